"""T5 and its family in Flax Linen, with T5X's parameter names and logical axes.

T5 1.0 and 1.1, LM-adapted and Flan-T5, mT5, ByT5 and umT5 differ in settings of `T5Config` alone.

Parameter names and shapes, initializers, masks and the places of dropout agree with
google-research/t5x (`t5x/examples/t5/network.py`, `layers.py`), so a T5X checkpoint loads by name.
Two seams are our own:

* Keys and values are computed apart from attention. Training and step-by-step decoding run the
  same layers; a decoding step only takes most of its keys and values from a cache.
* The output matrix is apart from the decoder (`Transformer.decode`, then `Transformer.logits`), so
  a loss can work from the hidden states without ever holding `[B, T, V]`
  (`make_factored_forward`).

With `T5Config.scan_layers` the same parameters are stacked, layer upon layer (`stack_layers`).

Token id 0 is padding and the first decoder input; every mask follows from `tokens > 0`. The
relative position bias needs only differences of positions within one row, which packing keeps, so
the `*_positions` features of a packed batch are not read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tnt_jax.models import sharded_embedding, sharding
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.t5_config import T5Config
from tnt_jax.models.t5_layers import Cache, Decoder, Encoder
from tnt_jax.runtime.array_types import Array, Bool, Float, Int, Key, PyTree
from tnt_jax.runtime.errors import UsageError

_EMBEDDING_AXES = ("vocab", "embed")


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
        return self.decoder(
            self._embed(decoder_input_tokens),
            encoded,
            self_mask=self_mask,
            cross_mask=cross_mask,
            deterministic=deterministic,
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

    def start_decoding(self, encoder_input_tokens: Int[Array, "B S"]) -> Memory:
        """Computes, once, what every `decode_step` reads: cross-attention keys and values.

        Decoding is for layers that are apart: a step that scanned them would cut every weight out
        of its stack again. See `decoding.decode`.
        """
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
        hidden, cache = self.decoder.step(
            self._embed(tokens[:, None]),
            memory.keys_values,
            position=position,
            cross_mask=memory.mask,
            cache=cache,
        )
        return self.logits(hidden)[:, 0], cache


def empty_cache(config: T5Config, num_rows: int, max_length: int) -> Cache:
    """A cache for `Transformer.decode_step`: zeros, `[num_rows, H, max_length, D]` per layer."""
    zeros = jnp.zeros((num_rows, config.num_heads, max_length, config.head_dim), config.dtype)
    return tuple((zeros, zeros) for _ in range(config.num_decoder_layers))


# ------------------------------------------------------------------------------------ Parameters

_LAYER = re.compile(r"layers_(\d+)")
_STACKED = "layers"


def stack_layers(params: PyTree) -> PyTree:
    """Parameters as a network with `scan_layers` has them, from those of one without.

    `encoder/layers_0/...`, `encoder/layers_1/...` become `encoder/layers/...` with a first axis of
    layers, and so in the decoder. Parameters that are stacked already stay as they are.

    Args:
      params: Arrays, or shapes and dtypes (`jax.ShapeDtypeStruct`).
    """

    def stack(*layers: Any) -> Any:
        first = layers[0]
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(layers), *first.shape), first.dtype)
        return jnp.stack(layers)

    def of_stack(tree: PyTree) -> PyTree:
        layers = {int(match[1]): key for key in tree if (match := _LAYER.fullmatch(key))}
        stacked = {key: value for key, value in tree.items() if key not in layers.values()}
        if layers:
            in_order = [tree[layers[i]] for i in sorted(layers)]
            stacked[_STACKED] = jax.tree.map(stack, *in_order)
        return stacked

    return _of_stacks(of_stack, params)


def unstack_layers(params: PyTree) -> PyTree:
    """The reverse of `stack_layers`: every layer under a name of its own."""

    def layer_of(leaf: Any, i: int) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        return leaf[i]

    def of_stack(tree: PyTree) -> PyTree:
        apart = {key: value for key, value in tree.items() if key != _STACKED}
        if _STACKED in tree:
            num_layers = jax.tree.leaves(tree[_STACKED])[0].shape[0]
            for i in range(num_layers):
                layer = functools.partial(layer_of, i=i)
                apart[f"layers_{i}"] = jax.tree.map(layer, tree[_STACKED])
        return apart

    return _of_stacks(of_stack, params)


def _of_stacks(change: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    stacks = {stack: change(params[stack]) for stack in ("encoder", "decoder") if stack in params}
    return {**params, **stacks}


def _boxed_params(config: T5Config, key: Key[Array, ""]) -> PyTree:
    # Layers apart, whatever the config: so a model with stacked layers starts from the same random
    # numbers. Parameter shapes do not depend on the batch.
    apart = dataclasses.replace(config, scan_layers=False, remat_policy="none")
    tokens = jnp.ones((1, 1), jnp.int32)
    return Transformer(apart).init(key, tokens, tokens, tokens)["params"]


def init(config: T5Config, key: Key[Array, ""]) -> PyTree:
    """Random float32 parameters by T5X's initializers: a plain dict, arrays unboxed.

    A pure function of the key: call it under `jax.jit` with `out_shardings` for a model that fits
    no single device. The numbers are the same with and without `scan_layers`.
    """
    params = nn.unbox(_boxed_params(config, key))
    return stack_layers(params) if config.scan_layers else params


@functools.lru_cache(maxsize=16)
def _traced_shapes(config: T5Config) -> PyTree:
    """Once for each network: it traces a forward pass, and every stage of a run asks for it."""
    return jax.eval_shape(functools.partial(_boxed_params, config), jax.random.key(0))


def _boxed_shapes(config: T5Config) -> PyTree:
    """Shapes of the parameters, with their axes; layers apart.

    All layers of a stack have the same, so one of each stack is traced: a trace takes a third of a
    second for every layer in it, and a file may say that there are many.
    """
    shapes = _traced_shapes(dataclasses.replace(config, num_encoder_layers=1, num_decoder_layers=1))
    numbers = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}

    def of_stack(stack: str) -> PyTree:
        layer = shapes[stack]["layers_0"]
        return shapes[stack] | {f"layers_{i}": layer for i in range(numbers[stack])}

    return {**shapes, **{stack: of_stack(stack) for stack in numbers}}


def abstract_params(config: T5Config) -> PyTree:
    """Shapes and dtypes of `init`'s result, without computing it."""
    shapes = nn.unbox(_boxed_shapes(config))
    return stack_layers(shapes) if config.scan_layers else shapes


