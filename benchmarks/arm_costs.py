"""What an update of each arm of the study takes: bytes on the device, by XLA; and seconds.

    python benchmarks/arm_costs.py --run=runs/venues_sweep

The model is the run's original, a batch is what its arms are trained with (16 packed rows), and the
ids to remove of a position are as many as the run's training files have. Seconds are the smallest
`train_seconds` of an arm in the run's results.json, the one that other work disturbed least.

Takes about 5 minutes of one core and 2 GB of memory (estimated, not measured).
"""

import argparse
import dataclasses
import json
import pathlib

import jax
import optax
import report

from tnt_jax import objectives, precompile
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import datasets
from tnt_jax.data.examples import max_negative_ids
from tnt_jax.training import settings

ARMS = {
    "marked tokens": (
        *("fine-tuning", "NL+LL", "UL+LL", "NL+KL", "UL+KL"),
        *("TNFLL", "TNRLL", "TNFF", "TNRF", "TNRR", "TNSF", "TNJJ"),
    ),
    "every position": ("TNFF", "TNRF"),
}
FINE_TUNE = objectives.TntObjective(negative_term="none", positive_term="log_likelihood")


def most_ids(file, vocabulary, lengths):
    """The largest number of ids to remove at a position of a training file."""
    dataset = datasets.RecordFiles(files=str(file), vocabulary=vocabulary)
    return max_negative_ids(dataset.load(lengths))


def least_seconds(results):
    """The seconds of the quickest training of each arm."""
    found = {}
    for row in json.loads(results.read_text())["rows"]:
        if row["train_seconds"] is not None:
            name, seconds = row["objective"], row["train_seconds"]
            found[name] = min(seconds, found.get(name, seconds))
    return found


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", default="56,48", help="inputs,targets")
    arguments = parser.parse_args()
    inputs, targets = map(int, arguments.lengths.split(","))
    folder = arguments.run
    original = str(folder / "original" / "model")
    vocabulary = pretrained.vocabulary(original)
    config = dataclasses.replace(pretrained.open_checkpoint(original).config, dropout_rate=0.0)
    lengths = {"inputs": inputs, "targets": targets}
    outputs = folder / "training_outputs"
    (every,) = outputs.glob("greedy.Gazetteer-* and sampled.Gazetteer-*.merged.jsonl")
    files = {"marked tokens": outputs / "greedy and sampled.merged.jsonl", "every position": every}
    seconds = least_seconds(folder / "results.json")
    report.heading()

    def rows():
        first = None  # MiB of fine-tuning
        for marks, file in files.items():
            number = most_ids(file, vocabulary, lengths)
            for name in ARMS[marks]:
                objective = FINE_TUNE if name == "fine-tuning" else objectives.named(name)
                found = precompile.compile_step(
                    jax.devices()[:1],
                    model=config,
                    objective=objective,
                    update=settings.Update(
                        batch_size=arguments.batch,
                        task_feature_lengths=lengths,
                        optimizer=optax.adam(3e-4),
                        pack=True,
                    ),
                    original_choice=settings.OriginalChoice(path=None),
                    num_negative_ids=number,
                )
                total = found["bytes"]["total"] / 2**20
                first = first or total
                arm = name if marks == "marked tokens" else f"{name}, {marks}"
                took = round(seconds[arm]) if arm in seconds else "-"
                yield arm, marks, number, total, total / first, took

    report.table(["arm", "marks", "ids a position", "MiB", "times fine-tuning", "seconds"], rows())


if __name__ == "__main__":
    main()
