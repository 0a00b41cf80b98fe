"""Signs that an update went wrong, and what each of them suggests to change.

The thresholds are rules of thumb: they say where to look, not whether a model is good.
"""

import dataclasses

from tnt_jax.evaluation.evaluations import (
    Certificate,
    Comparison,
    Evaluation,
    Mask,
    Outputs,
    Rate,
    Unrelated,
)

_FEWEST = 5  # outputs: fewer are chance
_LEAK = 0.1  # nats a token, on prompts of other tasks
_LEAST_BLEU, _LEAST_ROUGE_L = 50, 60  # to the original's outputs, where no mask tells more
_LEAST_OF_MASK = 0.8  # as a share of the mask's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign:
    """One sign of failure.

    Attributes:
      name: What is looked for.
      is_seen: Whether it is there.
      evidence: The numbers, before and after.
      suggestion: What to look at or change where it is seen.
    """

    name: str
    is_seen: bool
    evidence: str
    suggestion: str


def signs(evaluation: Evaluation, num_newly_unwanted: int) -> list[Sign]:
    """Looks for every sign in what `tnt_jax.evaluate` wrote.

    Args:
      evaluation: The evaluation.
      num_newly_unwanted: Outputs that are unwanted now and were clean before.
    """
    before, after = evaluation.original, evaluation.current
    return [
        _no_reduction(evaluation),
        _moved_elsewhere(before, num_newly_unwanted),
        _damage("repeated words", before.repeated_word, after.repeated_word, 0.01),
        _damage("repeated phrases", before.repeated_phrase, after.repeated_phrase, 0.02),
        _damage("unknown tokens", before.unknown_token, after.unknown_token, 0.005),
        _length_drift(before.mean_length, after.mean_length),
        _collapse("outputs", "texts", before.distinct_outputs, after.distinct_outputs),
        _collapse(
            "trigrams", "three words in a row", before.distinct_trigrams, after.distinct_trigrams
        ),
        *_changed_too_much(evaluation.comparison, evaluation.mask),
        *_clean_changed(evaluation.comparison.unchanged_clean),
        *_leak(evaluation.unrelated),
    ]


def notes(of: Certificate | None) -> list[str]:
    """Sentences on what the numbers of a certificate are of, where that is easily misread.

    Args:
      of: The certificate that `tnt_jax.evaluate` wrote. Nothing is said of numbers that an older
        file does not have.
    """
    found = []
    if of is None:
        return found
    num_marked, num_others = of.num_negative or 0, of.num_positive or 0
    if num_marked > num_others:
        found.append(
            f"{num_marked:,.0f} of {num_marked + num_others:,.0f} positions of the original's "
            "outputs are marked (at_every_position marks those where something is removed, whether "
            "or not it was said). Residual, collateral and smallest cost are means over these, and "
            "KL elsewhere is " + ("of the few others." if num_others else "of no position.")
        )
    if number := of.num_removed_everywhere:
        found.append(
            f"{number:,} ids are removed at every position (.everywhere.json). The certificate "
            "does not count them as marks: where nothing else is marked, what was taken from them "
            "is a part of KL elsewhere."
        )
    if number := of.num_graded:
        found.append(
            f"{number:,} of the ids to remove have a strength below 1. The residual is of those of "
            "strength 1 alone: compare residual and collateral together with the smallest cost."
        )
    if of.num_cut_inputs or of.num_cut_targets:
        found.append(
            f"{of.num_cut_inputs or 0:,} inputs and {of.num_cut_targets or 0:,} outputs are cut "
            f"(TASK_FEATURE_LENGTHS): the certificate is without what lies beyond, "
            f"{of.num_lost_marks or 0:,} ids to remove among it."
        )
    return found


def _no_reduction(evaluation: Evaluation) -> Sign:
    before, after = (of.unwanted_outputs for of in (evaluation.original, evaluation.current))
    evidence = f"{_share(before)} unwanted before, {_share(after)} now"
    suggestion = (
        "Ineffective marks or learning rate. Look at a few marked records: do the spans cover what "
        "must go, and are the alternatives that would be just as wrong removed too? Then raise the "
        "learning rate or TRAIN_STEPS."
    )
    left = cost = None
    what = "residual"
    if (certificate := evaluation.certificate) is not None:
        left, cost = certificate.negative_residual, certificate.negative_smallest_cost
        if certificate.num_graded:
            # Of a graded mark some probability may stay, so what moves is no residual: both parts
            # together are the distance from what is desired.
            collateral = certificate.negative_collateral
            left = None if left is None or collateral is None else left + collateral
            what = "residual and collateral"
    if left is not None and cost is not None:
        evidence += f"; {what} at the marks {left:.3g} nats, {cost:.3g} without an update"
        if left > cost / 2:
            suggestion = (
                "The marked tokens kept most of their probability: the update hardly moved. Raise "
                "the learning rate, TRAIN_STEPS or negative_weight (alpha)."
            )
        else:
            suggestion = (
                "The marked tokens are gone, and others that are just as unwanted took their "
                "place: ineffective marks. Mark more (alternatives at a mark's first token; more "
                "training outputs), or generate, mark and train for another round."
            )
    is_seen = before.numerator >= _FEWEST and evaluation.cut < 0.25
    return Sign(name="no reduction", is_seen=is_seen, evidence=evidence, suggestion=suggestion)


