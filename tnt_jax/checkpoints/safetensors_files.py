"""Directories of safetensors files: tensors by their names, whichever network they are of."""

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
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_SHARD_BYTES = 5 * 10**9

# --------------------------------------------------------------------------------- Reading


def hub_name(folder: epath.Path) -> tuple[str, str] | None:
    """The hub's name and revision of a model that lies in its cache; None for any other folder."""
    match = re.search(r"/models--([^/]+)/snapshots/([0-9a-f]{40})/?$", os.fspath(folder))
    return (match[1].replace("--", "/"), match[2]) if match else None  # no name on the hub has "--"


def read_directory(folder: epath.Path, auto_class: str) -> dict[str, LazyArray]:
    """The tensors of a directory's safetensors files.

    Args:
      folder: The directory.
      auto_class: The class of transformers that loads such a model, for messages.

    Raises:
      UsageError: There are none, or they are incomplete or damaged.
    """
    if (folder / WEIGHTS).exists():
        return read(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        found = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".msgpack")]
        name = hub_name(folder)
        # A model of the hub was downloaded without weights of another kind: by its name, then.
        given = os.fspath(folder) if name is None else name[0]
        made = f"{given}-safetensors" if name is None else f"{given.rpartition('/')[2]}-safetensors"
        raise UsageError(
            f"{given}: expected {WEIGHTS} (or {INDEX} and its shards), found "
            f"{', '.join(sorted(found)) or 'no weights'}. Where transformers and torch are "
            "installed, this converts it, into a directory to give in its place: python -c "
            f'"from transformers import {auto_class} as M, AutoTokenizer as T; '
            f"[x.from_pretrained('{given}').save_pretrained('{made}') for x in (M, T)]\""
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
        in_shard = read(folder / shard)
        absent = [name for name in names if name not in in_shard]
        if absent:
            raise UsageError(
                f"{folder / shard}: {INDEX} promises {', '.join(absent[:4])} here"
                f"{f' and {len(absent) - 4} more' if len(absent) > 4 else ''}; not found."
            )
        stored |= in_shard
    return stored


_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it

# The types of parameters that networks are trained in.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}


def read(path: epath.Path) -> dict[str, LazyArray]:
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
    other = {kind for kind, *_ in entries.values() if kind not in DTYPES}
    if other:
        named = next(name for name, (kind, *_) in entries.items() if kind in other)
        raise UsageError(
            f"{path}: expected numbers of type F32, BF16 or F16, found {', '.join(sorted(other))} "
            f"({named}). Take the files of this model in one of these types."
        )
    arrays = {}
    for name, (kind, shape, start, end) in entries.items():
        dtype = DTYPES[kind]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise UsageError(
                f"{path}: {name} of shape {shape} and type {kind} cannot fill {end - start} bytes: "
                "the file is damaged. Copy it again."
            )
        source = f"{path.name}: {name}"
        arrays[name] = lazy_arrays.of_file(path, first + start, shape, dtype, source)
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


# --------------------------------------------------------------------------------- Writing


def write_directory(
    folder: epath.Path,
    stored: Mapping[str, LazyArray],
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    progress: Callable[[Sequence[Any]], Iterator[Any]] = iter,
) -> None:
    """Writes tensors as safetensors, with an index where they take more than one file.

    In memory is one file's part of them.

    Args:
      folder: An existing local directory.
      stored: The tensors, by the names that they get.
      max_shard_bytes: Most bytes of one file, unless a single tensor is larger.
      progress: Wraps the sequence of files.
    """
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
        save(folder / shard, tensors)
    if len(shards) > 1:
        total = sum(_num_bytes(array) for array in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(files.json_text(index))


def save(path: epath.Path, tensors: Mapping[str, np.ndarray]) -> None:
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


def are_equal(one: LazyArray, other: LazyArray) -> bool:
    """Whether two matrices are the same."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return all(np.array_equal(one[part], other[part]) for part in lazy_arrays.parts(one.shape))
