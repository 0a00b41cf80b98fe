"""Tokenised, marked examples in files, made once and read where they lie.

    FOLDER/<key>/about.json    what they were made of, how many there are, the bytes of each file
                 rows.bin      one example after the other: `examples.to_bytes`, the id in UTF-8,
                               and zeros up to a multiple of four bytes
                 offsets.npy   [N + 1] int64: example i is rows.bin[offsets[i] : offsets[i + 1]]
                 digests.npy   [N] uint64: `examples.row_digest`, compared when an example is read
                 columns.npy   [C, N] int32: `examples.COLUMNS`
                 sets.npz      the long sets of ids that rows name, if there are any: `as_arrays`
                 kept_*.npy    what was made of the examples later, such as which share a row

The key is a digest of all that decides what the examples are. The folder appears under its name
when it is whole, and nothing in it changes after that.
"""

import hashlib
import os
import pathlib
import re
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

ABOUT, ROWS, OFFSETS, DIGESTS, COLUMNS_FILE, SETS = (
    *("about.json", "rows.bin", "offsets.npy"),
    *("digests.npy", "columns.npy", "sets.npz"),
)
_AT_A_TIME = 1024  # examples that are read for an iteration


class ExampleFiles(ExampleTable):
    """The examples of a folder, or some of them.

    Attributes:
        about: What the folder says of itself.

    Raises:
        UsageError: the folder is damaged.
    """

    def __init__(self, folder: pathlib.Path, indices: np.ndarray | None = None):
        self._folder, self._indices = folder, indices
        self.about: Mapping[str, Any] = files.read_object(folder / ABOUT, "stored examples")
        try:
            sizes = {name: (folder / name).stat().st_size for name in self.about["bytes"]}
            number = self.about["num_examples"]
            self._offsets = self._array(OFFSETS, mapped=True)
            self._digests = self._array(DIGESTS, mapped=True)
            is_whole = sizes == self.about["bytes"] and len(self._offsets) == number + 1
            has_sets_file = is_whole and SETS in sizes
            self._sets = read_sets(folder / SETS) if has_sets_file else {}
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            if (said := system_error(error)) is not None:
                raise said from error
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        if not is_whole:
            raise self._damaged(f"files of {sizes} bytes")
        # One for the life of this object: what is open can be read when the folder is gone.
        self._file = os.open(folder / ROWS, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._number = number if indices is None else len(indices)

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
        return 0 <= self.about["least_id"] <= self.about["largest_id"] < number

    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """See `ExampleTable.kept`; mapped, where the folder can be written."""
        indices = b"" if self._indices is None else self._indices.tobytes()
        key = hashlib.sha256(name.encode() + indices).hexdigest()[:16]
        file = self._folder / f"kept_{re.sub(r'[^a-z]+.*', '', name)}_{key}.npy"
        if not file.exists():
            made = make()
            try:
                with files.replacing(file) as unfinished, unfinished.open("wb") as opened:
                    np.save(opened, made)
            except OSError:
                return made
        try:
            return self._array(file.name, mapped=True)
        except ValueError as error:
            raise UsageError(f"{file}: {error}. Delete it, and it is made again.") from error


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
