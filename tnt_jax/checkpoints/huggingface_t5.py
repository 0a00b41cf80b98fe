"""T5's settings and names in Hugging Face's format: `models/t5`, `mt5` and `umt5`."""

import re
from collections.abc import Mapping
from typing import Any

from tnt_jax.checkpoints.hub_family import HubFamily
from tnt_jax.models.t5_config import T5Config
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_MODEL_TYPES = ("t5", "mt5", "umt5")

# ---------------------------------------------------------------------------------- The settings

# What is read; how large it may be is checked by `T5Config`. null is absent.
_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
_SETTING_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_SIZES, (int,)),
    "feed_forward_proj": (str,),
    "dense_act_fn": (str,),
    "layer_norm_epsilon": (float, int),
    "relative_attention_num_buckets": (int,),
    "relative_attention_max_distance": (int,),
    "tie_word_embeddings": (bool,),
    "scale_decoder_outputs": (bool,),
}


def check(config: Mapping[str, Any]) -> None:
    """Raises a UsageError for an encoder alone."""
    is_encoder_decoder = config.get("is_encoder_decoder")
    if is_encoder_decoder not in (None, True):
        raise UsageError(
            "expected an encoder-decoder of the T5 family, found is_encoder_decoder "
            f"{is_encoder_decoder!r:.60}"
        )


def network_config(config: Mapping[str, Any], where: str, *, is_tied: bool) -> T5Config:
    """The network of a `config.json`.

    Args:
      config: Its fields.
      where: The file, for messages.
      is_tied: Whether the weights hold no output matrix of their own.

    Raises:
      UsageError: A setting is missing, or is one that this network does not have.
    """
    given = {key: value for key, value in config.items() if value is not None}
    files.check_types(given, _SETTING_TYPES, where)
    kind = config["model_type"]
    projection = given.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    is_gated = projection.startswith("gated-")
    # transformers computes "gated-gelu" by the approximation and "gelu" exactly.
    name = given.get("dense_act_fn", projection.rpartition("-")[2])
    name = "gelu_new" if projection == "gated-gelu" and name == "gelu" else name
    activation = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}.get(
        name, name
    )
    for key, expected in (("pad_token_id", 0), ("eos_token_id", 1), ("decoder_start_token_id", 0)):
        found = given.get(key, expected)
        if found not in (expected, [expected]) or isinstance(found, bool):
            raise UsageError(
                f"{where}: expected T5's ids, {key} {expected}, found {found!r:.60}. Such a "
                "model's ids mean something else."
            )
    # T5 scales where weights are tied, and says so by the flag even where they no longer are.
    scale = given.get("scale_decoder_outputs", given.get("tie_word_embeddings", True))
    scale = scale and kind != "mt5"
    try:
        return T5Config(
            vocab_size=given["vocab_size"],
            emb_dim=given["d_model"],
            num_heads=given["num_heads"],
            num_encoder_layers=given["num_layers"],
            num_decoder_layers=given.get("num_decoder_layers", given["num_layers"]),
            head_dim=given["d_kv"],
            mlp_dim=given["d_ff"],
            mlp_activations=(activation, "linear") if is_gated else (activation,),
            logits_via_embedding=is_tied,
            scale_decoder_outputs=None if scale == is_tied else scale,
            relpos_bias_per_layer=kind == "umt5",
            num_relpos_buckets=given.get("relative_attention_num_buckets", 32),
            relpos_max_distance=given.get("relative_attention_max_distance", 128),
            layer_norm_epsilon=given.get("layer_norm_epsilon", 1e-6),
        )
    except KeyError as error:
        raise UsageError(f"{where}: expected {error.args[0]!r}, found no such setting.") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}.") from error


