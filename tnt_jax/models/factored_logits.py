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
      vocab_axis: The axis of `matrix` that runs over the vocabulary, 0 or 1.
      softcap: What no logit exceeds, as in `cap`; None is no bound.
    """

    hidden: Any  # arrays, but trees of shardings are FactoredLogits too
    matrix: Any
    vocab_axis: int = flax.struct.field(pytree_node=False)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)

    def whole(self) -> Float[Array, "B T V"]:
        """Multiplies the factors: logits in float32."""
        return multiply(self.hidden, self.matrix, self.vocab_axis, self.softcap)


def multiply(hidden, matrix, vocab_axis, softcap=None):
    """Logits in float32, from whatever the dtypes are."""
    matrix = matrix.astype(jnp.float32)
    matrix = matrix if vocab_axis == 1 else matrix.T
    return cap(jnp.matmul(hidden.astype(jnp.float32), matrix), softcap)


def cap(logits: Float[Array, "*shape"], softcap: float | None) -> Float[Array, "*shape"]:
    """Bounds logits smoothly: `softcap * tanh(logits / softcap)`; None leaves them as they are."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def slope_of_cap(capped: Float[Array, "*shape"], softcap: float) -> Float[Array, "*shape"]:
    """The derivative of `cap` where it has these values."""
    share = capped / softcap
    return (1 - share) * (1 + share)
