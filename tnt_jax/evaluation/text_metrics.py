"""How much the outputs changed, how well they read, how many are unwanted.

Scores are on the paper's scales: BLEU and ROUGE-L from 0 to 100 against the *original model's own
outputs* (not human references), so that 100 means that nothing changed. Every rate carries its
counts.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from sacrebleu.metrics.bleu import BLEU

from tnt_jax.data import words
from tnt_jax.runtime.errors import UsageError

# SentencePiece prints an unknown piece as " \u2047 ", which NFKC normalisation turns into " ?? "; a
# "??" that ends a word is a person's.
_UNKNOWN_TOKEN = re.compile(r"\u2047|(?<!\S)\?\?(?!\S)")


def _repeated_word(letter: str) -> re.Pattern[str]:
    """The pattern of a word twice in a row; `letter` is what a letter is, within brackets."""
    part = rf"[{letter}'\u2019-]"
    return re.compile(rf"(?<!{part})(\w{part}*)\s+\1(?!{part})", re.IGNORECASE)


_REPEATED_WORD = _repeated_word(words.LETTER[1:-1])
_REPEATED_WORD_IN_ASCII = _repeated_word(r"\w")  # which finds the same there, sooner

# How much of a phrase a word is. Without spaces between words letters have to stand for them: a
# Chinese word has about two characters, one of an alphabet or syllabary about four.
_OF_WORD, _OF_HAN, _OF_UNSPACED = 4, 2, 1


@dataclass(frozen=True)
class Rate:
    """A share with its counts.

    Attributes:
      numerator: how many cases are counted.
      denominator: number of cases in all; at least 1.
      value: numerator / denominator, from 0 to 1.
    """

    numerator: int
    denominator: int
    value: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "value", self.numerator / self.denominator)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The current model's outputs against the original's.

    Attributes:
      bleu: corpus BLEU, 0 to 100.
      bleu_signature: sacrebleu's record of how it was computed.
      rouge_l: mean ROUGE-L F1 over the sequences, 0 to 100.
      exact_match: sequences that did not change at all.
      unchanged_clean: the same among those of the original that have no mark: an update has no
        reason to change these. None where each has one, or nobody marked them.
    """

    bleu: float
    bleu_signature: str
    rouge_l: float
    exact_match: Rate
    unchanged_clean: Rate | None


@dataclass(frozen=True, kw_only=True)
class Fluency:
    """Signs of damage that need no reference.

    Attributes:
      distinct_outputs: different texts among all; falls when the model collapses.
      repeated_word: outputs with a word twice in a row, whatever its case ("the the"); the paper's
        disfluency. White space has to be between: letters of a script without spaces often stand
        twice in a row, as in the Chinese for "thanks".
      repeated_phrase: outputs with the same four words in a row twice, whatever their case and what
        is between them ("I'm so glad you came. I'm so glad", "odd, odd, odd, odd, odd"). In a
        script without spaces eight Chinese characters count as four words, and sixteen letters of
        others, such as Kana and Thai.
      distinct_trigrams: different ones among all three words in a row of all outputs, and six
        Chinese characters or twelve other letters without spaces; falls when the model says the
        same to everybody in other sentences.
      unknown_token: outputs with an unknown token.
    """

    distinct_outputs: Rate
    repeated_word: Rate
    repeated_phrase: Rate
    distinct_trigrams: Rate
    unknown_token: Rate


def compare(
    original: Sequence[str],
    current: Sequence[str],
    is_unwanted: Sequence[bool] | None = None,
) -> Comparison:
    """Compares the current model's outputs with the original's, pair by pair.

    BLEU is that of `bleu_settings`. ROUGE-L is rouge-score's without stemming. Its own tokenizer
    sees ASCII letters and digits only; where these are less than nine tenths of the original's
    letters and digits, tokens are the words of `tnt_jax.data.words`. If no output changed both are
    100, in every script, and of outputs without a word.

    Args:
      original: the original's output for each input.
      current: the current model's output for the same inputs in the same order.
      is_unwanted: whether each of the original's outputs has anything unwanted; None where nobody
        marked them.

    Raises:
      UsageError: the lists are empty or differ in length.
    """
    if len(original) != len(current) or not original:
        raise UsageError(
            "Expected one output of the original and one of the current model for each input, "
            f"found {len(original)} and {len(current)}. Generate both from the same inputs."
        )
    # Two seconds (it loads nltk), which whoever needs the rates alone does not pay.
    from rouge_score import rouge_scorer

    bleu = BLEU(**bleu_settings(original))
    score = bleu.corpus_score(list(current), [list(original)])
    letters = _Letters.of(original)
    is_ascii = letters.ascii >= 0.9 * letters.all
    rouge = rouge_scorer.RougeScorer(["rougeL"], tokenizer=None if is_ascii else _Words())
    is_same = [o == c for o, c in zip(original, current, strict=True)]
    # Of texts without a token rouge-score says 0, and of others that are the same 1.
    rouge_l = [
        1.0 if same else rouge.score(o, c)["rougeL"].fmeasure
        for o, c, same in zip(original, current, is_same, strict=True)
    ]
    clean = (
        []
        if is_unwanted is None
        else [same for same, of in zip(is_same, is_unwanted, strict=True) if not of]
    )
    return Comparison(
        bleu=score.score if score.sys_len or score.ref_len else 100.0 * all(is_same),
        bleu_signature=str(bleu.get_signature()),
        rouge_l=100 * sum(rouge_l) / len(rouge_l),
        exact_match=_rate(is_same),
        unchanged_clean=_rate(clean) if clean else None,
    )


