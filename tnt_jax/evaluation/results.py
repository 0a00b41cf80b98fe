"""Results, one row per update and decoder: how much it cut, at what change, how sure that is.

A sweep computes its rows from the texts and marks of the original's and an arm's outputs for the
same prompts. Prompts are split in two by their ids: weights are chosen on one part, and what is
reported is of the other. Records of the same prompt are in the same part. A report shows rows of
sweeps and of evaluations.
"""

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np

from tnt_jax.data import records
from tnt_jax.evaluation import evaluations, text_metrics
from tnt_jax.evaluation.evaluations import Number
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

Row = dict[str, Any]  # `Shown`, and what else a sweep knows

# The arm that patches no model: the original while what is unwanted is masked. Others are compared
# with it. It is on no frontier: that is of those that were trained.
MASK = "decode mask"

_MOST_RESAMPLED = 10_000_000  # prompts of resamples that are in memory at once


class Shown(TypedDict):
    """What a report shows of a row; unknown fields are absent, or None.

    Attributes:
      task: what the model does.
      objective: the objective, or another name of the arm.
      decoder: how the outputs were made.
      unwanted_rate_before: share of the original's outputs that are unwanted, from 0 to 1.
      unwanted_rate_after: the same of the patched model.
      bleu: BLEU to the original's outputs, 0 to 100.
      alpha: the objective's `negative_weight`.
      rate: what a sweep multiplied the learning rate by, unless that was 1.
      seed: the training run's seed.
      steps: updates of training, all rounds together.
      rouge_l: ROUGE-L to the original's outputs, 0 to 100.
      bleu_to_mask: BLEU to what the original says under the mask (`MASK`), 0 to 100.
      same_as_mask: share of outputs that are what it says under the mask, from 0 to 1.
      exact_match: share of outputs that did not change, from 0 to 1.
      unchanged_clean: the same among those that were clean, from 0 to 1.
      repeated_word_rate: share of outputs with a word twice in a row, from 0 to 1.
      repeated_phrase_rate: share of outputs with four words in a row twice, from 0 to 1.
      unknown_token_rate: share of outputs with an unknown token, from 0 to 1.
      distinct_ratio: different outputs among all, from 0 to 1.
      distinct_trigram_ratio: different ones among all three words in a row, from 0 to 1.
      repeated_word_rate_before, ...: the last five of the original's outputs.
      residual: nats at the marks that are left of what must go.
      collateral: nats at the marks of everything else.
      smallest_cost: nats at the marks without an update.
      collateral_elsewhere: KL to the original at ordinary positions, in nats.
      num_graded: ids to remove, of a strength below 1: the residual is without them.
      unrelated_kl: KL to the original on prompts of other tasks, in nats.
      unrelated_unchanged: share of outputs to these that did not change, from 0 to 1.
    """

    task: str
    objective: str
    decoder: str
    unwanted_rate_before: Number
    unwanted_rate_after: Number
    bleu: Number
    alpha: NotRequired[Number]
    rate: NotRequired[Number]
    seed: NotRequired[Number]
    steps: NotRequired[Number]
    rouge_l: NotRequired[Number]
    bleu_to_mask: NotRequired[Number]
    same_as_mask: NotRequired[Number]
    exact_match: NotRequired[Number]
    unchanged_clean: NotRequired[Number]
    repeated_word_rate: NotRequired[Number]
    repeated_phrase_rate: NotRequired[Number]
    unknown_token_rate: NotRequired[Number]
    distinct_ratio: NotRequired[Number]
    distinct_trigram_ratio: NotRequired[Number]
    repeated_word_rate_before: NotRequired[Number]
    repeated_phrase_rate_before: NotRequired[Number]
    unknown_token_rate_before: NotRequired[Number]
    distinct_ratio_before: NotRequired[Number]
    distinct_trigram_ratio_before: NotRequired[Number]
    residual: NotRequired[Number]
    collateral: NotRequired[Number]
    smallest_cost: NotRequired[Number]
    collateral_elsewhere: NotRequired[Number]
    num_graded: NotRequired[Number]
    unrelated_kl: NotRequired[Number]
    unrelated_unchanged: NotRequired[Number]


