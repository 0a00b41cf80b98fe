"""Decoder-only networks: by hand, and the same in any rows, in a loop, by steps and on a mesh."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import t5_inputs
from helpers.tiny_llama import LLAMA

from tnt_jax import objectives
from tnt_jax.data.batches import Batches
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL, ENCODER_DECODER, count_lost, num_shared_by
from tnt_jax.models import causal_lm, causal_lm_layers, decoding, parameters, sharding
from tnt_jax.models.causal_lm_config import LayerKind, Llama3Scaling
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import originals, train_step
from tnt_jax.training.trainer import Trainer

# Every switch that Llama leaves off.
MIXED = dataclasses.replace(
    LLAMA,
    logits_via_embedding=False,
    num_layers=3,
    layer_kinds=(LayerKind(window=3), LayerKind(rope_theta=None), LayerKind(rope_factor=4.0)),
    layer_pattern=(0, 1, 2),
    attention_bias="all",
    query_key_norm="head",
    norms="pre_and_post",
    norm_scale_offset=1.0,
    scales_embedding=True,
    attention_scale=0.5,
    attention_softcap=1.5,
    final_softcap=3.0,
)
POST = dataclasses.replace(LLAMA, norms="post", query_key_norm="all_heads", num_kv_heads=4)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, MIXED, POST], ids=["llama", "mixed", "post"])
LENGTHS = {"inputs": 8, "targets": 6}
PACKED = {"inputs": 8, "targets": 12}  # several examples in a row
NOTHING = np.zeros((0, 2), np.int32)
TNRF = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")


def examples(sizes=((3, 4), (5, 2), (1, 6), (8, 3), (4, 3)), marks=(), seed=0):
    rng = np.random.default_rng(seed)

    def ids(number):
        return rng.integers(0, LLAMA.vocab_size, number).astype(np.int32)  # 0 and 1 as any other

    return [
        Example(ids(n), targets := ids(m), pairs_of(targets, marks), id=str(i))
        for i, (n, m) in enumerate(sizes)
    ]


def pairs_of(targets, marks):
    return np.array([(m, targets[m]) for m in marks if m < len(targets)], np.int32).reshape(-1, 2)


def logits_of(config, params, batch):
    return causal_lm.CausalLM(config).forward(params, jax.tree.map(jnp.asarray, batch)).whole()


# --- Rows -----------------------------------------------------------------------------------------


def test_a_row_by_hand():
    prompt, response = np.array([7, 8, 9], np.int32), np.array([4, 0, 5], np.int32)
    example = Example(prompt, response, np.array([[1, 0]], np.int32))
    features = CAUSAL.convert([example], {"inputs": 4, "targets": 4})
    assert {name: rows[0].tolist() for name, rows in features.items()} == {
        "decoder_input_tokens": [7, 8, 9, 4, 0, 0, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 1, 0, 0, 0],
        "decoder_positions": [0, 1, 2, 3, 4, 0, 0, 0],
        # The prompt's last token predicts the first of the response.
        "decoder_target_places": [2, 3, 4, 0],
        "decoder_target_tokens": [4, 0, 5, 0],
        "decoder_loss_mask": [1, 1, 1, 0],
        "decoder_negative_ids": [[-1], [0], [-1], [-1]],
    }


def test_a_long_prompt_loses_its_beginning_behind_the_first_token():
    example = Example(np.arange(10, 20, dtype=np.int32), np.array([1], np.int32), NOTHING)
    features = CAUSAL.convert([example], {"inputs": 4, "targets": 2})
    assert features["decoder_input_tokens"][0].tolist() == [10, 17, 18, 19, 0, 0]
    assert count_lost([example], {"inputs": 4, "targets": 2}).num_inputs == 1


def test_a_response_follows_a_prompt():
    example = Example(np.zeros(0, np.int32), np.array([4], np.int32), NOTHING, id="lonely")
    with pytest.raises(UsageError, match=r"'lonely': expected a prompt of at least one token"):
        CAUSAL.convert([example], LENGTHS)


@CONFIGS
def test_packed_rows_have_the_logits_of_rows_of_their_own(config):
    params, rows = t5_inputs.random_params(config), examples()
    alone = logits_of(config, params, CAUSAL.convert(rows, PACKED))
    batches = Batches(rows, 2, PACKED, seed=0, pack=True, feature_layout=CAUSAL)
    places, packed = batches.read(0).places, logits_of(config, params, batches.batch(0))
    assert len(places) > 2
    for example, row, _, _, start, number in places:
        found = packed[row, start : start + number]
        np.testing.assert_allclose(found, alone[example, :number], atol=2e-5)


# --- The network ----------------------------------------------------------------------------------


def test_a_rotation_by_hand():
    """One pair of dimensions at theta 100: at position 3 the second pair turns by 0.3."""
    speeds = LayerKind(rope_theta=100.0).inverse_frequencies(4)
    np.testing.assert_allclose(speeds, [1, 0.1], rtol=1e-6)
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    found = causal_lm_layers.rotate(x, jnp.array([[3]]), jnp.asarray(speeds))[0, 0, 0]
    c, s = np.cos([3, 0.3]), np.sin([3, 0.3])
    expected = [c[0] - 3 * s[0], 2 * c[1] - 4 * s[1], 3 * c[0] + s[0], 4 * c[1] + 2 * s[1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_llama_3_slows_down_what_turns_less_than_once():
    scaling = Llama3Scaling(
        factor=8, low_freq_factor=1, high_freq_factor=4, original_max_positions=8192
    )
    plain = LayerKind(rope_theta=500_000.0).inverse_frequencies(128)
    found = LayerKind(rope_theta=500_000.0, rope_llama3=scaling).inverse_frequencies(128)
    turns = plain * 8192 / (2 * np.pi)
    np.testing.assert_allclose(found[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / 8).all()


def test_a_window_ends_what_is_seen():
    """Through two layers with a window of 3 a token is seen four positions on, and no further."""
    config = dataclasses.replace(LLAMA, layer_kinds=(LayerKind(window=3),))
    params = t5_inputs.random_params(config)

    def first_logit(prompt):
        example = Example(np.array(prompt, np.int32), np.array([1], np.int32), NOTHING)
        return logits_of(config, params, CAUSAL.convert([example], LENGTHS))[0, 0]

    row = [3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(first_logit(row), first_logit([9, *row[1:]]))
    assert np.abs(first_logit(row) - first_logit([3, 9, *row[2:]])).max() > 1e-3


@pytest.mark.parametrize(
    ("config", "remat_policy"),
    [(LLAMA, "none"), (MIXED, "full"), (POST, "minimal")],
    ids=["llama", "mixed", "post"],
)
def test_stacked_layers_have_the_logits_and_gradients_of_layers_apart(config, remat_policy):
    params, batch = t5_inputs.random_params(config), CAUSAL.convert(examples(), LENGTHS)
    stacked = dataclasses.replace(config, scan_layers=True, remat_policy=remat_policy)

    def total(config, params):
        return jnp.sum(jnp.sin(logits_of(config, params, batch)))

    expected = jax.jit(jax.value_and_grad(functools.partial(total, config)))(params)
    found = jax.jit(jax.value_and_grad(functools.partial(total, stacked)))(
        parameters.stack_layers(params)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * largest),
        parameters.unstack_layers(found[1]),
        expected[1],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "head_dim to be even"),
        ({"norms": "none"}, "norms: expected one of pre, pre_and_post, post, found 'none'"),
        ({"layer_pattern": (0, 1)}, "indices of the 1 layer_kinds"),
        ({"num_layers": 0}, "num_layers: expected a whole number from 1"),
        (
            {"final_softcap": 0.0},
            "final_softcap: expected a number above 0 and below 1e.06, or None, found 0.0",
        ),
    ],
)
def test_settings_that_no_network_has(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(LLAMA, **changes)


# --- Decoding -------------------------------------------------------------------------------------


def decoded(config, params, prompts, num_shared=0, **settings):
    tokens = np.zeros((len(prompts), 9), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in prompts], np.int32)
    keys = decoding.record_keys(0, [str(len(ids)) for ids in prompts])
    settings = {"max_length": LENGTHS["targets"], "end_ids": (39,), **settings}
    return decoding.decode(
        params,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        keys,
        config=config,
        decoding=decoding.Decoding(**settings),
        num_shared=num_shared,
    )


@CONFIGS
def test_steps_are_the_teacher_forced_argmax(config):
    params, rows = t5_inputs.random_params(config), examples()
    found = decoded(config, params, [row.inputs for row in rows], end_ids=())
    said = [
        dataclasses.replace(row, targets=np.asarray(ids))
        for row, ids in zip(rows, found.tokens, strict=True)
    ]
    log_probs = jax.nn.log_softmax(logits_of(config, params, CAUSAL.convert(said, LENGTHS)))
    np.testing.assert_array_equal(found.tokens, log_probs.argmax(-1))
    np.testing.assert_allclose(found.log_prob, log_probs.max(-1).sum(1), atol=2e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"temperature": 1.0}], ids=str)
def test_a_prompt_among_others_says_what_it_says_alone(settings):
    params = t5_inputs.random_params(MIXED)
    prompts = [row.inputs for row in examples()]
    together = decoded(MIXED, params, [*prompts, []], **settings)
    for row, prompt in enumerate(prompts):
        alone = decoded(MIXED, params, [prompt], **settings)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.log_prob[row], alone.log_prob[0], atol=1e-4)
    assert not together.tokens[-1].any()  # filler


@pytest.mark.parametrize(
    ("config", "settings"),
    [(LLAMA, {}), (POST, {}), (MIXED, {"temperature": 1.0}), (MIXED, {"num_beams": 3})],
)
def test_what_all_prompts_begin_with_is_read_once(config, settings):
    params = t5_inputs.random_params(config)
    beginning = examples(((5, 1),), seed=1)[0].inputs
    prompts = [[*beginning, *row.inputs[:4]] for row in examples()]
    apart = decoded(config, params, prompts, **settings)
    found = decoded(config, params, [*prompts, []], num_shared=5, **settings)
    np.testing.assert_array_equal(found.tokens[:-1], apart.tokens)
    np.testing.assert_allclose(found.log_prob[:-1], apart.log_prob, atol=1e-4)
    assert not found.tokens[-1].any()  # filler


@pytest.mark.parametrize("num_beams", [1, 3])
def test_devices_that_share_a_batch_each_read_what_its_prompts_begin_with(num_beams):
    prompts = [[7, 8, 9, 10, *row.inputs[:4].tolist()] for row in examples()]
    settings = decoding.Decoding(max_length=LENGTHS["targets"], num_beams=num_beams)
    found = []
    for shape, num_shared in (((1, 1, 1), 0), ((2, 2, 2), 4)):
        mesh = sharding.make_mesh(
            sharding.MeshShape(data=shape[0], fsdp=shape[1], model=shape[2]),
            jax.devices()[: math.prod(shape)],
        )
        of_mesh = Model(config=MIXED, mesh=mesh)
        params = of_mesh.init(0)
        found.append(of_mesh.decode(params, prompts, 9, settings, 8, num_shared=num_shared))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].log_prob, found[1].log_prob, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([], 0),
        ([range(20)], 16),  # one token at least is its own
        ([range(17), range(30)], 16),
        ([range(16), range(30)], 8),
        ([[*range(9), 1], [*range(9), 2, 3]], 8),
        ([[*range(20), 1], [*range(20), 2], [5, *range(20)]], 0),
        ([range(20), []], 0),
    ],
)
def test_what_inputs_have_in_common(inputs, expected):
    assert num_shared_by(inputs) == expected


def test_beams_score_what_they_say():
    params, rows = t5_inputs.random_params(MIXED), examples()
    found = decoded(MIXED, params, [row.inputs for row in rows], num_beams=4, length_penalty=0.0)
    said = [
        dataclasses.replace(row, targets=np.asarray(ids))
        for row, ids in zip(rows, found.tokens, strict=True)
    ]
    log_probs = jax.nn.log_softmax(logits_of(MIXED, params, CAUSAL.convert(said, LENGTHS)))
    chosen = np.take_along_axis(np.asarray(log_probs), found.tokens[:, :, None], axis=2)[:, :, 0]
    ended = np.cumsum(np.asarray(found.tokens) == 39, axis=1) > 0
    is_said = ~np.pad(ended, ((0, 0), (1, 0)))[:, :-1]
    np.testing.assert_allclose(found.log_prob, (chosen * is_said).sum(1), atol=2e-4)
    greedy = decoded(MIXED, params, [row.inputs for row in rows])
    assert (found.log_prob >= greedy.log_prob - 1e-4).all()


# --- Training: the one train step -----------------------------------------------------------------


SIZES = [(3, 4), (5, 2), (1, 6), (8, 3), (4, 3), (2, 5), (6, 6), (3, 1)]


def update(config, shape, num_microbatches=1, marks=(1, 3), original_seed=1, batch=None):
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    model = Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape(**shape), devices))
    trainer = Trainer(
        model=model,
        objective=TNRF,
        optimizer=optax.adafactor(1e-2, min_dim_size_to_factor=16),
        num_microbatches=num_microbatches,
    )
    place = functools.partial(jax.tree.map, lambda x, like: jax.device_put(x, like.sharding))
    params = place(t5_inputs.random_params(config), model.abstract_params)
    original = place(t5_inputs.random_params(config, original_seed), model.abstract_params)
    if batch is None:
        batch = CAUSAL.convert(examples(SIZES, marks), LENGTHS)
    state, sums = trainer.step(
        trainer.init_state(params),
        original,
        sharding.put_batch(batch, model.mesh),
        jax.device_put(jax.random.key(0), sharding.replicated(model.mesh)),
    )
    return jax.tree.map(np.asarray, (state.params, sums))


@functools.cache
def update_on_one_device(config):
    return update(config, {"data": 1})


@pytest.mark.parametrize(
    ("shape", "num_microbatches"),
    [
        ({"data": 2, "fsdp": 2, "model": 2}, 2),
        ({"fsdp": 4, "model": 2}, 1),
        ({"data": 1}, 4),
    ],
    ids=str,
)
def test_eight_devices_and_microbatches_give_the_update_of_one(shape, num_microbatches):
    expected_params, expected = update_on_one_device(MIXED)
    params, sums = update(MIXED, shape, num_microbatches)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(sums[name], expected[name], rtol=2e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        params,
        expected_params,
    )


def rows_that_begin_alike(num_shared=5, num_filler=0, said=True):
    """A batch whose rows begin with the same tokens; with `said` it has the feature for that."""
    beginning = np.arange(11, 11 + num_shared, dtype=np.int32)
    rows = [
        dataclasses.replace(row, inputs=np.concatenate([beginning, row.inputs]))
        for row in examples(SIZES, marks=(1, 3))
    ]
    nothing = np.zeros(0, np.int32)
    rows += [Example(nothing, nothing, NOTHING)] * num_filler
    lengths = {"inputs": num_shared + 8, "targets": 6}
    return CAUSAL.convert(rows, lengths, num_shared=num_shared if said else 0)


def assert_same_update(found, expected):
    (params, sums), (expected_params, expected_sums) = found, expected
    for name in ("loss", "gradient_norm", "num_tokens"):
        np.testing.assert_allclose(sums[name], expected_sums[name], rtol=2e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        params,
        expected_params,
    )


@functools.cache
def update_of_rows_apart(config):
    return update(config, {"data": 1}, batch=rows_that_begin_alike(said=False))


@pytest.mark.parametrize(
    ("config", "shape", "num_microbatches"),
    [
        (LLAMA, {"data": 1}, 1),
        (POST, {"data": 1}, 1),
        (MIXED, {"data": 1}, 4),
        (MIXED, {"data": 2, "fsdp": 2, "model": 2}, 2),
        (MIXED, {"fsdp": 4, "model": 2}, 1),
    ],
    ids=["llama", "post", "microbatches", "all axes", "fsdp and model"],
)
def test_what_rows_begin_with_is_learned_from_once_for_all(config, shape, num_microbatches):
    batch = rows_that_begin_alike()
    assert batch["decoder_shared_tokens"].tolist() == [[11, 12, 13, 14, 15]] * len(SIZES)
    found = update(config, shape, num_microbatches, batch=batch)
    assert_same_update(found, update_of_rows_apart(config))


def test_what_rows_begin_with_is_computed_once_in_a_loop_of_layers():
    config = dataclasses.replace(MIXED, scan_layers=True, remat_policy="full")
    batches = [rows_that_begin_alike(said=said) for said in (True, False)]
    found, expected = (update(config, {"data": 1}, batch=batch) for batch in batches)
    assert_same_update(found, expected)


def test_what_rows_begin_with_is_computed_once_where_a_kernel_attends():
    params = t5_inputs.random_params(MIXED)
    by_kernel = dataclasses.replace(MIXED, attention="splash")
    batch = rows_that_begin_alike()
    found = logits_of(by_kernel, params, batch)
    expected = logits_of(MIXED, params, rows_that_begin_alike(said=False))
    is_target = batch["decoder_loss_mask"] > 0
    np.testing.assert_allclose(found[is_target], expected[is_target], atol=2e-5)


@pytest.mark.parametrize("shape", [{"data": 1}, {"data": 2, "fsdp": 4}], ids=str)
def test_filler_rows_begin_as_they_like(shape):
    """There are 8 rows and 8 of filler: on 8 devices, half of the devices have filler alone."""
    devices = jax.devices()[: math.prod(shape.values())]
    model = Model(config=MIXED, mesh=sharding.make_mesh(sharding.MeshShape(**shape), devices))
    forward = jax.jit(sharding.traced_on(model.mesh, model.forward))
    params, found = t5_inputs.random_params(MIXED), []
    params = jax.device_put(params, sharding.replicated(model.mesh))
    for said in (True, False):
        batch = rows_that_begin_alike(num_filler=8, said=said)
        logits = forward(params, sharding.put_batch(batch, model.mesh)).whole()
        assert np.isfinite(logits).all()
        found.append(np.asarray(logits)[batch["decoder_loss_mask"] > 0])
    np.testing.assert_allclose(*found, atol=2e-5)


def test_joined_rows_lie_as_whole_ones_do():
    """Before the compiler: heads that devices share out stay where they are."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, model=2))
    model = Model(config=LLAMA, mesh=mesh)
    program = jax.jit(sharding.traced_on(mesh, model.forward))
    batch = jax.tree.map(jnp.asarray, rows_that_begin_alike())
    text = program.lower(model.abstract_params, batch).as_text()
    said = re.findall(r"sharding_constraint .*<@mesh, \[(.*)\]> : tensor<(.*)>", text)
    rows, positions = '{"data", "fsdp"}', 5 + 2 * 14
    width, heads = LLAMA.emb_dim, LLAMA.num_heads * LLAMA.head_dim
    assert width != heads
    assert (f"{rows}, {{}}, {{}}", f"4x{positions}x{width}xf32") in said
    assert (f'{rows}, {{}}, {{"model"}}', f"4x{positions}x{heads}xf32") in said


