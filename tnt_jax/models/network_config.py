"""The settings that every family of networks has: its sizes, and how it is computed."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tnt_jax.runtime.errors import UsageError

ACTIVATIONS = {
    "gelu": nn.gelu,  # the tanh approximation, as in T5 1.1
    "linear": lambda x: x,
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
}

# What each layer keeps for its gradient; T5X's names. None keeps everything.
REMAT_POLICIES = {
    "none": None,
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# How attention over whole rows is computed; `attention` says what each is.
ATTENTIONS = ("xla", "splash", "cudnn")

MOST_LAYERS = 1000  # of a stack; T5 has 24, and the deepest transformer that was published 1,000

# The largest size of each kind: far above what networks have, which is in the comments, and small
# enough that no product of them overflows. A larger one is a mistake, or is meant to take memory.
_LARGEST = {
    "vocab_size": 2**24,  # 256 thousand
    "emb_dim": 2**16,  # 4,096
    "num_heads": 2**12,  # 128
    "head_dim": 2**12,  # 128
    "mlp_dim": 2**20,  # 65,536
}
# How a network is computed, which says nothing of what it computes: no checkpoint states it.
COMPUTATION = (
    *("dtype", "dropout_rate", "float32_attention_logits", "attention"),
    *("scan_layers", "remat_policy"),
)
_LARGEST_EPSILON = 1.0  # 1e-6; with more, a norm passes on little but its scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What the settings of each family have in common; `families.network_of` makes a network.

    A config is hashable, so it may be a static argument of `jax.jit`.

    Attributes:
      vocab_size: rows of the embedding, padding of the vocabulary included.
      emb_dim: width of the residual stream.
      num_heads: attention heads per layer.
      head_dim: width of one head; `num_heads * head_dim` need not be `emb_dim`.
      mlp_dim: width of the hidden MLP layer.
      mlp_activations: one activation, or several whose outputs are multiplied.
      logits_via_embedding: True ties the output matrix to the embedding.
      layer_norm_epsilon: added to the mean square.
      dtype: dtype of the computation, float32 or bfloat16, as a name or a dtype. Parameters and
        logits are always float32.
      dropout_rate: probability of zeroing; acts only where a call is given a key.
      float32_attention_logits: compute attention logits and softmax in float32 whatever `dtype` is.
      attention: "xla", "splash" (TPUs) or "cudnn" (NVIDIA GPUs): how attention over whole rows is
        computed; decoding is always "xla". T5 has no other.
      scan_layers: one compiled loop over the layers of a stack instead of a copy of the program for
        each: compiles in the time of one layer. Their parameters are stacked along a new first
        axis, under `layers` (`parameters.stack_layers`); the function is the same.
      remat_policy: what a layer keeps from the forward pass for its gradient, the rest is computed
        again: "none" computes nothing again, "minimal" all but the products with a weight, "full"
        everything. Only "minimal" and "full" also let go of weights that were gathered along the
        mesh axis `fsdp`.
      adapter_scale: what multiplies the adapters among the parameters, if any: alpha / rank.

      unseen: the names of the settings that the shape of no parameter shows.

    Raises:
      UsageError: a size below 1 or beyond any network's, a rate outside [0, 1), an epsilon outside
        [0, 1], or an unknown activation, dtype or policy.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    mlp_activations: Sequence[str]
    logits_via_embedding: bool
    layer_norm_epsilon: float = 1e-6
    dtype: str | np.dtype | type = "float32"
    dropout_rate: float = 0.0
    float32_attention_logits: bool = False
    attention: str = "xla"
    scan_layers: bool = False
    remat_policy: str = "none"
    adapter_scale: float = 1.0
    unseen: ClassVar[tuple[str, ...]] = ("mlp_activations", "layer_norm_epsilon")

    @property
    def total_layers(self) -> int:
        """Number of layers of all stacks."""
        raise NotImplementedError

    def __post_init__(self):
        family = type(self).__name__
        self._check_sizes(_LARGEST)
        # Tuples and dtypes, so that a configuration is hashable: a static argument of jax.jit.
        activations = self.mlp_activations
        activations = (activations,) if isinstance(activations, str) else tuple(activations)
        object.__setattr__(self, "mlp_activations", activations)
        unknown = [name for name in activations if name not in ACTIVATIONS]
        if unknown or not activations:
            raise UsageError(
                f"{family}.mlp_activations must name one or more of {', '.join(ACTIVATIONS)}; "
                f"found {activations!s:.80}"
            )
        dtype = np.dtype(None)
        with contextlib.suppress(TypeError):  # not the name of any dtype
            dtype = jnp.dtype(self.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise UsageError(f"{family}.dtype: expected float32 or bfloat16, found {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype)
        if self.attention not in ATTENTIONS:
            raise UsageError(
                f"ATTENTION: expected {', '.join(ATTENTIONS)}, found {self.attention!r:.60}."
            )
        if self.remat_policy not in REMAT_POLICIES:
            raise UsageError(
                f"{family}.remat_policy: expected one of {', '.join(REMAT_POLICIES)}, "
                f"found {self.remat_policy!r}"
            )
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UsageError(
                f"{family}.dropout_rate: expected a number in [0, 1), found {self.dropout_rate}"
            )
        if not 0 <= self.layer_norm_epsilon <= _LARGEST_EPSILON:
            raise UsageError(
                f"{family}.layer_norm_epsilon: expected a number from 0 to {_LARGEST_EPSILON:g}, "
                f"found {self.layer_norm_epsilon!r:.60}"
            )
        object.__setattr__(self, "layer_norm_epsilon", float(self.layer_norm_epsilon))

    def _check_sizes(self, largest: Mapping[str, int]) -> None:
        """Raises a UsageError for a field that is no whole number from 1 to its largest value."""
        for name, most in largest.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:  # True is an int as well
                raise UsageError(
                    f"{type(self).__name__}.{name}: expected a whole number from 1 to {most:,}, "
                    f"found {value!r:.60}"
                )
