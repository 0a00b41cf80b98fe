"""Models in Hugging Face's format: `config.json`, safetensors files and a tokenizer's files.

Settings and weights agree with transformers; neither it nor torch is needed. What differs between
the families is in a module for each: `huggingface_t5`, `huggingface_causal_lm`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from tnt_jax.checkpoints import (
    huggingface_causal_lm,
    huggingface_t5,
    lazy_arrays,
    safetensors_files,
)
from tnt_jax.checkpoints.hub_family import HubFamily
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models import families, parameters
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import hub_files

CONFIG = "config.json"
# Everything else that belongs to a model; a file that is not there is not missed.
TOKENIZER_FILES = ("spiece.model", "vocab.json", "merges.txt", *hub_files.FILES)
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
OTHER_FILES = (hub_files.GENERATION, *TOKENIZER_FILES, *_LICENCES)

_FAMILIES = (huggingface_t5.FAMILY, huggingface_causal_lm.FAMILY)
_FAMILY_OF = {model_type: family for family in _FAMILIES for model_type in family.model_types}
_HEAD = "lm_head.weight"


def family_of_network(config: NetworkConfig) -> HubFamily:
    """The family of a network."""
    return next(family for family in _FAMILIES if isinstance(config, family.config_class))


# ---------------------------------------------------------------------------------- The settings


def read_config(folder: epath.Path) -> dict[str, Any]:
    """`config.json` of a directory.

    Raises:
      UsageError: It is not JSON, or not of a network that is known.
    """
    path = folder / CONFIG
    config = files.read_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILY_OF:
        kind = f"model_type {model_type!r:.60}"
        architectures = config.get("architectures")
        if isinstance(architectures, list):
            kind += f" ({', '.join(map(str, architectures)):.60})"
        t5_types, other_types = (", ".join(family.model_types) for family in _FAMILIES)
        raise UsageError(
            f"{path}: expected an encoder-decoder of the T5 family (model_type {t5_types}) or a "
            f"decoder-only language model ({other_types}), found {kind}. tnt_jax trains no other "
            "architecture."
        )
    try:
        _FAMILY_OF[model_type].check(config)
    except UsageError as error:
        raise UsageError(f"{path}: {error}. tnt_jax trains no other architecture.") from None
    return config


def network_config(config: Mapping[str, Any], where: str, *, is_tied: bool) -> NetworkConfig:
    """The network of a `config.json`.

    Args:
      config: From `read_config`.
      where: The file, for messages.
      is_tied: Whether the weights hold no output matrix of their own.

    Raises:
      UsageError: A setting is missing, or is one that this network does not have.
    """
    return _FAMILY_OF[config["model_type"]].network_config(config, where, is_tied=is_tied)


def new_config(config: NetworkConfig) -> dict[str, Any]:
    """A `config.json` for a network that did not come with one.

    Raises:
      UsageError: transformers has no such network.
    """
    return family_of_network(config).new_config(config)


# --------------------------------------------------------------------------------- Reading


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A directory of Hugging Face's.

    Attributes:
      config: The settings of the network.
      weights: By T5X's names; those of another network than `config` have their own names.
    """

    config: NetworkConfig
    weights: dict[str, LazyArray]


def read(folder: epath.Path) -> Model:
    """The settings and the weights of a directory; no weight is read yet.

    Raises:
      UsageError: Something is missing, cut short, or of a kind that is not read.
    """
    settings = read_config(folder)
    auto_class = _FAMILY_OF[settings["model_type"]].auto_class
    stored = safetensors_files.read_directory(folder, auto_class)
    return of_tensors(stored, settings, str(folder), str(folder / CONFIG))


