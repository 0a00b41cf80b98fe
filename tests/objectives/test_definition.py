"""The objectives against float64 NumPy written from the formulas, and what must always hold."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from tnt_jax import objectives
from tnt_jax.runtime.errors import UsageError

# The paper's objectives and baselines, and ours: (negative term, positive term).
TERMS = {
    "TNFF": ("forward_kl", "forward_kl"),
    "TNRR": ("reverse_kl", "reverse_kl"),
    "TNRF": ("reverse_kl", "forward_kl"),
    "TNFLL": ("forward_kl", "log_likelihood"),
    "TNRLL": ("reverse_kl", "log_likelihood"),
    "TNSR": ("reverse_kl_split", "reverse_kl"),
    "TNSF": ("reverse_kl_split", "forward_kl"),
    "TNJJ": ("jensen_shannon", "jensen_shannon"),
    "TNJSJ": ("jensen_shannon_split", "jensen_shannon"),
    "NL+LL": ("negative_likelihood", "log_likelihood"),
    "UL+LL": ("unlikelihood", "log_likelihood"),
    "NL+KL": ("negative_likelihood", "forward_kl"),
    "UL+KL": ("unlikelihood", "forward_kl"),
    "NPO+LL": ("negative_preference", "log_likelihood"),
    "NPO+KL": ("negative_preference", "forward_kl"),
    "FTPO": ("final_token_preference", "none"),
    "FTPO+KL": ("final_token_preference", "forward_kl"),
    "fine-tune": ("none", "log_likelihood"),
}
BASELINE_TERMS = (
    *("negative_likelihood", "unlikelihood", "log_likelihood", "none"),
    *("negative_preference", "final_token_preference"),
)
PURE_DIVERGENCES = [name for name, pair in TERMS.items() if not set(pair) & set(BASELINE_TERMS)]

seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.1, 1.0, 8.0, 100.0, 1e4])


def objective_named(name, **settings):
    negative_term, positive_term = TERMS[name]
    return objectives.TntObjective(
        negative_term=negative_term, positive_term=positive_term, **settings
    )


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradient(objective, current, original, target_tokens, negative_ids, loss_mask):
    """The losses [B, T] and the gradient of their sum with respect to the current logits."""

    def total(current):
        losses = objective.token_losses(
            current_logits=current,
            original_logits=original,
            target_tokens=target_tokens,
            negative_ids=negative_ids,
            loss_mask=loss_mask,
        )
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(current)
    return losses, gradient


def random_batch(seed, vocab_size=29, num_ids=3, scale=1.0, drift=1.0):
    """Arguments of `losses_and_gradient`; every third position is ordinary, none is padding.

    One shape for most tests, as each shape is compiled: `[2, 12, vocab_size]`, with room for
    `vocab_size - 1` negative ids.
    """
    rng = np.random.default_rng(seed)
    original = rng.normal(size=(2, 12, vocab_size)) * scale
    current = original + rng.normal(size=original.shape) * scale * drift
    negative_ids = np.full((2, 12, vocab_size - 1), -1)
    negative_ids[..., :num_ids] = rng.integers(-1, vocab_size, size=(2, 12, num_ids))
    negative_ids[:, ::3] = -1
    first_ids, other_ids = negative_ids[..., 0], rng.integers(0, vocab_size, size=(2, 12))
    return {
        "current": jnp.asarray(current, jnp.float32),
        "original": jnp.asarray(original, jnp.float32),
        "target_tokens": jnp.asarray(np.where(first_ids >= 0, first_ids, other_ids), jnp.int32),
        "negative_ids": jnp.asarray(negative_ids, jnp.int32),
        "loss_mask": jnp.ones((2, 12), jnp.int32),
    }


def batch_of_probabilities(original, current, removed_id):
    """The same batch with a few probabilities written out; all other ids have probability 0."""
    logits = np.full((2, 2, 12, 29), -2e4, np.float32)
    logits[0, ..., : len(original)] = np.log(original)
    logits[1, ..., : len(current)] = np.log(current)
    batch = random_batch(0)
    ids = jnp.full_like(batch["negative_ids"], -1).at[..., 0].set(removed_id)
    targets = jnp.full_like(batch["target_tokens"], removed_id)
    models = {"original": jnp.asarray(logits[0]), "current": jnp.asarray(logits[1])}
    return batch | models | {"negative_ids": ids, "target_tokens": targets}


@functools.partial(jax.jit, static_argnames="removed_everywhere")
def certificate_of(current, original, negative_ids, removed_everywhere=()):
    return objectives.certificate(
        current_logits=current,
        original_logits=original,
        negative_ids=negative_ids,
        removed_everywhere=removed_everywhere,
    )


desired_log_probs = jax.jit(objectives.desired_log_probs, static_argnums=2)


def removed_by(negative_ids, vocab_size):
    return (np.asarray(negative_ids)[..., None] == np.arange(vocab_size)).any(axis=-2)


# --- The formulas, in float64, from probabilities and with gradients by hand ---------------------


def log_sum_exp(logits, ids=True):
    """Over the ids alone, keeping the axis; -inf where there are none."""
    logits = np.where(ids, logits, -np.inf)
    peak = np.maximum(logits.max(axis=-1, keepdims=True), -1e300)
    with np.errstate(divide="ignore"):
        return peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True))


def log_ratio_mean(a, log_a, log_b):
    """The sum of a log(a / b), where 0 log 0 = 0."""
    with np.errstate(invalid="ignore"):
        return np.where(a > 0, a * (log_a - log_b), 0.0).sum(axis=-1, keepdims=True)


def float64_term(name, current, original, removed, target_tokens, floor=1e-6):
    """One term of DESIGN.md section 3 and its gradient to the current logits, at every position."""
    z, z0 = np.asarray(current, np.float64), np.asarray(original, np.float64)
    kept = ~removed
    log_p, log_p0 = z - log_sum_exp(z), z0 - log_sum_exp(z0)
    log_q = np.where(kept, z - log_sum_exp(z, kept), -np.inf)
    log_new = np.where(kept, z0 - log_sum_exp(z0, kept), -np.inf)
    p, q, p_new = np.exp(log_p), np.exp(log_q), np.exp(log_new)
    m = np.where(removed, p, 0).sum(axis=-1, keepdims=True)
    log_1_m = log_sum_exp(log_p, kept)
    residual = np.where(m < 0.5, -np.log1p(-np.minimum(m, 0.5)), -log_1_m)
    residual_gradient = np.where(removed, p, -m * q)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_m = np.where(m < 0.5, log_sum_exp(log_p, removed), np.log1p(-np.exp(log_1_m)))
        if name == "forward_kl":
            return residual + log_ratio_mean(p_new, log_new, log_q), p - p_new
        if name == "reverse_kl":
            log_p0_removed = log_sum_exp(log_p0, removed)
            log_e = np.minimum(np.log(floor), log_p0_removed)
            log_e_share = log_e + log_p0 - log_p0_removed
            log_pe = np.where(removed, log_e_share, np.log1p(-np.exp(log_e)) + log_new)
            loss = log_ratio_mean(p, log_p, log_pe)
            return loss, p * (log_p - log_pe - loss)
        if name == "reverse_kl_split":
            loss = log_ratio_mean(q, log_q, log_new)
            gradient = np.where(kept, q * (log_q - log_new - loss), 0)
            return residual + loss, residual_gradient + gradient
        if name in ("jensen_shannon", "jensen_shannon_split"):
            is_split = name == "jensen_shannon_split"
            b, log_b = (q, log_q) if is_split else (p, log_p)
            log_mean = np.log((p_new + b) / 2)
            half = log_ratio_mean(b, log_b, log_mean)
            loss = (log_ratio_mean(p_new, log_new, log_mean) + half) / 2
            gradient = np.where(b > 0, b * (log_b - log_mean - half) / 2, 0)
            return (residual + loss, residual_gradient + gradient) if is_split else (loss, gradient)
        if name == "negative_likelihood":
            within = np.where(removed, np.exp(log_p - log_m + log_1_m), -p)
            return np.maximum(log_m, -10.3), np.where(log_m > -10.3, within, 0)
        if name == "unlikelihood":
            return residual, residual_gradient
        if name == "negative_preference":  # the authors' formula, of masses, with beta 0.1
            log_m0 = log_sum_exp(log_p0, removed)
            log_ratio = log_sum_exp(log_p, removed) - log_m0
            within = np.where(removed, np.exp(log_p - log_sum_exp(log_p, removed)) - p, -p)
            share = 1 / (1 + np.exp(-0.1 * log_ratio))
            return 20 * np.logaddexp(0, 0.1 * log_ratio), 2 * share * within
        if name == "final_token_preference":
            return float64_final_token_preference(z, z0, removed)
        if name == "none":
            return np.zeros_like(m), np.zeros_like(z)
    is_target = np.arange(z.shape[-1]) == np.asarray(target_tokens)[..., None]
    return -np.where(is_target, log_p, 0).sum(axis=-1, keepdims=True), p - is_target


def float64_final_token_preference(z, z0, removed):
    """FTPO as its authors' trainer has it, row by row; its gradient by the rules of calculus."""
    losses, gradients = np.zeros((*z.shape[:-1], 1)), np.zeros_like(z)
    for row in np.ndindex(z.shape[:-1]):
        y, y0, is_removed = z[row], z0[row], removed[row]
        likeliest = sorted(np.flatnonzero(~is_removed), key=lambda i: (-y0[i], i))[:20]
        least = y0.max() + math.log(0.01)
        chosen = [i for i in likeliest if y0[i] >= min(least, y0[likeliest[0]])]
        rejected = np.flatnonzero(is_removed)
        if not len(rejected):
            continue
        top = y[rejected].max()
        total = np.exp(y[rejected] - top).sum()
        gaps = y[chosen] - top - math.log(total)
        weights = np.clip((2 - gaps) / 2, 0, 1)
        of_weights = np.where((gaps > 0) & (gaps < 2), -0.5, 0)
        lost = np.logaddexp(0, 2 - gaps)
        of_lost = -1 / (1 + np.exp(gaps - 2))
        if weights.sum():
            numerator, denominator = (weights * lost).sum(), weights.sum()
            losses[row] += numerator / denominator
            slopes = (of_weights * lost + weights * of_lost) / denominator
            slopes -= numerator * of_weights / denominator**2
            gradients[row][chosen] += slopes
            gradients[row][rejected] -= slopes.sum() * np.exp(y[rejected] - top) / total
        moved, targets = y - y0, [*chosen, *rejected]
        others = np.setdiff1d(np.arange(len(y)), targets)
        excess = np.maximum(np.abs(moved[targets]) - 0.5, 0)
        losses[row] += 0.05 * (excess**2).mean()
        gradients[row][targets] += 0.1 * excess * np.sign(moved[targets]) / len(targets)
        if len(others):
            losses[row] += 0.4 * (moved[others] ** 2).mean()
            gradients[row][others] += 0.8 * moved[others] / len(others)
    return losses, gradients


