"""From records to examples: texts as token ids, and spans as ids to remove at positions.

A span marks the tokens whose extents (see `tokenization`) it overlaps.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from tnt_jax.data import records
from tnt_jax.data.examples import (
    Example,
    SetAt,
    loss_mask_until,
    no_id_is_left,
    position_without_ids,
    unique_pairs,
)
from tnt_jax.data.negative_sets import LEAST, name_of
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization
from tnt_jax.tokenizers.tokenization import Extent, Tokeniser

MARKS = ("whole", "first_token")  # what a span makes negative


def examples_from_records(
    rows: Sequence[records.Record],
    vocabulary: Tokeniser,
    where: str,
    marks: str = "whole",
    loss_until: str = "end",
) -> list[Example]:
    """Tokenises and marks records; warns about spans that touch no token.

    Args:
        rows: the records.
        vocabulary: the tokeniser of inputs and targets.
        where: the file that they come from, for the warning.
        marks: what of a span counts as marked; see `datasets.RecordFiles`.
        loss_until: where the loss of a marked target ends; see `datasets.RecordFiles`.

    Raises:
        UsageError: a record does not fit the vocabulary (`mark_tokens`).
    """
    marked = [example_from_record(record, vocabulary, marks, loss_until) for record in rows]
    log_spans_without_token(sum(number for _, number in marked), where)
    return [example for example, _ in marked]


def example_from_record(
    record: records.Record, vocabulary: Tokeniser, marks: str, loss_until: str
) -> tuple[Example, int]:
    """The tokenised record, and how many of its spans touch no token."""
    marked = mark_tokens(record, vocabulary, marks)
    inputs = prompt_ids(record, vocabulary)
    example = Example(
        inputs=np.array(inputs, np.int32),
        targets=marked.target_ids,
        negative_pairs=marked.negative_pairs,
        negative_strengths=marked.negative_strengths,
        loss_mask=loss_mask_until(
            loss_until,
            marked.target_ids,
            marked.negative_pairs,
            marked.negative_strengths,
            marked.span_numbers,
        ),
        span_numbers=marked.span_numbers,
        sets=tuple(
            SetAt(
                entry[0],
                int(name_of(entry[1]), 16),
                records.strength_of(entry),
                array_of(entry[1]),
            )
            for entry in record.negative_token_ids
            if len(entry[1]) >= LEAST
        ),
        id=record.id,
    )
    return example, marked.num_spans_without_token


def prompt_ids(record: records.Record, vocabulary: Tokeniser) -> list[int]:
    """The ids of what a model is given: the record's conversation, or its inputs.

    Raises:
        UsageError: the record has a conversation that the model does not take, or nothing that a
            decoder-only model could go on with.
    """
    try:
        ids = vocabulary.prompt_ids(record.inputs, record.messages)
    except UsageError as error:
        raise UsageError(f"record {record.id!r}: {error}") from error
    if not ids:  # a model without a BOS
        raise UsageError(
            f"record {record.id!r}: expected a prompt of at least one token, which the model goes "
            "on with, found none. Give it a text, or leave it out."
        )
    return ids


def log_spans_without_token(number: int, where: str) -> None:
    """Warns about spans that mark nothing; `where` names the data set."""
    if number:
        logging.warning(
            "%s: %d negative spans touch no token (white space, or characters that the vocabulary "
            "drops) and mark nothing.",
            where,
            number,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class MarkedTarget:
    """A target sequence and what must not be said in it.

    Attributes:
        target_ids: `[T]` int32, EOS included.
        negative_pairs: `[M, 2]` int32 rows (position, id), sorted, without repeats.
        span_numbers: `[T]` int32: of each token the number, from 1, of the first span that marks
            it; 0 where none does, -1 where the token stands for no text (without any span: the end,
            or all of a blank text).
        num_spans_without_token: spans that overlap no token's extent (white space, or characters
            that the tokeniser's normalisation drops), so that nothing was marked for them.
        negative_strengths: `[M]` float64, of each pair; None where all are 1.
    """

    target_ids: np.ndarray
    negative_pairs: np.ndarray
    span_numbers: np.ndarray
    num_spans_without_token: int
    negative_strengths: np.ndarray | None = None


def mark_tokens(
    record: records.Record, vocabulary: Tokeniser, marks: str = "whole"
) -> MarkedTarget:
    """Turns the marks of a record into token ids to remove per position.

    A token is negative when its extent overlaps a negative span: its own id is removed there. The
    EOS stands for no text, so spans never mark it. `negative_token_ids` come on top. With the marks
    "first_token" the first token of each span alone is negative: whatever begins otherwise goes on
    otherwise. A span's tokens have its strength; an id with several at a position has the largest.

    With `target_ids` these exact ids are kept. Without them the text is tokenised, and spans are
    matched in the text as it was given, although the tokeniser may normalise it.

    Raises:
        UsageError: `target_ids` do not decode to `targets` or go on after the EOS, a removed id or
            its position does not exist, all ids are removed at a position, or there are no such
            marks.
    """
    if marks not in MARKS:
        raise UsageError(f"marks: expected one of {', '.join(MARKS)}, found {marks!r}.")
    if record.negative_spans:
        ids, extents, dropped = _measured(record, vocabulary)
        span_numbers = [0 if start < end else -1 for start, end in extents]
    else:  # to measure takes most of the time
        ids, extents, dropped = _ids(record, vocabulary), [], frozenset()
        span_numbers = [-1 if id_ in vocabulary.end_ids else 0 for id_ in ids]
        if not record.targets.strip():
            span_numbers = [-1] * len(ids)
    pairs: list[tuple[int, int]] = []
    strengths: list[float] = []
    num_spans_without_token = 0
    for number, mark in enumerate(record.negative_spans or (), start=1):
        span = (mark[0], mark[1])
        positions = [] if dropped.issuperset(range(*span)) else [*touched(extents, span)]
        positions = positions[: 1 if marks == "first_token" else None]
        pairs += [(position, ids[position]) for position in positions]
        strengths += [records.strength_of(mark)] * len(positions)
        for position in positions:
            span_numbers[position] = span_numbers[position] or number
        num_spans_without_token += not positions
    long: list[np.ndarray] = []
    strengths_of_long: list[float] = []
    for entry in record.negative_token_ids:
        position, removed_ids, strength = entry[0], entry[1], records.strength_of(entry)
        check_entry(entry, record, vocabulary, len(ids))
        if len(removed_ids) < LEAST:
            pairs += [(position, removed_id) for removed_id in removed_ids]
            strengths += [strength] * len(removed_ids)
        else:
            of_set = array_of(removed_ids)
            long.append(np.stack([np.full_like(of_set, position), of_set], axis=1))
            strengths_of_long += [strength] * len(of_set)
    strengths += strengths_of_long
    is_graded = any(strength != 1 for strength in strengths)
    if long or is_graded:
        negative_pairs, of_pairs = unique_pairs(
            np.concatenate([np.array(pairs, np.int32).reshape(-1, 2), *long]),
            np.array(strengths) if is_graded else None,
        )
    else:  # which is quicker for few
        negative_pairs = np.array(sorted({*pairs}), np.int32).reshape(-1, 2)
        of_pairs = None
    position = position_without_ids(negative_pairs, of_pairs, vocabulary.size)
    if position is not None:
        raise no_id_is_left(f"record {record.id!r}", position, vocabulary.size)
    return MarkedTarget(
        target_ids=np.array(ids, np.int32),
        negative_pairs=negative_pairs,
        negative_strengths=of_pairs,
        span_numbers=np.array(span_numbers, np.int32),
        num_spans_without_token=num_spans_without_token,
    )


def check_entry(
    entry: records.TokenIds, record: records.Record, vocabulary: Tokeniser, num_tokens: int
) -> None:
    """Raises a UsageError where an id to remove, or its position, does not exist.

    Args:
        entry: one of the record's `negative_token_ids`.
        record: the record, for the message.
        vocabulary: the tokeniser of its ids.
        num_tokens: tokens of its targets, EOS included.
    """
    position, removed_ids = entry[0], entry[1]
    if position >= num_tokens:
        raise UsageError(
            f"record {record.id!r}: negative_token_ids has position {position}, but its "
            f"targets have {num_tokens} tokens."
        )
    for removed_id in (min(removed_ids, default=0), max(removed_ids, default=0)):
        if not 0 <= removed_id < vocabulary.size:
            raise UsageError(
                f"record {record.id!r}: negative_token_ids has id {removed_id}, but the "
                f"vocabulary has {vocabulary.size} ids."
            )


@functools.lru_cache(maxsize=1024)
def array_of(ids: tuple[int, ...]) -> np.ndarray:
    """Ids as an array; records share the tuples of long sets."""
    return np.array(ids, np.int32)


def token_id_entries(removed: Mapping[int, Mapping[int, float]]) -> tuple[records.TokenIds, ...]:
    """Entries for `Record.negative_token_ids`, one for each strength that a position has.

    Args:
        removed: by position, the ids to remove there and their strengths.
    """
    return tuple(
        records.with_strength(
            position, tuple(sorted(i for i, s in ids.items() if s == strength)), strength
        )
        for position, ids in sorted(removed.items())
        for strength in sorted({*ids.values()}, reverse=True)
    )


def ids_and_extents(
    record: records.Record, vocabulary: Tokeniser
) -> tuple[list[int], list[Extent]]:
    """Ids of the record's targets, EOS included, and their extents in `record.targets`.

    Raises:
        UsageError: `target_ids` do not decode to `targets`, or go on after the EOS.
    """
    return _measured(record, vocabulary)[:2]


def _ids(record: records.Record, vocabulary: Tokeniser) -> list[int]:
    """The ids of the record's targets, checked as `ids_and_extents` does."""
    if record.target_ids is None:
        return [*vocabulary.encode_reply(record.targets, record.inputs), vocabulary.end_id]
    ids = _checked_ids(record, vocabulary)
    _check_text(record, vocabulary.decode(ids))
    return ids