def _moved_elsewhere(before: Outputs, num_newly_unwanted: int) -> Sign:
    num_before = before.unwanted_outputs.numerator
    return Sign(
        name="unwanted elsewhere",
        is_seen=num_newly_unwanted >= max(_FEWEST, num_before / 4),
        evidence=(
            f"{num_newly_unwanted} outputs that were clean are unwanted now; {num_before} were "
            "unwanted before"
        ),
        suggestion=(
            "The removed probability went to other unwanted values, or clean outputs were hardly "
            "held. Give the annotator alternatives, train on more clean outputs "
            "(clean_per_marked), or use a KL term at ordinary positions (TNFF, TNRF)."
        ),
    )


def _damage(name: str, one: Rate, other: Rate, threshold: float) -> Sign:
    rise = other.value - one.value
    return Sign(
        name=name,
        is_seen=rise >= threshold and other.numerator - one.numerator >= _FEWEST,
        evidence=f"{_share(one)} before, {_share(other)} now",
        suggestion=(
            "Loss imbalance or poor marks. Lower negative_weight (alpha) or the learning rate, "
            "train on more clean outputs (clean_per_marked); and see whether spans cut words in "
            "half or cover what is right."
        ),
    )


def _length_drift(one: float, other: float) -> Sign:
    ratio = other / one if one else 1.0
    suggestion = (
        "Outputs end too early: marks near the end teach to stop, and log-likelihood terms sharpen "
        "what is short. Lower negative_weight (alpha), use a KL term at ordinary positions."
        if ratio < 1
        else "Outputs no longer end: the end of a text lost probability. Lower negative_weight "
        "(alpha) or TRAIN_STEPS, and make sure that training outputs are not cut before their end "
        "(TASK_FEATURE_LENGTHS)."
    )
    return Sign(
        name="length drift",
        is_seen=abs(ratio - 1) > 0.1,
        evidence=f"mean length {one:.1f} before, {other:.1f} now ({ratio - 1:+.0%})",
        suggestion=suggestion,
    )


def _collapse(what: str, of: str, one: Rate, other: Rate) -> Sign:
    return Sign(
        name=f"collapse of distinct {what}",
        is_seen=other.value < 0.9 * one.value and one.numerator >= 2 * _FEWEST,
        evidence=f"{_share(one)} different {of} before, {_share(other)} now",
        suggestion=(
            "The model says the same whatever the input. Lower the learning rate or TRAIN_STEPS; "
            "hold ordinary positions by a KL term (TNFF, TNRF) instead of log-likelihood."
        ),
    )


def _changed_too_much(comparison: Comparison, mask: Mask | None) -> list[Sign]:
    bleu, rouge_l = comparison.bleu, comparison.rouge_l
    least_bleu, least_rouge_l = _LEAST_BLEU, _LEAST_ROUGE_L
    evidence = f"BLEU {bleu:.1f} and ROUGE-L {rouge_l:.1f} to the original's outputs"
    if mask is not None:
        same = mask.to_current.exact_match
        if same.numerator == same.denominator:  # the mask itself, which no update can outdo
            return []
        of_mask = mask.comparison
        least_bleu, least_rouge_l = (_LEAST_OF_MASK * of for of in (of_mask.bleu, of_mask.rouge_l))
        evidence += f"; the decode mask has {of_mask.bleu:.1f} and {of_mask.rouge_l:.1f}"
    return [
        Sign(
            name="low BLEU or ROUGE-L",
            is_seen=bleu < least_bleu or rouge_l < least_rouge_l,
            evidence=evidence,
            suggestion=(
                "Over-constrained: alpha too high. Lower negative_weight or the learning rate; "
                "replace log-likelihood at ordinary positions by a KL term. Sampled outputs differ "
                "by chance as well: compare them with another arm rather than with 100."
            ),
        )
    ]


def _clean_changed(unchanged_clean: Rate | None) -> list[Sign]:
    if unchanged_clean is None:
        return []
    is_measured = unchanged_clean.denominator >= 2 * _FEWEST
    return [
        Sign(
            name="clean outputs changed",
            is_seen=is_measured and unchanged_clean.value < 0.1,
            evidence=f"of the original's clean outputs {_share(unchanged_clean)} did not change",
            suggestion=(
                "The update does not stop at what was marked. Replace log-likelihood at ordinary "
                "positions by a KL term (TNFF, TNRF), or lower the learning rate or TRAIN_STEPS. "
                "Sampled outputs differ by chance as well: compare them with another arm."
            ),
        )
    ]


def _leak(unrelated: Unrelated | None) -> list[Sign]:
    if unrelated is None:
        return []
    kl = unrelated.kl
    # Evaluations of before do not tell the number of positions.
    is_measured = unrelated.num_positive != 0
    shown = "no finite number of" if kl is None else f"{kl:.3f}"
    shown = f"{shown} nats a token" if is_measured else "every token is marked, so none has a KL"
    return [
        Sign(
            name="leak into other tasks",
            is_seen=is_measured and (kl is None or kl > _LEAK),
            evidence=f"on unrelated prompts {shown}; {_share(unrelated.unchanged)} unchanged",
            suggestion=(
                "The update changes what it was not trained on. Lower the learning rate or "
                "TRAIN_STEPS, use a KL term at ordinary positions (TNFF, TNRF), or train adapters "
                "in the upper layers alone (TRAINED_LAYERS)."
            ),
        )
    ]


def _share(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.numerator:,} of {rate.denominator:,})"
