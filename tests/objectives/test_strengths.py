"""Graded removal: marks of a strength below 1, against numbers by hand and float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax import objectives
from tnt_jax.runtime.errors import UsageError

VOCAB_SIZE, NUM_IDS, SHAPE = 13, 4, (2, 9)
DIVERGENCES = ("forward_kl", "reverse_kl", "reverse_kl_split", "jensen_shannon")
DIVERGENCES += ("jensen_shannon_split",)
BASELINES = ("negative_likelihood", "unlikelihood")
POSITIVE = {"reverse_kl_split": "reverse_kl", "jensen_shannon_split": "jensen_shannon"}

each_divergence = pytest.mark.parametrize("term", DIVERGENCES)
each_seed = pytest.mark.parametrize("seed", range(3))
# Of strengths: what only lowers ids, and what raises some of them up to tenfold.
each_range = pytest.mark.parametrize("smallest", [0.01, -9.0], ids=["lowered", "raised"])


def objective_of(term, **settings):
    positive = POSITIVE.get(term, term if term in DIVERGENCES else "log_likelihood")
    return objectives.TntObjective(negative_term=term, positive_term=positive, **settings)


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradient(objective, batch):
    """The losses `[B, T]`, and the gradient of their sum to the current logits."""

    def total(current):
        losses = objective.token_losses(
            current_logits=current,
            original_logits=batch["original"],
            target_tokens=batch["targets"],
            negative_ids=batch["ids"],
            loss_mask=jnp.ones(batch["targets"].shape, jnp.int32),
            negative_strengths=batch.get("strengths"),
        )
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(batch["current"])
    return losses, gradient


certificate = jax.jit(objectives.certificate, static_argnames="removed_everywhere")


def random_batch(seed, smallest=0.01, largest=0.99):
    """Every third position has no mark; an id may come up twice, with two strengths."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, *SHAPE, VOCAB_SIZE)) * 2
    ids = rng.integers(-1, VOCAB_SIZE, (*SHAPE, NUM_IDS))
    ids[..., 1] = ids[..., 0]
    ids[:, ::3] = -1
    return {
        "original": jnp.asarray(logits[0], jnp.float32),
        "current": jnp.asarray(logits[1], jnp.float32),
        "targets": jnp.asarray(rng.integers(0, VOCAB_SIZE, SHAPE), jnp.int32),
        "ids": jnp.asarray(ids, jnp.int32),
        "strengths": jnp.asarray(rng.uniform(smallest, largest, ids.shape), jnp.float32),
    }


def strength_of_each(batch):
    """Float64 `[B, T, V]`, by going through all marks."""
    found = np.full((*SHAPE, VOCAB_SIZE), -np.inf)
    for place in np.ndindex(*SHAPE, NUM_IDS):
        removed_id, where = int(batch["ids"][place]), place[:2]
        if removed_id >= 0:
            strength = float(batch["strengths"][place])
            found[where][removed_id] = max(found[where][removed_id], strength)
    return np.where(found > -np.inf, found, 0.0)


def probabilities(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(axis=-1, keepdims=True)


def desired(batch):
    p_new = probabilities(batch["original"]) * (1 - strength_of_each(batch))
    return p_new / p_new.sum(axis=-1, keepdims=True)


def kl(a, b):
    return (a * np.log(np.where(a > 0, a, 1) / b)).sum(axis=-1)


# --- By hand --------------------------------------------------------------------------------------


def batch_of(original, current, removed_id, target=0, **more):
    """One position."""
    return {
        "original": jnp.log(jnp.asarray([[original]], jnp.float32)),
        "current": jnp.log(jnp.asarray([[current]], jnp.float32)),
        "targets": jnp.full((1, 1), target, jnp.int32),
        "ids": jnp.full((1, 1, 1), removed_id, jnp.int32),
        **more,
    }


def test_undial_on_four_ids():
    """Its published loss: cross-entropy with softmax(z0 - beta onehot(y)), here beta = log 4.

    p0 = (0.4, 0.3, 0.2, 0.1) and y = 0: the adjusted probabilities are 0.1, 0.3, 0.2 and 0.1, of
    0.7 together. The current model is uniform: the cross-entropy is log 4, whatever the target.
    """
    objective = objectives.named("UNDIAL", negative_strength=1 - math.exp(-math.log(4)))
    batch = batch_of([0.4, 0.3, 0.2, 0.1], [0.25] * 4, removed_id=0)
    losses, gradient = losses_and_gradient(objective, batch)
    target = np.array([1, 3, 2, 1]) / 7
    entropy = (2 * math.log(7) + 3 * math.log(7 / 3) + 2 * math.log(7 / 2)) / 7
    np.testing.assert_allclose(losses, math.log(4) - entropy, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], 0.25 - target, rtol=1e-6)
    log_probs = objectives.desired_log_probs(
        batch["original"], batch["ids"], (), jnp.full((1, 1, 1), 0.75)
    )
    np.testing.assert_allclose(jnp.exp(log_probs[0, 0]), target, rtol=1e-6)


