import html
import json
import math
import re
import subprocess
import sys

import jax
import pytest
from helpers.event_files import shown

from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import metric_writers


def test_numbers_are_curves_in_groups(tmp_path):
    with metric_writers.open_all(str(tmp_path), start=0, config={}) as out:
        out.write(10, {"loss": 0.5, "eval/loss": 0.25, "positive_kl": math.nan})
        out.write(20, {"loss": 0.125})
        out.flush()
        assert shown(tmp_path / "tensorboard") == {  # while the run goes on
            "train/loss": [(10, 0.5), (20, 0.125)],
            "eval/loss": [(10, 0.25)],
        }
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 10, "loss": 0.5, "eval/loss": 0.25, "positive_kl": None},
        {"step": 20, "loss": 0.125},
    ]


def test_a_run_that_goes_on_shows_each_update_once(tmp_path):
    def run(start, steps, value):
        with metric_writers.open_all(str(tmp_path), start=start, config={}) as out:
            for step in steps:
                out.write(step, {"loss": value})

    run(0, (0, 10, 20, 30), 1.0)
    run(20, (30, 40), 2.0)  # it died at 30, and its last checkpoint was 20
    assert shown(tmp_path / "tensorboard")["train/loss"] == [
        *((0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)),
    ]
    run(0, (0, 10), 3.0)  # without a checkpoint, it began anew
    assert shown(tmp_path / "tensorboard")["train/loss"] == [(0, 3.0), (10, 3.0)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 10]


def test_texts_are_cells_whatever_is_in_them(tmp_path):
    hostile = "a | b\n<script>*x* _y_ `z` &amp; [link](http://a) # \\ ~ Zoë ▁"
    with metric_writers.open_all(str(tmp_path), start=0, config={}) as out:
        out.write_table(3, "samples", ["prompt", "now"], [[hostile, "plain"]])
    ((step, table),) = shown(tmp_path / "tensorboard")["samples"]
    heading, rule, row = table.split("\n")
    assert (step, heading, rule) == (3, "| prompt | now |", "| --- | --- |")
    cell, plain = re.fullmatch(r"\| ([^|]*) \| ([^|]*) \|", row).groups()
    assert plain == "plain"
    # Nothing is left that Markdown or HTML would take for its own, and a browser shows the text.
    assert not re.search(r"[^\w\s&#;ë▁]|_", cell.replace("<br>", ""))
    assert html.unescape(cell.replace("<br>", "\n")) == hostile


def test_a_bucket_gets_the_whole_file_at_every_flush(tmp_path, monkeypatch):
    # A folder stands for the bucket; nothing may come to it but our uploads.
    class Bucket(type(tmp_path)):
        def __new__(cls, path):
            return type(tmp_path)(str(path).replace("gs://bucket", str(tmp_path)))

    monkeypatch.setattr(metric_writers.epath, "Path", Bucket)
    writer = metric_writers.TensorBoard("gs://bucket", start=0)
    writer.write(1, {"loss": 1.0})
    assert shown(tmp_path) == {}  # not yet: an upload at every line would cost too much
    writer.flush()
    assert shown(tmp_path) == {"train/loss": [(1, 1.0)]}
    writer.write(2, {"loss": 2.0})
    writer.close()
    assert shown(tmp_path) == {"train/loss": [(1, 1.0), (2, 2.0)]}


def test_a_later_host_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metric_writers.open_all(str(tmp_path), start=0, config={}, wandb_project="p") as out:
        out.write(1, {"loss": 1.0})
        out.write_table(1, "samples", ["now"], [["x"]])
        out.flush()
    assert list(tmp_path.iterdir()) == []


def test_no_tensorflow_is_imported(tmp_path):
    code = """
import sys
from tnt_jax.watching import metric_writers
with metric_writers.open_all(sys.argv[1], start=0, config={}) as out:
    out.write(1, {"loss": 1.0})
    out.write_table(1, "samples", ["now"], [["a"]])
print("tensorflow" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    completed = subprocess.run(command, capture_output=True, text=True)
    assert completed.stdout == "False\n", completed.stderr


# --- Weights & Biases: a stand-in for the service, which answers as wandb 0.31 does ---------------

WANDB = """
import json, pathlib

SERVER = pathlib.Path(__file__).parent / "server.json"
REFUSAL = SERVER.with_name("refusal.txt")

class Error(Exception):
    pass

class UsageError(Error):
    pass

class Table:
    def __init__(self, columns, data):
        self.content = [columns, *data]

