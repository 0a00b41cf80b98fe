"""Models in Hugging Face's format: `config.json`, safetensors files and a tokenizer's files.

Settings and weights agree with transformers (`models/t5`, `mt5`, `umt5`); neither it nor torch is
needed.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from tnt_jax.checkpoints import lazy_arrays
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models import families, parameters
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.models.t5_config import T5Config
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Everything else that belongs to a model; a file that is not there is not missed.
OTHER_FILES = (
    "generation_config.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE",
)

_MODEL_TYPES = ("t5", "mt5", "umt5")
_MAX_SHARD_BYTES = 5 * 10**9

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


def read_config(folder: epath.Path) -> dict[str, Any]:
    """`config.json` of a directory.

    Raises:
      UsageError: It is not JSON, or not of an encoder-decoder of the T5 family.
    """
    path = folder / CONFIG
    config = files.read_object(path)
    model_type, is_encoder_decoder = config.get("model_type"), config.get("is_encoder_decoder")
    if model_type not in _MODEL_TYPES or is_encoder_decoder not in (None, True):
        kind = f"model_type {model_type!r:.60}"
        if model_type in _MODEL_TYPES:
            kind = f"is_encoder_decoder {is_encoder_decoder!r:.60}"
        architectures = config.get("architectures")
        if isinstance(architectures, list):
            kind += f" ({', '.join(map(str, architectures)):.60})"
        raise UsageError(
            f"{path}: expected an encoder-decoder of the T5 family (model_type "
            f"{', '.join(_MODEL_TYPES)}), found {kind}. tnt_jax trains no other architecture."
        )
    return config


def t5_config(config: Mapping[str, Any], where: str, *, is_tied: bool) -> T5Config:
    """The network of a `config.json`.

    Args:
      config: From `read_config`.
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


def new_config(config: NetworkConfig) -> dict[str, Any]:
    """A `config.json` for a network that did not come with one.

    Raises:
      UsageError: transformers has no such network.
    """
    assert isinstance(config, T5Config), config
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
# Other names of the embedding, and what the first T5 files hold although nothing reads it.
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_IGNORED = (
    re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
)


def weight_name(name: str) -> str:
    """Hugging Face's name of the parameter that T5X calls `name`."""
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


# --------------------------------------------------------------------------------- Reading


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A directory of Hugging Face's.

    Attributes:
      config: Of the network.
      weights: By T5X's names; those of another network than `config` have their own names.
    """

    config: T5Config
    weights: dict[str, LazyArray]


def read(folder: epath.Path) -> Model:
    """The settings and the weights of a directory; no weight is read yet.

    Raises:
      UsageError: Something is missing, cut short, or of a kind that is not read.
    """
    settings = read_config(folder)
    stored = _stored(folder)
    for name in ("shared.weight", "lm_head.weight", *_ALIASES):
        if name in stored and len(stored[name].shape) != 2:
            raise UsageError(
                f"{folder}: expected {stored[name].source} to be a matrix, found the shape "
                f"{stored[name].shape}: it is damaged, or of an architecture that is not T5's."
            )
    embedding = _embedding(stored, folder)
    head = stored.get("lm_head.weight")
    # As transformers: weights that say the same twice are tied, unless the settings deny it.
    is_tied = head is None or (
        settings.get("tie_word_embeddings") is not False and _equal(head, embedding)
    )
    config = t5_config(settings, str(folder / CONFIG), is_tied=is_tied)
    check_depth(config, len(stored), str(folder / CONFIG))
    stored["shared.weight"] = embedding
    for alias in (*_ALIASES, *(["lm_head.weight"] if is_tied else [])):
        stored.pop(alias, None)
    weights = {}
    for name in parameter_names(config):
        array = stored.pop(weight_name(name), None)
        if array is not None:
            weights[name] = array.transposed() if _is_transposed(name) else array
    unexpected = {
        name: array
        for name, array in stored.items()
        if not any(pattern.fullmatch(name) for pattern in _IGNORED)
    }
    return Model(config, weights | unexpected)


def check_depth(config: T5Config, num_arrays: int, where: str) -> None:
    """Raises a UsageError for more layers than arrays: a number that is wrong, or meant to harm.

    Everything that follows takes time for each layer.
    """
    num_layers = config.num_encoder_layers + config.num_decoder_layers
    if num_layers > num_arrays:
        raise UsageError(
            f"{where}: expected the settings of the weights beside it, which are {num_arrays} "
            f"arrays; found {num_layers} layers."
        )


def parameter_names(config: NetworkConfig) -> list[str]:
    """T5X's names of a network's parameters, layers apart, in the order of the tree."""
    shapes = families.network_of(config).abstract_params()
    return list(lazy_arrays.shapes(parameters.unstack_layers(shapes)))


def _embedding(stored: Mapping[str, LazyArray], folder: epath.Path) -> LazyArray:
    copies = [stored[name] for name in ("shared.weight", *_ALIASES) if name in stored]
    if not copies and "lm_head.weight" in stored:
        copies = [stored["lm_head.weight"]]  # tied weights may be stored by any of their names
    if not copies:
        raise UsageError(
            f"{folder}: expected the embedding as shared.weight, found no such tensor among the "
            f"{len(stored)} there ({', '.join(sorted(stored)[:4])} ...)."
        )
    for copy in copies[1:]:
        if not _equal(copies[0], copy):
            raise UsageError(
                f"{folder}: expected one embedding, found {copy.source} other than "
                f"{copies[0].source}. T5 has one for both of its stacks."
            )
    return copies[0]


def _equal(one: LazyArray, other: LazyArray) -> bool:
    """Whether two matrices are the same."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    rows = max(1, 2**24 // max(1, math.prod(one.shape[1:])))
    starts = range(0, one.shape[0], rows)
    return all(
        np.array_equal(one[slice(i, i + rows), slice(None)], other[slice(i, i + rows), slice(None)])
        for i in starts
    )


