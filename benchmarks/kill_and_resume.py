r"""Kills training at random moments, starts it again, and compares what comes out bit by bit.

    python benchmarks/kill_and_resume.py --rounds=20

A tiny T5 is trained with TNRF on made-up records, packed, with dropout, in microbatches, with an
evaluation and a checkpoint every few updates, on 1, 2 and 8 simulated CPU devices: undisturbed at
first, and then, in each round, killed one to three times and started again with the same command.
Half of the kills come at any time, from start to end; half of them just after a checkpoint has
begun to be written. Two in three are `kill -9`; the third is SIGTERM, at which a run saves and ends
with status 75. Then parameters, optimizer state, what the checkpoint says of the run (the
original's digest and its log-probabilities among it) and every line of `metrics.jsonl` and
`events.jsonl`, but for times, must be those of the undisturbed run, bit by bit.

After that, one run of `--memory_steps` updates, whose resident memory must not grow.

The exit status is 1 at the first difference, which is named, and its files are kept.

Takes about 2 hours of two cores and 2 GB of memory with `--rounds=20` (estimated, not measured).
"""

import argparse
import collections
import ctypes
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from tnt_jax.checkpoints import checkpoint_kinds, orbax
from tnt_jax.data import records
from tnt_jax.runtime import console, program
from tnt_jax.tokenizers import tokenization

