"""Layers in a loop, and layers computed twice, are the network that they are of."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import t5_inputs
from helpers.t5_inputs import CONFIG_1_0, SOME_BATCH, random_params
from jax.sharding import PartitionSpec

from tnt_jax import objectives
from tnt_jax.checkpoints import digests
from tnt_jax.models import decoding, parameters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import optimizers
from tnt_jax.training.trainer import Trainer

# Two depths, so that the stacks cannot be taken for each other.
T5_1_0 = dataclasses.replace(CONFIG_1_0, num_encoder_layers=2, num_decoder_layers=3)
T5_1_1 = dataclasses.replace(T5_1_0, mlp_activations=("gelu", "linear"), logits_via_embedding=False)
UMT5 = dataclasses.replace(T5_1_1, relpos_bias_per_layer=True)
CONFIGS = {"1.0": T5_1_0, "1.1": T5_1_1, "umt5": UMT5}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def scanned(config, **changes):
    return dataclasses.replace(config, scan_layers=True, **changes)


def packed(batch):
    """The same tokens as two segments of each row, one where the other is cut."""
    return batch | {
        "encoder_segment_ids": jnp.where(jnp.arange(12)[None] < 4, 1, 2)
        * (batch["encoder_input_tokens"] > 0),
        "decoder_segment_ids": jnp.where(jnp.arange(40)[None] < 9, 1, 2)
        * (batch["decoder_target_tokens"] > 0),
    }


def loss_of(config, dropout_key=None):
    """A number in which every logit counts on its own."""
    forward = t5_inputs.make_forward(config)

    def loss(params, batch):
        logits = forward(params, batch, dropout_key)
        weights = jax.random.normal(jax.random.key(5), logits.shape)
        return jnp.mean(logits * weights), logits

    return loss


# LLVM's optimisations take longer than what they speed up.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


@functools.cache
def gradients_of(config, is_packed=False):
    """Logits, and gradients with layers apart, of one set of parameters."""
    params = random_params(dataclasses.replace(config, scan_layers=False))
    if config.scan_layers:
        params = parameters.stack_layers(params)
    batch = packed(SOME_BATCH) if is_packed else SOME_BATCH
    gradients, logits = quick_jit(jax.grad(loss_of(config), has_aux=True))(params, batch)
    return logits, parameters.unstack_layers(gradients)


def assert_close(found, expected, atol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), found, expected
    )


# ------------------------------------------------------------------------------------ One network


@pytest.mark.parametrize(
    ("config", "is_packed"),
    [(T5_1_0, False), (T5_1_1, True), (UMT5, False)],
    ids=["1.0", "1.1 packed", "umt5"],
)
def test_values_and_gradients_are_those_of_layers_apart(config, is_packed):
    assert_close(gradients_of(scanned(config), is_packed), gradients_of(config, is_packed))


@pytest.mark.parametrize(
    ("policy", "scan_layers"), [("minimal", True), ("full", True), ("full", False)]
)
def test_gradients_are_those_without_remat(policy, scan_layers):
    config = dataclasses.replace(UMT5, remat_policy=policy, scan_layers=scan_layers)
    assert_close(gradients_of(config), gradients_of(UMT5))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_computed_again_has_the_same_dropout(scan_layers):
    config = dataclasses.replace(CONFIG_1_0, dropout_rate=0.3, scan_layers=scan_layers)
    params = t5.T5(config).init(jax.random.key(0))

    def gradients(policy):
        settings = dataclasses.replace(config, remat_policy=policy)
        loss = loss_of(settings, dropout_key=jax.random.key(2))
        return quick_jit(jax.grad(loss, has_aux=True))(params, SOME_BATCH)

    assert_close(gradients("full"), gradients("none"))


def test_every_scanned_layer_has_a_dropout_of_its_own():
    # All layers add the same number to every element that their dropout lets through. With one mask
    # for all of them, and one for what they begin with, a row would have four sizes at most.
    config = scanned(CONFIG_1_0, num_encoder_layers=8, dropout_rate=0.5)
    params = jax.tree.map(jnp.zeros_like, t5.T5(config).init(jax.random.key(0)))
    layers = params["encoder"]["layers"]
    for norm in (layers["pre_mlp_layer_norm"], params["encoder"]["encoder_norm"]):
        norm["scale"] += 1
    layers["mlp"]["wi"]["kernel"] += 1
    layers["mlp"]["wo"]["kernel"] += 1
    params["token_embedder"]["embedding"] += 1
    states = t5.Transformer(config).apply(
        {"params": params},
        jnp.full((4, 1), 7),
        deterministic=False,
        method="encode",
        rngs={"dropout": jax.random.key(1)},
    )
    sizes = [len(np.unique(np.round(row[row != 0], 4))) for row in np.asarray(states)[:, 0]]
    assert max(sizes) > 4


def test_full_keeps_less_than_minimal_and_minimal_less_than_none():
    config = dataclasses.replace(CONFIG_1_0, num_encoder_layers=4, num_decoder_layers=4)

    def temporary_bytes(policy):
        settings = scanned(config, remat_policy=policy)
        gradient = quick_jit(jax.grad(loss_of(settings), has_aux=True))
        compiled = gradient.lower(t5.T5(settings).abstract_params(), SOME_BATCH).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    full, minimal, none = (temporary_bytes(policy) for policy in ("full", "minimal", "none"))
    assert full < minimal < none


# ------------------------------------------------------------------------------------- Parameters


@each_config
def test_stacked_parameters_start_from_the_same_numbers(config):
    key = jax.random.key(3)
    apart, stacked = t5.T5(config).init(key), t5.T5(scanned(config)).init(key)
    kernel = stacked["decoder"]["layers"]["self_attention"]["query"]["kernel"]
    for i in range(3):
        expected = apart["decoder"][f"layers_{i}"]["self_attention"]["query"]["kernel"]
        np.testing.assert_array_equal(kernel[i], expected)
    assert_close(stacked, parameters.stack_layers(apart), atol=0)
    assert_close(parameters.unstack_layers(stacked), apart, atol=0)
    # What is so already stays so.
    assert_close(parameters.stack_layers(stacked), stacked, atol=0)
    assert_close(parameters.unstack_layers(apart), apart, atol=0)


def test_stacked_parameters_are_those_that_the_network_asks_for():
    config = scanned(UMT5)
    tokens = jnp.ones((1, 1), jnp.int32)
    boxed = jax.eval_shape(
        lambda: t5.Transformer(config).init(jax.random.key(0), tokens, tokens, tokens)["params"]
    )
    names = jax.tree.map(lambda x: x.names, boxed, is_leaf=lambda x: hasattr(x, "names"))
    assert names == t5.T5(config).logical_axes()
    shapes = jax.tree.map(lambda x: x.value.shape, boxed, is_leaf=lambda x: hasattr(x, "names"))
    assert shapes == jax.tree.map(lambda x: x.shape, t5.T5(config).abstract_params())
    assert names["encoder"]["layers"]["mlp"]["wo"]["kernel"] == ("layers", "mlp", "embed")


def test_eleven_layers_are_in_the_order_of_their_numbers():
    apart = {
        "decoder": {f"layers_{i}": {"scale": jnp.full(2, i)} for i in (10, 2, 0, 1, *range(3, 10))}
    }
    stacked = parameters.stack_layers(apart)["decoder"]["layers"]["scale"]
    np.testing.assert_array_equal(stacked[:, 0], range(11))


def test_shapes_are_stacked_as_arrays_are():
    shapes = t5.T5(T5_1_0).abstract_params()
    assert parameters.stack_layers(shapes) == t5.T5(scanned(T5_1_0)).abstract_params()
    assert parameters.unstack_layers(t5.T5(scanned(T5_1_0)).abstract_params()) == shapes


@pytest.mark.parametrize("policy", ["all", "Full"])
def test_an_unknown_policy_is_named(policy):
    with pytest.raises(UsageError, match="policy: expected one of none, minimal, full, found"):
        dataclasses.replace(T5_1_0, remat_policy=policy)


# --------------------------------------------------------------------------------------- Decoding


@pytest.mark.parametrize("config", [T5_1_0, UMT5], ids=["1.0", "umt5"])
def test_outputs_are_those_of_layers_apart(config):
    params = random_params(config)
    settings = decoding.Decoding(max_length=6, num_beams=2, end_ids=(1,), banned_ids=(0,))
    tokens = SOME_BATCH["encoder_input_tokens"]
    lengths = (tokens != 0).sum(axis=1)
    expected = decoding.decode(params, tokens, lengths, config=config, decoding=settings)
    found = decoding.decode(
        parameters.stack_layers(params),
        tokens,
        lengths,
        config=scanned(config, remat_policy="full"),
        decoding=settings,
    )
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, rtol=1e-6)


def test_weights_are_cut_out_of_their_stacks_before_the_loop():
    config = scanned(T5_1_1)
    tokens = SOME_BATCH["encoder_input_tokens"]
    traced = jax.jit(
        functools.partial(decoding.decode, config=config, decoding=decoding.Decoding(max_length=4))
    ).trace(t5.T5(config).abstract_params(), tokens, (tokens != 0).sum(axis=1))
    (call,) = (eqn for eqn in traced.jaxpr.jaxpr.eqns if "jaxpr" in eqn.params)
    (loop,) = (eqn for eqn in call.params["jaxpr"].eqns if eqn.primitive.name == "while")
    stacked = (3, config.emb_dim, config.num_heads * config.head_dim)
    assert stacked in {var.aval.shape for var in call.params["jaxpr"].jaxpr.invars}
    assert stacked not in {var.aval.shape for var in loop.invars}


# -------------------------------------------------------------------------------------- Adafactor


def few_params():
    """One parameter of each kind of shape, in stacks of two and of three layers."""
    rng = np.random.default_rng(0)

    def layer():
        return {"wi": rng.normal(size=(16, 24)), "scale": rng.normal(size=16)}

    params = {
        "token_embedder": {"embedding": rng.normal(size=(50, 16))},
        "encoder": {f"layers_{i}": layer() for i in range(2)},
        "decoder": {f"layers_{i}": layer() for i in range(3)} | {"norm": rng.normal(size=16)},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


@pytest.mark.parametrize(
    "settings",
    [{"min_dim_size_to_factor": 12}, {"weight_decay_rate": 0.1}, {"momentum": 0.9}],
    ids=str,
)
def test_adafactor_updates_each_layer_as_a_parameter_of_its_own(settings):
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    params = few_params()
    # Gradients of very different sizes, so that what one layer's is clipped by is not another's.
    gradients = jax.tree.map(lambda x: x**3, params)
    gradients["decoder"]["layers_1"]["wi"] *= 100
    stacked = parameters.stack_layers(params)
    plain, of_layers = (
        optax.adafactor(schedule, **settings),
        optimizers.adafactor(schedule, **settings),
    )
    plain_state, state = plain.init(params), of_layers.init(stacked)
    for _ in range(3):
        updates, plain_state = plain.update(gradients, plain_state, params)
        params = optax.apply_updates(params, updates)
        updates, state = of_layers.update(parameters.stack_layers(gradients), state, stacked)
        stacked = optax.apply_updates(stacked, updates)
        assert_close(parameters.unstack_layers(stacked), params, atol=1e-8)
    assert state[0].count == 3


def test_without_a_stack_it_is_optax_s_adafactor():
    params = few_params()
    gradients = jax.tree.map(lambda x: x**3, params)
    found, expected = (
        optimizer.update(gradients, optimizer.init(params), params)
        for optimizer in (optimizers.adafactor(0.1), optax.adafactor(0.1))
    )
    assert_close(found, expected, atol=0)


# ------------------------------------------------------------------------------------- Checkpoints


def test_the_fingerprint_is_of_the_network():
    params = random_params(UMT5)
    digest = digests.of_params(params)
    assert digests.of_params(parameters.stack_layers(params)) == digest
    other = parameters.stack_layers(params)
    scale = other["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"]
    other["encoder"]["layers"]["pre_mlp_layer_norm"]["scale"] = scale[::-1]
    assert digests.of_params(other) != digest


# ---------------------------------------------------------------------------------------- On a mesh

# Sizes by which an array in a compiled program is recognised.
OF_A_MESH = dataclasses.replace(
    T5_1_1,
    vocab_size=56,
    emb_dim=24,
    num_heads=4,
    mlp_dim=40,
    num_encoder_layers=1,
    num_decoder_layers=2,
    remat_policy="full",
)
FINE_TUNE = objectives.TntObjective(negative_term="none", positive_term="log_likelihood")


def batch_of(num_rows):
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 50, (num_rows, 5)).astype(np.int32)
    return {
        "encoder_input_tokens": rng.integers(1, 50, (num_rows, 7)).astype(np.int32),
        "decoder_input_tokens": np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": tokens,
        "decoder_loss_mask": np.ones_like(tokens),
        "decoder_negative_ids": np.full((num_rows, 5, 1), -1, np.int32),
    }


def step_on(config, shape, devices):
    """The parameters after an update, layers apart."""
    mesh = sharding.make_mesh(sharding.MeshShape(**shape), devices)
    model = Model(config=config, mesh=mesh)
    trainer = Trainer(
        model=model,
        objective=FINE_TUNE,
        optimizer=optimizers.adafactor(0.01, min_dim_size_to_factor=16),
    )
    params = random_params(dataclasses.replace(config, scan_layers=False))
    params = parameters.stack_layers(params) if config.scan_layers else params
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), params, model.abstract_params
    )
    state, sums = trainer.step(
        trainer.init_state(params),
        None,
        sharding.put_batch(batch_of(16), mesh),
        jax.device_put(jax.random.key(0), sharding.replicated(mesh)),
    )
    return jax.device_get((parameters.unstack_layers(state.params), sums["loss"]))


def test_eight_devices_with_stacked_layers_give_the_update_of_one_without():
    found = step_on(scanned(OF_A_MESH), {"data": 2, "fsdp": 2, "model": 2}, jax.devices())
    plain = dataclasses.replace(OF_A_MESH, remat_policy="none")
    assert_close(found, step_on(plain, {"data": 1}, jax.devices()[:1]))


@pytest.mark.parametrize(
    ("scan_layers", "shape"),
    [(False, {"fsdp": 4}), (True, {"fsdp": 4}), (True, {"data": 2, "fsdp": 2})],
    ids=str,
)
def test_weights_are_gathered_and_activations_are_not(scan_layers, shape):
    config = dataclasses.replace(OF_A_MESH, scan_layers=scan_layers)
    mesh = sharding.make_mesh(sharding.MeshShape(**shape), jax.devices()[:4])
    model = Model(config=config, mesh=mesh)
    forward = t5.T5(config).forward

    def gradient(params, batch):
        return jax.grad(lambda params: jnp.sum(forward(params, batch).hidden ** 2))(params)

    program = jax.jit(
        sharding.traced_on(mesh, gradient),
        out_shardings=jax.tree.map(lambda x: x.sharding, model.abstract_params),
    )
    batch = {
        name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding.batch_sharding(mesh))
        for name, rows in batch_of(16).items()
    }
    text = program.lower(model.abstract_params, batch).compile().as_text()
    gathered = set(re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text))
    # Kernels of attention and of the MLP, from quarters along `embed`.
    kernels = {"24,16", "16,24", "24,40", "40,24"}
    assert kernels <= gathered
    # All rows (16) of a sequence (7 or 5 positions) are on no device; the ids are, to look up their
    # part of the embedding.
    assert not [shape for shape in gathered if re.match(r"16,.*\b[57]\b|.*\b[57]\b.*,24$", shape)]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_said_of_activations_and_weights(scan_layers):
    """Before the compiler: it may find the same by itself for some sizes, and not for others."""
    config = dataclasses.replace(OF_A_MESH, scan_layers=scan_layers, dtype="bfloat16")
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, model=2))
    model = Model(config=config, mesh=mesh)
    program = jax.jit(sharding.traced_on(mesh, t5_inputs.make_forward(config)))
    text = program.lower(model.abstract_params, jax.tree.map(jnp.asarray, batch_of(16))).as_text()
    said = collections.Counter(
        re.findall(r"sharding_constraint .*<@mesh, \[(.*)\]> : tensor<(.*)>", text)
    )
    rows = '{"data", "fsdp"}'
    assert {
        # The residual stream, heads and the hidden layer of the MLP, logits.
        (f"{rows}, {{}}, {{}}", "16x7x24xbf16"),
        (f"{rows}, {{}}, {{}}", "16x5x24xbf16"),
        (f'{rows}, {{"model"}}, {{}}, {{}}', "16x4x7x4xbf16"),
        (f'{rows}, {{"model"}}, {{}}, {{}}', "16x4x5x4xbf16"),
        (f'{rows}, {{}}, {{"model"}}', "16x7x40xbf16"),
        (f'{rows}, {{}}, {{"model"}}', "16x5x40xbf16"),
        (f'{rows}, {{}}, {{"model"}}', "16x5x56xf32"),
        # Weights: cast where they lie, then whole along `embed`. The output matrix stays float32.
        ('{"fsdp"}, {"model"}', "24x16xbf16"),
        ('{}, {"model"}', "24x16xbf16"),
        ('{"model"}, {"fsdp"}', "40x24xbf16"),
        ('{"model"}, {}', "40x24xbf16"),
        ('{}, {"model"}', "24x56xf32"),
    } <= said.keys()
    # After the embedding and after each layer; queries, keys, values and what is mixed of them in
    # the encoder, and keys and values for the decoder. A loop has one layer's.
    assert said[(f"{rows}, {{}}, {{}}", "16x7x24xbf16")] == 2
    assert said[(f"{rows}, {{}}, {{}}", "16x5x24xbf16")] == (2 if scan_layers else 3)
    heads = (f'{rows}, {{"model"}}, {{}}, {{}}', "16x4x7x4xbf16")
    assert said[heads] == (6 if scan_layers else 8)
    assert not [shape for _, shape in said if shape.startswith(("24x16xf", "24x40xf", "40x24xf"))]


def test_a_constraint_says_nothing_of_axes_that_a_shard_map_has_taken():
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=4))
    config = scanned(OF_A_MESH)
    params = parameters.stack_layers(random_params(OF_A_MESH))
    batch = jax.tree.map(jnp.asarray, batch_of(16))
    del batch["decoder_negative_ids"]
    forward = t5_inputs.make_forward(config)
    expected = quick_jit(forward)(params, batch)

    @quick_jit
    def by_hand(params, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.shard_map(
                lambda params, batch: forward(params, batch, None),
                in_specs=(PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec("data"),
                axis_names={"data"},
            )(params, batch)

    found = by_hand(*jax.device_put((params, batch), sharding.replicated(mesh)))
    np.testing.assert_allclose(found, expected, atol=1e-5)
