import json
import sys
import time

import jax
import pytest

from tnt_jax.runtime import console, files
from tnt_jax.watching import metric_writers


@pytest.fixture
def later_host(monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: 1)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_one_object_a_line_and_readable_at_once(tmp_path):
    with metric_writers.MetricsWriter(tmp_path / "new") as writer:
        writer.write(1, {"loss": 0.5, "tokens": 7})
        assert lines_of(tmp_path / "new" / "metrics.jsonl") == [
            {"step": 1, "loss": 0.5, "tokens": 7.0}
        ]
        writer.write(2, {"loss": jax.numpy.float32(0.25)})
    assert lines_of(tmp_path / "new" / "metrics.jsonl")[1] == {"step": 2, "loss": 0.25}


def test_metrics_that_are_not_finite_stay_json(tmp_path):
    with metric_writers.MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": float("nan"), "norm": float("inf")})
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": None, "norm": None}]


@pytest.mark.parametrize("left", ['{"step": 1}\n{"st', '{"st', ""])
def test_reopened_metrics_lose_only_a_half_line(tmp_path, left):
    (tmp_path / "metrics.jsonl").write_text(left)
    with metric_writers.MetricsWriter(tmp_path) as writer:
        writer.write(2, {})
    whole = [{"step": 1}] if "}" in left else []
    assert lines_of(tmp_path / "metrics.jsonl") == [*whole, {"step": 2}]


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2}\n{"step": 4, "loss": 1}\n\0\0\n{"step": 6}\n{"step": 4}\n{"step": 8'
    )
    with metric_writers.MetricsWriter(tmp_path, last_step=4) as writer:
        assert lines_of(path) == [{"step": 2}, {"step": 4, "loss": 1}, {"step": 4}]
        writer.write(6, {})
    with metric_writers.MetricsWriter(tmp_path, last_step=0):  # no checkpoint: the run begins anew
        assert lines_of(path) == []


def test_lines_are_kept_whole_whatever_their_texts_hold(tmp_path):
    text = "a\u2028b\x85c\x0bd\re"
    with metric_writers.StepLines(tmp_path / "samples.jsonl") as writer:
        writer.write(3, {"text": text})
        writer.write(4, {"text": text})
    with metric_writers.StepLines(tmp_path / "samples.jsonl", last_step=3) as writer:
        writer.write(5, {})
    written = (tmp_path / "samples.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [json.loads(line) for line in written] == [{"step": 3, "text": text}, {"step": 5}]


def test_lines_that_are_damaged_are_of_no_step(tmp_path):
    path, whole = tmp_path / "events.jsonl", '{"step": 1}\n'
    damaged = ("[" * 100_000, f'{{"step": {10**400}}}', '{"step": []}', "null", "\0")
    path.write_text("".join(f"{line}\n" for line in damaged) + whole)
    with metric_writers.StepLines(path, last_step=3):
        assert path.read_text() == whole


def test_lines_of_a_step_hold_any_value(tmp_path):
    with metric_writers.StepLines(tmp_path / "events.jsonl") as writer:
        writer.write(3, {"loss": float("inf"), "examples": ["Zoë"], "count": 2})
    assert lines_of(tmp_path / "events.jsonl") == [
        {"step": 3, "loss": None, "examples": ["Zoë"], "count": 2}
    ]


def test_numbers_that_are_not_finite_become_null_wherever_they_are(tmp_path):
    nan, infinity = float("nan"), float("inf")
    value = {"a": [nan, (1, -infinity)], "b": {"c": {"d": infinity}}, "e": [0.5, True, None, "NaN"]}
    told = {"a": [None, [1, None]], "b": {"c": {"d": None}}, "e": [0.5, True, None, "NaN"]}

    def no_json(literal):
        raise AssertionError(f"{literal} is not JSON")

    files.write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text(), parse_constant=no_json) == told
    with metric_writers.StepLines(tmp_path / "lines.jsonl") as lines:
        lines.write(2, value)
    line = (tmp_path / "lines.jsonl").read_text()
    assert json.loads(line, parse_constant=no_json) == {"step": 2, **told}


