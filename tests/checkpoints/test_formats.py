"""The owner of a Hugging Face model and the user of T5X: in, patched, and out in the same format.

With T5's own vocabulary where the outside data has it, else with one trained here.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib

import gin
import numpy as np
import pytest
from etils import epath
from helpers import rooms
from helpers.huggingface_model import TINY, write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import records
from tnt_jax.runtime import program
from tnt_jax.tokenizers import tokenization, vocabularies

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    with contextlib.chdir(folder), rooms.devices_seen():
        yield folder


@pytest.fixture(scope="module")
def hf():
    """A model with T5's vocabulary, its prompts, and a list of what it should not say."""
    shared = os.environ.get("TNT_JAX_SHARED")
    texts = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    if shared:
        file = pathlib.Path(shared) / "data" / "t5_vocab" / "sentencepiece.model"
        vocab_size = 32128
    else:
        file = pathlib.Path("trained.model")
        tokenization.train_sentencepiece(texts, file, vocab_size=200)
        vocab_size = 320
    folder = pathlib.Path("flan-t5-tiny")
    write_directory(folder, dataclasses.replace(TINY, vocab_size=vocab_size))
    vocabularies.write(epath.Path(folder), tokenization.SentencePiece(str(file), 100))
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 0}')
    rows = [records.Record(id=str(i), inputs=text) for i, text in enumerate(texts[:24])]
    records.write_records("prompts.jsonl", rows)
    return str(folder)


