"""The interface of annotators: a record in, unwanted character spans out.

Offsets are Unicode code points into a record's targets, end exclusive, so that they mean the same
in Python, in JSON and for any vocabulary. `tnt_jax.annotators` lists the annotators there are.
"""

import hashlib
import operator
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tnt_jax.data.records import Record, counted_otherwise, is_strength
from tnt_jax.data.token_automaton import Listed
from tnt_jax.runtime.errors import UsageError

_HOW_SPANS_ARE = (
    "A span is [start, end] with 0 <= start < end <= length, counted in Unicode code points (not "
    "bytes), end exclusive"
)


@dataclass(frozen=True, kw_only=True)
class Span:
    """One unwanted stretch of the targets.

    Attributes:
      start: code point offset of its first character.
      end: code point offset after its last character.
      alternatives: texts that would be just as wrong from `start` on, in every casing that the text
        may take there (`phrases.forms`).
      strength: how much of its probability goes, above 0 and at most 1: less than 1 where the
        annotator is unsure. Its alternatives have it, too.
    """

    start: int
    end: int
    alternatives: Sequence[str] = ()
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What an annotator found in one record.

    Attributes:
      spans: sorted and disjoint; empty when nothing is unwanted.
      supported: texts that remain right in this record, in every casing. A token that begins one of
        them must not be removed on account of an alternative.
      unwanted: texts that must not come up anywhere in the targets. What would complete one is
        removed at every position, whether or not it was going to come up: a decoding mask as marks.
    """

    spans: tuple[Span, ...]
    supported: tuple[str, ...] = ()
    unwanted: Listed | None = None


@runtime_checkable
class Annotator(Protocol):
    """The interface of every annotator. Implementations are deterministic and picklable."""

    @property
    def description(self) -> str:
        """Name and settings: the `annotator` field of every record it marked."""
        ...

    def annotate(self, record: Record) -> Annotation | None:
        """Marks what is unwanted in the record's targets, given its inputs.

        Earlier marks of the record do not count. None says that the annotator does not know the
        record: it can call it neither marked nor clean.
        """
        ...

    def everywhere(self) -> Listed | None:
        """Texts to remove at every position of every record; usually none."""
        ...


@runtime_checkable
class Mask(Protocol):
    """An annotator that knows beforehand what it would mark: it can mask while decoding."""

    def unwanted(self, record: Record) -> Listed:
        """The texts that would be marked in any targets of a record.

        The list is the same for all records; which of it may come up depends on the inputs.
        """
        ...


@runtime_checkable
class KnowsInnocentWords(Protocol):
    """An annotator that says of any text which of its words are in nothing that it would mark."""

    def innocent_words(self, text: str) -> Sequence[str]:
        """Each of these words, in lower case unless letters count as they are."""
        ...


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The spans sorted, those that overlap made one.

    One that holds several has the alternatives of those that begin where it does, and the largest
    of their strengths.
    """
    disjoint: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.start, span.end)):
        if not disjoint or span.start >= disjoint[-1].end:
            disjoint.append(span)
            continue
        before = disjoint[-1]
        more = span.alternatives if span.start == before.start else ()
        disjoint[-1] = Span(
            start=before.start,
            end=max(before.end, span.end),
            alternatives=tuple(dict.fromkeys((*before.alternatives, *more))),
            strength=max(before.strength, span.strength),
        )
    return tuple(disjoint)


def _pair_and_strength(item: Any) -> tuple[Any, Any]:
    """What an annotator gave as one span: its (start, end), unchecked, and its strength."""
    if isinstance(item, Span):
        return (item.start, item.end), item.strength
    if isinstance(item, np.ndarray) and item.ndim == 1:
        item = item.tolist()
        # With a strength all numbers of an array are floats, the offsets, too.
        if len(item) == 3 and all(isinstance(i, float) and i.is_integer() for i in item[:2]):
            item = [int(item[0]), int(item[1]), item[2]]
    if isinstance(item, tuple | list) and len(item) == 3:
        return item[:2], item[2]
    return item, 1.0


def _offset(given: Any) -> int | None:
    """A whole number, also one of NumPy's; None for anything else."""
    if isinstance(given, bool | np.bool_):
        return None
    try:
        return operator.index(given)
    except TypeError:
        return None


def checked_spans(found: Iterable[Any], record: Record, where: str) -> tuple[Span, ...]:
    """Pairs, triples with a strength, and spans as sorted and disjoint spans within the targets.

    Numbers and rows may be NumPy's; those of the spans returned are Python's own.

    Raises:
      UsageError: something else is among them, or one lies outside the targets.
    """
    spans = []
    for item in found:
        pair, strength = _pair_and_strength(item)
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        offsets = [at for at in map(_offset, pair) if at is not None] if is_pair else []
        if len(offsets) != 2:
            raise UsageError(
                f"{where}: expected (start, end) pairs of integers or Span objects for record "
                f"{record.id!r}, found {item!r}."
            )
        if not is_strength(strength):
            raise UsageError(
                f"{where}: expected a strength above 0 and at most 1 for record {record.id!r}, "
                f"found {item!r}."
            )
        start, end = offsets
        if not 0 <= start < end <= len(record.targets):
            raise UsageError(
                f"{where}: [{start}, {end}] for record {record.id!r}, whose targets have "
                f"{len(record.targets)} characters."
                f"{counted_otherwise(record.targets, start, end)} {_HOW_SPANS_ARE}."
            )
        alternatives = item.alternatives if isinstance(item, Span) else ()
        # A text alone is a sequence of texts, too: of its letters.
        if isinstance(alternatives, str) or not all(
            isinstance(text, str) and text.strip() for text in alternatives
        ):
            raise UsageError(
                f"{where}: expected a list of texts that are not blank as alternatives for record "
                f"{record.id!r}, found {item!r}."
            )
        spans.append(
            Span(start=start, end=end, alternatives=alternatives, strength=float(strength))
        )
    return merged(spans)


@dataclass(frozen=True, kw_only=True)
class TextFile:
    """A file that an annotator's setting names.

    Attributes:
      path: where the file is.
      setting: the setting that names the file, for messages.
      text: what is in it.
    """

    path: pathlib.Path
    setting: str
    text: str

    @classmethod
    def read(cls, path: str, *, setting: str) -> "TextFile":
        """Reads the file.

        Raises:
          UsageError: there is none, or it is not UTF-8.
        """
        try:
            # As bytes, or line ends would be translated, and offsets into texts with them.
            text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{setting}: expected a UTF-8 text file, cannot read {path!r}: {error}."
            ) from error
        return cls(path=pathlib.Path(path), setting=setting, text=text)

    @property
    def identity(self) -> str:
        """File name and digest: the same on every machine, different once the content is."""
        return f"{self.path.name}:{hashlib.sha256(self.text.encode()).hexdigest()[:12]}"
