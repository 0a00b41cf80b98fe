"""The layers of a decoder-only language model, and the stack of them.

Axes: B rows, L positions, Q positions that ask, K positions that are seen, H heads of keys and
values, G query heads that share one, D width of a head, P pairs in it, E width of the stream, W any
width, S prompts' positions, N rows of decoding, J positions of a joined row (`Rows`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tnt_jax.models import attention as whole_rows
from tnt_jax.models import layers, sharding
from tnt_jax.models.causal_lm_config import CausalLMConfig
from tnt_jax.models.factored_logits import cap
from tnt_jax.models.layers import Cache, KeysValues
from tnt_jax.runtime.array_types import Array, Bool, Float, Int
from tnt_jax.runtime.errors import UsageError

# Finite, so that a query with nothing to attend to (filler) stays finite as well.
_MASKED_LOGIT = -1e10
_FURTHEST = 2**30  # a window that no position is beyond


class Seen(NamedTuple):
    """Keys and values, and which of them each query sees."""

    keys_values: KeysValues
    mask: Bool[Array, "B 1 1 Q K"]


class Sources(NamedTuple):
    """Where the layers' positions and masks come from; the same for all layers.

    Attributes:
      segment_ids: The example of each position, from 1; 0 is filler.
      positions: Counted from 0 in each example.
    """

    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]


class Rows(NamedTuple):
    """How rows that begin alike are computed: their common beginning once, not in each of them.

    Each part of a batch becomes one joined row: the beginning, then the rest of each of its rows.
    All but attention is computed position by position, on joined rows; attention sees whole ones.

    Attributes:
      num_rows: Rows of the batch.
      num_shared: Positions of the common beginning; 0 leaves all rows as they are.
    """

    num_rows: int = 0
    num_shared: int = 0

    @classmethod
    def of(cls, num_rows: int, num_shared: int) -> "Rows":
        """Rows are joined where a part of the batch has several of them."""
        return cls(num_rows, num_shared if num_rows > sharding.num_parts("batch") else 0)

    def joined(self, x: Float[Array, "B L W"], width: str = "width") -> Float[Array, "_ J W"]:
        """Joins whole rows; the beginning is that of the first row of each part.

        `width` is the logical axis of the last dimension (`sharding.constrain`).
        """
        if not self.num_shared:
            return x
        parts = x.reshape(sharding.num_parts("batch"), -1, *x.shape[1:])
        rest = parts[:, :, self.num_shared :].reshape(len(parts), -1, x.shape[-1])
        joined = jnp.concatenate([parts[:, 0, : self.num_shared], rest], axis=1)
        return sharding.constrain(joined, "batch", "length", width)

    def whole(self, x: Float[Array, "_ J W"]) -> Float[Array, "B L W"]:
        """Undoes `joined`."""
        if not self.num_shared:
            return x
        # Gradients of the beginning are summed over rows: in float32, as all sums over a batch are.
        beginning = x[:, : self.num_shared].astype(jnp.float32)
        repeated = jnp.repeat(beginning, self.num_rows // len(x), axis=0).astype(x.dtype)
        rest = x[:, self.num_shared :].reshape(self.num_rows, -1, x.shape[-1])
        return jnp.concatenate([repeated, rest], axis=1)


_WHOLE = Rows()  # joins nothing


def rotate(
    x: Float[Array, "B _ L D"], positions: Int[Array, "B L"], speeds: Float[Array, "P"]
) -> Float[Array, "B _ L D"]:
    """Turns the pairs (i, i + D/2) of each head by position times speed; in float32."""
    angles = jnp.einsum("bl,d->bld", positions.astype(jnp.float32), speeds)[:, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return turned.astype(x.dtype)


def _norm(config: CausalLMConfig, axis: str = "norm") -> layers.OffsetNorm:
    return layers.OffsetNorm(config, config.norm_scale_offset, axis)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: CausalLMConfig

    def setup(self):
        """Binds the submodules; their names are T5X's, and transformers' in `*_norm`."""
        c = self.config
        dense = functools.partial(layers.dense, kernel_init=nn.initializers.normal(0.02))
        has_bias = c.attention_bias != "none"
        axes = ("embed", "joined_kv")
        self.query = dense(c, c.num_heads * c.head_dim, axes, use_bias=has_bias)
        self.key = dense(c, c.num_kv_heads * c.head_dim, axes, use_bias=has_bias)
        self.value = dense(c, c.num_kv_heads * c.head_dim, axes, use_bias=has_bias)
        self.out = dense(c, c.emb_dim, ("joined_kv", "embed"), use_bias=c.attention_bias == "all")
        if c.query_key_norm != "none":
            self.query_norm = _norm(c, "head_dim")
            self.key_norm = _norm(c, "head_dim")

    def _heads(self, x: Float[Array, "B L J"], norm: Any) -> Float[Array, "B _ L D"]:
        """Splits into heads, normalised before or after."""
        if norm is not None and self.config.query_key_norm == "all_heads":
            x = norm(x)
        x = x.reshape(*x.shape[:2], -1, self.config.head_dim).swapaxes(1, 2)
        if norm is not None and self.config.query_key_norm == "head":
            x = norm(x)
        return sharding.constrain(x, "batch", "heads", "length", "width")

    def queries(
        self,
        x: Float[Array, "_ _ E"],
        positions: Int[Array, "B Q"],
        speeds: Float[Array, "P"],
        rows: Rows = _WHOLE,
    ) -> Float[Array, "B H G Q D"]:
        """Rotated queries, by the head of keys that they ask; `x` is joined if `rows` says so."""
        c = self.config
        norm = None if c.query_key_norm == "none" else self.query_norm
        rotated = rotate(self._heads(rows.whole(self.query(x)), norm), positions, speeds)
        return rotated.reshape(len(rotated), c.num_kv_heads, -1, *rotated.shape[2:])

    def keys_values(
        self,
        x: Float[Array, "_ _ E"],
        positions: Int[Array, "B K"],
        speeds: Float[Array, "P"],
        rows: Rows = _WHOLE,
    ) -> KeysValues:
        """Rotated keys, and values, `[B, H, K, D]` both; `x` is joined if `rows` says so."""
        _check_heads(self.config)
        norm = None if self.config.query_key_norm == "none" else self.key_norm
        keys = rotate(self._heads(rows.whole(self.key(x)), norm), positions, speeds)
        return keys, self._heads(rows.whole(self.value(x)), None)

    def __call__(
        self, queries: Float[Array, "B H G Q D"], seen: Sequence[Seen], rows: Rows = _WHOLE
    ) -> Float[Array, "_ _ E"]:
        """Attends to all that is seen, with one softmax; logits and weights are of float32.

        Where there are more rows of queries than of keys or masks (beams, prompts that begin
        alike), those of one row are next to each other, and share it.
        """
        c = self.config
        logits = []
        for (keys, _), mask in seen:
            asked = jnp.einsum(
                "bhrd,bhkd->bhrk",
                _by_keys(queries, len(keys)),
                keys,
                preferred_element_type=jnp.float32,
            )
            capped = cap(asked * c.logit_scale, c.attention_softcap)
            of_rows = jnp.repeat(mask, len(queries) // len(mask), axis=0)
            logits.append(jnp.where(of_rows, _by_rows(capped, queries.shape), _MASKED_LOGIT))
        weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1)).astype(c.dtype)
        ends = np.cumsum([part.shape[-1] for part in logits])[:-1]
        mixed: Any = 0
        for ((_, values), _), part in zip(seen, jnp.split(weights, ends, axis=-1), strict=True):
            of_keys = jnp.einsum("bhrk,bhkd->bhrd", _by_keys(part, len(values)), values)
            mixed += _by_rows(of_keys, queries.shape)
        return self._out(mixed, rows)

    def by_kernel(
        self,
        queries: Float[Array, "B H G L D"],
        keys_values: KeysValues,
        segment_ids: Int[Array, "B L"],
        kind: Int[Array, ""],
        rows: Rows,
    ) -> Float[Array, "_ _ E"]:
        """The same where queries and keys are those of whole rows, by the kernel of the config."""
        c = self.config
        mixed = whole_rows.by_kernel(
            c.attention,
            queries,
            keys_values,
            segment_ids,
            windows=[kind.window for kind in c.layer_kinds],
            kind=kind,
            scale=c.logit_scale,
            softcap=c.attention_softcap,
        )
        return self._out(mixed, rows)

    def _out(self, mixed: Float[Array, "B H G Q D"], rows: Rows) -> Float[Array, "_ _ E"]:
        """The output of all heads, one after the other at each position."""
        mixed = mixed.reshape(len(mixed), self.config.num_heads, *mixed.shape[3:])
        mixed = sharding.constrain(mixed, "batch", "heads", "length", "width")
        mixed = mixed.swapaxes(1, 2).reshape(len(mixed), mixed.shape[2], -1)
        return self.out(rows.joined(mixed, "joined_kv"))


def num_places(cache: Cache) -> int:
    """Positions that keys and values are of."""
    return cache[0][0].shape[2]


def _by_keys(x: Float[Array, "N H G Q W"], num_rows: int) -> Float[Array, "B H R W"]:
    """Joins the axes of all queries that ask the same keys, which have `num_rows` rows.

    So a product has two batch axes and one of rows. With more axes of rows, XLA on a CPU exchanges
    the operands, and a step of decoding takes 1.3 times as long.
    """
    x = x.reshape(num_rows, -1, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _by_rows(x: Float[Array, "B H R W"], shape: Sequence[int]) -> Float[Array, "N H G Q W"]:
    """Undoes `_by_keys`, for queries of a shape `[N, H, G, Q, _]`."""
    num_rows, num_heads, *of_head, _ = shape
    apart = x.reshape(len(x), num_heads, num_rows // len(x), *of_head, x.shape[-1])
    return apart.swapaxes(1, 2).reshape(num_rows, num_heads, *of_head, x.shape[-1])


def _check_heads(config: CausalLMConfig) -> None:
    """Raises a UsageError where the heads of keys cannot be shared out."""
    num_devices = sharding.free_axes().get("model", 1)
    if config.num_kv_heads % num_devices:
        raise UsageError(
            f"MODEL_DEVICES: expected a number that divides the network's {config.num_kv_heads} "
            f"heads of keys and values, found {num_devices}. Use FSDP_DEVICES instead."
        )


class _Layer(nn.Module):
    config: CausalLMConfig

    def setup(self):
        c = self.config
        if c.norms != "post":
            self.pre_self_attention_layer_norm = _norm(c)
            self.pre_mlp_layer_norm = _norm(c)
        if c.norms != "pre":
            self.post_self_attention_layer_norm = _norm(c)
            self.post_mlp_layer_norm = _norm(c)
        self.self_attention = Attention(c)
        self.mlp = layers.Mlp(c)
        self.dropout = layers.dropout(c)

    def __call__(
        self,
        x: Float[Array, "B L E"],
        attend: Callable[[Attention, Float[Array, "B L E"]], Float[Array, "B L E"]],
        *,
        deterministic: bool,
    ) -> Float[Array, "B L E"]:
        """One layer, whose attention is `attend(self_attention, normalised stream)`."""
        c = self.config
        y = x if c.norms == "post" else self.pre_self_attention_layer_norm(x)
        y = attend(self.self_attention, y)
        y = y if c.norms == "pre" else self.post_self_attention_layer_norm(y)
        x = x + self.dropout(y, deterministic=deterministic)
        y = x if c.norms == "post" else self.pre_mlp_layer_norm(x)
        y = self.mlp(y, deterministic=deterministic)
        y = y if c.norms == "pre" else self.post_mlp_layer_norm(y)
        return x + self.dropout(y, deterministic=deterministic)


class Decoder(nn.Module):
    """The layers, from embedded tokens to normalised states, and the output matrix."""

    config: CausalLMConfig

    def setup(self):
        """Binds the submodules; their names are T5X's."""
        c = self.config
        self.layers = layers.make_layers(c, _Layer, c.num_layers)
        self.decoder_norm = _norm(c)
        self.dropout = layers.dropout(c)
        kinds = c.layer_kinds
        self.speeds = np.stack([kind.inverse_frequencies(c.head_dim) for kind in kinds])
        self.windows = np.array([kind.window or _FURTHEST for kind in kinds], np.int32)
        if not c.logits_via_embedding:
            # Float32 whatever the compute dtype: the loss is worst off in bfloat16.
            self.logits_dense = layers.dense(
                c,
                c.vocab_size,
                ("embed", "vocab"),
                nn.initializers.normal(0.02),
                dtype=jnp.float32,
            )

    def __call__(
        self,
        x: Float[Array, "B L E"],
        sources: Sources,
        *,
        deterministic: bool,
        first: int = 0,
        stop: int | None = None,
        num_shared: int = 0,
    ) -> Float[Array, "B L E"]:
        """All positions at once: all layers, the norm, and dropout before them.

        With `first`, `x` is what enters that layer; with `stop`, the result is what enters that.
        The first `num_shared` positions, which are the same in all rows, are computed once for all;
        with dropout there are none.
        """
        c, rows = self.config, Rows.of(len(x), num_shared)

        def call(layer: _Layer, x: Float[Array, "B L E"], kind: Int[Array, ""]) -> Array:
            speeds, window = jnp.asarray(self.speeds)[kind], jnp.asarray(self.windows)[kind]

            def attend(attention: Attention, y: Float[Array, "B L E"]) -> Array:
                keys_values = attention.keys_values(y, sources.positions, speeds, rows)
                queries = attention.queries(y, sources.positions, speeds, rows)
                if c.attention != "xla":
                    segment_ids = sources.segment_ids
                    return attention.by_kernel(queries, keys_values, segment_ids, kind, rows)
                mask = whole_rows.mask(*sources, window)
                return attention(queries, [Seen(keys_values, mask)], rows)

            return layer(x, attend, deterministic=deterministic)

        if first == 0:
            x = self.dropout(x, deterministic=deterministic)
        kinds = jnp.asarray(c.kind_of_layers)[first:stop]
        chosen = layers.chosen(self.layers, first, stop)
        x = layers.run_layers(chosen, c.num_layers, c, rows.joined(x), call, (kinds,))
        return rows.whole(self.decoder_norm(x) if stop is None else x)

    def prefill(
        self, x: Float[Array, "B S E"], sources: Sources, beginning: Cache | None = None
    ) -> Cache:
        """Keys and values of each layer for prompts, in one row each; layers are apart.

        Args:
          x: Embedded tokens.
          sources: Their examples and positions.
          beginning: Keys and values of what all prompts begin with, before `x`.
        """
        c = self.config
        found = []
        for number, (layer, kind) in enumerate(
            zip(self.layers, c.kind_of_layers.tolist(), strict=True)
        ):
            speeds, window = jnp.asarray(self.speeds[kind]), jnp.asarray(self.windows[kind])
            mask = whole_rows.mask(*sources, window)
            seen = []
            if beginning is not None:
                back = sources.positions[:, :, None] - jnp.arange(num_places(beginning))[None, None]
                seen = [Seen(beginning[number], (back < window)[:, None, None])]

            def attend(
                attention: Attention, y: Array, speeds=speeds, mask=mask, seen=seen
            ) -> Array:
                keys_values = attention.keys_values(y, sources.positions, speeds)
                found.append(keys_values)
                queries = attention.queries(y, sources.positions, speeds)
                return attention(queries, [*seen, Seen(keys_values, mask)])

            x = layer(x, attend, deterministic=True)
        return tuple(found)

    def step(
        self,
        x: Float[Array, "N 1 E"],
        *,
        step: Int[Array, ""],
        last: Int[Array, "B"],
        prompts: Sequence[Cache],
        cache: Cache,
    ) -> tuple[Float[Array, "N 1 E"], Cache]:
        """One position of every row; layers are apart.

        Args:
          x: Embedded tokens.
          step: Its number, and its place in the cache.
          last: Where each prompt's last token stands, which is what step 0 reads.
          prompts: Keys and values of the prompts, by consecutive parts; what is before the last
            token is seen.
          cache: Keys and values of the steps before.

        Returns:
          Normalised states, and the cache with this position added.
        """
        positions = jnp.repeat(last, len(x) // len(last))[:, None] + step
        # Of each prompt: how far back its places, and those of the cache, lie.
        sizes = [num_places(part) for part in prompts]
        places = jnp.split(jnp.arange(sum(sizes))[None], np.cumsum(sizes)[:-1], axis=1)
        back = [(last[:, None] + step) - of_part for of_part in places]
        is_prompt = [of_part < last[:, None] for of_part in places]
        since = step - jnp.arange(num_places(cache))
        kept = []
        for number, (layer, kind) in enumerate(
            zip(self.layers, self.config.kind_of_layers.tolist(), strict=True)
        ):
            speeds, window = jnp.asarray(self.speeds[kind]), int(self.windows[kind])
            of_prompts = [
                Seen(part[number], (is_there & (far < window))[:, None, None, None])
                for part, is_there, far in zip(prompts, is_prompt, back, strict=True)
            ]
            of_cache = ((since >= 0) & (since < window))[None, None, None, None]

            def attend(
                attention: Attention,
                y: Array,
                number=number,
                speeds=speeds,
                of_prompts=of_prompts,
                of_cache=of_cache,
            ) -> Array:
                new = attention.keys_values(y, positions, speeds)
                write = functools.partial(
                    jax.lax.dynamic_update_slice_in_dim, start_index=step, axis=2
                )
                of_steps = (write(cache[number][0], new[0]), write(cache[number][1], new[1]))
                kept.append(of_steps)
                queries = attention.queries(y, positions, speeds)
                return attention(queries, [*of_prompts, Seen(of_steps, of_cache)])

            x = layer(x, attend, deterministic=True)
        return self.decoder_norm(x), tuple(kept)
