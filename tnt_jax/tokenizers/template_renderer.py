"""Renders chat templates, which are programs that somebody else wrote, in another process.

What runs there is `template_process`; it may take no more time and memory than templates do.
"""

import datetime
import json
import os
import pathlib
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import template_process

# What rendering one prompt may take: a thousand times what templates do.
_MOST_SECONDS = 10  # of a processor
_MOST_SECONDS_WAITING = 120  # of a clock, on a machine that is busy
_MOST_BYTES = 2**29
_MOST_CHARACTERS = 2**24


class Renderer:
    """A process that renders one template; it is started when it is needed, and again if it ended.

    Threads may share it. It ends with this object, or when this process does.
    """

    def __init__(self, source: str, where: str, date: str | None):
        self._source = source
        self._where = where
        self._date = date
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of that one starts its own
        self._finalizer: Any = None

    def render(self, settings: Sequence[Mapping[str, Any]]) -> list[str]:
        """The template's texts, one for each mapping of names to values; all say the same time.

        Raises:
            UsageError: the template is wrong, refuses, or takes too much.
        """
        request = {"settings": settings, "now": self._date or datetime.datetime.now().isoformat()}
        with self._lock:
            answer = self._ask(json.dumps(request))
        if "texts" in answer:
            return answer["texts"]
        if "refusal" in answer:
            found = f"one that refuses them: {_line(answer['refusal'])}"
            advice = "Change the messages or their roles"
        else:
            found = f"one that fails: {_line(answer['error'])}"
            advice = "Give the model another template"
        raise UsageError(
            f"{self._where}: expected a chat template that renders these messages, found {found}. "
            f"{advice}."
        )

    def _ask(self, request: str) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return {"error": f"it takes more than {_MOST_SECONDS} seconds, or all memory"}
        return json.loads(line)

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        """A line of what it answers; less where it ends or the time is over before."""
        assert process.stdout is not None
        until = time.monotonic() + _MOST_SECONDS_WAITING
        parts, size = [], 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(until - time.monotonic(), 0)):
                    break
                part = os.read(process.stdout.fileno(), 2**16)
                size += len(part)
                if not part or size > _MOST_BYTES:
                    break
                parts.append(part)
        return b"".join(parts)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        process = subprocess.Popen(
            # -P: what lies beside the program is not what it imports.
            [sys.executable, "-P", str(pathlib.Path(template_process.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us: it ends when its input does
        )
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _end, process, self._owner)
        start = {
            "source": self._source,
            "bytes": _MOST_BYTES,
            "seconds": _MOST_SECONDS,
            "characters": _MOST_CHARACTERS,
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(start).encode() + b"\n")
        return process

    def close(self) -> None:
        """Ends the process; the next request starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.communicate()


def _line(text: str) -> str:
    """What somebody else wrote, as one line."""
    return json.dumps(" ".join(text.split()), ensure_ascii=False)
