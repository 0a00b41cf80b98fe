"""Batches of features: which examples each has, in which order and rows. NumPy only."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnt_jax.data import packing, shuffling
from tnt_jax.data.examples import (
    Example,
    ExampleTable,
    have_strengths,
    lengths_of,
    max_negative_ids,
    take,
)
from tnt_jax.data.layouts import ENCODER_DECODER, FeatureLayout, Place
from tnt_jax.runtime.errors import UsageError


def feature_shapes(
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    num_negative_ids: int,
    *,
    pack: bool,
    feature_layout: "FeatureLayout",
    has_strengths: bool = False,
    num_shared: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of a batch, without making one; the arguments are those of `Batches`.

    All are int32 but `decoder_negative_strengths`, which is float32.
    """
    nothing = np.zeros(0, np.int32)
    example = Example(nothing, nothing, negative_pairs=nothing.reshape(0, 2))
    batches = Batches(
        [example],
        1,
        task_feature_lengths,
        seed=0,
        num_negative_ids=num_negative_ids,
        pack=pack,
        feature_layout=feature_layout,
        has_strengths=has_strengths,
        num_shared=num_shared,
    )
    return {name: (batch_size, *rows.shape[1:]) for name, rows in batches.batch(0).items()}


class Padding(NamedTuple):
    """How full the rows of an epoch are."""

    num_rows: int
    examples_per_row: float
    input_padding: float  # share of the positions that hold no token, of the layout's first kind
    target_padding: float  # of the targets


class Placed(NamedTuple):
    """The examples of a batch, and where they lie.

    Attributes:
        examples: the examples, row by row.
        places: the place of each example.
    """

    examples: list[Example]
    places: list[Place]


