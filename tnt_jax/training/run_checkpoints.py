"""The checkpoints of a training run, in its model directory.

Orbax writes to a temporary name and renames, so a half-written checkpoint is never taken for the
newest. The original's parameters are never in a checkpoint of the run that trains away from them.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from tnt_jax.checkpoints import lazy_arrays, orbax
from tnt_jax.runtime import files
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings, train_step

# In a run's notes: its checkpoint was saved because the run was told to stop.
_OF_STOP = "of_stop"
_policies = ocp.checkpoint_managers


class _OrbaxManager(ocp.CheckpointManager):
    """Orbax's own, which leaves the question whether to stop to the loop.

    It asks JAX after the number of the checkpoint, also later and in a thread, and JAX lets all
    processes stop after the number that follows the one they asked for last (`loop`).
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints under one model directory; use it as a context manager."""

    def __init__(self, model_dir: str, keep: settings.Keep | None = None):
        """Opens a model directory, and creates it if need be.

        What an earlier process left half-written is deleted.

        Args:
          model_dir: The directory.
          keep: Which checkpoints stay; None is what `Keep()` says.

        Raises:
          UsageError: The directory cannot be made.
        """
        self._dir = files.absolute(model_dir)
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"MODEL_DIR: expected a directory that can be written, found {model_dir}: "
                f"{error.strerror or error}."
            ) from error
        self._of_stops: set[int] = set()
        self._best = None if keep is None else keep.best
        self._orbax = _OrbaxManager(
            self._dir,
            item_names=("params", "optimizer", "run"),
            options=_retention(keep or settings.Keep(), self._of_stops),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused):
        self._orbax.close()  # waits for what is being written

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._orbax.reload()

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None if there is none."""
        return self._orbax.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint where `Keep.best` is smallest, None if there is none.

        There is none either where every checkpoint lacks a finite number of it.
        """
        step = self._orbax.best_step()
        if step is None or self._best is None:
            return None
        self._orbax.wait_until_finished()  # its metrics are read from disk
        best = _finite(self._best, self._orbax.metrics(step) or {})
        return step if best < math.inf else None

    def save(
        self,
        state: train_step.TrainState,
        run: Mapping[str, Any],
        metrics: Mapping[str, float | int] | None = None,
        *,
        is_of_stop: bool = False,
    ) -> None:
        """Writes a checkpoint in the background.

        Args:
          state: The training state to save.
          run: What the run notes of itself, a JSON object.
          metrics: The metrics measured at this step; `Keep.best` among them.
          is_of_stop: Whether it is there because the run was told to stop. It goes when the next
            one is there, so that a run leaves what it would have left without the stop.
        """
        if is_of_stop:
            run = {**run, _OF_STOP: True}
            self._of_stops.add(int(state.step))  # before Orbax asks which ones stay
        is_saved = self._orbax.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                run=ocp.args.JsonSave(dict(run)),
            ),
            # A copy: Orbax keeps what it is given, to find the best, and writes it later.
            metrics=None if metrics is None else dict(metrics),
        )
        assert is_saved, f"there is a checkpoint of step {state.step} or a later one"

    def run_of(self, step: int) -> dict[str, Any]:
        """The `run` that was saved with a checkpoint.

        Raises:
          UsageError: The checkpoint was not written by a training run.
        """
        run = orbax.read_run(self._item(step, "run").parent)
        assert run is not None
        return run

    def check(self, step: int, abstract_state: train_step.TrainState) -> None:
        """Raises a UsageError unless a checkpoint is of a run, of this model and optimizer."""
        self._check_layers(step, abstract_state.params)
        _check_tree(self._item(step, "params"), abstract_state.params, "the model settings")
        _check_tree(self._item(step, "optimizer"), abstract_state.opt_state, "OPTIMIZER")

    def restore(self, step: int, abstract_state: train_step.TrainState) -> train_step.TrainState:
        """The state of a checkpoint, on the mesh of `abstract_state`, not on that it was saved on.

        Args:
          step: The checkpoint's number of updates.
          abstract_state: Shapes, dtypes and shardings to restore to.

        Raises:
          UsageError: The checkpoint is of another model or optimizer (`check`).
        """
        self.check(step, abstract_state)
        if self.run_of(step).get(_OF_STOP):
            self._of_stops.add(step)
        with orbax.reading(self._item(step, "params").parent):
            restored = self._orbax.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract_state.params),
                    optimizer=ocp.args.StandardRestore(abstract_state.opt_state),
                ),
            )
        return train_step.TrainState(
            step=jax.device_put(jnp.asarray(step, jnp.int32), abstract_state.step.sharding),
            params=restored["params"],
            opt_state=restored["optimizer"],
        )

    def _check_layers(self, step: int, abstract_params: PyTree) -> None:
        """A run goes on with its layers as it has them: its optimizer state is laid out so too."""

        def is_scanned(tree: PyTree) -> bool:
            return any("/layers/" in name for name in lazy_arrays.shapes(tree))

        item = self._item(step, "params")
        with orbax.reading(item):
            saved = is_scanned(orbax.tree_of(item))
        if saved != is_scanned(abstract_params):
            raise UsageError(
                f"scan_layers: expected {saved}, as the run in {item.parent.parent} has it, found "
                f"{not saved}. Set SCAN_LAYERS = {saved}; or begin another run from this one: give "
                f"{item.parent} as INITIAL_CHECKPOINT_PATH, with another MODEL_DIR."
            )

    def _item(self, step: int, name: str) -> epath.Path:
        checkpoint = self._dir / orbax.STEP_NAMES.build_name(step)
        if not (checkpoint / name).exists():
            raise UsageError(
                f"MODEL_DIR: expected the checkpoints of a training run, but {checkpoint} has no "
                f"`{name}`. Give it as INITIAL_CHECKPOINT_PATH, with another MODEL_DIR."
            )
        return checkpoint / name


@dataclasses.dataclass
class _ButOfStops(_policies.PreservationPolicy):
    """What another policy keeps of all checkpoints but those of stops, and the newest one.

    Attributes:
      policy: The other policy.
      of_stops: Steps of checkpoints that are there because of a stop. The run goes on from the
        newest; what it leaves is what it would have left without them.
    """

    policy: Any
    of_stops: set[int]

    # Orbax's own types are protocols that cannot be checked while tests run.
    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Tells of each checkpoint, the oldest first, whether it stays."""
        newest = checkpoints[-1].step if checkpoints else None
        # The one of a stop takes no other's place, not even while it is the newest: it may be the
        # best by a metric, and goes when the next one is there.
        others = [of for of in checkpoints if of.step not in self.of_stops]
        stays = self.policy.should_preserve(others, context=context)
        kept = {of.step for of, is_kept in zip(others, stays, strict=True) if is_kept}
        return [of.step in kept or of.step == newest for of in checkpoints]


