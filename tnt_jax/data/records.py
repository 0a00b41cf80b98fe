"""The record: an input, what the original model said to it, and what is unwanted there.

Programs exchange records as JSONL, one object a line:

    {"id": "...", "inputs": "text", "targets": "text the original model produced",
     "target_ids": [...],                       exact generated ids, EOS included
     "negative_spans": [[start, end], ...],     code point offsets into targets, end exclusive
     "negative_token_ids": [[position, [ids]]], further ids removed at a position of target_ids
     "negative_set": [[position, "name"]],      the same, by the name of a set (`negative_sets`)
     "annotator": "name and settings",
     "messages": [{"role": "user", "content": "text"}, ...]}       the conversation before the reply

A mark may have a strength s above 0 and at most 1, as `[start, end, s]`, `[position, [ids], s]` or
`[position, "name", s]`: then the original's probability is multiplied by 1 - s, before all is
renormalised. Without one it is 1, which is removal. Except in spans it may be from -99 to below 0,
which raises the ids: 1 - s is above 1.

Only `inputs` or `messages` is required, so a file of prompts is a file of records. Targets that are
there and empty are an output: the model ended at once. A conversation is for a chat model; its
texts, one after another, are the `inputs` where there are none. Unknown fields are kept. What TRL
writes is read as well: `prompt` and `completion`, each a text or messages, and `messages` that end
with the assistant's turn, which is the `targets`; what else TRL gives a template, such as tools, is
refused (`conversations`). Files are local, or in a bucket (`gs://`): whatever `etils.epath` opens.
"""

import array
import dataclasses
import hashlib
import json
import numbers
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np

from tnt_jax.data import negative_sets
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file
from tnt_jax.tokenizers import conversations

Span = tuple[int, int] | tuple[int, int, float]  # start, end, and a strength below 1
# Position, ids, and a strength below 1.
TokenIds = tuple[int, tuple[int, ...]] | tuple[int, tuple[int, ...], float]

# No id is raised more than a hundredfold: a larger factor is a quotient with nearly 0 below.
LEAST_STRENGTH = -99.0


class _NoTargets(str):
    """An empty text that stands for none: told from an empty output by its type, also in copies."""

    __slots__ = ()


NO_TARGETS = _NoTargets()


def strength_of(mark: Span | TokenIds) -> float:
    """The strength of an entry of `negative_spans` or `negative_token_ids`."""
    return mark[2] if len(mark) == 3 else 1.0


