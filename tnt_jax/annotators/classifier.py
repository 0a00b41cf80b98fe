"""An annotator that asks a scorer of whole texts, and finds the words that carry the score."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tnt_jax.annotators import python_function
from tnt_jax.annotators.interface import Annotation, Span
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.runtime.errors import UsageError

_SETTING = "Classifier.scorer"
_BATCH = 128  # texts that the scorer is given at once
_FEW = 8  # words that go before it is asked whether as many as may go would be enough

_Extent = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Marks the words that make a scorer call the targets unwanted.

    Targets that score at or above the threshold lose the word without which they score least, then
    the next, until they score below it: those words are marked. Where several do alike, the one
    goes first that scores most by itself, then the first. If it takes all words, or more than
    `most_words`, the whole output is marked. Words are left out of the text as it is, but for white
    space, which becomes a space.

    For each word that goes, the scorer is asked for as many texts as there are words left. So with
    more than `most_words` words it is not always tried to the end: after 8 words the scorer is
    asked for the text without the `most_words` words that seemed worst at first. If that is
    unwanted, too, the whole output is marked.

    Attributes:
      threshold: the least score of unwanted targets; 0.5 where the scorer gives probabilities.
      scorer: "module:function": from a list of texts to one score each, higher where a text is more
        likely unwanted. Known by default: that of the package alt-profanity-check.
      confidence: whether a word's strength is the score of the text before the word was taken out
        of it. The scores have to be probabilities then.
      most_words: the most words of an output that are marked one by one.

    Raises:
      UsageError: the scorer is not there, or gives something else than one finite number a text,
        or than probabilities where these are needed.
    """

    threshold: int | float = 0.5
    scorer: str = "profanity_check:predict_prob"
    confidence: bool = dataclasses.field(default=False, metadata={"omit_default": True})
    most_words: int = dataclasses.field(default=50, metadata={"omit_default": True})

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise UsageError(f"Classifier.threshold: expected a number, found {self.threshold}.")
        if self.most_words < 1:
            raise UsageError(
                f"Classifier.most_words: expected at least 1, found {self.most_words}."
            )
        try:
            self.score(["one", "two"])
        except UsageError as error:
            if "no module 'profanity_check'" not in str(error):
                raise
            raise UsageError(f"{error} Install it: pip install alt-profanity-check") from error

    @cached_property
    def description(self) -> str:
        """Name, scorer with its version, and threshold."""
        scorer = python_function.identity(self.scorer, _SETTING)
        more = ", confidence=True" if self.confidence else ""
        if self.most_words != type(self).most_words:
            more += f", most_words={self.most_words}"
        return f"Classifier({scorer}, threshold={self.threshold}{more})"

    def score(self, texts: Iterable[str]) -> list[float]:
        """The score of each text; the scorer is given at most 128 at once."""
        left, scores = iter(texts), []
        while batch := list(itertools.islice(left, _BATCH)):
            scores += self._scores_of(batch)
        return scores

    def _scores_of(self, texts: Sequence[str]) -> list[float]:
        found = python_function.find(self.scorer, _SETTING)(list(texts))
        try:
            scores = [float(score) for score in found]
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{_SETTING}: expected {self.scorer} to give a number for each text, found "
                f"{type(found).__name__}: {error}."
            ) from error
        if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
            raise UsageError(
                f"{_SETTING}: expected {self.scorer} to give {len(texts)} finite numbers for as "
                f"many texts, found {str(scores)[:80]}."
            )
        return scores

    def annotate(self, record: Record) -> Annotation:
        """Marks the words of the targets that carry their score."""
        text = record.targets
        extents = words.extents(text)
        whole = self.score([text])[0] if extents else -math.inf
        if whole < self.threshold:
            return Annotation(spans=())
        found = self._words_that_carry(text, extents, whole) or {(0, len(text)): whole}
        strengths = {word: self._strength(score, record) for word, score in found.items()}
        return Annotation(
            spans=tuple(
                Span(start=start, end=end, strength=strength)
                for (start, end), strength in sorted(strengths.items())
            )
        )

    def _words_that_carry(
        self, text: str, extents: Sequence[_Extent], whole: float
    ) -> dict[_Extent, float] | None:
        """The words that go, each with the score before it went; None if the whole text does."""
        alone = dict(zip(extents, self.score(text[a:b] for a, b in extents), strict=True))
        left, removed = list(extents), {}
        worst_at_first: list[_Extent] = []
        score = whole
        while score >= self.threshold:
            if len(removed) == self.most_words:
                return None
            is_long = len(extents) > self.most_words
            if is_long and len(removed) == _FEW and self._is_unwanted(text, worst_at_first):
                return None
            scores = self.score(_without(text, [*removed, word]) for word in left)
            ranked = sorted(
                (score, -alone[word], word) for score, word in zip(scores, left, strict=True)
            )
            worst_at_first = worst_at_first or [word for *_, word in ranked[: self.most_words]]
            removed[ranked[0][-1]] = score
            score, _, word = ranked[0]
            left.remove(word)
            if not left:
                return None
        return removed

    def _is_unwanted(self, text: str, removed: Sequence[_Extent]) -> bool:
        """Whether a text is still unwanted without these words."""
        return self.score([_without(text, removed)])[0] >= self.threshold

    def _strength(self, score: float, record: Record) -> float:
        """The strength of the mark of a word that was taken out of a text with this score."""
        if not self.confidence:
            return 1.0
        if not 0 < score <= 1:
            raise UsageError(
                f"Classifier.confidence: record {record.id!r}: expected {self.scorer} to give "
                f"probabilities, above 0 where it marks, found {score}. Set it to False."
            )
        return score

    def everywhere(self) -> None:
        """Nothing: the scorer knows texts, not words."""


def _without(text: str, removed: Iterable[_Extent]) -> str:
    """The text without these stretches, with single spaces."""
    edges = [0, *(edge for extent in sorted(removed) for edge in extent), len(text)]
    kept = (text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    return " ".join("".join(kept).split())