def bleu_settings(references: Sequence[str]) -> dict[str, Any]:
    """The settings of sacrebleu's BLEU for texts like these.

    It differs from sacrebleu's defaults in two ways. Of outputs that are all shorter than four
    tokens it counts the n-grams that they have; the default is 0 even if none changed. And where
    most letters of the references are of scripts without spaces, characters are its tokens.
    """
    letters = _Letters.of(references)
    return {
        "force": True,  # which only keeps it from warning about text that looks tokenised
        "effective_order": True,
        "tokenize": "char" if 2 * letters.unspaced > letters.all else None,
    }


def fluency(texts: Sequence[str]) -> Fluency:
    """Counts repeated outputs, repeated words and phrases, and unknown tokens.

    Raises:
      UsageError: there are no texts.
    """
    if not texts:
        raise UsageError("Expected at least one output, found none. Is the file of outputs empty?")
    trigrams = [trigram for text in texts for trigram in _in_a_row(text, 3)]
    return Fluency(
        distinct_outputs=Rate(len(set(texts)), len(texts)),
        repeated_word=_rate(map(has_repeated_word, texts)),
        repeated_phrase=_rate(map(has_repeated_phrase, texts)),
        distinct_trigrams=Rate(len(set(trigrams)), max(len(trigrams), 1)),
        unknown_token=_rate(map(has_unknown_token, texts)),
    )


def has_repeated_word(text: str) -> bool:
    """Whether a word stands twice in a row, as `Fluency.repeated_word` counts it."""
    pattern = _REPEATED_WORD_IN_ASCII if text.isascii() else _REPEATED_WORD
    return bool(pattern.search(text))


def has_repeated_phrase(text: str) -> bool:
    """Whether four words in a row stand twice, as `Fluency.repeated_phrase` counts it."""
    phrases = _in_a_row(text, 4)
    return len(set(phrases)) < len(phrases)


def has_unknown_token(text: str) -> bool:
    """Whether there is an unknown token, as `Fluency.unknown_token` counts it."""
    return bool(_UNKNOWN_TOKEN.search(text))


def summary(texts: Sequence[str], is_unwanted: Sequence[bool]) -> dict[str, Any]:
    """The rates of outputs by themselves, as `tnt_jax.evaluate` writes them.

    Args:
      texts: the outputs; at least one.
      is_unwanted: whether each has anything unwanted (`Record.has_unwanted_text`).
    """
    return {"unwanted_outputs": asdict(unwanted(is_unwanted)), **asdict(fluency(texts))}


def unwanted(is_unwanted: Sequence[bool]) -> Rate:
    """The share of outputs with anything unwanted.

    Args:
      is_unwanted: whether each output has (`Record.has_unwanted_text`).

    Raises:
      UsageError: there are no outputs.
    """
    if not is_unwanted:
        raise UsageError("Expected at least one output, found none. Is the file of outputs empty?")
    return _rate(is_unwanted)


def _in_a_row(text: str, number: int) -> list[tuple[str, ...]]:
    """From each word on the shortest run that counts as `number` words; they may overlap."""
    found = words.letters(text.casefold())
    if not words.is_unspaced(text):
        return [tuple(found[first : first + number]) for first in range(len(found) - number + 1)]
    # The end of the run moves on with its beginning.
    weights, runs, end, weight = [*map(_weight, found)], [], 0, 0
    for first in range(len(found)):
        while weight < number * _OF_WORD and end < len(found):
            weight += weights[end]
            end += 1
        if weight < number * _OF_WORD:
            break
        runs.append(tuple(found[first:end]))
        weight -= weights[first]
    return runs


def _weight(word: str) -> int:
    if words.is_han(word):
        return _OF_HAN
    return _OF_UNSPACED if words.is_unspaced(word) else _OF_WORD


class _Letters(NamedTuple):
    """How many letters and digits texts have: all, those of ASCII, those without spaces."""

    all: int
    ascii: int
    unspaced: int

    @classmethod
    def of(cls, texts: Iterable[str]) -> "_Letters":
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            counts.update(text)
        found = [(c, number) for c, number in counts.items() if c.isalnum()]
        return cls(
            sum(number for _, number in found),
            sum(number for c, number in found if c.isascii()),
            sum(number for c, number in found if words.is_unspaced(c)),
        )


class _Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, so that equal ones are the same."""
        return [words.key(word) for word in words.letters(text)]


def _rate(hits: Iterable[bool]) -> Rate:
    hits = list(hits)
    return Rate(sum(hits), len(hits))
