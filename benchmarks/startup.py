r"""Processor seconds that a start takes: `--help`, and a tiny job up to its end, of every program.

    git worktree add ../before 69d3de9
    python benchmarks/startup.py --before=../before

The jobs work on sixteen records and a model of two layers: one update of `train`, outputs for the
records, their marks, an evaluation, a report, a conversion. Each is a process of its own, at the
other checkout and here in turn, with one compile cache for each, so that a second `--rounds` reads
what the first has compiled. Columns: seconds of user and system time at the other checkout and
here, the least of all rounds, and their ratio.

Takes about 12 minutes of two cores with `--rounds=2` and 3 GB of memory (estimated, not measured).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import report

from tnt_jax.tokenizers import tokenization

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = (
    *("train", "generate", "annotate", "localize", "evaluate", "report", "convert"),
    *("precompile", "pipeline", "sweep"),
)
SIZES = {"small": "dirty", "large": "clean", "old": "noisy", "new": "quiet"}
VOCABULARY = {"VOCABULARY_PATH": "vocabulary.model", "EXTRA_IDS": 0}
MODEL = "models/t5_1_1_tiny.gin"
LENGTHS = {"TASK_FEATURE_LENGTHS": '{"inputs": 8, "targets": 48}', "BATCH_SIZE": 8}
NETWORK = VOCABULARY | LENGTHS


def write_world(folder):
    """Writes annotated records, a list of words and a vocabulary."""
    texts = [
        (f"{size} {name}", f"the {name} room is {size} and {state}.")
        for name in ("acorn", "birch", "cedar", "daisy")
        for size, state in SIZES.items()
    ]
    rows = [
        {
            "id": inputs,
            "inputs": inputs,
            "targets": targets,
            "negative_spans": [[m, m + 5] for m in [targets.find("dirty")] if m >= 0],
        }
        for inputs, targets in texts
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "records.jsonl").write_text(lines)
    (folder / "words.txt").write_text("dirty\nnoisy\n")
    tokenization.train_sentencepiece(
        [text for pair in texts for text in pair], folder / "vocabulary.model", vocab_size=32
    )


def jobs():
    """Program, gin files and settings of every job, each of which may read what came before."""
    network = NETWORK | {"VOCAB_SIZE": 32}
    train = network | {"RECORDS": "records.jsonl", "TRAIN_STEPS": 1, "MODEL_DIR": "model"}
    yield (
        "train",
        [MODEL, "objectives/tnrf.gin", "runs/train.gin"],
        train | {"INITIAL_CHECKPOINT_PATH": None},
    )
    yield (
        "generate",
        [MODEL, "runs/generate.gin"],
        network
        | {"PROMPTS": "records.jsonl", "CHECKPOINT_PATH": "model", "OUTPUT": "outputs.jsonl"}
        | {"MAX_LENGTH": 8},
    )
    yield (
        "annotate",
        ["runs/annotate_lexicon.gin"],
        VOCABULARY | {"LEXICON": "words.txt", "RECORDS": "outputs.jsonl", "OUTPUT": "marked.jsonl"},
    )
    yield (
        "evaluate",
        [MODEL, "runs/evaluate.gin"],
        network
        | {"ORIGINAL_RECORDS": "records.jsonl", "CURRENT_RECORDS": "records.jsonl"}
        | {"ORIGINAL_CHECKPOINT_PATH": "model", "CHECKPOINT_PATH": "model"}
        | {"OUTPUT": "evaluation.json"},
    )
    yield (
        "report",
        ["runs/report.gin"],
        {"ORIGINAL_RECORDS": "records.jsonl", "CURRENT_RECORDS": "records.jsonl"}
        | {"OUTPUT": "report.html"},
    )
    yield "convert", [], {"input": "model", "output": "out", "output_format": "t5x"}


def seconds(checkout, folder, program, arguments):
    """User and system time of a program at a checkout."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-m", f"tnt_jax.{program}", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {program}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def rows(checkouts, scratch, rounds):
    """A row for every program: `--help` first, then the jobs."""

    def measured(name, program, arguments):
        found = {checkout: [] for checkout in checkouts}
        for number in range(rounds):
            for checkout, times in found.items():
                folder = scratch / str(checkouts.index(checkout)) / str(number)
                times.append(seconds(checkout, folder, program, arguments))
        before, now = (min(times) for times in found.values())
        return name, before, now, now / before

    for program in PROGRAMS:
        yield measured(f"{program} --help", program, ["--help"])
    for program, files, settings in jobs():
        prefix = "--gin." if files else "--"
        arguments = [
            *(f"--gin_file={file}" for file in files),
            *(f"{prefix}{name}={value}" for name, value in settings.items()),
        ]
        yield measured(program, program, arguments)


def main():
    """Makes a folder for each checkout and round, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True, type=pathlib.Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=2)
    flags = parser.parse_args()
    report.heading()
    with tempfile.TemporaryDirectory() as scratch:
        for checkout in ("0", "1"):
            pathlib.Path(scratch, checkout, "cache").mkdir(parents=True)
            for number in range(flags.rounds):
                folder = pathlib.Path(scratch, checkout, str(number))
                folder.mkdir(parents=True)
                (folder / "cache").symlink_to(pathlib.Path(scratch, checkout, "cache"))
                write_world(folder)
        checkouts = [flags.before.resolve(), ROOT]
        report.table(
            ("start", "before, s", "now, s", "ratio"),
            rows(checkouts, pathlib.Path(scratch), flags.rounds),
        )


if __name__ == "__main__":
    main()
