r"""Damages valid files of every format, and gives them to what the programs read with.

    python benchmarks/fuzz.py --inputs=10000

For each format a small valid input is written once: records, lists of annotators, gin files,
tokenizers, models in all formats, examples, what a report reads, and what runs leave for later
runs. Each case is a copy in which a file is damaged once to three times: bits are flipped; bytes,
lines or keys are lost, doubled or put elsewhere; a value becomes one of another kind, huge, not
finite, negative or deeply nested; a length in a header lies; text is no UTF-8, or has a mark at its
start or a null in it; a file is empty, a directory, missing or a link to itself; a compressed chunk
is half a gigabyte of zeros.

What comes of it must be a result or a message of one line, as programs print it (`failures`). These
are failures: any other exception; a traceback on stderr; a message that the memory did not suffice;
more than 10 seconds of a processor; more than 200 MB of resident memory beyond the files' own size;
the end of the process. A case is decided by its format, `--seed` and its number:

    python benchmarks/fuzz.py --format=gguf --case=17

does one again and shows all of it. The files of a failure are kept (`--failures`), and are read
again with `--format=gguf --files=FOLDER`. The exit status is 1 if there is a failure.

Takes 30 minutes of one core for 10,000 inputs (estimated), and about 1 GB of memory.
"""

import argparse
import collections
import contextlib
import gc
import io
import json
import math
import os
import pathlib
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import fuzz_damage
import fuzz_formats
from fuzz_formats import COMMON, FORMATS, write_common, write_json

from tnt_jax.runtime import console, failures, program

Folder = pathlib.Path

MOST_SECONDS = 10  # of a processor
MOST_SECONDS_WAITING = 120  # of the clock, on a machine that others use
MOST_BYTES = 200 * 2**20
CASES_PER_PROCESS = 500

# ----------------------------------------------------------------------------------------- Cases


