"""How a run is watched: what is shown and written while it goes on, beside its metrics."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tnt_jax.data import feature_converters, tokenization
from tnt_jax.models import decoding
from tnt_jax.models.model import Model
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import metric_writers, profiling, progress_view, samples

# Protocols, so that a run without such an evaluation imports neither seqio nor TensorFlow.


@runtime_checkable
class OpenedEvaluation(Protocol):
    """An evaluation that is ready: `seqio_evaluation.Opened`."""

    @property
    def every(self) -> int:
        """Updates from one evaluation to the next."""
        ...

    def __call__(self, step: int, params: PyTree, out: metric_writers.Writers) -> dict[str, float]:
        """Evaluates these parameters; returns the metrics and writes the rest."""
        ...


@runtime_checkable
class InferenceEvaluation(Protocol):
    """Settings of an evaluation during training: `seqio_evaluation.SeqioEvaluation`."""

    def open(
        self,
        model: Model,
        *,
        checkpoint_path: str | None,
        task_feature_lengths: Mapping[str, int],
        model_dir: str,
    ) -> OpenedEvaluation:
        """Checks the settings and loads what the evaluation needs."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """The settings.

    Attributes:
      sample_every: In updates: what the original and the model say to a few prompts is shown so
        often, and at the end. None shows none.
      num_samples: Prompts, taken from all over the data; half of them were marked.
      sample_prompts: A file of records to take the prompts from instead, all of them.
      sample_decoder: How outputs are made. None is greedy, up to the tokens of "targets".
      profile_updates: The first and the last update of a `jax.profiler` trace; None is without.
      profile_dir: Where it goes; None is the TensorBoard folder of the run.
      wandb_project: Shows the run in Weights & Biases as well.
      inference_evaluation: Of seqio's tasks; None is without.
    """

    sample_every: int | None = None
    num_samples: int = 8
    sample_prompts: str | None = None
    sample_decoder: decoding.Decoding | None = None
    profile_updates: Sequence[int] | None = None
    profile_dir: str | None = None
    wandb_project: str | None = None
    inference_evaluation: InferenceEvaluation | None = None

    def __post_init__(self):
        for name, number in (
            ("SAMPLE_EVERY", self.sample_every),
            ("NUM_SAMPLES", self.num_samples),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")

    def prepare(
        self,
        model: Model,
        *,
        vocabulary: Any,
        examples: Sequence[feature_converters.Example],
        task_feature_lengths: Mapping[str, int],
        checkpoint_path: str | None,
        model_dir: str,
    ) -> "Prepared":
        """Reads what the settings name, so that a mistake among them is found at once.

        Args:
          model: That is trained.
          vocabulary: Of the data.
          examples: To take prompts from.
          task_feature_lengths: Tokens of "inputs" and "targets".
          checkpoint_path: Of the original; None is a random model.
          model_dir: Of the run.

        Raises:
          UsageError: A setting does not fit.
        """
        metric_writers.check_wandb(self.wandb_project)
        speaker = evaluation = None
        if self.sample_every is not None:
            prompts = samples.of_examples(examples, self.num_samples)
            if self.sample_prompts is not None:
                prompts = samples.of_records(self.sample_prompts, vocabulary)
            speaker = samples.Speaker(
                model=model,
                vocabulary=vocabulary,
                prompts=prompts,
                decoder=decoding.within_vocabulary(
                    self.sample_decoder
                    or decoding.Decoding(max_length=task_feature_lengths["targets"]),
                    tokenization.check_vocabulary(vocabulary),
                    model.config,
                ),
                longest_input=task_feature_lengths["inputs"],
            )
        if self.inference_evaluation is not None:
            evaluation = self.inference_evaluation.open(
                model,
                checkpoint_path=checkpoint_path,
                task_feature_lengths=task_feature_lengths,
                model_dir=model_dir,
            )
        traces = profiling.Traces(
            self.profile_updates, self.profile_dir or metric_writers.tensorboard_folder(model_dir)
        )
        return Prepared(self, speaker, evaluation, traces, model_dir)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run is watched with.

    Attributes:
      settings: Of it.
      speaker: Says what samples show.
      evaluation: Of seqio's tasks.
      traces: Of a few updates.
      model_dir: Of the run.
    """

    settings: Watch
    speaker: samples.Speaker | None
    evaluation: OpenedEvaluation | None
    traces: profiling.Traces
    model_dir: str

    @contextlib.contextmanager
    def around(
        self,
        *,
        out: metric_writers.Writers,
        params: PyTree,
        original: PyTree | None,
        start: int,
        train_steps: int,
    ) -> Iterator["Watched"]:
        """Around the updates of a run.

        Args:
          out: What the run writes to.
          params: All that the model is run with, before the first of the updates.
          original: Likewise of the original; None where it is not in memory.
          start: The update that the run goes on from.
          train_steps: The last one.
        """
        with contextlib.ExitStack() as stack:
            shown = None
            if self.speaker is not None:
                shown = samples.Samples(
                    self.speaker, self.model_dir, start=start, original=original, out=out
                )
                stack.callback(shown.close)
            if self.evaluation is not None and start == 0:
                out.write(0, self.evaluation(0, params, out))
            stack.enter_context(self.traces)
            view = progress_view.for_stdout(start, train_steps)
            stack.enter_context(view.showing())
            yield Watched(self, shown, view, out)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run that is watched.

    Attributes:
      prepared: What with.
      samples: Of what the models say; None shows none.
      view: Of the metrics, on stdout.
      out: What the run writes to.
    """

    prepared: Prepared
    samples: samples.Samples | None
    view: progress_view.Lines
    out: metric_writers.Writers

    @contextlib.contextmanager
    def update(self, step: int, state: Any) -> Iterator[None]:
        """Around an update, which begins with `state`."""
        with self.prepared.traces.update(step, state):
            yield

    def dispatched(self, step: int, state: Any) -> None:
        """The devices have begun with an update, which makes `state`."""
        self.prepared.traces.after(step, state)
        self.view.dispatched(step)

    def look(self, step: int, params: PyTree, is_last: bool) -> dict[str, float]:
        """Shows samples and evaluates, after an update after which either is due.

        Args:
          step: The update.
          params: All that the model is run with.
          is_last: Whether it is the last one.

        Returns:
          The metrics of the evaluation, not written yet.
        """
        every, evaluation = self.prepared.settings.sample_every, self.prepared.evaluation
        if self.samples is not None and every and (is_last or step % every == 0):
            self.samples.write(step, params)
        if evaluation is not None and (is_last or step % evaluation.every == 0):
            return evaluation(step, params, self.out)
        return {}