def with_strength(first: Any, second: Any, strength: float) -> tuple[Any, ...]:
    """An entry of `negative_spans` or `negative_token_ids`; a strength of 1 is not written."""
    return (first, second) if strength == 1 else (first, second, float(strength))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One example, before tokenisation.

    Attributes:
        id: names the example; unique within a data set.
        inputs: text that the model is given.
        targets: text that the original model produced, which may be empty; `NO_TARGETS` in a
            prompt.
        target_ids: the exact generated ids, EOS included. Kept because re-tokenising a sampled text
            can give other ids. None when only the text is known.
        negative_spans: unwanted stretches of `targets`, as (start, end) in Unicode code points, end
            exclusive, or (start, end, strength). None means not annotated yet, () means nothing is
            unwanted.
        negative_token_ids: (position, ids) pairs: ids to remove at a token position, beside those
            that follow from the spans. Alternatives that would be just as wrong, or earlier marks.
            With a strength: (position, ids, strength). One below 0 raises the ids. A position may
            have several entries; where an id has several strengths, the largest counts.
        annotator: who or what made the annotation.
        messages: (role, content) pairs: the conversation that a chat model is given, in place of
            `inputs`; () where there is none.
        extra: fields that are not ours, kept from file to file.

    Raises:
        UsageError: a span or a position lies outside the targets, or a strength outside what
            `is_strength` and `is_strength_of_ids` take.
    """

    id: str
    inputs: str
    targets: str = NO_TARGETS
    target_ids: tuple[int, ...] | None = None
    negative_spans: tuple[Span, ...] | None = None
    negative_token_ids: tuple[TokenIds, ...] = ()
    annotator: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for start, end in self.offsets:
            if not 0 <= start < end <= len(self.targets):
                raise UsageError(
                    f"record {self.id!r}: negative_spans has [{start}, {end}], but targets has "
                    f"{len(self.targets)} characters.{counted_otherwise(self.targets, start, end)} "
                    "A span is [start, end] with 0 <= start < end <= length, counted in Unicode "
                    "code points (not bytes), end exclusive."
                )
        for name, marks, is_valid, allowed in (
            ("negative_spans", self.negative_spans or (), is_strength, ""),
            (
                "negative_token_ids",
                self.negative_token_ids,
                is_strength_of_ids,
                f", or one from {LEAST_STRENGTH:g} to below 0, which raises the ids",
            ),
        ):
            for mark in marks:
                if not is_valid(strength_of(mark)):
                    raise UsageError(
                        f"record {self.id!r}: {name} has the strength {_shown(mark[-1])} in "
                        f"{ascii(list(mark))[:60]}: expected a number above 0 and at most 1"
                        f"{allowed}."
                    )
        for position, *_ in self.negative_token_ids:
            # Without target_ids the length is known, and checked, only after tokenisation.
            if position < 0 or (self.target_ids is not None and position >= len(self.target_ids)):
                raise UsageError(
                    f"record {self.id!r}: negative_token_ids has position {position}; expected a "
                    "position in target_ids, counted from 0."
                )

    @property
    def is_prompt(self) -> bool:
        """Whether there is no output, not even an empty one."""
        return isinstance(self.targets, _NoTargets) and self.target_ids is None

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """The negative spans as (start, end), whatever their strength; () if not annotated."""
        return tuple((span[0], span[1]) for span in self.negative_spans or ())

    @property
    def has_unwanted_text(self) -> bool:
        """Whether a span of the targets is marked, which is what annotators and people mark.

        This is what is counted: of the original's outputs and of the patched model's, in
        evaluations, looks and reports. `says_unwanted` is what may not be learned from as it is.
        """
        return bool(self.negative_spans)

    @property
    def says_unwanted(self) -> bool:
        """Whether anything that was said is marked: a span, or one of `target_ids` is removed.

        This is what decides what is learned from: no such output is clean, or preferred. A mark by
        id alone has no text: that an output ends too early, for one, or an earlier round's. No
        annotator makes one of another model's output, so none is counted (`has_unwanted_text`). An
        id that is lowered by less than 1 may still be said: so `localize` lowers, in good outputs
        too, whatever fewer texts end well after.
        """
        ids = self.target_ids or ()
        return self.has_unwanted_text or any(
            strength_of(entry) == 1 and entry[0] < len(ids) and ids[entry[0]] in entry[1]
            for entry in self.negative_token_ids
        )

    @property
    def prompt(self) -> str:
        """What the model is given, as one text: two records with the same one ask the same."""
        return json.dumps(self.messages) if self.messages else self.inputs

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
        fields = conversations.as_record(fields, where)
        if fields.get("inputs") is None:
            found = [name for name, value in fields.items() if value is not None]
            raise UsageError(f"{where}: the field 'inputs' is missing; found {sorted(found)[:20]}.")
        known = known_fields(fields, where)
        if "messages" in known:
            known["messages"] = tuple((one["role"], one["content"]) for one in known["messages"])
        for name in ("negative_spans", "negative_token_ids"):
            if name in known:
                known[name] = tuple(mark.entry for mark in known[name])
        if named := known.pop("negative_set", ()):
            entries = known.get("negative_token_ids", ())
            known["negative_token_ids"] = _with_sets(entries, [one.entry for one in named], where)
        known.setdefault("id", default_id(where))
        extra = {name: value for name, value in fields.items() if name not in _EXPECTED}
        try:
            return cls(**known, extra=extra)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None

    def to_json(self, names: negative_sets.Names | None = None) -> dict[str, Any]:
        """The inverse of `from_json`; optional fields that hold nothing are left out.

        Args:
            names: gives names to long sets of ids, which are then not written out
                (`negative_sets`).
        """
        fields: dict[str, Any] = {"id": self.id, "inputs": self.inputs}
        if not self.is_prompt:
            fields["targets"] = self.targets
        if self.target_ids is not None:
            fields["target_ids"] = [int(i) for i in self.target_ids]
        if self.negative_spans is not None:
            fields["negative_spans"] = [
                list(with_strength(int(span[0]), int(span[1]), strength_of(span)))
                for span in self.negative_spans
            ]
        fields |= self._removed(names)
        if self.annotator:
            fields["annotator"] = self.annotator
        if self.messages:
            fields["messages"] = [
                {"role": role, "content": content} for role, content in self.messages
            ]
        return {**fields, **self.extra}

    def _removed(self, names: negative_sets.Names | None) -> dict[str, list[Any]]:
        """The fields that say which ids are removed where."""
        written, named = [], []
        for entry in self.negative_token_ids:
            position, ids, strength = int(entry[0]), entry[1], strength_of(entry)
            if names is not None and len(ids) >= negative_sets.LEAST:
                named.append([*with_strength(position, names(ids), strength)])
            else:
                written.append([*with_strength(position, [int(i) for i in ids], strength)])
        fields = {"negative_token_ids": written, "negative_set": named}
        return {name: entries for name, entries in fields.items() if entries}

    def to_line(self, names: negative_sets.Names | None = None) -> str:
        """The line of JSONL; `names` as in `to_json`.

        Raises:
            UsageError: a field that is not ours holds a number that is not finite.
        """
        fields = self.to_json(names)
        try:
            return json.dumps(fields, ensure_ascii=False, allow_nan=False) + "\n"
        except ValueError:
            name, number = files.not_finite(fields)
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


def iterate(
    path: str | os.PathLike, is_chosen: Callable[[int], bool] | None = None
) -> Iterator[Record]:
    """Reads as `read_records`, one by one, without a look at ids.

    Args:
        path: a JSONL file, or a glob.
        is_chosen: whether the record with a number, from 0, is wanted; None wants all.

    Raises:
        UsageError: no file, or a bad line among those that are wanted.
    """
    return (record for _, _, record in _lines_of_files(path, is_chosen))


def _of_files(path: str | os.PathLike) -> Iterator[tuple[str, Record]]:
    return ((where, record) for where, _, record in _lines_of_files(path))


def _lines_of_files(
    path: str | os.PathLike, is_chosen: Callable[[int], bool] | None = None
) -> Iterator[tuple[str, bytes, Record]]:
    """Places, lines and records."""
    count = 0
    for file in files.matching_files(path):
        name = str(file)
        with file.open("rb") as lines, naming_file(file):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    if is_chosen is None or is_chosen(count):
                        where = f"{name}:{number}"
                        yield where, line, _parsed(line, where)
                    count += 1


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
            yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> Record:
    """The record of a line; most have no field that is not ours, which takes a third of the time.

    Raises:
        UsageError: a bad line.
    """
    try:
        found = _ONLY_OURS.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return Record.from_json(files.parse_line(line, where), where)
    try:
        return Record(
            id=default_id(where) if found.id is None else found.id,
            inputs=found.inputs,
            targets=found.targets,
            target_ids=found.target_ids,
            negative_spans=found.negative_spans,
            negative_token_ids=(
                _with_sets(found.negative_token_ids, found.negative_set, where)
                if found.negative_set
                else found.negative_token_ids
            ),
            annotator=found.annotator,
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def data_set(located: Iterable[tuple[str, Record]], path: str | os.PathLike) -> list[Record]:
    """Collects records, each given with its place as `file:line`, into one data set.

    Raises:
        UsageError: there is no record in `path`, or an id is used twice.
    """
    first_use: dict[str, str] = {}
    found = []
    for where, record in located:
        _enter(first_use, record.id, where)
        found.append(record)
    if not found:
        raise _without_records(path)
    return found


def _enter(first_use: dict[str, str], id: str, where: str) -> None:
    if id in first_use:
        raise UsageError(
            f"{where}: the id {id!r} was used before, at {first_use[id]}. Every "
            "record of a data set needs its own."
        )
    first_use[id] = where


def _without_records(path: str | os.PathLike) -> UsageError:
    return UsageError(f"{path}: expected records, found none.")


class Survey(NamedTuple):
    """What a look at all records of a data set finds.

    Attributes:
        num_records: how many there are.
        digest: a fingerprint of their ids, their lines and their order.
    """

    num_records: int
    digest: str


def survey(path: str | os.PathLike) -> Survey:
    """Checks a data set as `read_records` does, with eight bytes of memory for each record.

    Raises:
        UsageError: no file, no record, a bad line (named as `file:line`), or an id used twice.
    """
    hashes, hashed = array.array("q"), hashlib.sha256()
    for _, line, record in _lines_of_files(path):
        hashes.append(hash(record.id))
        hashed.update(f"{record.id}\n".encode())
        hashed.update(line.strip())
    if not hashes:
        raise _without_records(path)
    ordered = np.frombuffer(hashes, np.int64)
    ordered.sort()
    equal = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(equal):  # of two ids, or of one that is used twice
        doubtful, first_use = {*equal.tolist()}, {}
        for where, record in _of_files(path):
            if hash(record.id) in doubtful:
                _enter(first_use, record.id, where)
    return Survey(len(ordered), hashed.hexdigest()[:16])


def read_pairs(
    original: str | os.PathLike, current: str | os.PathLike
) -> tuple[list[Record], list[Record]]:
    """Reads the annotated outputs of two models, both in the order of the original's.

    Raises:
        UsageError: they are not for the same prompts, or not annotated alike: by the same annotator
            with the same list, or both by people.
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
            check_annotated(row, path)
        if one.prompt != other.prompt:
            raise UsageError(
                f"record {one.id!r} has other inputs in {current}, {_shown(other.prompt)}, than in "
                f"{original}, {_shown(one.prompt)}. Generate both from the same prompts."
            )
        if _measure_of(one.annotator) != _measure_of(other.annotator):
            raise UsageError(
                f"record {one.id!r} has another annotator in {current}, "
                f"{other.annotator or 'none that is named'}, than in {original}, "
                f"{one.annotator or 'none that is named'}: another one marks other things. "
                "Annotate both alike."
            )
    return before, after


