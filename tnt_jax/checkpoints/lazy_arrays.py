"""Arrays in files: shape and dtype are known, elements are read when they are asked for.

Every checkpoint format is a mapping from T5X's parameter names to such arrays, and every difference
of layout (a transposed matrix, a layer of a scanned stack) is a view of one. So a parameter goes
from a file to the devices, or to another file, without the rest of the model in memory.
"""

import dataclasses
import functools
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath

from tnt_jax.models import sharding
from tnt_jax.models.network_config import MOST_LAYERS
from tnt_jax.runtime import files
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

ITS_OWN_SETTINGS = "its own settings"  # what a checkpoint says, or shows, of its network

Index = tuple[slice, ...]  # one (start, stop) per axis, both given, without steps


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array that is not in memory.

    Attributes:
      shape: The array's shape.
      dtype: The dtype of its elements, as stored.
      source: Where it is, for people: a file and the name in it.
      read: Reads a part, `read(index)`, into new memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    source: str
    read: Callable[[Index], np.ndarray]

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        """The elements of `index`, slices without steps, as `jax.make_array_from_callback` asks."""
        whole = [slice(*part.indices(n)) for part, n in zip(index, self.shape, strict=True)]
        assert all(part.step == 1 for part in whole), index
        return self.read(tuple(slice(part.start, part.stop) for part in whole))

    def load(self) -> np.ndarray:
        """The whole array."""
        return self[(slice(None),) * len(self.shape)]

    def transposed(self) -> "LazyArray":
        """The same elements with the order of the axes reversed."""
        return dataclasses.replace(
            self,
            shape=self.shape[::-1],
            read=lambda index: _copied(self.read(index[::-1]).T, self.dtype),
        )

    def at(self, position: int, axis: int) -> "LazyArray":
        """One layer of a stack: the axis is dropped."""
        shape = (*self.shape[:axis], *self.shape[axis + 1 :])
        read = functools.partial(self._read_at, position, axis)
        return LazyArray(shape, self.dtype, f"{self.source}, layer {position}", read)

    def _read_at(self, position: int, axis: int, index: Index) -> np.ndarray:
        part = self.read((*index[:axis], slice(position, position + 1), *index[axis:]))
        return np.ascontiguousarray(part.squeeze(axis))

    def merged(self, axis: int) -> "LazyArray":
        """Two axes as one, the elements of the second next to each other."""
        outer, inner = self.shape[axis : axis + 2]

        def read(index: Index) -> np.ndarray:
            start, stop = index[axis].start, index[axis].stop
            rows = slice(start // inner, -(-stop // inner))
            part = self.read((*index[:axis], rows, slice(0, inner), *index[axis + 1 :]))
            part = part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :])
            first = start - rows.start * inner
            return part.take(range(first, first + stop - start), axis)

        shape = (*self.shape[:axis], outer * inner, *self.shape[axis + 2 :])
        return dataclasses.replace(self, shape=shape, read=read)

    def split(self, axis: int, outer: int) -> "LazyArray":
        """One axis as two, the reverse of `merged`."""
        inner = self.shape[axis] // outer

        def read(index: Index) -> np.ndarray:
            rows, within = index[axis], index[axis + 1]
            joined = slice(rows.start * inner, rows.stop * inner)
            part = self.read((*index[:axis], joined, *index[axis + 2 :]))
            part = part.reshape(*part.shape[:axis], -1, inner, *part.shape[axis + 1 :])
            return part.take(range(within.start, within.stop), axis + 1)

        shape = (*self.shape[:axis], outer, inner, *self.shape[axis + 1 :])
        return dataclasses.replace(self, shape=shape, read=read)

    def reordered(self, axis: int, order: np.ndarray) -> "LazyArray":
        """The same parts along an axis in another order: the one at `i` was at `order[i]`."""

        def read(index: Index) -> np.ndarray:
            wanted = order[index[axis]]
            first, last = int(wanted.min()), int(wanted.max())
            part = self.read((*index[:axis], slice(first, last + 1), *index[axis + 1 :]))
            return part.take(wanted - first, axis)

        return dataclasses.replace(self, read=read)

    def astype(self, dtype: np.dtype) -> "LazyArray":
        """The same elements, converted when they are read."""
        if dtype == self.dtype:
            return self
        return dataclasses.replace(
            self, dtype=dtype, read=lambda index: _copied(self.read(index), dtype)
        )


