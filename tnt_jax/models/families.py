"""The families of networks: one line for each."""

from collections.abc import Callable
from typing import Any

from tnt_jax.models import causal_lm, t5
from tnt_jax.models.causal_lm_config import CausalLMConfig
from tnt_jax.models.network import Network
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.models.t5_config import T5Config

_FAMILIES: dict[type[NetworkConfig], Callable[[Any], Network]] = {
    T5Config: t5.T5,
    CausalLMConfig: causal_lm.CausalLM,
}


def network_of(config: NetworkConfig) -> Network:
    """The network with these settings; it holds no arrays, so making one costs nothing."""
    return _FAMILIES[type(config)](config)
