"""The smallest change that fulfils a wish: attempts one after another, each looked at on its way.

An attempt starts from the original and goes on in legs. After each leg the model answers the choice
prompts, which it is not trained on. Until a look cuts enough, the one with the larger cut is
better. Of those that cut enough, the one with the higher BLEU to the original's outputs is: as the
learning rate falls, a model comes back to the original where it may. An attempt ends when looks
bring nothing better. If a look was enough, the search is over: of those that were enough, and
within one BLEU of the highest among them, the one with the largest cut is taken. Else the next
attempt follows, which learns from what the last one still said as well (a round), later with a
larger weight. Each starts from the original again: so one file of outputs, one weight and one
number of updates say what the result is.
"""

import contextlib
import dataclasses
import functools
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from tnt_jax.data import records
from tnt_jax.evaluation import results, text_metrics
from tnt_jax.experiments.experiment import TRAINING_OUTPUTS, Arm, Changes
from tnt_jax.experiments.experiment_run import ExperimentRun
from tnt_jax.runtime import files, stages
from tnt_jax.runtime.errors import UsageError

FOLDER = "looks"
TIME_IS_OVER = "what would come next would probably end after --time"
_ENOUGH = "the cut was enough"
_NEARLY = 1.0  # BLEU; looks on the prompts to choose by do not tell so little apart
NO_MORE = 4  # looks that bring nothing better, an epoch, after which an attempt is over
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to train.

    Attributes:
      weight: The weight of the negative term.
      round: 1 learns from outputs of the original; a further one also from what the attempt before
        still said to the same prompts, where that is unwanted.
    """

    weight: float
    round: int = 1

    def __str__(self) -> str:
        first = "" if self.round == 1 else f"round {self.round}, "
        return f"{first}weight {self.weight:g}"


# What is tried where outputs can be made and marked, and where people marked those that there are.
ROUNDS = (Attempt(weight=30.0), Attempt(weight=30.0, round=2), Attempt(weight=90.0, round=3))
WEIGHTS = (Attempt(weight=30.0), Attempt(weight=90.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is looked for, and how far.

    Attributes:
      enough: The cut on the choice prompts that is looked for.
      attempts: The attempts, in the order in which they are made; rounds count up from 1.
      updates: The numbers of updates after which there is a look, in each attempt.
      prompts: The file of choice prompts.
      deadline: On the clock of `time.monotonic`: nothing begins that would probably end later. What
        was kept takes no time.
    """

    enough: float
    attempts: Sequence[Attempt]
    updates: Sequence[int]
    prompts: str
    deadline: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How far an attempt had come after some updates.

    Attributes:
      attempt: The attempt that was looked at.
      updates: Number of its updates so far.
      cut: Share of the original's unwanted outputs that was gone, with the decoder where it was
        least.
      bleu: BLEU to the original's outputs on the same prompts, 0 to 100, with the first decoder.
      unwanted: Unwanted outputs on the choice prompts, by decoder.
    """

    attempt: Attempt
    updates: int
    cut: float
    bleu: float
    unwanted: dict[str, int]

    def __str__(self) -> str:
        return f"{self.attempt}, update {self.updates}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search.

    Attributes:
      best: The look that is taken: of those that are enough, and within one BLEU of the highest
        among them, the one with the largest cut; else that with the largest cut of all. Of equals
        the first.
      files: The outputs that it learned from.
      is_enough: Whether the cut of `best` is enough.
      looks: All looks, in their order.
      reason: Why the search ended.
    """

    best: Look
    files: str
    is_enough: bool
    looks: Sequence[Look]
    reason: str


def read_note(note: pathlib.Path, of_what: Mapping[str, Any]) -> Found | None:
    """What a search came to, from the file that `write_note` wrote; None if it was another search.

    Args:
      note: The file; None is returned where it is missing.
      of_what: What the search depends on, JSON values.

    Raises:
      UsageError: The file is damaged.
    """
    if not note.is_file():
        return None
    value = files.read_object(note, "--output")
    if value.get("of") != of_what:
        return None
    try:
        return msgspec.convert(value.get("found"), Found)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"--output: {note}: expected what a search came to, found other fields ({error}). "
            "Delete this file, and the search is done again."
        ) from None


def write_note(note: pathlib.Path, of_what: Mapping[str, Any], found: Found) -> None:
    """Writes what a search came to, for `read_note`."""
    files.write_json(note, {"of": of_what, "found": dataclasses.asdict(found)})


def unwanted_in(file: str) -> int:
    """How many outputs of an annotated file have something unwanted."""
    return sum(row.has_unwanted_text for row in records.iterate(file))


