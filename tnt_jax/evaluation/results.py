"""Numbers of a sweep: how much each arm cut, at what change, and how sure that is.

Everything is computed from the texts and marks of the original's and an arm's outputs for the same
prompts. Prompts are split in two by their ids: weights are chosen on one part, and what is reported
is of the other.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tnt_jax.data import records
from tnt_jax.evaluation import text_metrics

Row = dict[str, Any]

# The arm that patches no model. It is on no frontier: that is of those that were trained.
MASK = "decode mask"


def is_for_choice(record_id: str, share: float) -> bool:
    """Whether a prompt is among those that weights are chosen on: the same in every run."""
    digest = hashlib.sha256(record_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def measure(original: Sequence[records.Record], current: Sequence[records.Record]) -> Row:
    """The numbers of an arm; rates and shares from 0 to 1, BLEU and ROUGE-L from 0 to 100.

    Args:
      original: Annotated outputs of the original.
      current: Annotated outputs of the arm, for the same prompts in the same order.

    Raises:
      UsageError: There are none.
    """
    before, after = (
        text_metrics.unwanted([row.negative_spans or () for row in rows]).value
        for rows in (original, current)
    )
    texts, patched = ([row.targets for row in rows] for rows in (original, current))
    comparison = text_metrics.compare(texts, patched)
    fluent_before, fluent = text_metrics.fluency(texts), text_metrics.fluency(patched)
    return {
        "num_outputs": len(original),
        "unwanted_rate_before": before,
        "unwanted_rate_after": after,
        "cut": 1 - after / before if before else 0.0,
        "bleu": comparison.bleu,
        "rouge_l": comparison.rouge_l,
        "exact_match": comparison.exact_match.value,
        "repeated_word_rate": fluent.repeated_word.value,
        "unknown_token_rate": fluent.unknown_token.value,
        "distinct_ratio": fluent.distinct_outputs.value,
        "repeated_word_rate_before": fluent_before.repeated_word.value,
        "unknown_token_rate_before": fluent_before.unknown_token.value,
        "distinct_ratio_before": fluent_before.distinct_outputs.value,
    }


def intervals(
    original: Sequence[records.Record],
    arms: Mapping[str, Sequence[records.Record]],
    baseline: str,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Row]:
    """95 % intervals over prompts, by paired bootstrap: every arm sees the same resamples.

    Args:
      original: Annotated outputs of the original.
      arms: Annotated outputs of each, for the same prompts in the same order.
      baseline: The arm that the others are compared with; if it is not among them, none are.
      num_resamples: Of the prompts.
      seed: Of the resamples.

    Returns:
      By arm: "cut_interval"; "bleu_interval"; "bleu_p_value", of a difference to the baseline's
      BLEU at least so large (sacrebleu's paired bootstrap test; None for the baseline, and without
      one).
    """
    # Here, because they take a second to import, which nobody else pays.
    import scipy.stats
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.significance import PairedTest

    marked = np.array([bool(row.negative_spans) for row in original], float)

    def cut(before: np.ndarray, after: np.ndarray, axis: int = -1) -> np.ndarray:
        of_before, of_after = before.sum(axis=axis), after.sum(axis=axis)
        # As in `measure`: where nothing was unwanted nothing is cut.
        return np.where(of_before > 0, 1 - of_after / np.maximum(of_before, 1), 0.0)

    systems: Any = [(name, [row.targets for row in arms[name]]) for name in _first(arms, baseline)]
    found: Any
    _, found = PairedTest(
        systems,
        {"BLEU": BLEU(force=True)},
        [[row.targets for row in original]],
        test_type="bs",
        n_samples=num_resamples,
    )()
    by_name = {}
    for name, result in zip(found["System"], found["BLEU"], strict=True):
        after = np.array([bool(row.negative_spans) for row in arms[name]], float)
        sampled = scipy.stats.bootstrap(
            (marked, after),
            cut,
            paired=True,
            vectorized=True,
            n_resamples=num_resamples,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        by_name[name] = {
            "cut_interval": [float(sampled.low), float(sampled.high)],
            # sacrebleu gives half a width around the mean, which may go beyond the scale.
            "bleu_interval": [
                max(result.mean - result.ci, 0.0),
                min(result.mean + result.ci, 100.0),
            ],
            "bleu_p_value": result.p_value if baseline in arms else None,
        }
    return by_name


def _first(arms: Mapping[str, Any], name: str) -> list[str]:
    return sorted(arms, key=lambda other: other != name)


def choose(rows: Sequence[Row], cut: float) -> dict[str, float | None]:
    """The weight of every arm: of those that cut enough the one with the most BLEU to the original.

    Where none cuts enough it is the one that cuts most. Seeds are averaged first.

    Args:
      rows: Of the part that is for choosing, of one decoder.
      cut: What is enough.

    Returns:
      By objective; None where it has no weight.
    """
    by_arm: dict[str, dict[Any, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault(row["objective"], {}).setdefault(row["alpha"], []).append(row)

    def worth(of_weight: Sequence[Row]) -> tuple[bool, float]:
        mean_cut = _mean(of_weight, "cut")
        is_enough = mean_cut >= cut
        return is_enough, _mean(of_weight, "bleu") if is_enough else mean_cut

    return {arm: max(found, key=lambda alpha: worth(found[alpha])) for arm, found in by_arm.items()}


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def pareto(rows: Sequence[Row]) -> list[bool]:
    """Of every row, whether no other has at least its cut and BLEU, and more of one."""

    def beats(other: Row, row: Row) -> bool:
        no_less = other["cut"] >= row["cut"] and other["bleu"] >= row["bleu"]
        return no_less and (other["cut"] > row["cut"] or other["bleu"] > row["bleu"])

    return [not any(beats(other, row) for other in rows) for row in rows]


def averaged(rows: Sequence[Row], key: Callable[[Row], Any]) -> list[Row]:
    """Rows that differ in their seed alone as one: means, and standard deviations as `NAME_sd`."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    found = []
    for group in groups.values():
        merged = dict(group[0])
        del merged["seed"]
        merged["num_seeds"] = len(group)
        for name, value in group[0].items():
            if isinstance(value, float) and name != "alpha":
                values = [row[name] for row in group if row.get(name) is not None]
                merged[name] = float(np.mean(values))
                merged[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found.append(merged)
    return found
