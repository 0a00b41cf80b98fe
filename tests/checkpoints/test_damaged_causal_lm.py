"""As `test_damaged_models`: every setting and tensor of decoder-only models, one at a time."""

import contextlib
import json
import pathlib
import resource
import shutil

import numpy as np
import pytest
import safetensors.numpy
from helpers import golden_model, tiny_tokenizers
from helpers.chat_templates import TEMPLATES
from helpers.mutations import outcome, places, with_change

from tnt_jax.checkpoints import pretrained
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.tokenizers import tokenization

FOLDER = golden_model.FOLDER / "causal_lm"
# One with every part of a config.json in the one dialect and in the other.
MODELS = {"gemma3": None, "gemma3_4": "gemma3", "llama_3_4": "llama_3", "smollm3": None}
# The settings that are damaged: of the first model all, then those that it lacks.
DAMAGED = {
    "gemma3_4": {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"},
    "llama_3_4": {"rope_theta", "rope_scaling", "attention_bias"},
    "smollm3": {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window"},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
VALUES = (
    *({}, [], None, True, "", "x" * 10_000, -1, 0, 1e9, float("inf"), float("nan"), 10**30, 2**40),
    json.loads("[" * 500 + "]" * 500),
)
MESH = sharding.make_mesh(sharding.MeshShape())


@pytest.fixture(autouse=True)
def no_memory(tmp_path):
    """A size that is believed is gigabytes; all that is here are kilobytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.chdir(tmp_path):
        yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # of a kilobyte each


def copy_of(name):
    folder = pathlib.Path("model")
    shutil.copytree(FOLDER / (MODELS[name] or name), folder)
    if MODELS[name]:
        shutil.copy(FOLDER / f"{name}.json", folder / "config.json")
    return folder


def read(path):
    opened = pretrained.open_checkpoint(str(path))
    config = pretrained.config_of(pretrained.FromCheckpoint(), opened)
    opened.restore(Model(config=config, mesh=MESH).abstract_params)


@pytest.mark.parametrize("name", MODELS)
def test_every_setting(name):
    folder = copy_of(name)
    whole = json.loads((folder / "config.json").read_text())
    assert outcome(read, folder) == "works"
    for place in places(whole):
        if place and place[0] not in DAMAGED.get(name, whole):
            continue
        for new in VALUES:
            (folder / "config.json").write_text(json.dumps(with_change(whole, place, new)))
            message = outcome(read, folder)
            if place and place[0] in SIZES:
                assert message != "works", (place, str(new)[:20])
    for key in DAMAGED.get(name, whole):
        others = {other: value for other, value in whole.items() if other != key}
        (folder / "config.json").write_text(json.dumps(others))
        message = outcome(read, folder)
        if key in (*SIZES, "num_hidden_layers", "model_type"):
            assert message != "works", key
    # What would change the function and is not known.
    for key, value in {"rope_yarn": 1, "num_experts": 8, "router_aux_loss_coef": 0.1}.items():
        (folder / "config.json").write_text(json.dumps({**whole, key: value}))
        assert f"found {key}: they may change what the network computes" in outcome(read, folder)


@pytest.mark.parametrize("name", ["gemma3", "llama_3_4"])
def test_every_tensor(name):
    folder = copy_of(name)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)

    def of(written):
        safetensors.numpy.save_file(written, file, {"format": "pt"})
        return outcome(read, folder)

    for tensor, array in tensors.items():
        others = {key: value for key, value in tensors.items() if key != tensor}
        assert of(others) != "works", tensor
        for shape in ((), (array.size + 1,), (*array.shape, 2), tuple(n + 1 for n in array.shape)):
            assert of({**others, tensor: np.ones(shape, np.float32)}) != "works", (tensor, shape)
        assert of({**others, tensor: array.astype(np.int8)}) != "works", tensor
        # Such models are stored in half precision, too.
        assert of({**others, tensor: array.astype(np.float16)}) == "works", tensor
    assert "extra" in of({**tensors, "extra": np.ones(3, np.float32)})
    # What old files hold although it follows from the settings.
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert of(tensors | inverse) == "works"
    assert of(tensors) == "works"


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
def test_every_setting_of_a_tokenizer(kind):
    """Beside the model's own file, whose merges and pieces are the package's to read."""
    folder = tiny_tokenizers.KINDS[kind](pathlib.Path("model"), chat_template=TEMPLATES[kind])

    def tokenise():
        vocabulary = pretrained.vocabulary("model")
        tokenization.check_vocabulary(vocabulary)
        vocabulary.encode("the house")

    assert outcome(tokenise) == "works"
    for name in ("tokenizer_config.json", "generation_config.json", "tokenizer.json"):
        whole = json.loads((folder / name).read_text())
        looked_at = places({k: v for k, v in whole.items() if k != "model"})
        for place in looked_at:
            for new in VALUES:
                (folder / name).write_text(json.dumps(with_change(whole, place, new)))
                outcome(tokenise)
        (folder / name).write_text(json.dumps(whole))
    assert outcome(tokenise) == "works"
