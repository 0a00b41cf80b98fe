"""From examples of token ids to the arrays that a network takes.

Axes: `B` examples, `Ti` input tokens, `T` target tokens, `K` removed ids per position. Model
features are int32: `encoder_input_tokens` `[B, Ti]`; `decoder_input_tokens`,
`decoder_target_tokens` and `decoder_loss_mask` `[B, T]`, padded with 0; `decoder_negative_ids`
`[B, T, K]`, padded with -1. A position is negative when it has any id. The id -2 - n, which is
always the first, stands for all ids of set n (`examples.Sets`). NumPy only.

Where marks have strengths, `decoder_negative_strengths` `[B, T, K]`, float32 and padded with 1, has
them; without the feature all are 1.

In a packed batch several examples share a row, and `B` counts rows. `encoder_segment_ids` `[B, Ti]`
and `decoder_segment_ids` `[B, T]` number the examples of a row from 1, with 0 at padding.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from tnt_jax.data.examples import (
    HAS_SPAN,
    IS_CLEAN,
    KEEPS_TEXT,
    Example,
    ExampleTable,
    have_strengths,
    marks_with_sets,
    max_negative_ids,
    most_at_one_position,
    says_removed,
)
from tnt_jax.runtime.errors import UsageError


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
    has_strengths: bool | None = None,
    set_numbers: Mapping[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Pads or cuts examples to one shape.

    What is too long is cut at the end. A target that is cut has no EOS: the text did not end there.

    Args:
        examples: `B` of them, or as many as there are places.
        task_feature_lengths: `Ti` under "inputs" and `T` under "targets".
        num_negative_ids: `K`; None takes what these examples need.
        places: where each example lies in a packed batch; None gives each a row of its own.
        has_strengths: whether there is a feature of strengths; None has it if an example needs it.
        set_numbers: the number of each set of ids that the device has (`examples.Sets`), by its
            name; the ids of other sets are written out. None writes out all.

    Returns:
        The model features listed at the head of this module.

    Raises:
        UsageError: a length is missing, or an example has more than `K` ids at a position.
    """
    input_length, target_length = checked_lengths(task_feature_lengths)
    is_packed = places is not None
    if places is None:
        places = _rows_of_their_own(examples, target_length)
    of_loss = _loss_features(
        examples, places, target_length, num_negative_ids, has_strengths, set_numbers
    )
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
    has_strengths: bool | None,
    set_numbers: Mapping[int, int] | None,
) -> dict[str, np.ndarray]:
    """The features of the loss, which are the same for every family of networks."""
    num_negative_ids = num_negative_ids or max_negative_ids(examples)
    if has_strengths is None:
        has_strengths = have_strengths(examples)
    num_rows = 1 + max((place.row for place in places), default=-1)
    targets, loss_mask = np.zeros((2, num_rows, target_length), np.int32)
    negative_ids = np.full((num_rows, target_length, num_negative_ids), -1, np.int32)
    strengths = np.ones(negative_ids.shape if has_strengths else 0, np.float32)
    for example, place in zip(examples, places, strict=True):
        row, offset = place.row, place.target_offset
        kept_targets = example.targets[:target_length]
        here = slice(offset, offset + len(kept_targets))
        targets[row, here] = kept_targets
        has_loss = 1 if example.loss_mask is None else example.loss_mask[:target_length]
        loss_mask[row, here] = has_loss
        pairs, of_pairs = marks_with_sets(example, set_numbers or {})
        positions, slots, ids = _negative_slots(example.id, pairs, target_length, num_negative_ids)
        negative_ids[row, offset + positions, slots] = ids
        if of_pairs is not None:
            strengths[row, offset + positions, slots] = of_pairs[: len(ids)]
    features = {
        "decoder_target_tokens": targets,
        "decoder_loss_mask": loss_mask,
        "decoder_negative_ids": negative_ids,
    }
    if has_strengths:
        features["decoder_negative_strengths"] = strengths
    return features


