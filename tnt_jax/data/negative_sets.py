"""Long sets of ids to remove: in a table beside the records, which refer to them.

Many records remove the same ids where a span begins: the first tokens of all that a list holds. So
a set of `LEAST` ids or more is written once, as a line of `RECORDS.sets.jsonl`, and a record's
`negative_set` names it. The name is a digest of the ids, so what was changed by hand is refused,
and no table fits records by accident. `Record` has the ids themselves; records that share a set
share the tuple.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import numpy as np

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError, naming_file

LEAST = 16  # a name is as long as four ids; what few ids say, a reader sees at once
LINE = b'{"set": '  # how each line of a table begins, and no record
_Ids = tuple[int, ...]


class _Line(msgspec.Struct):
    set: str
    ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...]


_LINES = msgspec.json.Decoder(_Line)


def file_of(path: str) -> str:
    """Where the sets are that a file of records refers to."""
    return path + files.SETS_ENDING


@functools.lru_cache(maxsize=1024)
def name_of(ids: _Ids) -> str:
    """The name of a set: a digest of its ids, 16 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids, "<i4").tobytes(), digest_size=8).hexdigest()


class Names:
    """Gives sets their names, and keeps the lines of those that it has not met before."""

    _MOST_KNOWN = 4096

    def __init__(self):
        self._known: dict[int, tuple[_Ids, str]] = {}  # by identity, which the tuple here secures
        self._met: set[str] = set()
        self._lines: list[str] = []

    def __call__(self, ids: _Ids) -> str:
        """The name of a set."""
        known = self._known.get(id(ids))
        if known is None:
            if len(self._known) >= self._MOST_KNOWN:
                self._known.clear()
            known = self._known[id(ids)] = ids, name_of(ids)
        name = known[1]
        if name not in self._met:
            self._met.add(name)
            self._lines.append(json.dumps({"set": name, "ids": [*map(int, ids)]}) + "\n")
        return name

    def forget(self) -> None:
        """Lets every set be new again."""
        self._met.clear()

    def lines_of(self, record: Any) -> list[str]:
        """The lines of the sets that a record is the first to have, and its own."""
        line = record.to_line(self)
        lines, self._lines = self._lines, []
        return [*lines, line]


def find(path: str, name: str, where: str) -> _Ids:
    """The set of a name, in the table of a file of records.

    Args:
        path: the file of records.
        name: the set's name, as a record has it.
        where: the place of that record, for messages.

    Raises:
        UsageError: there is no table, it is none, or the set is not in it.
    """
    table = file_of(path)
    try:
        found = _table(table, _state(table)).get(name)
        if found is None and files.is_remote(table):  # it may have been replaced since
            _size_in_bucket.cache_clear()
            _table.cache_clear()
            found = _table(table, _state(table)).get(name)
    except FileNotFoundError:
        raise UsageError(
            f"{where}: negative_set: expected the sets that it names in {table}, which is not "
            "there. Keep that file beside the records, or annotate again."
        ) from None
    if found is None:
        raise UsageError(
            f"{where}: negative_set: expected a set that {table} has, found {name!a:.40}. Its "
            "records are others, or it was cut short: annotate again."
        )
    return found


def _state(path: str) -> tuple[int, ...]:
    """What changes when a file is replaced."""
    if files.is_remote(path):
        return (_size_in_bucket(path),)
    stat = os.stat(path)  # noqa: PTH116 (once for every record)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=1024)
def _size_in_bucket(path: str) -> int:
    """Bytes of a file when it was first asked for: asking takes a request, and a record has sets.

    A table that was replaced meanwhile gives no wrong ids: their name is a digest of them.
    """
    return files.size_of(path)


@functools.lru_cache(maxsize=16)
def _table(path: str, state: tuple[int, ...]) -> dict[str, _Ids]:
    del state
    found: dict[str, _Ids] = {}
    with files.path_of(path).open("rb") as lines, naming_file(path):
        for number, line in enumerate(lines, start=1):
            try:
                one = _LINES.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise UsageError(
                    f'{path}:{number}: expected a line that annotate wrote, {{"set": "...", "ids": '
                    f"[...]}}; found another ({error})."
                ) from None
            if name_of(one.ids) != one.set:
                raise UsageError(
                    f"{path}:{number}: expected the ids of the set {one.set:.40}, found others. "
                    "The file was changed: annotate again."
                )
            found[one.set] = one.ids
    return found


class Divider:
    """Puts lines of a table, which stand between those of records, into the table; each set once.

    Attributes:
        names: the names of the sets that it has met.
    """

    def __init__(self, path: str, stack: contextlib.ExitStack):
        """Takes the path of the records, and what puts the table in place when it is left."""
        self.names: set[str] = set()
        self._table, self._stack = file_of(path), stack
        self._file: Any = None  # opened for the first set: most files of records have none

    def records_of(self, content: bytes) -> bytes:
        """The lines that are of records."""
        if LINE not in content:
            return content
        of_records = []
        for line in content.splitlines(keepends=True):
            if not line.startswith(LINE):
                of_records.append(line)
            elif (name := _LINES.decode(line).set) not in self.names:
                self.names.add(name)
                if self._file is None:
                    unfinished = self._stack.enter_context(files.replacing(self._table))
                    self._file = self._stack.enter_context(unfinished.open("wb"))
                self._file.write(line)
        return b"".join(of_records)


@contextlib.contextmanager
def dividing(path: str | os.PathLike) -> Iterator[Divider]:
    """Yields what divides the lines for a file of records; then the table is put in place."""
    with contextlib.ExitStack() as stack:
        yield Divider(os.fspath(path), stack)


def remove(path: str | os.PathLike) -> None:
    """Takes away the table that an earlier file of records had."""
    files.path_of(file_of(os.fspath(path))).unlink(missing_ok=True)
