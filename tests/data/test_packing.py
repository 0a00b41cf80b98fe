"""Several examples in a row: the same examples, the same loss, fewer rows."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import t5_inputs
from helpers.examples import example
from hypothesis import strategies as st

from tnt_jax import objectives
from tnt_jax.data import packing
from tnt_jax.data.batches import Batches
from tnt_jax.data.layouts import Place, convert_features
from tnt_jax.models import t5
from tnt_jax.training import train_step


def random_examples(num_examples, seed=0, longest=9, vocab_size=40, strengths=None):
    """Marks of none to three ids at a position, a loss mask now and then, one EOS at the end."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(num_examples):
        inputs, targets = (
            [*rng.integers(2, vocab_size, rng.integers(longest)), 1] for _ in range(2)
        )
        pairs = [
            (position, token)
            for position in range(len(targets))
            for token in sorted(rng.choice(np.arange(2, vocab_size), rng.choice(4), replace=False))
        ]
        mask = rng.integers(0, 2, len(targets)) if index % 3 == 0 else None
        examples.append(example(inputs, targets, pairs, mask, name=str(index)))
        if strengths is not None:
            of_pairs = rng.choice(strengths, len(pairs))
            examples[-1] = dataclasses.replace(examples[-1], negative_strengths=of_pairs)
    return examples


# --- Which examples share a row -------------------------------------------------------------------


def test_rows_by_hand():
    sizes = np.array([[2, 1], [6, 1], [3, 3], [1, 6], [2, 2]])
    # Of 8 and 8: (6, 1) and (1, 6) share a row; of the others (3, 3) is the largest.
    rows = packing.pack(sizes, (8, 8))
    assert [row.tolist() for row in rows] == [[1, 3], [2, 4, 0]]
    # One dimension alone would let four of the examples share.
    assert len(packing.pack(sizes, (14, 14))) == 1
    # In windows, each of its own, which follow each other in an order.
    assert [row.tolist() for row in packing.pack(sizes, (14, 14), window=3)] == [[1, 2, 0], [3, 4]]
    order = np.array([4, 3, 2, 1, 0])
    rows = packing.pack(sizes, (14, 14), window=3, order=order)
    assert [row.tolist() for row in rows] == [[3, 2, 4], [1, 0]]


