"""A little world for tests of programs: sixty rooms, a vocabulary, a model and a list of words.

    inputs "small acorn"    targets "the acorn room is small and dirty."

The size of a room decides whether it is dirty, clean, noisy or quiet. "dirty" and "noisy" are the
unwanted words; each is spelt in several tokens, every other word is one token.
"""

import itertools
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