def memory(key: str) -> int:
    """Bytes of this process: "VmRSS", or "VmHWM", the most since `forget_peak`."""
    status = Folder("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(key)).split()[1])


def forget_peak() -> None:
    """The most memory is from now on that of now."""
    Folder("/proc/self/clear_refs").write_text("5")


def processor_seconds() -> float:
    """The processor time that this process and its finished children have taken."""
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime


def size_of(folder: Folder) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prepare(folder: Folder, seed: int, name: str, number: int) -> tuple[Folder, list[str]]:
    """The files of a case, in a folder of its own, and what was done to them."""
    place = folder / "damaged"
    remove(place)
    shutil.copytree(folder / "valid", place)
    chance = random.Random(f"{seed} {name} {number}")
    return place, fuzz_damage.damage(place, FORMATS[name].pattern, chance)


def remove(path: Folder) -> None:
    """Deletes whatever is there."""
    shutil.rmtree(path, ignore_errors=True)


def outcome(name: str, place: Folder, log: Folder, *, shows: bool = False) -> dict[str, Any]:
    """What comes of reading a folder: `said`, a message or "", or `failure`."""
    gc.collect()
    forget_peak()
    before, began, logged = memory("VmRSS"), processor_seconds(), log.stat().st_size
    allowed = before + size_of(place) + MOST_BYTES
    said, failure = "", None
    try:
        FORMATS[name].read(Folder(place.name))
    except BaseException as error:
        if shows:
            traceback.print_exc()
        message = failures.explain(error) if isinstance(error, Exception) else None
        if message is None:
            *_, last = traceback.extract_tb(error.__traceback__)
            failure = f"{type(error).__name__}: {error!s:.300} ({last.filename}:{last.lineno})"
        else:
            said = message
            if not (10 < len(message) < 2200 and message.isprintable()):
                failure = f"a message that is no line: {message!r}"
            elif message.startswith("out of memory"):
                failure = message
    seconds, peak = processor_seconds() - began, memory("VmHWM")
    gc.collect()
    sys.stderr.flush()
    printed = log.read_bytes()[logged:].decode("utf-8", "replace")
    if failure is None and "Traceback" in printed:
        failure = f"printed: {printed[-600:]}"
    elif failure is None and seconds > MOST_SECONDS:
        failure = f"{seconds:.1f} seconds of a processor"
    elif failure is None and peak > allowed:
        failure = f"{(peak - before) / 2**20:,.0f} MiB of memory for {size_of(place):,} bytes"
    return {
        **{"said": said, "failure": failure, "seconds": round(seconds, 2)},
        "mebibytes": round((peak - before) / 2**20),
    }


def start_as_programs_do() -> None:
    """Logging, warnings and signals as a program has them."""
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        program.run("tnt_jax.report", "report", ["--help"])


def work(name: str, folder: Folder, seed: int, numbers: range) -> None:
    """Does the cases of one process; prints a line before and after each."""
    os.chdir(folder)
    log = folder / "stderr.txt"
    log.touch()
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start_as_programs_do()

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    found = None
    fuzz_formats.is_first[0] = True
    for _ in range(2):  # what is imported and compiled once is nobody's memory
        remove(folder / "damaged")
        shutil.copytree("valid", "damaged")
        found = outcome(name, folder / "damaged", log)
    assert found is not None
    if found["said"] or found["failure"]:
        answer(broken=f"what is valid is not read: {found}")
        return
    fuzz_formats.is_first[0] = False
    gc.collect()
    gc.freeze()  # what programs import need not be looked through after each case
    size = int(Folder("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * 2**30, resource.RLIM_INFINITY))
    for number in numbers:
        place, done = prepare(folder, seed, name, number)
        answer(begun=number, done=done)
        answer(number=number, done=done, **outcome(name, place, log))


def write_valid(name: str, folder: Folder) -> None:
    """Writes the valid input of a format, in a process of its own folder."""
    if (folder / "valid").exists():
        return
    remove(folder)
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        write_common(Folder(COMMON))
        # Under the name that it is read by: some files hold paths.
        Folder("damaged").mkdir()
        FORMATS[name].write(Folder("damaged"))
        Folder("damaged").rename("valid")


# ------------------------------------------------------------------------------------------- Main


def run_worker(flags: argparse.Namespace, name: str, numbers: range) -> Iterator[dict[str, Any]]:
    """Cases of a process of its own, one by one; the last one may be what ended it."""
    command = [sys.executable, __file__, f"--worker={name}", f"--seed={flags.seed}"]
    command += [f"--folder={flags.folder}", f"--first={numbers.start}", f"--last={numbers.stop}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        begun: dict[str, Any] | None = None
        for line in lines_of(process):
            found = json.loads(line)
            if "broken" in found:
                sys.exit(f"{name}: {found['broken']}")
            begun = {"number": found["begun"], "done": found["done"]} if "begun" in found else None
            if begun is None:
                yield found
        process.kill()
        status = process.wait()
        if begun is not None:
            reason = "it did not come to an end" if status == -9 else f"ended with {status}"
            yield {**begun, "said": "", "failure": reason, "seconds": 0, "mebibytes": 0}
        elif status not in (0, -9):
            sys.exit(f"{name}: a process ended with {status}, see {flags.folder}/{name}/stderr.txt")


def lines_of(process: "subprocess.Popen[bytes]") -> Iterator[bytes]:
    """What a process prints, line by line; ends with it, and where the next one takes too long."""
    assert process.stdout is not None
    waiting, began, at_first = b"", time.monotonic(), seconds_of(process.pid)
    while True:
        if select.select([process.stdout], [], [], 1)[0]:
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                return
            *lines, waiting = (waiting + part).split(b"\n")
            yield from lines
            began, at_first = time.monotonic(), seconds_of(process.pid)
        # Starting takes longer than a case may: three times as long, and it says itself what it is.
        elif (
            seconds_of(process.pid) - at_first > 3 * MOST_SECONDS
            or time.monotonic() - began > MOST_SECONDS_WAITING
        ):
            return


def seconds_of(process_id: int) -> float:
    """Processor time of a process."""
    try:
        fields = Folder(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def shares(inputs: int, names: Sequence[str]) -> dict[str, int]:
    """How many inputs each format gets."""
    total = sum(FORMATS[name].share for name in names)
    return {name: math.ceil(inputs * FORMATS[name].share / total) for name in names}


def fuzz(flags: argparse.Namespace, name: str, number: int) -> list[dict[str, Any]]:
    """All cases of a format; keeps the files of failures."""
    command = [sys.executable, __file__, f"--write={name}", f"--folder={flags.folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found, first, last = [], flags.first, flags.first + number
    while first < last:
        numbers = range(first, min(first + CASES_PER_PROCESS, last))
        for case in run_worker(flags, name, numbers):
            found.append(case)
            with (flags.folder / name / "cases.jsonl").open("a") as file:
                file.write(json.dumps({"seed": flags.seed, **case}) + "\n")
            if case["failure"]:
                keep(flags, name, case)
        if not found:
            sys.exit(f"{name}: no case was done, see {flags.folder}/{name}/stderr.txt")
        first = found[-1]["number"] + 1
    return found


def keep(flags: argparse.Namespace, name: str, case: dict[str, Any]) -> None:
    """Copies the files of a failure, and says what it was."""
    target = flags.failures / f"{name}-{flags.seed}-{case['number']}"
    remove(target)
    with tempfile.TemporaryDirectory() as other:  # the place of the case is in use
        shutil.copytree(flags.folder / name / "valid", Folder(other) / "valid")
        place, _ = prepare(Folder(other), flags.seed, name, case["number"])
        shutil.copytree(place, target / "damaged", symlinks=True)
    write_json(target / "case.json", case)
    console.log(f"{target}: {case['failure']} ({'; '.join(case['done'])})")


def again(flags: argparse.Namespace) -> None:
    """One case, or the files of one, in this process, with everything that it says."""
    folder = flags.folder / flags.format
    write_valid(flags.format, folder)
    with contextlib.chdir(folder):
        if flags.files:
            remove(Folder("damaged"))
            shutil.copytree(flags.files, "damaged", symlinks=True)
            console.log(f"the files of {flags.files}")
        else:
            console.log("; ".join(prepare(folder, flags.seed, flags.format, flags.case)[1]))
        Folder("stderr.txt").touch()
        console.log(
            str(outcome(flags.format, folder / "damaged", Folder("stderr.txt"), shows=True))
        )


def main() -> None:
    """All formats, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=[*FORMATS], choices=FORMATS)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all formats together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", choices=FORMATS, help="of the one case to do again")
    parser.add_argument("--case", type=int, help="its number")
    parser.add_argument("--files", type=Folder, help="in its place: a folder of its files")
    parser.add_argument("--folder", type=Folder, help="for the files; kept, and used again")
    parser.add_argument("--failures", type=Folder, default=Folder("fuzz_failures"))
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--worker", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=FORMATS, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    is_kept = flags.folder is not None
    flags.folder = (flags.folder or Folder(tempfile.mkdtemp(prefix="fuzz"))).absolute()
    flags.failures = flags.failures.absolute()
    flags.files = flags.files and flags.files.absolute()
    if flags.write:
        write_valid(flags.write, flags.folder / flags.write)
    elif flags.worker:
        numbers = range(flags.first, flags.last)
        work(flags.worker, flags.folder / flags.worker, flags.seed, numbers)
    elif flags.format:
        again(flags)
    else:
        rows = []
        for name, number in shares(flags.inputs, flags.formats).items():
            cases = fuzz(flags, name, number)
            rows.append(row_of(name, cases))
            console.log(" ".join(map(str, rows[-1])))
        show(rows)
        if not is_kept:
            remove(flags.folder)
        if any(row[4] for row in rows):
            sys.exit(1)


def row_of(name: str, cases: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    """A row of the table."""
    counts = collections.Counter(
        "failures" if case["failure"] else "refused" if case["said"] else "read" for case in cases
    )
    said = {case["said"] for case in cases if case["said"]}
    return (
        *(name, len(cases), counts["refused"], counts["read"], counts["failures"], len(said)),
        *(max(case["mebibytes"] for case in cases), max(case["seconds"] for case in cases)),
    )


def show(rows: Sequence[tuple[Any, ...]]) -> None:
    """The table."""
    columns = ("format", "inputs", "refused", "read", "failures", "different messages")
    columns += ("most MiB", "most seconds")
    total = ("all", *(sum(row[i] for row in rows) for i in range(1, 6)))
    total += tuple(max(row[i] for row in rows) for i in (6, 7))
    console.table([*rows, total], columns=columns, title="What came of damaged files")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
