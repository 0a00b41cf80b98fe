"""Low-rank adapters (LoRA): a kernel `W` acts as `W + (alpha / rank) A B`, and only A and B train.

Parameters of adapters lie beside the kernels that they change: `.../query/kernel` gets
`.../query/adapter_in` (A) and `.../query/adapter_out` (B), B zero at first, so that the model
starts as the original. A network's layers use those that they are given, at
`NetworkConfig.adapter_scale`: given none, it is the original again.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tnt_jax.runtime.array_types import Array, Key, PyTree
from tnt_jax.runtime.errors import UsageError

ADAPTER_IN, ADAPTER_OUT = "adapter_in", "adapter_out"


def _pairs(params: PyTree, make: Any, path: tuple[str, ...] = ()) -> PyTree:
    """The nested dict of what `make(path, kernel)` returns for every kernel within a layer."""
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            below = _pairs(value, make, (*path, name))
            found |= {name: below} if below else {}
        elif name == "kernel" and any(part.startswith("layers") for part in path):
            found |= make(path, value)
    return found


def upper_layers(tree: PyTree, number: int | None) -> PyTree:
    """The part of a tree of parameters, or of their axes, that is trained or has adapters.

    What is below is the same in both forward passes of an update. So the compiler computes it once,
    and no gradient goes through it.

    Args:
      tree: A nested dict with a stack of layers called `decoder`.
      number: Number of that stack's layers, counted from the output; None takes the whole tree.

    Raises:
      UsageError: There are not so many, or they are stacked.
    """
    if number is None:
        return tree
    decoder = tree["decoder"]
    if "layers" in decoder:
        raise UsageError(
            f"TRAINED_LAYERS={number}: expected SCAN_LAYERS=False, because stacked layers are all "
            "trained alike; found True."
        )
    layers = sorted((n for n in decoder if n.startswith("layers_")), key=lambda n: int(n[7:]))
    if not 1 <= number <= len(layers):
        raise UsageError(
            f"TRAINED_LAYERS: expected None or 1 to {len(layers)}, as many layers as the decoder "
            f"has; found {number}."
        )
    return {"decoder": {name: decoder[name] for name in layers[-number:]}}


def init(abstract_params: PyTree, rank: int, key: Key[Array, ""]) -> PyTree:
    """New adapters: A is Gaussian with variance 1 / inputs, B is 0.

    Args:
      abstract_params: Shapes of the model's parameters, with layers stacked or not.
      rank: Width of the adapters.
      key: Random key. Each A has one of its own, by its name; stacked layers are one A.
    """

    def make(path: tuple[str, ...], kernel: Any) -> dict[str, Array]:
        *layers, inputs, outputs = kernel.shape
        own_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        gaussian = jax.random.normal(own_key, (*layers, inputs, rank)) * inputs**-0.5
        return {ADAPTER_IN: gaussian, ADAPTER_OUT: jnp.zeros((*layers, rank, outputs))}

    return _pairs(abstract_params, make)


def logical_axes(axes: PyTree) -> PyTree:
    """The logical axes of every adapter, from those of the parameters."""

    def make(path: tuple[str, ...], kernel: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        *layers, inputs, outputs = kernel
        return {
            ADAPTER_IN: (*layers, inputs, "adapter_rank"),
            ADAPTER_OUT: (*layers, "adapter_rank", outputs),
        }

    return _pairs(axes, make)


def is_adapter(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a tree, by its path, belongs to an adapter."""
    return getattr(path[-1], "key", None) in (ADAPTER_IN, ADAPTER_OUT)