def test_one_row_of_each_part_has_nothing_to_share():
    mesh = sharding.make_mesh(sharding.MeshShape(fsdp=8))
    model = Model(config=LLAMA, mesh=mesh)
    program = jax.jit(sharding.traced_on(mesh, model.forward))
    one, other = (
        program.lower(model.abstract_params, rows_that_begin_alike(said=said)).as_text()
        for said in (True, False)
    )
    assert one.count("concatenate") == other.count("concatenate")


def test_with_dropout_no_two_rows_begin_alike():
    """The masks of dropout are those of rows apart."""
    network = causal_lm.CausalLM(dataclasses.replace(MIXED, dropout_rate=0.5))
    params, key = t5_inputs.random_params(MIXED), jax.random.key(0)
    batches = (rows_that_begin_alike(said=said) for said in (True, False))
    found, expected = (
        network.forward(params, jax.tree.map(jnp.asarray, batch), key).whole() for batch in batches
    )
    np.testing.assert_array_equal(found, expected)


def test_what_rows_begin_with_is_computed_once(optimised):
    """Eight rows have 46 positions each, and begin with the same 32.

    So 32 + 8 x 14 = 144 positions are computed, not 8 x 46 = 368. (Attention is computed for all of
    them, but takes little in a network that is as wide as this one.)
    """
    config = dataclasses.replace(LLAMA, emb_dim=128, mlp_dim=512)
    network, params = causal_lm.CausalLM(config), t5_inputs.random_params(config)
    flops = []
    for said in (True, False):
        batch = rows_that_begin_alike(32, said=said)
        assert batch["decoder_input_tokens"].shape == (8, 46)
        batch = jax.tree.map(jnp.asarray, batch)
        lowered = jax.jit(network.lower_states, static_argnums=2).lower(params, batch, 1)
        flops.append(lowered.compile().cost_analysis()["flops"])
    assert flops[0] < 0.5 * flops[1]


