r"""Trains a T5 on annotated records: Targeted Negative Training, its baselines, or fine-tuning.

The parameters come from the first of these that exists:

1. the newest checkpoint in MODEL_DIR: the run resumes where it stopped;
2. INITIAL_CHECKPOINT_PATH, a checkpoint or a model directory;
3. a random initialisation from the seed, if INITIAL_CHECKPOINT_PATH is None.

The original, with which the objectives compare, always comes from 2 or 3, also when a run resumes.
It is never the half-trained model of MODEL_DIR. Every checkpoint holds its digest, which is
checked. A further round starts from a patched model: START_CHECKPOINT_PATH names it.

Example:
    python -m tnt_jax.train --gin_file=models/t5_1_1_base.gin --gin_file=objectives/tnrf.gin \
      --gin_file=runs/train.gin --gin.RECORDS=annotated.jsonl --gin.VOCABULARY_PATH=spiece.model \
      --gin.INITIAL_CHECKPOINT_PATH=original/checkpoint_1000 --gin.MODEL_DIR=patched \
      --gin.TRAIN_STEPS=200
"""

import dataclasses
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from etils import epath
from jax.experimental import multihost_utils

from tnt_jax import objectives
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import feature_converters
from tnt_jax.models import sharding
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import (
    console,
    files,
    holding,
    memory,
    operative_config,
    preemption,
    processes,
    program,
    settings_json,
    stages,
)
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError, check_seed
from tnt_jax.training import (
    load_original,
    loop,
    original_cache,
    resume,
    run_checkpoints,
    train_step,
)
from tnt_jax.watching import metric_writers, watching


@runtime_checkable
class Dataset(Protocol):
    """A source of examples: `datasets.RecordFiles`, `tasks.SeqioDataset`, or your own."""

    @property
    def vocabulary(self) -> Any:
        """The tokeniser of its ids."""
        ...

    def removed_everywhere(self) -> tuple[int, ...]:
        """Ids to remove at every position, whatever the marks."""
        ...

    def load(self, task_feature_lengths: Mapping[str, int]) -> list[feature_converters.Example]:
        """All examples, tokenised and marked."""
        ...


