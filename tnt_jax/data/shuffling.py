"""The order of an epoch: a permutation by (seed, epoch), of which any place is computed alone.

Of more than `LARGEST_TABLE` rows no table is made. A Feistel network permutes the numbers below a
power of four from a key; a number that comes out beyond the last row goes in again until one comes
out that is a row (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import functools

import numpy as np

# Up to so many rows the permutation is NumPy's, a table, as earlier versions had it for any number.
LARGEST_TABLE = 65_536
_NUM_ROUNDS = 8


def rows_at(places: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Which rows come at some places of an epoch.

    Args:
        places: `[P]` ints in [0, num_rows).
        num_rows: number of rows in an epoch.
        seed: random seed of the order.
        epoch: number of the epoch, from 0.

    Returns:
        `[P]` int64. All places of an epoch give every row once.
    """
    if num_rows <= LARGEST_TABLE:
        return _table(num_rows, seed, epoch)[places]
    half = np.uint64((num_rows - 1).bit_length() + 1) // np.uint64(2)  # bits of either half
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(_NUM_ROUNDS, np.uint64)
    rows = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(rows))
    while len(outside):
        left, right = rows[outside] >> half, rows[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        rows[outside] = (left << half) | right
        outside = outside[rows[outside] >= num_rows]
    return rows.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _table(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood, 2014): a bit in changes half of those out."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
