r"""Trains a T5 on annotated records: Targeted Negative Training, its baselines, or fine-tuning.

The parameters come from, in this order:

1. the newest checkpoint in MODEL_DIR, if there is one: the run goes on where it stopped;
2. INITIAL_CHECKPOINT_PATH, a checkpoint or a model directory of this tool;
3. a random initialisation from the seed, if INITIAL_CHECKPOINT_PATH is None.

The original, which the objectives compare with, always comes from 2 or 3, also when a run goes on:
it is never the half-trained model of MODEL_DIR. Its digest is in every checkpoint, and checked. A
further round, which starts from a model that was patched already, names that one in
START_CHECKPOINT_PATH.

Example:
    python -m tnt_jax.train --gin_file=models/t5_1_1_base.gin --gin_file=objectives/tnrf.gin \
      --gin_file=runs/train.gin --gin.RECORDS=annotated.jsonl --gin.VOCABULARY_PATH=spiece.model \
      --gin.INITIAL_CHECKPOINT_PATH=original/checkpoint_1000 --gin.MODEL_DIR=patched \
      --gin.TRAIN_STEPS=200
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import optax
from etils import epath

from tnt_jax import (
    assembly,
    checkpoints,
    feature_converters,
    memory,
    objectives,
    original_setup,
    original_states,
    pretrained,
    program,
    run_config,
    run_log,
    sharding,
    t5,
    train_step,
    training_loop,
)
from tnt_jax.array_types import PyTree
from tnt_jax.errors import UsageError


@runtime_checkable
class Dataset(Protocol):
    """A source of examples: `tasks.RecordFiles`, `tasks.SeqioDataset`, or your own."""

    @property
    def vocabulary(self) -> Any:
        """The seqio vocabulary of its ids."""
        ...

    def load(self, task_feature_lengths: Mapping[str, int]) -> list[feature_converters.Example]:
        """All examples, tokenised and marked."""
        ...


def train(
    *,
    model_dir: str,
    model: t5.T5Config | pretrained.FromCheckpoint,
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
    seed: int = 0,
) -> str:
    """Trains, writing checkpoints, `metrics.jsonl` and the operative config into `model_dir`.

    Args:
      model_dir: Where everything goes; a run that was stopped goes on from there.
      model: The network's settings, or that they are the initial checkpoint's.
      objective: The loss per token.
      dataset: Annotated examples.
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
      seed: Of the data order, dropout and a random initialisation.

    Returns:
      The path of the last checkpoint.

    Raises:
      UsageError: A setting, the data or a checkpoint does not fit; or the loss is not finite.
    """
    _check_positive(
        TRAIN_STEPS=train_steps,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        eval_every=eval_every,
    )
    assembly.check_seed(seed)
    pretrained.check_takes_checkpoints(epath.Path(model_dir).expanduser(), "MODEL_DIR")
    if states_dir is not None and original != "cached":
        raise UsageError(
            f"STATES_DIR is set, to {states_dir}, and ORIGINAL is {original!r}: states are kept "
            "with ORIGINAL='cached' alone."
        )

    trainer = original_setup.make_trainer(
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
        return network.restore(initial_checkpoint_path)

    def start_params() -> PyTree:
        assert start_checkpoint_path is not None
        return network.restore(start_checkpoint_path)

    data = training_loop.Data.of(
        load(dataset),
        load(eval_dataset) if eval_dataset else [],
        batch_size=batch_size,
        task_feature_lengths=task_feature_lengths,
        seed=seed,
        pack=pack,
    )
    _check_marks(data.examples, objective, task_feature_lengths, config.vocab_size)
    _log_fill(data.batches)
    memory.check_batch(batch_size, task_feature_lengths["inputs"] + task_feature_lengths["targets"])

    with (
        memory.explained(
            memory.of_training(trainer),
            BATCH_SIZE=batch_size,
            NUM_MICROBATCHES=num_microbatches,
            TASK_FEATURE_LENGTHS=task_feature_lengths,
        ),
        checkpoints.Checkpoints(model_dir, keep=keep_checkpoints) as saved,
        run_log.MetricsWriter(model_dir) as metrics,
    ):
        run_config.write(model_dir)
        pretrained.describe(model_dir, config, dataset.vocabulary, initial_checkpoint_path)
        brought, params = original_setup.bring(
            trainer,
            initial_params,
            initial_checkpoint_path,
            is_new=saved.latest_step() is None,
            start_params=start_params if start_checkpoint_path else None,
            examples=[*data.examples, *data.eval_examples],
            states_folder=states_dir
            or original_states.default_folder(getattr(dataset, "files", None), model_dir),
            task_feature_lengths=task_feature_lengths,
            batch_size=batch_size,
            seed=seed,
        )
        if objective.needs_original:
            _warn_about(objective, config, initial_checkpoint_path)
        run = {
            "original": brought.identity,
            "objective": run_config.describe(objective),
            "model": run_config.describe(config),
            "data": data.describe(),
            "start": start_checkpoint_path or initial_checkpoint_path,
            "jax": jax.__version__,
        }
        if original == "adapters_off":
            run["adapters"] = {"rank": adapter_rank, "alpha": adapter_alpha}
            if initial_checkpoint_path is not None:
                # The checkpoint itself: a model directory means another when it has a newer.
                run["adapters"]["beside"] = str(pretrained.find(initial_checkpoint_path))
        start, state = _begin(trainer, params, saved, run, model_dir)
        run_log.log(
            f"Training on {len(data.examples)} examples from update {start} to {train_steps}, "
            f"{batch_size} rows at a time, on {jax.device_count()} {jax.default_backend()} "
            "device(s)."
        )
        training_loop.Loop(
            trainer=trainer,
            original=brought,
            data=data,
            every=training_loop.Every(
                checkpoint=checkpoint_every, log=log_every, evaluation=eval_every
            ),
            saved=saved,
            run=run,
            metrics=metrics,
            model_dir=model_dir,
            seed=seed,
        ).go(state, start, train_steps)
        if start >= train_steps:
            run_log.log(f"Nothing to do: {model_dir} is at update {start} of {train_steps}.")
    last = str(pretrained.find(model_dir))
    run_log.log(f"The model is in {last}.")
    return last


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, found {value}.")


def _begin(
    trainer: assembly.Trainer,
    params: PyTree | None,
    saved: checkpoints.Checkpoints,
    run: Mapping[str, Any],
    model_dir: str,
) -> tuple[int, train_step.TrainState]:
    """The state to go on from and its step: of new parameters, or of the newest checkpoint."""
    if params is not None:
        return 0, trainer.init_state(params)
    start = saved.latest_step()
    assert start is not None
    before = saved.run_of(start)
    _check_original(before["original"], run["original"], model_dir)
    _check_adapters(before.get("adapters"), run.get("adapters"), model_dir)
    run_log.log(f"Going on from checkpoint {start} in {model_dir}.")
    return start, saved.restore(start, trainer.abstract_state)


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
    run_log.log(
        f"{num_marked} of {len(examples)} examples have marks: {num_marks} ids to remove, of which "
        f"{lost.num_marks} lie beyond TASK_FEATURE_LENGTHS and are not learned from."
    )


def _log_fill(batches: feature_converters.Batches) -> None:
    fill = batches.fill()
    how = f"Packed, {fill.examples_per_row:.1f} examples a row" if batches.pack else "Not packed"
    run_log.log(
        f"{how}: padding is {fill.input_padding:.0%} of the inputs' and {fill.target_padding:.0%} "
        f"of the targets' positions. An epoch takes {fill.num_rows / batches.batch_size:.1f} "
        "updates."
    )


def _warn_about(
    objective: objectives.TntObjective, model: t5.T5Config, initial_checkpoint_path: str | None
) -> None:
    if initial_checkpoint_path is None:
        run_log.log(
            "Warning: INITIAL_CHECKPOINT_PATH is None, so the original is a random model: there is "
            f"no behaviour to keep, although {objective.positive_term!r} compares with it."
        )
    if model.dropout_rate:
        run_log.log(
            f"Warning: DROPOUT_RATE is {model.dropout_rate}. The original runs without dropout, so "
            "a model that has not changed already has a loss; 0 is the default for divergences."
        )


def _check_original(
    saved: Mapping[str, Any] | None, found: Mapping[str, Any] | None, model_dir: str
) -> None:
    """A run must go on with the original that it began with."""
    if (saved or {}).get("digest") == (found or {}).get("digest"):
        return
    raise UsageError(
        f"MODEL_DIR {model_dir} holds a run whose original was {_describe_original(saved)}; now it "
        f"is {_describe_original(found)}. Pass the same INITIAL_CHECKPOINT_PATH, objective and "
        "seed, or another MODEL_DIR."
    )


def _check_adapters(
    saved: Mapping[str, Any] | None, found: Mapping[str, Any] | None, model_dir: str
) -> None:
    """What adapters have learned is multiplied by their settings."""
    saved, found = (of and {name: of[name] for name in ("rank", "alpha")} for of in (saved, found))
    if saved != found:
        raise UsageError(
            f"MODEL_DIR {model_dir} holds a run whose adapters were {saved or 'none'}; now they "
            f"are {found or 'none'}. Pass the same ORIGINAL, ADAPTER_RANK and ADAPTER_ALPHA, or "
            "another MODEL_DIR."
        )


def _describe_original(original: Mapping[str, Any] | None) -> str:
    if original is None:
        return "none (an objective without divergences)"
    return f"{original['path'] or 'a random initialisation'} (digest {original['digest']})"


if __name__ == "__main__":
    program.run("tnt_jax.train", "train")
