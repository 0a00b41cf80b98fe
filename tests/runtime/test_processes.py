"""Training in several processes, which really run here: as one would, and as if none had died."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import rooms, several

from tnt_jax.checkpoints import checkpoint_kinds, orbax
from tnt_jax.data import records
from tnt_jax.runtime import processes
from tnt_jax.runtime.errors import UsageError

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import kill_and_resume

RUN = {
    "DROPOUT_RATE": 0.1,
    "PACK": True,
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 48},
    "BATCH_SIZE": 8,
    "LOG_EVERY": 1,
    "CHECKPOINT_EVERY": 4,
    "TRAIN_STEPS": 30,
    "MODEL_DIR": "model",
}
# Seconds after which JAX by itself takes a process for lost. Here it is told to after ten.
JAX_WAITS = 100


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, an original, and a run of TNRF in one process."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        records.write_records("original.annotated.jsonl", rooms.marked_corpus())
        rooms.train_original("original", 3)
        assert rooms.run("train", {**RUN, "MODEL_DIR": "alone"}) == 0
        yield


@pytest.fixture(scope="module")
def two():
    """The run in two processes, undisturbed: its model directory."""
    settings = {**RUN, "MODEL_DIR": "two"}
    with several.running("train", settings, 2, "two") as run:
        assert run.end() == [0, 0], run.said(1)
    return pathlib.Path("two")


def losses(model_dir):
    lines = kill_and_resume.lines_of(pathlib.Path(model_dir, "metrics.jsonl"))
    assert [line["step"] for line in lines] == [*range(1, len(lines) + 1)]  # written by one alone
    return [line["loss"] for line in lines]


def test_two_processes_learn_what_one_learns(two):
    np.testing.assert_allclose(losses(two), losses("alone"), rtol=2e-3)
    ours, theirs = rooms.saved(two), rooms.saved("alone")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), ours, theirs)


def test_four_processes_with_sharded_parameters_begin_as_one_does():
    """Parameters over two of four processes, the batch over all; a few updates."""
    settings = {**RUN, "TRAIN_STEPS": 3, "MODEL_DIR": "four", "FSDP_DEVICES": 2}
    with several.running("train", settings, 4, "four") as run:
        assert run.end() == [0] * 4, run.said(3)
    np.testing.assert_allclose(losses("four"), losses("alone")[:3], rtol=2e-3)


def test_a_run_that_is_stopped_and_then_loses_a_process_ends_as_the_undisturbed_one(two):
    # One of them is told to stop, twice: all save after the same update.
    with several.held("train", RUN, 2, "told", at=10) as run:
        run.wait_for("update 5 of 30")
        run.send(signal.SIGTERM, index=1)
        time.sleep(0.1)
        run.send(signal.SIGTERM, index=1)
        pathlib.Path("hold").unlink()
        assert run.end() == [75, 75], run.said(1)
        step = orbax.read_run(checkpoint_kinds.find("model"))["position"]["next_batch"]
        for index in range(2):
            said = f"(process {index} of 2): stopped by SIGTERM: update {step} is saved. The same"
            assert said in run.said(index)
    # One is killed: the other does not wait for ever, and says what has happened.
    with several.held("train", RUN, 2, "killed", at=step + 10, **several.SOON_MISSED) as run:
        run.wait_for("Going on from checkpoint")
        run.wait_for(f"update {step + 6} of 30")
        run.send(signal.SIGKILL, index=1)
        began = time.monotonic()
        left, killed = run.end()
        assert killed == -signal.SIGKILL
        assert left not in (0, 2, 75)  # what a restart loop starts again
        assert time.monotonic() - began < JAX_WAITS
        assert "another process" in run.said(0) or "another task died" in run.said(0)
    # Started again, the run ends with the same bits.
    with several.running("train", RUN, 2, "again") as run:
        assert run.end() == [0, 0], run.said(1)
    assert kill_and_resume.difference(two, pathlib.Path("model")) is None


# Each has the same command line, and further settings of its own.
TRAIN = """
import json, os, sys
from tnt_jax.checkpoints import pretrained
from tnt_jax.runtime import processes, program