class Run:
    def __init__(self, runs, arguments):
        self.runs = runs
        self.of_run = runs.setdefault(arguments["id"], {"inits": [], "history": []})
        self.of_run["inits"].append(arguments)
        assert arguments["resume"] == "allow"
        history = self.of_run["history"]
        self.step = history[-1][0] + 1 if history else 0  # where a run goes on

    def log(self, values, step):
        assert step >= self.step, "wandb drops this, with a warning"
        self.step = step
        values = {name: getattr(value, "content", value) for name, value in values.items()}
        self.of_run["history"].append([step, values])

    def finish(self, exit_code):
        self.of_run["exit_code"] = exit_code
        SERVER.write_text(json.dumps(self.runs))

def init(**arguments):
    if REFUSAL.exists():
        raise UsageError(REFUSAL.read_text())
    return Run(json.loads(SERVER.read_text()) if SERVER.exists() else {}, arguments)
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The folder of a package `wandb`, which has nothing yet."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield folder
    sys.modules.pop("wandb", None)


def test_weights_and_biases_has_one_run_and_each_update_once(tmp_path, wandb):
    model_dir = tmp_path / "patched"

    def run(start, steps, value):
        arguments = {"start": start, "config": {"seed": 3}, "wandb_project": "names"}
        with metric_writers.open_all(str(model_dir), **arguments) as out:
            for step in steps:
                out.write(step, {"loss": value, "eval/loss": value})
                out.write_table(step, "samples", ["now"], [["a"]])

    run(0, (10, 20, 30), 1.0)
    run(20, (30, 40), 2.0)
    ((run_id, of_run),) = json.loads((wandb / "server.json").read_text()).items()
    assert [init["id"] for init in of_run["inits"]] == [run_id, run_id]
    assert of_run["inits"][0]["project"] == "names"
    assert of_run["inits"][0]["name"] == "patched"
    assert of_run["inits"][0]["config"] == {"seed": 3}
    history = of_run["history"]
    assert [step for step, _ in history] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert history[0][1] == {"train/loss": 1.0, "eval/loss": 1.0}
    assert history[1][1] == {"samples": [["now"], ["a"]]}
    assert [values["train/loss"] for _, values in history[::2]] == [1.0, 1.0, 1.0, 2.0]
    assert of_run["exit_code"] == 0
    # What begins anew in the same folder is no part of it.
    run(0, (10,), 3.0)
    first, second = json.loads((wandb / "server.json").read_text()).items()
    assert first == (run_id, of_run)
    assert [step for step, _ in second[1]["history"]] == [10, 10]


def test_weights_and_biases_hears_of_a_failure(tmp_path, wandb):
    arguments = {"start": 0, "config": {}, "wandb_project": "names"}
    with (
        pytest.raises(ZeroDivisionError),
        metric_writers.open_all(str(tmp_path / "run"), **arguments) as out,
    ):
        out.write(1, {"loss": 1.0})
        raise ZeroDivisionError
    (of_run,) = json.loads((wandb / "server.json").read_text()).values()
    assert of_run["exit_code"] == 1


@pytest.mark.parametrize(
    ("refusal", "found"),
    [  # of wandb 0.31
        (
            "No API key configured. Use `wandb login` to log in.",
            "No API key configured. Use `wandb login` to log in",
        ),
        (
            "Failed to get resume status for run 0a: context deadline exceeded\nwhile retrying",
            "Failed to get resume status for run 0a: context deadline exceeded",
        ),
        ("", "UsageError"),
    ],
)
def test_weights_and_biases_that_cannot_log_in_is_told_in_one_line(tmp_path, wandb, refusal, found):
    (wandb / "refusal.txt").write_text(refusal)
    arguments = {"start": 0, "config": {}, "wandb_project": "names"}
    with pytest.raises(UsageError) as raised:
        metric_writers.open_all(str(tmp_path / "run"), **arguments)
    assert str(raised.value) == (
        "WANDB_PROJECT: expected that wandb can log in and begin a run in 'names', found: "
        f"{found}. Run `wandb login`, or set WANDB_API_KEY, WANDB_MODE=offline, or WANDB_PROJECT "
        "to None."
    )
    (wandb / "refusal.txt").unlink()  # whoever logs in then begins where it would have begun
    with metric_writers.open_all(str(tmp_path / "run"), **arguments) as out:
        out.write(1, {"loss": 1.0})
    (of_run,) = json.loads((wandb / "server.json").read_text()).values()
    assert [step for step, _ in of_run["history"]] == [1]


def test_weights_and_biases_must_be_there(monkeypatch):
    metric_writers.check_wandb(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"WANDB_PROJECT is 'p'.*pip install 'tnt_jax\[wandb\]'"):
        metric_writers.check_wandb("p")
