"""Graded removal that looks ahead, against marks of single positions.

    make quickstart && python benchmarks/look_ahead.py

First table: texts that can be counted, the two tokens of docs/limits.md and ten tokens of three
kinds. Values are exact there, and so is KL(text), the divergence from the original over whole
texts; beside it stands what samples of the original, weighted by importance, make of it.

Second table: the quickstart's original (--run), its samples for some of its training prompts, and
what arms learn from them. "marks" are the gazetteer's; "labels" only say which outputs are bad, and
`localize` finds the tokens. KL(text) is measured on samples of each arm, for the prompts kept for
evaluation. Whatever is as clean costs at least the last column, `least_cost` of the shares of
unwanted samples before and after.

Takes 20 minutes of one core after the quickstart (15 measured for eight of the arms), and 1 GB.
"""

import argparse
import json
import math
import pathlib

import finished_run
import jax
import numpy as np
import optax
import report
from scipy.special import rel_entr

from tnt_jax import localize, objectives, train
from tnt_jax.checkpoints import opened_model, pretrained
from tnt_jax.data import datasets, marks, records
from tnt_jax.data.batches import batch_for_eval
from tnt_jax.data.examples import Example
from tnt_jax.evaluation import results
from tnt_jax.localization import look_ahead, prefix_values
from tnt_jax.models import decoding, sharding
from tnt_jax.objectives import fused
from tnt_jax.training import settings

SAMPLED = decoding.Decoding(max_length=48, temperature=1.0)
NUM_TOKENS = 8
# Name, marks, objective and its settings. Where every position has strengths, all have the negative
# term, and `negative_weight` multiplies the whole loss. So there are arms that have the same
# loss everywhere and do not look ahead: the two TNRR, and the one with `residual_weight`.
ARMS = (
    ("marks, TNFF x 10", "given", "TNFF", {"negative_weight": 10.0}),
    ("marks, TNRF x 2", "given", "TNRF", {"negative_weight": 2.0}),
    ("marks, TNFF, residual x 10", "given", "TNFF", {"residual_weight": 10.0}),
    ("marks, ahead, TNFF, residual x 10", "given_ahead", "TNFF", {"residual_weight": 10.0}),
    ("marks, TNRR", "given", "TNRR", {}),
    ("marks, ahead, TNRF", "given_ahead", "TNRF", {}),
    ("labels, TNRF x 2", "found", "TNRF", {"negative_weight": 2.0}),
    ("labels, blame, TNRF x 2", "blamed", "TNRF", {"negative_weight": 2.0}),
    ("labels, TNRR", "found", "TNRR", {}),
    ("labels, ahead, TNFF", "ahead", "TNFF", {}),
    ("labels, ahead, TNRF", "ahead", "TNRF", {}),
)


