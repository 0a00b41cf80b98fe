"""Files and folders: finding, checking and replacing them, and the JSON in them.

A path is local, or in a bucket (`gs://`): whatever `etils.epath` opens.
"""

import atexit
import contextlib
import glob
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import msgspec
from etils import epath

from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

# ----------------------------------------------------------------------------------- Paths


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store (gs://), which `pathlib` takes for a local folder."""
    return "://" in os.fspath(path)


def path_of(path: str | os.PathLike) -> Any:
    """The path as `pathlib.Path`, or, in an object store, as `epath.Path`, which can as much."""
    return epath.Path(path) if is_remote(path) else pathlib.Path(path)


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path from the root, without `~`; one in an object store as it is.

    (`epath.Path.absolute` takes gs://a for a folder "gs:" here.)
    """
    found = epath.Path(path).expanduser()
    return found if is_remote(path) else found.absolute()


def size_of(path: str | os.PathLike) -> int:
    """Bytes of a file.

    `epath` would look up the name of its owner as well, and fails where the owner has none: in a
    container, on a shared disk.
    """
    return epath.Path(path).stat().length if is_remote(path) else pathlib.Path(path).stat().st_size


def files_below(folder: str | os.PathLike) -> list[str]:
    """The files in a local folder and in the folders in it, sorted.

    Raises:
        OSError: the system does not let it be read. (`rglob` of Python 3.12 finds nothing then.)
    """

    def refuse(error: OSError) -> NoReturn:
        raise error

    return sorted(
        os.path.join(place, name)  # noqa: PTH118 (there may be many)
        for place, _, names in os.walk(folder, onerror=refuse)
        for name in names
    )


SETS_ENDING = ".sets.jsonl"  # of the table that may lie beside records: `data.negative_sets`


def matching_files(path: str | os.PathLike) -> list[Any]:
    """The file `path`, or the files that match it as a glob pattern, sorted; each by `path_of`.

    A pattern leaves out the tables beside records, which those who read records find by themselves.

    Raises:
        UsageError: there is none.
    """
    files, num_tables = [path_of(path)], 0
    if not files[0].is_file():
        # Path.glob takes no absolute pattern.
        if is_remote(path):
            store, _, rest = os.fspath(path).partition("://")
            bucket, _, pattern = rest.partition("/")
            names = map(os.fspath, epath.Path(f"{store}://{bucket}").glob(pattern))
        else:
            names = glob.glob(os.fspath(path), recursive=True)  # noqa: PTH207
        found = [file for file in map(path_of, sorted(names)) if file.is_file()]
        files = [file for file in found if not file.name.endswith(SETS_ENDING)]
        num_tables = len(found) - len(files)
    if not files:
        left_out = f" (names that end in {SETS_ENDING} do not count: annotate's tables have them)"
        raise UsageError(
            f"{path}: no such file, and no file matches it as a pattern"
            f"{left_out if num_tables else ''}."
        )
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
    if not is_remote(path) and (reason := _unwritable(pathlib.Path(path) / "any")):
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


def temporary_folder(of: str) -> pathlib.Path:
    """Makes a folder on this machine that is deleted when the process ends; `of` is in its name."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"tnt_jax-{of}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def version_of(path: epath.Path) -> tuple[int, int]:
    """Size and time of change of a file: they differ when its content changes."""
    if is_remote(path):
        found = path.stat()
        return found.length, found.mtime
    status = os.stat(path)  # noqa: PTH116 (epath would look up the owner's name as well)
    return status.st_size, status.st_mtime_ns


def versions_of(pattern: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """The `version_of` each file of a pattern, by its path."""
    return {os.fspath(file): version_of(epath.Path(file)) for file in matching_files(pattern)}


def new_folder_beside(folder: epath.Path) -> epath.Path:
    """Makes an empty folder for what will be renamed to `folder`, which this process holds.

    What runs that were killed have left of theirs is deleted: whole models, it may be.
    """
    ours = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.iterdir():
        if ours.fullmatch(left.name) and left.is_dir():
            left.rmtree()
    unfinished = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.unfinished"
    unfinished.mkdir()
    return unfinished


def _beside(path: pathlib.Path) -> pathlib.Path:
    # Not the process id: on two hosts that share a folder it may be the same.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")


# ----------------------------------------------------------------------------------- JSON text


def json_text(value: Any) -> str:
    """A JSON value as the text of a file of settings, which other programs read as well.

    Raises:
        ValueError: a number in it is not finite. (`as_json`, for results, writes null instead.)
    """
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def not_finite(value: Any) -> tuple[str, float | None]:
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
            name, _ = not_finite(json.loads(line.decode("utf-8-sig")))
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
        bad = (name for name, v in fields if not is_text(json.dumps(v, ensure_ascii=False)))
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


_DEEPEST = 100  # of lists and objects within each other; no format of ours has ten


def check_depth(content: bytes, value: Any) -> None:
    """Raises a RecursionError for JSON, as it is written and as a value, that is nested deeper.

    Python reads more than it can write or print again: how much depends on who asks.
    """
    if not _may_be_deep(content):
        return
    level = [value]
    for _ in range(_DEEPEST):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [child for part in parts for child in part if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError("nested too deeply")


def _may_be_deep(content: bytes) -> bool:
    return content.count(b"[") + content.count(b"{") > _DEEPEST


# With an exponent of three digits, or so many digits that one of two would be too large. What it
# looks like is found much more quickly where all digits are 0.
_LARGE_NUMBER = re.compile(rb"[\s:,\[]-?(?:[0-9][0-9.]*[eE]\+?[0-9]{3}|[0-9]{200})")
_DIGITS_AS_0 = bytes.maketrans(b"123456789E", b"000000000e")
_MANY_DIGITS = b"0" * 200


def may_be_refused(content: bytes) -> bool:
    """Whether JSON that a quicker decoder takes may be what `parse_line` refuses.

    That one may skip what nobody asks for: numbers that are too large, lists in lists.
    """
    if _may_be_deep(content):
        return True
    shape = content.translate(_DIGITS_AS_0)
    if b"0e000" in shape or b"0e+000" in shape or _MANY_DIGITS in shape:
        return _LARGE_NUMBER.search(content) is not None
    return False


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # a half of a pair, as JSON spells it


def has_half_pairs(content: bytes, value: Any) -> bool:
    """Whether JSON, here as it is written and as a value, spells half a surrogate pair.

    That is no Unicode text: no tokeniser takes it, and no file of UTF-8.
    """
    return bool(_SURROGATE.search(content)) and not is_text(json.dumps(value, ensure_ascii=False))


def is_text(value: Any) -> bool:
    """Whether a value is a string of Unicode text: without half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def wrong_field(error: msgspec.ValidationError) -> str:
    """The field of an object whose value, or a part of it, is of the wrong type."""
    found = re.search(r"`\$\.(\w+)", str(error))
    return found[1] if found else ""


# ----------------------------------------------------------------------------------- JSON files


MOST_BYTES = 2**28  # the largest tokenizers take a tenth of it


def read(path: str | os.PathLike, setting: str = "") -> Any:
    """The value in a file.

    Args:
        path: local, or anything that `etils.epath` opens.
        setting: that names it, for messages.

    Raises:
        UsageError: there is no such file, it is not JSON, or larger than any that is expected.
        OSError: the system does not let it be read.
    """
    file = epath.Path(path)
    try:
        size = size_of(file)
        if size > MOST_BYTES:
            reason = f"it has {size:,} bytes, and {MOST_BYTES:,} are the most"
        else:
            with naming_file(file):
                content = file.read_bytes()
            value = parse(content.decode("utf-8-sig"))
            check_depth(content, value)
            if not has_half_pairs(content, value):
                return value
            reason = "half a surrogate pair (\\ud800 to \\udfff), which is no text"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 ({error.reason} at byte {error.start})"
    except NotFiniteError as error:
        reason = f"it holds {error}"
    except ValueError as error:
        reason = f"not JSON: {error}"
    except RecursionError:
        reason = "nested too deeply"
    except OSError as error:
        if system_error(error) is not None:
            raise
        reason = error.strerror or type(error).__name__
    where = f"{setting}: " if setting else ""
    raise UsageError(f"{where}expected a JSON file, found {path}: {reason}.")


def read_object(path: str | os.PathLike, setting: str = "") -> dict[str, Any]:
    """The object in a file; raises a UsageError also where it is another kind of value."""
    found = read(path, setting)
    if not isinstance(found, dict):
        raise UsageError(
            f"{f'{setting}: ' if setting else ''}{path}: expected a JSON object, found "
            f"{type(found).__name__}."
        )
    return found


def check_types(
    found: Mapping[str, Any], kinds_of: Mapping[str, tuple[type, ...]], where: str = ""
) -> None:
    """Raises a UsageError for a value of an object that is of none of its types.

    Args:
        found: the object; what it does not have, or has as null, is not missed.
        kinds_of: by the names of values, their types.
        where: the object comes from, for the message.
    """
    for key, kinds in kinds_of.items():
        value = found.get(key)
        if value is not None and type(value) not in kinds:  # True is an int as well
            names = " or ".join(kind.__name__ for kind in kinds)
            place = f"{where}: {key}" if where else key
            raise UsageError(f"{place}: expected {names}, found {value!r:.60}.")


# ----------------------------------------------------------------------------------- Writing


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file or none: it appears under its name only when it is complete.

    Of several processes of a run the first one writes, and the others do nothing.
    """
    if not console.is_first_process():
        return
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, as `as_json` makes it, and as `write_text` does."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text. A number that is not finite becomes null: JSON has no NaN, and no infinity."""
    return json.dumps(_with_null(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(part) for part in value]
    return value
