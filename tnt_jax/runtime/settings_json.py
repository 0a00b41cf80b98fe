"""Settings as JSON, for comparing two runs: equal exactly when they ask for the same thing."""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import gin
import gin.config as gin_config
import numpy as np
from etils import epath


def describe(value: Any) -> Any:
    """A JSON value that two settings share exactly when they ask for the same thing.

    Never an address in memory, never a side effect such as calling what gin would call. Functions
    and classes come with what gin binds to them (within the scope of `@scope/name`) and with the
    variables that they close over, which is where an optax schedule keeps its numbers. The
    description of a vocabulary depends on what is in its model file and not on where that lies.
    A field of a dataclass whose metadata has "omit_default" is left out where it has its default:
    so a setting may be added, and what was described before is described alike. One with
    `compare=False` is left out always: it decides where something lies, and not what comes of it.

    Args:
        value: anything. A kind of object that this does not know is described by its class and
            attributes.
    """
    return _describe(value, ())


def _describe(value: Any, outer: tuple[int, ...]) -> Any:
    """`describe` within the values whose ids are `outer`, so that a cycle ends."""
    if isinstance(value, enum.Enum):
        return {"class": written_name(type(value)), "name": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes):
        return _digest(value)
    if inspect.ismodule(value):
        return {"module": value.__name__}
    if id(value) in outer:
        return "..."
    outer = (*outer, id(value))

    def named(values: Mapping[Any, Any]) -> dict[str, Any]:
        return {str(name): _describe(x, outer) for name, x in values.items()}

    if isinstance(value, Mapping):
        return named(value)
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        fields = {name: getattr(value, name) for name in names}
        return {"class": written_name(type(value)), **named(fields)}
    if isinstance(value, list | tuple):
        return [_describe(x, outer) for x in value]
    if isinstance(value, set | frozenset):
        return sorted((_describe(x, outer) for x in value), key=json.dumps)
    if isinstance(value, gin_config.ConfigurableReference):
        return _describe_reference(value, outer)
    if isinstance(value, functools.partial):
        call = {"args": _describe(value.args, outer), **named(value.keywords)}
        return {"partial": _describe(value.func, outer), **call}
    if inspect.isclass(value) or inspect.isroutine(value):
        return _describe_function(value, outer)
    if hasattr(value, "sentencepiece_model_file"):  # a tokeniser, ours or seqio's
        file = value.sentencepiece_model_file
        try:
            model = _digest(epath.Path(file).read_bytes())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            model = os.fspath(file)
        name = written_name(type(value))
        return {"class": name, "model": model, "extra_ids": value.extra_ids}
    if hasattr(value, "tokenizer_digest"):  # a tokeniser of a directory
        return {"class": written_name(type(value)), "model": value.tokenizer_digest}
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        for field in dataclasses.fields(value):
            omits_default = field.metadata.get("omit_default")
            if not field.compare or (omits_default and fields[field.name] == field.default):
                del fields[field.name]
        return {"class": written_name(type(value)), **named(fields)}
    if isinstance(value, np.dtype):
        return str(value)
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        array = np.asarray(value)
        if array.ndim == 0 and array.dtype.kind in "biuf":
            return _describe(array.item(), outer)
        return {
            "array": _digest(array.tobytes()),
            "shape": list(array.shape),
            "dtype": str(array.dtype),
        }
    return {"class": written_name(type(value)), **named(getattr(value, "__dict__", {}))}


def _describe_function(function: Any, outer: tuple[int, ...]) -> dict[str, Any]:
    """A function or class: its name, what gin binds to it, and what it closes over."""
    # What gin hands over is wrapped, for `@scope/name` once more, with the scope in the closure.
    scope = []
    while (call := _gin_call(function)) is not None:
        scope = _closure(call).get("scope_components", scope)
        function = function.__bases__[0] if inspect.isclass(function) else function.__wrapped__
    described = {"function": written_name(function)}
    with gin.config_scope(scope) if scope else contextlib.nullcontext():
        try:
            settings = gin.get_bindings(function, resolve_references=False)
        except ValueError:  # not known to gin
            settings = {}
        settings |= _closure(function)
        if inspect.ismethod(function):
            settings["self"] = function.__self__
        return described | {name: _describe(x, outer) for name, x in settings.items()}


def _describe_reference(reference: Any, outer: tuple[int, ...]) -> Any:
    """What stands behind `@name`, `@name()` or `%NAME`, without calling it."""
    function = reference.configurable.wrapped
    with gin.config_scope(reference.scopes) if reference.scopes else contextlib.nullcontext():
        described = _describe_function(function, outer)
    if function is gin_config.macro:
        return described.get("value")
    if function.__module__ == "gin.config":  # a constant
        return repr(reference)
    return {"call": described.pop("function"), **described} if reference.evaluate else described


def _gin_call(function: Any) -> Callable[..., Any] | None:
    """The function by which gin wrapped this function or class, if it did."""
    call = type(function).__call__ if inspect.isclass(function) else function
    is_wrapper = hasattr(call, "__wrapped__") and hasattr(call, "__code__")
    return call if is_wrapper and is_gin_code(call.__code__) else None


def _closure(function: Any) -> dict[str, Any]:
    """The variables that a function closes over, by name."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


# Modules that have moved, and where they were when notes and checkpoints first named what is in
# them. A run that was begun before the move goes on after it: to files, nothing has another name.
_WRITTEN_IN = {
    "tnt_jax.localization.": "tnt_jax.annotators.",
    "tnt_jax.tokenizers.": "tnt_jax.data.",
    **{
        f"tnt_jax.experiments.experiment_run.{name}": f"tnt_jax.experiments.experiment.{name}"
        for name in ("_write_corpus", "_train_vocabulary", "_hand_back")
    },
}


def written_name(value: Any) -> str:
    """The name of a class or a function in notes and checkpoints: with its module, as it was."""
    name = f"{value.__module__}.{value.__qualname__}"
    for now, before in _WRITTEN_IN.items():
        if name.startswith(now):
            return name.replace(now, before, 1)
    return name


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()} ({len(content)} bytes)"


def is_gin_code(code: types.CodeType) -> bool:
    """Whether a function belongs to gin itself."""
    return pathlib.Path(code.co_filename).parent == pathlib.Path(inspect.getfile(gin)).parent
