"""What the compiler for TPUs makes of a train step: it runs without a TPU, where libtpu is."""

import contextlib
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from helpers import rooms

from tnt_jax.runtime import program
from tnt_jax.training import compiled_step

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)
ROOT = pathlib.Path(__file__).parents[2]
GIB = 2**30
# As a user has it, who was told nothing but to install libtpu.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}

# Large enough for the compiler to care, and stacked, so that it compiles in a minute.
MODEL = """
include "models/t5_1_1_tiny.gin"
include "objectives/tnrf.gin"
include "runs/train.gin"

from __gin__ import dynamic_registration

from tnt_jax.models import t5

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
        env=ENVIRONMENT,
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
    versions = [importlib.metadata.version(name) for name in ("jax", "libtpu")]
    assert [report["jax"], report["libtpu"]] == versions
    assert "JAX {}, libtpu {}.".format(*versions) in printed
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
        assert completed.returncode == 3, completed.stderr
        assert "It does not fit: " in completed.stdout
        assert re.search(r"To make it fit, try .*ORIGINAL='cached'", completed.stdout)
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["fits"] is False


CHIPS = {  # topology: devices, and GiB of each
    "v4:2x2x1": (4, 32),
    "v5e:1x1": (1, 16),  # less than a host
    "v5e:1x2": (2, 16),
    "v5e:2x4": (8, 16),
    "v5p:2x2x1": (4, 95),
    "v6e:2x4": (8, 32),
    "tpu7x:2x2x1": (8, 96),
}


def run_python(code):
    completed = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout, completed.stderr


def test_the_memory_of_every_generation_is_known():
    printed, complaints = run_python(f"""
