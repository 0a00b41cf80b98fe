r"""Kills programs at random moments, starts them again, and compares what comes out.

    python benchmarks/kill_programs.py --rounds=10

A tiny T5 is patched, compared by a pipeline, asked for outputs, and these are annotated: each
undisturbed at first, and then, in each round, stopped one to three times at any moment from start
to end and started again with the same command. Two in three stops are `kill -9`, the third is
SIGTERM. Then every file of records, the parameters of every model, and the numbers that were
written, but for times, must be those of the undisturbed run, bit by bit.

The exit status is 1 at the first difference, which is named, and its files are kept.
`kill_and_resume.py` does this to `train` alone, on several devices, with its metrics and memory.

Takes 10 minutes of two cores with `--rounds=10`, and about 2 GB (memory estimated).
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping

import kill_and_resume
import numpy as np

from tnt_jax import patch
from tnt_jax.checkpoints import orbax, pretrained
from tnt_jax.runtime import console

# Of what is written: where it lies, and what the clock says.
CHANGING = {"seconds", "train_seconds", "model", "loads", "report", "same_by_pipeline", "training"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, and how its results are read.

    Attributes:
      command: From the output's path to the arguments.
      results: From it to what must be the same, by name.
    """

    command: Callable[[pathlib.Path], list[str]]
    results: Callable[[pathlib.Path], Mapping[str, str]]


def programs(folder: pathlib.Path) -> dict[str, Program]:
    """All of them, in a folder that `kill_and_resume.write_world` has filled."""

    def flags(gin_files: list[str], settings: Mapping[str, object]) -> list[str]:
        files = [f"--gin_file={file}" for file in (folder / "model.gin", *gin_files)]
        return [*files, *(f"--gin.{name}={value}" for name, value in settings.items())]

    def of_patch(output: pathlib.Path) -> list[str]:
        given = {
            "model": folder / "original",
            "prompts": folder / "prompts.txt",
            "words": folder / "words.txt",
            "output": output,
            "cut": 0.9,
        }
        more = {"VOCABULARY_PATH": folder / "vocabulary.model", "EXTRA_IDS": 0}
        more |= {"LEARNING_RATE": 3e-3, "OPTIMIZER": "@optax.adam"}
        return patch.gin_arguments(
            [f"--{name}={value}" for name, value in given.items()]
            + [f"--gin.{name}={value}" for name, value in more.items()]
        )

    shared = {
        "VOCABULARY_PATH": folder / "vocabulary.model",
        "EXTRA_IDS": 0,
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 24},
        "BATCH_SIZE": 16,
    }
    of_pipeline = {
        "ORIGINAL_CHECKPOINT_PATH": folder / "original",
        "TRAIN_PROMPTS": folder / "records.jsonl",
        "EVAL_PROMPTS": folder / "records.jsonl",
        "ANNOTATOR": "@annotators.Lexicon",
        "annotators.Lexicon.path": folder / "words.txt",
        "ARMS": "[@tnrf/experiment.Arm(), @ul_ll/experiment.Arm()]",
        "MAX_LENGTH": 24,
        "OPTIMIZER": "@optax.adam",
        "LEARNING_RATE": 3e-3,
        "TRAIN_STEPS": 40,
    }
    of_generate = {"CHECKPOINT_PATH": folder / "original", "PROMPTS": folder / "records.jsonl"}
    of_annotate = {"RECORDS": folder / "records.jsonl", "LEXICON": folder / "words.txt"}
    return {
        "patch": Program(of_patch, results_of_folder),
        "pipeline": Program(
            lambda output: flags(
                ["runs/pipeline.gin"], {**shared, **of_pipeline, "OUTPUT_DIR": output}
            ),
            results_of_folder,
        ),
        "generate": Program(
            lambda output: flags(
                ["runs/generate.gin"],
                {**shared, **of_generate, "BATCH_SIZE": 4, "MAX_LENGTH": 24, "OUTPUT": output},
            ),
            results_of_file,
        ),
        "annotate": Program(
            lambda output: flags(
                ["runs/annotate_lexicon.gin"],
                {
                    **{name: shared[name] for name in ("VOCABULARY_PATH", "EXTRA_IDS")},
                    **of_annotate,
                    "OUTPUT": output,
                },
            )[1:],
            results_of_file,
        ),
    }


