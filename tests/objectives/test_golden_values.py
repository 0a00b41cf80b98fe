"""Agreement with the losses that the paper's authors released (google/t5patches).

Theirs are sums with a signed weight per token: +1 positive, -1 negative, 0 padding. Their forward
terms are cross-entropies, so ours plus the entropy of the target is theirs; and their classes with
a reverse term smooth every probability by 1e-6, which is our `smoothing`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax import objectives

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
SMOOTHING = 1e-6

# class: (negative term, positive term, smoothing)
CLASSES = {
    "NL": ("negative_likelihood", "log_likelihood", 0.0),
    "UL": ("unlikelihood", "log_likelihood", 0.0),
    "TNFF": ("forward_kl", "forward_kl", 0.0),
    "TNRR": ("reverse_kl", "reverse_kl", SMOOTHING),
    "TNRF": ("reverse_kl", "forward_kl", SMOOTHING),
    "TNFLL": ("forward_kl", "log_likelihood", 0.0),
    "TNRLL": ("reverse_kl", "log_likelihood", SMOOTHING),
}


def published_losses_and_gradients(name, current, original, target_tokens, weights, alpha):
    """The released formulas in float64: losses [B, T], gradients to the logits [B, T, V]."""

    def probabilities(logits):
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return odds / odds.sum(axis=-1, keepdims=True)

    def smooth(distribution):
        return (distribution + SMOOTHING) / (1 + SMOOTHING * distribution.shape[-1])

    def cross_entropy(target):
        return -(target * np.log(p)).sum(axis=-1, keepdims=True), p - target

    def reverse_kl(target):
        log_ratio = np.log(p) - np.log(smooth(target))
        loss = (p * log_ratio).sum(axis=-1, keepdims=True)
        return loss, p * (log_ratio - loss)

    p, p0 = (probabilities(np.asarray(x, np.float64)) for x in (current, original))
    one_hot = np.eye(p.shape[-1])[target_tokens]
    p_new = p0 * (1 - one_hot)
    p_new /= p_new.sum(axis=-1, keepdims=True)
    p_n = (p * one_hot).sum(axis=-1, keepdims=True)
    positive = {
        "TNFF": lambda: cross_entropy(p0),
        "TNRR": lambda: reverse_kl(p0),
        "TNRF": lambda: cross_entropy(smooth(p0)),
        "TNRLL": lambda: cross_entropy(smooth(one_hot)),
    }.get(name, lambda: cross_entropy(one_hot))()
    negative = {
        "NL": lambda: (np.log(p_n), one_hot - p),
        "UL": lambda: (-np.log1p(-p_n), p_n / (1 - p_n) * (one_hot - p)),
        "TNFF": lambda: cross_entropy(p_new),
        "TNFLL": lambda: cross_entropy(p_new),
    }.get(name, lambda: reverse_kl(p_new))()
    weights = np.asarray(weights)[..., None]
    losses, gradients = (
        np.where(weights < 0, alpha * of_negative, of_positive) * (weights != 0)
        for of_negative, of_positive in zip(negative, positive, strict=True)
    )

    # What a cross-entropy has above the KL: the entropy of its target.
    negative_target = p_new if name in ("TNFF", "TNFLL") else one_hot
    positive_target = {"TNFF": p0, "TNRF": smooth(p0)}.get(name, one_hot)
    entropies = [
        -(target * np.log(np.where(target > 0, target, 1))).sum(axis=-1, keepdims=True)
        for target in (negative_target, positive_target)
    ]
    entropies = np.where(weights < 0, alpha * entropies[0], entropies[1]) * (weights != 0)
    return losses[..., 0], gradients, entropies[..., 0]


def our_losses(name, current, original, target_tokens, weights, alpha):
    negative_term, positive_term, smoothing = CLASSES[name]
    objective = objectives.TntObjective(
        negative_term=negative_term,
        positive_term=positive_term,
        negative_weight=alpha,
        smoothing=smoothing,
    )
    return objective.token_losses(
        current_logits=current,
        original_logits=original,
        target_tokens=target_tokens,
        negative_ids=jnp.where(weights < 0, target_tokens, -1)[..., None],
        loss_mask=(weights != 0).astype(jnp.int32),
    )


@pytest.fixture(scope="module")
def batch():
    arrays = np.load(GOLDEN / "t5_logits.npz")
    names = ("logits/int", "orig_logits/int")
    names += ("batch/int/decoder_target_tokens", "batch/int/decoder_loss_weights")
    return tuple(jnp.asarray(arrays[name]) for name in names)


@pytest.fixture(scope="module")
def published():
    return np.load(GOLDEN / "t5patches_losses.npz")


# FACTS: the values in the tests of the released library, with logits 0 ... 23 for both models and
# targets [[1, 2, 1, 0], [0, 1, 0, 2]]. Weights per sequence, scores at alpha 1, scores at 0.5.
A, B, NONE = [1, 1, -1, 0], [1, -1, 1, -1], [0, 0, 0, 0]
KNOWN_SCORES = {
    "UL": ([A, B], [-2.0958900, -6.190234], [-1.9555511, -5.502723]),
    "NL": ([A, B], [-0.4076061, -3.0], [-1.1114091, -3.9076061]),
    "TNRR": ([A, B], [-2.8245807, -11.3777275], [-1.4122901, -5.6888638]),
    "TNFLL": ([A, NONE], [-2.461224, 0], [-2.1382182, 0]),
    "TNRLL": ([A, NONE], [-4.639796, 0], [-3.2275052, 0]),
    "TNFF": ([NONE, B], [0, -3.9873507], [0, -2.826071]),
    "TNRF": ([NONE, B], [0, -13.042522], [0, -7.3536587]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_values_in_the_tests_of_the_released_library(name):
    logits = jnp.arange(24.0).reshape(2, 4, 3)
    target_tokens = jnp.array([[1, 2, 1, 0], [0, 1, 0, 2]])
    weights, *scores = KNOWN_SCORES[name]
    for alpha, expected in zip((1.0, 0.5), scores, strict=True):
        inputs = logits, logits, target_tokens, jnp.array(weights), alpha
        *_, entropies = published_losses_and_gradients(name, *inputs)
        found = -(our_losses(name, *inputs) + entropies).sum(axis=-1)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", ["10000", "10", "1", "0.1"])
@pytest.mark.parametrize("name", CLASSES)
def test_losses_and_scores_of_the_released_library(name, alpha, batch, published):
    # NL is compared where neither floor acts: ours (on negatives) and theirs (on positives, by
    # the wrong sign) lie at -10.3, and log p(target) stays above -8.3 in this batch.
    inputs = *batch, float(alpha)
    losses, _, entropies = published_losses_and_gradients(name, *inputs)
    found = np.asarray(our_losses(name, *inputs), np.float64) + entropies
    np.testing.assert_allclose(found, losses, rtol=1e-6, atol=1e-7)
    # Released in float32: its log(1 - p) and its reverse KL, a plain sum, are off by up to 3.3e-5,
    # as float64 shows just as our losses do.
    rtol = 1e-6 if name in ("NL", "TNFF", "TNFLL") else 4e-5
    stored = {what: published[f"{name}/alpha={alpha}/int/{what}"] for what in ("loss", "score")}
    np.testing.assert_allclose(found.sum(), stored["loss"], rtol=rtol)
    np.testing.assert_allclose(-found.sum(axis=-1), stored["score"], rtol=rtol)


def test_no_floor_acts_in_the_golden_batch(batch):
    current, _, target_tokens, weights = batch
    log_p = np.take_along_axis(jax.nn.log_softmax(current), target_tokens[..., None], axis=-1)
    assert (log_p[weights != 0] > -8.3).all()


# x8: p0(n) and p(n) reach both ends; the golden values themselves stay below 0.01.
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("name", CLASSES)
def test_gradients_of_the_released_formulas(name, scale, batch):
    current, original, target_tokens, weights = batch
    inputs = scale * original, target_tokens, weights, 10.0

    def total(current):
        losses = our_losses(name, current, *inputs)
        return losses.sum(), losses

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(scale * current)
    losses, expected, entropies = published_losses_and_gradients(name, scale * current, *inputs)
    if name == "NL":  # where our floor acts, there is nothing to earn
        is_floored = (np.asarray(weights) < 0) & (losses < 10 * -10.3)
        assert is_floored.any() == (scale == 8.0)
        losses = np.where(is_floored, 10 * -10.3, losses)
        expected = np.where(is_floored[..., None], 0, expected)
    losses -= entropies
    assert np.linalg.norm(found - losses) < 1e-6 * np.linalg.norm(losses)
    assert np.linalg.norm(gradient - expected) < 5e-6 * np.linalg.norm(expected)


def test_cross_entropy_of_t5x(batch, published):
    current, _, target_tokens, weights = batch
    for z_loss, what in ((1e-4, "loss"), (0.0, "score")):
        objective = objectives.TntObjective(
            negative_term="none", positive_term="log_likelihood", z_loss=z_loss
        )
        losses = objective.token_losses(
            current_logits=current,
            original_logits=None,
            target_tokens=target_tokens,
            negative_ids=jnp.full((1, 1, 1), -1),
            loss_mask=(weights != 0).astype(jnp.int32),
        )
        found = losses.sum() if what == "loss" else -losses.sum(axis=-1)
        np.testing.assert_allclose(found, published[f"FT/{what}/int"], rtol=1e-6)
