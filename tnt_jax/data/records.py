"""The record: an input, what the original model said to it, and what is unwanted there.

Programs exchange records as JSONL, one object a line (`tnt_jax.data.tfrecords`: the same as
TFRecord):

    {"id": "...", "inputs": "text", "targets": "text the original model produced",
     "target_ids": [...],                       exact generated ids, EOS included
     "negative_spans": [[start, end], ...],     code point offsets into targets, end exclusive
     "negative_token_ids": [[position, [ids]]], further ids removed at a position of target_ids
     "annotator": "name and settings"}

Only `inputs` is required, so a file of prompts is a file of records. Unknown fields are kept. Files
are local, or in a bucket (`gs://`): whatever `etils.epath` opens.
"""

import contextlib
import dataclasses
import glob
import json
import math
import os
import pathlib
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from tnt_jax.runtime.errors import UsageError, naming_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One example, before tokenisation.

    Attributes:
        id: names the example; unique within a data set.
        inputs: text for the encoder.
        targets: text that the original model produced; empty in a prompt.
        target_ids: the exact generated ids, EOS included. Kept because re-tokenising a sampled text
            can give other ids. None when only the text is known.
        negative_spans: unwanted stretches of `targets`, as (start, end) in Unicode code points, end
            exclusive. None means not annotated yet, () means nothing is unwanted.
        negative_token_ids: (position, ids) pairs: ids to remove at a token position, beside those
            that follow from the spans. Alternatives that would be just as wrong, or earlier marks.
        annotator: who or what made the annotation.
        extra: fields that are not ours, kept from file to file.

    Raises:
        UsageError: a span or a position lies outside the targets.
    """

    id: str
    inputs: str
    targets: str = ""
    target_ids: tuple[int, ...] | None = None
    negative_spans: tuple[tuple[int, int], ...] | None = None
    negative_token_ids: tuple[tuple[int, tuple[int, ...]], ...] = ()
    annotator: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for start, end in self.negative_spans or ():
            if not 0 <= start < end <= len(self.targets):
                raise UsageError(
                    f"record {self.id!r}: negative_spans has [{start}, {end}], but targets has "
                    f"{len(self.targets)} characters.{counted_otherwise(self.targets, start, end)} "
                    "A span is [start, end] with 0 <= start < end <= length, counted in Unicode "
                    "code points (not bytes), end exclusive."
                )
        for position, _ in self.negative_token_ids:
            # Without target_ids the length is known, and checked, only after tokenisation.
            if position < 0 or (self.target_ids is not None and position >= len(self.target_ids)):
                raise UsageError(
                    f"record {self.id!r}: negative_token_ids has position {position}; expected a "
                    "position in target_ids, counted from 0."
                )

    @classmethod
    def from_json(cls, fields: Any, where: str) -> "Record":
        """Builds a record from a parsed JSON object.

        Args:
            fields: what was parsed; anything but an object (a mapping) is the user's mistake.
            where: its place as `file:line`, for messages; the id of an object that has none is made
                from it.

        Raises:
            UsageError: a field is missing, of the wrong type or out of range.
        """
        if not isinstance(fields, Mapping):
            raise UsageError(f"{where}: expected a JSON object, found {_shown(fields)}.")
        if fields.get("inputs") is None:
            found = [name for name, value in fields.items() if value is not None]
            raise UsageError(f"{where}: the field 'inputs' is missing; found {sorted(found)[:20]}.")
        known = known_fields(fields, where)
        path, _, line = where.rpartition(":")
        known.setdefault("id", f"{pathlib.PurePath(path).stem}:{line}")
        extra = {name: value for name, value in fields.items() if name not in _FIELDS}
        try:
            return cls(**known, extra=extra)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`; optional fields that hold nothing are left out."""
        fields: dict[str, Any] = {"id": self.id, "inputs": self.inputs, "targets": self.targets}
        if self.target_ids is not None:
            fields["target_ids"] = [int(i) for i in self.target_ids]
        if self.negative_spans is not None:
            fields["negative_spans"] = [[int(s), int(e)] for s, e in self.negative_spans]
        if self.negative_token_ids:
            fields["negative_token_ids"] = [
                [int(position), [int(i) for i in ids]] for position, ids in self.negative_token_ids
            ]
        if self.annotator:
            fields["annotator"] = self.annotator
        return {**fields, **self.extra}

    def to_line(self) -> str:
        """The line of JSONL.

        Raises:
            UsageError: a field that is not ours holds a number that is not finite.
        """
        return self.as_text(self.to_json()) + "\n"

    def as_text(self, fields: Mapping[str, Any]) -> str:
        """Some of its fields as JSON; raises as `to_line`."""
        try:
            return json.dumps(fields, ensure_ascii=False, allow_nan=False)
        except ValueError:
            name, number = _not_finite(fields)
            if number is None:
                raise
            raise UsageError(
                f"record {self.id!r}: {name}: expected finite numbers, found {number}, which JSON "
                "does not have. Give None, or leave the field out."
            ) from None


