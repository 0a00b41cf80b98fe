"""`jax.profiler` traces of a few updates of a run."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from tnt_jax.runtime import console, files, processes
from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import hooks


class Trace(hooks.Hook):
    """Traces a run from one update to another, both included.

    Every host writes a trace of its own devices.

    Args:
      updates: The first and the last one.
      folder: The trace comes into `plugins/profile` in it: the TensorBoard folder of the run, for
        TensorBoard's profiler to show it. Local, or anything that `etils.epath` opens.

    Raises:
      UsageError: `updates` are no two updates.
    """

    periods = (1,)
    is_training = True

    def __init__(self, updates: Sequence[int], folder: str):
        if len(updates) != 2 or not 1 <= updates[0] <= updates[1]:
            raise UsageError(
                "PROFILE_UPDATES: expected [FIRST, LAST] with 1 <= FIRST <= LAST, or None, found "
                f"{list(updates)}."
            )
        self._updates, self._folder = updates, folder
        self._open = contextlib.ExitStack()
        self._has_begun = False

    def begin(self, beginning: hooks.Beginning) -> None:
        """Begins the trace, if the run begins among its updates."""
        self(beginning.step, beginning.state)

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        """Begins the trace before its first update, and ends it after its last; no metrics.

        Args:
          step: Number of the last update.
          state: The training state that it made; waited for where the trace begins or ends.
        """
        first, last = self._updates
        if not self._has_begun and first - 1 <= step < last:
            jax.block_until_ready(state)
            self._has_begun = True
            self._open.enter_context(self._trace())
        elif self._has_begun and step == last:
            jax.block_until_ready(state)
            self.close()
        return {}

    def close(self) -> None:
        """Ends the trace, if it has not ended."""
        self._open.close()
        if not self._has_begun:
            console.log(
                f"No trace was made: PROFILE_UPDATES is {list(self._updates)}, and none of these "
                "updates was among the run's."
            )

    @contextlib.contextmanager
    def _trace(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            local = self._folder
            # The profiler writes to disks alone, and names its file after the host.
            if files.is_remote(self._folder) or processes.count() > 1:
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
