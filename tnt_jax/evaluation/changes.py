"""What a patched model changed in one output: the kind of change, how much, and where to look.

A page shows both texts side by side with the words that differ and the unwanted spans, the worst
change first.
"""

import collections
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
    "white space": "clean before and now, the same words with other spaces or line breaks",
    "mended": "unwanted before, clean now",
    "unchanged": "the same text",
}

# difflib looks at all pairs of equal words again and again, and takes minutes for two outputs that
# repeat a few words hundreds of times. With more pairs than these another method is used.
_MOST_PAIRS = 50_000

# Of a segment; a word can be both.
CHANGED, UNWANTED = 1, 2

Segment = tuple[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One output of both models.

    Attributes:
      kind: One of `KINDS`.
      share: The share of words without a counterpart in the other text, from 0 to 1, over both
        texts.
      signs: What the patched output has and the original one had not: "repeated word", "repeated
        phrase", "unknown token".
      original: The original's output in pieces, each with the sum of its flags `CHANGED` and
        `UNWANTED`.
      current: The patched model's output in pieces, each with the sum of these flags.
      lengths: Number of words of the original's output and of the patched model's.
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
    changed: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    same, num_same = _same(before, after)
    at = 0, 0
    for *places, length in [*same, (len(before), len(after), 0)]:
        for side, (start, end) in enumerate(zip(at, places, strict=True)):
            if start < end:
                extent = words[side][start].start(), words[side][end - 1].end()
                changed[side].append(extent)
        at = places[0] + length, places[1] + length
    if before == after:  # all that may differ is between the words
        changed = _other_spaces(words[0], words[1], (original.targets, current.targets))
    num_words = len(before) + len(after)
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
        share=1 - 2 * num_same / num_words if num_words else 0.0,
        signs=signs,
        original=segments(original.targets, changed[0], original.offsets),
        current=segments(current.targets, changed[1], current.offsets),
        lengths=(len(before), len(after)),
    )


def _same(before: Sequence[str], after: Sequence[str]) -> tuple[list[tuple[int, int, int]], int]:
    """The words that both have in the same order: stretches to show, and how many at most.

    A stretch is (place in one, place in the other, length).
    """
    shorter = min(len(before), len(after))
    start = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    left = shorter - start
    end = next((i for i in range(left) if before[-1 - i] != after[-1 - i]), left)
    one, other = before[start : len(before) - end], after[start : len(after) - end]
    pairs = _longest_common(one, other)
    counts, others = collections.Counter(one), collections.Counter(other)
    if sum(number * others[word] for word, number in counts.items()) > _MOST_PAIRS:
        found = [(i, j, 1) for i, j in pairs]
    else:
        matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
        found = [tuple(block) for block in matcher.get_matching_blocks()[:-1]]
    stretches = [
        (0, 0, start),
        *((start + i, start + j, length) for i, j, length in found),
        (len(before) - end, len(after) - end, end),
    ]
    return stretches, start + len(pairs) + end


def _longest_common(one: Sequence[str], other: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of places of a longest common subsequence, in order.

    Bits of one number stand for the words of `one` (Hyyr\u00f6 2004, "Bit-parallel LCS-length
    computation revisited"): 0 where one word more makes the subsequence longer.
    """
    places: dict[str, int] = collections.defaultdict(int)
    for i, word in enumerate(one):
        places[word] |= 1 << i
    everywhere = (1 << len(one)) - 1
    bits, rows = everywhere, []
    for word in other:
        hits = bits & places[word]
        bits = ((bits + hits) | (bits - hits)) & everywhere
        rows.append(bits)
    found, i, j = [], len(one), len(other)
    while i and j:
        if rows[j - 1] >> (i - 1) & 1:
            i -= 1
            continue
        j -= 1
        if not j or rows[j - 1] >> (i - 1) & 1:
            i -= 1
            found.append((i, j))
    return found[::-1]


def _other_spaces(
    one: Sequence[re.Match[str]], other: Sequence[re.Match[str]], texts: Sequence[str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The white space that differs in two texts of the same words."""
    gaps = []
    for words, text in zip((one, other), texts, strict=True):
        edges = [0, *(edge for word in words for edge in word.span()), len(text)]
        gaps.append(list(zip(edges[::2], edges[1::2], strict=True)))
    pairs = [
        (first, second)
        for first, second in zip(*gaps, strict=True)
        if texts[0][slice(*first)] != texts[1][slice(*second)]
    ]
    return [first for first, _ in pairs], [second for _, second in pairs]


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
    if current.has_unwanted_text and not original.has_unwanted_text:
        return "newly unwanted"
    if signs:
        return "damaged"
    if current.has_unwanted_text:
        return "still unwanted"
    if original.has_unwanted_text:
        return "mended"
    is_same = original.targets.split() == current.targets.split()
    return "white space" if is_same else "other words"
