"""The update on a mesh: it has the numbers of one device, and nothing is where it should not be."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest
from helpers import t5_inputs
from helpers.two_matrices import KEY, TNRF, assert_trees_close, small_batch

from tnt_jax.models import sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.training import compiled_step, train_step
from tnt_jax.training.trainer import Trainer

CONFIG = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=4,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=64,
    mlp_activations=("relu",),
    logits_via_embedding=False,
)
# The output matrix is factored, nothing else.
OPTIMIZER = optax.adafactor(1e-2, min_dim_size_to_factor=16)


def abstract_batch(mesh):
    return {
        name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding.batch_sharding(mesh))
        for name, rows in small_batch(vocab_size=CONFIG.vocab_size).items()
    }


@functools.cache
def program_on(data, fsdp, model, num_microbatches):
    """The trainer of a mesh, and its step: traced on shapes alone, and compiled."""
    shape = sharding.MeshShape(data=data, fsdp=fsdp, model=model)
    mesh = sharding.make_mesh(shape, jax.devices()[: data * fsdp * model])
    trainer = Trainer(
        model=Model(config=CONFIG, mesh=mesh),
        objective=TNRF,
        optimizer=OPTIMIZER,
        num_microbatches=num_microbatches,
    )
    traced = trainer.step.trace(
        trainer.abstract_state,
        trainer.model.abstract_params,
        abstract_batch(mesh),
        jax.eval_shape(lambda: KEY),
    )
    return trainer, traced, traced.lower().compile()


@pytest.fixture(scope="module")
def expected_update():
    """On one device, without a mesh: the parameters of two models, the state and the sums."""
    init = jax.jit(t5.T5(CONFIG).init)
    params, original_params = init(jax.random.key(0)), init(jax.random.key(1))
    step = functools.partial(
        train_step.train_step,
        forward=t5_inputs.make_forward(CONFIG),
        objective=TNRF,
        optimizer=OPTIMIZER,
    )
    state, sums = jax.jit(step)(
        train_step.init_state(params, OPTIMIZER),
        original_params,
        small_batch(vocab_size=CONFIG.vocab_size),
        KEY,
    )
    # Copies, because `device_put` may keep an array's memory, which the program then gives away.
    params, original_params = (jax.tree.map(np.array, x) for x in (params, original_params))
    return params, original_params, state, sums


def placed(params, trainer):
    return jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), params, trainer.model.abstract_params
    )


@pytest.mark.parametrize(
    "shape", [(8, 1, 1, 1), (4, 1, 2, 2), (2, 2, 2, 1), (2, 2, 2, 2), (1, 4, 2, 2)]
)
def test_eight_devices_give_the_numbers_of_one(shape, expected_update):
    params, original_params, expected_state, expected_sums = expected_update
    trainer, _, step = program_on(*shape)
    mesh, wanted = trainer.model.mesh, trainer.abstract_state
    state = trainer.init_state(placed(params, trainer))
    original_params = placed(original_params, trainer)
    batch = sharding.put_batch(small_batch(vocab_size=CONFIG.vocab_size), mesh)
    key = jax.device_put(KEY, sharding.replicated(mesh))

    before = jax.tree.leaves(state.params)
    state, sums = step(state, original_params, batch, key)
    assert_trees_close(state, expected_state, rtol=1e-5, atol=2e-6)
    assert_trees_close(sums, expected_sums, rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, wanted)
    # The state's memory is given away; the original's is not, and serves the next update.
    assert all(leaf.is_deleted() for leaf in before)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((original_params, batch)))
    state, sums = step(state, original_params, batch, key)
    assert state.step == 2
    assert sums["loss"] < expected_sums["loss"]


def test_the_original_is_a_fixed_point_of_the_compiled_program(expected_update):
    params, *_ = expected_update
    trainer, _, step = program_on(4, 1, 2, 2)
    mesh = trainer.model.mesh
    batch = small_batch(is_marked=False, vocab_size=CONFIG.vocab_size)
    state, sums = step(
        trainer.init_state(placed(params, trainer)),
        placed(params, trainer),
        sharding.put_batch(batch, mesh),
        jax.device_put(KEY, sharding.replicated(mesh)),
    )
    assert sums["loss"] == sums["gradient_norm"] == 0
    assert_trees_close(state.params, params, rtol=0, atol=0)


def test_random_parameters_are_the_same_on_every_mesh(expected_update):
    trainer, *_ = program_on(4, 1, 2, 2)
    assert_trees_close(trainer.model.init(0), expected_update[0], rtol=1e-6)


def captured_bytes(traced):
    """The size of the largest array that a program carries inside itself."""
    sizes = [const.nbytes for const in traced.jaxpr.consts if hasattr(const, "nbytes")]
    # In the text `dense<1.0>` is one number repeated, `dense<[...]>` and `dense<"0x...">` are data.
    arrays = re.findall(
        r"""dense(?:_resource)?<(?:\[|"|__)[^>]*> : tensor<([\dx]+)x[a-z]+(\d+)>""",
        traced.lower().as_text(),
    )
    sizes += [
        math.prod(int(size) for size in shape.split("x")) * int(bits) // 8 for shape, bits in arrays
    ]
    return max(sizes, default=0)


def test_the_program_carries_no_parameter():
    trainer, traced, _ = program_on(4, 1, 2, 2)
    sizes = [leaf.size * 4 for leaf in jax.tree.leaves(trainer.model.abstract_params)]
    bucket_table = 4 * (2 * CONFIG.relpos_max_distance + 1)
    assert captured_bytes(traced) <= bucket_table < min(size for size in sizes if size > 1024)

    # The same step around an original that it has captured: the check above would see it.
    original_params = jax.jit(t5.T5(CONFIG).init)(jax.random.key(1))
    capturing = jax.jit(
        lambda state, batch, key: train_step.train_step(
            state,
            original_params,
            batch,
            key,
            forward=trainer.model.forward,
            objective=TNRF,
            optimizer=OPTIMIZER,
        )
    ).trace(
        trainer.abstract_state,
        abstract_batch(trainer.model.mesh),
        jax.eval_shape(lambda: KEY),
    )
    assert captured_bytes(capturing) == max(sizes)


def test_the_state_is_donated_and_the_original_is_not():
    _, traced, _ = program_on(4, 1, 2, 2)
    state, original_params, batch, key = traced.lower().args_info[0]
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves((original_params, batch, key)))


