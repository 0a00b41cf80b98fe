"""Stages of a long run: what has been done with the same settings and inputs is not done again.

A stage writes a file or a folder. Beside the outputs lies a note for each, with its settings and
fingerprints of what it read.
"""

import contextlib
import contextvars
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tnt_jax.runtime import console, files, holding, preemption, settings_json
from tnt_jax.runtime.errors import UsageError, naming_file

_running: contextvars.ContextVar[bool] = contextvars.ContextVar("running", default=False)
_only_done: contextvars.ContextVar[bool] = contextvars.ContextVar("only_done", default=False)

_NOT_LOCAL = "not a local file"  # named by its path alone
_NOT_THERE = "not there"
_IN_FOLDER = "OUTPUT_DIR"  # in a note, before what lies in the run's folder
# From so many bytes on a file's digest is kept for as long as the file looks the same.
_LARGE = 64 * 2**20
_PIECE = 2**20  # bytes that are read at once
_digests: dict[pathlib.Path, tuple[tuple[int, ...], str]] = {}


class NotDoneError(Exception):
    """A stage has to be run, where only what is done was asked for."""


@contextlib.contextmanager
def only_done(is_so: bool = True) -> Iterator[None]:
    """Context manager: runs nothing; a stage that is not done raises `NotDoneError`."""
    token = _only_done.set(is_so)
    try:
        yield
    finally:
        _only_done.reset(token)


def is_running() -> bool:
    """Whether what asks is called by a stage: then something else decides what comes next."""
    return _running.get()


def note_path(root: pathlib.Path, name: str) -> pathlib.Path:
    """The note of a stage of the run whose folder is `root`."""
    return root / "stages" / f"{name.replace(': ', '_').replace(', ', '_')}.json"


def describe(
    function: Callable[..., Any],
    settings: Mapping[str, Any],
    paths: Sequence[str],
    version: str = "",
) -> dict[str, Any]:
    """What a stage is made of, a JSON value: two that are equal make the same.

    Args:
      function: That makes it.
      settings: Arguments.
      paths: Files (or globs) and directories that it depends on.
      version: For what the settings do not show.
    """
    return {
        "function": settings_json.describe(function),
        "settings": settings_json.describe(dict(settings)),
        "version": version,
        "inputs": {path: fingerprint(path) for path in paths},
    }


