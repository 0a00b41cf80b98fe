"""How a program (`python -m tnt_jax.train` and the others) starts.

A program is a module with a docstring, which `--help` prints, and one function of keyword-only
arguments, which gin binds. The module ends with

    if __name__ == "__main__":
        program.run("tnt_jax.train", "train")

Settings that cannot work are found before anything heavy is imported: the gin files are read once
as text (`_Settings`), and only then by gin, which imports what they name.
"""

import argparse
import ast
import copy
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import logging
import os
import pathlib
import re
import sys
import tokenize
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import absl.logging
import gin
from gin import config as gin_config
from gin import config_parser

from tnt_jax import failures, gin_types, preemption, processes, quiet_tensorflow
from tnt_jax.errors import UsageError

# Where gin_configs is: beside the package in a clone, in it when it was installed from a wheel.
_PACKAGE = pathlib.Path(__file__).parent
_ROOT = _PACKAGE if (_PACKAGE / "gin_configs").is_dir() else _PACKAGE.parent
_GIN_CONFIGS = _ROOT / "gin_configs"

# ---------------------------------------------------------------------------------------------
# A program's output is its own: libraries speak from warnings on.
# ---------------------------------------------------------------------------------------------

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# It only reads data, and would claim a GPU's whole memory.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
absl.logging.set_verbosity(absl.logging.WARNING)

quiet_tensorflow.install()


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def _is_not_said_twice(record: logging.LogRecord) -> bool:
    """Orbax logs what its threads raise, with tracebacks of pages; `run` says it in a line."""
    is_orbaxs = bool(record.exc_info) and "orbax" in record.pathname
    return not (is_orbaxs or record.name == "asyncio")


@functools.cache  # once for a process
def _drop_reads_left_alone() -> None:
    """Orbax gathers its reads, and leaves the others where one fails.

    Whenever Python comes upon them, to its very end, pages of tracebacks would bury the message.
    """
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def run(
    module_name: str,
    function_name: str,
    arguments: Sequence[str] | None = None,
    *,
    flags: Sequence[str] = (),
    needs_all: bool = True,
    processes_run: processes.Kind = processes.Kind.ALONE,
) -> NoReturn:
    """Runs a program with its command line, and exits.

    Exit status 0: done. 2, with one line on stderr: something that the user can mend (a
    `UsageError`, a setting that gin refuses, a path that does not work, a full disk, too little
    memory). 75: stopped by SIGTERM, and the same command goes on (`preemption`). 130: interrupted.
    1 with one line: another process of the run is gone (`processes`). Any other exception is our
    own defect and keeps its traceback.

    Args:
        module_name: full name of the program's module, which `python -m` knows only as `__main__`:
            gin files refer to the function by its real name, so that is what is called.
        function_name: the function in it; every argument is keyword-only.
        arguments: the command line; `sys.argv[1:]` by default.
        flags: arguments of the function that are flags of their own: `--NAME=VALUE`.
        needs_all: whether every setting that the gin files require must be given.
        processes_run: how the program runs where there are several processes.
    """
    # `force`: some library has set a format of its own when it was imported.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_not_said_twice)
    _drop_reads_left_alone()
    preemption.install()
    given = sys.argv[1:] if arguments is None else arguments
    seconds = 10.0
    try:
        status, message = _outcome(
            module_name, function_name, given, flags, needs_all, processes_run
        )
    except preemption.Preempted as stopped:  # also while an error was being explained
        status = preemption.EXIT_STATUS
        message = f"stopped by SIGTERM: {stopped}. The same command goes on."
        seconds = 60.0  # all are told, and one may be compiling
    preemption.ignore()
    if message is not None:
        print(f"{_name(module_name)}: {message}", file=sys.stderr)
        _give_up_stdout()
    if status:
        processes.end(status, seconds)
    sys.exit(status)


def _outcome(
    module_name: str,
    function_name: str,
    arguments: Sequence[str],
    own_flags: Sequence[str],
    needs_all: bool,
    processes_run: processes.Kind,
) -> tuple[int, str | None]:
    """Runs a program: its exit status and last words, if there are any."""
    try:
        configured = configure(module_name, function_name, arguments, own_flags, needs_all)
        if configured is not None:
            processes.start(function_name, processes_run)
            configured()
        sys.stdout.flush()  # what is wrong with it is said now, not when Python ends
    except KeyboardInterrupt:
        return 130, "interrupted"
    except Exception as error:
        message = failures.explain(error)
        if message is not None:
            return failures.exit_status(error), f"error: {message}"
        if processes.count() == 1:
            raise
        traceback.print_exc()
        return 1, "error: a defect of this program, see above"
    return 0, None


