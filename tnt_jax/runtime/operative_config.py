"""The gin settings of a run, written beside its output."""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import gin
import gin.config as gin_config

from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

_given: list[pathlib.Path] = []  # gin files of this process
# The headings of `text`.
_AS_WRITTEN = re.compile(r"^# (Macros|Parameters for \S+):\n# =+$", re.MULTILINE)


def note_given(files: Iterable[pathlib.Path]) -> None:
    """Notes the gin files that this process was given, with those that they include."""
    _given[:] = (file.absolute() for file in files)


def check_writable(
    path: str | os.PathLike, setting: str, reads: Mapping[str, str | None] | None = None
) -> None:
    """`files.check_writable`, and that neither the output nor its settings replace a gin file.

    Args:
        path: the output whose settings `write` puts beside it.
        setting: the setting that names the output, for messages.
        reads: files (or globs) that are read, by their settings: none of them is written over.

    Raises:
        UsageError: it cannot be written, or would be written over what this process reads.
    """
    files.check_writable(path, setting, reads)
    _check_is_no_gin_file(path, setting, is_folder=False)


def check_folder(path: str | os.PathLike, setting: str) -> None:
    """Finds out, before the work, whether what `write` writes into a folder replaces a gin file.

    Raises:
        UsageError: it would replace one of this process.
    """
    _check_is_no_gin_file(path, setting, is_folder=True)


def _check_is_no_gin_file(path: str | os.PathLike, setting: str, *, is_folder: bool) -> None:
    """Raises a UsageError for a gin file of this run, unless `write` has written it."""
    if files.is_remote(path):
        return
    output = pathlib.Path(path)
    beside = _file_of(output, is_folder)
    for file in (output, beside):
        if not file.is_file() or not any(
            given.exists() and file.samefile(given) for given in _given
        ):
            continue
        if file == beside and is_written(file):
            continue
        what = "the settings of the run" if file == beside else "the output"
        raise UsageError(
            f"{setting}: expected a place of its own for {what}, found {file}, which is a gin file "
            f"of this run: it would be written over. Set another {setting}, or rename the gin file."
        )


def is_written(file: pathlib.Path) -> bool:
    """Whether a gin file is one that `write` has written, with all that a run was given."""
    return _AS_WRITTEN.search(file.read_text("utf-8-sig")) is not None


def write(path: str | os.PathLike) -> None:
    """Writes the gin settings of this process beside an output.

    What was used so far, with defaults, and what was set but not used yet, such as the settings of
    a function that is called later. `--gin_file` reads the file back. Nothing is written where gin
    was given nothing, that is, where a program's function is called from Python.

    Args:
        path: a folder (the file is `operative_config.gin` in it) or a file (`<path>.gin`).
    """
    settings = text()
    if settings is None:
        return
    output = files.path_of(path)
    files.write_text(_file_of(output, output.is_dir()), settings)


def _file_of(output: Any, is_folder: bool) -> Any:
    """Where the settings go, as a path of the same kind."""
    return output / "operative_config.gin" if is_folder else output.with_name(f"{output.name}.gin")


def given() -> str | None:
    """What gin was given, without defaults: the same however much of the work was done before.

    None where it was given nothing.
    """
    return gin.config_str() or None


def text() -> str | None:
    """What `write` writes; None where gin was given nothing."""
    if given() is None:
        return None
    # gin prints either what was set or what was used; only both together repeat the run, and gin
    # has no public function for that.
    merged = {key: dict(values) for key, values in gin_config._CONFIG.items()}
    with gin_config._OPERATIVE_CONFIG_LOCK:
        for key, values in gin_config._OPERATIVE_CONFIG.items():
            merged[key] = {**merged.get(key, {}), **values}
    return gin_config._config_str(merged)