def of_tensors(
    stored: Mapping[str, LazyArray], settings: Mapping[str, Any], where: str, config_file: str
) -> Model:
    """The model of tensors that are named and laid out as Hugging Face has them.

    Args:
      stored: The tensors, by Hugging Face's names.
      settings: The settings of a `config.json`.
      where: The path of the tensors, for messages.
      config_file: The path of the settings, for messages.

    Raises:
      UsageError: They do not belong together.
    """
    family = _FAMILY_OF[settings["model_type"]]
    stored = dict(stored)
    _check_types(stored, family, where)
    for name in (*family.embeddings, _HEAD):
        if name in stored and len(stored[name].shape) != 2:
            raise UsageError(
                f"{where}: expected {stored[name].source} to be a matrix, found the shape "
                f"{stored[name].shape}: it is damaged, or of another architecture than its "
                f"{CONFIG} says."
            )
    embedding = _embedding(stored, family, where)
    head = stored.get(_HEAD)
    # As transformers: weights that say the same twice are tied, unless the settings deny it.
    is_tied = head is None or (
        settings.get("tie_word_embeddings") is not False
        and safetensors_files.are_equal(head, embedding)
    )
    config = network_config(settings, config_file, is_tied=is_tied)
    check_depth(config, len(stored), config_file)
    for alias in (*family.embeddings, *([_HEAD] if is_tied else [])):
        stored.pop(alias, None)
    stored[family.embeddings[0]] = embedding
    weights = {}
    for name in parameter_names(config):
        array = stored.pop(family.weight_name(name, config), None)
        if array is not None:
            weights[name] = array.transposed() if family.is_transposed(name) else array
    unexpected = {
        name: array
        for name, array in stored.items()
        if not any(pattern.fullmatch(name) for pattern in family.ignored)
    }
    return Model(config, weights | unexpected)


def _check_types(stored: Mapping[str, LazyArray], family: HubFamily, where: str) -> None:
    found = next((name for name, a in stored.items() if a.dtype == np.float16), None)
    if found is not None and family.why_not_float16 is not None:
        raise UsageError(
            f"{where}: expected numbers of type F32 or BF16, found F16 ({found}). "
            f"{family.why_not_float16}: take the float32 or bfloat16 files of this model. If there "
            "are none, transformers saves it as float32: from_pretrained(..., dtype=torch.float32)"
            ".save_pretrained(...)."
        )


def check_depth(config: NetworkConfig, num_arrays: int, where: str) -> None:
    """Raises a UsageError for more layers than arrays: a number that is wrong, or meant to harm.

    Everything that follows takes time for each layer.
    """
    if config.total_layers > num_arrays:
        raise UsageError(
            f"{where}: expected the settings of the weights beside it, which are {num_arrays} "
            f"arrays; found {config.total_layers} layers."
        )


def parameter_names(config: NetworkConfig) -> list[str]:
    """T5X's names of a network's parameters, layers apart, in the order of the tree."""
    shapes = families.network_of(config).abstract_params()
    return list(lazy_arrays.shapes(parameters.unstack_layers(shapes)))


def _embedding(stored: Mapping[str, LazyArray], family: HubFamily, where: str) -> LazyArray:
    copies = [stored[name] for name in family.embeddings if name in stored]
    if not copies and _HEAD in stored:
        copies = [stored[_HEAD]]  # tied weights may be stored by any of their names
    if not copies:
        raise UsageError(
            f"{where}: expected the embedding as {family.embeddings[0]}, found no such tensor "
            f"among the {len(stored)} there ({', '.join(sorted(stored)[:4])} ...)."
        )
    for copy in copies[1:]:
        if not safetensors_files.are_equal(copies[0], copy):
            raise UsageError(
                f"{where}: expected one embedding, found {copy.source} other than "
                f"{copies[0].source}. Such a model has one."
            )
    return copies[0]


# --------------------------------------------------------------------------------- Writing


def weight_name(name: str, config: NetworkConfig) -> str:
    """Hugging Face's name of the parameter that T5X calls `name`."""
    return family_of_network(config).weight_name(name, config)


def to_stored(weights: Mapping[str, LazyArray], config: NetworkConfig) -> dict[str, LazyArray]:
    """Weights of a network under Hugging Face's names, as Hugging Face lays them out."""
    family = family_of_network(config)
    return {
        family.weight_name(name, config): array.transposed()
        if family.is_transposed(name)
        else array
        for name, array in weights.items()
    }


def write_weights(
    folder: epath.Path,
    weights: Mapping[str, LazyArray],
    config: NetworkConfig,
    *,
    progress: Callable[[Sequence[Any]], Iterator[Any]] = iter,
    **settings: int,
) -> None:
    """Writes weights as safetensors, with an index where they take more than one file.

    Args:
      folder: An existing local directory.
      weights: The arrays to write, by T5X's names.
      config: The settings of the network.
      progress: Wraps the sequence of files.
      **settings: Further settings of `safetensors_files.write_directory`: `max_shard_bytes`.
    """
    safetensors_files.write_directory(
        folder, to_stored(weights, config), progress=progress, **settings
    )
