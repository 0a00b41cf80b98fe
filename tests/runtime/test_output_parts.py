"""Work in parts: one process or several, stopped or not, the same bytes; and nothing done twice."""

import contextlib
import json
import pathlib
import re
import shutil
import signal
import time

import hypothesis
import pytest
from helpers import rooms, several
from helpers.holders import refusal
from hypothesis import strategies as st

from tnt_jax import annotate, annotators
from tnt_jax.annotators import beam_jobs
from tnt_jax.data import records, removed_everywhere
from tnt_jax.runtime import output_parts
from tnt_jax.runtime.errors import UsageError

ALONE = {"TNT_JAX_DISTRIBUTED": ""}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        yield


def part_files(output):
    return sorted(path.name for path in pathlib.Path(f"{output}.parts").glob("[0-9]*.jsonl"))


def wait_until(is_so, run):
    latest = time.monotonic() + 240
    while not is_so():
        assert time.monotonic() < latest, run.said(0)
        time.sleep(0.002)


def assert_nothing_is_left(output):
    beside = pathlib.Path(output).parent
    assert not [path.name for path in beside.glob(f"*{output}*") if path.name.endswith("parts")]
    assert not list(beside.glob("*.unfinished"))


# --- Parts by themselves --------------------------------------------------------------------------


def do(output, sizes, work, *, until=None, shuffled=False):
    """Does the work: step s of part p comes to a line; gives the parts that were done here."""
    with output_parts.opened(output, sizes, work) as job:
        done = job.missing[:until]
        for part in done:
            for step in range(sizes[part]):
                job.add(part, [f"{part} {step} of {work}\n"], {"steps": 1})
        if until is not None:
            raise InterruptedError
        job.wait_for_all()
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        backwards = [
            [sum(sizes) - 1 - start - step for step in range(size)]
            for start, size in zip(starts, sizes, strict=True)
        ]
        job.join(removed_everywhere.replacing(output, None), backwards if shuffled else None)
        assert job.counts["steps"] == sum(sizes)
        assert job.new_counts["steps"] == sum(sizes[part] for part in done)
    return done


@hypothesis.given(
    st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(0, 6), st.booleans()
)
def test_what_is_done_is_not_done_again_and_all_comes_in_its_place(sizes, number, shuffled):
    output = pathlib.Path("steps.jsonl")
    output.write_text("of before")
    with pytest.raises(InterruptedError):
        do("steps.jsonl", sizes, {"name": "a"}, until=number)
    assert output.read_text() == "of before"
    assert pathlib.Path("steps.jsonl.parts").exists() == (number > 0)
    assert do("steps.jsonl", sizes, {"name": "a"}, shuffled=shuffled) == [
        *range(number, len(sizes))
    ]
    lines = [
        f"{part} {step} of {{'name': 'a'}}"
        for part, size in enumerate(sizes)
        for step in range(size)
    ]
    assert output.read_text().splitlines() == (lines[::-1] if shuffled else lines)
    assert_nothing_is_left("steps.jsonl")


@pytest.fixture
def two_of_three():
    """Work of which two parts are done."""
    with pytest.raises(InterruptedError):
        do("three.jsonl", [2, 2, 1], {"seed": 1, "prompts": "x"}, until=2)
    yield pathlib.Path("three.jsonl.parts")
    shutil.rmtree("three.jsonl.parts", ignore_errors=True)


def test_parts_of_other_work_are_discarded(two_of_three, capsys):
    assert do("three.jsonl", [2, 2, 1], {"seed": 2, "prompts": "x"}) == [0, 1, 2]
    assert capsys.readouterr().out == (
        "three.jsonl.parts: what was done before (2 parts) is discarded: it was of other settings "
        "or inputs (seed).\n"
    )
    assert "'seed': 1" not in pathlib.Path("three.jsonl").read_text()


