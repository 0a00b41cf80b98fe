"""Programs and what they hold: two at once, one that is killed, one that is elsewhere."""

import contextlib
import functools
import json
import pathlib
import re
import signal
import sys

import pytest
from helpers import rooms, several
from helpers.holders import held_by_another, note_of, refusal

from tnt_jax import convert
from tnt_jax.checkpoints import checkpoint_kinds, orbax
from tnt_jax.data import records
from tnt_jax.runtime import holding
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import loop

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import kill_and_resume

ALONE = {"TNT_JAX_DISTRIBUTED": ""}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, with its records marked and an original of three updates."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        records.write_records("original.annotated.jsonl", rooms.marked_corpus())
        rooms.train_original("original", 3)
        yield


@pytest.mark.parametrize(
    ("run_name", "held", "settings"),
    [
        ("train", ("folder", "place"), {"MODEL_DIR": "place"}),
        ("pipeline", ("folder", "place"), {"OUTPUT_DIR": "place"}),
        ("sweep", ("folder", "place"), {"OUTPUT_DIR": "place", "OBJECTIVES": "['TNRF']"}),
        ("annotate", ("output", "place.jsonl"), {"OUTPUT": "place.jsonl"}),
        ("generate", ("output", "place.jsonl"), {"OUTPUT": "place.jsonl"}),
        ("localize", ("output", "place.jsonl"), {"OUTPUT": "place.jsonl"}),
        ("evaluate", ("output", "place.jsonl"), {"OUTPUT": "place.jsonl"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_programs_leave_a_place_to_whoever_is_at_work_there(run_name, held, settings, capsys):
    settings = {
        "pipeline": {"TRAIN_STEPS": 1},
        "sweep": {"TRAIN_STEPS": 1},
        "annotate": {"RECORDS": "corpus.jsonl"},
        "generate": {"CHECKPOINT_PATH": "original"},
        "localize": {"RECORDS": "original.annotated.jsonl"},
        "evaluate": {"CURRENT_RECORDS": "original.annotated.jsonl", "CHECKPOINT_PATH": "original"},
    }.get(run_name, {}) | settings
    kind, path = held
    with held_by_another(kind, path) as other:
        there = sorted(pathlib.Path().rglob("*"))
        assert rooms.run(run_name, settings) == 2
        assert sorted(pathlib.Path().rglob("*")) == there
        error = capsys.readouterr().err
        assert re.match(rf"tnt_jax\.{run_name}: error: [A-Z_]+: {refusal(other)}", error)
        assert error.count("\n") == 1


@pytest.mark.parametrize("output_format", ["huggingface", "orbax", "t5x"])
def test_convert_leaves_a_place_to_whoever_is_at_work_there(output_format, capsys):
    kind = "output" if output_format == "huggingface" else "folder"
    arguments = ["--input=original", "--output=converted", f"--output_format={output_format}"]
    with held_by_another(kind, "converted") as other:
        with pytest.raises(SystemExit) as stopped:
            convert._main(arguments)
        assert stopped.value.code == 2
        assert re.search(refusal(other), capsys.readouterr().err)
    with contextlib.suppress(FileNotFoundError):
        pathlib.Path("converted").rmdir()


RUN = {"LOG_EVERY": 1, "CHECKPOINT_EVERY": 4, "TRAIN_STEPS": 24}


def training(name, **settings):
    return several.running("train", {**RUN, **settings}, 1, name, **ALONE)


def settings_of(model_dir):
    """But for the name of the folder."""
    written = pathlib.Path(model_dir, "operative_config.gin").read_text()
    return written.replace(f"'{model_dir}'", "''")


@functools.cache
def alone(rate):
    """What a run with this learning rate is when nobody disturbs it: a model directory."""
    with training(f"alone_{rate}", MODEL_DIR=f"alone_{rate}", LEARNING_RATE=rate) as run:
        assert run.end() == [0], run.said(0)
    return f"alone_{rate}"


def assert_same_run(one, other):
    assert kill_and_resume.difference(pathlib.Path(one), pathlib.Path(other)) is None
    rooms.assert_same_state(one, other)
    assert settings_of(one) == settings_of(other)
    names = [sorted(path.name for path in pathlib.Path(of).iterdir()) for of in (one, other)]
    assert names[0] == names[1]


def test_of_two_that_train_in_one_folder_one_does():
    rates = (0.003, 0.01)
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(training(f"both_{rate}", MODEL_DIR="both", LEARNING_RATE=rate))
            for rate in rates
        ]
        statuses = [run.end()[0] for run in runs]
        said = [run.said(0) for run in runs]
    assert sorted(statuses) == [0, 2], said
    winner = statuses.index(0)
    assert_same_run("both", alone(rates[winner]))
    # Where one had ended before the other began, that is another run than the folder holds.
    line = said[1 - winner].splitlines()[-1]
    assert re.match(r"tnt_jax\.train: error: MODEL_DIR:? (expected )?both (to be free|holds)", line)


def test_a_second_one_is_told_who_is_at_work_and_when_that_one_is_killed_it_goes_on_at_once():
    settings = {**RUN, "MODEL_DIR": "one", "LEARNING_RATE": 0.003}
    with several.held("train", settings, 1, "first", at=10, **ALONE) as first:
        first.wait_for("update 9 of 24")
        first.send(signal.SIGSTOP, index=0)
        with training("second", MODEL_DIR="one", LEARNING_RATE=0.01) as second:
            assert second.end() == [2]
        line = second.said(0).splitlines()[-1]
        assert re.match(
            r"tnt_jax\.train: error: MODEL_DIR: " + refusal(first.processes[0]), line
        ), line
        first.send(signal.SIGKILL, index=0)
        assert first.end() == [-signal.SIGKILL]
    assert pathlib.Path("one/.held").exists()
    with training("again", MODEL_DIR="one", LEARNING_RATE=0.003) as again:
        assert again.end() == [0], again.said(0)
        assert "Going on from checkpoint" in again.said(0)
        assert "waiting up to" not in again.said(0)
    assert_same_run("one", alone(0.003))


def test_a_run_is_described_where_it_writes_before_its_first_checkpoint(monkeypatch):
    def interrupted(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_batch", interrupted)
        assert rooms.run("train", {**RUN, "MODEL_DIR": "described"}) == 130
    names = {path.name for path in pathlib.Path("described").iterdir()}
    assert "run.json" in names
    assert not names & {".held", *(f"checkpoint_{step}" for step in range(25))}
    about = json.loads(pathlib.Path("described/run.json").read_text())
    assert rooms.run("train", {**RUN, "TRAIN_STEPS": 1, "MODEL_DIR": "described"}) == 0
    of_checkpoint = orbax.read_run(checkpoint_kinds.find("described"))
    assert about.keys() >= {"original", "optimizer", "data", "seed", "versions"}
    assert {**about, "config": ""} == {name: of_checkpoint[name] for name in about} | {"config": ""}


def test_on_another_host_it_goes_on_when_the_first_has_been_silent(monkeypatch, capsys):
    monkeypatch.setattr(holding, "_STALE", 0.6)
    settings = {**RUN, "TRAIN_STEPS": 2, "MODEL_DIR": "moved"}
    pathlib.Path("moved").mkdir()
    pathlib.Path("moved/.held").write_bytes(note_of())
    assert rooms.run("train", settings) == 0
    assert "MODEL_DIR: moved was held by process 7 on elsewhere" in capsys.readouterr().out
    assert not pathlib.Path("moved/.held").exists()


def test_a_run_whose_place_was_taken_over_ends_and_writes_nothing_more(monkeypatch, capsys):
    monkeypatch.setattr(holding, "_BEAT", 0.01)
    steps = []
    check = holding.check

    def overtaken():
        steps.append(1)
        if len(steps) == 3:
            unfinished = pathlib.Path("overtaken/unfinished")
            unfinished.write_bytes(note_of())
            unfinished.replace("overtaken/.held")
            with contextlib.suppress(UsageError):
                while True:
                    check()
        check()

    monkeypatch.setattr(holding, "check", overtaken)
    settings = {**RUN, "CHECKPOINT_EVERY": 3, "MODEL_DIR": "overtaken"}
    assert rooms.run("train", settings) == 2
    error = capsys.readouterr().err
    assert "MODEL_DIR: expected to hold overtaken, found that process 7 on elsewhere" in error
    metrics = kill_and_resume.lines_of(pathlib.Path("overtaken/metrics.jsonl"))
    assert [line["step"] for line in metrics] == [1, 2]
    assert not list(pathlib.Path("overtaken").glob("checkpoint_*"))


def test_several_processes_are_one_run_and_all_are_refused():
    with held_by_another("folder", "several") as other:
        with several.running("train", {**RUN, "MODEL_DIR": "several"}, 2, "refused") as run:
            assert run.end() == [2, 2], run.said(0) + run.said(1)
        for index in range(2):
            assert re.search(refusal(other), run.said(index).splitlines()[-1]), run.said(index)


@pytest.mark.parametrize(
    ("index", "number", "status"),
    [(0, 2, "held"), (1, 2, "goes on"), (1, 3, "held"), (0, 1, "held")],
)
def test_processes_of_a_sweep_hold_their_shares(index, number, status, capsys):
    settings = {
        "OUTPUT_DIR": "shared",
        "OBJECTIVES": "['TNRF']",
        "TRAIN_STEPS": 1,
        "PROCESS_INDEX": index,
        "NUM_PROCESSES": number,
    }
    with held_by_another("folder", "shared", [0, 2]) as other:
        assert rooms.run("sweep", settings) == 2
        error = capsys.readouterr().err
        if status == "held":
            assert re.search(refusal(other), error.strip())
        else:  # nothing is there yet of what process 0 makes
            assert "process 1 of 2: expected in shared what process 0 makes" in error