def parts(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Indices that go through an array in rows, of some 16 million numbers at a time."""
    if not shape:
        yield ()
        return
    rows = max(1, 2**24 // max(1, math.prod(shape[1:])))
    rest = (slice(None),) * (len(shape) - 1)
    yield from ((slice(i, min(i + rows, shape[0])), *rest) for i in range(0, shape[0], rows))


def _copied(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy, in pages of its own.

    They go back to the system when it is dropped. Blocks of malloc would lie between those of the
    parameters and stay: 0.4 GB while a T5-large is read.
    """
    num_bytes = array.size * np.dtype(dtype).itemsize
    copy = np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype, array.size).reshape(array.shape)
    copy[...] = array
    return copy


def of_array(array: np.ndarray, source: str) -> LazyArray:
    """An array in memory as a `LazyArray`."""
    return LazyArray(array.shape, array.dtype, source, lambda index: np.array(array[index]))


def of_file(
    path: epath.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, source: str
) -> LazyArray:
    """A view of the array whose elements begin at an offset of a file, row after row."""
    return LazyArray(
        shape, dtype, source, functools.partial(_read_file, path, offset, shape, dtype)
    )


def _read_file(
    path: epath.Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    """A part of the array that begins at an offset: its rows are read, and the part is of them."""
    if not shape:  # one number, which has no rows
        return _read_file(path, offset, (1,), dtype, (slice(0, 1),)).reshape(())
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


# What TensorStore raises, for whatever reason.
STORE_ERRORS = (ValueError, TypeError, IndexError, NotImplementedError)


def of_store(store: ts.TensorStore, source: str) -> LazyArray:
    """A view of an array that TensorStore has opened.

    Raises:
      UsageError: It is read in pieces that are larger than the array.
    """
    dtype = store.dtype.numpy_dtype
    chunk = store.chunk_layout.read_chunk.shape or ()
    of_chunk = math.prod(size or 1 for size in chunk) * dtype.itemsize
    of_array = math.prod(store.shape) * dtype.itemsize
    if of_chunk > max(of_array, _SMALL_BYTES):
        raise UsageError(
            f"{source}: expected chunks of at most {of_array:,} bytes, as the array has, found "
            f"{of_chunk:,}; the checkpoint is damaged."
        )
    read = functools.partial(_read_store, store, source)
    return LazyArray(tuple(store.shape), dtype, source, read)


def _read_store(store: ts.TensorStore, source: str, index: Index) -> np.ndarray:
    try:
        return store[index].read().result()
    except STORE_ERRORS as error:
        raise damaged(source, error) from error


def damaged(source: str, error: Exception) -> Exception:
    """What to raise where TensorStore cannot open or read an array."""
    return system_error(error) or UsageError(
        f"{source}: {first_line(error)}; the checkpoint is damaged."
    )


def is_file_name(name: Any) -> bool:
    """Whether a name that a file states is that of a file beside it, and leads nowhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and len(name) <= 255
        and not set(name) & set("/\\\0")
    )


_MOST_COMPRESSION = 1000  # constants take less, but no model is made of them
_SMALL_BYTES = 2**26


def check_sizes(arrays: Mapping[str, LazyArray], folder: epath.Path) -> None:
    """Compares what arrays would take in memory with the files that they are in.

    A shape is a few bytes of text, whatever it promises: it is believed as far as files can hold
    so much, compressed. Local files alone are counted.

    Raises:
      UsageError: They cannot.
    """
    if files.is_remote(folder):
        return
    stated = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
    if stated <= _SMALL_BYTES:
        return
    found = sum(map(os.path.getsize, files.files_below(folder)))
    if stated > found * _MOST_COMPRESSION:
        raise UsageError(
            f"{folder}: its arrays should take {stated:,} bytes, and its files have {found:,}: "
            "they are damaged, or not all of them are there."
        )


def check_types(arrays: Mapping[str, LazyArray]) -> None:
    """Raises a UsageError unless every array is float32 or bfloat16."""
    for array in arrays.values():
        if array.dtype not in (np.float32, jnp.bfloat16):
            raise UsageError(
                f"{array.source:.200}: expected float32 or bfloat16, found {array.dtype!s:.60}."
            )


def kvstore(folder: epath.Path) -> dict[str, Any] | str:
    """How TensorStore names a directory."""
    path = os.fspath(folder).rstrip("/") + "/"
    return path if files.is_remote(path) else {"driver": "file", "path": path}


def first_line(error: Exception) -> str:
    """What TensorStore says, without where in its source it says so, and its settings."""
    text = str(error).splitlines()[0]
    return re.split(r" \[(?:source locations|tensorstore_spec)", text)[0].rstrip(".")


def stack(arrays: Sequence[LazyArray], axis: int) -> LazyArray:
    """Arrays of one shape, side by side along a new axis; of several types, with a common one."""
    first = arrays[0]
    assert all(a.shape == first.shape for a in arrays), first.source
    dtype = np.result_type(*(a.dtype for a in arrays))

    def read(index: Index) -> np.ndarray:
        rest = (*index[:axis], *index[axis + 1 :])
        parts = [array.read(rest).astype(dtype, copy=False) for array in arrays[index[axis]]]
        return np.stack(parts, axis)

    shape = (*first.shape[:axis], len(arrays), *first.shape[axis:])
    return LazyArray(shape, dtype, f"{first.source}, and {len(arrays) - 1} more", read)


# The layers of a network with `scan_layers`, and its layers apart: two names of the same.
_STACKED = re.compile(r"(encoder|decoder)/layers/(.+)")


def layers_apart(arrays: Mapping[str, LazyArray]) -> dict[str, LazyArray]:
    """Every layer of a stack under a name of its own, as `parameters.unstack_layers` has it."""
    apart = {}
    for name, array in arrays.items():
        if match := _STACKED.fullmatch(name):
            stack_name, rest = match.groups()
            for i in range(num_layers_of(array, 0)):
                apart[f"{stack_name}/layers_{i}/{rest}"] = array.at(i, 0)
        else:
            apart[name] = array
    return apart


def checked_step(step: Any, where: str) -> int:
    """The step that a checkpoint states, as a number or an array of one.

    Raises:
      UsageError: It is none that a run can have come to.
    """
    array = np.asarray(step) if isinstance(step, int | np.ndarray | np.generic) else np.zeros(0)
    if array.size != 1 or array.dtype.kind not in "iu" or not 0 <= array.item() <= _LAST_STEP:
        raise UsageError(
            f"{where}: expected a step, a whole number from 0 to {_LAST_STEP:,}, found "
            f"{step!r:.60}."
        )
    return int(array.item())


_LAST_STEP = 2**31 - 1  # it is counted in 32 bits


def num_layers_of(array: LazyArray, axis: int) -> int:
    """The length of an axis of layers.

    Raises:
      UsageError: There is no such axis, or no network has as many layers.
    """
    num_layers = array.shape[axis] if axis < len(array.shape) else 0
    if not 1 <= num_layers <= MOST_LAYERS:
        raise UsageError(
            f"{array.source}: expected axis {axis} to be of layers, 1 to {MOST_LAYERS:,} of them; "
            f"found the shape {array.shape}."
        )
    return num_layers


def laid_out(arrays: Mapping[str, LazyArray], abstract: PyTree) -> dict[str, LazyArray]:
    """Arrays with layers apart, under the names and with the types of a tree of parameters."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(abstract):
        name = sharding.path_name(path)
        if match := _STACKED.fullmatch(name):
            stack_name, rest = match.groups()
            layers = [
                arrays[f"{stack_name}/layers_{i}/{rest}"].astype(leaf.dtype)
                for i in range(leaf.shape[0])
            ]
            found[name] = stack(layers, 0)
        else:
            found[name] = arrays[name].astype(leaf.dtype)
    return found


def check(arrays: Mapping[str, LazyArray], abstract: PyTree, where: str, setting: str) -> None:
    """Compares stored arrays with the parameters of a model and names all differences at once.

    Args:
      arrays: By name, as "encoder/encoder_norm/scale".
      abstract: A tree of anything with shapes.
      where: The checkpoint, for the message.
      setting: What says how the model should be.

    Raises:
      UsageError: Something is missing, unexpected or of another shape.
    """
    differences = differences_of(
        {name: array.shape for name, array in arrays.items()}, shapes(abstract)
    )
    if differences:
        raise UsageError(mismatch(where, setting, differences))


def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, by its name: "encoder/encoder_norm/scale"."""
    # Names alone: Orbax reads named tuples back as dicts, and tuples as lists.
    return {
        sharding.path_name(path): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def differences_of(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What two sets of named shapes do not share, in words."""
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is unexpected" for name in found if name not in expected),
        *(
            f"{name} is {found[name]} instead of {expected[name]}"
            for name in expected
            if name in found and found[name] != expected[name]
        ),
    ]


