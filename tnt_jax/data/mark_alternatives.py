"""What else is removed where unwanted text stands: what would be just as wrong in its place.

Of a mark's alternatives the first tokens are removed where the mark begins (`token_ids`);
of a list that must not come up at all, every token that would complete one of its texts
(`Completions`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.data import marks
from tnt_jax.data.negative_sets import LEAST
from tnt_jax.data.token_automaton import BEGINNING, Listed, Reading
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers.tokenization import Extent, Tokeniser

_MOST_LISTS = 256  # whose flags are kept: records with the same inputs have the same list


def token_ids(
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
    first = next(marks.touched(extents, span), None)
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
        """The tokens to remove in one kind of place; see `token_ids`.

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


def _tokens_after(
    vocabulary: Tokeniser, before: str | None, strings: Sequence[str]
) -> list[list[tuple[int, bool]]]:
    """`Tokeniser.continuations` of texts that are not blank, without the spaces at their ends."""
    strings = [string.strip() for string in strings]
    if not all(strings):
        raise UsageError("alternatives: expected texts that are not blank, found a blank one.")
    return vocabulary.continuations(before, strings)
