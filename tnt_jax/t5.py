"""T5 and its family in Flax Linen, with T5X's parameter names and logical axes.

T5 1.0 and 1.1, LM-adapted and Flan-T5, mT5, ByT5 and umT5 differ in settings of `T5Config` alone.

Parameter names and shapes, initializers, masks and the places of dropout agree with
google-research/t5x (`t5x/examples/t5/network.py`, `layers.py`), so a T5X checkpoint loads by name.
Two seams are our own:

* Keys and values are computed apart from attention. Training and step-by-step decoding run the
  same layers; a decoding step only takes most of its keys and values from a cache.
* The output matrix is apart from the decoder (`Transformer.decode`, then `Transformer.logits`), so
  a loss can work from the hidden states without ever holding `[B, T, V]`.

Token id 0 is padding and the first decoder input; every mask follows from `tokens > 0`. The
relative position bias needs only differences of positions within one row, which packing keeps, so
the `*_positions` features of a packed batch are not read.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tnt_jax import embedding, fused_objective
from tnt_jax.array_types import Array, Bool, Float, Int, Key, PyTree
from tnt_jax.errors import UsageError

# T5X's value. Finite, so that a query with nothing to attend to (padding) stays finite as well.
_MASKED_LOGIT = -1e10

_ACTIVATIONS = {
    "gelu": nn.gelu,  # the tanh approximation, as in T5 1.1
    "linear": lambda x: x,
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
    "gelu_exact": functools.partial(nn.gelu, approximate=False),
}

KeysValues = tuple[Float[Array, "_ H _ D"], Float[Array, "_ H _ D"]]
Cache = tuple[KeysValues, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Architecture of one T5 model, with T5X's field names.

    Attributes:
      vocab_size: rows of the embedding, padding of the vocabulary included.
      emb_dim: width of the residual stream.
      num_heads: attention heads per layer.
      num_encoder_layers: layers of the encoder.
      num_decoder_layers: layers of the decoder.
      head_dim: width of one head; `num_heads * head_dim` need not be `emb_dim`.
      mlp_dim: width of the hidden MLP layer.
      mlp_activations: one activation (T5 1.0: `("relu",)`), or several whose outputs are multiplied
        (T5 1.1: `("gelu", "linear")`).
      logits_via_embedding: True ties the output matrix to the embedding (T5 1.0).
      scale_decoder_outputs: whether logits are multiplied by `emb_dim ** -0.5`; None is T5X's rule,
        where the output matrix is tied.
      relpos_bias_per_layer: a relative position bias for every layer (umT5, `scalable_t5` of T5X)
        instead of one for each stack.
      num_relpos_buckets: of the relative position bias.
      relpos_max_distance: beyond it all distances share a bucket.
      layer_norm_epsilon: added to the mean square.
      dtype: of the computation, float32 or bfloat16, as a name or a dtype. Parameters and logits
        are always float32.
      dropout_rate: probability of zeroing, at T5X's places; acts only where a call is given a key.
      float32_attention_logits: compute attention logits and softmax in float32 whatever `dtype` is.

    Raises:
      UsageError: a size below 1, buckets that the distance does not fill, a rate outside [0, 1), an
        epsilon below 0, or an unknown activation or dtype.
    """

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: Sequence[str]
    logits_via_embedding: bool
    scale_decoder_outputs: bool | None = None
    relpos_bias_per_layer: bool = False
    num_relpos_buckets: int = 32
    relpos_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dtype: str | np.dtype | type = "float32"
    dropout_rate: float = 0.0
    float32_attention_logits: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or value < 1):
                raise UsageError(
                    f"T5Config.{field.name} must be a whole number of at least 1, not {value!r}"
                )
        # Tuples and dtypes, so that a configuration is hashable: a static argument of jax.jit.
        activations = self.mlp_activations
        activations = (activations,) if isinstance(activations, str) else tuple(activations)
        object.__setattr__(self, "mlp_activations", activations)
        unknown = [name for name in activations if name not in _ACTIVATIONS]
        if unknown or not activations:
            raise UsageError(
                f"T5Config.mlp_activations must name one or more of {', '.join(_ACTIVATIONS)}; "
                f"found {activations}"
            )
        dtype = np.dtype(None)
        with contextlib.suppress(TypeError):  # not the name of any dtype
            dtype = jnp.dtype(self.dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise UsageError(f"T5Config.dtype must be float32 or bfloat16, not {self.dtype!r}")
        object.__setattr__(self, "dtype", dtype)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise UsageError(f"T5Config.dropout_rate must be in [0, 1), not {self.dropout_rate}")
        if self.layer_norm_epsilon < 0:
            raise UsageError(f"layer_norm_epsilon must be >= 0, not {self.layer_norm_epsilon}")
        # Half of a direction's buckets hold one distance each, and further ones must follow.
        buckets, distance = self.num_relpos_buckets, self.relpos_max_distance
        if buckets % 4 or distance <= buckets // 2:
            raise UsageError(
                "T5Config.num_relpos_buckets must be a multiple of 4 and less than twice "
                f"relpos_max_distance, not {buckets} with {distance}"
            )

    @property
    def scales_logits(self) -> bool:
        """`scale_decoder_outputs`, or what None stands for."""
        scale = self.scale_decoder_outputs
        return self.logits_via_embedding if scale is None else scale


class Memory(NamedTuple):
    """What every decoding step reads and none changes.

    Attributes:
      keys_values: per decoder layer, cross-attention keys and values of the encoder output.
      mask: 1 where the encoder input is a token, `[B, 1, 1, S]`.
    """

    keys_values: Cache
    mask: Bool[Array, "B 1 1 S"]


# ---------------------------------------------------------------------------------------- Layers


def _dense(
    config: T5Config,
    features: int,
    axes: tuple[str, str],
    kernel_init: Callable | None = None,
    **kwargs,
) -> nn.Dense:
    if kernel_init is None:
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    kwargs.setdefault("dtype", config.dtype)
    return nn.Dense(
        features,
        use_bias=False,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        **kwargs,
    )


def _layer_norm(config: T5Config) -> nn.RMSNorm:
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=config.dtype, scale_init=scale_init)


