r"""Examples per second, packed against unpacked, at equal tokens per batch; and the input's cost.

    python benchmarks/packing.py        minutes on one core; --rounds=N and --updates=N change that

Lengths are those of message and reply pairs (`tnt_jax.experiments.corpora.chitchat` under T5's
vocabulary: the logarithms are normal, the median is 18 tokens, 95 % are below 64). Ids are random,
and every third example has marks. A batch has as many rows, and so as many positions, packed or
not. "loss" is the mean over the tokens of the same examples both ways, before any update.

The second table is of runs as `tnt_jax.train` loops, with the thread that makes batches ahead and
without it: which part of the time the loop waits for its input.

Needs jax, flax, optax and numpy, and nothing else of what tnt_jax needs.

Takes 9 minutes of one core and 1.2 GB of memory.
"""

import argparse
import contextlib
import functools
import time

import jax
import numpy as np
import optax
import report

from tnt_jax import objectives
from tnt_jax.data.batches import Batches, batch_for_eval
from tnt_jax.data.examples import Example
from tnt_jax.models import sharding, t5
from tnt_jax.runtime import prefetch
from tnt_jax.training import train_step

VOCAB_SIZE = 2048
CONFIG = t5.T5Config(
    vocab_size=VOCAB_SIZE,
    emb_dim=128,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=32,
    mlp_dim=256,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
)
OBJECTIVE = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")
LENGTHS = ({"inputs": 64, "targets": 64}, {"inputs": 128, "targets": 128})
LOG_MEDIAN, LOG_DEVIATION = 2.92, 0.76  # of chitchat's messages and replies alike
BATCH_SIZE = 16
OPTIMIZER = optax.adafactor(1e-3)


def make_examples(num_examples, seed=0):
    """Message and reply pairs in lengths alone."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(LOG_MEDIAN, LOG_DEVIATION, (num_examples, 2))).astype(int) + 1
    examples = []
    for number, (num_inputs, num_targets) in enumerate(sizes):
        inputs, targets = (
            np.append(rng.integers(2, VOCAB_SIZE, size - 1), 1).astype(np.int32)
            for size in (num_inputs, num_targets)
        )
        is_marked = number % 3 == 0 and num_targets > 1
        pairs = [(0, targets[0]), (0, targets[0] % (VOCAB_SIZE - 3) + 2)] if is_marked else []
        pairs = np.unique(np.array(pairs, np.int32).reshape(-1, 2), axis=0)
        examples.append(Example(inputs, targets, pairs, id=str(number)))
    return examples


class Run:
    """A model in training, on the next batch at every update."""

    def __init__(self, examples, lengths, pack):
        self.batches = Batches(examples, BATCH_SIZE, lengths, seed=0, pack=pack)
        self.mesh = sharding.make_mesh(sharding.MeshShape())
        settings = {"forward": t5.T5(CONFIG).forward, "objective": OBJECTIVE}
        self.original = t5.T5(CONFIG).init(jax.random.key(0))
        self.state = train_step.init_state(t5.T5(CONFIG).init(jax.random.key(1)), OPTIMIZER)
        self.key = jax.random.key(0)
        self.step = jax.jit(
            functools.partial(train_step.train_step, optimizer=OPTIMIZER, **settings)
        )
        self.eval_step = jax.jit(functools.partial(train_step.eval_step, **settings))
        self.num_batches = 0

    def next_batch(self, _=None):
        """The next batch, on the devices."""
        self.num_batches += 1
        return sharding.put_batch(self.batches.batch(self.num_batches - 1), self.mesh)

    def update(self, batch):
        """One update, which is not waited for."""
        self.state, sums = self.step(self.state, self.original, batch, self.key)
        return sums["loss"]

    def mean_loss(self, batches):
        """The mean loss of a token over some batches."""
        sums = [self.eval_step(self.state.params, self.original, batch) for batch in batches]
        return sum(float(s["loss"]) for s in sums) / sum(float(s["num_tokens"]) for s in sums)


def compare(examples, lengths, rounds):
    """Rows of the first table for one pair of lengths."""
    runs = {name: Run(examples, lengths, pack=name == "packed") for name in ("unpacked", "packed")}
    layouts = [runs["packed"].batches.read(k).places for k in range(2)]
    same = [examples[place.example] for layout in layouts for place in layout]
    num_ids = runs["packed"].batches.num_negative_ids
    losses = {
        "unpacked": runs["unpacked"].mean_loss(batch_for_eval(same, BATCH_SIZE, lengths, num_ids)),
        "packed": runs["packed"].mean_loss([runs["packed"].batches[k] for k in range(2)]),
    }
    times = report.interleave(
        {name: lambda run=run: run.update(run.next_batch()) for name, run in runs.items()},
        rounds,
        warm_up=2,
    )
    slower = report.ratio(times["packed"], times["unpacked"])  # of a batch, of as many positions
    for name, run in runs.items():
        padding = run.batches.padding()
        yield (
            f"{lengths['inputs']} + {lengths['targets']}",
            name,
            padding.examples_per_row,
            f"{padding.input_padding:.0%}, {padding.target_padding:.0%}",
            1e3 * report.median(times[name]),
            padding.examples_per_row * BATCH_SIZE / report.median(times[name]),
            padding.examples_per_row / slower if name == "packed" else 1.0,
            f"{losses[name]:.6f}",
        )


def wait_for_input(run, num_updates, is_ahead):
    """Seconds of a run and the part of them in which it waits for its input."""
    for _ in range(2):  # compiles, and again for a state that is on the mesh
        jax.block_until_ready(run.update(run.next_batch()))
    upcoming = (run.next_batch() for _ in range(num_updates))
    if is_ahead:
        upcoming = prefetch.iterate(run.next_batch, range(num_updates))
    began, waited, before = time.perf_counter(), 0.0, None
    with contextlib.closing(upcoming):
        for _ in range(num_updates):
            asked = time.perf_counter()
            batch = next(upcoming)
            waited += time.perf_counter() - asked
            latest = run.update(batch)
            jax.block_until_ready(before)  # as tnt_jax.train: one update runs, one waits
            before = latest
        jax.block_until_ready(before)
    seconds = time.perf_counter() - began
    return seconds, waited / seconds


def waits(examples, num_updates):
    """Rows of the second table."""
    for pack in (False, True):
        run = Run(examples, LENGTHS[0], pack)
        for is_ahead in (False, True):
            seconds, fraction = wait_for_input(run, num_updates, is_ahead)
            yield (
                "packed" if pack else "unpacked",
                "in a thread, ahead" if is_ahead else "in turn",
                1e3 * seconds / num_updates,
                f"{fraction:.1%}",
            )


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=100, help="of a run in the second table")
    parser.add_argument("--examples", type=int, default=8000)
    flags = parser.parse_args()
    report.heading()
    examples = make_examples(flags.examples)
    report.table(
        (
            *("inputs + targets", "", "examples a row", "padding: inputs, targets", "ms a batch"),
            *("examples/s", "times as many", "loss"),
        ),
        (row for lengths in LENGTHS for row in compare(examples, lengths, flags.rounds)),
    )
    print()
    report.table(
        ("", "batches are made", "ms an update", "input_wait_fraction"),
        waits(examples, flags.updates),
    )


if __name__ == "__main__":
    main()
