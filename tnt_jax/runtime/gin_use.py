"""What a program makes of its settings: gin takes also those of which nothing is ever made."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gin import config as gin_config

from tnt_jax.runtime.errors import UsageError

_OURS = "tnt_jax."


def check(function: Callable[..., Any], flags: Sequence[str]) -> None:
    """Refuses flags for what neither the function nor its settings, in turn, refer to.

    Those of other packages are left alone: they may ask gin for theirs by themselves.

    Args:
        function: Of the program, with its settings.
        flags: Names as in `--gin.NAME=VALUE`, such as "scope/module.Class.argument".

    Raises:
        UsageError: One would change nothing.
    """
    used = _used_by(function)
    for flag in flags:
        name = flag.rpartition("/")[2].rpartition(".")[0]
        meant = gin_config._REGISTRY.matching_selectors(name) if name else []
        if meant and all(full.startswith(_OURS) and full not in used for full in meant):
            known = sorted(n.removeprefix(_OURS) for n in used if n.startswith(_OURS))
            raise UsageError(
                f"--gin.{flag}: this run makes no {name}, so that the setting would change "
                f"nothing. What it makes: {', '.join(known)}."
            )


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