def _dropout(config: T5Config) -> nn.Dropout:
    """T5's dropout: one mask for all positions of a sequence."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


@functools.cache
def _bucket_of_offset(bidirectional: bool, num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the offsets -max_distance to max_distance (key minus query position).

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    `max_distance`. A table, so that training and decoding cannot disagree by a rounding of the
    logarithm.
    """
    offsets = np.arange(-max_distance, max_distance + 1)
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

    @nn.compact
    def __call__(
        self, query_positions: Int[Array, "Q"], key_positions: Int[Array, "K"]
    ) -> Float[Array, "1 H Q K"]:
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        embedding = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(init, ("heads", "relpos_buckets")),
            (c.num_heads, c.num_relpos_buckets),
            jnp.float32,
        )
        offsets = key_positions[None, :] - query_positions[:, None]
        offsets = jnp.clip(offsets, -c.relpos_max_distance, c.relpos_max_distance)
        table = _bucket_of_offset(self.bidirectional, c.num_relpos_buckets, c.relpos_max_distance)
        buckets = jnp.asarray(table)[offsets + c.relpos_max_distance]
        # A contraction with a one-hot, as in T5X: the gradient of a gather is a slow scatter.
        one_hot = jax.nn.one_hot(buckets, c.num_relpos_buckets, dtype=jnp.float32)
        return jnp.einsum("hn,qkn->hqk", embedding, one_hot)[None]


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
        self.query = _dense(c, joined_kv, ("embed", "joined_kv"), init(1.0 / c.head_dim))
        self.key = _dense(c, joined_kv, ("embed", "joined_kv"), init(1.0))
        self.value = _dense(c, joined_kv, ("embed", "joined_kv"), init(1.0))
        self.out = _dense(c, c.emb_dim, ("joined_kv", "embed"), init(1.0))
        self.dropout = _dropout(c)

    def _split_heads(self, x: Float[Array, "B T J"]) -> Float[Array, "B H T D"]:
        c = self.config
        return x.reshape(*x.shape[:2], c.num_heads, c.head_dim).swapaxes(1, 2)

    def keys_values(self, x: Float[Array, "B T E"]) -> KeysValues:
        return self._split_heads(self.key(x)), self._split_heads(self.value(x))

    def __call__(
        self,
        x: Float[Array, "B Q E"],
        keys_values: KeysValues,
        *,
        mask: Bool[Array, "#B 1 #Q K"],
        bias: Float[Array, "1 H Q K"] | None = None,
        deterministic: bool,
    ) -> Float[Array, "B Q E"]:
        keys, values = keys_values
        queries = self._split_heads(self.query(x))
        if self.config.float32_attention_logits:
            queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
        logits = jnp.einsum("bhqd,bhkd->bhqk", queries, keys)
        if bias is not None:
            logits = logits + bias.astype(logits.dtype)
        logits = jnp.where(mask, logits, _MASKED_LOGIT)
        weights = jax.nn.softmax(logits).astype(self.config.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, values)
        return self.out(mixed.swapaxes(1, 2).reshape(*x.shape[:2], -1))