def float64_losses_and_gradient(name, batch):
    removed = removed_by(batch["negative_ids"], batch["current"].shape[-1])
    is_negative = removed.any(axis=-1, keepdims=True)
    negative_term, positive_term = TERMS[name]
    inputs = batch["current"], batch["original"], removed, batch["target_tokens"]
    loss, gradient = float64_term(positive_term, *inputs)
    if negative_term != "none":
        negative_loss, negative_gradient = float64_term(negative_term, *inputs)
        loss = np.where(is_negative, negative_loss, loss)
        gradient = np.where(is_negative, negative_gradient, gradient)
    return loss[..., 0], gradient


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / (np.linalg.norm(expected) or 1.0)


ACCURACY_CASES = {
    # name: (scale, drift, added to z0 on S, added to z on S, error of losses, error of gradients)
    "ordinary": (1.0, 0.3, 0, 0, 1e-6, 5e-6),
    "drifted": (2.0, 1.0, 0, 0, 1e-6, 5e-6),
    "times 8": (8.0, 1.0, 0, 0, 1e-6, 5e-6),
    "p0(S) within 1e-7 of 1": (2.0, 0.5, 30, 0, 1e-6, 5e-6),
    # log p(S) is -exp(-24) or so here, and float32 knows the 24 to 1e-6 only.
    "p(S) within 1e-7 of 1": (2.0, 0.5, 0, 24, 3e-6, 5e-6),
    "both within 1e-7 of 1": (2.0, 0.5, 30, 24, 3e-6, 5e-6),
    "near p0": (3.0, 0.01 / 3, 0, 0, 1e-4, 5e-4),
    "near p0, times 8": (8.0, 0.01 / 8, 0, 0, 1e-4, 5e-4),
}


