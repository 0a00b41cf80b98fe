"""What a run tells: lines and progress on stdout, metrics and results in files.

On several hosts only the first one prints and writes. Importing this needs neither JAX nor
TensorFlow, so that a program which only handles text starts at once.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, SupportsFloat

import rich.box
import rich.console
import rich.progress
import rich.table
import rich.text
from etils import epath

from tnt_jax.data import records

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


def log(message: str) -> None:
    """Prints one line on stdout at once; what a terminal would obey in it is spelt out."""
    if is_first_process():
        print(message.translate(_OBEYED), flush=True)


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
            log(line)
            last_time, last_count = now, count
    log(f"{description}: {count} in {duration(time.monotonic() - start)}")


def duration(seconds: float) -> str:
    """A time for people: 1:05, 12:03:20."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StepLines:
    """Appends JSON objects to a file, one a line: `{"step": 10, "loss": 0.5}`.

    A last line that a kill cut short is dropped. A run that goes on from a checkpoint drops what
    was written after it as well, for it will write that again: so each step is there once.

    Args:
        path: of the file; its folder is made if need be. Local, or anything that `etils.epath`
            opens, such as gs://.
        last_step: of the lines to keep; None keeps all.
    """

    def __init__(self, path: str | os.PathLike, last_step: int | None = None):
        self._file = None
        if not is_first_process():
            return
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            written = path.read_bytes().decode("utf-8", "replace")  # whatever a crash left
            whole = written[: written.rfind("\n") + 1]
            if last_step is not None:
                lines = whole.split("\n")[:-1]  # a text in it may hold other separators
                whole = "".join(f"{line}\n" for line in lines if _step_of(line) <= last_step)
            if whole != written:
                write_text(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, as `as_json` writes it, flushed."""
        if self._file is None:
            return
        self._file.write(as_json({"step": int(step), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # not a line of ours, or damaged


class MetricsWriter(StepLines):
    """Appends metrics to `metrics.jsonl`.

    Args:
        directory: where the file goes.
        last_step: as in `StepLines`.
    """

    def __init__(self, directory: str | os.PathLike, last_step: int | None = None):
        super().__init__(epath.Path(directory) / "metrics.jsonl", last_step)

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the metrics of a step, as `StepLines.write` does."""
        super().write(step, {name: float(value) for name, value in values.items()})


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file or none: it appears under its name only when it is complete."""
    if not is_first_process():
        return
    with records.replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, as `as_json` makes it, and as `write_text` does."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text. A number that is not finite becomes null: JSON has no NaN, and no infinity."""
    return json.dumps(_with_null(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _with_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_null(part) for part in value]
    return value


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
    shown = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
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
