"""From examples of token ids to the arrays that the model takes, batch by batch.

Axes: `B` examples, `Ti` input tokens, `T` target tokens, `K` removed ids per position. Model
features are int32: `encoder_input_tokens` `[B, Ti]`; `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_mask` `[B, T]`, padded with 0; `decoder_negative_ids`
`[B, T, K]`, padded with -1. A position is negative when it has any id. NumPy only.

In a packed batch several examples share a row, and `B` counts rows. `encoder_segment_ids` `[B, Ti]`
and `decoder_segment_ids` `[B, T]` number the examples of a row from 1, with 0 at padding.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from tnt_jax.data import packing
from tnt_jax.runtime.errors import UsageError

T5PATCHES_MODES = tuple(
    prefix + marks
    for prefix in ("", "corrective_", "negative_and_positive_")
    for marks in ("first", "diff", "full")
)

LOSS_UNTIL = ("end", "first_negative")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example of any length.

    Attributes:
        inputs: `[Ti]` int32, as the tokeniser makes a prompt.
        targets: `[T]` int32, the end included.
        negative_pairs: `[M, 2]` int32 rows (position, id): ids to remove at target positions.
            Sorted, without repeats.
        loss_mask: `[T]` int32, 0 where a target token has no loss; None means 1 everywhere.
        span_numbers: `[T]` int32: of each target token the number, from 1, of the negative span
            that marks it; 0 where none does, -1 where the token stands for no text. None where
            marks are not known as spans. For counting: what is trained on are the pairs.
        id: its name in messages and reports.
        keeps_last_input: whether inputs that are too long are cut before their last id: T5 was
            trained with the end there.
    """

    inputs: np.ndarray
    targets: np.ndarray
    negative_pairs: np.ndarray
    loss_mask: np.ndarray | None = None
    span_numbers: np.ndarray | None = None
    id: str = ""
    keeps_last_input: bool = True


def loss_until(end: str, targets: np.ndarray, negative_pairs: np.ndarray) -> np.ndarray | None:
    """The loss mask of a target that counts up to an end.

    Args:
        end: one of LOSS_UNTIL. "first_negative" leaves no loss after the first token that is
            itself removed, for what follows a mistake is the consequence of it. Ids that are
            removed beside another token are no mistake of the target's.
        targets: `[T]` token ids.
        negative_pairs: `[M, 2]` rows (position, id), sorted.

    Returns:
        `[T]` int32; None where all tokens count.

    Raises:
        UsageError: no such end.
    """
    if end not in LOSS_UNTIL:
        raise UsageError(f"loss_until: expected one of {', '.join(LOSS_UNTIL)}, found {end!r}.")
    positions, ids = negative_pairs.T
    mistakes = positions[ids == targets[positions]]
    if end == "end" or not len(mistakes):
        return None
    return (np.arange(len(targets)) <= mistakes[0]).astype(np.int32)


class CutCounts(NamedTuple):
    """How much of a data set does not fit into the feature lengths."""

    num_inputs: int  # examples whose input is cut
    num_targets: int  # examples whose target is cut
    num_marks: int  # (position, id) pairs beyond the cut
    num_spans: int  # negative spans of which no token is left, so far as they are known


class Place(NamedTuple):
    """Where one example lies in a batch."""

    example: int  # its index in the data set
    row: int
    segment: int  # its number within the row, from 1
    input_offset: int  # its first input token is encoder_input_tokens[row, input_offset]
    target_offset: int  # its first target token is decoder_target_tokens[row, target_offset]
    num_targets: int  # target tokens that are kept, EOS included


