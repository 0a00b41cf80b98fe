"""What a word is, and finding listed phrases word by word.

A word is a run of letters, digits, marks and underscores; an apostrophe joins ("don't" does not
hold "don") unless it starts a possessive 's ("idiot's" holds "idiot"), and `.`, `,` and `:` join
digits ("4.5" does not hold "4"). Every other visible character is a word of its own, except that a
hyphen between words counts as a space ("half-ass" holds "ass", "4-star" is "4 star"). Runs of white
space are one space. Canonically equivalent strings and the two apostrophes are equal. A script
written without spaces is out of reach: its runs of letters are single words.
"""

import functools
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tnt_jax.annotators.interface import Span

# `\w` leaves out combining marks (accents of decomposed text, vowel signs of Indic scripts);
# without them "cafe" would be found in "cafe\u0301".
_MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
_LETTER = rf"[\w{_MARKS}]"
_APOSTROPHE = r"['\u2019]"
_HYPHEN = r"[-\u2010\u2011]"
_WORD = re.compile(
    rf"{_LETTER}+(?:{_APOSTROPHE}(?![sS]\b){_LETTER}+|(?<=\d)[.,:](?=\d){_LETTER}+)*"
    rf"|{_APOSTROPHE}[sS]\b"
    rf"|(?<!{_LETTER}){_HYPHEN}|{_HYPHEN}(?!{_LETTER})"  # between words it is a space
    rf"|[^\w\s{_MARKS}\-\u2010\u2011]"
)


def extents(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each word."""
    return [match.span() for match in _WORD.finditer(text)]


def key(word: str, *, case_sensitive: bool = False) -> str:
    """What equal words have in common."""
    composed = unicodedata.normalize("NFC", word).replace("\u2019", "'")
    return composed if case_sensitive else composed.casefold()


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
            (key(text[start:end], case_sensitive=self._case_sensitive), start, end)
            for start, end in extents(text)
        ]

    def _mentions_from(
        self, words: list[tuple[str, int, int]], first: int
    ) -> Iterator[tuple[int, set]]:
        """Phrases from word `first` on, shortest first: (index after the last word, values)."""
        node = self._root
        for index in range(first, len(words)):
            node = node.get(words[index][0])
            if node is None:
                return
            if None in node:
                yield index + 1, node[None]

    def longest_mentions(self, text: str) -> Iterator[tuple[int, int, set]]:
        """Disjoint mentions from left to right, the longest at each place: (start, end, values)."""
        words = self._words(text)
        first = 0
        while first < len(words):
            mentions = list(self._mentions_from(words, first))
            if not mentions:
                first += 1
                continue
            last, values = mentions[-1]
            yield words[first][1], words[last - 1][2], values
            first = last

    def outside(self, text: str) -> list[str]:
        """The words that belong to no mention, in lower case."""
        mentions = [(start, end) for start, end, _ in self.longest_mentions(text)]
        return [
            text[start:end].lower()
            for start, end in extents(text)
            if not any(first <= start < last for first, last in mentions)
        ]

    def values_in(self, text: str) -> set:
        """The values of all phrases in the text, also of those within longer ones."""
        words = self._words(text)
        return {
            value
            for first in range(len(words))
            for _, values in self._mentions_from(words, first)
            for value in values
        }

    def values_of(self, phrase: str) -> frozenset:
        """The values that a phrase of the trie names."""
        node = self._root
        for word, _, _ in self._words(phrase):
            node = node[word]
        return frozenset(node[None])


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
        if not re.search(r"[eoy]e$", word):  # seeing, hoeing, dyeing keep theirs
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
        re.sub(rf"(?<={_LETTER}){_HYPHEN}(?={_LETTER})", " ", text),
        re.sub(rf"(?<={_LETTER})\s+(?={_LETTER})", "-", text),
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
    for start, end in extents(text):
        if key(text[start:end]) != "'s":
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
        return Span(start=start, end=end, alternatives=tuple(t for t in others if t != marked))
