"""Directories of Hugging Face's, read and written without transformers, and what can be wrong.

That transformers computes the same is in `test_parity.py`.
"""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from helpers.huggingface_model import TINY, write_directory

from tnt_jax import convert
from tnt_jax.checkpoints import huggingface, lazy_arrays, pretrained, safetensors_files
from tnt_jax.models import t5
from tnt_jax.runtime.errors import UsageError

# config.json as the hub has them, but for what the network does not depend on.
T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 32128,
}
FLAN_T5_SMALL = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 8,
    "num_heads": 6,
    "num_layers": 8,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 32128,
}
BYT5_SMALL = FLAN_T5_SMALL | {
    "d_ff": 3584,
    "d_model": 1472,
    "num_decoder_layers": 4,
    "num_layers": 12,
    "vocab_size": 384,
    "tokenizer_class": "ByT5Tokenizer",
}
MT5_SMALL = FLAN_T5_SMALL | {
    "architectures": ["MT5ForConditionalGeneration"],
    "model_type": "mt5",
    "vocab_size": 250112,
}
UMT5_SMALL = FLAN_T5_SMALL | {
    "architectures": ["UMT5ForConditionalGeneration"],
    "model_type": "umt5",
    "scalable_attention": True,
    "vocab_size": 256384,
}


def config_of(settings, *, is_tied=False):
    return huggingface.network_config(settings, "config.json", is_tied=is_tied)


def num_params(config):
    shapes = lazy_arrays.shapes(t5.T5(config).abstract_params()).values()
    return sum(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize(
    ("settings", "is_tied", "count"),
    [
        # As published, in millions: t5-small 60.5, flan-t5-small 77, mt5- and byt5-small 300.
        (T5_SMALL, True, 60_506_624),
        (FLAN_T5_SMALL, False, 76_961_152),
        (MT5_SMALL, False, 300_176_768),
        (BYT5_SMALL, False, 299_637_760),
        # mT5 with its own vocabulary, and a relative bias of 6 x 32 in 16 layers instead of 2.
        (UMT5_SMALL, False, 300_176_768 + 2 * (256384 - 250112) * 512 + 14 * 6 * 32),
    ],
)
def test_the_settings_of_the_hub(settings, is_tied, count):
    config = config_of(settings, is_tied=is_tied)
    assert num_params(config) == count
    assert config.scales_logits == is_tied
    assert config.mlp_activations == (("relu",) if is_tied else ("gelu", "linear"))
    assert config.relpos_bias_per_layer == (settings is UMT5_SMALL)


@pytest.mark.parametrize(
    ("settings", "is_tied", "scales"),
    [
        (T5_SMALL, True, True),
        (T5_SMALL, False, True),  # an output matrix of its own, and no word against scaling
        (FLAN_T5_SMALL, True, False),  # as transformers 5 makes it: tied all the same
        (
            FLAN_T5_SMALL | {"tie_word_embeddings": True, "scale_decoder_outputs": False},
            True,
            False,
        ),
        (MT5_SMALL | {"tie_word_embeddings": True}, True, False),  # its code never scales
        (UMT5_SMALL | {"tie_word_embeddings": True}, True, True),
    ],
)
def test_logits_are_scaled_where_transformers_does(settings, is_tied, scales):
    assert config_of(settings, is_tied=is_tied).scales_logits == scales


@pytest.mark.parametrize(
    ("change", "activations"),
    [
        ({"feed_forward_proj": "relu", "dense_act_fn": "relu"}, ("relu",)),
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "silu"}, ("silu", "linear")),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, ("gelu", "linear")),
        ({"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}, ("gelu_exact",)),
        ({"feed_forward_proj": "gelu_new", "dense_act_fn": None}, ("gelu",)),
    ],
)
def test_activations(change, activations):
    assert config_of(FLAN_T5_SMALL | change).mlp_activations == activations


@pytest.mark.parametrize(
    ("settings", "is_tied"),
    [
        (T5_SMALL, True),
        (FLAN_T5_SMALL, False),
        (UMT5_SMALL, False),
        (FLAN_T5_SMALL | {"feed_forward_proj": "gelu", "dense_act_fn": "gelu"}, False),
        (FLAN_T5_SMALL | {"relative_attention_num_buckets": 16, "layer_norm_epsilon": 1e-5}, False),
    ],
)
def test_a_new_config_says_the_same(settings, is_tied):
    config = config_of(settings, is_tied=is_tied)
    assert config_of(huggingface.new_config(config), is_tied=is_tied) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": 2}, "config.json: expected T5's ids, eos_token_id 1, found 2"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id 0, found 5"),
        ({"feed_forward_proj": "gated-mish"}, "config.json: .*mlp_activations must name"),
        ({"num_heads": 0}, "config.json: T5Config.num_heads: expected a whole number"),
        ({"feed_forward_proj": 3}, "config.json: feed_forward_proj: expected str, found 3"),
        ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon: expected float or int, found '1e-6'"),
    ],
)
def test_settings_that_are_not_t5_s(change, message):
    settings = {k: v for k, v in FLAN_T5_SMALL.items() if k != "dense_act_fn"} | change
    with pytest.raises(UsageError, match=message):
        config_of(settings)


