"""The exceptions that are no defect of ours, and what the system says of a file."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator


class UsageError(ValueError):
    """A mistake in what the user gave us: a setting, a file, a record.

    The message says what was expected, what was found and which setting to change. Programs print
    it as one line and exit with status 2; anything else that escapes is our own defect and keeps
    its traceback.
    """


class ProcessLost(RuntimeError):
    """Another process of the run is not there, or not any more; nothing is wrong with this one.

    Programs print the message as one line and exit with status 1: all of them are to be started
    again.
    """


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


# ----------------------------------------------------------------------- Files and the system

# TensorStore has no types, and words for all: what it did, "the file": the reason [number].
_OF_TENSORSTORE = re.compile(r"\[os_error_code='(\d{1,6})'")


def system_error(error: BaseException) -> OSError | None:
    """Why the system did not let a file be read or written, where that is what an error is about.

    No permission, no further open file, a full or broken disk: none of it says anything about what
    is in the file. None where the error is another one, or says that nothing is at the path.
    """
    for one in chain(error):
        found = one if isinstance(one, OSError) else of_tensorstore(one)
        if found is not None and found.errno is not None and not is_absence(found):
            # One of its own, to be raised from the error that it may be a cause of.
            reason = found.strerror or os.strerror(found.errno)
            return OSError(found.errno, reason, *filter(None, [found.filename]))
    return None


def of_tensorstore(error: BaseException) -> OSError | None:
    """The system's error that TensorStore puts in words, as Python has it; None for any other."""
    text = str(error)
    match = _OF_TENSORSTORE.search(text)
    if match is None:
        return None
    path = text[: match.start()].rpartition('": ')[0].rpartition('"')[2]
    return OSError(int(match[1]), os.strerror(int(match[1])), *filter(None, [path]))


def is_absence(error: OSError) -> bool:
    """Whether it says that nothing, or a directory in place of a file, is at a path."""
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def naming_file(path: str | os.PathLike) -> Iterator[None]:
    """Context manager: puts the path into an OSError that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise
