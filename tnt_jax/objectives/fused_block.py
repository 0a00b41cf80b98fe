"""An objective on a block of tokens: values, and the gradient to the logits in closed form.

`definition` is the definition; this computes the same from logits `[rows, V]`, of which a device
may hold some columns only (`Reductions`), in as few passes over them as there are sums to take.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tnt_jax.objectives import definition
from tnt_jax.runtime.array_types import Array, Bool, Float, Int

_LOG_ZERO = definition.LOG_ZERO
# With up to so many ids per position, "is it one of them" is asked of every element of a block, at
# no memory; beyond, a mask is scattered.
_FEW_IDS = 8
# Up to so many per position are compared with each other.
_FEW_TO_COMPARE = 32


class TokenValues(NamedTuple):
    """What a step wants to know of every token, each float32 `[B, T]`, 0 at padding.

    Attributes:
      losses: The loss of each token, nats (`TntObjective.token_losses`).
      removed_mass: The probability still on removed ids (`definition.removed_mass`).
      residual: `definition.Certificate.residual`, nats; None without an original.
      collateral: `definition.Certificate.collateral`, nats; None without an original.
      smallest_cost: `definition.Certificate.smallest_cost`, nats; None without an original.
    """

    losses: Float[Array, "B T"]
    removed_mass: Float[Array, "B T"]
    residual: Float[Array, "B T"] | None = None
    collateral: Float[Array, "B T"] | None = None
    smallest_cost: Float[Array, "B T"] | None = None


@dataclasses.dataclass(frozen=True)
class Reductions:
    """Sums and maxima over the vocabulary, of which this device has `size` ids."""

    axes: tuple[str, ...]
    size: int

    @property
    def vocab_size(self) -> int:
        """Ids of all devices."""
        return self.size * math.prod(jax.lax.axis_size(axis) for axis in self.axes)

    def sums(self, *terms: Float[Array, "R"]) -> Sequence[Float[Array, "R"]]:
        """Adds up over the devices, all terms in one exchange."""
        return jax.lax.psum(terms, self.axes) if self.axes else terms

    def maxima(self, *terms: Float[Array, "R"]) -> Sequence[Float[Array, "R"]]:
        """Takes the largest over the devices, all terms in one exchange."""
        return jax.lax.pmax(terms, self.axes) if self.axes else terms

    @property
    def first_id(self) -> Int[Array, ""]:
        """The id of this device's first column."""
        place = jnp.int32(0)
        for axis in self.axes:
            place = place * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
        return place * self.size

    def local(self, ids: Int[Array, "..."]) -> Int[Array, "..."]:
        """Ids as columns of this device's part; those of other devices and padding are -1."""
        if self.axes:
            ids = jnp.where(ids >= 0, ids - self.first_id, -1)
        return jnp.where((ids >= 0) & (ids < self.size), ids, -1)

    def top(
        self, logits: Float[Array, "R V"], number: int
    ) -> tuple[Float[Array, "R _"], Int[Array, "R _"]]:
        """The largest logits of each row and their ids, largest first; of equals the first id.

        A device sends its own largest ones, never the row.
        """
        values, columns = _top(logits, min(number, self.size))
        ids = columns + self.first_id
        if not self.axes:
            return values, ids
        for axis in reversed(self.axes):  # in the order of ids, so that equals stay in it
            values, ids = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (values, ids))
        values, places = jax.lax.top_k(values, min(number, self.vocab_size))
        return values, jnp.take_along_axis(ids, places, axis=1)


class _Term(NamedTuple):
    """A term of an objective, and its gradient to the logits.

    Attributes:
      value: The term at every token, nats.
      of_kept: Gradient to logits outside `S`; what it has on `S` is not used.
      of_removed: Gradient to the logits of `Block.ids`.
    """

    value: Float[Array, "R"]
    of_kept: Float[Array, "R V"]
    of_removed: Float[Array, "R K"]


class _Graded(NamedTuple):
    """The marks of a strength below 1, each once; of one below 0, the id is raised.

    Attributes:
      ids: The columns that this device has, -1 elsewhere.
      strengths: The strength of each of these ids, 0 elsewhere.
      logits: The original's logits of these ids, not lowered; None without an original.
    """

    ids: Int[Array, "R K"]
    strengths: Float[Array, "R K"]
    logits: Float[Array, "R K"] | None


