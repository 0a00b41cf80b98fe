"""What gin does not check of settings: their types, and whether the run uses them at all."""

import abc
import collections.abc
import copy
import enum
import inspect
import os
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
from gin import config as gin_config

from tnt_jax.runtime.errors import UsageError

_OURS = "tnt_jax."
_OPTAX = "optax."
_UPDATE = "tnt_jax.training.settings.Update"  # its `optimizer` is the macro OPTIMIZER

# --- Types ----------------------------------------------------------------------------------------


def check_types() -> None:
    """Compares what gin will pass with the annotations of the parameters that it is bound to.

    gin knows no types, so that `--gin.TRAIN_STEPS=1e3`, a float, would fail somewhere deep within.
    What a reference (`@...`) gives is compared as far as it says what that is.

    Raises:
        UsageError: a value is of another type.
    """
    for (_, selector), bindings in gin_config._CONFIG.items():
        parameters = _parameters(gin_config._REGISTRY[selector].wrapped)
        for name, value in bindings.items():
            value: Any
            setting = f"{_short(selector)}.{name}"
            macros: list[str] = []
            while _is_macro(value):
                setting = "/".join(value.scopes)
                if setting in macros:
                    raise UsageError(f"macros refer to each other: %{', %'.join(macros)}.")
                macros.append(setting)
                try:
                    value = gin.query_parameter(f"{setting}/gin.macro.value")
                except ValueError:  # it has none: nothing reads what it is for
                    value = gin.REQUIRED
            if name not in parameters or value is gin.REQUIRED:
                continue
            annotation, default = parameters[name].annotation, parameters[name].default
            if value is not default and not _has_type(value, annotation):
                raise UsageError(
                    f"--gin.{setting}: expected {_type_name(annotation)}, found {value!r}."
                    f"{_with_other_parentheses(value, annotation)}"
                )


def _with_other_parentheses(value: Any, annotation: Any) -> str:
    """What to write where a reference fits with parentheses, or without; else nothing."""
    if not isinstance(value, gin_config.ConfigurableReference):
        return ""
    other = copy.copy(value)
    other._evaluate = not value.evaluate
    if not _has_type(other, annotation):
        return ""
    return f" Write it {'with' if other.evaluate else 'without'} parentheses: {other!r}."


def _short(selector: str) -> str:
    """A full name as gin files and flags give it: ours without package and room."""
    return ".".join(selector.split(".")[-2:]) if selector.startswith(_OURS) else selector


def _is_macro(value: Any) -> bool:
    return (
        isinstance(value, gin_config.ConfigurableReference)
        and value.evaluate
        and value.selector == "gin.macro"
    )


def _has_type(value: Any, annotation: Any) -> bool:
    """Whether a value of gin is what an annotation says; True where that cannot be told."""
    annotation = _bare(annotation)
    if isinstance(value, gin_config.ConfigurableReference):
        parts = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        return any(_fits(value, part) for part in parts)
    if _is_union(annotation):
        return any(_has_type(value, part) for part in typing.get_args(annotation))
    expected = typing.get_origin(annotation) or annotation
    if expected in (int, float, str, bool):
        return type(value) is expected or (expected is float and type(value) is int)
    if expected in (None, type(None)):
        return value is None
    if expected in (collections.abc.Mapping, collections.abc.Sequence, tuple, list, dict):
        if isinstance(value, list | tuple) and expected in (list, tuple):
            expected = type(value)  # nobody can say which one is meant
        return (
            isinstance(value, expected)
            and not isinstance(value, str)
            and _has_elements(value, typing.get_args(annotation))
        )
    if expected is collections.abc.Callable:
        return False
    if not isinstance(expected, type) or expected in (Any, inspect.Parameter.empty):
        return True
    if isinstance(value, str):
        is_path = expected is os.PathLike or issubclass(expected, pathlib.PurePath)
        if is_path or issubclass(expected, enum.Enum | np.dtype):
            return True
    if isinstance(value, list | tuple) and issubclass(expected, collections.abc.Set | np.ndarray):
        return True  # gin has no literal for these
    try:
        return isinstance(value, expected)  # no number is a mesh, no text an array
    except TypeError:  # a protocol that cannot tell
        return True


