"""Runs the whole loop: generate, annotate, train, generate again, evaluate, report.

Each stage is one of the other programs, with the settings of the gin file. Stages exchange files
under OUTPUT_DIR. A stage that finished with the same settings and input files is kept, one that
was interrupted resumes, and one whose settings changed is done again with all that follow.

Example, the quickstart:

    python -m tnt_jax.pipeline --gin_file=experiments/quickstart.gin
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tnt_jax.data import records
from tnt_jax.experiments.experiment import Arm, Experiment, Opened
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
      bleu_margin: BLEU to the original's outputs above the baseline's, for each decoder.
    """

    arm: str
    baseline: str
    num_unwanted: int
    unwanted_rate: float
    cut: float
    bleu_margin: Mapping[str, float]

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
) -> dict[str, Any]:
    """Runs every stage that is not done, prints the table, writes `summary.json` and `report.html`.

    Args:
      experiment: What the arms share.
      arms: What to compare; each is trained from the original on the same annotated outputs.
      num_rounds: Of every arm: a further one generates with the model so far, and trains it on all
        outputs so far.
      expectations: To check at the end.
      num_examples: Changed outputs to print.

    Returns:
      What `summary.json` holds.

    Raises:
      UsageError: Settings contradict each other, another run writes into OUTPUT_DIR, or a stage
        found a mistake.
    """
    if num_rounds < 1:
        raise UsageError(f"NUM_ROUNDS: expected at least 1, found {num_rounds}.")
    experiment.check_names([arm.name for arm in arms])
    if expectations:
        expectations.check_names([arm.name for arm in arms], list(experiment.decoders))
    with holding.folder(experiment.folder, "OUTPUT_DIR"):
        return _run(experiment, arms, num_rounds, expectations, num_examples)


def _run(
    experiment: Experiment,
    arms: Sequence[Arm],
    num_rounds: int,
    expectations: Expectations | None,
    num_examples: int,
) -> dict[str, Any]:
    began = time.monotonic()
    opened = Opened(experiment)
    decoders = experiment.decoders
    training_outputs, original_outputs = opened.training_outputs, opened.original_outputs
    evaluations: dict[str, dict[str, Any]] = {}
    models: dict[str, str] = {}
    for arm in arms:
        *_, models[arm.name] = opened.train_rounds(
            arm.name, arm.objective, training_outputs, num_rounds
        )
        evaluations[arm.name] = {
            decoder: opened.evaluate(arm.name, models[arm.name], decoder) for decoder in decoders
        }
        opened.hand_back(arm.name, models[arm.name])

    checks = _check(expectations, evaluations) if expectations else []
    summary = {"evaluations": evaluations, "expectations": checks, "num_rounds": num_rounds}
    root, first_decoder = opened.root, opened.first_decoder
    files.write_json(str(root / "summary.json"), summary)
    page = opened.report([arm.name for arm in arms])
    _print_table(evaluations, decoders, opened.num_seen)
    best = expectations.arm if expectations else arms[0].name
    _print_examples(
        original_outputs[first_decoder],
        str(root / best / f"{first_decoder}.annotated.jsonl"),
        best,
        num_examples,
    )
    for check in checks:
        console.log(f"{'reached' if check['reached'] else 'MISSED '}  {check['text']}")
    console.log(
        f"Everything is in {root}: the patched model in {models[best]}, the numbers in "
        f"{root / 'summary.json'}. {time.monotonic() - began:.0f} seconds."
    )
    console.log(f"Open {page.resolve().as_uri()} in a browser: before and after, output by output.")
    return summary


def _check(
    expected: Expectations, evaluations: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    decoder = next(iter(evaluations[expected.arm]))
    first = evaluations[expected.arm][decoder]
    unwanted = first["original"]["unwanted_outputs"]
    checks = [
        (
            f"unwanted {decoder} outputs of the original: {unwanted['numerator']}, expected at "
            f"least {expected.num_unwanted}",
            unwanted["numerator"] >= expected.num_unwanted,
        ),
        (
            f"their share: {unwanted['value']:.1%}, expected at least {expected.unwanted_rate:.0%}",
            unwanted["value"] >= expected.unwanted_rate,
        ),
        (
            f"cut by {expected.arm}, {decoder}: {first['cut']:.1%}, expected at least "
            f"{expected.cut:.0%}",
            first["cut"] >= expected.cut,
        ),
    ]
    for name, margin in expected.bleu_margin.items():
        bleu, baseline = (
            evaluations[arm][name]["comparison"]["bleu"]
            for arm in (expected.arm, expected.baseline)
        )
        checks.append(
            (
                f"BLEU to the original, {name}: {expected.arm} {bleu:.1f}, {expected.baseline} "
                f"{baseline:.1f}; expected at least {margin:g} more",
                bleu - baseline >= margin,
            )
        )
    return [{"text": text, "reached": bool(reached)} for text, reached in checks]


def _print_table(
    evaluations: Mapping[str, Mapping[str, Any]], decoders: Iterable[str], num_seen: int
) -> None:
    for decoder in decoders:
        any_arm = next(iter(evaluations.values()))[decoder]
        before = any_arm["original"]
        columns = ("", "unwanted", "cut", "BLEU", "ROUGE-L", "unchanged", "repeats", "KL elsewhere")
        repeats = _percent(before["repeated_word"])
        rows = [("original", _percent(before["unwanted_outputs"]), "", "", "", "", repeats, "")]
        for arm, of_arm in evaluations.items():
            result = of_arm[decoder]
            comparison, after = result["comparison"], result["current"]
            elsewhere = result["certificate"]["positive_collateral"]  # None: it was not finite
            rows.append(
                (
                    arm,
                    _percent(after["unwanted_outputs"]),
                    f"{result['cut']:.1%}",
                    f"{comparison['bleu']:.1f}",
                    f"{comparison['rouge_l']:.1f}",
                    _percent(comparison["exact_match"]),
                    _percent(after["repeated_word"]),
                    "-" if elsewhere is None else f"{elsewhere:.3f}",
                )
            )
        num_outputs = before["unwanted_outputs"]["denominator"]
        which = f"prompts, {num_seen} of them trained on" if num_seen else "unseen prompts"
        console.table(rows, columns=columns, title=f"{decoder} outputs on {num_outputs} {which}")


def _print_examples(original_path: str, current_path: str, arm: str, number: int) -> None:
    original = records.read_records(original_path)
    current = {row.id: row for row in records.read_records(current_path)}
    changed = [
        (before, current[before.id])
        for before in original
        if before.negative_spans and not current[before.id].negative_spans
    ]
    for before, after in changed[:number]:
        spans = ", ".join(
            repr(before.targets[slice(*span)]) for span in before.negative_spans or ()
        )
        console.log(
            f"\n  input     {before.inputs}\n  original  {before.targets}\n"
            f"  {arm:<8}  {after.targets}\n  unwanted  {spans}"
        )


def _percent(rate: Mapping[str, Any]) -> str:
    return f"{rate['value']:.1%} ({rate['numerator']})"


if __name__ == "__main__":
    program.run("tnt_jax.pipeline", "pipeline")
