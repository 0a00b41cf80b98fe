import math
import random

import pytest
from sacrebleu.metrics.bleu import BLEU

from tnt_jax.data import records
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


@pytest.mark.parametrize(
    "texts",
    [
        ["yes"],
        ["no", "yes, sir"],
        ["你是傻瓜吗？", "好"],
        ["คุณโง่มาก"],
        ["ばか", "がんばれ"],
        ["да", "нет, спасибо"],
        ["विद्यार्थियों के लिए"],
        ["바보"],
        ["\U0001f600", "!"],
        ["", "a b c d e"],
        [""],
        [" "],
    ],
)
def test_unchanged_outputs_score_100_in_every_script(texts):
    result = text_metrics.compare(texts, texts)
    assert (result.bleu, result.rouge_l) == pytest.approx((100, 100))
    # What changed altogether does not.
    if texts[0].strip():
        result = text_metrics.compare(texts, ["x"] * len(texts))
        assert (result.bleu, result.rouge_l) == (0, 0)


def test_scores_of_a_text_without_spaces_by_hand():
    """The original asks "you are a fool?" in Chinese; two of its five characters changed."""
    result = text_metrics.compare(["你是傻瓜？"], ["你是好人？"])
    # Characters found: 3 of 5; pairs 1 of 4; no longer run, of 3 and 2: smoothed to 1/2 and 1/4.
    expected = 100 * math.prod([3 / 5, 1 / 4, 1 / 2 / 3, 1 / 4 / 2]) ** 0.25
    assert result.bleu == pytest.approx(expected)
    assert "|tok:char|" in result.bleu_signature
    assert result.rouge_l == pytest.approx(100 * 2 / 4)  # letters alone


def test_rouge_l_sees_all_letters_where_the_original_has_few_of_ascii():
    # Two of three words stayed; the case of letters, and how they are composed, do not count.
    result = text_metrics.compare(["Он сказал: ё"], ["он СКАЗАЛ, нет"])
    assert result.rouge_l == pytest.approx(100 * 2 / 3)
    # In English it is rouge-score's own: "caf" of two tokens, where a word became another one.
    result = text_metrics.compare(["a longer text with a caf\u00e9"] * 2, ["caf\u00e8", "z"])
    assert result.rouge_l == pytest.approx(100 * (2 / 7) / 2)


@pytest.mark.parametrize("length", [4, 5, 9])
def test_bleu_is_sacrebleus_where_an_output_has_four_tokens(length):
    rng = random.Random(length)
    texts = [
        [" ".join(rng.choices("abcdefg.,", k=rng.randint(0, length))) for _ in range(20)]
        for _ in range(2)
    ]
    texts[1][0] = "a b c d"
    expected = BLEU(force=True).corpus_score(texts[1], [texts[0]]).score
    assert text_metrics.compare(*texts).bleu == expected


def test_bleu_by_hand():
    # n-grams of CURRENT found in ORIGINAL, of all: unigrams 5 + 4 of 6 + 5, bigrams 3 + 3 of 5 + 4,
    # trigrams 2 + 2 of 4 + 3, 4-grams 1 + 1 of 3 + 2. Equal lengths: no brevity penalty.
    expected = 100 * math.prod([9 / 11, 6 / 9, 4 / 7, 2 / 5]) ** 0.25
    result = text_metrics.compare(ORIGINAL, CURRENT)
    assert result.bleu == pytest.approx(expected)
    assert result.bleu_signature.startswith("nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp")


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
    result = text_metrics.compare(original, current, [True, False, False, True])
    assert result.unchanged_clean == text_metrics.Rate(1, 2)
    assert result.exact_match == text_metrics.Rate(2, 4)
    assert text_metrics.compare(original, current).unchanged_clean is None
    assert text_metrics.compare(["a"], ["a"], [True]).unchanged_clean is None


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
        # Hindi: "for the students books, to the students" repeats no four words.
        ("विद्यार्थियों के लिए पुस्तकें, विद्यार्थियों को", False),
        ("यह पुस्तक बहुत अच्छी है, यह पुस्तक बहुत अच्छी", True),
        # Eight Chinese characters, seven; four and two words.
        ("今天天气真的很好，今天天气真的很好", True),
        ("今天天气真的好，今天天气真的好", False),
        ("今天天气 very good，今天天气 very good", True),
        ("天气 very 好 x 天气 very 好", False),
        ("\u2764\ufe0f a b. \u2764\ufe0f a b", False),  # what ends an emoji is no word
        # Fifteen Japanese letters, and sixteen.
        ("あいうえおかきくけこさしすせそ。あいうえおかきくけこさしすせそ", False),
        ("あいうえおかきくけこさしすせそた。あいうえおかきくけこさしすせそた", True),
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
    # Six Chinese characters from the first and from the second on; the same ones again.
    result = text_metrics.fluency(["今天天气很好", "今天天气很好！", "今天"])
    assert result.distinct_trigrams == text_metrics.Rate(1, 2)


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
        ("cafe\u0301 cafe\u0301", True),
        ("cafe cafe\u0301", False),
        ("की की", True),
        ("उस दिन न आना", False),
        ("\u2764\ufe0fthe the", True),
        ("哈哈，谢谢！人人都好", False),
        ("มากๆ", False),
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
    spans = [((0, 1), (2, 3)), (), None, ((0, 2, 0.1),)]
    rows = [
        records.Record(id=str(number), inputs="", targets="a b", negative_spans=of_row)
        for number, of_row in enumerate(spans)
    ]
    found = text_metrics.unwanted([row.has_unwanted_text for row in rows])
    assert found == text_metrics.Rate(2, 4)


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
