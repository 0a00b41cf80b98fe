"""What a run prints: lines, progress and tables on stdout.

On several hosts only the first one prints. Importing this needs neither JAX nor
TensorFlow, so that a program which only handles text starts at once.
"""

import contextlib
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text

# Plain progress lines: none sooner than the first after the last one, none later than the second.
# In between, one for every tenth of the work.
_SHORTEST_SILENCE = 15.0  # seconds
_LONGEST_SILENCE = 60.0  # seconds


def is_first_process() -> bool:
    """Whether this process prints and writes: always, unless it is a later host of several."""
    jax = sys.modules.get("jax")
    # `jax.process_index()` starts the backend, after which `jax.distributed.initialize` is refused.
    # So it is asked only once several processes have met.
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


# What a terminal would obey rather than show: outputs of models and names in files may hold it.
_OBEYED = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


_log_file: pathlib.Path | None = None


def log(message: str) -> None:
    """Prints one line on stdout at once; what a terminal would obey in it is spelt out.

    Within `logging_to` the line goes to that file instead.
    """
    if _log_file is None:
        say(message)
    elif is_first_process():
        with _log_file.open("a", encoding="utf-8") as file:
            file.write(message.translate(_OBEYED) + "\n")


def say(message: str) -> None:
    """Prints one line as `log` does, also within `logging_to`."""
    if is_first_process():
        print(message.translate(_OBEYED), flush=True)


@contextlib.contextmanager
def logging_to(path: pathlib.Path) -> Iterator[None]:
    """Context manager: what programs `log` goes to the end of a file; stdout is for `say`.

    What is shown of a work that goes on, bars and their lines, stays on stdout.
    """
    global _log_file
    before, _log_file = _log_file, path
    try:
        yield
    finally:
        _log_file = before


def progress(iterable: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Yields what `iterable` yields and shows how far it is and how much time is left.

    On a terminal this is a bar. Elsewhere it is plain lines, 15 to 60 seconds apart, and a last
    one.

    Args:
        iterable: the work; the time that its consumer spends on an item counts.
        description: what is being done ("generating").
        total: number of items, where `len(iterable)` does not tell.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if not is_first_process():
        yield from iterable
    elif sys.stdout.isatty():
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        ) as bar:
            yield from bar.track(iterable, total=total, description=description)
    else:
        yield from _plain_progress(iterable, description, total)


def _plain_progress(iterable: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
    start = time.monotonic()
    last_time, last_count, count = start, 0, 0
    for item in iterable:
        yield item
        count += 1
        now = time.monotonic()
        waited = now - last_time
        a_tenth_further = total is not None and count - last_count >= total / 10
        if waited >= _LONGEST_SILENCE or (waited >= _SHORTEST_SILENCE and a_tenth_further):
            line = f"{description}: {count}"
            if total:
                left = (now - start) / count * max(total - count, 0)
                line += f"/{total} ({100 * count // total} %), {duration(left)} left"
            say(line)
            last_time, last_count = now, count
    log(f"{description}: {count} in {duration(time.monotonic() - start)}")


def duration(seconds: float) -> str:
    """A time for people: 1:05, 12:03:20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(
    rows: Sequence[Sequence[Any]], *, columns: Sequence[str], title: str | None = None
) -> None:
    """Prints a table on stdout.

    Args:
        rows: cells, one sequence a row. Numbers are aligned to the right (floats with one decimal,
            so give percentages), None is a dash, everything else is printed as it is.
        columns: the headings.
        title: printed above.
    """
    if not is_first_process():
        return
    heading = None if title is None else rich.text.Text(title.translate(_OBEYED))  # no markup
    shown = rich.table.Table(title=heading, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for index, name in enumerate(columns):
        cells = [row[index] for row in rows]
        is_number = any(isinstance(cell, int | float) for cell in cells)
        shown.add_column(rich.text.Text(name), justify="right" if is_number else "left")
    for row in rows:
        shown.add_row(*(rich.text.Text(_cell(value)) for value in row))
    # A file has no width: there, a line is as long as it needs to be.
    console = rich.console.Console(width=None if sys.stdout.isatty() else 10_000)
    console.print(shown)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if isinstance(value, float) else str(value).translate(_OBEYED)
