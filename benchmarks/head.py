r"""The loss head alone, from hidden states and output matrix to loss and gradients.

    taskset -c 0 python benchmarks/head.py

The first table, of T5's vocabulary and width 512: "temp" is what XLA allocates beside arguments and
results, in units of a float32 `[tokens, vocabulary]`; "matmuls" is the time in products of the
hidden states with the output matrix; the last column is the time over that of the first line. A
float32 head has at least 3 products in plain fine-tuning, 4 with an original.

The second table: the relative error of TNRF's loss and gradients (Frobenius) against float64. First
of the objective alone, from given float32 logits to the gradient to them; then of the whole head,
which has the rounding of the logits as well. A third of the tokens is marked, or none. "drift" is
how far the current model is from its original; "random" are two that have nothing in common.

Needs jax, flax, optax and numpy, and nothing else of what tnt_jax needs.

Takes about 15 minutes of one core, for each row a process of 0.7 GB.
"""

import argparse
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import report

from tnt_jax import fused_objective, objectives
from tnt_jax.fused_block import Block, Reductions
from tnt_jax.fused_objective import FactoredLogits

EMBED, VOCAB = 512, 32128
LIVE = 0.44  # of the positions, in the line with padding
FINE_TUNE = objectives.TntObjective(negative_term="none", positive_term="log_likelihood")
TNRF = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")
FLOOR = TNRF.removed_token_floor


def make_arguments(num_tokens, seed=0, drift=None, marked=1 / 3, live=1.0):
    """Hidden states and matrices of both models (`[1, N, E]`, `[E, V]`), and what is of tokens."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    original = normal(1, num_tokens, EMBED), normal(EMBED, VOCAB) / np.float32(EMBED**0.5)
    current = normal(1, num_tokens, EMBED), normal(EMBED, VOCAB) / np.float32(EMBED**0.5)
    if drift is not None:
        current = tuple(x + np.float32(drift) * y for x, y in zip(original, current, strict=True))
    targets = rng.integers(2, VOCAB, (1, num_tokens)).astype(np.int32)
    tokens = {
        "target_tokens": targets,
        "negative_ids": np.where(rng.random((1, num_tokens)) < marked, targets, -1)[..., None],
        "loss_mask": (rng.random((1, num_tokens)) < live).astype(np.int32),
    }
    return jax.device_put((current, original, tokens))


# ------------------------------------------------------------------------------------- The variants


def cross_entropy(current, original, tokens):
    """What a fine-tuning step without this project has."""
    del original
    logits = jnp.matmul(*current)
    target = tokens["target_tokens"][..., None]
    at_target = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - at_target
    return jnp.sum(losses * tokens["loss_mask"]), None


def dense(current, original, tokens):
    """The definition of TNRF."""
    losses = TNRF.token_losses(
        current_logits=jnp.matmul(*current), original_logits=jnp.matmul(*original), **tokens
    )
    return losses.sum(), None


def fused(current, original, tokens, objective=TNRF, block_size=None):
    """What the train step has."""
    return fused_objective.token_values(
        objective,
        FactoredLogits(*current, vocab_axis=1),
        FactoredLogits(*original, vocab_axis=1) if objective.needs_original else None,
        block_size=block_size,
        **tokens,
    )


def gradients_of(variant):
    """The head as a step runs it: values and gradients, compiled."""
    return jax.jit(jax.value_and_grad(variant, has_aux=True))


PADDED = f"TNRF, fused, {1 - LIVE:.0%} padding"
VARIANTS = {
    "plain cross-entropy, dense": cross_entropy,
    "plain cross-entropy, fused": functools.partial(fused, objective=FINE_TUNE),
    "TNRF, fused": fused,
    "TNRF, fused, blocks of 64": functools.partial(fused, block_size=64),
    "TNRF, fused, blocks of 128": functools.partial(fused, block_size=128),
    "TNRF, fused, blocks of 1024": functools.partial(fused, block_size=1024),
    PADDED: fused,
    "TNRF, dense": dense,
}
FIRST, *_ = VARIANTS


def cost_of(name, flags):
    """A variant in turn with a product and the first variant, in this process; and its memory."""
    step = gradients_of(VARIANTS[name])
    arguments = make_arguments(flags.tokens)
    live = LIVE if name == PADDED else 1.0
    own = arguments if live == 1 else make_arguments(flags.tokens, live=live)
    product = jax.jit(jnp.matmul)
    runs = {
        # The first product waits for the memory that the last run gave back: the second counts.
        **dict.fromkeys(["before matmul", "matmul"], lambda: product(*arguments[0])),
        FIRST: functools.partial(gradients_of(VARIANTS[FIRST]), *arguments),
        name: functools.partial(step, *own),
    }
    times = report.interleave(runs, flags.rounds, warm_up=2)
    larger = jax.eval_shape(functools.partial(make_arguments, flags.memory_tokens))
    temp = step.lower(*larger).compile().memory_analysis().temp_size_in_bytes
    return (
        temp / 2**20,
        temp / (4 * flags.memory_tokens * VOCAB),
        1e3 * report.median(times[name]),
        report.ratio(times[name], times["matmul"]),
        report.ratio(times[name], times[FIRST]),
    )


# ------------------------------------------------------------------------------------ The reference


def log_softmax(logits):
    """In whatever the logits are."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def reference(logits, original_logits, tokens):
    """TNRF and its gradient to the logits in float64, from the formulas of `TntObjective`."""
    marked = tokens["negative_ids"][0, :, 0]
    is_negative = marked >= 0
    removed = np.arange(VOCAB) == marked[:, None]
    log_p, log_p0 = log_softmax(logits), log_softmax(original_logits)
    p = np.exp(log_p)
    log_new = log_softmax(np.where(removed, -np.inf, original_logits))
    # The floored p_new: S has e of the mass, the others share what is left.
    log_floor = np.minimum(np.log(FLOOR), np.where(removed, log_p0, -np.inf).max(axis=1))
    log_floor = np.where(is_negative, log_floor, -np.inf)[:, None]
    log_floored = np.where(removed, log_floor, log_new + np.log1p(-np.exp(log_floor)))
    reverse = (p * (log_p - log_floored)).sum(axis=1)
    new = np.exp(log_new)
    forward = (new * (np.where(removed, 0, log_new) - log_p)).sum(axis=1)
    gradient = np.where(is_negative[:, None], p * (log_p - log_floored - reverse[:, None]), p - new)
    return np.where(is_negative, reverse, forward).sum(), gradient