def results_of_file(output: pathlib.Path) -> dict[str, str]:
    """A digest of the file."""
    return {"output": hashlib.sha256(output.read_bytes()).hexdigest()}


def results_of_folder(output: pathlib.Path) -> dict[str, str]:
    """Digests of records, of parameters and of numbers, by their names in the folder."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if name.endswith((".annotated.jsonl", ".tokens.jsonl", ".merged.jsonl")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif name in ("patch.json", "summary.json"):
            numbers = json.loads(path.read_text("utf-8"))
            kept = {key: value for key, value in numbers.items() if key not in CHANGING}
            found[name] = json.dumps(kept, sort_keys=True).replace(str(output), "")
        elif name.endswith("/model") and path.is_dir():
            checkpoint = pretrained.find(str(path))
            found[name] = checkpoint.name
            for array_name, array in orbax.lazy_item(checkpoint / "params").items():
                content = np.asarray(array.load()).tobytes()
                found[f"{name}/{array_name}"] = hashlib.sha256(content).hexdigest()
    return found


def difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first name whose results differ, None if there is none."""
    names = sorted(expected.keys() | found.keys())
    return next((name for name in names if expected.get(name) != found.get(name)), None)


def check(name: str, program: Program, folder: pathlib.Path, rounds: int, seed: int) -> list[tuple]:
    """Rows of what was done to a program; exits at a difference."""
    runs, chance = kill_and_resume.Runs(folder, name), random.Random(seed)
    straight = folder / f"{name}-straight"
    runs.finish(program.command(straight), 1, straight.name)
    expected = program.results(straight)
    again = folder / f"{name}-again"  # with everything compiled: how long a run takes
    seconds = runs.finish(program.command(again), 1, again.name)
    if found := difference(expected, program.results(again)):
        sys.exit(f"{name}: two undisturbed runs differ in {found} ({folder})")
    rows = []
    for number in range(1, rounds + 1):
        output, moments = folder / f"{name}-{number}", []
        for _ in range(chance.randint(1, 3)):
            began = time.monotonic()
            process = runs.start(program.command(output), 1, output.name)
            process.join(chance.uniform(0, seconds))
            how = kill_and_resume.kill(process, output, chance)
            if how is not None:
                moments.append(f"{how} {time.monotonic() - began:.1f} s")
        runs.finish(program.command(output), 1, output.name)
        found = difference(expected, program.results(output))
        shown = "; ".join(moments) or "not: it was over"
        rows.append((name, number, shown, found or f"the same: {len(expected)} results"))
        console.log(" | ".join(map(str, rows[-1])))
        if found:
            sys.exit(f"{name} differs in {found}: see {straight} and {output}.")
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    return rows


def main() -> None:
    """All programs, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", default="patch,pipeline,generate,annotate")
    parser.add_argument("--rounds", type=int, default=10, help="of each program")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kill_programs"))
    kill_and_resume.write_world(folder)
    (folder / "words.txt").write_text("\n".join(kill_and_resume.UNWANTED) + "\n")
    sizes = kill_and_resume.STATES
    prompts = [f"{size} {name}" for size in sizes for name in kill_and_resume.NAMES]
    # In both orders, so that there are enough to keep some back.
    prompts += [" ".join(reversed(prompt.split())) for prompt in prompts]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    original = kill_and_resume.arguments(
        folder,
        ["objectives/fine_tune.gin"],
        INITIAL_CHECKPOINT_PATH=None,
        MODEL_DIR=folder / "original",
        LEARNING_RATE=1e-2,
        TRAIN_STEPS=80,
    )
    kill_and_resume.Runs(folder).finish(original, 1, "original")
    began, rows = time.monotonic(), []
    of_all = programs(folder)
    for name in flags.programs.split(","):
        rows += check(name, of_all[name], folder, flags.rounds, flags.seed)
    console.table(
        rows,
        columns=("program", "round", "stopped", "result"),
        title=f"{len(rows)} rounds without a difference, in {time.monotonic() - began:.0f} s",
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    main()
