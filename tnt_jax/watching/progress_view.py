"""What a training run shows while it goes: plain lines, or on a terminal a table that moves."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

from tnt_jax.runtime import console

# The metrics that people watch: in words, short ones for the table, and how the number is written.
_SHOWN = {
    "loss": ("loss", "loss", "{:.4f}"),
    "negative_mass": ("p(removed)", "p(removed)", "{:.2e}"),
    "positive_kl": (
        "KL to the original at ordinary positions",
        "KL to the original elsewhere",
        "{:.2e}",
    ),
    "gradient_norm": ("gradient norm", "gradient norm", "{:.3g}"),
    "num_skipped": ("{} left out", "left out", "{:.0f}"),
    "tokens_per_second": ("{} target tokens/s", "target tokens/s", "{:.0f}"),
    "input_wait_fraction": ("{} of the time waiting for input", "waiting for input", "{:.0%}"),
}


def line(metrics: Mapping[str, float | int]) -> str:
    """Metrics in a line, those that are there."""
    parts = []
    for name, (words, _, form) in _SHOWN.items():
        if name in metrics:
            number = form.format(metrics[name])
            parts.append(words.format(number) if "{}" in words else f"{words} {number}")
    return ", ".join(parts)


class TimeLeft:
    """How long the rest of a run takes, at the pace so far.

    Evaluations and checkpoints count, for they come again; what was compiled before the first
    update does not.

    Args:
        start: the update that the run goes on from.
        train_steps: the last one.
    """

    def __init__(self, start: int, train_steps: int):
        self._start, self._train_steps = start, train_steps
        self._since: float | None = None

    def begin(self) -> None:
        """When the devices have begun with an update; the first time counts."""
        if self._since is None:
            self._since = time.monotonic()

    def after(self, step: int) -> float:
        """Seconds, asked for when update `step` is done."""
        assert self._since is not None
        pace = (time.monotonic() - self._since) / (step - self._start)
        return pace * (self._train_steps - step)


class Lines:
    """A line for each entry of metrics; what a run shows where there is no terminal.

    Args:
        start: the update that the run goes on from.
        train_steps: the last one.
    """

    def __init__(self, start: int, train_steps: int):
        self._start, self._train_steps = start, train_steps
        self._began = time.monotonic()
        self._left = TimeLeft(start, train_steps)
        # The update and its metrics.
        self._first: tuple[int, Mapping[str, float | int]] | None = None
        self._newest: tuple[int, Mapping[str, float | int]] | None = None

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Around the run."""
        yield

    def dispatched(self, step: int) -> None:
        """The devices have begun with an update."""
        del step
        self._left.begin()

    def trained(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Metrics of the updates up to `step`."""
        self._newest = (step, metrics)
        self._first = self._first or self._newest
        self._show_trained(step, metrics, self._left.after(step))

    def evaluated(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Metrics of an evaluation."""
        console.log(f"update {step}, evaluation: {line(metrics)}")

    def outcome(self) -> str:
        """What came of the updates, in a sentence."""
        if self._first is None or self._newest is None:
            return ""
        done = self._newest[0] - self._start
        said = [f"{done} updates in {console.duration(time.monotonic() - self._began)}"]
        for name in ("loss", "negative_mass", "positive_kl"):
            words, _, form = _SHOWN[name]
            before, after = (of.get(name) for of in (self._first[1], self._newest[1]))
            if before is not None and after is not None:
                said.append(f"{words} from {form.format(before)} to {form.format(after)}")
        return f"{', '.join(said)}. "

    def _show_trained(self, step: int, metrics: Mapping[str, float | int], left: float) -> None:
        rest = f"; {console.duration(left)} left" if step < self._train_steps else ""
        console.log(f"update {step} of {self._train_steps}: {line(metrics)}{rest}")


class Table(Lines):
    """A table at the foot of a terminal: the newest metrics beside the first ones, and a bar.

    Whatever else is printed meanwhile goes above it.

    Args:
        start: the update that the run goes on from.
        train_steps: the last one.
        console: None is stdout.
    """

    def __init__(self, start: int, train_steps: int, console: rich.console.Console | None = None):
        super().__init__(start, train_steps)
        self._step = start
        self._ends: float | None = None
        self._evaluated: tuple[int, Mapping[str, float | int]] | None = None
        self._live = rich.live.Live(
            console=console or rich.console.Console(),
            get_renderable=self._render,
            refresh_per_second=4,
        )

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Shows the table meanwhile; its last state stays."""
        with self._live:
            yield

    def dispatched(self, step: int) -> None:
        """Moves the bar."""
        super().dispatched(step)
        self._step = step

    def evaluated(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Fills the column of the evaluation."""
        self._evaluated = (step, metrics)
        self._live.refresh()

    def _show_trained(self, step: int, metrics: Mapping[str, float | int], left: float) -> None:
        del step, metrics  # in self._newest
        self._ends = time.monotonic() + left
        self._live.refresh()

    def _render(self) -> rich.table.Table:
        first = None if self._first is self._newest else self._first
        columns = [
            (heading.format(column[0]), column[1])
            for heading, column in (
                ("update {}", first),
                ("update {}", self._newest),
                ("evaluation, {}", self._evaluated),
            )
            if column is not None
        ]
        metrics = rich.table.Table(box=None, padding=(0, 2, 0, 0))
        metrics.add_column()
        for heading, _ in columns:
            metrics.add_column(heading, justify="right")
        for name, (_, words, form) in _SHOWN.items():
            cells = [form.format(of[name]) if name in of else "" for _, of in columns]
            if any(cells):
                metrics.add_row(words, *cells)

        now = time.monotonic()
        seconds = f"{console.duration(now - self._began)} so far"
        if self._ends is not None:
            seconds += f", {console.duration(max(self._ends - now, 0.0))} left"
        bar = rich.table.Table.grid(padding=(0, 2, 0, 0))
        bar.add_row(
            f"update {self._step} of {self._train_steps}",
            rich.progress_bar.ProgressBar(total=self._train_steps, completed=self._step, width=30),
            seconds,
        )
        both = rich.table.Table.grid()
        both.add_row(metrics)
        both.add_row(bar)
        return both


def for_stdout(start: int, train_steps: int) -> Lines:
    """The table if stdout is a terminal, otherwise lines."""
    is_table = console.is_first_process() and sys.stdout.isatty()
    return (Table if is_table else Lines)(start, train_steps)
