"""Marks found from labels of whole outputs, against the marks that the labels were made from.

    make quickstart && python benchmarks/sequence_marks.py

Reads the original, the prompts and the gazetteer of a finished quickstart (or sweep: --run). The
original's samples for its training prompts are labelled bad where the gazetteer marks anything, and
`localize` finds marks from these labels alone. First table: they against the gazetteer's, token by
token, and values of 50 prefixes against 64 sampled continuations of each. Second table, --train:
what TNRF makes of either, and of found marks with the largest fall of a bad output in which nothing
was found, on the prompts kept for evaluation. No alternatives are removed: labels know none.

Takes 15 minutes of one core after the quickstart, and about 2 GB (estimated, not measured).
"""

import argparse
import json
import pathlib

import finished_run
import numpy as np
import report

from tnt_jax import localize
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import records
from tnt_jax.localization import marking, prefix_values
from tnt_jax.models import decoding

# Longer than the run's own outputs, of which one in twenty is cut.
SAMPLED = decoding.Decoding(max_length=64, temperature=1.0)
NUM_SAMPLES = 64


def main():
    """Prints the tables; what is computed is kept in a folder of the run, and used again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, default="runs/quickstart")
    parser.add_argument("--output", type=pathlib.Path, help="default: sequence_marks of the run")
    parser.add_argument("--train", action="store_true", help="the second table, too")
    arguments = parser.parse_args()
    folder = arguments.output or arguments.run / "sequence_marks"
    run = finished_run.FinishedRun(arguments.run, folder)
    annotator = finished_run.gazetteer(run.gazetteer)
    given, found, all_bad = folder / "given.jsonl", folder / "found.jsonl", folder / "largest.jsonl"
    run.generate(run.original, run.train_prompts, given, SAMPLED, annotator, seed=7)
    quality = folder / "found.jsonl.values.json"
    if not quality.exists():
        localize.localize(
            output=str(found),
            input=str(given),
            original_model=localize.OriginalModel(
                checkpoint_path=str(run.original),
                model=pretrained.FromCheckpoint(),
                task_feature_lengths=finished_run.LENGTHS,
                batch_size=128,
            ),
            vocabulary=run.vocabulary,
            check=localize.MonteCarlo(annotator=annotator, num_samples=NUM_SAMPLES),
        )
    report.heading()
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
        rows = records.read_records(found)
        records.write_records(all_bad, (with_a_mark(row, run.vocabulary) for row in rows))
        measured = [arm(run, marks, annotator) for marks in (given, found, all_bad)]
        columns = [f"{name}: {what}" for name in finished_run.DECODERS for what in ("cut", "BLEU")]
        print()
        report.table(["marks", *columns], measured)


def with_a_mark(row, vocabulary):
    """A bad output without a mark gets one where its value falls most."""
    if "blame" not in row.extra:
        return row
    threshold = prefix_values.Threshold(at_least_one=True)
    is_negative = threshold.negative(np.array(row.extra["values"]))
    return marking.mark(row, is_negative, vocabulary)


def arm(run, marks, annotator):
    """Trains on the marks; how much of the unwanted is cut, and what is kept."""
    model = run.train(marks.stem, marks)
    row = [marks.stem]
    for decoder in finished_run.DECODERS:
        measured = run.measure(model, decoder, annotator)
        row += [f"{measured['cut']:.1%}", f"{measured['bleu']:.1f}"]
    return row


if __name__ == "__main__":
    main()