def main():
    """Prints the tables; what is computed is kept in a folder of the run, and used again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, default="runs/quickstart")
    parser.add_argument("--output", type=pathlib.Path, help="default: look_ahead of the run")
    parser.add_argument("--outputs", type=int, default=4000, help="samples to learn from")
    parser.add_argument("--exact", action="store_true", help="the first table alone")
    arguments = parser.parse_args()
    report.heading()
    columns = ["texts", "arm", "KL(text)", "by 10,000 samples", "smallest", "unwanted"]
    report.table(columns, exact_rows())
    if arguments.exact:
        return
    folder = arguments.output or arguments.run / "look_ahead"
    run = finished_run.FinishedRun(arguments.run, folder)
    annotator = finished_run.gazetteer(run.gazetteer, alternatives=True)
    files = marked(run, annotator, arguments.outputs)
    print()
    columns = ["", "cut", "BLEU", "to mask", "same as mask"]
    of_samples = ["sampled: cut", "BLEU", "KL(text)", "standard error", "at least"]
    report.table([*columns, *of_samples], (arm(run, annotator, files, *one) for one in ARMS))


# ----------------------------------------------------------------------- Texts that can be counted


def exact_rows():
    """A row for each set of texts and each way to mark."""
    ahead = look_ahead.LookAhead(num_tokens=3, least_strength=-99.0, least_value=0.0)
    for name, joint, is_clean in (two_tokens(), ten_tokens()):
        smallest = -math.log(joint[is_clean].sum())
        for arm_name, how in (("marks", None), ("look ahead", ahead)):
            said = desired(joint, is_clean, how)
            ratio = np.divide(said, joint, out=np.zeros_like(said), where=joint > 0)
            log_ratio = np.log(np.maximum(ratio, 1e-300))
            drawn = np.random.default_rng(0).choice(joint.size, 10_000, p=joint.ravel())
            by_samples = (ratio * log_ratio).ravel()[drawn].mean()
            kl = (said * log_ratio).sum()
            yield (
                name,
                arm_name,
                f"{kl:.4f}",
                f"{by_samples:.4f}",
                f"{smallest:.4f}",
                said[~is_clean].sum(),
            )


def two_tokens():
    """`a` or `b`, then right or wrong: wrong nine times in ten after `a`, once after `b`."""
    joint = np.array([[0.05, 0.45], [0.45, 0.05]])
    return "two tokens", joint, np.array([[True, False], [True, False]])


def ten_tokens():
    """Each of three tokens depends on the last two; bad is 2 after 1, anywhere."""
    after = np.random.default_rng(5).dirichlet(np.ones(3), size=(3, 3))
    tokens = np.stack(np.unravel_index(np.arange(3**10), (3,) * 10), axis=1)
    padded = np.pad(tokens, ((0, 0), (2, 0)))
    probs = after[padded[:, :-2], padded[:, 1:-1], tokens].prod(axis=1)
    is_bad = ((tokens[:, :-1] == 1) & (tokens[:, 1:] == 2)).any(axis=1)
    return "ten tokens", probs.reshape((3,) * 10), ~is_bad.reshape((3,) * 10)


def desired(joint, is_clean, ahead):
    """Over texts, if each position has its desired distribution; `ahead` None: of marks alone."""
    said = np.ones(1)
    for position in range(joint.ndim):
        size = joint.shape[position]
        shape = math.prod(joint.shape[:position]), size, -1
        total = joint.reshape(shape).sum(axis=2)
        probs = total / total.sum(axis=1, keepdims=True)
        values = (joint * is_clean).reshape(shape).sum(axis=2) / total
        strengths = (
            (values == 0) & ((probs * values).sum(axis=1, keepdims=True) > 0)
            if ahead is None
            else ahead.strengths(probs, values)
        )
        kept = probs * (1 - strengths)
        said = (said[:, None] * kept / kept.sum(axis=1, keepdims=True)).ravel()
    return said.reshape(joint.shape)


# -------------------------------------------------------------------------------- The quickstart


def marked(run, annotator, number):
    """By name, files with the marks of the same samples."""
    every, given = run.folder / "every.jsonl", run.folder / "given.jsonl"
    prompts = run.folder / "prompts.jsonl"
    if not prompts.exists():
        records.write_records(prompts, records.read_records(run.train_prompts)[:number])
    run.generate(run.original, prompts, every, SAMPLED, annotator, seed=7)
    rows = [
        {**row.to_json(), "unwanted": bool(row.negative_spans)} for row in records.iterate(every)
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"given": given}
    ahead = look_ahead.LookAhead(num_tokens=NUM_TOKENS)
    for name, more in {
        "found": {"label_field": "unwanted"},
        "blamed": {"label_field": "unwanted", "blame_as_strength": True},
        "ahead": {"label_field": "unwanted", "ahead": ahead},
        "given_ahead": {"ahead": ahead},
    }.items():
        files[name] = run.folder / f"{name}.jsonl"
        if files[name].exists():
            continue
        localize.localize(
            output=str(files[name]),
            input=str(given),
            original_model=localize.OriginalModel(
                checkpoint_path=str(run.original),
                model=pretrained.FromCheckpoint(),
                task_feature_lengths=finished_run.LENGTHS | {"targets": 48},
                batch_size=128,
            ),
            vocabulary=run.vocabulary,
            training=prefix_values.Training(num_updates=500, width=128),
            num_folds=2,
            **more,
        )
    return files


def arm(run, annotator, files, name, of_marks, objective, more):
    """Trains on marks; how much of the unwanted is cut, what is kept, and what it costs."""
    model = run.folder / name.replace(" ", "_").replace(",", "")
    train.train(
        model_dir=str(model),
        model=pretrained.FromCheckpoint(),
        objective=objectives.named(objective, **more),
        dataset=datasets.RecordFiles(files=str(files[of_marks]), vocabulary=run.vocabulary),
        original_choice=settings.OriginalChoice(path=str(run.original)),
        update=settings.Update(
            batch_size=32,
            task_feature_lengths=finished_run.LENGTHS | {"targets": 48},
            optimizer=optax.adam(optax.cosine_decay_schedule(3e-4, finished_run.STEPS)),
        ),
        schedule=settings.Schedule(train_steps=finished_run.STEPS),
    )
    row = [name]
    for decoder in finished_run.DECODERS:
        run.measure(model, decoder, annotator)
        before = run.run / f"original/{decoder}.annotated.jsonl"
        masked = records.read_records(run.run / f"{results.MASK}/{decoder}.annotated.jsonl")
        output = run.folder / f"{model.name}.{decoder}.jsonl"
        found = results.measure(*records.read_pairs(str(before), str(output)), masked)
        row += [f"{found['cut']:.1%}", f"{found['bleu']:.1f}"]
        if decoder == "greedy":
            row += [f"{found['bleu_to_mask']:.1f}", f"{found['same_as_mask']:.1%}"]
            continue
        of_texts = log_likelihoods(run, model, output) - log_likelihoods(run, run.original, output)
        error = of_texts.std() / math.sqrt(len(of_texts))
        cost = least_cost(found["unwanted_rate_before"], found["unwanted_rate_after"])
        row += [f"{of_texts.mean():.3f}", f"{error:.3f}", f"{cost:.3f}"]
    return row


def least_cost(before, after):
    """The smallest KL(text) to an original, in nats, of what is unwanted so rarely.

    It only scales the probabilities of unwanted texts, and those of all others. So it is the
    divergence of two coins.

    Args:
        before: probability of an unwanted text, of the original.
        after: the highest that is allowed.
    """
    after = min(after, before)  # the original itself is no dirtier than it is
    return float(rel_entr(after, before) + rel_entr(1 - after, 1 - before))


def log_likelihoods(run, model, output):
    """The log-likelihood that a model gives each output in a file, in nats."""
    opened = opened_model.open_model(
        str(model), pretrained.FromCheckpoint(), run.vocabulary,
        batch_size=128, num_tokens=sum(finished_run.LENGTHS.values()), mesh_shape=None,
    )  # fmt: skip
    compute, found = fused.jit_log_likelihoods(opened.model), []
    examples: list[Example] = marks.examples_from_records(
        records.read_records(output), run.vocabulary, str(output)
    )
    layout = opened.model.network.feature_layout
    for batch in batch_for_eval(examples, 128, finished_run.LENGTHS, feature_layout=layout):
        placed = sharding.put_batch(batch, opened.model.mesh)
        found.append(np.asarray(jax.device_get(compute(opened.params, placed))).sum(axis=1))
    return np.concatenate(found)[: len(examples)].astype(np.float64)


if __name__ == "__main__":
    main()
