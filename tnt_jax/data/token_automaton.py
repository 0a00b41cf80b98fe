"""Which next tokens would have a listed text in an output, however its characters are cut up.

A `TokenAutomaton` is a list of texts (`text_automaton`) read through the tokens of a vocabulary:
compiled once, and then shared by decoding, `annotate` and training. A token is *removed* where the
text up to it and with it would be marked if it ended there. Until a listed text that may be said
("rice boat", where "rice" may not) is whole, what is marked on the way to it is not removed; what
leads elsewhere is.

Tokens are read as bytes. In most states most tokens come to what they come to where no listed text
is under way (the *base* of a state), so that those that do not are listed beside the base's own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.data import words
from tnt_jax.data.text_automaton import Automaton
from tnt_jax.runtime.errors import UsageError

# Of a listed text: time and memory grow with the square of its words where these repeat.
_MOST_CHARACTERS = 2000

_CONTINUES = range(0x80, 0xC0)  # bytes of UTF-8 that begin no character
_MOST_KNOWN = 64  # sets of texts that may be said
_OF_RUN = 256  # added to a byte of a run that is text as a whole, or not at all


class Reading(NamedTuple):
    """Where an output stands: a state of the automaton, and of a character that is not whole."""

    state: int
    within: int


BEGINNING = Reading(Automaton.START, 0)


class Listed(NamedTuple):
    """Texts that must not come up in an output.

    Attributes:
        texts: all that are listed, the same ones for every output: they are compiled once.
        allowed: those of them that may come up in this one.
        case_sensitive: whether letters count as they are.
    """

    texts: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    case_sensitive: bool = False

    def compiled(self, vocabulary: Any, *, removes_starts: bool = False) -> "TokenAutomaton":
        """The list for a vocabulary; the last few are kept.

        Raises:
            UsageError: a text is too long.
        """
        longest = max(self.texts, key=len, default="")
        if len(longest) > _MOST_CHARACTERS:
            raise UsageError(
                f"expected listed texts of at most {_MOST_CHARACTERS:,} characters, where tokens "
                f"are removed that would complete them, found one of {len(longest):,}: "
                f"{longest[:40]!a} ... Shorten it in the list, or take it out."
            )
        return _compiled(self.texts, vocabulary, self.case_sensitive, removes_starts)


class FlagPlaces(NamedTuple):
    """The places of the flags within `TokenAutomaton.flags`. Place 0 holds a flag that is False.

    Methods take numbers or arrays of them, and return as many places.

    Attributes:
        num_states: number of states of the automaton.
    """

    num_states: int

    def into(self, state: Any) -> Any:
        """The places of the flags that say whether no token may lead into a state."""
        return 1 + state

    def end_in(self, state: Any) -> Any:
        """The places of the flags that say whether no output may end in a state."""
        return 1 + self.num_states + state

    def of_mentions(self, made: np.ndarray) -> np.ndarray:
        """The places (int32) of the flags that say whether a set has an unwanted mention.

        Set 0 has no mention: its place is 0.
        """
        return np.where(made > 0, 1 + 2 * self.num_states + made, 0).astype(np.int32)


class Entries(NamedTuple):
    """What tokens come to: one row for each, sorted by where they come.

    Attributes:
        starts: `[N + 1]` int32: the first row of each place.
        tokens: `[E]` int32 ids.
        ends: `[E]` int32: the flag (`TokenAutomaton.flags`) of the state after it.
        made: `[E]` int32: the flag of the mentions that are made up to it.
        states: `[E]` int32: the state after it.
        new: `[E]` int32: the set of those mentions that were not there before it.
    """

    starts: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray
    made: np.ndarray
    states: np.ndarray
    new: np.ndarray

    def at(self, place: int) -> "Entries":
        """The entries of one place."""
        rows = slice(*self.starts[place : place + 2].tolist())
        return Entries(self.starts[place : place + 2], *(column[rows] for column in self[1:]))


class Utf8(NamedTuple):
    """Reads bytes as characters of classes; state 0 is between characters.

    The first 256 columns are of bytes. The others are of those that are tokens by themselves, where
    a run of these is text as a whole or none of it is; the last state is within one that is not.

    Attributes:
        next_state: `[U, 512]` int32.
        class_of: `[U, 512]` int32: the class of the character that a byte makes whole, else -1.
        breaks: `[U, 512]` bool: whether the bytes before it, or it alone, come to no character.
    """

    next_state: np.ndarray
    class_of: np.ndarray
    breaks: np.ndarray

    @classmethod
    def of(cls, classes: np.ndarray) -> "Utf8":
        """The tables for `[0x110000]` classes of code points."""
        number: dict[tuple[int, ...], int] = {}
        rows: list[tuple[int, ...]] = []

        def node(targets: Sequence[int]) -> int:
            """A state by what its 64 continuations lead to; -1 where none does."""
            key = tuple(targets)
            if set(key) == {-1}:
                return -1
            if key not in number:
                rows.append(key)
                number[key] = len(rows)
            return number[key]

        # The last byte leads to a class, written as -2 - class; the ones before it to a state.
        blocks, which = np.unique(classes.reshape(-1, 64), axis=0, return_inverse=True)
        last = [node((-2 - block).tolist()) for block in blocks]
        block = [last[i] for i in which.reshape(-1).tolist()]
        block[0xD800 >> 6 : 0xE000 >> 6] = [-1] * (0x800 >> 6)  # surrogates
        block += [-1] * (5 * 4096 - len(block))  # there are no more code points
        three = [block[i : i + 64] for i in range(0, 0x10000 >> 6, 64)]
        three[0] = [-1] * 32 + three[0][32:]  # what two bytes say
        four = [
            [node(block[i : i + 64]) for i in range(first, first + 4096, 64)]
            for first in range(0, 5 * 4096, 4096)
        ]
        four[0] = [-1] * 16 + four[0][16:]
        leads = dict(zip(range(0xC2, 0xE0), block[2:32], strict=True))
        leads |= {0xE0 + i: node(of) for i, of in enumerate(three)}
        leads |= {0xF0 + i: node(of) for i, of in enumerate(four)}

        next_state = np.zeros((1 + len(rows), 256), np.int32)
        class_of = np.full((1 + len(rows), 256), -1, np.int32)
        breaks = np.ones((1 + len(rows), 256), bool)
        breaks[0] = False
        for byte in range(256):
            if byte < 0x80:
                class_of[:, byte] = classes[byte]
            elif byte in leads and leads[byte] >= 0:
                next_state[:, byte] = leads[byte]
            else:
                breaks[0, byte] = True
        for state, targets in enumerate(rows, start=1):
            for byte, target in zip(_CONTINUES, targets, strict=True):
                if target != -1:
                    breaks[state, byte] = False
                    class_of[state, byte] = -2 - target if target < -1 else -1
                    next_state[state, byte] = max(target, 0)
        # The last state goes on as the first one does, after a token that is not of the run.
        next_state, class_of, breaks = (
            np.vstack([of, of[:1]]) for of in (next_state, class_of, breaks)
        )
        broken_run = len(breaks) - 1
        of_run = breaks.copy()
        of_run[broken_run] = True
        return cls(
            np.hstack([next_state, np.where(of_run, broken_run, next_state)]),
            np.hstack([class_of, np.where(of_run, -1, class_of)]),
            np.hstack([breaks, of_run]),
        )

    def possible(self, num_classes: int) -> np.ndarray:
        """`[U, C]` bool: the classes of the characters that a state may come to."""
        found = np.zeros((len(self.next_state), num_classes), bool)
        continues = slice(_CONTINUES.start, _CONTINUES.stop)
        for _ in range(3):
            for state in range(1, len(found) - 1):
                whole = self.class_of[state, continues]
                found[state, whole[whole >= 0]] = True
                found[state] |= found[np.unique(self.next_state[state, continues])].any(0)
            found[0] = False
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A list of texts, read through the tokens of a vocabulary.

    Axes: `S` states, `C` classes of characters, `U` states within a character, `V` ids.

    Attributes:
        automaton: the automaton of the texts, which reads characters.
        utf8: reads bytes as the automaton's classes of characters.
        says_broken: whether bytes that form no character are said, as "\ufffd", or left out.
        token_bytes: the bytes of each id, as columns of `utf8`; none for an id that says nothing.
        base_numbers: `[S]` int32: the number of each state's base.
        bases: what tokens come to at each base.
        others: what tokens come to in each state, where that is not what they come to at its base.
        live: `[S, U]` bool: whether a character may still lead on in a listed text.
        removes_starts: whether what begins a listed text, and no other word, is removed.
    """

    automaton: Automaton
    utf8: Utf8
    says_broken: bool
    token_bytes: tuple[tuple[int, ...], ...]
    base_numbers: np.ndarray
    bases: Entries
    others: Entries
    live: np.ndarray
    removes_starts: bool

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        vocabulary: Any,
        *,
        case_sensitive: bool = False,
        removes_starts: bool = False,
    ) -> "TokenAutomaton":
        """Compiles a list of texts for a vocabulary.

        Args:
            texts: listed words and phrases.
            vocabulary: a `Tokeniser`.
            case_sensitive: whether letters count as they are.
            removes_starts: also know which tokens would begin a text.
        """
        automaton = Automaton.of(texts, case_sensitive=case_sensitive)
        utf8 = Utf8.of(automaton.char_classes())
        contents = [tuple(of) for of in vocabulary.token_bytes]
        for i in vocabulary.run_ids:
            contents[i] = (_OF_RUN + contents[i][0],)
        compiler = _Compiler(
            automaton, utf8, tuple(contents), vocabulary.says_broken, removes_starts
        )
        return compiler.compiled()

    # ------------------------------------------------------------------------------------- Reading

    def read(self, reading: Reading, token: int) -> Reading:
        """Where an output stands after one more token."""
        content = self.token_bytes[token] if token < len(self.token_bytes) else ()
        return self._trace(reading, content)[0]

    # --------------------------------------------------------------------------------------- Flags

    @property
    def flag_places(self) -> FlagPlaces:
        """The places of this list's flags."""
        return FlagPlaces(len(self.automaton.states))

    def flags(
        self, allowed: Iterable[str], innocent: "Innocent | _InnocentToo | None" = None
    ) -> np.ndarray:
        """What is wrong for an output, given what may be said in it.

        Args:
            allowed: the texts of the list that may.
            innocent: words that may begin as listed texts do; None knows none.

        Returns:
            `[F]` bool: False; of each state whether no token may lead there, and whether no output
            may end there; of each set of mentions whether one of them is unwanted; of each phrase
            whether it is.
        """
        of = self._of_allowed(tuple(allowed))
        wrong = of.wrong
        if self.removes_starts:
            is_shared = of.is_shared
            if innocent is not None:
                is_shared = is_shared | innocent.states(self.automaton)
            wrong = wrong | (of.is_begun & ~is_shared)
        flags = np.concatenate([[False], wrong, of.ended, of.made, of.is_unwanted[:-1]])
        # There is no hope where no token goes on: a vocabulary may not spell the rest from there.
        hopeful = np.flatnonzero(of.ended & ~wrong).tolist()
        while stuck := [state for state in hopeful if not self._goes_on(state, flags)]:
            flags[self.flag_places.into(np.array(stuck))] = True
            hopeful = [state for state in hopeful if state not in stuck]
        return flags

    @functools.cached_property
    def _of_allowed(self) -> Callable[[tuple[str, ...]], "_OfAllowed"]:
        """`_what_is_wrong`; the last few answers are kept."""
        return functools.lru_cache(_MOST_KNOWN)(self._what_is_wrong)

    def _what_is_wrong(self, allowed: tuple[str, ...]) -> "_OfAllowed":
        """What is wrong, given what may be said and no innocent words."""
        automaton = self.automaton
        is_unwanted = np.ones(len(automaton.phrase_of) + 1, bool)
        is_unwanted[automaton.numbers(allowed)] = False
        is_unwanted[-1] = False  # stands for no phrase
        ended = np.any(is_unwanted[_padded(automaton.ended)], axis=1)
        made = np.any(is_unwanted[_padded(automaton.sets)], axis=1)
        # A text that may be said, and is under way, may still make right what is wrong so far.
        leads, is_shared, is_begun = np.zeros((3, len(ended)), bool)
        for begun, amid, is_wrong in zip(
            automaton.begun, automaton.amid, is_unwanted[:-1].tolist(), strict=True
        ):
            (is_begun if is_wrong else is_shared)[list(begun)] = True
            leads[list(() if is_wrong else amid)] = True
        after = np.array([state for state, _ in automaton.retreats])
        loses = np.any(is_unwanted[_padded([of for _, of in automaton.retreats])], axis=1)
        hopes = _grown(leads, after, ~loses)
        # Or the word that is under way ends here.
        space = automaton.others[words.SPACE]
        hopes = _grown(hopes, automaton.next_state[:, space], ~made[automaton.made[:, space]])
        return _OfAllowed(ended & ~hopes, is_begun, is_shared, ended, made, is_unwanted)

    def _goes_on(self, state: int, flags: np.ndarray) -> bool:
        """Whether a token may follow that goes on with what is under way."""
        others = self.others.at(state)
        is_wrong = flags[others.ends] | flags[others.made]
        # What a first character makes is wrong with every token that it begins.
        made = self.flag_places.of_mentions(self.automaton.made[state])
        of_first = np.append(flags[made], False)
        is_wrong |= of_first[self.first_classes[others.tokens]]
        return not np.all(is_wrong) or bool(np.any(self.live[state][self._within_parts]))

    @functools.cached_property
    def _within_parts(self) -> np.ndarray:
        """The states within a character that tokens lead to which are a part of one."""
        is_part = (self.first_classes == self.automaton.next_state.shape[1]) & (
            self.ends_within > 0
        )
        return np.unique(self.ends_within[is_part])

    # ------------------------------------------------------------------------------------- Removed

    def removed(self, reading: Reading, flags: np.ndarray) -> np.ndarray:
        """The ids that would have an unwanted text in an output, sorted.

        What an output says before them does not count: neither what is wrong in it, nor that it has
        to go on in some way (`decoding` counts that, too).

        Args:
            reading: where the output stands.
            flags: what is wrong in the output (`flags`).
        """
        state, within = reading
        automaton = self.automaton
        after = state
        if within and self.says_broken:
            after = int(automaton.next_state[state, automaton.broken])
        is_removed = np.zeros(len(self.token_bytes), bool)
        base = self.bases.at(self.base_numbers[after])
        np.logical_or.at(is_removed, base.tokens, flags[base.ends] | flags[base.made])
        others = self.others.at(after)
        is_wrong = flags[others.ends] | flags[others.made]
        if flags[self.flag_places.end_in(after)]:
            pairs = zip(others.states.tolist(), others.new.tolist(), strict=True)
            is_wrong &= np.array([self._is_new(after, *pair, flags) for pair in pairs], bool)
        is_removed[others.tokens] = is_wrong
        # What a first character makes is wrong with every token that it begins.
        made = [
            self._is_unwanted(set(automaton.sets[of]) - set(automaton.ended[after]), flags)
            for of in automaton.made[after].tolist()
        ]
        is_removed |= np.array([*made, False])[self.first_classes]
        if within:
            for token in self.within_tokens.tolist():
                end, made = self._trace(Reading(state, within), self.token_bytes[token])
                new = frozenset(made) - set(automaton.ended[state])
                is_removed[token] = self._is_unwanted(new, flags) or (
                    bool(flags[self.flag_places.into(end.state)])
                    and self._is_new(state, end.state, 0, flags)
                )
        return np.flatnonzero(is_removed)

    def removed_everywhere(self) -> tuple[np.ndarray, frozenset[int]]:
        """The ids that are removed wherever an output stands, and the phrases that they hold."""
        flags = self.flags(())
        bases = np.flatnonzero(self.automaton.base == np.arange(len(self.automaton.base)))
        ids = functools.reduce(
            np.intersect1d, (self.removed(Reading(int(base), 0), flags) for base in bases)
        )
        held: set[int] = set()
        for token in ids.tolist():
            end, made = self._trace(BEGINNING, self.token_bytes[token])
            held.update(made, self.automaton.ended[end.state])
        return ids, frozenset(held)

    @functools.cached_property
    def first_classes(self) -> np.ndarray:
        """`[V]` int32: the class of each token's first character; C for one without any."""
        return self._outlines[0]

    @functools.cached_property
    def ends_within(self) -> np.ndarray:
        """`[V]` int32: where in a character each token ends that begins between two."""
        return self._outlines[1]

    @functools.cached_property
    def _outlines(self) -> np.ndarray:
        utf8, num_classes = self.utf8, self.automaton.next_state.shape[1]
        broken = np.where(utf8.breaks & self.says_broken, self.automaton.broken, -1)
        # For each byte the class that is said first.
        said = np.where(broken >= 0, broken, utf8.class_of).tolist()
        following = utf8.next_state.tolist()
        found = np.zeros((2, len(self.token_bytes)), np.int32)
        for token, content in enumerate(self.token_bytes):
            first, within = num_classes, 0
            for byte in content:
                if first == num_classes and said[within][byte] >= 0:
                    first = said[within][byte]
                within = following[within][byte]
            found[:, token] = first, within
        return found

    @functools.cached_property
    def within_tokens(self) -> np.ndarray:
        """`[H]` int32: the ids that may go on within a character, or in a run of bytes."""
        return np.array(
            [
                i
                for i, of in enumerate(self.token_bytes)
                if of and (of[0] in _CONTINUES or of[0] >= _OF_RUN)
            ],
            np.int32,
        )

    def _trace(self, reading: Reading, content: Sequence[int]) -> tuple[Reading, list[int]]:
        """Where bytes lead, and the mentions that they make."""
        state, within = reading
        tables, utf8, made = self.automaton, self.utf8, []
        for byte in content:
            numbers = [tables.broken] if utf8.breaks[within, byte] and self.says_broken else []
            if utf8.class_of[within, byte] >= 0:
                numbers.append(utf8.class_of[within, byte])
            for number in numbers:
                made += tables.sets[tables.made[state, number]]
                state = int(tables.next_state[state, number])
            within = int(utf8.next_state[within, byte])
        return Reading(state, within), made

    def _is_new(self, before: int, after: int, new: int, flags: np.ndarray) -> bool:
        """Whether more is wrong in a state after a token than in the one before it."""
        ended = self.automaton.ended
        mentions = {*self.automaton.sets[new], *ended[after]} - set(ended[before])
        return self._is_unwanted(mentions, flags) or not ended[after]

    def _is_unwanted(self, mentions: Collection[int], flags: np.ndarray) -> bool:
        num_phrases = len(self.automaton.phrase_of)
        return any(flags[p - num_phrases] for p in mentions)


