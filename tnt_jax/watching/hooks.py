"""Hooks: what is done while a run goes on, each after every so many updates."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tnt_jax.runtime.array_types import PyTree
from tnt_jax.watching import metric_writers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """A run before the first update that this process computes.

    Attributes:
      step: Number of updates before it.
      state: The training state after them.
      params_of: Gives all parameters that the model is run with, from a training state.
      original_params: All parameters that the original is run with; None where they are not in
        memory.
      original_digest: Digest of the original's parameters; None where the objective compares with
        no original.
      out: Where metrics and tables go.
    """

    step: int
    state: Any
    params_of: Callable[[Any], PyTree]
    original_params: PyTree | None
    original_digest: str | None
    out: metric_writers.Writers


class Hook(abc.ABC):
    """Something that is done after every so many updates of a run, and after its last one.

    Attributes:
      periods: It is due after every so many updates, of each of these numbers.
      is_training: Whether its time counts where tokens per second are measured.
    """

    periods: tuple[int, ...]
    is_training: bool = False

    def is_due(self, step: int, train_steps: int) -> bool:
        """Whether it is called after update `step`, of `train_steps` in all."""
        return step == train_steps or any(step % period == 0 for period in self.periods)

    def begin(self, beginning: Beginning) -> None:  # noqa: B027 - most have nothing to begin
        """Is called once, before the first update."""

    @abc.abstractmethod
    def __call__(self, step: int, state: Any) -> Mapping[str, float | int]:
        """Is called after an update.

        Args:
          step: Number of the update.
          state: The training state that it made.

        Returns:
          Metrics of this update, which the loop writes.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Is called at the end, whatever ended the run."""