def test_what_is_longer_than_a_row_has_a_row_of_its_own():
    rows = packing.pack(np.array([[1, 1], [9, 1], [1, 9], [20, 20]]), (8, 8))
    assert [row.tolist() for row in rows] == [[0], [1], [2], [3]]


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=60),
    st.integers(1, 60),
)
def test_every_example_is_in_one_row_and_no_two_rows_would_fit_into_one(sizes, window):
    sizes = np.array(sizes)
    rows = packing.pack(sizes, (10, 8), window)
    assert sorted(rows.members.tolist()) == list(range(len(sizes)))
    kept = np.minimum(sizes, (10, 8))
    filled = [kept[row].sum(axis=0) for row in rows]
    assert (np.array(filled) <= (10, 8)).all()
    windows = [set((row // window).tolist()) for row in rows]
    assert all(len(of_row) == 1 for of_row in windows)
    for one in range(len(rows)):
        for other in range(one):
            if windows[one] == windows[other]:
                assert (filled[one] + filled[other] > (10, 8)).any()


def test_rows_of_short_and_of_long_examples_are_mixed():
    """The order of rows is that of the examples, which is random, not that of their sizes."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 40, (4000, 1)).repeat(2, axis=1)
    num_members = np.array([len(row) for row in packing.pack(sizes, (40, 40))])
    halves = num_members[: len(num_members) // 2], num_members[len(num_members) // 2 :]
    assert halves[0].mean() == pytest.approx(halves[1].mean(), rel=0.05)


# --- One batch ------------------------------------------------------------------------------------


def test_two_examples_in_a_row_by_hand():
    batches = Batches(
        [
            example([7, 8, 1], [3, 9, 4, 1], [(1, 6), (1, 9), (2, 4)]),
            example([8, 1], [5, 1], [(0, 5)], loss_mask=[0, 1]),
        ],
        1,
        {"inputs": 6, "targets": 7},
        seed=0,
        pack=True,
    )
    assert batches.read(0).places == [Place(0, 0, 1, 0, 0, 4), Place(1, 0, 2, 3, 4, 2)]
    expected = {
        "encoder_input_tokens": [[7, 8, 1, 8, 1, 0]],
        "decoder_input_tokens": [[0, 3, 9, 4, 0, 5, 0]],
        "decoder_target_tokens": [[3, 9, 4, 1, 5, 1, 0]],
        "decoder_loss_mask": [[1, 1, 1, 1, 0, 1, 0]],
        "decoder_negative_ids": [
            [[-1, -1], [6, 9], [4, -1], [-1, -1], [5, -1], [-1, -1], [-1, -1]]
        ],
        "encoder_segment_ids": [[1, 1, 1, 2, 2, 0]],
        "decoder_segment_ids": [[1, 1, 1, 1, 2, 2, 0]],
    }
    features = batches.batch(0)
    assert list(features) == list(expected)
    for name, value in expected.items():
        assert features[name].dtype == np.int32
        np.testing.assert_array_equal(features[name], value, err_msg=name)


LENGTHS = {"inputs": 14, "targets": 16}


def packed_batches(examples, batch_size=3, **settings):
    return Batches(examples, batch_size, LENGTHS, seed=3, pack=True, **settings)


def test_a_layout_says_where_every_example_lies():
    examples = random_examples(40)
    examples.append(example([*range(2, 22), 1], [*range(2, 30)], [(1, 5), (20, 6)]))
    for pack in (True, False):
        batches = dataclasses.replace(packed_batches(examples), pack=pack)
        for k in range(9):
            features = batches[k]
            num_targets = num_marks = 0
            for place in batches.read(k).places:
                source = examples[place.example]
                here = slice(place.target_offset, place.target_offset + place.num_targets)
                found = features["decoder_target_tokens"][place.row, here]
                assert found.tolist() == source.targets[: LENGTHS["targets"]].tolist()
                first_input = features["encoder_input_tokens"][place.row, place.input_offset]
                assert first_input == source.inputs[0]
                # As if it were alone.
                alone = convert_features([source], LENGTHS, 3)
                for name in ("decoder_input_tokens", "decoder_loss_mask", "decoder_negative_ids"):
                    expected = alone[name][0, : place.num_targets]
                    np.testing.assert_array_equal(features[name][place.row, here], expected)
                num_targets += place.num_targets
                num_marks += (alone["decoder_negative_ids"] >= 0).sum()
            # And nothing else is there.
            assert np.count_nonzero(features["decoder_target_tokens"]) == num_targets
            assert (features["decoder_negative_ids"] >= 0).sum() == num_marks


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_is_seen_once_per_epoch(shuffle):
    examples = random_examples(23)
    batches = packed_batches(examples, batch_size=4, shuffle=shuffle)
    indices = [place.example for k in range(40) for place in batches.read(k).places]
    epochs = np.array(indices[: len(indices) // 23 * 23]).reshape(-1, 23)
    assert len(epochs) > 10
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs}) == (len(epochs) if shuffle else 1)


def test_the_same_examples_share_a_row_in_every_epoch_and_with_every_seed():
    examples = random_examples(40)

    def rows_of(batches):
        rows = {}
        for k in range(30):
            for place in batches.read(k).places:
                rows.setdefault((k, place.row), []).append(place.example)
        return {tuple(row) for row in rows.values()}

    found = rows_of(packed_batches(examples))
    assert rows_of(dataclasses.replace(packed_batches(examples), seed=8)) == found
    assert sorted(index for row in found for index in row) == list(range(40))


def test_batch_k_does_not_depend_on_what_was_read_before():
    examples = random_examples(17)
    straight = packed_batches(examples)
    expected = [straight[k] for k in range(12)]
    for k in (11, 0, 7):
        resumed = packed_batches(examples)
        for name, value in resumed.batch(k).items():
            np.testing.assert_array_equal(value, expected[k][name])


def test_an_epoch_says_how_full_its_rows_are():
    examples = [example([2, 1], [3, 4, 1])] * 8
    packed = packed_batches(examples).padding()  # five would fit by their targets: 16 positions
    assert packed == (2, 4.0, 1 - 16 / 28, 1 - 24 / 32)
    alone = dataclasses.replace(packed_batches(examples), pack=False).padding()
    assert alone == (8, 1.0, 1 - 16 / 112, 1 - 24 / 128)


# --- The loss -------------------------------------------------------------------------------------

CONFIG = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=8,
    mlp_dim=32,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
)


@pytest.mark.parametrize(
    ("forward", "strengths"),
    [
        (t5_inputs.make_forward(CONFIG), None),
        (t5.T5(CONFIG).forward, None),
        (t5.T5(CONFIG).forward, (0.2, 0.9, 1.0)),
    ],
    ids=["whole", "factored", "factored, strengths"],
)
def test_loss_and_gradient_are_those_of_rows_of_their_own(forward, strengths):
    examples = random_examples(60, strengths=strengths)
    batches = packed_batches(examples, batch_size=4)
    layout, packed = batches.read(1).places, batches[1]
    assert len(layout) > 2 * 4  # more than two in a row
    alone = convert_features(
        [examples[place.example] for place in layout], LENGTHS, batches.num_negative_ids
    )
    assert (alone["decoder_negative_ids"] >= 0).sum(axis=-1).max() == 3
    params, original_params = (t5.T5(CONFIG).init(jax.random.key(seed)) for seed in (0, 1))
    objective = objectives.TntObjective(
        negative_term="reverse_kl", positive_term="forward_kl", negative_weight=3.0
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_and_sums(params, batch):
        original_logits = forward(original_params, batch)
        return train_step.token_sums(objective, forward(params, batch), original_logits, batch)

    (found, found_sums), (expected, expected_sums) = (
        gradient_and_sums(params, jax.tree.map(jnp.asarray, batch)) for batch in (packed, alone)
    )
    assert found_sums.keys() == expected_sums.keys()
    for name, value in expected_sums.items():
        np.testing.assert_allclose(found_sums[name], value, rtol=1e-5, err_msg=name)
    size = float(optax.tree.norm(expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * size)
