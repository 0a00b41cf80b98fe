"""Runs our objectives inside T5X's own training program, `python -m t5x.train`.

It needs google-research/t5x; nothing else imports this module. `TntModel` is T5X's encoder-decoder
model with a `TntObjective`. `TntTrainer` is its trainer with a frozen original. `FeatureConverter`
turns our seqio tasks into model features. `get_dataset` reads batches that a restart neither
repeats nor skips. `gin_configs/t5x/train.gin` puts them together.

The loss is the sum of the token losses of a batch, over all microbatches and devices, divided once
by the number of unmasked target tokens, as in `train_step`. Therefore T5X's
`loss_normalizing_factor`, `label_smoothing` and `z_loss` are not settings of `TntModel`; the last
two are settings of `TntObjective`.

The original always comes from the initial checkpoint, also when T5X resumes from a checkpoint in
`model_dir`. It is an argument of the compiled step, sharded as the parameters are. It is never
donated and never saved. `MODEL_DIR/tnt_jax_run.json` holds its path and digest.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
import tensorflow as tf
from absl import logging
from clu import metrics as clu_metrics
from clu.data import dataset_iterator
from etils import epath
from flax import linen as nn
from t5x import (  # pyright: ignore[reportMissingImports]  # T5X is on no package index
    decoding,
    metrics,
    models,
    train_state,
    trainer,
    utils,
)

from tnt_jax import objectives
from tnt_jax.checkpoints import digests
from tnt_jax.data import tasks
from tnt_jax.data.batches import Batches
from tnt_jax.data.examples import (
    Example,
    have_strengths,
    id_of,
    max_negative_ids,
    num_marks_of,
    unique_pairs,
)
from tnt_jax.data.layouts import convert_features
from tnt_jax.runtime import files
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import train_step

_RUN_FILE = "tnt_jax_run.json"


# --- Data -----------------------------------------------------------------------------------------


_EOS_ID = 1  # of every T5X model


class FeatureConverter(seqio.FeatureConverter):
    """Model features of tasks whose features are those of `tasks`: marks and loss mask included.

    Examples are padded or cut as `convert_features` does. For an input that is
    cut to keep its EOS, `DatasetConfig.trim_output_features` must be False.
    """

    TASK_FEATURES = types.MappingProxyType(
        dict.fromkeys(("inputs", "targets"), seqio.FeatureConverter.FeatureSpec(dtype=tf.int32))
    )
    MODEL_FEATURES = types.MappingProxyType(
        {
            name: seqio.FeatureConverter.FeatureSpec(dtype=tf.int32, rank=rank)
            for name, rank in (
                ("encoder_input_tokens", 1),
                ("decoder_input_tokens", 1),
                ("decoder_target_tokens", 1),
                ("decoder_loss_mask", 1),
                ("decoder_negative_ids", 2),
            )
        }
    )
    PACKING_FEATURE_DTYPES = types.MappingProxyType({})

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        num_negative_ids: int = 1,
        has_strengths: bool = False,
    ):
        """Makes a converter.

        Args:
          pack: Must be False.
          use_custom_packing_ops: Belongs to packing; T5X gives it.
          num_negative_ids: `K`, the most ids to remove at one position.
          has_strengths: Whether there is a feature for strengths of marks below 1.

        Raises:
          UsageError: Packing was asked for.
        """
        del use_custom_packing_ops
        if pack:
            raise UsageError(
                "DatasetConfig.pack: expected False, found True: the plug-in does not pack "
                "examples. Set it to False for train and train_eval."
            )
        # What is too long is cut below, after seqio would have refused it.
        super().__init__(pack=False, apply_length_check=False)
        self.num_negative_ids = num_negative_ids
        self.has_strengths = has_strengths
        if has_strengths:
            spec = seqio.FeatureConverter.FeatureSpec(dtype=tf.float32, rank=2)
            self.MODEL_FEATURES = types.MappingProxyType(
                {**type(self).MODEL_FEATURES, "decoder_negative_strengths": spec}
            )

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        lengths = self.get_model_feature_lengths(task_feature_lengths)

        def convert_one(name, inputs, targets, negative_ids, strengths, loss_mask):
            pairs, strengths = unique_pairs(negative_ids, strengths)
            example = Example(
                inputs=inputs,
                targets=targets,
                negative_pairs=pairs,
                negative_strengths=strengths if self.has_strengths else None,
                # T5X may have cut targets already, and pads with 0.
                loss_mask=loss_mask[: len(targets)] * (targets != 0),
                id=id_of(name),
                keeps_last_input=len(inputs) > 0 and inputs[-1] == _EOS_ID,
            )
            batch = convert_features(
                [example],
                task_feature_lengths,
                self.num_negative_ids,
                has_strengths=self.has_strengths,
            )
            return [batch[feature][0] for feature in self.MODEL_FEATURES]

        def convert(fields):
            targets = fields["targets"]
            negative_ids = fields.get("negative_ids", tf.zeros([0, 2], tf.int32))
            of_all = tf.ones(tf.shape(negative_ids)[:1])
            arrays = tf.numpy_function(
                convert_one,
                [
                    fields.get("id", ""),
                    fields["inputs"],
                    targets,
                    negative_ids,
                    fields.get("negative_strengths", of_all),
                    fields.get("loss_mask", tf.ones_like(targets)),
                ],
                [spec.dtype for spec in self.MODEL_FEATURES.values()],
            )
            return {
                name: tf.ensure_shape(
                    array, [lengths[name], self.num_negative_ids][: self.MODEL_FEATURES[name].rank]
                )
                for name, array in zip(self.MODEL_FEATURES, arrays, strict=True)
            }

        return ds.map(convert, num_parallel_calls=tf.data.AUTOTUNE)

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Positions of each model feature."""
        return {
            name: task_feature_lengths["inputs" if name.startswith("encoder") else "targets"]
            for name in self.MODEL_FEATURES
        }