class _OfAllowed(NamedTuple):
    """What is wrong where some texts may be said.

    Attributes:
        wrong: `[S]` bool: of each state whether a text that may not be said is whole, for good.
        is_begun: `[S]` bool: whether one is under way.
        is_shared: `[S]` bool: whether one that may be said is under way.
        ended: `[S]` bool: whether one that may not be said would be mentioned if the text ended.
        made: `[M]` bool: of each set of mentions whether one is unwanted.
        is_unwanted: `[P + 1]` bool: of each phrase whether it is; at last False.
    """

    wrong: np.ndarray
    is_begun: np.ndarray
    is_shared: np.ndarray
    ended: np.ndarray
    made: np.ndarray
    is_unwanted: np.ndarray


class Innocent:
    """Words that are not listed, by how they begin.

    Attributes:
        words: the words, as `words.keys` compares them.
    """

    def __init__(self, texts: Iterable[str], *, case_sensitive: bool = False):
        self._case_sensitive = case_sensitive
        self.words = frozenset(
            word for text in texts for word in words.keys(text, case_sensitive=case_sensitive)
        )
        self._begun = {""} if self.words else set[str]()
        self._begun.update(*map(_prefixes, self.words))
        self._known: tuple[Automaton, np.ndarray] | None = None

    def states(self, automaton: Automaton) -> np.ndarray:
        """`[S]` bool: whether what is under way in a state may be these words as well."""
        if self._known is None or self._known[0] is not automaton:
            found = np.zeros(len(automaton.states), bool)
            found[[n for n in range(len(found)) if self._may_be_in(automaton, n)]] = True
            self._known = automaton, found
        return self._known[1]

    def and_also(self, texts: Iterable[str]) -> "_InnocentToo":
        """These words and those of further texts."""
        return _InnocentToo(self, Innocent(texts, case_sensitive=self._case_sensitive))

    def may_add(self, automaton: Automaton) -> Callable[[str], bool]:
        """Tells of another word whether `states` may have more where it is one of these, too."""
        own = self.states(automaton)
        open_states = {state for of in automaton.begun for state in of if not own[state]}
        begun = {automaton.states[state].before for state in open_states} - {""}
        on_the_way = {
            word for state in open_states for word in automaton.paths[automaton.states[state].node]
        }

        def adds(text: str) -> bool:
            return any(
                word in on_the_way or not begun.isdisjoint(_prefixes(word))
                for word in words.keys(text, case_sensitive=self._case_sensitive)
            )

        return adds

    def _may_be_in(self, automaton: Automaton, number: int, too: "Innocent | None" = None) -> bool:
        state = automaton.states[number]
        of_both = (self,) if too is None else (self, too)
        return any(state.before in of._begun for of in of_both) and all(
            any(word in of.words for of in of_both) for word in automaton.paths[state.node]
        )


