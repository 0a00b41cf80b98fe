"""Two kinds of unwanted values, removed in either order or at once: do the models differ?

    make quickstart && python benchmarks/round_order.py

Reads the original, the prompts and the gazetteer of a finished quickstart (or sweep: --run). A are
the names of venues, B all other values. "A then B" trains on marks of A in the original's outputs,
then generates with that model, marks B, and trains on both files; "at once" marks both in the
original's outputs. The desired distributions of the three are the same wherever all three have the
same marks (tests/data/test_rounds.py); the trained models need not be. Printed: what each cut and
kept, and for each pair how many greedy answers are the same, and their divergence per token.

Takes 8 minutes of two cores after the quickstart, and about 2 GB (estimated, not measured).
"""

import argparse
import itertools
import json
import pathlib
import tempfile

import finished_run
import report

from tnt_jax import evaluate
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import records, rounds


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, default="runs/quickstart")
    parser.add_argument("--output", type=pathlib.Path, help="default: round_order of the run")
    arguments = parser.parse_args()
    folder = arguments.output or arguments.run / "round_order"
    folder.mkdir(parents=True, exist_ok=True)
    run = finished_run.FinishedRun(arguments.run, folder)
    values = json.loads(run.gazetteer.read_text())
    kinds = {
        "A": {name: of for name, of in values.items() if name == "name"},
        "B": {name: of for name, of in values.items() if name != "name"},
    }
    annotators = {"both": finished_run.gazetteer(run.gazetteer, alternatives=True)}
    for kind, of_kind in kinds.items():
        (folder / f"{kind}.json").write_text(json.dumps(of_kind))
        annotators[kind] = finished_run.gazetteer(folder / f"{kind}.json", alternatives=True)

    models = {
        "A then B": in_turn(run, annotators, "A", "B"),
        "B then A": in_turn(run, annotators, "B", "A"),
        "at once": said(run, run.original, "at_once", annotators["both"]),
    }
    models["at once"] = run.train("at_once_model", models["at once"])
    report.heading()
    rows = []
    for name, model in models.items():
        measured = run.measure(model, "greedy", annotators["both"])
        by_kind = [cut_of(run, model, annotators[kind]) for kind in kinds]
        rows.append(
            [name, *(f"{x:.1%}" for x in (*by_kind, measured["cut"])), f"{measured['bleu']:.1f}"]
        )
    report.table(["", "A cut", "B cut", "cut", "BLEU to the original"], rows)
    print()
    pairs = list(itertools.combinations(models, 2))
    pairs += [("original", name) for name in models]
    rows = []
    for first, second in pairs:
        same, divergence = compare(run, {**models, "original": run.original}, first, second)
        rows.append([f"{first}, {second}", f"{same:.1%}", f"{divergence:.4f}"])
    report.table(["", "same greedy answers", "KL per token, nats"], rows)


def said(run, model, name, annotator):
    """A model's greedy outputs for the prompts of training, marked."""
    output = run.folder / f"{name}.jsonl"
    decoder = finished_run.DECODERS["greedy"]
    run.generate(model, run.train_prompts, output, decoder, annotator)
    return output


def in_turn(run, annotators, first, second):
    """Trains against one kind, then against the other in what that model says."""
    name = f"{first}_then_{second}"
    of_first = said(run, run.original, f"{name}.1", annotators[first])
    model = run.train(f"{name}_1", of_first)
    of_second = said(run, model, f"{name}.2", annotators[second])
    merged = run.folder / f"{name}.merged.jsonl"
    files = [str(of_first), str(of_second)]
    rounds.merge_files(output=str(merged), rounds=files, vocabulary=run.vocabulary)
    return run.train(f"{name}_2", merged, start=model)


def cut_of(run, model, annotator):
    """Share of the original's greedy outputs with one kind of value that are without it now."""
    number = []
    for outputs in (
        run.run / "original/greedy.annotated.jsonl",
        run.folder / f"{model.name}.greedy.jsonl",
    ):
        rows = records.read_records(str(outputs))
        number.append(sum(bool(annotator.annotate(row).spans) for row in rows))
    return 1 - number[1] / number[0]


def compare(run, models, first, second):
    """Share of the same greedy answers; KL(first || second) per token of the first's answers."""
    unmarked, texts = [], []
    for name in (first, second):
        path = run.folder / f"{models[name].name}.greedy.jsonl"
        if name == "original":
            path = run.run / "original/greedy.annotated.jsonl"
        rows = [
            record_without_marks(row)
            for row in sorted(records.read_records(str(path)), key=lambda row: row.id)
        ]
        texts.append([row.targets for row in rows])
        unmarked.append(rows)
    same = sum(a == b for a, b in zip(*texts, strict=True)) / len(texts[0])
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(pathlib.Path(folder, f"{number}.jsonl")) for number in (0, 1)]
        for path, rows in zip(paths, unmarked, strict=True):
            records.write_records(path, rows)
        found = evaluate.evaluate(
            output=str(pathlib.Path(folder, "evaluation.json")),
            original_records=paths[0],
            current_records=paths[1],
            vocabulary=run.vocabulary,
            print_table=False,
            certificate=evaluate.Certificate(
                model=pretrained.FromCheckpoint(),
                original_checkpoint_path=str(models[first]),
                checkpoint_path=str(models[second]),
                task_feature_lengths=finished_run.LENGTHS,
                batch_size=128,
            ),
        )
    assert found.certificate is not None
    return same, found.certificate.positive_collateral


def record_without_marks(row):
    """Nothing is removed: the divergence of the whole distributions."""
    return records.Record(
        id=row.id,
        inputs=row.inputs,
        targets=row.targets,
        target_ids=row.target_ids,
        negative_spans=(),
    )


if __name__ == "__main__":
    main()
