"""The layout of two sequences that google/t5patches published, and its modes."""

import numpy as np

from tnt_jax.runtime.errors import UsageError

T5PATCHES_MODES = tuple(
    prefix + marks
    for prefix in ("", "corrective_", "negative_and_positive_")
    for marks in ("first", "diff", "full")
)


def t5patches_target(
    negative_targets: np.ndarray, corrected_targets: np.ndarray, mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads one example of the layout that google/t5patches published, in one of its modes.

    The two sequences are compared position by position. `first` and `diff` mark the first or every
    difference in `negative_targets`, `full` marks every token. `corrective_*` has no marks: it
    trains on `corrected_targets`, with loss at the first, at every difference or everywhere.
    `negative_and_positive_*` takes an example for negative, in mode `*`, when `negative_targets`
    has at least as many tokens, else for positive: `corrected_targets` with loss everywhere.

    t5patches also weights one padding position where one sequence is the beginning of the other;
    padding has no loss here.

    Args:
        negative_targets: ids; zeros at the end are padding.
        corrected_targets: ids, likewise.
        mode: one of `T5PATCHES_MODES`.

    Returns:
        Targets `[T]`, negative pairs `[M, 2]` and loss mask `[T]`, as in `Example`.

    Raises:
        UsageError: no such mode.
    """
    if mode not in T5PATCHES_MODES:
        raise UsageError(f"t5patches mode: expected one of {T5PATCHES_MODES}, found {mode!r}.")
    negative = np.trim_zeros(np.asarray(negative_targets, np.int32), "b")
    corrected = np.trim_zeros(np.asarray(corrected_targets, np.int32), "b")
    kind, _, marks = mode.rpartition("_")
    if kind == "negative_and_positive":
        kind, marks = ("", marks) if len(negative) >= len(corrected) else ("corrective", "full")
    targets, other = (corrected, negative) if kind == "corrective" else (negative, corrected)
    chosen = targets != np.pad(other, (0, len(targets)))[: len(targets)]
    if marks == "first":
        chosen &= np.cumsum(chosen) == 1
    elif marks == "full":
        chosen[:] = True
    if kind == "corrective":
        return targets, np.zeros((0, 2), np.int32), chosen.astype(np.int32)
    positions = np.flatnonzero(chosen)
    pairs = np.stack([positions, targets[positions]], axis=1).astype(np.int32)
    return targets, pairs, np.ones_like(targets)
