"""Finding listed phrases word by word; `tnt_jax.data.words` says what a word is."""

import functools
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tnt_jax.annotators.interface import Span
from tnt_jax.data import mark_alternatives, words


class Phrases:
    """A trie over words: phrases with the values they name.

    A node maps the next word to its child; under the key None it holds the values of the phrase
    that ends there.
    """

    def __init__(self, items: Iterable[tuple[str, Hashable]], *, case_sensitive: bool = False):
        self._case_sensitive = case_sensitive
        self._root: dict = {}
        for phrase, value in items:
            node = self._root
            for word, _, _ in self._words(phrase):
                node = node.setdefault(word, {})
            node.setdefault(None, set()).add(value)

    def _words(self, text: str) -> list[tuple[str, int, int]]:
        """The (comparison key, start, end) of each word."""
        return [
            (words.key(text[start:end], case_sensitive=self._case_sensitive), start, end)
            for start, end in words.extents(text)
        ]

    def _keys(self, text: str) -> Iterable[str]:
        """The comparison keys of the words of a text."""
        if text.isascii():  # where no letter's case decides what a word is
            return words.texts(text if self._case_sensitive else text.casefold())
        return words.keys(text, case_sensitive=self._case_sensitive)

    def _mentions_from(
        self, found: list[tuple[str, int, int]], first: int
    ) -> Iterator[tuple[int, set]]:
        """Phrases from word `first` on, shortest first: (index after the last word, values)."""
        node = self._root
        for index in range(first, len(found)):
            node = node.get(found[index][0])
            if node is None:
                return
            if None in node:
                yield index + 1, node[None]

    def longest_mentions(self, text: str) -> Iterator[tuple[int, int, set]]:
        """Disjoint mentions from left to right, the longest at each place: (start, end, values)."""
        # Most texts have no word with which a phrase begins: to see that is quicker.
        if not any(map(self._root.__contains__, self._keys(text))):
            return
        found = self._words(text)
        first = 0
        while first < len(found):
            if found[first][0] not in self._root:
                first += 1
                continue
            mentions = list(self._mentions_from(found, first))
            if not mentions:
                first += 1
                continue
            last, values = mentions[-1]
            yield found[first][1], found[last - 1][2], values
            first = last

    def outside(self, text: str) -> list[str]:
        """The words that belong to no mention, in lower case unless letters count as they are."""
        mentions = self.longest_mentions(text)
        last, found = next(mentions, None), []
        for start, end in words.extents(text):
            while last is not None and last[1] <= start:
                last = next(mentions, None)
            if last is None or start < last[0]:
                word = text[start:end]
                found.append(word if self._case_sensitive else word.lower())
        return found

    def mentions(self, text: str) -> Iterator[tuple[int, int, set]]:
        """All mentions, also those within longer ones: (start, end, values)."""
        if not any(map(self._root.__contains__, self._keys(text))):
            return
        found = self._words(text)
        for first in range(len(found)):
            for last, values in self._mentions_from(found, first):
                yield found[first][1], found[last - 1][2], values

    def values_in(self, text: str) -> set:
        """The values of all phrases in the text, also of those within longer ones."""
        return {value for _, _, values in self.mentions(text) for value in values}

    def values_of(self, phrase: str) -> frozenset:
        """The values that a phrase of the trie names."""
        node = self._root
        for word, _, _ in self._words(phrase):
            node = node[word]
        return frozenset(node[None])


def word_rule(texts: Iterable[str]) -> str:
    """What tells the marks of a list from those of before version 0.3, where these differ.

    Until then a text in a script without spaces was found only where it stood alone.
    """
    return ", letters_are_words=True" if any(map(words.is_unspaced, texts)) else ""


