"""gin files read as text: what they set, and what they lack, before gin imports what they name."""

import dataclasses
import difflib
import importlib.util
import pathlib
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gin import config_parser

from tnt_jax.runtime import operative_config
from tnt_jax.runtime.errors import UsageError

# Where gin_configs is: beside the package in a clone, in it when it was installed from a wheel.
_PACKAGE = pathlib.Path(__file__).parents[1]
ROOT = _PACKAGE if (_PACKAGE / "gin_configs").is_dir() else _PACKAGE.parent
GIN_CONFIGS = ROOT / "gin_configs"

# How a gin file begins that a program made: it may set more than the run reads.
MADE = "# What python -m tnt_jax."

_REQUIRED = object()  # stands for %gin.REQUIRED


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a setting refers to, which text alone does not tell: "@scope/module.name", or "%MACRO".

    "()" last where it is called.
    """

    text: str


class _Names(config_parser.ParserDelegate):
    """Notes which macros and configurables a gin text reads, and imports nothing."""

    def __init__(self):
        self.macros: list[str] = []
        self.selectors: list[str] = []

    def macro(self, macro_name) -> Any:
        if macro_name == "gin.REQUIRED":
            return _REQUIRED
        self.macros.append(macro_name)
        return Reference(f"%{macro_name}")

    def configurable_reference(self, scoped_configurable_name, evaluate) -> Any:
        self.selectors.append(scoped_configurable_name)
        return Reference(f"@{scoped_configurable_name}{'()' if evaluate else ''}")


class Settings:
    """The settings of some gin files and flags, so far as text tells.

    Attributes:
        values: by key ("MODEL_DIR", "t5.T5Config.emb_dim"), the last value; that of
            @module.name, or of %MACRO, is a `Reference`.
        files: all that were read.
        sources: by key, the gin file that set it last; what the command line sets has none.
    """

    def __init__(self, folders: Sequence[pathlib.Path]):
        self._folders = folders
        self.values: dict[str, Any] = {}
        self.files: list[pathlib.Path] = []
        self.sources: dict[str, pathlib.Path] = {}
        self._texts: dict[str, str] = {}  # macro -> its value and comment, as gin has it
        self._defined: dict[str, pathlib.Path] = {}  # macro -> gin file
        self._read: dict[str, str] = {}  # macro -> who reads it
        self._mentions: dict[str, tuple[list[str], list[str]]] = {}  # key -> macros, configurables
        self._referred: set[str] = set()  # configurables, by settings that were replaced as well
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
        self.files.append(path)
        try:
            self._add_text(path.read_text("utf-8-sig"), path)
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
        self.sources.pop(name, None)
        selectors = self._note(names, name, f"--gin.{name}")
        if "." not in name:
            self._flags.append(name)
        for selector in [name, *selectors] if "." in name else selectors:
            symbol = selector.rpartition("/")[2].partition(".")[0]
            # A module that no gin file imports: one of ours, else one such as optax.
            if symbol not in self._imports:
                if module := _module_of(symbol):
                    self._imports[symbol] = f"from {module} import {symbol}"
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
        problems, live = [], self._live()
        required = [key for key in self.required() if key in live]
        if needs_all and required:
            problems.append("set " + ", ".join(f"--gin.{key}=..." for key in required))
        for name in self._read:
            if name in self.values or "." in name or name not in live:  # with a dot: a constant
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

    def of_own_files(self) -> dict[str, pathlib.Path]:
        """The `sources` that are the user's: neither the project's, nor made by a program."""
        ours = GIN_CONFIGS.resolve()
        own = {
            file
            for file in self.sources.values()
            if ours not in file.resolve().parents
            and not file.read_text("utf-8-sig").startswith(MADE)
            and not operative_config.is_written(file)
        }
        return {key: file for key, file in self.sources.items() if file in own}

    def required(self) -> list[str]:
        """Keys that are still %gin.REQUIRED; a macro only where something reads it."""
        return [
            key
            for key, value in self.values.items()
            if value is _REQUIRED and (key in self._read or key not in self._defined)
        ]

    def unneeded(self) -> list[str]:
        """Keys that have no value and need none: nothing reads them any more (`_live`)."""
        live = self._live()
        keys = [key for key, value in self.values.items() if value is _REQUIRED]
        keys += [name for name in self._read if name not in self.values and "." not in name]
        return [key for key in keys if key not in live]

    def defaults(self) -> list[tuple[str, str]]:
        """The macros that something reads and that have a value; it, and the comment beside it."""
        required = self.required()
        return [
            (key, text)
            for key, text in self._texts.items()
            if key in self._read and key not in required
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
            if folder not in (pathlib.Path(), ROOT):
                for path in sorted(folder.rglob("*.gin")):
                    yield str(path.relative_to(folder)), path.read_text("utf-8", "replace")

    def _add_text(self, text: str, path: pathlib.Path) -> None:
        names = _Names()
        for statement in _statements(text, names, path):
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
                    line = text.splitlines()[statement.location.line_num - 1]
                    self._texts[key] = line.partition("=")[2].strip()
                self.values[key] = statement.value
                self.sources[key] = path
                self._note(names, key, path.name)

    def _note(self, names: _Names, key: str, reader: str) -> list[str]:
        """Notes what a setting reads; returns the configurables, scopes before them."""
        for name in names.macros:
            self._read.setdefault(name, reader)
        macros, selectors = list(names.macros), list(names.selectors)
        configurables = [selector.rpartition("/")[2] for selector in selectors]
        self._mentions[key] = macros, configurables
        self._referred.update(configurables)
        names.macros.clear()
        names.selectors.clear()
        return selectors

    def _live(self) -> set[str]:
        """Keys that something reads, macros without a value among them.

        CERTIFICATE=None replaces a setting that named @evaluate.Certificate(). No other one names
        it, so nothing reads its settings any more, nor the macros in them.
        """
        of_configurable: dict[str, list[str]] = {}
        for key in self._mentions:
            if "." in key:
                name = key.rpartition("/")[2].rpartition(".")[0]
                of_configurable.setdefault(name, []).append(key)
        # What no setting names may be the program's own function.
        found = {
            key
            for name, keys in of_configurable.items()
            if name not in self._referred
            for key in keys
        }
        reached = list(found)
        while reached:
            macros, configurables = self._mentions.get(reached.pop(), ([], []))
            named = [key for name in configurables for key in of_configurable.get(name, ())]
            new = {*macros, *named} - found
            found |= new
            reached += new
        return found


def _statements(text: str, names: _Names, path: pathlib.Path) -> Iterator[Any]:
    """What a gin text says, one statement after another.

    Raises:
        UsageError: a value is none. gin raises for other mistakes.
    """
    parser = config_parser.ConfigParser(text, names)
    while True:
        try:
            statement = parser.parse_statement()
        except _NOT_VALUES as error:
            token: Any = parser.current_token
            raise UsageError(f"{path}, line {token.start[0]}: {_why(error)}") from None
        if statement is None:
            return
        yield statement


# What gin's parser raises beside what it calls a mistake: for a list as the key of a dict, and for
# more brackets than it can follow.
_NOT_VALUES = (TypeError, RecursionError)


def _why(error: Exception) -> str:
    found = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return f"expected a value, found one that is none ({found})"


def _module_of(name: str) -> str | None:
    """The package or room in which a module, or folder of modules, has this name: it is unique."""
    for path in (f"{name}.py", f"{name}/__init__.py"):
        if (_PACKAGE / path).exists():
            return "tnt_jax"
        for found in _PACKAGE.glob(f"*/{path}"):
            return f"tnt_jax.{found.relative_to(_PACKAGE).parts[0]}"
    return None


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
    except _NOT_VALUES as error:
        reason = _why(error)
    if value.strip().startswith(tuple("\"'([{@%")):
        raise UsageError(f"{flag}: {reason}; a text that starts like this needs quotes within")
    return value


def as_gin(value: str) -> str:
    """A flag's value as gin text: quoted, where it is a plain text."""
    names = _Names()
    is_text = _parse_value(value, names, value) is value
    return repr(value) if is_text else value.strip()


def _and(names: Iterable[str]) -> str:
    return ", ".join(names)


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)
