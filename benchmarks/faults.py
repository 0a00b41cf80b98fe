r"""Disturbs every program in six ways, starts it again, and compares what comes out.

    python benchmarks/faults.py --rounds=4

Every program works on a tiny T5, undisturbed at first. Then, in each round, one of these faults
comes at a random moment from its start to its end:

    kill      `kill -9`, once to three times
    term      SIGTERM, once to three times: it ends with status 75, or 0 if it was done
    full      no file may be longer than a random size, from the start or from a moment on
              (RLIMIT_FSIZE, which a disk that is full resembles: a write fails half-way)
    readonly  the folder of the output, and all that is in it, may not be written any more
    changed   an input is another one: after a `kill -9`, or while the program is at work
    two       a second run starts in the same place, with the same input or with another

What the program says may not contain a traceback. If it ends with 2, it has said why in one line.
Then the fault goes away, and the same command must come to what the undisturbed run came to: every
file, byte by byte, but for times and paths; every array of a checkpoint, bit by bit. After an input
has changed, it must come to what that input gives from scratch, or refuse in one line, and with the
first input again to what that gives, or refuse. Of two at once, the result must be wholly one's.

The exit status is 1 at the first difference, which is named, and its files are kept. `--rows=FILE`
keeps what was done; with the same file, what is in it is not done again.
`kill_and_resume.py` kills `train` on several devices, and looks at its memory, too.

Takes 17 minutes for each round of `--rounds`, and about 3 GB of memory, on a machine at work.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import kill_and_resume
import numpy as np

from tnt_jax.checkpoints import orbax
from tnt_jax.data import records
from tnt_jax.runtime import console

Process = multiprocessing.Process
Results = Mapping[str, str]

# Of JSON that is written: what the clock says; settings as gin writes them, those alone that a
# process has used, and one that goes on uses fewer.
TIMES = {"seconds", "train_seconds", "training", "loads", "config", *kill_and_resume.TIMES}
# Of a place: what holds a time in every line; notes of files with their times; states of a model,
# kept whatever they were computed for; settings, as above; what was said; what `kill -9` leaves.
UNLIKE = re.compile(
    r"events\.out\.tfevents|(^|/)stages/|^states/|\.gin$|(^|/)log\.txt$|\.unfinished$"
)
# In a page: settings and notes as they are in files, and digests of these.
OF_FILES = re.compile(rb"<pre.*?</pre>|\b[0-9a-f]{64}\b", re.DOTALL)
# In a place, beside "input": of the same name, which some programs note.
OTHER = "other/input"
CHECKPOINT = re.compile(r"(.*/)?checkpoint_\d+")


class DifferenceError(Exception):
    """A program did not do what it should; the message says what it did."""


# -------------------------------------------------------------------------------------- Programs


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, and what of its input changes.

    Attributes:
      command: From a place, the folder of a run, and the path of the input to the arguments.
      input: What a run reads, which is copied to its place: a file or a folder.
      other: What it is changed to.
      writes_one: Whether all of its output comes from one reading of the input.
      is_done_once: Whether it refuses to do again what is done.
    """

    command: Callable[[pathlib.Path, pathlib.Path], list[str]]
    input: pathlib.Path
    other: pathlib.Path
    writes_one: bool = True
    is_done_once: bool = False


def gin_flags(gin_files: list[str | pathlib.Path], settings: Mapping[str, object]) -> list[str]:
    """Files and settings as arguments."""
    return [
        *(f"--gin_file={file}" for file in gin_files),
        *(f"--gin.{name}={value}" for name, value in settings.items()),
    ]


