"""T5X's checkpoints: parameters and step, in and out.

`DIR/checkpoint_<step>` is a msgpack file `checkpoint` with one zarr array beside it for each
parameter (the legacy format; agrees with `t5x/checkpoints.py`, version 3), or has an Orbax item
`state`.
Layers have names of their own (`layers_0`) or, as `t5x/examples/scalable_t5` scans them, one array
with an axis of layers. T5X's optimizer state is not carried over.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from tnt_jax.checkpoints import lazy_arrays
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.models.t5_config import T5Config
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

CHECKPOINT_FILE = "checkpoint"
ORBAX_ITEM = "state"
_VERSION = 3
_CHUNK_BYTES = 64 * 2**20  # T5X's own

# ------------------------------------------------------------------------------ The legacy format


def read_legacy(folder: epath.Path) -> tuple[dict[str, LazyArray], int]:
    """Parameters, by T5X's names, and the step of a checkpoint in the legacy format.

    Raises:
      UsageError: It is of another version or damaged.
      OSError: The system does not let it be read.
    """
    file = folder / CHECKPOINT_FILE
    with naming_file(file):
        packed = file.read_bytes()
    try:
        content = _unpacked(packed)
        version, state = content["version"], content["optimizer"]
        step = state["state"]["step"]
        leaves = flax.traverse_util.flatten_dict(
            state["target"], is_leaf=lambda _, x: _is_spec(x), sep="/"
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever msgpack raises on bytes that are none
        raise UsageError(
            f"{file}: expected a T5X checkpoint (msgpack with `version` and `optimizer`): "
            f"{type(error).__name__}: {error!s:.200}."
        ) from error
    if version != _VERSION:
        raise UsageError(f"{file}: expected version {_VERSION}, found {version!r:.60}.")
    step = lazy_arrays.checked_step(step, str(file))
    opened = {
        name: ts.open(_spec(folder, leaf), open=True, read=True)
        for name, leaf in leaves.items()
        if isinstance(leaf, Mapping) and _is_spec(leaf)
    }
    arrays = {}
    for name, leaf in leaves.items():
        source = f"{folder.name}/target.{name.replace('/', '.')}"
        if name in opened:
            try:
                store = opened[name].result()
            except lazy_arrays.STORE_ERRORS as error:
                raise lazy_arrays.damaged(source, error) from error
            array = lazy_arrays.of_store(store, source)
        elif isinstance(leaf, np.ndarray | np.generic):
            array = lazy_arrays.of_array(np.asarray(leaf), f"{file.name}: {name}")
        else:
            raise UsageError(f"{source}: expected an array, or where it is, found {leaf!r:.60}.")
        arrays[name] = array
    lazy_arrays.check_sizes(arrays, folder)
    return arrays, step


def _unpacked(content: bytes) -> Any:
    """What a msgpack file holds: maps, texts, numbers and NumPy arrays, nothing that runs.

    A list is made room for by the length that it states, before its elements are looked for, and
    lists may stand within lists. A first reading refuses long ones, which no checkpoint has: what
    is long in it are maps, which grow, and texts and arrays, which must be in the file. An array is
    a file of its own within it: a list of shape, type and bytes.
    """

    def look(content: bytes, **options: Any) -> None:
        msgpack.unpackb(content, strict_map_key=False, max_array_len=1000, **options)

    look(content, raw=False, ext_hook=lambda code, data: look(data, raw=True))
    return flax.serialization.msgpack_restore(content)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, Mapping) and "driver" in leaf and "kvstore" in leaf


def _spec(folder: epath.Path, leaf: Mapping[str, Any]) -> dict[str, Any]:
    # The bucket and the folder that it was written to are not where it is now.
    kvstore = leaf["kvstore"]
    path = leaf.get("path") or (kvstore.get("path") if isinstance(kvstore, Mapping) else None)
    name = path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else None
    if not lazy_arrays.is_file_name(name):
        raise UsageError(
            f"{folder / CHECKPOINT_FILE}: expected the names of arrays in this directory, found "
            f"{path!r:.60}."
        )
    return {
        "driver": "zarr",
        "kvstore": lazy_arrays.kvstore(folder / str(name)),
        "fill_missing_data_reads": False,  # a lost file is an error, and no zeros
    }


def write_legacy(
    folder: epath.Path,
    arrays: Mapping[str, LazyArray],
    step: int,
    progress: Callable[[Iterable[Any]], Iterator[Any]] = iter,
) -> None:
    """Writes parameters in the legacy format, one after the other.

    Args:
      folder: The checkpoint; it appears when it is whole.
      arrays: The arrays to write, by T5X's names.
      step: Number of updates that the checkpoint states.
      progress: Wraps the sequence of parameters.
    """
    unfinished = files.new_folder_beside(folder)
    try:
        _write_arrays(unfinished, arrays, step, progress)
        unfinished.rename(folder)
    finally:
        if unfinished.exists():
            unfinished.rmtree()


def _write_arrays(
    folder: epath.Path,
    arrays: Mapping[str, LazyArray],
    step: int,
    progress: Callable[[Iterable[Any]], Iterator[Any]],
) -> None:
    leaves = {}
    for name in progress(list(arrays)):
        array = arrays[name]
        path = f"target.{name.replace('/', '.')}"
        metadata = {
            "shape": list(array.shape),
            "chunks": _chunks(array),
            "compressor": {"id": "gzip", "level": 1},
        }
        spec = {"driver": "zarr", "dtype": array.dtype.name, "metadata": metadata}
        store = ts.open(
            spec | {"kvstore": lazy_arrays.kvstore(folder / path)},
            create=True,
            delete_existing=True,
        ).result()
        store.write(array.load()).result()
        leaves[name] = spec | {"kvstore": {"driver": "file", "path": path}}
    content = {
        "version": _VERSION,
        "optimizer": {
            "target": flax.traverse_util.unflatten_dict(leaves, sep="/"),
            "state": {"step": np.int32(step), "param_states": {}},
        },
    }
    packed = flax.serialization.msgpack_serialize(content)
    (folder / CHECKPOINT_FILE).write_bytes(packed)


def _chunks(array: LazyArray) -> list[int]:
    """At most `_CHUNK_BYTES`, by splitting the first axis evenly."""
    num_bytes = math.prod(array.shape) * array.dtype.itemsize
    if not array.shape or num_bytes <= _CHUNK_BYTES:
        return list(array.shape)
    rows = array.shape[0]
    parts = -(-num_bytes // _CHUNK_BYTES)
    parts = next((n for n in range(parts, rows) if rows % n == 0), rows)
    return [rows // parts, *array.shape[1:]]


# ------------------------------------------------------------------------------- Scanned layers

# `scalable_t5` differs from `t5` in three ways: the layers of a stack may be one array, every layer
# has a relative position bias, and the kernels of attention have axes of heads and head_dim.

_SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
_OWN_BIAS = re.compile(r"(encoder|decoder)/layers_\d+/relpos_bias/rel_embedding")
_SCAN_AXIS = 1  # T5X's default, and what is written


def is_scanned(arrays: Mapping[str, LazyArray]) -> bool:
    """Whether the layers of a stack are one array."""
    return any(_SCANNED.fullmatch(name) for name in arrays)


def is_scalable(arrays: Mapping[str, LazyArray]) -> bool:
    """Whether these are parameters of T5X's `scalable_t5` rather than of its `t5`."""
    return any(
        _SCANNED.fullmatch(name) or _OWN_BIAS.fullmatch(name) or _is_split(name, array)
        for name, array in arrays.items()
    )


