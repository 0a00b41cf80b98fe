"""Runs the whole loop: generate, annotate, train, generate again, evaluate, report.

Each stage is one of the other programs, with the settings of the gin file. Stages exchange files
under OUTPUT_DIR. A stage that finished with the same settings and input files is kept, one that
was interrupted resumes, and one whose settings changed is done again with all that follow.

Example, the quickstart:

    python -m tnt_jax.pipeline --gin_file=experiments/quickstart.gin
"""

import dataclasses
import itertools
import math
import operator
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.evaluation import diagnosis, results, tables
from tnt_jax.evaluation.evaluations import Evaluation, Rate
from tnt_jax.experiments.experiment import Arm, Experiment, check_rounds
from tnt_jax.experiments.experiment_run import ExperimentRun, open_run
from tnt_jax.runtime import console, files, holding, program
from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expectations:
    """What a run should reach; it is checked and reported either way.

    Attributes:
      arm: The arm that should reach it.
      baseline: The arm that it is compared with.
      num_unwanted: Unwanted outputs of the original, at least, with the first decoder.
      unwanted_rate: The same as a share of its outputs.
      cut: Share of the unwanted outputs that `arm` removes, with the first decoder.
      bleu_margin: BLEU to the original's outputs above the baseline's, for each decoder. This and
        what follows is not asked for unless it is set; it is of the first decoder.
      bleu_times_baseline: The same as a multiple of the baseline's.
      bleu_share_of_mask: The same as a share of the mask's (`Experiment.mask_decoding`).
      bleu_to_mask: BLEU to the mask's outputs.
      trigrams_share_of_mask: Distinct trigrams as a share of the mask's.
      kl_elsewhere: KL to the original at ordinary positions, at most, in nats a token.
      collateral: At the marks, at most, in nats a token.
      baseline_kl_times: The baseline's `kl_elsewhere` as a multiple of the arm's.
      fewer_repeated_phrases: Fewer outputs repeat a phrase than of the original.
    """

    arm: str
    baseline: str
    num_unwanted: int
    unwanted_rate: float
    cut: float
    bleu_margin: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bleu_times_baseline: float | None = None
    bleu_share_of_mask: float | None = None
    bleu_to_mask: float | None = None
    trigrams_share_of_mask: float | None = None
    kl_elsewhere: float | None = None
    collateral: float | None = None
    baseline_kl_times: float | None = None
    fewer_repeated_phrases: bool = False

    def check_names(self, arms: Sequence[str], decoders: Sequence[str]) -> None:
        """Finds out, before the work, whether a run has what is expected of it.

        Raises:
          UsageError: It has no such arm or decoder.
        """
        for setting, names, of_run in (
            ("arm", [self.arm], arms),
            ("baseline", [self.baseline], arms),
            ("bleu_margin", self.bleu_margin, decoders),
        ):
            if strange := [name for name in names if name not in of_run]:
                raise UsageError(
                    f"Expectations.{setting}: expected what this run has, {', '.join(of_run)}; "
                    f"found {', '.join(strange)}. Change it, or set "
                    "--gin.pipeline.pipeline.expectations=None."
                )