# The name of what reads people's marks, `annotators.Spans`, which begins how it describes itself.
OF_PEOPLE = "Spans"


def _measure_of(annotator: str) -> str:
    """What has to be the same of two annotators, so that what they mark can be compared.

    That is all but the file of people's marks: each file is of some outputs, so those of two models
    have two.
    """
    return OF_PEOPLE if annotator.startswith(f"{OF_PEOPLE}(") else annotator


def annotator_of(original: Record, current: Record) -> str:
    """Who marked two outputs that `read_pairs` compared, for people to read."""
    if original.annotator == current.annotator:
        return current.annotator
    return f"{original.annotator} (original), {current.annotator} (patched)"


def check_output(record: Record, path: str | os.PathLike | None = None) -> None:
    """Raises a UsageError, which names the file, where a record is a prompt."""
    if record.is_prompt:
        raise UsageError(
            f"{'' if path is None else f'{path}: '}record {record.id!r} has no targets. Expected "
            "outputs of the original model (tnt_jax.generate writes them), not prompts."
        )


def check_annotated(record: Record, path: str | os.PathLike) -> None:
    """Raises a UsageError, which names the file, where nobody has annotated a record."""
    if record.negative_spans is None:
        raise UsageError(
            f"record {record.id!r} of {path} has no negative_spans: expected annotated records "
            "(python -m tnt_jax.annotate)."
        )


