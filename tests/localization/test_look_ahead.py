"""Looking ahead on texts that can be counted: the nearest clean distribution, learned and exact."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tnt_jax import objectives
from tnt_jax.localization import look_ahead
from tnt_jax.runtime.errors import UsageError

pytestmark = pytest.mark.usefixtures("optimised")


class Texts:
    """Every text of some length, with its probability and whether it is clean.

    Attributes:
      joint: `[V, ..., V]`, of every text.
      is_clean: The same shape.
    """

    def __init__(self, joint, is_clean):
        self.joint, self.is_clean = joint, is_clean

    def next_probs(self, joint):
        """For each position, the conditional probabilities `[prefixes, V]` of that distribution."""
        size, found = joint.shape[0], []
        for position in range(joint.ndim):
            of_token = joint.reshape(size**position, size, -1).sum(axis=2)
            total = of_token.sum(axis=1, keepdims=True)
            uniform = np.full_like(of_token, 1 / size)
            found.append(np.divide(of_token, total, out=uniform, where=total > 0))
        return found

    def next_values(self):
        """The chance to end clean after each prefix and token, as `next_probs`."""
        size, found = self.joint.shape[0], []
        for position in range(self.joint.ndim):
            shape = size**position, size, -1
            total = self.joint.reshape(shape).sum(axis=2)
            clean = (self.joint * self.is_clean).reshape(shape).sum(axis=2)
            found.append(np.divide(clean, total, out=np.zeros_like(clean), where=total > 0))
        return found

    def of_next_probs(self, next_probs):
        """The distribution over texts that has these conditional probabilities."""
        size, joint = self.joint.shape[0], np.ones(1)
        for of_position in next_probs:
            joint = (joint[:, None] * of_position).reshape(-1)
        return joint.reshape(size * np.ones(self.joint.ndim, int))

    @property
    def nearest(self):
        clean = self.joint * self.is_clean
        return clean / clean.sum()

    @property
    def smallest_kl(self):
        return -math.log((self.joint * self.is_clean).sum())

    def kl(self, joint):
        said = joint > 1e-20  # the float32 of what is never said
        return float((joint[said] * np.log(joint[said] / self.joint[said])).sum())

    def marks(self, settings):
        """Strengths by exact values, as `next_probs`; None: of what makes a text bad."""
        strengths = []
        for probs, values in zip(self.next_probs(self.joint), self.next_values(), strict=True):
            if settings is None:  # the first token after which no text is clean
                before = (probs * values).sum(axis=1, keepdims=True)
                strengths.append(((values == 0) & (before > 0)).astype(float))
            else:
                strengths.append(settings.strengths(probs, values))
        return strengths


def two_tokens():
    """docs/limits.md: "a" or "b", then right or wrong; wrong nine times in ten after "a"."""
    joint = np.zeros((4, 4))
    joint[0, 2:], joint[1, 2:] = [0.05, 0.45], [0.45, 0.05]
    is_clean = np.ones((4, 4), bool)
    is_clean[:, 3] = False
    return Texts(joint, is_clean)


def ten_tokens():
    """Three tokens, each after the last two; a text is bad where 2 follows 1 anywhere."""
    rng = np.random.default_rng(0)
    after = rng.dirichlet(np.ones(3), size=(3, 3))
    joint = np.ones(1)
    for _ in range(10):
        size = len(joint)
        last = np.arange(size) % 3 if size >= 3 else np.zeros(size, int)
        before = np.arange(size) // 3 % 3 if size >= 9 else np.zeros(size, int)
        joint = (joint[:, None] * after[before, last]).reshape(-1)
    shape = (3,) * 10
    tokens = np.stack(np.unravel_index(np.arange(3**10), shape), axis=1)
    bad = ((tokens[:, :-1] == 1) & (tokens[:, 1:] == 2)).any(axis=1)
    return Texts(joint.reshape(shape), ~bad.reshape(shape))


EXACT = look_ahead.LookAhead(num_tokens=3, least_strength=-99.0, least_value=0.0)


def desired(texts, strengths):
    """Over texts, where at every position is said what graded removal desires."""
    found = []
    for probs, of_position in zip(texts.next_probs(texts.joint), strengths, strict=True):
        ids = jnp.broadcast_to(jnp.arange(probs.shape[1]), (1, *probs.shape))
        logits = jnp.log(jnp.maximum(probs, 1e-30))[None]
        log_probs = objectives.desired_log_probs(logits, ids, (), jnp.asarray(of_position)[None])
        found.append(np.exp(np.asarray(log_probs[0], np.float64)))
    return texts.of_next_probs(found)


def test_two_tokens_by_hand():
    """After "a" one text in ten ends well, after "b" nine: of 0.5 each, all in all half of them."""
    first, second = two_tokens().marks(EXACT)
    np.testing.assert_allclose(first[0, :2], [0.8, -0.8], atol=1e-12)
    np.testing.assert_allclose(second[0, 2:], [-9, 1], atol=1e-12)
    np.testing.assert_allclose(second[1, 2:], [1 - 1 / 0.9, 1], atol=1e-12)


@pytest.mark.parametrize("texts", [two_tokens(), ten_tokens()], ids=["two", "ten"])
def test_exact_values_lead_to_the_nearest_texts_and_marks_alone_do_not(texts):
    ahead, plain = (desired(texts, texts.marks(settings)) for settings in (EXACT, None))
    np.testing.assert_allclose(ahead, texts.nearest, atol=1e-6)
    assert texts.kl(ahead) == pytest.approx(texts.smallest_kl, abs=1e-4)
    # Marks lead to clean texts as well, further away.
    assert plain[~texts.is_clean].sum() < 1e-9
    assert texts.kl(plain) > texts.smallest_kl + 0.1


def test_two_tokens_cost_what_the_docs_say():
    texts = two_tokens()
    kl = [texts.kl(desired(texts, texts.marks(settings))) for settings in (None, EXACT)]
    np.testing.assert_allclose(kl, [1.204, 0.693], atol=5e-4)


@pytest.mark.parametrize("name", ["TNFF", "TNRF", "TNJJ"])
def test_training_two_tokens_says_the_nearest_texts(name):
    """Logits in a table, the objective of training, Adam; the third token cannot come."""
    texts = two_tokens()
    marked = {"ahead": texts.marks(EXACT), "plain": texts.marks(None)}
    probs = np.concatenate(texts.next_probs(texts.joint))[:3]  # the prefixes "", "a" and "b"
    original = jnp.log(jnp.maximum(jnp.asarray(probs, jnp.float32), 1e-9))[None]
    objective = objectives.named(name)

    def said(strengths):
        by_prefix = jnp.asarray(np.concatenate(strengths)[:3], jnp.float32)[None]
        ids = jnp.where(by_prefix == 0, -1, jnp.arange(4))
        optimizer = optax.adam(optax.cosine_decay_schedule(0.2, 2000))

        def loss(current):
            return objective.token_losses(
                current_logits=current,
                original_logits=original,
                target_tokens=jnp.zeros((1, 3), jnp.int32),
                negative_ids=ids,
                loss_mask=jnp.ones((1, 3), jnp.int32),
                negative_strengths=by_prefix,
            ).sum()

        def update(carry, _):
            current, state = carry
            updates, state = optimizer.update(jax.grad(loss)(current), state)
            return (current + updates, state), None

        start = original, optimizer.init(original)
        (current, _), _ = jax.jit(lambda: jax.lax.scan(update, start, length=2000))()
        first, *second = np.exp(np.asarray(jax.nn.log_softmax(current[0]), np.float64))
        return first[:2, None] * np.array(second)[:, 2:]

    np.testing.assert_allclose(said(marked["ahead"]), [[0.1, 0], [0.9, 0]], atol=1e-3)
    np.testing.assert_allclose(said(marked["plain"]), [[0.5, 0], [0.5, 0]], atol=1e-3)


# --- Strengths ------------------------------------------------------------------------------------


def test_equal_values_change_nothing_and_tokens_that_are_not_looked_at_keep_theirs():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(6), size=(2, 5))[..., :4]  # two more are not looked at
    settings = look_ahead.LookAhead(num_tokens=4, least_strength=-99.0)
    values = rng.uniform(0.1, 0.9, size=probs.shape)
    equal = settings.strengths(probs, np.broadcast_to(values[..., :1], probs.shape))
    np.testing.assert_allclose(equal, 0, atol=1e-12)
    strengths = settings.strengths(probs, values)
    np.testing.assert_allclose((probs * (1 - strengths)).sum(-1), probs.sum(-1))
    # A head that is wrong by one factor everywhere gives the same strengths.
    np.testing.assert_allclose(settings.strengths(probs, values / 2), strengths)


def test_bounds_hold():
    settings = look_ahead.LookAhead(num_tokens=2, least_strength=-3.0, least_value=0.1)
    probs = np.array([[0.99, 0.01], [0.5, 0.5], [0.5, 0.0]])
    values = np.array([[0.1, 0.9], [0.09, 0.1], [0.5, 1.0]])
    strengths = settings.strengths(probs, values)
    assert strengths[0, 1] == -3 and 0 < strengths[0, 0] < 0.1
    assert not strengths[1].any()  # below the least value
    assert not strengths[2].any()  # a token of no weight has none
    assert not settings.strengths(probs, np.zeros_like(probs)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 0}, "LookAhead.num_tokens: expected at least 1, found 0"),
        ({"least_strength": -100.0}, "least_strength: expected from -99 to 0, found -100"),
        ({"least_strength": 0.5}, "LookAhead.least_strength: expected from -99 to 0, found 0.5"),
        ({"least_value": 1.0}, "LookAhead.least_value: expected at least 0 and below 1, found 1.0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        look_ahead.LookAhead(**settings)


def test_gin_files_look_ahead_where_they_say_how_far():
    assert look_ahead.settings_of(None) is look_ahead.settings_of(0) is None
    assert look_ahead.settings_of(4, least_value=0.2) == look_ahead.LookAhead(
        num_tokens=4, least_value=0.2
    )
