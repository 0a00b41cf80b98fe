"""Decoder-only models as Hugging Face has them: their settings and the names of their weights.

`config.json` has two dialects. transformers 5 writes `rope_parameters`, nested by the type of layer
where there are several; what the hub has from before says `rope_theta` and `rope_scaling`, and in
Gemma 3 `rope_local_base_freq` and `sliding_window_pattern`. Both are read. A setting that would
change the function and is not known is refused by name: another network would be computed without
a word.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnt_jax.checkpoints.hub_family import HubFamily
from tnt_jax.models.causal_lm_config import CausalLMConfig, LayerKind, Llama3Scaling
from tnt_jax.models.network_config import COMPUTATION, MOST_LAYERS
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

# ---------------------------------------------------------------------------------- The families


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What a model type has that its `config.json` does not say.

    Attributes:
      switches: Fields of `CausalLMConfig`.
      defaults: Values of keys that `config.json` may leave out, as transformers has them. null is a
        value: Mistral's files say `"sliding_window": null` and mean that there is none.
      biases: What `attention_bias` true stands for; None where the key has no meaning.
      window_switch: The key that makes `sliding_window` count; None where it always does.
      window_layers: Which layers have the window where no `layer_types` says so: those
        "from_max_window_layers" on, or those "without_rope".
      full_every: Where no `layer_types` says otherwise, every layer whose number is a multiple of
        this one sees everything, and the others have the window. None is not of this kind.
      softcaps: Keys of `_SOFTCAPS` that transformers computes in this family.
    """

    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    biases: str | None = "all"
    window_switch: str | None = None
    window_layers: str = "from_max_window_layers"
    full_every: int | None = None
    softcaps: tuple[str, ...] = ()


