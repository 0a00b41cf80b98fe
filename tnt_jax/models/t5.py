"""T5 and its family in Flax Linen, with T5X's parameter names and logical axes.

T5 1.0 and 1.1, LM-adapted and Flan-T5, mT5, ByT5 and umT5 differ in settings of `T5Config` alone.
The rest of the project sees a T5 as `T5`, which is a `network.Network`.

Parameter names and shapes, initializers, masks and the places of dropout agree with
google-research/t5x (`t5x/examples/t5/network.py`, `layers.py`), so a T5X checkpoint loads by name.
Two seams are our own:

* Keys and values are computed apart from attention. Training and step-by-step decoding run the
  same layers; a decoding step only takes most of its keys and values from a cache.
* The output matrix is apart from the decoder (`Transformer.decode`, then `Transformer.logits`), so
  a loss can work from the hidden states without ever holding `[B, T, V]` (`T5.forward`).

With `T5Config.scan_layers` the same parameters are stacked, layer upon layer
(`parameters.stack_layers`).

Token id 0 is padding and the first decoder input; where a batch has no segment ids, every mask
follows from `tokens > 0`. The relative position bias needs only differences of positions within one
row, which packing keeps, so the `*_positions` features of a packed batch are not read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tnt_jax.data.layouts import ENCODER_DECODER, FeatureLayout
from tnt_jax.models import sharded_embedding, sharding
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.linen_network import LinenNetwork
from tnt_jax.models.network import LOWER_STATES, DecodingStart
from tnt_jax.models.t5_config import T5Config
from tnt_jax.models.t5_layers import Cache, Decoder, Encoder
from tnt_jax.runtime.array_types import Array, Bool, Float, Int, Key, PyTree
from tnt_jax.runtime.errors import UsageError

_EMBEDDING_AXES = ("vocab", "embed")
_ENCODER_STATES = "encoder_states"  # the feature of what the encoder says


class Memory(NamedTuple):
    """What every decoding step reads and none changes.

    Attributes:
      keys_values: per decoder layer, cross-attention keys and values of the encoder output.
      mask: 1 where the encoder input is a token, `[B, 1, 1, S]`.
    """

    keys_values: Cache
    mask: Bool[Array, "B 1 1 S"]


# ----------------------------------------------------------------------------------------- Model


def _attention_mask(
    queries: Int[Array, "B Q"] | Bool[Array, "B Q"],
    keys: Int[Array, "B K"] | Bool[Array, "B K"],
    allowed: Callable,
) -> Bool[Array, "B 1 Q K"]:
    return allowed(queries[:, None, :, None], keys[:, None, None, :])


class Transformer(nn.Module):
    """An encoder-decoder T5. Axes: B rows, S source positions, T target positions, E `emb_dim`."""

    config: T5Config

    def setup(self):
        """Binds the submodules; their names are T5X's."""
        c = self.config
        # No dtype here: rows are cast after the look-up, so their gradients add up in float32.
        self.token_embedder = nn.Embed(
            c.vocab_size,
            c.emb_dim,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(stddev=1.0), _EMBEDDING_AXES
            ),
        )
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        table: Any = self.token_embedder.embedding
        rows = sharded_embedding.look_up(table, tokens, jnp.dtype(self.config.dtype))
        return sharding.constrain(rows, "batch", "length", "width")

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B S E"]:
        """Encoder states after the final norm and dropout."""
        segment_ids = encoder_segment_ids
        is_token = (encoder_input_tokens if segment_ids is None else segment_ids) > 0
        mask = _attention_mask(is_token, is_token, jnp.logical_and)
        if segment_ids is not None:
            mask &= _attention_mask(segment_ids, segment_ids, jnp.equal)
        return self.encoder(
            self._embed(encoder_input_tokens), mask=mask, deterministic=deterministic
        )

    def decode(
        self,
        encoded: Float[Array, "B S E"],
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        decoder_target_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
        entering: Float[Array, "B T E"] | None = None,
        first: int = 0,
        stop: int | None = None,
    ) -> Float[Array, "B T E"]:
        """Decoder states at all positions (teacher forcing), after the final norm and dropout.

        The token arrays are read for their padding as well; `decoder_input_tokens` are the targets
        shifted right by one, with 0 first. With `entering`, those are the states that enter the
        layer `first`; `stop` is as in `Decoder`.

        Raises:
          UsageError: segment ids of the encoder without those of the decoder, or the reverse.
        """
        if (encoder_segment_ids is None) != (decoder_segment_ids is None):
            raise UsageError(
                "a packed batch needs both encoder_segment_ids and decoder_segment_ids; found one"
            )
        is_source = encoder_input_tokens > 0
        is_target = decoder_target_tokens > 0
        positions = jnp.arange(is_target.shape[1])
        self_mask = _attention_mask(positions[None], positions[None], jnp.greater_equal)
        self_mask = self_mask & _attention_mask(is_target, is_target, jnp.logical_and)
        cross_mask = _attention_mask(is_target, is_source, jnp.logical_and)
        if decoder_segment_ids is not None and encoder_segment_ids is not None:
            self_mask &= _attention_mask(decoder_segment_ids, decoder_segment_ids, jnp.equal)
            cross_mask &= _attention_mask(decoder_segment_ids, encoder_segment_ids, jnp.equal)
        return self.decoder(
            self._embed(decoder_input_tokens) if entering is None else entering,
            encoded,
            self_mask=self_mask,
            cross_mask=cross_mask,
            deterministic=deterministic,
            first=first,
            stop=stop,
        )

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Float32 logits of decoder states."""
        hidden = hidden.astype(jnp.float32)
        if self.config.logits_via_embedding:
            table = self.token_embedder.embedding
            logits = hidden @ sharding.gather(table, _EMBEDDING_AXES, jnp.float32).T
        else:
            logits = self.decoder.logits_dense(hidden)
        logits = sharding.constrain(logits, "batch", "length", "vocab")
        # The embedding has unit variance, an output matrix of its own has 1 / emb_dim.
        return logits * self.config.emb_dim**-0.5 if self.config.scales_logits else logits

    def hidden(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        decoder_target_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T E"]:
        """Teacher-forced decoder states: `encode` and `decode` in turn."""
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            deterministic=deterministic,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )

    def __call__(self, *tokens: Int[Array, "B _"], **kwargs: Any) -> Float[Array, "B T V"]:
        """Teacher-forced logits: `hidden`, with its arguments, and `logits` in turn."""
        return self.logits(self.hidden(*tokens, **kwargs))

    def start_decoding(
        self, encoder_input_tokens: Int[Array, "B S"], lengths: Int[Array, "B"]
    ) -> Memory:
        """Computes, once, what every `decode_step` reads: cross-attention keys and values."""
        is_token = jnp.arange(encoder_input_tokens.shape[1])[None] < lengths[:, None]
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids=is_token.astype(jnp.int32))
        return Memory(self.decoder.cross_keys_values(encoded), is_token[:, None, None, :])

    def decode_step(
        self,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N V"], Cache]:
        """Logits of the token after `tokens`, in the time of one position.

        Args:
          tokens: the decoder input at `position` (0 at position 0). N is B, or B times the number
            of beams with the beams of one input next to each other.
          position: the position of `tokens`, the same in every row.
          cache: self-attention keys and values of the earlier positions, zeros at first.
          memory: from `start_decoding`.

        Returns:
          The logits and the cache with this position added.
        """
        hidden, cache = self.step_states(tokens, position, cache, memory)
        return self.logits(hidden)[:, 0], cache

    def step_states(
        self,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N 1 E"], Cache]:
        """The decoder state of which `decode_step` makes logits, and the cache."""
        return self.decoder.step(
            self._embed(tokens[:, None]),
            memory.keys_values,
            position=position,
            cross_mask=memory.mask,
            cache=cache,
        )


# --------------------------------------------------------------------------------------- Network


@dataclasses.dataclass(frozen=True)
class T5(LinenNetwork):
    """A T5 as `network.Network` describes it.

    Attributes:
      config: The settings of the network.
    """

    config: T5Config
    stacks: ClassVar = {"encoder": "num_encoder_layers", "decoder": "num_decoder_layers"}

    @property
    def feature_layout(self) -> FeatureLayout:
        """Inputs for the encoder, targets for the decoder."""
        return ENCODER_DECODER

    def boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters by T5X's initializers, in Flax's boxes."""
        tokens = jnp.ones((1, 1), jnp.int32)  # no shape depends on the batch
        return Transformer(self.config).init(key, tokens, tokens, tokens)["params"]

    def forward(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        dropout_key: Key[Array, ""] | None = None,
        trained_layers: int | None = None,
    ) -> FactoredLogits:
        """Teacher-forced logits, not multiplied out.

        Of the batch, the encoder and decoder tokens and, where it is packed, the segment ids are
        read.
        """
        first, encoded, lower = self.first_trained(trained_layers), (), {}
        if trained_layers is not None:
            encoded = (batch[_ENCODER_STATES],)
            lower = {"entering": batch[LOWER_STATES] if first else None, "first": first}
        hidden = self._states(
            params,
            batch,
            *encoded,
            **lower,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method="decode" if encoded else "hidden",
        )
        return FactoredLogits(self._scaled(hidden), *self.output_matrix(params))

    def _states(
        self, params: PyTree, batch: Mapping[str, Array], *encoded: Array, **kwargs: Any
    ) -> Float[Array, "B T E"]:
        """What the module's method computes from what it is to read of a batch."""
        found = Transformer(self.config).apply(
            {"params": params},
            *encoded,
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            **kwargs,
        )
        return cast(jax.Array, found)  # apply returns a pair only if it may change variables

    def lower_features(self, trained_layers: int) -> dict[str, str]:
        """The encoder's output, and the decoder's states unless all its layers are trained."""
        features = {_ENCODER_STATES: "encoder_input_tokens"}
        if self.first_trained(trained_layers):
            features[LOWER_STATES] = "decoder_target_tokens"
        return features

    def lower_states(
        self, params: PyTree, batch: Mapping[str, Array], trained_layers: int
    ) -> dict[str, Float[Array, "B _ E"]]:
        """What the encoder says, and what enters the first of the decoder's last layers."""
        encoded = Transformer(self.config).apply(
            {"params": params},
            batch["encoder_input_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            method="encode",
        )
        states = {_ENCODER_STATES: cast(jax.Array, encoded)}
        if stop := self.first_trained(trained_layers):
            encoded = states[_ENCODER_STATES]
            states[LOWER_STATES] = self._states(params, batch, encoded, stop=stop, method="decode")
        return states

    def _scaled(self, hidden: jax.Array) -> jax.Array:
        if self.config.scales_logits:
            hidden = hidden.astype(self.hidden_dtype) * self.config.emb_dim**-0.5
        return hidden

    @property
    def hidden_dtype(self) -> Any:
        """Float32 where the logits are scaled, else the compute dtype."""
        return jnp.dtype("float32") if self.config.scales_logits else self.config.dtype

    def start_decoding(
        self,
        params: PyTree,
        input_tokens: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        *,
        num_beams: int,
        max_length: int,
        num_shared: int = 0,  # an encoder looks ahead: no states of two inputs are the same
    ) -> DecodingStart:
        """Runs the encoder; the decoder begins with id 0 and an empty cache."""
        c = self.config
        memory = Transformer(c).apply(
            {"params": params}, input_tokens, lengths, method="start_decoding"
        )
        num_rows = len(input_tokens) * num_beams
        zeros = jnp.zeros((num_rows, c.num_heads, max_length, c.head_dim), c.dtype)
        cache = tuple((zeros, zeros) for _ in range(c.num_decoder_layers))
        return DecodingStart(jnp.zeros(num_rows, jnp.int32), cache, memory)

    def decode_step(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N V"], Cache]:
        """Logits of the next token, by the decoder alone."""
        stepped = Transformer(self.config).apply(
            {"params": params}, tokens, position, cache, memory, method="decode_step"
        )
        return cast(tuple[jax.Array, Cache], stepped)

    def decode_states(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N E"], Cache]:
        """The state of one position of every row, scaled as `forward` scales it."""
        stepped = Transformer(self.config).apply(
            {"params": params}, tokens, position, cache, memory, method="step_states"
        )
        hidden, cache = cast(tuple[jax.Array, Cache], stepped)
        return self._scaled(hidden)[:, 0], cache