def check_against_float64(name, vocab_size):
    objective = objective_named(name)
    for case, (scale, drift, *raised, loss_error, gradient_error) in ACCURACY_CASES.items():
        batch = random_batch(0, vocab_size, scale=scale, drift=drift)
        removed = removed_by(batch["negative_ids"], vocab_size)
        for model, amount in zip(("original", "current"), raised, strict=True):
            batch[model] += jnp.asarray(amount * removed, jnp.float32)
        losses, gradient = losses_and_gradient(objective, **batch)
        expected_losses, expected_gradient = float64_losses_and_gradient(name, batch)
        # Apart, or the larger of the two would hide errors of the other.
        is_negative = removed.any(axis=-1)
        for positions in (is_negative, ~is_negative):
            loss_found = relative_error(losses[positions], expected_losses[positions])
            gradient_found = relative_error(gradient[positions], expected_gradient[positions])
            assert loss_found < loss_error, case
            assert gradient_found < gradient_error, case


@pytest.mark.parametrize("name", TERMS)
def test_agrees_with_float64(name):
    check_against_float64(name, vocab_size=29)


@pytest.mark.parametrize("vocab_size", [7, 101])
def test_agrees_with_float64_at_other_vocabulary_sizes(vocab_size):
    check_against_float64("TNSF", vocab_size)


def test_hand_numbers():
    # p0 = p = (1/2, 1/4, 1/4) without id 0 is p_new = (0, 1/2, 1/2), and M = (1/4, 3/8, 3/8).
    batch = batch_of_probabilities([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], removed_id=0)
    log = math.log
    for name, expected in {
        "TNFF": log(2),
        "TNRR": 0.5 * log(0.5 / 1e-6) + 0.5 * log(0.5 / (1 - 1e-6)),
        "TNSR": log(2),
        "TNJJ": (log(0.5 / 0.375) + 0.5 * log(2) + 0.5 * log(0.25 / 0.375)) / 2,
        "TNJSJ": log(2),
        "NL+LL": -log(2),
        "UL+LL": log(2),
        "NPO+LL": 20 * log(2),
        "FTPO": log(1 + 2 * math.exp(2)),
        "fine-tune": log(2),
    }.items():
        losses, _ = losses_and_gradient(objective_named(name), **batch)
        np.testing.assert_allclose(losses, expected, rtol=1e-6, err_msg=name)


def test_negative_preference_by_hand():
    """-2/beta log sigmoid(-beta log(p/p0)): with p/p0 = 1/2 and beta 1/2, 4 log(1 + sqrt(1/2))."""
    batch = batch_of_probabilities([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], removed_id=0)
    objective = objective_named("NPO+LL", npo_beta=0.5)
    losses, gradient = losses_and_gradient(objective, **batch)
    np.testing.assert_allclose(losses, 2.139200, rtol=1e-6)
    # 2 sqrt(p) / (sqrt(p) + sqrt(p0)) = 2 / (1 + sqrt(2)) of the gradient of log p.
    slope = 0.8284271
    np.testing.assert_allclose(
        gradient[0, 0, :3], [0.75 * slope, -0.5 * slope, -0.25 * slope], rtol=1e-5
    )