def test_undial_elsewhere():
    """Its authors have no loss there; "+KL" has forward KL to p0."""
    batch = batch_of([0.5, 0.5], [0.25, 0.75], removed_id=-1)
    undial, with_kl = map(objectives.named, ("UNDIAL", "UNDIAL+KL"))
    losses, gradient = losses_and_gradient(undial, batch)
    assert losses == 0
    assert not gradient.any()
    losses, gradient = losses_and_gradient(with_kl, batch)
    np.testing.assert_allclose(losses, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], [-0.25, 0.25], rtol=1e-6)
    assert undial.negative_strength == with_kl.negative_strength == 1 - math.exp(-10)


def test_a_baseline_mixes_the_losses_with_and_without_its_marks():
    """Both marks hold, or none does; m is 0.3 with them."""
    batch = batch_of([0.5, 0.25, 0.25], [0.2, 0.7, 0.1], removed_id=0)
    batch |= {"ids": jnp.array([[[0, 2, -1]]]), "strengths": jnp.array([[[0.25, 0.125, 0.9]]])}
    log = math.log
    with_marks = {"unlikelihood": -log(0.7), "negative_likelihood": log(0.3)}
    of_marks = {
        "unlikelihood": [0.2, -0.3, 0.1],
        "negative_likelihood": [0.2 / 0.3 - 0.2, -0.7, 0.1 / 0.3 - 0.1],
    }
    for term in BASELINES:
        objective = objective_of(term, negative_weight=2.0)
        losses, gradient = losses_and_gradient(objective, batch)
        wanted = 0.25 * 2 * with_marks[term] + 0.75 * -log(0.2)
        np.testing.assert_allclose(losses, wanted, rtol=1e-6)
        wanted = 0.25 * 2 * np.array(of_marks[term]) + 0.75 * np.array([-0.8, 0.7, 0.1])
        np.testing.assert_allclose(gradient[0, 0], wanted, rtol=1e-5)


def test_the_certificate_by_hand():
    """p0 = (1/2, 1/4, 1/4), id 0 at 1/2 and id 1 at 1: p_new = (1/2, 0, 1/2)."""
    ids, strengths = jnp.array([[[0, 1, 0]]]), jnp.array([[[0.5, 1.0, 0.25]]])
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    found = objectives.certificate(
        current_logits=logits,
        original_logits=logits,
        negative_ids=ids,
        negative_strengths=strengths,
    )
    log = math.log
    np.testing.assert_allclose(found.residual, -log(3 / 4), rtol=1e-6)
    # q = (2/3, 1/3).
    np.testing.assert_allclose(found.collateral, 0.5 * log(3 / 4) + 0.5 * log(3 / 2), rtol=1e-6)
    np.testing.assert_allclose(found.smallest_cost, 0.5 * log(2), rtol=1e-6)
    mass = objectives.removed_mass(logits, ids, (), strengths)
    np.testing.assert_allclose(mass, 0.25 + 0.5 * 0.5, rtol=1e-6)


# --- What must always hold ------------------------------------------------------------------------


@each_range
@each_seed
def test_identities(seed, smallest):
    batch = random_batch(seed, smallest)
    p_new, p0, p = desired(batch), *map(probabilities, (batch["original"], batch["current"]))
    marks = batch["ids"], (), batch["strengths"]
    found = objectives.desired_log_probs(batch["original"], *marks)
    np.testing.assert_allclose(jnp.exp(found), p_new, rtol=1e-5)
    parts = certificate(
        current_logits=batch["current"],
        original_logits=batch["original"],
        negative_ids=batch["ids"],
        negative_strengths=batch["strengths"],
    )
    assert not parts.residual.any()  # nothing goes altogether
    np.testing.assert_allclose(parts.residual + parts.collateral, kl(p_new, p), rtol=1e-4)
    np.testing.assert_allclose(parts.smallest_cost, kl(p_new, p0), rtol=1e-4, atol=1e-6)
    mass = objectives.removed_mass(batch["current"], *marks)
    lowered = np.maximum(strength_of_each(batch), 0)  # what is raised is not to be removed
    np.testing.assert_allclose(mass, (lowered * p).sum(axis=-1), rtol=1e-5)