def _name(module_name: str) -> str:
    """Of the program, for people; with which of several processes it is."""
    if processes.count() == 1:
        return module_name
    return f"{module_name} (process {processes.index()} of {processes.count()})"


def _give_up_stdout() -> None:
    """Where stdout takes nothing more, a closed pipe or a full disk, Python would try again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def configure(
    module_name: str,
    function_name: str,
    arguments: Sequence[str],
    own_flags: Sequence[str] = (),
    needs_all: bool = True,
) -> Callable[[], Any] | None:
    """All that `run` does before it calls the function: gin is given every setting, and asked.

    Args:
        module_name: as in `run`, and so are the others.
        function_name: of the program.
        arguments: the command line.
        own_flags: `flags`.
        needs_all: whether every setting that is required must be given.

    Returns:
        The function with its settings; None where help was asked for, which is then printed.

    Raises:
        UsageError: a flag, a gin file or a setting does not fit. gin raises for others.
    """
    short_name = f"{module_name.rpartition('.')[2]}.{function_name}"
    own = {f"--{name}=": f"--gin.{short_name}.{name}=" for name in own_flags}
    for flag, setting in own.items():
        arguments = [
            setting + argument.removeprefix(flag) if argument.startswith(flag) else argument
            for argument in arguments
        ]
    flags = _Flags.parse(module_name, arguments)
    folders = _gin_folders(flags.search_folders)
    if flags.help:
        print(_help(module_name, function_name, flags, folders))
        return None

    settings = _Settings(folders)
    files = [settings.add_file(name, given_by="--gin_file") for name in flags.gin_files]
    for name, value in flags.bindings:
        settings.add_binding(name, value)
    settings.check(needs_all)
    unused = settings.unused_macros()
    if unused:
        print(f"{module_name}: warning: nothing reads {_and(unused)}", file=sys.stderr)

    module = importlib.import_module(module_name)
    gin.clear_config()
    for file in files:
        parse_gin_file(file, flags.search_folders)
    imports = settings.imports_for_bindings()
    for name, value in flags.bindings:
        try:
            gin.parse_config([*imports, f"{name} = {_as_gin(value)}"])
        except Exception as error:
            if failures.explain(error) is None:
                raise
            # The place in the text that we made up tells the user nothing.
            reason = str(error).partition("\n  In bindings string")[0]
            raise UsageError(f"--gin.{name}={value}: {reason}") from None

    function = getattr(module, function_name)
    try:
        configured = gin.get_configurable(function)
    except ValueError:  # no gin file refers to it
        configured = gin.external_configurable(function, module=module_name)
    missing = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and name not in gin.get_bindings(function, resolve_references=False)
    ]
    if missing:
        raise UsageError(
            f"no gin file sets {_and(missing)}: pass a run file with --gin_file=..., or set "
            + ", ".join(f"--gin.{short_name}.{name}=..." for name in missing)
        )
    gin_types.check()
    if needs_all:
        gin.finalize()  # refuses whatever is still required
    return configured


def bound_arguments(
    function: Callable[..., Any], names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """What gin would call a function with, for some of its arguments.

    Args:
        function: of a program.
        names: of its arguments; those that gin does not bind are left out.
        optional: further ones, left out also where a setting that they need is not given.

    Raises:
        UsageError: gin binds none of them, or one is required and was not given.
    """
    try:
        bindings = gin.get_bindings(function, resolve_references=False)
    except ValueError:
        bindings = {}
    found = {}
    for name in (*names, *optional):
        if name not in bindings:
            continue
        value = copy.deepcopy(bindings[name])  # which is how gin evaluates what a value refers to
        if value is gin.REQUIRED and name in names:
            raise UsageError(f"settings are missing: no gin file and no flag sets {name}.")
        if value is not gin.REQUIRED:
            found[name] = value
    if not found:
        raise UsageError(
            f"expected the gin files of a {function.__name__} run, found none of its settings: add "
            "--gin_file=models/..., --gin_file=objectives/... and --gin_file=runs/train.gin."
        )
    return found


def parse_gin_file(
    path: str | os.PathLike, search_folders: Sequence[str | os.PathLike] = ()
) -> None:
    """Gives gin one file; `path` and what it includes are looked up as `--gin_file` is."""
    find = _Settings(_gin_folders(search_folders)).find
    # gin's own search takes a folder for a package and logs every place where it finds nothing.
    readers: Any = gin_config._FILE_READERS
    own = readers[:]
    readers[:] = [(lambda name: find(name).open(encoding="utf-8"), lambda name: True)]
    try:
        gin.parse_config_file(os.fspath(path))
    finally:
        readers[:] = own


def _gin_folders(search_folders: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
    return [pathlib.Path(), *map(pathlib.Path, search_folders), _ROOT, _GIN_CONFIGS]


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


@dataclasses.dataclass
class _Flags:
    """The command line, taken apart.

    Attributes:
        gin_files: as given, in order.
        search_folders: of `--gin_search_paths`.
        bindings: (name, value) of each `--gin.NAME=VALUE`, as given.
        help: whether `--help` was there.
        options: the text that explains the flags.
    """

    gin_files: list[str]
    search_folders: list[pathlib.Path]
    bindings: list[tuple[str, str]]
    help: bool
    options: str

    @classmethod
    def parse(cls, module_name: str, arguments: Sequence[str]) -> "_Flags":
        parser = _Parser(
            prog=f"python -m {module_name}",
            usage="%(prog)s --gin_file=FILE ... [--gin.NAME=VALUE ...]",
            add_help=False,
            allow_abbrev=False,
        )
        parser.add_argument(
            "--gin_file",
            action="append",
            default=[],
            metavar="FILE",
            help="settings; repeatable, later ones win. Looked for as given, then in "
            "--gin_search_paths, then in the project's gin_configs folder",
        )
        parser.add_argument(
            "--gin_search_paths",
            action="append",
            default=[],
            metavar="FOLDER[,FOLDER]",
            help="where else to look for gin files and what they include; repeatable",
        )
        parser.add_argument("--help", "-h", action="store_true", help="print this and exit")
        # Only for the help text: argparse cannot take a flag whose name is open.
        parser.add_argument(
            "--gin.NAME",
            metavar="VALUE",
            help="one setting: a macro of a gin file (--gin.BATCH_SIZE=32) or an argument "
            "(--gin.t5.T5Config.emb_dim=64); repeatable, wins over files. A text needs no quotes",
        )
        bindings, others = [], []
        for argument in arguments:
            if not argument.startswith("--gin."):
                others.append(argument)
                continue
            name, equals, value = argument.removeprefix("--gin.").partition("=")
            if not equals or not re.fullmatch(r"(\w+/)*\w+(\.\w+)*", name):
                raise UsageError(f"{argument}: expected --gin.NAME=VALUE")
            bindings.append((name, value))
        found = parser.parse_args(others)
        folders = [f for group in found.gin_search_paths for f in group.split(",") if f]
        return cls(
            gin_files=found.gin_file,
            search_folders=[pathlib.Path(folder) for folder in folders],
            bindings=bindings,
            help=found.help,
            options=parser.format_help(),
        )


def _help(
    module_name: str, function_name: str, flags: _Flags, folders: Sequence[pathlib.Path]
) -> str:
    """What the program does, its flags, what must be set, and an example if none was given."""
    spec = importlib.util.find_spec(module_name)
    assert spec is not None and spec.origin is not None, module_name
    # Read, not imported: help should not wait for TensorFlow.
    description = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text("utf-8"))) or ""
    parts = [description, flags.options.strip()]
    argument_prefix = f"{module_name.rpartition('.')[2]}.{function_name}."
    example = None
    for name in flags.gin_files or sorted(str(p) for p in (_GIN_CONFIGS / "runs").glob("*.gin")):
        settings = _Settings(folders)
        file = settings.add_file(name, given_by="--gin_file")
        required = settings.required()
        if not required or not (
            flags.gin_files or any(key.startswith(argument_prefix) for key in settings.values)
        ):
            continue
        shown = os.path.relpath(file, _GIN_CONFIGS) if _GIN_CONFIGS in file.parents else file
        comment = itertools.takewhile(
            lambda line: line.startswith("#"), file.read_text("utf-8").splitlines()
        )
        lines = [
            *(f"  {line.lstrip('# ')}" for line in comment),
            *(f"  --gin.{key}=..." for key in required),
        ]
        parts.append("\n".join([f"--gin_file={shown} needs:", *lines]))
        example = example or " ".join(
            [
                f"python -m {module_name} --gin_file={shown}",
                *(f"--gin.{key}=..." for key in required),
            ]
        )
    if example and "python -m" not in description:
        parts.append(f"example:\n  {example}")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------------------------------
# gin files read as text
# ---------------------------------------------------------------------------------------------

_REQUIRED = object()  # stands for %gin.REQUIRED


class _Names(config_parser.ParserDelegate):
    """Notes which macros and configurables a gin text reads, and imports nothing."""

    def __init__(self):
        self.macros: list[str] = []
        self.selectors: list[str] = []

    def macro(self, macro_name) -> Any:
        if macro_name == "gin.REQUIRED":
            return _REQUIRED
        self.macros.append(macro_name)
        return None

    def configurable_reference(self, scoped_configurable_name, evaluate) -> Any:
        self.selectors.append(scoped_configurable_name)
        return None


class _Settings:
    """The settings of some gin files and flags, so far as text tells.

    Attributes:
        values: by key ("MODEL_DIR", "t5.T5Config.emb_dim"), the last value; references are None.
    """

    def __init__(self, folders: Sequence[pathlib.Path]):
        self._folders = folders
        self.values: dict[str, Any] = {}
        self._defined: dict[str, pathlib.Path] = {}  # macro -> gin file
        self._read: dict[str, str] = {}  # macro -> who reads it
        self._flags: list[str] = []  # macros that the command line sets
        self._imports: dict[str, str] = {}  # name -> import line
        self._open_files: list[pathlib.Path] = []

    def add_file(self, name: str, *, given_by: str) -> pathlib.Path:
        """Reads a gin file and what it includes; returns where it is.

        Raises:
            UsageError: no such file, or not gin.
        """
        path = self.find(name, given_by)
        if path in self._open_files:
            raise UsageError(f"{given_by}: {path} includes itself")
        self._open_files.append(path)
        try:
            self._add_text(path.read_text("utf-8"), path)
        except SyntaxError as error:
            content = f": {error.text.strip()}" if error.text else ""
            raise UsageError(f"{path}, line {error.lineno}: {error.msg}{content}") from None
        except tokenize.TokenError as error:
            message, (line, _) = error.args
            raise UsageError(f"{path}, line {line}: {message}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: expected UTF-8 text: {error}") from None
        self._open_files.pop()
        return path

    def find(self, name: str, given_by: str = "include") -> pathlib.Path:
        """Where the gin file is that `--gin_file` or an include names.

        Raises:
            UsageError: nowhere.
        """
        candidates = [folder / name for folder in self._folders]
        for path in candidates:
            if path.is_file():
                return path
        known = [path for path, _ in self._known_files()]
        close = [path for path in known if pathlib.Path(path).name == pathlib.Path(name).name]
        close = close or difflib.get_close_matches(name, known, n=2, cutoff=0.7)
        hint = f"; did you mean {_or(close)}?" if close else ""
        looked = _and(dict.fromkeys(str(pathlib.Path.cwd() / path) for path in candidates))
        raise UsageError(f"{given_by}: no gin file {name!r}: looked for {looked}{hint}")

    def add_binding(self, name: str, value: str) -> None:
        """Adds `--gin.NAME=VALUE`.

        Raises:
            UsageError: the value looks like gin (a container, a quoted text, a reference) but is
                not.
        """
        names = _Names()
        self.values[name] = _parse_value(value, names, f"--gin.{name}={value}")
        self._note_macros(names, f"--gin.{name}")
        if "." not in name:
            self._flags.append(name)
        for selector in [name, *names.selectors] if "." in name else names.selectors:
            symbol = selector.rpartition("/")[2].partition(".")[0]
            # A module that no gin file imports: one of ours, else one such as optax.
            if symbol not in self._imports:
                if importlib.util.find_spec(f"tnt_jax.{symbol}"):
                    self._imports[symbol] = f"from tnt_jax import {symbol}"
                elif importlib.util.find_spec(symbol):
                    self._imports[symbol] = f"import {symbol}"

    def check(self, needs_all: bool = True) -> None:
        """Finds what gin would find late, or never.

        Args:
            needs_all: False leaves settings that are required and not given to whoever reads them.

        Raises:
            UsageError: a flag sets a macro that nothing reads, or one that is read has no value.
        """
        for name in self._flags:
            if name not in self._read:
                close = difflib.get_close_matches(name, self._read)
                if close:
                    hint = f"did you mean {_or(close)}?"
                elif self._read:
                    hint = f"what they read: {_and(sorted(self._read))}"
                else:
                    hint = "is a --gin_file missing?"
                raise UsageError(f"--gin.{name}: no gin file reads %{name}; {hint}")
        problems = []
        if needs_all and (required := self.required()):
            problems.append("set " + ", ".join(f"--gin.{key}=..." for key in required))
        for name in self._read:
            if name in self.values or "." in name:  # with a dot it is a constant
                continue
            problem = f"{self._read[name]} reads %{name}, which nothing sets"
            if setters := [path for path, text in self._known_files() if _sets(text, name)]:
                # An experiment is a whole run, rather than a part to add to one.
                setters.sort(key=lambda path: path.startswith("experiments"))
                problem += f": add --gin_file={setters[0]}"
                problem += f" (or one of {len(setters) - 1} others)" if setters[1:] else ""
            elif close := difflib.get_close_matches(name, self.values, n=1):
                problem += f" (did you mean %{close[0]}?)"
            problems.append(f"{problem}, or --gin.{name}=...")
        if problems:
            raise UsageError("settings are missing: " + "; ".join(problems))

    def required(self) -> list[str]:
        """Keys that are still %gin.REQUIRED; a macro only where something reads it."""
        return [
            key
            for key, value in self.values.items()
            if value is _REQUIRED and (key in self._read or key not in self._defined)
        ]

    def unused_macros(self) -> list[str]:
        """Macros that a gin file defines and nothing reads."""
        return [
            f"{name} ({path.name})"
            for name, path in self._defined.items()
            if name not in self._read
        ]

    def imports_for_bindings(self) -> list[str]:
        """Lines of gin after which the command line may use every name that the gin files use."""
        return ["from __gin__ import dynamic_registration", *self._imports.values()]

    def _known_files(self) -> Iterator[tuple[str, str]]:
        """Name, as for `--gin_file`, and text of the gin files of the search folders and ours."""
        for folder in self._folders:
            if folder not in (pathlib.Path(), _ROOT):
                for path in sorted(folder.rglob("*.gin")):
                    yield str(path.relative_to(folder)), path.read_text("utf-8", "replace")

    def _add_text(self, text: str, path: pathlib.Path) -> None:
        names = _Names()
        for statement in config_parser.ConfigParser(text, names):
            self._note_macros(names, path.name)
            if isinstance(statement, config_parser.IncludeStatement):
                self.add_file(
                    statement.filename,
                    given_by=f"{path}, line {statement.location.line_num}",
                )
            elif isinstance(statement, config_parser.ImportStatement):
                if not statement.module.startswith("__gin__."):
                    self._imports[statement.bound_name()] = statement.format()
            elif isinstance(statement, config_parser.BindingStatement):
                key = f"{statement.scope}/" if statement.scope else ""
                key += statement.selector
                if statement.arg_name:
                    key += f".{statement.arg_name}"
                else:
                    self._defined[key] = path
                self.values[key] = statement.value

    def _note_macros(self, names: _Names, reader: str) -> None:
        for name in names.macros:
            self._read.setdefault(name, reader)
        names.macros.clear()


def _sets(text: str, macro: str) -> bool:
    return (
        re.search(rf"^{re.escape(macro)}\s*=(?!\s*%gin\.REQUIRED)", text, re.MULTILINE) is not None
    )


def _parse_value(value: str, names: config_parser.ParserDelegate, flag: str) -> Any:
    """The value of a flag: a gin literal or reference, else the text itself.

    Raises:
        UsageError: it starts as gin does and is not gin.
    """
    try:
        parser = config_parser.ConfigParser(value.strip(), names)
        parsed = parser.parse_value()
        rest: Any = parser.current_token
        if rest.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            return parsed
        reason = f"unexpected {rest.string!r}"
    except (SyntaxError, tokenize.TokenError) as error:
        reason = error.args[0]
    if value.strip().startswith(tuple("\"'([{@%")):
        raise UsageError(f"{flag}: {reason}; a text that starts like this needs quotes within")
    return value


def _as_gin(value: str) -> str:
    """A flag's value as gin text: quoted, where it is a plain text."""
    names = _Names()
    is_text = _parse_value(value, names, value) is value
    return repr(value) if is_text else value.strip()


def _and(names: Iterable[str]) -> str:
    return ", ".join(names)


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
