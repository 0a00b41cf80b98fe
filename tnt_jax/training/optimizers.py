"""Optimizers that know of stacked layers.

Adafactor clips the update of a parameter by its root mean square, and scales it by the parameter's.
A stack of layers (`NetworkConfig.scan_layers`) is one array, but it is many parameters: here each
layer has its own.
"""

import functools
import itertools
from typing import Any

import jax
import optax

from tnt_jax.models import sharding
from tnt_jax.runtime.array_types import Array, PyTree


def adafactor(learning_rate: Any = None, **settings: Any) -> optax.GradientTransformation:
    """`optax.adafactor`, the same for stacked layers as for layers that are apart.

    Args:
      learning_rate: A number or a schedule.
      settings: The other arguments of `optax.adafactor`.
    """
    return layer_by_layer(optax.adafactor(learning_rate, **settings))


def layer_by_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies an optimizer to each layer of a stack as to a parameter of its own.

    Args:
      optimizer: One that treats every parameter by itself: a norm over all of them, as
        `optax.clip_by_global_norm` takes it, would be a norm over one layer. Put that outside.

    Returns:
      An optimizer whose state has the structure of `optimizer`'s. Statistics of stacked parameters
      have a first axis of layers, counters are shared.
    """

    def init(params: PyTree) -> PyTree:
        states = []
        for stack in _stacks(params):
            part, make = _part(params, stack), optimizer.init
            if stack is not None:
                one_layer = jax.tree.map(lambda x: x[0], part)
                axes = _layer_axes(jax.eval_shape(optimizer.init, one_layer))
                make = jax.vmap(make, out_axes=axes)
            states.append(make(part))
        return _merged(states)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> Any:
        results = []
        for stack in _stacks(updates):
            part = _part((updates, state, params), stack)
            update_part = optimizer.update
            if stack is not None:
                update_part = functools.partial(_update_layers, optimizer)
            results.append(update_part(*part))
        return _merged(results)

    return optax.GradientTransformation(init, update)


def _update_layers(
    optimizer: optax.GradientTransformation, updates: PyTree, state: PyTree, params: PyTree | None
) -> tuple[PyTree, PyTree]:
    """Updates one layer of a stack after the other, in place.

    All layers at once (`jax.vmap`) would need memory for intermediate results as large as the
    largest stack: half a GiB on each of eight devices at XXL.
    """
    axes = _layer_axes(state)
    is_shared = jax.tree.map(lambda axis: axis is None, axes, is_leaf=lambda x: x is None)

    def layer_of(stacked: PyTree, i: Array) -> PyTree:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=0, keepdims=False), stacked
        )

    def put(stacked: PyTree, layer: PyTree, i: Array) -> PyTree:
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), i, axis=0),
            stacked,
            layer,
        )

    def body(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        updates, new_state = carry
        layer_state = jax.tree.map(
            lambda shared, old, new: old if shared else layer_of(new, i),
            is_shared, state, new_state,
        )  # fmt: skip
        changed, layer_state = optimizer.update(
            layer_of(updates, i), layer_state, None if params is None else layer_of(params, i)
        )
        new_state = jax.tree.map(
            lambda shared, old, new: new if shared else put(old, new, i),
            is_shared, new_state, layer_state,
        )  # fmt: skip
        return put(updates, changed, i), new_state

    num_layers = jax.tree.leaves(updates)[0].shape[0]
    return jax.lax.fori_loop(0, num_layers, body, (updates, state))


# A part of a tree is all parameters of one stack, or all that are in none (None), and what stands
# for them in a state; the others have an empty node in their place, as in `optax.masked`. Counters,
# which stand for no parameter, are in every part.


def _stack_of(path: tuple[Any, ...]) -> str | None:
    """The stack that a leaf is a layer's of, "encoder" or "decoder"."""
    keys = sharding.dict_keys(path)
    return next((a for a, b in itertools.pairwise(keys) if b == "layers"), None)


def _stacks(params: PyTree) -> list[str | None]:
    found = [_stack_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    return [None, *dict.fromkeys(stack for stack in found if stack is not None)]


def _part(tree: PyTree, stack: str | None) -> PyTree:
    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        is_in = not sharding.dict_keys(path) or _stack_of(path) == stack
        return leaf if is_in else optax.MaskedNode()

    return jax.tree.map_with_path(pick, tree)


def _merged(parts: list[PyTree]) -> PyTree:
    def pick(*leaves: Any) -> Any:
        return next((x for x in leaves if not isinstance(x, optax.MaskedNode)), leaves[0])

    return jax.tree.map(pick, *parts, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _layer_axes(state: PyTree) -> PyTree:
    """Where the layers are, for each leaf of a stack's part: counters have none."""
    return jax.tree.map_with_path(lambda path, _: 0 if sharding.dict_keys(path) else None, state)
