"""Which examples share a row, so that short ones leave little padding. NumPy only."""

from collections.abc import Sequence

import numpy as np

# Examples that are packed together. More fill the rows better and take longer to place: on message
# and reply pairs, 256 need 3 % more rows than 4096, and all at once would need 0.5 % fewer.
WINDOW = 4096


def pack(sizes: np.ndarray, capacity: Sequence[int], window: int = WINDOW) -> list[np.ndarray]:
    """Puts examples into as few rows as first-fit decreasing finds, window by window.

    The largest example comes first, and each goes into the first row of its window that has room
    for it. A function of the arguments alone: the same rows on every host and after every restart.

    Args:
        sizes: `[N, D]`, of each example in each of D dimensions, such as input and target tokens.
        capacity: `[D]`, of a row. An example that is larger counts as being as large: it is cut.
        window: examples that are packed together, next to each other in `sizes`.

    Returns:
        The rows, each an int array with the indices of its examples, the largest first. Rows of a
        window stand in the order of their largest examples in `sizes`: as random as that order is.
    """
    sizes = np.minimum(sizes, capacity)
    rows = []
    for start in range(0, len(sizes), window):
        of_window = _first_fit_decreasing(sizes[start : start + window], np.array(capacity))
        rows += sorted((start + np.array(row) for row in of_window), key=lambda row: row[0])
    return rows


def _first_fit_decreasing(sizes: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    rows: list[list[int]] = []
    free = np.empty_like(sizes)  # of the rows that there are
    for index in np.argsort(-(sizes / capacity).sum(axis=1), kind="stable").tolist():
        fits = np.all(free[: len(rows)] >= sizes[index], axis=1)
        row = int(fits.argmax()) if rows else 0
        if not rows or not fits[row]:
            row = len(rows)
            rows.append([])
            free[row] = capacity
        rows[row].append(index)
        free[row] -= sizes[index]
    return rows