@each_range
@each_seed
def test_removal_beside_strengths_splits_the_certificate(seed, smallest):
    """Ids 0 and 1 go everywhere, by the objective's setting and by a mark of strength 1."""
    batch = random_batch(seed, smallest)
    batch["ids"] = batch["ids"].at[..., 3].set(1)
    batch["strengths"] = batch["strengths"].at[..., 3].set(1.0)
    kept = np.ones(VOCAB_SIZE)
    kept[[0, 1]] = 0
    p_new = desired(batch) * kept
    p_new /= p_new.sum(axis=-1, keepdims=True)
    p0, p = map(probabilities, (batch["original"], batch["current"]))
    parts = certificate(
        current_logits=batch["current"],
        original_logits=batch["original"],
        negative_ids=batch["ids"],
        removed_everywhere=(0,),
        negative_strengths=batch["strengths"],
    )
    np.testing.assert_allclose(parts.residual, -np.log((p * kept).sum(axis=-1)), rtol=1e-5)
    np.testing.assert_allclose(parts.residual + parts.collateral, kl(p_new, p), rtol=1e-4)
    np.testing.assert_allclose(parts.smallest_cost, kl(p_new, p0), rtol=1e-4, atol=1e-6)


@each_range
@each_divergence
@each_seed
def test_the_desired_distribution_is_the_fixed_point(term, seed, smallest):
    batch = random_batch(seed, smallest)
    p_new = jnp.asarray(np.log(desired(batch)), jnp.float32)
    losses, gradient = losses_and_gradient(objective_of(term), batch | {"current": p_new})
    np.testing.assert_allclose(losses, 0, atol=1e-9)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    moved = losses_and_gradient(objective_of(term), batch)[0]
    assert (moved > losses).all()


@each_range
@each_divergence
@each_seed
def test_a_strength_is_another_logit_of_the_original(term, seed, smallest):
    """Ids of a strength below 1 are ordinary ids; `m` of those that go is not touched."""
    batch = random_batch(seed, smallest)
    removed = batch["ids"].at[..., :3].set(-1)  # the last of each position goes
    both = batch | {"strengths": batch["strengths"].at[..., 3].set(1.0)}
    of_graded = batch | {"ids": batch["ids"].at[..., 3].set(-1)}
    lowered = batch["original"] + np.log1p(-strength_of_each(of_graded)).astype(np.float32)
    # Then the floor of the reverse KL is what it is, too.
    objective = objective_of(
        term, **({"removed_token_floor": 1e-12} if term == "reverse_kl" else {})
    )
    found = losses_and_gradient(objective, both)
    plain = {"original": lowered, "ids": removed, "strengths": None}
    expected = losses_and_gradient(objective, batch | plain)
    is_marked = np.asarray((removed >= 0).any(axis=-1))  # the others have one term or the other
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one[is_marked], other[is_marked], rtol=1e-4, atol=1e-6)


@each_seed
def test_the_gradient_of_forward_kl_is_what_is_too_much(seed):
    """p - p_new, to the logits, wherever ids are lowered, raised or go."""
    batch = random_batch(seed, smallest=-9.0)
    batch["strengths"] = batch["strengths"].at[..., 3].set(1.0)
    found = losses_and_gradient(objective_of("forward_kl"), batch)[1]
    expected = probabilities(batch["current"]) - desired(batch)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@each_divergence
def test_a_strength_of_0_changes_nothing(term):
    """Also beside one that does, and for an id that has another: the larger one counts."""
    batch = random_batch(7, smallest=-9.0)
    batch["ids"] = jnp.where(batch["ids"] == 5, -1, batch["ids"]).at[..., 2].set(5)
    none = losses_and_gradient(objective_of(term), batch | {"ids": batch["ids"].at[..., 2].set(-1)})
    zero = {"strengths": batch["strengths"].at[..., 2].set(0.0)}
    found = losses_and_gradient(objective_of(term), batch | zero)
    is_marked = np.asarray((batch["ids"].at[..., 2].set(-1) >= 0).any(axis=-1))
    for one, other in zip(found, none, strict=True):
        np.testing.assert_allclose(one[is_marked], other[is_marked], rtol=1e-5, atol=1e-7)
    marks = batch["ids"], (), zero["strengths"].at[..., 3].set(0.0)
    both = batch["ids"].at[..., 3].set(batch["ids"][..., 1]), (), marks[2]
    for of_marks in (marks, both):
        expected = desired(batch | {"ids": of_marks[0], "strengths": of_marks[2]})
        log_probs = objectives.desired_log_probs(batch["original"], *of_marks)
        np.testing.assert_allclose(jnp.exp(log_probs), expected, rtol=1e-5)