def get_dataset(
    cfg: utils.DatasetConfig,
    shard_id: int,
    num_shards: int,
    feature_converter_cls: Callable[..., FeatureConverter],
    num_epochs: int | None = None,
    continue_from_last_checkpoint: bool = False,
    *,
    model_dir: str,
) -> dataset_iterator.DatasetIterator:
    """T5X's `get_dataset_fn` for training: batch k depends on the data, the seed and k alone.

    Every epoch is a permutation of all examples, the same on any number of hosts, and a run that
    goes on from a checkpoint starts with the batch after its last one. (T5X's own data start anew.)

    Args:
      cfg: What to read, by the name of a registered task or mixture.
      shard_id: Which of these parts this host reads, from 0.
      num_shards: Parts that hosts read a batch in.
      feature_converter_cls: `FeatureConverter`, which says how many ids fit at a position.
      num_epochs: Not looked at, as training runs on.
      continue_from_last_checkpoint: Not looked at, as it always does.
      model_dir: MODEL_DIR.

    Raises:
      UsageError: A setting of `cfg` or the data have a mistake.
    """
    del num_epochs, continue_from_last_checkpoint
    if not epath.Path(model_dir).is_absolute():
        raise UsageError(f"MODEL_DIR: expected an absolute path, found {model_dir!r} (T5X's need).")
    if cfg.seed is None:
        raise UsageError(
            "train/utils.DatasetConfig.seed: expected a number, found None: a restart would see "
            "other data. Set RANDOM_SEED."
        )
    converter = feature_converter_cls(
        pack=cfg.pack, use_custom_packing_ops=cfg.use_custom_packing_ops
    )
    examples = tasks.SeqioDataset(
        mixture_or_task_name=cfg.mixture_or_task_name,
        split=cfg.split,
        mixture_or_task_module=cfg.module,
    ).load(cfg.task_feature_lengths)
    needed = max_negative_ids(examples)
    if needed > converter.num_negative_ids:
        raise UsageError(
            f"NUM_NEGATIVE_IDS (FeatureConverter.num_negative_ids): {cfg.mixture_or_task_name!r} "
            f"has {needed} ids to remove at one position, found {converter.num_negative_ids}. Set "
            f"it to {needed}."
        )
    if have_strengths(examples) and not converter.has_strengths:
        raise UsageError(
            f"HAS_STRENGTHS (FeatureConverter.has_strengths): {cfg.mixture_or_task_name!r} has "
            "marks of a strength below 1, found False. Set it to True."
        )
    logging.info(
        "%d of %d examples have marks.",
        int((num_marks_of(examples) > 0).sum()),
        len(examples),
    )
    rows_of_host = cfg.batch_size // num_shards
    return _Batches(
        Batches(
            examples,
            cfg.batch_size,
            cfg.task_feature_lengths,
            seed=cfg.seed,
            num_negative_ids=converter.num_negative_ids,
            shuffle=cfg.shuffle,
            has_strengths=converter.has_strengths,
        ),
        rows=slice(shard_id * rows_of_host, (shard_id + 1) * rows_of_host),
        start=_num_updates_done(epath.Path(model_dir)),
    )