def _stored(folder: epath.Path) -> dict[str, LazyArray]:
    """The tensors of a directory's safetensors files."""
    if (folder / WEIGHTS).exists():
        return read_safetensors(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        found = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".msgpack")]
        raise UsageError(
            f"{folder}: expected {WEIGHTS} (or {INDEX} and its shards), found "
            f"{', '.join(sorted(found)) or 'no weights'}. Where transformers and torch are "
            'installed, this converts it: python -c "from transformers import AutoModelForSeq2SeqLM'
            f" as M; M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
        )
    weight_map = files.read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UsageError(f"{folder / INDEX}: expected a weight_map, found {weight_map!r:.60}.")
    names_by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not lazy_arrays.is_file_name(shard):
            raise UsageError(
                f"{folder / INDEX}: expected the names of files in this directory, found "
                f"{shard!r:.60}."
            )
        names_by_shard.setdefault(shard, []).append(name)
    missing = [shard for shard in names_by_shard if not (folder / shard).exists()]
    if missing:
        raise UsageError(
            f"{folder}: {INDEX} names {len(names_by_shard)} shards, of which "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. Copy the whole "
            "directory."
        )
    stored = {}
    for shard, names in names_by_shard.items():
        in_shard = read_safetensors(folder / shard)
        absent = [name for name in names if name not in in_shard]
        if absent:
            raise UsageError(
                f"{folder / shard}: {INDEX} promises {', '.join(absent[:4])} here"
                f"{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}; not found."
            )
        stored |= in_shard
    return stored


_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it

# The types of parameters that T5 has been trained in.
_DTYPES = {"F32": np.dtype(np.float32), "BF16": jnp.dtype(jnp.bfloat16)}


