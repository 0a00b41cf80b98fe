"""Makes the files of `example_files` from records, in parts, by several processes at once.

Records are cut into parts where lines end. A part is one file in FOLDER/<key>.parts, written beside
its place and renamed, so a stop loses only what is not whole. Whoever makes a part locks it: this
program's own processes, those of another host, and other runs that need the same examples share the
work. Whoever finds all parts there joins them, renames the folder, and deletes the parts.

Run as a program, this module is one of those processes: `python -m tnt_jax.data.example_maker`
takes a JSON object from standard input, makes parts until none is left, and writes a mistake of the
user's, or what the disk refuses, to standard output.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

import tnt_jax
from tnt_jax.data import example_rows, records
from tnt_jax.data.example_files import (
    ABOUT,
    COLUMNS_FILE,
    DIGESTS,
    OFFSETS,
    ROWS,
    SETS,
    About,
    ExampleFiles,
    as_arrays,
    checksum,
    from_arrays,
    write_sets,
)
from tnt_jax.data.examples import COLUMNS
from tnt_jax.runtime import console, failures, files, processes, settings_json
from tnt_jax.runtime.errors import UsageError, naming_file, system_error
from tnt_jax.tokenizers import chat, hub_tokenizer, tokenization

_FORMAT = 3  # to be raised where the same records come to other examples, or other files
_BYTES_PER_PART = 2**22  # of records: about a second's work
_MOST_PARTS = 4096
_MOST_PROCESSES = 16
_AGAIN = 0.1  # seconds between two looks at what others have made
_JOINED = 99_999  # the number by which whoever joins the parts locks that
_MISTAKEN = 2  # the status of a process that has found what the user can mend, and said it

# The tokenisers that another process can be told of: with their fields alone.
_KINDS = {
    "sentencepiece": tokenization.SentencePiece,
    "bytes": tokenization.Bytes,
    "hub": hub_tokenizer.HubTokenizer,
    "chat": chat.ChatTokenizer,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Lines of a file of records.

    Attributes:
        file: the file's path.
        start: where the first line begins, in bytes.
        end: where the last line ends, in bytes.
        first_line: number of the first line, from 1.
    """

    file: str
    start: int
    end: int
    first_line: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made, and of what.

    Attributes:
        path: a file (or glob) of records.
        vocabulary: the tokeniser of inputs and targets.
        lengths: "inputs" and "targets", in tokens: beyond them marks are lost, which is counted.
        settings: further arguments of `datasets.RecordFiles` that decide what an example is.
        parts: the parts of the files of records.
        of: a JSON value that decides what the examples are.
        states: size and time of change of each local file of records, by its path: they differ when
            it is written or replaced.
    """

    path: str
    vocabulary: tokenization.Tokeniser
    lengths: Mapping[str, int]
    settings: Mapping[str, Any]
    parts: Sequence[Part]
    of: Mapping[str, Any]
    states: Mapping[str, Sequence[int]]

    @property
    def key(self) -> str:
        """A digest of `of`: the name of the folder."""
        return hashlib.sha256(json.dumps(self.of, sort_keys=True).encode()).hexdigest()[:16]

    def check_unchanged(self, file: str, found: os.stat_result | None) -> None:
        """Raises a UsageError where a file of records is not the one that was digested.

        Args:
            file: the path of a file that has a state.
            found: what the system says of it by now; None where it is gone.
        """
        if found is None or _state(found) != [*self.states[file]]:
            raise UsageError(
                f"{file}: expected the records that were there at the start, found that they were "
                "written, replaced or deleted since. Let nothing write the file while examples are "
                "made, and give the same command again."
            )


def _state(stat: os.stat_result) -> list[int]:
    # Not its inode, which is not always the same in a mounted bucket.
    return [stat.st_size, stat.st_mtime_ns]


def make_plan(
    path: str,
    vocabulary: tokenization.Tokeniser,
    lengths: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Plan:
    """Reads the records once, to digest them and to find where parts begin.

    Raises:
        UsageError: there is no file.
    """
    found = files.matching_files(path)
    sizes = [files.size_of(file) for file in found]
    largest = max(_BYTES_PER_PART, sum(sizes) // _MOST_PARTS)
    parts, digests, states = [], [], {}
    for file in found:
        hashed = hashlib.sha256()
        place = start = 0
        line = first_line = 1
        with file.open("rb") as lines:
            if not files.is_remote(file):
                states[os.fspath(file)] = _state(os.fstat(lines.fileno()))
            while content := lines.read(min(largest, 2**20)):
                hashed.update(content)
                if place + len(content) - start >= largest and (end := content.find(b"\n") + 1):
                    parts.append(Part(os.fspath(file), start, place + end, first_line))
                    start, first_line = place + end, line + 1
                line += content.count(b"\n")
                place += len(content)
        if place > start:
            parts.append(Part(os.fspath(file), start, place, first_line))
        # An id that a record lacks is made of the file's name.
        digests.append([pathlib.PurePath(file).stem, hashed.hexdigest()])
    of = {
        "format": _FORMAT,
        "version": tnt_jax.__version__,
        "records": digests,
        "vocabulary": settings_json.describe(vocabulary),
        "task_feature_lengths": dict(lengths),
        **settings,
    }
    template = getattr(vocabulary, "source", "")
    if "strftime_now" in template and getattr(vocabulary, "date", None) is None:
        of["day"] = datetime.date.today().isoformat()
    return Plan(path, vocabulary, lengths, settings, parts, of, states)


def open_or_make(plan: Plan, folder: pathlib.Path) -> ExampleFiles:
    """The examples of a plan, from a folder that has them or gets them; says which.

    Raises:
        UsageError: the folder cannot be written, the examples in it are damaged, or a record has a
            mistake.
    """
    whole = folder / plan.key
    began = time.monotonic()
    # In this order: another process may put it there at any moment, with all that is in it.
    if whole.exists() and not (whole / ABOUT).exists():
        raise UsageError(
            f"{whole}: expected {ABOUT} in a folder of examples, found none. Delete this folder, "
            "and they are made again."
        )
    is_new = not (whole / ABOUT).exists()
    if is_new:
        _make(plan, whole)
    else:  # whoever joined the parts may have been killed before they were deleted
        shutil.rmtree(_parts_of(whole), ignore_errors=True)
    found = ExampleFiles(whole)
    how = "made before"
    if is_new:
        how = f"made in {console.duration(time.monotonic() - began)}"
    console.log(f"{plan.path}: {len(found):,} examples are in {whole}, {how}.")
    return found


def _make(plan: Plan, whole: pathlib.Path) -> None:
    """Makes all parts, with others or alone, and joins them."""
    work = _Work(whole, plan)
    number = min(_num_processes(), len(work.missing()))
    description = _described(plan.vocabulary) if number > 1 else None
    if description is None:
        for _ in console.progress(work.made(), "making examples, parts", len(plan.parts)):
            pass
    else:
        _make_in_processes(work, description, number)
    work.join()


def _num_processes() -> int:
    """How many processes this one starts: each processor has one, of which it may have a share."""
    number = min(processes.num_cores(), _MOST_PROCESSES)
    # Several processes may be on one host, as one for each of its GPUs.
    return number if processes.count() == 1 else max(1, number // min(processes.count(), 8))


# ------------------------------------------------------------------------------------------ Parts


def _parts_of(whole: pathlib.Path) -> pathlib.Path:
    return whole.with_name(f"{whole.name}.parts")


class _Work:
    """The parts of a plan that are there, and those that are not.

    Args:
        whole: the folder that they become.
        plan: what they are of.
    """

    def __init__(self, whole: pathlib.Path, plan: Plan):
        self.plan, self.whole = plan, whole
        self.folder = _parts_of(whole)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05}.npz"

    def missing(self) -> list[int]:
        """Numbers of the parts that nobody has made yet; none if the whole is there."""
        if self.whole.exists():
            return []
        there = {path.name for path in self.folder.glob("*.npz")}
        return [n for n in range(len(self.plan.parts)) if self._file(n).name not in there]

    def made(self) -> Iterator[int]:
        """Makes parts until all are there; yields a number after each that this process made."""
        order = random.Random()  # so that two who begin at once do not meet at every part
        while missing := self.missing():
            order.shuffle(missing)
            num_made = 0
            for number in missing:
                if self._file(number).exists():
                    continue
                with self._claimed(number) as is_ours:
                    if is_ours and not self._file(number).exists():
                        self._write(number)
                        num_made += 1
                        yield number
            if not num_made:  # others are at work on what is left
                time.sleep(_AGAIN)

    @contextlib.contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        """Whether nobody else is making a part; the lock ends with the process that has it."""
        try:
            self.folder.mkdir(exist_ok=True)
            opened = os.open(self.folder / f"{number:05}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # just joined, and deleted
            yield False
            return
        try:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            except OSError:  # a file system without locks: work may be done twice
                yield True
            else:
                yield True
        finally:
            os.close(opened)

    def _write(self, number: int) -> None:
        arrays = _arrays_of(self.plan, self.plan.parts[number])
        with files.replacing(self._file(number)) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]

    def join(self) -> None:
        """Makes the whole of the parts, unless somebody else was quicker.

        Raises:
            UsageError: an id is used twice, there is no record, or a file of records was written
                since it was digested.
        """
        while not self.whole.exists():
            with self._claimed(_JOINED) as is_ours:
                if is_ours and not self.whole.exists():
                    self._join()
                    break
            time.sleep(_AGAIN)  # somebody else joins them
        shutil.rmtree(self.folder, ignore_errors=True)

    def _join(self) -> None:
        for file in self.plan.states:
            path = pathlib.Path(file)
            self.plan.check_unchanged(file, path.stat() if path.exists() else None)
        # Among the parts: whoever joins them deletes what killed processes have left there.
        beside = self.folder / f"{uuid.uuid4().hex}.unfinished"
        try:
            self._write_whole(beside)
            beside.rename(self.whole)
        except OSError:
            if not (self.whole / ABOUT).exists():  # where there are no locks
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _write_whole(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        counts = np.array([self._read(n, "counts") for n in range(len(self.plan.parts))])
        counts = counts.reshape(-1, 4)
        ends = np.cumsum(counts[:, 0]).tolist()
        num_examples = ends[-1] if ends else 0

        def new(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
            return np.lib.format.open_memmap(folder / name, "w+", np.dtype(dtype), shape)

        offsets = new(OFFSETS, (num_examples + 1,), "<i8")
        digests = new(DIGESTS, (num_examples,), "<u8")
        columns = new(COLUMNS_FILE, (len(COLUMNS), num_examples), "<i4")
        ids = np.empty(num_examples, np.uint64)
        with (folder / ROWS).open("wb") as rows:
            for number, end in enumerate(ends):
                here = slice(end - int(counts[number, 0]), end)
                rows.write(self._read(number, "rows").data)
                sizes = self._read(number, "sizes")
                offsets[here.start + 1 : end + 1] = offsets[here.start] + np.cumsum(sizes)
                digests[here] = self._read(number, "digests")
                columns[:, here] = self._read(number, "columns").T
                ids[here] = self._read(number, "ids")
        del offsets, digests, columns  # written, and no longer in memory
        sets: dict[int, np.ndarray] = {}
        for number in range(len(ends)):
            names = ("set_names", "set_sizes", "set_ids")
            sets |= from_arrays({name: self._read(number, name) for name in names})
        if sets:
            write_sets(folder / SETS, sets)
        ids.sort()
        if not num_examples or (ids[1:] == ids[:-1]).any():
            records.survey(self.plan.path)
        written = (OFFSETS, DIGESTS, COLUMNS_FILE, *([SETS] if sets else []))
        about = About(
            num_examples=num_examples,
            num_spans_without_token=int(counts[:, 1].sum()),
            least_id=int(counts[:, 2].min()),
            largest_id=int(counts[:, 3].max()),
            bytes={name: (folder / name).stat().st_size for name in (ROWS, *written)},
            checksums={name: checksum(folder / name) for name in written},
            of=dict(self.plan.of),
        )
        text = files.as_json(msgspec.to_builtins(about), indent=2)
        (folder / ABOUT).write_text(text + "\n", "utf-8")

    def _read(self, number: int, name: str) -> np.ndarray:
        """An array of a part; a part that is damaged is made again."""
        for is_new in (False, True):
            if is_new:
                self._write(number)
            with self._file(number).open("rb") as file:
                try:
                    return np.load(file, allow_pickle=False)[name]
                except Exception as error:  # of whatever kind: a header is parsed as Python
                    said = system_error(error)
                    if said is not None and said.errno != errno.EINVAL:  # a place before the file
                        raise
        raise UsageError(f"{self._file(number)}: expected what was just written, found damage.")


def _arrays_of(plan: Plan, part: Part) -> dict[str, np.ndarray]:
    """The examples of a part of the records.

    Returns:
        `rows`, the examples as bytes; `sizes`, `digests`, `columns` and `ids` (a hash of it) of
        each; `counts`: the examples, the spans without a token, the least and the largest id; and
        the sets that rows name (`example_files.as_arrays`).

    Raises:
        UsageError: a record has a mistake, or the file was written since it was digested.
    """
    with files.path_of(part.file).open("rb") as file, naming_file(part.file):
        file.seek(part.start)
        lines = file.read(part.end - part.start).split(b"\n")
        if part.file in plan.states:  # after it was read
            plan.check_unchanged(part.file, os.fstat(file.fileno()))
    found = example_rows.rows_of(
        lines,
        part.file,
        part.first_line,
        plan.vocabulary,
        plan.lengths["targets"],
        plan.settings,
    )
    counts = [
        *(len(found.contents), found.num_spans_without_token),
        *(found.least_id, found.largest_id),
    ]
    return {
        "rows": np.frombuffer(b"".join(found.contents), np.uint8),
        "sizes": np.array([len(content) for content in found.contents], np.int64),
        "digests": np.frombuffer(b"".join(found.digests), "<u8"),
        "columns": found.columns,
        "ids": np.frombuffer(b"".join(found.id_digests), "<u8"),
        "counts": np.array(counts, np.int64),
        **as_arrays(found.sets),
    }


# -------------------------------------------------------------------------------- Other processes


def _described(vocabulary: tokenization.Tokeniser) -> dict[str, Any] | None:
    """A tokeniser of ours as JSON, for another process; None for any other."""
    for name, kind in _KINDS.items():
        if type(vocabulary) is kind:
            fields = dataclasses.fields(kind)
            return {"kind": name, "fields": {f.name: getattr(vocabulary, f.name) for f in fields}}
    return None


def _make_in_processes(work: _Work, vocabulary: Mapping[str, Any], number: int) -> None:
    """Starts processes that make all parts, and waits for them."""
    job = {
        "whole": str(work.whole),
        "plan": dataclasses.asdict(work.plan) | {"vocabulary": vocabulary},
        "parent": os.getpid(),
    }
    root = str(pathlib.Path(tnt_jax.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    total = len(work.plan.parts)
    told = json.dumps(job, default=os.fspath) + "\n"
    running: list[subprocess.Popen[str]] = []
    try:
        for _ in range(number):
            started = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for us: they end with this process
            )
            running.append(started)
            # A pipe holds 64 KiB: the plan of many parts waits until its reader has imported all.
            threading.Thread(target=_tell, args=(started, told), daemon=True).start()
        for _ in console.progress(_as_they_come(work, running), "making examples, parts", total):
            pass
    finally:
        for process in running:
            process.kill()
            process.communicate()


def _tell(process: "subprocess.Popen[str]", job: str) -> None:
    # Why it has ended before, its status says.
    with contextlib.suppress(OSError, ValueError):
        assert process.stdin is not None
        process.stdin.write(job)
        process.stdin.flush()


def _as_they_come(work: _Work, running: Sequence["subprocess.Popen[str]"]) -> Iterator[int]:
    """Yields once for each part, when it is there; ends when all processes have ended."""
    num_made = 0
    while True:
        statuses = [process.poll() for process in running]
        num_done = len(work.plan.parts) - len(work.missing())
        for _ in range(num_done - num_made):
            yield num_done
        num_made = max(num_made, num_done)
        for process, status in zip(running, statuses, strict=True):
            if status:
                if status == _MISTAKEN:
                    raise UsageError(json.loads(process.communicate()[0])["mistake"])
                raise RuntimeError(
                    f"a process that makes examples ended with status {status}: what it printed "
                    "says why. The same command goes on from the parts that are whole."
                )
        if None not in statuses:
            return
        time.sleep(_AGAIN)


def _take_part() -> int:
    """Makes parts as standard input says; returns the status of the process."""
    job = json.loads(sys.stdin.readline())
    given = job["plan"]
    vocabulary = _KINDS[given["vocabulary"]["kind"]](**given["vocabulary"]["fields"])
    parts = [Part(**part) for part in given["parts"]]
    plan = Plan(**(given | {"vocabulary": vocabulary, "parts": parts}))
    try:
        for _ in _Work(pathlib.Path(job["whole"]), plan).made():
            if os.getppid() != job["parent"]:
                return 1  # it was killed
    except Exception as error:  # a full disk, too: whatever is no defect of ours
        mistake = failures.explain(error)
        if mistake is None:
            raise
        print(json.dumps({"mistake": mistake}))
        return _MISTAKEN
    return 0


if __name__ == "__main__":
    sys.exit(_take_part())
