"""What to change where memory does not suffice, of the host or of a device."""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnt_jax.runtime import failures
from tnt_jax.runtime.errors import UsageError


def inference_advice(*settings: str) -> list[str]:
    """What would help a program that runs a model whose batches depend on these settings."""
    return [
        f"a smaller {' or '.join(settings)}",
        "FSDP_DEVICES or MODEL_DEVICES (parameters over more devices)",
    ]


def check_batch(
    batch_size: int, num_tokens: int, num_negative_ids: int = 0, bytes_of_ids: int = 0
) -> None:
    """Compares a batch with the memory of the host, which makes it before any device sees it.

    Where that is far too small the system ends the process without a word.

    Args:
      batch_size: Rows.
      num_tokens: Tokens of a row, inputs and targets together.
      num_negative_ids: Ids that are removed at a position, at most. A row has room for as many at
        every position of its targets.
      bytes_of_ids: Bytes that the room for removed ids takes in a row.

    Raises:
      UsageError: It does not fit.
    """
    # Of targets there are ids, inputs and masks; a row is a few objects of Python as well.
    of_ids, found = batch_size * bytes_of_ids, host_bytes()
    needed = batch_size * (200 + 16 * num_tokens) + of_ids
    if needed > found:
        room, also = "", ""
        if of_ids > needed // 2:
            room = (
                f", {of_ids / 2**30:.1f} of them room for {num_negative_ids} removed ids at "
                "every position of the targets, as many as one position has"
            )
            also = ", or mark fewer ids at one position"
        raise UsageError(
            f"out of memory with BATCH_SIZE={batch_size} and {num_tokens} tokens in a row "
            f"(TASK_FEATURE_LENGTHS): a batch takes about {needed / 2**30:.1f} GiB{room}, and "
            f"this host has {found / 2**30:.1f}. Set a smaller BATCH_SIZE or "
            f"TASK_FEATURE_LENGTHS{also}."
        )


def host_bytes() -> int:
    """Bytes of memory of this machine, or of this process's share where there is such a limit."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        found = min(found, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    return found


@contextlib.contextmanager
def explained(tries: Sequence[str], **settings: Any) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into one that says what to change.

    Args:
      tries: What would help, what costs least first.
      **settings: The values that the work was done with, by the names of their macros.

    Raises:
      UsageError: There is not enough.
    """
    try:
        yield
    except Exception as error:
        reason = failures.out_of_memory(error)
        if reason is None or isinstance(error, UsageError):
            raise
        found = ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())
        raise UsageError(
            f"out of memory with {found}: {reason}. To make it fit, try {'; '.join(tries)}."
        ) from error


def _shown(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
