"""A program opens each checkpoint that it is given once, and then passes on what it has opened."""

import collections
import contextlib
import dataclasses

import pytest
from helpers import rooms

from tnt_jax.checkpoints import checkpoint_kinds
from tnt_jax.data import records


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, an original of one update, and its outputs with marks."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        rows = [dataclasses.replace(row, annotator="by hand") for row in rooms.marked_corpus()]
        records.write_records("original.annotated.jsonl", rows)
        rooms.train_original("original", 1)
        yield


@pytest.fixture
def found(monkeypatch):
    """Counts how often each path is looked up, which is what opening it begins with."""
    counts = collections.Counter()
    find = checkpoint_kinds.find

    def counted(path):
        counts[path] += 1
        return find(path)

    monkeypatch.setattr(checkpoint_kinds, "find", counted)
    return counts


def test_training_opens_its_original_once(found):
    settings = {"INITIAL_CHECKPOINT_PATH": "original", "MODEL_DIR": "trained", "TRAIN_STEPS": 1}
    settings |= {"EVAL_DATASET": "@datasets.RecordFiles()"}
    assert rooms.run("train", settings) == 0
    assert found["original"] == 1
    # A run that goes on asks for no other.
    assert rooms.run("train", {**settings, "TRAIN_STEPS": 2}) == 0
    assert found["original"] == 2


@pytest.mark.parametrize(
    ("program", "settings"),
    [
        ("generate", {"CHECKPOINT_PATH": "original"}),
        ("evaluate", {"CURRENT_RECORDS": "original.annotated.jsonl", "CHECKPOINT_PATH": "copy"}),
        ("localize", {"RECORDS": "original.annotated.jsonl", "NUM_UPDATES": 1, "NUM_FOLDS": 2}),
    ],
)
def test_a_model_is_opened_once(found, program, settings):
    if "copy" in settings.values():
        rooms.train_original("copy", 1)
        found.clear()
    assert rooms.run(program, {**settings, "OUTPUT": f"{program}.out"}) == 0
    assert found["original"] == 1
    assert found["copy"] == ("copy" in settings.values())
