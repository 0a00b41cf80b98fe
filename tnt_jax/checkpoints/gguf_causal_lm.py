"""Decoder-only models in GGUF files: what llama.cpp's converter wrote, back as Hugging Face has it.

The converter of llama.cpp takes a directory of Hugging Face's. It renames the settings and the
tensors, puts the rows of some queries and keys in another order, adds 1 to the norms of Gemma, and
writes the scaling of Llama 3's rotation as a tensor of factors. All of that is undone here, so that
whatever reads such a directory goes on from there. A setting that is not known is refused by name.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tnt_jax.checkpoints import huggingface_causal_lm
from tnt_jax.checkpoints.gguf_files import GgufFile
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models.network_config import MOST_LAYERS
from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How llama.cpp stores an architecture, and what it knows of it without being told.

    Attributes:
      model_type: The `model_type` of `config.json`.
      swaps_rows: Whether rows of queries and keys that are rotated together lie side by side, and
        not half a head apart.
      norm_offset: What was added to the scales of norms; it is taken off again.
      settings: Further settings of `config.json`, which the file does not state.
      ffn_norm: The name of the norm before the MLP.
    """

    model_type: str
    swaps_rows: bool = False
    norm_offset: float = 0.0
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ffn_norm: str = "post_attention_layernorm"


_GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
_ARCHITECTURES = {
    "llama": _Architecture(model_type="llama", swaps_rows=True),
    "qwen2": _Architecture(model_type="qwen2", settings={"use_sliding_window": False}),
    "qwen3": _Architecture(model_type="qwen3", settings={"use_sliding_window": False}),
    "smollm3": _Architecture(
        model_type="smollm3",
        swaps_rows=True,
        settings={"use_sliding_window": False, "no_rope_layer_interval": 4},
    ),
    "gemma": _Architecture(model_type="gemma", norm_offset=1.0, settings=_GELU),
    "gemma2": _Architecture(
        model_type="gemma2",
        norm_offset=1.0,
        settings=_GELU,
        ffn_norm="pre_feedforward_layernorm",
    ),
    "gemma3": _Architecture(
        model_type="gemma3_text",
        norm_offset=1.0,
        settings=_GELU,
        ffn_norm="pre_feedforward_layernorm",
    ),
}

