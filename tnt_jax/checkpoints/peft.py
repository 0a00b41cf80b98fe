"""Low-rank adapters in the format of Hugging Face's `peft`, beside a model of Hugging Face's.

A directory has `adapter_model.safetensors` and `adapter_config.json`. `PeftModel.from_pretrained`
puts each pair of matrices onto the module of the base that its name says. It loads a pair onto
nothing where no module has that name, and servers do so without a word: so every name is compared
with those of the base before one is written. Neither peft nor torch is needed.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from tnt_jax.checkpoints import huggingface, pretrained, safetensors_files, trained_parts
from tnt_jax.checkpoints.hub_family import HubFamily
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."  # PEFT's own modules around the base
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


class Base(NamedTuple):
    """The model that adapters are loaded onto, as transformers finds it.

    Attributes:
      name: A name on the hub or a directory.
      revision: The commit or branch of the model on the hub; None for a directory.
      is_loadable: Whether transformers reads what is there.
    """

    name: str
    revision: str | None
    is_loadable: bool


def trained(source: pretrained.Pretrained) -> trained_parts.Adapters:
    """The adapters of a run.

    Raises:
      UsageError: It trained none, or they are not there.
    """
    if source.adapters is None:
        raise UsageError(
            "--output_format=peft: expected a run that trained adapters (ORIGINAL='adapters_off'), "
            f"found a full model at {source.path} ({source.kind}). Use "
            "--output_format=huggingface."
        )
    if not source.adapters.pairs:
        raise UsageError(
            f"{source.path}: expected the adapters that its notes tell of, found none: it is "
            "damaged. Copy the checkpoint again."
        )
    return source.adapters


def base_of(adapters: trained_parts.Adapters) -> Base:
    """What adapters were trained beside: by its name on the hub where it came from there."""
    original = adapters.original
    if found := safetensors_files.hub_name(original.path):
        return Base(*found, is_loadable=True)
    path = str(original.path)
    is_loadable = (original.path / huggingface.CONFIG).exists() and not files.is_remote(path)
    return Base(path, None, is_loadable)


def to_stored(
    adapters: trained_parts.Adapters,
    base: Mapping[str, LazyArray],
    config: NetworkConfig,
    dtype: np.dtype,
) -> dict[str, LazyArray]:
    """Adapters under PEFT's names, as PEFT lays them out.

    `base_model.model.MODULE.lora_A.weight` is `[rank, inputs]`, and `.lora_B.weight` is
    `[outputs, rank]`: each ours, transposed.

    Args:
      adapters: The adapters that a run has trained.
      base: The parameters of the model that they are loaded onto, by T5X's names, layers apart.
      config: The settings of the network.
      dtype: Dtype of the result.

    Raises:
      UsageError: A module that an adapter is for is none of the base's, or is of another shape; or
        an adapter that the run has trained is lost.
    """
    where = str(adapters.original.path)
    modules = {
        name.removesuffix(".weight"): array.shape
        for name, array in huggingface.to_stored(base, config).items()
    }
    stored: dict[str, LazyArray] = {}
    for kernel, (a, b) in adapters.pairs.items():
        if kernel not in base:
            raise UsageError(
                f"--output_format=peft: expected adapters for modules of {where}, found one for "
                f"{kernel}, which it does not have. Use the original that they were trained beside."
            )
        module = huggingface.weight_name(kernel, config).removesuffix(".weight")
        expected = (b.shape[-1], a.shape[0])
        if modules[module] != expected:
            raise UsageError(
                f"--output_format=peft: expected {module} of {where} to be {expected}, as its "
                f"adapter is, found {modules[module]}. Use the original that they were trained "
                "beside."
            )
        stored[f"{_PREFIX}{module}{_LORA_A}"] = a.transposed().astype(dtype)
        stored[f"{_PREFIX}{module}{_LORA_B}"] = b.transposed().astype(dtype)
    missing = [
        huggingface.weight_name(kernel, config).removesuffix(".weight")
        for kernel in _kernels_of(adapters, base)
        if kernel not in adapters.pairs
    ]
    if missing:
        raise UsageError(
            "--output_format=peft: expected an adapter for every module of the layers that were "
            f"trained, found none for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}. The "
            "run is damaged: copy its checkpoint again."
        )
    return stored


def _kernels_of(adapters: trained_parts.Adapters, base: Mapping[str, LazyArray]) -> list[str]:
    """Names of the kernels that a run has adapters for, if nothing is lost."""
    kernels = [name for name in base if "/layers_" in name and name.endswith("/kernel")]
    if adapters.num_layers is None:
        return kernels
    layer = re.compile(r"decoder/layers_(\d+)/")
    number_of = {name: int(found[1]) for name in kernels if (found := layer.match(name))}
    first = max(number_of.values(), default=0) + 1 - adapters.num_layers
    return [name for name, number in number_of.items() if number >= first]


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def new_config(
    adapters: trained_parts.Adapters, names: Mapping[str, Any], family: HubFamily
) -> dict[str, Any]:
    """An `adapter_config.json`.

    Args:
      adapters: The adapters that a run has trained.
      names: What is in `adapter_model.safetensors`, from `to_stored`.
      family: What Hugging Face calls the base's settings and parameters.
    """
    base = base_of(adapters)
    modules = {
        name.removeprefix(_PREFIX).removesuffix(_LORA_A) for name in names if name.endswith(_LORA_A)
    }
    # PEFT puts an adapter onto every module whose name ends in one of these: where lower layers
    # have none, these are whole names.
    targets = {_last(module) for module in modules} if adapters.num_layers is None else modules
    alpha = float(adapters.alpha)
    return {
        "peft_type": "LORA",
        "task_type": family.peft_task,
        "base_model_name_or_path": base.name,
        "revision": base.revision,  # of the base
        "r": adapters.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,  # PEFT, too, divides it by r
        "target_modules": sorted(targets),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "auto_mapping": None,
    }


def write(folder: epath.Path, stored: Mapping[str, LazyArray], config: Mapping[str, Any]) -> None:
    """Writes both files into a local directory; all adapters are in memory meanwhile.

    Args:
      folder: An existing directory.
      stored: From `to_stored`.
      config: From `new_config`.
    """
    tensors = {name: array.load() for name, array in sorted(stored.items())}
    safetensors_files.save(folder / WEIGHTS, tensors)
    (folder / CONFIG).write_text(files.json_text(config))