class _InnocentToo(NamedTuple):
    """Words that are innocent in every output, and those of one prompt.

    Attributes:
        many: the words of all outputs; which states they may be in is computed once.
        few: the words of the prompt; only states that they can change are looked at.
    """

    many: Innocent
    few: Innocent

    def states(self, automaton: Automaton) -> np.ndarray:
        """`[S]` bool: whether what is under way in a state may be words of either."""
        found = self.many.states(automaton).copy()
        candidates = {
            number
            for begun in self.few._begun - {""}  # what stands behind a whole word is below
            for number in automaton.states_before.get(begun, ())
        } | {number for word in self.few.words for number in automaton.states_behind.get(word, ())}
        for number in candidates:
            found[number] |= self.many._may_be_in(automaton, number, self.few)
        return found


def _prefixes(word: str) -> Iterable[str]:
    """What a word begins with, up to all of it: no listed text is longer."""
    return itertools.accumulate(word[:_MOST_CHARACTERS])


@functools.lru_cache(maxsize=4)
def _compiled(
    texts: tuple[str, ...], vocabulary: Any, case_sensitive: bool, removes_starts: bool
) -> TokenAutomaton:
    return TokenAutomaton.of(
        texts, vocabulary, case_sensitive=case_sensitive, removes_starts=removes_starts
    )


