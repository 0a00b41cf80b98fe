"""What a start of the programs imports: TensorFlow costs more than all else together."""

import json
import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).parents[1]

# One fresh interpreter does a small job on JSONL with every program, one after the other.
JOB = """
import json, pathlib, sys
from helpers import rooms

HEAVY = ("tensorflow", "tensorflow_datasets", "tensorflow_text", "keras", "seqio", "clu", "gguf")
found = {}

def note(name, status=0):
    assert status == 0, name
    found[name] = [module for module in HEAVY if module in sys.modules]

def run(name, gin_files=(), **settings):
    note(name, rooms.run(name, settings, gin_files))

rooms.write_world(pathlib.Path())
rooms.train_original("original", 60, LEARNING_RATE=1e-2)
run("generate", OUTPUT="original.jsonl", CHECKPOINT_PATH="original")
run("annotate", OUTPUT="original.annotated.jsonl", RECORDS="original.jsonl")
rooms.records.write_records("marked.jsonl", rooms.marked_corpus())
run("train", RECORDS="marked.jsonl", MODEL_DIR="patched", TRAIN_STEPS=2, SAMPLE_EVERY=2)
run(
    "evaluate",
    ORIGINAL_RECORDS="original.annotated.jsonl",
    CURRENT_RECORDS="original.annotated.jsonl",
    CHECKPOINT_PATH="patched",
    OUTPUT="evaluation.json",
)
run(
    "pipeline",
    ARMS="[@tnrf/experiment.Arm()]",
    TRAIN_STEPS=2,
    OUTPUT_DIR="pipeline",
)
from tnt_jax import convert, report

convert.convert(input="patched", output="out", output_format="t5x")
note("convert")
records = "original.annotated.jsonl"
report.report(output="report.html", original_records=records, current_records=records)
note("report")
print(json.dumps(found))
"""


def test_a_run_on_json_lines_imports_neither_tensorflow_nor_seqio(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", JOB],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    programs = ("generate", "annotate", "train", "evaluate", "report", "convert", "pipeline")
    assert found == {name: [] for name in programs}