def mismatch(where: str, setting: str, differences: Sequence[str]) -> str:
    """The message about a checkpoint of another model."""
    advice = f"change {setting}, or the path"
    if setting == ITS_OWN_SETTINGS:
        advice = "it is damaged, or of another architecture than its settings say"
    shown = [f"{difference:.200}" for difference in differences[:_MOST_SHOWN]]
    if more := len(differences) - len(shown):
        shown.append(f"and {more} more")
    return (
        f"the checkpoint {where} does not fit {setting}: {'; '.join(shown)}. Expected a "
        f"checkpoint of the same sizes: {advice}."
    )


_MOST_SHOWN = 20  # of what differs between a checkpoint and a model: the rest is more of the same


def restore(arrays: Mapping[str, LazyArray], abstract: PyTree) -> PyTree:
    """Reads parameters, one after the other, each straight to the devices that hold it.

    Beside what the devices of this host hold, one parameter is in memory; of one that is sharded
    and larger than `_MOST_AT_ONCE`, one part.

    Args:
      arrays: By name, from `laid_out`.
      abstract: Shapes, dtypes and shardings to restore to.
    """
    leaves, treedef = jax.tree.flatten_with_path(abstract)
    restored: dict[str, jax.Array] = {}
    by_name = {sharding.path_name(path): leaf for path, leaf in leaves}
    # In the order of the files: the layers of a scanned stack come from one array.
    for name in sorted(by_name, key=lambda name: arrays[name].source):
        leaf = by_name[name]
        read = _reader(arrays[name], leaf.sharding)
        placed = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
        restored[name] = placed.block_until_ready()
    return jax.tree.unflatten(treedef, [restored[name] for name in by_name])


_MOST_AT_ONCE = 2**33  # bytes


def _reader(array: LazyArray, place: jax.sharding.Sharding) -> Callable[[Any], np.ndarray]:
    """Gives parts of an array to the devices of this host, and reads the file once for all of them.

    Files are read in rows. Devices that hold columns would each have all rows read.
    """
    indices = place.addressable_devices_indices_map(array.shape).values()
    parts = {
        tuple(part.indices(n)[:2] for part, n in zip(index, array.shape, strict=True))
        for index in indices
        if index is not None
    }
    box = tuple(
        slice(min(start for start, _ in axis), max(stop for _, stop in axis))
        for axis in zip(*parts, strict=True)
    )
    num_bytes = math.prod(axis.stop - axis.start for axis in box) * array.dtype.itemsize
    if len(parts) < 2 or num_bytes > _MOST_AT_ONCE:
        return array.__getitem__

    @functools.cache
    def whole() -> np.ndarray:
        return array[box]

    def read(index: Any) -> np.ndarray:
        wanted = (part.indices(n) for part, n in zip(index, array.shape, strict=True))
        return whole()[
            tuple(
                slice(start - of.start, stop - of.start)
                for (start, stop, _), of in zip(wanted, box, strict=True)
            )
        ]

    return read
