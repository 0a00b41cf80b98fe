"""The original's states of a data set, computed once and kept in files.

They are those of its decoder and, where the last layers alone are trained, those that enter these
layers. They depend on the original and on an example's tokens alone: not on marks, objective,
weight, batch size or packing. So one folder serves every run of a sweep, several data sets may
share it, and what a stopped run has computed is there for the next one.

    FOLDER/<original>/part_<keys>.npy    [tokens, E], one example after the other
    FOLDER/<original>/part_<keys>.json   {"keys": {key of an example: [first row, number of rows]}}

A part is there when its JSON is: both files are written beside their place and renamed, that last.
It is named after what is in it, so that two runs at once may write the same folder. States keep the
dtype that they were computed in; bfloat16 is stored as its bits.

A billion tokens are 15,000 parts, and a process may have 1,024 files open. So a part is opened when
rows of it are read, and closed again: once for all its rows in a batch.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from io import BufferedReader

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tnt_jax.data.batches import batch_for_eval
from tnt_jax.data.examples import Example, lengths_of, take
from tnt_jax.data.layouts import ENCODER_DECODER, FeatureLayout, Place
from tnt_jax.runtime import console, files
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

TARGETS = "decoder_target_tokens"  # the feature of tokens that the decoder's states lie like

_TOKENS_PER_PART = 65_536  # 128 MiB at width 512: what is lost at most when a run is stopped
_KEYS_AT_A_TIME = 65_536  # of examples that are looked for: hosts ask each other what they lack


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """A file of states.

    Attributes:
      index: The JSON file beside it.
      offset: Bytes before the first row.
      num_rows: States in the file, one for each token.
      width: Numbers in a state.
      dtype: Dtype of a state.
    """

    index: pathlib.Path
    offset: int
    num_rows: int
    width: int
    dtype: np.dtype

    @classmethod
    def opened(cls, index: pathlib.Path, dtype: str) -> "_Part":
        """Reads what the file says of itself.

        Raises:
          ValueError: It is no array of that dtype, or its shape is not that of the file.
        """
        # Maps the file: a shape that it is too short for is refused, and no object is made.
        array = np.lib.format.open_memmap(index.with_suffix(".npy"), mode="r")
        stored = {"bfloat16": "uint16"}.get(dtype, dtype)
        is_stored_so = array.dtype == stored and array.ndim == 2 and array.flags.c_contiguous
        if dtype not in ("float32", "bfloat16") or not is_stored_so or array.shape[1] == 0:
            raise ValueError(f"{dtype!r:.60} as {array.dtype} of shape {array.shape}")
        return cls(
            index=index,
            offset=array.offset,
            num_rows=array.shape[0],
            width=array.shape[1],
            dtype=jnp.dtype(dtype),
        )

    def read(self, file: BufferedReader, first: int, rows: np.ndarray) -> None:
        """Fills rows, one after the other in memory, from those that begin with `first`."""
        row_bytes = self.width * self.dtype.itemsize
        with naming_file(file.name):
            file.seek(self.offset + first * row_bytes)
            num_read = file.readinto(rows.view(np.uint8).data)
        if num_read != rows.nbytes:
            raise _damaged(self.index, f"{num_read} of {rows.nbytes} bytes from row {first} on")

    @property
    def kind(self) -> tuple[int, np.dtype]:
        """The width and dtype of its states, which all parts have in common."""
        return self.width, self.dtype


def _damaged(index: pathlib.Path, found: object) -> UsageError:
    """The message about a part that has to be computed again."""
    return UsageError(
        f"{index}: expected states of the original, with a file .npy beside it, found {found}. "
        "Delete both: they will be computed again."
    )


class OriginalStates:
    """The states of one original in a folder.

    Args:
      folder: A folder on this host's disk, or shared by all hosts; made if need be.
      identity: A text that tells the original, and how it is computed, from others.
      task_feature_lengths: Where "inputs" and "targets" are cut.
      feature_layout: The layout of features of the original's network.
      like: The feature of tokens with the same positions: there is a state for each target token,
        or for each position of those that `feature_layout` counts first.

    Raises:
      UsageError: The folder is in a bucket, or a part of it is damaged.
      OSError: The system does not let a part be read.
    """

    def __init__(
        self,
        folder: str,
        identity: str,
        task_feature_lengths: Mapping[str, int],
        feature_layout: FeatureLayout = ENCODER_DECODER,
        *,
        like: str = TARGETS,
    ):
        check_is_local(folder)
        self.folder = pathlib.Path(folder).expanduser() / re.sub(r"\W+", "-", identity)
        self._lengths = dict(task_feature_lengths)
        self._layout = feature_layout
        self.like = like
        self._parts: list[_Part] = []
        self._rows: dict[str, tuple[int, int, int]] = {}  # part, first row, number of rows
        self._kept: dict[str, np.ndarray] = {}  # not yet written
        # `glob` of Python 3.12 finds nothing where the system does not let the folder be read.
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []  # noqa: PTH208
        for name in names:
            if name.startswith("part_") and name.endswith(".json"):
                self._add(self.folder / name)

    def _add(self, index: pathlib.Path) -> None:
        try:
            about = files.read_object(index)
            with naming_file(index.with_suffix(".npy")):
                part = _Part.opened(index, about["dtype"])
            rows = {
                key: (len(self._parts), first, number)
                for key, (first, number) in about["keys"].items()
            }
            if not all(
                type(first) is type(number) is int and 0 <= first <= first + number <= part.num_rows
                for _, first, number in rows.values()
            ):
                raise ValueError(f"rows that an array of {part.num_rows} has not")
            if self._parts and part.kind != self._parts[0].kind:
                raise ValueError(
                    f"{part.dtype}s of width {part.width}, where {self._parts[0].index} has "
                    f"{self._parts[0].dtype}s of width {self._parts[0].width}"
                )
        except MemoryError:
            raise
        except Exception as error:  # of whatever kind: Python parses the head of an array
            if (said := system_error(error)) is not None:  # and nothing about what is in the files
                raise said from error
            raise _damaged(index, f"{type(error).__name__}: {error!s:.300}") from error
        self._rows |= rows
        self._parts.append(part)

    def key(self, example: Example) -> str:
        """A name for the tokens that the states depend on."""
        kept = self._layout.cut_input(
            example.inputs, self._lengths["inputs"], example.keeps_last_input
        )
        inputs = np.ascontiguousarray(kept, "<i4")
        targets = np.ascontiguousarray(example.targets[: self._lengths["targets"]], "<i4")
        hashed = hashlib.sha256(f"{len(inputs)} ".encode() + inputs.tobytes() + targets.tobytes())
        return hashed.hexdigest()[:32]

    def missing(self, keys: Collection[str]) -> set[str]:
        """The keys that have no states; the same on every host."""
        is_missing: np.ndarray = np.array([key not in self._rows for key in keys], bool)
        if jax.process_count() > 1:  # every host has to take part in computing any
            is_missing = np.any(multihost_utils.process_allgather(is_missing), axis=0)
        return {key for key, absent in zip(keys, is_missing.tolist(), strict=True) if absent}

    def batch(
        self, examples: Sequence[Example], batch_size: int, num_shared: int
    ) -> dict[str, np.ndarray]:
        """The features of examples, each in a row of its own; what is left of it is filled up.

        They are those without marks: however many there are, all batches have one shape.

        Args:
          examples: At most `batch_size` of them.
          batch_size: Rows.
          num_shared: Tokens that their rows begin with; each number is another shape.
        """
        pairs = np.zeros((0, 2), np.int32)
        unmarked = [
            dataclasses.replace(each, negative_pairs=pairs, negative_strengths=None, sets=())
            for each in examples
        ]
        lengths, layout = self._lengths, self._layout
        (found,) = batch_for_eval(
            unmarked, batch_size, lengths, feature_layout=layout, num_shared=num_shared
        )
        return found

    def num_shared(self, examples: Sequence[Example]) -> int:
        """The number of tokens that the rows of examples begin with."""
        return self._layout.num_shared(examples, self._lengths)

    def keep(self, examples: Sequence[Example], states: np.ndarray) -> None:
        """Keeps the states `[B, T, E]` of the first rows of a batch, each an example of its own.

        They are written when there are enough of them, or by `flush`.
        """
        for row, example in enumerate(examples):
            if (key := self.key(example)) not in self._rows:
                self._kept[key] = states[row, : self._num_states(example)].copy()  # not the batch
        if sum(map(len, self._kept.values())) >= _TOKENS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Writes what is kept and not yet written."""
        if self._kept:
            self._write(self._kept)
            self._kept = {}

    def _num_states(self, example: Example) -> int:
        sizes = self._layout.sizes(lengths_of([example]), self._lengths)
        return int(sizes[0, int(self.like == TARGETS)])

    def _write(self, kept: Mapping[str, np.ndarray]) -> None:
        name = hashlib.sha256(" ".join(kept).encode()).hexdigest()[:16]
        index = self.folder / f"part_{name}.json"
        if index.exists():  # another host was quicker; what it wrote may be in use
            self._add(index)
            return
        ends = np.cumsum([len(states) for states in kept.values()]).tolist()
        starts = [0, *ends[:-1]]
        array = np.concatenate(list(kept.values()))
        is_bfloat16 = array.dtype == jnp.bfloat16
        with (
            files.replacing(index.with_suffix(".npy")) as unfinished,
            unfinished.open("wb") as file,
        ):
            np.save(file, array.view(np.uint16) if is_bfloat16 else array)
        keys = {
            key: [start, end - start] for key, start, end in zip(kept, starts, ends, strict=True)
        }
        with files.replacing(index) as unfinished:
            unfinished.write_text(json.dumps({"dtype": str(array.dtype), "keys": keys}), "utf-8")
        self._add(index)

    def of(self, example: Example) -> np.ndarray:
        """States `[number of tokens, E]` of an example, read from the file."""
        _, _, number = self._place(example)
        return self.feature([(example, 0, 0)], (1, number))[0]

    def _place(self, example: Example) -> tuple[int, int, int]:
        """The part where an example is, its first row, and the number of rows."""
        place = self._rows[self.key(example)]
        number = self._num_states(example)
        if place[2] != number:
            index = self._parts[place[0]].index
            raise _damaged(index, f"{place[2]} states of an example with {number} tokens")
        return place

    def of_batch(
        self, batch: Mapping[str, np.ndarray], placed: Iterable[tuple[Example, Place]]
    ) -> np.ndarray:
        """The states of a batch of features, whose examples lie where they are placed."""
        starts = [
            (example, at.row, at.target_offset if self.like == TARGETS else at.input_offset)
            for example, at in placed
        ]
        return self.feature(starts, batch[self.like].shape)

    def of_rows(self, examples: Iterable[Example], shape: tuple[int, int]) -> np.ndarray:
        """`feature` where each example has a row of its own, in their order."""
        return self.feature(((example, row, 0) for row, example in enumerate(examples)), shape)

    def feature(
        self,
        placed: Iterable[tuple[Example, int, int]],
        shape: tuple[int, int],
    ) -> np.ndarray:
        """The states of a batch `[B, T, E]`, 0 at padding.

        Args:
          placed: Each example with its row and the position where its states begin.
          shape: `B` and `T`.

        Raises:
          UsageError: A part has become shorter since it was looked at.
          OSError: The system does not let it be read.
        """
        width, dtype = self._parts[0].kind
        states = np.zeros((*shape, width), dtype)
        wanted = sorted((*self._place(example), row, start) for example, row, start in placed)
        for number, of_part in itertools.groupby(wanted, key=operator.itemgetter(0)):
            part = self._parts[number]
            with part.index.with_suffix(".npy").open("rb") as file:
                for _, first, count, row, start in of_part:
                    assert start + count <= shape[1], "examples are placed within a batch"
                    part.read(file, first, states[row, start : start + count])
        return states


