"""Every test runs on eight simulated CPU devices, without network, with strict numerics."""

import collections
import gc
import os
import pathlib
import subprocess
import sys
import tempfile

# Before the first import of JAX or TensorFlow, and inherited by the programs that tests start.
os.environ.update(
    JAX_PLATFORMS="cpu",
    CUDA_VISIBLE_DEVICES="",  # TensorFlow would claim a GPU's whole memory
    TF_CPP_MIN_LOG_LEVEL="3",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    NO_GCE_CHECK="true",  # otherwise TFDS may wait for a cloud metadata server
)

# Compiling is most of the time of tests: little is optimised, and nothing is compiled twice, by
# whichever process. The first one makes the folder and pytest's workers inherit its name, also for
# temporary files, which they would leave behind. Two flags halve the time of a compilation with JAX
# 0.10. XLA ends a process that sets one that it no longer has, so each is tried first.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _folder = tempfile.TemporaryDirectory(prefix="tnt_jax_tests_")
    _try = [sys.executable, "-c", "from jaxlib import xla_client; xla_client.make_cpu_client()"]
    _flags = [
        flag
        for flag in (
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
        if not subprocess.run(
            _try, env={**os.environ, "XLA_FLAGS": flag}, capture_output=True
        ).returncode
    ]
    os.environ.update(
        TMPDIR=_folder.name,
        JAX_COMPILATION_CACHE_DIR=f"{_folder.name}/compiled",
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        JAX_DISABLE_MOST_OPTIMIZATIONS="true",
        XLA_FLAGS=" ".join([os.environ.get("XLA_FLAGS", ""), *_flags]),
    )

import hypothesis
import jax
import long_tests
import pytest

# In this process only: a program that a test starts sees one device unless the test says otherwise.
jax.config.update("jax_num_cpu_devices", 8)
# An implicit broadcast between ranks is a wrong axis more often than it is meant.
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a property compiles, so a deadline would measure the compiler. The examples
# are the same in every run: a red test can be run again.
hypothesis.settings.register_profile("tnt_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tnt_jax")

# Files that take longest, most of them over ten seconds of a core: `make check` leaves them to
# `make test`.
# They start several processes, compile for TPUs, train, or drive a browser.
SLOW_FILES = {
    *("test_sweep", "test_processes", "test_load_original", "test_main_job", "test_generate"),
    *("test_two_at_once", "test_scan_layers", "test_tpu_program", "test_damaged_models"),
    *("test_step_on_meshes", "test_resume", "test_formats", "test_fused", "test_localize"),
    *("test_output_parts", "test_fuzz", "test_paper_experiments", "test_watching", "test_tpu_vm"),
    *("test_t5", "test_mistakes", "test_train_step", "test_parity", "test_trained_layers"),
    *("test_tutorial", "test_packing", "test_prefix_values", "test_strengths", "test_definition"),
    *("test_decoding", "test_removed_everywhere", "test_look_ahead", "test_t5x", "test_benchmarks"),
    *("test_gguf", "test_report_browser", "test_start", "test_t5x_plugin", "test_opened_once"),
    *("test_peft", "test_causal_lm", "test_causal_lm_parity", "test_chat_main_job"),
    *("test_damaged_causal_lm", "test_attention", "test_smollm2", "test_patch"),
    *("test_negative_sets", "test_preemption"),
}


# What hangs most on JAX itself: of the slow files, those that .ci/run runs on every Python.
EVERY_PYTHON = {"test_train_step", "test_main_job", "test_processes"}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="what long_tests.py leaves out too")


def pytest_collection_modifyitems(config, items):
    """Marks the tests of slow files, and leaves out long cases, but of files that are named."""
    named = {pathlib.Path(name.partition("::")[0]).stem for name in config.args}
    kept, left_out = [], []
    for item in items:
        file = item.path.stem
        if file in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
        if file in EVERY_PYTHON:
            item.add_marker(pytest.mark.every_python)
        is_wanted = config.getoption("--all") or file in named
        is_long = long_tests.is_left_out(file, item.originalname, case_of(item))
        (left_out if is_long and not is_wanted else kept).append(item)
    # Of files that are collected in part, by a name or by --last-failed, nobody can say what lacks.
    is_in_part = any("::" in name for name in config.args) or config.getoption("lf", False)
    if not is_in_part:
        check_that_long_tests_are_there(items)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def case_of(item):
    return item.callspec.id if hasattr(item, "callspec") else ""


def check_that_long_tests_are_there(items):
    """A test that was renamed would run in full again, and nobody would see why."""
    cases = collections.defaultdict(set)
    for item in items:
        cases[item.path.stem, item.originalname].add(case_of(item))
    files = {file for file, _ in cases}
    for file, tests in long_tests.KEPT.items():
        for test, kept in tests.items():
            if file in files and not (cases[file, test] and kept <= cases[file, test]):
                missing = sorted(kept - cases[file, test])
                raise pytest.UsageError(f"long_tests.py: no {file}.py::{test}, or not of {missing}")


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_kept():
    """What a file has compiled, the next one has no use for: it is half of a worker's memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimised():
    """Compiles to quick code, for what computes longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def old_objects_left_out():
    """Looking through all that a worker has made so far would take half a second, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def reads_left_alone(old_objects_left_out):
    """For tests of damaged checkpoints: Orbax gathers its reads, and leaves the others where one
    fails. Python finds them whenever it looks; here it looks before the test is over.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The optional folder of outside data, with golden/ and data/ (see tests/golden/README.md)."""
    folder = os.environ.get("TNT_JAX_SHARED")
    if not folder:
        pytest.skip("needs outside data: set TNT_JAX_SHARED to a folder with golden/ and data/")
    return pathlib.Path(folder)
