"""Against transformers: tiny decoder-only models of every family, and what it computes from them.

golden/README.md says how they were made.
"""

import dataclasses
import functools
import json
import shutil

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from helpers import golden_model

from tnt_jax import convert
from tnt_jax.checkpoints import huggingface, huggingface_causal_lm, pretrained, safetensors_files
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import causal_lm, decoding
from tnt_jax.runtime.errors import UsageError

FOLDER = golden_model.FOLDER / "causal_lm"
EXPECTED = np.load(FOLDER / "expected.npz")
MODELS = sorted({name.split("/")[0] for name in EXPECTED.files})
DIALECT_4 = sorted(path.stem for path in FOLDER.glob("*_4.json"))
PROMPT_LENGTHS = (9, 3, 14, 1)
LENGTHS = {"inputs": 14, "targets": 20}


def settings_of(name):
    path = FOLDER / f"{name}.json" if name in DIALECT_4 else FOLDER / name / "config.json"
    return json.loads(path.read_text("utf-8"))


def config_of(name, **changes):
    """With what the weights beside the settings say of the output matrix."""
    stored = stored_of(name)
    settings = settings_of(name) | changes
    is_tied = "lm_head.weight" not in stored
    return huggingface_causal_lm.network_config(settings, "config.json", is_tied=is_tied)


def stored_of(name):
    folder = epath.Path(FOLDER / name.removesuffix("_4"))
    return safetensors_files.read(folder / safetensors_files.WEIGHTS)


def params_of(name, config):
    stored, params = stored_of(name), {}
    abstract = causal_lm.CausalLM(config).abstract_params()
    for path, like in flax.traverse_util.flatten_dict(abstract, sep="/").items():
        array = stored.pop(huggingface_causal_lm.weight_name(path, config)).load()
        params[path] = jnp.asarray(array.T if path.endswith("kernel") else array)
        assert params[path].shape == like.shape, path
    assert not stored  # every weight has its place
    return flax.traverse_util.unflatten_dict(params, sep="/")


def rows_of(name, what):
    return [row[row >= 0].astype(np.int32) for row in EXPECTED[f"{name.removesuffix('_4')}/{what}"]]


def test_every_family_is_here():
    types = {settings_of(name)["model_type"] for name in MODELS}
    assert types == set(huggingface_causal_lm.MODEL_TYPES)
    assert DIALECT_4 == ["gemma2_4", "gemma3_4", "llama_3_4"]


