"""Whether the numbers of a run are sound: what is not finite, and losses that leap.

What is found is written to `events.jsonl` beside the metrics, one JSON object a line:

    {"step": 7, "event": "skipped", "loss": null, "gradient_norm": null, "parameters": [...],
     "examples": [...]}
    {"step": 90, "event": "loss_spike", "loss": 3.1, "usual_loss": 0.4, "deviations": 31.0,
     "gradient_norm": 12.0, "examples": [...]}

`examples` are the ids of those that the update learned from. What is usual depends on the updates
before that had marks as well, or none as well: the loss of a marked token is of another size than
that of a token to keep. A checkpoint has it (`Health.state`), so a run that went on finds what it
would have found.
"""

import collections
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tnt_jax.runtime import console
from tnt_jax.runtime.errors import UsageError
from tnt_jax.watching import metric_writers

# Losses that a loss is compared with: the last ones of its kind, once there are enough of them.
_WINDOW, _ENOUGH = 100, 20
_KINDS = ("losses_unmarked", "losses_marked")
# So many updates that are left out in a row are no accident.
_MOST_SKIPPED = 20
_MOST_NAMES = 6  # of parameters and examples in a message
_MOST_EXAMPLES = 256  # in events.jsonl

# A checkpoint's optimizer has no clipping that its run had not, even with ALLOW_CHANGES.
CLIP = "set MAX_GRADIENT_NORM in a run with another MODEL_DIR"


class Health:
    """Looks at the sums of one update after the other.

    Args:
      names: Names of the parameters, from `train_step.gradient_names`.
      is_skipping: Whether the step leaves out an update that is not finite.
      spike_deviations: How far above the usual loss a loss is noted; None notes none. In standard
        deviations, estimated from the median distance to the median, or in hundredths of the median
        where that is more.
      examples_of: From the number of an update to the ids of its examples.
      events: Where to write.
      where: What checkpoint there is, for messages.
      state: The state that a checkpoint holds; None begins anew.

    Raises:
      UsageError: `spike_deviations` is not positive.
    """

    def __init__(
        self,
        *,
        names: Sequence[str],
        is_skipping: bool,
        spike_deviations: float | None,
        examples_of: Callable[[int], Sequence[str]],
        events: metric_writers.StepLines,
        where: Callable[[], str],
        state: Mapping[str, Any] | None = None,
    ):
        if spike_deviations is not None and not 0 < spike_deviations < math.inf:
            raise UsageError(
                f"SPIKE_DEVIATIONS: expected None or more than 0, found {spike_deviations}."
            )
        state = state or {}
        self._names = names
        self._is_skipping = is_skipping
        self._spike_deviations = spike_deviations
        self._examples_of = examples_of
        self._events = events
        self._where = where
        # Of updates without marks and with them. Earlier versions noted "losses", of both together.
        self._losses = {
            kind: collections.deque(state.get(kind, ()), maxlen=_WINDOW) for kind in _KINDS
        }
        self._num_skipped = state.get("num_skipped", 0)
        self._skipped_in_a_row = state.get("skipped_in_a_row", 0)

    @property
    def num_skipped(self) -> int:
        """Updates that the run has left out so far."""
        return self._num_skipped

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            **{kind: list(losses) for kind, losses in self._losses.items()},
            "num_skipped": self._num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def is_sound(self, step: int, sums: Mapping[str, Any]) -> bool:
        """Whether an update counts: False if it was left out. To be asked once of each.

        Args:
          step: Number of the update.
          sums: The update's sums, from `train_step.train_step`.

        Raises:
          UsageError: It is not finite, and the run stops at that; or too many were left out.
        """
        loss, norm = (float(sums[name]) for name in ("loss", "gradient_norm"))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._not_finite(step, loss, norm, sums["gradient_not_finite"])
            return False
        self._skipped_in_a_row = 0
        kind = _KINDS[float(sums["num_negative"]) > 0]
        self._look_for_spike(step, loss / max(float(sums["num_tokens"]), 1.0), norm, kind)
        return True

    def _not_finite(self, step: int, loss: float, norm: float, not_finite: Any) -> None:
        pairs = zip(self._names, np.asarray(not_finite).tolist(), strict=True)
        bad = [name for name, is_bad in pairs if is_bad]
        examples = self._examples_of(step)
        found = [
            f"{name} = {value}"
            for name, value in (("loss", loss), ("gradient_norm", norm))
            if not math.isfinite(value)
        ]
        number = len(self._names)
        where = (
            f"Not finite is the gradient of {_some(bad)} ({len(bad)} of {number} parameters)."
            if bad
            else f"The gradient of each of the {number} parameters is finite."
        )
        what = f"found {' and '.join(found)}. {where}"
        if not self._is_skipping:
            raise UsageError(
                f"update {step}: expected finite numbers, {what} Before it, there is "
                f"{self._where()}. Lower LEARNING_RATE or negative_weight, {CLIP}, or look at the "
                f"examples of that update: {_some(examples)}. NON_FINITE='skip' leaves such "
                "updates out."
            )
        self._num_skipped += 1
        self._skipped_in_a_row += 1
        self._events.write(
            step,
            {
                "event": "skipped",
                "loss": loss,
                "gradient_norm": norm,
                "parameters": bad,
                "examples": list(examples[:_MOST_EXAMPLES]),
            },
        )
        console.log(f"update {step} is left out ({self._num_skipped} so far): {what}")
        if self._skipped_in_a_row >= _MOST_SKIPPED:
            first = step - self._skipped_in_a_row + 1
            raise UsageError(
                f"updates {first} to {step}: expected finite numbers in one of {_MOST_SKIPPED} "
                f"updates, {what} There is {self._where()}. Lower LEARNING_RATE or "
                f"negative_weight, or {CLIP}."
            )

    def _look_for_spike(self, step: int, loss: float, norm: float, kind: str) -> None:
        before, threshold = list(self._losses[kind]), self._spike_deviations
        self._losses[kind].append(loss)
        if threshold is None or len(before) < _ENOUGH:
            return
        usual = statistics.median(before)
        distance = statistics.median(abs(other - usual) for other in before)
        # 1.4826: the standard deviation of a normal distribution with that median distance.
        unit = max(1.4826 * distance, 0.01 * abs(usual), 1e-12)
        deviations = (loss - usual) / unit
        if deviations <= threshold:
            return
        examples = self._examples_of(step)
        self._events.write(
            step,
            {
                "event": "loss_spike",
                "loss": loss,
                "usual_loss": usual,
                "deviations": deviations,
                "gradient_norm": norm,
                "examples": list(examples[:_MOST_EXAMPLES]),
            },
        )
        console.log(
            f"update {step}: the loss leapt to {loss:.4g} from {usual:.4g}, {deviations:.0f} "
            f"deviations, on the examples {_some(examples)} (events.jsonl)."
        )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