@pytest.mark.parametrize("content", [None, b"", b"not JSON", b"[1]"])
def test_parts_of_which_nothing_is_known_are_discarded(two_of_three, content, capsys):
    (two_of_three / "of.json").unlink()
    if content is not None:
        (two_of_three / "of.json").write_bytes(content)
    assert do("three.jsonl", [2, 2, 1], {"seed": 1, "prompts": "x"}) == [0, 1, 2]
    assert "(2 parts) is discarded" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [*("cut", "longer", "empty", "another", "of other work", "gone", "counts", "nested")]
)
def test_a_part_that_is_not_whole_is_done_again(two_of_three, damage, capsys):
    file = two_of_three / "00001.jsonl"
    content = file.read_bytes()
    about, _, rest = content.partition(b"\n")
    changed = {
        "cut": content[:-1],
        "longer": content + b"x\n",
        "empty": b"",
        "another": (two_of_three / "00000.jsonl").read_bytes(),
        "counts": content.replace(b'"steps": 2', b'"steps": {}'),
        "nested": b"[" * 100_000 + b"\n" + rest,
        "of other work": json.dumps({**json.loads(about), "of": "0" * 16}).encode() + b"\n" + rest,
    }
    file.unlink()
    if damage != "gone":
        file.write_bytes(changed[damage])
    assert do("three.jsonl", [2, 2, 1], {"seed": 1, "prompts": "x"}) == [1, 2]
    assert "three.jsonl.parts: 1 of 3 parts were done before.\n" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before all is done", "before it is read"])
def test_a_part_that_vanishes_is_named(two_of_three, when):
    pathlib.Path("three.jsonl").write_text("of before")
    with (
        pytest.raises(UsageError, match=r"no other run may write it\. .*expected 00000\.jsonl"),
        output_parts.opened("three.jsonl", [2, 2, 1], {"seed": 1, "prompts": "x"}) as job,
    ):
        job.add(2, ["line\n"], {})
        if when == "before it is read":
            job.wait_for_all()
        (two_of_three / "00000.jsonl").unlink()
        if when == "before all is done":
            job.wait_for_all()
        else:
            job.join(removed_everywhere.replacing("three.jsonl", None))
    assert pathlib.Path("three.jsonl").read_text() == "of before"
    assert part_files("three.jsonl") == ["00001.jsonl", "00002.jsonl"]


def test_a_folder_of_others_is_left_alone(two_of_three):
    (two_of_three / "thesis.txt").write_text("mine")
    of_beam = two_of_three.with_name("three.jsonl.beam")
    shutil.copytree(two_of_three, of_beam)
    message = r"expected nothing in .*three\.jsonl\.{}, or .*thesis"
    with pytest.raises(UsageError, match=message.format("parts")):
        do("three.jsonl", [2], {"seed": 2})
    with pytest.raises(UsageError, match=message.format("beam")):  # before Beam is looked for
        list(beam_jobs.map_records(lambda row: row, "few.jsonl", "three.jsonl", []))
    assert (of_beam / "thesis.txt").exists()
    shutil.rmtree(of_beam)
    assert (two_of_three / "thesis.txt").read_text() == "mine"
    assert part_files("three.jsonl") == ["00000.jsonl", "00001.jsonl"]


def test_what_a_kill_left_half_written_goes(two_of_three):
    (two_of_three / ".00002.jsonl.0123abcd.unfinished").write_text("half")
    assert do("three.jsonl", [2, 2, 1], {"seed": 1, "prompts": "x"}) == [2]
    assert_nothing_is_left("three.jsonl")


SCRIPT = """
import os, pathlib
from tnt_jax.runtime import output_parts, processes, program
from tnt_jax.runtime.errors import UsageError

processes._PATIENCE = 1.0
processes.start("test", processes.Kind.APART)
index = processes.index()
try:
    {work}
except UsageError as error:
    print(error, flush=True)
    processes.end(2)
    os._exit(2)
"""


