"""Ids that an annotator removes at every position of every record: in a file beside the records."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from tnt_jax import json_files, records, run_log
from tnt_jax.errors import UsageError

_ENDING = ".everywhere.json"


def file_of(path: str) -> str:
    """Where the ids are that belong to a file of records."""
    return path + _ENDING


def removed_ids(path: str) -> tuple[int, ...]:
    """The ids in such a file, for `TntObjective.removed_everywhere`.

    Raises:
      UsageError: The file is missing or is not one of those.
    """
    ids = json_files.read_object(path, "a file of ids that annotate wrote").get("ids")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise UsageError(
            f"{path}: expected a file of ids that annotate wrote (<output>{_ENDING}), with a list "
            f"of them as 'ids'; found {ids!r:.60}."
        )
    return tuple(ids)


def of_records(path: str) -> tuple[int, ...]:
    """The ids that belong to files of records, all together; of most there are none.

    Args:
      path: A file (or glob) of records.
    """
    return tuple(sorted({id_ for file in files_of(path) for id_ in removed_ids(file)}))


def files_of(path: str) -> list[str]:
    """Those that are there, for a file (or glob) of records."""
    found = [file_of(os.fspath(file)) for file in records.matching_files(path)]
    return [file for file in found if records.path_of(file).exists()]


def write(path: str, ids: Iterable[int], more: Mapping[str, Any]) -> str:
    """Writes the ids that belong to a file of records, and what else there is to say of them."""
    run_log.write_json(file_of(path), {"ids": sorted(ids), **more})
    return file_of(path)


def write_none(path: str) -> None:
    """Takes away what an earlier annotator of the same file has left."""
    records.path_of(file_of(path)).unlink(missing_ok=True)