def read_records(path: str | os.PathLike) -> list[Record]:
    """Reads a JSONL file, or every file that a glob pattern names, in sorted order.

    A record without an id gets `file-stem:line`. Empty lines are skipped.

    Raises:
        UsageError: no file, no record, a bad line (named as `file:line`), or an id used twice.
    """
    return data_set(_of_files(path), path)


def iterate(path: str | os.PathLike) -> Iterator[Record]:
    """Reads as `read_records`, one by one, without a look at ids.

    Raises:
        UsageError: no file, or a bad line.
    """
    return (record for _, record in _of_files(path))


def _of_files(path: str | os.PathLike) -> Iterator[tuple[str, Record]]:
    for file in matching_files(path):
        with file.open("rb") as lines, naming_file(file):
            yield from located(lines, str(file))


def located(
    lines: Iterable[bytes], file: str, first_number: int = 1
) -> Iterator[tuple[str, Record]]:
    """The records of lines of JSONL, each with its place as `file:line`; empty lines are skipped.

    Raises:
        UsageError: a bad line.
    """
    for number, line in enumerate(lines, start=first_number):
        if line.strip():
            where = f"{file}:{number}"
            yield where, Record.from_json(parse_line(line, where), where)


def data_set(located: Iterable[tuple[str, Record]], path: str | os.PathLike) -> list[Record]:
    """Collects records, each given with its place as `file:line`, into one data set.

    Raises:
        UsageError: there is no record in `path`, or an id is used twice.
    """
    return list(unique(located, path))


def unique(located: Iterable[tuple[str, Record]], path: str | os.PathLike) -> Iterator[Record]:
    """The records of a data set, one by one, checked as `data_set` does."""
    first_use = {}
    for where, record in located:
        if record.id in first_use:
            raise UsageError(
                f"{where}: the id {record.id!r} was used before, at {first_use[record.id]}. Every "
                "record of a data set needs its own."
            )
        first_use[record.id] = where
        yield record
    if not first_use:
        raise UsageError(f"{path}: expected records, found none.")


