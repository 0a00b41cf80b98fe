"""Evaluation with seqio's Evaluator while a model is trained: T5X users' tasks and metrics, as is.

A task says what is measured: its `metric_fns` (or `metric_objs`) take what the model predicts for
the inputs, with or without the log-probability of that, or how probable it finds the targets. Here
are the functions that the Evaluator asks for these, as T5X's models give them.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from tnt_jax.checkpoints import pretrained
from tnt_jax.data import tasks
from tnt_jax.data.batches import batch_for_eval
from tnt_jax.data.examples import Example
from tnt_jax.models import decoding, sharding
from tnt_jax.models.model import Model
from tnt_jax.objectives import fused
from tnt_jax.runtime import console
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import hooks

_Scores = list[tuple[int, float]]
_Outputs = list[tuple[int, list[int]]]


class ModelFunctions:
    """What seqio's Evaluator asks a model for, of a dataset of (index, model features).

    Every host goes through the whole dataset.

    Args:
        model: the network.
        decoder: how predictions are made.
        batch_size: examples that are computed at a time.
    """

    def __init__(self, model: Model, decoder: decoding.Decoding, batch_size: int):
        self._model, self._decoder, self._batch_size = model, decoder, batch_size
        self._log_likelihoods = fused.jit_log_likelihoods(model)

    def predict(self, params: PyTree, dataset: Any) -> _Outputs:
        """The token ids of each output, padded with 0 to the longest that there may be."""
        return self.predict_with_aux(params, dataset)[0]

    def predict_with_aux(
        self, params: PyTree, dataset: Any
    ) -> tuple[_Outputs, dict[str, list[float]]]:
        """Outputs, and `{"scores": ...}`: the log-probability of each, in nats."""
        outputs: _Outputs = []
        scores: list[float] = []
        for indices, features in self._batches(dataset):
            inputs = features["encoder_input_tokens"]
            keys = None
            if self._decoder.temperature:
                keys = decoding.record_keys(0, [str(index) for index in indices])
            decoded = self._model.decode(
                params,
                [_unpadded(row).tolist() for row in inputs],
                inputs.shape[1],
                self._decoder,
                self._batch_size,
                row_keys=keys,
            )
            tokens, log_probs = map(sharding.fetch, (decoded.tokens, decoded.log_prob))
            outputs += zip(indices, tokens.tolist(), strict=False)  # filler rows come last
            scores += log_probs[: len(indices)].tolist()
        return outputs, {"scores": scores}

    def score(self, params: PyTree, dataset: Any) -> _Scores:
        """The log-likelihood of each target, in nats: the sum over its tokens, as weighted."""
        scores: _Scores = []
        layout = self._model.network.feature_layout
        no_marks = np.zeros((0, 2), np.int32)
        for indices, features in self._batches(dataset):
            inputs, targets = features["encoder_input_tokens"], features["decoder_target_tokens"]
            examples = [
                Example(*map(_unpadded, rows), negative_pairs=no_marks, id=str(index))
                for index, *rows in zip(indices, inputs, targets, strict=True)
            ]
            lengths = {"inputs": inputs.shape[1], "targets": targets.shape[1]}
            (batch,) = batch_for_eval(examples, self._batch_size, lengths, feature_layout=layout)
            placed = sharding.put_batch(batch, self._model.mesh)
            found = np.asarray(self._log_likelihoods(params, placed))
            weighted = found[: len(indices)] * features["decoder_loss_weights"]
            scores += zip(indices, weighted.sum(axis=1).tolist(), strict=True)
        return scores

    def for_seqio(self, params: PyTree) -> dict[seqio.metrics.ModelOutputType, Callable[..., Any]]:
        """The `model_fns` of `seqio.Evaluator.evaluate`."""
        kinds = seqio.metrics.ModelOutputType
        return {
            kinds.PREDICTION: functools.partial(self.predict, params),
            kinds.PREDICTION_WITH_AUX: functools.partial(self.predict_with_aux, params),
            kinds.SCORE: functools.partial(self.score, params),
        }

    def _batches(self, dataset: Any) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        rows = dataset.as_numpy_iterator()
        while batch := list(itertools.islice(rows, self._batch_size)):
            indices = [int(index) for index, _ in batch]
            yield (
                indices,
                {name: np.stack([features[name] for _, features in batch]) for name in batch[0][1]},
            )


def _unpadded(ids: np.ndarray) -> np.ndarray:
    """The ids of a row without the zeros that seqio fills it up with."""
    return np.trim_zeros(ids, "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqioEvaluation:
    """A task or mixture that a model is evaluated on while it is trained.

    The numbers of the original, or of whatever training starts from, come first, as update 0.

    Attributes:
      mixture_or_task_name: Registered with seqio; its tasks have metrics.
      mixture_or_task_module: Imported first, so that it can register the task.
      split: Such as "validation".
      every: In updates; the end is always evaluated.
      batch_size: Examples that are computed at a time.
      decoder: How predictions are made. None is greedy, up to the tokens of "targets".
      evaluator: `seqio.Evaluator`, or what takes the same arguments; those not given here, such as
        `num_examples` or `logger_cls`, are bound to it.
      feature_converter: Makes model features of the task's; called with `pack=False`.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str | None = None
    split: str = "validation"
    every: int = 500
    batch_size: int = 32
    decoder: decoding.Decoding | None = None
    evaluator: Callable[..., seqio.Evaluator] = seqio.Evaluator
    feature_converter: Callable[..., seqio.FeatureConverter] = seqio.EncDecFeatureConverter

    def open(
        self,
        model: Model,
        *,
        source: pretrained.Pretrained | None,
        task_feature_lengths: Mapping[str, int],
        model_dir: str,
    ) -> "TaskEvaluation":
        """Reads the data, and prepares what a run evaluates with.

        Args:
          model: The network that is trained.
          source: The checkpoint that it comes from; None is a random model.
          task_feature_lengths: Tokens of "inputs" and "targets".
          model_dir: Folder of the run; seqio's loggers write to `inference_eval` in it.

        Raises:
          UsageError: There is no such task, it measures nothing on this split, its vocabulary is
            not the model's, or a setting does not fit.
        """
        if self.every < 1:
            raise UsageError(f"SEQIO_EVAL_EVERY: expected at least 1, found {self.every}.")
        sharding.check_batch_size(self.batch_size, 1, model.mesh, "EVAL_BATCH_SIZE")
        of_setting = f"{self.mixture_or_task_name!r} (EVAL_MIXTURE_OR_TASK_NAME)"
        found = seqio.get_subtasks(
            tasks.find_task(self.mixture_or_task_name, self.mixture_or_task_module)
        )
        measured = seqio.evaluation.get_valid_eval_tasks(found, self.split)
        if not measured:
            names = ", ".join(task.name for task in found)
            raise UsageError(
                f"{of_setting}: expected a task with metric_fns and a split {self.split!r}, found "
                f"none among {names}. Give one of them both, or name another task or split."
            )
        vocabularies = []
        for task in measured:
            vocabulary = tasks.tokeniser(task.output_features["targets"].vocabulary)
            pretrained.check_vocabulary(vocabulary, model.config, source)
            vocabularies.append(vocabulary)
        decoder = decoding.within_vocabulary(
            self.decoder or decoding.Decoding(max_length=task_feature_lengths["targets"]),
            min(vocabularies, key=lambda vocabulary: vocabulary.size),
            model.config,
        )
        log_dir = epath.Path(model_dir).expanduser() / "inference_eval"
        evaluator = self.evaluator(
            mixture_or_task_name=self.mixture_or_task_name,
            feature_converter=self.feature_converter(pack=False),
            eval_split=self.split,
            sequence_length=dict(task_feature_lengths),
            log_dir=os.fspath(log_dir),
        )
        functions = ModelFunctions(model, decoder, self.batch_size)
        return TaskEvaluation(self.every, evaluator, functions, log_dir)


