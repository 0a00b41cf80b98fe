"""From records to examples: texts as token ids, and spans as ids to remove at positions.

A span marks the tokens whose extents (see `tokenization`) it overlaps.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from tnt_jax.data import records, tokenization
from tnt_jax.data.examples import Example, SetAt, loss_mask_until, unique_pairs
from tnt_jax.data.negative_sets import LEAST, name_of
from tnt_jax.data.token_automaton import BEGINNING, Listed, Reading
from tnt_jax.data.tokenization import Extent, Tokeniser
from tnt_jax.runtime.errors import UsageError

MARKS = ("whole", "first_token")  # what a span makes negative
_MOST_LISTS = 256  # whose flags are kept: records with the same inputs have the same list


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
            loss_until, marked.target_ids, marked.negative_pairs, marked.negative_strengths
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
            its position does not exist, or there are no such marks.
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
        touched = [] if dropped.issuperset(range(*span)) else [*_touched(extents, span)]
        touched = touched[: 1 if marks == "first_token" else None]
        pairs += [(position, ids[position]) for position in touched]
        strengths += [records.strength_of(mark)] * len(touched)
        for position in touched:
            span_numbers[position] = span_numbers[position] or number
        num_spans_without_token += not touched
    long: list[np.ndarray] = []
    strengths_of_long: list[float] = []
    for entry in record.negative_token_ids:
        position, removed_ids, strength = entry[0], entry[1], records.strength_of(entry)
        if position >= len(ids):
            raise UsageError(
                f"record {record.id!r}: negative_token_ids has position {position}, but its "
                f"targets have {len(ids)} tokens."
            )
        for removed_id in (min(removed_ids, default=0), max(removed_ids, default=0)):
            if not 0 <= removed_id < vocabulary.size:
                raise UsageError(
                    f"record {record.id!r}: negative_token_ids has id {removed_id}, but the "
                    f"vocabulary has {vocabulary.size} ids."
                )
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
    return MarkedTarget(
        target_ids=np.array(ids, np.int32),
        negative_pairs=negative_pairs,
        negative_strengths=of_pairs,
        span_numbers=np.array(span_numbers, np.int32),
        num_spans_without_token=num_spans_without_token,
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


def alternative_token_ids(
    vocabulary: Tokeniser,
    target_ids: Sequence[int] | np.ndarray,
    span: Extent,
    alternatives: Sequence[str],
    supported: Sequence[str] = (),
    continuations: "Continuations | None" = None,
    measured: tuple[str, Sequence[Extent]] | None = None,
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """What to remove where a span begins, so that it is not replaced by an alternative.

    The alternatives are tokenised from the boundary where the span's first token begins: with its
    leading space if it has one, and with the characters that it holds before the span (in
    "▁(river", a span from "river" on has "(" before it). Where a lone "▁" comes before that token,
    an alternative such as "▁city" would take the place of the "▁", one such as "▁", "Zoo" goes on
    after it: each is removed where it would depart. A first token that ends before the
    alternative's own text begins is not removed: it begins innocent words too. Nor is one that
    begins a supported text, or that begins an innocent word and not all of the alternative. An
    unknown token is never removed, for it stands for much else.

    Args:
        vocabulary: the tokeniser of the targets.
        target_ids: the generated ids.
        span: (start, end) in the text of `target_ids`.
        alternatives: texts that would be just as wrong in the place of the span.
        supported: texts that would be right there.
        continuations: with the words that would neither be right nor wrong; None knows none.
        measured: the text in which the span is, and the extent of each id in it; None decodes the
            ids.

    Returns:
        Entries for `Record.negative_token_ids`: positions and, sorted, the ids to remove there.
        Empty when the span touches no token. A long list (`negative_sets.LEAST`) that other spans
        may share has the span's own first token, too, which the span removes anyway.

    Raises:
        UsageError: an alternative is blank.
    """
    text, extents = measured or vocabulary.extents(target_ids)
    first = next(_touched(extents, span), None)
    if first is None:
        return ()
    place = vocabulary.place_of(target_ids, first)
    before = place.before + text[extents[first][0] : span[0]]
    continuations = continuations or Continuations(vocabulary)
    return tuple(
        (place.start + is_after_space, ids)
        for is_after_space, ids in continuations.removed(
            before,
            place.space,
            alternatives,
            supported,
            said=(first > place.start, int(target_ids[first])),
        )
    )


class AllBut(Sequence[str]):
    """The texts of a list but one. Spans that share the list share what it comes to."""

    def __init__(self, texts: tuple[str, ...], but: str):
        """Keeps a list, without repeats, and the text that is left out if it is there."""
        self.texts, self.but = texts, but

    def __iter__(self) -> Iterator[str]:
        return (text for text in self.texts if text != self.but)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AllBut | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


_Spot = tuple[bool, int]  # whether it is after a lone "▁" that was generated, and an id there
_Removed = tuple[tuple[bool, tuple[int, ...]], ...]  # sorted ids, before and after such a "▁"


class _First(NamedTuple):
    """The token with which a text departs from what was generated.

    Attributes:
        id: the token's id.
        is_after_space: whether it comes after a lone "▁" that was generated, too.
        reaches: whether it spells some of the text, rather than what stands before it alone.
        is_whole: whether it spells all of it.
    """

    id: int
    is_after_space: bool
    reaches: bool
    is_whole: bool


class _Shared:
    """What is removed in one kind of place for a list of alternatives.

    Attributes:
        texts: the list.
        removed: for all of it.
    """

    _MOST_VARIANTS = 64

    def __init__(self, texts: tuple[str, ...], spots: Iterable[tuple[str, _Spot]]):
        """Takes the texts that are removed, each with its token."""
        self.texts = texts
        alone: dict[_Spot, str | None] = {}
        for text, spot in spots:
            alone[spot] = None if spot in alone else text
        self.removed = _by_place(alone)
        self._only = {text: spot for spot, text in alone.items() if text is not None}
        self._without: dict[str, _Removed] = {}

    def without(self, text: str, said: _Spot) -> _Removed:
        """What is removed for all texts but one, and for what was said if it is among many."""
        spot = self._only.get(text)
        if spot is None or (spot == said and len(dict(self.removed)[spot[0]]) >= LEAST):
            return self.removed
        if text not in self._without:
            after, id_ = spot
            _make_room(self._without, self._MOST_VARIANTS)
            left = (
                (where, tuple(i for i in ids if i != id_) if where == after else ids)
                for where, ids in self.removed
            )
            self._without[text] = tuple((where, ids) for where, ids in left if ids)
        return self._without[text]


def _by_place(spots: Iterable[_Spot]) -> _Removed:
    removed: dict[bool, list[int]] = {}
    for is_after_space, id_ in sorted(spots):
        removed.setdefault(is_after_space, []).append(id_)
    return tuple((where, tuple(ids)) for where, ids in removed.items())


def _make_room(cache: dict[Any, Any], most: int) -> None:
    """Forgets what was put there first, where another one would be too many."""
    if len(cache) >= most:
        del cache[next(iter(cache))]


class Continuations:
    """How texts go on after others; what is the same for many spans is computed once."""

    _MOST_PLACES = 64  # of places whose texts are kept: most spans begin after a space
    _MOST_TEXTS = 1 << 18  # at a place
    _MOST_SHARED = 256  # of lists at a place

    def __init__(
        self, vocabulary: Tokeniser, innocent: Sequence[str] | Callable[[], Sequence[str]] = ()
    ):
        """Keeps the words that would be neither right nor wrong in the place of any span.

        A function finds them when the first alternative is looked at: of many texts there is none.
        """
        self._vocabulary = vocabulary
        self._innocent = innocent
        self._known: dict[tuple[str, int | None], dict[str, _First | None]] = {}
        self._innocent_firsts: dict[tuple[str, int | None], frozenset[_Spot]] = {}
        self._shared: dict[tuple[str, int | None, int, tuple[str, ...]], _Shared] = {}

    def removed(
        self,
        before: str,
        space: int | None,
        texts: Sequence[str],
        supported: Sequence[str],
        said: _Spot,
    ) -> _Removed:
        """The tokens to remove in one kind of place; see `alternative_token_ids`.

        Args:
            before: what stands before the texts.
            space: the id of a lone "▁" that comes before, if there is one.
            texts: that would be wrong.
            supported: that would be right.
            said: the token that is marked.
        """
        if not isinstance(texts, AllBut):
            return _by_place({spot for _, spot in self._spots(before, space, texts, supported)})
        key = before, space, id(texts.texts), tuple(supported)
        shared = self._shared.pop(key, None)
        if shared is None:
            _make_room(self._shared, self._MOST_SHARED)
            # It keeps the list, so that no other one gets its identity.
            shared = _Shared(texts.texts, self._spots(before, space, texts.texts, supported))
        self._shared[key] = shared  # the last to be forgotten
        return shared.without(texts.but, said)

    def _spots(
        self, before: str, space: int | None, texts: Sequence[str], supported: Sequence[str]
    ) -> Iterator[tuple[str, _Spot]]:
        """Those of the texts that are removed, with their tokens."""
        kept = {
            (first.is_after_space, first.id) for _, first in self._firsts(before, space, supported)
        }
        of_words = self._firsts_of_words(before, space)
        for text, first in self._firsts(before, space, texts):
            spot = first.is_after_space, first.id
            if (
                first.reaches
                and first.id != self._vocabulary.unknown_id
                and spot not in kept
                and (first.is_whole or spot not in of_words)
            ):
                yield text, spot

    def _firsts(
        self, before: str, space: int | None, texts: Sequence[str]
    ) -> list[tuple[str, _First]]:
        """The first token of each text; without those texts that come to none."""
        place = before, space
        if place not in self._known:
            _make_room(self._known, self._MOST_PLACES)
        known = self._known.setdefault(place, {})
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if len(known) + len(missing) > self._MOST_TEXTS:  # as if every record had its own
            known.clear()
            missing = [*dict.fromkeys(texts)]
        for text, tokens in zip(
            missing, _tokens_after(self._vocabulary, before, missing), strict=True
        ):
            num_shared = int(bool(tokens) and tokens[0][0] == space)
            if len(tokens) == num_shared:
                known[text] = None
                continue
            first_id, reaches = tokens[num_shared]
            known[text] = _First(first_id, bool(num_shared), reaches, len(tokens) == 1 + num_shared)
        return [(text, first) for text in texts if (first := known[text]) is not None]

    def _firsts_of_words(self, before: str, space: int | None) -> frozenset[_Spot]:
        """The first tokens of all innocent words."""
        place = before, space
        if callable(self._innocent):
            self._innocent = self._innocent()
        if place not in self._innocent_firsts:
            _make_room(self._innocent_firsts, self._MOST_SHARED)
            self._innocent_firsts[place] = frozenset(
                (first.is_after_space, first.id)
                for _, first in self._firsts(before, space, self._innocent)
            )
        return self._innocent_firsts[place]


class Completions:
    """What would complete a text: a decoding mask as marks."""

    def __init__(self, vocabulary: Tokeniser):
        self._vocabulary = vocabulary
        # Of the last lists: what is wrong for an output, and what is removed where it stands.
        self._known: dict[Listed, tuple[np.ndarray, dict[Reading, frozenset[int]]]] = {}

    def ids(
        self, target_ids: Sequence[int] | np.ndarray, listed: Listed, but: Collection[int] = ()
    ) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """At every position, the ids that would complete one of the texts, however it is cut up.

        They are what `masking.Mask` removes there, but that nothing has to be made whole.

        Args:
            target_ids: the generated ids.
            listed: texts that must not come up.
            but: ids that are left out.

        Returns:
            Entries for `Record.negative_token_ids`: positions and, sorted, the ids to remove there.
        """
        compiled = listed.compiled(self._vocabulary)
        if listed not in self._known:
            _make_room(self._known, _MOST_LISTS)
            self._known[listed] = compiled.flags(listed.allowed), {}
        flags, removed_at = self._known[listed]
        reading, found = BEGINNING, []
        for position, token in enumerate(int(i) for i in target_ids):
            if reading not in removed_at:
                removed_at[reading] = frozenset(compiled.removed(reading, flags).tolist())
            if removed := removed_at[reading].difference(but):
                found.append((position, tuple(sorted(removed))))
            reading = compiled.read(reading, token)
        return tuple(found)


def _touched(extents: Sequence[Extent], span: Extent) -> Iterator[int]:
    start, end = span
    return (i for i, (a, b) in enumerate(extents) if a < b and a < end and start < b)


def _tokens_after(
    vocabulary: Tokeniser, before: str | None, strings: Sequence[str]
) -> list[list[tuple[int, bool]]]:
    """`Tokeniser.continuations` of texts that are not blank, without the spaces at their ends."""
    strings = [string.strip() for string in strings]
    if not all(strings):
        raise UsageError("alternatives: expected texts that are not blank, found a blank one.")
    return vocabulary.continuations(before, strings)