# Bounds of logits, and our names. transformers reads none of `gemma`, and in `gemma3_text` the
# final one alone.
_SOFTCAPS = {
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "final_softcap",
}
_GEMMA = {"norm_scale_offset": 1.0, "scales_embedding": True}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32}
_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(biases=None, defaults={"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": _Family(
        switches={"attention_bias": "qkv"},
        biases=None,
        window_switch="use_sliding_window",
        defaults=_QWEN,
    ),
    "qwen3": _Family(
        switches={"query_key_norm": "head"},
        window_switch="use_sliding_window",
        defaults={**_QWEN, "head_dim": 128},
    ),
    "smollm3": _Family(
        window_switch="use_sliding_window",
        window_layers="without_rope",
        defaults={
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
        },
    ),
    "gemma": _Family(switches=_GEMMA, defaults={"head_dim": 256, "num_key_value_heads": 16}),
    "gemma2": _Family(
        switches={**_GEMMA, "norms": "pre_and_post"},
        full_every=2,
        softcaps=tuple(_SOFTCAPS),
        defaults={
            "head_dim": 256,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _Family(
        switches={**_GEMMA, "query_key_norm": "head", "norms": "pre_and_post"},
        full_every=6,
        softcaps=("final_logit_softcapping",),
        defaults={
            "head_dim": 256,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "olmo2": _Family(
        switches={"query_key_norm": "all_heads", "norms": "post"},
        defaults={"rms_norm_eps": 1e-5},
    ),
}
MODEL_TYPES = tuple(_FAMILIES)

# What is read, and its types; what is asked of the layers' kinds and of the rotation besides. How
# large it may be is checked by `CausalLMConfig`.
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_SIZES, (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), (int,)),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), (int,)),
    **dict.fromkeys(("max_window_layers", "no_rope_layer_interval"), (int,)),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), (int,)),
    **dict.fromkeys(("attention_bias", "use_sliding_window"), (bool,)),
    **dict.fromkeys(("hidden_act", "hidden_activation"), (str,)),
    **dict.fromkeys(("rms_norm_eps", "query_pre_attn_scalar", *_SOFTCAPS), (float, int)),
    **dict.fromkeys(("layer_types", "no_rope_layers"), (list,)),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), (dict,)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), (float, int)),
}
_THETA = "rope_theta"
# These would change the function, and are known with these values alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "mlp_bias": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    **dict.fromkeys(_SOFTCAPS, (None,)),
    "use_bidirectional_attention": (None, False),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "pruned_heads": (None, {}),
    "torchscript": (None, False),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
}
# These do not change it.
_WITHOUT_MEANING = {
    *("architectures", "model_type", "transformers_version", "_name_or_path", "torch_dtype"),
    *("dtype", "use_cache", "cache_implementation", "initializer_range", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("decoder_start_token_id", "tokenizer_class", "max_position_embeddings", "is_decoder"),
    *("tie_word_embeddings", "tie_encoder_decoder", "cross_attention_hidden_size"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
    *("id2label", "label2id", "problem_type", "num_labels", "task_specific_params"),
    *("transformers.js_config", "finetuning_task", "prefix", "use_bfloat16", "tf_legacy_loss"),
    # Of the programs that trained it, or that hand it on.
    *("is_llama_config", "neftune_noise_alpha", "unsloth_fixed", "unsloth_version"),
    *("_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
    *("gradient_checkpointing", "attention_dropout"),  # dropout is ours to set
    "max_sequence_length",
    # How outputs are made, which older files have here. We take it from DECODER alone.
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups"),
    *("max_length", "min_length", "length_penalty", "repetition_penalty", "diversity_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping"),
    *("num_return_sequences", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("output_scores", "return_dict_in_generate", "remove_invalid_values"),
}


def network_config(config: Mapping[str, Any], where: str, *, is_tied: bool) -> CausalLMConfig:
    """The network of a `config.json`.

    Args:
      config: Its fields; `model_type` is one of `MODEL_TYPES`.
      where: The file, for messages.
      is_tied: Whether the weights hold no output matrix of their own.

    Raises:
      UsageError: A setting is missing, of a wrong type, or not known.
    """
    try:
        return _network_config(config, is_tied)
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removesuffix('.')}.") from error


def _network_config(config: Mapping[str, Any], is_tied: bool) -> CausalLMConfig:
    family = _FAMILIES[config["model_type"]]
    _check_known(config, family)
    given = {**family.defaults, **config}
    for key in (_THETA, "rope_local_base_freq"):  # null is the same as absent
        if given.get(key) is None:
            given[key] = family.defaults.get(key, 10_000.0)
    files.check_types(given, _SETTING_TYPES)
    for key in _SIZES:
        if given.get(key) is None:
            raise UsageError(f"expected {key!r}, found no such setting.")
    num_layers, num_heads = given["num_hidden_layers"], given["num_attention_heads"]
    if not 0 < num_layers <= MOST_LAYERS:  # before anything is made for each of them
        raise UsageError(f"num_hidden_layers: expected 1 to {MOST_LAYERS}, found {num_layers}.")
    switches = dict(family.switches)
    if given.get("attention_bias") and family.biases is not None:
        switches["attention_bias"] = family.biases
    scalar = given.get("query_pre_attn_scalar")
    if scalar is not None and not 0 < scalar < math.inf:
        raise UsageError(f"query_pre_attn_scalar: expected a number above 0, found {scalar}.")
    for key in family.softcaps:
        if given.get(key) is not None:
            switches[_SOFTCAPS[key]] = given[key]
    # null has no meaning there.
    epsilons = (given.get("rms_norm_eps"), family.defaults.get("rms_norm_eps"), 1e-6)
    kinds, pattern = _layer_kinds(given, family)
    return CausalLMConfig(
        vocab_size=given["vocab_size"],
        emb_dim=given["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=given.get("num_key_value_heads") or num_heads,
        head_dim=given.get("head_dim") or given["hidden_size"] // max(num_heads, 1),
        mlp_dim=given["intermediate_size"],
        mlp_activations=(_activation(given), "linear"),
        logits_via_embedding=is_tied,
        layer_norm_epsilon=next(x for x in epsilons if x is not None),
        num_layers=num_layers,
        layer_kinds=kinds,
        layer_pattern=pattern,
        attention_scale=None if scalar is None else scalar**-0.5,
        **switches,
    )


def _check_known(config: Mapping[str, Any], family: _Family) -> None:
    """Raises a UsageError for what would change the function and is not known."""
    for key, values in _ONLY.items():
        if key not in family.softcaps and config.get(key) not in values:
            expected = " or ".join(
                dict.fromkeys("nothing" if v is None else str(v) for v in values)
            )
            raise UsageError(
                f"{key}: expected {expected}, found {config[key]!r:.60}: such a network "
                "is not computed here."
            )
    unknown = sorted(set(config) - set(_SETTING_TYPES) - set(_ONLY) - _WITHOUT_MEANING)
    if unknown:
        raise UsageError(
            f"expected settings of {', '.join(MODEL_TYPES)}, found {', '.join(unknown)}: "
            "they may change what the network computes. What transformers does not read for this "
            "model_type may be deleted from a copy of the file."
        )
    # Older files of Gemma 2 have the window twice.
    window = {**family.defaults, **config}.get("sliding_window")
    if config.get("sliding_window_size") not in (None, window):
        raise UsageError(
            f"sliding_window_size: expected sliding_window's {window}, found "
            f"{config['sliding_window_size']!r:.60}."
        )


def _activation(given: Mapping[str, Any]) -> str:
    name = given.get("hidden_activation") or given.get("hidden_act") or "silu"
    if given["model_type"].startswith("gemma"):
        # The first files of Gemma say "gelu" and mean the approximation, as transformers has it.
        name = {"gelu": "gelu_pytorch_tanh", "silu": "gelu_pytorch_tanh"}.get(name, name)
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu"}
    if name not in known:
        raise UsageError(f"hidden_act: expected {', '.join(known)}, found {name!r:.60}.")
    return known[name]


# ---------------------------------------------------------------------------------- The layers


def _layer_kinds(
    given: Mapping[str, Any], family: _Family
) -> tuple[Sequence[LayerKind], Sequence[int]]:
    """The kinds of layers, and which each layer is."""
    num_layers = given["num_hidden_layers"]
    no_rope = given.get("no_rope_layers")
    interval = given.get("no_rope_layer_interval")
    if no_rope is None and interval:
        no_rope = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if no_rope is not None and len(no_rope) != num_layers:
        raise UsageError(
            f"no_rope_layers: expected a number for each of {num_layers} layers, found "
            f"{no_rope!r:.80}."
        )
    types = given.get("layer_types") or _layer_types(given, family, no_rope)
    known = ("full_attention", "sliding_attention")
    if len(types) != num_layers or any(kind not in known for kind in types):
        raise UsageError(
            f"layer_types: expected full_attention or sliding_attention for each of "
            f"{num_layers} layers, found {types!r:.80}."
        )
    window = given.get("sliding_window")
    kinds: dict[LayerKind, int] = {}
    pattern = []
    for i, layer_type in enumerate(types):
        kind = LayerKind(
            window=window if layer_type == "sliding_attention" else None,
            **_rope(given, layer_type),
        )
        if no_rope is not None and not no_rope[i]:
            kind = LayerKind(window=kind.window, rope_theta=None)
        pattern.append(kinds.setdefault(kind, len(kinds)))
    return tuple(kinds), tuple(pattern)


def _layer_types(
    given: Mapping[str, Any], family: _Family, no_rope: Sequence[int] | None
) -> list[str]:
    """What a file from before `layer_types` means; `no_rope` is 0 where nothing is rotated."""
    num_layers = given["num_hidden_layers"]
    if family.full_every is not None:
        # transformers 5 keeps the key of 4 under another name.
        every = given.get("sliding_window_pattern") or given.get("_sliding_window_pattern")
        every = every or family.full_every
        return [
            "full_attention" if (i + 1) % every == 0 else "sliding_attention"
            for i in range(num_layers)
        ]
    if given.get("sliding_window") is None:
        return ["full_attention"] * num_layers
    if family.window_switch is None:
        return ["sliding_attention"] * num_layers
    if not given.get(family.window_switch):
        return ["full_attention"] * num_layers
    if family.window_layers == "without_rope":
        return ["full_attention" if rope else "sliding_attention" for rope in no_rope or ()]
    first = given.get("max_window_layers") or 0
    return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]


def _rope(given: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    """The rotation of a type of layer: fields of `LayerKind`."""
    stated = given.get("rope_parameters")
    if stated is None:
        is_local = given["model_type"] == "gemma3_text" and layer_type == "sliding_attention"
        theta = given["rope_local_base_freq" if is_local else _THETA]
        scaling = {} if is_local else given.get("rope_scaling") or {}
        stated = {"rope_theta": theta, **scaling}
    elif layer_type in stated:
        stated = stated[layer_type]
    if not isinstance(stated, dict):
        raise UsageError(f"expected settings of the rotation, found {stated!r:.60}.")
    stated = {key: value for key, value in stated.items() if value is not None or key == _THETA}
    kind = stated.get("rope_type", stated.get("type", "default"))
    known = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            *("factor", "low_freq_factor", "high_freq_factor"),
            "original_max_position_embeddings",
        ),
    }
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(set(stated) - allowed - {*known.get(str(kind), ())})
    if str(kind) not in known or unknown:
        raise UsageError(
            f"rotary positions: expected the type {', '.join(known)}, found "
            f"{kind!r:.40} with {', '.join(unknown) or 'nothing else'}: such rotations are not "
            "computed here."
        )
    if stated.get("partial_rotary_factor") not in _ONLY["partial_rotary_factor"]:
        raise UsageError(f"partial_rotary_factor: expected 1, found {stated!r:.80}.")
    stated = {_THETA: given[_THETA], **stated}
    numbers: dict[str, float] = {}
    for key in ("rope_theta", *known[str(kind)]):
        value: Any = stated.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UsageError(f"{key}: expected a number, found {value!r:.60}.")
        numbers[key] = float(value)
    fields: dict[str, Any] = {"rope_theta": numbers["rope_theta"]}
    if kind == "linear":
        fields["rope_factor"] = numbers["factor"]
    elif kind == "llama3":
        fields["rope_llama3"] = Llama3Scaling(
            factor=numbers["factor"],
            low_freq_factor=numbers["low_freq_factor"],
            high_freq_factor=numbers["high_freq_factor"],
            original_max_positions=int(numbers["original_max_position_embeddings"]),
        )
    return fields


# ---------------------------------------------------------------------------- The way back

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}


def new_config(config: CausalLMConfig) -> dict[str, Any]:
    """A `config.json` for a network that did not come with one, in the older dialect.

    Raises:
      UsageError: transformers has no such network.
    """
    for model_type, family in _FAMILIES.items():
        settings = _settings_of(config, model_type, family)
        with contextlib.suppress(UsageError):
            found = network_config(settings, "", is_tied=config.logits_via_embedding)
            if _function_of(found) == _function_of(config):
                return settings
    raise UsageError(
        f"expected a network as transformers has it ({', '.join(MODEL_TYPES)}), found switches "
        f"that go together in none of them: {config}."
    )


def _function_of(config: CausalLMConfig) -> tuple[Any, ...]:
    """All that decides what a network computes, and nothing of how."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in (*COMPUTATION, "layer_kinds", "layer_pattern", "attention_scale", "adapter_scale"):
        del fields[name]
    return (config.kinds, float(np.float32(config.logit_scale)), *fields.items())


def _settings_of(config: CausalLMConfig, model_type: str, family: _Family) -> dict[str, Any]:
    """The settings of a network, as far as a model type has words for them."""
    kinds = config.kinds
    windows = {kind.window for kind in kinds if kind.window is not None}
    full = next((k for k in kinds if k.window is None and k.rope_theta is not None), kinds[0])
    names = {"gelu": "gelu_pytorch_tanh", "gelu_exact": "gelu", "swish": "silu"}
    activation = names.get(config.mlp_activations[0], config.mlp_activations[0])
    settings: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "rms_norm_eps": config.layer_norm_epsilon,
        "tie_word_embeddings": config.logits_via_embedding,
        "rope_theta": full.rope_theta or 10_000.0,
        # The defaults of transformers are those of the first model of each family, whose vocabulary
        # was larger; the tokenizer's files say which ids these are.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    if model_type.startswith("gemma"):
        settings["hidden_activation"] = activation
    if family.biases is not None:
        settings["attention_bias"] = config.attention_bias == family.biases
    if full.rope_llama3 is not None:
        scaling = full.rope_llama3
        settings["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    elif full.rope_factor != 1:
        settings["rope_scaling"] = {"rope_type": "linear", "factor": full.rope_factor}
    if "sliding_window" in family.defaults or family.window_switch is not None:
        settings["sliding_window"] = max(windows, default=None)
    if family.window_switch is not None:
        settings[family.window_switch] = bool(windows)
        settings["max_window_layers"] = 0
    if family.window_switch is not None or family.full_every is not None:
        settings["layer_types"] = [
            "full_attention" if kind.window is None else "sliding_attention" for kind in kinds
        ]
    if "no_rope_layer_interval" in family.defaults:
        settings["no_rope_layers"] = [int(kind.rope_theta is not None) for kind in kinds]
    if model_type == "gemma3_text":
        local = next((kind.rope_theta for kind in kinds if kind.window is not None), None)
        settings["rope_local_base_freq"] = local or 10_000.0
    if "query_pre_attn_scalar" in family.defaults:
        # transformers wants a whole number.
        settings["query_pre_attn_scalar"] = round(config.logit_scale**-2)
    for key in family.softcaps:
        settings[key] = getattr(config, _SOFTCAPS[key])
    return settings


# --------------------------------------------------------------------------------- The names

_WHOLE = {
    "token_embedder/embedding": "model.embed_tokens.weight",
    "decoder/decoder_norm/scale": "model.norm.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
}
_PARTS = {
    "self_attention": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "query_norm": "q_norm",
    "key_norm": "k_norm",
    "wi_0": "gate_proj",
    "wi_1": "up_proj",
    "wo": "down_proj",
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
    "kernel": "weight",
    "scale": "weight",
}


def weight_name(name: str, config: CausalLMConfig) -> str:
    """Hugging Face's name of the parameter that we call `name`."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, *path = name.split("/")
    parts = [_PARTS.get(part, part) for part in path]
    if path[0] == "pre_mlp_layer_norm" and config.norms == "pre":
        parts[0] = "post_attention_layernorm"  # the norm after attention is the one before the MLP
    return ".".join(["model.layers", layer.removeprefix("layers_"), *parts])


def _is_transposed(name: str) -> bool:
    return name.endswith("/kernel")


# Buffers that old files hold; they follow from the settings.
_IGNORED = (re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),)

FAMILY = HubFamily(
    model_types=MODEL_TYPES,
    config_class=CausalLMConfig,
    check=lambda config: None,
    network_config=network_config,
    new_config=new_config,
    # Without it most model types are untied, and one that is tied would miss its output matrix.
    always_said=lambda config: {"tie_word_embeddings": config.logits_via_embedding},
    weight_name=weight_name,
    is_transposed=_is_transposed,
    embeddings=("model.embed_tokens.weight",),
    ignored=_IGNORED,
    why_not_float16=None,
    auto_class="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    peft_task="CAUSAL_LM",
    tag="causal-lm",
)