def _negative_slots(
    id: str, pairs: np.ndarray, target_length: int, num_negative_ids: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position, place among the `K` of that position, and id of each mark within the length."""
    positions, ids = pairs[pairs[:, 0] < target_length].T
    # The pairs are sorted: the n-th id at a position is n after the first of that position.
    slots = np.arange(len(positions)) - np.searchsorted(positions, positions)
    if slots.size and slots.max() >= num_negative_ids:
        raise UsageError(
            f"example {id!r} has {slots.max() + 1} negative ids at one position, but "
            f"num_negative_ids is {num_negative_ids}. Raise it, or leave it unset."
        )
    return positions, slots, ids


def _shift_right(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, 0), (1, 0)))[:, :-1]


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
    input_length, target_length = checked_lengths(task_feature_lengths)
    if isinstance(examples, ExampleTable):
        return CutCounts(
            num_inputs=int((examples.column("num_inputs") > input_length).sum()),
            num_targets=int((examples.column("num_targets") > target_length).sum()),
            num_marks=int(examples.column("lost_marks").sum()),
            num_spans=int(examples.column("lost_spans").sum()),
        )
    return CutCounts(
        num_inputs=sum(len(e.inputs) > input_length for e in examples),
        num_targets=sum(len(e.targets) > target_length for e in examples),
        num_marks=sum(int((e.negative_pairs[:, 0] >= target_length).sum()) for e in examples),
        num_spans=sum(_num_lost_spans(e.span_numbers, target_length) for e in examples),
    )


def _num_lost_spans(span_numbers: np.ndarray | None, target_length: int) -> int:
    if span_numbers is None:
        return 0
    # Sets of a few numbers are quicker than arrays of them.
    kept, cut = span_numbers[:target_length].tolist(), span_numbers[target_length:].tolist()
    return sum(number > 0 for number in {*cut} - {*kept})


def are_all_covered(examples: Sequence[Example], task_feature_lengths: Mapping[str, int]) -> bool:
    """Whether negative spans cover all text that there is a loss for, so that none is to be kept.

    False where some example's marks are not known as spans: ids that are removed beside a token, or
    at every position, leave the token itself to be kept.
    """
    if isinstance(examples, ExampleTable):
        flags = examples.column("flags")
    else:
        _, length = checked_lengths(task_feature_lengths)
        flags = np.array([covering_of(example, length) for example in examples])
    return not (flags & KEEPS_TEXT).any() and bool((flags & HAS_SPAN).any())


def covering_of(example: Example, target_length: int) -> int:
    """How spans cover the text of an example: a sum of `KEEPS_TEXT` and `HAS_SPAN`."""
    if example.span_numbers is None:
        return KEEPS_TEXT
    numbers = example.span_numbers[:target_length]
    is_kept = numbers == 0
    if example.loss_mask is not None:
        is_kept = is_kept & (example.loss_mask[:target_length] > 0)
    return KEEPS_TEXT * bool(is_kept.any()) + HAS_SPAN * bool((numbers > 0).any())


def columns_of(example: Example, target_length: int, has_spans: bool) -> list[int]:
    """The numbers of an example in an `ExampleTable`, in the order of `COLUMNS`.

    Args:
        example: with its `span_numbers`.
        target_length: that the table is for.
        has_spans: whether a person or program has marked spans in it.
    """
    pairs, strengths = example.negative_pairs, example.negative_strengths
    is_cut = len(example.targets) > target_length
    is_clean = not has_spans and not (len(pairs) and says_removed(example))
    return [
        len(example.inputs),
        len(example.targets),
        len(pairs),
        most_at_one_position(example),
        0 if strengths is None else int((strengths < 1).sum()),
        int((pairs[:, 0] >= target_length).sum()) if is_cut else 0,
        _num_lost_spans(example.span_numbers, target_length) if is_cut else 0,
        covering_of(example, target_length) + IS_CLEAN * is_clean,
        most_at_one_position(example, with_sets=True),
    ]


# The feature of the tokens that all rows of a batch begin with, `[B, S]`.
SHARED = "decoder_shared_tokens"

_SHARED_TOKENS = 8  # that are counted at a time: few programs are compiled


@runtime_checkable
class FeatureLayout(Protocol):
    """How a family of networks has examples as features (`models.network.Network.feature_layout`).

    `Ti` and `T` are the task feature lengths of "inputs" and "targets". Whatever the family, the
    features of the loss are `decoder_target_tokens`, `decoder_loss_mask` and `decoder_negative_ids`
    as `convert_features` has them: `[B, T]`, `[B, T]` and `[B, T, K]`; and where there are any,
    `decoder_negative_strengths` `[B, T, K]`.
    """

    def convert(
        self,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        num_negative_ids: int | None = None,
        places: Sequence[Place] | None = None,
        has_strengths: bool | None = None,
        set_numbers: Mapping[int, int] | None = None,
        num_shared: int = 0,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of features.

        The arguments are those of `convert_features`; and `num_shared`, the number of tokens that
        all rows begin with: a network computes them once. It is 0 for a packed batch.
        """
        ...

    def num_shared(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> int:
        """Counts the tokens that rows of one example each have in common at their beginning.

        0 where a network would compute none of them once for all rows, or where that does not pay.
        """
        ...

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Counts the positions of a row: where examples are read, and where targets are."""
        ...

    def sizes(self, lengths: np.ndarray, task_feature_lengths: Mapping[str, int]) -> np.ndarray:
        """Counts the positions that each example takes, `[N, 2]`, as `capacity` does.

        Args:
            lengths: `[N, 2]`, ids of inputs and targets of each, before anything is cut.
            task_feature_lengths: where they are cut.
        """
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
        has_strengths: bool | None = None,
        set_numbers: Mapping[int, int] | None = None,
        num_shared: int = 0,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of the features that are listed at the head of this module."""
        assert not num_shared
        return convert_features(
            examples, task_feature_lengths, num_negative_ids, places, has_strengths, set_numbers
        )

    def num_shared(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> int:
        """0: an encoder looks ahead, so the states of no two inputs are the same."""
        return 0

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Positions of the encoder and of the decoder."""
        return checked_lengths(task_feature_lengths)

    def sizes(self, lengths: np.ndarray, task_feature_lengths: Mapping[str, int]) -> np.ndarray:
        """Counts the input and target tokens of each example that are kept, `[N, 2]`."""
        return np.minimum(lengths, checked_lengths(task_feature_lengths))

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

    Where all rows begin with the same `S` tokens, a system message or an instruction, a batch may
    say so: `decoder_shared_tokens` `[B, S]` has them in each row, filler rows included. A network
    reads how many there are.
    """

    def convert(
        self,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        num_negative_ids: int | None = None,
        places: Sequence[Place] | None = None,
        has_strengths: bool | None = None,
        set_numbers: Mapping[int, int] | None = None,
        num_shared: int = 0,
    ) -> dict[str, np.ndarray]:
        """Makes one batch of features.

        Raises:
          UsageError: a length is missing, an example has more than `K` ids at a position, or a
            response has no prompt token to follow.
        """
        input_length, target_length = checked_lengths(task_feature_lengths)
        length, _ = self.capacity(task_feature_lengths)
        assert places is None or not num_shared, "packed rows have examples within them"
        if places is None:
            places = _rows_of_their_own(examples, target_length)
        of_loss = _loss_features(
            examples, places, target_length, num_negative_ids, has_strengths, set_numbers
        )
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
        features = {
            "decoder_input_tokens": tokens,
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
            "decoder_target_places": target_places,
            **of_loss,
        }
        if num_shared:
            beginnings = tokens[segments[:, 0] > 0, :num_shared]
            assert (beginnings == beginnings[:1]).all()
            shared = beginnings[0] if len(beginnings) else np.zeros(num_shared, np.int32)
            features[SHARED] = np.tile(shared, (num_rows, 1))
        return features

    def num_shared(
        self, examples: Sequence[Example], task_feature_lengths: Mapping[str, int]
    ) -> int:
        """Counts the tokens that all prompts begin with.

        0 where it is less than a sixteenth of a row: attention needs a copy of it in every row.
        """
        input_length, _ = checked_lengths(task_feature_lengths)

        def count() -> np.ndarray:
            kept = (self.cut_input(each.inputs, input_length) for each in examples)
            return np.array([num_shared_by(kept)])

        is_table = isinstance(examples, ExampleTable)
        found = examples.kept(f"shared {input_length}", count) if is_table else count()
        number = int(found[0])
        return number if 16 * number >= self.capacity(task_feature_lengths)[0] else 0

    def capacity(self, task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
        """Positions of a row, and of its responses."""
        input_length, target_length = checked_lengths(task_feature_lengths)
        return input_length + target_length, target_length

    def sizes(self, lengths: np.ndarray, task_feature_lengths: Mapping[str, int]) -> np.ndarray:
        """Counts the positions of each example, and of its response, `[N, 2]`."""
        num_inputs, num_targets = np.minimum(lengths, checked_lengths(task_feature_lengths)).T
        return np.stack([num_inputs + np.maximum(num_targets - 1, 0), num_targets], axis=1)

    def cut_input(self, ids: np.ndarray, length: int, keeps_last: bool = True) -> np.ndarray:
        """The first id, which may begin every text, and the last ones, with the question."""
        if len(ids) <= length:
            return ids
        return np.concatenate([ids[:1], ids[len(ids) - length + 1 :]])


def num_shared_by(inputs: Iterable[Sequence[int] | np.ndarray]) -> int:
    """The number of ids that all inputs have in common at their beginning.

    Every input has at least one more. It is rounded down to a multiple of 8, so that few programs
    are compiled; no more inputs are read than it takes to know that it is 0.
    """
    shared: np.ndarray | None = None
    for ids in inputs:
        own = np.asarray(ids[:-1] if shared is None else ids[: len(shared)][: len(ids) - 1])
        if shared is None:
            shared = own
        length = min(len(shared), len(own))
        is_other = shared[:length] != own[:length]
        shared = shared[: int(is_other.argmax()) if is_other.any() else length]
        if len(shared) < _SHARED_TOKENS:
            return 0
    return 0 if shared is None else len(shared) // _SHARED_TOKENS * _SHARED_TOKENS


ENCODER_DECODER = EncoderDecoder()


CAUSAL = Causal()


def checked_lengths(task_feature_lengths: Mapping[str, int]) -> tuple[int, int]:
    """The lengths of "inputs" and "targets", in tokens; raises a UsageError where one is none."""
    input_length, target_length = (task_feature_lengths.get(n, 0) for n in ("inputs", "targets"))
    if min(input_length, target_length) < 1:
        raise UsageError(
            "TASK_FEATURE_LENGTHS: expected positive numbers of tokens for 'inputs' and 'targets', "
            f"found {dict(task_feature_lengths)}."
        )
    return input_length, target_length
