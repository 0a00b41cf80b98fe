"""What a training run shows while it goes: plain lines, or on a terminal one line that moves."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import rich.console
import rich.progress

from tnt_jax.runtime import console

# The metrics that people watch: in words, and how the number is written.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "negative_mass": ("p(removed)", "{:.2e}"),
    "positive_kl": ("KL to the original at ordinary positions", "{:.2e}"),
    "gradient_norm": ("gradient norm", "{:.3g}"),
    "num_skipped": ("{} left out", "{:.0f}"),
    "tokens_per_second": ("{} target tokens/s", "{:.0f}"),
    "input_wait_fraction": ("{} of the time waiting for input", "{:.0%}"),
}
_ON_A_TERMINAL = ("tokens_per_second", "loss", "negative_mass")


def line(metrics: Mapping[str, float | int], names: Sequence[str] = tuple(_SHOWN)) -> str:
    """Writes those of the named metrics that are there in a line."""
    parts = []
    for name in names:
        if name in metrics:
            words, form = _SHOWN[name]
            number = form.format(metrics[name])
            parts.append(words.format(number) if "{}" in words else f"{words} {number}")
    return ", ".join(parts)


class View:
    """A line for each entry of metrics; on a terminal a bar whose line has the newest of them.

    Whatever else is printed meanwhile goes above the bar.

    Args:
        start: the update that the run goes on from.
        train_steps: the last one.
        terminal: shows the bar; None is stdout, if that is a terminal.
    """

    def __init__(self, start: int, train_steps: int, terminal: rich.console.Console | None = None):
        self._start, self._train_steps = start, train_steps
        self._began = time.monotonic()
        self._first_update_began: float | None = None
        # The update and its metrics.
        self._first: tuple[int, Mapping[str, float | int]] | None = None
        self._newest: tuple[int, Mapping[str, float | int]] | None = None
        self._bar: rich.progress.Progress | None = None
        if terminal is None and console.is_first_process() and sys.stdout.isatty():
            terminal = rich.console.Console()
        if terminal is not None:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("update {task.completed} of {task.total}"),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TextColumn("{task.description}", markup=False),
                console=terminal,
            )
            self._task = self._bar.add_task("", total=train_steps, completed=start)

    @contextlib.contextmanager
    def showing(self) -> Iterator[None]:
        """Shows the bar meanwhile, if there is one; its last state stays."""
        self._began = time.monotonic()
        with self._bar or contextlib.nullcontext():
            yield

    def dispatched(self, step: int) -> None:
        """Is told that the devices have begun with an update."""
        if self._first_update_began is None:
            self._first_update_began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def trained(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Shows the metrics of the updates up to `step`."""
        self._newest = (step, metrics)
        self._first = self._first or self._newest
        rest = ""
        if step < self._train_steps:
            rest = f"{console.duration(self._seconds_left(step))} left"
        if self._bar is not None:
            shown = ", ".join(filter(None, [line(metrics, _ON_A_TERMINAL), rest]))
            self._bar.update(self._task, description=shown, refresh=True)
            return
        separator = "; " if rest else ""
        console.log(f"update {step} of {self._train_steps}: {line(metrics)}{separator}{rest}")

    def evaluated(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Prints the metrics of an evaluation."""
        console.log(f"update {step}, evaluation: {line(metrics)}")

    def outcome(self) -> str:
        """What came of the updates, in a sentence."""
        if self._first is None or self._newest is None:
            return ""
        done = self._newest[0] - self._start
        said = [f"{done} updates in {console.duration(time.monotonic() - self._began)}"]
        for name in ("loss", "negative_mass", "positive_kl"):
            words, form = _SHOWN[name]
            before, after = (of.get(name) for of in (self._first[1], self._newest[1]))
            if before is not None and after is not None:
                said.append(f"{words} from {form.format(before)} to {form.format(after)}")
        return f"{', '.join(said)}. "

    def _seconds_left(self, step: int) -> float:
        """How long the rest takes at the pace so far, asked for when update `step` is done.

        Evaluations and checkpoints count, for they come again; what was compiled before the first
        update does not.
        """
        assert self._first_update_began is not None
        pace = (time.monotonic() - self._first_update_began) / (step - self._start)
        return pace * (self._train_steps - step)