def convert_features(
    examples: Sequence[Example],
    task_feature_lengths: Mapping[str, int],
    num_negative_ids: int | None = None,
    places: Sequence[Place] | None = None,
) -> dict[str, np.ndarray]:
    """Pads or cuts examples to one shape.

    What is too long is cut at the end. A target that is cut has no EOS: the text did not end there.

    Args:
        examples: `B` of them, or as many as there are places.
        task_feature_lengths: `Ti` under "inputs" and `T` under "targets".
        num_negative_ids: `K`; None takes what these examples need.
        places: where each example lies in a packed batch; None gives each a row of its own.

    Returns:
        The model features listed at the head of this module.

    Raises:
        UsageError: a length is missing, or an example has more than `K` ids at a position.
    """
    input_length, target_length = _lengths(task_feature_lengths)
    is_packed = places is not None
    if places is None:
        places = _rows_of_their_own(examples, target_length)
    of_loss = _loss_features(examples, places, target_length, num_negative_ids)
    num_rows = len(of_loss["decoder_target_tokens"])
    inputs, input_segments = np.zeros((2, num_rows, input_length), np.int32)
    target_segments = np.zeros((num_rows, target_length), np.int32)
    for example, place in zip(examples, places, strict=True):
        kept_inputs = ENCODER_DECODER.cut_input(
            example.inputs, input_length, example.keeps_last_input
        )
        here = slice(place.input_offset, place.input_offset + len(kept_inputs))
        inputs[place.row, here] = kept_inputs
        input_segments[place.row, here] = place.segment
        num_targets = min(len(example.targets), target_length)
        here = slice(place.target_offset, place.target_offset + num_targets)
        target_segments[place.row, here] = place.segment
    targets = of_loss["decoder_target_tokens"]
    shifted = _shift_right(targets)
    features = {
        "encoder_input_tokens": inputs,
        # A segment begins with 0, not with the end of the one before it.
        "decoder_input_tokens": (
            shifted * (target_segments == _shift_right(target_segments)) if is_packed else shifted
        ),
        **of_loss,
    }
    if is_packed:
        features["encoder_segment_ids"] = input_segments
        features["decoder_segment_ids"] = target_segments
    return features


def _rows_of_their_own(examples: Sequence[Example], target_length: int) -> list[Place]:
    return [Place(row, row, 1, 0, 0, target_length) for row in range(len(examples))]


def _loss_features(
    examples: Sequence[Example],
    places: Sequence[Place],
    target_length: int,
    num_negative_ids: int | None,
) -> dict[str, np.ndarray]:
    """The features of the loss, which are the same for every family of networks."""
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    num_rows = 1 + max((place.row for place in places), default=-1)
    targets, loss_mask = np.zeros((2, num_rows, target_length), np.int32)
    negative_ids = np.full((num_rows, target_length, num_negative_ids), -1, np.int32)
    for example, place in zip(examples, places, strict=True):
        row, offset = place.row, place.target_offset
        kept_targets = example.targets[:target_length]
        here = slice(offset, offset + len(kept_targets))
        targets[row, here] = kept_targets
        has_loss = 1 if example.loss_mask is None else example.loss_mask[:target_length]
        loss_mask[row, here] = has_loss
        positions, slots, ids = _negative_slots(example, target_length, num_negative_ids)
        negative_ids[row, offset + positions, slots] = ids
    return {
        "decoder_target_tokens": targets,
        "decoder_loss_mask": loss_mask,
        "decoder_negative_ids": negative_ids,
    }