# What a report shows, and how it tells two updates apart whose seeds may differ.
SHOWN = (*Shown.__annotations__, "cut")
SETTINGS = ("task", "objective", "decoder", "alpha", "rate", "steps")


def cut_of(before: float, after: float) -> float:
    """The share of the unwanted outputs that is gone; 0 where there were none.

    From the rates of as many outputs. It is rounded, or 7 of 35 would be a cut of less than 0.8.
    """
    return round(1 - after / before, 12) if before else 0.0


def is_for_choice(record_id: str, share: float) -> bool:
    """Whether a prompt is among those that weights are chosen on: the same in every run.

    Args:
      record_id: the id of its record; of several with the same prompt the first one's, by which
        `are_for_choice` goes.
      share: the share of prompts that weights are chosen on, from 0 to 1.
    """
    digest = hashlib.sha256(record_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def are_for_choice(rows: Sequence[records.Record], share: float) -> list[bool]:
    """Whether each record's prompt is among those that weights are chosen on.

    Of a prompt all records are, or none: what was chosen on one would not be new to another.
    """
    first = _first_of_prompts(rows)
    return [is_for_choice(first[row.prompt], share) for row in rows]


def num_prompts_for_choice(rows: Sequence[records.Record], share: float) -> tuple[int, int]:
    """How many different prompts weights are chosen on, and how many others there are."""
    first = _first_of_prompts(rows)
    number = sum(is_for_choice(name, share) for name in first.values())
    return number, len(first) - number


def _first_of_prompts(rows: Sequence[records.Record]) -> dict[str, str]:
    """The different prompts in order, each with the id of the first record that has it."""
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row.prompt, row.id)
    return first


def measure(
    original: Sequence[records.Record],
    current: Sequence[records.Record],
    masked: Sequence[records.Record] | None = None,
) -> Row:
    """The numbers of an arm; rates and shares from 0 to 1, BLEU and ROUGE-L from 0 to 100.

    Args:
      original: annotated outputs of the original.
      current: annotated outputs of the arm, for the same prompts in the same order.
      masked: annotated outputs of the original under the decoding mask, for the same prompts, if
        there are any.

    Raises:
      UsageError: there are none.
    """
    is_unwanted = [row.has_unwanted_text for row in original]
    before = text_metrics.unwanted(is_unwanted).value
    after = text_metrics.unwanted([row.has_unwanted_text for row in current]).value
    texts, patched = ([row.targets for row in rows] for rows in (original, current))
    comparison = text_metrics.compare(texts, patched, is_unwanted)
    to_mask: Row = {}
    if masked is not None:
        found = text_metrics.compare([row.targets for row in masked], patched)
        to_mask = {"bleu_to_mask": found.bleu, "same_as_mask": found.exact_match.value}
    return {
        "num_outputs": len(original),
        "unwanted_rate_before": before,
        "unwanted_rate_after": after,
        "cut": cut_of(before, after),
        "bleu": comparison.bleu,
        "rouge_l": comparison.rouge_l,
        **to_mask,
        "exact_match": comparison.exact_match.value,
        "unchanged_clean": _value(comparison.unchanged_clean),
        **_fluency(text_metrics.fluency(texts), text_metrics.fluency(patched)),
    }


def _fluency(before: Any, after: Any) -> Row:
    """The columns of `text_metrics.Fluency`, of the original and of an arm.

    Args:
      before: an object with the same fields, of the original.
      after: the same of the arm.
    """
    fields = {
        "repeated_word_rate": "repeated_word",
        "repeated_phrase_rate": "repeated_phrase",
        "unknown_token_rate": "unknown_token",
        "distinct_ratio": "distinct_outputs",
        "distinct_trigram_ratio": "distinct_trigrams",
    }
    return {
        f"{name}{suffix}": getattr(found, field).value
        for suffix, found in (("", after), ("_before", before))
        for name, field in fields.items()
    }


def _value(rate: Any) -> float | None:
    return None if rate is None else rate.value


