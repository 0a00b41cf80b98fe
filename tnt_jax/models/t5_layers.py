"""The layers of a T5, and its two stacks of them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tnt_jax.models import layers, sharding
from tnt_jax.models.layers import Cache, KeysValues
from tnt_jax.models.t5_config import T5Config
from tnt_jax.runtime.array_types import Array, Bool, Float, Int

# T5X's value. Finite, so that a query with nothing to attend to (padding) stays finite as well.
_MASKED_LOGIT = -1e10


@functools.lru_cache(maxsize=64)
def _bucket_of_offset(
    bidirectional: bool, num_buckets: int, max_distance: int, furthest: int
) -> np.ndarray:
    """Buckets of the offsets -furthest to furthest (key minus query position).

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `max_distance`. A table, so that training and decoding cannot disagree by a rounding of the
    logarithm; as long as the sequences are, whatever the settings of a model say.
    """
    offsets = np.arange(-furthest, furthest + 1)
    if bidirectional:
        num_buckets //= 2
        first_bucket = np.where(offsets > 0, num_buckets, 0)
        distances = np.abs(offsets)
    else:
        first_bucket = np.zeros_like(offsets)
        distances = np.maximum(-offsets, 0)
    num_exact = num_buckets // 2
    octave = np.log(np.maximum(distances, 1) / num_exact) / np.log(max_distance / num_exact)
    # The tiny addend keeps exact powers (log 8 / log 16 * 8 = 6) from being rounded down.
    logarithmic = np.floor(num_exact + octave * (num_buckets - num_exact) + 1e-9).astype(int)
    buckets = np.where(distances < num_exact, distances, np.minimum(logarithmic, num_buckets - 1))
    return (first_bucket + buckets).astype(np.int32)


class _RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of key minus query position."""

    config: T5Config
    bidirectional: bool

    def setup(self):
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.rel_embedding = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (self.config.num_heads, self.config.num_relpos_buckets),
            jnp.float32,
        )

    def __call__(
        self, query_positions: Int[Array, "Q"], key_positions: Int[Array, "K"]
    ) -> Float[Array, "1 H Q K"]:
        return self.later(query_positions, key_positions)()

    def later(
        self,
        query_positions: Int[Array, "Q"],
        key_positions: Int[Array, "K"],
        num_groups: int = 1,
    ) -> Callable[[], Float[Array, "G H Q K"]]:
        """The same, computed when and where it is called, for each group of rows by itself."""
        c = self.config
        embedding: Any = self.rel_embedding
        # A query stands at one of the keys, so no offset is as large as their number.
        furthest = min(c.relpos_max_distance, len(key_positions))
        table = _bucket_of_offset(
            self.bidirectional, c.num_relpos_buckets, c.relpos_max_distance, furthest
        )

        def bias() -> Float[Array, "G H Q K"]:
            offsets = key_positions[None, :] - query_positions[:, None]
            offsets = jnp.clip(offsets, -furthest, furthest)
            buckets = jnp.asarray(table)[offsets + furthest]
            # A contraction with a one-hot, as in T5X: the gradient of a gather is a slow scatter.
            one_hot = jax.nn.one_hot(buckets, c.num_relpos_buckets, dtype=jnp.float32)
            of_groups = jnp.broadcast_to(embedding, (num_groups, *embedding.shape))
            if num_groups > 1:
                of_groups = sharding.constrain(of_groups, "batch", "heads", "relpos_buckets")
            return jnp.einsum("ghn,qkn->ghqk", of_groups, one_hot)

        return bias


def _shared_bias(
    stack: "Encoder | Decoder", positions: Int[Array, "T"], num_rows: int
) -> Callable[[], Float[Array, "G H T T"] | None]:
    """What the layers of a stack call for their bias, where they share one.

    In a loop over layers each computes it again, and on a mesh each device for its own rows.
    Computed once, its gradient, as large as the attention logits of one row, would be added up in
    the loop and over devices; so only that of its few parameters is.
    """
    c = stack.config
    if c.relpos_bias_per_layer:
        return lambda: None
    if c.scan_layers:
        num_groups = sharding.num_parts("batch")
        num_groups = num_groups if num_rows % num_groups == 0 else 1
        return stack.relpos_bias.later(positions, positions, num_groups)
    bias = stack.relpos_bias(positions, positions)
    return lambda: bias


