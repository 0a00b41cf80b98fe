r"""Compares what `patch` took with a grid of weights and numbers of updates around it.

    python benchmarks/patch_grid.py --patch=patched

For each cell of the grid the pipeline that `patch` printed is run with another weight and another
number of updates, on the same outputs and the same prompts to report on. A row says how much of
what is unwanted is gone there, and what that costs elsewhere. The last line is the question: the KL
to the original of what `patch` took, as a multiple of the smallest one in the grid (with its own)
whose cut is at least --cut. The grid may look at these prompts, `patch` did not.

Takes 5 minutes of two cores on the quickstart's T5 (9 cells), and about 2 GB (memory estimated).
"""

import argparse
import dataclasses
import json
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tnt_jax import pipeline
from tnt_jax.experiments.experiment_run import open_run
from tnt_jax.runtime import console, holding, program


def cells(folder: pathlib.Path, records: str, weights: list[float], updates: int) -> list[tuple]:
    """Rows of a number of updates: weight, updates, cut, BLEU, KL elsewhere."""
    flags = {
        "OUTPUT_DIR": str(folder / "grid" / f"{updates} updates"),
        "TRAINING_RECORDS": records,
        "TRAIN_STEPS": updates,
    }
    program.configure(
        "tnt_jax.pipeline",
        "pipeline",
        [f"--gin_file={folder / 'pipeline.gin'}"]
        + [f"--gin.{name}={value!r}" for name, value in flags.items()],
    )
    found = program.bound_arguments(pipeline.pipeline, ("experiment", "arms"))
    (arm,) = found["arms"]
    arms = [
        dataclasses.replace(
            arm,
            name=f"weight {weight:g}",
            objective=dataclasses.replace(arm.objective, negative_weight=weight),
        )
        for weight in weights
    ]
    with (
        holding.folder(found["experiment"].folder, "OUTPUT_DIR"),
        console.logging_to(folder / "grid.log"),
    ):
        outcome = pipeline.run_stages(found["experiment"], arms)
    decoder = outcome.opened.first_decoder
    rows = []
    for weight, of_arm in zip(weights, arms, strict=True):
        evaluation = outcome.evaluations[of_arm.name][decoder]
        kl = evaluation.certificate and evaluation.certificate.positive_collateral
        rows.append((weight, updates, evaluation.cut, evaluation.comparison.bleu, kl))
    return rows


def shown(row: tuple) -> tuple[str, ...]:
    """A row as text."""
    weight, updates, cut, bleu, kl = row
    return f"{weight:g}", str(updates), f"{cut:.1%}", f"{bleu:.1f}", f"{kl:.4f}"


def main() -> None:
    """The whole grid, one number of updates after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", type=pathlib.Path, required=True, help="a folder that is done")
    parser.add_argument("--weights", type=float, nargs="+", default=[3.0, 10.0, 30.0])
    parser.add_argument(
        "--updates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="times those of the patch"
    )
    parser.add_argument("--cut", type=float, help="that counts; else what patch reached")
    flags = parser.parse_args()
    folder = flags.patch.absolute()
    numbers = json.loads((folder / "patch.json").read_text("utf-8"))
    program.configure("tnt_jax.pipeline", "pipeline", [f"--gin_file={folder / 'pipeline.gin'}"])
    experiment = program.bound_arguments(pipeline.pipeline, ("experiment",))["experiment"]
    with holding.folder(experiment.folder, "OUTPUT_DIR"):
        records = open_run(experiment).make_training_outputs()
    taken = (
        *(numbers["weight"], numbers["updates"], numbers["cut"]),
        *(numbers["bleu"], numbers["kl_elsewhere"]),
    )
    rows = []
    for times in flags.updates:
        found = cells(folder, records, flags.weights, max(round(times * numbers["updates"]), 1))
        for row in found:
            console.log(" | ".join(shown(row)))
        rows += found
    columns = ("weight", "updates", "cut", "BLEU", "KL elsewhere, nats a token")
    console.table([*map(shown, rows), ("taken:", *shown(taken)[1:])], columns=columns)
    least = numbers["cut"] if flags.cut is None else flags.cut
    enough = [row for row in [*rows, taken] if row[2] >= least]
    if not enough:
        console.log(f"No cell has a cut of {least:.1%}.")
        return
    best = min(enough, key=lambda row: row[-1])
    console.log(
        f"With a cut of {least:.1%} or more the smallest KL elsewhere is {best[-1]:.4f} (weight "
        f"{best[0]:g}, {best[1]} updates): the patch has {taken[-1] / best[-1]:.2f} times as much."
    )


if __name__ == "__main__":
    main()