def test_a_setting_that_is_missing():
    settings = {k: v for k, v in T5_SMALL.items() if k != "d_kv"}
    with pytest.raises(UsageError, match=r"config.json: expected 'd_kv', found no such setting"):
        config_of(settings)


# ------------------------------------------------------------------------------------- Files


@pytest.fixture
def directory(tmp_path):
    write_directory(tmp_path / "model")
    return tmp_path / "model"


def read(folder):
    return pretrained.open_checkpoint(str(folder))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_what_is_written_is_read(dtype, max_shard_bytes, tmp_path):
    arrays = write_directory(tmp_path, dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 3000)
    found = read(tmp_path)
    assert found.config == TINY
    assert found.weights.keys() == arrays.keys()
    for name, array in found.weights.items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array.load(), arrays[name], err_msg=name)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whoever_may_read_the_user_s_files_may_read_the_weights(umask, tmp_path):
    """A server runs as another user than the one who trained."""
    before = os.umask(umask)
    try:
        write_directory(tmp_path)
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file.name


def test_the_safetensors_library_reads_the_same(directory):
    """Its own reader, on what its own writer wrote."""
    expected = safetensors.numpy.load_file(directory / "model.safetensors")
    found = safetensors_files.read(epath.Path(directory / "model.safetensors"))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array.load(), expected[name])
    matrix = found["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    part = (slice(2, 7), slice(3, 9))
    np.testing.assert_array_equal(matrix[part], expected[matrix.source.split(": ")[1]][part])
    np.testing.assert_array_equal(
        matrix.transposed()[part[::-1]], expected[matrix.source.split(": ")[1]][part].T
    )


def test_tied_weights_by_any_of_their_names(tmp_path):
    """safetensors stores shared tensors once, under whichever name comes first."""
    config = dataclasses.replace(TINY, logits_via_embedding=True)
    arrays = write_directory(tmp_path, config)
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for names in (
        ["encoder.embed_tokens.weight"],
        ["lm_head.weight"],
        ["shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    ):
        renamed = {k: v for k, v in stored.items() if k != "shared.weight"}
        renamed |= dict.fromkeys(names, stored["shared.weight"])
        safetensors.numpy.save_file(renamed, tmp_path / "model.safetensors")
        found = read(tmp_path)
        assert found.config == config
        assert found.weights.keys() == arrays.keys()
        np.testing.assert_array_equal(
            found.weights["token_embedder/embedding"].load(), arrays["token_embedder/embedding"]
        )


def test_an_output_matrix_that_differs_is_not_tied(directory):
    settings = json.loads((directory / "config.json").read_text())
    settings |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    (directory / "config.json").write_text(json.dumps(settings))  # as transformers 5 saves T5 1.1
    assert read(directory).config == TINY


def change_tensors(directory, change):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def test_two_embeddings_are_no_t5(directory):
    change_tensors(
        directory, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1})
    )
    with pytest.raises(UsageError, match=r"expected one embedding, found .*encoder.embed_tokens"):
        read(directory)


def test_every_difference_is_named_at_once(directory):
    def change(tensors):
        tensors["encoder.adapter.weight"] = np.zeros((2, 2), np.float32)
        del tensors["encoder.block.2.layer.1.DenseReluDense.wi_1.weight"]
        tensors["decoder.final_layer_norm.weight"] = np.zeros(13, np.float32)
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = (
            np.zeros((32, 2), np.float32)  # in the first T5 files, and ignored by everybody
        )

    change_tensors(directory, change)
    message = (
        r"does not fit its own settings: encoder/layers_2/mlp/wi_1/kernel is missing; "
        r"encoder\.adapter\.weight is unexpected; decoder/decoder_norm/scale is \(13,\) instead of "
        r"\(12,\)\. Expected"
    )
    with pytest.raises(UsageError, match=message):
        convert.convert(
            input=str(directory), output="out", output_format="huggingface", dry_run=True
        )


def test_a_file_that_is_cut_short(directory):
    file = directory / "model.safetensors"
    content = file.read_bytes()
    for size, message in (
        (
            len(content) - 1,
            f"expected {len(content)} bytes, .*found {len(content) - 1}: .*cut short",
        ),
        (len(content) // 2, "cut short"),
        (200, "expected a safetensors file: its header is cut short"),
        (0, "expected a safetensors file: it is empty"),
    ):
        file.write_bytes(content[:size])
        with pytest.raises(UsageError, match=message):
            read(directory)
    file.write_bytes(content + b"x")
    with pytest.raises(UsageError, match="the file is damaged"):
        read(directory)


def test_a_file_that_is_none(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(UsageError, match=r"model.safetensors: expected a safetensors file"):
        read(directory)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 80], "b is at 0 to 80, after what ends at 80"),  # where a is as well
        ([90, 170], "b is at 90 to 170, after what ends at 80"),
        ([-80, 0], "not made of whole numbers"),
        ([80.0, 160.0], "not made of whole numbers"),
        ("ab", "not made of whole numbers"),
    ],
)
def test_tensors_that_are_not_one_after_the_other(offsets, message, directory):
    entry = {"dtype": "F32", "shape": [4, 5]}
    header = {"a": entry | {"data_offsets": [0, 80]}, "b": entry | {"data_offsets": offsets}}
    content = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(
        len(content).to_bytes(8, "little") + content + bytes(160)
    )
    with pytest.raises(UsageError, match=f"expected a safetensors file: .*{message}"):
        read(directory)


