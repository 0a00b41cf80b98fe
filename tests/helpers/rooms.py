"""A little world for tests of programs: sixty rooms, a vocabulary, a model and a list of words.

    inputs "small acorn"    targets "the acorn room is small and dirty."

The size of a room decides whether it is dirty, clean, noisy or quiet. "dirty" and "noisy" are the
unwanted words; each is spelt in several tokens, every other word is one token.
"""

import contextlib
import dataclasses
import itertools
import re

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.extend import backend

from tnt_jax import convert
from tnt_jax.checkpoints import checkpoint_kinds
from tnt_jax.data import records
from tnt_jax.runtime import program
from tnt_jax.tokenizers import tokenization

NAMES = (
    *("acorn", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel"),
    *("iris", "jade", "kiwi", "lotus", "maple", "nutmeg", "olive"),
)
STATES = {"small": "dirty", "large": "clean", "old": "noisy", "new": "quiet"}
UNWANTED = re.compile(r"\b(dirty|noisy)\b")
VOCAB_SIZE = 38

# The smallest T5 that learns this, over the project's own tiny one.
MODEL = f"""
include "models/t5_1_1_tiny.gin"

from tnt_jax.models import t5

VOCAB_SIZE = {VOCAB_SIZE}
t5.T5Config.num_encoder_layers = 1
t5.T5Config.num_decoder_layers = 1
"""


def corpus():
    return [
        records.Record(
            id=f"{size} {name}",
            inputs=f"{size} {name}",
            targets=f"the {name} room is {size} and {state}.",
            extra={"name": name},
        )
        for name, (size, state) in itertools.product(NAMES, STATES.items())
    ]


def turned(row):
    """A room asked for in the other order: "acorn small"."""
    inputs = " ".join(reversed(row.inputs.split()))
    return dataclasses.replace(row, id=f"{row.id} turned", inputs=inputs)


def marked_corpus():
    """The rooms, with the unwanted words marked."""
    return [
        dataclasses.replace(
            row, negative_spans=tuple(m.span() for m in UNWANTED.finditer(row.targets))
        )
        for row in corpus()
    ]


def write_world(folder):
    """Writes corpus.jsonl, words.txt, vocabulary.model and tiny.gin."""
    rows = corpus()
    words = {word.strip(".") for row in rows for word in row.targets.split()} - {"dirty", "noisy"}
    records.write_records(folder / "corpus.jsonl", rows)
    tokenization.train_sentencepiece(
        [text for row in rows for text in (row.inputs, row.targets)],
        folder / "vocabulary.model",
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=[f"\u2581{word}" for word in sorted(words)],
    )
    (folder / "words.txt").write_text("# unwanted\ndirty\nnoisy\n")
    (folder / "tiny.gin").write_text(MODEL)


# The gin files and settings of every kind of run, seen from the folder that holds the world.
VOCABULARY = {"VOCABULARY_PATH": "vocabulary.model", "EXTRA_IDS": 0}
LENGTHS = {"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 16}}
UPDATES = {"BATCH_SIZE": 16, "OPTIMIZER": "@optax.adam", "LEARNING_RATE": 3e-3}
TRAIN = UPDATES | LENGTHS | {"INITIAL_CHECKPOINT_PATH": "original", "TRAIN_STEPS": 20}
EXPERIMENT = (
    VOCABULARY
    | LENGTHS
    | UPDATES
    | {
        "ORIGINAL_CHECKPOINT_PATH": "original",
        "TRAIN_PROMPTS": "corpus.jsonl",
        "EVAL_PROMPTS": "corpus.jsonl",
        "ANNOTATOR": "@annotators.Lexicon",
        "annotators.Lexicon.path": "words.txt",
        "GENERATE_BATCH_SIZE": 32,
        "MAX_LENGTH": 16,
    }
)
RUNS = {
    "train": (
        ["tiny.gin", "objectives/tnrf.gin", "runs/train.gin"],
        VOCABULARY | TRAIN | {"RECORDS": "original.annotated.jsonl"},
    ),
    "train_task": (["tiny.gin", "objectives/tnrf.gin", "runs/train_task.gin"], TRAIN),
    "generate": (
        ["tiny.gin", "runs/generate.gin"],
        VOCABULARY | LENGTHS | {"PROMPTS": "corpus.jsonl", "MAX_LENGTH": 16},
    ),
    "annotate": (["runs/annotate_lexicon.gin"], VOCABULARY | {"LEXICON": "words.txt"}),
    "localize": (
        ["tiny.gin", "runs/localize.gin"],
        VOCABULARY | LENGTHS | {"CHECKPOINT_PATH": "original"},
    ),
    "evaluate": (
        ["tiny.gin", "runs/evaluate.gin"],
        VOCABULARY
        | LENGTHS
        | {
            "ORIGINAL_RECORDS": "original.annotated.jsonl",
            "ORIGINAL_CHECKPOINT_PATH": "original",
        },
    ),
    "pipeline": (["tiny.gin", "runs/pipeline.gin"], EXPERIMENT),
    "sweep": (["tiny.gin", "runs/sweep.gin"], EXPERIMENT),
}


def arguments(run_name, settings, gin_files=()):
    """The command line of a run: what is above, with other settings and further gin files."""
    files, defaults = RUNS[run_name]
    return [
        *(f"--gin_file={file}" for file in (*files, *gin_files)),
        *(f"--gin.{name}={value}" for name, value in {**defaults, **settings}.items()),
    ]


def run(run_name, settings, gin_files=()):
    """Runs a program in this process, as `python -m` does; returns its exit status."""
    return run_program(run_name, arguments(run_name, settings, gin_files))


def run_with_marks(run_name, settings, path):
    """A pipeline or sweep whose annotator is a file of marks, and leaves out all other records."""
    settings |= {"ANNOTATOR": "@annotators.Spans", "annotators.Spans.path": path}
    settings |= {"annotators.Spans.unmatched": "leave_out"}
    given = arguments(run_name, settings)
    return run_program(run_name, [argument for argument in given if "Lexicon" not in argument])


def run_program(run_name, given):
    """Runs a program in this process with a command line; returns its exit status."""
    name = run_name.partition("_")[0]
    with pytest.raises(SystemExit) as stopped:
        program.run(f"tnt_jax.{name}", name, given)
    gin.clear_config()
    return stopped.value.code


def train_original(model_dir, train_steps, **settings):
    """A model of the rooms, from nothing; `corpus.jsonl` is what it learns from."""
    settings = {
        "RECORDS": "corpus.jsonl",
        "ANNOTATED": False,
        "INITIAL_CHECKPOINT_PATH": None,
        "TRAIN_STEPS": train_steps,
        "MODEL_DIR": model_dir,
        **settings,
    }
    assert run("train", settings, ["objectives/fine_tune.gin"]) == 0


def make_hub_model(folder):
    """A directory of Hugging Face's that learned the rooms in both orders; returns what it learned.

    "original" is the same model as ours; "corpus.jsonl" is written anew.
    """
    rows = [*corpus(), *map(turned, corpus())]
    records.write_records("corpus.jsonl", rows)
    train_original("original", 80, LEARNING_RATE=1e-2)
    convert.convert(input="original", output=folder, output_format="huggingface")
    return rows


def saved(path, item="params"):
    """An item of a checkpoint, or of the newest one in a model directory, as NumPy arrays."""
    folder = checkpoint_kinds.find(str(path)) / item
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restore = ocp.args.PyTreeRestore(restore_args=as_numpy)
    return ocp.PyTreeCheckpointHandler().restore(folder, args=restore)


def assert_same_state(one, other):
    """Parameters and optimizer state of two checkpoints agree in every bit."""
    for item in ("params", "optimizer"):
        left, right = saved(one, item), saved(other, item)
        assert jax.tree.structure(left) == jax.tree.structure(right)
        jax.tree.map(np.testing.assert_array_equal, left, right)


@contextlib.contextmanager
def devices_seen(number=1):
    """Programs that are run here see so many of the eight simulated devices.

    For eight of them compiling takes twice the time of one, and each keeps a copy of the
    parameters.
    """
    devices = backend.get_backend().devices()[:number]
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("devices", "local_devices"):
            monkeypatch.setattr(jax, name, lambda *unused: devices)
        for name in ("device_count", "local_device_count"):
            monkeypatch.setattr(jax, name, lambda *unused: number)
        yield