def run(name, files, **settings):
    arguments = [f"--gin_file={file}" for file in files]
    arguments += [f"--gin.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    with pytest.raises(SystemExit) as stopped:
        program.run(f"tnt_jax.{name}", name, arguments)
    gin.clear_config()
    assert stopped.value.code == 0


FROM_CHECKPOINT = "models/from_checkpoint.gin"
LENGTHS = {"inputs": 24, "targets": 16}


def generate(checkpoint, output):
    run(
        "generate",
        [FROM_CHECKPOINT, "runs/generate.gin"],
        CHECKPOINT_PATH=checkpoint,
        PROMPTS="prompts.jsonl",
        OUTPUT=output,
        MAX_LENGTH=16,
        TASK_FEATURE_LENGTHS=LENGTHS,
    )
    return records.read_records(output)


def annotate(source, output, vocabulary_of):
    run(
        "annotate",
        ["runs/annotate_lexicon.gin"],
        LEXICON="words.txt",
        RECORDS=source,
        OUTPUT=output,
        VOCABULARY_PATH=vocabulary_of,
        ALTERNATIVES=False,
    )


@pytest.fixture(scope="module")
def annotated(hf):
    """Its outputs, with the most frequent word in them marked; of several, the first in order."""
    outputs = generate(hf, "outputs.jsonl")
    counts = collections.Counter(
        word for row in outputs for word in set(row.targets.split()) if word.isalnum()
    )
    word = min(counts, key=lambda word: (-counts[word], word))
    pathlib.Path("words.txt").write_text(f"{word}\n")
    annotate("outputs.jsonl", "annotated.jsonl", hf)
    return "annotated.jsonl"


# So small that an update lowers the loss by what its slope says: where a random model is after a
# larger one is chance, for its loss is steep and rough.
RATE = 1e-6


@pytest.fixture(scope="module")
def patched(hf, annotated):
    """The directory after eight updates of plain gradient descent, each on all examples."""
    run(
        "train",
        [FROM_CHECKPOINT, "objectives/tnrf.gin", "runs/train.gin"],
        INITIAL_CHECKPOINT_PATH=hf,
        RECORDS=annotated,
        MODEL_DIR="patched",
        TRAIN_STEPS=8,
        BATCH_SIZE=24,
        TASK_FEATURE_LENGTHS=LENGTHS,
        OPTIMIZER="@optax.sgd",
        optax__sgd__learning_rate=RATE,
        LOG_EVERY=1,
    )
    return "patched"


@pytest.fixture(scope="module")
def handed_back(hf, annotated, patched):
    """A Hugging Face directory, written from the checkpoint with the numbers of an evaluation."""
    generate(patched, "patched.jsonl")  # a model directory of ours brings its vocabulary along
    annotate("patched.jsonl", "patched.annotated.jsonl", patched)
    run(
        "evaluate",
        [FROM_CHECKPOINT, "runs/evaluate.gin"],
        ORIGINAL_RECORDS=annotated,
        CURRENT_RECORDS="patched.annotated.jsonl",
        ORIGINAL_CHECKPOINT_PATH=hf,
        CHECKPOINT_PATH=patched,
        OUTPUT="evaluation.json",
        TASK_FEATURE_LENGTHS=LENGTHS,
    )
    convert.convert(
        input=patched,
        output="patched-hf",
        output_format="huggingface",
        evaluation="evaluation.json",
    )
    return "patched-hf"


def test_training_starts_from_the_directory_and_moves_away(patched):
    lines = pathlib.Path(patched, "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert metrics[0]["positive_kl"] == pytest.approx(0, abs=1e-6)
    for before, after in itertools.pairwise(metrics):
        fall = before["loss"] - after["loss"]
        assert fall == pytest.approx(RATE * before["gradient_norm"] ** 2, rel=0.25)


def test_a_hugging_face_model_is_handed_back(hf, patched, handed_back):
    # The same files but for the weights, the type of the weights and the card.
    before, after = pathlib.Path(hf), pathlib.Path(handed_back)
    assert {f.name for f in after.iterdir()} == {f.name for f in before.iterdir()} | {"README.md"}
    for name in ("generation_config.json", "spiece.model", "tokenizer_config.json"):
        assert (after / name).read_bytes() == (before / name).read_bytes()
    settings = [json.loads((f / "config.json").read_text()) for f in (after, before)]
    assert settings[0] == settings[1] | {"torch_dtype": "float32"}
    # The weights are the checkpoint's, bit by bit, and say what it says.
    saved = rooms.saved(patched)
    weights = pretrained.open_checkpoint(handed_back).weights
    for name, array in weights.items():
        leaf = saved
        for key in name.split("/"):
            leaf = leaf[key]
        np.testing.assert_array_equal(array.load(), leaf)
    outputs = generate(handed_back, "again.jsonl")
    assert outputs == records.read_records("patched.jsonl")


def test_the_card_says_what_was_done(hf, patched, handed_back):
    card = pathlib.Path(handed_back, "README.md").read_text()
    evaluation = json.loads(pathlib.Path("evaluation.json").read_text())
    run_ = pretrained.open_checkpoint(patched).run
    for fact in (
        f"`{hf}` (digest of its parameters {run_['original']['digest']})",
        "| at marked tokens | reverse_kl |",
        "| elsewhere | forward_kl |",
        "| weight of marked tokens (alpha) | 1.0 |",
        "| updates | 8 |",
        f"| data | 24 examples (digest {run_['data']['digest']}) |",
        f"{evaluation['original']['unwanted_outputs']['value']:.2%}",
        f"{evaluation['current']['unwanted_outputs']['value']:.2%}",
        f"| BLEU to the original's outputs | | {evaluation['comparison']['bleu']:.1f} |",
    ):
        assert fact in card, fact
    assert "no weight was changed" not in card


@pytest.mark.parametrize(
    ("output_format", "scan_layers"), [("huggingface", False), ("t5x", True), ("t5x_orbax", False)]
)
def test_a_pipeline_hands_the_model_back_as_it_came(output_format, scan_layers, hf, annotated):
    """T5X's checkpoints bring no vocabulary: that alone is named besides the path."""
    source = f"original-{output_format}"
    convert.convert(input=hf, output=source, output_format=output_format, scan_layers=scan_layers)
    settings = {
        "ORIGINAL_CHECKPOINT_PATH": source,
        "VOCABULARY_PATH": hf,
        "TRAIN_PROMPTS": "prompts.jsonl",
        "EVAL_PROMPTS": "prompts.jsonl",
        "ANNOTATOR": "@annotators.Lexicon",
        "annotators__Lexicon__path": "words.txt",
        "ARMS": "[@tnff/experiment.Arm()]",
        "TRAIN_STEPS": 1,
        "BATCH_SIZE": 8,
        "GENERATE_BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "MAX_LENGTH": 16,
        "OUTPUT_DIR": f"pipeline-{output_format}",
    }
    run("pipeline", [FROM_CHECKPOINT, "runs/pipeline.gin"], **settings)
    root = pathlib.Path(f"pipeline-{output_format}", "TNFF")
    found = pretrained.open_checkpoint(str(root / output_format))
    assert (found.output_format, found.scan_layers) == (output_format, scan_layers)
    trained = pretrained.open_checkpoint(str(root / "model"))
    for name, array in found.weights.items():
        np.testing.assert_array_equal(array.load(), trained.weights[name].load())
    if output_format == "huggingface":
        assert "Before and after" in (root / "huggingface" / "README.md").read_text()
        assert pretrained.vocabulary(str(root / "huggingface")).size > 100
