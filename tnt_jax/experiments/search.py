"""The smallest update that fulfils a wish: weights one after another, each looked at on its way.

At each weight a run starts from the original and goes on in legs. After each leg the model answers
the choice prompts, which it is not trained on. The first look whose cut is enough ends the search.
A run that ends without it, or whose cut no longer rises, is followed by one with a larger weight,
again from the original: so one weight and one number of updates say what the result is.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.evaluation import results
from tnt_jax.experiments.experiment import Arm, Changes, Opened
from tnt_jax.runtime import stages

FOLDER = "looks"
TIME_IS_OVER = "the time was over"
_NO_MORE = 6  # looks without a larger cut, an epoch and a half, after which a run is over


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is looked for, and how far.

    Attributes:
      enough: The cut on the choice prompts that ends the search.
      weights: Of the negative term, one run for each, in this order.
      updates: After how many there is a look, in each run.
      prompts: The file of choice prompts.
      deadline: On the clock of `time.monotonic`: no leg begins that would probably end later.
    """

    enough: float
    weights: Sequence[float]
    updates: Sequence[int]
    prompts: str
    deadline: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """What a run had come to.

    Attributes:
      weight: Of the negative term.
      updates: So far.
      cut: Share of the original's unwanted outputs that was gone, with the decoder where it was
        least.
      unwanted: Unwanted outputs on the choice prompts, by decoder.
    """

    weight: float
    updates: int
    cut: float
    unwanted: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
      best: The look that is taken: the first that is enough, or the one with the largest cut.
      is_enough: Whether it is.
      looks: All, in their order.
      reason: Why the search ended.
    """

    best: Look
    is_enough: bool
    looks: Sequence[Look]
    reason: str


def read_found(value: Mapping[str, Any]) -> Found:
    """What a search came to, from JSON as `dataclasses.asdict` makes it."""
    looks = [Look(**look) for look in value["looks"]]
    return Found(**{**value, "looks": looks, "best": Look(**value["best"])})


def unwanted_in(file: str) -> int:
    """How many outputs of an annotated file have something unwanted."""
    return sum(bool(row.negative_spans) for row in records.iterate(file))


def original_unwanted(opened: Opened, prompts: str) -> dict[str, int]:
    """The original's unwanted outputs on prompts, by decoder, that cuts are shares of."""
    return {
        decoder: unwanted_in(opened.outputs_of("choice", opened.original, prompts, decoder))
        for decoder in opened.settings.decoders
    }


def search(
    opened: Opened,
    arm: Arm,
    plan: Plan,
    before: dict[str, int],
    told: Callable[[Look], Any] = lambda look: None,
) -> Found:
    """Runs until a look is enough.

    What was done before is kept: looks, by what they are made of. A leg that was stopped goes on.

    Args:
      opened: The experiment; its folder is held.
      arm: To train; its weight is that of the run.
      plan: What is looked for.
      before: The original's unwanted outputs on the choice prompts, by decoder.
      told: Is called after each look.
    """
    looks: list[Look] = []
    longest_leg = 0.0
    for weight in plan.weights:
        objective = dataclasses.replace(arm.objective, negative_weight=weight)
        of_run: list[Look] = []
        for after, updates in zip([0, *plan.updates], plan.updates, strict=False):
            began = time.monotonic()
            if looks and began + longest_leg > plan.deadline:
                return _found(looks, plan, TIME_IS_OVER)
            look = _look(
                opened, Arm(name=arm.name, objective=objective), after, updates, plan, before
            )
            longest_leg = max(longest_leg, time.monotonic() - began)
            of_run.append(look)
            looks.append(look)
            told(look)
            if look.cut >= plan.enough:
                return _found(looks, plan, "the cut was enough")
            if _has_stopped_rising(of_run):
                break
    return _found(looks, plan, f"no weight up to {plan.weights[-1]:g} was enough")


def _found(looks: Sequence[Look], plan: Plan, reason: str) -> Found:
    # Of equal cuts the first: the smaller update. One that is enough is the last, and the largest.
    best = max(looks, key=lambda look: look.cut)
    return Found(best=best, is_enough=best.cut >= plan.enough, looks=looks, reason=reason)


def _has_stopped_rising(of_run: Sequence[Look]) -> bool:
    """Whether something was cut, and the last looks are no better than the best before them."""
    cuts = [look.cut for look in of_run]
    best_before = max(cuts[:-_NO_MORE], default=0.0)
    return best_before > 0 and max(cuts[-_NO_MORE:]) <= best_before


def _look(
    opened: Opened, arm: Arm, after: int, updates: int, plan: Plan, before: dict[str, int]
) -> Look:
    """Trains from one look to the next, and looks."""
    changes = Changes(schedule={"train_steps": updates})
    weight, files = arm.objective.negative_weight, opened.training_outputs
    # The checkpoint makes room for the next one: what it said is known by what made it.
    identity = opened.describe_training(arm.objective, files, changes)
    checkpoint = str(opened.root / arm.name / "model" / f"checkpoint_{updates}")

    def outputs() -> dict[str, str]:
        name = f"{FOLDER}/{arm.name}, weight {weight:g}, update {updates}"
        return {
            decoder: opened.outputs_of(name, checkpoint, plan.prompts, decoder, identity=identity)
            for decoder in opened.settings.decoders
        }

    made: dict[str, str] | None = None
    with contextlib.suppress(stages.NotDoneError), stages.only_done():
        made = outputs()
    if made is None:
        opened.train(arm.name, arm.objective, files, changes=changes, after=after)
        made = outputs()
    unwanted = {decoder: unwanted_in(file) for decoder, file in made.items()}
    cut = min(
        results.cut_of(before[name], number) for name, number in unwanted.items() if before[name]
    )
    return Look(weight=weight, updates=updates, cut=cut, unwanted=unwanted)
