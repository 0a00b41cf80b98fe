"""T5 against T5X's own numbers and against a float64 NumPy T5 written from the papers."""

import dataclasses
import functools
import math
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden_model, t5_inputs
from helpers.t5_inputs import CONFIG_1_0, SOME_BATCH, random_batch, random_params

from tnt_jax.models import t5, t5_layers
from tnt_jax.runtime.errors import UsageError

GOLDEN = np.load(golden_model.FOLDER / "t5_logits.npz")

GOLDEN_CONFIG = golden_model.CONFIG


@functools.cache
def forward_of(config):
    return jax.jit(t5_inputs.make_forward(config))


def golden_params(name="params"):
    return golden_model.tree(GOLDEN, f"{name}/")


def golden_batch(name):
    return golden_model.tree(GOLDEN, f"batch/{name}/")


# ------------------------------------------------------------------------------ NumPy reference


def bucket(offset, bidirectional):
    """Relative position bucket of a key `offset` places after its query (Raffel et al., 2.1)."""
    num_buckets, first = (16, 16 if offset > 0 else 0) if bidirectional else (32, 0)
    distance = abs(offset) if bidirectional else max(-offset, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    share = math.log(distance / exact) / math.log(128 / exact)
    return first + min(exact + math.floor(share * (num_buckets - exact) + 1e-9), num_buckets - 1)


def numpy_logits(params, config, batch):
    """T5 in float64, one head at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    batch = {name: np.asarray(value) for name, value in batch.items()}
    embedding = params["token_embedder"]["embedding"]
    activations = {
        "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "linear": lambda x: x,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
    }

    def norm(x, layer):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["scale"]

    def attend(layer, x, y, allowed, bias):
        heads = []
        for h in range(config.num_heads):
            part = slice(h * config.head_dim, (h + 1) * config.head_dim)
            q, k, v = (
                z @ layer[name]["kernel"][:, part]
                for z, name in ((x, "query"), (y, "key"), (y, "value"))
            )
            scores = q @ k.swapaxes(1, 2) + (0 if bias is None else bias[h])
            weights = np.where(allowed, np.exp(scores - scores.max(-1, keepdims=True)), 0)
            # A padded query may see nothing; its output is read by no one.
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            heads.append(weights @ v)
        return np.concatenate(heads, -1) @ layer["out"]["kernel"]

    def mlp(layer, x):
        hidden = 1.0
        for i, name in enumerate(config.mlp_activations):
            kernel = layer["wi" if len(config.mlp_activations) == 1 else f"wi_{i}"]["kernel"]
            hidden = hidden * activations[name](x @ kernel)
        return hidden @ layer["wo"]["kernel"]

    def bias(stack, length, bidirectional):
        offsets = np.arange(length)[None, :] - np.arange(length)[:, None]
        buckets = np.vectorize(lambda o: bucket(o, bidirectional))(offsets)
        return stack["relpos_bias"]["rel_embedding"][:, buckets]

    source, target = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    source_segments = batch.get("encoder_segment_ids", source > 0)
    target_segments = batch.get("decoder_segment_ids", target > 0)

    def allowed(q, k):
        return (q[:, :, None] == k[:, None, :]) & (q[:, :, None] > 0) & (k[:, None, :] > 0)

    encoder = params["encoder"]
    x = embedding[source]
    for i in range(config.num_encoder_layers):
        layer = encoder[f"layers_{i}"]
        y = norm(x, layer["pre_attention_layer_norm"])
        mask = allowed(source_segments, source_segments)
        x = x + attend(layer["attention"], y, y, mask, bias(encoder, source.shape[1], True))
        x = x + mlp(layer["mlp"], norm(x, layer["pre_mlp_layer_norm"]))
    encoded = norm(x, encoder["encoder_norm"])

    decoder = params["decoder"]
    x = embedding[batch["decoder_input_tokens"]]
    length = target.shape[1]
    for i in range(config.num_decoder_layers):
        layer = decoder[f"layers_{i}"]
        y = norm(x, layer["pre_self_attention_layer_norm"])
        mask = allowed(target_segments, target_segments) & np.tri(length, dtype=bool)
        x = x + attend(layer["self_attention"], y, y, mask, bias(decoder, length, False))
        y = norm(x, layer["pre_cross_attention_layer_norm"])
        mask = allowed(target_segments, source_segments)
        x = x + attend(layer["encoder_decoder_attention"], y, encoded, mask, None)
        x = x + mlp(layer["mlp"], norm(x, layer["pre_mlp_layer_norm"]))
    hidden = norm(x, decoder["decoder_norm"])
    if config.logits_via_embedding:
        return hidden @ embedding.T / math.sqrt(config.emb_dim)
    return hidden @ decoder["logits_dense"]["kernel"]


# ---------------------------------------------------------------------------------------- Logits


@pytest.mark.parametrize("batch_name", ["int", "packed"])
@pytest.mark.parametrize("which", ["", "orig_"])
def test_logits_equal_t5x(which, batch_name):
    forward = forward_of(GOLDEN_CONFIG)
    logits = forward(golden_params(f"{which}params"), golden_batch(batch_name))
    # At every position, padding included.
    np.testing.assert_allclose(logits, GOLDEN[f"{which}logits/{batch_name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_name", ["int", "packed"])
def test_the_numpy_reference_equals_t5x(batch_name):
    batch = golden_batch(batch_name)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    logits = numpy_logits(golden_params(), GOLDEN_CONFIG, batch)
    golden = GOLDEN[f"logits/{batch_name}"]
    np.testing.assert_allclose(logits[real], golden[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_decoder_layers": 2},
        {"logits_via_embedding": False, "mlp_activations": ("silu", "linear")},
        {"num_encoder_layers": 2, "mlp_activations": ("gelu", "linear", "relu")},
    ],
    ids=str,
)
def test_logits_equal_the_numpy_reference(changes):
    config = dataclasses.replace(CONFIG_1_0, **changes)
    params = random_params(config)
    # Long enough for logarithmic buckets and for the last one (distance 128 and more).
    batch = random_batch(np.random.default_rng(1), config.vocab_size, [150, 9], [140, 30])
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    logits = forward_of(config)(params, batch)
    expected = numpy_logits(params, config, batch)
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("offset", "encoder_bucket", "decoder_bucket"),
    [
        (0, 0, 0),
        (-1, 1, 1),
        (1, 17, 0),
        (-7, 7, 7),
        (7, 23, 0),
        (-8, 8, 8),
        (-16, 10, 16),
        (-32, 12, 21),
        (64, 30, 0),
        (-64, 14, 26),
        (-127, 15, 31),
        (-5000, 15, 31),
        (5000, 31, 0),
    ],
)
def test_relative_position_buckets(offset, encoder_bucket, decoder_bucket):
    index = np.clip(offset, -128, 128) + 128
    assert t5_layers._bucket_of_offset(True, 32, 128, 128)[index] == encoder_bucket
    assert t5_layers._bucket_of_offset(False, 32, 128, 128)[index] == decoder_bucket


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("furthest", [1, 7, 40, 127])
def test_buckets_do_not_depend_on_the_length(bidirectional, furthest):
    found = t5_layers._bucket_of_offset(bidirectional, 32, 128, furthest)
    assert found.tolist() == [bucket(i, bidirectional) for i in range(-furthest, furthest + 1)]


def test_a_distance_that_no_sequence_has_takes_no_memory():
    """Buckets are looked up in a table; one up to the distance had 64 MB here."""
    config = dataclasses.replace(CONFIG_1_0, relpos_max_distance=2**20)
    params = t5.T5(config).abstract_params()
    tracemalloc.start()
    try:
        jax.eval_shape(t5_inputs.make_forward(config), params, SOME_BATCH)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


def test_packed_rows_equal_rows_of_their_own():
    packed = golden_batch("packed")
    rows = {
        "encoder_input_tokens": [[5, 6, 7, 1, 0], [9, 10, 11, 12, 1]],
        "decoder_input_tokens": [[0, 20, 21, 0], [0, 30, 31, 32]],
        "decoder_target_tokens": [[20, 21, 1, 0], [30, 31, 32, 1]],
    }
    rows = {name: jnp.asarray(value, jnp.int32) for name, value in rows.items()}
    forward = forward_of(GOLDEN_CONFIG)
    together = forward(golden_params(), packed)[0]
    apart = forward(golden_params(), rows)
    np.testing.assert_allclose(together[:3], apart[0, :3], atol=1e-5)
    np.testing.assert_allclose(together[3:7], apart[1], atol=1e-5)


def test_padding_changes_nothing():
    batch = golden_batch("int")
    wider = {name: jnp.pad(value, ((0, 1), (0, 7))) for name, value in batch.items()}
    forward = forward_of(GOLDEN_CONFIG)
    narrow, wide = forward(golden_params(), batch), forward(golden_params(), wider)
    real = np.asarray(batch["decoder_target_tokens"]) > 0
    np.testing.assert_allclose(wide[:3, :9][real], narrow[real], atol=1e-5)
    assert np.isfinite(wide).all()  # a row of padding attends to nothing


@pytest.mark.parametrize("config", [GOLDEN_CONFIG, CONFIG_1_0], ids=["1.1", "1.0"])
def test_hidden_states_times_the_output_matrix_are_the_logits(config):
    params = random_params(config)
    batch = SOME_BATCH
    model = t5.Transformer(config)

    @jax.jit
    def hidden_states(params, encoder_input_tokens, *decoder_tokens):
        encoded = model.apply({"params": params}, encoder_input_tokens, method="encode")
        return model.apply(
            {"params": params}, encoded, encoder_input_tokens, *decoder_tokens, method="decode"
        )

    hidden = hidden_states(params, *batch.values())
    if config.logits_via_embedding:
        matrix = params["token_embedder"]["embedding"].T / 4.0  # sqrt of emb_dim 16
    else:
        matrix = params["decoder"]["logits_dense"]["kernel"]
    logits = forward_of(config)(params, batch)
    np.testing.assert_allclose(np.asarray(hidden) @ np.asarray(matrix), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "vocab_axis", "dtype"),
    [
        ({}, 0, "float32"),
        ({"dtype": "bfloat16"}, 0, "float32"),  # scaled in float32
        ({"scale_decoder_outputs": False, "dtype": "bfloat16"}, 0, "bfloat16"),
        ({"logits_via_embedding": False}, 1, "float32"),
        ({"logits_via_embedding": False, "scale_decoder_outputs": True}, 1, "float32"),
    ],
    ids=str,
)
def test_factored_logits_are_logits(changes, vocab_axis, dtype):
    config = dataclasses.replace(CONFIG_1_0, **changes)
    params = random_params(config)
    factored = jax.jit(t5.T5(config).forward)(params, SOME_BATCH)
    assert (factored.vocab_axis, factored.hidden.dtype) == (vocab_axis, jnp.dtype(dtype))
    assert factored.matrix.shape == ((50, 16) if vocab_axis == 0 else (16, 50))
    matrix = np.asarray(factored.matrix)
    product = np.asarray(factored.hidden, np.float32) @ (matrix if vocab_axis else matrix.T)
    # The same rounding before the product: of the float32 product alone the order of sums differs.
    np.testing.assert_allclose(product, forward_of(config)(params, SOME_BATCH), atol=2e-4)


def test_factored_logits_have_dropout_with_a_key():
    config = dataclasses.replace(CONFIG_1_0, dropout_rate=0.5)
    params, key = random_params(config), jax.random.key(1)
    factored = jax.jit(t5.T5(config).forward)(params, SOME_BATCH, key)
    logits = forward_of(config)(params, SOME_BATCH, key)
    np.testing.assert_allclose(factored.hidden @ factored.matrix.T, logits, atol=2e-4)


def test_an_id_outside_the_vocabulary_is_loud():
    batch = golden_batch("int")
    batch["encoder_input_tokens"] = batch["encoder_input_tokens"].at[1, 0].set(384)
    logits = np.asarray(forward_of(GOLDEN_CONFIG)(golden_params(), batch))
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[[0, 2]]).all()


# ------------------------------------------------------------------------------ Dtype and dropout


@pytest.mark.parametrize("float32_attention_logits", [False, True])
def test_bfloat16_computes_near_float32_and_leaves_parameters_alone(float32_attention_logits):
    config = dataclasses.replace(
        GOLDEN_CONFIG, dtype="bfloat16", float32_attention_logits=float32_attention_logits
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(t5.T5(config).abstract_params())} == {
        jnp.dtype(jnp.float32)
    }
    batch = golden_batch("int")
    encoded = jax.eval_shape(
        lambda params, tokens: t5.Transformer(config).apply(
            {"params": params}, tokens, method="encode"
        ),
        golden_params(),
        batch["encoder_input_tokens"],
    )
    assert encoded.dtype == jnp.bfloat16
    logits = forward_of(config)(golden_params(), batch)
    assert logits.dtype == jnp.float32
    difference = np.abs(logits - GOLDEN["logits/int"])
    assert 1e-4 < difference.mean() < 2e-2  # bfloat16 keeps 8 bits, and it was used


def test_dropout_acts_only_with_a_key():
    config, batch = CONFIG_1_0, SOME_BATCH
    params = random_params(config)
    first, second = jax.random.split(jax.random.key(0))
    plain = forward_of(config)(params, batch)
    np.testing.assert_array_equal(forward_of(config)(params, batch, first), plain)

    forward = forward_of(dataclasses.replace(config, dropout_rate=0.5))
    np.testing.assert_array_equal(forward(params, batch), plain)
    dropped = forward(params, batch, first)
    np.testing.assert_array_equal(dropped, forward(params, batch, first))
    assert np.abs(dropped - forward(params, batch, second)).mean() > 0.1
    assert np.abs(dropped - plain).mean() > 0.1


def test_dropout_masks_are_shared_by_all_positions():
    # Copies of one token, no position bias, linear attention weights: every position has the same
    # state, and keeps it only if its dropout is that of the others.
    config = dataclasses.replace(CONFIG_1_0, dropout_rate=0.5)
    params = random_params(config)
    params["encoder"]["relpos_bias"]["rel_embedding"] *= 0
    states = jax.jit(
        lambda tokens, key: t5.Transformer(config).apply(
            {"params": params}, tokens, deterministic=False, method="encode", rngs={"dropout": key}
        )
    )(jnp.full((2, 6), 7, jnp.int32), jax.random.key(3))
    # Only the encoder's last dropout has a mask per position: undo it by looking at what it kept.
    kept = np.asarray(states) != 0
    assert 0.3 < kept.mean() < 0.7
    for row, row_kept in zip(np.asarray(states), kept, strict=True):
        for column in range(row.shape[1]):
            values = row[row_kept[:, column], column]
            np.testing.assert_allclose(values, values[:1].repeat(len(values)), atol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 0.1  # and each row has its own


# -------------------------------------------------------------------------------- Cached decoding


@pytest.mark.parametrize(
    ("config", "num_beams"),
    [(GOLDEN_CONFIG, 1), (CONFIG_1_0, 1), (CONFIG_1_0, 2)],
    ids=["1.1", "1.0", "1.0 beams"],
)
def test_cached_decoding_equals_teacher_forcing(config, num_beams):
    params = random_params(config)
    batch = SOME_BATCH
    expected = forward_of(config)(params, batch)

    network = t5.T5(config)
    tokens = batch["encoder_input_tokens"]
    start = jax.jit(
        functools.partial(
            network.start_decoding,
            num_beams=num_beams,
            max_length=41,  # longer than what is decoded
        )
    )(params, tokens, jnp.sum(tokens > 0, axis=1))
    inputs = jnp.repeat(batch["decoder_input_tokens"], num_beams, axis=0)
    np.testing.assert_array_equal(start.tokens, inputs[:, 0])
    step = jax.jit(network.decode_step)
    cache = start.cache
    for position in range(40):
        logits, cache = step(params, inputs[:, position], position, cache, start.memory)
        np.testing.assert_allclose(
            logits, jnp.repeat(expected[:, position], num_beams, axis=0), atol=5e-5
        )


# ----------------------------------------------------------------------------------- Parameters


def test_parameter_names_and_shapes_are_those_of_t5x():
    shapes = jax.tree.map(lambda x: x.shape, t5.T5(GOLDEN_CONFIG).abstract_params())
    expected = jax.tree.map(lambda x: x.shape, golden_params())
    assert shapes == expected
    tied = t5.T5(CONFIG_1_0).abstract_params()
    assert "logits_dense" not in tied["decoder"]
    assert set(tied["encoder"]["layers_0"]["mlp"]) == {"wi", "wo"}


def test_logical_axes_fit_the_parameters():
    axes = t5.T5(GOLDEN_CONFIG).logical_axes()
    jax.tree.map(lambda x, names: None if len(x.shape) == len(names) else pytest.fail(names),
                 t5.T5(GOLDEN_CONFIG).abstract_params(), axes)  # fmt: skip
    assert axes["token_embedder"]["embedding"] == ("vocab", "embed")
    assert axes["encoder"]["relpos_bias"]["rel_embedding"] == ("heads", "relpos_buckets")
    layer = axes["decoder"]["layers_1"]
    assert layer["self_attention"]["query"]["kernel"] == ("embed", "joined_kv")
    assert layer["encoder_decoder_attention"]["out"]["kernel"] == ("joined_kv", "embed")
    assert layer["mlp"]["wi_0"]["kernel"] == ("embed", "mlp")
    assert layer["mlp"]["wo"]["kernel"] == ("mlp", "embed")
    assert layer["pre_mlp_layer_norm"]["scale"] == ("norm",)
    assert axes["decoder"]["logits_dense"]["kernel"] == ("embed", "vocab")


def test_initializers_are_those_of_t5x():
    config = dataclasses.replace(
        GOLDEN_CONFIG, emb_dim=64, num_heads=16, mlp_dim=256, num_encoder_layers=1
    )
    params = jax.jit(t5.T5(config).init)(jax.random.key(0))
    layer = params["encoder"]["layers_0"]
    attention = {name: np.std(x["kernel"]) for name, x in layer["attention"].items()}
    expected = {
        "query": 1 / math.sqrt(64 * 16),  # fan-in 64, head_dim 16
        "key": 1 / math.sqrt(64),
        "value": 1 / math.sqrt(64),
        "out": 1 / math.sqrt(16 * 16),
    }
    assert attention == pytest.approx(expected, rel=0.03)
    assert np.std(layer["mlp"]["wi_1"]["kernel"]) == pytest.approx(1 / math.sqrt(64), rel=0.03)
    # A normal cut at two standard deviations, then scaled back to the wanted one.
    largest = np.abs(layer["mlp"]["wo"]["kernel"]).max() * math.sqrt(256)
    assert largest == pytest.approx(2 / 0.8796, rel=0.01)
    assert np.std(params["token_embedder"]["embedding"]) == pytest.approx(1, rel=0.03)
    logits_dense = params["decoder"]["logits_dense"]["kernel"]
    assert np.std(logits_dense) == pytest.approx(1 / math.sqrt(64), rel=0.03)
    rel_embedding = np.abs(params["decoder"]["relpos_bias"]["rel_embedding"])
    assert 0.9 < rel_embedding.max() / math.sqrt(3 / ((16 + 32) / 2)) <= 1
    assert (layer["pre_mlp_layer_norm"]["scale"] == 1).all()


# --------------------------------------------------------------------------------- Configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 0}, "T5Config.emb_dim: expected a whole number from 1 to 65,536, found 0"),
        (
            {"emb_dim": True},
            "T5Config.emb_dim: expected a whole number from 1 to 65,536, found True",
        ),
        ({"num_heads": 10**30}, r"T5Config.num_heads: expected a whole .* 4,096, found 1000\d*"),
        ({"num_decoder_layers": 1001}, "decoder_layers: expected .* from 1 to 1,000, found 1001"),
        ({"relpos_max_distance": 10**9}, "max_distance: expected .* to 1,048,576, found 1000"),
        (
            {"layer_norm_epsilon": 1e9},
            r"epsilon: expected a number from 0 to 1, found 1000000000.0",
        ),
        ({"layer_norm_epsilon": math.nan}, r"epsilon: expected a number from 0 to 1, found nan"),
        ({"mlp_activations": ("gelu", "glu")}, "gelu, linear, .*found .*'glu'"),
        ({"mlp_activations": ()}, "T5Config.mlp_activations must name one or more"),
        ({"dtype": "float16"}, "T5Config.dtype: expected float32 or bfloat16, found 'float16'"),
        ({"dtype": "bf16"}, "T5Config.dtype: expected float32 or bfloat16, found 'bf16'"),
        ({"dropout_rate": 1.0}, r"T5Config.dropout_rate: expected a number in \[0, 1\), found 1.0"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(CONFIG_1_0, **changes)


def test_segment_ids_come_in_pairs():
    batch = golden_batch("packed")
    del batch["decoder_segment_ids"]
    with pytest.raises(UsageError, match="both encoder_segment_ids and decoder_segment_ids"):
        jax.eval_shape(t5_inputs.make_forward(GOLDEN_CONFIG), golden_params(), batch)


def test_a_config_is_a_value():
    for dtype in (jnp.bfloat16, "bfloat16", jnp.dtype("bfloat16")):
        config = dataclasses.replace(CONFIG_1_0, dtype=dtype, mlp_activations=["relu"])
        assert config == dataclasses.replace(CONFIG_1_0, dtype="bfloat16")
        assert hash(config) == hash(dataclasses.replace(CONFIG_1_0, dtype="bfloat16"))


def test_a_network_of_many_layers_is_described_in_a_moment():
    """One layer of each stack is traced, which says all: what `init` makes is the same."""
    for of_layers in ({}, {"relpos_bias_per_layer": True}):
        config = dataclasses.replace(
            CONFIG_1_0, num_encoder_layers=3, num_decoder_layers=2, **of_layers
        )
        made = jax.eval_shape(t5.T5(config).init, jax.random.key(0))
        assert jax.tree.structure(made) == jax.tree.structure(t5.T5(config).abstract_params())
        assert jax.tree.leaves(made) == jax.tree.leaves(t5.T5(config).abstract_params())
    deep = dataclasses.replace(config, num_encoder_layers=1000, num_decoder_layers=1000)
    began = time.process_time()  # of this process alone, whatever else the machine does
    assert len(t5.T5(deep).abstract_params()["decoder"]) == 1000 + 1
    assert time.process_time() - began < 20  # traced, they take five minutes
