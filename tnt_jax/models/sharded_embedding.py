"""Rows of an embedding that is split over the mesh, both ways: by token and by width.

The compiler's own partitioning of a gather brings the whole table to every device, or fails on a
mesh whose `data` axis is computed apart. Here each device looks up,
for all tokens of its `fsdp` group, what it has of their rows; then the group exchanges pieces of
rows. What travels is as large as the result, whatever the vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tnt_jax.models import sharding
from tnt_jax.runtime.array_types import Array, Float, Int


def look_up(
    table: Float[Array, "V E"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T E"]:
    """The rows of `tokens`, cast to `dtype`; an id outside the table reads NaN.

    Gradients of a row are added up in the table's dtype.

    Args:
      table: Split as `sharding.AXIS_RULES` has ("vocab", "embed") on the mesh in use, if any.
      tokens: Split along their rows as "batch".
      dtype: Dtype of the result.
    """
    # NaN is loud, where clamping would read another row.
    read = functools.partial(jnp.take, axis=0, mode="fill")
    free = sharding.free_axes()
    batch, vocab, embed = (
        tuple(axis for axis in sharding.AXIS_RULES[name] if axis in free)
        for name in ("batch", "vocab", "embed")
    )
    num_parts = math.prod(free[axis] for axis in batch)
    if not (vocab or embed) or len(tokens) % num_parts:
        return read(table, tokens).astype(dtype)

    def on_device(table, tokens):
        for axis in embed:
            tokens = jax.lax.all_gather(tokens, axis, axis=0, tiled=True)
        if not vocab:
            rows = read(table, tokens).astype(dtype)
        else:
            (axis,) = vocab
            first = jax.lax.axis_index(axis) * len(table)
            is_here = (tokens >= first) & (tokens < first + len(table))
            is_beyond = tokens >= len(table) * jax.lax.axis_size(axis)
            rows = read(table, jnp.where(is_here, tokens - first, 0))
            rows = jnp.where(is_here[..., None], rows, 0.0).astype(dtype)
            rows = jax.lax.psum(rows, axis)
            rows = jnp.where(is_beyond[..., None], jnp.nan, rows)
        for axis in embed:
            rows = jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=2, tiled=True)
        return rows

    return jax.shard_map(
        on_device,
        in_specs=(PartitionSpec(vocab or None, embed or None), PartitionSpec(batch or None)),
        out_specs=PartitionSpec(batch or None),
        axis_names={*batch, *vocab, *embed},
    )(table, tokens)
