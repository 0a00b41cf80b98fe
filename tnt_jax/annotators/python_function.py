"""Marks what a function says: the user's own, or of a package, named as "module:function"."""

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import pathlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from tnt_jax.annotators.interface import Annotation, checked_spans
from tnt_jax.data.records import Record
from tnt_jax.runtime.errors import UsageError

_SETTING = "PythonFunction.function"


@dataclass(frozen=True, kw_only=True)
class PythonFunction:
    """Marks what a function of the user's says.

    Attributes:
      function: "module:function": from (inputs, targets) to an iterable of (start, end) pairs,
        (start, end, strength) triples or `annotators.Span` objects, in any order; those that
        overlap become one. Numbers and rows may be NumPy's. It must give the same for the same
        texts.

    Raises:
      UsageError: there is no such function, or it gives something else.
    """

    function: str

    def __post_init__(self):
        _ = self.description

    @cached_property
    def description(self) -> str:
        """Name, function, and the version of its code."""
        return f"PythonFunction({identity(self.function, _SETTING)})"

    def annotate(self, record: Record) -> Annotation:
        """What the function marks."""
        function = find(self.function, _SETTING)
        found = function(record.inputs, record.targets)
        if not isinstance(found, Iterable):
            raise UsageError(
                f"{_SETTING}: expected {self.function} to give (start, end) pairs or Span "
                f"objects for record {record.id!r}, found {found!r}."
            )
        return Annotation(spans=checked_spans(found, record, f"{_SETTING}: {self.function}"))

    def everywhere(self) -> None:
        """Nothing: the function marks places."""


@cache
def find(name: str, setting: str) -> Callable:
    """Imports the function.

    Args:
      name: such as "my_marks:capitals"; the module lies in the working directory, on PYTHONPATH or
        in an installed package.
      setting: that holds the name, for messages.

    Raises:
      UsageError: the name has another form, or there is no such module or function in it.
    """
    module_name, _, function_name = name.partition(":")
    names = [*module_name.split("."), function_name]
    if not all(part.isidentifier() for part in names):
        raise UsageError(f'{setting}: expected "module:function", found {name!r}.')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and itself misses another
        raise UsageError(
            f"{setting}: no module {module_name!r}. It must lie in the working directory or on "
            "PYTHONPATH, or be installed with pip."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(
            f"{setting}: expected a function {function_name!r} in module {module_name!r}, which "
            f"has {', '.join(names) or 'none'}."
        )
    return function


@cache
def identity(name: str, setting: str) -> str:
    """The name with what tells one version of its code from the next.

    That is the version of the package that the module belongs to. For a module that belongs to
    none, or lies where it is edited (`pip install -e`), it is a digest of its file and of the
    modules in its folder that it imports.
    """
    find(name, setting)
    module_name = name.partition(":")[0]
    top_level = module_name.partition(".")[0]
    distributions = importlib.metadata.packages_distributions().get(top_level)
    file = getattr(sys.modules[module_name], "__file__", None)
    if distributions:
        package = importlib.metadata.distribution(distributions[0])
        if file is None or _is_copied(package, pathlib.Path(file)):
            return f"{name} {distributions[0]}=={package.version}"
    if file is None:
        return name
    contents = [path.read_bytes() for path in _sources(module_name, pathlib.Path(file))]
    return f"{name} {hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"


def _sources(module_name: str, file: pathlib.Path) -> list[pathlib.Path]:
    """A module's file, and those of the modules in its folder or below that it imports.

    Import statements are read, so what a function imports when it is called counts as well. What is
    installed in a virtual environment there does not.
    """
    found, left = {file}, [(module_name, file)]
    while left:
        for name in _imported(*left.pop()):
            spec = _spec(name)
            other = pathlib.Path((spec and spec.origin) or "")
            is_installed = not {"site-packages", "dist-packages"}.isdisjoint(other.parts)
            if file.parent in other.parents and not is_installed and other not in found:
                found.add(other)
                left.append((name, other))
    return [file, *sorted(found - {file})]


def _imported(module_name: str, file: pathlib.Path) -> set[str]:
    """What the import statements of a module may name: modules, and what is in them."""
    spec, names = _spec(module_name), set()
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (SyntaxError, ValueError):  # no source, such as a library in C
        return names
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            if node.level:
                base = importlib.util.resolve_name(base, spec.parent if spec else None)
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
    return names


def _spec(name: str) -> importlib.machinery.ModuleSpec | None:
    """Where a module comes from; None where there is none, or nobody knows."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _is_copied(package: importlib.metadata.Distribution, file: pathlib.Path) -> bool:
    """Whether pip put the file there: one that lies elsewhere changes without a new version."""
    if package.read_text("RECORD") is None:
        return False
    return any(pathlib.Path(str(package.locate_file(path))) == file for path in package.files or ())
