"""GGUF files, as llama.cpp has them: settings, tokenizer and tensors of a model in one.

A file is a header of settings and of the names, shapes, types and places of tensors, and then the
tensors. The header is read here and not by `gguf.GGUFReader`, which believes what a file states: a
count of 2^60 entries or a length beyond the end keeps it busy or is cut in silence; and it maps
local files alone. What the blocks of a quantised type mean is left to that package, which is
imported when a file is opened.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tnt_jax.checkpoints import lazy_arrays, safetensors_files
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# The types of numbers in the header, by the numbers that stand for them.
_NUMBERS = {
    **{0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2")},
    **{4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("?")},
    **{10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")},
}
_UINT32, _STRING, _ARRAY, _UINT64 = 4, 8, 9, 10
_MOST_AXES = 4
_ALIGNMENT = 32  # of tensors, where the header states none
# What an entry takes at least: a name without characters, and what follows it.
_LEAST_BYTES_OF_SETTING = 8 + 4 + 1
_LEAST_BYTES_OF_TENSOR = 8 + 4 + 8 + 4 + 8
_READ_AHEAD = 2**20

QUANTISED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
_TYPES = (*safetensors_files.DTYPES, *QUANTISED)


@dataclasses.dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file.

    Attributes:
      path: The file.
      settings: By their names in the file. An array is a list of strings or a NumPy array.
      tensors: By their names in the file, float32 where they were quantised.
      quantisation: The quantised types, from the one of the most numbers; None where there is none.
    """

    path: epath.Path
    settings: Mapping[str, Any]
    tensors: Mapping[str, LazyArray]
    quantisation: str | None


def is_gguf(path: epath.Path) -> bool:
    """Whether a path is of a file that calls itself GGUF: by its name, or by its first bytes."""
    if not path.is_file():
        return False
    if path.name.lower().endswith(SUFFIX):
        return True
    with path.open("rb") as file, naming_file(path):
        return file.read(len(_MAGIC)) == _MAGIC


