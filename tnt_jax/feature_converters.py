"""From examples of token ids to the arrays that the model takes, batch by batch.

Axes: `B` examples, `Ti` input tokens, `T` target tokens, `K` removed ids per position. Model
features are int32: `encoder_input_tokens` `[B, Ti]`; `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_mask` `[B, T]`, padded with 0; `decoder_negative_ids`
`[B, T, K]`, padded with -1. A position is negative when it has any id. NumPy only.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnt_jax.errors import UsageError

EOS_ID = 1  # T5's; tokenization.check_vocabulary makes sure of it

T5PATCHES_MODES = tuple(
    prefix + marks
    for prefix in ("", "corrective_", "negative_and_positive_")
    for marks in ("first", "diff", "full")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example of any length.

    Attributes:
        inputs: `[Ti]` int32, EOS included.
        targets: `[T]` int32, EOS included.
        negative_pairs: `[M, 2]` int32 rows (position, id): ids to remove at target positions.
            Sorted, without repeats.
        loss_mask: `[T]` int32, 0 where a target token has no loss; None means 1 everywhere.
        id: its name in messages and reports.
    """

    inputs: np.ndarray
    targets: np.ndarray
    negative_pairs: np.ndarray
    loss_mask: np.ndarray | None = None
    id: str = ""


class Lost(NamedTuple):
    """How much of a data set does not fit into the feature lengths."""

    num_inputs: int  # examples whose input is cut
    num_targets: int  # examples whose target is cut
    num_marks: int  # (position, id) pairs beyond the cut


def convert_features(
    examples: Sequence[Example],
    task_feature_lengths: Mapping[str, int],
    num_negative_ids: int | None = None,
) -> dict[str, np.ndarray]:
    """Pads or cuts examples to one shape.

    What is too long is cut at the end. A target that is cut has no EOS: the text did not end there.

    Args:
        examples: `B` of them.
        task_feature_lengths: `Ti` under "inputs" and `T` under "targets".
        num_negative_ids: `K`; None takes what these examples need.

    Returns:
        The model features listed at the head of this module.

    Raises:
        UsageError: a length is missing, or an example has more than `K` ids at a position.
    """
    input_length, target_length = _lengths(task_feature_lengths)
    batch_size = len(examples)
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    targets = np.zeros((batch_size, target_length), np.int32)
    loss_mask = np.zeros((batch_size, target_length), np.int32)
    negative_ids = np.full((batch_size, target_length, num_negative_ids), -1, np.int32)
    for row, example in enumerate(examples):
        kept_targets = example.targets[:target_length]
        targets[row, : len(kept_targets)] = kept_targets
        if example.loss_mask is None:
            loss_mask[row, : len(kept_targets)] = 1
        else:
            loss_mask[row, : len(kept_targets)] = example.loss_mask[:target_length]
        kept_pairs = example.negative_pairs[example.negative_pairs[:, 0] < target_length]
        positions, ids = kept_pairs.T
        # The pairs are sorted: the n-th id at a position is n after the first of that position.
        slots = np.arange(len(positions)) - np.searchsorted(positions, positions)
        if slots.size and slots.max() >= num_negative_ids:
            raise UsageError(
                f"example {example.id!r} has {slots.max() + 1} negative ids at one position, but "
                f"num_negative_ids is {num_negative_ids}. Raise it, or leave it unset."
            )
        negative_ids[row, positions, slots] = ids
    return {
        "encoder_input_tokens": pad_inputs([e.inputs for e in examples], input_length),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
        "decoder_loss_mask": loss_mask * (targets != 0),
        "decoder_negative_ids": negative_ids,
    }


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of a data set: 16 hexadecimal digits; the order counts."""
    hashed = hashlib.sha256()
    for example in examples:
        arrays = (example.inputs, example.targets, example.negative_pairs, example.loss_mask)
        for array in arrays:
            hashed.update(b"-" if array is None else f"{array.shape} ".encode() + array.tobytes())
    return hashed.hexdigest()[:16]


def pad_inputs(inputs: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Encoder input ids `[B, length]` int32, padded with 0.

    An input that is cut keeps its EOS as the last token, as T5 was trained (seqio's
    `append_eos_after_trim`).
    """
    padded = np.zeros((len(inputs), length), np.int32)
    for row, ids in zip(padded, inputs, strict=True):
        kept = ids[:length]
        row[: len(kept)] = kept
        if len(ids) > length and ids[-1] == EOS_ID:
            row[-1] = EOS_ID
    return padded


