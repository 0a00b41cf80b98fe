"""What a word is: texts that were cut by hand."""

import unicodedata

import numpy as np
import pytest

from tnt_jax.data import words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don\u2019t say 4.5 to half-ass idiot's", "Don\u2019t|say|4.5|to|half|ass|idiot|'s"),
        # What makes an emoji of a character is in no word.
        (
            "You \u2764\ufe0fidiot 1\ufe0f\u20e3idiot",
            "You|\u2764|\ufe0f|idiot|1|\ufe0f|\u20e3|idiot",
        ),
        # An accent that is a character of its own, and Hindi vowel signs.
        ("cafe\u0301 x", "cafe\u0301|x"),
        (
            "\u0915\u0940 \u0915\u0941\u0924\u094d\u0924\u0947",
            "\u0915\u0940|\u0915\u0941\u0924\u094d\u0924\u0947",
        ),
        # Chinese, with a sign of its own; Korean, which has spaces.
        ("\u4f60\u662f\u50bb\u74dc\uff1f", "\u4f60|\u662f|\u50bb|\u74dc|\uff1f"),
        ("\ub108\ub294 \ubc14\ubcf4", "\ub108\ub294|\ubc14\ubcf4"),
        # Japanese in three scripts, a letter with its mark apart, a long vowel.
        ("\u304b\u3099\u304c\u30ab\u30fc\u65e5", "\u304b\u3099|\u304c|\u30ab|\u30fc|\u65e5"),
        # Thai: a tone mark stays on its letter; digits are numbers.
        (
            "\u0e42\u0e07\u0e48\u0e21\u0e32\u0e01 \u0e51.\u0e52",
            "\u0e42|\u0e07\u0e48|\u0e21|\u0e32|\u0e01|\u0e51.\u0e52",
        ),
        # Beside letters that join.
        (
            "5\u4eba don't\u65e5's a\u65e5b 4.\u65e5",
            "5|\u4eba|don't|\u65e5|'s|a|\u65e5|b|4|.|\u65e5",
        ),
        ("\u65e5-\u672c \u65e5-", "\u65e5|\u672c|\u65e5|-"),
        ("\u0301\u65e5\u0301a\u0301", "\u0301|\u65e5\u0301|a\u0301"),
        ("\U00020000\U0001f600", "\U00020000|\U0001f600"),
    ],
)
def test_words(text, expected):
    assert words.texts(text) == expected.split("|")
    assert [text[start:end] for start, end in words.extents(text)] == expected.split("|")


def test_stretches_are_runs_without_spaces():
    text = "a\u738b\u5c0f\u660e b-c \u738b"
    assert [text[a:b] for a, b in words.stretches(text)] == [
        "a",
        "\u738b\u5c0f\u660e",
        "b",
        "c",
        "\u738b",
    ]


def test_letters_are_words_without_what_joins_them():
    assert words.letters("I'm 4.5 h-a!") == ["I", "m", "4", "5", "h", "a"]
    assert words.letters("\u50bb\u74dc, cafe\u0301's") == ["\u50bb", "\u74dc", "cafe\u0301", "s"]


def test_equal_words_are_equal_however_they_are_composed():
    text = "\u304c\u304e \u00e9 \uf900"
    assert words.keys(text) == words.keys(unicodedata.normalize("NFD", text))
    assert words.keys("\u304c") != words.keys("\u304b")


def test_what_a_character_comes_to_is_of_its_kind():
    """Masks read folded characters: a letter without spaces and its marks, if anything."""
    kinds = words.kinds()
    for code in np.flatnonzero(kinds == words.UNSPACED_LETTER).tolist():
        first, *marks = words.fold(chr(code))
        assert kinds[ord(first)] == words.UNSPACED_LETTER
        assert all(kinds[ord(mark)] == words.MARK for mark in marks)
