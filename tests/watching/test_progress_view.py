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
    view = progress_view.View(start=10, train_steps=30)
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
    assert progress_view.View(start=0, train_steps=5).outcome() == ""


def test_a_terminal_shows_the_newest_numbers_and_the_time_left(clock, capsys):
    file = io.StringIO()
    terminal = rich.console.Console(file=file, force_terminal=True, width=110, color_system=None)
    view = progress_view.View(start=0, train_steps=40, terminal=terminal)
    with view.showing():
        view.dispatched(1)
        clock(10)
        view.trained(10, FIRST)
        terminal.print("something else")
        view.dispatched(20)
        clock(10)
        view.trained(20, LATER)
        clock(5)
    *_, bar = re.split(r"[\r\n]+", re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", file.getvalue()).strip())
    assert re.sub(r"\W*[━╸╺]+\W*", " ", bar).strip() == (
        "update 20 of 40 loss 0.1250, p(removed) 1.00e-03, 0:20 left"
    )
    assert "something else" in file.getvalue()
    assert "1234 target tokens/s, loss 2.5000, p(removed) 9.00e-01" in file.getvalue()
    assert capsys.readouterr().out == ""  # no lines beside it


@pytest.mark.parametrize("is_terminal", [False, True])
def test_there_are_lines_unless_stdout_is_a_terminal(monkeypatch, capsys, is_terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    view = progress_view.View(0, 1)
    with view.showing():
        view.dispatched(1)
        view.trained(1, FIRST)
    assert ("update 1 of 1: loss 2.5000" in capsys.readouterr().out) != is_terminal