class _Attention(nn.Module):
    """Multi-head attention without biases.

    T5 does not divide attention logits by sqrt(head_dim); the initializer of the query does.
    """

    config: T5Config

    def setup(self):
        c = self.config
        joined_kv = c.num_heads * c.head_dim
        init = functools.partial(
            nn.initializers.variance_scaling, mode="fan_in", distribution="normal"
        )
        self.query = layers.dense(c, joined_kv, ("embed", "joined_kv"), init(1.0 / c.head_dim))
        self.key = layers.dense(c, joined_kv, ("embed", "joined_kv"), init(1.0))
        self.value = layers.dense(c, joined_kv, ("embed", "joined_kv"), init(1.0))
        self.out = layers.dense(c, c.emb_dim, ("joined_kv", "embed"), init(1.0))
        self.dropout = layers.dropout(c)

    def _split_heads(self, x: Float[Array, "B T J"]) -> Float[Array, "B H T D"]:
        c = self.config
        x = x.reshape(*x.shape[:2], c.num_heads, c.head_dim).swapaxes(1, 2)
        return sharding.constrain(x, "batch", "heads", "length", "width")

    def keys_values(self, x: Float[Array, "B T E"]) -> KeysValues:
        return self._split_heads(self.key(x)), self._split_heads(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B Q E"],
        keys_values: KeysValues,
        *,
        mask: Bool[Array, "#B 1 #Q K"],
        bias: Float[Array, "G H Q K"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B Q E"]:
        keys, values = keys_values
        queries = self._split_heads(self.query(x))
        if self.config.float32_attention_logits:
            queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys)
        if bias is not None:
            of_groups = logits.reshape(len(bias), -1, *logits.shape[1:])
            logits = (of_groups + bias[:, None].astype(logits.dtype)).reshape(logits.shape)
        logits = jnp.where(mask, logits, _MASKED_LOGIT)
        weights = jax.nn.softmax(logits).astype(self.config.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        mixed = sharding.constrain(mixed, "batch", "heads", "length", "width")
        return self.out(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1))


class _EncoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        if self.config.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(self.config, bidirectional=True)
        self.pre_attention_layer_norm = layers.layer_norm(self.config)
        self.attention = _Attention(self.config)
        self.pre_mlp_layer_norm = layers.layer_norm(self.config)
        self.mlp = layers.Mlp(self.config)
        self.dropout = layers.dropout(self.config)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        *,
        mask: Bool[Array, "B 1 S S"],
        bias: Float[Array, "G H S S"] | None,
        deterministic: bool,
    ) -> Float[Array, "B S E"]:
        """One layer; without a `bias` of the stack it has one of its own."""
        if bias is None:
            positions = jnp.arange(x.shape[1])
            bias = self.relpos_bias(positions, positions)
        y = self.pre_attention_layer_norm(x)
        y = self.attention(
            y, self.attention.keys_values(y), mask=mask, bias=bias, deterministic=deterministic
        )
        x = x + self.dropout(y, deterministic=deterministic)
        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic=deterministic)
        return x + self.dropout(y, deterministic=deterministic)


class _DecoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        if self.config.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(self.config, bidirectional=False)
        self.pre_self_attention_layer_norm = layers.layer_norm(self.config)
        self.self_attention = _Attention(self.config)
        self.pre_cross_attention_layer_norm = layers.layer_norm(self.config)
        self.encoder_decoder_attention = _Attention(self.config)
        self.pre_mlp_layer_norm = layers.layer_norm(self.config)
        self.mlp = layers.Mlp(self.config)
        self.dropout = layers.dropout(self.config)

    def __call__(
        self,
        x: Float[Array, "N T E"],
        cross_keys_values: KeysValues,
        *,
        positions: Int[Array, "T"],
        self_mask: Bool[Array, "#N 1 T L"],
        self_bias: Float[Array, "G H T L"] | None,
        cross_mask: Bool[Array, "B 1 #T S"],
        deterministic: bool,
        cache: KeysValues | None = None,
    ) -> tuple[Float[Array, "N T E"], KeysValues]:
        """One layer; returns its output and the self-attention keys and values that it used.

        With a `cache`, `x` is of one position, and its key and value are written there first.
        """
        if self_bias is None:
            self_bias = self.relpos_bias(positions, jnp.arange(self_mask.shape[-1]))
        y = self.pre_self_attention_layer_norm(x)
        keys_values = self.self_attention.keys_values(y)
        if cache is not None:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=positions[0], axis=2
            )
            keys_values = (write(cache[0], keys_values[0]), write(cache[1], keys_values[1]))
        y = self.self_attention(
            y, keys_values, mask=self_mask, bias=self_bias, deterministic=deterministic
        )
        x = x + self.dropout(y, deterministic=deterministic)

        y = self.pre_cross_attention_layer_norm(x)
        # In beam search x has several rows per encoder input, next to each other. As further
        # queries of one row they share its keys and values; elsewhere this reshape does nothing.
        y = y.reshape(cross_mask.shape[0], -1, y.shape[-1])
        y = self.encoder_decoder_attention(
            y, cross_keys_values, mask=cross_mask, deterministic=deterministic
        )
        x = x + self.dropout(y, deterministic=deterministic).reshape(x.shape)

        y = self.mlp(self.pre_mlp_layer_norm(x), deterministic=deterministic)
        return x + self.dropout(y, deterministic=deterministic), keys_values


