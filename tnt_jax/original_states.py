"""The original's decoder states of a data set, computed once and kept in files.

They depend on the original and on an example's tokens alone: not on marks, objective, weight, batch
size or packing. So one folder serves every run of a sweep, several data sets may share it, and
what a stopped run has computed is there for the next one.

    FOLDER/<original>/part_<keys>.npy    [tokens, E], one example after the other
    FOLDER/<original>/part_<keys>.json   {"keys": {key of an example: [first row, number of rows]}}

A part is there when its JSON is: both files are written beside their place and renamed, that last.
It is named after what is in it, so that two runs at once may write the same folder. States keep the
dtype that they were computed in; bfloat16 is stored as its bits.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tnt_jax import feature_converters, json_files, records, run_log
from tnt_jax.errors import UsageError

_TOKENS_PER_PART = 65_536  # 128 MiB at width 512: what is lost at most when a run is stopped


class OriginalStates:
    """The states of one original in a folder.

    Args:
      folder: Local to this host, or shared by all hosts; made if need be.
      identity: Of the original and of how it is computed.
      task_feature_lengths: Where "inputs" and "targets" are cut.

    Raises:
      UsageError: The folder is in a bucket, or a part of it is damaged.
    """

    def __init__(self, folder: str, identity: str, task_feature_lengths: Mapping[str, int]):
        if "://" in folder:
            raise UsageError(
                f"STATES_DIR: expected a local folder (they are read row by row), found {folder}. "
                "Where records or MODEL_DIR are in a bucket, set it."
            )
        self._folder = pathlib.Path(folder).expanduser() / re.sub(r"\W+", "-", identity)
        self._lengths = dict(task_feature_lengths)
        self._parts: list[np.ndarray] = []
        self._rows: dict[str, tuple[int, int, int]] = {}  # part, first row, number of rows
        for index in sorted(self._folder.glob("part_*.json")):
            self._add(index)

    def _add(self, index: pathlib.Path) -> None:
        try:
            keys = json_files.read_object(index)
            # Mapped: a shape that the file is too short for is refused, and no object is made.
            array = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
            if keys["dtype"] == "bfloat16":
                array = array.view(jnp.bfloat16)
            rows = {
                str(key): (len(self._parts), int(first), int(number))
                for key, (first, number) in keys["keys"].items()
            }
            if array.ndim != 2 or not all(
                0 <= first <= first + number <= len(array) for _, first, number in rows.values()
            ):
                raise ValueError(f"rows that an array {array.shape} has not")
        except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError) as error:
            raise UsageError(
                f"{index}: expected states of the original, with a file .npy beside it, found "
                f"{type(error).__name__}: {error}. Delete both: they will be computed again."
            ) from error
        self._rows |= rows
        self._parts.append(array)

    def _key(self, example: feature_converters.Example) -> str:
        kept = feature_converters.cut_input(example.inputs, self._lengths["inputs"])
        inputs = np.ascontiguousarray(kept, "<i4")
        targets = np.ascontiguousarray(example.targets[: self._lengths["targets"]], "<i4")
        hashed = hashlib.sha256(f"{len(inputs)} ".encode() + inputs.tobytes() + targets.tobytes())
        return hashed.hexdigest()[:32]

    def missing(
        self, examples: Iterable[feature_converters.Example]
    ) -> list[feature_converters.Example]:
        """Those without states, each content once; the same on every host."""
        unique = {self._key(example): example for example in examples}
        is_missing: np.ndarray = np.array([key not in self._rows for key in unique], bool)
        if jax.process_count() > 1:  # every host has to take part in computing any
            is_missing = np.any(multihost_utils.process_allgather(is_missing), axis=0)
        return [e for e, absent in zip(unique.values(), is_missing.tolist(), strict=True) if absent]

    def compute(
        self,
        examples: Sequence[feature_converters.Example],
        states_of: Callable[[dict[str, np.ndarray]], np.ndarray],
        batch_size: int,
    ) -> None:
        """Computes and keeps the states of the examples that have none.

        Args:
          examples: Any, also those that have states.
          states_of: From a batch of model features to states `[B, T, E]`, on this host.
          batch_size: Rows of a batch.

        Raises:
          UsageError: The folder cannot be written.
        """
        todo = self.missing(examples)
        if not todo:
            run_log.log(f"The original's states are in {self._folder}: nothing to compute.")
            return
        records.check_writable(self._folder / "part", "STATES_DIR")
        batches = feature_converters.batch_for_eval(todo, batch_size, self._lengths)
        kept: dict[str, np.ndarray] = {}
        num_batches = -(-len(todo) // batch_size)
        title = f"states of the original, {len(todo)} examples, in batches"
        for number, batch in enumerate(run_log.progress(batches, title, num_batches)):
            states = states_of(batch)
            first = number * batch_size
            for row, example in enumerate(todo[first : first + batch_size]):
                num_tokens = min(len(example.targets), self._lengths["targets"])
                kept[self._key(example)] = states[row, :num_tokens].copy()  # not the batch
            if sum(map(len, kept.values())) >= _TOKENS_PER_PART:
                self._write(kept)
                kept = {}
        if kept:
            self._write(kept)

    def _write(self, kept: Mapping[str, np.ndarray]) -> None:
        name = hashlib.sha256(" ".join(kept).encode()).hexdigest()[:16]
        index = self._folder / f"part_{name}.json"
        if index.exists():  # another host was quicker; what it wrote may be in use
            self._add(index)
            return
        ends = np.cumsum([len(states) for states in kept.values()]).tolist()
        starts = [0, *ends[:-1]]
        array = np.concatenate(list(kept.values()))
        is_bfloat16 = array.dtype == jnp.bfloat16
        with (
            records.replacing(index.with_suffix(".npy")) as unfinished,
            unfinished.open("wb") as file,
        ):
            np.save(file, array.view(np.uint16) if is_bfloat16 else array)
        keys = {
            key: [start, end - start] for key, start, end in zip(kept, starts, ends, strict=True)
        }
        with records.replacing(index) as unfinished:
            unfinished.write_text(json.dumps({"dtype": str(array.dtype), "keys": keys}), "utf-8")
        self._add(index)

    def of(self, example: feature_converters.Example) -> np.ndarray:
        """States `[number of target tokens, E]` of an example, read from the file."""
        part, first, number = self._rows[self._key(example)]
        return self._parts[part][first : first + number]

    def feature(
        self,
        placed: Iterable[tuple[feature_converters.Example, int, int]],
        shape: tuple[int, int],
    ) -> np.ndarray:
        """The states of a batch `[B, T, E]`, 0 at padding.

        Args:
          placed: Each example with its row and the position where its targets begin.
          shape: `B` and `T`.
        """
        like = self._parts[0]
        states = np.zeros((*shape, like.shape[1]), like.dtype)
        for example, row, start in placed:
            found = self.of(example)
            states[row, start : start + len(found)] = found
        return states


def default_folder(records_path: str | os.PathLike | None, model_dir: str) -> str:
    """Beside a file of records, so that every run on it finds them; otherwise in the model's."""
    if records_path is not None and pathlib.Path(records_path).is_file():
        return f"{records_path}.states"
    return f"{model_dir.rstrip('/')}/original_states"