class Stages:
    """Runs stages, and remembers with what settings and inputs each one was run."""

    def __init__(self, root: pathlib.Path):
        self._root = root
        self._said: set[str] = set()  # each once: arms share stages

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        output: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        output_name: str = "output",
        also_depends_on: Sequence[str] = (),
        version: str = "",
        goes_on: bool = False,
        earlier_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Calls `function(output_name=output, **inputs, **settings)` unless that has been done.

        Args:
          name: Name of the stage.
          function: Writes `output`, a file or a directory.
          output: Its path.
          inputs: Files (or globs) and directories that it reads, by argument.
          settings: Its other arguments.
          output_name: The argument that takes `output`.
          also_depends_on: Further files whose change makes it run again.
          version: A text whose change makes it run again, for what the settings do not show.
          goes_on: Whether `function` goes on from what it finds in `output`, a directory. So what
            other settings left there is deleted first.
          earlier_settings: The settings of an earlier, shorter run whose output `function` may go
            on from; None if there is none.

        Raises:
          UsageError: There is something to go on from, and it is not known what made it; or another
            process has taken over what this one holds.
          NotDoneError: It has to be run, and `only_done` forbids it.
        """
        preemption.check()
        holding.check()
        note = note_path(self._root, name)
        paths = (*inputs.values(), *also_depends_on)
        described = self._placed(describe(function, settings, paths, version))
        before: dict[str, Any] = {}
        # A note that is there and may not be read is none that is missing: that ends the run.
        with contextlib.suppress(FileNotFoundError):
            before = _read(note)
        made_of = self._placed(before.get("described"))
        _take_over(made_of, described)
        is_same = made_of == described
        is_there = pathlib.Path(output).exists()
        if is_same and before.get("done") and is_there:
            if name not in self._said and not _only_done.get():
                console.log(f"[{self._number_of(name)}] {name}: done before, kept.")
            return
        if _only_done.get():
            raise NotDoneError(name)
        is_leg = earlier_settings is not None and made_of == {
            **described,
            "settings": self._placed(settings_json.describe(dict(earlier_settings))),
        }
        if goes_on and not is_same and not is_leg and is_there:
            if not before:
                raise UsageError(
                    f"{name}: expected nothing, or what this run made, in {output}; found "
                    f"files, and no {note}. Set another OUTPUT_DIR, or delete the folder."
                )
            if changed := _difference(made_of, described):
                console.log(f"{name}: made anew, for {', '.join(changed)} changed.")
            # Fits no settings: what an interruption leaves is not whole, nor to go on from.
            files.write_json(str(note), {"described": None, "done": False})
            shutil.rmtree(output)
        console.log(f"[{self._number_of(name)}] {name}")
        is_gone_on_from = goes_on and (is_same or is_leg) and is_there
        spent = before.get("seconds") if is_gone_on_from else None
        spent = spent if isinstance(spent, float) else 0.0
        with _noted(note, described, spent):
            function(**{output_name: output}, **inputs, **settings)
        preemption.check()

    def _placed(self, value: Any) -> Any:
        """A JSON value in which the paths below the run's folder do not say where that lies.

        So what was done counts after the folder is moved, and however its path is written.
        """
        return _replaced(json.loads(json.dumps(value)), os.path.abspath(self._root))  # noqa: PTH100

    def _number_of(self, name: str) -> int:
        self._said.add(name)
        return len(self._said)

    def seconds(self, name: str) -> float | None:
        """How long a stage took, if it is done; what was stopped and went on, in all."""
        with contextlib.suppress(FileNotFoundError):
            found = _read(note_path(self._root, name))
            seconds = found.get("seconds") if found.get("done") else None
            return seconds if isinstance(seconds, float) else None
        return None


def _replaced(value: Any, root: str) -> Any:
    """A JSON value with the paths of its texts and keys below a folder as paths in it."""
    if isinstance(value, dict):
        return {_replaced(key, root): _replaced(of, root) for key, of in value.items()}
    if isinstance(value, list):
        return [_replaced(of, root) for of in value]
    if not isinstance(value, str) or os.sep not in value or files.is_remote(value):
        return value
    path = os.path.abspath(value)  # noqa: PTH100 (links stay)
    return _IN_FOLDER + path[len(root) :] if f"{path}{os.sep}".startswith(root + os.sep) else value


def _difference(before: Any, now: Mapping[str, Any]) -> list[str]:
    """Which settings and inputs changed; none where the note does not say what they were."""
    found = []
    for part in ("settings", "inputs"):
        noted = before.get(part) if isinstance(before, dict) else None
        if isinstance(noted, dict):
            names = sorted({*noted, *now[part]})
            found += [f"{part}: {name}" for name in names if noted.get(name) != now[part].get(name)]
    return found


def _take_over(noted: Any, described: dict[str, Any]) -> None:
    """Makes what a stage is made of comparable with a note of 0.2.0.

    That version knew what a stage read in an object store by its path alone. So a path is enough
    here, too, and what was made then is not made again.
    """
    read = noted.get("inputs") if isinstance(noted, dict) else None
    if isinstance(read, dict):
        for path in described["inputs"]:
            if files.is_remote(path) and read.get(path) == _NOT_LOCAL:
                described["inputs"][path] = _NOT_LOCAL


def _read(note: pathlib.Path) -> dict[str, Any]:
    """What a note says; nothing where it is damaged."""
    with contextlib.suppress(ValueError, RecursionError), naming_file(note):
        found = json.loads(note.read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


@contextlib.contextmanager
def _noted(note: pathlib.Path, described: Mapping[str, Any], spent: float) -> Iterator[None]:
    """Context manager of a stage: writes whether it is done, and its seconds plus those `spent`."""

    def write(is_done: bool) -> None:
        seconds = round(spent + time.monotonic() - began, 1)
        files.write_json(str(note), {"described": described, "done": is_done, "seconds": seconds})

    began = time.monotonic()
    write(False)
    token = _running.set(True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # what stopped it is worth more
            write(False)
        raise
    finally:
        _running.reset(token)
    write(True)


def fingerprint(path: str) -> str:
    """Changes when the file, a file in the folder, or one that the pattern matches, does.

    Hidden files in a folder do not count: desktops and downloads write such.
    """
    if files.is_remote(path):
        return _remote_fingerprint(path)
    found = pathlib.Path(path)
    if found.is_dir():
        paths = map(pathlib.Path, files.files_below(found))
        inside = [file for file in paths if file.is_file()]  # no link that leads nowhere
        inside = [f for f in inside if not any(p[0] == "." for p in f.relative_to(found).parts)]
        stats = [(str(file.relative_to(found)), file.stat()) for file in inside]
        described = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return _digest(repr(described).encode())
    if found.is_file():
        return _digest_of_file(found)
    try:
        inside = files.matching_files(found)
    except UsageError:  # the name of a model of Hugging Face's, say
        return _NOT_LOCAL
    contents = [(str(file), _digest_of_file(file)) for file in inside]
    return _digest(repr(contents).encode())


def _remote_fingerprint(path: str) -> str:
    """`fingerprint` of a file, a folder or a pattern in an object store."""
    found = files.path_of(path)
    if found.is_dir():
        stats = [(os.fspath(file), file.stat()) for file in sorted(_files_in(found))]
        return _digest(repr([(name, stat.length, stat.mtime) for name, stat in stats]).encode())
    try:
        matching = files.matching_files(path)
    except UsageError:
        return _NOT_THERE
    return _digest(repr([(str(file), _digest_of_file(file)) for file in matching]).encode())


def _files_in(folder: Any) -> Iterator[Any]:
    """What is not hidden below a folder of an object store, for which `glob` takes no "**"."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_in(path)
        else:
            yield path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest_of_file(path: Any) -> str:
    """`_digest` of a file, local or in an object store, which may be a model of many gigabytes."""
    stat = path.stat() if isinstance(path, pathlib.Path) else None
    if stat is None or stat.st_size < _LARGE:
        return _read_digest(path)
    known = _digests.get(path)
    is_same = stat.st_ino, stat.st_size, stat.st_mtime_ns
    if known is None or known[0] != is_same:
        known = _digests[path] = (is_same, _read_digest(path))
    return known[1]


def _read_digest(path: Any) -> str:
    # In pieces, not by `hashlib.file_digest`: TensorFlow's files, for a bucket, are none for that.
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            hashed.update(piece)
    return hashed.hexdigest()[:16]
