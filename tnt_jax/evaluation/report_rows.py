"""The results that a report compares, one row per update: from evaluations and from sweeps."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tnt_jax.evaluation import results
from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One update, evaluated with one decoder. What is not known is None.

    Attributes:
      task: What the model does.
      objective: Or another name of the arm.
      decoder: How the outputs were made.
      unwanted_rate_before: Unwanted outputs of the original, from 0 to 1.
      unwanted_rate_after: Of the patched model.
      bleu: To the original's outputs, 0 to 100.
      alpha: `negative_weight` of the objective.
      seed: Of the training run.
      steps: Updates of training, of all rounds together.
      rouge_l: To the original's outputs, 0 to 100.
      exact_match: Outputs that did not change, from 0 to 1.
      repeated_word_rate: Outputs with a word twice in a row, from 0 to 1.
      unknown_token_rate: Outputs with an unknown token, from 0 to 1.
      distinct_ratio: Different outputs among all, from 0 to 1.
      residual: Nats at the marks that are left of what must go.
      collateral: Nats at the marks of everything else.
      smallest_cost: Nats at the marks without an update.
      collateral_elsewhere: KL to the original at ordinary positions, in nats.
    """

    task: str
    objective: str
    decoder: str
    unwanted_rate_before: int | float
    unwanted_rate_after: int | float
    bleu: int | float
    alpha: int | float | None = None
    seed: int | float | None = None
    steps: int | float | None = None
    rouge_l: int | float | None = None
    exact_match: int | float | None = None
    repeated_word_rate: int | float | None = None
    unknown_token_rate: int | float | None = None
    distinct_ratio: int | float | None = None
    residual: int | float | None = None
    collateral: int | float | None = None
    smallest_cost: int | float | None = None
    collateral_elsewhere: int | float | None = None

    @property
    def cut(self) -> float:
        """Share of the unwanted outputs that is gone; 0 where there were none."""
        before = self.unwanted_rate_before
        return 1 - self.unwanted_rate_after / before if before else 0.0


_TEXTS = ("task", "objective", "decoder")
_NUMBERS = tuple(field.name for field in dataclasses.fields(Row) if field.name not in _TEXTS)
_REQUIRED = tuple(
    field.name for field in dataclasses.fields(Row) if field.default is dataclasses.MISSING
)
# What one update is, beside its seed.
_SETTINGS = (*_TEXTS, "alpha", "steps")