def compute(
    stores: Mapping[str, OriginalStates],
    data: Sequence[Sequence[Example]],
    states_of: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]],
    batch_size: int,
) -> None:
    """Computes and keeps the states of the examples that lack some.

    No more examples are in memory than a batch has, where data sets are read from files.

    Args:
      stores: By the names of their features; of one network, with the same lengths.
      data: The data sets, which may have examples in common, also such that have states.
      states_of: From a batch of model features to states `[B, T, E]` by the same names, on this
        host.
      batch_size: Rows of a batch.

    Raises:
      UsageError: A folder cannot be written.
    """
    if not stores:
        return
    first_store = next(iter(stores.values()))
    todo = _lacking(stores, data)
    num_lacking = sum(map(len, todo))
    if not num_lacking:
        console.log(f"The original's states are in {first_store.folder}: nothing to compute.")
        return
    for store in stores.values():
        files.check_writable(store.folder / "part", "STATES_DIR")
    shared = [
        first_store.num_shared(examples) if len(indices) else 0
        for examples, indices in zip(data, todo, strict=True)
    ]
    # One program for all data sets whose rows have anything in common.
    least = min(filter(None, shared), default=0)
    shared = [min(number, least) for number in shared]
    chosen = [
        (examples, num_shared, indices[start : start + batch_size])
        for examples, num_shared, indices in zip(data, shared, todo, strict=True)
        for start in range(0, len(indices), batch_size)
    ]
    title = f"states of the original, {num_lacking} examples, in batches"
    for examples, num_shared, indices in console.progress(chosen, title):
        read = take(examples, indices)
        states = states_of(first_store.batch(read, batch_size, num_shared))
        for name, store in stores.items():
            store.keep(read, states[name])
    for store in stores.values():
        store.flush()


