"""Models in GGUF files: the same as in the directory that the file was made of."""

import dataclasses
import json
import random
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from etils import epath
from helpers import gguf_writer, golden_model, rooms, tiny_tokenizers

from tnt_jax import convert
from tnt_jax.checkpoints import (
    checkpoint_kinds,
    gguf_files,
    gguf_tokenizer,
    lazy_arrays,
    pretrained,
)
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import families
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_tokenizer

gguf = pytest.importorskip("gguf", reason="needs GGUF's types: pip install gguf")

GOLDEN = golden_model.FOLDER / "causal_lm"
GEMMA_2 = json.loads((GOLDEN / "gemma2" / "config.json").read_text())
# What a GGUF file has no words for, in the golden models: the settings that they get instead.
OTHERWISE = {
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8},
}
STATED = {
    "gemma2": {
        "attention.sliding_window": 5,
        "attn_logit_softcapping": GEMMA_2["attn_logit_softcapping"],
        "final_logit_softcapping": GEMMA_2["final_logit_softcapping"],
    },
    "gemma3": {
        "attention.sliding_window": 5,
        "attention.sliding_window_pattern": 3,
        "rope.freq_base_swa": 20.0,
    },
    "mistral": {"attention.sliding_window": 5},
}
EXACT = ("llama", "llama_3", "mistral", "qwen2", "qwen3", "smollm3")
GEMMA = ("gemma", "gemma2", "gemma3")


