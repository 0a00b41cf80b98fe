"""Marks found from labels of whole outputs, against the marks that the labels were made from.

    make quickstart && python benchmarks/sequence_marks.py     15 minutes on one core

Takes the original, the prompts and the gazetteer of a finished quickstart (or sweep: --run). The
original's samples for its training prompts are labelled bad where the gazetteer marks anything, and
`localize` finds marks from these labels alone. First table: they against the gazetteer's, token by
token, and values of 50 prefixes against 64 sampled continuations of each. Second table, --train:
what TNRF makes of either, and of found marks with the largest fall of a bad output in which nothing
was found, on the prompts kept for evaluation. No alternatives are removed: labels know none.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np
import optax
import report

from tnt_jax import (
    annotate,
    annotators,
    decoding,
    generate,
    localize,
    objectives,
    pretrained,
    records,
    results,
    sequence_values,
    tasks,
    train,
)

LENGTHS = {"inputs": 56, "targets": 64}
# Longer than the run's own outputs, of which one in twenty is cut.
SAMPLED = decoding.Decoding(max_length=64, temperature=1.0)
DECODERS = {  # those of the run
    "greedy": decoding.Decoding(max_length=48),
    "sampled": decoding.Decoding(max_length=48, temperature=1.0),
}
NUM_SAMPLES = 64
STEPS = 240


def main():
    """Prints the tables; what is computed is kept in a folder of the run, and used again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, default="runs/quickstart")
    parser.add_argument("--output", type=pathlib.Path, help="default: sequence_marks of the run")
    parser.add_argument("--train", action="store_true", help="the second table, too")
    arguments = parser.parse_args()
    run, folder = arguments.run, arguments.output or arguments.run / "sequence_marks"
    world = _World(run, folder)
    given, found, all_bad = folder / "given.jsonl", folder / "found.jsonl", folder / "largest.jsonl"
    if not given.exists():
        world.generate(run / "original/model", run / "corpus/mine.jsonl", given, SAMPLED, seed=7)
    quality = folder / "found.jsonl.values.json"
    if not quality.exists():
        localize.localize(
            output=str(found),
            input=str(given),
            checkpoint_path=str(run / "original/model"),
            model=pretrained.FromCheckpoint(),
            vocabulary=world.vocabulary,
            task_feature_lengths=LENGTHS,
            batch_size=128,
            check=localize.MonteCarlo(annotator=world.annotator, num_samples=NUM_SAMPLES),
        )
    print(report.environment(), end="\n\n")
    numbers = json.loads(quality.read_text())
    numbers = {**numbers, **numbers["agreement"], **numbers["monte_carlo"]}
    report.table(
        ["values of prefixes", ""],
        [
            [name, str(x) if isinstance(x, int) else f"{x:.3f}"]
            for name, x in numbers.items()
            if isinstance(x, int | float)
        ],
    )
    if arguments.train:
        records.write_records(all_bad, map(world.with_a_mark, records.read_records(found)))
        rows = [world.arm(path) for path in (given, found, all_bad)]
        print()
        report.table(["marks", *(f"{d}: {n}" for d in DECODERS for n in ("cut", "BLEU"))], rows)


@dataclasses.dataclass
class _World:
    run: pathlib.Path
    folder: pathlib.Path

    def __post_init__(self):
        self.vocabulary = pretrained.vocabulary(str(self.run / "vocabulary.model"), extra_ids=0)
        self.annotator = annotators.Gazetteer(
            path=str(self.run / "corpus/gazetteer.json"), alternatives=False
        )

    def generate(self, model, prompts, output, decoder, seed=0):
        """The model's outputs, marked by the gazetteer."""
        unmarked = self.folder / f"unmarked.{output.name}"
        generate.generate(
            output=str(unmarked),
            prompts=str(prompts),
            checkpoint_path=str(model),
            model=pretrained.FromCheckpoint(),
            vocabulary=self.vocabulary,
            decoder=decoder,
            task_feature_lengths=LENGTHS,
            batch_size=256,
            seed=seed,
        )
        annotate.annotate(output=str(output), input=str(unmarked), annotator=self.annotator)

    def with_a_mark(self, row):
        """A bad output without a mark gets one where its value falls most."""
        if "blame" not in row.extra:
            return row
        threshold = sequence_values.Threshold(at_least_one=True)
        is_negative = threshold.negative(np.array(row.extra["values"]))
        return localize.mark(row, is_negative, self.vocabulary)

    def arm(self, marks):
        """Trains on the marks; how much of the unwanted is cut, and what is kept."""
        name = marks.stem
        train.train(
            model_dir=str(self.folder / name),
            model=pretrained.FromCheckpoint(),
            objective=objectives.TntObjective(
                negative_term="reverse_kl", positive_term="forward_kl", negative_weight=2.0
            ),
            dataset=tasks.RecordFiles(
                files=str(marks), vocabulary=self.vocabulary, clean_per_marked=3
            ),
            task_feature_lengths=LENGTHS,
            batch_size=32,
            train_steps=STEPS,
            initial_checkpoint_path=str(self.run / "original/model"),
            optimizer=optax.adam(optax.cosine_decay_schedule(3e-4, STEPS)),
        )
        row = [name]
        for decoder, settings in DECODERS.items():
            output = self.folder / f"{name}.{decoder}.jsonl"
            self.generate(self.folder / name, self.run / "corpus/eval.jsonl", output, settings)
            before = records.read_records(self.run / f"original/{decoder}.annotated.jsonl")
            measured = results.measure(before, records.read_records(output))
            row += [f"{measured['cut']:.1%}", f"{measured['bleu']:.1f}"]
        return row


if __name__ == "__main__":
    main()
