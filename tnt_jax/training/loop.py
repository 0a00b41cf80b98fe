"""The loop of a training run: batches in, updates, what is written down on the way."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.data import feature_converters
from tnt_jax.models import sharding
from tnt_jax.runtime import holding, preemption, prefetch
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import health, load_original, run_checkpoints, train_step
from tnt_jax.training.originals import CachedStates
from tnt_jax.training.trainer import Trainer, jit_eval_step
from tnt_jax.watching import metric_writers, watching


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from, on the host.

    Attributes:
      examples: To train on.
      eval_examples: To evaluate on; may be empty.
      batches: Of `examples`, by number.
      num_negative_ids: Of a position, at most: one for both, for each is a program of its own.
    """

    examples: Sequence[feature_converters.Example]
    eval_examples: Sequence[feature_converters.Example]
    batches: feature_converters.Batches
    num_negative_ids: int

    @classmethod
    def of(
        cls,
        examples: Sequence[feature_converters.Example],
        eval_examples: Sequence[feature_converters.Example],
        *,
        batch_size: int,
        task_feature_lengths: Mapping[str, int],
        seed: int,
        pack: bool,
        feature_layout: feature_converters.FeatureLayout,
    ) -> "Data":
        """The arguments are those of `feature_converters.Batches`."""
        num_negative_ids = feature_converters.max_negative_ids([*examples, *eval_examples])
        batches = feature_converters.Batches(
            examples,
            batch_size,
            task_feature_lengths,
            seed=seed,
            num_negative_ids=num_negative_ids,
            pack=pack,
            feature_layout=feature_layout,
        )
        return cls(
            examples=examples,
            eval_examples=eval_examples,
            batches=batches,
            num_negative_ids=num_negative_ids,
        )

    def describe(self) -> dict[str, Any]:
        """For the checkpoint: which data it was."""
        return {
            "num_examples": len(self.examples),
            "digest": feature_converters.digest(self.examples),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Every:
    """Of how many updates each is done once.

    Attributes:
      checkpoint: A checkpoint; the end is always saved.
      log: A line and an entry of metrics.
      evaluation: An evaluation.
    """

    checkpoint: int
    log: int
    evaluation: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that a run holds fixed while it goes round.

    Attributes:
      trainer: Its step.
      original: What the step needs of the original.
      data: What it learns from.
      every: How often what is done.
      saved: Where checkpoints go.
      run: What each of them says of the run.
      metrics: Where metrics go.
      events: Where `health` writes.
      spike_deviations: As in `health.Health`.
      before: What the checkpoint that the run goes on from says; nothing of a new run.
      watched: What the run is watched with.
      starts_from_original: Whether a new run does.
      model_dir: Of the run, for messages.
      seed: Of dropout.
    """

    trainer: Trainer
    original: load_original.Brought
    data: Data
    every: Every
    saved: run_checkpoints.Checkpoints
    run: Mapping[str, Any]
    metrics: metric_writers.Writers
    events: metric_writers.StepLines
    spike_deviations: float | None
    before: Mapping[str, Any]
    watched: watching.Prepared
    starts_from_original: bool
    model_dir: str
    seed: int

    def go(
        self,
        state: train_step.TrainState,
        start: int,
        train_steps: int,
        is_due: Callable[[int], bool],
    ) -> str:
        """From the state after update `start`, which it takes over (donates), to the last.

        Args:
          state: After update `start`.
          start: Number of updates so far.
          train_steps: Of them in all.
          is_due: Whether to save after an update, of that number, and stop. Asked of every one.

        Returns:
          What came out, in words; nothing if there is nothing to do.

        Raises:
          UsageError: The loss, the gradient or a parameter is not finite; or another process has
            taken over what this one holds.
          Preempted: It was due.
        """
        if start >= train_steps:
            return ""
        key = jax.random.key(self.seed)
        evaluate = _Evaluation(self)
        health = self._health()
        since = _SinceLog(self.before.get("since_log"))
        steps = range(start + 1, train_steps + 1)
        with (
            self._watched(state, start, train_steps) as watched,
            contextlib.closing(prefetch.ahead(self._batch, steps)) as upcoming,
        ):
            if is_due(start):
                raise preemption.Preempted(f"{self._newest()}, and no update was begun")
            for step in steps:
                with since.waiting():
                    batch = next(upcoming)
                with watched.update(step, state):
                    state, sums = self.trainer.step(state, self.original.params, batch, key)
                watched.dispatched(step, state)
                since.add(sums)
                holding.check()  # what is written from here on would be written into another's
                is_last = step == train_steps
                is_stopping = is_due(step) and not is_last
                is_save = is_last or step % self.every.checkpoint == 0
                # All that is written of a step is written before its checkpoint: what a run that
                # goes on from there finds is complete.
                metrics = {}
                if is_save or step % self.every.log == 0:
                    found = self._summary(step, since.fetch(), health)
                    watched.view.trained(step, found)
                    metrics |= found
                with since.paused():
                    if self.data.eval_examples and (is_last or step % self.every.evaluation == 0):
                        found = evaluate(state)
                        watched.view.evaluated(step, found)
                        metrics |= {f"eval/{name}": value for name, value in found.items()}
                    metrics |= watched.look(step, self._whole(state.params), is_last)
                if metrics:
                    self.metrics.write(step, metrics)
                if is_stopping and not (self.trainer.skip_non_finite or since.is_finite()):
                    self._summary(step, since.fetch(), health)  # says what is not, and ends the run
                if is_save or is_stopping:
                    self.metrics.flush()
                    self._save(state, step, metrics, health, since)
                if is_stopping:
                    raise preemption.Preempted(f"update {step} is saved")
            return watched.view.outcome()

    def _watched(
        self, state: train_step.TrainState, start: int, train_steps: int
    ) -> contextlib.AbstractContextManager[watching.Watched]:
        whole = self._whole(state.params)
        original = None
        if not isinstance(self.trainer.original, CachedStates):
            original = self.original.params
        if original is None and start == 0 and self.starts_from_original:
            original = whole
        return self.watched.around(
            out=self.metrics, params=whole, original=original, start=start, train_steps=train_steps
        )

    def _whole(self, params: PyTree) -> PyTree:
        """All that the model is run with."""
        return self.trainer.original.current_params(params, self.original.params)

    def _batch(self, step: int) -> dict[str, jax.Array]:
        """Of an update, on the mesh."""
        batches = self.data.batches
        placed = [
            (self.data.examples[p.example], p.row, p.target_offset)
            for p in batches.layout(step - 1)
        ]
        batch = self.original.with_states(batches.batch(step - 1), placed)
        return sharding.put_batch(batch, self.trainer.model.mesh)

    def _summary(self, step: int, found: "_Found", health: health.Health) -> dict[str, float | int]:
        """The metrics of the updates since the last line, those that were left out apart."""
        first_step = step - len(found.sums) + 1
        sums = [
            of_step
            for number, of_step in enumerate(found.sums, start=first_step)
            if health.is_sound(number, of_step)
        ]
        summary = train_step.summarize(_add(sums)) if sums else {}
        if self.trainer.skip_non_finite:
            summary["num_skipped"] = len(found.sums) - len(sums)
        summary["tokens_per_second"] = summary.get("num_tokens", 0.0) / found.seconds
        summary["input_wait_fraction"] = found.seconds_waited / found.seconds
        return summary

    def _save(
        self,
        state: train_step.TrainState,
        step: int,
        metrics: Mapping[str, float | int],
        health: health.Health,
        since: "_SinceLog",
    ) -> None:
        # The numbers of an update say nothing of the parameters that it made.
        names = [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)]
        are_finite = jax.device_get(_are_finite(state.params)).tolist()
        bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
        if bad:
            raise UsageError(
                f"update {step}: expected finite parameters, found others in {', '.join(bad[:6])} "
                f"({len(bad)} of {len(names)} parameters). Before it, there is {self._newest()}. "
                "Lower LEARNING_RATE, or set MAX_GRADIENT_NORM."
            )
        run = {
            **self.run,
            "position": {"next_batch": step},
            "health": health.state(),
            "since_log": since.state(),
        }
        self.saved.save(state, run, metrics)

    def _newest(self) -> str:
        step = self.saved.latest_step()
        kept = "no checkpoint yet" if step is None else f"checkpoint {step}"
        return f"{kept} in {self.model_dir}"

    def _health(self) -> health.Health:
        def examples_of(step: int) -> list[str]:
            examples = self.data.examples
            numbers = [place.example for place in self.data.batches.layout(step - 1)]
            return [examples[number].id or f"number {number}" for number in numbers]

        return health.Health(
            names=train_step.gradient_names(self.trainer.abstract_params),
            is_skipping=self.trainer.skip_non_finite,
            spike_deviations=self.spike_deviations,
            examples_of=examples_of,
            events=self.events,
            where=self._newest,
            state=self.before.get("health"),
        )


@jax.jit
def _are_finite(params: PyTree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)])


class _Evaluation:
    """The evaluation of a run, compiled once."""

    def __init__(self, loop: Loop):
        self._loop = loop
        trainer = loop.trainer
        self._step = jit_eval_step(
            trainer.model, trainer.objective, trainer.original, trainer.block_size
        )

    def __call__(self, state: train_step.TrainState) -> dict[str, float]:
        """The metrics of all of the evaluation's examples."""
        loop, data = self._loop, self._loop.data
        batch_size = data.batches.batch_size
        batches = feature_converters.batch_for_eval(
            data.eval_examples,
            batch_size,
            data.batches.task_feature_lengths,
            data.num_negative_ids,
            data.batches.feature_layout,
        )
        sums = []
        for number, batch in enumerate(batches):
            first = number * batch_size
            rows = data.eval_examples[first : first + batch_size]
            placed = [(example, row, 0) for row, example in enumerate(rows)]
            batch = sharding.put_batch(
                loop.original.with_states(batch, placed), loop.trainer.model.mesh
            )
            sums.append(jax.device_get(self._step(state.params, loop.original.params, batch)))
        return train_step.summarize(_add(sums))


@dataclasses.dataclass(frozen=True)
class _Found:
    """Of the updates since the last line: their sums, the time they took, that spent waiting."""

    sums: Sequence[Mapping[str, Any]]
    seconds: float
    seconds_waited: float


class _SinceLog:
    """What has happened since the last line of the log."""

    def __init__(self, before: Mapping[str, Any] | None = None):
        """Begins anew, or, given the `state` of a run that was stopped, where that one was."""
        before = before or {"sums": (), "seconds": 0.0, "seconds_waited": 0.0}
        self._pending: list[Any] = [  # the newest ones are still on the devices
            {name: np.float32(value) for name, value in sums.items()} for sums in before["sums"]
        ]
        self._began = time.monotonic() - before["seconds"]
        self._waited = before["seconds_waited"]

    def state(self) -> dict[str, Any] | None:
        """For a checkpoint: float32 is written as float64, which holds it exactly."""
        if not self._pending:
            return None
        sums = jax.device_get(self._pending)
        return {
            "sums": [{name: np.asarray(x).tolist() for name, x in of.items()} for of in sums],
            "seconds": time.monotonic() - self._began,
            "seconds_waited": self._waited,
        }

    @contextlib.contextmanager
    def waiting(self):
        """Around what waits for input."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    @contextlib.contextmanager
    def paused(self):
        """Around what is no training."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, sums: Any) -> None:
        """Of one more update."""
        self._pending.append(sums)
        if len(self._pending) > 1:
            # The devices have the newest update to go on with. With more of them waiting, batches
            # fill the memory, and simulated CPU devices block each other for ever.
            jax.block_until_ready(self._pending[-2])

    def is_finite(self) -> bool:
        """Whether the losses and gradients so far are; waits for the devices."""
        return all(
            bool(np.isfinite(value))
            for sums in self._pending
            for name, value in jax.device_get(sums).items()
            if name in ("loss", "gradient_norm")
        )

    def fetch(self) -> _Found:
        """Waits for the devices, and begins anew."""
        sums = jax.device_get(self._pending)
        found = _Found(sums, time.monotonic() - self._began, self._waited)
        self.__init__()
        return found


def _add(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    # In float64: a count of tokens over many updates passes what float32 holds exactly.
    return {
        name: float(sum(float(of_step[name]) for of_step in sums))
        for name, first in sums[0].items()
        if not np.ndim(first)
    }
