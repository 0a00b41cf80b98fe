"""Which examples share a row, so that short ones leave little padding. NumPy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Examples that are packed together. More fill the rows better and take longer to place: on message
# and reply pairs, 256 need 3 % more rows than 4096, and all at once would need 0.5 % fewer.
WINDOW = 4096


class Rows(Sequence[np.ndarray]):
    """Rows of examples; `rows[r]` has the indices of the examples of row r, the largest first.

    Attributes:
        members: `[N]` int32, the examples, row after row.
        starts: `[R + 1]` int64: row r is `members[starts[r] : starts[r + 1]]`.
    """

    def __init__(self, members: np.ndarray, starts: np.ndarray):
        self.members, self.starts = members, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: Any) -> Any:
        """The examples of a row."""
        return self.members[self.starts[row] : self.starts[row + 1]]


def pack(
    sizes: np.ndarray,
    capacity: Sequence[int],
    window: int = WINDOW,
    order: np.ndarray | None = None,
) -> Rows:
    """Puts examples into as few rows as first-fit decreasing finds, window by window.

    The largest example comes first, and each goes into the first row of its window that has room
    for it. A function of the arguments alone: the same rows on every host and after every restart.

    Args:
        sizes: `[N, D]`, the size of each example in each of D dimensions, such as input and target
            tokens.
        capacity: `[D]`, the size of a row. An example that is larger counts as being as large: it
            is cut.
        window: examples that are packed together, next to each other in `order`.
        order: `[N]`, a permutation of the examples; None has them as they are in `sizes`.

    Returns:
        The rows. Those of a window stand in the order of their largest examples: as random as that
        order is.
    """
    sizes = np.minimum(sizes, capacity)
    members, lengths = [], []
    for start in range(0, len(sizes), window):
        chosen = slice(start, start + window) if order is None else order[start : start + window]
        rows = _first_fit_decreasing(sizes[chosen], capacity)
        rows.sort(key=lambda row: row[0])
        placed = np.fromiter((i for row in rows for i in row), np.int32)
        members.append(placed + start if order is None else order[start + placed])
        lengths += map(len, rows)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Rows(np.concatenate(members).astype(np.int32), starts)


def _first_fit_decreasing(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    order = np.argsort(-(sizes / np.array(capacity)).sum(axis=1), kind="stable")
    rows: list[list[int]] = []
    # A row after the last one has no room for any example. Small numbers: they are compared often.
    number = np.int16 if max(capacity) < 2**15 else np.int64
    free = [np.full(len(sizes), -1, number) for _ in capacity]
    fits, fits_too = np.empty((2, len(sizes)), bool)
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        num_rows = len(rows)
        found = np.greater_equal(free[0][:num_rows], size[0], out=fits[:num_rows])
        for of_dimension, needed in zip(free[1:], size[1:], strict=True):
            found &= np.greater_equal(of_dimension[:num_rows], needed, out=fits_too[:num_rows])
        row = int(found.argmax()) if num_rows else 0
        if not num_rows or not found[row]:
            row = num_rows
            rows.append([])
            for of_dimension, of_row in zip(free, capacity, strict=True):
                of_dimension[row] = of_row
        rows[row].append(index)
        for of_dimension, needed in zip(free, size, strict=True):
            of_dimension[row] -= needed
    return rows