def _measured(
    record: records.Record, vocabulary: Tokeniser
) -> tuple[list[int], list[Extent], frozenset[int]]:
    """`ids_and_extents`, and which places within the extents hold what no token says."""
    if record.target_ids is None:
        encoded = vocabulary.encode_reply_with_extents(record.targets, record.inputs)
        end = len(record.targets)
        ids, extents = [*encoded.ids, vocabulary.end_id], [*encoded.extents, (end, end)]
        return ids, extents, encoded.silent
    ids = _checked_ids(record, vocabulary)
    text, extents = vocabulary.extents(ids)
    _check_text(record, text)
    return ids, extents, frozenset()


def _checked_ids(record: records.Record, vocabulary: Tokeniser) -> list[int]:
    ids = [int(i) for i in record.target_ids or ()]
    end = tokenization.find_end(ids, vocabulary.end_ids)
    if end < len(ids) - 1:
        raise UsageError(
            f"record {record.id!r}: target_ids go on after the EOS (id {ids[end]}) at position "
            f"{end}: expected them to end there, without padding."
        )
    return ids


def _check_text(record: records.Record, text: str) -> None:
    if text != record.targets:
        raise UsageError(
            f"record {record.id!r}: target_ids decode to {text[:60]!r}, but targets is "
            f"{record.targets[:60]!r}. Expected the vocabulary that the ids were generated "
            "with; leave target_ids out to have targets tokenised."
        )


def pieces(record: records.Record, vocabulary: Tokeniser) -> list[str]:
    """The targets cut up, one stretch per token, spaces with what follows them.

    Joined they are the targets; without a token there is none. What stands for no text, and what
    shares its character with a token before it, gets an empty one.

    Raises:
        UsageError: ids and text do not belong together; see `mark_tokens`.
    """
    _, extents = ids_and_extents(record, vocabulary)
    ends = list(itertools.accumulate((end for _, end in extents), max))
    starts = [0, *ends][: len(ends)]
    ends = [*ends[:-1], len(record.targets)][: len(ends)]
    return [record.targets[start:end] for start, end in zip(starts, ends, strict=True)]


def touched(extents: Sequence[Extent], span: Extent) -> Iterator[int]:
    """The tokens whose extents a span overlaps."""
    start, end = span
    return (i for i, (a, b) in enumerate(extents) if a < b and a < end and start < b)