def test_two_removed_ids_are_preferred_to_as_their_mass():
    batch = batch_of_probabilities([0.25, 0.25, 0.5], [0.125, 0.125, 0.75], removed_id=0)
    batch["negative_ids"] = batch["negative_ids"].at[..., 1].set(1)
    losses, _ = losses_and_gradient(objective_named("NPO+LL", npo_beta=0.5), **batch)
    np.testing.assert_allclose(losses, 2.139200, rtol=1e-6)  # the masses are 1/4 and 1/2
    # Chosen is id 2 alone: log of 0.75 over 0.25, 1.0986, is short of 2 by 0.9014.
    ftpo = objectives.FinalTokenPreference(target_weight=0.0, rest_weight=0.0)
    losses, _ = losses_and_gradient(objective_named("FTPO", ftpo=ftpo), **batch)
    np.testing.assert_allclose(losses, math.log1p(math.exp(2) / 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("rejected_logit", "expected"),
    [
        # Gaps 1.5 and 0.2, weights 0.25 and 0.9: 0.25 x 0.974077 + 0.9 x 1.952978 over 1.15.
        # Of the targets id 0 moved by 2: 0.05 x 1.5^2 / 3; of 26 others one did: 0.4 x 0.36 / 26.
        (1.0, 1.740173 + 0.0375 + 0.0055385),
        # Gaps 7.5 and 6.2: both have won. 0.05 x 7.5^2 / 3.
        (-5.0, 0.9375 + 0.0055385),
        # Gaps 0.5 and -0.8, weights 0.75 and 1: 0.75 x 1.701413 + 2.859033 over 1.75.
        (2.0, 2.362910 + 0.05 * 0.25 / 3 + 0.0055385),
    ],
)
def test_final_token_preference_by_hand(rejected_logit, expected):
    """Ids 1 and 2 are chosen; id 3 has e^-7 of the likeliest one's probability, less than 0.01."""
    batch = batch_of_probabilities([1.0], [1.0], removed_id=0)
    for model, logits in (
        ("original", [3.0, 2.0, 1.0, -4.0]),
        ("current", [rejected_logit, 2.5, 1.2, -3.4]),
    ):
        batch[model] = batch[model].at[..., :4].set(jnp.array(logits))
    losses, _ = losses_and_gradient(objective_named("FTPO"), **batch)
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


def test_the_likeliest_id_that_stays_is_chosen_however_rare():
    batch = batch_of_probabilities([1.0], [1.0], removed_id=0)
    # In both models id 1 is 20 nats below the removed id: softplus(2 + 20).
    for model in ("original", "current"):
        batch[model] = batch[model].at[..., :3].set(jnp.array([3.0, -17.0, -18.0]))
    losses, gradient = losses_and_gradient(objective_named("FTPO"), **batch)
    np.testing.assert_allclose(losses, 22.0, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0, :3], [1, -1, 0], atol=1e-6)


def test_no_loss_at_ordinary_positions():
    batch = random_batch(5)
    losses, gradient = losses_and_gradient(objective_named("FTPO"), **batch)
    is_marked = (np.asarray(batch["negative_ids"]) >= 0).any(axis=-1)
    assert is_marked.any() and not is_marked.all()
    assert (losses[is_marked] > 0).all() and (losses[~is_marked] == 0).all()
    assert (gradient[~is_marked] == 0).all()


def test_residual_weight_multiplies_what_is_still_said():
    # m = 1/2 is removed; what is left, q = (3/4, 1/4), should be p_new = (1/2, 1/2).
    batch = batch_of_probabilities([0.5, 0.25, 0.25], [0.5, 0.375, 0.125], removed_id=0)
    log = math.log
    mean = [5 / 8, 3 / 8]
    jensen_shannon = sum(
        0.5 * x * log(x / m) for x, m in zip((0.5, 0.5, 0.75, 0.25), (*mean, *mean), strict=True)
    )
    for name, outside in {
        "TNFF": 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25),
        "TNSF": 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5),
        "TNJSJ": jensen_shannon,
    }.items():
        for weight in (1.0, 3.0):
            objective = objective_named(name, residual_weight=weight)
            losses, _ = losses_and_gradient(objective, **batch)
            np.testing.assert_allclose(losses, weight * log(2) + outside, rtol=1e-6, err_msg=name)


# --- What must always hold -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PURE_DIVERGENCES)
@hypothesis.given(seed=seeds, scale=scales)
def test_the_original_is_a_fixed_point_without_negatives(name, seed, scale):
    batch = random_batch(seed, scale=scale)
    batch["current"] = batch["original"]
    batch["negative_ids"] = jnp.full_like(batch["negative_ids"], -1)
    losses, gradient = losses_and_gradient(objective_named(name), **batch)
    # Exactly 0: an optimizer that divides by the size of the gradient would amplify any rounding.
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradient, 0)


