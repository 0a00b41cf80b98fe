"""An annotator that makes the mistakes of another one's: what a study of bad marks compares."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tnt_jax.annotators.interface import (
    Annotation,
    Annotator,
    KnowsInnocentWords,
    Mask,
    Span,
    merged,
)
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """Misses some spans of another annotator, and marks words that it does not.

    What happens to a record depends on the seed and on its inputs and targets alone. With a higher
    rate the same mistakes are made, and more. If the other annotator can mask while decoding
    (`interface.Mask`), this one can, with the same texts: mistakes are made in marks alone.

    Attributes:
      annotator: the annotator whose marks get mistakes.
      miss_rate: share of its spans that are left out, from 0 to 1.
      false_rate: share of the other words that are marked, from 0 to 1. They have no alternatives.
      confidence: None says nothing of how sure a mark is. A number n of 1 or more makes an
        annotator that has a feeling u for each mark, from 0 to 1: the largest of n numbers drawn
        uniformly for a mark of the other annotator's, the smallest of n for a false one. The
        strength is the probability that a mark is right, given u, where as many are right as are
        false: `u^(n-1) / (u^(n-1) + (1-u)^(n-1))`. With n = 1 that is a half, whatever the mark;
        with n = 2 it is u, which is larger for a right mark than for a false one in 5 of 6 pairs.
      seed: random seed of the choice of mistakes.

    Raises:
      UsageError: a rate, or the confidence, is outside its range.
    """

    annotator: Annotator
    miss_rate: int | float = 0.0
    false_rate: int | float = 0.0
    seed: int = 0
    confidence: int | None = dataclasses.field(default=None, metadata={"omit_default": True})

    def __post_init__(self):
        for name in ("miss_rate", "false_rate"):
            rate = getattr(self, name)
            if not 0 <= rate <= 1:
                raise UsageError(f"Noisy.{name}: expected a rate from 0 to 1, found {rate}.")
        if self.confidence is not None and self.confidence < 1:
            raise UsageError(
                "Noisy.confidence: expected None, or a number of draws of 1 or more, found "
                f"{self.confidence}."
            )
        # Not a method of the class, by which every one would seem to be a mask.
        if isinstance(self.annotator, Mask):
            object.__setattr__(self, "unwanted", self.annotator.unwanted)

    @property
    def description(self) -> str:
        """Name and settings, those of the other annotator among them."""
        confidence = "" if self.confidence is None else f", confidence={self.confidence}"
        return (
            f"Noisy({self.annotator.description}, miss_rate={self.miss_rate}, "
            f"false_rate={self.false_rate}, seed={self.seed}{confidence})"
        )

    def annotate(self, record: Record) -> Annotation | None:
        """What the other annotator finds, with mistakes."""
        found = self.annotator.annotate(record)
        if found is None:
            return None
        misses, falsely = self._random("miss", record), self._random("false", record)
        sure, spans = self._random("sure", record), []
        for span in found.spans:
            strength = self._strength(sure, max)  # drawn for each span, missed or not
            if misses.random() >= self.miss_rate:
                is_sure = self.confidence is None
                spans.append(span if is_sure else dataclasses.replace(span, strength=strength))
        for start, end in words.extents(record.targets):
            # Both are drawn for each word, marked or not.
            is_false, strength = falsely.random() < self.false_rate, self._strength(sure, min)
            if is_false and not any(start < s.end and s.start < end for s in found.spans):
                spans.append(Span(start=start, end=end, strength=strength))
        return dataclasses.replace(found, spans=merged(spans))

    def _strength(self, random: random.Random, choose: Callable[..., float]) -> float:
        """The strength of a mark; `choose` is the larger or the smaller of several feelings."""
        if self.confidence is None:
            return 1.0
        feeling = choose(random.random() for _ in range(self.confidence))
        for_right, for_false = (x ** (self.confidence - 1) for x in (feeling, 1 - feeling))
        # A mark stays one: the smallest that a strength may be is above 0.
        return max(round(for_right / (for_right + for_false), 4), 1e-4)

    def innocent_words(self, text: str) -> Sequence[str]:
        """What the other annotator says of a text, if it says anything."""
        other = self.annotator
        return other.innocent_words(text) if isinstance(other, KnowsInnocentWords) else ()

    def everywhere(self) -> Listed | None:
        """What the other annotator removes everywhere."""
        return self.annotator.everywhere()

    def _random(self, purpose: str, record: Record) -> random.Random:
        # Python's own hash of a text differs from process to process.
        key = json.dumps([self.seed, purpose, record.inputs, record.targets])
        return random.Random(hashlib.sha256(key.encode()).digest())
