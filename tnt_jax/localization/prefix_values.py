"""From "this output is bad" to the tokens that made it so: values of prefixes, and their falls.

The value of a prefix is the probability that the original, going on from it, ends well:

    value(x, y_<i) = E over the original's continuations of [the whole output is good]

the decomposition of Meng et al. 2022 (NADO, arXiv 2205.14219). Here a small head on the original's
decoder states estimates it, trained on labels of whole outputs alone. The state at position i has
seen y_<i, so position i holds the value of the prefix of i tokens.

NADO also asks that value(y_<i) = sum over v of p0(v | y_<i) value(y_<i v). Exactly, that needs the
states after every other token v. In expectation the original's own samples do it: over all samples
that go through a prefix, the mean label is its value, and cross-entropy finds the mean. (A pull of
each value towards the next one, which is that sum with one sample, changed nothing measurable.)
Learned from greedy outputs, it is the value of going on greedily.

Axes: `B` outputs, `T` positions, `E` width of the states, `V` vocabulary. Values of one output, in
NumPy, have no padding: one for each prefix, the empty one first and the whole text last.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tnt_jax.models import factored_logits
from tnt_jax.runtime.array_types import Array, Float, Int, Key, PyTree
from tnt_jax.runtime.errors import UsageError


class Evidence(NamedTuple):
    """What the head reads of a batch of outputs: all of it is the original's.

    Attributes:
      states: decoder states.
      tokens: decoder inputs: at position i the token y_(i-1), and 0 at the first.
      said: the log-probability of that token, and the entropy of the distribution that it was taken
        from (nats). 0 at the first position.
      mask: 1 where there is a prefix to value.
    """

    states: Float[Array, "B T E"]
    tokens: Int[Array, "B T"]
    said: Float[Array, "B T 2"]
    mask: Int[Array, "B T"]


class Past(NamedTuple):
    """What the head knows of the prefix before the position that it is asked about.

    Attributes:
      states: decoder states there.
      so_far: each feature's largest value up to there.
    """

    states: Float[Array, "B T E"]
    so_far: Float[Array, "B T _"]


class ValueHead(nn.Module):
    """A network that gives the logit of the value of each prefix.

    A state is made for guessing the next token, and tells badly whether the last one was right:
    that takes the state before it, the token (its row of the output matrix) and how likely it was.
    What was said earlier it forgets: so the second layer sees every feature's largest value so far.
    No position sees a later one.

    Attributes:
      width: features of each hidden layer.
      dropout: share of features left out in training.
    """

    width: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        evidence: Evidence,
        rows: Float[Array, "B T E"],
        past: Past | None = None,
        *,
        is_training: bool = False,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T _"]]:
        """The logit at every position, from the evidence and the rows of its tokens.

        Args:
          evidence: a batch of rows. The positions of a row follow each other, unless `past` is
            given.
          rows: the row of the output matrix that belongs to each token.
          past: what precedes each position, where positions do not follow each other; None: they
            do.
          is_training: whether features are left out.

        Returns:
          The logits, and each feature's largest value so far, as `Past` has it.
        """
        drop = nn.Dropout(self.dropout, deterministic=not is_training)
        states = evidence.states.astype(jnp.float32)
        if past is None:
            before = jnp.pad(states, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        else:
            before = past.states.astype(jnp.float32)
        vectors = [nn.LayerNorm()(x) for x in (states, before, rows)]
        now = nn.relu(nn.Dense(self.width)(drop(jnp.concatenate([*vectors, evidence.said], -1))))
        so_far = jax.lax.cummax(now, axis=1) if past is None else jnp.maximum(past.so_far, now)
        hidden = nn.relu(nn.Dense(self.width)(drop(jnp.concatenate([now, so_far], -1))))
        return nn.Dense(1)(hidden)[..., 0], so_far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a head is trained.

    Attributes:
      width: features of each hidden layer.
      dropout: share of features left out.
      num_updates: updates of AdamW. The learning rate falls to 0 along a cosine.
      batch_size: outputs in an update.
      learning_rate: at the start.
      weight_decay: per update and rate.

    Raises:
      UsageError: a value outside its range.
    """

    width: int = 256
    dropout: float = 0.2
    num_updates: int = 1000
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2

    def __post_init__(self):
        for name, expected, holds in (
            ("width", "at least 1", self.width >= 1),
            ("dropout", "at least 0 and below 1", 0 <= self.dropout < 1),
            ("num_updates", "at least 1", self.num_updates >= 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("learning_rate", "above 0", self.learning_rate > 0),
            ("weight_decay", "at least 0", self.weight_decay >= 0),
        ):
            if not holds:
                found = getattr(self, name)
                raise UsageError(f"Training.{name}: expected {expected}, found {found}")

    @property
    def head(self) -> ValueHead:
        """The value head to train."""
        return ValueHead(self.width, self.dropout)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with its schedule."""
        rate = optax.cosine_decay_schedule(self.learning_rate, self.num_updates)
        return optax.adamw(rate, weight_decay=self.weight_decay)


@functools.partial(jax.jit, static_argnames="softcap")
def log_prob_and_entropy(
    states: Float[Array, "B T E"],
    matrix: Float[Array, "V E"],
    tokens: Int[Array, "B T"],
    softcap: float | None = None,
) -> Float[Array, "B T 2"]:
    """The log-probability of each target token, and the entropy of its distribution, in nats.

    One position is computed at a time: logits `[B, T, V]` are never held.

    Args:
      states: decoder states.
      matrix: the output matrix.
      tokens: the target tokens.
      softcap: the bound of the logits (`FactoredLogits.softcap`); None is no bound.
    """

    def at_position(of_position):
        states, tokens = of_position
        log_probs = jax.nn.log_softmax(factored_logits.multiply(states, matrix, 0, softcap))
        own = jnp.take_along_axis(log_probs, tokens[:, None], axis=1)[:, 0]
        return jnp.stack([own, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)], axis=1)

    by_position = (jnp.swapaxes(states, 0, 1), jnp.swapaxes(tokens, 0, 1))
    return jnp.swapaxes(jax.lax.map(at_position, by_position), 0, 1)


def value_losses(
    logits: Float[Array, "B T"], is_good: Float[Array, "B"], mask: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Cross-entropy of the value of every prefix against its output's label; nats, 0 at padding."""
    labels = jnp.broadcast_to(is_good[:, None], logits.shape)
    return optax.sigmoid_binary_cross_entropy(logits, labels) * mask.astype(logits.dtype)


def fit(
    evidence_of: Callable[[np.ndarray], Evidence],
    is_good: np.ndarray,
    matrix: Float[Array, "V E"],
    training: Training,
    seed: int,
) -> PyTree:
    """Trains a head.

    Args:
      evidence_of: gives the evidence of the outputs with these indices, all of the same `T`.
      is_good: `[N]` labels, 1 where an output is good.
      matrix: the original's output matrix.
      training: the settings.
      seed: random seed of the first parameters, the batches and the dropout.

    Returns:
      The head's parameters.
    """
    key, init_key = jax.random.split(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    labels = np.asarray(is_good, np.float32)
    first = evidence_of(np.zeros(1, int))
    params = jax.jit(training.head.init)(init_key, first, rows_of(matrix, first))["params"]
    opt_state = training.optimizer.init(params)
    for number in range(training.num_updates):
        chosen = rng.integers(len(labels), size=training.batch_size)
        params, opt_state = _update(
            params,
            opt_state,
            evidence_of(chosen),
            labels[chosen],
            matrix,
            jax.random.fold_in(key, number),
            training=training,
        )
    return params


@functools.partial(jax.jit, static_argnames="training", donate_argnums=(0, 1))
def _update(
    params: PyTree,
    opt_state: Any,
    evidence: Evidence,
    is_good: Float[Array, "B"],
    matrix: Float[Array, "V E"],
    key: Key[Array, ""],
    *,
    training: Training,
) -> tuple[PyTree, Any]:
    def mean_loss(params):
        found: Any = training.head.apply(
            {"params": params},
            evidence,
            rows_of(matrix, evidence),
            is_training=True,
            rngs={"dropout": key},
        )
        logits, _ = found
        losses = value_losses(logits, is_good, evidence.mask)
        return jnp.sum(losses) / jnp.sum(evidence.mask).astype(jnp.float32)

    updates, opt_state = training.optimizer.update(jax.grad(mean_loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def rows_of(matrix: Float[Array, "V E"], evidence: Evidence) -> Float[Array, "B T E"]:
    """The matrix's rows of the evidence's tokens; zeros at the first position: none is said."""
    return matrix[evidence.tokens].astype(jnp.float32).at[:, 0].set(0.0)


@functools.partial(jax.jit, static_argnames="training")
def values(
    params: PyTree, evidence: Evidence, matrix: Float[Array, "V E"], *, training: Training
) -> Float[Array, "B T"]:
    """The value of every prefix, from 0 to 1; what stands at padding means nothing."""
    found: Any = training.head.apply({"params": params}, evidence, rows_of(matrix, evidence))
    return jax.nn.sigmoid(found[0])


# ------------------------------------------------------------------------------------- The marks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold:
    """Which tokens of a bad output are negative: those at which its value falls enough.

    Attributes:
      ratio: a token is negative when value(y_<=i) < ratio * value(y_<i), and
      min_fall: value(y_<i) - value(y_<=i) >= min_fall.
      at_least_one: whether an output without such a token gets the mark where its value falls most.

    Raises:
      UsageError: a value outside its range.
    """

    ratio: float = 0.7
    min_fall: float = 0.1
    at_least_one: bool = False

    def __post_init__(self):
        for name, expected, holds in (
            ("ratio", "above 0 and at most 1", 0 < self.ratio <= 1),
            ("min_fall", "from 0 to 1", 0 <= self.min_fall <= 1),
        ):
            if not holds:
                raise UsageError(
                    f"Threshold.{name}: expected {expected}, found {getattr(self, name)}"
                )

    def negative(self, values: np.ndarray) -> np.ndarray:
        """Whether each token of one bad output is negative: one fewer than there are values."""
        before, after = values[:-1], values[1:]
        is_negative = (after < self.ratio * before) & (before - after >= self.min_fall)
        if self.at_least_one and len(before) and not is_negative.any():
            is_negative[np.argmax(before - after)] = True
        return is_negative


def short(number: Any) -> float:
    """A number as records have it: four digits."""
    return float(f"{float(number):.4g}")


def blame(values: np.ndarray) -> np.ndarray:
    """How much of one bad output's fall, from its first value to 0, each token brought about.

    A token is blamed for what its prefix is below every earlier one, for the value may rise again
    and fall once more. The last entry is what is left in the end: not found in any token. They add
    up to 1. Where the value stays as it is but for one token that takes it to 0, that token has all
    the blame; the soft form of a mark.
    """
    lowest = np.append(np.minimum.accumulate(values), 0.0)
    return (lowest[:-1] - lowest[1:]) / lowest[0]


# ------------------------------------------------------------------------------- How good it is


class Agreement(NamedTuple):
    """Tokens that were found against tokens that are negative.

    Attributes:
      precision: share of those found that are negative.
      recall: share of the negative ones that were found.
      f1: their harmonic mean.
      spans_found: share of runs of negative tokens in which any was found.
      chance: share of all tokens that are negative: the precision of a guess.
      num_found: tokens found.
      num_negative: negative tokens.
    """

    precision: float
    recall: float
    f1: float
    spans_found: float
    chance: float
    num_found: int
    num_negative: int


def agreement(found: Sequence[np.ndarray], negative: Sequence[np.ndarray]) -> Agreement:
    """Compares marks, one array of booleans per output, token by token."""
    both = num_found = num_negative = num_tokens = num_spans = spans_found = 0
    for one, other in zip(found, negative, strict=True):
        both += int((one & other).sum())
        num_found += int(one.sum())
        num_negative += int(other.sum())
        num_tokens += len(other)
        number = np.cumsum(np.diff(other.astype(int), prepend=0) == 1) * other  # of its run, from 1
        num_spans += int(number.max(initial=0))
        spans_found += len(np.unique(number[one & other]))
    return Agreement(
        precision=both / max(num_found, 1),
        recall=both / max(num_negative, 1),
        f1=2 * both / max(num_found + num_negative, 1),
        spans_found=spans_found / max(num_spans, 1),
        chance=num_negative / max(num_tokens, 1),
        num_found=num_found,
        num_negative=num_negative,
    )


def area_under_curve(scores: np.ndarray, is_good: np.ndarray) -> float:
    """How often a good one scores above a bad one; ties count half. 0.5 is chance."""
    _, place, number = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(number) - (number - 1) / 2)[place]  # from 1, the mean of those that tie
    num_good = int(is_good.sum())
    num_pairs = num_good * (len(is_good) - num_good)
    return float((ranks[is_good].sum() - num_good * (num_good + 1) / 2) / num_pairs)


class Estimates(NamedTuple):
    """Values against shares of good ones among sampled continuations of the same prefixes.

    Attributes:
      correlation: Pearson's, of values with shares; None where one of them does not vary.
      explained: the part of the true values' variance that the values explain, the sampling noise
        of the shares taken out; 1 is exact, 0 is no better than their mean, below 0 is worse. None
        where the shares vary no more than by that noise.
      mean_value: the mean of the head's values.
      mean_share: the mean share of good continuations.
    """

    correlation: float | None
    explained: float | None
    mean_value: float
    mean_share: float


def compare_estimates(values: np.ndarray, shares: np.ndarray, num_samples: int) -> Estimates:
    """Compares values with shares, each of `num_samples` (at least 2) continuations."""
    noise = np.mean(shares * (1 - shares)) / (num_samples - 1)  # its expectation is the variance
    variance = np.var(shares, ddof=1) - noise
    error = np.mean((values - shares) ** 2) - noise
    varies = np.ptp(values) > 0 and np.ptp(shares) > 0
    return Estimates(
        correlation=float(np.corrcoef(values, shares)[0, 1]) if varies else None,
        explained=float(1 - error / variance) if variance > 0 else None,
        mean_value=float(values.mean()),
        mean_share=float(shares.mean()),
    )