class _Mlp(nn.Module):
    """Position-wise MLP; with several activations their outputs gate each other."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], *, deterministic: bool) -> Float[Array, "B T E"]:
        c = self.config
        names = ["wi"]
        if len(c.mlp_activations) > 1:
            names = [f"wi_{i}" for i in range(len(c.mlp_activations))]
        hidden = math.prod(
            _ACTIVATIONS[activation](_dense(c, c.mlp_dim, ("embed", "mlp"), name=name)(x))
            for name, activation in zip(names, c.mlp_activations, strict=True)
        )
        hidden = _dropout(c)(hidden, deterministic=deterministic)
        return _dense(c, c.emb_dim, ("mlp", "embed"), name="wo")(hidden)


class _EncoderLayer(nn.Module):
    config: T5Config

    def setup(self):
        if self.config.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(self.config, bidirectional=True)
        self.pre_attention_layer_norm = _layer_norm(self.config)
        self.attention = _Attention(self.config)
        self.pre_mlp_layer_norm = _layer_norm(self.config)
        self.mlp = _Mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(
        self,
        x: Float[Array, "B S E"],
        *,
        mask: Bool[Array, "B 1 S S"],
        bias: Float[Array, "1 H S S"],
        deterministic: bool,
    ) -> Float[Array, "B S E"]:
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
        self.pre_self_attention_layer_norm = _layer_norm(self.config)
        self.self_attention = _Attention(self.config)
        self.pre_cross_attention_layer_norm = _layer_norm(self.config)
        self.encoder_decoder_attention = _Attention(self.config)
        self.pre_mlp_layer_norm = _layer_norm(self.config)
        self.mlp = _Mlp(self.config)
        self.dropout = _dropout(self.config)

    def __call__(
        self,
        x: Float[Array, "N T E"],
        cross_keys_values: KeysValues,
        *,
        self_mask: Bool[Array, "#N 1 T L"],
        self_bias: Float[Array, "1 H T L"],
        cross_mask: Bool[Array, "B 1 #T S"],
        deterministic: bool,
        cache: KeysValues | None,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "N T E"], KeysValues]:
        """One layer; returns its output and the self-attention keys and values that it used.

        With a `cache`, `x` is the one `position`, and its key and value are written there first.
        """
        y = self.pre_self_attention_layer_norm(x)
        keys_values = self.self_attention.keys_values(y)
        if cache is not None:
            write = functools.partial(
                jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=2
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


def _biases(
    stack: "_Encoder | _Decoder", query_positions: Int[Array, "Q"], key_positions: Int[Array, "K"]
) -> Sequence[Float[Array, "1 H Q K"]]:
    """The relative position bias for each layer of a stack."""
    if stack.config.relpos_bias_per_layer:
        return [layer.relpos_bias(query_positions, key_positions) for layer in stack.layers]
    return [stack.relpos_bias(query_positions, key_positions)] * len(stack.layers)


class _Encoder(nn.Module):
    config: T5Config

    def setup(self):
        if not self.config.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(self.config, bidirectional=True)
        self.layers = [_EncoderLayer(self.config) for _ in range(self.config.num_encoder_layers)]
        self.encoder_norm = _layer_norm(self.config)
        self.dropout = _dropout(self.config)
        # The last dropout of the encoder alone has a mask per position in T5X.
        self.output_dropout = nn.Dropout(self.config.dropout_rate)

    def __call__(
        self, x: Float[Array, "B S E"], *, mask: Bool[Array, "B 1 S S"], deterministic: bool
    ) -> Float[Array, "B S E"]:
        positions = jnp.arange(x.shape[1])
        biases = _biases(self, positions, positions)
        x = self.dropout(x, deterministic=deterministic)
        for layer, bias in zip(self.layers, biases, strict=True):
            x = layer(x, mask=mask, bias=bias, deterministic=deterministic)
        return self.output_dropout(self.encoder_norm(x), deterministic=deterministic)


class _Decoder(nn.Module):
    config: T5Config

    def setup(self):
        c = self.config
        if not c.relpos_bias_per_layer:
            self.relpos_bias = _RelativePositionBias(c, bidirectional=False)
        self.layers = [_DecoderLayer(c) for _ in range(c.num_decoder_layers)]
        self.decoder_norm = _layer_norm(c)
        self.dropout = _dropout(c)
        if not c.logits_via_embedding:
            # Float32 whatever the compute dtype: the loss is worst off in bfloat16.
            self.logits_dense = _dense(c, c.vocab_size, ("embed", "vocab"), dtype=jnp.float32)

    def cross_keys_values(self, encoded: Float[Array, "B S E"]) -> Cache:
        return tuple(layer.encoder_decoder_attention.keys_values(encoded) for layer in self.layers)

    def __call__(
        self,
        x: Float[Array, "N T E"],
        cross_keys_values: Cache,
        *,
        positions: Int[Array, "T"],
        self_mask: Bool[Array, "#N 1 T L"],
        cross_mask: Bool[Array, "B 1 #T S"],
        deterministic: bool,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "N T E"], Cache]:
        biases = _biases(self, positions, jnp.arange(self_mask.shape[-1]))
        x = self.dropout(x, deterministic=deterministic)
        new_cache = []
        for i, layer in enumerate(self.layers):
            x, keys_values = layer(
                x,
                cross_keys_values[i],
                self_mask=self_mask,
                self_bias=biases[i],
                cross_mask=cross_mask,
                deterministic=deterministic,
                cache=None if cache is None else cache[i],
                position=positions[0],
            )
            new_cache.append(keys_values)
        x = self.dropout(self.decoder_norm(x), deterministic=deterministic)
        return x, tuple(new_cache)


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
                nn.initializers.normal(stddev=1.0), ("vocab", "embed")
            ),
        )
        self.encoder = _Encoder(c)
        self.decoder = _Decoder(c)

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        return embedding.look_up(self.token_embedder.embedding, tokens, self.config.dtype)

    def encode(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B S E"]:
        """Encoder states after the final norm and dropout."""
        is_token = encoder_input_tokens > 0
        mask = _attention_mask(is_token, is_token, jnp.logical_and)
        if encoder_segment_ids is not None:
            mask &= _attention_mask(encoder_segment_ids, encoder_segment_ids, jnp.equal)
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
    ) -> Float[Array, "B T E"]:
        """Decoder states at all positions (teacher forcing), after the final norm and dropout.

        The token arrays are read for their padding as well; `decoder_input_tokens` are the targets
        shifted right by one, with 0 first.

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
        hidden, _ = self.decoder(
            self._embed(decoder_input_tokens),
            self.decoder.cross_keys_values(encoded),
            positions=positions,
            self_mask=self_mask,
            cross_mask=cross_mask,
            deterministic=deterministic,
        )
        return hidden

    def logits(self, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Float32 logits of decoder states."""
        hidden = hidden.astype(jnp.float32)
        is_tied = self.config.logits_via_embedding
        logits = (self.token_embedder.attend if is_tied else self.decoder.logits_dense)(hidden)
        # The embedding has unit variance, an output matrix of its own has 1 / emb_dim.
        return logits * self.config.emb_dim**-0.5 if self.config.scales_logits else logits

    def __call__(
        self,
        encoder_input_tokens: Int[Array, "B S"],
        decoder_input_tokens: Int[Array, "B T"],
        decoder_target_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B T V"]:
        """Teacher-forced logits: `encode`, `decode` and `logits` in turn."""
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids=encoder_segment_ids,
            deterministic=deterministic,
        )
        hidden = self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            deterministic=deterministic,
        )
        return self.logits(hidden)

    def start_decoding(self, encoder_input_tokens: Int[Array, "B S"]) -> Memory:
        """Computes, once, what every `decode_step` reads: cross-attention keys and values."""
        encoded = self.encode(encoder_input_tokens)
        mask = (encoder_input_tokens > 0)[:, None, None, :]
        return Memory(self.decoder.cross_keys_values(encoded), mask)

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
          position: of `tokens`, the same in every row.
          cache: self-attention keys and values of the earlier positions, from `empty_cache` and
            then from the previous step.
          memory: from `start_decoding`.

        Returns:
          The logits and the cache with this position added.
        """
        length = cache[0][0].shape[2]
        hidden, cache = self.decoder(
            self._embed(tokens[:, None]),
            memory.keys_values,
            positions=position[None],
            self_mask=(jnp.arange(length) <= position)[None, None, None, :],
            cross_mask=memory.mask,
            deterministic=True,
            cache=cache,
        )
        return self.logits(hidden)[:, 0], cache


def empty_cache(config: T5Config, num_rows: int, max_length: int) -> Cache:
    """A cache for `Transformer.decode_step`: zeros, `[num_rows, H, max_length, D]` per layer."""
    zeros = jnp.zeros((num_rows, config.num_heads, max_length, config.head_dim), config.dtype)
    return tuple((zeros, zeros) for _ in range(config.num_decoder_layers))


# ------------------------------------------------------------------------------------ Parameters


def _boxed_params(config: T5Config, key: Key[Array, ""]) -> PyTree:
    # Parameter shapes do not depend on the batch.
    tokens = jnp.ones((1, 1), jnp.int32)
    return Transformer(config).init(key, tokens, tokens, tokens)["params"]


def init(config: T5Config, key: Key[Array, ""]) -> PyTree:
    """Random float32 parameters by T5X's initializers: a plain dict, arrays unboxed.

    A pure function of the key: call it under `jax.jit` with `out_shardings` for a model that fits
    no single device.
    """
    return nn.unbox(_boxed_params(config, key))


def abstract_params(config: T5Config) -> PyTree:
    """Shapes and dtypes of `init`'s result, without computing it."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def param_logical_axes(config: T5Config) -> PyTree:
    """The structure of the parameters, with a tuple of T5X's logical axis names for each."""
    boxed = jax.eval_shape(functools.partial(_boxed_params, config), jax.random.key(0))
    return jax.tree.map(
        lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def make_forward(config: T5Config) -> Callable[..., Float[Array, "B T V"]]:
    """The model as a function of parameters and a batch.

    Returns:
      `forward(params, batch, dropout_key=None) -> logits [B, T, V]` in float32, where `batch` is a
      dict of model features, of which the encoder and decoder tokens and, in a packed batch, the
      segment ids are read. Without a key there is no dropout.
    """
    model = Transformer(config)

    def forward(
        params: PyTree,
        batch: Mapping[str, Int[Array, "B _"]],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T V"]:
        logits = model.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        return cast(jax.Array, logits)  # apply returns a pair only if it may change variables

    return forward


def make_factored_forward(config: T5Config) -> Callable[..., fused_objective.FactoredLogits]:
    """As `make_forward`, but the logits are not multiplied out."""
    model = Transformer(config)

    def forward(
        params: PyTree,
        batch: Mapping[str, Array],
        dropout_key: Key[Array, ""] | None = None,
    ) -> fused_objective.FactoredLogits:
        def states(model):
            encoded = model.encode(
                batch["encoder_input_tokens"],
                encoder_segment_ids=batch.get("encoder_segment_ids"),
                deterministic=dropout_key is None,
            )
            return model.decode(
                encoded,
                batch["encoder_input_tokens"],
                batch["decoder_input_tokens"],
                batch["decoder_target_tokens"],
                encoder_segment_ids=batch.get("encoder_segment_ids"),
                decoder_segment_ids=batch.get("decoder_segment_ids"),
                deterministic=dropout_key is None,
            )

        rngs = None if dropout_key is None else {"dropout": dropout_key}
        hidden = nn.apply(states, model)({"params": params}, rngs=rngs)
        if config.scales_logits:
            hidden = hidden.astype(jnp.float32) * config.emb_dim**-0.5
        matrix, vocab_axis = output_matrix(config, params)
        return fused_objective.FactoredLogits(hidden, matrix, vocab_axis)

    return forward


def output_matrix(config: T5Config, params: PyTree) -> tuple[Any, int]:
    """The output matrix among the parameters (or shapes, or shardings), and its vocabulary axis."""
    if config.logits_via_embedding:
        return params["token_embedder"]["embedding"], 0
    return params["decoder"]["logits_dense"]["kernel"], 1