pretrained._SOME_BYTES = int(os.environ.get("SOME_BYTES", pretrained._SOME_BYTES))
arguments, own = map(json.loads, sys.argv[1:])
arguments += own[int(os.environ["JAX_PROCESS_ID"])]
program.run("tnt_jax.train", "train", arguments, processes_run=processes.Kind.TOGETHER)
"""


def run_apart(name, settings, *own, **environment):
    """Trains in as many processes as there are lists of settings."""
    arguments = rooms.arguments("train", {**RUN, "MODEL_DIR": name, **settings})
    command = ["-c", TRAIN, json.dumps(arguments), json.dumps(own)]
    with several.Processes(command, len(own), name, **environment) as run:
        statuses = run.end()
    return statuses, [run.said(index) for index in range(len(own))]


def train_apart(name, *own):
    """`run_apart`, where all fail before the models are looked at."""
    found = run_apart(name, {}, *own)
    assert not pathlib.Path(name).exists()
    return found


def test_processes_that_have_other_files_do_not_train_on_a_mixture():
    stale = [dataclasses.replace(row, negative_spans=()) for row in rooms.marked_corpus()]
    records.write_records("stale.jsonl", [*rooms.marked_corpus()[:30], *stale[30:]])
    others = ["CHECKPOINT_EVERY=5", "NON_FINITE=skip", "ALLOW_CHANGES=['seed']", "SAMPLE_EVERY=2"]
    statuses, said = train_apart(
        "mixed", [f"--gin.{each}" for each in others], ["--gin.RECORDS=stale.jsonl"]
    )
    assert statuses == [2, 2], said
    message = (
        "expected the same models, data and settings in all 2 processes, found others in some: "
        "data (RECORDS and its settings), checkpoint_every, non_finite (NON_FINITE), keep "
        "(ALLOW_CHANGES, KEEP_BEST or another setting of settings.Keep), samples (SAMPLE_EVERY, "
        "SAMPLE_PROMPTS or another setting of the samples). Start all of them alike, with the same "
        "files"
    )
    assert all(message in text for text in said)


@pytest.fixture(scope="module")
def another():
    """The original with another output matrix, its largest array."""
    params = rooms.saved("original")
    params["decoder"]["logits_dense"]["kernel"] += 0.5
    saved = {"params": ocp.args.StandardSave(params)}
    orbax.save_items(epath.Path("another").absolute(), 3, saved)
    return "another"


@pytest.mark.parametrize(
    ("name", "settings", "environment"),
    [
        # Each has all parameters.
        ("replicated", {}, {}),
        # The digest of all of them is seen to differ, whatever part of the files was compared.
        ("digest", {}, {"SOME_BYTES": "0"}),
        # Each has a part of them, so the digest of all is the same for both.
        ("sharded", {"FSDP_DEVICES": 2}, {}),
    ],
    ids=["replicated", "digest", "sharded"],
)
def test_processes_that_have_other_models_do_not_train_on_a_mixture(
    name, settings, environment, another
):
    statuses, said = run_apart(
        name, settings, [], [f"--gin.INITIAL_CHECKPOINT_PATH={another}"], **environment
    )
    assert statuses == [2, 2], said
    message = (
        "expected the same models, data and settings in all 2 processes, found others in some: "
        "original (INITIAL_CHECKPOINT_PATH)"
    )
    assert all(message in text for text in said)
    assert not list(pathlib.Path(name).glob("checkpoint_*"))


def test_processes_that_start_from_other_models_do_not_train_on_a_mixture(another):
    """A further round."""
    starts = [[f"--gin.START_CHECKPOINT_PATH={path}"] for path in ("original", another)]
    statuses, said = run_apart("starts", {"FSDP_DEVICES": 2}, *starts)
    assert statuses == [2, 2], said
    message = "found others in some: start (START_CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH). Star"
    assert all(message in text for text in said)


def test_hosts_have_what_they_start_from_at_paths_of_their_own(another):
    """A checkpoint has the path of one of them: none waits for another, and none is refused."""
    for path in ("here", "there"):
        shutil.copytree(another, path)
    starts = [[f"--gin.START_CHECKPOINT_PATH={path}"] for path in ("here", "there")]
    for train_steps in (2, 3):
        settings = {"TRAIN_STEPS": train_steps, "FSDP_DEVICES": 2}
        statuses, said = run_apart("own_paths", settings, *starts)
        assert statuses == [0, 0], said
    assert "Going on from checkpoint 2" in said[0]
    assert orbax.read_run(checkpoint_kinds.find("own_paths"))["start"]["path"] == "here"


def test_a_mistake_in_the_file_of_one_process_ends_the_other_in_a_line():
    clean = [dataclasses.replace(row, negative_spans=()) for row in rooms.marked_corpus()]
    records.write_records("clean.jsonl", clean)
    statuses, said = train_apart("unmarked", ["--gin.RECORDS=clean.jsonl"], [])
    assert statuses == [2, 1], said
    assert "needs marked tokens, but none of the 60 examples has one" in said[0]
    assert "another process of this run has ended: what it printed says why." in said[1]
    assert "stack trace" not in said[1]


def test_each_process_holds_its_own_rows_and_all_of_them_are_held_once(two):
    """Checks for every batch of an epoch what lies on the devices of each process."""
    program = textwrap.dedent(
        """
        import json, sys
        import numpy as np
        from tnt_jax.data.batches import Batches
        from tnt_jax.data.examples import Example
        from tnt_jax.models import sharding
        from tnt_jax.runtime import processes

        processes.start("test", processes.Kind.TOGETHER)
        examples = [
            Example(np.array([7]), np.array([number + 2]), np.zeros((0, 2), int))
            for number in range(16)
        ]
        batches = Batches(examples, 8, {"inputs": 1, "targets": 1}, seed=3)
        mesh = sharding.make_mesh(sharding.MeshShape())
        held = []
        for number in range(2):
            batch = sharding.put_batch(batches.batch(number), mesh)
            held += [int(row.item()) for s in batch["decoder_target_tokens"].addressable_shards
                     for row in s.data]
        print(json.dumps({"held": held}))
        """
    )
    with several.Processes(["-c", program], 2, "rows") as run:
        assert run.end() == [0, 0], run.said(1)
    held = [
        json.loads(next(line for line in run.said(index).splitlines() if "held" in line))["held"]
        for index in range(2)
    ]
    assert sorted(map(len, held)) == [8, 8]
    assert sorted(held[0] + held[1]) == [*range(2, 18)]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TNT_JAX_DISTRIBUTED": "yes"}, "TNT_JAX_DISTRIBUTED: expected 1 or nothing, found 'yes'"),
        (
            {"TNT_JAX_DISTRIBUTED": "1", "JAX_NUM_PROCESSES": "0"},
            "JAX_NUM_PROCESSES: expected a whole number from 1 on, found '0'.",
        ),
        (
            {"TNT_JAX_DISTRIBUTED": "1", "JAX_PROCESS_ID": "first"},
            "JAX_PROCESS_ID: expected a whole number from 0 on, found 'first'.",
        ),
    ],
)
def test_what_is_said_of_the_others_must_be_whole(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(message)):
        processes.start("train", processes.Kind.TOGETHER)


def test_cores_are_counted_where_a_system_does_not_say_which_are_ours(monkeypatch):
    allowed = sorted(os.sched_getaffinity(0))
    assert processes.num_cores() == len(allowed)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert processes.num_cores() == os.cpu_count() >= len(allowed)


def test_a_program_for_one_process_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TNT_JAX_DISTRIBUTED", "1")
    settings = {"OUTPUT": "out", "CURRENT_RECORDS": "no.jsonl", "CHECKPOINT_PATH": "original"}
    assert rooms.run("evaluate", settings) == 2
    message = "error: evaluate runs in one process, and TNT_JAX_DISTRIBUTED=1 says that there are"
    assert message in capsys.readouterr().err


def test_nobody_says_who_the_others_are():
    program = "from tnt_jax.runtime import processes; processes.start('test', processes.Kind.APART)"
    environment = {"TNT_JAX_DISTRIBUTED": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "TNT_JAX_DISTRIBUTED=1: expected to be told of the other processes (coor" in done.stderr


def test_processes_come_to_a_place_as_often_as_they_like():
    """A script of yours may train twice: each time all hear what is said that time."""
    program = textwrap.dedent(
        """
        from tnt_jax.runtime import processes

        processes.start("test", processes.Kind.TOGETHER)
        for time in range(3):
            print(processes.gather("place", f"{processes.index()} at {time}"), flush=True)
            processes.wait_for_all("other place")
        """
    )
    with several.Processes(["-c", program], 2, "often", **several.SOON_MISSED) as run:
        assert run.end() == [0, 0]
    for log in run.logs:
        said = [line for line in log.read_text().splitlines() if line.startswith("[")]
        assert said == [str([f"{index} at {time}" for index in (0, 1)]) for time in range(3)]


def test_a_mistake_in_one_process_does_not_keep_the_others_waiting():
    """Each has another setting: one cannot begin, and the other is not left alone with it."""
    program = textwrap.dedent(
        """
        import os
        from tnt_jax.runtime import processes, program
        from tnt_jax.runtime.errors import UsageError

        processes.start("test", processes.Kind.TOGETHER)
        if processes.index() == 1:
            processes.end(2)
        processes.wait_for_all("work")
        """
    )
    with several.Processes(["-c", program], 2, "mistake", **several.SOON_MISSED) as run:
        run.processes[1].wait()
        began = time.monotonic()
        left, mistaken = run.end()
        assert time.monotonic() - began < JAX_WAITS
    assert mistaken == 2
    assert left not in (0, 2, 75)