def _has_elements(value: Any, of: Sequence[Any]) -> bool:
    """Whether the parts of a container are what its annotation says in brackets."""
    if isinstance(value, collections.abc.Mapping):
        keys, values = of if len(of) == 2 else (Any, Any)
        return all(_has_type(k, keys) and _has_type(v, values) for k, v in value.items())
    if len(of) == 1 or of[1:] == (...,):
        return all(_has_type(part, of[0]) for part in value)
    if not of:
        return True
    return len(value) == len(of) and all(map(_has_type, value, of))


def _type_name(annotation: Any) -> str:
    if _is_union(annotation):
        return " or ".join(map(_type_name, typing.get_args(annotation)))
    kind = typing.get_origin(annotation) or annotation
    names = {collections.abc.Callable: "a reference (@module.name)", types.NoneType: "None"}
    name = names.get(kind, getattr(kind, "__name__", str(kind)))
    parts = [] if name in names.values() else typing.get_args(annotation)
    if not all(isinstance(part, type) and part is not Any for part in parts):
        return name
    return f"{name}[{', '.join(map(_type_name, parts))}]" if parts else name


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _fits(reference: gin_config.ConfigurableReference, annotation: Any) -> bool:
    """Whether what a reference gives could be what one annotation says, which is no union."""
    annotation = _bare(annotation)
    kind = typing.get_origin(annotation) or annotation
    if kind is None or kind is types.NoneType:
        return False
    if kind is np.dtype:  # whatever NumPy makes one of
        return not reference.evaluate
    wrapped = None if reference.configurable is None else reference.configurable.wrapped
    is_protocol = getattr(kind, "_is_protocol", False)
    if inspect.isclass(wrapped) and (is_protocol or kind is collections.abc.Callable):
        # `@Lexicon`, the class, can be called, and `@Lexicon()` can do what it is there for.
        is_called = kind is collections.abc.Callable or _defines_call(kind)
        return not reference.evaluate or _defines_call(wrapped) if is_called else reference.evaluate
    is_open = kind in (Any, collections.abc.Callable, inspect.Parameter.empty)
    if is_open or not inspect.isclass(kind) or is_protocol or wrapped is None:
        return True
    try:
        if not reference.evaluate:  # the function or the class itself
            return isinstance(wrapped, kind)
        if inspect.isclass(wrapped):
            is_made_as_usual = type(wrapped) in (type, abc.ABCMeta)
            if not is_made_as_usual or wrapped.__new__ is not object.__new__:
                return True
        gives = wrapped if inspect.isclass(wrapped) else _return_annotation(wrapped)
        if not inspect.isclass(gives) or gives is inspect.Signature.empty:
            return True
        if issubclass(kind, gives):  # what it gives may be the narrower kind
            return True
        if hasattr(gives, "_fields") and kind in (collections.abc.Sequence, tuple):
            return False  # a named tuple is something of its own
        return issubclass(gives, (int, float) if kind is float else kind)
    except TypeError:  # a kind that cannot tell
        return True


def _defines_call(kind: type) -> bool:
    """Whether what a class makes can be called, or might be: `__new__` may make anything."""
    is_made_as_usual = kind.__new__ is object.__new__ or getattr(kind, "_is_protocol", False)
    return not is_made_as_usual or any("__call__" in vars(base) for base in kind.__mro__)


def _bare(annotation: Any) -> Any:
    """The type of an annotation, without what `Annotated` adds to it."""
    is_annotated = typing.get_origin(annotation) is typing.Annotated
    return annotation.__origin__ if is_annotated else annotation


def _return_annotation(function: Callable[..., Any]) -> Any:
    try:
        return inspect.signature(function, eval_str=True).return_annotation
    except (NameError, TypeError, ValueError):  # written for type checkers alone, or in C
        return inspect.Signature.empty


# --- Use ------------------------------------------------------------------------------------------


def check_used(function: Callable[..., Any], flags: Sequence[str]) -> None:
    """Refuses flags for what neither the function nor its settings, in turn, refer to.

    gin itself takes them. Flags for other packages are left alone: those may ask gin for theirs by
    themselves.

    Args:
        function: the program's, with its settings.
        flags: the names in `--gin.NAME=VALUE`, such as "scope/module.Class.argument".

    Raises:
        UsageError: one would change nothing.
    """
    used = _used_by(function)
    for flag in flags:
        name = flag.rpartition("/")[2].rpartition(".")[0]
        meant = gin_config._REGISTRY.matching_selectors(name) if name else []
        if meant and all(full.startswith(_OURS) and full not in used for full in meant):
            known = sorted(_short(n) for n in used if n.startswith(_OURS))
            raise UsageError(
                f"--gin.{flag}: this run makes no {name}, so that the setting would change "
                f"nothing. What it makes: {', '.join(known)}."
            )


