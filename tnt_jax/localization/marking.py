"""Marks of the tokens at which an output went wrong."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnt_jax.data import marks, records
from tnt_jax.localization import prefix_values

_LEAST_STRENGTH = 0.01  # of a mark whose tokens have less blame, or none: it stays a mark


def mark(
    row: records.Record,
    is_negative: np.ndarray,
    vocabulary: Any,
    blame: np.ndarray | None = None,
    *,
    is_sure: bool = True,
) -> records.Record:
    """The record with these tokens marked, its earlier marks replaced.

    A token that stands for no text, such as the lone space before a word, is removed by its id; the
    span that people see is of what it begins.

    Args:
      row: A record with an output.
      is_negative: Whether each of its first tokens is negative; `Threshold.negative` makes it of
        `values`.
      vocabulary: The tokeniser.
      blame: The blame of each of these tokens (`prefix_values.blame`), for the strengths of marks.
      is_sure: Without blame, whether marks have the strength 1; False gives them the least.
    """

    def strength(positions: list[int]) -> float:
        if blame is None:
            return 1.0 if is_sure else _LEAST_STRENGTH
        return prefix_values.short(np.clip(blame[positions].sum(), _LEAST_STRENGTH, 1.0))

    ids, extents = marks.ids_and_extents(row, vocabulary)
    spans: list[tuple[int, int, list[int]]] = []  # the last are the tokens that are blamed for it
    without_text: list[int] = []
    for position in np.flatnonzero(is_negative).tolist():
        start, end = extents[position]
        if start == end:
            without_text.append(position)
            start, end = next((e for e in extents[position:] if e[0] < e[1]), (start, end))
        if start == end:
            continue
        if spans and start <= spans[-1][1]:  # pieces of one word
            first, last, positions = spans[-1]
            spans[-1] = (first, max(end, last), [*positions, position])
        else:
            spans.append((start, end, [position]))
    return dataclasses.replace(
        row,
        negative_spans=tuple(
            records.with_strength(start, end, strength(positions))
            for start, end, positions in spans
        ),
        negative_token_ids=tuple(
            records.with_strength(position, (ids[position],), strength([position]))
            for position in without_text
        ),
    )


def agreement(
    given: Sequence[records.Record], marked: Sequence[records.Record], vocabulary: Any
) -> dict[str, Any]:
    """What the spans found mark, against what the spans given mark, in bad outputs."""

    def of(row: records.Record) -> np.ndarray:
        spans_alone = dataclasses.replace(row, negative_token_ids=())
        marked = marks.mark_tokens(spans_alone, vocabulary)
        return np.isin(np.arange(len(marked.target_ids)), marked.negative_pairs[:, 0])

    bad = [
        (of(after), of(before))
        for before, after in zip(given, marked, strict=True)
        if before.has_unwanted_text
    ]
    return prefix_values.agreement(*zip(*bad, strict=True))._asdict()