@pytest.mark.parametrize("term", BASELINES)
def test_a_baseline_ignores_what_is_raised(term):
    batch = random_batch(8, smallest=-9.0)
    lowered = batch | {"ids": jnp.where(batch["strengths"] > 0, batch["ids"], -1)}
    found, expected = (losses_and_gradient(objective_of(term), x) for x in (batch, lowered))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (lowered["ids"] != batch["ids"]).any()


def test_the_floor_of_the_reverse_kl_does_not_raise_what_was_rarer():
    """p0 = (0.998, 1e-4, rest): lowering id 0 would raise id 1, which goes, tenfold."""
    original = [0.998, 1e-4, 1 - 0.998 - 1e-4]
    p_new = np.array([0.998 * 0.1, 0, original[2]])
    p_new /= p_new.sum()
    at_minimum = (1 - 1e-4) * p_new + np.array([0, 1e-4, 0])
    batch = batch_of(original, at_minimum, removed_id=1)
    batch |= {"ids": jnp.array([[[0, 1]]]), "strengths": jnp.array([[[0.9, 1.0]]])}
    losses, gradient = losses_and_gradient(
        objective_of("reverse_kl", removed_token_floor=1e-2), batch
    )
    np.testing.assert_allclose(losses, 0, atol=1e-9)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


# The split terms are not those of positions without a mark.
@pytest.mark.parametrize("term", sorted({*DIVERGENCES, *BASELINES} - {*POSITIVE}))
def test_a_strength_near_0_is_hardly_a_mark(term):
    batch = random_batch(3)
    hardly = {"strengths": jnp.full(batch["ids"].shape, 1e-6)}
    unmarked = {"ids": jnp.full_like(batch["ids"], -1), "strengths": None}
    found, expected = (
        losses_and_gradient(objective_of(term), batch | marks) for marks in (hardly, unmarked)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", ["reverse_kl", "unlikelihood"])
def test_the_setting_multiplies_what_the_batch_says(term):
    batch = random_batch(4)
    half = losses_and_gradient(objective_of(term, negative_strength=0.5), batch)
    expected = losses_and_gradient(
        objective_of(term), batch | {"strengths": batch["strengths"] / 2}
    )
    jax.tree.map(np.testing.assert_array_equal, half, expected)
    alone = losses_and_gradient(
        objective_of(term, negative_strength=0.5), batch | {"strengths": None}
    )
    halves = {"strengths": jnp.full(batch["ids"].shape, 0.5)}
    expected = losses_and_gradient(objective_of(term), batch | halves)
    jax.tree.map(np.testing.assert_array_equal, alone, expected)


@pytest.mark.parametrize("term", ["reverse_kl", "unlikelihood"])
def test_one_set_of_marks_holds_for_all_positions(term):
    batch = random_batch(5)
    one = {"ids": jnp.array([[[3, 7]]]), "strengths": jnp.array([[[0.25, 1.0]]])}
    all_of_them = {name: jnp.broadcast_to(x, (*SHAPE, 2)) for name, x in one.items()}
    found, expected = (
        losses_and_gradient(objective_of(term), batch | x) for x in (one, all_of_them)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, expected
    )


def test_marks_that_are_ignored_have_no_strength():
    objective = objectives.TntObjective(negative_term="none", positive_term="forward_kl")
    batch = random_batch(6)
    found, expected = (
        losses_and_gradient(objective, batch | {"strengths": strengths})
        for strengths in (batch["strengths"], None)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negative_strength": 0.0}, "strength: expected above 0 and at most 1, found 0.0"),
        ({"negative_strength": 1.5}, "strength: expected above 0 and at most 1, found 1.5"),
        (
            {"negative_strength": math.nan},
            "strength: expected above 0 and at most 1, found nan",
        ),
        ({"negative_strength": True}, "strength: expected above 0 and at most 1, found True"),
        (
            {"negative_term": "none", "negative_strength": 0.5},
            "ignores everything marked, found negat",
        ),
        ({"negative_term": "none", "positive_term": "none"}, "leaves no loss at any position"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    terms = {"negative_term": "forward_kl", "positive_term": "forward_kl"}
    with pytest.raises(UsageError, match=message):
        objectives.TntObjective(**(terms | settings))