@dataclasses.dataclass
class Batches:
    """An endless sequence of batches: batch k depends on the examples, the seed and k alone.

    Every epoch is a permutation of all rows by (seed, epoch), and batches run on from one epoch
    into the next: each example is seen exactly once per epoch, whatever the batch size. Nothing
    needs to be saved to resume, and every host builds the same global batch.

    Without packing an example is a row. Packing puts as many whole examples into a row as fit. It
    is planned once, whatever the seed, so the same examples share a row in every epoch. The batch
    size counts rows, so a packed batch has as many positions as an unpacked one, and more examples.

    Attributes:
        examples: the data set.
        batch_size: rows in a global batch.
        task_feature_lengths: "inputs" and "targets", in tokens.
        seed: random seed of the order.
        num_negative_ids: `K`; None takes what the data set needs.
        has_strengths: whether batches have strengths of marks; None has them if an example does.
        shuffle: False keeps the order of `examples` (of each row's largest example, if packed).
        pack: True puts several examples into a row.
        feature_layout: the layout of features of the network that the batches are for.
        set_numbers: the number of each set of ids that the device has, by its name
            (`examples.Sets`).
        num_shared: tokens that all rows begin with (`FeatureLayout.num_shared`); 0 if packed.

    Raises:
        UsageError: there are no examples, or a setting is not positive.
    """

    examples: Sequence[Example]
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    seed: int
    num_negative_ids: int | None = None
    shuffle: bool = True
    pack: bool = False
    feature_layout: FeatureLayout = ENCODER_DECODER
    has_strengths: bool | None = None
    set_numbers: Mapping[int, int] | None = None
    num_shared: int = 0

    def __post_init__(self):
        if not self.examples:
            raise UsageError("expected a data set with examples, found none.")
        if self.batch_size < 1:
            raise UsageError(f"BATCH_SIZE: expected a positive number, found {self.batch_size}.")
        if self.num_negative_ids is None:
            self.num_negative_ids = max_negative_ids(
                self.examples, with_sets=bool(self.set_numbers)
            )
        if self.has_strengths is None:
            self.has_strengths = have_strengths(self.examples)
        self._rows = self._planned() if self.pack else None
        self._num_rows = len(self.examples if self._rows is None else self._rows)

    def _planned(self) -> packing.Rows:
        """Which examples share a row: planned now, or kept with the examples."""
        capacity = self.feature_layout.capacity(self.task_feature_lengths)
        num_examples = len(self.examples)

        def plan() -> np.ndarray:
            order = None
            if self.shuffle:  # or a window of examples that are alike would pack badly
                order = shuffling.rows_at(np.arange(num_examples), num_examples, seed=0, epoch=0)
            rows = packing.pack(self._sizes(lengths_of(self.examples)), capacity, order=order)
            return np.concatenate([rows.starts, rows.members], dtype=np.int64)

        if not isinstance(self.examples, ExampleTable):
            found = plan()
        else:
            layout, lengths = type(self.feature_layout).__name__, dict(self.task_feature_lengths)
            found = self.examples.kept(
                f"packing {packing.WINDOW} {layout} {sorted(lengths.items())} {self.shuffle}", plan
            )
        return packing.Rows(found[-num_examples:], found[:-num_examples])

    def _sizes(self, lengths: np.ndarray) -> np.ndarray:
        return self.feature_layout.sizes(lengths, self.task_feature_lengths)

    def batch(self, k: int) -> dict[str, np.ndarray]:
        """Batch k, counted from 0: its model features."""
        return self.features(self.read(k))

    __getitem__ = batch

    def features(self, placed: Placed) -> dict[str, np.ndarray]:
        """The model features of what `read` has read."""
        return self.feature_layout.convert(
            placed.examples,
            self.task_feature_lengths,
            self.num_negative_ids,
            placed.places if self.pack else None,
            self.has_strengths,
            self.set_numbers,
            self.num_shared,
        )

    def read(self, k: int) -> Placed:
        """The examples of batch k, and where each of them lies; row by row.

        What is kept for each example, such as an array `[T, E]` of the original's decoder states,
        goes to `[row, target_offset : target_offset + num_targets]` of an array `[B, T, E]`.
        """
        members = self._members(k)
        examples = take(self.examples, np.concatenate(members))
        sizes = iter(self._sizes(lengths_of(examples)).tolist())
        places = []
        for row, indices in enumerate(members):
            input_offset = target_offset = 0
            for segment, index in enumerate(indices.tolist(), start=1):
                num_inputs, num_targets = next(sizes)
                places.append(Place(index, row, segment, input_offset, target_offset, num_targets))
                input_offset += num_inputs
                target_offset += num_targets
        return Placed(examples, places)

    def padding(self) -> Padding:
        """How full the rows of an epoch are."""
        capacity = np.array(self.feature_layout.capacity(self.task_feature_lengths))
        total = self._sizes(lengths_of(self.examples)).sum(axis=0, dtype=np.int64)
        input_share, target_share = total / (self._num_rows * capacity)
        per_row = len(self.examples) / self._num_rows
        return Padding(self._num_rows, per_row, 1 - float(input_share), 1 - float(target_share))

    def _members(self, k: int) -> list[np.ndarray]:
        """The indices of the examples of each row of batch k."""
        epochs, places = np.divmod(
            np.arange(k * self.batch_size, (k + 1) * self.batch_size), self._num_rows
        )
        rows = places
        if self.shuffle:
            rows = np.concatenate(
                [
                    shuffling.rows_at(places[epochs == epoch], self._num_rows, self.seed, epoch)
                    for epoch in np.unique(epochs).tolist()
                ]
            )
        if self._rows is None:
            return list(rows[:, None])
        return [self._rows[row] for row in rows.tolist()]


def batch_for_eval(
    examples: Sequence[Example],
    batch_size: int,
    task_feature_lengths: Mapping[str, int],
    num_negative_ids: int | None = None,
    feature_layout: FeatureLayout = ENCODER_DECODER,
    has_strengths: bool | None = None,
    set_numbers: Mapping[int, int] | None = None,
    num_shared: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with rows whose loss mask is 0.

    `num_shared` counts tokens that the inputs of all examples begin with.
    """
    num_negative_ids = num_negative_ids or max_negative_ids(examples, with_sets=bool(set_numbers))
    if has_strengths is None:
        has_strengths = have_strengths(examples)
    nothing = np.zeros(0, np.int32)
    filler = Example(nothing, nothing, negative_pairs=nothing.reshape(0, 2))
    for start in range(0, len(examples), batch_size):
        chosen = [*examples[start : start + batch_size], *[filler] * batch_size][:batch_size]
        yield feature_layout.convert(
            chosen,
            task_feature_lengths,
            num_negative_ids,
            has_strengths=has_strengths,
            set_numbers=set_numbers,
            num_shared=num_shared,
        )
