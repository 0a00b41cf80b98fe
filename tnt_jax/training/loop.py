"""The loop of a training run: batches in, updates, what is written down on the way."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tnt_jax.data.batches import Batches, batch_for_eval
from tnt_jax.data.examples import (
    Example,
    Sets,
    digest,
    have_strengths,
    max_negative_ids,
    sets_of,
)
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import holding, memory, preemption, prefetch
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import health, load_original, run_checkpoints, settings, train_step
from tnt_jax.training.trainer import Trainer, jit_eval_step
from tnt_jax.watching import hooks, metric_writers, progress_view, watching

_questions = itertools.count()  # whether to stop: each is asked by all processes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from, on the host.

    Attributes:
      examples: The examples to train on.
      eval_examples: The examples to evaluate on; may be empty.
      batches: The batches of `examples`, by number.
      num_negative_ids: Most removed ids at a position. Training and evaluation share this number:
        each one is a program of its own.
      has_strengths: Whether any mark, of training or of evaluation, has a strength below 1.
      sets: Long sets of ids that examples of either share, which the device has once.
      num_shared_in_eval: Tokens that all of `eval_examples` begin with.
    """

    examples: Sequence[Example]
    eval_examples: Sequence[Example]
    batches: Batches
    num_negative_ids: int
    has_strengths: bool
    sets: Sets
    num_shared_in_eval: int = 0

    def check_fits(self, update: settings.Update) -> None:
        """Raises a UsageError where this host has no memory for a batch."""
        lengths = update.task_feature_lengths
        bytes_of_an_id = 8 if self.has_strengths else 4
        memory.check_batch(
            update.batch_size,
            sum(lengths.values()),
            self.num_negative_ids,
            lengths["targets"] * self.num_negative_ids * bytes_of_an_id,
        )

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: number and digest of the examples."""
        return {
            "num_examples": len(self.examples),
            "digest": digest(self.examples),
        }


def make_data(
    examples: Sequence[Example],
    eval_examples: Sequence[Example],
    update: settings.Update,
    seed: int,
    model: Model,
) -> Data:
    """Makes batches of examples for a model, in an order that the seed decides."""
    sets = sets_of(examples, eval_examples)
    num_negative_ids = max(
        max_negative_ids(of, with_sets=bool(sets.ids)) for of in (examples, eval_examples)
    )
    has_strengths = any(map(have_strengths, (examples, eval_examples)))
    layout, lengths = model.network.feature_layout, update.task_feature_lengths
    num_shared = 0 if update.pack else layout.num_shared(examples, lengths)
    batches = Batches(
        examples,
        update.batch_size,
        lengths,
        seed=seed,
        num_negative_ids=num_negative_ids,
        pack=update.pack,
        feature_layout=layout,
        has_strengths=has_strengths,
        set_numbers=sets.numbers,
        num_shared=num_shared,
    )
    return Data(
        examples=examples,
        eval_examples=eval_examples,
        batches=batches,
        num_negative_ids=num_negative_ids,
        has_strengths=has_strengths,
        sets=sets,
        num_shared_in_eval=layout.num_shared(eval_examples, lengths),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """Everything that a run holds fixed while it goes round.

    Attributes:
      trainer: Has the step.
      loaded_original: What the step needs of the original.
      sources: Where the parameters of the run come from.
      data: What it learns from.
      schedule: How many updates there are, and how often it logs, evaluates and saves.
      watch: What the run is watched with.
      watch_hooks: What `watch` has made of its settings.
      saved: Where checkpoints go.
      run: What each of them says of the run.
      before: What the checkpoint that the run goes on from says; nothing of a new run.
      model_dir: Folder of the run.
    """

    trainer: Trainer
    loaded_original: load_original.LoadedOriginal
    sources: load_original.Sources
    data: Data
    schedule: settings.Schedule
    watch: watching.Watch
    watch_hooks: Sequence[hooks.Hook]
    saved: run_checkpoints.Checkpoints
    run: Mapping[str, Any]
    before: Mapping[str, Any]
    model_dir: str

    def go(self, state: train_step.TrainState, start: int) -> str:
        """From the state after update `start`, which it takes over (donates), to the last.

        Args:
          state: The state after update `start`.
          start: Number of updates so far.

        Returns:
          What came out, in words; nothing if there is nothing to do.

        Raises:
          UsageError: The loss, the gradient or a parameter is not finite; or another process has
            taken over what this one holds.
          Preempted: The process was told to stop, and the newest update is saved.
        """
        last = self.schedule.train_steps
        with (
            metric_writers.open_all(
                self.model_dir,
                start=start,
                config=self.run,
                wandb_project=self.watch.wandb_project,
            ) as metrics,
            metric_writers.StepLines(f"{self.model_dir}/events.jsonl", last_step=start) as events,
            preemption.deferred(_stop_of_all()) as is_due,
        ):
            if start >= last:
                return ""
            view = progress_view.View(start, last)
            progress = _Progress(self, metrics, events, view)
            with self._begun(progress, state, start), view.showing():
                return self._update_all(progress, state, start, is_due)

    def _update_all(
        self,
        progress: "_Progress",
        state: train_step.TrainState,
        start: int,
        is_due: Callable[[int], bool],
    ) -> str:
        """All updates after `start`; `is_due` says after each whether to save and stop."""
        since, view, last = progress.since, progress.view, self.schedule.train_steps
        key = jax.random.key(self.schedule.seed)
        steps = range(start + 1, last + 1)
        with contextlib.closing(prefetch.iterate(self._batch, steps)) as upcoming:
            if is_due(start):
                raise preemption.Preempted(f"{self.newest()}, and no update was begun")
            for step in steps:
                # The next batch, and the update, which the devices compute in their own time.
                with since.waiting():
                    batch = next(upcoming)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, sums = self.trainer.step(state, self.loaded_original.params, batch, key)
                view.dispatched(step)
                since.add(sums)
                holding.check()  # what is written from here on would be written into another's
                is_stopping = is_due(step) and step != last
                # What is due after it, the checkpoint after everything else.
                progress.metrics.clear()
                for hook in progress.hooks:
                    if hook.is_due(step, last):
                        with contextlib.nullcontext() if hook.is_training else since.paused():
                            progress.metrics |= hook(step, state)
                if is_stopping:
                    progress.stop(step, state)
                    raise preemption.Preempted(f"update {step} is saved")
            return view.outcome()

    @contextlib.contextmanager
    def _begun(
        self, progress: "_Progress", state: train_step.TrainState, start: int
    ) -> Iterator[None]:
        """Context manager around the updates: begins every hook, and closes it at the end."""
        original_params = self.loaded_original.whole
        if original_params is None and start == 0 and self.sources.start_is_original:
            original_params = self._whole(state)
        beginning = hooks.Beginning(
            step=start,
            state=state,
            params_of=self._whole,
            original_params=original_params,
            original_digest=(self.loaded_original.identity or {}).get("digest"),
            out=progress.writers,
        )
        with contextlib.ExitStack() as stack:
            with progress.since.paused():
                for hook in progress.hooks:
                    stack.callback(hook.close)
                    hook.begin(beginning)
            yield

    def _whole(self, state: train_step.TrainState) -> PyTree:
        """All parameters that the model is run with."""
        loaded = self.loaded_original
        beside = loaded.params if loaded.whole is None else loaded.whole
        return self.trainer.original_kind.current_params(state.params, beside)

    def _batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of an update, on the mesh."""
        read = self.data.batches.read(step - 1)
        placed = list(zip(read.examples, read.places, strict=True))
        batch = self.loaded_original.with_states(self.data.batches.features(read), placed)
        return sharding.put_batch(batch, self.trainer.model.mesh)

    def newest(self) -> str:
        """The newest checkpoint, in words."""
        step = self.saved.latest_step()
        kept = "no checkpoint yet" if step is None else f"checkpoint {step}"
        return f"{kept} in {self.model_dir}"

    @property
    def measured_before(self) -> Mapping[str, Any]:
        """What the checkpoint has of losses; nothing if they are those of another objective."""
        step = self.before.get("position", {}).get("next_batch")
        changed = [
            change["name"]
            for change in self.run.get("changes", ())
            if change["after_update"] == step
        ]
        return {} if "objective" in changed else self.before

    def make_health(self, events: metric_writers.StepLines) -> health.Health:
        """Makes the watch over whether the numbers of updates are sound."""

        def examples_of(step: int) -> list[str]:
            read = self.data.batches.read(step - 1)
            return [
                example.id or f"number {place.example}"
                for example, place in zip(read.examples, read.places, strict=True)
            ]

        return health.Health(
            names=train_step.gradient_names(self.trainer.abstract_params),
            is_skipping=self.trainer.skip_non_finite,
            spike_deviations=self.watch.spike_deviations,
            examples_of=examples_of,
            events=events,
            where=self.newest,
            state=self.measured_before.get("health"),
        )