def programs(world: pathlib.Path) -> dict[str, Program]:
    """All of them, in a folder that `write_world` has filled."""
    model = world / "model.gin"
    vocabulary = {"VOCABULARY_PATH": world / "vocabulary.model", "EXTRA_IDS": 0}
    lengths = {"TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 24}}
    updates = {"BATCH_SIZE": 16, "OPTIMIZER": "@optax.adam", "LEARNING_RATE": 3e-3}
    experiment = {
        **{**vocabulary, **lengths, **updates},
        "ORIGINAL_CHECKPOINT_PATH": world / "original",
        "EVAL_PROMPTS": world / "records.jsonl",
        "ANNOTATOR": "@annotators.Lexicon",
        "MAX_LENGTH": 24,
        "TRAIN_STEPS": 20,
    }
    marked, other = world / "records.jsonl", world / "records-other.jsonl"

    def of_gin(files: list[str | pathlib.Path], settings: Mapping[str, object], **places: str):
        """Where a setting is a path in the place, and "" is the input."""

        def command(place: pathlib.Path, source: pathlib.Path) -> list[str]:
            paths = {name: place / path if path else source for name, path in places.items()}
            return gin_flags(files, {**settings, **paths})

        return command

    def of_patch(place: pathlib.Path, source: pathlib.Path) -> list[str]:
        given = {"model": world / "original", "prompts": source, "words": world / "words.txt"}
        given |= {"output": place / "output", "cut": 0.9}
        more = {**vocabulary, "LEARNING_RATE": 3e-3, "OPTIMIZER": "@optax.adam"}
        return [f"--{name}={value}" for name, value in given.items()] + gin_flags([], more)

    def of_convert(place: pathlib.Path, source: pathlib.Path) -> list[str]:
        return [f"--input={source}", f"--output={place / 'output'}", "--output_format=t5x"]

    return {
        "generate": Program(
            of_gin(
                [model, "runs/generate.gin"],
                {
                    **{**vocabulary, **lengths, "BATCH_SIZE": 64, "MAX_LENGTH": 24},
                    "CHECKPOINT_PATH": world / "original",
                },
                PROMPTS="",
                OUTPUT="output.jsonl",
            ),
            *(world / "many.jsonl", world / "many-other.jsonl"),
        ),
        "annotate": Program(
            of_gin(
                ["runs/annotate_lexicon.gin"],
                {**vocabulary, "RECORDS": world / "very_many.jsonl", "AT_EVERY_POSITION": True},
                LEXICON="",
                OUTPUT="output.jsonl",
            ),
            *(world / "words.txt", world / "words-other.txt"),
        ),
        "train": Program(
            of_gin(
                [model, "objectives/tnrf.gin", "runs/train.gin"],
                {
                    **{**vocabulary, **lengths, **updates, "TRAIN_STEPS": 12},
                    "INITIAL_CHECKPOINT_PATH": world / "original",
                    "CHECKPOINT_EVERY": 3,
                    "LOG_EVERY": 2,
                    "DROPOUT_RATE": 0.1,
                },
                RECORDS="",
                MODEL_DIR="output",
            ),
            *(marked, other),
        ),
        "localize": Program(
            of_gin(
                [model, "runs/localize.gin"],
                {
                    **{**vocabulary, **lengths, "BATCH_SIZE": 16},
                    **{"CHECKPOINT_PATH": world / "original", "NUM_UPDATES": 30, "NUM_FOLDS": 2},
                },
                **{"RECORDS": "", "OUTPUT": "output.jsonl", "STATES_DIR": "states"},
            ),
            *(marked, other),
        ),
        "evaluate": Program(
            of_gin(
                [model, "runs/evaluate.gin"],
                {
                    **{**vocabulary, **lengths, "BATCH_SIZE": 16},
                    "ORIGINAL_RECORDS": marked,
                    "ORIGINAL_CHECKPOINT_PATH": world / "original",
                    "CHECKPOINT_PATH": world / "patched",
                },
                **{"CURRENT_RECORDS": "", "OUTPUT": "output.json", "TOKENS_OUTPUT": "tokens.jsonl"},
            ),
            *(world / "current.jsonl", world / "current-other.jsonl"),
        ),
        "convert": Program(of_convert, world / "original", world / "patched", is_done_once=True),
        "pipeline": Program(
            of_gin(
                [model, "runs/pipeline.gin"],
                {
                    **experiment,
                    "annotators.Lexicon.path": world / "words.txt",
                    "ARMS": "[@tnrf/experiment.Arm(), @ul_ll/experiment.Arm()]",
                },
                TRAIN_PROMPTS="",
                OUTPUT_DIR="output",
            ),
            *(marked, other),
            writes_one=False,
        ),
        "sweep": Program(
            of_gin(
                [model, "runs/sweep.gin"],
                {**experiment, "TRAIN_PROMPTS": marked, "OBJECTIVES": "['TNRF']", "ALPHAS": [1.0]},
                **{"annotators.Lexicon.path": "", "OUTPUT_DIR": "output"},
            ),
            *(world / "words.txt", world / "words-other.txt"),
            writes_one=False,
        ),
        "report": Program(
            of_gin(
                ["runs/report.gin"],
                {"ORIGINAL_RECORDS": marked},
                CURRENT_RECORDS="",
                OUTPUT="output.html",
            ),
            *(world / "current.jsonl", world / "current-other.jsonl"),
        ),
        "patch": Program(
            of_patch, world / "prompts.txt", world / "prompts-other.txt", writes_one=False
        ),
    }


def write_world(world: pathlib.Path, runs: kill_and_resume.Runs) -> None:
    """Writes all that the programs read, and makes an original and a patched model."""
    kill_and_resume.write_world(world)
    unwanted, sizes = kill_and_resume.UNWANTED, kill_and_resume.STATES
    (world / "words.txt").write_text("\n".join(unwanted) + "\n")
    (world / "words-other.txt").write_text("\n".join([*unwanted, "quiet"]) + "\n")
    prompts = [f"{size} {name}" for size in sizes for name in kill_and_resume.NAMES]
    # In both orders, so that there are enough to keep some back.
    prompts += [" ".join(reversed(prompt.split())) for prompt in prompts]
    (world / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (world / "prompts-other.txt").write_text("\n".join(prompts[::-1]) + "\n")

    def write(name: str, rows: list[records.Record]) -> None:
        records.write_records(world / f"{name}.jsonl", rows)

    rows = list(records.read_records(world / "records.jsonl"))
    write("records-other", rows[:-7])

    def copies(number: int) -> Iterator[records.Record]:
        for copy in range(number):
            for row in rows:
                yield dataclasses.replace(row, id=f"{row.id} {copy}", negative_spans=None)

    many = list(copies(10))
    write("many", many)
    write("many-other", many[::-1])
    write("very_many", list(copies(90)))

    def without(*words: str) -> Iterator[records.Record]:
        for row in rows:
            for word in words:
                if word in row.targets:
                    targets = row.targets.replace(word, "clean")
                    row = dataclasses.replace(row, targets=targets, negative_spans=())
            yield row

    write("current", list(without(unwanted[0])))
    write("current-other", list(without(*unwanted)))

    def train(name: str, objective: str, start: object, rate: float, num_steps: int) -> None:
        settings = {"INITIAL_CHECKPOINT_PATH": start, "MODEL_DIR": world / name}
        settings |= {"LEARNING_RATE": rate, "TRAIN_STEPS": num_steps}
        command = kill_and_resume.arguments(world, [f"objectives/{objective}.gin"], **settings)
        runs.finish(command, 1, name)

    train("original", "fine_tune", None, 1e-2, 80)
    # To the same update: `convert` puts checkpoints of several beside each other.
    train("patched", "tnrf", world / "original", 3e-4, 80)


# --------------------------------------------------------------------------------------- Results


def results(place: pathlib.Path) -> dict[str, str]:
    """What a run came to: digests of files and of arrays, by their names in its place."""
    found = {}
    inside = {path: str(path.relative_to(place)) for path in sorted(place.rglob("*"))}
    names = {path for path, name in inside.items() if CHECKPOINT.fullmatch(name)}
    checkpoints = {path for path in names if (path / "params").exists()}  # Orbax's
    for path, name in inside.items():
        if name.partition("/")[0] in ("input", "other") or UNLIKE.search(name):
            continue
        if path in checkpoints:
            found |= {f"{name}/{item}": value for item, value in of_checkpoint(path).items()}
        elif path.is_file() and not any(folder in checkpoints for folder in path.parents):
            text = content_of(path).replace(f"{place}/{OTHER}".encode(), f"{place}/input".encode())
            text = text.replace(str(place).encode(), b"")
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def of_checkpoint(folder: pathlib.Path) -> dict[str, str]:
    """Digests of the arrays in a checkpoint, and of what it says of its run."""
    found = {}
    for item in ("params", "optimizer"):
        if (folder / item).exists():
            for name, lazy in orbax.lazy_item(folder / item).items():
                array = np.asarray(lazy.load())
                content = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
                found[f"{item}/{name}"] = hashlib.sha256(content).hexdigest()
    about = dict(orbax.read_run(folder) or {})
    about.pop("config", None)  # names the place
    return found | {f"run/{name}": json.dumps(value) for name, value in about.items()}


def content_of(file: pathlib.Path) -> bytes:
    """The bytes of a file, of JSON without what the clock says."""
    content = file.read_bytes()
    if file.suffix == ".html":
        return OF_FILES.sub(b"", content)
    if file.suffix in (".json", ".jsonl"):
        lines = content.splitlines() if file.suffix == ".jsonl" else [content]
        values = [without_times(json.loads(line)) for line in lines]
        return "\n".join(json.dumps(value, sort_keys=True) for value in values).encode()
    return content


def without_times(value: object) -> object:
    """A value of JSON without the fields in `TIMES`."""
    if isinstance(value, dict):
        kept = ((name, part) for name, part in value.items() if name not in TIMES)
        return {name: without_times(part) for name, part in kept}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def difference(expected: Results, found: Results) -> list[str]:
    """The names of results that differ."""
    names = sorted(expected.keys() | found.keys())
    return [name for name in names if expected.get(name) != found.get(name)]


# ---------------------------------------------------------------------------------------- Trials


class Trial:
    """One round of one fault: a place with an input, in which runs are started and disturbed.

    Args:
      bench: The program and what its undisturbed runs came to.
      place: The folder, which is made.
      seed: Of the moments.
    """

    def __init__(self, bench: "Bench", place: pathlib.Path, seed: str):
        self._bench, self._place = bench, place
        self._logged = 0  # characters of what was said that were looked at
        self.chance = random.Random(seed)
        self.done: list[str] = []  # for the table: what was done, and what came of it
        self.num_faults = 0
        bench.prepare(place)

    def moment(self) -> float:
        """Seconds: any moment of an undisturbed run."""
        return self.chance.uniform(0, self._bench.seconds)

    def start(self, input_name: str = "input") -> Process:
        """Starts the program."""
        bench = self._bench
        command = bench.program.command(self._place, self._place / input_name)
        return bench.runs.start(command, 1, self._place.name, bench.name)

    def end(self, process: Process, *expected: int) -> int:
        """Waits for a run; returns its status, which must be one of those expected."""
        process.join(120 + 20 * self._bench.seconds)
        if process.is_alive():
            process.kill()
            raise DifferenceError("it did not end")
        status = process.exitcode
        assert status is not None
        if status not in expected:
            raise DifferenceError(f"status {status}, and not one of {expected}")
        return status

    def said(self, refused: int) -> None:
        """Looks at what the runs since the last look have said: no traceback, a line a refusal."""
        text = self._bench.runs.said(self._place.name)
        text, self._logged = text[self._logged :], len(text)
        if "Traceback" in text:
            raise DifferenceError("a traceback")
        errors = re.findall(r"^tnt_jax\.\w+: error: .*", text, re.MULTILINE)
        if len(errors) != refused:
            raise DifferenceError(f"{len(errors)} lines of an error, and not {refused}")
        # Everything else is a line of progress: no pages from a library.
        self.done += [shown(error) for error in errors]

    def compare(self, *expected: Results) -> None:
        """The results must be those of one undisturbed run."""
        found = results(self._place)
        gaps = [difference(each, found) for each in expected]
        if all(gaps):
            raise DifferenceError(f"other results: {min(gaps, key=len)[:8]}")

    def finish(self, *expected: Results, may_refuse: bool = False) -> int:
        """Runs to the end; its results must be expected, unless it may refuse, and does."""
        is_done_once = self._bench.program.is_done_once
        status = self.end(self.start(), *((0, 2) if may_refuse or is_done_once else (0,)))
        self.said(refused=status == 2)
        if status == 0 or not may_refuse:
            self.compare(*expected)
        return status

    def swap(self, source: pathlib.Path) -> None:
        """Makes the input another one, between one system call and the next."""
        new, old = self._place / "other_new", self._place / "other_old"
        copy(source, new)
        (self._place / "input").rename(old)
        new.rename(self._place / "input")
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file or a folder."""
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)


def shown(error: str) -> str:
    """The beginning of a message, without paths and numbers, so that like ones are alike."""
    text = re.sub(r"/\S+/", "", error.partition(" error: ")[2])
    return " ".join(re.sub(r"\d+", "N", text).split()[:7])


class Bench:
    """A program with the results of its undisturbed runs, with either input."""

    def __init__(self, name: str, program: Program, runs: kill_and_resume.Runs, folder):
        self.name, self.program, self.runs, self.folder = name, program, runs, folder
        self.expected, _ = self._undisturbed("straight", program.input)
        again, self.seconds = self._undisturbed("again", program.input)
        if found := difference(self.expected, again):
            sys.exit(f"{name}: two undisturbed runs differ in {found} ({folder})")
        self.other, _ = self._undisturbed("other", program.other)
        if not difference(self.expected, self.other):
            sys.exit(f"{name}: the other input makes no difference ({folder})")
        straight = folder / f"{name}-straight"
        written = [path for path in straight.rglob("*") if path.is_file()]
        self.sizes = [path.stat().st_size for path in written if path.parent != straight / "input"]

    def prepare(self, place: pathlib.Path, source: pathlib.Path | None = None) -> None:
        """Makes a place with an input, and another one beside it."""
        place.mkdir()
        copy(source or self.program.input, place / "input")
        (place / OTHER).parent.mkdir()
        copy(self.program.other, place / OTHER)

    def _undisturbed(self, kind: str, source: pathlib.Path) -> tuple[Results, float]:
        place = self.folder / f"{self.name}-{kind}"
        shutil.rmtree(place, ignore_errors=True)
        self.prepare(place, source)
        command = self.program.command(place, place / "input")
        seconds = self.runs.finish(command, 1, place.name, self.name)
        return results(place), seconds


# ---------------------------------------------------------------------------------------- Faults


def signals(trial: Trial, bench: Bench, number: signal.Signals) -> None:
    """Sends a signal, once to three times."""
    for _ in range(trial.chance.randint(1, 3)):
        process = trial.start()
        process.join(trial.moment())
        if not process.is_alive():
            trial.end(process, 0)
            break
        os.kill(process.pid, number)
        # 0: too late. -SIGTERM: before the program had begun.
        answers = (75, 0) if number == signal.SIGTERM else (0,)
        status = trial.end(process, *answers, -number)
        trial.num_faults += status != 0
        trial.done.append(f"status {status}")
        trial.said(refused=0)
    trial.finish(bench.expected)


def kill(trial: Trial, bench: Bench) -> None:
    """`kill -9`."""
    signals(trial, bench, signal.SIGKILL)


def term(trial: Trial, bench: Bench) -> None:
    """SIGTERM."""
    signals(trial, bench, signal.SIGTERM)


def full(trial: Trial, bench: Bench) -> None:
    """No room for more than a part of some file."""
    largest = trial.chance.randint(0, max(trial.chance.choice(bench.sizes), 1))
    process = trial.start()
    if trial.chance.random() < 0.6:
        process.join(trial.moment())
    if process.is_alive():
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest, hard))
        trial.num_faults += 1
    ended_with_an_error(trial, bench, process)


def readonly(trial: Trial, bench: Bench) -> None:
    """Nothing may be written to the place any more."""
    process = trial.start()
    process.join(trial.moment())
    if process.is_alive():
        permit(trial, False)
        trial.num_faults += 1
    try:
        ended_with_an_error(trial, bench, process, lambda: permit(trial, True))
    finally:
        permit(trial, True)


def permit(trial: Trial, is_so: bool) -> None:
    """Lets everybody write to the place, or nobody."""
    for folder, _, names in os.walk(trial._place):
        for path in (pathlib.Path(folder), *(pathlib.Path(folder, name) for name in names)):
            try:
                mode = path.stat().st_mode & 0o777
                path.chmod(mode | 0o200 if is_so else mode & 0o555)
            except FileNotFoundError:  # it was renamed meanwhile
                continue


def ended_with_an_error(
    trial: Trial, bench: Bench, process: Process, repair: Callable[[], None] = lambda: None
) -> None:
    """A run whose writes failed has said so, or has not noticed and is right."""
    status = trial.end(process, 0, 2)
    trial.done.append(f"status {status}")
    trial.said(refused=status == 2)
    repair()
    if status == 0:
        trial.compare(bench.expected)
    trial.finish(bench.expected)


def changed(trial: Trial, bench: Bench) -> None:
    """The input is another one from some moment on, and later the first one again."""
    process, is_killed = trial.start(), trial.chance.random() < 0.5
    process.join(trial.moment())
    if is_killed and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        trial.end(process, 0, -signal.SIGKILL)
    trial.swap(bench.program.other)
    trial.num_faults += 1
    status = trial.end(process, 0, 2, -signal.SIGKILL)
    trial.done.append(f"killed, then changed: {status}" if is_killed else f"changed: {status}")
    trial.said(refused=status == 2)
    if status == 0 and bench.program.writes_one:
        trial.compare(bench.expected, bench.other)
    trial.finish(bench.other, may_refuse=True)
    trial.swap(bench.program.input)
    trial.finish(bench.expected, may_refuse=True)


def two(trial: Trial, bench: Bench) -> None:
    """A second run in the same place."""
    inputs = ["input", trial.chance.choice(["input", OTHER])]
    processes = [trial.start(inputs[0])]
    processes[0].join(trial.moment() * trial.chance.choice([0, 1]))
    processes.append(trial.start(inputs[1]))
    trial.num_faults += 1
    statuses = [trial.end(process, 0, 2) for process in processes]
    trial.done.append(f"{'the same' if inputs[0] == inputs[1] else 'other'} input: {statuses}")
    trial.said(refused=statuses.count(2))
    if 0 not in statuses:
        raise DifferenceError("neither of two did the work")
    winners = [name for name, status in zip(inputs, statuses, strict=True) if status == 0]
    expected = {"input": bench.expected, OTHER: bench.other}
    trial.compare(*(expected[name] for name in winners))
    trial.finish(bench.expected, may_refuse=OTHER in winners)


FAULTS = {function.__name__: function for function in (kill, term, full, readonly, changed, two)}


# ------------------------------------------------------------------------------------------ Main


def attempt(bench: Bench, fault: str, number: int, seed: int) -> dict[str, object]:
    """A row of what was done in one round; of a difference its last entry says what it is."""
    place = bench.folder / f"{bench.name}-{fault}-{number}"
    log = bench.folder / f"{place.name}.log"
    shutil.rmtree(place, ignore_errors=True)
    log.unlink(missing_ok=True)
    trial = Trial(bench, place, f"{seed} {bench.name} {fault} {number}")
    began, differs = time.monotonic(), None
    try:
        FAULTS[fault](trial, bench)
        shutil.rmtree(place)
        log.unlink()
    except DifferenceError as error:
        differs = str(error)
    return {
        **{"program": bench.name, "fault": fault, "round": number, "faults": trial.num_faults},
        **{"seconds": round(time.monotonic() - began, 1), "done": trial.done, "differs": differs},
    }


def main() -> None:
    """All programs, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*programs(pathlib.Path())]
    parser.add_argument("--programs", nargs="+", default=names, choices=names)
    parser.add_argument("--faults", nargs="+", default=[*FAULTS], choices=FAULTS)
    parser.add_argument("--rounds", type=int, default=4, help="of each program with each fault")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--rows", type=pathlib.Path, help="a JSONL file, which is added to")
    parser.add_argument("--go_on", action="store_true", help="after a difference, too")
    parser.add_argument("--folder", type=pathlib.Path, help="for the files; kept, and used again")
    flags = parser.parse_args()
    rows = kill_and_resume.lines_of(flags.rows) if flags.rows else []
    rows = [row for row in rows if not row["differs"]]  # what differed is done again
    already = {(row["program"], row["fault"], row["round"]) for row in rows}
    folder = (flags.folder or pathlib.Path(tempfile.mkdtemp(prefix="faults"))).absolute()
    runs = kill_and_resume.Runs(folder, tuple(names))
    if not (folder / "patched").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_world(folder, runs)
    differ = []
    for name in flags.programs:
        rounds = [(fault, 1 + number) for number in range(flags.rounds) for fault in flags.faults]
        rounds = [each for each in rounds if (name, *each) not in already]
        bench = Bench(name, programs(folder)[name], runs, folder) if rounds else None
        for fault, number in rounds:
            row = attempt(bench, fault, number, flags.seed)
            console.log(json.dumps(row))
            if flags.rows:
                with flags.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if not row["differs"]:
                rows.append(row)
                continue
            differ.append(f"{folder}/{name}-{fault}-{number}, and its .log: {row['differs']}")
            if not flags.go_on:
                sys.exit(differ[0])
    show(rows)
    if differ:
        sys.exit("\n".join(differ))
    if flags.folder is None:
        shutil.rmtree(folder)


def show(rows: list[dict]) -> None:
    """A table: of each program and fault, how often, in what time, and what came of it."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["program"], row["fault"]].append(row)
    table = []
    for (name, fault), group in groups.items():
        outcomes = collections.Counter(text for row in group for text in row["done"])
        shown_outcomes = "; ".join(f"{text} ({count})" for text, count in outcomes.items())
        seconds = sum(row["seconds"] for row in group)
        table.append((name, fault, sum(row["faults"] for row in group), seconds, shown_outcomes))
    columns = ("program", "fault", "times", "seconds", "what the runs said and ended with")
    num_faults = sum(row[2] for row in table)
    console.table(table, columns=columns, title=f"{num_faults} faults without a difference")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="os.fork")
    main()
