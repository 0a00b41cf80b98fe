"""Strengths of marks that look ahead: from the values of next tokens to graded removal.

The nearest distribution to the original over texts, of those that give bad texts no probability, is
the original's given that the text is good. After a prefix y it says a token v with the probability

    p0(v | y) value(y v) / value(y)

where a value is the probability to end well (`prefix_values`). That is graded removal of the
strength 1 - value(y v) / value(y): below 0, and so raised, where more texts end well after v. The
usual marks look at one position by itself: `docs/limits.md` has an example.

Axes: `B` outputs, `T` positions, `E` width of the states, `V` vocabulary, `K` next tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.data import marks, records
from tnt_jax.data.layouts import pad_inputs
from tnt_jax.localization import prefix_values
from tnt_jax.models import factored_logits, next_states, sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import console
from tnt_jax.runtime.array_types import Array, Bool, Float, Int, PyTree
from tnt_jax.runtime.errors import UsageError

_LEAST_CHANGE = 0.01  # smaller strengths are not written: they are errors of values, in large files
_MOST = 0.9999  # a strength of 1 would say that an output with the token is bad: `says_unwanted`
_BATCHES_AT_ONCE = 8  # of each head: so many outputs are looked at before their records are written


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookAhead:
    """How values of next tokens become strengths of marks.

    Attributes:
      num_tokens: Tokens that are looked at, at each position: the original's likeliest, and the one
        that was said.
      least_strength: No strength is below it: a token is raised by the factor 1 minus it at most.
      least_value: Prefixes of a smaller value have no strengths. A quotient of two values near 0
        says what their errors are, and hardly any good text goes on from there.

    Raises:
      UsageError: A value outside its range.
    """

    num_tokens: int = 8
    least_strength: float = -9.0
    least_value: float = 0.05

    def __post_init__(self):
        lowest = records.LEAST_STRENGTH
        for name, expected, holds in (
            ("num_tokens", "at least 1", self.num_tokens >= 1),
            ("least_strength", f"from {lowest:g} to 0", lowest <= self.least_strength <= 0),
            ("least_value", "at least 0 and below 1", 0 <= self.least_value < 1),
        ):
            if not holds:
                raise UsageError(
                    f"LookAhead.{name}: expected {expected}, found {getattr(self, name)}"
                )

    def strengths(self, probs: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Computes 1 - value(y v) / value(y) of the tokens v that are looked at.

        Here value(y) is the mean of value(y v) over these tokens, by their probabilities. The
        head's own value of y is another estimate, which has seen one token less: where it is, say,
        above the values of all next tokens, all tokens that are looked at would lose to all that
        are not. By the mean, the latter keep the probability that they have; tokens of equal values
        get 0; and exact values of the whole vocabulary have value(y) itself as their mean.

        Args:
          probs: `[..., K]`, the original's; 0 leaves a token out.
          values: `[..., K]`, from 0 to 1.

        Returns:
          `[..., K]`, from `least_strength` to 1; 0 changes nothing.
        """
        mean = mean_value(probs, values)[..., None]
        is_known = (mean > 0) & (mean >= self.least_value) & (probs > 0)
        ratio = values / np.where(is_known, mean, 1.0)
        return np.where(is_known, np.clip(1 - ratio, self.least_strength, 1.0), 0.0)


def settings_of(
    num_tokens: int | None,
    least_strength: float = LookAhead.least_strength,
    least_value: float = LookAhead.least_value,
) -> LookAhead | None:
    """`LookAhead` for gin files: None or 0 tokens do not look ahead."""
    if not num_tokens:
        return None
    return LookAhead(num_tokens=num_tokens, least_strength=least_strength, least_value=least_value)


