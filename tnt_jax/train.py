r"""Trains a model on annotated records: Targeted Negative Training, its baselines, or fine-tuning.

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

import contextlib
import dataclasses
import functools
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from etils import epath

from tnt_jax import objectives
from tnt_jax.checkpoints import checkpoint_kinds, pretrained
from tnt_jax.data import datasets, negative_sets
from tnt_jax.data.batches import Batches
from tnt_jax.data.examples import (
    Example,
    check_ids_are_left,
    check_token_ids,
    digest,
)
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime import (
    console,
    files,
    holding,
    memory,
    operative_config,
    processes,
    program,
    settings_json,
    stages,
)
from tnt_jax.training import (
    checks,
    load_original,
    loop,
    original_cache,
    resume,
    run_checkpoints,
    settings,
)
from tnt_jax.training.trainer import Trainer, make_trainer
from tnt_jax.watching import watching


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

    def load(self, task_feature_lengths: Mapping[str, int]) -> Sequence[Example]:
        """All examples, tokenised and marked: a list, or an `examples.ExampleTable`."""
        ...


def train(
    *,
    model_dir: str,
    model: NetworkConfig | pretrained.FromCheckpoint,
    objective: objectives.TntObjective,
    dataset: Dataset,
    original_choice: settings.OriginalChoice,
    update: settings.Update,
    schedule: settings.Schedule,
    keep: settings.Keep | None = None,
    eval_dataset: Dataset | None = None,
    watch: watching.Watch | None = None,
) -> str:
    """Trains, writing checkpoints, `metrics.jsonl` and the operative config into `model_dir`.

    Args:
      model_dir: Where everything goes; a run that was stopped goes on from there.
      model: The network's settings, or that they are the initial checkpoint's.
      objective: The loss per token.
      dataset: Annotated examples. What they remove everywhere is added to the objective's.
      original_choice: Which model is the original, and where its logits come from.
      update: How an update is computed.
      schedule: Where training starts, how long it goes on; how often it logs, evaluates and saves.
      keep: Which checkpoints stay on disk, and what may differ from the run that left them.
      eval_dataset: Examples that are evaluated, and not trained on.
      watch: What else is shown and written; metrics always are.

    Returns:
      The path of the last checkpoint.

    Raises:
      UsageError: A setting, the data or a checkpoint does not fit; `model_dir` holds another run,
        or another process is at work in it; or the loss is not finite.
    """
    # ------------------------------------------------------------------------------ The settings
    keep, watch = keep or settings.Keep(), watch or watching.Watch()
    model_dir = os.fspath(epath.Path(model_dir).expanduser())  # for all that write to it
    checkpoint_kinds.check_takes_checkpoints(epath.Path(model_dir), "MODEL_DIR")
    operative_config.check_folder(model_dir, "MODEL_DIR")
    resume.check_allowed(keep.allow_changes)

    # ------------------------------------------------------------------------------- The network
    objective = _with_removed(objective, dataset.removed_everywhere())
    path = original_choice.path
    source = None if path is None else pretrained.open_checkpoint(path)
    config = pretrained.config_of(model, source)
    trainer = make_trainer(
        config=config, objective=objective, original_choice=original_choice, update=update
    )
    checks.check_schedule(keep, schedule, trainer, has_evaluation=eval_dataset is not None)
    sources = load_original.Sources(trainer.model, source, original_choice, schedule)
    _ = trainer.abstract_state  # refuses what does not go together before data are read
    states_folder = _states_folder(trainer, original_choice, dataset, model_dir)

    # ---------------------------------------------------------------------------------- The data
    examples, eval_examples = (
        _read_examples(each, update.task_feature_lengths, sources, model_dir, trainer.objective)
        for each in (dataset, eval_dataset)
    )
    data = loop.make_data(examples, eval_examples, update, schedule.seed, trainer.model)
    trainer = trainer.with_sets(data.sets.ids)
    checks.check_marks(examples, trainer, update.task_feature_lengths)
    checks.check_best_has_marks(keep, eval_examples, objective, update.task_feature_lengths)
    _log_padding(data.batches)
    data.check_fits(update)

    # ---------------------------------------------------- What is done on the way, and what it is
    watch_hooks = watch.make_hooks(
        trainer.model,
        vocabulary=dataset.vocabulary,
        examples=eval_examples or examples,
        task_feature_lengths=update.task_feature_lengths,
        source=source,
        model_dir=model_dir,
    )
    run = _describe_run(trainer, dataset, data, sources, update, keep, watch.describe(watch_hooks))

    # ------------------------------------------------------------------------------- The updates
    with (
        holding.folder(model_dir, "MODEL_DIR"),
        _memory_explained(trainer, update, data.num_negative_ids),
        run_checkpoints.Checkpoints(model_dir, keep) as saved,
    ):
        load = functools.partial(
            load_original.load,
            trainer,
            sources,
            update,
            data=(examples, eval_examples),
            states_folder=states_folder,
            keeps_whole=bool(watch_hooks),
        )
        start = resume.begin(trainer, saved, run, load, sources, keep.allow_changes, model_dir)
        _warn_about(trainer, path)
        operative_config.write(model_dir)
        files.write_json(f"{model_dir}/run.json", run)
        pretrained.describe(model_dir, config, dataset.vocabulary, source, is_new=not start.before)
        console.log(
            f"Training on {len(examples)} examples from update {start.step} to "
            f"{schedule.train_steps}, {update.batch_size} rows at a time, on {jax.device_count()} "
            f"{jax.default_backend()} device(s). The first update takes longest: it is compiled."
        )
        outcome = loop.Loop(
            trainer=trainer,
            loaded_original=start.loaded_original,
            sources=sources,
            data=data,
            schedule=schedule,
            watch=watch,
            watch_hooks=watch_hooks,
            saved=saved,
            run=run,
            before=start.before,
            model_dir=model_dir,
        ).go(start.state, start.step)
        _log_nothing_or_best(start.step, schedule, saved, keep, model_dir)
    last = str(checkpoint_kinds.find(model_dir))
    console.log(f"{outcome}The model is in {last}.{_next(model_dir)}")
    return last


def _states_folder(
    trainer: Trainer, choice: settings.OriginalChoice, dataset: Dataset, model_dir: str
) -> str:
    """Where the original's states are kept; a UsageError where they would be and cannot be."""
    folder = choice.states_folder(getattr(dataset, "files", None), model_dir)
    if trainer.state_features:
        original_cache.check_folder(folder)
    return folder