def _finite(name: str, metrics: Mapping[str, float | int]) -> float:
    """A metric of a checkpoint; infinity where it is not there or not finite."""
    value = metrics.get(name, math.inf)
    # NaN is neither below nor above another: sorted, it may stand before what is best.
    return value if math.isfinite(value) else math.inf


def _retention(keep: settings.Keep, of_stops: set[int]) -> ocp.CheckpointManagerOptions:
    kept: list[_policies.PreservationPolicy] = [_policies.LatestN(keep.checkpoints)]
    if keep.every is not None:
        kept.append(_policies.EveryNSteps(keep.every))

    metric = functools.partial(_finite, keep.best or "")
    if keep.best is not None:
        best = _policies.BestN(
            get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        kept.append(best)
    return ocp.CheckpointManagerOptions(
        preservation_policy=_ButOfStops(_policies.AnyPreservationPolicy(kept), of_stops),
        # Metrics are written only where there is such a function.
        best_fn=None if keep.best is None else metric,
        best_mode="min",
        cleanup_tmp_directories=True,
        step_name_format=orbax.STEP_NAMES,
    )


def _check_tree(path: epath.Path, abstract: PyTree, setting: str) -> None:
    """Compares a saved tree with the expected one and names every difference at once."""
    # The item's own handler: a checkpointer would warn that an item is no whole checkpoint.
    with orbax.reading(path):
        found = lazy_arrays.shapes(orbax.tree_of(path))
    differences = lazy_arrays.differences_of(found, lazy_arrays.shapes(abstract))
    if differences:
        raise UsageError(lazy_arrays.mismatch(str(path.parent), setting, differences))
