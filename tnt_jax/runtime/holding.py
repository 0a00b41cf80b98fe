"""One run at a time in a place: a note there says who holds it, and whether that one still lives.

The note of a folder is `FOLDER/.held`, that of an output `.NAME.held` beside it. It is there for as
long as the run lasts, and says host, process and since when. Of several processes that run one
program together the first one holds, and the others learn what came of it. A note in a folder must
be there for all of them: a folder that they do not share is refused before any work. A note may be
left by a process that was killed. Whether its holder lives is found out in this order:

1. By the kernel, on the host that wrote it: a local note is locked (`flock`), and the lock ends
   with the process, whatever ends it. Processes in other containers of that host count.
2. By the process table of that host, where there is no such lock, such as in a bucket: a process
   with that number lives, and began when the note says. Numbers are used again.
3. By watching, from everywhere else. A holder changes its note every 10 seconds. Whoever finds no
   change for 60 seconds of its own clock takes over: clocks of two hosts are never compared.

A bucket has no writing that fails where there is a file already. So whoever writes a note without a
lock waits for two seconds and reads whose it is: the last one has it. A holder that finds a note of
another when it changes its own, because it was suspended for a minute, or two hosts wrote with more
than two seconds between them, ends at the next `check`.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tnt_jax.runtime import console, failures, files, preemption, processes
from tnt_jax.runtime.errors import UsageError

_BEAT = 10.0  # seconds between two changes of a note
_STALE = 60.0  # seconds without one, after which a holder on another host is dead
_SETTLE = 2.0  # seconds until what two write at once without a lock is there for both
_ANSWER = 0.2  # seconds in which whoever has the lock has written who it is, or ended
_TRIES = 20
# Bytes of every note: TensorFlow remembers an object's length for five seconds, and reads so much.
_SIZE = 1024
NOTE = ".held"  # in the folder
_NOTE = re.compile(re.escape(NOTE) + r"(?:-(\d+)-of-(\d+))?")

_held: set["_Hold"] = set()  # by this process


@contextlib.contextmanager
def folder(
    path: str | os.PathLike, setting: str, share: tuple[int, int] | None = None
) -> Iterator[None]:
    """Holds a folder that a run writes into; it is created.

    Args:
      path: The folder.
      setting: The setting that names the folder, for messages.
      share: Which one of how many independent processes this is that write into the folder by
        design, from 0 on. They do not exclude each other. None is all of the folder.

    Raises:
      UsageError: Somebody else holds it, it cannot be written, or not all processes see it.
    """
    files.check_directory(path, setting)
    note = files.path_of(path) / (NOTE if share is None else f"{NOTE}-{{}}-of-{{}}".format(*share))

    def take() -> _Hold:
        hold = _Hold(note, setting, path)
        try:
            # Looked for when the own note is there: of two at once, one finds the other's.
            for other in _excluded(note):
                _Hold(other, setting, path).release()  # nobody's: it goes
        except BaseException:
            hold.release()
            raise
        return hold

    with _of_all(take) as token:
        _check_all_see(note, token, setting, path)
        yield


@contextlib.contextmanager
def output(path: str | os.PathLike, setting: str) -> Iterator[None]:
    """Holds a file or folder that a run writes whole, with what belongs to it beside it.

    Args:
      path: The output; the folder that it goes to is created.
      setting: The setting that names the output, for messages.

    Raises:
      UsageError: Somebody else holds it.
    """
    of = files.path_of(path)
    if not files.is_remote(path):
        of.parent.mkdir(parents=True, exist_ok=True)
    with _of_all(lambda: _Hold(of.with_name(f".{of.name}.held"), setting, path)):
        yield  # that all see it, `output_parts` finds out


def check() -> None:
    """To be called before something is written; looks at no file.

    Raises:
      UsageError: Somebody else has taken over what this process holds.
    """
    for hold in tuple(_held):
        hold.check()


def is_lost() -> bool:
    """Whether somebody else has taken over what this process holds."""
    return any(hold.is_lost for hold in tuple(_held))


@contextlib.contextmanager
def _of_all(take: Callable[[], "_Hold"]) -> Iterator[str]:
    """Context manager: the first process takes the hold; all processes raise what it raises.

    Yields the token of its note.
    """
    hold, refusal = None, ""
    if processes.index() == 0:
        try:
            hold = take()
        except UsageError as error:
            refusal = str(error)
    try:
        said = json.dumps([refusal, hold and hold.token])
        refusal, token = json.loads(processes.gather("hold", said)[0])
        if refusal:
            raise UsageError(refusal)
        yield token
    finally:
        if hold is not None:
            with preemption.deferred():
                hold.release()


def _check_all_see(note: Any, token: str, setting: str, of: str | os.PathLike) -> None:
    """Raises a UsageError in all processes unless all see the note that the first one wrote."""
    is_seen = processes.index() == 0 or processes.is_soon(lambda: _is_there(note, token))
    found = processes.gather("see", json.dumps(is_seen))
    blind = [str(number) for number, seen in enumerate(found) if not json.loads(seen)]
    if blind:
        raise UsageError(
            f"{setting}: expected a folder that all {len(found)} processes see, found that what "
            f"the first one writes into {of} is not there for process {', '.join(blind)}. Set "
            f"{setting} to a folder that all hosts share, or to one in gs://."
        )


def _is_there(note: Any, token: str) -> bool:
    """Whether the note is there with this token."""
    # Whatever a network file system or the client of a bucket raises: it is looked for again.
    with contextlib.suppress(Exception):
        return (_Note(note).read() or {}).get("token") == token
    return False


def _excluded(note: Any) -> list[Any]:
    """The other notes in a folder that may not be there together with this one."""
    if files.is_remote(note):  # shares are of local folders
        return []

    def share(name: str) -> tuple[str, str] | None:
        match = _NOTE.fullmatch(name)
        return (match[1], match[2]) if match and match[1] else None

    def go_together(one: tuple[str, str] | None, other: tuple[str, str] | None) -> bool:
        return one is not None and other is not None and one[0] != other[0] and one[1] == other[1]

    others = [file for file in note.parent.iterdir() if _NOTE.fullmatch(file.name)]
    return [
        file
        for file in sorted(others)
        if file.name != note.name and not go_together(share(note.name), share(file.name))
    ]


class _Hold:
    """A note that this process has written, and changes until it is released.

    Args:
      note: Its path.
      setting: For messages.
      of: What is held, for messages.

    Raises:
      UsageError: Somebody else holds it.
    """

    def __init__(self, note: Any, setting: str, of: str | os.PathLike):
        self._file, self._setting, self._of = _Note(note), setting, os.fspath(of)
        self._about = {
            **_here(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "token": secrets.token_hex(8),
            "beat": 0,
        }
        self._lost: dict[str, Any] | None = None
        self._ended = threading.Event()
        try:
            if not any(self._take() for _ in range(_TRIES)):
                raise self._refusal({})
        except BaseException:
            self._leave()
            raise
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        _held.add(self)

    def _take(self) -> bool:
        """Whether the note is written; False where another's vanished meanwhile.

        Raises:
          UsageError: Somebody holds it.
        """
        is_locked = self._file.lock()
        if is_locked is False:
            time.sleep(_ANSWER)
        found = self._file.read()
        if found is None and is_locked is False:  # it is just being taken, or taken away
            return False
        if found is not None and not self._is_dead(found, is_locked):
            return False
        self._about["lock"] = self._file.device() if is_locked else None
        try:
            self._file.write(self._about)
        except OSError:
            if is_locked:  # else half a note is left, of which nobody can say who wrote it
                with contextlib.suppress(OSError):
                    self._file.remove()
            raise
        if not is_locked:
            time.sleep(_SETTLE)
            found = self._file.read()
            if not self._is_own(found):
                raise self._refusal(found or {})
        return True

    def _is_dead(self, found: dict[str, Any], is_locked: bool | None) -> bool:
        """Whether the holder of a note is dead; False where it has taken its note away meanwhile.

        Raises:
          UsageError: It lives.
        """
        here = _here()
        is_here = found.get("boot") == here["boot"]
        # The same kernel may know one file system twice, each with its own locks.
        knows_lock = found.get("lock") is not None and found["lock"] == self._file.device()
        if is_here and knows_lock and is_locked is not None:
            lives = not is_locked
        elif is_here and found.get("namespace") == here["namespace"] is not None:
            began = _began(found.get("process"))
            lives = began is not None and began == found.get("began")
        else:
            return self._watch(found)
        if lives:
            raise self._refusal(found)
        return True

    def _watch(self, found: dict[str, Any]) -> bool:
        """Waits for a sign of life of the holder: True if none comes, False if its note goes."""
        console.log(
            f"{self._setting}: {self._of} was held by {_who(found)}, and nothing here says whether "
            f"that one lives: waiting up to {_STALE:.0f} seconds for a sign of life."
        )
        latest = time.monotonic() + _STALE
        while time.monotonic() < latest:
            time.sleep(_STALE / 60)
            now = self._file.read()
            if now is None:
                return False
            if now != found:
                raise self._refusal(now)
        return True

    @property
    def token(self) -> str:
        """The text that this note has, and no other one."""
        return self._about["token"]

    def _is_own(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self.token

    def _refusal(self, found: dict[str, Any]) -> UsageError:
        return UsageError(
            f"{self._setting}: expected {self._of} to be free, found that {_who(found)} is at work "
            f"in it. Wait until that has ended, stop it, or set another {self._setting}."
        )

    @property
    def is_lost(self) -> bool:
        """Whether the note is another's by now."""
        return self._lost is not None

    def check(self) -> None:
        """Raises a UsageError where the note is another's by now."""
        if self._lost is not None:
            raise UsageError(
                f"{self._setting}: expected to hold {self._of}, found that {_who(self._lost)} has "
                "taken it over, which happens when nothing is heard of a run for a minute. That "
                "one goes on, this one ends; if it should be this one, stop that one first."
            )

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            # Whatever the client of a bucket raises: the next time may be better.
            with contextlib.suppress(Exception):
                found = self._file.read()
                if found is not None and not self._is_own(found):
                    self._lost = found
                    return
                self._about["beat"] += 1
                self._file.write(self._about)

    def release(self) -> None:
        """Takes the note away."""
        _held.discard(self)
        self._ended.set()
        self._beating.join(_BEAT)  # it may be about to write
        self._leave()

    def _leave(self) -> None:
        with contextlib.suppress(Exception):  # what is left is a dead holder's
            if self._is_own(self._file.read()):
                self._file.remove()
        self._file.close()