def read(path: epath.Path) -> GgufFile:
    """The settings and tensors of a file; elements of tensors are read when they are asked for.

    Raises:
      UsageError: The package `gguf` is missing; the file is none, is damaged, is one part of
        several, or has tensors of a type that is not read.
    """
    types = _types_of_package(path)
    size = files.size_of(path)
    with path.open("rb") as file, naming_file(path):
        header = _Header(file, size)
        try:
            num_tensors, num_settings = _read_start(header)
            settings = _read_settings(header, num_settings)
            entries = _read_entries(header, num_tensors)
            first = _first_tensor(settings, header.position)
        except (ValueError, OverflowError) as error:
            raise UsageError(f"{path}: expected a GGUF file: {error}.") from error
    _check_is_whole(settings, path)
    tensors, numbers_of_type, ends = {}, {}, []
    for name, (shape, number, offset) in entries.items():
        known = types.get(number)
        if known is None:
            raise UsageError(
                f"{path}: expected tensors of type {', '.join(_TYPES)}, found "
                f"{_name_of_type(number)} ({name!r:.80}). Take another quantisation of this model, "
                "or its Hugging Face directory."
            )
        type_name, block, block_bytes = known
        if shape[-1] % block:
            raise UsageError(
                f"{path}: expected {name!r:.80} of type {type_name} to have rows of a multiple of "
                f"{block} numbers, found {shape[-1]:,}: the file is damaged. Copy it again."
            )
        num_bytes = math.prod(shape) // block * block_bytes
        ends.append((offset, offset + num_bytes, name))
        source = f"{path.name}: {name} ({type_name})"
        if type_name in safetensors_files.DTYPES:
            dtype = safetensors_files.DTYPES[type_name]
            tensors[name] = lazy_arrays.of_file(path, first + offset, shape, dtype, source)
            continue
        blocks = lazy_arrays.of_file(
            path,
            first + offset,
            (*(shape[:-1] or (1,)), shape[-1] // block, block_bytes),
            np.dtype(np.uint8),
            source,
        )
        reader = functools.partial(_dequantise, blocks, type_name, block)
        tensors[name] = LazyArray(shape, np.dtype(np.float32), source, reader)
        numbers_of_type[type_name] = numbers_of_type.get(type_name, 0) + math.prod(shape)
    _check_places(ends, size - first, path)
    most_first = sorted(numbers_of_type, key=lambda name: -numbers_of_type[name])
    return GgufFile(path, settings, tensors, " and ".join(most_first) or None)


# ---------------------------------------------------------------------------------- The header


class _Header:
    """Reads a file from its beginning, and no more than it has."""

    def __init__(self, file: Any, size: int):
        self._file, self._size = file, size
        self._ahead, self._start = b"", 0  # what is read already, and where in it to go on
        self.position = 0

    def check(self, count: int, num_bytes: int, what: str) -> None:
        """Raises a ValueError unless `count` of something with so many bytes may still follow."""
        left = self._size - self.position
        if count * num_bytes > left:
            raise ValueError(f"it states {count:,} {what}, where {left:,} bytes are left")

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        if num_bytes > len(self._ahead) - self._start:
            self.check(num_bytes, 1, "bytes")
            kept = self._ahead[self._start :]
            more = self._file.read(max(num_bytes - len(kept), _READ_AHEAD))
            self._ahead, self._start = kept + more, 0
            if num_bytes > len(self._ahead):
                raise ValueError("it has become shorter while it was read")
        self._start += num_bytes
        self.position += num_bytes
        return self._ahead[self._start - num_bytes : self._start]

    def integer(self, kind: int = _UINT32) -> int:
        """The next whole number."""
        return int.from_bytes(self.take(_NUMBERS[kind].itemsize), "little")

    def string(self) -> str:
        """The next string; a UnicodeDecodeError is a ValueError."""
        return self.take(self.integer(_UINT64)).decode()

    def value(self, kind: int) -> Any:
        """The next value of a setting."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return _plain(self.numbers(kind, 1)[0])
        kind, count = self.integer(), self.integer(_UINT64)
        if kind == _STRING:
            self.check(count, 8, "strings")
            return [self.string() for _ in range(count)]
        return self.numbers(kind, count)

    def numbers(self, kind: int, count: int) -> np.ndarray:
        """The next numbers of one type."""
        if kind not in _NUMBERS:
            raise ValueError(f"a value of type {kind}")
        dtype = _NUMBERS[kind]
        self.check(count, dtype.itemsize, "numbers")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)


def _plain(number: np.generic) -> Any:
    """A number as Python has it: a float32 as it is written, so that 1e-05 is that."""
    return float(str(number)) if number.dtype == np.float32 else number.item()


def _read_start(header: _Header) -> tuple[int, int]:
    """The numbers of tensors and settings that a file states."""
    if (magic := header.take(len(_MAGIC))) != _MAGIC:
        raise ValueError(f"it begins with {magic!r}")
    version = header.integer()
    if version not in _VERSIONS:
        found = "of a machine with the other order of bytes" if version % 2**16 == 0 else version
        raise ValueError(f"expected version {' or '.join(map(str, _VERSIONS))}, found {found}")
    num_tensors, num_settings = header.integer(_UINT64), header.integer(_UINT64)
    header.check(num_settings, _LEAST_BYTES_OF_SETTING, "settings")
    header.check(num_tensors, _LEAST_BYTES_OF_TENSOR, "tensors")
    return num_tensors, num_settings


def _read_settings(header: _Header, count: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for _ in range(count):
        name, kind = header.string(), header.integer()
        if name in settings:
            raise ValueError(f"it states {name!r:.80} twice")
        settings[name] = header.value(kind)
    return settings


def _read_entries(header: _Header, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """By the names of tensors: shape, the number of the type, and offset behind the header."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, num_axes = header.string(), header.integer()
        if name in entries:
            raise ValueError(f"it has {name!r:.80} twice")
        if not 1 <= num_axes <= _MOST_AXES:
            raise ValueError(f"{name!r:.80} has {num_axes} axes, and {_MOST_AXES} are the most")
        # The axis whose elements are side by side comes first.
        shape = tuple(header.integer(_UINT64) for _ in range(num_axes))[::-1]
        if not all(shape):
            raise ValueError(f"{name!r:.80} has the shape {shape}")
        number, offset = header.integer(), header.integer(_UINT64)
        entries[name] = (shape, number, offset)
    return entries


def _first_tensor(settings: Mapping[str, Any], end: int) -> int:
    """Where the tensors begin, behind a header that ends at `end`."""
    alignment = settings.get("general.alignment", _ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment > 0 and not alignment & (alignment - 1)
    if not is_power:
        raise ValueError(f"general.alignment is {alignment!r:.40}, which is no power of two")
    return -(-end // alignment) * alignment


def _check_is_whole(settings: Mapping[str, Any], path: epath.Path) -> None:
    parts = settings.get("split.count", 0)
    if parts not in (0, 1):
        raise UsageError(
            f"{path}: expected a whole model, found one of {parts!r:.20} files. llama.cpp joins "
            "them: llama-gguf-split --merge FIRST_FILE WHOLE_FILE."
        )


def _check_places(ends: list[tuple[int, int, str]], size: int, path: epath.Path) -> None:
    """Raises a UsageError unless each tensor lies within the file, and none over another.

    So tensors are no more than the file holds, whatever their shapes promise.
    """
    position = 0
    for start, end, name in sorted(ends):
        if start < position or end > size:
            missing = f"{size:,} bytes are there" if end > size else "another one is there"
            raise UsageError(
                f"{path}: expected {name!r:.80} at bytes {start:,} to {end:,} behind the header, "
                f"where {missing}: the file is cut short or damaged. Copy it again."
            )
        position = end


# ----------------------------------------------------------------------------------- The types


def _types_of_package(path: epath.Path) -> dict[int, tuple[str, int, int]]:
    """By the number of a type that is read: its name, the numbers in a block, and its bytes."""
    try:
        import gguf  # imported when such a file is named, and not for all others
    except ImportError:
        raise UsageError(f"{path}: a GGUF file is read with a package: pip install gguf.") from None
    kinds = {name: gguf.GGMLQuantizationType[name] for name in _TYPES}
    return {int(kind): (name, *gguf.GGML_QUANT_SIZES[kind]) for name, kind in kinds.items()}


def _name_of_type(number: int) -> str:
    import gguf

    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    return known.get(number, f"number {number}")


def _dequantise(
    blocks: LazyArray, type_name: str, block: int, index: lazy_arrays.Index
) -> np.ndarray:
    """A part of a quantised tensor, as float32.

    Args:
      blocks: Its bytes: all axes but the last (one of length 1 for a vector), then blocks, then the
        bytes of each.
      type_name: The quantised type, such as "Q4_K".
      block: How many numbers a block stands for.
      index: The part to read.
    """
    import gguf

    if len(index) == 1:
        return _dequantise(blocks, type_name, block, (slice(0, 1), *index))[0]
    kind = gguf.GGMLQuantizationType[type_name]
    rows, *others, columns = index
    of_row = slice(columns.start // block, -(-columns.stop // block))
    start = columns.start - of_row.start * block
    within = slice(start, start + columns.stop - columns.start)
    part = np.empty([axis.stop - axis.start for axis in index], np.float32)
    for some, *_ in lazy_arrays.parts(part.shape):  # so that little is in memory twice
        places = slice(rows.start + some.start, rows.start + some.stop)
        content = blocks.read((places, *others, of_row, slice(0, blocks.shape[-1])))
        with np.errstate(all="ignore"):  # of damaged files; what is no number is seen later
            numbers = gguf.quants.dequantize(content.reshape(*content.shape[:-2], -1), kind)
        part[some] = numbers[..., within]
    return part
