"""Examples made beforehand are those that training opens."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from tnt_jax import prepare as prepare_program
from tnt_jax.data import datasets
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": str(n), "inputs": "say", "targets": "good, bad.", "negative_spans": [[6, 9]]}
        for n in range(20)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    pathlib.Path("records.jsonl").write_text(text, "utf-8")
    texts = ["good, bad.", "say"]
    tokenization.train_sentencepiece(texts, "vocabulary.model", vocab_size=13)


def prepare(**settings):
    given = {"RECORDS": "records.jsonl", "VOCABULARY_PATH": "vocabulary.model", "EXTRA_IDS": 0}
    given |= {"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 16}} | settings
    arguments = [f"--gin.{name}={value!r}" for name, value in given.items()]
    with pytest.raises(SystemExit) as end:
        program.run("tnt_jax.prepare", "prepare", ["--gin_file=runs/prepare.gin", *arguments])
    return end.value.code


def load(**settings):
    """What a run does with the same records and settings."""
    dataset = datasets.RecordFiles(
        **({"files": "records.jsonl"} | settings),
        vocabulary=tokenization.SentencePiece("vocabulary.model"),
    )
    return dataset.load({"inputs": 8, "targets": 16}, "model")


@pytest.mark.parametrize(
    ("records", "folder", "place"),
    [
        ("records.jsonl", None, "records.jsonl.examples"),
        ("records.jsonl", "kept", "kept"),
        ("*.jsonl", "kept", "kept"),
    ],
)
def test_examples_are_there_for_those_who_train(records, folder, place, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "_SMALLEST", 1000)
    assert prepare(RECORDS=records, EXAMPLES_DIR=folder) == 0
    assert f"20 examples are in {place}/" in capsys.readouterr().out
    assert prepare(RECORDS=records, EXAMPLES_DIR=folder, CLEAN_PER_MARKED=2) == 0
    assert len(load(files=records, examples_dir=folder)) == 20
    told = [line for line in capsys.readouterr().out.splitlines() if "examples are in" in line]
    assert len(told) == 2
    assert all(line.endswith("made before.") for line in told)


@pytest.mark.parametrize(("records", "smallest"), [("*.jsonl", 1000), ("records.jsonl", 2**24)])
def test_where_no_run_would_look_none_are_made(records, smallest, capsys, monkeypatch):
    """A run makes those of a pattern in MODEL_DIR, and those of few records in memory."""
    monkeypatch.setattr(datasets, "_SMALLEST", smallest)
    before = sorted(pathlib.Path.cwd().iterdir())
    assert prepare(RECORDS=records) == 2
    said = capsys.readouterr().err
    assert "EXAMPLES_DIR: expected a local folder" in said
    assert said.strip().endswith("Set EXAMPLES_DIR to a local folder, here and in the runs.")
    assert sorted(pathlib.Path.cwd().iterdir()) == before


def test_the_tokeniser_has_to_be_one_whose_examples_can_be_kept():
    class Other:
        vocab_size = 300

    other: Any = Other()
    dataset = datasets.RecordFiles(files="records.jsonl", vocabulary=other)
    for folder in (None, "kept"):
        with pytest.raises(UsageError, match=r"^VOCABULARY: expected a tokeniser of this project"):
            prepare_program.prepare(
                dataset=dataclasses.replace(dataset, examples_dir=folder),
                task_feature_lengths={"inputs": 8, "targets": 16},
            )
    with pytest.raises(UsageError, match=r"found Other\. Set EXAMPLES_DIR to None"):
        dataclasses.replace(dataset, examples_dir="kept").folders()


def test_lengths_that_are_none_are_a_usage_error(capsys):
    for lengths in ({"inputs": 8}, {"inputs": 8, "target": 16}, {"inputs": 8, "targets": 0}):
        assert prepare(EXAMPLES_DIR="kept", TASK_FEATURE_LENGTHS=lengths) == 2
        assert "TASK_FEATURE_LENGTHS: expected positive numbers" in capsys.readouterr().err
    assert not pathlib.Path("kept").exists()


@pytest.mark.parametrize("folder", ["gs://bucket/kept", "records.jsonl/kept"])
def test_a_folder_that_cannot_be_written_is_a_usage_error(folder, capsys):
    assert prepare(EXAMPLES_DIR=folder) == 2
    said = capsys.readouterr().err
    assert "EXAMPLES_DIR: expected a local folder" in said
    assert "Set it to None" not in said  # where no examples are kept
