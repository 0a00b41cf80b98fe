"""Where the numbers and texts of a run go: JSON lines, TensorBoard, Weights & Biases.

A run that was stopped goes on from a checkpoint, and computes again what came after it. TensorBoard
is told from which update on, and drops what it had from there; Weights & Biases keeps what it had.
Neither shows an update twice.

Only the first of several hosts writes. No TensorFlow is needed.
"""

import contextlib
import html
import importlib.util
import json
import math
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from etils import epath
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from tnt_jax.runtime import console, files, holding
from tnt_jax.runtime.errors import UsageError

_messages: Any = event_pb2  # made by protobuf when it is imported: type checkers see nothing

# An object store has no appending: a flush uploads the whole file.
_UPLOAD_EVERY = 60.0  # seconds


class _FlushedInTime:
    """A file that has whatever is written at once, or in an object store once in a while."""

    _file: Any = None
    _pause = 0.0  # seconds from one flush to the next
    _flushed = -math.inf

    def flush(self) -> None:
        """Whatever was written is in the file."""
        if self._file is not None:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush_in_time(self) -> None:
        if time.monotonic() - self._flushed >= self._pause:
            self.flush()


class StepLines(_FlushedInTime):
    """Appends JSON objects to a file, one a line: `{"step": 10, "loss": 0.5}`.

    A last line that a kill cut short is dropped. A run that goes on from a checkpoint drops what
    was written after it as well, for it will write that again: so each step is there once.

    In an object store the whole file is uploaded for every line, or once in a while, at `flush` and
    at the end.

    Args:
        path: the file; its folder is made if need be. Local, or anything that `etils.epath` opens,
            such as gs://.
        last_step: the last step whose lines are kept; None keeps all.
        pause: seconds from one upload to the next; a local file has every line at once.
    """

    def __init__(self, path: str | os.PathLike, last_step: int | None = None, pause: float = 0.0):
        if not console.is_first_process():
            return
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = ""
        if path.exists():
            written = path.read_bytes().decode("utf-8", "replace")  # whatever a crash left
            whole = written[: written.rfind("\n") + 1]
            if last_step is not None:
                lines = whole.split("\n")[:-1]  # a text in it may hold other separators
                whole = "".join(f"{line}\n" for line in lines if _step_of(line) <= last_step)
            if whole != written:
                files.write_text(path, whole)
        if files.is_remote(path):
            self._file, self._pause = _Upload(path, whole.encode()), pause
        else:
            self._file = path.open("ab")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line, as `as_json` writes it."""
        if self._file is None:
            return
        line = files.as_json({"step": int(step), **values}) + "\n"
        self._file.write(line.encode())
        self._flush_in_time()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # not a line of ours, or damaged


class MetricsWriter(StepLines):
    """Appends metrics to `metrics.jsonl`.

    Args:
        directory: where the file goes.
        last_step: the last step whose lines are kept; None keeps all.
    """

    def __init__(self, directory: str | os.PathLike, last_step: int | None = None):
        super().__init__(epath.Path(directory) / "metrics.jsonl", last_step, _UPLOAD_EVERY)

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends the metrics of a step, as `StepLines.write` does."""
        super().write(step, {name: float(value) for name, value in values.items()})


@runtime_checkable
class Writer(Protocol):
    """What a run writes to."""

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """The numbers of an update."""
        ...

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Texts of an update."""
        ...

    def flush(self) -> None:
        """What was written is kept, whatever happens to the process."""
        ...

    def close(self) -> None:
        """Writes what is left; may be called twice."""
        ...


class Writers:
    """`metrics.jsonl`, which has the numbers alone, and others; a context manager.

    Args:
        metrics: open.
        others: each is closed, as `metrics` is.
    """

    def __init__(self, metrics: MetricsWriter, others: Sequence[Writer] = ()):
        self._metrics, self._others = metrics, others

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Writes the numbers of an update everywhere."""
        self._metrics.write(step, metrics)
        for other in self._others:
            other.write(step, metrics)

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Writes texts to what shows texts."""
        for other in self._others:
            other.write_table(step, name, columns, rows)

    def flush(self) -> None:
        """Flushes all writers: a run that goes on from a checkpoint writes none of this again."""
        self._metrics.flush()
        for other in self._others:
            other.flush()

    def __enter__(self) -> "Writers":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:  # an error of one keeps none of the others open
            for writer in (self._metrics, *self._others):
                stack.callback(writer.close)


def open_all(
    model_dir: str,
    *,
    start: int,
    config: Mapping[str, Any],
    wandb_project: str | None = None,
) -> Writers:
    """Opens what a run writes to; on a later host, what writes nothing.

    Args:
        model_dir: the run's folder: `metrics.jsonl` and `tensorboard/` come into it.
        start: the update that the run goes on from; 0 if it begins.
        config: what the run notes of itself, as JSON: shown by Weights & Biases.
        wandb_project: the project of Weights & Biases that shows the run; None does without it.
    """
    with contextlib.ExitStack() as opened:
        # A run that begins anew leaves nothing of what it wrote before, update 0 among it.
        metrics = opened.enter_context(MetricsWriter(model_dir, last_step=start or -1))
        others: list[Writer] = []
        if console.is_first_process():
            others.append(TensorBoard(tensorboard_folder(model_dir), start=start))
            opened.callback(others[0].close)
            if wandb_project is not None:
                others.append(WeightsAndBiases(wandb_project, model_dir, config, start))
        opened.pop_all()
    return Writers(metrics, others)


def check_wandb(project: str | None) -> None:
    """Raises a UsageError if Weights & Biases is asked for and not there."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            f"WANDB_PROJECT is {project!r}: expected the package wandb, found none. Run pip "
            "install 'tnt_jax[wandb]', or set WANDB_PROJECT to None."
        )