# ---------------------------------------------------------------------------------- The settings

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OTHERS = {
    "context_length": "max_position_embeddings",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    # Networks that have none (most) are refused with these, by the settings of Hugging Face's name.
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# These would change the function, and are known with this value alone.
_ONLY = {"expert_count": 0, "attention.causal": True}
# These do not change it, or follow from others.
_WITHOUT_MEANING = {
    "vocab_size",
    "expert_used_count",
    "tensor_data_layout",
    "rope.scaling.finetuned",
}
_OF_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_OF_ROPE = (
    *("rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length"),
)
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # whose logits are scaled by another width
_FULL_EVERY = {"gemma2": 2, "gemma3_text": 6}  # the last of so many layers sees everything

_EMBEDDING, _HEAD, _ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"


def config_of(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of a file, in the older dialect.

    Raises:
      UsageError: It is of an architecture that is not read, or a setting is missing, of a wrong
        type or not known.
    """
    try:
        return _config_of(file)
    except UsageError as error:
        raise UsageError(f"{file.path}: {str(error).removesuffix('.')}.") from error


def _architecture(file: GgufFile) -> tuple[str, _Architecture]:
    name = file.settings.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise UsageError(
            f"general.architecture: expected {', '.join(_ARCHITECTURES)}, found {name!r:.60}. "
            "tnt_jax reads no other architecture from a GGUF file."
        )
    return name, _ARCHITECTURES[name]


def _config_of(file: GgufFile) -> dict[str, Any]:
    name, architecture = _architecture(file)
    prefix = f"{name}."
    given = {
        key.removeprefix(prefix): value
        for key, value in file.settings.items()
        if key.startswith(prefix)
    }
    _check_known(given, prefix)
    embedding = file.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise UsageError(f"expected a matrix {_EMBEDDING}, found no such tensor.")
    config: dict[str, Any] = {
        "architectures": [huggingface_causal_lm.ARCHITECTURES[architecture.model_type]],
        "model_type": architecture.model_type,
        "torch_dtype": "float32",
        "vocab_size": embedding.shape[0],
        **{theirs: given.get(ours) for ours, theirs in _SIZES.items()},
        **{theirs: given[ours] for ours, theirs in _OTHERS.items() if ours in given},
        **architecture.settings,
        "tie_word_embeddings": _HEAD not in file.tensors,
    }
    for ours, theirs in _SIZES.items():
        if type(config[theirs]) is not int or config[theirs] < 1:
            raise UsageError(
                f"{prefix}{ours}: expected a whole number above 0, found {config[theirs]!r:.60}."
            )
    if config["num_hidden_layers"] > MOST_LAYERS:  # before anything is made for each of them
        raise UsageError(
            f"{prefix}block_count: expected at most {MOST_LAYERS}, found "
            f"{config['num_hidden_layers']}."
        )
    # transformers has a number of each family's own where a file states none; llama.cpp has not.
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = _head_dim(given, config, prefix)
    config |= _window(given, architecture.model_type, config["num_hidden_layers"], prefix)
    if "sliding_window" in config and config["model_type"] == "llama":
        # llama.cpp has one architecture for both.
        config["model_type"] = "mistral"
        config["architectures"] = [huggingface_causal_lm.ARCHITECTURES["mistral"]]
    if name in ("llama", "qwen3", "smollm3"):
        config["attention_bias"] = any(name.endswith("attn_q.bias") for name in file.tensors)
    if config["model_type"] == "mistral" and config.pop("attention_bias"):
        raise UsageError("expected a model with a window to have no biases, found attn_q.bias.")
    if name in _LAYERS_OF_27B:
        is_largest = config["num_hidden_layers"] == _LAYERS_OF_27B[name]
        of_all = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = of_all if is_largest else config["head_dim"]
    if name == "gemma2":  # llama.cpp computes with these where a file states none
        config.setdefault("attn_logit_softcapping", 50.0)
        config.setdefault("final_logit_softcapping", 30.0)
    if name == "gemma3":
        config["rope_local_base_freq"] = given.get("rope.freq_base_swa", 10_000.0)
    config["rope_theta"] = given.get("rope.freq_base", 10_000.0)
    if scaling := _rope_scaling(given, prefix):
        config["rope_scaling"] = scaling
    if (factors := file.tensors.get(_ROPE_FREQS)) is not None:
        if scaling:
            raise UsageError(f"expected one scaling of the rotation, found {_ROPE_FREQS} as well.")
        config["rope_scaling"] = _llama3_scaling(factors, config)
    return config


def _check_known(given: Mapping[str, Any], prefix: str) -> None:
    """Raises a UsageError for what would change the function and is not known."""
    for key, value in given.items():
        if isinstance(value, list | np.ndarray) and key != _PATTERN:
            raise UsageError(
                f"{prefix}{key!s:.80}: expected one value for all layers, found {len(value)}: such "
                "a network is not computed here."
            )
        if key in _ONLY and value != _ONLY[key]:
            raise UsageError(
                f"{prefix}{key}: expected {_ONLY[key]}, found {value!r:.60}: such a network is not "
                "computed here."
            )
    known = {*_SIZES, *_OTHERS, *_ONLY, *_WITHOUT_MEANING, *_OF_HEADS, *_OF_ROPE, _WINDOW, _PATTERN}
    unknown = sorted(set(given) - known)
    if unknown:
        named = [f"{prefix}{name!s:.80}" for name in unknown[:4]]
        raise UsageError(
            f"expected settings that are known, found {', '.join(named)}: they may change what the "
            "network computes."
        )


def _head_dim(given: Mapping[str, Any], config: Mapping[str, Any], prefix: str) -> int:
    """The width of a head, which the rotation turns as a whole."""
    stated = {key: given[key] for key in _OF_HEADS if key in given}
    widths = list(stated.values()) or [config["hidden_size"] // config["num_attention_heads"]]
    if any(type(width) is not int or width != widths[0] for width in widths):
        raise UsageError(
            f"{prefix}attention: expected one width of heads, found "
            f"{', '.join(f'{key} {value!r:.20}' for key, value in stated.items())}: such a network "
            "is not computed here."
        )
    return widths[0]


def _window(
    given: Mapping[str, Any], model_type: str, num_layers: int, prefix: str
) -> dict[str, Any]:
    """How far layers see. llama.cpp's Qwen has no window, whatever its `config.json` said."""
    window = given.get(_WINDOW)
    pattern = given.get(_PATTERN)
    if model_type == "llama":
        if pattern is not None:
            raise UsageError(f"{prefix}{_PATTERN}: expected none, found {pattern!r:.60}.")
        return {} if window is None else {"sliding_window": window}
    if model_type not in _FULL_EVERY:
        for key in (_WINDOW, _PATTERN):
            if key in given:
                raise UsageError(f"{prefix}{key}: expected none, found {given[key]!r:.60}.")
        return {}
    if window is None and model_type == "gemma2":
        window = 4096  # as llama.cpp has it
    if window is None:
        is_local = [False] * num_layers
    elif isinstance(pattern, np.ndarray):
        is_local = [bool(one) for one in pattern]
    else:
        every = _FULL_EVERY[model_type] if pattern is None else pattern
        if type(every) is not int or every < 1:
            raise UsageError(f"{prefix}{_PATTERN}: expected a number, found {every!r:.60}.")
        is_local = [(i + 1) % every != 0 for i in range(num_layers)]
    types = {True: "sliding_attention", False: "full_attention"}
    return {"sliding_window": window, "layer_types": [types[one] for one in is_local]}


# ---------------------------------------------------------------------------------- The rotation


def _rope_scaling(given: Mapping[str, Any], prefix: str) -> dict[str, Any] | None:
    """`rope_scaling` of `config.json`; None where nothing is scaled."""
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    kind = given.get("rope.scaling.type", "none" if factor is None else "linear")
    if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
        return None
    if kind != "linear":
        raise UsageError(
            f"{prefix}rope.scaling.type: expected none or linear, found {kind!r:.40}: such "
            "rotations are not computed here."
        )
    return {"rope_type": "linear", "factor": factor}


# All files of Llama 3 have these two; with others the same factors can be said in many ways.
_LOW, _HIGH = 1.0, 4.0
_SAME = 1e-5  # of a factor: what float32 leaves of the arithmetic by which it was made


def _llama3_scaling(factors: LazyArray, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scaling of Llama 3 by which rotations are slowed down by these factors.

    Rotations that turn less than once within the old context are slowed down most, those that turn
    more than four times stay, and the inverse factors of those between are on a line. So one factor
    between says what the old context was.
    """
    count = config["head_dim"] // 2
    if factors.shape != (count,):
        raise UsageError(f"expected {_ROPE_FREQS} to have {count} factors, found {factors.shape}.")
    found = factors.load().astype(np.float64)
    if np.all(found == 1):
        return None
    refused = UsageError(
        f"expected {_ROPE_FREQS} to be of Llama 3's scaling with low_freq_factor {_LOW:g} and "
        f"high_freq_factor {_HIGH:g}, found other factors: such rotations are not computed here."
    )
    largest = float(str(np.float32(found.max())))
    if not (np.all(np.isfinite(found)) and found.min() >= 1):
        raise refused
    theta = config["rope_theta"]
    if type(theta) not in (int, float) or not 1 < theta < math.inf:
        raise refused
    speeds = theta ** -(np.arange(0, 2 * count, 2) / (2 * count))
    between = np.flatnonzero((found > 1 + _SAME) & (found < largest * (1 - _SAME)))
    if between.size:
        i = between[between.size // 2]
        share = (1 / found[i] - 1 / largest) / (1 - 1 / largest)
        context = (_LOW + share * (_HIGH - _LOW)) * 2 * np.pi / speeds[i]
    else:
        # The longest context in which the first rotation that is slowed down turns once.
        context = np.floor(_LOW * 2 * np.pi / speeds[found > 1].max())
    if not 1 <= context < 2**31:
        raise refused
    scaling = {
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": round(context),
    }
    scaled, plain = (_inverse_frequencies(config, one) for one in (scaling, None))
    if not np.allclose(scaled * found, plain, rtol=_SAME, atol=0):
        raise refused
    return scaling


def _inverse_frequencies(
    config: Mapping[str, Any], scaling: Mapping[str, Any] | None
) -> np.ndarray:
    """The rotation that a `config.json` says."""
    settings = {**config, "rope_scaling": scaling}
    network = huggingface_causal_lm.network_config(settings, _ROPE_FREQS, is_tied=True)
    rotating = next(kind for kind in network.kinds if kind.rope_theta is not None)
    return rotating.inverse_frequencies(network.head_dim).astype(np.float64)


# ---------------------------------------------------------------------------------- The tensors

_OF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_WHOLE = {
    _EMBEDDING: "model.embed_tokens.weight",
    _HEAD: "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}


def tensors_of(file: GgufFile, config: Mapping[str, Any]) -> dict[str, LazyArray]:
    """The tensors of a file as a directory of Hugging Face's has them; others by their own names.

    Args:
      file: A GGUF file of a known architecture.
      config: The settings of its `config.json`, from `config_of`.

    Raises:
      UsageError: A tensor cannot be of the heads that the settings state.
    """
    _, architecture = _architecture(file)
    heads = {"attn_q": config["num_attention_heads"]}
    heads["attn_k"] = config["num_key_value_heads"]
    stored = {}
    for name, array in file.tensors.items():
        if name == _ROPE_FREQS:
            continue  # it is in the settings
        match = _OF_LAYER.fullmatch(name)
        part = match[2] if match else ""
        if architecture.swaps_rows and part in heads:
            array = _with_halves(array, heads[part], str(file.path))
        if architecture.norm_offset and name.endswith("_norm.weight"):
            array = _minus(array, architecture.norm_offset)
        known = {**_PARTS, "ffn_norm": architecture.ffn_norm}
        if match and part in known:
            stored[f"model.layers.{match[1]}.{known[part]}.{match[3]}"] = array
        else:
            stored[_WHOLE.get(name, name)] = array
    return stored


def _with_halves(array: LazyArray, num_heads: Any, where: str) -> LazyArray:
    """Rows of queries or keys as they are rotated here: with the one half a head away."""
    rows = array.shape[0]
    if type(num_heads) is not int or num_heads < 1 or rows % (2 * num_heads):
        raise UsageError(
            f"{where}: expected {array.source} to have rows for {num_heads!r:.40} heads, found "
            f"{rows}: the file is damaged. Copy it again."
        )
    order = np.arange(rows).reshape(num_heads, rows // num_heads // 2, 2)
    return array.reordered(0, order.swapaxes(1, 2).ravel())


def _minus(array: LazyArray, number: float) -> LazyArray:
    return dataclasses.replace(
        array,
        dtype=np.dtype(np.float32),
        read=lambda index: array.read(index).astype(np.float32) - np.float32(number),
    )
