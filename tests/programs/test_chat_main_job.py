"""The programs end to end on a chat model: the rooms of `helpers.rooms`, asked in conversations."""

import contextlib
import dataclasses
import json
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import rooms, several, tiny_tokenizers
from helpers.chat_templates import TEMPLATES

from tnt_jax import convert
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import layouts, records
from tnt_jax.models import sharding

# A tiny Qwen 3. Its biggest words are tokens; "dirty" and "noisy" may be several.
MODEL = """
include "models/causal_lm_tiny.gin"

from tnt_jax.models import causal_lm_config

VOCAB_SIZE = 416
causal_lm_config.CausalLMConfig.query_key_norm = "head"
"""
LENGTHS = {"TASK_FEATURE_LENGTHS": {"inputs": 32, "targets": 16}}
TOKENIZER = {"VOCABULARY_PATH": "tokenizer", "EXTRA_IDS": None}
# A model directory has its own tokenizer.
ITS_OWN = {"VOCABULARY_PATH": "%CHECKPOINT_PATH", "EXTRA_IDS": None}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """All paths here are relative to it."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    (folder / "tiny.gin").write_text(MODEL)
    rows = [
        dataclasses.replace(row, messages=(("system", "Rooms."), ("user", row.inputs)))
        for row in rooms.corpus()
    ]
    records.write_records(folder / "corpus.jsonl", rows)
    texts = [text for row in rows for text in (row.inputs, row.targets, "system user assistant")]
    tiny_tokenizers.qwen(folder / "tokenizer", chat_template=TEMPLATES["qwen"], texts=texts)
    with contextlib.chdir(folder), rooms.devices_seen(4):
        yield


def run(name, **settings):
    assert rooms.run(name, LENGTHS | settings) == 0


def generate(output, checkpoint, **settings):
    run("generate", **ITS_OWN | {"OUTPUT": output, "CHECKPOINT_PATH": checkpoint} | settings)
    return records.read_records(output)


def train(model_dir, **settings):
    run("train", **TOKENIZER | {"MODEL_DIR": model_dir} | settings)


@pytest.fixture(scope="module")
def original():
    """A model that learned the rooms, and its outputs, annotated."""
    rooms.train_original("original", 250, **LENGTHS, **TOKENIZER, LEARNING_RATE=1e-2)
    generate("original.jsonl", "original")
    annotate = TOKENIZER | {"RECORDS": "original.jsonl", "OUTPUT": "original.annotated.jsonl"}
    assert rooms.run("annotate", annotate) == 0
    return records.read_records("original.annotated.jsonl")


@pytest.fixture(scope="module")
def patched(original):
    """The original after 20 updates of TNRF on adapters."""
    train("patched", ORIGINAL='"adapters_off"', LEARNING_RATE=1e-2, SAMPLE_EVERY=20)
    return generate("patched.jsonl", "patched")


def share_of_unwanted(rows):
    return np.mean([bool(rooms.UNWANTED.search(row.targets)) for row in rows])


def test_the_original_replies_in_conversations(original):
    learned = sum(row.targets == row.extra["reference"] for row in original)
    assert learned >= 50
    ends = pretrained.vocabulary("original").end_ids
    assert all(row.target_ids[-1] in ends for row in original)
    assert [row.messages for row in original] == [
        (("system", "Rooms."), ("user", row.inputs)) for row in rooms.corpus()
    ]


def test_a_patch_takes_the_unwanted_words_and_leaves_the_rest(original, patched):
    assert share_of_unwanted(original) > 0.4
    assert share_of_unwanted(patched) < 0.1
    unmarked = [
        (before, after)
        for before, after in zip(original, patched, strict=True)
        if not before.negative_spans
    ]
    same = sum(before.targets == after.targets for before, after in unmarked)
    assert same >= 0.9 * len(unmarked)


def test_samples_show_the_whole_conversation(patched):
    line = json.loads(pathlib.Path("patched/samples.jsonl").read_text().splitlines()[-1])
    for sample in line["samples"]:
        assert sample["inputs"].startswith("system\nRooms.\nuser\n")


def test_a_stopped_run_goes_on_to_the_same_numbers(original):
    """Packed, against cached states of the original's responses."""
    settings = {"ORIGINAL": '"cached"', "PACK": True, "BATCH_SIZE": 4}
    train("whole", TRAIN_STEPS=6, **settings)
    train("parts", TRAIN_STEPS=3, **settings)
    train("parts", TRAIN_STEPS=6, **settings)
    rooms.assert_same_state("whole", "parts")


