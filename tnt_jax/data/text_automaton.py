"""An automaton that reads a text character by character and knows what would be marked in it.

It finds listed phrases by the rule of `words`, as annotators do: word by word, of mentions that
overlap the first to start and then the longest. A *mention is made* when no further word can make
it longer; until then it is what would be found if the text ended. Which phrases are unwanted is
another question, whose answer may differ from text to text: `Automaton.flags`.
"""

import dataclasses
import functools
import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnt_jax.data import words

_MOST_MARKS = 4  # of a run on one letter, in a listed word, that are known in any order


class State(NamedTuple):
    """Where a text stands.

    Attributes:
        kind: what came last. "gap": white space, a symbol, or nothing. "word": letters that a
            listed word begins with; "dead": letters that none does. After letters: "apostrophe";
            "possessive", an apostrophe and an s; "joint", one of `words.JOINTS` after a digit;
            "hyphen". After no letter: "quote", an apostrophe; "quoted", an apostrophe and an s.
        node: the node of the words before; see `_Phrases`.
        before: the letters of the word before the apostrophe or joint, or all of them.
        last: the joint or hyphen; of a dead word "digit" if it ends with one, and "unspaced" if it
            is a letter of a script without spaces.
    """

    kind: str
    node: int
    before: str = ""
    last: str = ""


class _Phrases:
    """Listed phrases as a tree over words, and how to go on where a text leaves it.

    Nodes are numbered; 0 is the root, where no listed phrase is under way.
    """

    def __init__(self, texts: Iterable[tuple[str, ...]]):
        self.phrase_of: dict[tuple[str, ...], int] = {}
        self._child: dict[tuple[int, str], int] = {}
        self.paths: list[tuple[str, ...]] = [()]
        self._phrase: list[int | None] = [None]
        self.begun: list[set[str]] = [set()]  # by node, how its next words may begin
        for path in texts:
            if path and path not in self.phrase_of:
                self._add(path)

    def _add(self, path: tuple[str, ...]) -> None:
        node = 0
        for number, word in enumerate(path, start=1):
            if (node, word) not in self._child:
                self._child[node, word] = len(self.paths)
                self.paths.append(path[:number])
                self._phrase.append(None)
                self.begun.append(set())
                self.begun[node].update(_beginnings(word))
            node = self._child[node, word]
        self._phrase[node] = self.phrase_of[path] = len(self.phrase_of)

    def advance(self, node: int, word: str | None) -> tuple[int, tuple[int, ...]]:
        """The node after a word (None is no listed one), and the mentions that are made."""
        made: tuple[int, ...] = ()
        while True:
            child = None if word is None else self._child.get((node, word))
            if child is not None:
                return child, made
            if node == 0:
                return 0, made
            node, more = self.retreat(node)
            made += more

    def may_go_on(self, node: int, word: str, last: str) -> bool:
        """Whether a word is a next one, or begins one that goes on with a character."""
        return (node, word) in self._child or word + last in self.begun[node]

    @functools.cache  # noqa: B019 - lives as long as the tree
    def retreat(self, node: int) -> tuple[int, tuple[int, ...]]:
        """Where a node's words stand if they begin no longer phrase: later ones may."""
        path, made, rest = self.paths[node], (), self.paths[node][1:]
        at = 0
        for number, word in enumerate(path, start=1):
            at = self._child[at, word]
            if (phrase := self._phrase[at]) is not None:
                made, rest = (phrase,), path[number:]
        at = 0
        for word in rest:
            at, more = self.advance(at, word)
            made += more
        return at, made

    @functools.cache  # noqa: B019
    def ended(self, node: int) -> tuple[int, ...]:
        """The mentions that are made if a text ends at a node."""
        if node == 0:
            return ()
        node, made = self.retreat(node)
        return made + self.ended(node)


