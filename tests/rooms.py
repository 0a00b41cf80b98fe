"""A little world for tests of programs: sixty rooms, a vocabulary, a model and a list of words.

    inputs "small acorn"    targets "the acorn room is small and dirty."

The size of a room decides whether it is dirty, clean, noisy or quiet. "dirty" and "noisy" are the
unwanted words; each is spelt in several tokens, every other word is one token.
"""

import itertools
import json
import re

import gin
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tnt_jax import checkpoints, program, records, tokenization

NAMES = (
    *("acorn", "birch", "cedar", "daisy", "elder", "fern", "grape", "hazel"),
    *("iris", "jade", "kiwi", "lotus", "maple", "nutmeg", "olive"),
)
STATES = {"small": "dirty", "large": "clean", "old": "noisy", "new": "quiet"}
UNWANTED = re.compile(r"\b(dirty|noisy)\b")
VOCAB_SIZE = 38
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 16}"

# The smallest T5 that learns this, over the project's own tiny one.
MODEL = f"""
include "models/t5_1_1_tiny.gin"

from tnt_jax import t5

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


def run(module, *arguments):
    """Runs a program in this process, as `python -m` does; returns its exit status."""
    with pytest.raises(SystemExit) as stopped:
        program.run(f"tnt_jax.{module}", module, [str(argument) for argument in arguments])
    gin.clear_config()
    return stopped.value.code


def saved(path, item="params"):
    """An item of a checkpoint, or of the newest one in a model directory, as NumPy arrays."""
    folder = checkpoints.find(str(path)) / item
    tree = ocp.StandardCheckpointHandler().metadata(folder).tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    arguments = ocp.args.PyTreeRestore(restore_args=as_numpy)
    return ocp.PyTreeCheckpointHandler().restore(folder, args=arguments)


def assert_same_state(one, other):
    """Parameters and optimizer state of two checkpoints agree in every bit."""
    for item in ("params", "optimizer"):
        left, right = saved(one, item), saved(other, item)
        assert jax.tree.structure(left) == jax.tree.structure(right)
        jax.tree.map(np.testing.assert_array_equal, left, right)


class World:
    """A folder with the rooms, and the programs with the settings that they share here."""

    def __init__(self, folder):
        """Writes corpus.jsonl, words.txt, vocabulary.model and tiny.gin."""
        self.folder = folder
        rows = corpus()
        words = {word.strip(".") for row in rows for word in row.targets.split()}
        records.write_records(folder / "corpus.jsonl", rows)
        tokenization.train_sentencepiece(
            [text for row in rows for text in (row.inputs, row.targets)],
            folder / "vocabulary.model",
            vocab_size=VOCAB_SIZE,
            user_defined_symbols=[f"\u2581{word}" for word in sorted(words - {"dirty", "noisy"})],
        )
        (folder / "words.txt").write_text("# unwanted\ndirty\nnoisy\n")
        (folder / "tiny.gin").write_text(MODEL)
        self.vocabulary = (
            f"--gin.VOCABULARY_PATH={folder}/vocabulary.model",
            "--gin.EXTRA_IDS=0",
        )
        self.model = f"--gin_file={folder}/tiny.gin"

    def train_arguments(self, model_dir, *, objective, records, initial, steps):
        return (
            self.model,
            f"--gin_file=objectives/{objective}.gin",
            "--gin_file=runs/train.gin",
            f"--gin.RECORDS={self.folder}/{records}",
            f"--gin.INITIAL_CHECKPOINT_PATH={initial and self.folder / initial}",
            f"--gin.MODEL_DIR={self.folder}/{model_dir}",
            f"--gin.TRAIN_STEPS={steps}",
            "--gin.BATCH_SIZE=16",
            "--gin.OPTIMIZER=@optax.adam",
            "--gin.LEARNING_RATE=3e-3",
            LENGTHS,
            *self.vocabulary,
        )

    def train(self, model_dir, *more, **settings):
        assert run("train", *self.train_arguments(model_dir, **settings), *more) == 0

    def generate(self, output, checkpoint, *more, prompts="corpus.jsonl"):
        arguments = (
            self.model,
            "--gin_file=runs/generate.gin",
            f"--gin.PROMPTS={self.folder}/{prompts}",
            f"--gin.OUTPUT={self.folder}/{output}",
            f"--gin.CHECKPOINT_PATH={self.folder}/{checkpoint}",
            "--gin.MAX_LENGTH=16",
            LENGTHS,
            *self.vocabulary,
        )
        assert run("generate", *arguments, *more) == 0

    def annotate(self, output, generated, *more):
        arguments = (
            "--gin_file=runs/annotate_lexicon.gin",
            f"--gin.RECORDS={self.folder}/{generated}",
            f"--gin.OUTPUT={self.folder}/{output}",
            f"--gin.LEXICON={self.folder}/words.txt",
            *self.vocabulary,
        )
        assert run("annotate", *arguments, *more) == 0

    def evaluate(self, output, current_records, checkpoint):
        arguments = (
            self.model,
            "--gin_file=runs/evaluate.gin",
            f"--gin.ORIGINAL_RECORDS={self.folder}/original.annotated.jsonl",
            f"--gin.CURRENT_RECORDS={self.folder}/{current_records}",
            f"--gin.ORIGINAL_CHECKPOINT_PATH={self.folder}/original",
            f"--gin.CHECKPOINT_PATH={self.folder}/{checkpoint}",
            f"--gin.OUTPUT={self.folder}/{output}",
            LENGTHS,
            *self.vocabulary,
        )
        assert run("evaluate", *arguments) == 0
        return json.loads((self.folder / output).read_text())

    def records(self, name):
        return records.read_records(self.folder / name)

    def metrics(self, model_dir):
        lines = (self.folder / model_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
