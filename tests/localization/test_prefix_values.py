"""Values of prefixes on a chain whose values are known, the marks that follow, and the measures."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from tnt_jax.localization import look_ahead, prefix_values
from tnt_jax.localization.prefix_values import Evidence, Threshold, Training
from tnt_jax.runtime.errors import UsageError

pytestmark = pytest.mark.usefixtures("optimised")

# A chain of words: 0 is the start, 1 ends an output, 5 is the unwanted word. What comes next
# depends on the last word alone, so a state does not tell whether the unwanted one has been said.
EOS, BAD = 1, 5
CHAIN = np.array(
    [
        [0.00, 0.00, 0.40, 0.30, 0.30, 0.00],
        [0.00, 1.00, 0.00, 0.00, 0.00, 0.00],
        [0.00, 0.20, 0.30, 0.30, 0.15, 0.05],
        [0.00, 0.20, 0.30, 0.10, 0.30, 0.10],
        [0.00, 0.20, 0.30, 0.30, 0.00, 0.20],
        [0.00, 0.20, 0.30, 0.30, 0.20, 0.00],
    ]
)
LENGTH = 40
# States are one-hot words, and with this output matrix the model's distribution is the chain's.
MATRIX = jnp.asarray(np.log(np.maximum(CHAIN, 1e-9)).T, jnp.float32)
TRAINING = Training(width=48, num_updates=500, dropout=0.0)


def exact_values():
    """The value after each word where nothing unwanted has been said: h = P h + P(EOS)."""
    words = [0, 2, 3, 4]
    within = CHAIN[np.ix_(words, words)]
    solved = np.linalg.solve(np.eye(len(words)) - within, CHAIN[words, EOS])
    return dict(zip(words, solved, strict=True))


@functools.cache
def outputs(number, seed=0):
    """Sampled outputs, each without its EOS, which all have."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < number:
        words = [0]
        while words[-1] != EOS:
            words.append(int(rng.choice(len(CHAIN), p=CHAIN[words[-1]])))
        if len(words) < LENGTH:
            found.append(words[1:-1])
    return found


def evidence(texts):
    tokens = np.zeros((len(texts), LENGTH), np.int32)
    mask = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in enumerate(texts):
        tokens[row, 1 : len(text) + 1] = text
        mask[row, : len(text) + 1] = 1
    states = np.eye(len(CHAIN), dtype=np.float32)[tokens]
    following = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    said = prefix_values.log_prob_and_entropy(jnp.asarray(states), MATRIX, jnp.asarray(following))
    said = jnp.pad(said, ((0, 0), (1, 0), (0, 0)))[:, :-1] * (tokens > 0)[..., None]
    return Evidence(jnp.asarray(states), jnp.asarray(tokens), said, jnp.asarray(mask))


def fitted(texts, is_good, seed=0):
    everything = evidence(texts)
    return prefix_values.fit(
        lambda chosen: Evidence(*(array[chosen] for array in everything)),
        np.asarray(is_good),
        MATRIX,
        TRAINING,
        seed,
    )


def values_of(params, texts):
    found = np.asarray(prefix_values.values(params, evidence(texts), MATRIX, training=TRAINING))
    return [row[: len(text) + 1] for row, text in zip(found, texts, strict=True)]


@functools.cache
def head():
    texts = outputs(2000)
    return fitted(texts, [BAD not in text for text in texts])


def test_values_are_those_of_the_chain():
    exact = exact_values()
    assert 0.3 < exact[4] < exact[3] < exact[2] < 0.7
    texts = outputs(300, seed=1)
    differences, shown = [], []
    for text, values in zip(texts, values_of(head(), texts), strict=True):
        is_bad = np.cumsum(np.array([0, *text]) == BAD) > 0
        true = [0.0 if bad else exact[word] for bad, word in zip(is_bad, [0, *text], strict=True)]
        differences.extend(np.abs(values - true))
        shown.extend(values[is_bad])
    assert np.mean(differences) < 0.04
    assert np.mean(shown) < 0.03  # though the state after the unwanted word is forgotten at once