def _lacking(
    stores: Mapping[str, OriginalStates], data: Sequence[Sequence[Example]]
) -> list[np.ndarray]:
    """The indices, in each data set, of the examples without states: of each content the first."""
    key_of = next(iter(stores.values())).key
    lacking: set[str] = set()
    found = []
    for examples in data:
        of_data: list[int] = []
        keys = enumerate(map(key_of, examples))
        while some := list(itertools.islice(keys, _KEYS_AT_A_TIME)):
            first = {key: index for index, key in reversed(some)}
            new = set().union(*(store.missing(first) for store in stores.values())) - lacking
            of_data += sorted(first[key] for key in new)
            lacking |= new
        found.append(np.array(of_data, np.int64))
    return found


def check_folder(folder: str) -> None:
    """Finds out, before the original is read, whether states can be in a folder; it is created.

    Raises:
      UsageError: It is in a bucket, or is not there and cannot be made.
    """
    check_is_local(folder)
    place = pathlib.Path(folder).expanduser()
    if not place.is_dir():  # one that has all states need not be writable
        files.check_directory(place, "STATES_DIR")


def check_is_local(folder: str) -> None:
    """Raises a UsageError for a folder in a bucket."""
    if files.is_remote(folder):
        raise UsageError(
            f"STATES_DIR: expected a local folder (they are read row by row), found {folder}. "
            "Where records or MODEL_DIR are in a bucket, set it."
        )


def default_folder(records_path: str | os.PathLike | None, model_dir: str) -> str:
    """The folder beside a file of records, so that every run finds it; else one in `model_dir`."""
    if records_path is not None and pathlib.Path(records_path).is_file():
        return f"{records_path}.states"
    return f"{model_dir.rstrip('/')}/original_states"
