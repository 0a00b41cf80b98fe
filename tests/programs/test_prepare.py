"""Examples made beforehand are those that training opens."""

import json
import pathlib

import pytest

from tnt_jax.data import datasets, tokenization
from tnt_jax.runtime import program


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


def test_examples_are_there_for_those_who_train(capsys):
    assert prepare() == 0
    assert "20 examples are in records.jsonl.examples/" in capsys.readouterr().out
    assert prepare(CLEAN_PER_MARKED=2) == 0
    dataset = datasets.RecordFiles(
        files="records.jsonl",
        vocabulary=tokenization.SentencePiece("vocabulary.model"),
        examples_dir="records.jsonl.examples",
    )
    assert len(dataset.load({"inputs": 8, "targets": 16})) == 20
    told = [line for line in capsys.readouterr().out.splitlines() if "examples are in" in line]
    assert len(told) == 2
    assert all(line.endswith("made before.") for line in told)


def test_lengths_that_are_none_are_a_usage_error(capsys):
    for lengths in ({"inputs": 8}, {"inputs": 8, "target": 16}, {"inputs": 8, "targets": 0}):
        assert prepare(EXAMPLES_DIR="kept", TASK_FEATURE_LENGTHS=lengths) == 2
        assert "TASK_FEATURE_LENGTHS: expected positive numbers" in capsys.readouterr().err
    assert not pathlib.Path("kept").exists()


@pytest.mark.parametrize("folder", ["gs://bucket/kept", "records.jsonl/kept"])
def test_a_folder_that_cannot_be_written_is_a_usage_error(folder, capsys):
    assert prepare(EXAMPLES_DIR=folder) == 2
    assert "EXAMPLES_DIR: expected a local folder" in capsys.readouterr().err
