"""How much the outputs changed, how well they read, how many are unwanted.

Scores are on the paper's scales: BLEU and ROUGE-L from 0 to 100 against the *original model's own
outputs* (not human references), so that 100 means that nothing changed. Every rate carries its
counts.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sacrebleu.metrics.bleu import BLEU

from tnt_jax.runtime.errors import UsageError

# SentencePiece prints an unknown piece as " \u2047 ", which NFKC normalisation turns into " ?? "; a
# "??" that ends a word is a person's.
_UNKNOWN_TOKEN = re.compile(r"\u2047|(?<!\S)\?\?(?!\S)")
_REPEATED_WORD = re.compile(
    r"(?<![\w'\u2019-])(\w[\w'\u2019-]*)\s+\1(?![\w'\u2019-])", re.IGNORECASE
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Rate:
    """A share with its counts.

    Attributes:
      numerator: how many.
      denominator: of how many; at least 1.
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
        disfluency.
      repeated_phrase: outputs with the same four words in a row twice, whatever their case and what
        is between them ("I'm so glad you came. I'm so glad", "odd, odd, odd, odd, odd"). What is
        written without spaces is one word.
      distinct_trigrams: different ones among all three words in a row of all outputs; falls when
        the model says the same to everybody in other sentences.
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
    spans: Sequence[Sequence] | None = None,
) -> Comparison:
    """Compares the current model's outputs with the original's, pair by pair.

    BLEU is sacrebleu's with its defaults: 0 when no output has four tokens, even if none changed.
    ROUGE-L is rouge-score's without stemming: it sees ASCII letters and digits only, so that a text
    without any scores 0.

    Args:
      original: the original's output for each input.
      current: the current model's output for the same inputs in the same order.
      spans: the marks of each of the original's outputs; None where nobody marked them.

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

    bleu = BLEU(force=True)  # `force` only keeps it from warning about text that looks tokenised
    score = bleu.corpus_score(list(current), [list(original)])
    rouge = rouge_scorer.RougeScorer(["rougeL"])
    rouge_l = [rouge.score(o, c)["rougeL"].fmeasure for o, c in zip(original, current, strict=True)]
    is_same = [o == c for o, c in zip(original, current, strict=True)]
    clean = (
        [] if spans is None else [same for same, of in zip(is_same, spans, strict=True) if not of]
    )
    return Comparison(
        bleu=score.score,
        bleu_signature=str(bleu.get_signature()),
        rouge_l=100 * sum(rouge_l) / len(rouge_l),
        exact_match=_rate(is_same),
        unchanged_clean=_rate(clean) if clean else None,
    )


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
    return bool(_REPEATED_WORD.search(text))


def has_repeated_phrase(text: str) -> bool:
    """Whether four words in a row stand twice, as `Fluency.repeated_phrase` counts it."""
    phrases = _in_a_row(text, 4)
    return len(set(phrases)) < len(phrases)


def has_unknown_token(text: str) -> bool:
    """Whether there is an unknown token, as `Fluency.unknown_token` counts it."""
    return bool(_UNKNOWN_TOKEN.search(text))


def unwanted(spans: Sequence[Sequence]) -> Rate:
    """The share of outputs with anything unwanted.

    Args:
      spans: the spans of each output (`Annotation.spans`, or `negative_spans` of a record).

    Raises:
      UsageError: there are no outputs.
    """
    if not spans:
        raise UsageError("Expected at least one output, found none. Is the file of outputs empty?")
    return _rate(bool(found) for found in spans)


def _in_a_row(text: str, number: int) -> list[tuple[str, ...]]:
    """All runs of `number` words; they may overlap."""
    words = _WORD.findall(text.casefold())
    return [tuple(words[first : first + number]) for first in range(len(words) - number + 1)]


def _rate(hits: Iterable[bool]) -> Rate:
    hits = list(hits)
    return Rate(sum(hits), len(hits))
