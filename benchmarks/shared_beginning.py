r"""What it saves to compute once what all prompts of a batch begin with.

    taskset -c 0 python benchmarks/shared_beginning.py

SmolLM2 135M, random weights, float32. "demo" is a batch as `make demo` has it: eight rows of 64
prompt and 40 response tokens, and the first 32 are the same in all rows. "instructions" is a batch
of an assistant with long instructions: four rows of 512 and 64 tokens, the first 384 the same.
"states" is what is computed once for a data set with `TRAINED_LAYERS=10`. The others are updates of
TNRF by Adafactor.

Both variants of a line take turns in one process. What is measured is processor time, which another
program on the machine does not lengthen; "products" are XLA's count of floating-point operations,
"temporaries" XLA's count of bytes. All three are relative to the rows computed apart.

Takes 25 minutes of processor time with `--rounds=3`, and about 10 GB of memory (both estimated).
"""

import argparse
import functools

import jax
import numpy as np
import report
import step
from trained_layers import processor_seconds

from tnt_jax.data.layouts import SHARED
from tnt_jax.models import families

# Rows, lengths of prompt and response, and what prompts begin with.
SHAPES = {"demo": (8, (64, 40), 32), "instructions": (4, (512, 64), 384)}
UPDATES = {
    "adapters_cached, last 10": step.Variant("adapters_cached", trained_layers=10),
    "adapters_off": step.Variant("adapters_off"),
    "parameters": step.Variant("parameters"),
}


def batches_of(config, batch_size, lengths, num_shared):
    """One batch twice: its rows computed apart, and what they begin with once."""
    batch = step.make_batch(config, batch_size, lengths)
    beginning = batch["decoder_input_tokens"][:1, :num_shared]
    batch["decoder_input_tokens"][:, :num_shared] = beginning
    return batch, {**batch, SHARED: np.repeat(beginning, batch_size, axis=0)}


def relative(runs, compiled, rounds):
    """Products, temporaries and processor time of the second of two programs, by the first's."""
    times = [[], []]
    for number in range(-1, rounds):
        for run, of_run in zip(runs, times, strict=True):
            seconds = processor_seconds(run)
            if number >= 0:
                of_run.append(seconds)
    products = [one.cost_analysis()["flops"] for one in compiled]
    temporaries = [one.memory_analysis().temp_size_in_bytes for one in compiled]
    return (
        products[1] / products[0],
        temporaries[1] / temporaries[0],
        report.median(times[0]),
        report.ratio(times[1], times[0]),
    )


def rows_of(name, rounds):
    """The rows of a shape."""
    batch_size, lengths, num_shared = SHAPES[name]
    config = step.make_config("smollm2_135m", "float32", "none", False)
    network = families.network_of(config)
    batches = batches_of(config, batch_size, lengths, num_shared)
    params = network.init(jax.random.key(0))
    lower = jax.jit(network.lower_states, static_argnums=2)
    programs = [lower.lower(params, batch, 10).compile() for batch in batches]
    yield (
        name,
        "states",
        *relative(
            [
                functools.partial(one, params, batch)
                for one, batch in zip(programs, batches, strict=True)
            ],
            programs,
            rounds,
        ),
    )
    for kind, variant in UPDATES.items():
        work = step.Work(config, [variant], batch_size, lengths)
        states = {
            feature: value
            for feature, value in work.batches[variant].items()
            if feature not in batches[0]
        }
        runs, programs = [], []
        for batch in batches:
            batch = {**jax.tree.map(jax.numpy.asarray, batch), **states}
            work.batches[variant] = batch
            program = step.make_step(config, variant).lower(*work.arguments(variant)).compile()
            programs.append(program)
            runs.append(functools.partial(update, work, variant, batch, program))
        yield (name, kind, *relative(runs, programs, rounds))


def update(work, variant, batch, program):
    """One update from a batch."""
    work.batches[variant] = batch
    return work.update(variant, program)


def main():
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    report.heading()
    columns = ("", "products", "temporaries", "processor s apart", "relative")
    rows = (row for shape in flags.shapes.split(",") for row in rows_of(shape, flags.rounds))
    report.table(("", *columns), rows)


if __name__ == "__main__":
    main()