def _read_examples(
    dataset: Dataset | None,
    task_feature_lengths: Mapping[str, int],
    sources: load_original.Sources,
    model_dir: str,
    objective: objectives.TntObjective,
) -> Sequence[Example]:
    """All examples of a data set, whose ids are those of the network; none where there is none."""
    if dataset is None:
        return ()
    config = sources.model.config
    pretrained.check_vocabulary(dataset.vocabulary, config, sources.original_source)
    if isinstance(dataset, datasets.RecordFiles):  # your own `load` knows of no folder
        examples = dataset.load(task_feature_lengths, model_dir)
    else:
        examples = dataset.load(task_feature_lengths)
    check_token_ids(examples, config.vocab_size)
    check_ids_are_left(examples, objective.removed_everywhere, dataset.vocabulary.size)
    return examples


def _describe_run(
    trainer: Trainer,
    dataset: Dataset,
    data: loop.Data,
    sources: load_original.Sources,
    update: settings.Update,
    keep: settings.Keep,
    watched: Mapping[str, Any],
) -> dict[str, Any]:
    """What each checkpoint says of the run. All processes must have it and the rest alike."""
    schedule, choice = sources.schedule, sources.choice
    part: dict[str, dict[str, Any]] = {}
    if not trainer.original_kind.is_apart:
        of_part: dict[str, Any] = {"layers": choice.trained_layers}
        if sources.original_source is not None:
            # The checkpoint itself: a model directory would later be its newer checkpoint.
            of_part["beside"] = str(sources.original_source.path)
        if choice.has_adapters:
            part = {"adapters": {"rank": choice.adapter_rank, "alpha": choice.adapter_alpha}}
            part["adapters"] |= of_part
        else:
            part = {"upper_layers": of_part}
    run = resume.describe(
        trainer,
        update=update,
        seed=schedule.seed,
        data=data.describe(),
        vocabulary=dataset.vocabulary,
        part=part,
    )
    resume.check_alike(
        run,
        eval_dataset=digest(data.eval_examples),
        train_steps=schedule.train_steps,
        eval_every=schedule.eval_every,
        checkpoint_every=schedule.checkpoint_every,
        log_every=schedule.log_every,
        non_finite=update.non_finite,
        keep=settings_json.describe(keep),
        **watched,
    )
    return run