class _Batches(dataset_iterator.DatasetIterator):
    """The rows of one host, from batch `start` on. Saves nothing: `start` follows from the run."""

    def __init__(self, batches: Batches, rows: slice, start: int):
        self._batches, self._rows = batches, rows
        self._start = self._next = start

    def __next__(self) -> dict[str, np.ndarray]:
        batch = self._batches.batch(self._next)
        self._next += 1
        return {name: array[self._rows] for name, array in batch.items()}

    @property
    def element_spec(self) -> dict[str, dataset_iterator.ArraySpec]:
        return {
            name: dataset_iterator.ArraySpec(dtype=array.dtype, shape=array[self._rows].shape)
            for name, array in self._batches.batch(0).items()
        }

    def reset(self) -> None:
        self._next = self._start

    def save(self, filename: Any) -> None:
        pass

    def restore(self, filename: Any) -> None:
        pass


# --- Model ----------------------------------------------------------------------------------------


@flax.struct.dataclass
class _Mean(clu_metrics.Average):
    """A mean of sums that T5X adds up; 0 where nothing was counted, in place of NaN."""

    total: Any
    count: Any

    def compute(self) -> Any:
        return self.total / np.maximum(self.count, 1)


class TntModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder model, trained with a `TntObjective`.

    Decoding and scoring stay T5X's. Metrics are T5X's and those of `train_step`, under their names.
    """

    FEATURE_CONVERTER_CLS = FeatureConverter

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        objective: objectives.TntObjective,
        decode_fn: Callable[..., Any] = decoding.beam_search,
        feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
        default_decoder_params: models.DecoderParams | None = None,
    ):
        """Makes a model; all but `objective`, the loss per token, is T5X's."""
        super().__init__(
            module=module,
            input_vocabulary=input_vocabulary,
            output_vocabulary=output_vocabulary,
            optimizer_def=optimizer_def,
            decode_fn=decode_fn,
            feature_converter_cls=feature_converter_cls,
            default_decoder_params=default_decoder_params,
        )
        self.objective = objective

    def loss_fn(
        self,
        params: PyTree,
        batch: Mapping[str, jax.Array],
        dropout_rng: jax.Array | None,
        original_params: PyTree | None = None,
    ) -> tuple[jax.Array, dict[str, clu_metrics.Metric]]:
        """The sum of the token losses, not divided, and metrics.

        Args:
          params: The parameters of the current model.
          batch: Model features of `FeatureConverter`.
          dropout_rng: The random key of the current model's dropout; None is without dropout. The
            original has none.
          original_params: The parameters of the frozen original.

        Raises:
          UsageError: The objective needs the original and there is none, or the vocabulary has more
            ids than the model.
        """
        if self.objective.needs_original and original_params is None:
            raise UsageError(
                f"negative_term={self.objective.negative_term!r} with "
                f"positive_term={self.objective.positive_term!r} compares with the original model, "
                "which T5X's own trainer does not give. Set trainer_cls = @t5x_plugin.TntTrainer."
            )
        logits = self._compute_logits(params, batch, dropout_rng)
        original_logits = None
        if self.objective.needs_original:
            original_logits = self._compute_logits(original_params, batch, None)
        if logits.shape[-1] < self.output_vocabulary.vocab_size:
            raise UsageError(
                f"the vocabulary has {self.output_vocabulary.vocab_size} ids, but the model has "
                f"{logits.shape[-1]} logits. Set the vocab_size of its network, or its VOCABULARY."
            )
        loss, sums = train_step.token_sums(self.objective, logits, original_logits, batch)
        # Those of T5X count time, sequences and correct tokens.
        found = self._compute_metrics(
            logits=logits,
            targets=batch["decoder_target_tokens"],
            mask=batch["decoder_loss_mask"].astype(jnp.float32),
            loss=sums["loss"],
        )
        for name, total in sums.items():
            count = train_step.MEAN_OVER.get(name)
            found[name] = _Mean(total=total, count=sums[count]) if count else metrics.Sum(total)
        return loss, found

    def eval_fn(
        self,
        params: PyTree,
        batch: Mapping[str, jax.Array],
        original_params: PyTree | None = None,
    ) -> tuple[jax.Array, dict[str, clu_metrics.Metric]]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None, original_params)

    def score_batch(
        self, params: PyTree, batch: Mapping[str, jax.Array], return_intermediates: bool = False
    ) -> Any:
        """T5X's log-likelihood of each target, with our name for its weights."""
        batch = {**batch, "decoder_loss_weights": batch["decoder_loss_mask"]}
        return super().score_batch(params, batch, return_intermediates)