def intervals(
    original: Sequence[records.Record],
    arms: Mapping[str, Sequence[records.Record]],
    baseline: str,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Row]:
    """95 % intervals over prompts, by paired bootstrap: every arm sees the same resamples.

    Several outputs for one prompt are drawn together: they say less than as many for others.

    Where all is gone no resample knows of any that might not be: there the lower end of the cut is
    that of the exact binomial interval (Clopper and Pearson) of the prompts to which something
    unwanted was said.

    Args:
      original: annotated outputs of the original.
      arms: annotated outputs of each arm, for the same prompts in the same order.
      baseline: the arm that the others are compared with; if it is not among them, none are.
      num_resamples: how often the prompts are drawn anew.
      seed: decides the draws.

    Returns:
      For each arm "cut_interval"; "bleu_interval"; "bleu_p_value", the probability of a difference
      to the baseline's BLEU as large, in whichever direction, if it were chance which of the two
      said what (sacrebleu's approximate randomization test; None for the baseline, and without
      one). All are None where there is a single prompt.
    """
    import scipy.stats  # here, because it takes a second, which nobody else pays

    numbers = {prompt: number for number, prompt in enumerate(_first_of_prompts(original))}
    if len(numbers) < 2:
        return {
            name: {"cut_interval": None, "bleu_interval": None, "bleu_p_value": None}
            for name in arms
        }
    prompt_of = np.array([numbers[row.prompt] for row in original])

    def num_marked(rows: Sequence[records.Record]) -> np.ndarray:
        return np.bincount(prompt_of, [row.has_unwanted_text for row in rows])

    marked = num_marked(original)

    def cut(before: np.ndarray, after: np.ndarray, axis: int = -1) -> np.ndarray:
        of_before, of_after = before.sum(axis=axis), after.sum(axis=axis)
        # Where nothing was unwanted nothing is cut: `cut_of`.
        return np.where(of_before > 0, 1 - of_after / np.maximum(of_before, 1), 0.0)

    found = _bleu_tests(original, arms, baseline, prompt_of, num_resamples)
    by_name, said = {}, [row.targets for row in original]
    for name, result in found.items():
        after = num_marked(arms[name])
        sampled = scipy.stats.bootstrap(
            (marked, after),
            cut,
            paired=True,
            vectorized=True,
            n_resamples=num_resamples,
            batch=max(1, _MOST_RESAMPLED // len(marked)),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        low = float(sampled.low)
        if marked.any() and not after.any():
            low = 1 - scipy.stats.binomtest(0, np.count_nonzero(marked)).proportion_ci(0.95).high
        by_name[name] = {
            "cut_interval": [low, float(sampled.high)],
            # sacrebleu gives half a width around the mean, which may go beyond the scale.
            "bleu_interval": [
                max(result.mean - result.ci, 0.0),
                min(result.mean + result.ci, 100.0),
            ]
            # Of texts without a token sacrebleu says 0.
            if [row.targets for row in arms[name]] != said
            else [100.0, 100.0],
            "bleu_p_value": result.p_value,
        }
    return by_name


class _BleuTest(NamedTuple):
    """BLEU over resamples of prompts: its mean, half of its interval, and how sure it differs."""

    mean: float
    ci: float
    p_value: float | None


def _bleu_tests(
    original: Sequence[records.Record],
    arms: Mapping[str, Sequence[records.Record]],
    baseline: str,
    prompt_of: np.ndarray,
    num_resamples: int,
) -> dict[str, _BleuTest]:
    """A bootstrap of the BLEU of every arm, and its difference to the baseline's, over prompts.

    Args:
      original: its outputs, the references.
      arms: outputs of each arm.
      baseline: the arm that the others are tested against, if it is among them.
      prompt_of: `[N]` int, of each output the number of its prompt.
      num_resamples: how often the prompts are drawn anew, and how often two arms exchange what they
        said to a half of them.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.significance import PairedTest

    order = np.argsort(prompt_of, kind="stable")
    starts = np.flatnonzero(np.diff(prompt_of[order], prepend=-1))

    class OfCounts(BLEU):
        """BLEU of the counts that it is computed from, which are added up, in place of texts."""

        def counts_of(self, texts: list[str], references: list[list[str]]) -> Any:
            """The counts of each prompt's texts."""
            of_texts = np.array(super()._extract_corpus_statistics(texts, references))
            return np.add.reduceat(of_texts, starts).tolist()

        def _extract_corpus_statistics(self, hypotheses: Any, references: Any) -> Any:
            return hypotheses

    metric = OfCounts(**text_metrics.bleu_settings([row.targets for row in original]))
    references = [[original[i].targets for i in order]]
    counts = {
        name: metric.counts_of([rows[i].targets for i in order], references)
        for name, rows in arms.items()
    }

    def tested(kind: str, *names: str) -> Any:
        systems: Any = [(name, counts[name]) for name in names]
        test = PairedTest(systems, {"BLEU": metric}, None, kind, num_resamples)
        return dict(zip(names, test()[1]["BLEU"], strict=True))

    # Bootstraps give intervals alone: sacrebleu's test by them is one-sided, at half the value.
    p_values: dict[str, float | None] = dict.fromkeys(arms)
    if baseline in arms:
        for name, result in tested("ar", *_first(arms, baseline)).items():
            if name == baseline:
                continue
            # sacrebleu leaves out what differs as much: the two as they are, and all exchanged. Of
            # few prompts that differ at all that is much; of none it is everything.
            num_differ = sum(map(operator.ne, counts[name], counts[baseline]))
            p_values[name] = min(1.0, result.p_value + 2.0 ** (1 - num_differ))
    resampled = {name: tested("bs", name)[name] for name in arms}
    return {
        name: _BleuTest(result.mean, result.ci, p_values[name])
        for name, result in resampled.items()
    }


def _first(arms: Mapping[str, Any], name: str) -> list[str]:
    return sorted(arms, key=lambda other: other != name)


class Choice(NamedTuple):
    """What is chosen for an arm: `Shown` says what the two are; None where a row has none."""

    alpha: float | None
    rate: float | None

    @classmethod
    def of_row(cls, row: Row) -> "Choice":
        """The weight and the rate that a row was trained with."""
        return cls(row["alpha"], row.get("rate"))


def choose(rows: Sequence[Row], cut: float) -> dict[str, Choice]:
    """Chooses weight and rate for every arm: of those that cut enough, the ones with the most BLEU.

    Where none cut enough it is those that cut most. Seeds are averaged first.

    Args:
      rows: those of one decoder, on the prompts that weights are chosen on.
      cut: the cut that is enough.

    Returns:
      The choice of each objective.
    """
    by_arm: dict[str, dict[Choice, list[Row]]] = {}
    for row in rows:
        by_arm.setdefault(row["objective"], {}).setdefault(Choice.of_row(row), []).append(row)

    def worth(of_weight: Sequence[Row]) -> tuple[bool, float]:
        mean_cut = round(_mean(of_weight, "cut"), 12)  # as each cut is
        is_enough = mean_cut >= cut
        return is_enough, _mean(of_weight, "bleu") if is_enough else mean_cut

    return {arm: max(found, key=lambda one: worth(found[one])) for arm, found in by_arm.items()}


def _mean(rows: Sequence[Row], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def pareto(rows: Sequence[Row]) -> list[bool]:
    """Says of each row whether no other has at least its cut and BLEU, and more of one."""

    def beats(other: Row, row: Row) -> bool:
        no_less = other["cut"] >= row["cut"] and other["bleu"] >= row["bleu"]
        return no_less and (other["cut"] > row["cut"] or other["bleu"] > row["bleu"])

    return [not any(beats(other, row) for other in rows) for row in rows]


def over_seeds(rows: Sequence[Row], same: Sequence[str]) -> list[Row]:
    """Rows that differ in their seed alone as one, each with its place on the frontier.

    Means of all numbers, and standard deviations as `NAME_sd`; "num_seeds"; and "is_pareto" among
    the trained arms of one task and decoder (absent of a mask).

    Args:
      rows: one for each seed.
      same: the fields that rows of one group have alike.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in same), []).append(row)
    found = [_averaged(group) for group in groups.values()]
    comparable: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        if row["objective"] != MASK:
            comparable.setdefault((row.get("task"), row["decoder"]), []).append(row)
    for trained in comparable.values():
        for row, is_best in zip(trained, pareto(trained), strict=True):
            row["is_pareto"] = is_best
    return found


def _averaged(group: Sequence[Row]) -> Row:
    merged = dict(group[0])
    merged.pop("seed", None)
    merged["num_seeds"] = len(group)
    for name in group[0]:
        values = [row[name] for row in group if row.get(name) is not None]
        if name not in ("alpha", "rate", "seed") and values and isinstance(values[0], float):
            merged[name] = float(np.mean(values))
            merged[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return merged


# ---------------------------------------------------------------------------------------------
# What others wrote
# ---------------------------------------------------------------------------------------------


def from_results(value: Any, path: str) -> list[Row]:
    """The rows of a sweep's results, `{"rows": [...]}`: what `Shown` has of them, and "cut".

    Raises:
      UsageError: it is something else, or a row lacks a field or has one of the wrong type.
    """
    rows = value.get("rows") if isinstance(value, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise UsageError(f'RESULTS: expected {{"rows": [...]}} with a row at least, found {path}.')
    return [_checked(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected an object, found {type(row).__name__}.")
    given = {name: value for name, value in row.items() if value is not None}
    required = [name for name in Shown.__annotations__ if name in Shown.__required_keys__]
    if missing := [name for name in required if name not in given]:
        raise UsageError(f"{where}: expected {', '.join(missing)}, found {sorted(row)}.")
    try:
        known = msgspec.convert(given, Shown)
    except msgspec.ValidationError as error:
        name = files.wrong_field(error)
        expected = "a text" if Shown.__annotations__[name] is str else "a number"
        raise UsageError(
            f"{where}: {name}: expected {expected}, found {given[name]!r:.60}."
        ) from None
    cut = cut_of(known["unwanted_rate_before"], known["unwanted_rate_after"])
    return {**dict.fromkeys(SHOWN), **known, "cut": cut}


def training_of(found: Mapping[str, Any], where: str) -> Row:
    """How an arm was trained, as a pipeline wrote it: "alpha", "seed" and "steps", or None each.

    Raises:
      UsageError: one is no number; the message says that `where` has it.
    """
    stated = {name: found.get(name) for name in ("alpha", "seed", "steps")}
    for name, value in stated.items():
        try:
            msgspec.convert(value, Number | None)
        except msgspec.ValidationError:
            raise UsageError(
                f"{where}: {name}: expected a number or null, found {value!r:.60}."
            ) from None
    return stated


def from_evaluation(found: evaluations.Evaluation, known: Mapping[str, Any]) -> Row:
    """The row of an evaluation.

    Args:
      found: the evaluation.
      known: what that does not tell: the task, the objective and how it was trained.
    """
    before, after = found.original.unwanted_outputs.value, found.current.unwanted_outputs.value
    row = {
        "unwanted_rate_before": before,
        "unwanted_rate_after": after,
        "cut": cut_of(before, after),
        "bleu": found.comparison.bleu,
        "rouge_l": found.comparison.rouge_l,
        "exact_match": found.comparison.exact_match.value,
        "unchanged_clean": _value(found.comparison.unchanged_clean),
        **_fluency(found.original, found.current),
    }
    if found.mask is not None:
        to_mask = found.mask.to_current
        row |= {"bleu_to_mask": to_mask.bleu, "same_as_mask": to_mask.exact_match.value}
    row |= of_models(found)
    return {**dict.fromkeys(SHOWN), **row, **known}


def of_models(found: evaluations.Evaluation) -> Row:
    """The columns of an evaluation that need both models, and those of prompts of other tasks."""
    row: Row = {}
    if (certificate := found.certificate) is not None:
        row |= {
            "residual": certificate.negative_residual,
            "collateral": certificate.negative_collateral,
            "smallest_cost": certificate.negative_smallest_cost,
            "collateral_elsewhere": certificate.positive_collateral,
            "num_graded": certificate.num_graded,
        }
    if (unrelated := found.unrelated) is not None:
        row |= {"unrelated_kl": unrelated.kl, "unrelated_unchanged": unrelated.unchanged.value}
    return row