def _beginnings(word: str) -> set[str]:
    """How a word may begin: also with some of the marks on one letter, for they have no order."""
    found, known = set(), [""]
    for _, run in itertools.groupby(word, lambda c: bool(unicodedata.combining(c))):
        run = "".join(run)
        if not unicodedata.combining(run[0]) or not 2 <= len(run) <= _MOST_MARKS:
            parts = [run[:length] for length in range(1, len(run) + 1)]
        else:
            some = itertools.chain.from_iterable(
                itertools.combinations(run, length) for length in range(1, len(run) + 1)
            )
            parts = ["".join(of) for of in some]
        found.update(known[0] + part for part in parts)
        known = [known[0] + run]
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """The automaton as tables. Axes: `S` states, `C` classes of characters, `M` sets of mentions.

    Attributes:
        next_state: `[S, C]` int32.
        made: `[S, C]` int32: the number of the set of mentions that a character makes; 0 for none.
        base: `[S]` int32: the state after the same character where no listed phrase was under way.
        sets: the phrases in each set of mentions.
        ended: for each state, the phrases that would be mentioned if the text ended.
        retreats: for each state, the state and the mentions that result if what comes next is in no
            phrase that is under way from where the first one is; at a base that is the state
            itself.
        states: what each state stands for.
        paths: for each node, the words that lead to it.
        phrase_of: the number of each phrase, by the keys of its words.
        begun: for each phrase, the numbers of the states in which it is under way.
        amid: for each phrase, those of its `begun` states that it leads on from without an end of
            the word before.
        class_of: the class of a character, by the text that it comes to.
        others: the classes of characters in no listed word, by `words.kinds`.
        broken: the class of what is no character.
        case_sensitive: whether letters are compared as they are.
    """

    next_state: np.ndarray
    made: np.ndarray
    base: np.ndarray
    sets: tuple[frozenset[int], ...]
    ended: tuple[tuple[int, ...], ...]
    retreats: tuple[tuple[int, tuple[int, ...]], ...]
    states: tuple[State, ...]
    paths: tuple[tuple[str, ...], ...]
    phrase_of: Mapping[tuple[str, ...], int]
    begun: tuple[tuple[int, ...], ...]
    amid: tuple[tuple[int, ...], ...]
    class_of: Mapping[str, int]
    others: tuple[int, ...]
    broken: int
    case_sensitive: bool

    START = 0

    @classmethod
    def of(cls, texts: Iterable[str], *, case_sensitive: bool = False) -> "Automaton":
        """Compiles a list of texts."""
        paths = [words.keys(text, case_sensitive=case_sensitive) for text in texts]
        return _Compiler(_Phrases(paths), case_sensitive).automaton()

    @functools.cached_property
    def states_before(self) -> dict[str, list[int]]:
        """The states in which some letters of a word are under way, as their numbers."""
        found: dict[str, list[int]] = {}
        for number, state in enumerate(self.states):
            found.setdefault(state.before, []).append(number)
        return found

    @functools.cached_property
    def states_behind(self) -> dict[str, list[int]]:
        """The states that stand behind a word of a listed phrase, as their numbers."""
        found: dict[str, list[int]] = {}
        for number, state in enumerate(self.states):
            for word in set(self.paths[state.node]):
                found.setdefault(word, []).append(number)
        return found

    def numbers(self, texts: Iterable[str]) -> list[int]:
        """The phrases that texts of the list come to."""
        found = (words.keys(text, case_sensitive=self.case_sensitive) for text in texts)
        return sorted({self.phrase_of[path] for path in found if path})

    def char_classes(self) -> np.ndarray:
        """`[0x110000]` int32: the class of each code point."""
        found = np.array(self.others, np.int32)[words.kinds()]
        for text, number in self.class_of.items():
            if len(text) == 1:
                found[ord(text)] = number
        for character, text in words.folded(self.case_sensitive).items():
            place = ord(character)
            found[place] = self.class_of.get(text, self.others[words.kinds()[place]])
        return found

    def read(self, text: str) -> tuple[int, list[int]]:
        """The state after a text, and the phrases that would be marked in it."""
        state, made, of = self.START, [], self.char_classes()
        for character in text:
            number = of[ord(character)]
            made.extend(self.sets[self.made[state, number]])
            state = int(self.next_state[state, number])
        return state, [*made, *self.ended[state]]


