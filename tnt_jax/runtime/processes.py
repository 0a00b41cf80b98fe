"""Several processes that run one program together, such as one on each host of a TPU slice.

`TNT_JAX_DISTRIBUTED=1` says that there are others. Who they are is found out by
`jax.distributed.initialize`: a TPU slice, SLURM and Open MPI tell it; elsewhere
JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID do, in each process.

A process that ends takes the others with it: they are of no use alone, and whoever started them
starts all of them again. How soon, TNT_JAX_HEARTBEAT_SECONDS says; where they compute together,
mostly at once.
"""

import collections
import contextlib
import enum
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from tnt_jax.runtime.errors import ProcessLost, UsageError

VARIABLE = "TNT_JAX_DISTRIBUTED"
_ADDRESS, _NUMBER, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_HEARTBEAT = "TNT_JAX_HEARTBEAT_SECONDS"
_LONGEST_WORK = 7 * 24 * 3600  # seconds: what a process waits for another that is alive
# Seconds until a file that another host has written is there: NFS remembers for so long that it was
# not.
_PATIENCE = 60.0
_visits: collections.Counter[str] = collections.Counter()
_MISTAKEN = "tnt_jax/mistaken/"  # where a process notes that it ends with an error


def num_cores() -> int:
    """Cores that this process may use: `taskset -c 0` leaves one."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(allowed(0)) if allowed else os.cpu_count() or 1


class Kind(enum.Enum):
    """How a program runs in several processes."""

    ALONE = "it does not"
    APART = "each has a share of the work, on its own devices"
    TOGETHER = "each has a share of every computation"


def start(name: str, kind: Kind) -> None:
    """Meets the other processes, if there are any.

    Args:
      name: Name of the program.
      kind: How it runs in several processes.

    Raises:
      UsageError: The program runs alone, or nothing tells who the others are.
      ProcessLost: They are not there.
    """
    if not is_asked_for(os.environ):
        return
    if kind is Kind.ALONE:
        raise UsageError(
            f"{name} runs in one process, and {VARIABLE}=1 says that there are several. Start it "
            f"on one host, without {VARIABLE}; train, generate and annotate run on all."
        )
    import jax

    # Processes that compute together stop together: JAX answers SIGTERM, and not Python. Others can
    # be stopped where they are: their own answer stays.
    jax.config.update("jax_enable_preemption_service", kind is Kind.TOGETHER)
    address = os.environ.get(_ADDRESS)
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=_whole_number(_NUMBER, least=1),
            process_id=_whole_number(_INDEX, least=0),
            heartbeat_timeout_seconds=_whole_number(_HEARTBEAT, least=2) or 100,
        )
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"{VARIABLE}=1: expected to be told of the other processes ({_first_line(error)}). On "
            f"a TPU slice or under SLURM JAX asks for them; elsewhere set {_ADDRESS}=HOST:PORT, "
            f"{_NUMBER} and {_INDEX} in each. Or unset {VARIABLE}."
        ) from error
    except RuntimeError as error:
        if "before any JAX calls" in str(error):
            raise UsageError(
                f"{VARIABLE}=1: the processes must meet before anything is computed, but a module "
                "that a gin file imports computes with JAX when it is imported. Do that in a "
                "function."
            ) from error
        raise ProcessLost(
            f"{VARIABLE}=1: the other processes are not there ({_first_line(error)}). Start all of "
            f"them, and let the port of {address or 'the first one'} be open to the others."
        ) from error


def is_asked_for(environ: Mapping[str, str]) -> bool:
    """Whether an environment says that there are other processes."""
    value = environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{VARIABLE}: expected 1 or nothing, found {value!r}.")
    return value == "1"


def _whole_number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name}: expected a whole number from {least} on, found {text!r}.")
    return int(text)


def count() -> int:
    """How many processes run this program together."""
    jax = _jax_of_several()
    return 1 if jax is None else jax.process_count()


def index() -> int:
    """The number of this process among them, from 0."""
    jax = _jax_of_several()
    return 0 if jax is None else jax.process_index()


def _visit(place: str) -> str:
    """A name that no earlier visit had: what was said under a name stays there."""
    _visits[place] += 1
    return f"{place} {_visits[place]}"


def wait_for_all(place: str, seconds: float = _LONGEST_WORK) -> None:
    """Waits until every process has called this with the same name.

    Args:
      place: A name, the same in each process. All come to it equally often.
      seconds: Whoever has not come after these is not waited for longer.

    Raises:
      ProcessLost: A process has ended, or is not here in time.
    """
    if count() == 1:
        return
    from orbax.checkpoint import multihost

    place = _visit(place)
    failures: list[RuntimeError] = []

    def wait() -> None:
        try:
            multihost.get_barrier_sync_fn()(key=f"tnt_jax {place}", timeout_ms=int(seconds * 1000))
        except RuntimeError as error:
            failures.append(error)

    # In a thread, because a signal is answered between two lines of Python: SIGTERM would find no
    # answer for as long as the others take.
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join()
    if failures:
        reason = lost(failures[0]) or _first_line(failures[0])
        raise ProcessLost(f"waited for the other processes in vain: {reason}") from failures[0]


def gather(place: str, said: str) -> list[str]:
    """Gathers a text from each process, in their order.

    Args:
      place: A name, the same in each process. All come to it equally often.
      said: What this process says.

    Raises:
      ProcessLost: A process has ended with an error before it came here.
    """
    if count() == 1:
        return [said]
    from orbax.checkpoint import multihost

    place = _visit(place)
    client = multihost.get_jax_distributed_client()
    folder = f"tnt_jax/{place}/"
    client.key_value_set(f"{folder}{index()}", said)
    while True:
        # Looked for first: whoever has said something here may find its mistake in the answers.
        mistaken = client.key_value_dir_get(_MISTAKEN)
        found = dict(client.key_value_dir_get(folder))
        if len(found) == count():
            # Whoever ends, having found a mistake, must not take the answers from a slower one.
            wait_for_all(f"{place} heard")
            return [found[f"{folder}{number}"] for number in range(count())]
        if mistaken:
            raise ProcessLost(_has_ended("it ended with an error"))
        time.sleep(0.2)


def is_soon(is_so: Callable[[], bool]) -> bool:
    """Whether something is so, or, where other processes have to write files, soon will be.

    Args:
      is_so: Looks for it; is called until it returns True, for a minute at most.
    """
    latest = time.monotonic() + (_PATIENCE if count() > 1 else 0)
    while not is_so():
        if time.monotonic() >= latest:
            return False
        time.sleep(0.2)
    return True


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what two mappings do not have alike."""
    nothing = object()
    return [name for name in {**one, **other} if one.get(name, nothing) != other.get(name, nothing)]


