r"""Our updates and decoding of SmolLM2 135M against transformers, peft and torch, in turn.

    taskset -c 0 python benchmarks/llm_step.py --torch_python=/path/to/python

Random weights, float32, rows of 128 prompt and 64 response tokens. Plain supervised fine-tuning by
torch has its loss on the responses, full or with LoRA of rank 16 on all projections. AdamW
everywhere, so that the optimizers are equal. Decoding is greedy, 64 tokens after each prompt of
128, by `tnt_jax.models.decoding` and by transformers' `generate` with its cache.

The interpreter of --torch_python has torch, transformers and peft; it runs in a process that is
started once and takes turns with ours. Without it, our lines alone are printed. "times torch" is
the median of the ratios of neighbouring updates.

Takes 10 minutes of one core with `--rounds=5`, and about 12 GB of memory (memory estimated).
"""

import argparse
import functools
import json
import pathlib
import subprocess
import time

import jax
import numpy as np
import optax
import report
import step

from tnt_jax.models import decoding, families, parameters

LENGTHS = (128, 64)
RATE = 1e-5
UPPER = "TNRF, adapters_off, upper 10 layers"
VARIANTS = step.VARIANTS | {UPPER: step.Variant("adapters_off", trained_layers=10)}
# Ours -> what torch does with the same rows.
COUNTERPARTS = {
    "fine-tune": "full",
    "TNRF, second forward": "full",
    "TNRF, cached": "full",
    "TNRF, adapters_off": "lora",
    UPPER: "lora",
}


class Torch:
    """The process of `llm_step_torch.py`."""

    def __init__(self, python, batch_size):
        server = pathlib.Path(__file__).with_name("llm_step_torch.py")
        settings = {
            **{"batch": batch_size, "threads": report.num_cores(), "lengths": LENGTHS},
            **{"rate": RATE, "rank": step.RANK, "alpha": step.ALPHA},
        }
        self._process = subprocess.Popen(
            [python, server, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = json.loads(self._process.stdout.readline())

    def run(self, kind):
        """Seconds that something took."""
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self):
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


def seconds_of(run):
    """Seconds that something took here."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def in_turn(runs, rounds, warm_up=1):
    """Seconds of every run in every round; each of `runs` gives the seconds that it took."""
    times = {name: [] for name in runs}
    for number in range(-warm_up, rounds):
        for name, run in runs.items():
            seconds = run()
            if number >= 0:
                times[name].append(seconds)
    return times


def updates(batch_size, rounds, torch):
    """Rows of the first table: one variant at a time beside our fine-tuning and torch's."""
    config = step.make_config("smollm2_135m", "float32", "none", False)
    for name, kind in COUNTERPARTS.items():
        names = dict.fromkeys(["fine-tune", name])
        work = step.Work(config, [VARIANTS[one] for one in names], batch_size, LENGTHS)
        runs = {
            one: functools.partial(
                seconds_of,
                functools.partial(
                    work.update, VARIANTS[one], step.make_step(config, VARIANTS[one])
                ),
            )
            for one in names
        }
        if torch:
            runs["torch"] = functools.partial(torch.run, kind)
        times = in_turn(runs, rounds)
        theirs = times.get("torch")
        yield (
            name,
            1e3 * report.median(times[name]),
            report.ratio(times[name], times["fine-tune"]),
            f"{kind} fine-tuning" if theirs else None,
            1e3 * report.median(theirs) if theirs else None,
            report.ratio(times[name], theirs) if theirs else None,
        )


def decoded(batch_size, rounds, torch):
    """The row of the second table."""
    config = step.make_config("smollm2_135m", "float32", "none", False)
    params = families.network_of(config).init(jax.random.key(0))
    params = parameters.unstack_layers(params)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, config.vocab_size, (batch_size, LENGTHS[0])).astype(np.int32)
    lengths = np.full(batch_size, LENGTHS[0], np.int32)
    settings = decoding.Decoding(max_length=LENGTHS[1])

    def ours():
        return decoding.decode(params, prompts, lengths, config=config, decoding=settings).tokens

    runs = {"ours": functools.partial(seconds_of, ours)}
    if torch:
        runs["torch"] = functools.partial(torch.run, "generate")
    times = in_turn(runs, rounds)
    num_tokens = batch_size * LENGTHS[1]
    theirs = times.get("torch")
    yield (
        "greedy",
        num_tokens / report.median(times["ours"]),
        num_tokens / report.median(theirs) if theirs else None,
        1 / report.ratio(times["ours"], theirs) if theirs else None,
    )


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch_python", help="an interpreter with torch, transformers and peft")
    flags = parser.parse_args()
    report.heading()
    torch = Torch(flags.torch_python, flags.batch) if flags.torch_python else None
    if torch:
        print(", ".join(f"{name} {version}" for name, version in torch.versions.items()), "\n")
    what = f"batch {flags.batch} x {'/'.join(map(str, LENGTHS))}, float32"
    columns = (what, "ms", "times fine-tune", "torch does", "its ms", "times torch")
    step.OPTIMIZER = optax.adamw(RATE)
    report.table(columns, updates(flags.batch, flags.rounds, torch))
    print()
    columns = (what, "tokens/s", "transformers, tokens/s", "times transformers")
    report.table(columns, decoded(flags.batch, flags.rounds, torch))
    if torch:
        torch.close()


if __name__ == "__main__":
    main()