def pipeline(
    *,
    experiment: Experiment,
    arms: Sequence[Arm],
    num_rounds: int = 1,
    expectations: Expectations | None = None,
    num_examples: int = 3,
    num_masked_examples: int = 10,
) -> dict[str, Any]:
    """Runs every stage that is not done, prints the table, writes `summary.json` and `report.html`.

    Args:
      experiment: What the arms share.
      arms: What to compare; each is trained from the original on the same annotated outputs.
      num_rounds: Rounds of every arm. A further round generates with the model so far, and trains
        it on all outputs so far.
      expectations: What to check at the end; None checks nothing.
      num_examples: How many changed outputs are printed.
      num_masked_examples: Before training, print so many unwanted outputs of the original and what
        it says while that is masked, and how many of all are still unwanted then. If they are no
        better, the marks are wrong: training would teach just that. 0 prints nothing.

    Returns:
      What `summary.json` holds.

    Raises:
      UsageError: Settings contradict each other, another run writes into OUTPUT_DIR, or a stage
        found a mistake.
    """
    check_rounds(experiment, num_rounds)
    experiment.check_names([arm.name for arm in arms])
    if expectations:
        expectations.check_names([arm.name for arm in arms], list(experiment.decoders))
    with holding.folder(experiment.folder, "OUTPUT_DIR"):
        return _run(experiment, arms, num_rounds, expectations, num_examples, num_masked_examples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the stages of a pipeline came to.

    Attributes:
      opened: The experiment, whose files are there.
      evaluations: What `evaluate` wrote, by arm and decoder.
      models: The checkpoint of each arm.
      checks: The outcome of each expectation, in words.
      summary: What `summary.json` holds.
      page: The report.
      num_seen: Outputs with the first decoder whose prompts were learned from.
    """

    opened: ExperimentRun
    evaluations: Mapping[str, Mapping[str, Evaluation]]
    models: Mapping[str, str]
    checks: Sequence[Mapping[str, Any]]
    summary: dict[str, Any]
    page: pathlib.Path
    num_seen: int


def run_stages(
    experiment: Experiment,
    arms: Sequence[Arm],
    num_rounds: int = 1,
    expectations: Expectations | None = None,
    num_masked_examples: int = 0,
) -> Outcome:
    """Runs every stage that is not done, and prints no table; OUTPUT_DIR is held by the caller.

    Args:
      experiment: What the arms share.
      arms: What to compare; each is trained from the original on the same annotated outputs.
      num_rounds: Rounds of generating, annotating and training for every arm.
      expectations: What to check at the end; None checks nothing.
      num_masked_examples: How many masked outputs of the original are printed before training.

    Raises:
      UsageError: A stage found a mistake.
    """
    for arm in arms:
        experiment.check_arm(arm.name, lambda arm=arm: arm.objective, arm.changes)
    opened = open_run(experiment)
    decoders = experiment.decoders
    training_outputs, original_outputs = (
        opened.make_training_outputs(),
        opened.make_original_outputs(),
    )
    num_seen = opened.count_seen([training_outputs])
    evaluations: dict[str, dict[str, Evaluation]] = {}
    models: dict[str, str] = {}
    opened.make_unrelated_outputs()
    masks = opened.make_mask_outputs()
    of_masks = {name: opened.evaluate_mask(name) for name in masks}
    if opened.first_decoder in masks:
        _print_masked(
            original_outputs[opened.first_decoder],
            masks[opened.first_decoder],
            num_masked_examples,
        )
    for arm in arms:
        *_, models[arm.name] = opened.train_rounds(
            arm.name, arm.objective, training_outputs, num_rounds, arm.changes
        )
        evaluations[arm.name] = {
            decoder: opened.evaluate(arm.name, models[arm.name], decoder) for decoder in decoders
        }
        opened.hand_back(arm.name, models[arm.name])

    if of_masks:
        evaluations[results.MASK] = of_masks
    checks = _check(expectations, evaluations) if expectations else []
    schedule = experiment.schedule(start_path=None)
    training = {
        arm.name: {
            "alpha": arm.objective.negative_weight,
            "seed": schedule.seed,
            "steps": schedule.train_steps * num_rounds,
        }
        for arm in arms
    }
    summary = {
        "evaluations": {
            arm: {decoder: found.as_json() for decoder, found in of_arm.items()}
            for arm, of_arm in evaluations.items()
        },
        "expectations": checks,
        "num_rounds": num_rounds,
        "training": training,
    }
    files.write_json(str(opened.root / "summary.json"), summary)
    return Outcome(
        opened=opened,
        evaluations=evaluations,
        models=models,
        checks=checks,
        summary=summary,
        page=opened.report([arm.name for arm in arms]),
        num_seen=num_seen,
    )


def _run(
    experiment: Experiment,
    arms: Sequence[Arm],
    num_rounds: int,
    expectations: Expectations | None,
    num_examples: int,
    num_masked_examples: int,
) -> dict[str, Any]:
    began = time.monotonic()
    found = run_stages(experiment, arms, num_rounds, expectations, num_masked_examples)
    opened, root = found.opened, found.opened.root
    first_decoder = opened.first_decoder
    _print_table(found.evaluations, experiment.decoders, found.num_seen)
    best = expectations.arm if expectations else arms[0].name
    _print_examples(
        opened.make_original_outputs()[first_decoder],
        str(opened.files_of(best).annotated(first_decoder)),
        best,
        num_examples,
    )
    for check in found.checks:
        console.log(f"{'reached' if check['reached'] else 'MISSED '}  {check['text']}")
    console.log(
        f"Everything is in {root}: the patched model in {found.models[best]}, the numbers in "
        f"{root / 'summary.json'}. {time.monotonic() - began:.0f} seconds."
    )
    page = found.page.resolve().as_uri()
    console.log(f"Open {page} in a browser: before and after, output by output.")
    return found.summary


def _check(
    expected: Expectations, evaluations: Mapping[str, Mapping[str, Evaluation]]
) -> list[dict[str, Any]]:
    decoder = next(iter(evaluations[expected.arm]))
    first, other = (evaluations[arm][decoder] for arm in (expected.arm, expected.baseline))
    unwanted, bleu = first.original.unwanted_outputs, first.comparison.bleu
    elsewhere, collateral = _kl_elsewhere(first), math.inf
    if first.certificate is not None:
        collateral = _known(first.certificate.negative_collateral)
    # What, the number, the limit (None: nobody asked), how it is written.
    at_least = [
        (
            f"unwanted {decoder} outputs of the original",
            unwanted.numerator,
            expected.num_unwanted,
            "g",
        ),
        ("their share", unwanted.value, expected.unwanted_rate, ".1%"),
        (f"cut by {expected.arm}, {decoder}", first.cut, expected.cut, ".1%"),
        (
            f"BLEU to the original, as a multiple of {expected.baseline}'s",
            _over(bleu, other.comparison.bleu),
            expected.bleu_times_baseline,
            ".2f",
        ),
        (
            f"KL elsewhere of {expected.baseline}, as a multiple",
            _over(_kl_elsewhere(other), elsewhere),
            expected.baseline_kl_times,
            ".1f",
        ),
    ]
    for name, margin in expected.bleu_margin.items():
        one, baseline = (
            evaluations[arm][name].comparison.bleu for arm in (expected.arm, expected.baseline)
        )
        more = f"BLEU to the original, {name}: {expected.arm} {one:.1f}, {expected.baseline} "
        at_least.append((more + f"{baseline:.1f}; difference", one - baseline, margin, ".1f"))
    after, mask = first.current, first.mask
    of_mask = dict.fromkeys(("bleu", "to_mask", "trigrams"), math.nan)  # no mask reaches nothing
    if mask is not None:
        trigrams = (of.distinct_trigrams.value for of in (after, mask))
        of_mask = {
            "bleu": _over(bleu, mask.comparison.bleu),
            "to_mask": mask.to_current.bleu,
            "trigrams": _over(*trigrams),
        }
    at_least += [
        (
            "BLEU to the original, as a share of the mask's",
            of_mask["bleu"],
            expected.bleu_share_of_mask,
            ".2f",
        ),
        ("BLEU to the mask's outputs", of_mask["to_mask"], expected.bleu_to_mask, ".1f"),
        (
            "distinct trigrams, as a share of the mask's",
            of_mask["trigrams"],
            expected.trigrams_share_of_mask,
            ".2f",
        ),
    ]
    at_most = [
        ("KL elsewhere, nats a token", elsewhere, expected.kl_elsewhere, ".3f"),
        ("collateral at the marks, nats a token", collateral, expected.collateral, ".3f"),
    ]
    repeats = first.original.repeated_phrase.value if expected.fewer_repeated_phrases else None
    below = [("outputs that repeat a phrase", after.repeated_phrase.value, repeats, ".1%")]
    return [
        {
            "text": f"{what}: {found:{form}}, expected {word} {limit:{form}}",
            "reached": bool(is_reached(found, limit)),
        }
        for word, is_reached, checks in (
            ("at least", operator.ge, at_least),
            ("at most", operator.le, at_most),
            ("below", operator.lt, below),
        )
        for what, found, limit, form in checks
        if limit is not None
    ]


def _kl_elsewhere(found: Evaluation) -> float:
    """What reaches no limit where it was not measured."""
    return math.inf if found.certificate is None else _known(found.certificate.positive_collateral)


def _over(part: float, whole: float) -> float:
    return part / whole if whole else math.inf


def _known(value: float | None) -> float:
    """None stands for what is not finite, or was not measured, and reaches no limit."""
    return math.inf if value is None else value


def _print_table(
    evaluations: Mapping[str, Mapping[str, Evaluation]], decoders: Iterable[str], num_seen: int
) -> None:
    for decoder in decoders:
        found = {arm: of_arm[decoder] for arm, of_arm in evaluations.items() if decoder in of_arm}
        before = next(iter(found.values())).original.unwanted_outputs
        rates = [before, *(one.current.unwanted_outputs for one in found.values())]
        rows = {arm: results.from_evaluation(one, {}) for arm, one in found.items()}
        original = tables.of_original(next(iter(rows.values())))
        rows = {"original": original} | rows
        which = f"prompts, {num_seen} of them trained on" if num_seen else "unseen prompts"
        columns = tables.known(filter(_is_printed, tables.OF_TEXTS), [*rows.values()])
        console.table(
            [
                (arm, _percent(rate), *_cells(arm, row, columns))
                for (arm, row), rate in zip(rows.items(), rates, strict=True)
            ],
            columns=("", "unwanted", *(column.heading for column in columns)),
            title=f"{decoder} outputs on {before.denominator} {which}",
        )
        _print_moved(decoder, found, original)
        # The same for all arms: certificates are of the original's outputs.
        of_arms = (diagnosis.notes(result.certificate) for result in found.values())
        for note in dict.fromkeys(itertools.chain.from_iterable(of_arms)):
            console.log(note)
    console.log(
        "BLEU and unchanged are to the original's own outputs. The mask's are what it says while "
        "what is unwanted is masked. Phrases: outputs that say four words twice. Trigrams: "
        "different ones among all. Residual: what is left, at marks, of what must go. Collateral "
        "and KL: what moved that need not, at marks, elsewhere, and on unrelated prompts."
    )


def _print_moved(decoder: str, found: Mapping[str, Evaluation], original: results.Row) -> None:
    """Prints what needs both models, of those arms where it was measured: not of a mask."""
    measured = {arm: row for arm, one in found.items() if (row := results.of_models(one))}
    fields = set(itertools.chain.from_iterable(measured.values()))
    # Also those where no number was finite: that is worth knowing.
    columns = [c for c in filter(_is_printed, tables.OF_MODELS) if c.field in fields]
    if columns:
        console.table(
            [
                (arm, *_cells(arm, row, columns))
                for arm, row in {"original": original, **measured}.items()
            ],
            columns=("", *(column.heading for column in columns)),
            title=f"{decoder} outputs: what moved, in nats a token",
        )


def _is_printed(column: tables.Column) -> bool:
    """Whether it is a main one, or says how much stayed as it was."""
    return bool(column.short) or column.field in ("exact_match", "unrelated_unchanged")


def _cells(arm: str, row: results.Row, columns: Iterable[tables.Column]) -> list[str]:
    unknown = "" if arm == "original" else "-"
    values = [(row.get(column.field), column.form) for column in columns]
    return [unknown if value is None else tables.written(value, form) for value, form in values]


def _print_masked(original_path: str, masked_path: str, number: int) -> None:
    """Shows what a mask makes of the unwanted outputs, whatever that is, and counts what is wrong.

    Args:
      original_path: Annotated outputs of the original.
      masked_path: The same under the mask.
      number: How many to show; of 0 nothing is said at all.
    """
    if not number:
        return
    pairs = _pairs(original_path, masked_path)
    unwanted = [pair for pair in pairs if pair[0].has_unwanted_text]
    clean = [pair for pair in pairs if not pair[0].has_unwanted_text]
    for before, after in unwanted[:number]:
        _print_pair(before, after, results.MASK)
    num_left = sum(after.has_unwanted_text for _, after in unwanted)
    changed = [pair for pair in clean if pair[0].targets != pair[1].targets]
    console.log(
        f"\nUnder the mask {num_left} of {len(unwanted)} unwanted outputs are still unwanted, and "
        f"{len(changed)} of {len(clean)} clean ones changed"
        + (", such as this one:" if changed else ".")
    )
    for before, after in changed[:1]:
        _print_pair(before, after, results.MASK)


def _print_examples(original_path: str, current_path: str, arm: str, number: int) -> None:
    mended = [
        (before, after)
        for before, after in _pairs(original_path, current_path)
        if before.has_unwanted_text and not after.has_unwanted_text
    ]
    for before, after in mended[:number]:
        _print_pair(before, after, arm)


def _pairs(original_path: str, current_path: str) -> list[tuple[records.Record, records.Record]]:
    current = {row.id: row for row in records.read_records(current_path)}
    return [(row, current[row.id]) for row in records.read_records(original_path)]


def _print_pair(before: records.Record, after: records.Record, arm: str) -> None:
    lines = {"input": before.inputs, "original": before.targets, arm: after.targets}
    for name, row in (("unwanted", before), ("unwanted now", after)):
        if row.has_unwanted_text:
            lines[name] = ", ".join(repr(row.targets[slice(*span)]) for span in row.offsets)
    width = max(map(len, lines))
    console.log("\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in lines.items()))


def _percent(rate: Rate) -> str:
    return f"{rate.value:.1%} ({rate.numerator})"


if __name__ == "__main__":
    program.run("tnt_jax.pipeline", "pipeline")
