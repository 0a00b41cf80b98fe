"""Optimizers that know of stacked layers.

Adafactor clips the update of a parameter by its root mean square, and scales it by the parameter's.
A stack of layers (`T5Config.scan_layers`) is one array, but it is many parameters: here each layer
has its own.
"""

import itertools
from typing import Any

import jax
import optax

from tnt_jax.array_types import PyTree


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
            part, apply = _part((updates, state, params), stack), optimizer.update
            if stack is not None:
                axes = (0, _layer_axes(part[1]))
                apply = jax.vmap(
                    apply, in_axes=(*axes, None if params is None else 0), out_axes=axes
                )
            results.append(apply(*part))
        return _merged(results)

    return optax.GradientTransformation(init, update)


# A part of a tree is all parameters of one stack, or all that are in none (None), and what stands
# for them in a state; the others have an empty node in their place, as in `optax.masked`. Counters,
# which stand for no parameter, are in every part.


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


def _stack_of(path: tuple[Any, ...]) -> str | None:
    """The stack that a leaf is a layer's of, "encoder" or "decoder"."""
    keys = _keys(path)
    return next((a for a, b in itertools.pairwise(keys) if b == "layers"), None)


def _stacks(params: PyTree) -> list[str | None]:
    found = [_stack_of(path) for path, _ in jax.tree.leaves_with_path(params)]
    return [None, *dict.fromkeys(stack for stack in found if stack is not None)]


def _part(tree: PyTree, stack: str | None) -> PyTree:
    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        is_in = not _keys(path) or _stack_of(path) == stack
        return leaf if is_in else optax.MaskedNode()

    return jax.tree.map_with_path(pick, tree)


def _merged(parts: list[PyTree]) -> PyTree:
    def pick(*leaves: Any) -> Any:
        return next((x for x in leaves if not isinstance(x, optax.MaskedNode)), leaves[0])

    return jax.tree.map(pick, *parts, is_leaf=lambda x: isinstance(x, optax.MaskedNode))


def _layer_axes(state: PyTree) -> PyTree:
    """Where the layers are, for each leaf of a stack's part: counters have none."""
    return jax.tree.map_with_path(lambda path, _: 0 if _keys(path) else None, state)
