"""What the compiler for TPUs makes of a train step: it runs without a TPU, where libtpu is."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)

# Large enough for the compiler to care, and stacked, so that it compiles in a minute.
MODEL = """
include "models/t5_1_1_tiny.gin"
include "objectives/tnrf.gin"
include "runs/train.gin"

from __gin__ import dynamic_registration

from tnt_jax import t5

VOCAB_SIZE = 512
DTYPE = "bfloat16"
SCAN_LAYERS = True
REMAT_POLICY = "full"
FSDP_DEVICES = 8
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {"inputs": 128, "targets": 128}

t5.T5Config:
  emb_dim = 1024
  num_heads = 16
  num_encoder_layers = 6
  num_decoder_layers = 6
  head_dim = 64
  mlp_dim = 2048
"""


def precompile(folder, *arguments):
    (folder / "run.gin").write_text(MODEL)
    return subprocess.run(
        [
            *(sys.executable, "-m", "tnt_jax.precompile"),
            *("--gin_file=run.gin", "--gin.precompile.precompile.output=report.json", *arguments),
        ],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What precompile prints and writes, and the program itself."""
    folder = tmp_path_factory.mktemp("tpu")
    program = folder / "program.txt"
    completed = precompile(
        folder,
        "--topology=v5e:2x4",
        f"--gin.precompile.precompile.program_text={program}",
    )
    assert completed.returncode == 0, completed.stderr
    report = json.loads((folder / "report.json").read_text())
    return completed.stdout, report, program.read_text()


def test_it_says_what_a_chip_holds(compiled):
    printed, report, _ = compiled
    assert report["fits"] is True
    assert "of 16 GiB" in printed
    assert report["device"] == "TPU v5 lite"
    parts = report["bytes"]
    # Kernels, embedding and output matrix in eighths; norms and the position biases whole.
    kernels = 6 * (4 * 1024 * 1024 + 3 * 1024 * 2048) + 6 * (8 * 1024 * 1024 + 3 * 1024 * 2048)
    tables = 2 * 512 * 1024
    whole = 1024 * (6 * 2 + 6 * 3 + 2) + 2 * 16 * 32
    assert parts["parameters"] == 4 * ((kernels + tables) // 8 + whole)
    # The original's are in bfloat16 where they are computed in it: all but the output matrix.
    assert parts["original"] == (2 * kernels + 2 * tables // 2 + 4 * tables // 2) // 8 + 4 * whole
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")


def test_weights_are_cast_and_gathered_one_layer_at_a_time(compiled):
    program = compiled[2]
    gathered = set(re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", program))
    weights = {name for name in gathered if re.search(r"\[(1,)?(1024|2048),(1024|2048)\]", name)}
    assert {"bf16[1,1024,1024]", "bf16[1,1024,2048]", "bf16[1,2048,1024]"} <= weights
    assert all(name.startswith("bf16") for name in weights)
    # No stack of all six layers is cast before the loop: a device has an eighth of it.
    stacks = re.findall(r"(\w+)\[6,(?:128,1024|1024,128|128,2048|2048,128)\]", program)
    assert "f32" in stacks
    # The original's kernels are kept in bfloat16.
    arguments = program.partition("ENTRY")[2]
    stored = re.findall(r"bf16\[6,[\d,]+\]\S* parameter\(", arguments)
    assert len(stored) == 4 + 3 + 8 + 3


def test_no_device_adds_up_the_whole_gradient_of_a_kernel(compiled):
    """Here tokens travel: a device computes its part of a kernel's gradient for all rows."""
    collectives = compiled[1]["collectives"]
    for each in collectives:
        if each["operation"] in ("all-reduce", "reduce-scatter"):
            assert each["num_bytes"] < 1024 * 1024 * 4 / 8, each
    # Each layer's weights travel in its turn of the loop.
    assert {each["times"] for each in collectives if each["operation"] == "all-gather"} >= {6}


def test_what_does_not_fit_is_said_with_what_would_help(tmp_path):
    """Whatever words the compiler has for it: activations, then parameters, that are too large."""
    for settings in (
        {"BATCH_SIZE": 512, "REMAT_POLICY": "none"},
        {"VOCAB_SIZE": 4_000_000, "BATCH_SIZE": 1},
    ):
        completed = precompile(
            tmp_path,
            "--topology=v5e:1x1",
            "--gin.FSDP_DEVICES=1",
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 1024, 'targets': 512}",
            *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        )
        assert completed.returncode == 0, completed.stderr
        assert "It does not fit: " in completed.stdout
        assert re.search(r"To make it fit, try .*ORIGINAL='cached'", completed.stdout)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["fits"] is False


CHIPS = {  # topology: devices, and GiB of each
    "v4:2x2x1": (4, 32),
    "v5e:2x4": (8, 16),
    "v5p:2x2x1": (4, 95),
    "v6e:2x4": (8, 32),
    "tpu7x:2x2x1": (8, 96),
}


def test_the_memory_of_every_generation_is_known():
    code = f"""
from tnt_jax import precompile
for topology in {list(CHIPS)}:
    devices = precompile.devices_of(topology)
    print(topology, len(devices), precompile._limit(devices[0]) // 2**30)
"""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert completed.returncode == 0, completed.stderr
    expected = [f"{name} {number} {gib}" for name, (number, gib) in CHIPS.items()]
    assert completed.stdout.split("\n")[:-1] == expected


def test_a_topology_that_is_not_known_is_refused(tmp_path):
    completed = precompile(tmp_path, "--topology=v9:2x2")
    assert completed.returncode == 2
    assert "--topology: expected local or a TPU such as v5e:2x4" in completed.stderr
    assert "found 'v9:2x2'" in completed.stderr


def test_a_run_s_own_gin_files_are_needed(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-m", "tnt_jax.precompile", "--topology=local"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 2
    assert "expected the gin files of a train run" in completed.stderr