def original_outputs(opened: ExperimentRun, prompts: str) -> dict[str, str]:
    """The original's annotated outputs on prompts, by decoder, that looks are compared with."""
    return {
        decoder: opened.outputs_of("choice", opened.original, prompts, decoder)
        for decoder in opened.settings.decoders
    }


def search(
    opened: ExperimentRun,
    arm: Arm,
    plan: Plan,
    before: Mapping[str, str],
    told: Callable[[Look], Any] = lambda look: None,
) -> Found:
    """Trains one attempt after another until a look at one is enough.

    What was done before is kept: looks and rounds, by what they are made of. A leg that was stopped
    goes on.

    Args:
      opened: The experiment; its folder is held.
      arm: To train; its weight is that of the attempt.
      plan: What is looked for.
      before: The original's outputs on the choice prompts, by decoder.
      told: Is called after each look.
    """
    return _Search(opened, arm, plan, before).run(told)


class _Search:
    """Looks so far, what they learned from, and how long their legs took."""

    def __init__(self, opened: ExperimentRun, arm: Arm, plan: Plan, before: Mapping[str, str]):
        self._opened, self._arm, self._plan, self._before = opened, arm, plan, before
        self._unwanted = {decoder: unwanted_in(file) for decoder, file in before.items()}
        self._of_rounds = [opened.make_training_outputs()]  # what each round brought
        self._files = [opened.make_training_outputs()]  # what each round learns from
        self._looks: list[Look] = []
        self._seconds_of_training: list[float] = []  # of the leg before each look
        self._last_leg = 0.0

    def run(self, told: Callable[[Look], Any]) -> Found:
        """Trains attempt after attempt, until a look is enough or the time is over."""
        plan = self._plan
        for attempt in plan.attempts:
            if attempt.round > len(self._files):
                if self._is_time_over(self._seconds_of_outputs()) and not self._is_kept(
                    functools.partial(self._outputs_of_round, attempt.round)
                ):
                    return self._found(TIME_IS_OVER)
                self._begin_round(attempt.round)
            of_attempt: list[Look] = []
            for after, updates in zip([0, *plan.updates], plan.updates, strict=False):
                if self._is_time_over() and not self._is_kept(
                    functools.partial(self._outputs_of_look, attempt, updates)
                ):
                    return self._found(TIME_IS_OVER)
                look = self._leg(attempt, after, updates)
                of_attempt.append(look)
                told(look)
                if self._brings_no_more(of_attempt):
                    break
            if any(look.cut >= plan.enough for look in of_attempt):
                return self._found(_ENOUGH)
        *_, last = plan.attempts
        return self._found(f"no attempt up to {last} was enough")

    def _found(self, reason: str) -> Found:
        best = self._best()
        is_enough = best.cut >= self._plan.enough
        return Found(
            best=best,
            files=self._files[best.attempt.round - 1],
            is_enough=is_enough,
            looks=self._looks,
            reason=_ENOUGH if is_enough else reason,
        )

    def _best(self) -> Look:
        enough = [look for look in self._looks if look.cut >= self._plan.enough]
        if not enough:
            return max(self._looks, key=lambda look: look.cut)
        nearly = max(look.bleu for look in enough) - _NEARLY
        # Of what is as near as that, the largest cut is the least likely to be enough by chance.
        return max(
            (look for look in enough if look.bleu >= nearly), key=lambda look: (look.cut, look.bleu)
        )

    def _rank(self, look: Look) -> tuple[bool, float]:
        """What looks are compared by while an attempt goes on: the larger, the better."""
        is_enough = look.cut >= self._plan.enough
        return is_enough, look.bleu if is_enough else look.cut

    def _brings_no_more(self, of_attempt: Sequence[Look]) -> bool:
        """Whether something was cut, and the last looks are no better than the best before them."""
        before, last = of_attempt[:-NO_MORE], of_attempt[-NO_MORE:]
        best = max(map(self._rank, before), default=(False, 0.0))
        return best > (False, 0.0) and max(map(self._rank, last)) <= best

    # ------------------------------------------------------------------------------------ Time

    def _is_time_over(self, seconds_before: float = 0.0) -> bool:
        """Whether one more leg, after so many seconds, would probably end too late.

        The best look so far is trained again once another leg has made room for its own model.
        """
        if not self._looks:  # without one there is nothing to take
            return False
        best = self._looks.index(self._best())
        first = best
        while first and self._looks[first - 1].attempt == self._looks[best].attempt:
            first -= 1
        # The first leg also compiles, which the later ones and training again do not.
        again = (best + 1 - first) * statistics.median(self._seconds_of_training)
        ends = time.monotonic() + seconds_before + self._last_leg + again
        return ends > self._plan.deadline

    def _seconds_of_outputs(self) -> float:
        """How long the outputs of a round will take: as long as those of the original."""
        opened = self._opened
        return opened.seconds_of_outputs(TRAINING_OUTPUTS, opened.training_decoders) or 0.0

    # ------------------------------------------------------------------------------------ Work

    def _objective(self, attempt: Attempt) -> Any:
        return dataclasses.replace(self._arm.objective, negative_weight=attempt.weight)

    def _up_to(self, updates: int) -> Changes:
        """The settings of a run that ends after so many updates; data as the arm wants it."""
        return dataclasses.replace(self._arm.changes, schedule={"train_steps": updates})

    def _model(self, attempt: Attempt, updates: int) -> tuple[str, str]:
        """A checkpoint, and what it is made of: it makes room for the next one."""
        identity = self._opened.describe_training(
            self._objective(attempt), self._files[attempt.round - 1], self._up_to(updates)
        )
        name = f"checkpoint_{updates}"
        return str(self._opened.root / self._arm.name / "model" / name), identity

    def _is_kept(self, make: Callable[[], Any]) -> bool:
        """Whether all that is made with a model was kept, by a command before this one."""
        with contextlib.suppress(stages.NotDoneError), stages.only_done():
            make()
            return True
        return False

    def _kept_or_made(self, make: Callable[[], _T], train: Callable[[], Any]) -> _T:
        """What is made with a model; unless all of it was kept, the model is trained before."""
        if not self._is_kept(make):
            train()
        return make()

    def _train(self, attempt: Attempt, after: int, updates: int) -> None:
        self._opened.train(
            self._arm.name,
            self._objective(attempt),
            self._files[attempt.round - 1],
            changes=self._up_to(updates),
            after=after,
        )

    def _outputs_of_round(self, number: int) -> tuple[list[str], str]:
        """What the last look's model says to the prompts to learn from, after all before it."""
        last = self._looks[-1]
        checkpoint, identity = self._model(last.attempt, last.updates)
        return self._opened.further_round(
            f"{FOLDER}/round {number}",
            checkpoint,
            self._of_rounds,
            identity=identity,
            keep_clean=False,
        )

    def _begin_round(self, number: int) -> None:
        """Brings the outputs that a round learns from."""
        last, places = self._looks[-1], [0, *self._plan.updates]
        after = places[places.index(last.updates) - 1]
        self._of_rounds, merged = self._kept_or_made(
            lambda: self._outputs_of_round(number),
            # A command before this one may have ended here, and trained the best look's model.
            lambda: self._train(last.attempt, after, last.updates),
        )
        self._files.append(merged)

    def _outputs_of_look(self, attempt: Attempt, updates: int) -> dict[str, str]:
        """What a model says to the choice prompts, annotated, by decoder."""
        checkpoint, identity = self._model(attempt, updates)
        name = f"{FOLDER}/{self._arm.name}, {attempt}, update {updates}"
        return {
            decoder: self._opened.outputs_of(
                name, checkpoint, self._plan.prompts, decoder, identity=identity
            )
            for decoder in self._opened.settings.decoders
        }

    def _leg(self, attempt: Attempt, after: int, updates: int) -> Look:
        """Trains from one look to the next, and looks."""
        began = time.monotonic()
        seconds_of_training, is_trained = self._last_leg, False  # not known where it was kept

        def train() -> None:
            nonlocal seconds_of_training, is_trained
            self._train(attempt, after, updates)
            seconds_of_training, is_trained = time.monotonic() - began, True

        made = self._kept_or_made(lambda: self._outputs_of_look(attempt, updates), train)
        self._last_leg = time.monotonic() - began if is_trained else self._last_leg
        self._seconds_of_training.append(seconds_of_training)
        self._looks.append(self._look(attempt, updates, made))
        return self._looks[-1]

    def _look(self, attempt: Attempt, updates: int, made: Mapping[str, str]) -> Look:
        unwanted = {decoder: unwanted_in(file) for decoder, file in made.items()}
        first = self._opened.first_decoder
        pairs = zip(*records.read_pairs(self._before[first], made[first]), strict=True)
        texts = [(before.targets, after.targets) for before, after in pairs]
        return Look(
            attempt=attempt,
            updates=updates,
            cut=min(
                results.cut_of(before, unwanted[name])
                for name, before in self._unwanted.items()
                if before
            ),
            bleu=text_metrics.compare(*map(list, zip(*texts, strict=True))).bleu,
            unwanted=unwanted,
        )