def train(
    *,
    model_dir: str,
    model: NetworkConfig | pretrained.FromCheckpoint,
    objective: objectives.TntObjective,
    dataset: Dataset,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    train_steps: int,
    initial_checkpoint_path: str | None,
    start_checkpoint_path: str | None = None,
    optimizer: Callable[[], optax.GradientTransformation] | optax.GradientTransformation,
    num_microbatches: int = 1,
    mesh_shape: sharding.MeshShape | None = None,
    pack: bool = False,
    original: str = "parameters",
    states_dir: str | None = None,
    adapter_rank: int = 16,
    adapter_alpha: float = 32.0,
    block_size: int | None = None,
    eval_dataset: Dataset | None = None,
    eval_every: int = 500,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    keep_checkpoints: int = 2,
    keep_every: int | None = None,
    keep_best: str | None = None,
    max_gradient_norm: float | int | None = None,
    non_finite: str = "stop",
    spike_deviations: float | None = 10.0,
    watch: watching.Watch | None = None,
    seed: int = 0,
    allow_changes: Sequence[str] = (),
) -> str:
    """Trains, writing checkpoints, `metrics.jsonl` and the operative config into `model_dir`.

    Args:
      model_dir: Where everything goes; a run that was stopped goes on from there.
      model: The network's settings, or that they are the initial checkpoint's.
      objective: The loss per token.
      dataset: Annotated examples. What they remove everywhere is added to the objective's.
      task_feature_lengths: Tokens of "inputs" and "targets"; longer ones are cut, and counted.
      batch_size: Rows per update, over all devices and microbatches: examples, unless packed.
      train_steps: Updates in all, those before a restart included.
      initial_checkpoint_path: The original, and where training starts from; None is random.
      start_checkpoint_path: Where training starts from instead, for a further round.
      optimizer: An Optax optimizer, or what makes one, such as `optax.adafactor`.
      num_microbatches: Parts that each batch is computed in, to save memory.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      pack: Puts as many whole examples into a row as fit. An update then sees more of them.
      original: Where the original's logits come from: "parameters" (a second tree and a second
        forward pass), "cached" (decoder states, computed once for the data) or "adapters_off" (the
        model trains low-rank adapters, and is its own original without them).
      states_dir: Of the cached states; None is beside the file of records, or in `model_dir`.
      adapter_rank: Of adapters.
      adapter_alpha: Adapters are multiplied by `adapter_alpha / adapter_rank`.
      block_size: Tokens that a device computes the loss of at a time; None chooses.
      eval_dataset: Evaluated every `eval_every` updates and at the end.
      eval_every: In updates.
      checkpoint_every: In updates; the end is always saved.
      log_every: In updates.
      keep_checkpoints: The newest ones that stay on disk.
      keep_every: In updates: those stay as well.
      keep_best: A metric, such as "eval/loss": the checkpoint where it is smallest stays as well.
      max_gradient_norm: A gradient whose norm is larger is scaled down to it.
      non_finite: What becomes of an update whose loss or gradient is not finite: "stop" ends the
        run, "skip" leaves the update out and counts it.
      spike_deviations: How far above the usual a loss is noted in `events.jsonl`, as in
        `run_health.Health`.
      watch: What else is shown and written; metrics always are.
      seed: Of the data order, dropout and a random initialisation.
      allow_changes: What may differ from the run that `model_dir` holds, by its names in
        `resume.COMPARED`; otherwise it is refused.

    Returns:
      The path of the last checkpoint.

    Raises:
      UsageError: A setting, the data or a checkpoint does not fit; `model_dir` holds another run,
        or another process is at work in it; or the loss is not finite.
    """
    _check_positive(
        TRAIN_STEPS=train_steps,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        eval_every=eval_every,
    )
    check_seed(seed)
    model_dir = os.fspath(epath.Path(model_dir).expanduser())  # for all that write to it
    pretrained.check_takes_checkpoints(epath.Path(model_dir), "MODEL_DIR")
    operative_config.check_folder(model_dir, "MODEL_DIR")
    resume.check_allowed(allow_changes)
    _check_best(keep_best, checkpoint_every, eval_every if eval_dataset else None)
    if states_dir is not None and original != "cached":
        raise UsageError(
            f"STATES_DIR is set, to {states_dir}, and ORIGINAL is {original!r}: states are kept "
            "with ORIGINAL='cached' alone."
        )

    objective = _with_removed(objective, dataset.removed_everywhere())
    trainer = load_original.make_trainer(
        model=model,
        initial_checkpoint_path=initial_checkpoint_path,
        objective=objective,
        optimizer=optimizer,
        batch_size=batch_size,
        num_microbatches=num_microbatches,
        mesh_shape=mesh_shape,
        original=original,
        adapter_rank=adapter_rank,
        adapter_alpha=adapter_alpha,
        block_size=block_size,
        max_gradient_norm=max_gradient_norm,
        non_finite=non_finite,
    )
    network, config = trainer.model, trainer.model.config

    def load(of: Dataset) -> list[feature_converters.Example]:
        pretrained.check_vocabulary(of.vocabulary, config, initial_checkpoint_path)
        loaded = of.load(task_feature_lengths)
        feature_converters.check_token_ids(loaded, config.vocab_size)
        return loaded

    def initial_params() -> PyTree:
        if initial_checkpoint_path is None:
            return network.init(seed)
        return pretrained.open_checkpoint(initial_checkpoint_path).restore(network.abstract_params)

    def start_params() -> PyTree:
        if start_checkpoint_path is None:
            return initial_params()
        return pretrained.open_checkpoint(start_checkpoint_path).restore(network.abstract_params)

    data = loop.Data.of(
        load(dataset),
        load(eval_dataset) if eval_dataset else [],
        batch_size=batch_size,
        task_feature_lengths=task_feature_lengths,
        seed=seed,
        pack=pack,
        feature_layout=network.network.feature_layout,
    )
    _check_marks(data.examples, objective, task_feature_lengths, config.vocab_size)
    _log_fill(data.batches)
    memory.check_batch(batch_size, task_feature_lengths["inputs"] + task_feature_lengths["targets"])
    watched = (watch or watching.Watch()).prepare(
        network,
        vocabulary=dataset.vocabulary,
        examples=data.eval_examples or data.examples,
        task_feature_lengths=task_feature_lengths,
        checkpoint_path=initial_checkpoint_path,
        model_dir=model_dir,
    )

    def bring(is_new: bool) -> tuple[load_original.Brought, PyTree | None]:
        return load_original.bring(
            trainer,
            initial_params,
            initial_checkpoint_path,
            is_new=is_new,
            start_params=start_params if start_checkpoint_path else None,
            examples=[*data.examples, *data.eval_examples],
            states_folder=states_dir
            or original_cache.default_folder(getattr(dataset, "files", None), model_dir),
            task_feature_lengths=task_feature_lengths,
            batch_size=batch_size,
            seed=seed,
        )

    adapters = None
    if original == "adapters_off":
        adapters = {"rank": adapter_rank, "alpha": adapter_alpha}
        if initial_checkpoint_path is not None:
            # The checkpoint itself: a model directory means another when it has a newer.
            adapters["beside"] = str(pretrained.find(initial_checkpoint_path))
    run = resume.describe(
        trainer,
        optimizer={
            **settings_json.describe(optimizer),
            "max_gradient_norm": max_gradient_norm,
        },
        data=data.describe(),
        vocabulary=dataset.vocabulary,
        adapters=adapters,
        batch_size=batch_size,
        task_feature_lengths=dict(task_feature_lengths),
        pack=pack,
        seed=seed,
    )
    resume.check_alike(
        run,
        eval_dataset=feature_converters.digest(data.eval_examples),
        train_steps=train_steps,
        eval_every=eval_every,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
    )
    with (
        holding.folder(model_dir, "MODEL_DIR"),
        memory.explained(
            trainer.memory_advice(),
            BATCH_SIZE=batch_size,
            NUM_MICROBATCHES=num_microbatches,
            TASK_FEATURE_LENGTHS=task_feature_lengths,
        ),
        run_checkpoints.Checkpoints(
            model_dir, keep=keep_checkpoints, keep_every=keep_every, keep_best=keep_best
        ) as saved,
    ):
        start = resume.begin(
            trainer,
            saved,
            run,
            bring,
            start_path=start_checkpoint_path or initial_checkpoint_path,
            read_start=start_params,
            allow_changes=allow_changes,
            model_dir=model_dir,
        )
        if objective.needs_original:
            _warn_about(objective, config, initial_checkpoint_path)
        operative_config.write(model_dir)
        files.write_json(f"{model_dir}/run.json", run)
        pretrained.describe(model_dir, config, dataset.vocabulary, initial_checkpoint_path)
        console.log(
            f"Training on {len(data.examples)} examples from update {start.step} to {train_steps}, "
            f"{batch_size} rows at a time, on {jax.device_count()} {jax.default_backend()} "
            "device(s)."
        )
        with (
            metric_writers.open_all(
                model_dir,
                start=start.step,
                config=run,
                wandb_project=watched.settings.wandb_project,
            ) as metrics,
            metric_writers.StepLines(f"{model_dir}/events.jsonl", last_step=start.step) as events,
            preemption.deferred(_stop_of_all()) as is_due,
        ):
            outcome = loop.Loop(
                trainer=trainer,
                original=start.original,
                data=data,
                every=loop.Every(checkpoint=checkpoint_every, log=log_every, evaluation=eval_every),
                saved=saved,
                run=run,
                metrics=metrics,
                events=events,
                spike_deviations=spike_deviations,
                before=start.before,
                watched=watched,
                starts_from_original=initial_checkpoint_path is not None
                and start_checkpoint_path is None,
                model_dir=model_dir,
                seed=seed,
            ).go(start.state, start.step, train_steps, is_due)
        if start.step >= train_steps:
            console.log(f"Nothing to do: {model_dir} is at update {start.step} of {train_steps}.")
        best = saved.best_step() if keep_best is not None else None
        if best is not None:
            console.log(f"{keep_best} is smallest at {model_dir}/checkpoint_{best}.")
    last = str(pretrained.find(model_dir))
    console.log(f"{outcome}The model is in {last}.{_next(model_dir)}")
    return last


