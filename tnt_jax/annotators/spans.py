"""Marks what people have marked in a file."""

import ast
import csv
import io
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tnt_jax.annotators.interface import Annotation, TextFile, checked_spans
from tnt_jax.data import records
from tnt_jax.data.records import OF_PEOPLE, Record
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_Offsets = tuple[records.Span, ...]
_MATCHES = ("id", "text")
_UNMATCHED = ("error", "leave_out")


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """One line of a file of marks."""

    where: str
    id: str | None
    inputs: str | None
    targets: str | None
    offsets: _Offsets


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Marks what people marked.

    The file is one of two, told apart by its name:

        .csv     columns `text` (the targets) and `spans` (a list of the offsets of all unwanted
                 characters, such as "[8, 9, 10]"; neighbours make one span), as in the SemEval-2021
                 task on toxic spans
        others   JSONL: `negative_spans`, with `id` or `targets` to say whose they are; records that
                 someone marked by hand are such a file. A span may have a strength, such as the
                 share of people who marked it: [8, 11, 0.67]. Where `negative_spans` is null nobody
                 looked: the line marks nothing

    Attributes:
      path: the file.
      match: "id", or "text": the same targets and, where the file has any, inputs. None takes the
        id where every line has one.
      unmatched: what happens to a record that nobody marked: "error", or "leave_out" of the
        output. (Marked and found clean is an empty list in the file; null is not marked.)

    Raises:
      UsageError: the file is missing or malformed, or two of its lines mark one record differently.
    """

    path: str
    match: str | None = None
    unmatched: str = "error"

    def __post_init__(self):
        for name, value, known in (
            ("match", self.match, (None, *_MATCHES)),
            ("unmatched", self.unmatched, _UNMATCHED),
        ):
            if value not in known:
                raise UsageError(f"Spans.{name}: expected one of {known}, found {value!r}.")
        _ = self._mark_of  # a bad file is reported now, not at the first record

    @cached_property
    def _file(self) -> TextFile:
        return TextFile.read(self.path, setting="Spans.path")

    @cached_property
    def _marks(self) -> list[_Mark]:
        read = _read_csv if self.path.lower().endswith(".csv") else _read_jsonl
        marks = list(read(self._file))
        if not marks:
            raise UsageError(f"Spans.path: {self.path} has no marks, not even of a clean record.")
        return marks

    @cached_property
    def _match(self) -> str:
        has_ids = all(mark.id is not None for mark in self._marks)
        match = self.match or ("id" if has_ids else "text")
        for mark in self._marks:
            if (mark.id if match == "id" else mark.targets) is None:
                field = "id" if match == "id" else "targets"
                raise UsageError(
                    f"{mark.where}: expected a field {field!r} to match records by {match}, found "
                    "none. Set Spans.match to the other one, or complete the file."
                )
        return match

    @cached_property
    def _mark_of(self) -> dict[Hashable, _Mark]:
        marks: dict[Hashable, _Mark] = {}
        for mark in self._marks:
            key = mark.id if self._match == "id" else (mark.inputs, mark.targets)
            first = marks.setdefault(key, mark)
            if first.offsets != mark.offsets:
                raise UsageError(
                    f"{mark.where}: marks {list(map(list, mark.offsets))}, but {first.where} marks "
                    f"{list(map(list, first.offsets))} in the same record. Decide for one."
                )
        return marks

    @cached_property
    def description(self) -> str:
        """Name, file with digest, and settings."""
        settings = f"{self._file.identity}, match={self._match}, unmatched={self.unmatched}"
        return f"{OF_PEOPLE}({settings})"

    def annotate(self, record: Record) -> Annotation | None:
        """The record's marks; None where nobody marked it, if that is to be left out."""
        by_text = ((record.inputs, record.targets), (None, record.targets))
        keys = (record.id,) if self._match == "id" else by_text
        mark = next((self._mark_of[key] for key in keys if key in self._mark_of), None)
        if mark is None:
            if self.unmatched == "leave_out":
                return None
            raise UsageError(
                f"record {record.id!r}: expected its {self._match} among the "
                f"{len(self._mark_of)} that {self.path} marks, found it not there. Mark it (an "
                "empty list where it is clean; null says that nobody looked), or set "
                'Spans.unmatched to "leave_out".'
            )
        for field in ("inputs", "targets"):
            given = getattr(mark, field)
            if given is not None and given != getattr(record, field):
                raise UsageError(
                    f"record {record.id!r}: {mark.where} marks another text under this id: its "
                    f"{field} are {given[:60]!r}, those of the record "
                    f"{getattr(record, field)[:60]!r}."
                )
        return Annotation(
            spans=checked_spans(mark.offsets, record, f"{mark.where}: negative_spans")
        )

    def everywhere(self) -> None:
        """Nothing: people marked places."""


# -----------------------------------------------------------------------------
# Reading
# -----------------------------------------------------------------------------


def _read_jsonl(file: TextFile) -> Iterator[_Mark]:
    for number, line in enumerate(io.StringIO(file.text), start=1):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        fields = files.parse_line(line.encode(), where)
        if not isinstance(fields, dict) or "negative_spans" not in fields:
            raise UsageError(
                f"{where}: expected an object with negative_spans, and id or targets, found "
                f"{line.strip()[:60]}. (A record that is clean has an empty list.)"
            )
        if fields.get("id") is None and fields.get("targets") is None:
            raise UsageError(f"{where}: expected id or targets, to say whose marks these are.")
        known = records.known_fields(fields, where)
        # Null: labelling tools and tables write it where nobody has looked.
        if "negative_spans" in known:
            yield _Mark(
                where=where,
                id=known.get("id"),
                inputs=known.get("inputs"),
                targets=known.get("targets"),
                offsets=tuple(span.entry for span in known["negative_spans"]),
            )


def _read_csv(file: TextFile) -> Iterator[_Mark]:
    rows = csv.DictReader(io.StringIO(file.text, newline=""), strict=True)
    try:
        columns = rows.fieldnames or ()
    except csv.Error as error:
        raise UsageError(f"{file.path}:1: not CSV: {error}.") from error
    if not {"text", "spans"} <= set(columns):
        raise UsageError(
            f"Spans.path: {file.path}: expected columns text and spans, found {columns}."
        )
    for row in _whole_rows(rows, file):
        where = f"{file.path}:{rows.line_num}"
        text = row["text"] or ""
        yield _Mark(
            where=where,
            id=None,
            inputs=None,
            targets=text,
            offsets=runs(row["spans"] or "", len(text), where),
        )


def _whole_rows(rows: csv.DictReader, file: TextFile) -> Iterator[dict[str, str | None]]:
    try:
        yield from rows
    except csv.Error as error:
        raise UsageError(f"{file.path}:{rows.line_num}: not CSV: {error}.") from error


def runs(cell: str, length: int, where: str) -> _Offsets:
    """Offsets of characters as stretches: "[3, 4, 7]" is (3, 5), (7, 8)."""
    try:
        offsets = ast.literal_eval(cell)  # which reads literals and runs nothing
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        offsets = None
    if not isinstance(offsets, list) or not all(
        type(i) is int and 0 <= i < length for i in offsets
    ):
        raise UsageError(
            f"{where}: spans: expected a list of character offsets from 0 to {length - 1} such as "
            f"[8, 9, 10], found {cell[:60]!r}."
        )
    edges: list[list[int]] = []
    for offset in sorted(set(offsets)):
        if edges and edges[-1][1] == offset:
            edges[-1][1] = offset + 1
        else:
            edges.append([offset, offset + 1])
    return tuple((start, end) for start, end in edges)
