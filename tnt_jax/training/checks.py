"""What a run needs of its settings and examples together, checked before it begins."""

from collections.abc import Mapping, Sequence

from tnt_jax import objectives
from tnt_jax.data.examples import Example, count_graded, num_marks_of
from tnt_jax.data.layouts import are_all_covered, count_lost
from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings, train_step
from tnt_jax.training.trainer import Trainer


def check_schedule(
    keep: settings.Keep, schedule: settings.Schedule, trainer: Trainer, *, has_evaluation: bool
) -> None:
    """Raises a UsageError where evaluations and checkpoints do not go together.

    Args:
      keep: Which checkpoints are kept.
      schedule: How often the run evaluates and saves.
      trainer: The run's trainer.
      has_evaluation: Whether there are examples to evaluate.
    """
    if keep.every is not None and keep.every % schedule.checkpoint_every:
        raise UsageError(
            f"KEEP_EVERY: expected a multiple of CHECKPOINT_EVERY, which is "
            f"{schedule.checkpoint_every}, found {keep.every}: no checkpoint is written after "
            f"{keep.every} updates."
        )
    if schedule.eval_every != settings.EVAL_EVERY and not has_evaluation:
        raise UsageError(
            f"EVAL_EVERY is set, to {schedule.eval_every}, and EVAL_DATASET is None. Set "
            "EVAL_DATASET, too, or leave it out."
        )
    check_best_is_measured(keep, schedule, trainer, has_evaluation=has_evaluation)


def check_best_is_measured(
    keep: settings.Keep, schedule: settings.Schedule, trainer: Trainer, *, has_evaluation: bool
) -> None:
    """Raises a UsageError unless KEEP_BEST is measured whenever a checkpoint is written.

    The arguments are those of `check_schedule`.
    """
    if keep.best is None:
        return
    name = keep.best.removeprefix("eval/")
    is_training, objective = name == keep.best, trainer.objective
    names = trainer.measured(is_training=is_training)
    if name not in names:
        known = ", ".join(names if is_training else [f"eval/{each}" for each in names])
        raise UsageError(
            f"KEEP_BEST: expected what a run with negative_term={objective.negative_term!r}, "
            f"positive_term={objective.positive_term!r} and "
            f"ORIGINAL={trainer.original_kind.name!r} measures, one of {known}; found "
            f"{keep.best!r}."
        )
    if is_training or (has_evaluation and schedule.checkpoint_every % schedule.eval_every == 0):
        return
    found = f"{schedule.checkpoint_every} and {schedule.eval_every}"
    raise UsageError(
        f"KEEP_BEST={keep.best!r} needs an evaluation before each checkpoint: an EVAL_DATASET, and "
        "a CHECKPOINT_EVERY that is a multiple of EVAL_EVERY; found "
        f"{found if has_evaluation else 'no EVAL_DATASET'}."
    )


def check_best_has_marks(
    keep: settings.Keep,
    eval_examples: Sequence[Example],
    objective: objectives.TntObjective,
    task_feature_lengths: Mapping[str, int],
) -> None:
    """Raises a UsageError where KEEP_BEST is a mean over marks, and the evaluation has none.

    Args:
      keep: Which checkpoints are kept.
      eval_examples: The examples to evaluate.
      objective: The run's objective: what it removes everywhere needs no mark.
      task_feature_lengths: Tokens of "inputs" and "targets"; a mark beyond them is cut off.
    """
    best = keep.best or ""
    name = best.removeprefix("eval/")
    if name == best or train_step.MEAN_OVER[name] != "num_negative":
        return
    lost = count_lost(eval_examples, task_feature_lengths).num_marks
    if not objective.removed_everywhere and num_marks_of(eval_examples).sum() == lost:
        raise UsageError(
            f"KEEP_BEST={best!r} is a mean over marked tokens: expected marks in EVAL_DATASET, "
            f"found none in its {len(eval_examples)} examples within TASK_FEATURE_LENGTHS. "
            "Annotate them, or set KEEP_BEST='eval/loss'."
        )


def check_marks(
    examples: Sequence[Example],
    trainer: Trainer,
    task_feature_lengths: Mapping[str, int],
) -> None:
    """Raises a UsageError unless there is something to remove, and something to keep."""
    objective, num_embeddings = trainer.objective, trainer.model.config.vocab_size
    if objective.negative_term == "none":
        return
    marks_of_each = num_marks_of(examples)
    num_marked, num_marks = int((marks_of_each > 0).sum()), int(marks_of_each.sum())
    cut = count_lost(examples, task_feature_lengths)
    if num_marks == cut.num_marks and not objective.removed_everywhere:
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
    # Without a loss elsewhere (UNDIAL and FTPO as published) nothing holds it there anyway.
    has_rest = objective.positive_term != "none"
    if has_rest and are_all_covered(examples, task_feature_lengths):
        raise UsageError(
            f"negative spans cover all text of all {len(examples)} examples (within "
            "TASK_FEATURE_LENGTHS and LOSS_UNTIL), so that nothing holds the model to its "
            "original: expected some text that may stay. Mark the unwanted words alone, and leave "
            "clean outputs in the file."
        )
    num_graded = count_graded(examples)
    graded = f" {num_graded} of them have a strength below 1." if num_graded else ""
    console.log(
        f"{num_marked} of {len(examples)} examples have marks: {num_marks} ids to remove, of which "
        f"{cut.num_marks} lie beyond TASK_FEATURE_LENGTHS and are not learned from.{graded}"
    )
