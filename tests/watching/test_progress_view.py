import io
import re
import time

import pytest
import rich.console

from tnt_jax.watching import progress_view

FIRST = {"loss": 2.5, "negative_mass": 0.9, "num_tokens": 7.0, "tokens_per_second": 1234.4}
LATER = {"loss": 0.125, "negative_mass": 0.001, "positive_kl": 0.02, "num_tokens": 7.0}


@pytest.fixture
def clock(monkeypatch):
    """Stands for `time.monotonic`: seconds pass when the test says so."""
    seconds = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[0])

    def wait(more):
        seconds[0] += more

    return wait


def test_lines_have_the_metrics_and_the_time_left(clock, capsys):
    view = progress_view.Lines(start=10, train_steps=30)
    with view.showing():
        clock(500)  # compiling: not counted
        view.dispatched(11)
        clock(50)
        view.trained(15, FIRST)
        clock(70)  # 120 seconds for 10 updates
        view.trained(20, LATER)
        view.evaluated(20, {"loss": 0.5})
        clock(10)
        view.trained(30, LATER)
    assert capsys.readouterr().out.splitlines() == [
        "update 15 of 30: loss 2.5000, p(removed) 9.00e-01, 1234 target tokens/s; 2:30 left",
        "update 20 of 30: loss 0.1250, p(removed) 1.00e-03, "
        "KL to the original at ordinary positions 2.00e-02; 2:00 left",
        "update 20, evaluation: loss 0.5000",
        "update 30 of 30: loss 0.1250, p(removed) 1.00e-03, "
        "KL to the original at ordinary positions 2.00e-02",
    ]
    assert view.outcome() == (
        "20 updates in 10:30, loss from 2.5000 to 0.1250, p(removed) from 9.00e-01 to 1.00e-03. "
    )


def test_a_run_without_updates_has_no_outcome():
    assert progress_view.Lines(start=0, train_steps=5).outcome() == ""


def screen(written):
    """What a terminal shows in the end: control sequences for a table in place are obeyed."""
    lines = [""]
    row = 0
    for text, control, argument, code in re.findall(
        r"([^\x1b\n\r]+)|(\n|\r)|\x1b\[\??(\d*)(?:;\d+)*([A-Za-z])", written
    ):
        if text:
            lines[row] += text
        elif control == "\n":
            row += 1
            lines += [""] * (row - len(lines) + 1)
        elif code == "A":
            row -= int(argument or 1)
        elif code == "K":
            lines[row] = ""
    return "\n".join(lines)


def test_a_terminal_shows_the_newest_numbers_beside_the_first(clock):
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=True, width=100, color_system=None)
    view = progress_view.Table(start=0, train_steps=40, console=console)
    with view.showing():
        view.dispatched(1)
        clock(10)
        view.trained(10, FIRST)
        console.print("something else")
        view.dispatched(20)
        clock(10)
        view.trained(20, {**LATER, "loss": 0.25})
        view.evaluated(20, {"loss": 0.75})
        view.trained(20, LATER)
        clock(5)
    shown = [re.split(r"\s{2,}", line.strip()) for line in screen(file.getvalue()).splitlines()]
    shown = [line for line in shown if line != [""]]
    assert shown[:5] == [
        ["something else"],
        ["update 10", "update 20", "evaluation, 20"],
        ["loss", "2.5000", "0.1250", "0.7500"],
        ["p(removed)", "9.00e-01", "1.00e-03"],
        ["KL to the original elsewhere", "2.00e-02"],
    ]
    assert shown[-1][0] == "update 20 of 40"
    assert shown[-1][-1] == "0:25 so far, 0:15 left"


def test_where_there_is_no_terminal_there_are_lines():
    assert type(progress_view.for_stdout(0, 1)) is progress_view.Lines


def test_a_terminal_has_the_table(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert type(progress_view.for_stdout(0, 1)) is progress_view.Table
