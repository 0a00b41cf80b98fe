"""What a word is: the one rule by which texts are marked, masked and removed.

A word is a run of letters, digits, marks and underscores; an apostrophe joins ("don't" does not
hold "don") unless it starts a possessive 's ("idiot's" holds "idiot"), and `.`, `,` and `:` join
digits ("4.5" does not hold "4"). Every other visible character is a word of its own, except that a
hyphen between words counts as a space ("half-ass" holds "ass", "4-star" is "4 star"). What makes an
emoji of a character is such a word, too. Runs of white space are one space. Canonically equivalent
strings and the two apostrophes are equal.

In a script without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese and others) no character
says where a word ends. So each letter is a word of its own there, with the marks on it: what is
listed is found within longer words, too, and across spaces.
"""

import functools
import re
import unicodedata

import numpy as np

# `\w` leaves out combining marks (accents of decomposed text, vowel signs of Indic scripts);
# without them "cafe" would be found in "cafe\u0301". Two selectors and the marks that enclose stand
# on symbols and digits ("\u2764\ufe0f", "1\ufe0f\u20e3"): no word goes on with these, or begins.
_OF_SYMBOLS = "\ufe0e\ufe0f"
MARKS = "".join(
    c
    for c in map(chr, range(0x300, 0x1F000))
    if unicodedata.category(c) in ("Mn", "Mc") and c not in _OF_SYMBOLS
)


def _ranges(characters: str) -> str:
    """Characters in ascending order as ranges, which `re` reads much faster."""
    runs: list[list[str]] = []
    for character in characters:
        if runs and ord(character) == ord(runs[-1][1]) + 1:
            runs[-1][1] = character
        else:
            runs.append([character, character])
    return "".join(f"{first}-{last}" for first, last in runs)


_MARKS = _ranges(MARKS)  # within the brackets of a pattern
LETTER = rf"[\w{_MARKS}]"
APOSTROPHES = "'\u2019"
HYPHENS = "-\u2010\u2011"
JOINTS = ".,:"  # between digits
POSSESSIVE = "'s"
APOSTROPHE, HYPHEN = rf"[{APOSTROPHES}]", r"[\-\u2010\u2011]"

# Letters of scripts without spaces, as they stand within the brackets of a pattern.
HAN = (
    "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003fffd"
)
# Korean has spaces, and Tibetan a sign between syllables.
_BLOCKS = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao; Burmese; Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF)),  # of the Tai
    *((0x1B00, 0x1B7F), (0xA980, 0xA9DF)),  # Balinese, Javanese
    *((0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),  # Burmese
    *((0x3031, 0x3035), (0x303C, 0x303C), (0x3041, 0x312F)),  # Kana, Bopomofo
    *((0x31A0, 0x31BF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B16F)),
)
UNSPACED = HAN + "".join(
    # Without their digits, which form numbers, and their marks and signs.
    _ranges("".join(filter(str.isalpha, map(chr, range(first, last + 1)))))
    for first, last in _BLOCKS
)


def _pattern(letter: str, marks: str, joined: str) -> str:
    """The pattern of a word; `joined` is a letter that joins to the next one, as most do."""
    s = rf"[sS\u017f](?!{joined})"  # all that folds to an s, at the end of a word
    alone = "" if joined == letter else rf"[{UNSPACED}][{marks}]*|"
    return (
        rf"{alone}{joined}+(?:{APOSTROPHE}(?!{s}){joined}+|(?<=\d)[{JOINTS}](?=\d){joined}+)*"
        rf"|{APOSTROPHE}{s}"
        rf"|(?<!{letter}){HYPHEN}|{HYPHEN}(?!{letter})"  # between words it is a space
        rf"|[^\w\s{marks}\-\u2010\u2011]"
    )


