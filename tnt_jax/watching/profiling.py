"""`jax.profiler` traces of a few updates of a run."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from tnt_jax.runtime import console, processes
from tnt_jax.runtime.errors import UsageError


class Traces:
    """Traces a run from one update to another, both included; use it as a context manager.

    Every host writes a trace of its own devices.

    Args:
      updates: The first and the last one; None traces nothing.
      folder: The trace comes into `plugins/profile` in it: the TensorBoard folder of the run, for
        TensorBoard's profiler to show it. Local, or anything that `etils.epath` opens.

    Raises:
      UsageError: `updates` are no two updates.
    """

    def __init__(self, updates: Sequence[int] | None, folder: str):
        if updates is not None and (len(updates) != 2 or not 1 <= updates[0] <= updates[1]):
            raise UsageError(
                "PROFILE_UPDATES: expected [FIRST, LAST] with 1 <= FIRST <= LAST, or None, found "
                f"{list(updates)}."
            )
        self._updates, self._folder = updates, folder
        self._open = contextlib.ExitStack()
        self._is_tracing = False

    def __enter__(self) -> "Traces":
        return self

    def __exit__(self, *_) -> None:
        self._open.close()

    @contextlib.contextmanager
    def update(self, step: int, state: Any) -> Iterator[None]:
        """Around an update: a trace begins with the first one, when nothing else is under way.

        Args:
          step: Of the update.
          state: What it begins with; waited for.
        """
        if self._updates is None or not self._updates[0] <= step <= self._updates[1]:
            yield
            return
        if not self._is_tracing:
            jax.block_until_ready(state)
            self._is_tracing = True
            self._open.enter_context(self._trace())
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, state: Any) -> None:
        """Ends the trace with its last update, once that is done.

        Args:
          step: Of the update.
          state: What it made.
        """
        if self._is_tracing and self._updates is not None and step == self._updates[1]:
            jax.block_until_ready(state)
            self._open.close()

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            local = self._folder
            # The profiler writes to disks alone, and names its file after the host.
            if "://" in self._folder or processes.count() > 1:
                local = stack.enter_context(tempfile.TemporaryDirectory())
            jax.profiler.start_trace(local)
            try:
                yield
            finally:
                jax.profiler.stop_trace()
                if local != self._folder:
                    _copy(pathlib.Path(local), epath.Path(self._folder))
        console.log(
            f"The trace of updates {self._updates} is in {self._folder}/plugins/profile: "
            f"pip install tensorboard xprof, then tensorboard --logdir={self._folder}; or open "
            "the *.trace.json.gz at https://ui.perfetto.dev."
        )


def _copy(folder: pathlib.Path, to: epath.Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            name = file.name if processes.count() == 1 else f"{processes.index()}.{file.name}"
            copied = to / os.fspath(file.relative_to(folder).with_name(name))
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())