def count_lost(examples: Sequence[Example], task_feature_lengths: Mapping[str, int]) -> Lost:
    """Counts what `convert_features` would cut off."""
    input_length, target_length = _lengths(task_feature_lengths)
    return Lost(
        num_inputs=sum(len(e.inputs) > input_length for e in examples),
        num_targets=sum(len(e.targets) > target_length for e in examples),
        num_marks=sum(int((e.negative_pairs[:, 0] >= target_length).sum()) for e in examples),
    )


def max_negative_ids(examples: Sequence[Example]) -> int:
    """The smallest `K` that holds every mark of the examples; at least 1."""
    return max(
        (int(np.bincount(e.negative_pairs[:, 0]).max()) for e in examples if len(e.negative_pairs)),
        default=1,
    )


def check_token_ids(examples: Sequence[Example], num_embeddings: int) -> None:
    """Raises a UsageError when an id has no embedding: JAX would silently take another row's."""
    for example in examples:
        for name, ids in [
            ("inputs", example.inputs),
            ("targets", example.targets),
            ("negative_pairs", example.negative_pairs[:, 1]),
        ]:
            if ids.size and not 0 <= ids.min() <= ids.max() < num_embeddings:
                raise UsageError(
                    f"example {example.id!r}: {name} has ids from {ids.min()} to {ids.max()}, but "
                    f"the model has {num_embeddings} embeddings. Expected its own vocabulary."
                )


@dataclasses.dataclass
class Batches:
    """An endless sequence of batches: batch k depends on the examples, the seed and k alone.

    Every epoch is a permutation of all examples by (seed, epoch), and batches run on from one epoch
    into the next: each example is seen exactly once per epoch, whatever the batch size. Nothing
    needs to be saved to resume, and every host builds the same global batch.

    Attributes:
        examples: the data set.
        batch_size: rows in a global batch.
        task_feature_lengths: "inputs" and "targets", in tokens.
        seed: of the order.
        num_negative_ids: `K`; None takes what the data set needs.
        shuffle: False keeps the order of `examples`.

    Raises:
        UsageError: there are no examples, or a setting is not positive.
    """

    examples: Sequence[Example]
    batch_size: int
    task_feature_lengths: Mapping[str, int]
    seed: int
    num_negative_ids: int | None = None
    shuffle: bool = True

    def __post_init__(self):
        if not self.examples:
            raise UsageError("expected a data set with examples, found none.")
        if self.batch_size < 1:
            raise UsageError(f"BATCH_SIZE: expected a positive number, found {self.batch_size}.")
        _lengths(self.task_feature_lengths)
        if self.num_negative_ids is None:
            self.num_negative_ids = max_negative_ids(self.examples)

    def batch(self, k: int) -> dict[str, np.ndarray]:
        """Batch k, counted from 0: its model features."""
        positions = np.arange(k * self.batch_size, (k + 1) * self.batch_size)
        epochs, indices = np.divmod(positions, len(self.examples))
        orders = {epoch: self._order(epoch) for epoch in set(epochs.tolist())}
        chosen = [
            self.examples[int(orders[epoch][index])]
            for epoch, index in zip(epochs.tolist(), indices.tolist(), strict=True)
        ]
        return convert_features(chosen, self.task_feature_lengths, self.num_negative_ids)

    __getitem__ = batch

    def _order(self, epoch: int) -> np.ndarray:
        num_examples = len(self.examples)
        if not self.shuffle:
            return np.arange(num_examples)
        return _permutation(num_examples, self.seed, epoch)


