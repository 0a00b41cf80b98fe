"""Tokenised, marked examples in files, made once and read where they lie.

    FOLDER/<key>/about.json    what they were made of, how many there are, and of each file the
                               bytes and, but for rows.bin, the checksum
                 rows.bin      one example after the other: `examples.to_bytes`, the id in UTF-8,
                               and zeros up to a multiple of four bytes
                 offsets.npy   [N + 1] int64: example i is rows.bin[offsets[i] : offsets[i + 1]]
                 digests.npy   [N] uint64: `examples.row_digest`, compared when an example is read
                 columns.npy   [C, N] int32: `examples.COLUMNS`
                 sets.npz      the long sets of ids that rows name, if there are any: `as_arrays`
                 kept_*.npy    what was made of the examples later, such as which share a row; its
                               checksum is in the last four bytes, behind the array

The key is a digest of all that decides what the examples are. The folder appears under its name
when it is whole, and nothing in it changes after that.
"""

import hashlib
import os
import pathlib
import re
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from tnt_jax.data.examples import (
    COLUMNS,
    Example,
    ExampleTable,
    from_bytes,
    has_sets,
    row_digest,
    to_bytes,
)
from tnt_jax.runtime import console, files
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

ABOUT, ROWS, OFFSETS, DIGESTS, COLUMNS_FILE, SETS = (
    *("about.json", "rows.bin", "offsets.npy"),
    *("digests.npy", "columns.npy", "sets.npz"),
)
_CHECKED = (OFFSETS, DIGESTS, COLUMNS_FILE)
_FILES = (ROWS, *_CHECKED)
_AT_A_TIME = 1024  # examples that are read for an iteration


class About(msgspec.Struct):
    """What a folder says of its examples, in `about.json`.

    Attributes:
        num_examples: number of examples in the folder.
        num_spans_without_token: number of spans that touch no token, over all examples.
        least_id: the least id of all inputs, targets and marks; at most 0.
        largest_id: the largest id of all inputs, targets and marks; at least 0.
        bytes: the size of each file, in bytes, by its name.
        checksums: the CRC-32 of each file but `rows.bin`, each of whose rows has a digest.
        of: the JSON value that decides what the examples are (`example_maker.Plan.of`).
    """

    num_examples: int
    num_spans_without_token: int
    least_id: int
    largest_id: int
    bytes: dict[str, int]
    checksums: dict[str, int]
    of: dict[str, Any]


def checksum(path: pathlib.Path, size: int | None = None) -> int:
    """The CRC-32 of the first `size` bytes of a file, or of all; little of it is in memory."""
    found, left = 0, path.stat().st_size if size is None else size
    with path.open("rb") as file, naming_file(path):
        while left > 0 and (content := file.read(min(left, 2**20))):
            found, left = zlib.crc32(content, found), left - len(content)
    return found


