"""An annotator that makes the mistakes of another one's: what a study of bad marks compares."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tnt_jax.annotators.interface import Annotation, Annotator, Span, merged
from tnt_jax.data import words
from tnt_jax.data.records import Record
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """Misses some spans of another annotator, and marks words that it does not.

    What happens to a record depends on the seed and on its inputs and targets alone. With a higher
    rate the same mistakes are made, and more.

    Attributes:
      annotator: that is mostly right.
      miss_rate: share of its spans that are left out, from 0 to 1.
      false_rate: share of the other words that are marked, from 0 to 1. They have no alternatives.
      seed: of the choice.

    Raises:
      UsageError: a rate is outside its range.
    """

    annotator: Annotator
    miss_rate: int | float = 0.0
    false_rate: int | float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("miss_rate", "false_rate"):
            rate = getattr(self, name)
            if not 0 <= rate <= 1:
                raise UsageError(f"Noisy.{name}: expected a rate from 0 to 1, found {rate}.")

    @property
    def description(self) -> str:
        """Name and settings, those of the other annotator among them."""
        return (
            f"Noisy({self.annotator.description}, miss_rate={self.miss_rate}, "
            f"false_rate={self.false_rate}, seed={self.seed})"
        )

    def annotate(self, record: Record) -> Annotation | None:
        """What the other annotator finds, with mistakes."""
        found = self.annotator.annotate(record)
        if found is None:
            return None
        misses, falsely = self._random("miss", record), self._random("false", record)
        spans = [span for span in found.spans if misses.random() >= self.miss_rate]
        for start, end in words.extents(record.targets):
            is_false = falsely.random() < self.false_rate  # drawn for each word, marked or not
            if is_false and not any(start < s.end and s.start < end for s in found.spans):
                spans.append(Span(start=start, end=end))
        return dataclasses.replace(found, spans=merged(spans))

    def innocent_words(self, text: str) -> Sequence[str]:
        """What the other annotator says of a text, if it says anything."""
        of_other = getattr(self.annotator, "innocent_words", None)
        return of_other(text) if of_other else ()

    def everywhere(self) -> Listed | None:
        """What the other annotator removes everywhere."""
        return self.annotator.everywhere()

    def _random(self, purpose: str, record: Record) -> random.Random:
        # Python's own hash of a text differs from process to process.
        key = json.dumps([self.seed, purpose, record.inputs, record.targets])
        return random.Random(hashlib.sha256(key.encode()).digest())