def _memory_explained(
    trainer: Trainer, update: settings.Update, num_negative_ids: int
) -> contextlib.AbstractContextManager[None]:
    """Says what would help where memory runs out."""
    tries = trainer.memory_advice()
    if num_negative_ids > negative_sets.LEAST:  # what is shared counts as one
        tries.append(f"fewer ids marked at one position (one has {num_negative_ids})")
    return memory.explained(
        tries,
        BATCH_SIZE=update.batch_size,
        NUM_MICROBATCHES=update.num_microbatches,
        TASK_FEATURE_LENGTHS=update.task_feature_lengths,
    )


def _log_nothing_or_best(
    start: int,
    schedule: settings.Schedule,
    saved: run_checkpoints.Checkpoints,
    keep: settings.Keep,
    model_dir: str,
) -> None:
    """Says that there was nothing to do, and which checkpoint is best."""
    if start >= schedule.train_steps:
        console.log(f"Nothing to do: {model_dir} is at update {start} of {schedule.train_steps}.")
    best = saved.best_step() if keep.best is not None else None
    if best is not None:
        console.log(f"{keep.best} is smallest at {model_dir}/checkpoint_{best}.")


def _next(model_dir: str) -> str:
    """What to run after this, unless it is a stage of something that knows."""
    if stages.is_running():
        return ""
    return (
        " What does it say now? python -m tnt_jax.generate --gin_file=models/from_checkpoint.gin "
        f"--gin_file=runs/generate.gin --gin.CHECKPOINT_PATH={shlex.quote(model_dir)} "
        "--gin.PROMPTS=prompts.jsonl --gin.OUTPUT=outputs.jsonl"
    )


def _with_removed(
    objective: objectives.TntObjective, ids: Sequence[int]
) -> objectives.TntObjective:
    """The objective, with the ids that the data's annotator removes at every position."""
    if not ids or objective.negative_term == "none":
        return objective
    console.log(f"{len(ids)} ids are removed at every position, as the records' annotator has it.")
    both = {*objective.removed_everywhere, *ids}
    return dataclasses.replace(objective, removed_everywhere=tuple(sorted(both)))


def _log_padding(batches: Batches) -> None:
    found = batches.padding()
    how = f"Packed, {found.examples_per_row:.1f} examples a row" if batches.pack else "Not packed"
    console.log(
        f"{how}: padding is {found.input_padding:.0%} of the inputs' and "
        f"{found.target_padding:.0%} of the targets' positions. An epoch takes "
        f"{found.num_rows / batches.batch_size:.1f} updates."
    )
    if batches.num_shared:
        console.log(
            f"All prompts begin with the same {batches.num_shared} tokens: without dropout, a "
            "device computes these once for all of its rows."
        )


def _warn_about(trainer: Trainer, original_path: str | None) -> None:
    if not trainer.objective.needs_original:
        return
    if original_path is None:
        console.log(
            "Warning: INITIAL_CHECKPOINT_PATH is None, so the original is a random model: there is "
            f"no behaviour to keep, although {trainer.objective.positive_term!r} compares with it."
        )
    dropout_rate = trainer.model.config.dropout_rate
    if dropout_rate:
        console.log(
            f"Warning: DROPOUT_RATE is {dropout_rate}. The original runs without dropout, so "
            "a model that has not changed already has a loss; 0 is the default for divergences."
        )


if __name__ == "__main__":
    program.run("tnt_jax.train", "train", processes_run=processes.Kind.TOGETHER)