# --- Trainer --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _WithOriginal:
    """A step `(train_state, batch)` for T5X around one `(train_state, original_params, batch)`.

    So the compiled function takes the original as an argument, though T5X calls it without.
    """

    step: Any  # partitioned, lowered or compiled
    original_params: PyTree | None

    def __call__(self, train_state, batch):
        return self.step(train_state, self.original_params, batch)

    def lower(self, train_state, batch) -> "_WithOriginal":
        lowered = self.step.lower(train_state, self.original_params, batch)
        return dataclasses.replace(self, step=lowered)

    def compile(self) -> "_WithOriginal":
        return dataclasses.replace(self, step=self.step.compile())


class TntTrainer(trainer.Trainer):
    """T5X's trainer for a `TntModel`: it holds the original and divides by the tokens once."""

    def __init__(
        self,
        model: TntModel,
        train_state: Any,
        partitioner: Any,
        summary_dir: str,
        original: utils.RestoreCheckpointConfig | None = None,
        **t5x_settings: Any,
    ):
        """Makes a trainer, and reads the original.

        Args:
          model: Says whether there is an original.
          train_state: Where training starts or goes on.
          partitioner: T5X's.
          summary_dir: MODEL_DIR.
          original: The initial checkpoint, as in `CheckpointConfig.restore`.
          **t5x_settings: All else that T5X's trainer takes.

        Raises:
          UsageError: There is no original, or not the one that the run in MODEL_DIR began with.
        """
        original_params, identity = None, None
        if model.objective.needs_original:
            original_params, path = _read_original(original, train_state, partitioner, summary_dir)
            identity = {"path": path, "digest": digests.of_params(original_params)}
        _check_run(epath.Path(summary_dir), identity, int(utils.get_local_data(train_state.step)))
        super().__init__(
            model=model,
            train_state=train_state,
            partitioner=partitioner,
            summary_dir=summary_dir,
            **t5x_settings,
        )
        self._original_params = original_params

    @functools.cached_property
    def _partitioned_train_step(self) -> _WithOriginal:
        def step(train_state, original_params, batch):
            # T5X sums gradients and metrics over microbatches.
            gradients, found, _ = trainer.accumulate_grads_microbatched(
                types.SimpleNamespace(
                    loss_fn=functools.partial(self._model.loss_fn, original_params=original_params)
                ),
                train_state,
                batch,
                self._get_step_rng(train_state.step),
                self._num_microbatches,
                self._partitioner.data_partition_spec,
            )
            # A batch of padding alone changes nothing.
            num_tokens = jnp.maximum(found["num_tokens"].total, 1.0)
            gradients = jax.tree.map(lambda g: g / num_tokens, gradients)
            found["gradient_norm"] = _Mean(total=optax.tree.norm(gradients), count=jnp.ones(()))
            return trainer.apply_grads(
                train_state,
                gradients,
                found,
                self._learning_rate_fn(train_state.step),
                self._weight_metrics_computer,
            )

        return self._partition(step, (self._train_state_axes, None), donate_argnums=(0,))

    @functools.cached_property
    def _partitioned_eval_step(self) -> _WithOriginal:
        def step(train_state, original_params, batch):
            return self._model.eval_fn(train_state.params, batch, original_params)[1]

        return self._partition(step, None)

    def _partition(self, step, out_axes, **settings) -> _WithOriginal:
        has_original = self._original_params is not None
        in_axes = (
            self._train_state_axes,
            self._train_state_axes.params if has_original else None,
            self._partitioner.data_partition_spec,
        )
        partitioned = self._partitioner.partition(
            step, in_axis_resources=in_axes, out_axis_resources=out_axes, **settings
        )
        return _WithOriginal(partitioned, self._original_params)


