"""What an exception means to whoever started a program: a mistake to mend, or our own defect."""

import errno
import os
import re
import traceback

from tnt_jax.runtime import processes
from tnt_jax.runtime.errors import ProcessLost, UsageError, chain, of_tensorstore
from tnt_jax.runtime.settings_json import is_gin_code

# The user's to mend, whoever raised it: a path that does not work.
_PATH_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
_PATH_NUMBERS = (
    *(errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTEMPTY, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE),
)

# A place that takes no more. TensorStore, safetensors and TensorFlow say so in words alone.
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))

# NumPy's `tofile` says only how many numbers it could write.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")

# Of TensorFlow, about a file: whether trying again helps (1) or not (2).
_OF_BUCKETS = {
    "PermissionDeniedError": 2,
    "UnauthenticatedError": 2,
    "NotFoundError": 2,
    "FailedPreconditionError": 1,  # no host of that name: the network is down
    "UnavailableError": 1,
    "DeadlineExceededError": 1,
    "AbortedError": 1,
}

_LONGEST = 2000  # characters of a message, which may quote what is in somebody's file


def explain(error: BaseException) -> str | None:
    """One line for the user; None where the error is our own defect."""
    if isinstance(error, UsageError | ProcessLost):
        return _one_line(error)
    if (reason := processes.lost(error)) is not None:
        return printable(reason)
    causes = list(chain(error))
    for one in causes:
        full = next((reason for reason in _FULL if reason in str(one)), None)
        if full is None and isinstance(one, OSError) and (cut := _CUT_SHORT.match(str(one))):
            full = f"the disk takes no more ({cut[0]})"
        if full:
            place = f"{one.filename}: " if isinstance(one, OSError) and one.filename else ""
            return (
                f"cannot write: {place}{full}. Make room (or raise `ulimit -f`), or set another "
                "place, and give the same command again; what is whole under its name is kept."
            )
    for one in causes:
        if (said := of_tensorstore(one)) is not None:
            return _of_path(said)
    for one in causes:
        if _of_bucket(one) is not None:
            return (
                f"cannot read or write: {_one_line(one)}. Look at the path, at what this account "
                "may do there, and at the network, and give the same command again."
            )
    for one in causes:
        if (reason := out_of_memory(one)) is not None:
            return (
                f"out of memory: {reason}. Lower BATCH_SIZE or TASK_FEATURE_LENGTHS where the "
                "program has them, or run it where there is more."
            )
    if isinstance(error, BrokenPipeError):
        return "whoever reads the output has stopped reading it (a closed pipe)."
    if isinstance(error, _PATH_ERRORS) or (
        isinstance(error, OSError) and error.errno in _PATH_NUMBERS
    ):
        return _of_path(error)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "expected a path, found a text with a null character in it."
    if isinstance(error, UnicodeEncodeError) and "surrogates" in str(error):
        return f"expected Unicode text, found half a surrogate pair: {_one_line(error)}."
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    # gin refused a setting, or found a required argument missing. Any other TypeError at a call
    # through gin is a call that we wrote wrong.
    is_gins = is_gin_code(innermost.f_code)
    if is_gins and (not isinstance(error, TypeError) or "required" in str(error)):
        return _one_line(error)
    return None


def exit_status(error: BaseException) -> int:
    """The exit status for an error that `explain` explains: 1 if trying again helps, else 2."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, ProcessLost) or processes.lost(error):
        return 1
    return next(filter(None, map(_of_bucket, chain(error))), 2)


def _of_bucket(error: BaseException) -> int | None:
    """The exit status for what is said of a bucket; None where it is no such error.

    By TensorFlow, which reads files there for etils, or by Google's client, which Orbax asks.
    Neither is imported for it.
    """
    if type(error).__module__ == "google.api_core.exceptions":
        code = int(getattr(error, "code", None) or 0)
        return 2 if 400 <= code < 500 and code not in (408, 429) else 1
    if type(error).__module__ == "google.auth.exceptions":
        return 2 if type(error).__name__ == "DefaultCredentialsError" else 1
    if not type(error).__module__.startswith("tensorflow."):
        return None
    status = _OF_BUCKETS.get(type(error).__name__)
    is_of_path = re.search(r"://|HTTP|[Nn]o such file", str(error)) is not None
    return status if is_of_path else None


def out_of_memory(error: BaseException) -> str | None:
    """What there was no memory for, of the host or of a device; None where that is not it."""
    if isinstance(error, MemoryError):
        return str(error) or "the host has no more"
    text = str(error)
    if of_tensorstore(error) is not None:  # its RESOURCE_EXHAUSTED may be of open files
        return None
    # JAX has one type for whatever its runtime says, and TensorFlow's allocators say the same.
    if re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory|OOM when allocating", text):
        return " ".join(text.splitlines()[0].split())[:300].rstrip(".")
    return None


def _of_path(error: OSError) -> str:
    advice = ". Raise the limit of open files: `ulimit -n`."
    return _one_line(error) + (advice if error.errno == errno.EMFILE else "")


def _one_line(error: BaseException) -> str:
    # gin appends the calls that an exception passed through.
    text = re.split(r"\n\s*(?:In call to configurable|No values supplied by Gin)", str(error))[0]
    text = re.sub(r"^\[Errno \d+\] ", "", text)
    text = re.sub(r"<module '([\w.]+)'[^>]*>", r"\1", text)
    text = printable(" ".join(text.split()))  # before it is cut: spelt out, it is longer
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def printable(text: str) -> str:
    """The text with whatever a terminal would obey, or could not show, spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