def read_safetensors(path: epath.Path) -> dict[str, LazyArray]:
    """The tensors of one file; their elements are read when they are asked for.

    The safetensors library would map the whole file into memory and opens local ones alone. Here
    any part of a tensor is one read at an offset, of any file that `etils.epath` opens.

    Raises:
      UsageError: It is no safetensors file, is cut short, or holds another type of numbers.
    """
    size = files.size_of(path)
    with path.open("rb") as file, naming_file(path):
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut short" if size > 8 else "it is empty")
            if length > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                entries[name] = (str(entry["dtype"]), tuple(entry["shape"]), start, end)
            _check_offsets(entries)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path}: expected a safetensors file: {error}.") from error
    first = 8 + length
    expected_size = first + max((end for *_, end in entries.values()), default=0)
    if size != expected_size:
        raise UsageError(
            f"{path}: expected {expected_size} bytes, as its header says, found {size}: the file "
            f"is {'cut short' if size < expected_size else 'damaged'}. Copy it again."
        )
    other = {kind for kind, *_ in entries.values() if kind not in _DTYPES}
    if other:
        named = next(name for name, (kind, *_) in entries.items() if kind in other)
        raise UsageError(
            f"{path}: expected numbers of type F32 or BF16, found {', '.join(sorted(other))} "
            f"({named}). "
            + (
                "T5's activations overflow in float16, and its rounding is in the weights for "
                "good: take the float32 or bfloat16 files of this model. If there are none, "
                "transformers saves it as float32: from_pretrained(..., dtype=torch.float32)"
                ".save_pretrained(...)."
                if other == {"F16"}
                else "Take the files of this model in one of these types."
            )
        )
    arrays = {}
    for name, (kind, shape, start, end) in entries.items():
        dtype = _DTYPES[kind]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise UsageError(
                f"{path}: {name} of shape {shape} and type {kind} cannot fill {end - start} bytes: "
                "the file is damaged. Copy it again."
            )
        reader = functools.partial(_read, path, first + start, shape, dtype)
        arrays[name] = LazyArray(shape, dtype, f"{path.name}: {name}", reader)
    return arrays


def _check_offsets(entries: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> None:
    """Raises a ValueError unless the tensors fill the file from its beginning, each on its own."""
    for name, (_, shape, start, end) in entries.items():
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(f"the shape or the place of {name} is not made of whole numbers")
    position = 0
    for name, (*_, start, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if start != position or end < start:
            raise ValueError(f"{name} is at {start} to {end}, after what ends at {position}")
        position = end


def _read(
    path: epath.Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: lazy_arrays.Index,
) -> np.ndarray:
    """A part of the tensor that begins at an offset: its rows are read, and the part is of them."""
    if not shape:  # one number, which has no rows
        return _read(path, offset, (1,), dtype, (slice(0, 1),)).reshape(())
    rows, *rest = index
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    num_bytes = (rows.stop - rows.start) * row_bytes
    with path.open("rb") as file, naming_file(path):
        file.seek(offset + rows.start * row_bytes)
        content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise UsageError(f"{path}: it has become shorter since it was opened. Copy it again.")
    part = np.frombuffer(content, dtype).reshape(rows.stop - rows.start, *shape[1:])
    within = (slice(None), *rest)
    return part if part[within].shape == part.shape else part[within].copy()


# --------------------------------------------------------------------------------- Writing


def to_stored(weights: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Weights under Hugging Face's names, as Hugging Face lays them out."""
    return {
        weight_name(name): array.transposed() if _is_transposed(name) else array
        for name, array in weights.items()
    }


def write_weights(
    folder: epath.Path,
    weights: Mapping[str, LazyArray],
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    progress: Callable[[Sequence[Any]], Iterator[Any]] = iter,
) -> None:
    """Writes weights as safetensors, with an index where they take more than one file.

    In memory is one file's part of them.

    Args:
      folder: An existing local directory.
      weights: By T5X's names.
      max_shard_bytes: Of one file, unless a tensor is larger.
      progress: Wraps the sequence of files.
    """
    stored = to_stored(weights)
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(stored):
        num_bytes = _num_bytes(stored[name])
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map = {}
    for i, names in enumerate(progress(shards)):
        shard = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, shard)
        tensors = {name: stored[name].load() for name in names}
        save_safetensors(folder / shard, tensors)
    if len(shards) > 1:
        total = sum(_num_bytes(array) for array in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2, allow_nan=False) + "\n")


def save_safetensors(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a local file of tensors that transformers, too, takes for one.

    Whoever may read other files of this user may read it. The library would leave it to the user
    alone, and a server that runs as another one could not load the model.
    """
    path.touch()
    mode = os.stat(path).st_mode  # noqa: PTH116 (of a new file, as the user's umask has it)
    # "pt" is what transformers insists on, whoever wrote the file.
    safetensors.numpy.save_file(dict(tensors), os.fspath(path), {"format": "pt"})
    os.chmod(path, mode)  # noqa: PTH101


def _num_bytes(array: LazyArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