def golden(name, tmp_path):
    """A golden model in a directory, and in a file."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text()) | OTHERWISE.get(name, {})
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    path = tmp_path / f"{name}.gguf"
    gguf_writer.write_model(path, folder, **STATED.get(name, {}))
    return pretrained.open_checkpoint(str(folder)), pretrained.open_checkpoint(str(path))


def logits_of(model):
    network = families.network_of(model.config)
    params = model.restore(
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=ON_ONE),
            network.abstract_params(),
        )
    )
    rng = np.random.default_rng(0)
    example = Example(
        rng.integers(3, 64, 9).astype(np.int32),
        rng.integers(3, 64, 12).astype(np.int32),
        np.zeros((0, 2), np.int32),
    )
    batch = CAUSAL.convert([example], {"inputs": 9, "targets": 12})
    return np.asarray(network.forward(params, jax.tree.map(jnp.asarray, batch)).whole())


ON_ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

# ------------------------------------------------------------------------------------- Families


@pytest.mark.parametrize("name", EXACT)
def test_a_model_in_a_file_is_the_one_in_the_directory(name, tmp_path):
    directory, file = golden(name, tmp_path)
    assert (file.kind, file.quantisation, file.output_format) == ("GGUF", None, "huggingface")
    assert file.config == directory.config
    assert file.weights.keys() == directory.weights.keys()
    for weight, array in directory.weights.items():
        np.testing.assert_array_equal(file.weights[weight].load(), array.load(), weight)
    np.testing.assert_array_equal(logits_of(file), logits_of(directory))


@pytest.mark.parametrize("name", GEMMA)
def test_gemma_s_norms(name, tmp_path):
    """1 is added in the file: what is left of a float32 after that is what float32 rounds to."""
    directory, file = golden(name, tmp_path)
    assert file.config == dataclasses.replace(
        directory.config, attention_scale=file.config.attention_scale
    )
    np.testing.assert_allclose(file.config.logit_scale, directory.config.logit_scale, rtol=1e-7)
    for weight, array in directory.weights.items():
        apart = 1.2e-7 if weight.endswith("scale") else 0
        np.testing.assert_allclose(file.weights[weight].load(), array.load(), rtol=0, atol=apart)
    expected = logits_of(directory)
    np.testing.assert_allclose(
        logits_of(file), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_norms_that_were_bfloat16_come_back_exactly(tmp_path):
    directory, _ = golden("gemma", tmp_path)
    array = directory.weights["decoder/decoder_norm/scale"].load()
    stored = array.astype("bfloat16").astype(np.float32)
    np.testing.assert_array_equal((stored + np.float32(1)) - np.float32(1), stored)


@pytest.mark.parametrize(
    ("theta", "width", "factor", "context"),
    [(500_000.0, 128, 8.0, 8192), (500_000.0, 64, 32.0, 8192), (100.0, 8, 8.0, 32)],
    ids=["Llama 3.1 8B", "Llama 3.2 1B", "golden"],
)
def test_the_scaling_of_llama_3(theta, width, factor, context, tmp_path):
    """The factors in the file say which context length the model was first trained with."""
    config = write_scaled(tmp_path, theta, width, factor, context)
    (kind,) = set(pretrained.open_checkpoint(str(tmp_path / "model.gguf")).config.kinds)
    found, expected = kind.rope_llama3, config["rope_parameters"]
    assert dataclasses.asdict(found) == {
        "factor": expected["factor"],
        "low_freq_factor": expected["low_freq_factor"],
        "high_freq_factor": expected["high_freq_factor"],
        "original_max_positions": context,
    }


def test_a_file_without_heads_of_keys_has_one_for_each_of_queries(tmp_path):
    """llama.cpp reads it so; a window makes it a Mistral model, of which transformers has 8."""
    write_scaled(tmp_path, 500_000.0, 128, 8.0, 8192, of_file={"attention.sliding_window": 16})
    assert pretrained.open_checkpoint(str(tmp_path / "model.gguf")).config.num_kv_heads == 2


def write_scaled(tmp_path, theta, width, factor, context, of_file=None, **changes):
    """A model of two heads with a scaled rotation; with `of_file` without heads of keys."""
    config = json.loads((GOLDEN / "llama_3" / "config.json").read_text())
    config |= {"hidden_size": 2 * width, "head_dim": width, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_bias": False}
    config["rope_parameters"] |= {
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": context,
        **changes,
    }
    architecture = gguf_writer.settings_of(config)
    if of_file is not None:
        del architecture["attention.head_count_kv"]
        architecture |= of_file
    settings = {f"llama.{name}": value for name, value in architecture.items()}
    tensors = {
        "token_embd.weight": (np.zeros((64, 2 * width), np.float32), "F32"),
        "rope_freqs.weight": (gguf_writer.factors_of(config), "F32"),
    }
    path = tmp_path / "model.gguf"
    gguf_writer.write(path, {"general.architecture": "llama"} | settings, tensors)
    return config


def test_another_scaling_is_refused(tmp_path):
    write_scaled(tmp_path, 500_000.0, 128, 8.0, 8192, high_freq_factor=16.0)
    with pytest.raises(UsageError, match=r"rope_freqs.weight to be of Llama 3's scaling"):
        pretrained.open_checkpoint(str(tmp_path / "model.gguf"))


def test_an_output_matrix_of_its_own_and_none(tmp_path):
    tied = {name: golden(name, tmp_path)[1].config.logits_via_embedding for name in EXACT}
    assert tied == {
        name: json.loads((GOLDEN / name / "config.json").read_text())["tie_word_embeddings"]
        for name in EXACT
    }


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"expert_count": 8}, "llama.expert_count: expected 0, found 8: such a network"),
        ("llama", {"logit_scale": 2.0}, "found llama.logit_scale: they may change"),
        (
            "llama",
            {"rope.scaling.type": "yarn"},
            "rope.scaling.type: expected none or linear, foun",
        ),
        ("llama", {"rope.dimension_count": 2}, "one width of heads, found .*dimension_count 2"),
        (
            "llama",
            {"block_count": 10**6},
            "llama.block_count: expected at most 1000, found 1000000",
        ),
        ("llama", {"embedding_length": None}, "embedding_length: expected a whole number above 0"),
        ("llama", {"attention.head_count": [4, 4]}, "expected one value for all layers, found 2"),
        ("llama", {"attention.head_count_kv": "2"}, "num_key_value_heads: expected int, found '2'"),
        ("llama", {"attention.head_count": 7}, "expected one width of heads|rows for 7 heads|kv"),
        ("qwen2", {"attention.sliding_window": 5}, "qwen2.attention.sliding_window: expected none"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: expected nothing"),
        ("qwen3", {"block_count": 3}, "blk.3|layers.3.* is unexpected"),
    ],
)
def test_networks_that_are_not_computed_here(name, changes, message, tmp_path):
    path = tmp_path / "model.gguf"
    gguf_writer.write_model(path, GOLDEN / name, **changes)
    with pytest.raises(UsageError, match=message) as error:
        pretrained.config_of(pretrained.FromCheckpoint(), pretrained.open_checkpoint(str(path)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_architecture_that_is_not_read(tmp_path):
    path = tmp_path / "model.gguf"
    settings = {"general.architecture": "mamba"}
    gguf_writer.write(path, settings, {"a": (np.zeros((2, 2), np.float32), "F32")})
    with pytest.raises(UsageError, match=r"architecture: expected llama, .* found 'mamba'"):
        pretrained.open_checkpoint(str(path))


# ----------------------------------------------------------------------------------- Quantisation

# The numbers in a block, and the largest error as a part of the largest number of a block.
ERRORS = {
    **{"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127},
    **{"Q4_0": 1 / 8, "Q4_1": 1 / 15, "Q5_0": 1 / 16, "Q5_1": 1 / 31},
}
WITH_K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def one_tensor(tmp_path, array, kind):
    path = tmp_path / "one.gguf"
    gguf_writer.write(path, {"general.architecture": "llama"}, {"a": (array, kind)})
    return gguf_files.read(epath.Path(path))


def assert_parts_are_of(array, whole):
    """Any part that is read is the part of what is read as a whole."""
    assert array.shape == whole.shape
    rng = np.random.default_rng(0)
    for _ in range(20):
        edges = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in edges)
        np.testing.assert_array_equal(array[index], whole[index])


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("shape", [(7, 96), (64,), (2, 3, 64)])
def test_types_of_numbers(kind, shape, tmp_path):
    original = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    file = one_tensor(tmp_path, original, kind)
    found = file.tensors["a"].load()
    qtype = gguf.GGMLQuantizationType[kind]
    by_package = gguf.quants.dequantize(gguf.quants.quantize(original, qtype), qtype)
    np.testing.assert_array_equal(found.astype(np.float32), by_package.reshape(shape))
    error = np.abs(found.astype(np.float32) - original).max()
    assert error <= ERRORS[kind] * np.abs(original).max() * 1.01
    assert file.quantisation == (kind if kind.startswith("Q") else None)
    assert_parts_are_of(file.tensors["a"], found)


@pytest.mark.parametrize("kind", WITH_K)
def test_types_with_scales_of_scales(kind, tmp_path):
    """Blocks of 256 numbers, of random bytes; the scales in them are whatever these say."""
    qtype = gguf.GGMLQuantizationType[kind]
    _, num_bytes = gguf.GGML_QUANT_SIZES[qtype]
    content = np.random.default_rng(2).integers(0, 256, (5, 3 * num_bytes)).astype(np.uint8)
    file = one_tensor(tmp_path, content, kind)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(content, qtype)
    np.testing.assert_array_equal(file.tensors["a"].load(), expected)
    assert_parts_are_of(file.tensors["a"], expected)
    if by_hand := {"Q4_K": of_q4_k, "Q6_K": of_q6_k}.get(kind):
        blocks = content.reshape(-1, num_bytes)
        with np.errstate(all="ignore"):
            again = np.array([by_hand(block) for block in blocks], np.float32).reshape(5, -1)
        np.testing.assert_allclose(expected, again, rtol=1e-6)


def half(two):
    return np.float32(two.copy().view(np.float16)[0])


def of_q4_k(block):
    """Dequantises a block by hand: eight runs of 32 numbers, each with a scale and a minimum."""
    d, least, q, bits = half(block[:2]), half(block[2:4]), block[4:16].astype(int), block[16:]
    numbers = []
    for run in range(8):
        if run < 4:
            scale, minimum = q[run] & 63, q[run + 4] & 63
        else:
            scale = q[run + 4] & 15 | q[run - 4] >> 6 << 4
            minimum = q[run + 4] >> 4 | q[run] >> 6 << 4
        codes = bits[run // 2 * 32 :][:32]
        codes = codes >> 4 if run % 2 else codes & 15
        numbers += [d * scale * code - least * minimum for code in codes.astype(np.float32)]
    return numbers


def of_q6_k(block):
    """Dequantises a block by hand: 16 runs of 16 numbers, each of 6 bits that lie in two places."""
    low, high = block[:128].astype(int), block[128:192].astype(int)
    scales, d = block[192:208].view(np.int8), half(block[208:210])
    numbers = np.zeros(256, np.float32)
    for part in range(2):
        lows, highs = low[64 * part :], high[32 * part :]
        for i in range(32):
            codes = [
                lows[i] & 15 | (highs[i] & 3) << 4,
                lows[i + 32] & 15 | (highs[i] >> 2 & 3) << 4,
                lows[i] >> 4 | (highs[i] >> 4 & 3) << 4,
                lows[i + 32] >> 4 | (highs[i] >> 6 & 3) << 4,
            ]
            for j, code in enumerate(codes):
                scale = scales[8 * part + i // 16 + 2 * j]
                numbers[128 * part + 32 * j + i] = d * np.float32(scale) * np.float32(code - 32)
    return numbers


def test_a_large_matrix_is_dequantised_piece_by_piece(tmp_path, monkeypatch):
    def in_threes(shape):
        return ((slice(i, min(i + 3, shape[0])), slice(None)) for i in range(0, shape[0], 3))

    monkeypatch.setattr(lazy_arrays, "parts", in_threes)
    original = np.random.default_rng(1).normal(size=(11, 64)).astype(np.float32)
    array = one_tensor(tmp_path, original, "Q8_0").tensors["a"]
    qtype = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, qtype), qtype)
    np.testing.assert_array_equal(array.load(), expected)
    assert_parts_are_of(array, expected)


@pytest.mark.parametrize("kind", ["IQ4_XS", "TQ2_0", "F64"])
def test_a_type_that_is_not_read(kind, tmp_path):
    qtype = gguf.GGMLQuantizationType[kind]
    _, num_bytes = gguf.GGML_QUANT_SIZES[qtype]
    with pytest.raises(UsageError, match=rf"tensors of type F32, .* found {kind} \('a'\)"):
        one_tensor(tmp_path, np.zeros((2, num_bytes), np.uint8), kind)


def test_a_reordered_array():
    array = np.arange(24).reshape(6, 4)
    order = np.array([1, 0, 3, 2, 5, 4])
    view = lazy_arrays.of_array(array, "here").reordered(0, order)
    assert_parts_are_of(view, array[order])


# ------------------------------------------------------------------------------------- Tokenizers

QWEN = tiny_tokenizers.LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def with_digits(folder):
    """SmolLM's: digits apart, then GPT-2's pattern as the library has it."""
    path = tiny_tokenizers.gpt2(folder) / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["pre_tokenizer"]["pretokenizers"] = [
        {"type": "Digits", "individual_digits": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    ]
    path.write_text(json.dumps(content), "utf-8")
    return folder


def qwen(folder):
    return tiny_tokenizers.byte_level(
        folder,
        QWEN,
        tiny_tokenizers.CHATML,
        nfc=True,
        added=["<think>", "</think>"],
        ends=["<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


BYTE_LEVEL = {
    "gpt-2": tiny_tokenizers.gpt2,
    "smollm": with_digits,
    "llama-bpe": lambda folder: tiny_tokenizers.llama3(folder, chat_template="<|eot_id|>"),
    "qwen2": qwen,
}


def texts():
    rng = random.Random(0)
    alphabet = [*"aeint 019'\n\r\t<|>▁é日🤖", "e\u0301", "\u00a0", "  ", "don't", "'LL", "im_end"]
    found = ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(200)]
    anything = ["".join(map(chr, rng.choices(range(1, 0xD800), k=8))) for _ in range(100)]
    return [*tiny_tokenizers.TEXTS, "", " ", "Hello world! 123", *found, *anything]


def vocabulary_of(tmp_path, settings):
    path = tmp_path / "model.gguf"
    count = len(settings["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": (np.zeros((count, 4), np.float32), "F32")}
    network = {"block_count": 1, "embedding_length": 4, "feed_forward_length": 4}
    network |= {"attention.head_count": 2}
    settings = {f"llama.{name}": value for name, value in network.items()} | settings
    gguf_writer.write(path, {"general.architecture": "llama"} | settings, tensors)
    return pretrained.vocabulary(str(path), chat_template=None)


@pytest.mark.parametrize("split", BYTE_LEVEL)
def test_ids_are_those_of_the_directory_s_tokenizer(split, tmp_path):
    folder = BYTE_LEVEL[split](tmp_path / "folder")
    expected = hub_tokenizer.HubTokenizer(str(folder))
    found = vocabulary_of(tmp_path, gguf_writer.byte_level(folder, split))
    assert found.pieces() == expected.pieces()
    assert (found.end_id, found.unknown_id) == (expected.end_id, expected.unknown_id)
    assert found.never_said == expected.never_said or split == "llama-bpe"
    for text in texts():
        ids = expected.prompt_ids(text)
        assert found.prompt_ids(text) == ids, text
        assert found.decode(ids) == expected.decode(ids)
        assert found.encode_with_extents(text) == expected.encode_with_extents(text)


def test_the_end_of_a_text_ends_an_output_as_that_of_a_turn_does():
    """A file states one; but what SmolLM 2 calls so is its unknown token."""
    names = ["a", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>"]
    settings = {
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": np.array([1, 3, 3, 1, 3]),  # the fourth is text
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}<|im_end|>",
    }
    assert gguf_tokenizer.end_ids(settings) == (2, 1)
    assert gguf_tokenizer.end_ids({**settings, "tokenizer.ggml.unknown_token_id": 1}) == (2,)


def test_rows_without_a_token(tmp_path):
    """The converter fills up to the rows of the network."""
    folder = tiny_tokenizers.gpt2(tmp_path / "folder")
    settings = gguf_writer.byte_level(folder, "gpt-2")
    settings["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    settings["tokenizer.ggml.token_type"] += [gguf_writer.UNUSED] * 2
    found = vocabulary_of(tmp_path, settings)
    assert found.size == len(settings["tokenizer.ggml.tokens"]) - 2


def train_sentencepiece(folder, *, has_prefix, defined=()):
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*tiny_tokenizers.TEXTS, "a a  b   c    d"] * 3),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=has_prefix,
        user_defined_symbols=list(defined),
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(folder / "spm.model"))


@pytest.mark.parametrize("has_prefix", [True, False], ids=["llama 2", "gemma"])
def test_ids_are_those_of_sentencepiece(has_prefix, tmp_path):
    # As Gemma has some, which merges may make as well.
    defined = () if has_prefix else ("▁▁", "▁▁▁", "▁▁▁▁", "<start_of_turn>", "\n\n")
    processor = train_sentencepiece(tmp_path / "spm", has_prefix=has_prefix, defined=defined)
    settings = gguf_writer.of_sentencepiece(processor, has_prefix=has_prefix, defined=defined)
    found = vocabulary_of(tmp_path, settings)
    assert found.pieces() == [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert found.end_ids == {processor.eos_id()}
    for text in texts():
        ids = processor.encode(text)
        assert found.encode(text) == ids, text
        assert found.prompt_ids(text) == [processor.bos_id(), *ids]
        assert found.decode(ids) == processor.decode(ids)


def test_scores_say_what_is_joined_and_not_the_order_of_ids(tmp_path):
    processor = train_sentencepiece(tmp_path / "spm", has_prefix=True)
    settings = gguf_writer.of_sentencepiece(processor, has_prefix=True)
    kinds = settings["tokenizer.ggml.token_type"]
    normal = [i for i, kind in enumerate(kinds) if kind == gguf_writer.NORMAL]
    order = list(range(len(kinds)))
    for i, j in zip(normal, random.Random(0).sample(normal, len(normal)), strict=True):
        order[i] = j
    for name in ("tokens", "scores"):
        values = settings[f"tokenizer.ggml.{name}"]
        settings[f"tokenizer.ggml.{name}"] = [values[i] for i in order]
    found = vocabulary_of(tmp_path, settings)
    for text in texts():
        assert [order[i] for i in found.encode(text)] == processor.encode(text), text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "default"}, "ggml.pre: expected gpt-2, smollm, .* found 'default'"),
        ({"model": "bert"}, "ggml.model: expected gpt2 or llama, found 'bert'"),
        ({"eos_token_id": 10**6}, "eos_token_id: expected an id below .*, found 1000000"),
        ({"eos_token_id": None}, "expected tokenizer.ggml.eos_token_id, found no such setting"),
        ({"merges": ["no pair of tokens"]}, "merges: expected pairs .* 'no pair of tokens'"),
        ({"token_type": [9]}, "token_type: expected a type for each of .* tokens, found 1 types"),
        ({"tokens": None}, "ggml.tokens: expected list, found no such setting"),
        ({"model": "llama"}, "ggml.scores: expected a score for each"),
    ],
)
def test_a_tokenizer_that_is_not_known(changes, message, tmp_path):
    """The model is read, with a tokenizer from elsewhere."""
    folder = tiny_tokenizers.gpt2(tmp_path / "folder")
    settings = gguf_writer.byte_level(folder, "gpt-2")
    settings |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    path = tmp_path / "model.gguf"
    settings = {name: value for name, value in settings.items() if value is not None}
    gguf_writer.write_model(path, GOLDEN / "llama", tokenizer=settings)
    with pytest.raises(UsageError, match=message) as error:
        pretrained.vocabulary(str(path))
    assert "Set VOCABULARY_PATH to a directory" in str(error.value)
    model = pretrained.open_checkpoint(str(path))
    assert not (model.description / "tokenizer.json").exists()
    assert pretrained.vocabulary(str(folder)).size > 256


def test_another_vocabulary_is_refused_with_the_name_of_the_file(tmp_path):
    folder = tiny_tokenizers.gpt2(tmp_path / "folder")
    other = tiny_tokenizers.qwen(tmp_path / "other")
    path = tmp_path / "model.gguf"
    gguf_writer.write_model(
        path, GOLDEN / "llama", tokenizer=gguf_writer.byte_level(folder, "gpt-2")
    )
    model = pretrained.open_checkpoint(str(path))
    config = dataclasses.replace(model.config, vocab_size=512)
    with pytest.raises(UsageError, match=f"Set VOCABULARY_PATH to {path}."):
        pretrained.check_vocabulary(pretrained.vocabulary(str(other)), config, model)


# ------------------------------------------------------------------------------------- Programs

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def run(name, gin_files, **settings):
    given = [f"--gin_file={file}" for file in gin_files]
    given += [f"--gin.{key}={value!r}" for key, value in settings.items()]
    with rooms.devices_seen():
        return rooms.run_program(name, given)


def write_chat_model(folder, kind="Q8_0"):
    """A file with a model that can talk, and records of it with a word that is unwanted."""
    tokenizer = tiny_tokenizers.qwen(folder / "model", chat_template=TEMPLATE)
    settings = gguf_writer.byte_level(tokenizer, "llama-bpe")
    gguf_writer.write_directory(folder / "model", len(settings["tokenizer.ggml.tokens"]))
    path = gguf_writer.write_model(
        folder / "model.gguf", folder / "model", kind, tokenizer=settings
    )
    rows = [
        {"inputs": f"the house {i}", "targets": "cheap area", "negative_spans": [[0, 5]][: i % 2]}
        for i in range(4)
    ]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def train(path, model_dir, **settings):
    files = ["models/from_checkpoint.gin", "objectives/tnrf.gin", "runs/train.gin"]
    settings = {"TRAIN_STEPS": 2, "BATCH_SIZE": 4, "LEARNING_RATE": 0.1, **settings}
    settings["TASK_FEATURE_LENGTHS"] = {"inputs": 48, "targets": 12}
    records = str(path.with_name("records.jsonl"))
    given = {"INITIAL_CHECKPOINT_PATH": str(path), "RECORDS": records, "MODEL_DIR": str(model_dir)}
    assert run("train", files, **given, **settings) == 0


def test_a_run_is_whole_without_the_file_that_it_came_from(tmp_path, capsys):
    path = write_chat_model(tmp_path)
    vocabulary = pretrained.vocabulary(str(path))
    before = pretrained.open_checkpoint(str(path))
    pieces, config = vocabulary.pieces(), before.config
    ids = vocabulary.prompt_ids("the house", ())
    train(path, tmp_path / "patched")
    path.unlink()
    convert.convert(
        input=str(tmp_path / "patched"), output=str(tmp_path / "out"), output_format="huggingface"
    )
    assert "The weights come from Q8_0: the original that a patch" in capsys.readouterr().out
    after = pretrained.open_checkpoint(str(tmp_path / "out"))
    assert (after.kind, after.config) == ("Hugging Face", config)
    found = pretrained.vocabulary(str(tmp_path / "out"))
    assert found.pieces() == pieces and found.prompt_ids("the house", ()) == ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| its weights, which the patch keeps to | Q8_0, dequantised |" in card
    # What was trained is there, and under names that are not those of the file.
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    original = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    assert stored.keys() == original.keys()


@pytest.mark.parametrize("settings", [{"ADAPTER_RANK": 2, "ORIGINAL": "adapters_off"}, {}])
def test_a_run_beside_a_file_of_half_precision_is_read(settings, tmp_path):
    """What was trained is float32, and the original float16."""
    path = write_chat_model(tmp_path, "F16")
    train(path, tmp_path / "patched", TRAINED_LAYERS=1, **settings)
    found = pretrained.open_checkpoint(str(tmp_path / "patched"))
    types = {array.dtype for array in found.weights.values()}
    assert types == {np.dtype(np.float16), np.dtype(np.float32)}
    convert.convert(
        input=str(tmp_path / "patched"), output=str(tmp_path / "out"), output_format="huggingface"
    )
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.isfinite(array).all() for array in stored.values())


def test_adapters_beside_a_file(tmp_path, capsys):
    path = write_chat_model(tmp_path)
    train(path, tmp_path / "patched", ORIGINAL="adapters_off", ADAPTER_RANK=2)
    convert.convert(
        input=str(tmp_path / "patched"), output=str(tmp_path / "peft"), output_format="peft"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert f"{path} (GGUF), is none that transformers reads" in said
    assert "The weights come from Q8_0" in said
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    card = (tmp_path / "peft" / "README.md").read_text()
    made = f"--input={path} --output=BASE --output_format=huggingface"
    assert made in card and 'from_pretrained("BASE")' in card
    # The rank-2 matrices fit what the command makes.
    convert.convert(input=str(path), output=str(tmp_path / "BASE"), output_format="huggingface")
    base = safetensors.numpy.load_file(tmp_path / "BASE" / "model.safetensors")
    adapters = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for name, array in adapters.items():
        module, _, leaf = name.removeprefix("base_model.model.").rpartition(".lora_")
        axis = 1 if leaf == "A.weight" else 0
        assert array.shape[axis] == base[f"{module}.weight"].shape[axis]
    card = (tmp_path / "BASE" / "README.md").read_text()
    assert "weights are stored as float32 instead of Q8_0, otherwise unchanged" in card


# --------------------------------------------------------------------------------- Damaged files


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file with a little of everything."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = gguf_writer.byte_level(tiny_tokenizers.gpt2(folder / "tokenizer"), "gpt-2")
    path = folder / "small.gguf"
    gguf_writer.write_model(path, GOLDEN / "llama_3", tokenizer=tokenizer)
    return path.read_bytes()


def opened(path):
    """Opens all that a program would, and reads all weights."""
    model = pretrained.open_checkpoint(str(path))
    pretrained.config_of(pretrained.FromCheckpoint(), model)
    for array in model.weights.values():
        array.load()
    return pretrained.vocabulary(str(path)).size


def refusal(path):
    with pytest.raises(UsageError) as error:
        opened(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_any_byte_of_the_header_may_be_another(small, tmp_path):
    """It is refused in one line, or read all the same; never anything else."""
    rng = random.Random(0)
    header = small.index(b"rope_freqs.weight") + 200
    lengths = [small.index(b"general.architecture") - 8, small.index(b"llama.block_count") - 8]
    places = [*range(4, 32), *lengths, *(rng.randrange(header) for _ in range(300))]
    for number, place in enumerate(places):
        content = bytearray(small)
        content[place] = rng.choice(
            [0, 1, 0x7F, 0x80, 0xFF, content[place] ^ 1 << rng.randrange(8)]
        )
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(content)
        try:
            opened(path)
        except UsageError as error:
            assert "\n" not in str(error), (place, error)
        path.unlink()


def test_a_file_that_is_cut_short(small, tmp_path):
    rng = random.Random(0)
    path = tmp_path / "model.gguf"
    whole = len(small) - 32  # what fills up the last tensor may be missing
    for length in (0, 3, 4, 10, 23, *(rng.randrange(whole) for _ in range(40)), whole - 1):
        path.write_bytes(small[:length])
        message = refusal(path)
        assert "expected" in message and str(path) in message


HUGE = struct.pack("<Q", 2**60)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (lambda small: 8, HUGE, "states 1,152,921,504,606,846,976 tensors"),
        (lambda small: 16, HUGE, "states 1,152,921,504,606,846,976 settings"),
        (lambda small: 24, HUGE, "states 1,152,921,504,606,846,976 bytes"),
        # Behind the name of an array: its type, and that of its elements.
        (lambda small: small.index(b"ggml.tokens") + 11 + 8, HUGE, "976 strings"),
        (lambda small: small.index(b"ggml.token_type") + 15 + 8, HUGE, "976 numbers"),
        (lambda small: small.index(b"ggml.token_type") + 15, b"\x63", "a value of type 99"),
        # Behind the name of a tensor: the number of axes, their sizes, type and place.
        (lambda small: small.index(b"output_norm.weight") + 18, b"\x07", "has 7 axes"),
        (lambda small: small.index(b"output_norm.weight") + 22, HUGE, "cut short or damaged"),
        (lambda small: small.index(b"output_norm.weight") + 22, bytes(8), "has the shape"),
        (lambda small: small.index(b"output_norm.weight") + 30, b"\x63", "found number 99"),
        (lambda small: small.index(b"output_norm.weight") + 34, HUGE, "cut short or damaged"),
        (lambda small: 4, b"\x01", "expected version 2 or 3, found 1"),
        (lambda small: 4, b"\x00\x00\x00\x03", "the other order of bytes"),
        (lambda small: 0, b"PK", "it begins with b'PKUF'"),
        (lambda small: small.index(b"llama.block_count"), b"\xff", "codec can't decode"),
    ],
)
def test_what_a_header_states_is_not_believed(place, change, message, small, tmp_path):
    start = place(small)
    path = tmp_path / "model.gguf"
    path.write_bytes(small[:start] + change + small[start + len(change) :])
    assert message in refusal(path)


def test_tensors_that_lie_over_each_other(small, tmp_path):
    """Or a small file would promise a large model, each of its layers the same bytes."""
    file = bytearray(small)
    names = [b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"]
    first, second = (file.index(name) + len(name) + 4 + 16 + 4 for name in names)
    file[second : second + 8] = file[first : first + 8]
    path = tmp_path / "model.gguf"
    path.write_bytes(file)
    assert "where another one is there" in refusal(path)


def test_one_part_of_a_model(tmp_path):
    path = tmp_path / "model-00001-of-00002.gguf"
    settings = {"general.architecture": "llama", "split.count": 2}
    gguf_writer.write(path, settings, {"a": (np.zeros((2, 2), np.float32), "F32")})
    assert "llama-gguf-split --merge" in refusal(path)


def test_a_file_is_known_by_its_name_or_its_first_bytes(small, tmp_path):
    for name, content in (("a.gguf", b""), ("b.GGUF", b""), ("blob", small)):
        (tmp_path / name).write_bytes(content)
        assert gguf_files.is_gguf(epath.Path(tmp_path / name))
    (tmp_path / "c.bin").write_bytes(b"GGU")
    for other in (tmp_path, tmp_path / "c.bin", tmp_path / "none.gguf"):
        assert not gguf_files.is_gguf(epath.Path(other))
    with pytest.raises(UsageError, match=r"Of a GGUF file, give the path of the file itself\."):
        checkpoint_kinds.find(str(tmp_path))
    with pytest.raises(UsageError, match=r"found a file at .*c.bin\. Of files, only GGUF is read"):
        checkpoint_kinds.find(str(tmp_path / "c.bin"))


def test_without_the_package(small, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    path = tmp_path / "model.gguf"
    path.write_bytes(small)
    assert refusal(path) == f"{path}: a GGUF file is read with a package: pip install gguf."
