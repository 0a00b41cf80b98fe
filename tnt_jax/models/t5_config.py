"""The settings of a T5, beside those that every network has."""

import dataclasses
from typing import ClassVar

from tnt_jax.models.network_config import MOST_LAYERS, NetworkConfig
from tnt_jax.runtime.errors import UsageError

# The largest size of each kind, as in `network_config`.
_LARGEST = {
    "num_encoder_layers": MOST_LAYERS,
    "num_decoder_layers": MOST_LAYERS,
    "num_relpos_buckets": 2**10,  # 32
    "relpos_max_distance": 2**20,  # 128; no sequence is longer
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(NetworkConfig):
    """Architecture of one T5 model, with T5X's field names.

    `mlp_activations` are `("relu",)` in T5 1.0, whose output matrix is tied to the embedding, and
    `("gelu", "linear")` in T5 1.1, where it is not. Dropout is at T5X's places.

    Attributes:
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      scale_decoder_outputs: whether logits are multiplied by `emb_dim ** -0.5`; None is T5X's rule,
        where the output matrix is tied.
      relpos_bias_per_layer: a relative position bias for every layer (umT5, `scalable_t5` of T5X)
        instead of one for each stack.
      num_relpos_buckets: number of buckets of the relative position bias.
      relpos_max_distance: beyond it all distances share a bucket.

    Raises:
      UsageError: a setting that `NetworkConfig` refuses, or buckets that the distance does not
        fill.
    """

    num_encoder_layers: int
    num_decoder_layers: int
    scale_decoder_outputs: bool | None = None
    relpos_bias_per_layer: bool = False
    num_relpos_buckets: int = 32
    relpos_max_distance: int = 128
    unseen: ClassVar = (
        *("mlp_activations", "scales_logits", "relpos_max_distance", "layer_norm_epsilon"),
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_sizes(_LARGEST)
        if self.attention != "xla":
            raise UsageError(
                "ATTENTION: expected 'xla' for a T5, whose relative position bias no kernel takes; "
                f"found {self.attention!r}."
            )
        # Half of a direction's buckets hold one distance each, and further ones must follow.
        buckets, distance = self.num_relpos_buckets, self.relpos_max_distance
        if buckets % 4 or distance <= buckets // 2:
            raise UsageError(
                "T5Config.num_relpos_buckets: expected a multiple of 4 and less than twice "
                f"relpos_max_distance, found {buckets} with {distance}"
            )

    @property
    def scales_logits(self) -> bool:
        """`scale_decoder_outputs`, or what None stands for."""
        scale = self.scale_decoder_outputs
        return self.logits_via_embedding if scale is None else scale

    @property
    def total_layers(self) -> int:
        """Number of layers of both stacks."""
        return self.num_encoder_layers + self.num_decoder_layers