def _stop_of_all() -> Callable[[int], bool] | None:
    """What `preemption.deferred` asks; one host may be told to stop, and all have to save."""
    # Where `jax.distributed` runs, JAX answers SIGTERM, also in one process: Python hears nothing.
    if not jax.distributed.is_initialized():
        return None
    # JAX lets all stop at the largest number that a process has asked for, and one more; 0 is what
    # it begins with. A run that goes on from update 1000 and asked for 1000, 1001, ... would never
    # come to the 1 of a signal that it got while it read its models. So questions are counted.
    return lambda step: multihost_utils.reached_preemption_sync_point(next(_questions))


class _Progress:
    """What changes while a run goes round.

    Attributes:
      loop: What does not change.
      writers: Where metrics go.
      view: What is shown on stdout.
      health: Whether the numbers are sound.
      since: What has happened since the last line of the log.
      metrics: What has been measured after the newest update.
      hooks: What is done after an update, in this order.
    """

    def __init__(
        self,
        loop: Loop,
        writers: metric_writers.Writers,
        events: metric_writers.StepLines,
        view: progress_view.View,
    ):
        self.loop, self.writers, self.view = loop, writers, view
        self.health = loop.make_health(events)
        self.since = _SinceLog(
            loop.measured_before.get("since_log"), keeps_all=loop.trainer.skip_non_finite
        )
        self.metrics: dict[str, float | int] = {}
        self._checkpoint = _Checkpoint(self)
        self.hooks: list[hooks.Hook] = [_Log(self)]
        if loop.data.eval_examples:
            self.hooks.append(_Evaluation(self))
        # All that is written of a step is written before its checkpoint: what a run that goes on
        # from there finds is complete.
        self.hooks += [*loop.watch_hooks, _Record(self), self._checkpoint]

    def summarize(self, step: int) -> dict[str, float | int]:
        """The metrics of the updates since the last line, those that were left out apart."""
        found = self.since.fetch()
        first_step = step - len(found.sums) + 1
        sums = [
            of_step
            for number, of_step in enumerate(found.sums, start=first_step)
            if self.health.is_sound(number, of_step)
        ]
        summary = train_step.summarize(train_step.total(sums)) if sums else {}
        if self.loop.trainer.skip_non_finite:
            summary["num_skipped"] = len(found.sums) - len(sums)
        summary["tokens_per_second"] = summary.get("num_tokens", 0.0) / found.seconds
        summary["input_wait_fraction"] = found.seconds_waited / found.seconds
        return summary

    def stop(self, step: int, state: train_step.TrainState) -> None:
        """Saves the newest update, unless that is done."""
        if not (self.loop.trainer.skip_non_finite or self.since.is_finite()):
            self.summarize(step)  # says what is not, and ends the run
        if not self._checkpoint.is_due(step, self.loop.schedule.train_steps):
            self._checkpoint.save(step, state, is_of_stop=True)


