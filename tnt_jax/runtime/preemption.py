"""SIGTERM: what a machine is sent before it is taken away, and a job before its time is over.

A program that is told so ends with status 75, "the same command goes on". Most stop where they are:
nothing is under its name before it is whole. Training finishes its update and saves (`deferred`). A
second signal changes nothing.
"""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h, which launch/restart_loop.sh starts again
_AGAIN = 0.02  # seconds


class Preempted(BaseException):
    """The program has to end, and nothing is wrong.

    No `Exception`, as `KeyboardInterrupt` is none: nobody on the way takes it for an error.
    """


_has_come = False
_is_deferred = False


def install() -> None:
    """Answers SIGTERM from here on, in a program's main thread; elsewhere nobody can."""
    global _has_come
    _has_come = False
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGALRM, _on_alarm)
    _raise_again()


def ignore() -> None:
    """Ignores SIGTERM from here on: the program is ending."""
    if threading.current_thread() is threading.main_thread():
        # No SIG_IGN: programs that are started from here would inherit it.
        signal.signal(signal.SIGTERM, _no_answer)
        signal.signal(signal.SIGALRM, _no_answer)


def _no_answer(number: int, frame: FrameType | None) -> None:
    pass


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _has_come
    is_first, _has_come = not _has_come, True
    if is_first and not _is_deferred:
        raise Preempted("nothing is half written")


def _on_alarm(number: int, frame: FrameType | None) -> None:
    if not _is_deferred:
        raise Preempted("nothing is half written")


@functools.cache  # once for a process
def _raise_again() -> None:
    """What is raised goes nowhere in `__del__` and in callbacks of the garbage collector.

    A signal is answered wherever Python is, and JAX has such a callback.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Preempted):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        else:
            before(unraisable)

    sys.unraisablehook = hook


def check(message: str = "what was begun is done") -> None:
    """To be called between two things of which each is whole.

    Args:
      message: What can be said of the work.

    Raises:
      Preempted: A signal came while `deferred`, and nothing has answered it.
    """
    if _has_come and not _is_deferred:
        raise Preempted(message)


@contextlib.contextmanager
def deferred(of_all: Callable[[int], bool] | None = None) -> Iterator[Callable[[int], bool]]:
    """Context manager that defers SIGTERM. Yields `is_due(step)`.

    The loop saves and stops when `is_due(step)` returns True. A signal after the last call is left
    to the next `check`.

    Args:
      of_all: For several processes that compute together: returns whether all of them stop after
        an update. Every process must call it for every update. For example
        `jax.experimental.multihost_utils.reached_preemption_sync_point`.
    """
    global _is_deferred
    before, _is_deferred = _is_deferred, True

    def is_due(step: int) -> bool:
        return _has_come if of_all is None else of_all(step)

    try:
        yield is_due
    finally:
        _is_deferred = before