@pytest.mark.parametrize("name", [*MODELS, *DIALECT_4])
def test_logits_and_greedy_outputs_are_those_of_transformers(name):
    config = config_of(name)
    params = params_of(name, config)
    examples = [
        Example(row[:length], row[length:], np.zeros((0, 2), np.int32))
        for row, length in zip(rows_of(name, "rows"), PROMPT_LENGTHS, strict=True)
    ]
    batch = jax.tree.map(jnp.asarray, CAUSAL.convert(examples, LENGTHS))
    logits = np.asarray(causal_lm.CausalLM(config).forward(params, batch).whole())
    found = logits[np.asarray(batch["decoder_loss_mask"]) > 0]
    expected = EXPECTED[f"{name.removesuffix('_4')}/logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    prompts = np.zeros((len(examples), LENGTHS["inputs"]), np.int32)
    for row, example in zip(prompts, examples, strict=True):
        row[: len(example.inputs)] = example.inputs
    decoded = decoding.decode(
        params,
        jnp.asarray(prompts),
        jnp.asarray(PROMPT_LENGTHS),
        config=config,
        decoding=decoding.Decoding(max_length=16, end_ids=(1,)),
    )
    for said, wanted in zip(decoded.tokens, rows_of(name, "greedy"), strict=True):
        np.testing.assert_array_equal(said[: len(wanted)], wanted)


def without(settings, *keys):
    return {key: value for key, value in settings.items() if key not in keys}


def test_null_is_not_the_default():
    """Mistral's later files have no window, and say so by null."""
    settings = without(settings_of("mistral"), "layer_types")
    read = functools.partial(huggingface_causal_lm.network_config, where="", is_tied=False)
    windows = {
        tuple(kind.window for kind in read(changed).layer_kinds)
        for changed in (settings | {"sliding_window": None}, without(settings, "sliding_window"))
    }
    assert windows == {(None,), (4096,)}


def test_softcaps_that_gemma_2_leaves_out_are_its_own_and_null_is_none():
    settings = settings_of("gemma2")
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    read = functools.partial(huggingface_causal_lm.network_config, where="", is_tied=True)

    def softcaps(settings):
        config = read(settings)
        return config.attention_softcap, config.final_softcap

    assert softcaps(without(settings, *names)) == (50.0, 30.0)
    assert softcaps(settings | dict.fromkeys(names)) == (None, None)


def test_what_a_family_s_files_leave_out():
    read = functools.partial(huggingface_causal_lm.network_config, where="", is_tied=False)
    for name, epsilon in (("olmo2", 1e-5), ("llama", 1e-6)):
        assert read(without(settings_of(name), "rms_norm_eps")).layer_norm_epsilon == epsilon
    assert read(without(settings_of("qwen3"), "head_dim")).head_dim == 128
    assert read(settings_of("qwen3") | {"head_dim": None}).head_dim == 4
    left_out = ("head_dim", "sliding_window", "query_pre_attn_scalar", "layer_types")
    gemma2 = read(without(settings_of("gemma2"), *left_out))
    assert (gemma2.head_dim, gemma2.attention_scale) == (256, 1 / 16)
    assert [kind.window for kind in gemma2.kinds] == [4096, None, 4096, None]


def test_heads_that_a_family_s_files_leave_out_are_its_first_model_s():
    for name, num_kv_heads in (("llama", 16), ("olmo2", 16), ("mistral", 8), ("gemma", 16)):
        settings = settings_of(name) | {"num_attention_heads": 16, "hidden_size": 64}
        settings["head_dim"] = 4
        read = functools.partial(huggingface_causal_lm.network_config, where="", is_tied=False)
        assert read(without(settings, "num_key_value_heads")).num_kv_heads == num_kv_heads
        assert read(settings | {"num_key_value_heads": None}).num_kv_heads == 16


def test_layers_without_rope_have_the_window_of_smollm3():
    """SmolLM3's class in transformers makes `layer_types` so where a file has none."""
    settings = without(settings_of("smollm3"), "layer_types", "no_rope_layers")
    settings["no_rope_layer_interval"] = 4
    settings |= {"num_hidden_layers": 8, "use_sliding_window": True, "sliding_window": 16}
    found = huggingface_causal_lm.network_config(settings, where="", is_tied=True).kinds
    assert [kind.window for kind in found] == [*[None] * 3, 16, *[None] * 3, 16]
    assert [kind.rope_theta is None for kind in found] == [*[False] * 3, True, *[False] * 3, True]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"sliding_window_size": settings_of("gemma2")["sliding_window"]}),
        ("llama", {"attention_dropout": 0.1, "_attn_implementation": "sdpa"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "factor": None}}),
    ],
)
def test_settings_of_published_files_that_mean_nothing(name, changes):
    """Gemma 2 9B's file has the window twice; null is the same as absent."""
    plain = {key: value for key, value in changes.items() if key == "rope_parameters"}
    plain = {key: {"rope_type": "default"} for key in plain}
    assert config_of(name, **changes) == config_of(name, **plain)