def check_optax(
    function: Callable[..., Any], flags: Sequence[str], of_files: Mapping[str, pathlib.Path]
) -> None:
    """Refuses settings of Optax for what the run's optimizer does not refer to.

    gin takes them, and nothing asks for them: code that calls Optax by itself does not ask gin.

    Args:
        function: the program's, with its settings.
        flags: the names in `--gin.NAME=VALUE`.
        of_files: the settings of the user's own gin files, which other programs may share: they
            count where the run trains. What the project's files set for several optimizers is left
            alone.

    Raises:
        UsageError: one would change nothing.
    """
    used = _used_by(function)
    given = {name: f"--gin.{name}" for name in flags}
    if _UPDATE in used:
        given |= {name: f"{file}, {name}" for name, file in of_files.items()}
    for setting, said in given.items():
        name, _, argument = setting.rpartition("/")[2].rpartition(".")
        meant = gin_config._REGISTRY.matching_selectors(name) if name else []
        if meant and all(full.startswith(_OPTAX) and full not in used for full in meant):
            raise UsageError(
                f"{said}: this run's OPTIMIZER makes no {name}, so that the setting would change "
                f"nothing. {_in_its_place(name, argument, meant[0], used)}"
            )


def _in_its_place(name: str, argument: str, full: str, used: Collection[str]) -> str:
    """What to set instead of an argument of a function of Optax."""
    for other in used:
        if other.startswith(_OURS) and other.rpartition(".")[2] == name.rpartition(".")[2]:
            return f"Set {_short(other)}.{argument} instead."
    if "learning_rate" in _parameters(gin_config._REGISTRY[full].wrapped):
        return f"Set OPTIMIZER=@{name} as well, or leave it out."
    return f"Refer to @{name}() in LEARNING_RATE or OPTIMIZER, or leave it out."


def check_learning_rate(function: Callable[..., Any]) -> None:
    """Refuses an OPTIMIZER that takes a learning rate where nothing sets one.

    It would take its own default, whatever LEARNING_RATE is.

    Args:
        function: the program's, with its settings.

    Raises:
        UsageError: there is none.
    """
    if _UPDATE not in _used_by(function):
        return
    for (scope, name), bindings in gin_config._CONFIG.items():
        optimizer: Any = bindings.get("optimizer") if name == _UPDATE else None
        while _is_macro(optimizer):
            optimizer = gin.query_parameter(f"{'/'.join(optimizer.scopes)}/gin.macro.value")
        if not isinstance(optimizer, gin_config.ConfigurableReference):
            continue
        assert optimizer.configurable is not None, "all that is referred to is imported by now"
        made = optimizer.configurable.wrapped
        with gin.config_scope([*filter(None, scope.split("/")), *optimizer.scopes]):
            bound = gin.get_bindings(made, resolve_references=False)
        if "learning_rate" in _parameters(made) and "learning_rate" not in bound:
            full = optimizer.scoped_selector
            raise UsageError(
                f"OPTIMIZER: expected one whose learning_rate is set, found @{full}, whose own "
                "default would be taken, whatever LEARNING_RATE is. Set "
                f"--gin.{full}.learning_rate=%LEARNING_RATE, or to a rate."
            )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function takes; nothing where it is written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _used_by(function: Callable[..., Any]) -> set[str]:
    """Full names of all that gin may make for a function, the function among them."""
    waiting = [name for name, entry in gin_config._REGISTRY.items() if entry.wrapped is function]
    found: set[str] = set()
    values: dict[str, list[Any]] = {}
    for (scope, name), bindings in gin_config._CONFIG.items():
        # Of macros each one by itself; scopes of others do not matter here.
        key = f"{scope}/{name}" if name == "gin.macro" else name
        values.setdefault(key, []).extend(bindings.values())
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for value in values.get(name, ()):
                waiting += _referred_to(value)
    return found


def _referred_to(value: Any) -> Iterator[str]:
    if isinstance(value, gin_config.ConfigurableReference):
        scope, name = value.config_key
        yield f"{scope}/{name}" if name == "gin.macro" else name
    elif isinstance(value, dict):
        for part in (*value.keys(), *value.values()):
            yield from _referred_to(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _referred_to(part)