class Block:
    """The objective on a block of tokens; `R` rows, `V` this device's part of the vocabulary.

    Names are those of `definition`: `q` is p outside `S`, `p_new` the original there, `d` their
    log-ratio log q - log p_new. All that lives on `S` is gathered into `[R, K]`; there `q` and
    `p_new` are 0 and whatever multiplies them is finite. Marks of a strength below 1 are not in
    `S`: the original's logits are lowered there, and what is asked of them is gathered as well.
    """

    def __init__(
        self,
        objective,
        reductions,
        logits,
        original_logits,
        target_tokens,
        negative_ids,
        strengths=None,
    ):
        self.objective = objective
        self.reductions = reductions
        self.target = reductions.local(target_tokens)
        is_negative = objective.is_negative(target_tokens[:, None], negative_ids[:, None])
        self.is_negative = is_negative[:, 0]
        self.mixed, self.graded = None, None
        negative_ids, strengths = _each_once(negative_ids, strengths)
        if strengths is not None:
            negative_ids = objective.without_raised(negative_ids, strengths)
            if objective.mixes:
                self.mixed = self._mix(
                    logits, original_logits, target_tokens, negative_ids, strengths
                )
            negative_ids, self.graded = self._split(negative_ids, strengths, original_logits)
            if original_logits is not None:
                original_logits = self._lowered(original_logits, self.graded)
        self.ids = self._removed_ids(negative_ids)
        self.has_original = original_logits is not None
        self.logits = logits
        self.kept = self._without_removed(logits)
        self.of_removed = self._at_removed(logits)
        maxima = [self.kept.max(axis=1), self.of_removed.max(axis=1)]
        if original_logits is not None:
            self.original_kept = self._without_removed(original_logits)
            self.original_of_removed = self._at_removed(original_logits)
            maxima += [
                self.original_kept.max(axis=1),
                self.original_of_removed.max(axis=1),
            ]
        self.maxima = reductions.maxima(*map(jax.lax.stop_gradient, maxima))
        self._sum_up()

    # --- The set S ---

    def _removed_ids(self, negative_ids: Int[Array, "R _"]) -> Int[Array, "R K"]:
        """The columns of `S` that this device has, -1 elsewhere; of ids each once."""
        if self.objective.negative_term == "none":
            return jnp.full((len(negative_ids), 1), -1, jnp.int32)
        ids = negative_ids
        if everywhere := self.objective.removed_everywhere:
            is_everywhere = jnp.isin(ids, jnp.asarray(everywhere, jnp.int32))
            shape = len(ids), len(set(everywhere))
            of_all = jnp.broadcast_to(jnp.asarray(sorted(set(everywhere)), jnp.int32), shape)
            ids = jnp.concatenate([jnp.where(is_everywhere, -1, ids), of_all], axis=1)
        return self.reductions.local(ids)

    def _without_removed(self, logits: Float[Array, "R V"]) -> Float[Array, "R V"]:
        return _put(logits, self.ids, jnp.full(self.ids.shape, _LOG_ZERO))

    def _at_removed(self, logits: Float[Array, "R V"]) -> Float[Array, "R K"]:
        return _at(logits, self.ids)

    # --- Marks of a strength below 1 ---

    def _split(
        self,
        negative_ids: Int[Array, "R K"],
        strengths: Float[Array, "R K"],
        original_logits: Float[Array, "R V"] | None,
    ) -> tuple[Int[Array, "R K"], _Graded]:
        """The ids of strength 1, and the others; each is there once."""
        everywhere = jnp.asarray(self.objective.removed_everywhere, jnp.int32)
        is_removed = (strengths >= 1) | jnp.isin(negative_ids, everywhere)
        ids = self.reductions.local(jnp.where(is_removed, -1, negative_ids))
        logits = None if original_logits is None else _at(original_logits, ids)
        graded = _Graded(ids, jnp.where(ids < 0, 0.0, strengths), logits)
        return jnp.where(is_removed, negative_ids, -1), graded

    @staticmethod
    def _lowered(logits: Float[Array, "R V"], graded: _Graded) -> Float[Array, "R V"]:
        lowered = _at(logits, graded.ids) + jnp.log1p(-graded.strengths)
        return _put(logits, graded.ids, lowered)

    def _mix(self, logits, original_logits, target_tokens, negative_ids, strengths):
        """Losses and gradient of a term without `p_new`: with all marks, and without, mixed."""
        share, unsure_ids = definition.share_with_marks(negative_ids[:, None], strengths[:, None])
        (with_marks, of_marks), (without, of_none) = (
            Block(
                self.objective, self.reductions, logits, original_logits, target_tokens, ids
            ).losses_and_gradient()
            for ids in (negative_ids, unsure_ids[:, 0])
        )
        losses = share[:, 0] * with_marks + (1 - share[:, 0]) * without
        return losses, share * of_marks + (1 - share) * of_none

    # --- What all terms read ---

    def _sum(self, x: Float[Array, "R _"]) -> Float[Array, "R"]:
        (total,) = self.reductions.sums(x.sum(axis=1))
        return total

    def _sum_up(self) -> None:
        """Normalisers, masses and log-probabilities of both models."""
        # The mass of an empty S is that of exp(_LOG_ZERO), so no logarithm of 0 appears.
        top, top_removed, *tops = (m[:, None] for m in self.maxima)
        sums = [_sum_exp(self.kept, top), _sum_exp(self.of_removed, top_removed)]
        if self.has_original:
            shift = self.kept - self.original_kept
            sums += [
                _sum_exp(self.original_kept, tops[0]),
                _sum_exp(self.original_of_removed, tops[1]),
                _growth(self.original_kept - tops[0], shift).sum(axis=1),
            ]
            if (
                self.graded is not None and self.graded.logits is not None
            ):  # by how much they have been lowered, in all
                taken = self.graded.strengths * jnp.exp(self.graded.logits - tops[0])
                sums.append(taken.sum(axis=1))
        kept, removed, *others = (x[:, None] for x in self.reductions.sums(*sums))
        kept, removed = jnp.log(kept), jnp.log(removed)
        self.log_odds = (top_removed - top) + removed - kept
        self.logit_of_removed = top_removed + removed  # of all of S together
        self.log_removed, self.log_rest = _log_masses(self.log_odds)
        self.residual = jax.nn.softplus(self.log_odds)
        self.log_q = (self.kept - top) - kept
        # Within S: p | S, and p itself.
        self.log_within = (self.of_removed - top_removed) - removed
        self.p_removed = jnp.exp(self.log_within + self.log_removed)
        self.mass, self.rest = jnp.exp(self.log_removed), jnp.exp(self.log_rest)
        self.log_normaliser = top + kept - self.log_rest
        if not self.has_original:
            return
        kept0, removed0 = jnp.log(others[0]), jnp.log(others[1])
        self.original_log_odds = (tops[1] - tops[0]) + removed0 - kept0
        self.log_p_new = (self.original_kept - tops[0]) - kept0
        self.original_log_within = (self.original_of_removed - tops[1]) - removed0
        self.unlowered_log_odds = self.original_log_odds
        if self.graded is not None:
            # Log of the original's normaliser outside S over that of the lowered one.
            self.log_taken = jnp.log1p(others[3] / others[0])
            self.unlowered_log_odds = self.original_log_odds - self.log_taken
        # How much the normaliser has grown. Near the original the difference of two logarithms
        # would leave few digits of it, and none of the gradient.
        growth = others[2] / others[0]
        self.d = (self.kept - self.original_kept) - jnp.where(
            jnp.abs(growth) < 0.5,
            jnp.log1p(jnp.clip(growth, -0.5, 0.5)),
            (top - tops[0]) + (kept - kept0),
        )

    @property
    def q(self) -> Float[Array, "R V"]:
        """The current model outside `S`, renormalised."""
        return jnp.exp(self.log_q)

    @property
    def p_new(self) -> Float[Array, "R V"]:
        """The desired distribution."""
        return jnp.exp(self.log_p_new)

    @property
    def collateral(self) -> Float[Array, "R"]:
        """KL(p_new || q)."""
        return self._sum(_kl(self.p_new, self.q, self.d))

    @property
    def smallest_cost(self) -> Float[Array, "R"]:
        """KL(p_new || p0); outside `S` all ratios but those of graded ids are the same one."""
        cost = jax.nn.softplus(self.unlowered_log_odds)[:, 0]
        if self.graded is None:
            return cost
        p_new = jnp.exp(_at(self.log_p_new, self.graded.ids))
        ratio = -jnp.log1p(-self.graded.strengths) - self.log_taken
        within = jnp.where(self.graded.ids < 0, 0.0, _kl(p_new, p_new * jnp.exp(ratio), ratio))
        of_graded, mass = self.reductions.sums(within.sum(axis=1), p_new.sum(axis=1))
        rest = jnp.maximum(1 - mass, 0.0)
        log_ratio = -self.log_taken[:, 0]
        return cost + (of_graded + _kl(rest, rest * jnp.exp(log_ratio), log_ratio))

    @property
    def removed_mass(self) -> Float[Array, "R"]:
        """p(S), and of the other marks the probability times the strength."""
        if self.graded is None:
            return self.mass[:, 0]
        p = jnp.exp(_at(self.log_q, self.graded.ids) + self.log_rest)
        return self.mass[:, 0] + self._sum(jnp.maximum(self.graded.strengths, 0.0) * p)

    # --- The terms ---

    def values_and_gradient(self) -> tuple[TokenValues, Float[Array, "R V"]]:
        """Computes the values of every row, and the gradient of its loss to its logits.

        Padding is computed like any other row.
        """
        losses, gradient = self.losses_and_gradient() if self.mixed is None else self.mixed
        values = TokenValues(losses=losses, removed_mass=self.removed_mass)
        if self.has_original:
            values = values._replace(
                residual=self.residual[:, 0],
                collateral=self.collateral,
                smallest_cost=self.smallest_cost,
            )
        return values, gradient

    def losses_and_gradient(self) -> tuple[Float[Array, "R"], Float[Array, "R V"]]:
        """Computes the losses of `values_and_gradient`, and their gradient, alone."""
        objective = self.objective
        term = self._term(objective.positive_term)
        if objective.negative_term not in ("none", objective.positive_term):
            other = self._term(objective.negative_term)
        else:
            other = term
        if objective.negative_term != "none":
            weight = objective.negative_weight
            term = jax.tree.map(
                lambda p, n: jnp.where(
                    self.is_negative.reshape(-1, *[1] * (p.ndim - 1)), weight * n, p
                ),
                term,
                other,
            )
        return term.value, _put(term.of_kept, self.ids, term.of_removed)

    def _term(self, name: str) -> _Term:
        """Formulas of the values are in `TntObjective`, those of the gradients beside them here."""
        unlikelihood = _Term(self.residual[:, 0], -self.mass * self.q, self.p_removed)
        residual = unlikelihood
        if self.objective.residual_weight != 1:
            residual = _Term(*(self.objective.residual_weight * x for x in unlikelihood))
        match name:
            case "forward_kl" | "reverse_kl" if self.objective.smoothing:
                return self._smoothed(name)
            case "forward_kl":  # p - p_new; on S, p
                change = _change(self.p_new, self.q, self.d)
                return residual._replace(
                    value=residual.value + self.collateral, of_kept=change + residual.of_kept
                )
            case "reverse_kl":
                return self._floored_reverse_kl()
            case "reverse_kl_split":  # of the KL: q (d - KL)
                value = self._reverse_within_kept()
                return residual._replace(
                    value=residual.value + value,
                    of_kept=self.q * (self.d - value[:, None]) + residual.of_kept,
                )
            case "jensen_shannon":
                return self._jensen_shannon(self.log_rest)
            case "jensen_shannon_split":
                split = self._jensen_shannon(None)
                return _Term(*(x + y for x, y in zip(split, residual, strict=True)))
            case "negative_likelihood":  # [in S] p / m - p
                log_mass = self.log_removed
                is_above = log_mass > definition.LOG_LIKELIHOOD_FLOOR
                within = jnp.exp(self.log_within) - self.p_removed
                return _Term(
                    jnp.maximum(log_mass, definition.LOG_LIKELIHOOD_FLOOR)[:, 0],
                    jnp.where(is_above, -self.rest * self.q, 0.0),
                    jnp.where(is_above, within, 0.0),
                )
            case "unlikelihood":
                return unlikelihood
            case "negative_preference":  # of log m, times 2 sigmoid(beta log(m / p0(S)))
                return self._negative_preference()
            case "final_token_preference":
                return self._final_token_preference()
            case "log_likelihood":
                return self._cross_entropy()
            case "none":
                return _Term(*map(jnp.zeros_like, unlikelihood))
        raise AssertionError(name)

    def _negative_preference(self) -> _Term:
        beta = self.objective.npo_beta
        x = beta * (self.log_removed - _log_masses(self.original_log_odds)[0])
        slope = 2 * jax.nn.sigmoid(x)
        within = jnp.exp(self.log_within) - self.p_removed
        value = 2 / beta * jax.nn.softplus(x)
        return _Term(value[:, 0], -slope * self.rest * self.q, slope * within)

    def _final_token_preference(self) -> _Term:
        """The three parts of `definition.FinalTokenPreference`."""
        settings, chosen = self.objective.ftpo, self._chosen()
        short = settings.margin - (self.kept - self.logit_of_removed)
        ratio = short / settings.margin
        weights = jnp.where(chosen, jnp.clip(ratio, 0.0, 1.0), 0.0)
        is_sloped = chosen & (ratio > 0) & (ratio < 1)
        lost, pull = jax.nn.softplus(short), weights * jax.nn.sigmoid(short)
        moved = self.kept - self.original_kept  # 0 on S
        excess, excess_removed = (
            jnp.sign(x) * jnp.maximum(jnp.abs(x) - settings.target_slack, 0.0)
            for x in (jnp.where(chosen, moved, 0.0), self.of_removed - self.original_of_removed)
        )
        others = jnp.where(chosen, 0.0, moved)
        sums = self.reductions.sums(
            *(
                x.sum(axis=1)
                for x in (
                    *(weights, weights * lost, pull),
                    *(jnp.where(is_sloped, lost, 0.0), is_sloped.astype(jnp.float32)),
                    *(chosen.astype(jnp.float32), (self.ids >= 0).astype(jnp.float32)),
                    *(excess**2, excess_removed**2, others**2),
                )
            )
        )
        total, lost_sum, pull_sum, sloped_sum, num_sloped, num_chosen, num_removed, *squares = (
            x[:, None] for x in sums
        )
        # The mean L of the lost has to a gap the slope -(w_c sigmoid(margin - gap_c) + (lost_c - L)
        # [0 < w_c < 1] / margin) / sum of w; to a removed logit minus their sum, by its share of S.
        total = jnp.where(total > 0, total, 1.0)
        mean = lost_sum / total
        of_weights = jnp.where(is_sloped, lost - mean, 0.0) / settings.margin
        sum_of_slopes = pull_sum + (sloped_sum - num_sloped * mean) / settings.margin
        num_targets = num_chosen + num_removed
        of_target = settings.target_weight / num_targets
        of_other = settings.rest_weight / jnp.maximum(self.reductions.vocab_size - num_targets, 1.0)
        value = mean + of_target * (squares[0] + squares[1]) + of_other * squares[2]
        return _Term(
            value[:, 0],
            2 * (of_target * excess + of_other * others) - (pull + of_weights) / total,
            2 * of_target * excess_removed + sum_of_slopes / total * jnp.exp(self.log_within),
        )

    def _chosen(self) -> Bool[Array, "R V"]:
        """Which columns are ids that `definition.FinalTokenPreference` prefers."""
        settings = self.objective.ftpo
        _, _, top, top_removed = (m[:, None] for m in self.maxima)
        values, ids = self.reductions.top(self.original_kept, settings.num_chosen)
        least = jnp.minimum(jnp.maximum(top, top_removed) + math.log(settings.min_p), top)
        column = jax.lax.broadcasted_iota(jnp.int32, self.kept.shape, 1) + self.reductions.first_id
        last, last_id = values[:, -1:], ids[:, -1:]
        is_first = (self.original_kept > last) | (
            (self.original_kept == last) & (column <= last_id)
        )
        return (self.original_kept >= least) & is_first

    def _reverse_within_kept(self) -> Float[Array, "R"]:
        """KL(q || p_new)."""
        return self._sum(_kl(self.q, self.p_new, -self.d))

    def _floored_reverse_kl(self) -> _Term:
        """KL(p || p_e) by the chain rule; its gradient is p (log p - log p_e - KL)."""
        floor = math.log(self.objective.removed_token_floor)
        log_floor = jnp.minimum(_log_masses(self.unlowered_log_odds)[0], floor)
        log_rest_of_floor = jnp.log1p(-jnp.exp(log_floor))
        of_removed_bit = self.log_removed - log_floor
        of_kept_bit = self.log_rest - log_rest_of_floor
        of_bit = _kl(self.mass, jnp.exp(log_floor), -of_removed_bit) + _kl(
            self.rest, jnp.exp(log_rest_of_floor), -of_kept_bit
        )
        ratio = self.log_within - self.original_log_within
        within_removed = self._sum(
            _kl(jnp.exp(self.log_within), jnp.exp(self.original_log_within), -ratio)
        )
        value = (
            of_bit[:, 0]
            + self.mass[:, 0] * within_removed
            + self.rest[:, 0] * self._reverse_within_kept()
        )
        return _Term(
            value,
            self.rest * self.q * (self.d + (of_kept_bit - value[:, None])),
            self.p_removed * (ratio + (of_removed_bit - value[:, None])),
        )

    def _jensen_shannon(self, log_rest: Float[Array, "R 1"] | None) -> _Term:
        """JS of p_new and p, or of p_new and q where `log_rest` is None."""
        of_removed = jnp.zeros_like(self.p_removed)
        gap, b = self.d, self.q
        if log_rest is not None:
            gap, b = gap + log_rest, b * self.rest
        # Logarithms of the mean M over those of a and b.
        common = jnp.log1p(jnp.expm1(-jnp.abs(gap)) / 2)
        over_a, over_b = jnp.maximum(gap, 0) + common, jnp.maximum(-gap, 0) + common
        mean = (self.p_new + b) / 2
        value = self._sum(_kl(self.p_new, mean, over_a) + _kl(b, mean, over_b)) / 2
        # The gradient is b (log b/M - E[log b/M]) / 2, the expectation under all of p.
        expected = self._sum(-b * over_b)
        if log_rest is not None:
            value += self.mass[:, 0] * (math.log(2) / 2)
            expected += self.mass[:, 0] * math.log(2)
            of_removed = self.p_removed * (math.log(2) - expected[:, None]) / 2
        return _Term(value, b * (-over_b - expected[:, None]) / 2, of_removed)

    def _smoothed(self, name: str) -> _Term:
        """The forward or reverse KL with the desired distribution of t5patches."""
        s = self.objective.smoothing
        scale = math.log1p(s * self.reductions.vocab_size)
        p, log_p = self.rest * self.q, self.log_q + self.log_rest
        desired, log_desired = self.p_new + s, jnp.log(self.p_new + s) - scale
        desired = desired * math.exp(-scale)
        log_p_removed = self.log_within + self.log_removed
        is_local = self.ids >= 0
        at_removed = math.exp(math.log(s) - scale), math.log(s) - scale
        # On S `log_p` is far below all that float32 resolves: its own values are in `of_removed`.
        everything = [
            (p, log_p, desired, log_desired, self._is_kept),
            (self.p_removed, log_p_removed, *at_removed, is_local),
        ]
        if name == "forward_kl":
            kept, removed = (
                self._sum(jnp.where(where, _kl(target, p, log_p - log_target), 0.0))
                for p, log_p, target, log_target, where in everything
            )
            return _Term(kept + removed, p - desired, self.p_removed - at_removed[0])
        kept, removed = (
            self._sum(jnp.where(where, _kl(p, target, log_target - log_p), 0.0))
            for p, log_p, target, log_target, where in everything
        )
        value = kept + removed
        of_kept, of_removed = (
            p * (log_p - log_target - value[:, None]) for p, log_p, _, log_target, _ in everything
        )
        return _Term(value, of_kept, of_removed)

    @property
    def _is_kept(self) -> Bool[Array, "R V"]:
        return self.kept > _LOG_ZERO / 2

    def _cross_entropy(self) -> _Term:
        """-log p(target); the target distribution is `on` at the target and `off` elsewhere."""
        vocab_size = self.reductions.vocab_size
        on, off, entropy = self.objective.smoothed_target(vocab_size)
        has_target = self.target >= 0
        at_target = jnp.take_along_axis(self.logits, jnp.maximum(self.target, 0)[:, None], axis=1)
        normaliser = self.log_normaliser[:, 0]
        centred = jnp.where(has_target, at_target[:, 0] - normaliser, 0.0)
        value = (off - on) * self._sum(centred[:, None]) - entropy
        if off:
            value -= off * self._sum(self.logits - self.log_normaliser)
        total = on + (vocab_size - 1) * off
        if z_loss := self.objective.z_loss:
            value += z_loss * normaliser**2
            total = total + 2 * z_loss * self.log_normaliser

        def of(p, columns):
            return p * total - jnp.where(columns == self.target[:, None], on, off)

        column = jax.lax.broadcasted_iota(jnp.int32, self.kept.shape, 1)
        return _Term(value, of(self.rest * self.q, column), of(self.p_removed, self.ids))