def read_pairs(
    original: str | os.PathLike, current: str | os.PathLike
) -> tuple[list[Record], list[Record]]:
    """Reads the annotated outputs of two models, both in the order of the original's.

    Raises:
        UsageError: they are not for the same prompts, or not annotated alike.
    """
    before = read_records(original)
    by_id = {row.id: row for row in read_records(current)}
    after = [by_id[row.id] for row in before if row.id in by_id]
    if not len(before) == len(after) == len(by_id):
        raise UsageError(
            f"expected outputs for the same records, found {len(before)} in {original}, "
            f"{len(by_id)} in {current} and {len(after)} ids in both. Generate both from the same "
            "prompts."
        )
    for one, other in zip(before, after, strict=True):
        for row, path in ((one, original), (other, current)):
            if row.negative_spans is None:
                raise UsageError(
                    f"record {row.id!r} of {path} has no negative_spans: expected annotated "
                    "records (python -m tnt_jax.annotate)."
                )
        if one.inputs != other.inputs or one.annotator != other.annotator:
            raise UsageError(
                f"record {one.id!r} has other inputs, or another annotator, in {current} than in "
                f"{original}. Generate and annotate both alike."
            )
    return before, after


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> None:
    """Writes JSONL; the file appears under its name only when it is complete."""
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_line())


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store (gs://), which `pathlib` takes for a local folder."""
    return "://" in os.fspath(path)


def path_of(path: str | os.PathLike) -> Any:
    """The path as `pathlib.Path`, or, in an object store, as `epath.Path`, which can as much."""
    return epath.Path(path) if is_remote(path) else pathlib.Path(path)


def size_of(path: str | os.PathLike) -> int:
    """Bytes of a file.

    `epath` would look up the name of its owner as well, and fails where the owner has none: in a
    container, on a shared disk.
    """
    return epath.Path(path).stat().length if is_remote(path) else pathlib.Path(path).stat().st_size


def matching_files(path: str | os.PathLike) -> list[Any]:
    """The file `path`, or the files that match it as a glob pattern, sorted; each by `path_of`.

    Raises:
        UsageError: there is none.
    """
    files = [path_of(path)]
    if not files[0].is_file():
        # Path.glob takes no absolute pattern.
        if is_remote(path):
            store, _, rest = os.fspath(path).partition("://")
            bucket, _, pattern = rest.partition("/")
            names = map(os.fspath, epath.Path(f"{store}://{bucket}").glob(pattern))
        else:
            names = glob.glob(os.fspath(path), recursive=True)  # noqa: PTH207
        files = [file for file in map(path_of, sorted(names)) if file.is_file()]
    if not files:
        raise UsageError(f"{path}: no such file, and no file matches it as a pattern.")
    return files


def check_writable(
    path: str | os.PathLike, setting: str, reads: Mapping[str, str | None] | None = None
) -> None:
    """Finds out, before the work, whether a file can be written; its folder is created.

    Args:
        path: the file.
        setting: that names it, for messages.
        reads: files (or globs) that are read, by their settings: none of them is written over.

    Raises:
        UsageError: it cannot, or would be written over what is read.
    """
    if is_remote(path):
        return
    path = pathlib.Path(path)
    reason = _unwritable(path) or ("it is a directory" if path.is_dir() else None)
    if reason:
        raise UsageError(f"{setting}: expected a file that can be written, found {path}: {reason}.")
    for reader, pattern in (reads or {}).items():
        if pattern is None or is_remote(pattern) or not path.exists():
            continue
        if any(path.samefile(file) for file in matching_files(pattern)):
            raise UsageError(
                f"{setting}: expected a file of its own, found {path}, which {reader} reads: it "
                "would be written over. Choose another."
            )


def check_directory(path: str | os.PathLike, setting: str) -> None:
    """Finds out, before the work, whether a directory can be written to; it is created.

    Raises:
        UsageError: it cannot; the message names `setting`.
    """
    if "://" not in os.fspath(path) and (reason := _unwritable(pathlib.Path(path) / "any")):
        raise UsageError(
            f"{setting}: expected a directory that can be written, found {path}: {reason}."
        )


def _unwritable(path: pathlib.Path) -> str | None:
    """Why no file can be written there, as `replacing` writes it; None where one can."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = _beside(path)
        unfinished.touch()
        unfinished.unlink()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a null character
        return str(error)
    return None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` to write to, and renames it to `path` when all went well.

    Parent folders are created. A program that is stopped half-way leaves no file that looks whole.
    What goes to an object store is written to this machine first.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="tnt_jax-") as folder:
            unfinished = pathlib.Path(folder) / "unfinished"
            yield unfinished
            path_of(path).write_bytes(unfinished.read_bytes())
        return
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _beside(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _beside(path: pathlib.Path) -> pathlib.Path:
    # Not the process id: on two hosts that share a folder it may be the same.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")


def known_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a parsed object that a record has, checked one by one; lists become tuples.

    Raises:
        UsageError: a field is of the wrong type.
    """
    known = {}
    for name, (is_valid, expected) in _FIELDS.items():
        value = fields.get(name)
        if value is None:  # null is the same as absent
            continue
        if not is_valid(value):
            raise UsageError(f"{where}: {name}: expected {expected}, found {_shown(value)}.")
        known[name] = _as_tuples(value)
    return known


def parse_line(line: bytes, where: str) -> Any:
    """What a line of JSONL holds.

    Raises:
        UsageError: it is not UTF-8, or not JSON.
    """
    try:
        # Without the mark that Windows begins a file with, and what follows an object: or an open
        # end is said to be in line 2.
        value = parse(line.decode("utf-8-sig").rstrip())
        check_depth(line, value)
    except NotFiniteError as error:
        name = ""
        with contextlib.suppress(ValueError, RecursionError):  # what comes after may be no JSON
            name, _ = _not_finite(json.loads(line.decode("utf-8-sig")))
        field = f"{name}: " if name else ""
        raise UsageError(
            f"{where}: {field}expected finite numbers, found {error}. Write null, or leave the "
            "field out."
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{where}: not JSON: {error.msg} at column {error.colno}. Expected JSONL, one object a "
            'line, such as {"inputs": "..."}.'
        ) from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
        raise UsageError(f"{where}: JSON that cannot be read: {what}.") from None
    if has_half_pairs(line, value):
        fields = value.items() if isinstance(value, Mapping) else ()
        bad = (name for name, v in fields if not _is_text(json.dumps(v, ensure_ascii=False)))
        raise UsageError(
            f"{where}: {ascii(next(bad, 'the name of a field'))[1:-1]}: expected a string of "
            "Unicode text, found half a surrogate pair (\\ud800 to \\udfff). Was a text cut within "
            "a character?"
        )
    return value


class NotFiniteError(ValueError):
    """JSON text has a number that JSON, or a float, does not."""


def _refuse(literal: str) -> None:
    raise NotFiniteError(f"{literal}, which JSON does not have")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise NotFiniteError(f"{literal:.20}, which is more than a number can be")
    return number


_STRICT = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def parse(text: str) -> Any:
    """What JSON text holds.

    `json.loads` takes NaN and Infinity, too, and makes 1e999 one. What is read is written again,
    and nobody else reads those.

    Raises:
        NotFiniteError: a number is none, or not finite.
        ValueError: it is not JSON.
    """
    return _STRICT.decode(text)


def _not_finite(value: Any) -> tuple[str, float | None]:
    """The first field of an object with a number that is not finite in it, and the number."""
    for name, part in value.items() if isinstance(value, Mapping) else [("", value)]:
        waiting = [part]
        while waiting:
            part = waiting.pop()
            if isinstance(part, float) and not math.isfinite(part):
                return str(name), part
            if isinstance(part, Mapping):
                waiting += part.values()
            elif isinstance(part, list | tuple):
                waiting += part
    return "", None


def counted_otherwise(text: str, start: int, end: int) -> str:
    """A guess, for messages, at what was counted where a span does not lie within a text."""
    for name, encoding, size in (
        ("UTF-16 units, as in JavaScript", "utf-16-le", 2),
        ("bytes of UTF-8", "utf-8", 1),
    ):
        number = len(text.encode(encoding, "surrogatepass")) // size
        if 0 <= start < end <= number:
            return f" (It has {number} {name}: were those counted?)"
    return ""


_DEEPEST = 100  # of lists and objects within each other; no format of ours has ten


def check_depth(content: bytes, value: Any) -> None:
    """Raises a RecursionError for JSON, as it is written and as a value, that is nested deeper.

    Python reads more than it can write or print again: how much depends on who asks.
    """
    if content.count(b"[") + content.count(b"{") <= _DEEPEST:
        return
    level = [value]
    for _ in range(_DEEPEST):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError("nested too deeply")


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # a half of a pair, as JSON spells it


def has_half_pairs(content: bytes, value: Any) -> bool:
    """Whether JSON, here as it is written and as a value, spells half a surrogate pair.

    That is no Unicode text: no tokeniser takes it, and no file of UTF-8.
    """
    return bool(_SURROGATE.search(content)) and not _is_text(json.dumps(value, ensure_ascii=False))


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _is_int(value: Any) -> bool:
    """Whether it is a whole number, and one that an int32 array can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(i) and i >= 0 for i in value)


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(_are_ids(span) and len(span) == 2 for span in value)


def _are_ids_by_position(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, list) and len(entry) == 2 and _is_int(entry[0]) and _are_ids(entry[1])
        for entry in value
    )


_FIELDS = {
    "id": (_is_text, "a string of Unicode text"),
    "inputs": (_is_text, "a string of Unicode text"),
    "targets": (_is_text, "a string of Unicode text"),
    "target_ids": (_are_ids, "a list of token ids"),
    "negative_spans": (_are_spans, "a list of [start, end] code point offsets"),
    "negative_token_ids": (_are_ids_by_position, "a list of [position, [token ids]]"),
    "annotator": (_is_text, "a string of Unicode text"),
}


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    text = ascii(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