def _read_original(
    config: utils.RestoreCheckpointConfig | None,
    state: Any,
    partitioner: Any,
    model_dir: str,
) -> tuple[PyTree, str]:
    """The parameters of the initial checkpoint and its path; each array straight to its devices."""
    paths: Sequence[str] = ()
    if config is not None and not config.fallback_to_scratch:
        config, paths = utils.get_first_valid_restore_config_and_paths([config])
    if len(paths) != 1:
        raise UsageError(
            "INITIAL_CHECKPOINT_PATH (TntTrainer.original): this objective compares with the "
            f"original model, so one checkpoint is expected, whole (no fallback_to_scratch); found "
            f"{config}."
        )
    abstract = train_state.InferenceState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params),
        params_axes=state.params_axes,
    )
    reader = utils.create_orbax_checkpoint_manager(
        restore_cfg=config,
        train_state=abstract,
        partitioner=partitioner,
        model_dir=model_dir,  # it clears this directory of what was left half-written
    )
    try:
        return utils.restore(reader, paths, config).params, paths[0]
    finally:
        reader.close()


# --- The run --------------------------------------------------------------------------------------


def _saved_step(model_dir: epath.Path) -> int | None:
    """The step of the checkpoint that T5X goes on from."""
    if not model_dir.exists():
        return None
    here = utils.RestoreCheckpointConfig(path=str(model_dir), mode="latest")
    _, paths = utils.get_first_valid_restore_config_and_paths([here])
    return int(paths[0].rpartition("_")[2]) if paths else None


def _saved_run(model_dir: epath.Path) -> dict[str, Any] | None:
    """What a run in this directory began with; None where there was none."""
    path = model_dir / _RUN_FILE
    if path.exists():
        return files.read_object(path)
    if _saved_step(model_dir) is not None:
        raise UsageError(
            f"MODEL_DIR: {model_dir} has checkpoints but no {_RUN_FILE}: the run there did not use "
            "TntTrainer. Give one of them as INITIAL_CHECKPOINT_PATH, with another MODEL_DIR."
        )
    return None


def _num_updates_done(model_dir: epath.Path) -> int:
    run, step = _saved_run(model_dir), _saved_step(model_dir)
    return 0 if run is None or step is None else step - run["first_step"]


def _check_run(model_dir: epath.Path, original: dict[str, str] | None, step: int) -> None:
    """A run must go on with the original that it began with; writes down which, the first time."""
    run = _saved_run(model_dir)
    if run is None:
        if jax.process_index() == 0:
            model_dir.mkdir(parents=True, exist_ok=True)
            half_written = model_dir / f"{_RUN_FILE}.tmp"
            half_written.write_text(
                json.dumps({"original": original, "first_step": step}, allow_nan=False)
            )
            half_written.replace(model_dir / _RUN_FILE)
        return

    def describe(identity):
        if identity is None:
            return "none (an objective without divergences)"
        return f"{identity['path']} (digest {identity['digest']})"

    if (run["original"] or {}).get("digest") != (original or {}).get("digest"):
        raise UsageError(
            f"MODEL_DIR {model_dir} holds a run whose original was {describe(run['original'])}; "
            f"now it is {describe(original)}. Pass the same INITIAL_CHECKPOINT_PATH and "
            "objective, or another MODEL_DIR."
        )