def inflected(entry: str) -> list[str]:
    """The entry with -s, -ed and -ing on its last word, by the spelling rules of English."""
    if not entry[-1].isalpha():
        return []
    plural, past, participle = entry + "s", entry + "ed", entry + "ing"
    word = entry.lower()
    if re.search(r"(s|x|z|ch|sh)$", word):
        plural = entry + "es"
    elif re.search(r"[^aeiou]y$", word):
        plural, past = entry[:-1] + "ies", entry[:-1] + "ied"
    elif word.endswith("e"):
        past = entry + "d"
        if word.endswith("ie"):
            participle = entry[:-2] + "ying"
        elif not re.search(r"[eoy]e$", word):  # seeing, hoeing, dyeing keep theirs
            participle = entry[:-1] + "ing"
    if re.search(r"(?<![a-z])[^aeiou\W]*[aeiou][bdfgklmnprtvz]$", word):
        past, participle = entry + entry[-1] + "ed", entry + entry[-1] + "ing"
    return [plural, past, participle]


def forms(
    texts: Iterable[str], *, case_sensitive: bool = False, in_capitals: bool = True
) -> tuple[str, ...]:
    """Writes each text in the ways in which `Phrases` finds it, without repeats.

    These are: the text as listed, in lower case, with a capital, with one on each word, and in
    capitals; each of them with the hyphens and spaces as listed, with spaces alone and with hyphens
    alone, and with both apostrophes. What is marked and what is removed is the same text only if
    both go by this. (Mixtures such as "cRoWNe plaza" are found, and are not written here.)

    Args:
      texts: Listed words and phrases.
      case_sensitive: Leave the letters as they are listed.
      in_capitals: Write them in capitals, too; what is listed in capitals stays in any case.
    """
    return tuple(
        dict.fromkeys(
            form
            for text in texts
            for form in _forms(text, case_sensitive)
            if in_capitals or form == text or len(form) == 1 or not form.isupper()
        )
    )


@functools.lru_cache(maxsize=1 << 16)
def _forms(text: str, case_sensitive: bool) -> tuple[str, ...]:
    joints = (
        text,
        re.sub(rf"(?<={words.LETTER}){words.HYPHEN}(?={words.LETTER})", " ", text),
        re.sub(rf"(?<={words.LETTER})\s+(?={words.LETTER})", "-", text),
    )
    found = []
    for joined in joints:
        for spelt in (joined, joined.replace("\u2019", "'"), joined.replace("'", "\u2019")):
            found.extend((spelt,) if case_sensitive else _casings(spelt))
    return tuple(dict.fromkeys(found))


def _casings(text: str) -> tuple[str, ...]:
    lower = text.lower()
    return (
        text,
        lower,
        text.casefold(),
        text[:1].lower() + text[1:],
        *(text[:1].upper() + text[1:], _capitalised(text)),
        *(lower[:1].upper() + lower[1:], _capitalised(lower)),
        re.sub(r"(?<=['\u2019])S\b", "s", text.title()),  # "O'Reilly's"
        text.upper(),
    )


def _capitalised(text: str) -> str:
    """With a capital on each word, but for a possessive 's."""
    letters = list(text)
    for start, end in words.extents(text):
        if words.key(text[start:end]) != words.POSSESSIVE:
            letters[start] = letters[start].upper()
    return "".join(letters)


class Alternatives(NamedTuple):
    """What else would be marked in the place of a marked text.

    Attributes:
      of_capitals: its forms where the marked text is in capitals.
      of_letters: its forms elsewhere: all but those in capitals, which the text would not go on in.
    """

    of_capitals: tuple[str, ...]
    of_letters: tuple[str, ...]

    @classmethod
    def from_texts(cls, texts: Sequence[str], *, case_sensitive: bool = False) -> "Alternatives":
        """All forms of listed texts."""
        return cls(
            forms(texts, case_sensitive=case_sensitive),
            forms(texts, case_sensitive=case_sensitive, in_capitals=False),
        )

    def span(self, targets: str, start: int, end: int) -> Span:
        """A marked stretch of the targets, with all that would be just as wrong there."""
        marked = targets[start:end]
        is_in_capitals = len(marked) > 1 and marked.isupper()
        others = self.of_capitals if is_in_capitals else self.of_letters
        return Span(start=start, end=end, alternatives=mark_alternatives.AllBut(others, marked))