def trained_and_compared(folder, monkeypatch):
    """Numbers of a run with evaluation, and of its certificate; both read cached states.

    And of each batch that goes to the devices how many tokens its rows are said to begin with.
    """
    shared, put_batch = [], sharding.put_batch

    def spy(features, *more):
        shared.append(features[layouts.SHARED].shape[1] if layouts.SHARED in features else 0)
        return put_batch(features, *more)

    model, marked = f"{folder}/model", "original.annotated.jsonl"
    evaluation = {
        "EVAL_DATASET": "@evaluation/datasets.RecordFiles()",
        "evaluation/datasets.RecordFiles.files": marked,
        "evaluation/datasets.RecordFiles.vocabulary": "%VOCABULARY",
        "EVAL_EVERY": 2,
        "LOG_EVERY": 1,
    }
    compared = {"CHECKPOINT_PATH": model, "OUTPUT": f"{folder}/evaluation.json"}
    for role in ("ORIGINAL", "CURRENT"):
        compared[f"{role}_RECORDS"] = marked
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "put_batch", spy)
        settings = {"ORIGINAL": '"cached"', "BATCH_SIZE": 8, "TRAIN_STEPS": 2}
        train(model, **settings, **evaluation, STATES_DIR=f"{folder}/states")
        compared["evaluate.Certificate.states_dir"] = f"{folder}/states"
        run("evaluate", **TOKENIZER | compared)
    lines = pathlib.Path(model, "metrics.jsonl").read_text().splitlines()
    certificate = json.loads(pathlib.Path(compared["OUTPUT"]).read_text())["certificate"]
    return [*map(json.loads, lines), certificate], shared


def test_what_all_prompts_begin_with_is_computed_once_everywhere(original, monkeypatch, capsys):
    """For states that are cached, in updates, in evaluation and for the certificate."""
    found, shared = trained_and_compared("together", monkeypatch)
    number = max(shared)
    assert number >= 8
    # Eight batches of states, eight of each evaluation, two updates, two batches of the
    # certificate. The one left has the random tokens by which a resumed run knows its original.
    assert shared.count(number) == 8 + 2 * 8 + 2 + 2
    assert shared.count(0) == len(shared) - 28 == 1
    assert f"All prompts begin with the same {number} tokens: " in capsys.readouterr().out
    monkeypatch.setattr(layouts.Causal, "num_shared", lambda *_: 0)
    expected, shared = trained_and_compared("apart", monkeypatch)
    assert {*shared} == {0}
    assert "All prompts begin" not in capsys.readouterr().out
    for one, other in zip(found, expected, strict=True):
        for name in ("loss", "gradient_norm", "eval/loss", "positive_collateral", "num_negative"):
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_two_processes_learn_what_one_learns(original):
    """Packed, with parameters that both hold a half of, beside a second tree; four devices here."""
    settings = LENGTHS | TOKENIZER | {"PACK": True, "BATCH_SIZE": 4, "TRAIN_STEPS": 3}
    run("train", **settings, LOG_EVERY=1, MODEL_DIR="alone")
    of_both = {**settings, "LOG_EVERY": 1, "FSDP_DEVICES": 2, "MODEL_DIR": "two"}
    with several.running("train", of_both, 2, "two") as both:
        assert both.end() == [0, 0], both.said(1)
    logs = [pathlib.Path(name, "metrics.jsonl").read_text() for name in ("two", "alone")]
    losses = [[json.loads(line)["loss"] for line in log.splitlines()] for log in logs]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-3)
    ours, theirs = rooms.saved("two"), rooms.saved("alone")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), ours, theirs)


