"""Marks what a function says: the user's own, or of a package, named as "module:function"."""

import hashlib
import importlib
import importlib.metadata
import pathlib
import sys
import types
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
    none, or lies where it is edited (`pip install -e`), it is a digest of its file, and of those of
    the modules in its folder that it uses.
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
    contents = [path.read_bytes() for path in _read_with(sys.modules[module_name])]
    return f"{name} {hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"


def _read_with(module: types.ModuleType) -> list[pathlib.Path]:
    """The file of a module, and those in its folder, or below, of modules whose names it has."""
    first = pathlib.Path(str(module.__file__))
    found, left = {first}, [module]
    while left:
        for value in vars(left.pop()).values():
            used = value if isinstance(value, types.ModuleType) else None
            used = used or sys.modules.get(getattr(value, "__module__", None) or "")
            file = pathlib.Path(getattr(used, "__file__", None) or "")
            if used is not None and first.parent in file.parents and file not in found:
                found.add(file)
                left.append(used)
    return [first, *sorted(found - {first})]


def _is_copied(package: importlib.metadata.Distribution, file: pathlib.Path) -> bool:
    """Whether pip put the file there: one that lies elsewhere changes without a new version."""
    if package.read_text("RECORD") is None:
        return False
    return any(pathlib.Path(str(package.locate_file(path))) == file for path in package.files or ())