class _Log(hooks.Hook):
    """Writes a line and an entry of metrics, also before each checkpoint."""

    is_training = True

    def __init__(self, progress: _Progress):
        schedule = progress.loop.schedule
        self.periods = (schedule.log_every, schedule.checkpoint_every)
        self._progress = progress

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float | int]:
        """The metrics of the updates since the last line."""
        del state
        found = self._progress.summarize(step)
        self._progress.view.trained(step, found)
        return found


class _Record(hooks.Hook):
    """Writes what has been measured after an update."""

    periods = (1,)
    is_training = True

    def __init__(self, progress: _Progress):
        self._progress = progress

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float | int]:
        """Writes the metrics, if there are any; measures nothing."""
        del state
        if self._progress.metrics:
            self._progress.writers.write(step, self._progress.metrics)
        return {}


class _Checkpoint(hooks.Hook):
    """Saves the state, with all that a run needs that goes on from it."""

    is_training = True

    def __init__(self, progress: _Progress):
        self.periods = (progress.loop.schedule.checkpoint_every,)
        self._progress = progress

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float | int]:
        """Saves the state; measures nothing."""
        self.save(step, state)
        return {}

    def save(self, step: int, state: train_step.TrainState, *, is_of_stop: bool = False) -> None:
        """Saves the state; `is_of_stop` if nobody would have without a stop.

        Raises:
          UsageError: A parameter is not finite.
        """
        progress, loop = self._progress, self._progress.loop
        progress.writers.flush()
        # The numbers of an update say nothing of the parameters that it made.
        names = [sharding.path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)]
        are_finite = jax.device_get(_are_finite(state.params)).tolist()
        bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
        if bad:
            raise UsageError(
                f"update {step}: expected finite parameters, found others in {', '.join(bad[:6])} "
                f"({len(bad)} of {len(names)} parameters). Before it, there is {loop.newest()}. "
                f"Lower LEARNING_RATE, or {health.CLIP}."
            )
        run = {
            **loop.run,
            "position": {"next_batch": step},
            "health": progress.health.state(),
            "since_log": progress.since.state(),
        }
        loop.saved.save(state, run, progress.metrics, is_of_stop=is_of_stop)


