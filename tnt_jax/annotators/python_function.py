"""Functions of the user's own, or of a package, that a setting names as "module:function"."""

import hashlib
import importlib
import importlib.metadata
import pathlib
import sys
from collections.abc import Callable
from functools import cache

from tnt_jax.runtime.errors import UsageError


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

    That is the version of the package that the module belongs to; for a module that belongs to
    none, a digest of its file.
    """
    find(name, setting)
    module_name = name.partition(":")[0]
    top_level = module_name.partition(".")[0]
    distributions = importlib.metadata.packages_distributions().get(top_level)
    if distributions:
        return f"{name} {distributions[0]}=={importlib.metadata.version(distributions[0])}"
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        return name
    return f"{name} {hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()[:12]}"