def lost(error: BaseException) -> str | None:
    """What an error says if it says that another process has gone; None if it does not."""
    # What JAX's runtime raises is one of these. A path that does not work may have any name.
    if count() == 1 or not isinstance(error, RuntimeError | ValueError):
        return None
    text = _first_line(error)
    if re.search(r"Gloo|[Cc]oordination|Barrier|heartbeat|NCCL.*remote", text):
        return _has_ended(text[:200])
    return None


def _has_ended(reason: str) -> str:
    return (
        f"another process of this run has ended: what it printed says why. Start all {count()} "
        f"again; they go on from what is saved. ({reason})"
    )


def end(status: int, seconds: float = 10) -> None:
    """Before a program ends early: the others are waited for only as long as they may end alike.

    `jax.distributed` would otherwise wait for them at the end of Python, and they for this process.
    """
    if count() == 1:
        return
    if status in (1, 2):  # of a stop, all are told by whoever stops them
        _note_mistake()
    try:
        wait_for_all("end", seconds)  # a mistake that all of them find: each has its say
    except ProcessLost:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _note_mistake() -> None:
    """Tells the processes that wait in `gather` that this one ends with a mistake."""
    from orbax.checkpoint import multihost

    with contextlib.suppress(RuntimeError):  # whoever keeps the notes has gone
        multihost.get_jax_distributed_client().key_value_set(f"{_MISTAKEN}{index()}", "")


def _jax_of_several():
    jax = sys.modules.get("jax")
    return jax if jax is not None and jax.distributed.is_initialized() else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
