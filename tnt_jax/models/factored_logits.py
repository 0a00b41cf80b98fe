"""Logits as the product of hidden states and an output matrix, not multiplied out."""

from typing import Any

import flax.struct
import jax.numpy as jnp

from tnt_jax.runtime.array_types import Array, Float


class FactoredLogits(flax.struct.PyTreeNode):
    """Logits `[B, T, V]` that nobody has multiplied out.

    Attributes:
      hidden: `[B, T, E]`, the decoder's states, any float dtype.
      matrix: `[E, V]`, the output matrix (`vocab_axis=1`), or `[V, E]`, an embedding that serves as
        one (`vocab_axis=0`).
      vocab_axis: Of `matrix`.
    """

    hidden: Any  # arrays, but trees of shardings are FactoredLogits too
    matrix: Any
    vocab_axis: int = flax.struct.field(pytree_node=False)

    def whole(self) -> Float[Array, "B T V"]:
        """Multiplied out, in float32."""
        return multiply(self.hidden, self.matrix, self.vocab_axis)


def multiply(hidden, matrix, vocab_axis):
    """Logits in float32, from whatever the dtypes are."""
    matrix = matrix.astype(jnp.float32)
    matrix = matrix if vocab_axis == 1 else matrix.T
    return jnp.matmul(hidden.astype(jnp.float32), matrix)
