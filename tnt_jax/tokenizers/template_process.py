"""A process that renders one chat template and can do nothing else; `chat` starts it.

A template comes with a model, from somebody whom nobody checked. jinja2's sandbox keeps it from
Python's objects, but not from taking all memory (`"a" * 10**10`) or time. So it is rendered in a
process of its own, which the system gives so much memory and time and no file, and which `chat`
ends when it does not answer. Lines of JSON come on standard input and go to standard output: first
the template and its limits, then one request after another.
"""

import contextlib
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # not a Unix: the sandbox alone
    resource = None


class _Refusal(Exception):
    """What a template says with `raise_exception`."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which trainers find replies: what is within is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Any) -> Any:
        """Leaves the two tags out."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What templates of the Hugging Face hub expect to be there."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes that HTML would need."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _limit(limits: Mapping[str, int]) -> None:
    """No further file or process, so much memory."""
    if resource is None:
        return
    for kind, most in (
        ("RLIMIT_AS", limits["bytes"]),
        ("RLIMIT_NOFILE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_CORE", 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system has all
            resource.setrlimit(getattr(resource, kind), (most, most))


def _limit_time(seconds: int) -> None:
    """So much time from now on; who takes more is ended by the system."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + seconds + 1, hard))


def _render(
    template: jinja2.Template, settings: Mapping[str, Any], now: str, most_characters: int
) -> str:
    def strftime_now(form: str) -> str:
        return datetime.datetime.fromisoformat(now).strftime(form)

    parts, length = [], 0
    for part in template.generate(**settings, strftime_now=strftime_now):
        length += len(part)
        if length > most_characters:
            raise _Refusal(f"more than {most_characters:,} characters")
        parts.append(part)
    return "".join(parts)


def _answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    environment = _environment()
    # What is imported when it is first used, while there still are files; so is what says errors.
    for source in (r"{{ ['\n'] | tojson }}{{ [1] | pprint }}", "{{ none.none }}", "{% for %}"):
        with contextlib.suppress(jinja2.TemplateError):
            environment.from_string(source).render()
    start = json.loads(next(lines))
    _limit(start)
    template = None
    for line in lines:
        request = json.loads(line)
        _limit_time(start["seconds"])
        try:
            template = template or environment.from_string(start["source"])
            texts = [
                _render(template, one, request["now"], start["characters"])
                for one in request["settings"]
            ]
        except _Refusal as refusal:
            yield {"refusal": str(refusal)[:300]}
        except MemoryError:
            yield {"error": f"it takes more than {start['bytes'] // 2**20:,} MiB"}
        except Exception as error:  # whatever a template can do
            yield {"error": f"{type(error).__name__}: {error}"[:300]}
        else:
            yield {"texts": texts}


def _main() -> None:
    for answer in _answers(iter(sys.stdin)):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
