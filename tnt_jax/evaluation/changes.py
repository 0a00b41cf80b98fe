"""What a patched model changed in one output: the kind of change, how much, and where to look.

A page shows both texts side by side with the words that differ and the unwanted spans, the worst
change first.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Sequence

from tnt_jax.data import records
from tnt_jax.evaluation import text_metrics

# The kinds of change, the worst first, with what each one is.
KINDS = {
    "newly unwanted": "clean before, unwanted now",
    "damaged": "a repeated word or phrase or an unknown token that was not there before",
    "still unwanted": "unwanted before and now",
    "other words": "clean before and now, in other words",
    "mended": "unwanted before, clean now",
    "unchanged": "the same text",
}

# Of a segment; a word can be both.
CHANGED, UNWANTED = 1, 2

Segment = tuple[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One output of both models.

    Attributes:
      kind: One of `KINDS`.
      share: Of the words of both texts that have no counterpart in the other one, from 0 to 1.
      signs: What the patched output has and the original one had not: "repeated word", "repeated
        phrase", "unknown token".
      original: The original's output in pieces, each with `CHANGED` and `UNWANTED` added up.
      current: Likewise the patched model's.
      lengths: Words of both.
    """

    kind: str
    share: float
    signs: tuple[str, ...]
    original: tuple[Segment, ...]
    current: tuple[Segment, ...]
    lengths: tuple[int, int]


def change(original: records.Record, current: records.Record) -> Change:
    """Compares the annotated outputs of both models for the same input."""
    words = [list(re.finditer(r"\S+", row.targets)) for row in (original, current)]
    before, after = ([word.group() for word in of_text] for of_text in words)
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changed: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    for operation, *bounds in matcher.get_opcodes():
        if operation != "equal":
            for side, (start, end) in enumerate((bounds[:2], bounds[2:])):
                if start < end:
                    extent = words[side][start].start(), words[side][end - 1].end()
                    changed[side].append(extent)
    signs = tuple(
        name
        for name, has in (
            ("repeated word", text_metrics.has_repeated_word),
            ("repeated phrase", text_metrics.has_repeated_phrase),
            ("unknown token", text_metrics.has_unknown_token),
        )
        if has(current.targets) and not has(original.targets)
    )
    return Change(
        kind=_kind(original, current, signs),
        share=1 - matcher.ratio(),
        signs=signs,
        original=segments(original.targets, changed[0], original.offsets),
        current=segments(current.targets, changed[1], current.offsets),
        lengths=(len(before), len(after)),
    )


def worst_first(changes: Sequence[Change]) -> list[int]:
    """Places in `changes`: by kind, as in `KINDS`, and within one by how much changed."""
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted(range(len(changes)), key=lambda i: (order[changes[i].kind], -changes[i].share, i))


def segments(
    text: str, changed: Iterable[tuple[int, int]], unwanted: Iterable[tuple[int, int]]
) -> tuple[Segment, ...]:
    """Cuts a text where a mark begins or ends; joined, the pieces are the text.

    Args:
      text: Any.
      changed: (start, end) of what differs, in code points; may overlap with the next.
      unwanted: (start, end) of what must not be said.
    """
    marks = [0] * len(text)
    for spans, mark in ((changed, CHANGED), (unwanted, UNWANTED)):
        for start, end in spans:
            for place in range(start, end):
                marks[place] |= mark
    cuts = [i for i in range(len(text)) if i == 0 or marks[i] != marks[i - 1]]
    return tuple(
        (text[start:end], marks[start]) for start, end in itertools.pairwise([*cuts, len(text)])
    )


def _kind(original: records.Record, current: records.Record, signs: Sequence[str]) -> str:
    if original.targets == current.targets:
        return "unchanged"
    if current.negative_spans and not original.negative_spans:
        return "newly unwanted"
    if signs:
        return "damaged"
    if current.negative_spans:
        return "still unwanted"
    return "mended" if original.negative_spans else "other words"