@pytest.mark.parametrize("shard", [None, 3, "../../etc/passwd"])
def test_an_index_that_names_no_files(shard, tmp_path):
    write_directory(tmp_path, max_shard_bytes=3000)
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UsageError, match=r"expected the names of files in this directory, found"):
        read(tmp_path)


def test_a_shard_that_is_missing(tmp_path):
    write_directory(tmp_path, max_shard_bytes=3000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    for shard in shards[1:3]:
        shard.unlink()
    message = f"{len(shards)} shards, of which {shards[1].name}, {shards[2].name} are missing"
    with pytest.raises(UsageError, match=message):
        read(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold(tmp_path):
    write_directory(tmp_path, max_shard_bytes=3000)
    index = json.loads((tmp_path / safetensors_files.INDEX).read_text())
    index["weight_map"]["lm_head.weight"], lost = sorted(set(index["weight_map"].values()))[:2]
    index["weight_map"] = dict.fromkeys(index["weight_map"], lost)
    (tmp_path / safetensors_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(UsageError, match=f"{lost}: .*promises .* and \\d+ more; not found"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.float16, r"expected numbers of type F32 or BF16, found F16 \(.*overflow in float16"),
        (np.int8, r"found I8 \(.*in one of these types"),
    ],
)
def test_other_types_of_numbers(dtype, message, directory):
    change_tensors(directory, lambda t: t.update({name: x.astype(dtype) for name, x in t.items()}))
    with pytest.raises(UsageError, match=message):
        read(directory)


def test_weights_of_torch_in_the_hubs_cache(directory, tmp_path):
    """They were not downloaded, and transformers knows the model by its name."""
    snapshot = tmp_path / "models--google--mt5-small" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(directory, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UsageError) as raised:
        read(snapshot)
    message = str(raised.value)
    assert message.startswith("google/mt5-small: expected model.safetensors")
    call = "x.from_pretrained('google/mt5-small').save_pretrained('mt5-small-safetensors')"
    assert call in message
    assert str(tmp_path) not in message


def test_weights_of_torch(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = (
        r"expected model.safetensors .*, found pytorch_model.bin. Where transformers and torch are "
        r"installed, this converts it, into .*: python -c .*save_pretrained"
    )
    with pytest.raises(UsageError, match=message):
        read(directory)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "model_type 'bart'"),
        ({}, "model_type None"),
        ({"model_type": "t5", "is_encoder_decoder": False}, "is_encoder_decoder False"),
    ],
)
def test_another_architecture(settings, found, directory):
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=rf"expected an encoder-decoder of the T5 family.*{found}"):
        read(directory)


def test_a_damaged_config(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(UsageError, match=r"config.json: not JSON"):
        read(directory)


def test_a_parameter_goes_to_its_devices_part_by_part(directory, monkeypatch):
    """A parameter that is too large for memory is read in parts: for each device its own rows."""
    monkeypatch.setattr(lazy_arrays, "_MOST_AT_ONCE", 40 * 12 * 4 - 1)
    reads = []
    real = lazy_arrays._read_file

    def counted(path, offset, shape, dtype, index):
        part = real(path, offset, shape, dtype, index)
        reads.append((shape, part.shape))
        return part

    monkeypatch.setattr(lazy_arrays, "_read_file", counted)
    found = read(directory)
    mesh = jax.make_mesh((1, 8), ("data", "model"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    name = "token_embedder/embedding"
    tree = {
        "token_embedder": {"embedding": jax.ShapeDtypeStruct((40, 12), np.float32, sharding=rows)}
    }
    reads.clear()
    restored = lazy_arrays.restore(found.weights, tree)
    assert {part for _, part in reads} == {(5, 12)}
    np.testing.assert_array_equal(
        restored["token_embedder"]["embedding"], found.weights[name].load()
    )