def param_logical_axes(config: T5Config) -> PyTree:
    """The structure of the parameters, with a tuple of T5X's logical axis names for each."""
    axes = jax.tree.map(
        lambda box: box.names,
        _boxed_shapes(config),
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
    if not config.scan_layers:
        return axes

    def of_stack(tree: PyTree) -> PyTree:
        """Every layer has the axes of the first."""
        others = {key: value for key, value in tree.items() if not _LAYER.fullmatch(key)}
        stacked = jax.tree.map(
            lambda names: ("layers", *names),
            tree["layers_0"],
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return {**others, _STACKED: stacked}

    return _of_stacks(of_stack, axes)


def computed_dtypes(config: T5Config) -> PyTree:
    """The dtype in which a forward pass reads each parameter.

    Kernels within layers, and an embedding that is not the output matrix as well, are cast to the
    compute dtype before every use. All else is computed in float32.
    """

    def dtype_of(path: tuple[Any, ...], _: Any) -> Any:
        name = sharding.path_name(path)
        is_cast = "layers" in name and name.endswith("kernel")
        if name == "token_embedder/embedding":
            is_cast = not config.logits_via_embedding
        return config.dtype if is_cast else jnp.dtype("float32")

    return jax.tree.map_with_path(dtype_of, abstract_params(config))


# --------------------------------------------------------------------------------------- Forward


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
        logits = _apply(model, params, batch, dropout_key, "__call__")
        return cast(jax.Array, logits)  # apply returns a pair only if it may change variables

    return forward


def make_factored_forward(config: T5Config) -> Callable[..., FactoredLogits]:
    """As `make_forward`, without the product that ends in logits.

    Returns:
      `forward(params, batch, dropout_key=None) -> FactoredLogits`. `hidden` is of the compute
      dtype, or float32 where the logits are scaled; `matrix` is the parameter itself.
    """
    model = Transformer(config)

    def forward(
        params: PyTree,
        batch: Mapping[str, Int[Array, "B _"]],
        dropout_key: Key[Array, ""] | None = None,
    ) -> FactoredLogits:
        hidden = cast(jax.Array, _apply(model, params, batch, dropout_key, "hidden"))
        if config.scales_logits:
            hidden = hidden.astype(jnp.float32) * config.emb_dim**-0.5
        return FactoredLogits(hidden, *output_matrix(config, params))

    return forward


def output_matrix(config: T5Config, params: PyTree) -> tuple[Any, int]:
    """The output matrix in a tree of parameters, shapes or shardings, and its vocabulary axis."""
    if config.logits_via_embedding:
        return params["token_embedder"]["embedding"], 0
    return params["decoder"]["logits_dense"]["kernel"], 1


def _apply(
    model: Transformer,
    params: PyTree,
    batch: Mapping[str, Array],
    dropout_key: Key[Array, ""] | None,
    method: str,
) -> Any:
    return model.apply(
        {"params": params},
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method=method,
    )
