"""What a word is: the one rule by which texts are marked, masked and removed.

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
from collections.abc import Iterator

import numpy as np

# `\w` leaves out combining marks (accents of decomposed text, vowel signs of Indic scripts);
# without them "cafe" would be found in "cafe\u0301".
MARKS = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
LETTER = rf"[\w{MARKS}]"
APOSTROPHES = "'\u2019"
HYPHENS = "-\u2010\u2011"
JOINTS = ".,:"  # between digits
POSSESSIVE = "'s"
APOSTROPHE, HYPHEN = rf"[{APOSTROPHES}]", r"[\-\u2010\u2011]"


def _pattern(letter: str, marks: str) -> str:
    s = rf"[sS\u017f](?!{letter})"  # all that folds to an s, at the end of a word
    return (
        rf"{letter}+(?:{APOSTROPHE}(?!{s}){letter}+|(?<=\d)[{JOINTS}](?=\d){letter}+)*"
        rf"|{APOSTROPHE}{s}"
        rf"|(?<!{letter}){HYPHEN}|{HYPHEN}(?!{letter})"  # between words it is a space
        rf"|[^\w\s{marks}\-\u2010\u2011]"
    )


_WORD = re.compile(_pattern(LETTER, MARKS))
# In a text without marks, which most are, it finds the same words in a sixth of the time.
_WORD_WITHOUT_MARKS = re.compile(_pattern(r"\w", ""))
_MARKS = frozenset(MARKS)


def extents(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each word."""
    return [*iterate(text)]


def iterate(text: str, start: int = 0) -> Iterator[tuple[int, int]]:
    """The (start, end) of each word from a place between two words on, one after the other."""
    return (match.span() for match in _pattern_for(text).finditer(text, start))


def texts(text: str) -> list[str]:
    """Each word as it stands in a text."""
    return _pattern_for(text).findall(text)


def _pattern_for(text: str) -> re.Pattern[str]:
    is_plain = text.isascii() or _MARKS.isdisjoint(text)
    return _WORD_WITHOUT_MARKS if is_plain else _WORD


def key(word: str, *, case_sensitive: bool = False) -> str:
    """What equal words have in common."""
    if word.isascii():
        return word if case_sensitive else word.casefold()
    return _key(word, case_sensitive)


@functools.lru_cache(maxsize=1 << 16)
def _key(word: str, case_sensitive: bool) -> str:
    folded = "".join(fold(character, case_sensitive) for character in word)
    return unicodedata.normalize("NFD", folded)


def keys(text: str, *, case_sensitive: bool = False) -> tuple[str, ...]:
    """The keys of a text's words."""
    return tuple(
        key(text[start:end], case_sensitive=case_sensitive) for start, end in extents(text)
    )


@functools.lru_cache(maxsize=1 << 16)
def fold(character: str, case_sensitive: bool = False) -> str:
    """What a character comes to in the key of a word: decomposed, and without its case."""
    if character in APOSTROPHES:
        return "'"
    decomposed = unicodedata.normalize("NFD", character)
    if case_sensitive:
        return decomposed
    return unicodedata.normalize("NFD", decomposed.casefold())


# Kinds of characters, as `kinds` has them.
SPACE, SYMBOL, LETTERS, DIGIT = range(4)


@functools.lru_cache(maxsize=1)
def kinds() -> np.ndarray:
    """`[0x110000]` uint8: of each code point whether it is a space, a symbol, a letter or a digit.

    Surrogates, which no text holds, are symbols.
    """
    everything = "".join(map(chr, range(0x110000)))
    found = np.full(0x110000, SYMBOL, np.uint8)
    # A later one of these holds where two of them do.
    for kind, pattern in ((SPACE, r"\s+"), (LETTERS, r"\w+"), (DIGIT, r"\d+")):
        for match in re.finditer(pattern, everything):
            found[slice(*match.span())] = kind
    found[list(map(ord, MARKS))] = LETTERS
    return found


@functools.lru_cache(maxsize=2)
def folded(case_sensitive: bool) -> dict[str, str]:
    """`fold` of all characters that come to something else than themselves."""
    return {
        character: of
        for character in map(chr, range(0x110000))
        if not 0xD800 <= ord(character) < 0xE000
        and (of := fold.__wrapped__(character, case_sensitive)) != character
    }
