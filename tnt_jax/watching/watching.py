"""How a run is watched: what is shown and written while it goes on, beside its metrics."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tnt_jax.checkpoints import pretrained
from tnt_jax.data.examples import Example
from tnt_jax.models import decoding
from tnt_jax.models.model import Model
from tnt_jax.runtime import settings_json
from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import hooks, metric_writers, profiling, samples

_NUM_SAMPLES = 8


@runtime_checkable
class InferenceEvaluation(Protocol):
    """Settings of an evaluation during training: `seqio_evaluation.SeqioEvaluation`.

    A protocol, so that a run without such an evaluation imports neither seqio nor TensorFlow.
    """

    def open(
        self,
        model: Model,
        *,
        source: pretrained.Pretrained | None,
        task_feature_lengths: Mapping[str, int],
        model_dir: str,
    ) -> hooks.Hook:
        """Checks the settings and loads what the evaluation needs."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is watched of a training run, and how often.

    Attributes:
      sample_every: Updates between two looks at what the original and the model say to a few
        prompts, which are shown at the end, too. None shows none.
      num_samples: Prompts, taken from all over the data; half of them were marked.
      sample_prompts: A file of records to take the prompts from instead, all of them.
      sample_decoder: How outputs are made. None is greedy, up to the tokens of "targets".
      profile_updates: The first and the last update of a `jax.profiler` trace; None is without.
      profile_dir: Where it goes; None is the TensorBoard folder of the run.
      wandb_project: Shows the run in Weights & Biases as well.
      inference_evaluation: Evaluates on seqio's tasks; None is without.
      spike_deviations: How far above the usual a loss is noted in `events.jsonl`, in standard
        deviations; None notes none.
    """

    sample_every: int | None = None
    num_samples: int = _NUM_SAMPLES
    sample_prompts: str | None = None
    sample_decoder: decoding.Decoding | None = None
    profile_updates: Sequence[int] | None = None
    profile_dir: str | None = None
    wandb_project: str | None = None
    inference_evaluation: InferenceEvaluation | None = None
    spike_deviations: float | None = 10.0

    def __post_init__(self):
        for name, number in (
            ("SAMPLE_EVERY", self.sample_every),
            ("NUM_SAMPLES", self.num_samples),
        ):
            if number is not None and number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")
        num_samples = None if self.num_samples == _NUM_SAMPLES else self.num_samples
        for name, value, of, needed in (
            ("NUM_SAMPLES", num_samples, "SAMPLE_EVERY", self.sample_every),
            ("SAMPLE_PROMPTS", self.sample_prompts, "SAMPLE_EVERY", self.sample_every),
            ("PROFILE_DIR", self.profile_dir, "PROFILE_UPDATES", self.profile_updates),
        ):
            if value is not None and needed is None:
                raise UsageError(f"{name} is set, to {value}, and {of} is None. Set {of}, too.")

    def make_hooks(
        self,
        model: Model,
        *,
        vocabulary: Any,
        examples: Sequence[Example],
        task_feature_lengths: Mapping[str, int],
        source: pretrained.Pretrained | None,
        model_dir: str,
    ) -> list[hooks.Hook]:
        """Reads what the settings name, so that a mistake among them is found at once.

        Args:
          model: The network that is trained.
          vocabulary: The vocabulary of the data.
          examples: Examples to take prompts from.
          task_feature_lengths: Tokens of "inputs" and "targets".
          source: The original's checkpoint; None is a random model.
          model_dir: Folder of the run.

        Returns:
          The hooks, in the order in which they are called.

        Raises:
          UsageError: A setting does not fit.
        """
        metric_writers.check_wandb(self.wandb_project)
        made: list[hooks.Hook] = []
        # Samples of what the original and the model say.
        if self.sample_every is not None:
            prompts = samples.choose_prompts(examples, self.num_samples)
            if self.sample_prompts is not None:
                prompts = samples.read_prompts(self.sample_prompts, vocabulary)
            greedy = decoding.Decoding(max_length=task_feature_lengths["targets"])
            speaker = samples.Speaker(
                model=model,
                vocabulary=vocabulary,
                prompts=prompts,
                decoder=decoding.within_vocabulary(
                    self.sample_decoder or greedy,
                    vocabulary,
                    model.config,
                ),
                longest_input=task_feature_lengths["inputs"],
            )
            made.append(samples.Samples(speaker, model_dir, self.sample_every))
        # seqio's metrics of a task.
        if self.inference_evaluation is not None:
            evaluation = self.inference_evaluation.open(
                model,
                source=source,
                task_feature_lengths=task_feature_lengths,
                model_dir=model_dir,
            )
            made.append(evaluation)
        # A trace. It comes last, so that it does not show the other hooks before its first update.
        if self.profile_updates is not None:
            folder = self.profile_dir or metric_writers.tensorboard_folder(model_dir)
            made.append(profiling.Trace(self.profile_updates, folder))
        return made

    def describe(self, made: Sequence[hooks.Hook]) -> dict[str, Any]:
        """Describes what the processes of a run must have alike, as all of them compute it.

        Args:
          made: The hooks, from `make_hooks`: prompts are told apart by what they say, for hosts may
            have the file at paths of their own.

        Returns:
          JSON values.
        """
        prompts = [hook.prompts for hook in made if isinstance(hook, samples.Samples)]
        asked = {"every": self.sample_every, "decoder": self.sample_decoder, "prompts": prompts}
        return {
            "samples": settings_json.describe(asked if prompts else None),
            "inference_evaluation": settings_json.describe(self.inference_evaluation),
        }