def _each_once(
    ids: Int[Array, "R K"], strengths: Float[Array, "R K"] | None = None
) -> tuple[Int[Array, "R K"], Any]:
    """Ids of which the first stays and its repeats are -1, each with the largest of its strengths.

    Many ids are sorted; to compare them with each other would take `[R, K, K]`.
    """
    if ids.shape[1] <= _FEW_TO_COMPARE:
        is_same = ids[:, :, None] == ids[:, None, :]
        is_repeated = jnp.tril(is_same, -1).any(axis=2)
        if strengths is not None:
            strengths = jnp.where(is_same, strengths[:, None, :], -jnp.inf).max(axis=2)
    else:
        if strengths is None:
            ids = jnp.sort(ids, axis=1)
        else:
            ids, weakness = jax.lax.sort((ids, -strengths), dimension=1, num_keys=2)
            strengths = -weakness
        is_repeated = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(is_repeated, -1, ids), strengths


def _top(x: Float[Array, "R V"], number: int) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """`jax.lax.top_k` in one pass over the rows: on a CPU that sorts each of them as a whole.

    The largest are in the parts with the largest maxima; parts stay in the order of their columns,
    and so do equals.
    """
    num_rows, size = x.shape
    width = max(1, math.isqrt(size // number))
    num_parts = -(-size // width)
    padded = jnp.pad(x, ((0, 0), (0, num_parts * width - size)), constant_values=-jnp.inf)
    parts = padded.reshape(num_rows, num_parts, width)
    _, best = jax.lax.top_k(parts.max(axis=2), number)
    best = jnp.sort(best, axis=1)
    found = jnp.take_along_axis(parts, best[:, :, None], axis=1).reshape(num_rows, -1)
    values, places = jax.lax.top_k(found, number)
    columns = jnp.take_along_axis(best, places // width, axis=1) * width + places % width
    return values, columns


def _put(
    x: Float[Array, "R V"], ids: Int[Array, "R K"], values: Float[Array, "R K"]
) -> Float[Array, "R V"]:
    """`x`, with the values written to the columns `ids`."""
    if ids.shape[1] > _FEW_IDS:
        columns = jnp.where(ids < 0, x.shape[1], ids)
        return jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, columns, values)
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    for k in range(ids.shape[1]):
        x = jnp.where(column == ids[:, k, None], values[:, k, None], x)
    return x


def _at(x: Float[Array, "R V"], ids: Int[Array, "R K"]) -> Float[Array, "R K"]:
    """What `x` has at the columns `ids`, `_LOG_ZERO` where they are -1."""
    found = jnp.take_along_axis(x, jnp.maximum(ids, 0), axis=1)
    return jnp.where(ids < 0, _LOG_ZERO, found)


def _sum_exp(logits: Float[Array, "R _"], top: Float[Array, "R 1"]) -> Float[Array, "R"]:
    return jnp.exp(logits - top).sum(axis=1)


def _log_masses(log_odds):
    """The pair log p(S), log(1 - p(S))."""
    return jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)


def _near(x: Float[Array, "..."]) -> tuple[Bool[Array, "..."], Float[Array, "..."]]:
    """Where |x| < 1, and x there: a polynomial of it may overflow elsewhere."""
    is_near = jnp.abs(x) < 1
    return is_near, jnp.where(is_near, x, 0.0)


def _kl(a, b, log_ratio):
    """The summands of KL(a || b) as in `definition`, none negative; `log_ratio` is log b/a."""
    is_near, x = _near(log_ratio)
    return jnp.where(is_near, a * definition.exp_remainder(x), b - a - a * log_ratio)


def _change(a, b, log_ratio):
    """`b - a`, with all digits where they are near each other."""
    is_near, x = _near(log_ratio)
    return jnp.where(is_near, a * (x + definition.exp_remainder(x)), b - a)


def _growth(log_a, log_ratio):
    """`b - a` for log a below 0; where b would overflow, anything so large."""
    is_near, x = _near(log_ratio)
    a = jnp.exp(log_a)
    far = jnp.exp(jnp.minimum(log_a + log_ratio, 60.0)) - a
    return jnp.where(is_near, a * (x + definition.exp_remainder(x)), far)