class TaskEvaluation(hooks.Hook):
    """The evaluation of a run, with its data in memory.

    Args:
      every: Updates from one evaluation to the next.
      evaluator: Measures, with its data in memory.
      functions: What it asks the model for.
      log_dir: Folder that seqio's loggers write to.
    """

    def __init__(
        self, every: int, evaluator: seqio.Evaluator, functions: ModelFunctions, log_dir: Any
    ):
        self.periods = (every,)
        self._evaluator, self._functions, self._log_dir = evaluator, functions, log_dir

    def begin(self, beginning: hooks.Beginning) -> None:
        """Evaluates what a new run starts from."""
        self._params_of, self._out = beginning.params_of, beginning.out
        if beginning.step == 0:
            self._out.write(0, self(0, beginning.state))

    def __call__(self, step: int, state: Any) -> dict[str, float]:
        """Evaluates, prints the numbers, and writes the texts.

        Args:
          step: Number of the last update.
          state: The training state that it made.

        Returns:
          The numbers, as `inference_eval/TASK/METRIC`; nothing on later hosts.
        """
        is_first = console.is_first_process()
        if is_first and self._evaluator.loggers:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        model_functions = self._functions.for_seqio(self._params_of(state))
        future, _ = self._evaluator.evaluate(
            compute_metrics=is_first, step=step, model_fns=model_functions
        )
        numbers: dict[str, float] = {}
        for task_name, of_task in (future.result() or {}).items():
            for metric, value in of_task.items():
                name = f"inference_eval/{task_name}/{metric}"
                if isinstance(value, seqio.metrics.Scalar):
                    value = value.value
                if isinstance(value, seqio.metrics.Text):
                    text = tf.compat.as_str(value.textdata)
                    self._out.write_table(step, name, ["text"], [[text]])
                elif np.ndim(value) == 0 and not isinstance(value, seqio.metrics.MetricValue):
                    numbers[name] = float(value)
                # Pictures, sounds, histograms: seqio's loggers show them (seqio.Evaluator).
        shown = ", ".join(
            f"{name.removeprefix('inference_eval/')} {value:.4g}" for name, value in numbers.items()
        )
        console.log(f"update {step}, seqio: {shown}")
        return numbers