def _stop_of_all() -> Callable[[int], bool] | None:
    """What `preemption.deferred` asks; one host may be told to stop, and all have to save."""
    return multihost_utils.reached_preemption_sync_point if processes.count() > 1 else None


def _next(model_dir: str) -> str:
    """What to run after this, unless it is a stage of something that knows."""
    if stages.is_running():
        return ""
    return (
        " What does it say now? python -m tnt_jax.generate --gin_file=models/from_checkpoint.gin "
        f"--gin_file=runs/generate.gin --gin.CHECKPOINT_PATH={shlex.quote(model_dir)} "
        "--gin.PROMPTS=prompts.jsonl --gin.OUTPUT=outputs.jsonl"
    )


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}.")


def _check_best(keep_best: str | None, checkpoint_every: int, eval_every: int | None) -> None:
    """A metric must be there whenever a checkpoint is written."""
    if keep_best is None:
        return
    is_eval = keep_best.startswith("eval/")
    if keep_best.removeprefix("eval/") not in train_step.MEAN_OVER:
        names = ", ".join(train_step.MEAN_OVER)
        raise UsageError(
            f"KEEP_BEST: expected one of {names}, of the evaluation with eval/ before it; found "
            f"{keep_best!r}."
        )
    if is_eval and (eval_every is None or checkpoint_every % eval_every):
        found = "no EVAL_DATASET" if eval_every is None else f"{checkpoint_every} and {eval_every}"
        raise UsageError(
            f"KEEP_BEST={keep_best!r} needs an evaluation before each checkpoint: an EVAL_DATASET, "
            f"and a CHECKPOINT_EVERY that is a multiple of EVAL_EVERY; found {found}."
        )