class ExampleFiles(ExampleTable):
    """The examples of a folder, or some of them.

    Attributes:
        about: What the folder says of itself.

    Raises:
        UsageError: the folder is damaged.
    """

    def __init__(self, folder: pathlib.Path, indices: np.ndarray | None = None):
        self._folder, self._indices = folder, indices
        try:
            self.about = msgspec.convert(files.read_object(folder / ABOUT), About)
            names = sorted({*_FILES, *self.about.bytes} & {*_FILES, SETS})
            sizes = {name: (folder / name).stat().st_size for name in names}
            sums = {name: checksum(folder / name) for name in names if name != ROWS}
        except (OSError, UsageError, msgspec.ValidationError) as error:
            if (said := system_error(error)) is not None:
                raise said from error
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        if (sizes, sums) != (self.about.bytes, self.about.checksums):
            raise self._damaged(f"files of {sizes} bytes, with the checksums {sums}")
        self._offsets = self._array(OFFSETS, mapped=True)
        self._digests = self._array(DIGESTS, mapped=True)
        self._sets = read_sets(folder / SETS) if SETS in sizes else {}
        if (found := len(self._digests)) != self.about.num_examples:
            raise self._damaged(f"{found} examples, and not {self.about.num_examples}")
        # One for the life of this object: what is open can be read when the folder is gone.
        self._file = os.open(folder / ROWS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._number = self.about.num_examples if indices is None else len(indices)

    def _array(self, name: str, *, mapped: bool = False) -> np.ndarray:
        mode = "r" if mapped else None
        return np.load(self._folder / name, mmap_mode=mode, allow_pickle=False)

    def _damaged(self, found: str) -> UsageError:
        return UsageError(
            f"{self._folder}: expected the examples that were written there, found damage "
            f"({found:.300}). Delete this folder, and they are made again."
        )

    # ---------------------------------------------------------------------------- Single examples

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: Any) -> Any:
        """An example, or a list of those of a slice."""
        if isinstance(index, slice):
            return self.take(np.arange(self._number)[index])
        return self.take(np.array([range(self._number)[index]]))[0]

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, self._number, _AT_A_TIME):
            yield from self[start : start + _AT_A_TIME]

    def take(self, indices: np.ndarray) -> list[Example]:
        """See `ExampleTable.take`.

        Raises:
            UsageError: what is read is not what was written.
        """
        rows = indices if self._indices is None else self._indices[indices]
        starts, ends = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist()
        digests = self._digests[rows]
        found = []
        with naming_file(self._folder / ROWS):
            for start, end, digest in zip(starts, ends, digests.tolist(), strict=True):
                content = os.pread(self._file, end - start, start)
                found.append(self._example(content, digest))
        return found

    def _example(self, content: bytes, digest: int) -> Example:
        try:
            example, size = from_bytes(content, self._sets)
            # The digest is of all marks, however they are stored.
            whole = to_bytes(example) if has_sets(content) else content[:size]
            if row_digest(whole) != digest.to_bytes(8, "little"):
                raise ValueError("other content than its digest is of")
            object.__setattr__(example, "id", content[size:].rstrip(b"\0").decode())
        except ValueError as error:
            raise self._damaged(f"{ROWS}: {error}") from error
        return example

    # ------------------------------------------------------------------------ All of the examples

    def column(self, name: str) -> np.ndarray:
        """See `ExampleTable.column`."""
        column = self._array(COLUMNS_FILE, mapped=True)[COLUMNS.index(name)]
        return np.array(column if self._indices is None else column[self._indices])

    def subset(self, indices: np.ndarray) -> "ExampleFiles":
        """See `ExampleTable.subset`."""
        chosen = indices if self._indices is None else self._indices[indices]
        return ExampleFiles(self._folder, chosen.astype(np.int32))

    def row_digests(self) -> np.ndarray:
        """See `ExampleTable.row_digests`."""
        digests = self._array(DIGESTS)
        return digests if self._indices is None else digests[self._indices]

    def sets(self) -> Mapping[int, np.ndarray]:
        """See `ExampleTable.sets`; of a subset, those of all."""
        return self._sets

    def has_ids_below(self, number: int) -> bool:
        """See `ExampleTable.has_ids_below`."""
        return 0 <= self.about.least_id <= self.about.largest_id < number

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """See `ExampleTable.kept`; mapped, where the folder can be written.

        What is damaged is made again.
        """
        indices = b"" if self._indices is None else self._indices.tobytes()
        key = hashlib.sha256(name.encode() + indices).hexdigest()[:16]
        file = self._folder / f"kept_{re.sub(r'[^a-z]+.*', '', name)}_{key}.npy"
        if _is_whole(file):
            return self._array(file.name, mapped=True)
        if file.exists():
            console.log(f"{file}: expected what was kept there, found damage: it is made again.")
        made = make()
        try:
            with files.replacing(file) as unfinished:
                with unfinished.open("wb") as opened:
                    np.save(opened, made)
                found = checksum(unfinished)
                with unfinished.open("ab") as opened:
                    opened.write(found.to_bytes(_CHECKSUM_BYTES, "little"))
        except OSError:
            return made
        return self._array(file.name, mapped=True)


def write_sets(path: pathlib.Path, sets: Mapping[int, np.ndarray]) -> None:
    """Writes sets of ids, `[K]` int32 each, by their names."""
    names = sorted(sets)
    with path.open("wb") as file:
        np.savez(file, **as_arrays({name: sets[name] for name in names}))  # pyright: ignore


def as_arrays(sets: Mapping[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Sets as arrays: their names, their sizes, and the ids of all, one after another."""
    return {
        "set_names": np.array([*sets], "<u8"),
        "set_sizes": np.array([len(ids) for ids in sets.values()], "<i8"),
        "set_ids": np.concatenate([np.zeros(0, np.int32), *sets.values()]).astype("<i4"),
    }


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The inverse of `as_arrays`."""
    ends = np.cumsum(arrays["set_sizes"])[:-1]
    parts = np.split(arrays["set_ids"], ends) if len(arrays["set_names"]) else []
    return dict(zip(arrays["set_names"].tolist(), parts, strict=True))


def read_sets(path: pathlib.Path) -> dict[int, np.ndarray]:
    """The inverse of `write_sets`."""
    with np.load(path, allow_pickle=False) as arrays:
        return from_arrays(arrays)


_CHECKSUM_BYTES = 4


def _is_whole(file: pathlib.Path) -> bool:
    """Whether a file is there, and ends with the checksum of what is before it."""
    if not file.is_file():
        return False
    size = file.stat().st_size - _CHECKSUM_BYTES
    with file.open("rb") as opened, naming_file(file):
        opened.seek(max(size, 0))
        stated = opened.read(_CHECKSUM_BYTES)
    return size > 0 and int.from_bytes(stated, "little") == checksum(file, size)
