"""Against transformers: tiny models of every family that it saved, and what it computes from them.

golden/README.md says how they were made. `make parity` does the same afresh, with larger models and
in both directions.
"""

import json

import jax
import numpy as np
import pytest
from helpers import golden_model

from tnt_jax.checkpoints import pretrained
from tnt_jax.models import decoding, sharding
from tnt_jax.models.model import Model

FOLDER = golden_model.FOLDER / "huggingface"
EXPECTED = np.load(FOLDER / "expected.npz")
IDS = json.loads((FOLDER / "expected_ids.json").read_text("utf-8"))
FAMILIES = sorted({name.split("/")[0] for name in EXPECTED.files})
FEATURES = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
ONE_DEVICE = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])


def expected(family):
    prefix = f"{family}/"
    names = [name for name in EXPECTED.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): EXPECTED[name] for name in names}


def check_logits_and_greedy_tokens(family, mesh):
    golden = expected(family)
    path = str(FOLDER / family)
    model = Model(config=pretrained.open_checkpoint(path).config, mesh=mesh)
    params = pretrained.open_checkpoint(path).restore(model.abstract_params)
    tokens = {name: rows for name, rows in golden.items() if name in FEATURES}
    batch = sharding.put_batch(tokens, mesh)

    logits = np.asarray(jax.jit(model.forward)(params, batch).whole())[golden["is_compared"]]
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-4, atol=1e-4)

    max_length = golden["greedy_tokens"].shape[1]
    decoded = decoding.decode(
        params,
        batch["encoder_input_tokens"],
        (batch["encoder_input_tokens"] != 0).sum(axis=1),
        config=model.config,
        decoding=decoding.Decoding(max_length=max_length, end_ids=(1,), banned_ids=(0,)),
    )
    np.testing.assert_array_equal(decoded.tokens, golden["greedy_tokens"])


def test_every_family_is_here():
    assert len(FAMILIES) == 8
    assert {folder.parent.name for folder in FOLDER.glob("*/config.json")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(family):
    check_logits_and_greedy_tokens(family, ONE_DEVICE)


def test_they_are_on_a_mesh_too():
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, model=4))
    check_logits_and_greedy_tokens("umt5", mesh)


@pytest.mark.parametrize("path", ["spiece/spiece.model", "spiece", "tokenizer_json"])
def test_ids_of_texts_are_those_of_transformers(path):
    check_ids(path, IDS["texts"])


def test_ids_of_bytes_are_those_of_transformers():
    # seqio's ByteVocabulary has no text for its extra ids: "<extra_id_0>" are twelve bytes to it.
    check_ids("byt5", [text for text in IDS["texts"] if "<extra_id" not in text])


def check_ids(path, texts):
    vocabulary = pretrained.vocabulary(str(FOLDER / path))
    golden = IDS[path.split("/")[0]]
    assert vocabulary.size == golden["size"]
    ids = dict(zip(IDS["texts"], golden["ids"], strict=True))
    assert {text: [*vocabulary.encode(text), 1] for text in texts} == {
        text: ids[text] for text in texts
    }