def _grown(those: np.ndarray, after: np.ndarray, passes: np.ndarray) -> np.ndarray:
    """Those states, and all from which one may pass to one of them."""
    while True:
        more = those | (passes & those[after])
        if (more == those).all():
            return those
        those = more


def _padded(groups: Sequence[Collection[int]]) -> np.ndarray:
    """Groups of phrases as `[N, W]`, filled up with -1."""
    width = max(map(len, groups), default=0) or 1
    found = np.full((len(groups), width), -1)
    for row, group in zip(found, groups, strict=True):
        row[: len(group)] = list(group)
    return found


class _Compiler:
    """Compares what tokens come to in each state with what they come to at its base."""

    def __init__(
        self,
        automaton: Automaton,
        utf8: Utf8,
        token_bytes: tuple[tuple[int, ...], ...],
        says_broken: bool,
        removes_starts: bool,
    ):
        self._automaton = automaton
        self._utf8 = utf8
        self._token_bytes = token_bytes
        self._says_broken = says_broken
        num_states = len(automaton.states)
        # One more state: of nothing, which is like no other.
        self._next = np.vstack(
            [automaton.next_state, np.full_like(automaton.next_state[:1], num_states)]
        )
        self._made = np.vstack([automaton.made, np.zeros_like(automaton.made[:1])])
        self._sets: dict[frozenset[int], int] = {of: n for n, of in enumerate(automaton.sets)}
        self._ended = [*map(frozenset, automaton.ended), frozenset[int]()]
        says = np.array([bool(of) for of in self._ended])
        if removes_starts:
            says[list({state for of in automaton.begun for state in of})] = True
        self._says = says
        self._removes_starts = removes_starts
        self._joined: dict[tuple[int, int], int] = {}
        self._new: dict[tuple[int, int], int] = {}

    def compiled(self) -> TokenAutomaton:
        """Makes all tables."""
        automaton, num_states = self._automaton, len(self._automaton.states)
        is_base = automaton.base == np.arange(num_states)
        bases = np.flatnonzero(is_base)
        nodes, self._within = self._tree()
        # Tokens by the node at which they end.
        order = np.argsort(nodes, kind="stable").astype(np.int32)
        self._tokens = order
        self._first_token = np.searchsorted(nodes[order], np.arange(len(self._first_child) + 1))
        differs = automaton.next_state != automaton.next_state[automaton.base]
        self._live = (differs.astype(np.float32) @ self._utf8.possible(differs.shape[1]).T) > 0
        others = np.flatnonzero(~is_base)
        of_bases = self._entries(bases, np.full(len(bases), num_states), np.arange(len(bases)))
        of_others = self._entries(others, automaton.base[others], others)
        base_numbers = np.searchsorted(bases, automaton.base).astype(np.int32)
        full = dataclasses.replace(automaton, sets=tuple(self._sets))
        return TokenAutomaton(
            automaton=full,
            utf8=self._utf8,
            says_broken=self._says_broken,
            token_bytes=self._token_bytes,
            base_numbers=base_numbers,
            bases=self._sorted(of_bases, len(bases)),
            others=self._sorted(of_others, num_states),
            live=self._live,
            removes_starts=self._removes_starts,
        )

    def _tree(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens as a tree over classes; of each its node, and where in a character it ends."""
        lengths = np.array([len(of) for of in self._token_bytes])
        content = np.fromiter(itertools.chain.from_iterable(self._token_bytes), np.int32)
        firsts = np.cumsum(lengths) - lengths
        node = np.zeros(len(lengths), np.int64)
        within = np.zeros(len(lengths), np.int64)
        number: dict[int, int] = {}
        parents, classes = [-1], [-1]
        num_classes = self._automaton.next_state.shape[1]

        def descend(which: np.ndarray, of: np.ndarray) -> None:
            pairs, place = np.unique(node[which] * num_classes + of, return_inverse=True)
            found = np.zeros(len(pairs), np.int64)
            for i, pair in enumerate(pairs.tolist()):
                if pair not in number:
                    number[pair] = len(parents)
                    parents.append(pair // num_classes)
                    classes.append(pair % num_classes)
                found[i] = number[pair]
            node[which] = found[place]

        active = np.flatnonzero(lengths)
        for place in range(int(lengths.max(initial=0))):
            active = active[lengths[active] > place]
            byte = content[firsts[active] + place]
            at = within[active]
            if self._says_broken:
                broken = active[self._utf8.breaks[at, byte]]
                descend(broken, np.full(len(broken), self._automaton.broken))
            of = self._utf8.class_of[at, byte]
            descend(active[of >= 0], of[of >= 0])
            within[active] = self._utf8.next_state[at, byte]
        self._classes = np.array(classes)
        by_parent = np.argsort(parents, kind="stable")
        self._children = by_parent[1:]  # without the root
        ordered = np.array(parents)[by_parent][1:]
        self._first_child = np.searchsorted(ordered, np.arange(len(parents) + 1))
        return node, within

    def _entries(
        self, states: np.ndarray, bases: np.ndarray, places: np.ndarray
    ) -> list[np.ndarray]:
        """Columns (place, token, state after it, mentions made, of these the new ones)."""
        # A walk down the tree from all states at once, each beside its base.
        walk = [states, bases, *np.zeros((3, len(states)), np.int64), np.arange(len(states))]
        found: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(5)]
        for depth in itertools.count():
            if not len(walk[0]):
                return [np.concatenate(column) for column in found]
            at, base, made, of_base, node, origin = walk
            num = np.diff(self._first_child)[node]
            rows = np.repeat(np.arange(len(node)), num)
            within = np.arange(len(rows)) - np.repeat(np.cumsum(num) - num, num)
            node = self._children[self._first_child[node][rows] + within]
            of = self._classes[node]
            at, base, made, of_base, origin = (x[rows] for x in (at, base, made, of_base, origin))
            made = self._join(made, self._made[at, of])
            of_base = self._join(of_base, self._made[base, of])
            at, base = self._next[at, of], self._next[base, of]
            new = self._without(made, states[origin])
            # Only what differs from the base goes on.
            is_kept = at != base
            # What a first character makes is looked up when asked for: it may be most tokens.
            same = ~is_kept & (made != of_base) & (depth > 0)
            is_kept[same] = new[same] != self._without(of_base[same], states[origin[same]])
            at, base, made, of_base, node, origin, new = (
                x[is_kept] for x in (at, base, made, of_base, node, origin, new)
            )
            says = self._says[at] | (new > 0) | self._says[base] | (of_base > 0)
            self._collect(found, says, places[origin], node, at, made, new)
            walk = [at, base, made, of_base, node, origin]
        raise AssertionError("unreachable")

    def _collect(self, found, says, places, node, at, made, new) -> None:
        """Adds the tokens that end at nodes."""
        num = np.where(says, np.diff(self._first_token)[node], 0)
        rows = np.repeat(np.arange(len(node)), num)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(num) - num, num)
        tokens = self._tokens[self._first_token[node[rows]] + within]
        for column, values in zip(
            found, (places[rows], tokens, at[rows], made[rows], new[rows]), strict=True
        ):
            column.append(values)

    def _sorted(self, columns: list[np.ndarray], num_places: int) -> Entries:
        places, tokens, states, made, new = columns
        order = np.lexsort((tokens, places))
        places, tokens, states, made, new = (x[order].astype(np.int32) for x in columns)
        flag_places = FlagPlaces(len(self._automaton.states))
        # What is wrong so far is made right by no character that does not lead on.
        within = self._within[tokens]
        is_live = (within == 0) | self._live[states, within]
        return Entries(
            starts=np.searchsorted(places, np.arange(num_places + 1)).astype(np.int32),
            tokens=tokens,
            ends=np.where(is_live, flag_places.into(states), flag_places.end_in(states)),
            made=flag_places.of_mentions(made),
            states=states,
            new=new,
        )

    def _join(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Row by row, the number of the union of two sets of mentions."""
        found = np.where(one > 0, one, other)
        both = np.flatnonzero((one > 0) & (other > 0) & (one != other))
        for row in both.tolist():
            pair = int(one[row]), int(other[row])
            if pair not in self._joined:
                sets = list(self._sets)
                self._joined[pair] = self._number(sets[pair[0]] | sets[pair[1]])
            found[row] = self._joined[pair]
        return found

    def _without(self, made: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The sets of mentions without those that a text would have had if it ended in a state."""
        found = made.copy()
        for row in np.flatnonzero(made > 0).tolist():
            pair = int(made[row]), int(states[row])
            if pair not in self._new:
                sets = list(self._sets)
                self._new[pair] = self._number(sets[pair[0]] - self._ended[pair[1]])
            found[row] = self._new[pair]
        return found

    def _number(self, mentions: frozenset[int]) -> int:
        return self._sets.setdefault(mentions, len(self._sets))
