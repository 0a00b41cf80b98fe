"""Decoder states after each of several next tokens, at every position of given outputs.

A forward pass over every continued prefix would read each prefix again. Here an output is gone
through once with the key-value cache of decoding; at a position, a step that is taken back computes
the state after each candidate.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tnt_jax.models import families, parameters, sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import Array, Float, Int, PyTree


def next_states(
    params: PyTree,
    input_tokens: Int[Array, "B S"],
    input_lengths: Int[Array, "B"],
    targets: Int[Array, "B T"],
    candidates: Int[Array, "B T K"],
    *,
    config: NetworkConfig,
) -> Float[Array, "B T K E"]:
    """Computes the state after the targets before a position and one more token.

    The state `[b, t, k]` has read `targets[b, :t]` and `candidates[b, t, k]`: it is the state of
    `Network.forward` at position t + 1 of that text, to rounding. It takes T steps of decoding with
    K + 1 tokens each, and one more copy of the cache.

    Args:
      params: The parameters of the network of `config`, layers stacked or apart.
      input_tokens: Ids of each input, filled up on the right.
      input_lengths: Number of ids of each input.
      targets: Ids of each output, filled up on the right: states there mean nothing.
      candidates: Ids that may come at each position.
      config: The settings of the network.
    """
    params, config = parameters.for_decoding(params, config)
    network = families.network_of(config)
    num_positions = targets.shape[1]
    start = network.start_decoding(
        params, input_tokens, input_lengths, num_beams=1, max_length=num_positions + 1
    )

    def state_after(tokens, position, cache):
        return network.decode_states(params, tokens, position, cache, start.memory)

    def step(carry, of_position):
        last, cache = carry
        position, target, of_row = of_position
        _, cache = state_after(last, position, cache)
        states = jax.lax.map(lambda ids: state_after(ids, position + 1, cache)[0], of_row)
        return (target, cache), states

    # Scanned are positions, then candidates.
    by_position = jnp.arange(num_positions), targets.T, jnp.transpose(candidates, (1, 2, 0))
    _, states = jax.lax.scan(step, (start.tokens, start.cache), by_position)
    return jnp.transpose(states, (2, 0, 1, 3))


@sharding.keep_compiled
def jit_next_states(model: Model) -> Callable[..., Any]:
    """Compiles `next_states` of a model, without its config; every device gets the whole result."""
    return jax.jit(
        sharding.traced_on(model.mesh, next_states, config=model.config),
        out_shardings=sharding.replicated(model.mesh),
    )
