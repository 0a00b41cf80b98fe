"""Decoder-only language models: Llama, Mistral, Qwen, SmolLM, Gemma, OLMo, by switches.

Parameters have T5X's names, in one stack called `decoder`. Prompt and response share a row; the
loss is on responses alone, so the states that predict their tokens are gathered before the output
matrix. The rest of the project sees such a model as `CausalLM`, which is a `network.Network`.

Axes: B rows, L positions of prompt and response, R of responses, S of prompts, E `emb_dim`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tnt_jax.data.layouts import CAUSAL, SHARED, FeatureLayout
from tnt_jax.models import sharded_embedding, sharding
from tnt_jax.models.causal_lm_config import CausalLMConfig
from tnt_jax.models.causal_lm_layers import Decoder, Sources, num_places
from tnt_jax.models.factored_logits import FactoredLogits, multiply
from tnt_jax.models.layers import Cache
from tnt_jax.models.linen_network import LinenNetwork
from tnt_jax.models.network import LOWER_STATES, DecodingStart
from tnt_jax.runtime.array_types import Array, Float, Int, Key, PyTree


class Memory(NamedTuple):
    """What every decoding step reads and none changes.

    Attributes:
      prompts: Keys and values of the prompts, of each layer, by consecutive parts: what all prompts
        begin with, if they do, in one row for each part of the batch; and what is a prompt's own.
      last: Where each prompt's last token stands.
    """

    prompts: tuple[Cache, ...]
    last: Int[Array, "B"]


class Transformer(nn.Module):
    """The network from token ids to states."""

    config: CausalLMConfig

    def setup(self):
        """Binds the submodules; their names are T5X's."""
        c = self.config
        # No dtype here: rows are cast after the look-up, so their gradients add up in float32.
        self.token_embedder = nn.Embed(
            c.vocab_size,
            c.emb_dim,
            embedding_init=nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("vocab", "embed")
            ),
        )
        self.decoder = Decoder(c)

    def _embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L E"]:
        c = self.config
        table: Any = self.token_embedder.embedding
        rows = sharded_embedding.look_up(table, tokens, jnp.dtype(c.dtype))
        rows = rows * jnp.asarray(c.emb_dim**0.5, rows.dtype) if c.scales_embedding else rows
        return sharding.constrain(rows, "batch", "length", "width")

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        sources: Sources,
        *,
        entering: Float[Array, "B L E"] | None = None,
        **kwargs: Any,
    ) -> Float[Array, "B L E"]:
        """Normalised states at all positions.

        Args:
          tokens: Token ids. Read unless there are states that enter a later layer.
          sources: The example and the position that each token belongs to.
          entering: States that enter the layer `first`.
          **kwargs: Further arguments of `Decoder.__call__`.
        """
        x = self._embed(tokens) if entering is None else entering
        x = self.decoder(x, sources, **kwargs)
        if self.is_initializing() and not self.config.logits_via_embedding:
            self.decoder.logits_dense(x)  # so that it has parameters
        return x

    def prefill(
        self,
        tokens: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        beginning: Cache | None = None,
    ) -> Cache:
        """Keys and values of prompts at the left of their rows, after what all begin with."""
        num_before = 0 if beginning is None else num_places(beginning)
        places = jnp.broadcast_to(num_before + jnp.arange(tokens.shape[1])[None], tokens.shape)
        is_token = (places < lengths[:, None]).astype(jnp.int32)
        return self.decoder.prefill(self._embed(tokens), Sources(is_token, places), beginning)

    def step(
        self, tokens: Int[Array, "N"], step: Int[Array, ""], cache: Cache, memory: Memory
    ) -> tuple[Float[Array, "N 1 E"], Cache]:
        """States of one position of every row."""
        return self.decoder.step(
            self._embed(tokens[:, None]),
            step=step,
            last=memory.last,
            prompts=memory.prompts,
            cache=cache,
        )


