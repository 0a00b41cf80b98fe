"""Batches are made ahead in a thread: in order, not too many, and nothing is left of it."""

import contextlib
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax.models import sharding
from tnt_jax.runtime import prefetch


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def wait_until(condition):
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert condition()


@pytest.mark.parametrize("num_items", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("size", [1, 2, 20])
def test_everything_comes_in_order(num_items, size):
    assert list(prefetch.iterate(lambda n: n * n, range(num_items), size)) == [
        n * n for n in range(num_items)
    ]
    assert not threads()


def test_two_are_made_beside_the_one_in_use_and_no_more():
    made = []
    with contextlib.closing(prefetch.iterate(made.append, range(100))) as results:
        for used in range(20):
            next(results)
            wait_until(lambda used=used: len(made) == used + 3)
            time.sleep(0.002)
            assert len(made) == used + 3
    assert not threads()


def test_it_is_made_in_another_thread():
    (thread,) = prefetch.iterate(lambda _: threading.current_thread(), [0])
    assert thread is not threading.main_thread()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_comes_where_the_result_would_have_come(error):
    def make(n):
        if n == 4:
            raise error("not this one")
        return n

    seen = []
    with pytest.raises(error, match="not this one"):
        for result in prefetch.iterate(make, range(100)):
            seen.append(result)
    assert seen == [0, 1, 2, 3]
    assert not threads()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_when_the_consumer_stops(error):
    made = []

    def make(n):
        time.sleep(0.01)
        made.append(n)

    def consume():
        with contextlib.closing(prefetch.iterate(make, range(100))) as results:
            next(results)
            raise error

    with pytest.raises(error):
        consume()
    assert not threads()
    assert len(made) <= 3


def test_eight_devices_get_on_with_work_while_batches_are_put_there():
    """Simulated devices share few threads: what waits for them may keep what they wait for."""
    mesh = sharding.make_mesh(sharding.MeshShape(data=4, model=2))

    @jax.jit
    def step(total, batch):
        return total + jnp.sum(batch["rows"] @ batch["rows"].T)

    total, expected, pending = jnp.zeros(()), 0.0, []
    rows = np.arange(8 * 64, dtype=np.float32).reshape(8, 64) / 100
    batches = prefetch.iterate(
        lambda n: sharding.put_batch({"rows": rows + n % 7}, mesh), range(200)
    )
    for n, batch in enumerate(batches):
        total = step(total, batch)
        pending.append(total)
        if len(pending) > 1:
            jax.block_until_ready(pending[-2])  # as the training loop does
        expected += float(((rows + n % 7) @ (rows + n % 7).T).sum())
    np.testing.assert_allclose(total, expected, rtol=1e-4)
