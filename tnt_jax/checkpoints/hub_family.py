"""What differs between the families of networks in Hugging Face's format: settings and names."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from tnt_jax.models.network_config import NetworkConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubFamily:
    """A family of networks as transformers stores them.

    Attributes:
      model_types: The `model_type` of each kind.
      config_class: The settings of its networks.
      check: Raises a UsageError, which names no file, for a `config.json` of another kind of model
        that goes by one of these names.
      network_config: Makes the settings of a network from a `config.json`, a place for messages and
        `is_tied`: whether the weights hold no output matrix of their own. Raises a UsageError where
        a setting is missing or is one that the network does not have.
      new_config: Makes a `config.json` for a network that did not come with one. Raises a
        UsageError where transformers has no such network.
      always_said: Gives the settings that a `config.json` has to say of a network, whatever the one
        that it came with left out.
      weight_name: Gives Hugging Face's name of the parameter that we call by a name, for a config.
      is_transposed: Whether that parameter is stored the other way round.
      embeddings: Names of the embedding, of which one is enough; the first is the one we write.
      ignored: Names of what files hold although nothing reads it.
      why_not_float16: What is wrong with weights that were rounded to float16; None if nothing is.
      auto_class: The class of transformers that loads it.
      pipeline_tag: The hub's name of what it does.
      peft_task: PEFT's.
      tag: The hub's tag of a model card.
    """

    model_types: tuple[str, ...]
    config_class: type[NetworkConfig]
    check: Callable[[Mapping[str, Any]], None]
    network_config: Callable[..., Any]
    new_config: Callable[[Any], dict[str, Any]]
    always_said: Callable[[Any], dict[str, Any]]
    weight_name: Callable[[str, Any], str]
    is_transposed: Callable[[str], bool]
    embeddings: tuple[str, ...]
    ignored: tuple[re.Pattern[str], ...]
    why_not_float16: str | None
    auto_class: str
    pipeline_tag: str
    peft_task: str
    tag: str
