"""The settings of a decoder-only language model, beside those that every network has."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from tnt_jax.models.network_config import MOST_LAYERS, NetworkConfig
from tnt_jax.runtime.errors import UsageError

_LARGEST = {
    "num_layers": MOST_LAYERS,
    "num_kv_heads": 2**12,  # 8; as many as `num_heads` where no query head shares its keys
}
_MOST_POSITIONS = 2**30  # 10 million; no sequence is longer
_LARGEST_SOFTCAP = 1e6  # 50
_CHOICES = {
    "attention_bias": ("none", "qkv", "all"),
    "query_key_norm": ("none", "head", "all_heads"),
    "norms": ("pre", "pre_and_post", "post"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 and later stretch their slow rotations to a longer context.

    Rotations with a wavelength above `original_max_positions / low_freq_factor` are slowed down by
    `factor`, those below `original_max_positions / high_freq_factor` stay, and between the two the
    speed is a blend (`_compute_llama3_parameters` of transformers).

    Attributes:
      factor: By which slow rotations are slowed down.
      low_freq_factor: Bounds the slow ones.
      high_freq_factor: Bounds the quick ones.
      original_max_positions: Context length before the stretching, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        low, high = self.low_freq_factor, self.high_freq_factor
        if not (
            self.factor >= 1
            and 0 < low < high
            and 0 < self.original_max_positions <= _MOST_POSITIONS
        ):
            raise UsageError(
                "Llama3Scaling: expected factor of at least 1, 0 < low_freq_factor < "
                f"high_freq_factor and original_max_positions above 0, found {self}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What may differ between the layers of one network: how far they see, and their rotation.

    Attributes:
      window: A position sees the `window` positions up to itself; None sees all earlier ones.
      rope_theta: Base of the rotary position embedding; None rotates nothing.
      rope_factor: By which all rotations are slowed down ("linear" scaling).
      rope_llama3: Scaling of Llama 3.1; None has none.

    Raises:
      UsageError: A window below 1, or a base or factor that is not positive.
    """

    window: int | None = None
    rope_theta: float | None = 10_000.0
    rope_factor: float = 1.0
    rope_llama3: Llama3Scaling | None = None

    def __post_init__(self):
        if self.window is not None and not 1 <= self.window <= _MOST_POSITIONS:
            raise UsageError(
                f"LayerKind.window: expected 1 to {_MOST_POSITIONS:,}, found {self.window!r:.60}."
            )
        theta = self.rope_theta
        if not (theta is None or 1 < theta < math.inf) or not 0 < self.rope_factor < math.inf:
            raise UsageError(
                "LayerKind: expected rope_theta above 1 (or None) and rope_factor above 0, found "
                f"{theta!r} and {self.rope_factor!r}."
            )

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians that each pair of dimensions turns by from one position to the next.

        Args:
          head_dim: Width of a head, even.

        Returns:
          `[head_dim / 2]` float32; zeros where nothing is rotated.
        """
        if self.rope_theta is None:
            return np.zeros(head_dim // 2, np.float32)
        speeds = self.rope_theta ** -(np.arange(0, head_dim, 2) / head_dim) / self.rope_factor
        scaling = self.rope_llama3
        if scaling is not None:
            turns = speeds * scaling.original_max_positions / (2 * np.pi)  # within the old context
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            share = np.clip((turns - low) / (high - low), 0, 1)  # 1: quick, which stays
            speeds = speeds * (share + (1 - share) / scaling.factor)
        return speeds.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMConfig(NetworkConfig):
    """Architecture of one decoder-only language model.

    The families differ by switches: llama, mistral, qwen2, qwen3, smollm3, gemma, gemma2,
    gemma3_text and olmo2 are all of this class (`checkpoints.huggingface_causal_lm` has their
    settings).

    Attributes:
      num_layers: Number of layers.
      num_kv_heads: Heads of keys and values; each serves `num_heads / num_kv_heads` query heads.
      layer_kinds: The kinds of layers that there are.
      layer_pattern: Indices of `layer_kinds` that repeat along the layers: layer `i` is of kind
        `layer_pattern[i % len(layer_pattern)]`.
      attention_bias: "qkv" adds a bias to queries, keys and values, "all" to the output as well.
      query_key_norm: A norm of queries and keys before the rotation: of each "head", or over
        "all_heads" at once.
      norms: Whether attention and MLP have a norm before ("pre"), after ("post"), or both.
      norm_scale_offset: Added to the scale of every norm: 1 in Gemma, whose scales are stored
        without it.
      scales_embedding: Multiplies embedded tokens by the square root of `emb_dim`.
      attention_scale: Multiplies attention logits; None is `head_dim ** -0.5`.
      attention_softcap: What no attention logit exceeds: `c * tanh(logit / c)` stands in its place;
        None is no bound.
      final_softcap: The same for the logits of the vocabulary.

    Raises:
      UsageError: A setting that `NetworkConfig` refuses, a choice that there is not, heads that do
        not divide, an odd width of heads, a pattern that names no kind, a softcap that is not
        positive, or a kernel that does not compute all this.
    """

    num_layers: int
    num_kv_heads: int
    layer_kinds: Sequence[LayerKind] = (LayerKind(),)
    layer_pattern: Sequence[int] = (0,)
    attention_bias: str = "none"
    query_key_norm: str = "none"
    norms: str = "pre"
    norm_scale_offset: float = 0.0
    scales_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    unseen: ClassVar = (
        *("mlp_activations", "layer_norm_epsilon", "num_heads", "num_kv_heads", "head_dim"),
        *("kinds", "norm_scale_offset", "scales_embedding", "logit_scale"),
        *("attention_softcap", "final_softcap"),
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_sizes(_LARGEST)
        for name in ("layer_kinds", "layer_pattern"):  # hashable: a static argument of jax.jit
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"CausalLMConfig.{name}: expected one of {', '.join(choices)}, found "
                    f"{getattr(self, name)!r:.60}"
                )
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise UsageError(
                "CausalLMConfig: expected num_heads to be a multiple of num_kv_heads and head_dim "
                f"to be even, found {self.num_heads}, {self.num_kv_heads} and {self.head_dim}"
            )
        for name in ("attention_softcap", "final_softcap"):
            softcap = getattr(self, name)
            if softcap is not None and not 0 < softcap < _LARGEST_SOFTCAP:
                raise UsageError(
                    f"CausalLMConfig.{name}: expected a number above 0 and below "
                    f"{_LARGEST_SOFTCAP:g}, or None, found {softcap!r:.60}"
                )
        if self.attention == "cudnn" and self.dtype != jnp.bfloat16:
            raise UsageError(
                f"ATTENTION: 'cudnn' computes in bfloat16, found {self.dtype}. Set "
                "DTYPE='bfloat16', or ATTENTION='xla'."
            )
        if self.attention == "cudnn" and self.attention_softcap is not None:
            raise UsageError(
                "ATTENTION: 'cudnn' does not bound attention logits, as this network does at "
                f"{self.attention_softcap:g}. Use ATTENTION='xla'."
            )
        kinds = range(len(self.layer_kinds))
        if not self.layer_pattern or any(kind not in kinds for kind in self.layer_pattern):
            raise UsageError(
                f"CausalLMConfig.layer_pattern must have indices of the {len(self.layer_kinds)} "
                f"layer_kinds, found {self.layer_pattern!s:.80}"
            )

    @property
    def kind_of_layers(self) -> np.ndarray:
        """The kind of every layer, `[num_layers]` int32."""
        return np.resize(np.array(self.layer_pattern, np.int32), self.num_layers)

    @property
    def logit_scale(self) -> float:
        """What attention logits are multiplied by."""
        scale = self.attention_scale
        return self.head_dim**-0.5 if scale is None else scale

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self.layer_kinds[kind] for kind in self.kind_of_layers)

    @property
    def total_layers(self) -> int:
        """Number of layers."""
        return self.num_layers
