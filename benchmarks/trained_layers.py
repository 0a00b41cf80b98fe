r"""What an update costs where the last layers alone are trained, and the states below are cached.

    taskset -c 0 python benchmarks/trained_layers.py

SmolLM2 135M with its last 10 of 30 layers, two rows of 128 prompt and 64 response tokens; and T5
1.1 small with its decoder alone, then with the last 3 of that one's 8 layers, four rows of 512 and
64 tokens. Random weights, float32, TNRF, Adafactor.

All variants take turns in one process. What is measured is processor time, which another program on
the machine does not lengthen; "products" are XLA's own count of floating-point operations. Both are
relative to the first row, where every parameter is trained beside a second forward pass. "states"
are what is kept on disk for an example.

Takes 12 minutes of processor time with `--rounds=3`, and about 12 GB of memory (memory estimated).
"""

import argparse
import functools
import time

import jax
import report
import step

from tnt_jax.training.originals import STATES

# Size -> rows, lengths, and the numbers of last layers that are trained.
MODELS = {
    "smollm2_135m": (2, (128, 64), (None, 10)),
    "small": (4, (512, 64), (None, 8, 3)),
    "tiny": (2, (8, 4), (None, 1)),  # for a look at whether it runs
}
KINDS = ("parameters", "cached", "adapters_off", "adapters_cached")


def processor_seconds(run):
    """Processor time of something, of all threads of this process."""
    began = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - began


def rows_of(size, rounds):
    """The rows of a model's table."""
    batch_size, lengths, numbers = MODELS[size]
    config = step.make_config(size, "float32", "none", False)
    variants = [step.Variant(kind, trained_layers=n) for n in numbers for kind in KINDS]
    compiled = {}
    for variant in variants:
        # Two at a time: all of them would not fit.
        pair = list(dict.fromkeys([variants[0], variant]))
        work = step.Work(config, pair, batch_size, lengths)
        lowered = step.make_step(config, variant).lower(*work.arguments(variant))
        compiled[variant] = lowered.compile()
        products = [compiled[one].cost_analysis()["flops"] for one in (variant, variants[0])]
        batch = work.batches[variant]
        names = [name for name in batch if name == STATES or name.endswith("_states")]
        num_bytes = sum(batch[name].nbytes for name in names)
        of_turns = {one: [] for one in pair}
        for number in range(-1, rounds):
            for one in pair:
                seconds = processor_seconds(functools.partial(work.update, one, compiled[one]))
                if number >= 0:
                    of_turns[one].append(seconds)
        layers = variant.trained_layers
        yield (
            size,
            "all" if layers is None else f"last {layers}",
            variant.original,
            products[0] / products[1],
            report.median(of_turns[variant]),
            report.ratio(of_turns[variant], of_turns[variants[0]]),
            num_bytes / batch_size / 2**20,
        )


def main():
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="smollm2_135m,small", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    report.heading()
    columns = ("layers", "ORIGINAL", "products", "processor s", "relative", "states, MiB")
    rows = (row for size in flags.size.split(",") for row in rows_of(size, flags.rounds))
    report.table(("", *columns), rows)


if __name__ == "__main__":
    main()
