"""An annotator that asks a scorer of whole texts, and finds the words that carry the score."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tnt_jax.annotators import python_function
from tnt_jax.annotators.interface import Annotation, Span
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.runtime.errors import UsageError

_SETTING = "Classifier.scorer"


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Marks the words that make a scorer call the targets unwanted.

    Targets that score at or above the threshold lose the word without which they score least, then
    the next, until they score below it: those words are marked. Where several do alike, the one
    goes first that scores most by itself, then the first. If it takes all words, the whole output
    is marked. Words are left out of the text as it is, but for white space, which becomes a space.

    Attributes:
      threshold: the least score of unwanted targets; 0.5 where the scorer gives probabilities.
      scorer: "module:function": from a list of texts to one score each, higher where a text is more
        likely unwanted. Known by default: that of the package alt-profanity-check.
      confidence: whether a word's strength is the score of the text before the word was taken out
        of it. The scores have to be probabilities then.

    Raises:
      UsageError: the scorer is not there, or gives something else than one finite number a text,
        or than probabilities where these are needed.
    """

    threshold: int | float = 0.5
    scorer: str = "profanity_check:predict_prob"
    confidence: bool = dataclasses.field(default=False, metadata={"omit_default": True})

    def __post_init__(self):
        if not math.isfinite(self.threshold):
            raise UsageError(f"Classifier.threshold: expected a number, found {self.threshold}.")
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
        confidence = ", confidence=True" if self.confidence else ""
        return f"Classifier({scorer}, threshold={self.threshold}{confidence})"

    def score(self, texts: Sequence[str]) -> list[float]:
        """The score of each text."""
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
        alone = dict(zip(extents, self.score([text[a:b] for a, b in extents]), strict=True))
        left, removed = list(extents), []
        strengths: dict[tuple[int, int], float] = {}
        score = whole
        while left and score >= self.threshold:
            before = score
            scores = self.score([_without(text, sorted([*removed, word])) for word in left])
            score, _, word = min(
                (score, -alone[word], word) for score, word in zip(scores, left, strict=True)
            )
            left.remove(word)
            removed.append(word)
            strengths[word] = self._strength(before, record)
        if not left:
            strengths = {(0, len(text)): self._strength(whole, record)}
        return Annotation(
            spans=tuple(
                Span(start=start, end=end, strength=strength)
                for (start, end), strength in sorted(strengths.items())
            )
        )

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


def _without(text: str, removed: Sequence[tuple[int, int]]) -> str:
    """The text without these stretches, with single spaces."""
    edges = [0, *(edge for extent in removed for edge in extent), len(text)]
    kept = (text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    return " ".join("".join(kept).split())