@pytest.mark.parametrize(
    ("work", "message"),
    [
        # Each host has a disk of its own.
        (
            'with output_parts.opened(f"host{index}/out", [1, 1], {}) as job: job.wait_for_all()',
            "of.json",
        ),
        (
            'with output_parts.opened("shared", [1, 1], {"seed": index}) as job:'
            " job.wait_for_all()",
            "expected the settings and inputs of the first process, found others here (seed).",
        ),
    ],
)
def test_processes_that_do_not_work_on_the_same_say_so(work, message):
    for index in range(2):
        pathlib.Path(f"host{index}").mkdir(exist_ok=True)
    script = SCRIPT.replace("{work}", work)
    with several.Processes(["-c", script], 2, "apart", **several.SOON_MISSED) as run:
        first, second = run.end()
    assert second == 2
    assert first not in (0, 75)
    assert "OUTPUT must be where all processes see it" in run.said(1)
    assert message in run.said(1)


# --- annotate -------------------------------------------------------------------------------------

# Waits at the record with this text for as long as there is a file named `hold`.
FUNCTION = """
import pathlib, time

def idiots(inputs, targets):
    while targets == "number 5001" and pathlib.Path("hold").exists():
        time.sleep(0.01)
    start = targets.find("7")
    return [] if start < 0 else [(start, start + 1)]

def everything(inputs, targets):
    return [(0, len(targets))]
"""


@pytest.fixture(scope="module")
def annotated():
    """Twelve thousand records, and what one undisturbed process makes of them."""
    pathlib.Path("marking.py").write_text(FUNCTION)
    records.write_records(
        "outputs.jsonl",
        (
            records.Record(id=str(n), inputs="", targets=f"number {n}", extra={"\u2028": "\x85"})
            for n in range(12_000)
        ),
    )
    with running_annotate("alone.jsonl", 1) as run:
        assert run.end() == [0], run.said(0)
    rows = records.read_records("alone.jsonl")
    assert [row.id for row in rows] == [str(n) for n in range(12_000)]
    assert [bool(row.negative_spans) for row in rows] == ["7" in row.id for row in rows]
    return pathlib.Path("alone.jsonl").read_bytes()


@contextlib.contextmanager
def running_annotate(output, count, name=None, *, is_killed=False, **settings):
    settings = {
        "RECORDS": "outputs.jsonl",
        "OUTPUT": output,
        "FUNCTION": "marking:idiots",
        "VOCABULARY": None,
        **settings,
    }
    rooms.RUNS["annotate_python"] = (["runs/annotate_python.gin"], {"VOCABULARY_PATH": "none"})
    environment = ALONE if count == 1 else several.SOON_MISSED if is_killed else {}
    with several.running(
        "annotate_python", settings, count, name or f"log{count}", **environment
    ) as run:
        yield run


def test_three_processes_annotate_as_one(annotated):
    with running_annotate("three.jsonl", 3) as run:
        assert run.end() == [0, 0, 0], run.said(0)
    assert pathlib.Path("three.jsonl").read_bytes() == annotated
    said = [line for line in run.said(0).splitlines() if line.startswith("three.jsonl: ")]
    num_marked = sum("7" in str(n) for n in range(12_000))
    assert len(said) == 1
    assert said[0].startswith(f"three.jsonl: {num_marked} of 12000 outputs have something unwanted")
    assert "three.jsonl" not in run.said(1) + run.said(2)
    assert sorted(path.name for path in pathlib.Path().glob("three*")) == [
        *("three.jsonl", "three.jsonl.gin"),
    ]


class Counting(list):
    """Counts the elements that slices of it copy."""

    num_copied = 0

    def __getitem__(self, index):
        if isinstance(index, slice):
            Counting.num_copied += len(range(*index.indices(len(self))))
        return super().__getitem__(index)