def check_trainable(record: Record, path: str | os.PathLike, annotated: bool) -> None:
    """Raises a UsageError where a record cannot be trained on.

    Args:
        record: a record of a file.
        path: the file (or glob), for the message.
        annotated: whether a record that nobody annotated is an error.
    """
    check_output(record, path)
    if annotated and record.negative_spans is None and not record.negative_token_ids:
        raise UsageError(
            f"{path}: record {record.id!r} has no negative_spans: nobody annotated it. Run "
            "tnt_jax.annotate on the file, or set ANNOTATED (RecordFiles.annotated) to False "
            "to train on it as it is."
        )


def digest(rows: Iterable[Record]) -> str:
    """A fingerprint of records, their order and all their fields."""
    hashed = hashlib.sha256()
    for row in rows:
        # A prompt counts as an empty output, as before these were told apart: runs go on.
        whole = dataclasses.replace(row, targets="") if row.is_prompt else row
        hashed.update(whole.to_line().encode())
    return hashed.hexdigest()[:16]


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> None:
    """Writes JSONL; the file appears under its name only when it is complete."""
    with files.replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_line())


TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # what an int32 array can hold
_Offset = TokenId
_Position = Annotated[int, msgspec.Meta(gt=-(2**31), lt=2**31)]


class SpanFields(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """A span in JSON, with or without a strength, which a `Record` checks."""

    start: _Offset
    end: _Offset
    strength: Any = 1.0

    @property
    def entry(self) -> Span:
        """The span as `Record.negative_spans` has it."""
        return _entry(self.start, self.end, self.strength)


class TokenIdsFields(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """Ids at a position in JSON, with or without a strength, which a `Record` checks."""

    position: _Position
    ids: tuple[TokenId, ...]
    strength: Any = 1.0

    @property
    def entry(self) -> TokenIds:
        """The ids as `Record.negative_token_ids` has them."""
        return _entry(self.position, self.ids, self.strength)


class SetFields(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """The name of a set at a position in JSON, with or without a strength."""

    position: _Position
    name: str
    strength: Any = 1.0

    @property
    def entry(self) -> tuple[Any, ...]:
        """Position, name, and a strength that is not 1."""
        return _entry(self.position, self.name, self.strength)


def _with_sets(
    entries: Sequence[TokenIds], named: Sequence[tuple[Any, ...]], where: str
) -> tuple[TokenIds, ...]:
    """Entries of `negative_token_ids`, and those that name a set, by position and strength."""
    path = where.rpartition(":")[0]
    found = (
        (position, negative_sets.find(path, name, where), *strength)
        for position, name, *strength in named
    )
    return tuple(sorted((*entries, *found), key=lambda entry: (entry[0], -_number(entry))))


def _number(entry: TokenIds) -> float:
    """The strength of an entry; one that is no number is refused later."""
    strength = strength_of(entry)
    return strength if isinstance(strength, int | float) else 0.0


def is_strength(value: Any) -> bool:
    """Whether a value is a number above 0 and at most 1, of Python or NumPy."""
    return _is_number(value) and bool(0 < value <= 1)  # which NaN is not


def is_strength_of_ids(value: Any) -> bool:
    """Whether a value is a number from `LEAST_STRENGTH` to 1, but not 0, which marks nothing."""
    return _is_number(value) and value != 0 and bool(LEAST_STRENGTH <= value <= 1)


def _is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, of Python or NumPy; no boolean is."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _entry(first: Any, second: Any, strength: Any) -> Any:
    if is_strength_of_ids(strength):
        return with_strength(first, second, strength)
    return (first, second, strength)


def default_id(where: str) -> str:
    """The id of a record that has none, from its place as `file:line`."""
    path, _, line = where.rpartition(":")
    return f"{pathlib.PurePath(path).stem}:{line}"


class _Message(TypedDict):
    role: str
    content: str


class _Fields(TypedDict, total=False):
    """The fields that a record has in JSON."""

    id: str
    inputs: str
    targets: str
    target_ids: tuple[TokenId, ...]
    negative_spans: tuple[SpanFields, ...]
    negative_token_ids: tuple[TokenIdsFields, ...]
    negative_set: tuple[SetFields, ...]
    annotator: str
    messages: tuple[_Message, ...]


_EXPECTED = dict.fromkeys(_Fields.__annotations__, "a string of Unicode text") | {
    "target_ids": "a list of token ids",
    "negative_spans": "a list of [start, end] code point offsets, or [start, end, strength]",
    "negative_token_ids": "a list of [position, [token ids]], or [position, [token ids], strength]",
    "negative_set": 'a list of [position, "name of a set"], or [position, "name", strength]',
    "messages": 'a list of {"role": ..., "content": ...} with texts',
}


def known_fields(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a parsed object that a record has; lists become tuples, others are left out.

    Raises:
        UsageError: a field is of the wrong type.
    """
    # Null is the same as absent.
    given = {name: value for name, value in fields.items() if value is not None}
    if type(given.get("id")) is int:  # as many data sets have it
        given["id"] = str(given["id"])
    try:
        return msgspec.convert(given, _Fields)  # pyright: ignore[reportReturnType]
    except msgspec.ValidationError as error:
        name = files.wrong_field(error)
        shown = _shown(given[name])
        # Where the value is cut short, what is wrong may be in the rest.
        detail = f" ({error}.)" if "..." in shown else ""
        raise UsageError(
            f"{where}: {name}: expected {_EXPECTED[name]}, found {shown}.{detail}"
        ) from None


class Quick(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of most records, which have no others."""

    inputs: str
    id: str | None = None
    targets: str = NO_TARGETS
    target_ids: tuple[TokenId, ...] | None = None
    negative_spans: tuple[tuple[_Offset, _Offset], ...] | None = None
    negative_token_ids: tuple[tuple[_Offset, tuple[TokenId, ...]], ...] = ()
    negative_set: tuple[tuple[_Offset, str], ...] = ()
    annotator: str = ""


class _WithOthers(Quick, forbid_unknown_fields=False):
    """The same, with fields that are not ours, which are skipped."""

    messages: None = None
    prompt: None = None
    completion: None = None


_ONLY_OURS = msgspec.json.Decoder(Quick)
_WITH_OTHERS = msgspec.json.Decoder(_WithOthers)


def quick(line: bytes) -> Quick | None:
    """The fields of a line, as they are, without what is not ours; None if it is another record."""
    try:
        return _ONLY_OURS.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return _quick_with_others(line)


def _quick_with_others(line: bytes) -> Quick | None:
    try:
        line.decode()  # bytes of what is skipped are not looked at, nor are numbers and depths
        return None if files.may_be_refused(line) else _WITH_OTHERS.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


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


def _shown(value: Any) -> str:
    text = ascii(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
