"""Rounds: what was unwanted where in earlier outputs stays unwanted there in later ones.

A model that was patched once says other things, some of which are unwanted too. A further round
generates with it, annotates, and trains on all outputs so far, always against the first original.
Its desired distribution depends on the input and on the tokens before, so marks are brought
together by these: the order in which they were found makes no difference.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tnt_jax.data import marks, records, removed_everywhere


class Ledger:
    """The ids to remove for each pair of a prompt (`Record.prompt`) and a prefix of the targets.

    Of the strengths that outputs give an id, the largest is kept.
    """

    def __init__(self):
        self._ids: dict[bytes, dict[int, float]] = {}

    def add(self, prompt: str, marked: marks.MarkedTarget) -> None:
        """Enters the marks of one output."""
        if not len(marked.negative_pairs):
            return
        prefixes = list(_prefixes(prompt, marked.target_ids))
        for (position, removed_id), strength in strengths_of(marked).items():
            ids = self._ids.setdefault(prefixes[position], {})
            ids[removed_id] = max(strength, ids.get(removed_id, strength))

    def removed(self, prompt: str, target_ids: np.ndarray) -> dict[int, dict[int, float]]:
        """What all outputs so far say of the positions of one: by position, ids and strengths."""
        found = (
            (position, self._ids.get(prefix))
            for position, prefix in enumerate(_prefixes(prompt, target_ids))
        )
        return {position: ids for position, ids in found if ids}


def strengths_of(marked: marks.MarkedTarget) -> dict[tuple[int, int], float]:
    """The strength of each (position, id)."""
    pairs = [(position, removed_id) for position, removed_id in marked.negative_pairs.tolist()]
    if marked.negative_strengths is None:
        return dict.fromkeys(pairs, 1.0)
    return dict(zip(pairs, marked.negative_strengths.tolist(), strict=True))


def _prefixes(prompt: str, target_ids: np.ndarray) -> Iterator[bytes]:
    """A digest of the input and the tokens before each position."""
    state = hashlib.blake2b(prompt.encode(), digest_size=16)
    state.update(b"\0")
    for token in target_ids.tolist():
        yield state.digest()
        state.update(int(token).to_bytes(4, "little"))


def merge(
    rounds: Sequence[Sequence[records.Record]], vocabulary: Any, *, keep_clean: bool = True
) -> list[records.Record]:
    """All outputs of several rounds, each with the marks that any of them has at its prefixes.

    An output that came up in several rounds is kept once. A record of a later round has the number
    of the round after its id, for a prompt has an output in each; where that is taken, because a
    round was itself brought together from several, a count follows.

    Args:
      rounds: Annotated records of every round, the first original's first.
      vocabulary: The tokeniser of its ids.
      keep_clean: Whether to keep outputs of later rounds that have no mark. Nothing is marked in
        them, also where the original would go on with what is unwanted and the model of that round
        does not: there they teach it again.

    Raises:
      UsageError: A mark does not fit its targets.
    """
    ledger, first_tokens = Ledger(), Ledger()
    seen: set[tuple[str, bytes]] = set()
    names: set[str] = set()
    kept: list[tuple[records.Record, marks.MarkedTarget]] = []
    for number, rows in enumerate(rounds, start=1):
        for row in rows:
            marked = marks.mark_tokens(row, vocabulary)
            ledger.add(row.prompt, marked)
            first_tokens.add(
                row.prompt,
                marks.mark_tokens(row, vocabulary, "first_token") if row.negative_spans else marked,
            )
            output = row.prompt, marked.target_ids.tobytes()
            has_marks = bool(row.negative_spans or row.negative_token_ids)
            is_kept = number == 1 or keep_clean or has_marks
            if is_kept and output not in seen:
                seen.add(output)
                name = next(name for name in _names(row.id, number) if name not in names)
                names.add(name)
                kept.append((dataclasses.replace(row, id=name), marked))
    return [
        dataclasses.replace(
            row,
            negative_token_ids=_without_rest_of_spans(
                row, marked, ledger, first_tokens, vocabulary
            ),
        )
        for row, marked in kept
    ]


def _without_rest_of_spans(
    row: records.Record,
    marked: marks.MarkedTarget,
    ledger: Ledger,
    first_tokens: Ledger,
    vocabulary: Any,
) -> tuple[records.TokenIds, ...]:
    """Without what the spans say anyway and a setting may not want: tokens after a span's first.

    Args:
      row: An output.
      marked: The same output, tokenised and marked.
      ledger: What any output removes.
      first_tokens: The part of `ledger` that an output has as the first token of a span, or removes
        by its id.
      vocabulary: The tokeniser of its ids.
    """
    removed = ledger.removed(row.prompt, marked.target_ids)
    if not row.negative_spans:
        return marks.token_id_entries(removed)
    first = first_tokens.removed(row.prompt, marked.target_ids)
    spans = dataclasses.replace(row, negative_token_ids=())
    whole = strengths_of(marks.mark_tokens(spans, vocabulary))
    left = {
        position: {
            i: strength
            for i, strength in ids.items()
            if strength > whole.get((position, i), 0.0) or i in first.get(position, ())
        }
        for position, ids in removed.items()
    }
    return marks.token_id_entries(left)


def _names(id: str, number: int) -> Iterator[str]:
    """Possible ids of an output in a round, the preferred one first."""
    if number == 1:
        yield id
    yield f"{id} (round {number})"
    yield from (f"{id} (round {number}, {count})" for count in itertools.count(2))


def merge_files(
    *, output: str, rounds: Sequence[str], vocabulary: Any, keep_clean: bool = True
) -> None:
    """`merge` for files of records, and for the ids that belong to them (`removed_everywhere`)."""
    ids = {id_ for path in rounds for id_ in removed_everywhere.of_records(path)}
    everywhere = removed_everywhere.Ids(ids, {"rounds": list(rounds)}) if ids else None
    merged = merge(
        [records.read_records(path) for path in rounds], vocabulary, keep_clean=keep_clean
    )
    removed_everywhere.write_records(output, merged, everywhere)