def _check_marks(
    examples: Sequence[feature_converters.Example],
    objective: objectives.TntObjective,
    task_feature_lengths: Mapping[str, int],
    num_embeddings: int,
) -> None:
    """There must be something to remove, and something to keep."""
    if objective.negative_term == "none":
        return
    num_marked = sum(bool(len(example.negative_pairs)) for example in examples)
    lost = feature_converters.count_lost(examples, task_feature_lengths)
    num_marks = sum(len(example.negative_pairs) for example in examples)
    if num_marks == lost.num_marks and not objective.removed_everywhere:
        raise UsageError(
            f"negative_term={objective.negative_term!r} needs marked tokens, but none of the "
            f"{len(examples)} examples has one within TASK_FEATURE_LENGTHS. Annotate them "
            "(python -m tnt_jax.annotate), or use objectives/fine_tune.gin."
        )
    if objective.removed_everywhere and max(objective.removed_everywhere) >= num_embeddings:
        raise UsageError(
            f"removed_everywhere has id {max(objective.removed_everywhere)}, but the model has "
            f"{num_embeddings} embeddings. Expected ids of its own vocabulary."
        )
    if feature_converters.are_all_covered(examples, task_feature_lengths):
        raise UsageError(
            f"negative spans cover all text of all {len(examples)} examples (within "
            "TASK_FEATURE_LENGTHS and LOSS_UNTIL), so that nothing holds the model to its "
            "original: expected some text that may stay. Mark the unwanted words alone, and leave "
            "clean outputs in the file."
        )
    console.log(
        f"{num_marked} of {len(examples)} examples have marks: {num_marks} ids to remove, of which "
        f"{lost.num_marks} lie beyond TASK_FEATURE_LENGTHS and are not learned from."
    )


def _with_removed(
    objective: objectives.TntObjective, ids: Sequence[int]
) -> objectives.TntObjective:
    """With what the annotator of the data removes at every position."""
    if not ids or objective.negative_term == "none":
        return objective
    console.log(f"{len(ids)} ids are removed at every position, as the records' annotator has it.")
    both = {*objective.removed_everywhere, *ids}
    return dataclasses.replace(objective, removed_everywhere=tuple(sorted(both)))


def _log_fill(batches: feature_converters.Batches) -> None:
    fill = batches.fill()
    how = f"Packed, {fill.examples_per_row:.1f} examples a row" if batches.pack else "Not packed"
    console.log(
        f"{how}: padding is {fill.input_padding:.0%} of the inputs' and {fill.target_padding:.0%} "
        f"of the targets' positions. An epoch takes {fill.num_rows / batches.batch_size:.1f} "
        "updates."
    )


def _warn_about(
    objective: objectives.TntObjective, model: NetworkConfig, initial_checkpoint_path: str | None
) -> None:
    if initial_checkpoint_path is None:
        console.log(
            "Warning: INITIAL_CHECKPOINT_PATH is None, so the original is a random model: there is "
            f"no behaviour to keep, although {objective.positive_term!r} compares with it."
        )
    if model.dropout_rate:
        console.log(
            f"Warning: DROPOUT_RATE is {model.dropout_rate}. The original runs without dropout, so "
            "a model that has not changed already has a loss; 0 is the default for divergences."
        )


if __name__ == "__main__":
    program.run("tnt_jax.train", "train", processes_run=processes.Kind.TOGETHER)