NAMES = (
    *("acorn", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel"),
    *("iris", "jade", "kiwi", "lotus", "maple", "nutmeg", "olive"),
)
STATES = {"small": "dirty", "large": "clean", "old": "noisy", "new": "quiet"}
UNWANTED = ("dirty", "noisy")
VOCAB_SIZE = 38
MODEL = f"""
include "models/t5_1_1_tiny.gin"

from tnt_jax.models import t5

VOCAB_SIZE = {VOCAB_SIZE}
t5.T5Config.num_encoder_layers = 1
t5.T5Config.num_decoder_layers = 1
"""
EVALUATION = """
from __gin__ import dynamic_registration

from tnt_jax.data import datasets
from tnt_jax import train

train.train.eval_dataset = @evaluation/datasets.RecordFiles()
evaluation/datasets.RecordFiles.files = %RECORDS
"""
# What is simulated: devices -> how they are used.
MESHES = {
    1: {},
    2: {"FSDP_DEVICES": 2},
    8: {"FSDP_DEVICES": 2, "MODEL_DEVICES": 2},
}
# Of metrics.jsonl: what the clock says.
TIMES = {"tokens_per_second", "input_wait_fraction"}


# ---------------------------------------------------------------------------------------- The runs


def write_world(folder: pathlib.Path) -> None:
    """Writes records, a vocabulary and the gin files of the runs."""
    rows = []
    for name in NAMES:
        for size, state in STATES.items():
            targets = f"the {name} room is {size} and {state}."
            start = targets.index(state)
            spans = ((start, start + len(state)),) if state in UNWANTED else ()
            key = f"{size} {name}"
            rows.append(
                records.Record(
                    id=key, inputs=key, targets=targets, negative_spans=spans, annotator="list"
                )
            )
    records.write_records(folder / "records.jsonl", rows)
    words = {word.strip(".") for row in rows for word in row.targets.split()} - {*UNWANTED}
    tokenization.train_sentencepiece(
        [text for row in rows for text in (row.inputs, row.targets)],
        folder / "vocabulary.model",
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=[f"\u2581{word}" for word in sorted(words)],
    )
    (folder / "model.gin").write_text(MODEL)
    (folder / "evaluation.gin").write_text(EVALUATION)


def arguments(folder: pathlib.Path, gin_files: list[str], **settings: object) -> list[str]:
    """The command line of a training run."""
    settings = {
        "RECORDS": folder / "records.jsonl",
        "VOCABULARY_PATH": folder / "vocabulary.model",
        "EXTRA_IDS": 0,
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 24},
        "BATCH_SIZE": 16,
        "OPTIMIZER": "@optax.adam",
        "LEARNING_RATE": 3e-3,
        **settings,
    }
    return [
        f"--gin_file={folder / 'model.gin'}",
        *(f"--gin_file={file}" for file in gin_files),
        "--gin_file=runs/train.gin",
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


def run(
    name: str,
    command: list[str],
    num_devices: int,
    output: multiprocessing.connection.Connection,
    cache: pathlib.Path,
) -> None:
    """`python -m tnt_jax.<name>` in a process that has imported what it needs.

    Root without its capabilities: read-only files and folders are so for this process, too.
    """
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    output.close()
    # The server's own may have been files, which have a position.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    obey_permissions()
    import jax

    jax.config.update("jax_num_cpu_devices", num_devices)
    # Compiling is most of the time of a tiny run, and no part of what is looked at.
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    module = importlib.import_module(f"tnt_jax.{name}")
    # Flags that are no settings of gin become such.
    command = module.gin_arguments(command) if hasattr(module, "gin_arguments") else command
    program.run(f"tnt_jax.{name}", name, command)


def obey_permissions() -> None:
    """Gives up what lets root pass over the permissions of files (Linux: capabilities)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() != 0 or not hasattr(libc, "capset"):
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call; this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: 32 bits, and 32 more
    if libc.capget(header, sets) == 0:
        for index in range(3):
            sets[index] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.capset(header, sets)


class Runs:
    """Starts runs, each in a process of its own."""

    def __init__(self, folder: pathlib.Path, programs: tuple[str, ...] = ("train",)):
        self._folder = folder
        self._readers: dict[str, list[threading.Thread]] = collections.defaultdict(list)
        # A server that has imported the packages forks: a run starts at once.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            [*(f"tnt_jax.{name}" for name in programs), "tnt_jax.data.datasets", "orbax.checkpoint"]
        )

    def start(
        self, command: list[str], num_devices: int, name: str, program: str = "train"
    ) -> multiprocessing.Process:
        """Starts a run, whose output goes to `<name>.log`."""
        # Through a pipe: the limits of what a run may write do not hold for what it says.
        reads, writes = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=run,
            args=(program, command, num_devices, writes, self._folder / "compiled"),
        )
        process.start()
        writes.close()
        reader = threading.Thread(target=copy_to_end, args=(reads, self._log(name)), daemon=True)
        reader.start()
        self._readers[name].append(reader)
        return process

    def _log(self, name: str) -> pathlib.Path:
        return self._folder / f"{name}.log"

    def said(self, name: str) -> str:
        """All that the ended runs of this name have printed."""
        for reader in self._readers.pop(name, []):
            reader.join()
        return self._log(name).read_text("utf-8", "replace")

    def finish(
        self, command: list[str], num_devices: int, name: str, program: str = "train"
    ) -> float:
        """Runs to the end; returns how many seconds it took."""
        began = time.monotonic()
        process = self.start(command, num_devices, name, program)
        process.join()
        if process.exitcode != 0:
            text = self.said(name)
            sys.exit(f"{name}: a run ended with {process.exitcode}:\n{text[-3000:]}")
        return time.monotonic() - began


def copy_to_end(reads: multiprocessing.connection.Connection, log: pathlib.Path) -> None:
    """Appends what comes from a pipe to a file."""
    with reads, log.open("ab", buffering=0) as file:
        while content := os.read(reads.fileno(), 2**16):
            file.write(content)


# --------------------------------------------------------------------------------------- Killing


def kill(
    process: multiprocessing.Process, output: pathlib.Path, chance: random.Random
) -> str | None:
    """Kills a run, or tells it to stop; returns which, None if it was over before."""
    if not process.is_alive():
        process.join()
        return None
    number = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    os.kill(process.pid, number)
    process.join()
    # 0: too late. -SIGTERM: before the program had begun.
    if number == signal.SIGTERM and process.exitcode not in (75, 0, -signal.SIGTERM):
        sys.exit(f"told to stop, a run ended with {process.exitcode}: {output}")
    return "told at" if number == signal.SIGTERM else "killed at"


def kill_somewhere(
    process: multiprocessing.Process, model_dir: pathlib.Path, seconds: float, chance: random.Random
) -> str:
    """Kills a run at a random moment; returns when that was, "" if it was over before."""
    if chance.random() < 0.5:
        process.join(chance.uniform(0, seconds))
    else:
        # The n-th checkpoint that it begins to write.
        awaited, seen = chance.randint(1, 3), set()
        while process.is_alive() and len(seen) < awaited:
            seen |= {path.name for path in model_dir.glob("checkpoint_*tmp*")}
            time.sleep(0.001)
        process.join(chance.uniform(0, 0.05))
    how = kill(process, model_dir, chance)
    if how is None:
        return ""
    newest = max((step for step, _ in whole_checkpoints(model_dir)), default=0)
    half = len(list(model_dir.glob("checkpoint_*tmp*")))
    steps = [line["step"] for line in lines_of(model_dir / "metrics.jsonl")]
    written = f", {half} half-written" if half else ""
    return f"{how} update {max(steps, default=0)} (checkpoint {newest}{written})"


def whole_checkpoints(model_dir: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """The checkpoints of a directory, with their steps."""
    found = []
    for path in model_dir.glob("checkpoint_*"):
        step = path.name.removeprefix("checkpoint_")
        if step.isdigit():
            found.append((int(step), path))
    return sorted(found)


def lines_of(path: pathlib.Path) -> list[dict[str, object]]:
    """The whole lines of a JSONL file."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


# ------------------------------------------------------------------------------------- Comparing


def difference(expected: pathlib.Path, found: pathlib.Path) -> str | None:
    """What differs between the results of two runs, None if nothing does."""
    for name in ("metrics.jsonl", "events.jsonl"):
        rows = [
            [{key: row[key] for key in row if key not in TIMES} for row in lines_of(folder / name)]
            for folder in (expected, found)
        ]
        for number, (row, other) in enumerate(zip(*rows, strict=False), start=1):
            if row != other:
                return f"{name}, line {number}: expected {row}, found {other}"
        if len(rows[0]) != len(rows[1]):
            return f"{name}: expected {len(rows[0])} lines, found {len(rows[1])}"
    newest = [checkpoint_kinds.find(str(folder)) for folder in (expected, found)]
    if newest[0].name != newest[1].name:
        return f"the newest checkpoint: expected {newest[0].name}, found {newest[1].name}"
    for item in ("params", "optimizer"):
        arrays, others = (orbax.lazy_item(folder / item) for folder in newest)
        if arrays.keys() != others.keys():
            return f"{item}: expected other names than {sorted(arrays.keys() ^ others.keys())}"
        for name, array in arrays.items():
            one, other = np.asarray(array.load()), np.asarray(others[name].load())
            if one.dtype != other.dtype or one.shape != other.shape:
                return f"{item}/{name}: expected {one.dtype}{one.shape}, found another"
            if one.tobytes() != other.tobytes():
                gap = np.abs(np.float64(one) - np.float64(other))
                count = np.count_nonzero(gap)
                return f"{item}/{name}: {count} of {one.size} differ, by {gap.max():.3g} at most"
    runs = [orbax.read_run(folder) or {} for folder in newest]
    for key in runs[0].keys() | runs[1].keys():
        if key != "config" and runs[0].get(key) != runs[1].get(key):  # which names the model_dir
            return f"run/{key}: expected {runs[0].get(key)}, found {runs[1].get(key)}"
    return None


# ------------------------------------------------------------------------------------------ Memory


def resident_bytes(pid: int) -> int:
    """The resident memory of a process, as Linux reports it."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_over(process: multiprocessing.Process, metrics: pathlib.Path) -> list[tuple[int, int]]:
    """Resident bytes of a run and the updates that it had done, again and again to its end."""
    found, last = [], 0
    while process.is_alive():
        process.join(0.2)
        steps = [line["step"] for line in lines_of(metrics)]
        try:
            resident = resident_bytes(process.pid)
        except (OSError, IndexError, ValueError):  # it has just ended
            break
        if steps and steps[-1] > last and resident:
            last = steps[-1]
            found.append((last, resident))
    process.join()
    return found


def growth(samples: list[tuple[int, int]], num_steps: int) -> tuple[float, float]:
    """Mean MiB of the second fifth of a run and of the last: at first, memory fills up."""

    def mean(start, end):
        of = [size for step, size in samples if start <= step / num_steps <= end]
        return float(np.mean(of)) / 2**20 if of else float("nan")

    return mean(0.2, 0.4), mean(0.8, 1.0)


# -------------------------------------------------------------------------------------------- Main


def main(argv: list[str] | None = None) -> None:
    """The whole loop, as at the head of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="on each number of devices")
    parser.add_argument("--devices", type=int, nargs="+", default=list(MESHES), choices=MESHES)
    parser.add_argument("--steps", type=int, default=24, help="updates of a run")
    parser.add_argument("--checkpoint_every", type=int, default=3)
    parser.add_argument("--original", default="parameters", help="as the setting ORIGINAL")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--memory_steps", type=int, default=5000, help="0: memory is not looked at")
    parser.add_argument("--folder", type=pathlib.Path, help="for the files; kept")
    flags = parser.parse_args(argv)
    folder = flags.folder or pathlib.Path(tempfile.mkdtemp(prefix="kill_and_resume"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_world(folder)
    runs = Runs(folder)
    original = arguments(
        folder,
        ["objectives/fine_tune.gin"],
        INITIAL_CHECKPOINT_PATH=None,
        MODEL_DIR=folder / "original",
        LEARNING_RATE=1e-2,
        TRAIN_STEPS=40,
    )
    runs.finish(original, 1, "original")

    def command(model_dir: pathlib.Path, num_devices: int, **settings: object) -> list[str]:
        settings = {
            "INITIAL_CHECKPOINT_PATH": folder / "original",
            "MODEL_DIR": model_dir,
            "ORIGINAL": flags.original,
            "DROPOUT_RATE": 0.1,
            "NUM_MICROBATCHES": 2,
            "PACK": True,
            "TRAIN_STEPS": flags.steps,
            "CHECKPOINT_EVERY": flags.checkpoint_every,
            "LOG_EVERY": 2,  # not always where a checkpoint is
            "KEEP_BEST": "loss",
            "EVAL_EVERY": flags.checkpoint_every,
            **MESHES[num_devices],
            **settings,
        }
        if flags.original == "cached":
            settings["STATES_DIR"] = model_dir / "states"
        return arguments(
            folder, ["objectives/tnrf.gin", str(folder / "evaluation.gin")], **settings
        )

    chance = random.Random(flags.seed)
    rows = []
    columns = ("devices", "round", "stopped", "result")
    began = time.monotonic()
    for num_devices in flags.devices:
        straight = folder / f"straight_{num_devices}"
        runs.finish(command(straight, num_devices), num_devices, straight.name)
        again = folder / f"again_{num_devices}"  # with everything compiled: how long a run takes
        seconds = runs.finish(command(again, num_devices), num_devices, again.name)
        if found := difference(straight, again):
            sys.exit(f"{num_devices} devices: two undisturbed runs differ: {found} ({folder})")
        for number in range(1, flags.rounds + 1):
            model_dir = folder / f"killed_{num_devices}_{number}"
            moments = []
            for _ in range(chance.randint(1, 3)):
                process = runs.start(command(model_dir, num_devices), num_devices, model_dir.name)
                moments.append(kill_somewhere(process, model_dir, seconds, chance))
            runs.finish(command(model_dir, num_devices), num_devices, model_dir.name)
            found = difference(straight, model_dir)
            shown = "; ".join(filter(None, moments)) or "not: it was over"
            rows.append((num_devices, number, shown, found or "the same, bit by bit"))
            console.log(" | ".join(map(str, rows[-1])))
            if found:
                console.table(rows, columns=columns)
                sys.exit(f"diverged: {found}\nThe runs are {straight} and {model_dir}.")
            shutil.rmtree(model_dir)
    title = (
        f"{len(rows)} rounds of {flags.steps} updates, ORIGINAL={flags.original}, without a "
        f"difference, in {time.monotonic() - began:.0f} s"
    )
    console.table(rows, columns=columns, title=title)
    if flags.memory_steps:
        check_memory(runs, command, folder, flags.memory_steps)
    if flags.folder is None:
        shutil.rmtree(folder)


def check_memory(runs: Runs, command, folder: pathlib.Path, num_steps: int) -> None:
    """Exits with 1 where a long run's memory grows."""
    if not pathlib.Path("/proc/self/statm").exists():
        console.log("Memory is not looked at: this system has no /proc.")
        return
    model_dir = folder / "memory"
    settings = {
        "TRAIN_STEPS": num_steps,
        "CHECKPOINT_EVERY": max(num_steps // 20, 1),
        "LOG_EVERY": max(num_steps // 100, 1),
        "EVAL_EVERY": max(num_steps // 20, 1),
    }
    process = runs.start(command(model_dir, 1, **settings), 1, "memory")
    samples = memory_over(process, model_dir / "metrics.jsonl")
    if process.exitcode != 0:
        sys.exit(f"memory: the run ended with {process.exitcode}: see {folder / 'memory.log'}")
    early, late = growth(samples, num_steps)
    rows = [(f"{num_steps // 5} to {2 * num_steps // 5}", early)]
    rows.append((f"{4 * num_steps // 5} to {num_steps}", late))
    console.table(rows, columns=("updates", "resident MiB, mean"))
    if not late <= early * 1.02 + 8:
        sys.exit(f"memory grows: from {early:.1f} to {late:.1f} MiB ({folder})")
    console.log(f"Resident memory is flat over {num_steps} updates.")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    main()