def mean_value(probs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The mean `[...]` of values `[..., K]` of next tokens, by their probabilities."""
    return (probs * values).sum(-1) / np.maximum(probs.sum(-1), np.finfo(np.float64).tiny)


class Candidates(NamedTuple):
    """Tokens that may come next at each position of a batch.

    Attributes:
      ids: The likeliest ones, the likeliest first.
      log_probs: Their log-probabilities under the original, nats.
      entropy: The entropy of the original's whole distribution, nats.
    """

    ids: Int[Array, "B T K"]
    log_probs: Float[Array, "B T K"]
    entropy: Float[Array, "B T"]


@functools.partial(jax.jit, static_argnames=("num_tokens", "softcap"))
def next_candidates(
    states: Float[Array, "B T E"],
    matrix: Float[Array, "V E"],
    never: Bool[Array, " V"],
    *,
    num_tokens: int,
    softcap: float | None = None,
) -> Candidates:
    """Finds the likeliest next tokens at each position; logits `[B, T, V]` are never held.

    Args:
      states: Decoder states.
      matrix: The output matrix.
      never: Which ids no output has, such as padding.
      num_tokens: `K`.
      softcap: The bound of the logits (`FactoredLogits.softcap`); None is no bound.
    """

    def at_position(states):
        log_probs = jax.nn.log_softmax(factored_logits.multiply(states, matrix, 0, softcap))
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=1)
        found, ids = jax.lax.top_k(jnp.where(never, -jnp.inf, log_probs), num_tokens)
        return Candidates(ids, found, entropy)

    by_position = jax.lax.map(at_position, jnp.swapaxes(states, 0, 1))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), by_position)


@functools.partial(jax.jit, static_argnames="training")
def next_values(
    params: PyTree,
    evidence: prefix_values.Evidence,
    matrix: Float[Array, "V E"],
    candidates: Candidates,
    states: Float[Array, "B T K E"],
    *,
    training: prefix_values.Training,
) -> Float[Array, "B T K"]:
    """The value of every prefix with one of its candidates after it, from 0 to 1.

    Args:
      params: The head's.
      evidence: What the head reads of the outputs.
      matrix: The original's output matrix.
      candidates: What may come.
      states: The original's states after it (`models.next_states`).
      training: The head's settings.
    """
    apply: Any = functools.partial(training.head.apply, {"params": params})
    _, so_far = apply(evidence, prefix_values.rows_of(matrix, evidence))
    shape = candidates.ids.shape
    entropy = jnp.broadcast_to(candidates.entropy[..., None], shape)

    def flat(x):  # candidates of one position after those of another
        return x.reshape(shape[0], shape[1] * shape[2], *x.shape[3:])

    def repeated(x):
        return jnp.repeat(x, shape[2], axis=1)

    of_next = prefix_values.Evidence(
        states=flat(states),
        tokens=flat(candidates.ids),
        said=flat(jnp.stack([candidates.log_probs, entropy], axis=-1)),
        mask=repeated(evidence.mask),
    )
    past = prefix_values.Past(repeated(evidence.states), repeated(so_far))
    logits, _ = apply(of_next, matrix[of_next.tokens].astype(jnp.float32), past)
    return jax.nn.sigmoid(logits).reshape(shape)


class Outputs(Protocol):
    """What is asked of the outputs that are looked at, by their indices."""

    @property
    def matrix(self) -> Float[Array, "V E"]:
        """The original's output matrix."""
        ...

    def prompts(self, indices: np.ndarray) -> list[np.ndarray]:
        """The ids of their inputs."""
        ...

    def padded(self, indices: np.ndarray) -> np.ndarray:
        """Their tokens `[B, T]`; the last one of an output comes after its end."""
        ...

    def said(self, indices: np.ndarray) -> np.ndarray:
        """The log-probability of each token, and the entropy where it stands, `[B, T, 2]`."""
        ...

    def evidence(self, indices: np.ndarray) -> prefix_values.Evidence:
        """What a head reads of them."""
        ...


class Heads(NamedTuple):
    """Heads, each for the outputs that it was not trained on.

    Attributes:
      params: Fold -> the parameters of the head that was not trained on the outputs of that fold.
      folds: `[N]`, the fold of each output.
      training: Their settings.
    """

    params: Mapping[int, PyTree]
    folds: np.ndarray
    training: prefix_values.Training


class Strengths:
    """The strengths of outputs; counts what they change.

    Args:
      outputs: The original's outputs.
      model: The original's network.
      params: The original's parameters.
      vocabulary: The tokeniser.
      heads: The value heads for these outputs.
      values: The value of each prefix of each output. The last prefix is the text with its end.
      settings: How values become strengths.
      batch_size: Outputs that are computed together.
      input_length: Tokens at which inputs are cut.

    Raises:
      UsageError: The model has not so many tokens to say.
    """

    def __init__(
        self,
        outputs: Outputs,
        model: Model,
        params: PyTree,
        vocabulary: Any,
        *,
        heads: Heads,
        values: Sequence[np.ndarray],
        settings: LookAhead,
        batch_size: int,
        input_length: int,
    ):
        self._outputs, self._heads, self._values = outputs, heads, values
        self._model, self._params = model, params
        self._vocabulary, self._settings = vocabulary, settings
        self._batch_size, self._input_length = batch_size, input_length
        self._never = np.zeros(self._model.config.vocab_size, bool)
        self._never[[*self._vocabulary.never_said]] = True
        self._never[self._vocabulary.size :] = True
        num_said = int((~self._never).sum())
        if settings.num_tokens > num_said:
            raise UsageError(
                f"LOOK_AHEAD: expected at most the {num_said} tokens that the model can say, found "
                f"{settings.num_tokens}."
            )
        self._num_positions = self._num_lowered = self._num_raised = 0
        self._probability = self._difference = 0.0

    def numbers(self) -> dict[str, Any]:
        """What there was, and how well the values of prefixes and of what follows agree."""
        number = max(self._num_positions, 1)
        return {
            "num_lowered": self._num_lowered,
            "num_raised": self._num_raised,
            "probability_looked_at": self._probability / number,
            "difference_of_values": self._difference / number,
        }

    def add_to(self, rows: Iterable[records.Record]) -> Iterator[records.Record]:
        """Yields the records of the outputs, in order, with their strengths beside their marks."""
        stretch = self._batch_size * len(self._heads.params) * _BATCHES_AT_ONCE
        rows, num_rows = iter(rows), len(self._values)
        starts = range(0, num_rows, stretch)
        for start in console.progress(starts, "looking ahead, in stretches", len(starts)):
            here = np.arange(start, min(start + stretch, num_rows))
            found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            for fold, head in self._heads.params.items():
                own = here[self._heads.folds[here] == fold]
                for first in range(0, len(own), self._batch_size):
                    found |= self._of_batch(own[first : first + self._batch_size], head)
            for index in here.tolist():
                yield self._with_strengths(next(rows), *found[index])

    def _of_batch(
        self, indices: np.ndarray, head: PyTree
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By index of an output: ids `[T, K + 1]`, the last of which was said, and strengths."""
        outputs = self._outputs
        # Filled up with its first row, so that the last batch compiles nothing of its own.
        filled = np.append(indices, np.repeat(indices[:1], self._batch_size - len(indices)))
        evidence, said = outputs.evidence(filled), outputs.padded(filled)
        candidates = next_candidates(
            evidence.states,
            outputs.matrix,
            jnp.asarray(self._never),
            num_tokens=self._settings.num_tokens,
            softcap=self._model.network.final_softcap,
        )
        next_said = next_values(
            head,
            evidence,
            outputs.matrix,
            candidates,
            self._next_states(outputs.prompts(filled), said, np.asarray(candidates.ids)),
            training=self._heads.training,
        )
        ids, values = np.asarray(candidates.ids), np.asarray(next_said, np.float64)
        probs = np.exp(np.asarray(candidates.log_probs, np.float64))
        probs_said = np.exp(outputs.said(filled)[..., :1].astype(np.float64))
        found = {}
        for row, index in enumerate(indices.tolist()):
            own = self._values[index].astype(np.float64)
            length = len(own) - 1  # nothing comes after the end
            last = said[row, :length, None]
            is_among = (ids[row, :length] == last).any(axis=1, keepdims=True)
            all_probs = np.append(
                probs[row, :length], np.where(is_among, 0.0, probs_said[row, :length]), axis=1
            )
            all_values = np.append(values[row, :length], own[1:, None], axis=1)
            self._num_positions += length
            self._probability += float(all_probs.sum())
            self._difference += float(np.abs(mean_value(all_probs, all_values) - own[:-1]).sum())
            found[index] = (
                np.append(ids[row, :length], last, axis=1),
                self._settings.strengths(all_probs, all_values),
            )
        return found

    def _next_states(
        self, prompts: list[np.ndarray], said: np.ndarray, ids: np.ndarray
    ) -> jax.Array:
        width = self._input_length
        batch = {
            "inputs": pad_inputs(prompts, width, self._model.network.feature_layout),
            "lengths": np.array([min(len(prompt), width) for prompt in prompts], np.int32),
            "targets": said,
            "candidates": ids,
        }
        compute = next_states.jit_next_states(self._model)
        states = compute(self._params, *sharding.put_batch(batch, self._model.mesh).values())
        return jnp.asarray(np.asarray(states))  # on one device, as the head

    def _with_strengths(
        self, row: records.Record, ids: np.ndarray, strengths: np.ndarray
    ) -> records.Record:
        # Where an output was cut, no token of the record stands at its end.
        num_tokens = len(marks.ids_and_extents(row, self._vocabulary)[0])
        found: dict[int, dict[int, float]] = {}
        for position, column in np.argwhere(np.abs(strengths[:num_tokens]) >= _LEAST_CHANGE):
            strength = min(prefix_values.short(strengths[position, column]), _MOST)
            found.setdefault(int(position), {})[int(ids[position, column])] = strength
            self._num_lowered += strength > 0
            self._num_raised += strength < 0
        entries = (*row.negative_token_ids, *marks.token_id_entries(found))
        return dataclasses.replace(row, negative_token_ids=entries)
