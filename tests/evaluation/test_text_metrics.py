import math

import pytest

from tnt_jax.annotators import Span
from tnt_jax.evaluation import text_metrics
from tnt_jax.runtime.errors import UsageError

ORIGINAL = ["the cat sat on a mat", "a b c d e"]
CURRENT = ["the cat sat on the mat", "a b c d f"]


def test_unchanged_outputs_score_100():
    result = text_metrics.compare(ORIGINAL, ORIGINAL)
    assert result.bleu == pytest.approx(100)
    assert result.rouge_l == pytest.approx(100)
    assert result.exact_match == text_metrics.Rate(2, 2)
    assert result.exact_match.value == 1


def test_bleu_by_hand():
    # n-grams of CURRENT found in ORIGINAL, of all: unigrams 5 + 4 of 6 + 5, bigrams 3 + 3 of 5 + 4,
    # trigrams 2 + 2 of 4 + 3, 4-grams 1 + 1 of 3 + 2. Equal lengths: no brevity penalty.
    expected = 100 * math.prod([9 / 11, 6 / 9, 4 / 7, 2 / 5]) ** 0.25
    result = text_metrics.compare(ORIGINAL, CURRENT)
    assert result.bleu == pytest.approx(expected)
    assert result.bleu_signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_the_original_is_the_reference_in_bleu():
    # Five of six words, all found: only the brevity penalty exp(1 - 6 / 5) is left.
    result = text_metrics.compare(["a b c d e f"], ["a b c d e"])
    assert result.bleu == pytest.approx(100 * math.exp(1 - 6 / 5))
    # The other way round the sixth word costs precision, not length.
    result = text_metrics.compare(["a b c d e"], ["a b c d e f"])
    assert result.bleu == pytest.approx(100 * math.prod([5 / 6, 4 / 5, 3 / 4, 2 / 3]) ** 0.25)


def test_rouge_l_by_hand():
    # Longest common subsequences: 5 words of 6 and 6, 4 words of 5 and 5.
    assert text_metrics.compare(ORIGINAL, CURRENT).rouge_l == pytest.approx(
        100 * (5 / 6 + 4 / 5) / 2
    )
    # Subsequence "a c" of length 2: precision 2/2, recall 2/4, F1 2/3.
    assert text_metrics.compare(["a b c d"], ["a c"]).rouge_l == pytest.approx(100 * 2 / 3)


def test_exact_match_is_strict():
    result = text_metrics.compare(["a", "b", "c", "d"], ["a", "B", "c ", "d"])
    assert result.exact_match == text_metrics.Rate(2, 4)
    assert result.exact_match.value == 0.5


def test_unchanged_among_what_was_clean():
    """By hand: of the second and third, which have no mark, the second is as it was."""
    original, current = ["a", "b", "c", "d"], ["a", "b", "x", "y"]
    spans = [((0, 1),), (), (), ((0, 1),)]
    result = text_metrics.compare(original, current, spans)
    assert result.unchanged_clean == text_metrics.Rate(1, 2)
    assert result.exact_match == text_metrics.Rate(2, 4)
    assert text_metrics.compare(original, current).unchanged_clean is None
    assert text_metrics.compare(["a"], ["a"], [((0, 1),)]).unchanged_clean is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm so glad you came. I'm so glad!", True),  # I, m, so, glad
        ("family-friendly, family-friendly, family-friendly", True),
        ("No, no, no, no, no", True),  # the four words from the first, and from the second, on
        ("a b c d e A B C D", True),
        ("no no no no", False),  # four words stand once
        ("I'm so happy, I'm so glad", False),  # three in a row stand twice
        ("a b c d e b c d", False),
        ("", False),
    ],
)
def test_repeated_phrases(text, expected):
    assert text_metrics.has_repeated_phrase(text) is expected
    assert text_metrics.fluency([text, "x"]).repeated_phrase == text_metrics.Rate(int(expected), 2)


def test_distinct_trigrams_by_hand():
    # abc, bcd, and abc again in other case; two words have none.
    result = text_metrics.fluency(["a b c d", "A, B, C", "a b"])
    assert result.distinct_trigrams == text_metrics.Rate(2, 3)
    assert text_metrics.fluency(["a b"]).distinct_trigrams == text_metrics.Rate(0, 1)


def test_tokenised_text_raises_no_warning(caplog):
    text_metrics.compare(["this is tokenised ."] * 200, ["this is tokenised ."] * 200)
    assert not caplog.records


def test_fluency_counts():
    texts = ["the the cat", "a cat", "a cat", "what ⁇ is"]
    result = text_metrics.fluency(texts)
    assert result.distinct_outputs == text_metrics.Rate(3, 4)
    assert result.repeated_word == text_metrics.Rate(1, 4)
    assert result.unknown_token == text_metrics.Rate(1, 4)
    assert result.distinct_outputs.value == 0.75


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the the cat", True),
        ("The the cat", True),
        ("it is is.", True),
        ("on\non", True),
        ("don't don't", True),
        ("été été", True),
        ("the theatre", False),
        ("a cat", False),
        ("very, very good", False),
        ("bye-bye", False),
        ("no no-one", False),
        ("so-called called", False),
        ("can can't", False),
        ("the cat the cat", False),
        ("! !", False),
        ("", False),
    ],
)
def test_repeated_word(text, expected):
    assert text_metrics.fluency([text]).repeated_word.numerator == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ⁇ at the start", True),
        ("joined⁇", True),
        ("a ?? b", True),
        ("??", True),
        ("really??", False),
        ("a ??? b", False),
        ("why?", False),
    ],
)
def test_unknown_token(text, expected):
    assert text_metrics.fluency([text]).unknown_token.numerator == expected


def test_unwanted_counts_outputs_not_spans():
    spans = [(Span(start=0, end=1), Span(start=2, end=3)), (), [], [[0, 2]]]
    assert text_metrics.unwanted(spans) == text_metrics.Rate(2, 4)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: text_metrics.compare(["a"], ["a", "b"]), "found 1 and 2"),
        (lambda: text_metrics.compare([], []), "found 0 and 0"),
        (lambda: text_metrics.fluency([]), "found none"),
        (lambda: text_metrics.unwanted([]), "found none"),
    ],
)
def test_nothing_to_measure_is_a_mistake(call, found):
    with pytest.raises(UsageError, match=found):
        call()