def minimum_of(negative_term, original, removed, floor=1e-6):
    """Logits of p_new, or of the floored p_e for the reverse KL, from float64."""
    z0 = np.asarray(original, np.float64)
    log_p0 = z0 - log_sum_exp(z0)
    log_new = z0 - log_sum_exp(z0, ~removed)
    if negative_term != "reverse_kl":
        return jnp.asarray(np.where(removed, -2e4, log_new), jnp.float32)
    log_removed = log_sum_exp(log_p0, removed)
    with np.errstate(invalid="ignore"):
        log_e = np.minimum(np.log(floor), log_removed)
        return jnp.asarray(
            np.where(removed, log_e + log_p0 - log_removed, np.log1p(-np.exp(log_e)) + log_new),
            jnp.float32,
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in PURE_DIVERGENCES),
        *((name, {"residual_weight": 10.0}) for name in ("TNFF", "TNSF", "TNJSJ")),
    ],
)
@hypothesis.given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_desired_distribution_is_the_minimum(name, settings, seed, scale):
    objective = objective_named(name, **settings)
    batch = random_batch(seed, scale=scale)
    removed = removed_by(batch["negative_ids"], 29)
    minimum = minimum_of(objective.negative_term, batch["original"], removed)
    losses, gradient = losses_and_gradient(objective, **(batch | {"current": minimum}))
    np.testing.assert_allclose(losses, 0, atol=1e-9)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)

    noise = np.random.default_rng(seed).normal(size=minimum.shape)
    moved = jnp.asarray(minimum + 0.5 * scale * noise, jnp.float32)
    moved_losses, _ = losses_and_gradient(objective, **(batch | {"current": moved}))
    assert (moved_losses > losses).all()


@hypothesis.given(seed=seeds, scale=scales)
def test_removals_commute(seed, scale):
    batch = random_batch(seed, scale=scale)
    original = batch["original"]
    both = batch["negative_ids"]
    first, second = both.at[..., 1:].set(-1), both.at[..., 0].set(-1)
    at_once = desired_log_probs(original, both)
    # A logit of 1e4 is itself known to 1e-3 only, however small the log-probability it ends in.
    rounding = 4 * np.finfo(np.float32).eps * np.abs(original).max()
    for a, b in ((first, second), (second, first)):
        in_turn = desired_log_probs(desired_log_probs(original, a), b)
        np.testing.assert_allclose(in_turn, at_once, rtol=1e-6, atol=1e-5 + rounding)


@hypothesis.given(seed=seeds, scale=st.sampled_from([0.1, 1.0, 8.0]))
def test_desired_log_probs_are_the_original_renormalised(seed, scale):
    batch = random_batch(seed, scale=scale)
    removed = removed_by(batch["negative_ids"], 29)
    desired = np.exp(desired_log_probs(batch["original"], batch["negative_ids"]))
    odds = np.where(removed, 0, np.exp(np.asarray(batch["original"], np.float64)))
    np.testing.assert_allclose(desired, odds / odds.sum(axis=-1, keepdims=True), rtol=1e-5)
    assert (desired[removed] == 0).all()


@pytest.mark.parametrize("name", TERMS)
@hypothesis.given(seed=seeds, garbage=st.sampled_from([0.0, 1e30, math.nan, math.inf, -math.inf]))
def test_padding_changes_nothing(name, seed, garbage):
    objective = objective_named(name)
    batch = random_batch(seed)
    is_real = np.random.default_rng(seed).random((2, 12)) < 0.6
    batch["loss_mask"] = jnp.asarray(is_real, jnp.int32)
    losses, gradient = losses_and_gradient(objective, **batch)
    assert (losses[~is_real] == 0).all() and (gradient[~is_real] == 0).all()

    for model in ("current", "original"):
        batch[model] = jnp.where(is_real[..., None], batch[model], garbage)
    batch["target_tokens"] = jnp.where(is_real, batch["target_tokens"], 0)
    batch["negative_ids"] = jnp.where(is_real[..., None], batch["negative_ids"], 5)
    other_losses, other_gradient = losses_and_gradient(objective, **batch)
    np.testing.assert_array_equal(other_losses, losses)
    np.testing.assert_array_equal(other_gradient, gradient)


# Gaps up to 1e4; few values, so that ties are frequent, and hypothesis likes 0, -0 and denormals.
extreme_values = st.lists(st.floats(-5e3, 5e3, width=32), min_size=1, max_size=6)


@hypothesis.given(seed=seeds, current_values=extreme_values, original_values=extreme_values)
def test_finite_for_any_finite_logits(seed, current_values, original_values):
    rng = np.random.default_rng(seed)
    batch = random_batch(seed)
    for model, values in (("current", current_values), ("original", original_values)):
        batch[model] = jnp.asarray(rng.choice(values, size=batch[model].shape), jnp.float32)
    shuffled_ids = rng.permuted(np.broadcast_to(np.arange(29), (2, 12, 29)), axis=-1)
    num_removed = rng.integers(0, 29, size=(2, 12, 1))  # at most 28 of 29: one id is left
    ids = np.where(np.arange(28) < num_removed, shuffled_ids[..., :28], -1)
    batch["negative_ids"] = jnp.asarray(ids, jnp.int32)
    for name in TERMS:
        losses, gradient = losses_and_gradient(objective_named(name), **batch)
        assert np.isfinite(losses).all() and np.isfinite(gradient).all(), name
        assert (losses >= 0).all() or name.startswith("NL"), name