def test_the_unwanted_word_is_what_is_marked():
    texts = [text for text in outputs(300, seed=1) if BAD in text]
    assert len(texts) > 50
    found = [Threshold().negative(values) for values in values_of(head(), texts)]
    # A word said again changes nothing more: the output was lost at the first.
    first = [np.arange(len(text)) == text.index(BAD) for text in texts]
    agreement = prefix_values.agreement(found, first)
    assert agreement.precision > 0.95 and agreement.recall > 0.95
    blame = [prefix_values.blame(values) for values in values_of(head(), texts)]
    assert (
        np.mean([of_one[text.index(BAD)] for of_one, text in zip(blame, texts, strict=True)]) > 0.7
    )


def test_labels_that_mean_nothing_mark_nothing():
    texts = outputs(2000)
    labels = np.array([BAD not in text for text in texts])
    params = fitted(texts, np.random.default_rng(2).permutation(labels))
    others = [text for text in outputs(300, seed=1) if BAD in text]
    found = [Threshold().negative(values) for values in values_of(params, others)]
    assert sum(marks.sum() for marks in found) <= 0.03 * sum(map(len, others))


def test_a_head_is_its_seed():
    texts = outputs(2000)[:200]
    labels = [BAD not in text for text in texts]
    one, same, other = (fitted(texts, labels, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_no_value_depends_on_what_comes_later_or_on_padding():
    text = max(outputs(300, seed=1), key=len)
    whole = values_of(head(), [text, text])[0]
    for length in range(0, len(text), 5):
        (cut,) = values_of(head(), [text[:length]])
        np.testing.assert_allclose(cut, whole[: length + 1], atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_log_probability_and_entropy_against_scipy(softcap):
    rng = np.random.default_rng(0)
    states, matrix = rng.normal(size=(2, 5, 7)), rng.normal(size=(11, 7))
    tokens = rng.integers(11, size=(2, 5))
    found = prefix_values.log_prob_and_entropy(
        jnp.asarray(states, jnp.float32),
        jnp.asarray(matrix, jnp.float32),
        jnp.asarray(tokens),
        softcap=softcap,
    )
    logits = states @ matrix.T
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    log_probs = special.log_softmax(logits, axis=-1)
    own = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]
    expected = np.stack([own, stats.entropy(np.exp(log_probs), axis=-1)], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --------------------------------------------------------------------------------------- The marks


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Falls: 0.9 to 0.8, to 0.5, to 0.6, to 0.06, to 0.01.
        ({}, [0, 1, 0, 1, 0]),
        ({"ratio": 0.5}, [0, 0, 0, 1, 0]),
        ({"min_fall": 0.0}, [0, 1, 0, 1, 1]),
        ({"ratio": 1.0, "min_fall": 0.04}, [1, 1, 0, 1, 1]),
        ({"ratio": 0.05}, [0, 0, 0, 0, 0]),
        ({"ratio": 0.05, "at_least_one": True}, [0, 0, 0, 1, 0]),
        ({"ratio": 0.7, "at_least_one": True}, [0, 1, 0, 1, 0]),
    ],
)
def test_the_threshold_by_hand(settings, expected):
    values = np.array([0.9, 0.8, 0.5, 0.6, 0.06, 0.01])
    np.testing.assert_array_equal(Threshold(**settings).negative(values), np.array(expected, bool))


def test_an_output_of_no_token_has_no_mark():
    assert Threshold(at_least_one=True).negative(np.array([0.4])).shape == (0,)
    np.testing.assert_array_equal(prefix_values.blame(np.array([0.4])), [1.0])


def test_blame_by_hand():
    # A rise is not undone by the next fall: that only counts below 0.4.
    values = np.array([0.8, 0.4, 0.6, 0.4, 0.2, 0.2])
    np.testing.assert_allclose(prefix_values.blame(values), [0.5, 0, 0, 0.25, 0, 0.25])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold(ratio=0.0), "ratio: expected above 0 and at most 1, found 0.0"),
        (lambda: Threshold(min_fall=2.0), "Threshold.min_fall: expected from 0 to 1, found 2.0"),
        (lambda: Training(dropout=1.0), "dropout: expected at least 0 and below 1, found "),
        (lambda: Training(num_updates=0), "Training.num_updates: expected at least 1, found 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# ------------------------------------------------------------------------------------ The measures


def test_agreement_by_hand():
    negative = [np.array([0, 1, 1, 0, 1], bool), np.array([1, 0, 0], bool)]
    found = [np.array([1, 0, 1, 0, 0], bool), np.array([1, 0, 0], bool)]
    agreement = prefix_values.agreement(found, negative)
    assert agreement == (2 / 3, 2 / 4, 4 / 7, 2 / 3, 4 / 8, 3, 4)
    nothing = [np.zeros(3, bool)]
    assert prefix_values.agreement(nothing, nothing) == (0, 0, 0, 0, 0, 0, 0)


def test_area_under_curve_counts_pairs():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, size=40) / 5  # with ties
    is_good = rng.random(40) < 0.4
    pairs = list(itertools.product(scores[is_good], scores[~is_good]))
    expected = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    assert prefix_values.area_under_curve(scores, is_good) == pytest.approx(expected)