class _Compiler:
    """Explores the states of a list."""

    def __init__(self, phrases: _Phrases, case_sensitive: bool):
        self._phrases = phrases
        self._case_sensitive = case_sensitive
        listed = sorted({unit for path in phrases.phrase_of for word in path for unit in word})
        of_s = "sS\u017f" if case_sensitive else "s"
        kinds = words.kinds()
        letters = {unit for unit in (*listed, *of_s) if kinds[ord(unit)] >= words.LETTERS}
        symbols = {word for path in phrases.phrase_of for word in path if not _is_letters(word)}
        self._kind_of: dict[str, int] = {unit: int(kinds[ord(unit)]) for unit in sorted(letters)}
        # Letters that come to several, such as "\u00e9" to an e and its accent. Marks may come in
        # another order than in the list, so each counts whose parts the list has; of the syllables
        # of Korean, which are thousands, those that are within a listed word.
        whole = "\n".join(sorted({word for path in phrases.phrase_of for word in path}))
        for text in sorted(set(words.folded(case_sensitive).values())):
            has_marks = any(map(unicodedata.combining, text))
            if len(text) > 1 and letters.issuperset(text) and (has_marks or text in whole):
                is_unspaced = kinds[ord(text[0])] == words.UNSPACED_LETTER
                self._kind_of[text] = words.UNSPACED_LETTER if is_unspaced else words.LETTERS
        for symbol in sorted({*symbols, *words.JOINTS, *words.HYPHENS, "'"} - {words.POSSESSIVE}):
            self._kind_of[symbol] = words.SYMBOL

    # ------------------------------------------------------------------------------------- Steps
    # Each gives the next state, and the mentions that are made.

    def _begin(self, node: int, letters: str, kind: int) -> tuple[State, tuple[int, ...]]:
        """The letters of a word so far, after the words of a node; `kind` is of the last one."""
        made: tuple[int, ...] = ()
        while letters not in self._phrases.begun[node]:
            if node == 0:
                return _dead(kind), made
            node, more = self._phrases.retreat(node)
            made += more
        return State("word", node, letters), made

    def _extend(self, state: State, letters: str, kind: int) -> tuple[State, tuple[int, ...]]:
        """Reads letters that follow in the word of a state, or behind its apostrophe or joint."""
        if not state.before:
            return _dead(kind), ()
        before = state.before + letters
        if not before.isascii():
            before = unicodedata.normalize("NFD", before)
        return self._begin(state.node, before, kind)

    def _after_word(self, kind: str, state: State, last: str) -> tuple[State, tuple[int, ...]]:
        """The state of some kind after a word that is whole, or goes on with what came."""
        node, before, made = state.node, state.before, ()
        while before and not self._phrases.may_go_on(
            node, before, "'" if kind != "joint" else last
        ):
            if node == 0:
                before = ""
                break
            node, more = self._phrases.retreat(node)
            made += more
        return State(kind, node, before, last), made

    def _feed(self, node: int, *whole: str | None) -> tuple[int, tuple[int, ...]]:
        made: tuple[int, ...] = ()
        for word in whole:
            node, more = self._phrases.advance(node, word)
            made += more
        return node, made

    def _pending(self, state: State) -> tuple[str | None, ...]:
        """The words of a state if the text ends there, after those of its node."""
        own = state.before or None
        return {
            "gap": (),
            "word": (own,),
            "dead": (None,),
            "apostrophe": (own, "'"),
            "possessive": (own, "'" + state.last),
            "joint": (own, state.last),
            "hyphen": (state.last,),
            "quote": ("'",),
            "quoted": ("'" + state.last,),
        }[state.kind]

    def step(self, state: State, unit: str, kind: int) -> tuple[State, tuple[int, ...]]:
        """The state after one folded character; "" is one of no listed word."""
        if kind >= words.LETTERS:
            return self._letter(state, unit or _NO_LETTER, kind)
        is_in_word = state.kind in ("word", "dead")
        is_unspaced = is_in_word and self._last_kind(state) == words.UNSPACED_LETTER
        if unit == "'" and is_in_word and not is_unspaced:  # no apostrophe joins these
            return self._after_word("apostrophe", state, "")
        if unit and unit in words.JOINTS and is_in_word and self._ends_with_digit(state):
            return self._after_word("joint", state, unit)
        # All other characters end a word.
        node, made = self._feed(state.node, *self._pending(state))
        if kind == words.SPACE:
            return State("gap", node), made
        if unit == "'":
            return State("quote", node), made
        is_after_letter = is_in_word or state.kind in ("possessive", "quoted")
        if unit and unit in words.HYPHENS and is_after_letter:
            return State("hyphen", node, "", unit), made
        node, more = self._feed(node, unit or None)
        return State("gap", node), made + more

    def _letter(self, state: State, unit: str, kind: int) -> tuple[State, tuple[int, ...]]:
        if self._is_whole(state, kind):
            node, made = self._feed(state.node, *self._pending(state))
            begun, more = self._begin(node, unit, kind)
            return begun, made + more
        is_s = unit in ("s", "S", "\u017f")
        match state.kind:
            case "word" | "dead":
                is_unspaced = self._last_kind(state) == words.UNSPACED_LETTER
                return self._extend(state, unit, words.UNSPACED_LETTER if is_unspaced else kind)
            case "gap" | "hyphen":
                return self._begin(state.node, unit, kind)
            case "joint" if kind == words.DIGIT:
                return self._extend(state, state.last + unit, kind)
            case "apostrophe" if is_s:
                return self._after_word("possessive", state, unit)
            case "apostrophe":
                return self._extend(state, "'" + unit, kind)
            case "possessive":
                return self._extend(state, "'" + state.last + unit, kind)
            case "quote" if is_s:
                return State("quoted", state.node, "", unit), ()
        # A symbol, and then the word that begins.
        whole = self._pending(state) if state.kind == "joint" else ("'",)
        node, made = self._feed(state.node, *whole)
        begun, more = self._begin(
            node, (state.last + unit) if state.kind == "quoted" else unit, kind
        )
        return begun, made + more

    def _is_whole(self, state: State, kind: int) -> bool:
        """Whether the word that a state is in ends before a letter; a hyphen is in none."""
        if state.kind in ("gap", "hyphen"):
            return False
        if kind == words.UNSPACED_LETTER:
            return True
        is_word = state.kind in ("word", "dead")
        return is_word and kind != words.MARK and self._last_kind(state) == words.UNSPACED_LETTER

    def _last_kind(self, state: State) -> int:
        """The kind of what a word is up to a state: UNSPACED_LETTER, DIGIT at its end, LETTERS."""
        if state.kind == "dead":
            return _KIND_OF_DEAD[state.last]
        kinds = words.kinds()
        if kinds[ord(state.before[0])] == words.UNSPACED_LETTER:
            return words.UNSPACED_LETTER
        is_digit = kinds[ord(state.before[-1])] == words.DIGIT
        return words.DIGIT if is_digit else words.LETTERS

    def _ends_with_digit(self, state: State) -> bool:
        return self._last_kind(state) == words.DIGIT

    # ------------------------------------------------------------------------------------ Tables

    def automaton(self) -> Automaton:
        """All states, from the beginning of a text on."""
        joined, alone = [], []
        for text, kind in self._kind_of.items():
            if kind == words.UNSPACED_LETTER and len(text) == 1:
                alone.append(text)
            else:
                joined.append((text, kind))
        classes = [*joined, *((text, words.UNSPACED_LETTER) for text in alone)]
        others = [("", kind) for kind in words.KINDS]
        number: dict[State, int] = {State("gap", 0): 0}
        sets: dict[frozenset[int], int] = {frozenset(): 0}
        next_state, made = [], []
        left = [State("gap", 0)]

        def number_of(state: State) -> int:
            if state not in number:
                number[state] = len(number)
                left.append(state)
            return number[state]

        # A list may have thousands of letters that are words by themselves. In most states most of
        # them come to what they come to where no phrase is under way.
        at_root = [number_of(self._begin(0, text, words.UNSPACED_LETTER)[0]) for text in alone]
        column_of = {text: len(others) + len(joined) + i for i, text in enumerate(alone)}

        while len(next_state) < len(left):
            state = left[len(next_state)]
            found = [self._read(state, text, kind) for text, kind in others]
            whole = self._feed(state.node, *self._pending(state))[0]
            for text, kind in joined:
                is_idle = kind >= words.LETTERS and self._is_idle(state, text, kind, whole, found)
                found.append(found[kind] if is_idle else self._read(state, text, kind))
            next_row = [number_of(after) for after, _ in found] + at_root
            made_row = [sets.setdefault(frozenset(of), len(sets)) for _, of in found]
            if alone:
                going_on, of_all_else = self._leaving(state)
                made_row += [sets.setdefault(frozenset(of_all_else), len(sets))] * len(alone)
                for text in sorted(going_on & column_of.keys()):
                    after, of = self._read(state, text, words.UNSPACED_LETTER)
                    next_row[column_of[text]] = number_of(after)
                    made_row[column_of[text]] = sets.setdefault(frozenset(of), len(sets))
            next_state.append(np.array(next_row, np.int32))
            made.append(np.array(made_row, np.int32))
            number_of(self._base(state))
            if state.node:
                number_of(self._retreated(state)[0])
        base = [number[self._base(state)] for state in left]
        ended = []
        for state in left:
            node, of_state = self._feed(state.node, *self._pending(state))
            ended.append(of_state + self._phrases.ended(node))
        retreats = [(number[state], of) for state, of in map(self._retreated, left)]
        begun = [self._begun(path) for path in self._phrases.phrase_of]
        return Automaton(
            next_state=np.array(next_state),
            made=np.array(made),
            base=np.array(base, np.int32),
            sets=tuple(sets),
            ended=tuple(ended),
            retreats=tuple(retreats),
            states=tuple(left),
            paths=tuple(self._phrases.paths),
            phrase_of=self._phrases.phrase_of,
            begun=tuple(tuple(sorted(number[state] for state in of)) for of in begun),
            amid=tuple(
                tuple(sorted(number[state] for state, is_amid in of.items() if is_amid))
                for of in begun
            ),
            class_of={text: len(others) + place for place, (text, _) in enumerate(classes)},
            others=tuple(words.KINDS),
            broken=self._class_of_broken(classes),
            case_sensitive=self._case_sensitive,
        )

    def _read(self, state: State, text: str, kind: int) -> tuple[State, tuple[int, ...]]:
        """The state after a character that comes to a text; a symbol stays whole."""
        made: tuple[int, ...] = ()
        for unit in text if kind >= words.LETTERS and text else [text]:
            unit_kind = self._kind_of.get(unit, kind)
            state, more = self.step(state, unit, unit_kind)
            made += more
        return state, made

    def _leaving(self, state: State) -> tuple[set[str], tuple[int, ...]]:
        """How a word may begin that goes on with a phrase, and what is made where none does."""
        node, made = state.node, ()
        if state.kind not in ("gap", "hyphen"):
            node, made = self._feed(node, *self._pending(state))
        begun: set[str] = set()
        while node:
            begun |= self._phrases.begun[node]
            node, more = self._phrases.retreat(node)
            made += more
        return begun, made

    def _is_idle(
        self,
        state: State,
        text: str,
        kind: int,
        whole: int,
        others: Sequence[tuple[State, tuple[int, ...]]],
    ) -> bool:
        """Whether letters come to what those of no listed word come to; false where it is unclear.

        `whole` is the node of the state after its word, if that ends; `others` says by kinds what
        letters of no listed word come to.
        """
        if self._is_whole(state, kind):
            node, begun = whole, text
        elif state.kind == "dead":
            return True
        elif state.kind not in ("word", "gap", "hyphen"):
            # In a dead word all further letters are.
            first = text[0], self._kind_of.get(text[0], kind)
            return others[kind][0].kind == "dead" and self.step(state, *first) == others[kind]
        elif unicodedata.combining(text[0]):
            return False
        else:
            node, begun = state.node, state.before + text
        if not begun.isascii() and any(map(unicodedata.combining, text)):
            begun = begun.removesuffix(text[1:])  # marks may come in another order
        while begun not in self._phrases.begun[node]:
            if node == 0:
                return True
            node, _ = self._phrases.retreat(node)
        return False

    def _base(self, state: State) -> State:
        if state.kind == "word":
            return _dead(self._last_kind(state))
        return State(state.kind, 0, "", state.last)

    def _retreated(self, state: State) -> tuple[State, tuple[int, ...]]:
        if state.node == 0:
            return state, ()
        node, made = self._phrases.retreat(state.node)
        if not state.before:
            return state._replace(node=node), made
        kind = self._last_kind(state)
        if state.kind == "word":
            after, more = self._begin(node, state.before, kind)
        else:
            after, more = self._after_word(state.kind, state._replace(node=node), state.last)
        return after, made + more

    def _begun(self, path: Sequence[str]) -> dict[State, bool]:
        """The states in which a phrase is under way, as it may be written: `begun` and `amid`."""
        start = State("gap", 0)
        ways: dict[State, dict[State, bool]] = {start: {}}
        for place, word in enumerate(path):
            gaps = ("", " ", *words.HYPHENS) if place else ("",)
            after: dict[State, dict[State, bool]] = {}
            for (state, passed), gap in itertools.product(ways.items(), gaps):
                found = self._written(state, gap, word)
                node, made = self._feed(found[-1].node, *self._pending(found[-1]))
                if not made and self._phrases.paths[node] == tuple(path[: place + 1]):
                    amid = dict.fromkeys(found[:-1], True)
                    known = after.get(found[-1], {})
                    after[found[-1]] = {state: state.kind == "gap"} | known | passed | amid
            ways = after
        states: dict[State, bool] = {}
        for passed in ways.values():
            for state, is_amid in passed.items():
                states[state] = states.get(state, False) or is_amid
        states.pop(start, None)
        return states

    def _written(self, state: State, gap: str, word: str) -> list[State]:
        """The states while a word is written after a gap."""
        found = []
        if gap:
            kind = words.SPACE if gap == " " else words.SYMBOL
            found.append(self.step(state, "" if gap == " " else gap, kind)[0])
        # A symbol of several characters is one.
        is_symbol = word in self._kind_of and self._kind_of[word] == words.SYMBOL
        for unit in [word] if is_symbol else word:
            last = found[-1] if found else state
            found.append(self.step(last, unit, self._kind_of[unit])[0])
        return found

    @staticmethod
    def _class_of_broken(classes: Sequence[tuple[str, int]]) -> int:
        texts = [text for text, _ in classes]
        return len(words.KINDS) + texts.index("\ufffd") if "\ufffd" in texts else words.SYMBOL


_NO_LETTER = "\uffff"  # no character: no listed word has it


_KIND_OF_DEAD = {"": words.LETTERS, "digit": words.DIGIT, "unspaced": words.UNSPACED_LETTER}


def _dead(kind: int) -> State:
    last = {words.DIGIT: "digit", words.UNSPACED_LETTER: "unspaced"}.get(kind, "")
    return State("dead", 0, "", last)


def _is_letters(word: str) -> bool:
    return word == words.POSSESSIVE or words.kinds()[ord(word[0])] >= words.LETTERS