@pytest.mark.parametrize(
    ("inputs", "length", "expected"),
    [
        ([range(20), range(30)], 30, 16),
        ([range(20), range(40)], 30, 0),  # the second is cut: it has lost its beginning
        ([range(9), range(30)], 30, 8),
        ([range(9), range(300)], 300, 0),  # too little of a row of 306
        ([[*range(20), 1], [5, *range(20)]], 30, 0),
    ],
)
def test_what_the_rows_of_examples_have_in_common(inputs, length, expected):
    rows = [Example(np.array(ids, np.int32), np.zeros(1, np.int32), NOTHING) for ids in inputs]
    lengths = {"inputs": length, "targets": 6}
    assert CAUSAL.num_shared(rows, lengths) == expected
    assert ENCODER_DECODER.num_shared(rows, lengths) == 0


def adapters_of(config, num_layers=None):
    """A model with adapters in its upper layers, and its loss with gradient, and a batch."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    model = Model(config=dataclasses.replace(config, adapter_scale=2.0), mesh=mesh)
    params = t5_inputs.random_params(config)
    batch = CAUSAL.convert(examples(marks=(1,)), LENGTHS)
    trainer = Trainer(
        model=model,
        objective=TNRF,
        optimizer=optax.sgd(1.0),  # an update is the gradient
        original_kind=originals.Original(has_adapters=True, trained_layers=num_layers),
        adapter_rank=2,
    )
    state = trainer.init_state(model.init_adapters(2, 0, num_layers))
    place = functools.partial(jax.tree.map, lambda x, like: jax.device_put(x, like.sharding))
    arguments = (
        state,
        place(params, model.abstract_computed_params),
        sharding.put_batch(batch, mesh),
        jax.device_put(jax.random.key(0), sharding.replicated(mesh)),
    )
    return trainer, arguments


@CONFIGS
def test_upper_layers_learn_what_they_learn_where_all_do(config):
    """Adapters that are zero change nothing: lower ones decide nothing of the first update."""
    trainer, arguments = adapters_of(config)
    everywhere, sums = trainer.step(*arguments)
    trainer, arguments = adapters_of(config, 1)
    upper, upper_sums = trainer.step(*arguments)
    np.testing.assert_array_equal(upper_sums["loss"], sums["loss"])
    last = f"layers_{config.num_layers - 1}"
    assert upper.params.keys() == {"decoder"}
    assert upper.params["decoder"].keys() == {last}
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        upper.params["decoder"][last],
        everywhere.params["decoder"][last],
    )
    assert upper_sums["gradient_norm"] > 0


def test_lower_layers_are_computed_once_and_have_no_gradient(optimised):
    """Counted in forward passes of one layer, for a model of 8.

    Adapters everywhere: 8 for the model, 8 for its original, and at least 8 for the gradient.
    Adapters in the upper 2: 8 for the model, 2 for its original, and 2 for the gradient.
    """
    config = dataclasses.replace(LLAMA, num_layers=8)
    flops = {}
    for number in (None, 2):
        trainer, arguments = adapters_of(config, number)
        flops[number] = trainer.step.lower(*arguments).compile().cost_analysis()["flops"]
    assert flops[2] < (8 + 2 + 2) / (8 + 8 + 8) * 1.1 * flops[None]


def test_layers_that_are_not_there_or_not_apart():
    with pytest.raises(UsageError, match=r"TRAINED_LAYERS: expected None or 1 to 3, .* found 4\."):
        adapters_of(MIXED, 4)[0].abstract_params  # noqa: B018
    stacked = dataclasses.replace(LLAMA, scan_layers=True)
    with pytest.raises(UsageError, match=r"TRAINED_LAYERS=1: expected SCAN_LAYERS=False, "):
        adapters_of(stacked, 1)


def test_the_original_is_a_fixed_point():
    _, sums = update(MIXED, {"data": 2, "fsdp": 2, "model": 2}, marks=(), original_seed=0)
    assert sums["loss"] == sums["gradient_norm"] == 0


@CONFIGS
def test_cached_states_give_the_logits_of_a_second_forward_pass(config):
    network, params = causal_lm.CausalLM(config), t5_inputs.random_params(config)
    batch = jax.tree.map(jnp.asarray, CAUSAL.convert(examples(), LENGTHS))
    expected = network.forward(params, batch)
    cached = originals.Original(cached_from=config).logits(
        network.forward,
        network.upper_params(params, 0),
        batch | {originals.STATES: expected.hidden},
    )
    np.testing.assert_array_equal(cached.whole(), expected.whole())


def test_heads_that_the_mesh_does_not_divide_are_named():
    config = dataclasses.replace(LLAMA, num_heads=3, num_kv_heads=3)
    with pytest.raises(UsageError, match=r"MODEL_DEVICES: .* 3 heads of keys and values, found 2"):
        update(config, {"data": 4, "model": 2})


def test_packed_examples_give_the_sums_of_rows_of_their_own():
    rows = examples(marks=(0, 2))
    network = causal_lm.CausalLM(MIXED)
    batches = Batches(rows, 2, PACKED, seed=0, pack=True, feature_layout=CAUSAL)
    packed, chosen = batches.batch(0), [rows[place.example] for place in batches.read(0).places]
    params, original = t5_inputs.random_params(MIXED), t5_inputs.random_params(MIXED, 1)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(params, batch):
        return train_step.token_sums(
            TNRF, network.forward(params, batch), network.forward(original, batch), batch
        )

    (_, sums), found = gradient(params, jax.tree.map(jnp.asarray, packed))
    (_, expected_sums), expected = gradient(
        params, jax.tree.map(jnp.asarray, CAUSAL.convert(chosen, PACKED))
    )
    for name, value in expected_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
    size = float(optax.tree.norm(expected))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * size),
        found,
        expected,
    )
