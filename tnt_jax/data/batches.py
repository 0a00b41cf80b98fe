"""Batches of features: which examples each has, in which order and rows. NumPy only."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnt_jax.data import packing
from tnt_jax.data.examples import Example, have_strengths, max_negative_ids
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
) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of a batch, without making one.

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
    )
    return {name: (batch_size, *rows.shape[1:]) for name, rows in batches.batch(0).items()}


class Padding(NamedTuple):
    """How full the rows of an epoch are."""

    num_rows: int
    examples_per_row: float
    input_padding: float  # share of the positions that hold no token, of the layout's first kind
    target_padding: float  # of the targets


@dataclasses.dataclass
class Batches:
    """An endless sequence of batches: batch k depends on the examples, the seed and k alone.

    Every epoch is a permutation of all examples by (seed, epoch), and batches run on from one epoch
    into the next: each example is seen exactly once per epoch, whatever the batch size. Nothing
    needs to be saved to resume, and every host builds the same global batch.

    Packing puts as many whole examples into a row as fit, within the permutation of one epoch. The
    batch size counts rows, so a packed batch has as many positions as an unpacked one, and more
    examples. How many rows an epoch has depends on its permutation: to find batch k, the epochs
    before it are packed as well, 4 microseconds for each example, once.

    Attributes:
        examples: the data set.
        batch_size: rows in a global batch.
        task_feature_lengths: "inputs" and "targets", in tokens.
        seed: of the order.
        num_negative_ids: `K`; None takes what the data set needs.
        has_strengths: whether batches have strengths of marks; None has them if an example does.
        shuffle: False keeps the order of `examples` (of each row's largest example, if packed).
        pack: True puts several examples into a row.
        feature_layout: of the network that the batches are for.

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

    def __post_init__(self):
        if not self.examples:
            raise UsageError("expected a data set with examples, found none.")
        if self.batch_size < 1:
            raise UsageError(f"BATCH_SIZE: expected a positive number, found {self.batch_size}.")
        if self.num_negative_ids is None:
            self.num_negative_ids = max_negative_ids(self.examples)
        if self.has_strengths is None:
            self.has_strengths = have_strengths(self.examples)
        self._sizes = self.feature_layout.sizes(self.examples, self.task_feature_lengths)
        # Both serve many batches. The loop's thread asks and the user may, so the caches are ones
        # that threads can share.
        self._rows = functools.lru_cache(maxsize=2)(self._rows_of_epoch)
        self._num_rows = functools.lru_cache(maxsize=None)(lambda epoch: len(self._rows(epoch)))

    def batch(self, k: int) -> dict[str, np.ndarray]:
        """Batch k, counted from 0: its model features."""
        places = self.layout(k)
        return self.feature_layout.convert(
            [self.examples[place.example] for place in places],
            self.task_feature_lengths,
            self.num_negative_ids,
            places if self.pack else None,
            self.has_strengths,
        )

    __getitem__ = batch

    def layout(self, k: int) -> list[Place]:
        """Which examples batch k has, and where each of them lies; row by row.

        What is kept for each example, such as an array `[T, E]` of the original's decoder states,
        goes to `[row, target_offset : target_offset + num_targets]` of an array `[B, T, E]`.
        """
        places = []
        for row, indices in enumerate(self._members(k)):
            input_offset = target_offset = 0
            for segment, index in enumerate(indices, start=1):
                num_inputs, num_targets = self._sizes[index].tolist()
                places.append(
                    Place(int(index), row, segment, input_offset, target_offset, num_targets)
                )
                input_offset += num_inputs
                target_offset += num_targets
        return places

    def padding(self) -> Padding:
        """How full the rows of the first epoch are."""
        num_rows = self._num_rows(0)
        capacity = np.array(self.feature_layout.capacity(self.task_feature_lengths))
        input_share, target_share = self._sizes.sum(axis=0) / (num_rows * capacity)
        per_row = len(self.examples) / num_rows
        return Padding(num_rows, per_row, 1 - float(input_share), 1 - float(target_share))

    def _members(self, k: int) -> list[np.ndarray]:
        """The indices of the examples of each row of batch k."""
        epoch, start = 0, k * self.batch_size  # the row at which the batch starts in the epoch
        if not self.pack:
            epoch, start = divmod(start, len(self.examples))
        while start >= self._num_rows(epoch):
            start -= self._num_rows(epoch)
            epoch += 1
        members: list[np.ndarray] = []
        while len(members) < self.batch_size:
            members.extend(self._rows(epoch)[start : start + self.batch_size - len(members)])
            epoch, start = epoch + 1, 0
        return members

    def _rows_of_epoch(self, epoch: int) -> Sequence[np.ndarray] | np.ndarray:
        order = np.arange(len(self.examples))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(order))
        if not self.pack:
            return order[:, None]
        capacity = self.feature_layout.capacity(self.task_feature_lengths)
        rows = packing.pack(self._sizes[order], capacity)
        return [order[row] for row in rows]


def batch_for_eval(
    examples: Sequence[Example],
    batch_size: int,
    task_feature_lengths: Mapping[str, int],
    num_negative_ids: int | None = None,
    feature_layout: FeatureLayout = ENCODER_DECODER,
    has_strengths: bool | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with rows whose loss mask is 0."""
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    if has_strengths is None:
        has_strengths = have_strengths(examples)
    nothing = np.zeros(0, np.int32)
    filler = Example(nothing, nothing, negative_pairs=nothing.reshape(0, 2))
    for start in range(0, len(examples), batch_size):
        chosen = [*examples[start : start + batch_size], *[filler] * batch_size][:batch_size]
        yield feature_layout.convert(
            chosen, task_feature_lengths, num_negative_ids, has_strengths=has_strengths
        )