@jax.jit
def _are_finite(params: PyTree) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)])


class _Evaluation(hooks.Hook):
    """The evaluation of a run, compiled once."""

    def __init__(self, progress: _Progress):
        self.periods = (progress.loop.schedule.eval_every,)
        self._loop, self._view = progress.loop, progress.view
        trainer = progress.loop.trainer
        self._step = jit_eval_step(
            trainer.model, trainer.objective, trainer.original_kind, trainer.block_size
        )

    def begin(self, beginning: hooks.Beginning) -> None:
        """Evaluates what a new run starts from: later numbers are held against it."""
        if beginning.step == 0:
            beginning.out.write(0, self(0, beginning.state))

    def __call__(self, step: int, state: train_step.TrainState) -> dict[str, float]:
        """The metrics of all of the evaluation's examples, as `eval/METRIC`."""
        loop, data = self._loop, self._loop.data
        batch_size = loop.trainer.rows_at_once(data.batches.batch_size)
        batches = batch_for_eval(
            data.eval_examples,
            batch_size,
            data.batches.task_feature_lengths,
            data.num_negative_ids,
            data.batches.feature_layout,
            data.has_strengths,
            data.sets.numbers,
            data.num_shared_in_eval,
        )
        sums = []
        for number, batch in enumerate(batches):
            if loop.loaded_original.states:  # else the examples need not be read again
                first = number * batch_size
                rows = data.eval_examples[first : first + batch_size]
                batch = loop.loaded_original.with_states_of_rows(batch, rows)
            batch = sharding.put_batch(batch, loop.trainer.model.mesh)
            sums.append(
                jax.device_get(self._step(state.params, loop.loaded_original.params, batch))
            )
        found = train_step.summarize(train_step.total(sums))
        self._view.evaluated(step, found)
        return {f"eval/{name}": value for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class _Elapsed:
    """What has happened since the last line of the log.

    Attributes:
      sums: The sums of each update.
      seconds: How long the updates took.
      seconds_waited: How much of that was spent waiting for input.
    """

    sums: Sequence[Mapping[str, Any]]
    seconds: float
    seconds_waited: float


class _SinceLog:
    """What has happened since the last line of the log."""

    def __init__(self, before: Mapping[str, Any] | None = None, *, keeps_all: bool = True):
        """Begins anew, or, given the `state` of a run that was stopped, where that one was.

        Unless it `keeps_all`, nothing is kept of before where an update was left out: a run that
        leaves out none any more would end at it.
        """
        nothing = {"sums": (), "seconds": 0.0, "seconds_waited": 0.0}
        before = before or nothing
        if not (keeps_all or all(map(_is_finite, before["sums"]))):
            before = nothing
        self._pending: list[Any] = [  # the newest ones are still on the devices
            {name: np.float32(value) for name, value in sums.items()} for sums in before["sums"]
        ]
        self._began = time.monotonic() - before["seconds"]
        self._waited = before["seconds_waited"]

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps: float32 is written as float64, which holds it exactly."""
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
        """Context manager that counts its time as waiting for input."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    @contextlib.contextmanager
    def paused(self):
        """Context manager that does not count its time as training."""
        jax.block_until_ready(self._pending[-1:])  # what is not done yet is training
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def add(self, sums: Any) -> None:
        """Adds the sums of one more update."""
        self._pending.append(sums)
        if len(self._pending) > 1:
            # The devices have the newest update to go on with. With more of them waiting, batches
            # fill the memory, and simulated CPU devices block each other for ever.
            jax.block_until_ready(self._pending[-2])

    def is_finite(self) -> bool:
        """Whether the losses and gradients so far are; waits for the devices."""
        return all(map(_is_finite, jax.device_get(self._pending)))

    def fetch(self) -> _Elapsed:
        """Waits for the devices, and begins anew."""
        sums = jax.device_get(self._pending)
        found = _Elapsed(sums, time.monotonic() - self._began, self._waited)
        self._pending, self._began, self._waited = [], time.monotonic(), 0.0
        return found


def _is_finite(sums: Mapping[str, Any]) -> bool:
    """Whether an update has a loss and a gradient, as far as its sums say."""
    return all(bool(np.isfinite(sums.get(name, 0.0))) for name in ("loss", "gradient_norm"))
