"""Work on many records in numbered parts: shared by several processes, or done in several goes.

How the work is cut depends on itself alone. Process k of n does the parts k, k + n, k + 2n, ...
Until all of it is done, `OUTPUT.parts/` has

    of.json      what the work is: settings, inputs, version
    00012.jsonl  a part, whole or not there: a line about it, then its lines of the output

Then the first process puts them together in OUTPUT and deletes the folder. The same work, started
again, keeps the parts that are there; those of other work are discarded.
"""

import collections
import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from etils import epath

from tnt_jax import __version__
from tnt_jax.runtime import console, files, holding, preemption, processes
from tnt_jax.runtime.errors import UsageError, naming_file

_OF = "of.json"
_PART = re.compile(r"\d+\.jsonl")
# What may lie in the folder: ours, of `beam_jobs`, what a kill left of either, and what NFS keeps.
_OURS = re.compile(r"of\.json|\d+\.(jsonl|mistake)|\..+\.unfinished|\.nfs\w+")


class Parts:
    """What is done of some work, and what this process has to do; made by `opened`.

    Attributes:
        missing: numbers of the parts that this process has to do.
        counts: sums over the parts of all processes, by name; filled in the first process, by
            `join`.
        new_counts: those of the parts that were not done before.
    """

    def __init__(self, output: str, sizes: Sequence[int], work: Mapping[str, Any]):
        self._sizes = sizes
        self._folder = epath.Path(f"{output}.parts")
        self._of = {
            **json.loads(json.dumps(work)),
            "parts": {"number": len(sizes), "largest": max(sizes, default=0)},
            "version": __version__,
        }
        text = json.dumps(self._of, sort_keys=True)
        self._identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._steps: collections.Counter[int] = collections.Counter()
        self._lines: dict[int, list[str]] = collections.defaultdict(list)
        self._counts: dict[int, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.counts: collections.Counter[str] = collections.Counter()
        self.new_counts: collections.Counter[str] = collections.Counter()
        if processes.index() == 0:
            self._take_over()
        self._check_is_shared(processes.gather("open", self._identity))
        own = range(processes.index(), len(sizes), processes.count())
        # The first process has looked before another one could add to it.
        self._before = self._before if processes.index() == 0 else self._done()
        self.missing = [part for part in own if part not in self._before]

    # ------------------------------------------------------------------------------- Opening

    def _take_over(self) -> None:
        """Makes the folder this work's: what is there is kept, or discarded."""
        names = names_of_ours(self._folder)
        self._before: set[int] = set()
        found = None
        with contextlib.suppress(UsageError):
            found = files.read_object(self._folder / _OF)
        if found == self._of:
            self._before = self._done()
            if self._before:
                console.log(
                    f"{self._folder}: {len(self._before)} of {len(self._sizes)} parts were done "
                    "before."
                )
            return
        if num_others := sum(bool(_PART.fullmatch(name)) for name in names):
            reason = "nothing says of what it was"
            if found is not None:
                reason = f"it was of other settings or inputs ({self._changes(found)})"
            console.log(
                f"{self._folder}: what was done before ({num_others} parts) is discarded: {reason}."
            )
        self._delete()
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_json(self._folder / _OF, self._of)

    def _check_is_shared(self, identities: Sequence[str]) -> None:
        """Whether what the first process has written is here, and is of the work of all."""
        if processes.index() == 0:
            if len({*identities}) > 1:
                raise UsageError(
                    "expected the same settings and inputs in all processes, found others in some, "
                    "which say what they are. Start all processes alike, with the same files."
                )
            return
        processes.is_soon(lambda: (self._folder / _OF).exists())
        try:
            found = files.read_object(self._folder / _OF)
        except UsageError as error:
            raise UsageError(
                f"{self._where()}: expected {_OF}, which the first process has written there "
                f"({error})"
            ) from error
        if found != self._of:
            raise UsageError(
                f"{self._where()}: expected the settings and inputs of the first process, found "
                f"others here ({self._changes(found)}). Start all processes alike, with the same "
                "files."
            )

    def _changes(self, found: Mapping[str, Any]) -> str:
        """The names of what is not as `of.json` says."""
        return ", ".join(processes.differing(self._of, found))

    def _where(self) -> str:
        return (
            f"OUTPUT must be where all processes see it (gs://, or a folder that their hosts "
            f"share), and no other run may write it. {self._folder}"
        )

    # ------------------------------------------------------------------------------- Working

    def add(self, part: int, lines: Iterable[str], counts: Mapping[str, int]) -> None:
        """Takes what one step of a part came to; with the last of its steps the part is written.

        Args:
            part: number of the part, one of `missing`; its steps come in order.
            lines: lines of the output, each with its end.
            counts: numbers to add up over the steps.
        """
        holding.check()
        self._lines[part].extend(lines)
        self._counts[part].update(counts)
        self._steps[part] += 1
        if self._steps[part] < self._sizes[part]:
            return
        content = "".join(self._lines.pop(part)).encode()
        about = {
            "part": part,
            "of": self._identity,
            "bytes": len(content),
            "counts": self._counts.pop(part),
        }
        with files.replacing(self._file(part)) as unfinished:
            unfinished.write_bytes(json.dumps(about).encode() + b"\n" + content)

    def _file(self, part: int) -> epath.Path:
        return self._folder / f"{part:05}.jsonl"

    def _content(self, part: int) -> tuple[dict[str, int], bytes] | None:
        """Counts and lines of a part of this work; None where it is not there, or not whole.

        Raises:
            OSError: it is there and may not be read: nothing says that it has to be done again.
        """
        damage = (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError)
        with contextlib.suppress(FileNotFoundError, *damage):
            with naming_file(self._file(part)):
                about, _, content = self._file(part).read_bytes().partition(b"\n")
            found = json.loads(about)
            expected = (part, self._identity, len(content))
            if (found["part"], found["of"], found["bytes"]) == expected:
                return msgspec.convert(found["counts"], dict[str, int]), content
        return None

    def _done(self) -> set[int]:
        found = [part for part in self._there() if self._content(part) is not None]
        return {part for part in found if part < len(self._sizes)}

    def _there(self) -> set[int]:
        """The parts that have a file, whole or not."""
        if not self._folder.exists():
            return set()
        names = [file.name for file in self._folder.iterdir()]
        return {int(name.partition(".")[0]) for name in names if _PART.fullmatch(name)}

    # ------------------------------------------------------------------------------- Joining

    def wait_for_all(self) -> None:
        """Until every part is done.

        Raises:
            ProcessLost: a process has ended before.
            UsageError: a part is not there for all that.
        """
        all_parts = set(range(len(self._sizes)))
        is_first = processes.index() == 0
        if is_first and processes.count() > 1 and (left := all_parts - self._there()):
            console.log(f"{self._folder}: {len(left)} parts of other processes are to come.")
        processes.wait_for_all("parts")
        if is_first and not processes.is_soon(lambda: all_parts <= self._there()):
            raise self._missing(min(all_parts - self._there()))

    def _missing(self, part: int) -> UsageError:
        return UsageError(
            f"{self._where()}: expected {self._file(part).name}, which process "
            f"{part % processes.count()} has written there, found none that is whole. The same "
            "command does it again."
        )

    def join(
        self,
        replacing: contextlib.AbstractContextManager[Callable[[bytes], None]],
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Writes the output, in the first process: it replaces what was there before.

        Args:
            replacing: yields a function that takes the output's bytes, one stretch after another.
            places: for each part, the numbers of its lines in the output; None keeps the order of
                the parts.

        Raises:
            UsageError: a part is no longer whole.
        """
        if processes.index() > 0:
            return
        holding.check()
        lines = [b""] * sum(map(len, places or ()))
        with replacing as write:
            for part in range(len(self._sizes)):
                found = self._content(part)
                if found is None:
                    raise self._missing(part)
                counts, content = found
                self.counts.update(counts)
                if part not in self._before:
                    self.new_counts.update(counts)
                if places is None:
                    write(content)
                    continue
                for place, line in zip(places[part], io.BytesIO(content), strict=True):
                    lines[place] = line
            for line in lines:
                write(line)

    def close(self, is_whole: bool) -> None:
        """Deletes the folder if the output is whole, or nothing is done.

        Args:
            is_whole: whether the output is written, and what belongs to it.
        """
        is_alone = processes.count() == 1
        if is_whole and processes.index() == 0:
            with contextlib.suppress(OSError):  # of what stays, a later run makes what it can
                self._delete()
        if not is_whole and is_alone and not self._done():
            self._delete()
        if is_whole:
            processes.wait_for_all("output")

    def _delete(self) -> None:
        if self._folder.exists():
            self._folder.rmtree(missing_ok=True)


@contextlib.contextmanager
def opened(output: str, sizes: Sequence[int], work: Mapping[str, Any]) -> Iterator[Parts]:
    """The work, with what is done of it already; all processes open it, and leave it together.

    Within, `add` what comes of each step, `wait_for_all`, `join`, and write what else belongs to
    the output, which is held meanwhile (`holding`). After a failure the parts that are done stay.

    Args:
        output: the file to write. The folder beside it with the same name and `.parts` is ours.
        sizes: steps of each part.
        work: a JSON value that decides every line of the output, and how it is cut.

    Raises:
        UsageError: another run writes this output, the folder holds what is not ours, or the
            processes do not see the same one, or are not started alike.
    """
    with holding.output(output, "OUTPUT"):
        parts = Parts(output, sizes, work)
        try:
            yield parts
        except BaseException:
            with contextlib.suppress(OSError):
                parts.close(is_whole=False)
            raise
        with preemption.deferred():  # half of the folder gone, all of the work would be done again
            parts.close(is_whole=True)


def names_of_ours(folder: epath.Path) -> list[str]:
    """What lies in a folder of parts, which may be deleted; nothing if it is not there.

    Raises:
        UsageError: something in it is not ours.
    """
    names = [file.name for file in folder.iterdir()] if folder.exists() else []
    if strange := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise UsageError(
            f"OUTPUT: expected nothing in {folder}, or the parts of an output that is not whole "
            f"yet; found {strange[0]}. Move it away, or set another OUTPUT."
        )
    return names


def sizes(num_steps: int, largest: int) -> list[int]:
    """Steps of each part, where the parts have `largest` and the last one what is left."""
    return [min(largest, num_steps - start) for start in range(0, num_steps, largest)]
