"""The order of an epoch: every row once, none known beforehand, and no table of all of them."""

import tracemalloc

import numpy as np
import pytest

from tnt_jax.data import shuffling
from tnt_jax.data.shuffling import LARGEST_TABLE, rows_at


@pytest.mark.parametrize("num_rows", [1, 2, 7, LARGEST_TABLE, LARGEST_TABLE + 1, 131_073, 262_144])
def test_every_row_comes_once(num_rows):
    order = rows_at(np.arange(num_rows), num_rows, seed=3, epoch=2)
    assert (np.sort(order) == np.arange(num_rows)).all()
    places = np.array([num_rows - 1, 0, num_rows // 2])
    assert rows_at(places, num_rows, 3, 2).tolist() == order[places].tolist()


@pytest.mark.parametrize("num_rows", range(1, 70))
def test_every_row_comes_once_of_few_rows_without_a_table(monkeypatch, num_rows):
    monkeypatch.setattr(shuffling, "LARGEST_TABLE", 0)
    for epoch in range(3):
        order = rows_at(np.arange(num_rows), num_rows, seed=0, epoch=epoch)
        assert sorted(order.tolist()) == list(range(num_rows))


def test_orders_of_few_rows_are_numpys():
    """What runs of earlier versions saw, which a run that goes on from one must see."""
    expected = np.random.default_rng([5, 1]).permutation(100)
    assert rows_at(np.arange(100), 100, 5, 1).tolist() == expected.tolist()


def test_epochs_and_seeds_have_nothing_in_common():
    num_rows = LARGEST_TABLE + 99
    orders = [
        rows_at(np.arange(num_rows), num_rows, seed, epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    orders.append(np.arange(num_rows))
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Of two random orders one row on average has the same place in both.
            assert (one == other).sum() < 15
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.02  # five deviations
    for order in orders[:3]:
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
        # Every eighth of an epoch has its share of every eighth of the rows, by chi squared.
        shares = np.histogram2d(np.arange(num_rows), order, bins=8)[0]
        expected = num_rows / 64
        assert ((shares - expected) ** 2 / expected).sum() < 49 + 5 * (2 * 49) ** 0.5


def test_no_table_is_made():
    tracemalloc.start()
    try:
        found = rows_at(np.arange(10**12, 10**12 + 64), 10**13 + 7, 0, 0)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert len(set(found.tolist())) == 64
    assert found.max() < 10**13 + 7