def _negative_slots(
    example: Example, target_length: int, num_negative_ids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, place among the `K` of that position, and id of each mark within the length."""
    positions, ids = example.negative_pairs[example.negative_pairs[:, 0] < target_length].T
    # The pairs are sorted: the n-th id at a position is n after the first of that position.
    slots = np.arange(len(positions)) - np.searchsorted(positions, positions)
    if slots.size and slots.max() >= num_negative_ids:
        raise UsageError(
            f"example {example.id!r} has {slots.max() + 1} negative ids at one position, but "
            f"num_negative_ids is {num_negative_ids}. Raise it, or leave it unset."
        )
    return positions, slots, ids


def _shift_right(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, 0), (1, 0)))[:, :-1]


def feature_shapes(
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    num_negative_ids: int,
    *,
    pack: bool,
    feature_layout: "FeatureLayout",
) -> dict[str, tuple[int, ...]]:
    """Shapes of the features of a batch, int32 all, without making one."""
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
    )
    return {name: (batch_size, *rows.shape[1:]) for name, rows in batches.batch(0).items()}


def id_of(value: Any) -> str:
    """The id of an example as a task of seqio has it: a text, or a number."""
    return value.decode() if isinstance(value, bytes) else str(value)


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of a data set: 16 hexadecimal digits; the order counts."""
    hashed = hashlib.sha256()
    for example in examples:
        arrays = (example.inputs, example.targets, example.negative_pairs, example.loss_mask)
        for array in arrays:
            hashed.update(b"-" if array is None else f"{array.shape} ".encode() + array.tobytes())
    return hashed.hexdigest()[:16]


def pad_inputs(
    inputs: Sequence[Sequence[int] | np.ndarray], length: int, feature_layout: "FeatureLayout"
) -> np.ndarray:
    """Input ids `[B, length]` int32 at the left of their rows, filled up with 0, cut if need be."""
    padded = np.zeros((len(inputs), length), np.int32)
    for row, ids in zip(padded, inputs, strict=True):
        kept = feature_layout.cut_input(np.asarray(ids, np.int32), length)
        row[: len(kept)] = kept
    return padded


def count_lost(examples: Sequence[Example], task_feature_lengths: Mapping[str, int]) -> CutCounts:
    """Counts what `convert_features` would cut off."""
    input_length, target_length = _lengths(task_feature_lengths)
    return CutCounts(
        num_inputs=sum(len(e.inputs) > input_length for e in examples),
        num_targets=sum(len(e.targets) > target_length for e in examples),
        num_marks=sum(int((e.negative_pairs[:, 0] >= target_length).sum()) for e in examples),
        num_spans=sum(_num_lost_spans(e.span_numbers, target_length) for e in examples),
    )


def _num_lost_spans(span_numbers: np.ndarray | None, target_length: int) -> int:
    if span_numbers is None:
        return 0
    kept, cut = span_numbers[:target_length], span_numbers[target_length:]
    return int((np.setdiff1d(cut, kept) > 0).sum())


def are_all_covered(examples: Sequence[Example], task_feature_lengths: Mapping[str, int]) -> bool:
    """Whether negative spans cover all text that there is a loss for, so that none is to be kept.

    False where some example's marks are not known as spans: ids that are removed beside a token, or
    at every position, leave the token itself to be kept.
    """
    _, target_length = _lengths(task_feature_lengths)
    has_spans = False
    for example in examples:
        if example.span_numbers is None:
            return False
        numbers = example.span_numbers[:target_length]
        is_kept = numbers == 0
        if example.loss_mask is not None:
            is_kept = is_kept & (example.loss_mask[:target_length] > 0)
        if is_kept.any():
            return False
        has_spans |= bool((numbers > 0).any())
    return has_spans


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


@runtime_checkable
class FeatureLayout(Protocol):
    """How a family of networks has examples as features (`models.network.Network.feature_layout`).

    `Ti` and `T` are the task feature lengths of "inputs" and "targets". Whatever the family, the
    features of the loss are `decoder_target_tokens`, `decoder_loss_mask` and `decoder_negative_ids`
    as `convert_features` has them: `[B, T]`, `[B, T]` and `[B, T, K]`.
    """

    def convert(
        self,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        num_negative_ids: int | None = None,
        places: Sequence[Place] | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of features; the arguments are those of `convert_features`."""
        ...

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Counts the positions of a row: where examples are read, and where targets are."""
        ...

    def sizes(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> np.ndarray:
        """Counts the positions that each example takes, `[N, 2]`, as `capacity` does."""
        ...

    def cut_input(self, ids: np.ndarray, length: int, keeps_last: bool = True) -> np.ndarray:
        """What is kept of an input that is too long; any other is returned as it is."""
        ...


class EncoderDecoder:
    """Inputs are rows of the encoder, targets are rows of the decoder."""

    def convert(
        self,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        num_negative_ids: int | None = None,
        places: Sequence[Place] | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of the features that are listed at the head of this module."""
        return convert_features(examples, task_feature_lengths, num_negative_ids, places)

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Positions of the encoder and of the decoder."""
        return _lengths(task_feature_lengths)

    def sizes(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> np.ndarray:
        """Counts the input and target tokens of each example that are kept, `[N, 2]`."""
        sizes = [(len(example.inputs), len(example.targets)) for example in examples]
        return np.minimum(np.array(sizes), _lengths(task_feature_lengths))

    def cut_input(self, ids: np.ndarray, length: int, keeps_last: bool = True) -> np.ndarray:
        """The first ids, and with `keeps_last` the last one, the end, as T5 was trained.

        That is seqio's `append_eos_after_trim`.
        """
        if len(ids) > length and keeps_last:
            return np.append(ids[: length - 1], ids[-1])
        return ids[:length]


class Causal:
    """Prompt and response share a row; states are gathered where they predict the response.

    Beside the features of the loss, which lie as those of `EncoderDecoder`, with `L` = `Ti` + `T`:
    `decoder_input_tokens`, the prompt and the response without its last token;
    `decoder_segment_ids`, 0 where a row is filled up; `decoder_positions`, from 0 in each example,
    all `[B, L]`; `decoder_target_places` `[B, T]`, where among the `L` the state lies that predicts
    each target: that of the prompt's last token, then those of the targets before.
    """

    def convert(
        self,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        num_negative_ids: int | None = None,
        places: Sequence[Place] | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of features.

        Raises:
          UsageError: As `convert_features`, or a response without any prompt token to follow.
        """
        input_length, target_length = _lengths(task_feature_lengths)
        length, _ = self.capacity(task_feature_lengths)
        if places is None:
            places = _rows_of_their_own(examples, target_length)
        of_loss = _loss_features(examples, places, target_length, num_negative_ids)
        num_rows = len(of_loss["decoder_target_tokens"])
        tokens, segments, positions = np.zeros((3, num_rows, length), np.int32)
        target_places = np.zeros((num_rows, target_length), np.int32)
        for example, place in zip(examples, places, strict=True):
            prompt = self.cut_input(example.inputs, input_length)
            response = example.targets[:target_length]
            if len(response) and not len(prompt):
                raise UsageError(
                    f"example {example.id!r}: expected a prompt of at least one token, which the "
                    "response follows, found none. Give it inputs, or a token that begins texts."
                )
            row = np.concatenate([prompt, response[:-1]])
            here = slice(place.input_offset, place.input_offset + len(row))
            tokens[place.row, here] = row
            segments[place.row, here] = place.segment
            positions[place.row, here] = np.arange(len(row))
            first = place.input_offset + len(prompt) - 1
            here = slice(place.target_offset, place.target_offset + len(response))
            target_places[place.row, here] = first + np.arange(len(response))
        return {
            "decoder_input_tokens": tokens,
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
            "decoder_target_places": target_places,
            **of_loss,
        }

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Positions of a row, and of its responses."""
        input_length, target_length = _lengths(task_feature_lengths)
        return input_length + target_length, target_length

    def sizes(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> np.ndarray:
        """Counts the positions of each example, and of its response, `[N, 2]`."""
        sizes = [(len(example.inputs), len(example.targets)) for example in examples]
        num_inputs, num_targets = np.minimum(sizes, _lengths(task_feature_lengths)).T
        return np.stack([num_inputs + np.maximum(num_targets - 1, 0), num_targets], axis=1)

    def cut_input(self, ids: np.ndarray, length: int, keeps_last: bool = True) -> np.ndarray:
        """The first id, which may begin every text, and the last ones, with the question."""
        if len(ids) <= length:
            return ids
        return np.concatenate([ids[:1], ids[len(ids) - length + 1 :]])


ENCODER_DECODER = EncoderDecoder()
CAUSAL = Causal()


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

    def __post_init__(self):
        if not self.examples:
            raise UsageError("expected a data set with examples, found none.")
        if self.batch_size < 1:
            raise UsageError(f"BATCH_SIZE: expected a positive number, found {self.batch_size}.")
        if self.num_negative_ids is None:
            self.num_negative_ids = max_negative_ids(self.examples)
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
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order; the last batch is filled up with rows whose loss mask is 0."""
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    nothing = np.zeros(0, np.int32)
    filler = Example(nothing, nothing, negative_pairs=nothing.reshape(0, 2))
    for start in range(0, len(examples), batch_size):
        chosen = [*examples[start : start + batch_size], *[filler] * batch_size][:batch_size]
        yield feature_layout.convert(chosen, task_feature_lengths, num_negative_ids)


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