@functools.lru_cache(maxsize=4)  # a permutation serves many batches
def _permutation(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def batch_for_eval(
    examples: Sequence[Example],
    batch_size: int,
    task_feature_lengths: Mapping[str, int],
    num_negative_ids: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with rows whose loss mask is 0."""
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    nothing = np.zeros(0, np.int32)
    filler = Example(nothing, nothing, negative_pairs=nothing.reshape(0, 2))
    for start in range(0, len(examples), batch_size):
        chosen = [*examples[start : start + batch_size], *[filler] * batch_size][:batch_size]
        yield convert_features(chosen, task_feature_lengths, num_negative_ids)


class Selection(NamedTuple):
    """What `select_clean` kept."""

    examples: list[Example]
    num_marked: int
    num_clean: int  # of which there were
    num_clean_kept: int


def select_clean(
    examples: Sequence[Example], clean_per_marked: int | float, seed: int
) -> Selection:
    """Keeps every example with a mark, and a sample of the others, in their order.

    An original that mostly behaves produces few unwanted tokens: training on all of its outputs
    spends most updates on examples that only ask it to stay as it is.

    Args:
        examples: the data set.
        clean_per_marked: at most this many unmarked examples for each marked one.
        seed: of the sample.

    Raises:
        UsageError: no example has a mark, or `clean_per_marked` is negative.
    """
    if clean_per_marked < 0:
        raise UsageError(f"clean_per_marked: expected 0 or more, found {clean_per_marked}.")
    clean = [index for index, example in enumerate(examples) if not len(example.negative_pairs)]
    num_marked = len(examples) - len(clean)
    if not num_marked:
        raise UsageError(
            f"clean_per_marked={clean_per_marked} needs marked examples, but none of the "
            f"{len(examples)} has a negative token. Were they annotated?"
        )
    num_clean_kept = min(len(clean), round(clean_per_marked * num_marked))
    rng = np.random.default_rng(seed)
    dropped = set(rng.permutation(clean)[num_clean_kept:].tolist())
    return Selection(
        examples=[example for index, example in enumerate(examples) if index not in dropped],
        num_marked=num_marked,
        num_clean=len(clean),
        num_clean_kept=num_clean_kept,
    )


def t5patches_target(
    negative_targets: np.ndarray, corrected_targets: np.ndarray, mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads one example of the layout that google/t5patches published, in one of its modes.

    The two sequences are compared position by position. `first` and `diff` mark the first or every
    difference in `negative_targets`, `full` marks every token. `corrective_*` has no marks: it
    trains on `corrected_targets`, with loss at the first, at every difference or everywhere.
    `negative_and_positive_*` takes an example for negative, in mode `*`, when `negative_targets`
    has at least as many tokens, else for positive: `corrected_targets` with loss everywhere.

    t5patches also weights one padding position where one sequence is the beginning of the other;
    padding has no loss here.

    Args:
        negative_targets: ids; zeros at the end are padding.
        corrected_targets: ids, likewise.
        mode: one of `T5PATCHES_MODES`.

    Returns:
        Targets `[T]`, negative pairs `[M, 2]` and loss mask `[T]`, as in `Example`.

    Raises:
        UsageError: no such mode.
    """
    if mode not in T5PATCHES_MODES:
        raise UsageError(f"t5patches mode: expected one of {T5PATCHES_MODES}, found {mode!r}.")
    negative = np.trim_zeros(np.asarray(negative_targets, np.int32), "b")
    corrected = np.trim_zeros(np.asarray(corrected_targets, np.int32), "b")
    kind, _, marks = mode.rpartition("_")
    if kind == "negative_and_positive":
        kind, marks = ("", marks) if len(negative) >= len(corrected) else ("corrective", "full")
    targets, other = (corrected, negative) if kind == "corrective" else (negative, corrected)
    chosen = targets != np.pad(other, (0, len(targets)))[: len(targets)]
    if marks == "first":
        chosen &= np.cumsum(chosen) == 1
    elif marks == "full":
        chosen[:] = True
    if kind == "corrective":
        return targets, np.zeros((0, 2), np.int32), chosen.astype(np.int32)
    positions = np.flatnonzero(chosen)
    pairs = np.stack([positions, targets[positions]], axis=1).astype(np.int32)
    return targets, pairs, np.ones_like(targets)


def _lengths(task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
    input_length, target_length = (task_feature_lengths.get(n, 0) for n in ("inputs", "targets"))
    if min(input_length, target_length) < 1:
        raise UsageError(
            "TASK_FEATURE_LENGTHS: expected positive numbers of tokens for 'inputs' and 'targets', "
            f"found {dict(task_feature_lengths)}."
        )
    return input_length, target_length