def test_estimates_take_the_noise_of_samples_out():
    """Shares of 8 samples are off by 0.15; the true values still explain everything."""
    rng = np.random.default_rng(0)
    true = rng.random(20_000)
    shares = rng.binomial(8, true) / 8
    exact = prefix_values.compare_estimates(true, shares, 8)
    assert exact.explained == pytest.approx(1.0, abs=0.02)
    assert exact.correlation == pytest.approx(np.corrcoef(true, shares)[0, 1])
    assert exact.correlation < 0.95
    mean = prefix_values.compare_estimates(np.full(20_000, true.mean()), shares, 8)
    assert mean.explained == pytest.approx(0.0, abs=0.02) and mean.correlation is None
    halved = prefix_values.compare_estimates(0.5 + (true - 0.5) / 2, shares, 8)
    assert halved.explained == pytest.approx(0.75, abs=0.02)
    assert prefix_values.compare_estimates(true, np.full(20_000, 1.0), 8).explained is None


# --- Looking ahead --------------------------------------------------------------------------------


@functools.cache
def looked_ahead():
    """Texts, and for each of the six words at each position its probability and value."""
    texts = outputs(60, seed=1)
    everything = evidence(texts)
    never = jnp.zeros(len(CHAIN), bool).at[0].set(True)
    candidates = look_ahead.next_candidates(everything.states, MATRIX, never, num_tokens=5)
    states = jnp.eye(len(CHAIN))[candidates.ids]
    values = look_ahead.next_values(
        head(), everything, MATRIX, candidates, states, training=TRAINING
    )
    return texts, candidates, np.asarray(values)


def test_candidates_are_the_likeliest_and_never_what_no_output_has():
    texts, candidates, _ = looked_ahead()
    for row, text in enumerate(texts):
        for position, word in enumerate([0, *text]):
            ids = np.asarray(candidates.ids[row, position])
            probs = np.exp(np.asarray(candidates.log_probs[row, position]))
            assert set(ids.tolist()) == {1, 2, 3, 4, 5}
            np.testing.assert_allclose(probs, CHAIN[word][ids], atol=1e-6)
            assert (np.diff(probs) <= 1e-6).all()


def test_the_value_of_a_next_word_is_that_of_the_text_with_it():
    texts, candidates, values = looked_ahead()
    for row, number in itertools.product(range(3), range(5)):
        ids = np.asarray(candidates.ids[row, :, number])
        for position in range(len(texts[row]) + 1):
            continued = [*texts[row][:position], int(ids[position])]
            (expected,) = values_of(head(), [continued])
            np.testing.assert_allclose(values[row, position, number], expected[-1], atol=1e-5)


def test_learned_values_come_near_to_the_nearest_texts():
    """On clean prefixes, the probabilities of the next word that they lead to."""
    texts, candidates, values = looked_ahead()
    exact = exact_values() | {EOS: 1.0, BAD: 0.0}
    before, after = [], []
    for row, text in enumerate(texts):
        for position, word in enumerate([0, *text]):
            if BAD in text[:position]:
                break
            ids = np.asarray(candidates.ids[row, position])
            kept = ids != EOS  # the chain's head has seen no text with its end
            probs = CHAIN[word][ids] * kept
            probs /= probs.sum()
            strengths = look_ahead.LookAhead().strengths(probs, values[row, position])
            found = probs * (1 - strengths)
            true = probs * [exact[i] for i in ids.tolist()]
            before.append(np.abs(probs - true / true.sum()).sum())
            after.append(np.abs(found / found.sum() - true / true.sum()).sum())
    assert np.mean(after) < 0.25 * np.mean(before)
    assert np.mean(before) > 0.2
