"""Ids that an annotator removes at every position of every record: in a file beside the records.

The file says by a digest which records its ids belong to, and is written before those are put in
place. So ids are refused where the records were replaced, by whomever, and where a program was
killed between the two; there, the same command mends it.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from tnt_jax.data import negative_sets, records
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_ENDING = ".everywhere.json"


class Ids(NamedTuple):
    """What is removed at every position.

    Attributes:
      ids: Token ids.
      more: What else there is to say of them, JSON values.
    """

    ids: Iterable[int]
    more: Mapping[str, Any]


class _File(msgspec.Struct):
    """The JSON of such a file; `records` is the digest of the records that the ids belong to."""

    ids: tuple[records.TokenId, ...]
    records: Any = None


def file_of(path: str) -> str:
    """Where the ids are that belong to a file of records."""
    return path + _ENDING


def removed_ids(path: str) -> tuple[int, ...]:
    """The ids in such a file, for `TntObjective.removed_everywhere`.

    Raises:
      UsageError: The file is missing or is not one of those, or the records beside it are not those
        that it belongs to.
    """
    try:
        content = files.read_object(path, "a file of ids that annotate wrote")
        found = msgspec.convert(content, _File)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{path}: expected a file of ids that annotate wrote (<output>{_ENDING}), with a list "
            f"of them as 'ids'; found another ({error})."
        ) from None
    beside = files.path_of(path.removesuffix(_ENDING))
    if path.endswith(_ENDING) and beside.is_file():
        digest = _digest_of(beside)
        if digest != found.records:
            raise UsageError(
                f"{path}: expected ids that belong to {beside} (digest {digest}), found those of "
                f"other records (digest {found.records!r:.40}). Annotate again; or delete "
                "the file, and nothing is removed at every position; or, if it holds for these "
                "records too, rename it and set removed_everywhere.removed_ids.path."
            )
    return found.ids


def of_records(path: str) -> tuple[int, ...]:
    """The ids that belong to files of records, all together; of most there are none.

    Args:
      path: A file (or glob) of records.

    Raises:
      UsageError: A file of ids is not one, or the records beside it are not those that it belongs
        to.
    """
    return tuple(sorted({id_ for file in files_of(path) for id_ in removed_ids(file)}))


def files_of(path: str) -> list[str]:
    """The files of ids that there are beside a file (or glob) of records."""
    found = [file_of(os.fspath(file)) for file in files.matching_files(path)]
    return [file for file in found if files.path_of(file).exists()]


@contextlib.contextmanager
def replacing(path: str | os.PathLike, everywhere: Ids | None) -> Iterator[Callable[[bytes], None]]:
    """Yields a function that takes the bytes of a file of records, one stretch after the other.

    Each stretch has whole lines, which may be those of `negative_sets.Names.lines_of`. When all
    went well they are put in place, with the ids and the sets that belong to them.

    Args:
      path: The file of records to write.
      everywhere: Ids to remove everywhere; None takes away those that an earlier annotator has
        left.
    """
    hashed = hashlib.sha256()
    ids_file = file_of(os.fspath(path))
    with files.replacing(path) as unfinished:
        with negative_sets.dividing(path) as sets, unfinished.open("wb") as file:

            def write(content: bytes) -> None:
                content = sets.records_of(content)
                hashed.update(content)
                file.write(content)

            yield write
        if everywhere is not None:
            said = {"ids": sorted(everywhere.ids), "records": _short(hashed), **everywhere.more}
            files.write_json(ids_file, said)
    if everywhere is None:
        # Not before: the records of an earlier annotator would stand there without their ids.
        files.path_of(ids_file).unlink(missing_ok=True)
    if not sets.names:
        negative_sets.remove(path)


def write_records(
    path: str | os.PathLike, rows: Iterable[records.Record], everywhere: Ids | None
) -> None:
    """`records.write_records`, with the ids and sets of the records, as in `replacing`."""
    names = negative_sets.Names()
    with replacing(path, everywhere) as write:
        for row in rows:
            write("".join(names.lines_of(row)).encode())


def _digest_of(path: Any) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(2**20):
            hashed.update(content)
    return _short(hashed)


def _short(hashed: Any) -> str:
    return hashed.hexdigest()[:16]
