"""What settings of a run are refused before it begins."""

import re

import numpy as np
import optax
import pytest
from helpers.tiny_llama import LLAMA

from tnt_jax import objectives
from tnt_jax.data.examples import Example
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import checks, settings
from tnt_jax.training.trainer import make_trainer


def trainer_of(objective, kind="parameters"):
    return make_trainer(
        config=LLAMA,
        objective=objective,
        original_choice=settings.OriginalChoice(path=None, kind=kind),
        update=settings.Update(
            batch_size=8, task_feature_lengths={"inputs": 8, "targets": 8}, optimizer=optax.sgd(1.0)
        ),
    )


def check(best, objective, kind="parameters"):
    """Keeps the best by a metric, with an evaluation before each checkpoint."""
    trainer = trainer_of(objective, kind)
    schedule = settings.Schedule(train_steps=2, checkpoint_every=1, eval_every=1)
    checks.check_best_is_measured(settings.Keep(best=best), schedule, trainer, has_evaluation=True)


@pytest.mark.parametrize(("name", "is_refused"), [("TNFF", True), ("FTPO", False)])
def test_marks_on_all_text_are_a_mistake_only_where_something_holds_the_rest(name, is_refused):
    """FTPO and UNDIAL as published have no loss elsewhere."""
    example = Example(
        inputs=np.array([2, 1], np.int32),
        targets=np.array([3, 4, 1], np.int32),
        negative_pairs=np.array([[0, 3], [1, 4]], np.int32),
        span_numbers=np.array([1, 1, -1], np.int32),
    )
    lengths = {"inputs": 8, "targets": 8}
    trainer = trainer_of(objectives.named(name))
    if is_refused:
        with pytest.raises(UsageError, match=r"^negative spans cover all text of all 1 examples"):
            checks.check_marks([example], trainer, lengths)
    else:
        checks.check_marks([example], trainer, lengths)


ULLL, KL, TNFF = map(objectives.named, ("UL+LL", "KL", "TNFF"))
DISTILLED = objectives.named(
    "TNFF", removed_everywhere=(3,), removed_everywhere_counts_as="negative"
)


@pytest.mark.parametrize(
    ("best", "objective", "kind"),
    [
        ("eval/positive_kl", ULLL, "parameters"),
        ("positive_kl", ULLL, "adapters_off"),  # evaluations alone measure it
        ("eval/positive_kl", ULLL, "adapters_cached"),
        ("eval/negative_mass", KL, "parameters"),
        ("negative_residual", KL, "parameters"),
        ("eval/gradient_norm", TNFF, "parameters"),
        ("eval/positive_loss", DISTILLED, "parameters"),
    ],
)
def test_the_best_by_what_a_run_never_measures(best, objective, kind):
    with pytest.raises(UsageError, match=r"^KEEP_BEST: expected what a run with .* measures, "):
        check(best, objective, kind)


@pytest.mark.parametrize(
    ("best", "objective", "kind"),
    [
        ("eval/positive_kl", TNFF, "parameters"),
        ("eval/positive_kl", ULLL, "adapters_off"),
        ("positive_kl", KL, "cached"),
        ("negative_mass", ULLL, "parameters"),
        ("gradient_norm", TNFF, "parameters"),
        ("eval/negative_loss", DISTILLED, "parameters"),
    ],
)
def test_the_best_by_what_a_run_measures(best, objective, kind):
    check(best, objective, kind)


def test_what_could_be_measured_is_listed():
    expected = (
        "KEEP_BEST: expected what a run with negative_term='unlikelihood', "
        "positive_term='log_likelihood' and ORIGINAL='parameters' measures, one of eval/loss, "
        "eval/negative_loss, eval/positive_loss, eval/negative_mass; found 'eval/positive_kl'."
    )
    with pytest.raises(UsageError) as error:
        check("eval/positive_kl", ULLL)
    assert str(error.value) == expected


MARKED, CLEAN = (
    Example(np.array([7]), np.array([5, 6, 4]), np.array(pairs).reshape(-1, 2))
    for pairs in ([(2, 4)], [])
)


@pytest.mark.parametrize(
    ("best", "example", "length", "objective", "is_refused"),
    [
        ("eval/negative_mass", CLEAN, 8, TNFF, True),
        ("eval/negative_loss", CLEAN, 8, TNFF, True),
        ("eval/negative_mass", MARKED, 2, TNFF, True),  # the mark is cut off
        ("eval/negative_mass", MARKED, 3, TNFF, False),
        ("eval/loss", CLEAN, 8, TNFF, False),
        ("eval/negative_mass", CLEAN, 8, DISTILLED, False),
        ("negative_mass", CLEAN, 8, TNFF, False),  # of the training's examples
        (None, CLEAN, 8, TNFF, False),
    ],
)
def test_the_best_by_marks_that_the_evaluation_lacks(best, example, length, objective, is_refused):
    keep = settings.Keep(best=best)
    given = [CLEAN, example], objective, {"inputs": 8, "targets": length}
    if not is_refused:
        checks.check_best_has_marks(keep, *given)
        return
    message = (
        f"KEEP_BEST={best!r} is a mean over marked tokens: expected marks in EVAL_DATASET, found "
        "none in its 2 examples within TASK_FEATURE_LENGTHS. Annotate them, or set "
        "KEEP_BEST='eval/loss'."
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        checks.check_best_has_marks(keep, *given)