class _Note:
    """A file of `_SIZE` bytes with a JSON object, local or in a bucket."""

    def __init__(self, path: Any):
        self._path, self._opened = path, None

    def lock(self) -> bool | None:
        """Opens a local one: whether this process has its lock now; None where there are none."""
        if files.is_remote(self._path):
            return None
        while True:
            self.close()
            self._opened = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:  # a file system without locks
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._opened), self._path.stat()):
                    return True
            # Its holder has just taken it away: that lock is of no use.

    def device(self) -> int | None:
        """The file system of an open one, by the number that this kernel has for it."""
        return None if self._opened is None else os.fstat(self._opened).st_dev

    def read(self) -> dict[str, Any] | None:
        """What it says, as far as it can be understood; None where there is none."""
        try:
            content = self._path.read_bytes()[:_SIZE].strip()
        except FileNotFoundError:
            return None
        if not content:
            return None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(content)
            if isinstance(found, dict):
                return found
        return {}

    def write(self, about: dict[str, Any]) -> None:
        content = json.dumps(about).encode().ljust(_SIZE)
        if self._opened is None:
            self._path.write_bytes(content)
        else:  # in place: the lock is the file's, not its name's
            if os.pwrite(self._opened, content, 0) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self._path))
            os.fsync(self._opened)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._opened is not None:
            os.close(self._opened)
            self._opened = None


def _who(found: dict[str, Any]) -> str:
    if "process" not in found:
        return "another process"
    of = (str(found.get(name))[:80] for name in ("process", "host", "since"))
    return failures.printable("process {} on {} (since {})".format(*of))


def _here() -> dict[str, Any]:
    """This process, as a note says it. A boot of a host has a name of its own, on Linux."""
    host = socket.gethostname()
    boot, namespace = host, None
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path
    number = os.getpid()
    return {
        "host": host,
        "process": number,
        "boot": boot,
        "namespace": namespace,
        "began": _began(number),
    }


def _began(number: Any) -> int | None:
    """When a process began, in ticks since the boot, which no setting of a clock changes.

    None where there is no such process, or it is dead and waits to be collected.
    """
    with contextlib.suppress(OSError, TypeError, ValueError, IndexError):
        # The name, in parentheses, may have anything in it.
        stat = pathlib.Path(f"/proc/{int(number)}/stat").read_text().rpartition(")")[2].split()
        return None if stat[0] in "ZX" else int(stat[19])
    return None
