"""Lines of records to examples as bytes: what `marks` does, many records at a time.

Most records have texts and spans, and a tokeniser whose pieces, one after another, are the text.
Then no token needs an extent of its own: where a piece ends in the text is a running sum, and spans
are looked up in it. All other records go through `marks.example_from_record`, which is also the
definition of what must come out.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnt_jax.data import marks, records
from tnt_jax.data.examples import (
    COLUMNS,
    HAS_SPAN,
    IS_CLEAN,
    KEEPS_LAST_INPUT,
    KEEPS_TEXT,
    LOSS_UNTIL,
    row_digest,
    to_bytes,
)
from tnt_jax.data.layouts import columns_of
from tnt_jax.tokenizers import tokenization

_AT_A_TIME = 512  # records: their texts and tokens stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Rows:
    """Examples as they are stored.

    Attributes:
        contents: the bytes of each example: `to_bytes`, then its id and zeros; long sets of ids are
            named.
        digests: the `row_digest` of each example: `to_bytes` with all marks, without the id.
        id_digests: the `row_digest` of each example's id.
        columns: `[N, C]` int32: `examples.COLUMNS`.
        num_spans_without_token: number of spans that touch no token, over all examples.
        least_id: the least id of all inputs, targets and marks; at most 0.
        largest_id: the largest id of all inputs, targets and marks; at least 0.
        sets: `[K]` int32, the ids of each set that is named.
    """

    contents: list[bytes]
    digests: list[bytes]
    id_digests: list[bytes]
    columns: np.ndarray
    num_spans_without_token: int
    least_id: int
    largest_id: int
    sets: Mapping[int, np.ndarray]


def rows_of(
    lines: Sequence[bytes],
    file: str,
    first_line: int,
    vocabulary: tokenization.Tokeniser,
    target_length: int,
    settings: Mapping[str, Any],
) -> Rows:
    """Tokenises and marks the records of some lines.

    Args:
        lines: lines of a file of records.
        file: the file's path.
        first_line: number of the first line, from 1.
        vocabulary: the tokeniser of inputs and targets.
        target_length: tokens of a target that are trained on.
        settings: the arguments `marks`, `loss_until` and `annotated` of `datasets.RecordFiles`.

    Raises:
        UsageError: a record has a mistake.
    """
    blocks = [
        _Block(lines[start : start + _AT_A_TIME], file, first_line + start)
        .marked(vocabulary, target_length, settings)
        for start in range(0, len(lines), _AT_A_TIME)
    ]  # fmt: skip

    def all_of(name: str) -> list[bytes]:
        return [*itertools.chain.from_iterable(getattr(block, name) for block in blocks)]

    return Rows(
        contents=all_of("contents"),
        digests=all_of("digests"),
        id_digests=all_of("id_digests"),
        columns=np.concatenate([block.columns for block in blocks]),
        num_spans_without_token=sum(block.num_spans_without_token for block in blocks),
        least_id=min(block.least_id for block in blocks),
        largest_id=max(block.largest_id for block in blocks),
        sets={name: ids for block in blocks for name, ids in block.sets.items()},
    )


class _Block:
    """Some lines, and what they hold."""

    def __init__(self, lines: Sequence[bytes], file: str, first_line: int):
        self._file = file
        self._lines = [
            (number, line) for number, line in enumerate(lines, first_line) if line.strip()
        ]

    def marked(
        self, vocabulary: tokenization.Tokeniser, target_length: int, settings: Mapping[str, Any]
    ) -> Rows:
        plain = self._plain(vocabulary, settings)
        count = len(self._lines)
        contents, digests, id_digests = [b""] * count, [b""] * count, [b""] * count
        columns = np.zeros((count, len(COLUMNS)), np.int32)
        found = None
        if plain:
            found = _Plain(plain, vocabulary, target_length, settings["marks"] == "first_token")
            columns[found.places] = found.columns
            for place, content, size, name in found.rows():
                contents[place] = content
                digests[place] = row_digest(content[:size])
                id_digests[place] = row_digest(name)
        num_without = 0 if found is None else found.num_spans_without_token
        ids = [0, *([] if found is None else found.range_of_ids)]
        done = set() if found is None else {*found.places.tolist()}
        others = [place for place in range(count) if place not in done]
        rows = [self._record(place) for place in others]
        sets: dict[int, np.ndarray] = {}
        for place, record in zip(others, rows, strict=True):
            records.check_trainable(record, self._file, settings["annotated"])
            example, number = marks.example_from_record(
                record, vocabulary, settings["marks"], settings["loss_until"]
            )
            num_without += number
            content, name = to_bytes(example), record.id.encode()
            digests[place], id_digests[place] = row_digest(content), row_digest(name)
            if example.sets:
                content = to_bytes(example, names_sets=True)
                sets |= {one.name: one.ids for one in example.sets}
            contents[place] = content + name + bytes(-len(name) % 4)
            columns[place] = columns_of(example, target_length, record.has_unwanted_text)
            every = [example.inputs, example.targets, example.negative_pairs[:, 1]]
            for some in every:
                if len(some):
                    ids += [int(some.min()), int(some.max())]
        return Rows(contents, digests, id_digests, columns, num_without, min(ids), max(ids), sets)

    def _record(self, place: int) -> records.Record:
        number, line = self._lines[place]
        ((_, record),) = records.located([line], self._file, number)
        return record

    def _plain(
        self, vocabulary: tokenization.Tokeniser, settings: Mapping[str, Any]
    ) -> list["_Line"]:
        """The records of which nothing is needed but to look spans up."""
        written = vocabulary.written
        is_known = settings["marks"] in marks.MARKS and settings["loss_until"] in LOSS_UNTIL
        if written is None or not is_known:  # which `marks` refuses
            return []
        found = []
        for place, (number, line) in enumerate(self._lines):
            quick = records.quick(line)
            if quick is None or quick.negative_token_ids or quick.negative_set:
                continue
            if not _are_apart(quick):
                continue
            is_marked = bool(quick.negative_spans)
            if quick.negative_spans is None and settings["annotated"]:
                continue
            if is_marked and settings["loss_until"] != "end":
                continue
            found.append(
                _Line(
                    place,
                    quick,
                    records.default_id(f"{self._file}:{number}") if quick.id is None else quick.id,
                )
            )
        texts = [line.quick.targets for line in found if line.quick.target_ids is None]
        encoded = iter(vocabulary.encode_all([*texts, *(line.quick.inputs for line in found)]))
        for line in found:
            given = line.quick.target_ids
            line.ids = next(encoded) if given is None else _spoken(given, vocabulary)
        for line, inputs in zip(found, encoded, strict=True):
            line.inputs = inputs
        return [line for line in found if line.is_spelt(written, vocabulary)]


@dataclasses.dataclass
class _Line:
    """A record that may be plain.

    Attributes:
        place: the line's number among the lines of its block, from 0.
        quick: the record's fields.
        id: the record's id.
        ids: token ids of the targets, without the end; None where they are not as they should be.
        inputs: token ids of the inputs, without the end.
        shift: 1 where the spelling of `ids` has a space before the text, else 0.
        text: the targets, with one space between two words.
    """

    place: int
    quick: records.Quick
    id: str
    ids: list[int] | None = None
    inputs: Sequence[int] = ()
    shift: int = 0
    text: str = ""

    def is_spelt(self, written: Sequence[str], vocabulary: tokenization.Tokeniser) -> bool:
        """Whether the pieces of the targets, one after another, are the targets."""
        if self.ids is None:
            return False
        self.text = self.quick.targets
        try:
            spelt = "".join(map(written.__getitem__, self.ids))
        except IndexError:
            return False
        if self.quick.target_ids is not None:
            if vocabulary.decode(self.ids) != self.text:
                return False
        elif spelt[1:] != self.text:
            self.text = " ".join(self.text.split())
        self.shift = int(spelt[:1] == " ")
        return spelt[self.shift :] == self.text and self.text[:1] != " "

    def spans(self) -> list[tuple[int, int]]:
        """The spans, in the spelling."""
        given = self.quick.negative_spans or ()
        if self.text is self.quick.targets:
            return [(start + self.shift, end + self.shift) for start, end in given]
        found, whole = [], self.quick.targets
        for start, end in given:
            before = " ".join(whole[:start].split())
            first = len(before) + (bool(before) and whole[start - 1].isspace()) + self.shift
            found.append((first, first + len(" ".join(whole[start:end].split()))))
        return found


def _are_apart(quick: records.Quick) -> bool:
    """Whether there is a text, and every span begins and ends with a word, after the one before."""
    text, last = quick.targets, 0
    for start, end in quick.negative_spans or ():
        if not last <= start < end <= len(text):
            return False
        if text[start].isspace() or text[end - 1].isspace():
            return False
        last = end
    return bool(text)


def _spoken(ids: Sequence[int], vocabulary: tokenization.Tokeniser) -> list[int] | None:
    """Given ids without their end; None where they do not end with one, once."""
    end = tokenization.find_end(ids, vocabulary.end_ids)
    is_ended = end == len(ids) - 1 and ids[end] == vocabulary.end_id
    return [*ids[:end]] if is_ended else None


class _Plain:
    """Plain records, marked together.

    Axes: `N` records, `T` all target tokens, one record after another, `S` all spans.

    Attributes:
        places: `[N]`, the number of each record among the lines of its block, from 0.
        columns: `[N, C]` int32: `examples.COLUMNS`.
        num_spans_without_token: number of spans that touch no token, over all records.
        range_of_ids: the least ids of inputs and of targets, then the largest ids of both.
    """

    def __init__(
        self,
        lines: Sequence[_Line],
        vocabulary: tokenization.Tokeniser,
        target_length: int,
        first_token_alone: bool,
    ):
        self._lines = lines
        self.places = np.array([line.place for line in lines])
        end = [vocabulary.end_id]
        inputs = [[*line.inputs, *end] for line in lines]
        targets = [[*line.ids, *end] for line in lines if line.ids is not None]
        self._inputs, self._num_inputs = _flat(inputs)
        self._targets, self._num_targets = _flat(targets)
        self._first = _starts(self._num_targets)
        self._row = np.repeat(np.arange(len(lines)), self._num_targets)
        self._position = np.arange(len(self._row)) - self._first[self._row]

        # Where the characters of each token begin and end, without the spaces at its ends, if the
        # written of all records stand one after another.
        before, core, after = vocabulary.shapes[self._targets].T
        ends = np.cumsum(before + core + after)
        core_ends = ends - after
        core_starts = core_ends - core
        of_rows = (ends - before - core - after)[self._first]
        spans = [(row, start, end) for row, line in enumerate(lines) for start, end in line.spans()]
        row_of_span, span_starts, span_ends = np.array(spans, np.int64).reshape(-1, 3).T
        first = np.searchsorted(core_ends, span_starts + of_rows[row_of_span], side="right")
        last = np.searchsorted(core_starts, span_ends + of_rows[row_of_span], side="left")
        number = np.maximum(last - first, 0)
        span = np.repeat(np.arange(len(spans)), number)
        token = np.arange(len(span)) - np.repeat(_starts(number) - first, number)
        span, token = span[core[token] > 0], token[core[token] > 0]
        if first_token_alone:
            span, once = np.unique(span, return_index=True)
            token = token[once]
        self.num_spans_without_token = len(spans) - len(np.unique(span))
        self._marked = np.unique(token)
        self.columns = self._columns(target_length, core > 0, row_of_span, span, token)
        every = (self._inputs, self._targets)
        self.range_of_ids = [int(f(ids)) for f in (np.min, np.max) for ids in every]

    def _columns(
        self,
        target_length: int,
        has_text: np.ndarray,
        row_of_span: np.ndarray,
        span: np.ndarray,
        token: np.ndarray,
    ) -> np.ndarray:
        """The columns; `span` and `token` say which tokens each span marks."""
        count = len(self._lines)

        def per_row(rows: np.ndarray) -> np.ndarray:
            return np.bincount(rows, minlength=count)

        is_within = self._position < target_length
        marked_row, is_marked_within = self._row[self._marked], is_within[self._marked]
        num_marks = per_row(marked_row)
        # A token that several spans mark is the first one's.
        of_token = np.full(len(self._row), -1)
        of_token[token[::-1]] = span[::-1]
        is_left, is_cut = np.zeros((2, len(row_of_span)), bool)
        is_left[of_token[self._marked[is_marked_within]]] = True
        is_cut[of_token[self._marked[~is_marked_within]]] = True

        has_spans = per_row(row_of_span) > 0
        is_end = self._position == self._num_targets[self._row] - 1
        is_kept = np.where(has_spans[self._row], has_text & (of_token < 0), ~is_end) & is_within
        flags = IS_CLEAN * ~has_spans + KEEPS_TEXT * (per_row(self._row[is_kept]) > 0)
        flags += HAS_SPAN * (per_row(marked_row[is_marked_within]) > 0)
        self._num_marks = num_marks
        columns = {
            "num_inputs": self._num_inputs,
            "num_targets": self._num_targets,
            "num_marks": num_marks,
            "most_marks": num_marks > 0,
            "num_graded": np.zeros(count),
            "lost_marks": per_row(marked_row[~is_marked_within]),
            "lost_spans": per_row(row_of_span[is_cut & ~is_left]),
            "flags": flags,
            "most_written": num_marks > 0,
        }
        return np.stack([columns[name] for name in COLUMNS], axis=1).astype(np.int32)

    def rows(self) -> Iterator[tuple[int, bytes, int, bytes]]:
        """Yields of each its place, its bytes, how many of them `to_bytes` makes, and its id."""
        num_inputs, num_targets, num_marks = self._num_inputs, self._num_targets, self._num_marks
        sizes = 4 + num_inputs + num_targets + 2 * num_marks
        first = _starts(sizes)
        words = np.empty(int(sizes.sum()), "<i4")
        head = np.stack([num_inputs, num_targets, num_marks, np.full_like(sizes, KEEPS_LAST_INPUT)])
        for number, of_rows in enumerate(head):
            words[first + number] = of_rows

        def put(values: np.ndarray, counts: np.ndarray, where: np.ndarray) -> None:
            words[np.arange(len(values)) + np.repeat(where - _starts(counts), counts)] = values

        put(self._inputs, num_inputs, first + 4)
        put(self._targets, num_targets, first + 4 + num_inputs)
        pairs = np.stack([self._position[self._marked], self._targets[self._marked]], axis=1)
        put(pairs.reshape(-1), 2 * num_marks, first + 4 + num_inputs + num_targets)
        content = words.tobytes()
        for line, start, size in zip(
            self._lines, (4 * first).tolist(), (4 * sizes).tolist(), strict=True
        ):
            name = line.id.encode()
            row = content[start : start + size] + name + bytes(-len(name) % 4)
            yield line.place, row, size, name


def _flat(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all lists, one list after another, and how many each has."""
    lengths = np.array([len(numbers) for numbers in lists])
    return np.array([*itertools.chain.from_iterable(lists)], np.int32), lengths


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where each of several stretches begins that stand one after another."""
    return np.cumsum(lengths) - lengths