from tnt_jax import precompile
for topology in {list(CHIPS)}:
    devices = precompile.devices_of(topology)
    print(topology, len(devices), precompile._limit(devices[0]) // 2**30)
""")
    expected = [f"{name} {number} {gib}" for name, (number, gib) in CHIPS.items()]
    assert printed.split("\n")[:-1] == expected
    assert complaints == ""


def test_a_mesh_may_split_an_axis_of_the_torus():
    """A v6e of 4 x 4 has no axis of 8, and none of 2."""
    shapes = {"v6e:4x4": [(2, 8, 1), (8, 1, 2)], "v5p:4x4x4": [(2, 32, 1), (8, 1, 8)]}
    printed, _ = run_python(f"""
from tnt_jax import precompile
from tnt_jax.models import sharding
for topology, shapes in {shapes}.items():
    for data, fsdp, model in shapes:
        shape = sharding.MeshShape(data=data, fsdp=fsdp, model=model)
        mesh = sharding.make_mesh(shape, precompile.devices_of(topology))
        print(topology, *mesh.shape.values(), len(set(mesh.devices.flat)))
""")
    assert printed.split("\n")[:-1] == [
        f"{topology} {data} {fsdp} {model} {data * fsdp * model}"
        for topology, of in shapes.items()
        for data, fsdp, model in of
    ]


# Loads libtpu as any program with a TPU does; if another one has it already, all the better.
HOLD_LIBTPU = """
import sys
from jax.experimental import topologies
try:
    topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
finally:
    print("libtpu is taken", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def another_program_with_libtpu():
    names = ("ALLOW_MULTIPLE_LIBTPU_LOAD", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LIBTPU],
        env=environment | told,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "libtpu is taken\n"
        try:
            yield
        finally:
            holder.stdin.close()


def test_another_program_may_have_libtpu():
    with another_program_with_libtpu():
        printed, _ = run_python(
            "from tnt_jax import precompile; print(len(precompile.devices_of('v5e:2x4')))"
        )
    assert printed == "8\n"


def test_what_the_compiler_accepts_fits():
    """15 GiB in all: weights and gradient of 5 each, and of 640 layers what they are cast to and
    what they put out, 2.5 each. The compiler would refuse what needs more than a chip has.
    """
    printed, _ = run_python("""
import jax, json
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tnt_jax import precompile
from tnt_jax.training import compiled_step

devices = precompile.devices_of("v5e:2x4")
mesh = Mesh(np.array(devices), ("x",))
by_rows = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
weights = jax.ShapeDtypeStruct((640, 4096, 4096), jnp.float32, sharding=by_rows(None, "x"))
inputs = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=by_rows("x"))

def step(weights, inputs):
    def loss(weights):
        layer = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None))
        return jnp.sum(jax.lax.scan(layer, inputs, weights)[0] ** 2)

    gradient = jax.grad(loss)(weights)
    update = lambda i, w: w.at[i].add(-gradient[i] / jnp.sqrt(jnp.sum(gradient[i] ** 2)))
    return jax.lax.fori_loop(0, len(weights), update, weights)

lowered = jax.jit(step, donate_argnums=0, out_shardings=weights.sharding).lower(weights, inputs)
compiled, _, assigned = precompile._compile(lowered, "tpu")
kinds = {"weights": weights, "inputs": inputs}
print(json.dumps(compiled_step.memory(compiled, kinds, assigned)))
""")
    found = json.loads(printed)
    assert found["weights"] == 5 * GIB
    assert 15 * GIB < found["total"] < 15.75 * GIB


def test_a_report_that_is_not_understood_says_nothing():
    report = "Memory Space: default (color=0)\nTotal bytes: 411284480 (392.23MiB)\n"
    vmem = "Memory Space: vmem (color=1)\nTotal bytes: 1024 (1.0KiB)\n"
    assert compiled_step.assigned_bytes(vmem + report + vmem) == 411284480
    assert compiled_step.assigned_bytes(vmem) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, False),
        ({"dev/accel0": ""}, True),
        ({"dev/vfio/0": ""}, True),
        ({"dev/vfio/vfio": ""}, False),  # every machine that can hand a device on has it
        ({"pci/vendor": "0x1ae0\n", "pci/device": "0x0063\n"}, True),
        ({"pci/vendor": "0x1ae0\n", "pci/device": "0x9999\n"}, True),  # one to come
        ({"pci/vendor": "0x1ae0\n", "pci/device": "0x0042\n"}, False),  # a network card
        ({"pci/vendor": "0x8086\n", "pci/device": "0x0063\n"}, False),
    ],
)
def test_what_says_that_a_tpu_is_here(tmp_path, files, expected):
    for name, text in files.items():
        path = tmp_path / name.replace("pci/", "sys/bus/pci/devices/0000:00:04.0/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert program._has_tpu(tmp_path) is expected


needs_no_tpu = pytest.mark.skipif(program._has_tpu(), reason="a TPU is here")


@needs_no_tpu
def test_a_program_without_a_tpu_does_not_ask_libtpu_for_one(tmp_path):
    rooms.write_world(tmp_path)
    settings = {
        "RECORDS": "corpus.jsonl",
        "ANNOTATED": False,
        "INITIAL_CHECKPOINT_PATH": None,
        "TRAIN_STEPS": 1,
        "MODEL_DIR": "model",
    }
    arguments = rooms.arguments("train", settings, ["objectives/fine_tune.gin"])
    completed = subprocess.run(
        [sys.executable, "-m", "tnt_jax.train", *arguments],
        env=ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    lines = completed.stdout.splitlines()
    assert lines[0].startswith("Not packed: padding is ")
    assert "on 1 cpu device(s)" in lines[1]


CHOOSE = """
import os
from tnt_jax.runtime import program
program._keep_libtpu_quiet()
print(os.environ.get("JAX_PLATFORMS"))
"""
CHOSEN = """
import jax
print(jax.config.jax_platforms)
"""


@needs_no_tpu
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "cpu cpu"),
        ({"JAX_PLATFORMS": "tpu,cpu"}, "tpu,cpu tpu,cpu"),
        ({"TPU_LIBRARY_PATH": "/mine/libtpu.so"}, "None None"),
        ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, "None None"),
    ],
)
@pytest.mark.parametrize("is_imported", [True, False])
def test_who_has_chosen_where_to_compute_is_left_alone(settings, expected, is_imported):
    completed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import jax\n" * is_imported + CHOOSE + CHOSEN],
        env=ENVIRONMENT | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    assert completed.stdout.split() == expected.split()


@needs_no_tpu
def test_another_accelerator_is_left_alone(tmp_path):
    (tmp_path / "jax_plugins" / "mine").mkdir(parents=True)
    completed = subprocess.run(
        [sys.executable, "-c", CHOOSE],
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.stdout == "None\n", completed.stderr


def test_a_topology_that_is_not_known_is_refused(tmp_path):
    completed = precompile(tmp_path, "--topology=v9:2x2")
    assert completed.returncode == 2
    assert "--topology: expected local or a TPU such as v5e:2x4" in completed.stderr
    assert "found 'v9:2x2'" in completed.stderr


def test_a_run_s_own_gin_files_are_needed(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-m", "tnt_jax.precompile", "--topology=local"],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 2
    assert "expected the gin files of a train run" in completed.stderr


def test_help_has_the_exit_statuses(tmp_path):
    completed = subprocess.run(
        [sys.executable, "-m", "tnt_jax.precompile", "--help"],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0
    assert "Exit status: 0, it fits" in completed.stdout
    assert "3, it does not fit" in completed.stdout


def test_the_tests_have_the_libtpu_that_users_get():
    """JAX pins it in its extra `tpu`, which README says to install."""
    (pin,) = (
        line.partition(";")[0].strip().removeprefix("libtpu==")
        for line in importlib.metadata.requires("jax") or []
        if line.startswith("libtpu") and "tpu" in line.partition(";")[2]
    )
    installed = importlib.metadata.version("libtpu")
    assert fnmatch.fnmatchcase(installed, pin), "`make test` installs the one that JAX pins"
