"""SIGTERM: what a machine is sent before it is taken away, and a job before its time is over.

A program that is told so ends with status 75, "the same command goes on from here". Most stop where
they are: nothing is under its name before it is whole. Training finishes its update and saves
(`deferred`). A second signal changes nothing.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h, which launch/restart_loop.sh starts again


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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _has_come
    is_first, _has_come = not _has_come, True
    if is_first and not _is_deferred:
        raise Preempted("nothing is half written")


@contextlib.contextmanager
def deferred(of_all: Callable[[int], bool] | None = None) -> Iterator[Callable[[int], bool]]:
    """Around what ends by itself where it can save; gives it the question whether to.

    Args:
      of_all: Where several processes compute together: whether all of them are to stop after the
        update of this number, which each must ask of every update. Such as
        `jax.experimental.multihost_utils.reached_preemption_sync_point`.

    Raises:
      Preempted: At the end, where the signal came too late to be asked for.
    """
    global _is_deferred
    before, _is_deferred = _is_deferred, True

    def is_due(step: int) -> bool:
        return _has_come if of_all is None else of_all(step)

    try:
        yield is_due
    finally:
        _is_deferred = before
    if _has_come and not before:
        raise Preempted("what was being done is done")
