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


def init(abstract_params: PyTree, rank: int, key: Key[Array, ""]) -> PyTree:
    """New adapters: A is Gaussian with variance 1 / inputs, B is 0.

    Args:
      abstract_params: Of the model, stacked layers or not.
      rank: Width of the adapters.
      key: Each A has one of its own, by its name; stacked layers are one A.
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
