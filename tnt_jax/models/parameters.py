"""Trees of parameters as every network has them: layers apart or stacked, shapes, axes, dtypes.

A tree is a nested dict. A stack of layers is one of its top branches, and has its layers under
`layers_0`, `layers_1`, ..., or stacked along a new first axis under `layers`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tnt_jax.models import sharding
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import PyTree

_STACKS = ("encoder", "decoder")
_LAYER = re.compile(r"layers_(\d+)")
_STACKED = "layers"


def stack_layers(params: PyTree) -> PyTree:
    """Parameters as a network with `scan_layers` has them, from those of one without.

    `encoder/layers_0/...`, `encoder/layers_1/...` become `encoder/layers/...` with a first axis of
    layers, and so in the decoder. Parameters that are stacked already stay as they are.

    Args:
      params: Arrays, or shapes and dtypes (`jax.ShapeDtypeStruct`).
    """

    def stack(*layers: Any) -> Any:
        first = layers[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype)
        return jnp.stack(layers)

    def of_stack(tree: PyTree) -> PyTree:
        layers = {int(match[1]): key for key in tree if (match := _LAYER.fullmatch(key))}
        stacked = {key: value for key, value in tree.items() if key not in layers.values()}
        if layers:
            in_order = [tree[layers[i]] for i in sorted(layers)]
            stacked[_STACKED] = jax.tree.map(stack, *in_order)
        return stacked

    return _of_stacks(of_stack, params)


def for_decoding(params: PyTree, config: NetworkConfig) -> tuple[PyTree, NetworkConfig]:
    """Parameters and settings with layers apart, for a loop over tokens.

    Cut out of their stacks once, before the loop: steps that scan the layers are 40 % slower.
    """
    return unstack_layers(params), dataclasses.replace(
        config, scan_layers=False, remat_policy="none"
    )


def unstack_layers(params: PyTree) -> PyTree:
    """The reverse of `stack_layers`: every layer under a name of its own."""

    def layer_of(leaf: Any, i: int) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[i]

    def of_stack(tree: PyTree) -> PyTree:
        apart = {key: value for key, value in tree.items() if key != _STACKED}
        if _STACKED in tree:
            num_layers = jax.tree.leaves(tree[_STACKED])[0].shape[0]
            for i in range(num_layers):
                layer = functools.partial(layer_of, i=i)
                apart[f"layers_{i}"] = jax.tree.map(layer, tree[_STACKED])
        return apart

    return _of_stacks(of_stack, params)


def _of_stacks(change: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    stacks = {stack: change(params[stack]) for stack in _STACKS if stack in params}
    return {**params, **stacks}


def repeat_layers(params: PyTree, num_layers: Mapping[str, int]) -> PyTree:
    """Gives each stack as many layers as a network has, all like its first.

    Args:
      params: Shapes of a network with one layer in each stack.
      num_layers: Layers of each stack, such as `{"decoder": 24}`.
    """

    def of_stack(stack: str) -> PyTree:
        layer = params[stack]["layers_0"]
        return params[stack] | {f"layers_{i}": layer for i in range(num_layers[stack])}

    return {**params, **{stack: of_stack(stack) for stack in num_layers}}


def logical_axes(boxed: PyTree, *, stacked: bool) -> PyTree:
    """The axis names of every parameter, a tuple of one name for each dimension.

    Args:
      boxed: Shapes in Flax's boxes (`nn.LogicallyPartitioned`), layers apart.
      stacked: Whether the result is that of stacked layers, which have the axis "layers" first.
    """
    axes = jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )
    if not stacked:
        return axes

    def of_stack(tree: PyTree) -> PyTree:
        """Every layer has the axes of the first."""
        others = {key: value for key, value in tree.items() if not _LAYER.fullmatch(key)}
        stacked_axes = jax.tree.map(
            lambda names: ("layers", *names),
            tree["layers_0"],
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return {**others, _STACKED: stacked_axes}

    return _of_stacks(of_stack, axes)


def computed_dtypes(abstract: PyTree, config: NetworkConfig) -> PyTree:
    """The dtype in which a forward pass reads each parameter.

    Kernels within layers, and an embedding that is not the output matrix as well, are cast to the
    compute dtype before every use. All else is computed in float32.

    Args:
      abstract: Shapes of the parameters of the network of `config`.
      config: The settings of the network.
    """

    def dtype_of(path: tuple[Any, ...], _: Any) -> Any:
        name = sharding.path_name(path)
        is_cast = "layers" in name and name.endswith("kernel")
        if name == "token_embedder/embedding":
            is_cast = not config.logits_via_embedding
        return config.dtype if is_cast else jnp.dtype("float32")

    return jax.tree.map_with_path(dtype_of, abstract)