@dataclasses.dataclass(frozen=True)
class CausalLM(LinenNetwork):
    """A decoder-only language model as `network.Network` describes it.

    Attributes:
      config: The settings of the network.
    """

    config: CausalLMConfig
    stacks: ClassVar = {"decoder": "num_layers"}

    @property
    def feature_layout(self) -> FeatureLayout:
        """Prompt and response in one row."""
        return CAUSAL

    def boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters in Flax's boxes: all matrices with standard deviation 0.02."""
        ones = jnp.ones((1, 1), jnp.int32)  # no shape depends on the batch
        sources = Sources(ones, ones)
        return Transformer(self.config).init(key, ones, sources, deterministic=True)["params"]

    def forward(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        dropout_key: Key[Array, ""] | None = None,
        trained_layers: int | None = None,
    ) -> FactoredLogits:
        """Teacher-forced logits of the responses' tokens, not multiplied out."""
        first = self.first_trained(trained_layers)
        states = self._states(
            params,
            batch,
            entering=batch[LOWER_STATES] if first else None,
            first=first,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        places = batch["decoder_target_places"][:, :, None]
        hidden = jnp.take_along_axis(states, places, axis=1)
        hidden = sharding.constrain(hidden, "batch", "length", "width")
        return FactoredLogits(hidden, *self.output_matrix(params), self.final_softcap)

    def _states(
        self, params: PyTree, batch: Mapping[str, Array], **kwargs: Any
    ) -> Float[Array, "B L E"]:
        sources = Sources(batch["decoder_segment_ids"], batch["decoder_positions"])
        tokens, num_shared = batch["decoder_input_tokens"], 0
        # With dropout no two rows begin alike.
        if SHARED in batch and (kwargs["deterministic"] or not self.config.dropout_rate):
            num_shared = batch[SHARED].shape[1]
        found = Transformer(self.config).apply(
            {"params": params}, tokens, sources, num_shared=num_shared, **kwargs
        )
        return cast(jax.Array, found)  # apply returns a pair only if it may change variables

    def lower_features(self, trained_layers: int) -> dict[str, str]:
        """States at all positions, unless every layer is trained."""
        return {LOWER_STATES: "decoder_input_tokens"} if self.first_trained(trained_layers) else {}

    def lower_states(
        self, params: PyTree, batch: Mapping[str, Array], trained_layers: int
    ) -> dict[str, Float[Array, "B L E"]]:
        """What enters the first of the last layers."""
        stop = self.first_trained(trained_layers)
        if not stop:
            return {}
        return {LOWER_STATES: self._states(params, batch, deterministic=True, stop=stop)}

    @property
    def hidden_dtype(self) -> Any:
        """The compute dtype."""
        return self.config.dtype

    @property
    def final_softcap(self) -> float | None:
        """The bound of the logits in Gemma 2; None is no bound."""
        return self.config.final_softcap

    def start_decoding(
        self,
        params: PyTree,
        input_tokens: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        *,
        num_beams: int,
        max_length: int,
        num_shared: int = 0,
    ) -> DecodingStart:
        """Reads the prompts; the first step begins with the last token of each.

        A prompt's keys and values are kept once, for all of its beams. Those of what all prompts
        begin with are kept once for each part of the batch, by the devices that have it.
        """
        c = self.config
        prefill = functools.partial(Transformer(c).apply, {"params": params}, method="prefill")
        beginning = None
        if num_shared:
            shape = sharding.num_parts("batch"), num_shared
            tokens = jnp.broadcast_to(input_tokens[:1, :num_shared], shape)
            beginning = cast(Cache, prefill(tokens, jnp.full(len(tokens), num_shared)))
        own = cast(Cache, prefill(input_tokens[:, num_shared:], lengths, beginning))
        last = jnp.maximum(lengths - 1, 0)
        tokens = jnp.take_along_axis(input_tokens, last[:, None], axis=1)[:, 0]
        num_rows = len(input_tokens) * num_beams
        zeros = jnp.zeros((num_rows, c.num_kv_heads, max_length, c.head_dim), c.dtype)
        cache = tuple((zeros, zeros) for _ in range(c.num_layers))
        memory = Memory((own,) if beginning is None else (beginning, own), last)
        return DecodingStart(jnp.repeat(tokens, num_beams), cache, memory)

    def decode_step(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N V"], Cache]:
        """Logits of the next token of each row."""
        states, cache = self.decode_states(params, tokens, position, cache, memory)
        return multiply(states, *self.output_matrix(params), self.final_softcap), cache

    def decode_states(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: Cache,
        memory: Memory,
    ) -> tuple[Float[Array, "N E"], Cache]:
        """The state of one position of every row."""
        stepped = Transformer(self.config).apply(
            {"params": params}, tokens, position, cache, memory, method="step"
        )
        hidden, cache = cast(tuple[jax.Array, Cache], stepped)
        return hidden[:, 0], cache