def test_what_is_handed_back_says_the_same(patched):
    """A directory, and the adapters by PEFT's rule: W + (alpha / r) B A."""
    run = {"input": "patched", "output": "directory", "output_format": "huggingface"}
    convert.convert(**run)
    assert [row.targets for row in generate("again.jsonl", "directory")] == [
        row.targets for row in patched
    ]
    convert.convert(input="original", output="base", output_format="huggingface")
    convert.convert(input="patched", output="peft", output_format="peft")
    whole, base, added = (
        safetensors.numpy.load_file(path)
        for path in (
            "directory/model.safetensors",
            "base/model.safetensors",
            "peft/adapter_model.safetensors",
        )
    )
    config = json.loads(pathlib.Path("peft/adapter_config.json").read_text())
    assert (config["task_type"], config["r"]) == ("CAUSAL_LM", 16)
    changed = [name for name in base if not np.array_equal(whole[name], base[name])]
    assert len(added) == 2 * len(changed) == 2 * 7 * 2
    for name in changed:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = added[f"{module}.lora_A.weight"], added[f"{module}.lora_B.weight"]
        scale = config["lora_alpha"] / config["r"]
        np.testing.assert_allclose(whole[name], base[name] + scale * (b @ a), atol=1e-5)
    # What the owner's tools need beside the weights.
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (pathlib.Path("directory") / name).exists()
    settings = json.loads(pathlib.Path("directory/config.json").read_text())
    assert (settings["model_type"], settings["num_key_value_heads"]) == ("qwen3", 2)
    assert "AutoModelForCausalLM" in pathlib.Path("directory/README.md").read_text()


def test_what_rounding_did_is_said(patched, capsys):
    settings = {"output_format": "huggingface", "dtype": "bfloat16"}
    convert.convert(input="patched", output="rounded", **settings)
    lost, undone = re.search(
        r"by ([\d.]+)% of what .* ([\d.]+)% of", capsys.readouterr().out
    ).groups()
    arrays = [
        {name: array.load() for name, array in pretrained.open_checkpoint(path).weights.items()}
        for path in ("original", "patched", "rounded")
    ]
    before, after, rounded = (
        np.concatenate([of_model[name].ravel().astype(np.float64) for name in sorted(of_model)])
        for of_model in arrays
    )
    norm = np.linalg.norm
    assert float(lost) == pytest.approx(
        100 * norm(rounded - after) / norm(after - before), abs=0.06
    )
    changed = after != before
    nearest = before.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert float(undone) == pytest.approx(100 * (rounded == nearest)[changed].mean(), abs=0.06)


def test_a_pipeline_of_a_chat_model(original):
    settings = {
        "ORIGINAL_CHECKPOINT_PATH": "original",
        "TRAIN_PROMPTS": "corpus.jsonl",
        "EVAL_PROMPTS": "corpus.jsonl",
        "OUTPUT_DIR": "pipeline",
        "TRAIN_STEPS": 20,
        "LEARNING_RATE": 1e-2,
        "ARMS": "[@tnff/experiment.Arm()]",
    }
    run("pipeline", **settings | {"VOCABULARY_PATH": "original", "EXTRA_IDS": None})
    rows = records.read_records("pipeline/TNFF/greedy.annotated.jsonl")
    assert share_of_unwanted(rows) < 0.1
    assert [row.messages for row in rows] == [row.messages for row in original]
    assert "acorn" in pathlib.Path("pipeline/report.html").read_text()


def test_tokens_to_blame_are_found(original):
    settings = TOKENIZER | {
        "CHECKPOINT_PATH": "original",
        "RECORDS": "original.annotated.jsonl",
        "OUTPUT": "localized.jsonl",
        "NUM_UPDATES": 60,
        "NUM_FOLDS": 2,
    }
    run("localize", **settings)
    found = records.read_records("localized.jsonl")
    assert sum(bool(row.negative_spans) for row in found) >= 20