# A mark that stands on none of the letters without spaces joins, as the others' letters do.
_JOINED = rf"(?:[^\W{UNSPACED}]|[{_MARKS}])"
_WORD_UNSPACED = re.compile(_pattern(LETTER, _MARKS, _JOINED))
# In other texts these two find the same words sooner: in one without marks in a sixth of the time.
_WORD = re.compile(_pattern(LETTER, _MARKS, LETTER))
_WORD_WITHOUT_MARKS = re.compile(_pattern(r"\w", "", r"\w"))
# Runs of letters, whatever apostrophes and joints say; marks on none of them are in no run.
_LETTERS_UNSPACED = re.compile(rf"[{UNSPACED}][{_MARKS}]*|[^\W{UNSPACED}]{_JOINED}*")
_LETTERS = re.compile(rf"\w{LETTER}*")
_LETTERS_WITHOUT_MARKS = re.compile(r"\w+")

_IS_UNSPACED = re.compile(f"[{UNSPACED}]")
_IS_HAN = re.compile(f"[{HAN}]")
# All marks and letters without spaces, and rare others. `re` looks up what is below 0x10000, and
# compares the rest with one range after the other: these have to be few. Emoji are in none.
_NOT_PLAIN = re.compile(
    "["
    + _ranges("".join(c for c in MARKS if c < "\U00010000"))
    + "".join(re.findall("[\0-\uffff]-[\0-\uffff]", UNSPACED))
    + "\U00010000-\U0001efff\U00020000-\U0003ffff]"
)


def extents(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each word."""
    return [match.span() for match in _pattern_for(text).finditer(text)]


def stretches(text: str) -> list[tuple[int, int]]:
    """The (start, end) of each word, and of each run of letters of scripts without spaces."""
    found: list[tuple[int, int]] = []
    is_run = False
    for start, end in extents(text):
        is_letter = is_unspaced(text[start])
        if is_run and is_letter and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
        is_run = is_letter
    return found


def texts(text: str) -> list[str]:
    """Each word as it stands in a text."""
    return _pattern_for(text).findall(text)


def letters(text: str) -> list[str]:
    """Each run of letters, digits, marks and underscores: words, whatever would join them.

    A letter of a script without spaces is one by itself, with its marks.
    """
    if text.isascii() or not _NOT_PLAIN.search(text):
        return _LETTERS_WITHOUT_MARKS.findall(text)
    return (_LETTERS_UNSPACED if is_unspaced(text) else _LETTERS).findall(text)


def is_unspaced(text: str) -> bool:
    """Whether a text has letters of a script without spaces."""
    return bool(_IS_UNSPACED.search(text))


def is_han(text: str) -> bool:
    """Whether a text has Chinese characters."""
    return bool(_IS_HAN.search(text))


def _pattern_for(text: str) -> re.Pattern[str]:
    if text.isascii() or not _NOT_PLAIN.search(text):
        return _WORD_WITHOUT_MARKS
    return _WORD_UNSPACED if is_unspaced(text) else _WORD


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


# Kinds of characters, as `kinds` has them. From LETTERS on they are parts of words: MARK also of
# the word that an UNSPACED_LETTER is, which no other letter joins.
KINDS = SPACE, SYMBOL, LETTERS, DIGIT, MARK, UNSPACED_LETTER = range(6)


@functools.lru_cache(maxsize=1)
def kinds() -> np.ndarray:
    """`[0x110000]` uint8: the kind of each code point, one of `KINDS`.

    Surrogates, which no text holds, are symbols.
    """
    everything = "".join(map(chr, range(0x110000)))
    found = np.full(0x110000, SYMBOL, np.uint8)
    # A later one of these holds where two of them do.
    for kind, pattern in (
        (SPACE, r"\s+"),
        (LETTERS, r"\w+"),
        (DIGIT, r"\d+"),
        (UNSPACED_LETTER, f"[{UNSPACED}]+"),
    ):
        for match in re.finditer(pattern, everything):
            found[slice(*match.span())] = kind
    found[list(map(ord, MARKS))] = MARK
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