def error(found, expected):
    """Relative, of all arrays together."""
    pairs = list(zip(found, expected, strict=True))
    distance = sum(((np.asarray(x, np.float64) - y) ** 2).sum() for x, y in pairs)
    return f"{(distance / sum((y**2).sum() for _, y in pairs)) ** 0.5:.1e}"


@jax.jit
def dense_on_logits(logits, original_logits, tokens):
    """Loss and gradient to the logits, by the definition."""
    return jax.value_and_grad(
        lambda x: TNRF.token_losses(
            current_logits=x, original_logits=original_logits, **tokens
        ).sum()
    )(logits)


@jax.jit
def fused_on_logits(logits, original_logits, tokens):
    """The same, by what the fused head does with one block."""
    values, gradient = Block(
        TNRF,
        Reductions((), VOCAB),
        logits[0],
        original_logits[0],
        tokens["target_tokens"][0],
        tokens["negative_ids"][0],
    ).values_and_gradient()
    return values.losses.sum(), gradient[None]


def accuracy(num_tokens):
    """Rows of the second table."""
    ways = {
        "dense": (dense_on_logits, gradients_of(dense)),
        "fused": (fused_on_logits, gradients_of(fused)),
    }
    for drift, marked in [(None, 1 / 3), (1e-3, 1 / 3), (1e-4, 1 / 3), (1e-3, 0), (1e-4, 0)]:
        arguments = make_arguments(num_tokens, seed=1, drift=drift, marked=marked)
        tokens = jax.tree.map(np.asarray, arguments[2])
        rounded = [jax.jit(jnp.matmul)(*pair) for pair in arguments[:2]]
        of_rounded = reference(*(np.asarray(x[0], np.float64) for x in rounded), tokens)
        (hidden, matrix), original = (
            [np.asarray(x, np.float64) for x in pair] for pair in arguments[:2]
        )
        loss, gradient = reference(hidden[0] @ matrix, original[0][0] @ original[1], tokens)
        gradients = (gradient @ matrix.T)[None], hidden[0].T @ gradient
        for name, (on_logits, head) in ways.items():
            alone = on_logits(*rounded, arguments[2])
            (whole, _), whole_gradients = head(*arguments)
            yield (
                "random" if drift is None else f"{drift:g}",
                "a third" if marked else "none",
                name,
                error(alone[:1], of_rounded[:1]),
                error([alone[1][0]], of_rounded[1:]),
                error([whole], [loss]),
                error(whole_gradients, gradients),
            )


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="that times are of")
    parser.add_argument("--memory_tokens", type=int, default=8192, help="that bytes are of")
    parser.add_argument("--accuracy_tokens", type=int, default=256)
    parser.add_argument("--variant", help="one alone, in this process; prints a JSON line")
    flags = parser.parse_args()
    if flags.variant:
        print(json.dumps(cost_of(flags.variant, flags)))
        return None
    report.heading(is_apart=True)
    failed = []

    def costs():
        for name in VARIANTS:
            found = report.apart(__file__, [*sys.argv[1:], f"--variant={name}"])
            failed.extend([] if found else [name])
            yield name, *(found or [None] * 5)

    report.table(
        (
            f"{EMBED} x {VOCAB:,}, float32",
            f"temp MiB, {flags.memory_tokens} tokens",
            "of [N, V]",
            f"ms, {flags.tokens} tokens",
            "matmuls",
            "times the first",
        ),
        costs(),
    )
    print()
    report.table(
        (
            *("drift", "marked", "TNRF"),
            *("objective: loss", "gradient", "head: loss", "gradients"),
        ),
        accuracy(flags.accuracy_tokens),
    )
    return f"Failed: {'; '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())