def test_every_record_is_looked_up_once(monkeypatch):
    """Not the rest of them for every part: of ten million records that took minutes."""
    rows = [records.Record(id=str(n), inputs="x", targets=f"idiot {n}") for n in range(400)]
    monkeypatch.setattr(records, "read_records", lambda path: Counting(rows))
    monkeypatch.setattr(annotate, "_RECORDS_PER_PART", 8)
    records.write_records("many.jsonl", rows)
    pathlib.Path("idiots.txt").write_text("idiot\n")
    annotator = annotators.Lexicon(path="idiots.txt", alternatives=False)
    annotate.annotate(output="many.marked.jsonl", input="many.jsonl", annotator=annotator)
    assert Counting.num_copied <= len(rows)
    marked = list(records.iterate("many.marked.jsonl"))
    assert [row.id for row in marked] == [row.id for row in rows]
    assert all(row.negative_spans == ((0, 5),) for row in marked)


@pytest.mark.parametrize(("count", "done"), [(1, ["00000"]), (2, ["00000", "00002"])])
def test_annotate_that_was_killed_goes_on(annotated, count, done):
    pathlib.Path("killed.jsonl").write_text("of before")
    pathlib.Path("hold").touch()
    with running_annotate("killed.jsonl", count, is_killed=True) as run:
        wait_until(lambda: len(part_files("killed.jsonl")) == len(done), run)
        if count == 2:
            run.wait_for("1 parts of other processes are to come.")
        run.send(signal.SIGKILL, index=count - 1)
        statuses = run.end()
    # The first one did not wait for ever, and did not take it for the end.
    assert statuses[-1] == -signal.SIGKILL
    assert all(status not in (0, 2, 75) for status in statuses)
    assert part_files("killed.jsonl") == [f"{name}.jsonl" for name in done]
    assert pathlib.Path("killed.jsonl").read_text() == "of before"
    pathlib.Path("hold").unlink()
    with running_annotate("killed.jsonl", count) as run:
        assert run.end() == [0] * count, run.said(0)
    said = run.said(0)
    assert f"killed.jsonl.parts: {len(done)} of 3 parts were done before." in said
    left = {1: 7000, 2: 0}[count]  # of the first process
    assert f"annotating {left} records: {left} in" in said
    assert "of 12000 outputs have something unwanted" in said
    assert pathlib.Path("killed.jsonl").read_bytes() == annotated
    assert_nothing_is_left("killed.jsonl")


def test_annotate_that_is_told_to_stop_goes_on_where_it_was(annotated):
    """Also a process that has nothing left to do but to wait for the other."""
    pathlib.Path("hold").touch()
    with running_annotate("told.jsonl", 2) as run:
        run.wait_for("1 parts of other processes are to come.")
        for index in range(2):
            run.send(signal.SIGTERM, index)
        assert run.end() == [75, 75], run.said(0) + run.said(1)
    pathlib.Path("hold").unlink()
    with running_annotate("told.jsonl", 1) as run:  # alone, for a change
        assert run.end() == [0], run.said(0)
    assert "told.jsonl.parts: 2 of 3 parts were done before." in run.said(0)
    assert pathlib.Path("told.jsonl").read_bytes() == annotated


def test_two_that_annotate_otherwise_do_not_write_one_output(annotated):
    """The second would take the parts of the first for those of an earlier run."""
    pathlib.Path("hold").touch()
    with running_annotate("one.jsonl", 1, "first") as first:
        wait_until(lambda: len(part_files("one.jsonl")) == 1, first)
        with running_annotate("one.jsonl", 1, "second", FUNCTION="marking:everything") as second:
            assert second.end() == [2], second.said(0)
        line = second.said(0).splitlines()[-1]
        assert re.match(r"tnt_jax\.annotate: error: OUTPUT: " + refusal(first.processes[0]), line)
        pathlib.Path("hold").unlink()
        assert first.end() == [0], first.said(0)
    assert pathlib.Path("one.jsonl").read_bytes() == annotated
    assert_nothing_is_left("one.jsonl")