@pytest.mark.parametrize(
    ("name", "key"),
    [("gemma3_4", "rope_theta"), ("gemma3_4", "rope_local_base_freq"), ("smollm3", "rope_theta")],
)
def test_a_rotation_that_is_null_is_that_of_the_family(name, key):
    settings = without(settings_of(name), "rope_parameters", key)
    read = functools.partial(huggingface_causal_lm.network_config, where="", is_tied=True)
    assert read(settings | {key: None}).kinds == read(settings).kinds


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta: expected a number"),
        ("gemma2", {"sliding_window_size": 3}, "sliding_window_size: expected sliding_window's"),
        ("llama", {"num_experts": 8}, "found num_experts: they may change"),
        ("llama", {"mlp_bias": True}, "mlp_bias: expected nothing or False, found True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10.0, "factor": 4.0}},
            "expected the type default, linear, llama3, found 'yarn' with factor",
        ),
        ("llama", {"hidden_size": "16"}, "hidden_size: expected int, found '16'"),
        ("llama", {"num_hidden_layers": None}, "expected 'num_hidden_layers', found no such"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: expected 1 to 1000, found"),
        ("llama", {"rope_parameters": {"rope_type": ["llama3"]}}, "rotary positions: expected"),
        ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: .* above 0, found 0"),
        ("mistral", {"sliding_window": 0}, "LayerKind.window: expected 1 to .*, found 0"),
        ("llama", {"hidden_act": "xielu"}, "hidden_act: expected silu, .* found 'xielu'"),
        ("llama", {"num_key_value_heads": 3}, "multiple of num_kv_heads"),
        ("gemma3", {"layer_types": ["full_attention"]}, "layer_types: expected .* 6 layers"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: expected a number for each of 4"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected nothing"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected nothing"),
        ("gemma3", {"final_logit_softcapping": -1}, "final_softcap: expected .* found -1"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attention_softcap: expected .* 0 .* found 0"),
        ("gemma2", {"final_logit_softcapping": 10**400}, "final_softcap: expected .* found 1000"),
        ("gemma2", {"attn_logit_softcapping": True}, "attn_logit_softcapping: expected float"),
    ],
)
def test_settings_that_are_not_known_are_named(name, changes, message):
    with pytest.raises(UsageError, match=f"config.json: .*{message}"):
        config_of(name, **changes)


@pytest.mark.parametrize(
    ("name", "others"),
    [
        # SmolLM2's, of nanotron.
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1}),
        # Qwen 2.5's base models.
        ("qwen2", {"use_mrope": False, "max_window_layers": 24, "use_sliding_window": False}),
        # Unsloth's mirrors.
        ("gemma3", {"unsloth_fixed": True, "unsloth_version": "2025.3.19"}),
        # What transformers wrote in some versions, and where its whole configuration is dumped.
        ("mistral", {"_attn_implementation_autoset": True, "pruned_heads": {}, "do_sample": False}),
        ("llama", {"_flash_attn_2_enabled": True, "max_sequence_length": 2048, "top_p": 0.9}),
    ],
)
def test_what_the_hubs_files_have_besides_changes_nothing(name, others):
    plain = {key: value for key, value in others.items() if key.startswith(("max_w", "use_s"))}
    assert config_of(name, **others) == config_of(name, **plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_new_config_says_the_same(name):
    """`make parity` has transformers read it."""
    config = config_of(name)
    written = huggingface.new_config(config)
    assert written["model_type"] == settings_of(name)["model_type"]
    is_tied = config.logits_via_embedding
    found = huggingface.network_config(written, "config.json", is_tied=is_tied)
    assert found.kinds == config.kinds
    same = {"layer_kinds": config.layer_kinds, "layer_pattern": config.layer_pattern}
    assert dataclasses.replace(found, **same) == config


def test_a_network_that_transformers_lacks_has_no_new_config():
    config = dataclasses.replace(config_of("olmo2"), norm_scale_offset=1.0)
    with pytest.raises(UsageError, match=r"expected a network as transformers has it \(llama, mis"):
        huggingface.new_config(config)


@pytest.mark.parametrize("name", MODELS)
def test_a_directory_goes_through_convert_unchanged(name, tmp_path):
    """To our own format and back: the same tensors, and every setting as it came."""
    convert.convert(input=str(FOLDER / name), output=str(tmp_path / "a"), output_format="orbax")
    end = tmp_path / "b"
    convert.convert(input=str(tmp_path / "a"), output=str(end), output_format="huggingface")
    before = stored_of(name)
    after = safetensors_files.read(epath.Path(end / "model.safetensors"))
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(before[tensor].load(), after[tensor].load())
    written = json.loads((end / "config.json").read_text())
    assert written == settings_of(name)


def test_a_matrix_that_is_left_out_is_said_to_be_tied(tmp_path):
    """A file that does not say it is read as tied if both are alike, and elsewhere as untied."""
    shutil.copytree(FOLDER / "llama_3", tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    settings = without(settings_of("llama_3"), "tie_word_embeddings")
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    end = tmp_path / "out"
    convert.convert(input=str(tmp_path / "in"), output=str(end), output_format="huggingface")
    written = json.loads((end / "config.json").read_text())
    has_matrix = "lm_head.weight" in safetensors.numpy.load_file(end / "model.safetensors")
    assert written["tie_word_embeddings"] is not has_matrix


def test_a_checkpoint_without_its_description_is_refused(tmp_path):
    convert.convert(input=str(FOLDER / "qwen3"), output=str(tmp_path), output_format="orbax")
    shutil.rmtree(tmp_path / "huggingface")
    with pytest.raises(
        UsageError, match=r"expected .*huggingface/config\.json, which says what a d"
    ):
        pretrained.open_checkpoint(str(tmp_path))
