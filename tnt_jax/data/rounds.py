"""Rounds: what was unwanted where in earlier outputs stays unwanted there in later ones.

A model that was patched once says other things, some of which are unwanted too. A further round
generates with it, annotates, and trains on all outputs so far, always against the first original.
Its desired distribution depends on the input and on the tokens before, so marks are brought
together by these: the order in which they were found makes no difference.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.data import marks, negative_sets, records, removed_everywhere

_Ids = tuple[int, ...]
_Named = tuple[str, float]  # the name of a long set of ids, and the strength that all of them have


class Removed(NamedTuple):
    """What is removed at a position.

    Attributes:
      ids: The strengths of the ids of spans and of short lists.
      sets: The long sets, in the order of their names and strengths.
    """

    ids: Mapping[int, float]
    sets: tuple[_Named, ...] = ()


class Sets:
    """Long sets of ids, each once, however many marks have it; and what they come to together."""

    _MOST_WRITTEN_OUT = 64  # combinations of sets whose ids and strengths are kept

    def __init__(self):
        self._names: dict[int, tuple[_Ids, str]] = {}  # by identity, which the tuple here secures
        self._ids: dict[str, _Ids] = {}
        self._entries: dict[Any, tuple[tuple[Any, ...], ...]] = {}
        self._of_sets = functools.lru_cache(self._MOST_WRITTEN_OUT)(self._write_out)

    def name_of(self, ids: _Ids) -> str:
        """The name of a set, which is kept."""
        known = self._names.get(id(ids))
        if known is None:
            known = self._names[id(ids)] = ids, negative_sets.name_of(ids)
            self._ids.setdefault(known[1], ids)
        return known[1]

    def strengths(self, sets: tuple[_Named, ...]) -> Mapping[int, float]:
        """The largest strength of each id of some sets."""
        return self._of_sets(sets)

    def _write_out(self, sets: tuple[_Named, ...]) -> dict[int, float]:
        found: dict[int, float] = {}
        for name, strength in sets:
            found |= {i: max(strength, found.get(i, strength)) for i in self._ids[name]}
        return found

    def entries(self, position: int, removed: Removed) -> tuple[records.TokenIds, ...]:
        """The entries for `Record.negative_token_ids` at a position.

        Args:
          position: The position.
          removed: What is removed there; the strengths of its `ids` replace those of its sets.
        """
        if not removed.sets:
            return marks.token_id_entries({position: removed.ids})
        key = removed.sets, frozenset(removed.ids.items())
        if key not in self._entries:
            together = {**self.strengths(removed.sets), **removed.ids}
            self._entries[key] = tuple(
                (self._shared(ids), *strength)
                for _, ids, *strength in marks.token_id_entries({0: together})
            )
        return tuple((position, *entry) for entry in self._entries[key])

    def _shared(self, ids: _Ids) -> _Ids:
        if len(ids) < negative_sets.LEAST:
            return ids
        return self._ids.setdefault(negative_sets.name_of(ids), ids)


class Ledger:
    """What to remove for each pair of a prompt (`Record.prompt`) and a prefix of the targets.

    Of the strengths that outputs give an id, the largest counts. Long sets are kept by their names.
    """

    def __init__(self):
        self._ids: dict[bytes, dict[int, float]] = {}
        self._sets: dict[bytes, tuple[_Named, ...]] = {}

    def add(
        self,
        prompt: str,
        marked: marks.MarkedTarget,
        sets: Sequence[tuple[int, _Named]] = (),
    ) -> None:
        """Enters the marks of one output.

        Args:
          prompt: What the output replies to.
          marked: The output, with all marks that are of no long set.
          sets: Its long sets, each with its position.
        """
        if not len(marked.negative_pairs) and not sets:
            return
        prefixes = list(_prefixes(prompt, marked.target_ids))
        for (position, removed_id), strength in strengths_of(marked).items():
            ids = self._ids.setdefault(prefixes[position], {})
            ids[removed_id] = max(strength, ids.get(removed_id, strength))
        for position, named in sets:
            known = self._sets.get(prefixes[position], ())
            self._sets[prefixes[position]] = tuple(sorted({*known, named}))

    def removed(self, prompt: str, target_ids: np.ndarray) -> dict[int, Removed]:
        """What all outputs so far say of the positions of one."""
        found = (
            (position, Removed(self._ids.get(prefix, {}), self._sets.get(prefix, ())))
            for position, prefix in enumerate(_prefixes(prompt, target_ids))
        )
        return {position: removed for position, removed in found if any(removed)}


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
    ledger, first_tokens, sets = Ledger(), Ledger(), Sets()
    seen: set[tuple[str, bytes]] = set()
    names: set[str] = set()
    kept: list[tuple[records.Record, np.ndarray]] = []
    for number, rows in enumerate(rounds, start=1):
        for row in rows:
            target_ids = _enter(row, ledger, first_tokens, sets, vocabulary)
            output = row.prompt, target_ids.tobytes()
            has_marks = bool(row.negative_spans or row.negative_token_ids)
            is_kept = number == 1 or keep_clean or has_marks
            if is_kept and output not in seen:
                seen.add(output)
                name = next(name for name in _names(row.id, number) if name not in names)
                names.add(name)
                kept.append((dataclasses.replace(row, id=name), target_ids))
    return [
        dataclasses.replace(
            row,
            negative_token_ids=_entries(row, target_ids, ledger, first_tokens, sets, vocabulary),
        )
        for row, target_ids in kept
    ]


def _enter(
    row: records.Record, ledger: Ledger, first_tokens: Ledger, sets: Sets, vocabulary: Any
) -> np.ndarray:
    """Enters an output into both ledgers, which `_entries` describes; returns its target ids."""
    long = [entry for entry in row.negative_token_ids if len(entry[1]) >= negative_sets.LEAST]
    short = row
    if long:  # which are not written out
        rest = tuple(e for e in row.negative_token_ids if len(e[1]) < negative_sets.LEAST)
        short = dataclasses.replace(row, negative_token_ids=rest)
    marked = marks.mark_tokens(short, vocabulary)
    for entry in long:
        marks.check_entry(entry, row, vocabulary, len(marked.target_ids))
    named = [(entry[0], (sets.name_of(entry[1]), records.strength_of(entry))) for entry in long]
    ledger.add(row.prompt, marked, named)
    if row.negative_spans:
        first_tokens.add(row.prompt, marks.mark_tokens(short, vocabulary, "first_token"))
    else:
        first_tokens.add(row.prompt, marked)
    return marked.target_ids


def _entries(
    row: records.Record,
    target_ids: np.ndarray,
    ledger: Ledger,
    first_tokens: Ledger,
    sets: Sets,
    vocabulary: Any,
) -> tuple[records.TokenIds, ...]:
    """What to remove from an output, as entries for `Record.negative_token_ids`.

    Without what the spans say anyway and a setting may not want: tokens after a span's first.

    Args:
      row: The output.
      target_ids: Its ids.
      ledger: What any output removes.
      first_tokens: The part of `ledger` that an output has as the first token of a span, or removes
        by its id; without the long sets, which are all removed by their ids.
      sets: The long sets of `ledger`.
      vocabulary: The tokeniser of its ids.
    """
    whole: Mapping[tuple[int, int], float] = {}
    if row.negative_spans:
        spans = dataclasses.replace(row, negative_token_ids=())
        whole = strengths_of(marks.mark_tokens(spans, vocabulary))
    first = first_tokens.removed(row.prompt, target_ids)
    found: list[records.TokenIds] = []
    for position, removed in ledger.removed(row.prompt, target_ids).items():
        of_sets = sets.strengths(removed.sets)
        kept = first.get(position, Removed({})).ids
        # Of what a set removes, only what is to be removed more strongly.
        left = {
            i: strength
            for i, strength in removed.ids.items()
            if (
                strength > of_sets[i]
                if i in of_sets
                else i in kept or strength > whole.get((position, i), 0.0)
            )
        }
        found += sets.entries(position, removed._replace(ids=left))
    return tuple(found)


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