def test_what_was_left_out_before_is_counted(monkeypatch, capsys):
    monkeypatch.setattr(annotate, "_RECORDS_PER_PART", 2)
    rows = [records.Record(id=str(n), inputs="", targets="a b") for n in range(6)]
    records.write_records("few.jsonl", rows)
    marks = [{"id": "1", "negative_spans": [[0, 1]]}, {"id": "5", "negative_spans": []}]
    pathlib.Path("marks.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in marks))
    spans = annotators.Spans(path="marks.jsonl", unmatched="leave_out")
    add, added = output_parts.Parts.add, []

    def add_then_stop(self, part, lines, counts):
        add(self, part, lines, counts)
        added.append(part)
        if len(added) == 5:
            raise InterruptedError

    monkeypatch.setattr(output_parts.Parts, "add", add_then_stop)
    with pytest.raises(InterruptedError):
        annotate.annotate(output="few.out.jsonl", input="few.jsonl", annotator=spans)
    assert part_files("few.out.jsonl") == ["00000.jsonl", "00001.jsonl"]
    annotate.annotate(output="few.out.jsonl", input="few.jsonl", annotator=spans)
    assert added == [0, 0, 1, 1, 2, 2, 2]
    assert [row.id for row in records.read_records("few.out.jsonl")] == ["1", "5"]
    said = capsys.readouterr().out
    assert "few.out.jsonl: 1 of 2 outputs have something unwanted (50.0%)" in said
    assert "few.out.jsonl: 4 of 6 records are left out" in said


def test_beam_is_for_one_process(monkeypatch):
    pathlib.Path("listed.txt").write_text("idiot")
    words = annotators.Lexicon(path="listed.txt")
    monkeypatch.setattr(annotate.processes, "count", lambda: 2)
    with pytest.raises(UsageError, match=r"beam_options: .* one process, .*found 2\. Unset"):
        annotate.annotate(output="beam.jsonl", input="few.jsonl", annotator=words, beam_options=[])


# --- generate -------------------------------------------------------------------------------------

NUM_PROMPTS = 1500
SAMPLED = {
    "PROMPTS": "prompts.jsonl",
    "CHECKPOINT_PATH": "model",
    "TASK_FEATURE_LENGTHS": {"inputs": 40},
    "BATCH_SIZE": 32,
    "TEMPERATURE": 1.0,
}


@pytest.fixture(scope="module")
def generated():
    """Prompts, a model that has learnt little, and what this process, on eight devices, samples."""
    rooms.write_world(pathlib.Path())
    rows = rooms.corpus()
    prompts = (
        records.Record(id=str(n), inputs=" ".join(row.inputs for row in rows[n % 50 :][: n % 9]))
        for n in range(NUM_PROMPTS)
    )
    records.write_records("prompts.jsonl", prompts)
    with rooms.devices_seen():
        rooms.train_original("model", 1)
        assert rooms.run("generate", {**SAMPLED, "OUTPUT": "sampled.jsonl"}) == 0
    found = records.read_records("sampled.jsonl")
    assert [row.id for row in found] == [str(n) for n in range(NUM_PROMPTS)]
    assert len({row.targets for row in found}) > 100
    return pathlib.Path("sampled.jsonl").read_bytes()


def test_generate_that_was_killed_goes_on(generated):
    """In two processes, when two of six parts are done; then in three."""
    output = "killed.generated.jsonl"
    with several.held("generate", {**SAMPLED, "OUTPUT": output}, 2, output, at=2) as run:
        wait_until(lambda: len(part_files(output)) == 2, run)
        for index in range(2):
            run.send(signal.SIGKILL, index)
        assert run.end() == [-signal.SIGKILL] * 2
    assert part_files(output) == ["00000.jsonl", "00001.jsonl"]
    settings = {**SAMPLED, "OUTPUT": output}
    with several.running("generate", settings, 3, f"{output}3") as run:
        assert run.end() == [0] * 3, run.said(0)
    assert pathlib.Path(output).read_bytes() == generated
    assert_nothing_is_left(output)
    said = run.said(0)
    assert f"{output}.parts: 2 of 6 parts were done before." in said
    # Of the parts 0 and 3, which are the first process's, one is left.
    assert "generating 256 outputs, in batches: " in said
    num_unended = sum(1 not in row.target_ids for row in records.read_records(output))
    assert f"{output}: {NUM_PROMPTS} outputs, of which {num_unended} do not end within 16 " in said