def from_scalable(
    arrays: Mapping[str, LazyArray], where: str, *, share_biases: bool
) -> dict[str, LazyArray]:
    """Parameters of `scalable_t5`, scanned or not, as those of `t5`.

    Args:
      arrays: By T5X's names.
      where: The checkpoint, for messages.
      share_biases: Whether relative position biases that are the same in all layers become one.

    Raises:
      UsageError: The stacks do not say how many layers they have.
    """
    found = _with_joined_heads(_unstacked(arrays, where))
    return _with_shared_biases(found) if share_biases else found


def _unstacked(arrays: Mapping[str, LazyArray], where: str) -> dict[str, LazyArray]:
    """Scanned layers under names of their own; other arrays as they are."""
    found = {}
    for name, array in arrays.items():
        match = _SCANNED.fullmatch(name)
        if not match:
            found[name] = array
            continue
        stack, rest = match.groups()
        axis = _scan_axis(arrays, stack, where)
        for i in range(lazy_arrays.num_layers_of(array, axis)):
            found[f"{stack}/layers_{i}/{rest}"] = array.at(i, axis)
    return found


def _with_joined_heads(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Kernels of attention as `t5` has them: the axes of heads and head_dim are one."""
    return {
        name: array.merged(_head_axis(name)) if _is_split(name, array) else array
        for name, array in arrays.items()
    }


def _is_split(name: str, array: LazyArray) -> bool:
    return (
        len(array.shape) == 3
        and min(array.shape) > 0
        and re.search(r"attention/(query|key|value|out)/kernel", name) is not None
    )


def _head_axis(name: str) -> int:
    return 0 if name.endswith("/out/kernel") else 1


def _scan_axis(arrays: Mapping[str, LazyArray], stack: str, where: str) -> int:
    """Where the layers are: beside the width of the model in a layer's norm."""
    norm, of_layers = (
        arrays.get(name)
        for name in (f"{stack}/{stack}_norm/scale", f"{stack}/{stack}/pre_mlp_layer_norm/scale")
    )
    shapes = [array.shape for array in (norm, of_layers) if array is not None]
    if norm is None or of_layers is None or list(map(len, shapes)) != [1, 2]:
        raise UsageError(f"{where}: expected T5X's scanned layers, found no norms of the {stack}.")
    return _SCAN_AXIS if of_layers.shape[0] == norm.shape[0] else 0


def _with_shared_biases(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """One relative position bias for a stack, where every layer has the same.

    `scalable_t5` gives each its own, whatever the model; they differ in umT5, and in what was
    trained with it.
    """
    by_stack: dict[str, list[str]] = {"encoder": [], "decoder": []}
    for name in arrays:
        if match := _OWN_BIAS.fullmatch(name):
            by_stack[match[1]].append(name)
    if not all(by_stack.values()):
        return dict(arrays)
    loaded = {name: arrays[name].load() for names in by_stack.values() for name in names}
    for names in by_stack.values():
        if not all(np.array_equal(loaded[name], loaded[names[0]]) for name in names[1:]):
            return dict(arrays)
    shared = {name: array for name, array in arrays.items() if name not in loaded}
    return shared | {
        f"{stack}/relpos_bias/rel_embedding": arrays[names[0]] for stack, names in by_stack.items()
    }


def stacked(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """The parameters as T5X's `scalable_t5` has them with `scan_layers`."""
    num_heads = next(a.shape[0] for name, a in arrays.items() if name.endswith("/rel_embedding"))
    scanned: dict[str, LazyArray] = {}
    layers: dict[str, list[tuple[int, LazyArray]]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(encoder|decoder)/layers_(\d+)/(.+)", name)
        if match:
            stack, i, rest = match.groups()
            if "attention/" in rest:
                array = array.split(_head_axis(name), num_heads)
            layers.setdefault(f"{stack}/{stack}/{rest}", []).append((int(i), array))
        elif not name.endswith("relpos_bias/rel_embedding"):
            scanned[name] = array
    for stack in ("encoder", "decoder"):
        shared = arrays.get(f"{stack}/relpos_bias/rel_embedding")
        if shared is not None:
            depth = max(len(of) for name, of in layers.items() if name.startswith(f"{stack}/"))
            layers[f"{stack}/{stack}/relpos_bias/rel_embedding"] = [
                (i, shared) for i in range(depth)
            ]
    for name, of_layers in layers.items():
        in_order = [array for _, array in sorted(of_layers, key=lambda layer: layer[0])]
        scanned[name] = lazy_arrays.stack(in_order, _SCAN_AXIS)
    return scanned


# ------------------------------------------------------------------------------ The architecture


# Activations that `infer_config` reads off the names of the kernels.
_INFERRED_ACTIVATIONS = (("relu",), ("gelu", "linear"))


def is_inferred(config: NetworkConfig) -> bool:
    """Whether a checkpoint of T5X shows all that this network is."""
    return config.mlp_activations in _INFERRED_ACTIVATIONS


def infer_config(arrays: Mapping[str, LazyArray], where: str) -> T5Config:
    """The network that parameters belong to: a T5X checkpoint does not say.

    Sizes are those of the arrays. `wi` is T5 1.0's relu, `wi_0` and `wi_1` T5 1.1's gated gelu, and
    the output matrix is the embedding where there is no other.

    Raises:
      UsageError: They are not those of a T5.
    """

    def shape(name: str) -> tuple[int, int]:
        if name not in arrays:
            raise UsageError(
                f"{where}: expected the parameters of T5X's T5, found no {name} among "
                f"{len(arrays)} ({', '.join(sorted(arrays)[:4])} ...)."
            )
        found = arrays[name].shape
        if len(found) != 2 or not all(found):
            raise UsageError(f"{where}: expected {name} to be a matrix, found the shape {found}.")
        return found

    per_layer = "encoder/layers_0/relpos_bias/rel_embedding" in arrays
    first = "encoder/layers_0/"
    vocab_size, emb_dim = shape("token_embedder/embedding")
    num_heads, num_buckets = shape(f"{first if per_layer else 'encoder/'}relpos_bias/rel_embedding")
    is_gated = f"{first}mlp/wi_0/kernel" in arrays
    num_layers = {
        stack: len({name.split("/")[1] for name in arrays if name.startswith(f"{stack}/layers_")})
        for stack in ("encoder", "decoder")
    }
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=num_layers["encoder"],
        num_decoder_layers=num_layers["decoder"],
        head_dim=shape(f"{first}attention/query/kernel")[1] // num_heads,
        mlp_dim=shape(f"{first}mlp/wo/kernel")[0],
        mlp_activations=("gelu", "linear") if is_gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in arrays,
        relpos_bias_per_layer=per_layer,
        num_relpos_buckets=num_buckets,
    )


def as_t5x_has_it(
    config: NetworkConfig, arrays: Mapping[str, LazyArray]
) -> tuple[NetworkConfig, dict[str, LazyArray]]:
    """The same function as one of T5X's networks, which tie and scale the output matrix or neither.

    Raises:
      UsageError: T5X has no such network.
    """
    if not isinstance(config, T5Config):
        raise UsageError(
            "--output_format: T5X's formats are for T5, and this is a decoder-only model: choose "
            "huggingface, peft or orbax."
        )
    arrays = dict(arrays)
    if config.logits_via_embedding and not config.scales_logits:
        arrays["decoder/logits_dense/kernel"] = arrays["token_embedder/embedding"].transposed()
        config = dataclasses.replace(config, logits_via_embedding=False, scale_decoder_outputs=None)
    fixed = {"num_relpos_buckets": 32, "relpos_max_distance": 128, "layer_norm_epsilon": 1e-6}
    differing = [
        f"{name} = {getattr(config, name)} instead of {value}"
        for name, value in fixed.items()
        if getattr(config, name) != value
    ]
    if config.scales_logits and not config.logits_via_embedding:
        differing.append("scaled logits of an output matrix of its own")
    if differing:
        raise UsageError(
            f"T5X has no such network ({'; '.join(differing)}): choose --output_format=huggingface "
            "or orbax."
        )
    return config, arrays