def from_results(value: Any, path: str) -> list[Row]:
    """The rows of a sweep's results, `{"rows": [...]}`; fields that `Row` has not are left out.

    Raises:
      UsageError: It is something else, or a row lacks a field or has one of the wrong type.
    """
    rows = value.get("rows") if isinstance(value, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise UsageError(f'RESULTS: expected {{"rows": [...]}} with a row at least, found {path}.')
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        if not isinstance(row, Mapping):
            raise UsageError(f"{where}: expected an object, found {type(row).__name__}.")
        for names, is_one, expected in (
            (_TEXTS, lambda value: isinstance(value, str), "a text"),
            (_NUMBERS, _is_number, "a number"),
        ):
            for name in names:
                value = row.get(name)
                if value is not None and not is_one(value):
                    raise UsageError(f"{where}: {name}: expected {expected}, found {value!r:.60}.")
        known: dict[str, Any] = {name: row.get(name) for name in _TEXTS}
        known |= {name: finite(row.get(name)) for name in _NUMBERS}
        missing = [name for name in _REQUIRED if known[name] is None]
        if missing:
            raise UsageError(f"{where}: expected {', '.join(missing)}, found {sorted(row)}.")
        found.append(Row(**known))
    return found


def from_evaluation(evaluation: Mapping[str, Any], known: Mapping[str, Any]) -> Row:
    """The row of what `tnt_jax.evaluate` wrote.

    Args:
      evaluation: With "original", "current", "comparison" and, maybe, "certificate".
      known: Fields that it does not tell: the task, the objective and how it was trained.

    Raises:
      UsageError: It is none.
    """
    check_evaluation(evaluation)
    before, after = evaluation["original"], evaluation["current"]
    comparison, certificate = evaluation["comparison"], evaluation.get("certificate") or {}
    return Row(
        unwanted_rate_before=before["unwanted_outputs"]["value"],
        unwanted_rate_after=after["unwanted_outputs"]["value"],
        bleu=comparison["bleu"],
        rouge_l=comparison["rouge_l"],
        exact_match=comparison["exact_match"]["value"],
        repeated_word_rate=after["repeated_word"]["value"],
        unknown_token_rate=after["unknown_token"]["value"],
        distinct_ratio=after["distinct_outputs"]["value"],
        residual=finite(certificate.get("negative_residual")),
        collateral=finite(certificate.get("negative_collateral")),
        smallest_cost=finite(certificate.get("negative_smallest_cost")),
        collateral_elsewhere=finite(certificate.get("positive_collateral")),
        **known,
    )


_RATES = ("unwanted_outputs", "repeated_word", "unknown_token", "distinct_outputs")
_OF_RATES = ("numerator", "denominator", "value")
# Where in an evaluation the numbers are that a report shows.
_OF_EVALUATION = (
    *(
        (of, *name)
        for of in ("original", "current")
        for name in (*itertools.product(_RATES, _OF_RATES), ("mean_length",))
    ),
    *(("comparison", name) for name in ("bleu", "rouge_l")),
    ("comparison", "exact_match", "value"),
    ("cut",),
)
_OF_CERTIFICATE = (
    *("negative_residual", "negative_collateral", "negative_smallest_cost", "positive_collateral"),
)


def check_evaluation(evaluation: Any) -> None:
    """Raises a UsageError unless it has what a report shows of what `tnt_jax.evaluate` writes."""

    def value_at(path: Sequence[str]) -> Any:
        value = evaluation
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    found = evaluation if isinstance(evaluation, Mapping) else {}
    absent = [path for path in _OF_EVALUATION if not _is_number(value_at(path), is_finite=True)]
    if (certificate := found.get("certificate")) is not None:
        known = certificate if isinstance(certificate, Mapping) else {}
        absent += [
            ("certificate", name)
            for name in _OF_CERTIFICATE
            # Null is a number that was not finite.
            if name not in known or not (known[name] is None or _is_number(known[name]))
        ]
    if absent:
        raise UsageError(
            "expected the JSON file that python -m tnt_jax.evaluate wrote, with original, current, "
            f"comparison and cut; found {sorted(found) or 'nothing'}, and no number as "
            f"{'.'.join(absent[0])}."
        )


def num_outputs(evaluation: Mapping[str, Any]) -> int:
    """How many outputs an evaluation is of.

    Raises:
      UsageError: It is none.
    """
    check_evaluation(evaluation)
    return evaluation["original"]["unwanted_outputs"]["denominator"]


def _is_number(value: Any, *, is_finite: bool = False) -> bool:
    """Whether it is a number that a page has room for; JSON knows whole numbers of any length."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    return abs(value) < 1e15 or (is_infinite and not is_finite)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that differ in their seeds alone.

    Attributes:
      mean: Their means; the seed is that of the only one, or None.
      num_rows: How many they are.
      is_best: Whether no other group of the same task and decoder both cuts as much and keeps as
        much BLEU, and is better in one of them: the Pareto front. False where there is no other,
        and of a mask, which was not trained and is none of the others.
    """

    mean: Row
    num_rows: int
    is_best: bool


def groups(rows: Sequence[Row]) -> list[Group]:
    """Means over seeds, in the order of the rows."""
    members: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        members.setdefault(tuple(getattr(row, name) for name in _SETTINGS), []).append(row)
    means = [_mean(of_group) for of_group in members.values()]
    comparable: dict[tuple[str, str], list[int]] = {}
    for i, mean in enumerate(means):
        if mean.objective != results.MASK:
            comparable.setdefault((mean.task, mean.decoder), []).append(i)
    best = set()
    for indices in comparable.values():
        points = [{"cut": means[i].cut, "bleu": means[i].bleu} for i in indices]
        is_best = results.pareto(points) if len(points) > 1 else [False]
        best |= {i for i, on_front in zip(indices, is_best, strict=True) if on_front}
    return [
        Group(mean=mean, num_rows=len(of_group), is_best=i in best)
        for i, (mean, of_group) in enumerate(zip(means, members.values(), strict=True))
    ]


def _mean(rows: Sequence[Row]) -> Row:
    values = {name: getattr(rows[0], name) for name in _SETTINGS}
    values["seed"] = rows[0].seed if len(rows) == 1 else None
    for name in _NUMBERS:
        if name not in values:
            known = [value for row in rows if (value := getattr(row, name)) is not None]
            values[name] = statistics.fmean(known) if known else None
    return Row(**values)


def finite(value: int | float | None) -> int | float | None:
    """The number, or None in place of one that is not finite: JSON has none of those."""
    return value if value is not None and math.isfinite(value) else None