def new_config(config: T5Config) -> dict[str, Any]:
    """A `config.json` for a network that did not come with one.

    Raises:
      UsageError: transformers has no such network.
    """
    gate = config.mlp_activations[1:]
    name = {"gelu": "gelu_new", "gelu_exact": "gelu"}.get(
        config.mlp_activations[0], config.mlp_activations[0]
    )
    if gate not in ((), ("linear",)) or name == "linear":
        raise UsageError(
            "expected an MLP with one activation, gated or not, as transformers has it; found "
            f"{', '.join(config.mlp_activations)}."
        )
    if config.mlp_activations == ("gelu", "linear"):
        projection = "gated-gelu"
    else:
        projection = f"gated-{name}" if gate else name
    return {
        "architectures": [
            "UMT5ForConditionalGeneration"
            if config.relpos_bias_per_layer
            else "T5ForConditionalGeneration"
        ],
        "model_type": "umt5" if config.relpos_bias_per_layer else "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.emb_dim,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": projection,
        "dense_act_fn": name,
        "is_gated_act": bool(gate),
        "relative_attention_num_buckets": config.num_relpos_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": 0.1,
        "tie_word_embeddings": config.scales_logits,  # transformers reads from it whether to scale
        "scale_decoder_outputs": config.scales_logits,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "use_cache": True,
    }


# --------------------------------------------------------------------------------- The names

# T5X's name of a parameter within a layer -> Hugging Face's. Matrices are transposed.
_SUBLAYERS = {
    "encoder": {"attention": (0, "SelfAttention"), "mlp": (1, "DenseReluDense")},
    "decoder": {
        "self_attention": (0, "SelfAttention"),
        "encoder_decoder_attention": (1, "EncDecAttention"),
        "mlp": (2, "DenseReluDense"),
    },
}
_NORMS = {
    "pre_attention_layer_norm": 0,
    "pre_self_attention_layer_norm": 0,
    "pre_cross_attention_layer_norm": 1,
}
_MATRICES = {"query": "q", "key": "k", "value": "v", "out": "o"}
_WHOLE = {
    "token_embedder/embedding": "shared.weight",
    "encoder/encoder_norm/scale": "encoder.final_layer_norm.weight",
    "decoder/decoder_norm/scale": "decoder.final_layer_norm.weight",
    "decoder/logits_dense/kernel": "lm_head.weight",
}
# The names of the embedding, and what the first T5 files hold although nothing reads it.
_EMBEDDINGS = (
    "shared.weight",
    *("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
)
_IGNORED = (
    re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
)


def weight_name(name: str, config: T5Config) -> str:
    """Hugging Face's name of the parameter that T5X calls `name`."""
    del config  # all T5s have the same
    if name in _WHOLE:
        return _WHOLE[name]
    stack, *path = name.split("/")
    if path[0] == "relpos_bias":
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    block = f"{stack}.block.{path[0].removeprefix('layers_')}"
    match path[1:]:
        case ["relpos_bias", "rel_embedding"]:
            return f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
        case ["pre_mlp_layer_norm", "scale"]:
            return f"{block}.layer.{_SUBLAYERS[stack]['mlp'][0]}.layer_norm.weight"
        case [norm, "scale"]:
            return f"{block}.layer.{_NORMS[norm]}.layer_norm.weight"
        case [sublayer, matrix, "kernel"]:
            position, module = _SUBLAYERS[stack][sublayer]
            return f"{block}.layer.{position}.{module}.{_MATRICES.get(matrix, matrix)}.weight"
    raise AssertionError(name)


def _is_transposed(name: str) -> bool:
    return name.endswith(("/kernel", "/rel_embedding"))


FAMILY = HubFamily(
    model_types=_MODEL_TYPES,
    config_class=T5Config,
    check=check,
    network_config=network_config,
    new_config=new_config,
    always_said=lambda config: {},
    weight_name=weight_name,
    is_transposed=_is_transposed,
    embeddings=_EMBEDDINGS,
    ignored=_IGNORED,
    why_not_float16=(
        "T5's activations overflow in float16, and its rounding is in the weights for good"
    ),
    auto_class="AutoModelForSeq2SeqLM",
    pipeline_tag="text2text-generation",
    peft_task="SEQ_2_SEQ_LM",
    tag="t5",
)