def test_no_parameter_is_replicated_over_the_model_axis():
    trainer, _, compiled = program_on(4, 1, 2, 2)
    config, abstract_params = trainer.model.config, trainer.model.abstract_params
    state, original_params, batch, _ = compiled.input_shardings[0]
    new_state, _ = compiled.output_shardings

    def device_bytes(shardings, abstract):
        return jax.tree.map(
            lambda where, leaf: math.prod(where.shard_shape(leaf.shape)), shardings, abstract
        )

    expected = jax.tree.map(
        lambda leaf, axes: leaf.size // (1 if set(axes) == {"norm"} else 2),
        abstract_params,
        t5.T5(config).logical_axes(),
    )
    for shardings in (state.params, original_params, new_state.params):
        assert device_bytes(shardings, abstract_params) == expected
    # Adafactor's statistics of each element, where it keeps them: (1,) stands for none.
    abstract_v = trainer.abstract_state.opt_state[0].v
    assert device_bytes(new_state.opt_state[0].v, abstract_v) == jax.tree.map(
        lambda leaf, size: size if leaf.size > 1 else 1, abstract_v, expected
    )
    for name, where in batch.items():
        shape = abstract_batch(trainer.model.mesh)[name].shape
        assert where.shard_shape(shape) == (shape[0] // 4, *shape[1:])


def in_loops(compiled):
    return [each for each in compiled_step.collectives(compiled.as_text()) if each.times != 1]


def test_gradients_of_microbatches_are_exchanged_once_over_data():
    *_, compiled = program_on(4, 1, 1, 2)
    assert {each.operation for each in compiled_step.collectives(compiled.as_text())} == {
        "all-reduce"
    }
    assert in_loops(compiled) == []
    # Over `model` activations and rows of the loss are exchanged inside, but no kernel's gradient.
    trainer, _, compiled = program_on(4, 1, 2, 2)
    kernels = {
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4
        for leaf in jax.tree.leaves(trainer.abstract_params)
        if len(leaf.shape) == 2
    }
    assert in_loops(compiled)
    assert not {each.num_bytes for each in in_loops(compiled)} & kernels