def test_a_later_host_is_silent(later_host, tmp_path, capsys):
    console.log("hello")
    console.table([[1]], columns=["n"])
    assert list(console.progress(range(3), "counting")) == [0, 1, 2]
    with metric_writers.MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": 1.0})
    files.write_text(tmp_path / "text", "hello")
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_written_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "result.json"
    files.write_json(path, {"name": "Zoë", "cut": 0.75})
    assert json.loads(path.read_text("utf-8")) == {"name": "Zoë", "cut": 0.75}
    with pytest.raises(TypeError, match="not JSON serializable"):
        files.write_json(path, {"cut": object()})
    assert json.loads(path.read_text("utf-8"))["cut"] == 0.75
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


class Clock:
    """Stands for `time.monotonic`: seconds pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_what_is_logged_can_go_to_a_file_and_what_is_said_and_how_far_it_is_stays(
    clock, tmp_path, capsys
):
    file = tmp_path / "log.txt"
    with console.logging_to(file):
        console.log("one\x1b[2J")
        console.say("two")
        for _ in console.progress(range(3), "reading"):
            clock.now += 20
    console.log("three")
    assert file.read_text() == "one\\x1b[2J\nreading: 3 in 1:00\n"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "two"
    assert lines[1].startswith("reading: 1/3 ")
    assert lines[-1] == "three"


def test_quick_work_prints_one_line(clock, capsys):
    assert list(console.progress([1, 2, 3], "reading")) == [1, 2, 3]
    assert capsys.readouterr().out == "reading: 3 in 0:00\n"


def test_progress_says_how_far_and_how_long(clock, capsys):
    for _ in console.progress(range(10), "generating"):
        clock.now += 20
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "generating: 1/10 (10 %), 3:00 left"
    assert lines[-2:] == ["generating: 10/10 (100 %), 0:00 left", "generating: 10 in 3:20"]
    assert len(lines) == 11


def test_progress_is_sparse_on_long_work(clock, capsys):
    for _ in console.progress(range(1000), "generating"):
        clock.now += 4  # a tenth takes 400 s, so a line comes each minute
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "generating: 15/1000 (1 %), 1:05:40 left"
    assert len(lines) == 1000 // 15 + 1


def test_progress_without_a_known_total(clock, capsys):
    for _ in console.progress(iter(range(4)), "mining"):
        clock.now += 60
    assert capsys.readouterr().out.splitlines()[:2] == ["mining: 1", "mining: 2"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert list(console.progress(range(3), "[generating]")) == [0, 1, 2]
    out = capsys.readouterr().out
    assert "[generating]" in out
    assert "3/3" in out


def test_table_is_plain_whole_and_literal(capsys):
    console.table(
        [["TNRF", 76.98, 1, None], ["a [bold]name[/bold] " + "x" * 200, 5.0, 20, "ok"]],
        columns=["arm", "cut %", "n", "note"],
        title="Before [and] after",
    )
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == "Before [and] after"
    assert lines[1].split() == ["arm", "cut", "%", "n", "note"]
    assert lines[3].split() == ["TNRF", "77.0", "1", "-"]
    assert "a [bold]name[/bold] " + "x" * 200 in lines[4]
    assert lines[3].index("77.0") + 1 == lines[4].index("5.0")  # aligned at the point


def test_what_a_terminal_would_obey_is_spelt_out(capsys):
    """An output of a model, or a name in a file, may hold the codes that move a cursor."""
    console.log("one\n  input  \x1b[2Ja\x07b\x9b1m\tc é😀")
    console.table([("\x1b]0;title\x07", 1.0)], columns=("a", "b"))
    printed = capsys.readouterr().out
    assert printed.startswith("one\n  input  \\x1b[2Ja\\x07b\\x9b1m\tc é😀\n")
    assert "\\x1b]0;title\\x07" in printed
    assert "\x1b" not in printed
