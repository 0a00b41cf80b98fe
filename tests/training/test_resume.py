"""A run that was killed goes on as if nothing had been, and only as the run that it was."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rooms, t5_inputs

from tnt_jax.checkpoints import checkpoint_kinds, orbax, pretrained
from tnt_jax.data import records
from tnt_jax.models import sharding, t5
from tnt_jax.runtime import processes
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import load_original, loop, resume

sys.path.append(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import kill_and_resume

from tnt_jax.checkpoints import digests
from tnt_jax.models.model import Model
from tnt_jax.training import run_checkpoints
from tnt_jax.watching import progress_view

# Everything at once that could make a difference.
RUN = {
    "DROPOUT_RATE": 0.1,
    "NUM_MICROBATCHES": 2,
    "PACK": True,
    "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 48},
    "LOG_EVERY": 1,
    "CHECKPOINT_EVERY": 2,
    "KEEP_CHECKPOINTS": 5,
    "TRAIN_STEPS": 6,
    "EVAL_EVERY": 2,
    "train.train.eval_dataset": "@evaluation/datasets.RecordFiles()",
    "evaluation/datasets.RecordFiles.files": "original.annotated.jsonl",
}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, an original of three updates, and a run of TNRF, undisturbed."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen(2):
        marked = rooms.marked_corpus()
        records.write_records("original.annotated.jsonl", marked)
        records.write_records("fewer.jsonl", marked[1:])
        for seed, model_dir in enumerate(("original", "other")):
            rooms.train_original(model_dir, 3, SEED=seed)
        train("straight", **RUN)
        yield


def train(model_dir, gin_files=(), status=0, **settings):
    assert rooms.run("train", {**settings, "MODEL_DIR": model_dir}, gin_files) == status


def run_of(model_dir):
    return orbax.read_run(checkpoint_kinds.find(model_dir))


def as_killed(model_dir, newest, *, last_line):
    """What a `kill -9` in the run leaves: a whole checkpoint, and the beginnings of more."""
    shutil.copytree("straight", model_dir)
    for path in pathlib.Path(model_dir).glob("checkpoint_*"):
        step = int(path.name.removeprefix("checkpoint_"))
        if step == newest + 2:
            half = path.rename(f"{path}.orbax-checkpoint-tmp")
            shutil.rmtree(half / "optimizer")
        elif step > newest:
            shutil.rmtree(path)
    metrics = pathlib.Path(model_dir, "metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:last_line]) + lines[last_line][:20])


# --- Exactly --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("newest", "last_line"), [(2, 6), (4, 5)])
def test_a_killed_run_ends_as_the_undisturbed_one(newest, last_line):
    model_dir = f"killed_after_{newest}"
    as_killed(model_dir, newest, last_line=last_line)
    train(model_dir, **RUN)
    rooms.assert_same_state("straight", model_dir)
    assert kill_and_resume.difference(pathlib.Path("straight"), pathlib.Path(model_dir)) is None
    steps = [
        line["step"] for line in kill_and_resume.lines_of(pathlib.Path(model_dir, "metrics.jsonl"))
    ]
    assert steps == [0, 1, 2, 3, 4, 5, 6]  # 0 is the evaluation of what it starts from
    assert not list(pathlib.Path(model_dir).glob("*tmp*"))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew():
    pathlib.Path("early").mkdir()
    for name in ("metrics.jsonl", "events.jsonl"):
        pathlib.Path("early", name).write_text('{"step": 1, "loss": 7.0}\n{"ste')
    # Of a dead run of another model: nothing of it describes this one.
    shutil.copytree("straight/huggingface", "early/huggingface")
    for path in pathlib.Path("early/huggingface").iterdir():
        path.write_text("{}")
    train("early", **RUN)
    for path in pathlib.Path("straight/huggingface").iterdir():
        assert pathlib.Path("early/huggingface", path.name).read_bytes() == path.read_bytes()
    assert kill_and_resume.difference(pathlib.Path("straight"), pathlib.Path("early")) is None


def test_a_run_that_was_told_to_stop_saves_and_goes_on_exactly(monkeypatch, capsys):
    """SIGTERM between two lines of the log, and a second one while it saves."""
    run = {**RUN, "LOG_EVERY": 5, "CHECKPOINT_EVERY": 100, "EVAL_EVERY": 5}
    train("calm", **run)
    batch = loop.Loop._batch
    save = run_checkpoints.Checkpoints.save

    def batch_and_signal(loop, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(loop, step)

    def save_and_signal(*arguments, **settings):
        save(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_batch", batch_and_signal)
        patch.setattr(run_checkpoints.Checkpoints, "save", save_and_signal)
        train("told", status=75, **run)
    said = capsys.readouterr().err
    step = run_of("told")["position"]["next_batch"]
    assert 0 < step < 5
    assert f"stopped by SIGTERM: update {step} is saved. The same command goes on" in said
    lines = kill_and_resume.lines_of(pathlib.Path("told/metrics.jsonl"))
    assert [line["step"] for line in lines] == [0]
    train("told", **run)
    assert kill_and_resume.difference(pathlib.Path("calm"), pathlib.Path("told")) is None
    lines = kill_and_resume.lines_of(pathlib.Path("told/metrics.jsonl"))
    assert [line["step"] for line in lines] == [0, 5, 6]
    # The checkpoint of the stop is gone: without it there would have been none.
    for model_dir in ("calm", "told"):
        assert [path.name for path in pathlib.Path(model_dir).glob("checkpoint_*")] == [
            "checkpoint_6"
        ]


def test_a_stop_takes_the_place_of_no_other_checkpoint(monkeypatch):
    """In the end there are the two checkpoints that an undisturbed run would have kept."""
    run = {**RUN, "CHECKPOINT_EVERY": 2, "KEEP_CHECKPOINTS": 2}
    trained = progress_view.View.trained

    def trained_and_signal(view, step, metrics):
        trained(view, step, metrics)
        if step == 4:  # so the next update is the last one before the stop
            os.kill(os.getpid(), signal.SIGTERM)

    def steps_left():
        return sorted(path.name for path in pathlib.Path("stopped").glob("checkpoint_*"))

    with monkeypatch.context() as patch:
        patch.setattr(progress_view.View, "trained", trained_and_signal)
        train("stopped", status=75, **run)
    assert steps_left() == ["checkpoint_2", "checkpoint_4", "checkpoint_5"]
    train("stopped", **run)
    assert steps_left() == ["checkpoint_4", "checkpoint_6"]


def test_a_program_that_is_told_to_stop_stops():
    """Nothing to save, so it ends where it is; what is to be done again is done again."""
    settings = {**RUN, "MODEL_DIR": "stopped"}
    command = [sys.executable, "-m", "tnt_jax.train", *rooms.arguments("train", settings)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stopped = subprocess.Popen(command, **pipes)
    assert stopped.stdout.readline().startswith("30 of 60 examples have marks")
    stopped.terminate()
    stopped.terminate()
    _, said = stopped.communicate(timeout=240)
    assert stopped.returncode == 75
    assert re.fullmatch(r"tnt_jax.train: stopped by SIGTERM: .*\. The same command .*\n", said)


def test_the_comparison_sees_every_difference():
    straight, other = pathlib.Path("straight"), pathlib.Path("differs")
    shutil.copytree(straight, other)
    metrics = other / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text + text.splitlines()[-1] + "\n")
    assert kill_and_resume.difference(straight, other) == (
        "metrics.jsonl: expected 7 lines, found 8"
    )
    metrics.write_text(text.replace('"step": 3, "loss": ', '"step": 3, "loss": 1'))
    assert kill_and_resume.difference(straight, other).startswith("metrics.jsonl, line 4: expected")
    metrics.write_text(text)
    shutil.rmtree(other / "checkpoint_6")
    shutil.copytree(other / "checkpoint_4", other / "checkpoint_6")
    found = kill_and_resume.difference(straight, other)
    assert re.match(r"params/decoder/\S+: \d+ of \d+ differ, by \d", found)


def probe_by_hand(path):
    """Log-probabilities of sixteen tokens, from dense logits, on one device."""
    weights = pretrained.open_checkpoint(path)
    params = jax.tree.map(jnp.asarray, weights.restore(t5.T5(weights.config).abstract_params()))
    ids = np.random.default_rng(0).integers(2, rooms.VOCAB_SIZE, (4, 2, 16), dtype=np.int32)
    batch = {
        "encoder_input_tokens": ids[:, 0],
        "decoder_input_tokens": np.pad(ids[:, 1, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": ids[:, 1],
    }
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    logits = t5_inputs.make_forward(weights.config)(params, batch, None)
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, 1, :, None], axis=-1)[
        ..., 0
    ]


def test_p0_after_a_restart_is_the_p0_of_before():
    as_killed("p0", 2, last_line=3)
    train("p0", **RUN)
    before = orbax.read_run(checkpoint_kinds.find("straight/checkpoint_2"))["original"]
    after = run_of("p0")["original"]
    assert after == before  # in every bit
    assert after["digest"] == digests.of_params(rooms.saved("original"))
    np.testing.assert_allclose(after["probe"], probe_by_hand("original"), rtol=1e-5, atol=1e-5)
    # Not the half-trained model that the run went on from.
    assert np.abs(after["probe"] - probe_by_hand("straight/checkpoint_2")).mean() > 0.01


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_probe_is_the_same_on_every_mesh(num_devices):
    config = pretrained.open_checkpoint("original").config
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:num_devices])
    model = Model(config=config, mesh=mesh)
    found = load_original.probe(
        model, pretrained.open_checkpoint("original").restore(model.abstract_params)
    )
    np.testing.assert_allclose(found, run_of("straight")["original"]["probe"], rtol=1e-5)


# --- What a checkpoint says, and what is refused --------------------------------------------------


def test_a_checkpoint_says_what_its_run_was():
    run = run_of("straight")
    assert run["position"] == {"next_batch": 6}
    assert run["start"] == {"path": "original", "digest": run["original"]["digest"]}
    assert run["versions"]["jax"] == jax.__version__
    assert run["computed_on"]["mesh"] == {"data": 2, "fsdp": 1, "model": 1}
    assert run["objective"]["negative_term"] == "reverse_kl"
    assert "DROPOUT_RATE = 0.1" in run["config"]
    assert run["config"] == pathlib.Path("straight/operative_config.gin").read_text()
    health = run["health"]
    assert len(health["losses_marked"]) + len(health["losses_unmarked"]) == 6
    # What is stored is the model's own: nothing of the original, whose optimizer ended with it.
    names = orbax.lazy_item(checkpoint_kinds.find("straight") / "optimizer").keys()
    params = rooms.saved("straight")
    num_params = len(jax.tree.leaves(params))
    assert len(names) == 2 * num_params + 1  # Adam's two moments, and a counter
    items = {path.name for path in checkpoint_kinds.find("straight").iterdir() if path.is_dir()}
    assert items == {"params", "optimizer", "run"}


@pytest.mark.parametrize(
    ("settings", "names", "differences"),
    [
        ({"BATCH_SIZE": 32}, "['batch_size']", "batch_size (BATCH_SIZE) was 16, is 32"),
        (
            {"NEGATIVE_WEIGHT": 2.0},
            "['objective']",
            "objective (the objective's file): negative_weight was 1.0, is 2.0",
        ),
        (
            {"LEARNING_RATE": 0.01, "MAX_GRADIENT_NORM": None},
            "['optimizer']",
            "optimizer (OPTIMIZER and its settings): learning_rate was 0.003, is 0.01",
        ),
        (
            {"DROPOUT_RATE": 0.0, "PACK": False, "SEED": 1},
            "['model', 'pack', 'seed']",
            "model (the model's settings): dropout_rate was 0.1, is 0.0; pack (PACK) was True, is "
            "False; seed (SEED) was 0, is 1",
        ),
        (
            {"RECORDS": "fewer.jsonl"},
            "['data']",
            r"data (RECORDS and its settings) was 60 examples (digest \w+), is 59 examples "
            r"(digest \w+)",
        ),
        (
            {"INITIAL_CHECKPOINT_PATH": "other"},
            "['original', 'start']",
            r"original (INITIAL_CHECKPOINT_PATH) was original (digest \w+), is other (digest \w+); "
            "start (START_CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH) was original, is other",
        ),
    ],
)
def test_another_run_is_refused_and_the_difference_named(settings, names, differences, capsys):
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path("straight").rglob("*")}
    train("straight", status=2, **{**RUN, **settings})
    expected = (
        f"tnt_jax.train: error: MODEL_DIR straight holds another run, at update 6: {differences}. "
        "Set it back, choose another MODEL_DIR, or go on knowingly with "
        f'--gin.ALLOW_CHANGES="{names}".\n'
    )
    pattern = re.escape(expected).replace(r"\\w\+", r"\w+")
    assert re.fullmatch(pattern, capsys.readouterr().err)
    after = {path: path.stat().st_mtime_ns for path in pathlib.Path("straight").rglob("*")}
    assert after == before


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (
            {"MAX_GRADIENT_NORM": 1.0},
            "optimizer (OPTIMIZER and its settings): max_gradient_norm was None, is 1.0",
        ),
        (
            {"ORIGINAL": "adapters_off"},
            "adapters (ORIGINAL, ADAPTER_RANK, ADAPTER_ALPHA and TRAINED_LAYERS) was none, is "
            "{'rank': 16, 'alpha': 32.0}",
        ),
    ],
)
def test_a_change_that_the_checkpoint_cannot_take_is_named(settings, difference, capsys):
    """Whatever it makes of the trees; that it is allowed would not help."""
    train("straight", status=2, **RUN, **settings)
    assert capsys.readouterr().err == (
        f"tnt_jax.train: error: MODEL_DIR straight holds another run, at update 6: {difference}. "
        "Set it back, or choose another MODEL_DIR: the checkpoint does not fit the change.\n"
    )
    train("straight", status=2, **RUN, **settings, ALLOW_CHANGES=["optimizer", "adapters"])
    assert "straight/checkpoint_6 does not fit " in capsys.readouterr().err


def test_an_original_that_was_overwritten_is_refused_and_one_that_was_moved_is_not(capsys):
    shutil.copytree("straight", "here")
    shutil.copytree("original", "moved")
    train("here", **RUN, INITIAL_CHECKPOINT_PATH="moved")
    assert "Nothing to do" in capsys.readouterr().out
    shutil.rmtree("moved")
    shutil.copytree("other", "moved")
    train("here", status=2, **RUN, INITIAL_CHECKPOINT_PATH="moved")
    error = capsys.readouterr().err
    assert "original (INITIAL_CHECKPOINT_PATH) was original (digest " in error


def test_a_change_that_is_meant_is_made_and_written_down(capsys):
    shutil.copytree("straight", "changed")
    settings = {**RUN, "BATCH_SIZE": 32, "TRAIN_STEPS": 7}
    train("changed", **settings, ALLOW_CHANGES=["batch_size"])
    change = "batch_size (BATCH_SIZE) was 16, is 32"
    assert f"Going on with a change: {change}." in capsys.readouterr().out
    run = run_of("changed")
    assert run["batch_size"] == 32
    assert run["changes"] == [{"after_update": 6, "name": "batch_size", "change": change}]
    train("changed", **settings)  # now it is that run
    train("changed", status=2, **RUN)
    train("changed", status=2, **settings, ALLOW_CHANGES=["batchsize"])
    assert "ALLOW_CHANGES: expected a list of some of original, " in capsys.readouterr().err


# --- Without training -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"NUM_MICROBATCHES": 4}, "other masks"),
        ({"FSDP_DEVICES": 2}, "other masks"),  # of two devices, `data` then has one
        ({"BLOCK_SIZE": 64}, "rounding"),
        (
            {"NUM_MICROBATCHES": 4, "DROPOUT_RATE": 0.0, "ALLOW_CHANGES": ["model"]},
            "rounding",
        ),
    ],
)
def test_what_another_way_to_compute_changes_is_said(settings, how, capsys):
    """With dropout, microbatches and devices decide what is dropped."""
    if not pathlib.Path("again").exists():
        shutil.copytree("straight", "again")
    train("again", **{**RUN, **settings})
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "Computed otherwise" in line
    )
    ends = {
        "other masks": "): with DROPOUT_RATE=0.1, other units are dropped from here on than would "
        "have been; the batches are the same.",
        "rounding": "): the same up to rounding, not bit by bit.",
    }
    assert line.endswith(ends[how])


def compare(before, now, name, allow=()):
    run = {name: now}
    resume.check_same({name: before}, run, [name], allow, "there", 5)
    return run


def original_of(**changes):
    return {"path": "a", "digest": "00", "probe": [[-1.0, -2.0], [-3.0, -4.0]], **changes}


@pytest.mark.parametrize(
    ("name", "before", "now", "difference"),
    [
        (
            "vocabulary",
            {"class": "seqio.A", "model": "sha256:00", "extra_ids": 100},
            {"class": "seqio.A", "model": "sha256:11", "extra_ids": 0},
            "vocabulary (VOCABULARY_PATH): extra_ids was 100, is 0, model was sha256:00, is "
            "sha256:11",
        ),
        (
            "task_feature_lengths",
            {"inputs": 8, "targets": 16},
            {"inputs": 8, "targets": 32},
            "task_feature_lengths (TASK_FEATURE_LENGTHS): targets was 16, is 32",
        ),
        (
            "adapters",
            {"rank": 4, "alpha": 8.0, "beside": "a"},
            None,
            "adapters (ORIGINAL, ADAPTER_RANK, ADAPTER_ALPHA and TRAINED_LAYERS) was {'rank': 4, "
            "'alpha': 8.0}, is none",
        ),
        (
            "adapters",
            {"rank": 4, "alpha": 8.0},
            {"rank": 4, "alpha": 8.0, "layers": 2},
            "adapters (ORIGINAL, ADAPTER_RANK, ADAPTER_ALPHA and TRAINED_LAYERS): layers was None, "
            "is 2",
        ),
        (  # of a run that an older version began, and of one that this one began
            "objective",
            {"negative_weight": 1.0},
            {"negative_weight": 1.0, "residual_weight": 1.0, "npo_beta": 0.5},
            "objective (the objective's file): npo_beta was 0.1, is 0.5",
        ),
        (
            "objective",
            {"negative_weight": 1.0, "npo_beta": 0.5},
            {"negative_weight": 1.0},
            "objective (the objective's file): npo_beta was 0.5, is 0.1",
        ),
        (
            "optimizer",
            {"function": "adam", "max_gradient_norm": None},
            {"function": "adam", "max_gradient_norm": None, "learning_rate_factor": 0.5},
            "optimizer (OPTIMIZER and its settings): learning_rate_factor was None, is 0.5",
        ),
        (
            "original",
            None,
            original_of(path=None),
            "original (INITIAL_CHECKPOINT_PATH) was none (an objective without divergences), is a "
            "random initialisation (digest 00)",
        ),
        (
            "original",
            original_of(),
            original_of(probe=[[-1.0, -2.0], [-3.0, -5.0]]),
            "original (INITIAL_CHECKPOINT_PATH) has the parameters that it had, but computes "
            "otherwise: its log-probabilities of a probe batch differ by 0.25 nats a token (the "
            "model's settings, or the versions of what computes)",
        ),
        (  # whose batches had another order
            "pack",
            True,
            "planned once",
            "pack (PACK) was True, planned anew in every epoch by an earlier version, is True",
        ),
        (
            "data",
            {"num_examples": 65_537, "digest": "0" * 16},
            {"num_examples": 65_537, "digest": "rows-" + "1" * 16},
            "data (RECORDS and its settings) was 65537 examples (digest 0000000000000000, in the "
            "order of an earlier version), is 65537 examples (digest rows-1111111111111111)",
        ),
        (
            "objective",
            {"z_loss": 0.0},
            {"z_loss": 0.0, "negative_strength": 0.5},
            "objective (the objective's file): negative_strength was 1.0, is 0.5",
        ),
        (
            "start",
            {"path": "a", "digest": "00"},
            {"path": None, "digest": "11"},
            "start (START_CHECKPOINT_PATH or INITIAL_CHECKPOINT_PATH) was a, is a random "
            "initialisation",
        ),
    ],
)
def test_differences_are_named(name, before, now, difference):
    with pytest.raises(UsageError) as raised:
        compare(before, now, name)
    assert f"at update 5: {difference}. Set it back" in str(raised.value)
    run = compare(before, now, name, allow=[name])
    assert run["changes"] == [{"after_update": 5, "name": name, "change": difference}]


@pytest.mark.parametrize(
    ("name", "before", "now"),
    [
        # Where it lies says nothing of what it is.
        ("original", original_of(), original_of(path="b")),
        ("original", original_of(), original_of(probe=[[-1.01, -2.0], [-3.0, -4.0]])),
        ("start", {"path": "a", "digest": "00"}, {"path": "b", "digest": "00"}),
        # How it is computed, and settings that an older version had not.
        ("objective", {"negative_weight": 1.0}, {"negative_weight": 1.0, "residual_weight": 1.0}),
        (
            "model",
            {"emb_dim": 8, "scan_layers": False, "remat_policy": "none", "adapter_scale": 0.0},
            {
                "emb_dim": 8,
                "scan_layers": True,
                "remat_policy": "full",
                "adapter_scale": 2.0,
                "x": 1,
            },
        ),
        ("adapters", {"rank": 4, "alpha": 8.0, "beside": "a"}, {"rank": 4, "alpha": 8.0}),
        ("adapters", {"rank": 4, "alpha": 8.0}, {"rank": 4, "alpha": 8.0, "layers": None}),
        # A run from before there were strengths.
        ("objective", {"z_loss": 0.0}, {"z_loss": 0.0, "negative_strength": 1.0}),
    ],
)
def test_what_makes_no_other_run_is_let_pass(name, before, now):
    assert compare(before, now, name)["changes"] == []


def test_what_was_not_written_down_is_not_compared():
    resume.check_same({}, {"batch_size": 3, "seed": 1}, ["batch_size", "seed"], [], "there", 5)


def test_a_change_stays_written_down():
    before = {"changes": [{"after_update": 2, "name": "seed", "change": "..."}], "pack": False}
    run = {"pack": False}
    resume.check_same(before, run, ["pack"], [], "there", 5)
    assert json.loads(json.dumps(run["changes"])) == before["changes"]


def test_what_was_measured_of_another_objective_is_left_behind():
    before = {"position": {"next_batch": 7}, "health": {"losses": [0.1]}, "since_log": {}}
    changes = [{"after_update": 7, "name": "pack"}, {"after_update": 5, "name": "objective"}]
    run = types.SimpleNamespace(before=before, run={"changes": changes})
    measured = loop.Loop.measured_before.fget(run)
    assert measured is before
    changes.append({"after_update": 7, "name": "objective"})
    assert loop.Loop.measured_before.fget(run) == {}


def test_what_was_left_out_is_forgotten_where_nothing_is_left_out_any_more():
    """A run with NON_FINITE="stop" would end at it, however often it is started."""
    sums = [{"loss": 1.0, "gradient_norm": 2.0}, {"loss": math.nan, "gradient_norm": 2.0}]
    before = {"sums": sums, "seconds": 1.0, "seconds_waited": 0.0}
    assert not loop._SinceLog(before).is_finite()
    assert loop._SinceLog(before, keeps_all=False).fetch().sums == []
    before["sums"] = sums[:1]
    since = loop._SinceLog(before, keeps_all=False)
    assert [found["loss"] for found in since.fetch().sums] == [1.0]


@pytest.mark.parametrize("name", ["adapters", "upper_layers"])
def test_hosts_may_have_their_original_at_paths_of_their_own(name, monkeypatch):
    said = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gather", lambda place, own: said.append(own) or said)

    def check(part):
        resume.check_alike({name: part, "seed": 1, "config": "", "versions": {}})

    check({"layers": 1, "beside": "/home/one/model"})
    check({"layers": 1, "beside": "/home/two/model"})
    with pytest.raises(UsageError, match=rf"found others in some: {name} \(ORIGINAL"):
        check({"layers": 2, "beside": "/home/one/model"})


class Seen(run_checkpoints.Checkpoints):
    """Checkpoints as a host sees them, each time that it looks."""

    def __init__(self, *steps):
        self._steps = list(steps)

    def latest_step(self):
        return self._steps[0]

    def reload(self):
        self._steps = self._steps[1:] or self._steps


@pytest.mark.parametrize("steps", [(7,), (None, 3, 7), (None,), (8,)])
def test_all_hosts_go_on_from_the_checkpoint_that_the_first_one_sees(steps, monkeypatch):
    """Its file system may show a folder as it was a minute ago."""
    other = []  # what the first process says

    def gather(place, said):
        return [other.pop(0), said]

    monkeypatch.setattr(processes, "gather", lambda place, said: other.append(said) or [said])
    assert resume._latest_step(Seen(7)) == 7
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "gather", gather)
    monkeypatch.setattr(processes, "_PATIENCE", 0.5)
    if steps[-1] == 7:
        assert resume._latest_step(Seen(*steps)) == 7
        return
    message = r"found others in some: checkpoint \(the newest one that each sees in MODEL_DIR\)"
    with pytest.raises(UsageError, match=message):
        resume._latest_step(Seen(*steps))