class Encoder(nn.Module):
    """The encoder's layers, from embedded tokens to normalised states."""

    config: T5Config

    def setup(self):
        """Binds the submodules; their names are T5X's."""
        c = self.config
        if not c.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(c, bidirectional=True)
        self.layers = layers.make_layers(c, _EncoderLayer, c.num_encoder_layers)
        self.encoder_norm = layers.layer_norm(c)
        self.dropout = layers.dropout(c)
        # The last dropout of the encoder alone has a mask per position in T5X.
        self.output_dropout = nn.Dropout(c.dropout_rate)

    def __call__(
        self, x: Float[Array, "B S E"], *, mask: Bool[Array, "B 1 S S"], deterministic: bool
    ) -> Float[Array, "B S E"]:
        """All layers, the norm, and dropout around them."""
        c = self.config
        positions = jnp.arange(x.shape[1])
        bias = _shared_bias(self, positions, len(x))

        def call(layer: _EncoderLayer, x: Float[Array, "B S E"]) -> Float[Array, "B S E"]:
            return layer(x, mask=mask, bias=bias(), deterministic=deterministic)

        x = self.dropout(x, deterministic=deterministic)
        x = layers.run_layers(self.layers, c.num_encoder_layers, c, x, call)
        return self.output_dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """The decoder's layers, from embedded tokens to normalised states, and the output matrix."""

    config: T5Config

    def setup(self):
        """Binds the submodules; their names are T5X's."""
        c = self.config
        if not c.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(c, bidirectional=False)
        self.layers = layers.make_layers(c, _DecoderLayer, c.num_decoder_layers)
        self.decoder_norm = layers.layer_norm(c)
        self.dropout = layers.dropout(c)
        if not c.logits_via_embedding:
            # Float32 whatever the compute dtype: the loss is worst off in bfloat16.
            self.logits_dense = layers.dense(c, c.vocab_size, ("embed", "vocab"), dtype=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T E"],
        encoded: Float[Array, "B S E"],
        *,
        self_mask: Bool[Array, "B 1 T T"],
        cross_mask: Bool[Array, "B 1 T S"],
        deterministic: bool,
        first: int = 0,
        stop: int | None = None,
    ) -> Float[Array, "B T E"]:
        """All positions at once: all layers, the norm, and dropout around them.

        With `first`, `x` is what enters that layer; with `stop`, the result is what enters that.
        """
        c = self.config
        positions = jnp.arange(x.shape[1])
        bias = _shared_bias(self, positions, len(x))

        def call(layer: _DecoderLayer, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
            # Here and not before the layers, so that those of one layer at a time are in memory.
            cross_keys_values = layer.encoder_decoder_attention.keys_values(encoded)
            x, _ = layer(
                x,
                cross_keys_values,
                positions=positions,
                self_mask=self_mask,
                self_bias=bias(),
                cross_mask=cross_mask,
                deterministic=deterministic,
            )
            return x

        if first == 0:
            x = self.dropout(x, deterministic=deterministic)
        chosen = layers.chosen(self.layers, first, stop)
        x = layers.run_layers(chosen, c.num_decoder_layers, c, x, call)
        if stop is not None:
            return x
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

    def cross_keys_values(self, encoded: Float[Array, "B S E"]) -> Cache:
        """What all steps of decoding read of the encoder's output, for each layer."""
        assert not self.config.scan_layers, "steps are for layers that are apart"
        return tuple(layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers)

    def step(
        self,
        x: Float[Array, "N 1 E"],
        cross_keys_values: Cache,
        *,
        position: Int[Array, ""],
        cross_mask: Bool[Array, "B 1 1 S"],
        cache: Cache,
    ) -> tuple[Float[Array, "N 1 E"], Cache]:
        """One position, and the cache with its keys and values; no dropout."""
        length = cache[0][0].shape[2]
        positions = position[None]
        bias = None
        if not self.config.relpos_bias_per_layer:
            bias = self.relpos_bias(positions, jnp.arange(length))
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(
                x,
                cross_keys_values[i],
                positions=positions,
                self_mask=(jnp.arange(length) <= position)[None, None, None, :],
                self_bias=bias,
                cross_mask=cross_mask,
                deterministic=True,
                cache=cache[i],
            )
            new_cache.append(keys_values)
        return self.decoder_norm(x), tuple(new_cache)