def tensorboard_folder(model_dir: str) -> str:
    """Where TensorBoard looks: `tensorboard --logdir` takes this, or a folder of runs."""
    return os.fspath(epath.Path(model_dir).expanduser() / "tensorboard")


def _grouped(name: str) -> str:
    """The names of an evaluation have a group already: `eval/loss`."""
    return name if "/" in name else f"train/{name}"


class TensorBoard(_FlushedInTime):
    """Writes an event file, which `tensorboard --logdir` shows while the run goes on.

    Every process of a run has a file of its own. It begins by telling TensorBoard to drop what
    earlier ones had after `start`.

    Args:
        folder: local, or anything that `etils.epath` opens, such as gs://.
        start: the last update that stays; 0 drops everything.
    """

    def __init__(self, folder: str, start: int = 0):
        is_remote = files.is_remote(folder)
        # One name for each start of a run, in the order in which TensorBoard reads them.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        path = epath.Path(folder) / name
        if not is_remote:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Not tensorboard's EventFileWriter: it imports TensorFlow, and has a thread of its own.
        self._file = RecordWriter(_Upload(path) if is_remote else path.open("wb"))
        if is_remote:
            self._pause = _UPLOAD_EVERY
        self._write(0, file_version="brain.Event:2")
        begins = _messages.SessionLog(status=_messages.SessionLog.START)
        self._write(start + 1 if start else 0, session_log=begins)
        self.flush()

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Adds a point to each curve, unless it is not finite."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self._write(step, summary=scalar_pb(_grouped(name), float(value)))
        self._flush_in_time()

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Adds a table to the texts."""
        lines = [
            columns,
            ["---"] * len(columns),
            *([_as_markdown(cell) for cell in row] for row in rows),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self._write(step, summary=text_pb(name, table))
        self._flush_in_time()

    def _write(self, step: int, **content: Any) -> None:
        assert self._file is not None, "closed"
        event = _messages.Event(step=step, wall_time=time.time(), **content)
        self._file.write(event.SerializeToString())


def _as_markdown(text: str) -> str:
    """A text that shows as it is in a cell of a table: nothing of it is Markdown or HTML."""
    text = re.sub(r"[^\w\s&;]", lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))
    return re.sub(r"\s*\n\s*", "<br>", text).replace("_", "&#95;")


class _Upload:
    """A file of an object store, uploaded whole at every flush."""

    def __init__(self, path: epath.Path, content: bytes = b""):
        self._path, self._content, self._is_new = path, bytearray(content), True

    def write(self, more: bytes) -> None:
        self._content += more
        self._is_new = True

    def flush(self) -> None:
        # Only what is new: by now the file may be that of a run that took the folder over.
        if self._is_new and not holding.is_lost():
            self._path.write_bytes(bytes(self._content))
            self._is_new = False

    def close(self) -> None:
        self.flush()


class WeightsAndBiases:
    """Sends numbers and texts to Weights & Biases: `pip install 'tnt_jax[wandb]'`.

    The name that the run has there is kept in `MODEL_DIR/wandb_run.json`, so that a run that goes
    on is shown as one. What it computes again is not sent again: Weights & Biases takes updates in
    order. Account, server and offline use are set as for any of its runs, by `wandb login` and its
    environment variables.

    Args:
        project: the project that the run is shown in.
        model_dir: the run's folder.
        config: what the run notes of itself, as JSON.
        start: the update that the run goes on from; one that begins, in whatever folder, is shown
            as another run.

    Raises:
        UsageError: it lets no run begin: nobody is logged in, nothing is at the other end.
    """

    def __init__(self, project: str, model_dir: str, config: Mapping[str, Any], start: int):
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        folder = epath.Path(model_dir).expanduser()
        kept = folder / "wandb_run.json"
        run_id = None
        if start and kept.exists():
            files.check_types(found := files.read_object(kept), {"id": (str,)}, str(kept))
            run_id = found.get("id")
        if run_id is None:
            run_id = secrets.token_hex(4)
            files.write_json(os.fspath(kept), {"id": run_id, "project": project})
        self._table = wandb.Table
        try:
            self._run: Any = wandb.init(
                project=project,
                id=run_id,
                resume="allow",
                name=folder.name,
                config=dict(config),
                dir=None if files.is_remote(model_dir) else os.fspath(folder),
            )
        except wandb.Error as error:
            said, *_ = str(error).splitlines() or [type(error).__name__]
            raise UsageError(
                f"WANDB_PROJECT: expected that wandb can log in and begin a run in {project!r}, "
                f"found: {said.rstrip('.')}. Run `wandb login`, or set WANDB_API_KEY, "
                "WANDB_MODE=offline, or WANDB_PROJECT to None."
            ) from error

    def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Sends the numbers of an update that it does not have."""
        self._log(step, {_grouped(name): float(value) for name, value in metrics.items()})

    def write_table(
        self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Sends a table of an update that it does not have."""
        table = self._table(columns=list(columns), data=[list(row) for row in rows])
        self._log(step, {name: table})

    def flush(self) -> None:
        """Does nothing: another process sends what it was given, also after this one has ended."""

    def close(self) -> None:
        """Waits until all is sent; may be called twice."""
        if self._run is not None:
            # An exception is on its way through Writers.__exit__: the run is shown as failed.
            self._run.finish(exit_code=0 if sys.exception() is None else 1)
            self._run = None

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._run.step:
            self._run.log(values, step=step)