@pytest.mark.parametrize("name", ["TNRF", "TNJSJ", "NL+LL"])
@hypothesis.given(seed=seeds)
def test_negative_ids_are_a_set(name, seed):
    objective = objective_named(name)
    batch = random_batch(seed)
    losses, gradient = losses_and_gradient(objective, **batch)
    ids = np.array(batch["negative_ids"])
    ids[..., 3:9] = np.tile(ids[..., :3], 2)
    batch["negative_ids"] = jnp.asarray(np.random.default_rng(seed).permuted(ids, axis=-1))
    other_losses, other_gradient = losses_and_gradient(objective, **batch)
    np.testing.assert_array_equal(other_losses, losses)
    np.testing.assert_array_equal(other_gradient, gradient)


def test_one_set_of_negative_ids_serves_every_position():
    batch = random_batch(3)
    one_set = jnp.array([[[4, -1, 9]]])
    found = losses_and_gradient(objective_named("TNFF"), **(batch | {"negative_ids": one_set}))
    written_out = jnp.full_like(batch["negative_ids"], -1).at[..., :3].set(one_set)
    batch["negative_ids"] = written_out
    expected = losses_and_gradient(objective_named("TNFF"), **batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(
        desired_log_probs(batch["original"], one_set),
        desired_log_probs(batch["original"], written_out),
    )


@hypothesis.given(seed=seeds, scale=scales)
def test_certificate_splits_the_forward_kl(seed, scale):
    batch = random_batch(seed, scale=scale)
    models = batch["current"], batch["original"]
    found = certificate_of(*models, batch["negative_ids"])
    losses, _ = losses_and_gradient(objective_named("TNFF"), **batch)
    np.testing.assert_allclose(found.residual + found.collateral, losses, rtol=1e-6)

    batch["current"] = batch["original"]
    cost_of_original, _ = losses_and_gradient(objective_named("TNFF"), **batch)
    np.testing.assert_allclose(found.smallest_cost, cost_of_original, rtol=1e-6)

    is_ordinary = ~removed_by(batch["negative_ids"], 29).any(axis=-1)
    np.testing.assert_array_equal(found.residual[is_ordinary], 0)
    np.testing.assert_array_equal(found.smallest_cost[is_ordinary], 0)


def test_certificate_agrees_with_float64():
    batch = random_batch(1)
    removed = removed_by(batch["negative_ids"], 29)
    found = certificate_of(batch["current"], batch["original"], batch["negative_ids"])
    models = batch["current"], batch["original"]
    residual, _ = float64_term("unlikelihood", *models, removed, None)
    forward_kl, _ = float64_term("forward_kl", *models, removed, None)
    smallest_cost, _ = float64_term("unlikelihood", models[1], models[1], removed, None)
    assert relative_error(found.residual, residual[..., 0]) < 1e-6
    assert relative_error(found.collateral, (forward_kl - residual)[..., 0]) < 1e-6
    assert relative_error(found.smallest_cost, smallest_cost[..., 0]) < 1e-6
    mass = jax.jit(objectives.removed_mass)(batch["current"], batch["negative_ids"])
    z = np.asarray(batch["current"], np.float64)
    expected = np.where(removed, np.exp(z - log_sum_exp(z)), 0)
    np.testing.assert_allclose(mass, expected.sum(axis=-1), rtol=1e-6)


@hypothesis.given(seed=seeds, scale=scales)
def test_negative_likelihood_earns_nothing_below_its_floor(seed, scale):
    batch = random_batch(seed, scale=scale)
    batch["loss_mask"] = jnp.asarray((batch["negative_ids"] >= 0).any(axis=-1), jnp.int32)
    losses, gradient = losses_and_gradient(objective_named("NL+LL"), **batch)
    assert (losses >= np.float32(-10.3)).all()
    assert (gradient[losses == np.float32(-10.3)] == 0).all()


def test_a_rare_removed_id_is_not_raised_to_the_floor():
    # p0(S) = 1e-8 < 1e-6: the floored target is the original itself.
    probabilities = [1e-8, 0.5, 0.5 - 1e-8]
    batch = batch_of_probabilities(probabilities, probabilities, removed_id=0)
    losses, gradient = losses_and_gradient(objective_named("TNRR"), **batch)
    np.testing.assert_allclose(losses, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@pytest.mark.parametrize("name", ["TNFF", "NL+LL", "fine-tune"])
def test_negative_weight_multiplies_the_negative_term_alone(name):
    batch = random_batch(2)
    objective = objective_named(name)
    losses, gradient = losses_and_gradient(objective, **batch)
    weighted = losses_and_gradient(objective_named(name, negative_weight=8.0), **batch)
    is_negative = objective.is_negative(batch["target_tokens"], batch["negative_ids"])
    is_marked = (batch["negative_ids"] >= 0).any(axis=-1)
    np.testing.assert_array_equal(is_negative, is_marked if name != "fine-tune" else False)
    weight = jnp.where(is_negative, 8.0, 1.0)
    np.testing.assert_array_equal(weighted[0], weight * losses)
    np.testing.assert_allclose(weighted[1], weight[..., None] * gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["fine-tune", "UL+LL"])
def test_objectives_without_a_divergence_need_no_original(name):
    batch = random_batch(4)
    objective = objective_named(name)
    assert not objective.needs_original
    losses, gradient = losses_and_gradient(objective, **batch)
    without_losses, without_gradient = losses_and_gradient(
        objective, **(batch | {"original": None})
    )
    np.testing.assert_array_equal(losses, without_losses)
    np.testing.assert_array_equal(gradient, without_gradient)


def test_the_original_gets_no_gradient():
    batch = random_batch(5)

    def total(original):
        return losses_and_gradient(objective_named("TNFF"), **(batch | {"original": original}))[
            0
        ].sum()

    np.testing.assert_array_equal(jax.grad(total)(batch["original"]), 0)


@pytest.mark.parametrize("name", ["TNFF", "UL+LL"])
def test_bfloat16_logits_are_computed_with_in_float32(name):
    batch = random_batch(6)
    for model in ("current", "original"):
        batch[model] = batch[model].astype(jnp.bfloat16)
    losses, gradient = losses_and_gradient(objective_named(name), **batch)
    assert losses.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    for model in ("current", "original"):
        batch[model] = batch[model].astype(jnp.float32)
    float32_losses, float32_gradient = losses_and_gradient(objective_named(name), **batch)
    np.testing.assert_array_equal(losses, float32_losses)
    np.testing.assert_array_equal(gradient, float32_gradient.astype(jnp.bfloat16))


# --- Ids removed at every position ---------------------------------------------------------------


@pytest.mark.parametrize("counts_as", ["positive", "negative"])
def test_ids_removed_everywhere_are_removed_at_every_position(counts_as):
    batch = random_batch(7, num_ids=1)
    objective = objective_named(
        "TNSF", removed_everywhere=(2, 11), removed_everywhere_counts_as=counts_as
    )
    losses, gradient = losses_and_gradient(objective, **batch)

    # The same sets written out at each position, where they count as negative ...
    written_out = batch | {
        "negative_ids": batch["negative_ids"].at[..., 1:3].set(jnp.array([[[2, 11]]]))
    }
    expected = losses_and_gradient(objective_named("TNSF"), **written_out)
    if counts_as == "positive":  # ... and the positive term, with the same sets.
        is_marked = np.asarray((batch["negative_ids"] >= 0).any(axis=-1))
        is_negative = is_marked | np.isin(batch["target_tokens"], (2, 11))
        assert is_negative.any() and not is_negative.all()
        positive = losses_and_gradient(objective_named("TNFF"), **written_out)
        expected = (
            np.where(is_negative, expected[0], positive[0]),
            np.where(is_negative[..., None], expected[1], positive[1]),
        )
    np.testing.assert_allclose(losses, expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-8)


def test_which_positions_are_negative():
    target_tokens = jnp.array([[3, 4, 5, 6]])
    negative_ids = jnp.array([[[-1], [7], [-1], [2]]])

    def is_negative(**settings):
        objective = objective_named("TNRF", **settings)
        return objective.is_negative(target_tokens, negative_ids).tolist()[0]

    assert is_negative() == [False, True, False, True]
    # Removed ids alone make a position neither negative nor positive; its target among them does,
    # and so does a mark, even a mark of an id that is removed everywhere.
    assert is_negative(removed_everywhere=(2, 5)) == [False, True, True, True]
    assert (
        is_negative(removed_everywhere=(2, 5), removed_everywhere_counts_as="negative")
        == [True] * 4
    )


def test_certificate_and_desired_take_ids_removed_everywhere():
    batch = random_batch(8, num_ids=1)
    models, ids = (batch["current"], batch["original"]), batch["negative_ids"]
    written_out = ids.at[..., 1].set(12)
    np.testing.assert_array_equal(
        desired_log_probs(batch["original"], ids, (12,)),
        desired_log_probs(batch["original"], written_out),
    )
    np.testing.assert_array_equal(
        certificate_of(*models, ids, removed_everywhere=(12,)), certificate_of(*models, written_out)
    )


def test_ids_removed_everywhere_must_be_in_the_vocabulary():
    objective = objective_named("TNFF", removed_everywhere=(3, 29))
    with pytest.raises(UsageError, match="below the vocabulary size, 29, found 29"):
        losses_and_gradient(objective, **random_batch(0))


# --- T5X's cross-entropy -------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_fine_tuning_loss_is_the_cross_entropy_of_t5x(label_smoothing, z_loss):
    batch = random_batch(9, scale=3.0)
    objective = objective_named("fine-tune", label_smoothing=label_smoothing, z_loss=z_loss)
    losses, gradient = losses_and_gradient(objective, **(batch | {"original": None}))

    z = np.asarray(batch["current"], np.float64)
    target = np.full(z.shape, label_smoothing / 28)
    np.put_along_axis(
        target, np.asarray(batch["target_tokens"])[..., None], 1 - label_smoothing, -1
    )
    log_z = log_sum_exp(z)
    entropy = -np.where(target > 0, target * np.log(np.maximum(target, 1e-20)), 0).sum(axis=-1)
    expected = -(target * (z - log_z)).sum(axis=-1) - entropy + z_loss * log_z[..., 0] ** 2
    p = np.exp(z - log_z)
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(gradient, p - target + 2 * z_loss * log_z * p) < 1e-6


def test_fine_tuning_ignores_marks():
    batch = random_batch(10)
    losses, _ = losses_and_gradient(objective_named("fine-tune"), **batch)
    batch["negative_ids"] = jnp.full_like(batch["negative_ids"], -1)
    unmarked_losses, _ = losses_and_gradient(objective_named("fine-tune"), **batch)
    np.testing.assert_array_equal(losses, unmarked_losses)


# --- Mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_term": "forward"}, "negative_term: expected one of forward_kl, .*'forward'"),
        ({"negative_term": "log_likelihood"}, "negative_term: expected one of"),
        ({"positive_term": "unlikelihood"}, "positive_term: expected one of .*'unlikelihood'"),
        ({"positive_term": "reverse_kl_split"}, "positive_term: expected one of"),
        ({"negative_weight": -1.0}, "negative_weight: expected 0 or more"),
        ({"negative_weight": math.nan}, "negative_weight: expected 0 or more"),
        ({"residual_weight": 0.0}, "residual_weight: expected above 0"),
        (
            {"residual_weight": 2.0, "negative_term": "reverse_kl"},
            "belongs to negative_term=forward_kl or reverse_kl_split .*'reverse_kl'",
        ),
        ({"residual_weight": 2.0, "smoothing": 1e-6}, "without smoothing"),
        ({"removed_token_floor": 0.0}, "removed_token_floor: expected between 0 and 1"),
        ({"removed_token_floor": 1.0}, "removed_token_floor: expected between 0 and 1"),
        (
            {"removed_token_floor": 1e-3, "negative_term": "reverse_kl_split"},
            "removed_token_floor belongs to negative_term='reverse_kl' or "
            "positive_term='reverse_kl' without smoothing, found removed_token_floor=0.001 with "
            "'reverse_kl_split', 'forward_kl', smoothing=0.0. Leave removed_token_floor out, or ",
        ),
        (
            {"removed_token_floor": 1e-3, "positive_term": "reverse_kl", "smoothing": 1e-6},
            "removed_token_floor belongs to",
        ),
        ({"smoothing": 1.0}, "smoothing: expected at least 0 and below 1"),
        ({"smoothing": 1e-6, "negative_term": "unlikelihood"}, "Set smoothing=0"),
        ({"smoothing": 1e-6, "positive_term": "jensen_shannon"}, "Set smoothing=0"),
        ({"label_smoothing": 0.1}, "belongs to positive_term='log_likelihood'"),
        ({"z_loss": 1e-4}, "belongs to positive_term='log_likelihood'"),
        ({"z_loss": -1.0}, "z_loss: expected 0 or more"),
        (
            {"positive_term": "log_likelihood", "smoothing": 1e-6, "label_smoothing": 0.1},
            "Set one of them to 0",
        ),
        ({"npo_beta": 0.0, "negative_term": "negative_preference"}, "npo_beta: expected above 0"),
        ({"npo_beta": 0.5}, "npo_beta belongs to negative_term='negative_preference'"),
        (
            {"ftpo": objectives.FinalTokenPreference(margin=3.0)},
            "ftpo belongs to negative_term='final_token_preference'",
        ),
        ({"removed_everywhere": (-1,)}, "removed_everywhere: expected a tuple of token ids"),
        ({"removed_everywhere_counts_as": "both"}, "expected one of positive, negative"),
        ({"removed_everywhere": (1,), "negative_term": "none"}, "empty removed_everywhere"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    terms = {"negative_term": "forward_kl", "positive_term": "forward_kl"}
    with pytest.raises(UsageError, match=message):
        objectives.TntObjective(**(terms | settings))


def test_a_floor_is_of_either_term():
    for terms in (("reverse_kl", "log_likelihood"), ("unlikelihood", "reverse_kl")):
        objective = objectives.TntObjective(
            negative_term=terms[0], positive_term=terms[1], removed_token_floor=1e-3
        )
        assert objective.removed_token_floor == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chosen": 0}, "ftpo: num_chosen: expected at least 1, found 0"),
        ({"min_p": 0.0}, "ftpo: min_p: expected above 0"),
        ({"margin": 0.0}, "ftpo: margin: expected above 0"),
        ({"rest_weight": -1.0}, "ftpo: rest_weight: expected 0 or more"),
    ],
)
def test_impossible_settings_of_ftpo_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        objectives.FinalTokenPreference(**settings)


@pytest.mark.parametrize("name", sorted(set(TERMS) - {"fine-tune", "NL+LL", "UL+LL"}))
def test_divergences_without_original_logits_are_refused(name):
    batch = random_batch(0) | {"original": None}
    with pytest.raises(UsageError, match="original"):
        losses_and_gradient(objective_named(name), **batch)


def test_every_pair_of_terms_can_be_built():
    for negative_term, positive_term in itertools.product(
        objectives.NEGATIVE_TERMS, objectives.POSITIVE_TERMS
    ):
        if (negative_term, positive_term) != ("none", "none"):  # which leaves no loss
            objectives.TntObjective(negative_term=negative_term, positive_term=positive_term)
