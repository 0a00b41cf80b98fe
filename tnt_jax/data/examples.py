"""Tokenised examples of any length: token ids, ids to remove, and what may be trained on.

Axes: `Ti` input tokens, `T` target tokens, `M` marks. NumPy only.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.runtime.errors import UsageError

LOSS_UNTIL = ("end", "first_negative")


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenised example of any length.

    Attributes:
        inputs: `[Ti]` int32, as the tokeniser makes a prompt.
        targets: `[T]` int32, the end included.
        negative_pairs: `[M, 2]` int32 rows (position, id): ids to remove at target positions.
            Sorted, without repeats.
        negative_strengths: `[M]` float64, of each of these rows: at most 1 and not 0; below 0
            raises the id. None where all are 1.
        loss_mask: `[T]` int32, 0 where a target token has no loss; None means 1 everywhere.
        span_numbers: `[T]` int32: of each target token the number, from 1, of the negative span
            that marks it; 0 where none does, -1 where the token stands for no text. None where
            marks are not known as spans. For counting: what is trained on are the pairs.
        id: its name in messages and reports.
        keeps_last_input: whether inputs that are too long are cut before their last id: T5 was
            trained with the end there.
    """

    inputs: np.ndarray
    targets: np.ndarray
    negative_pairs: np.ndarray
    negative_strengths: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    span_numbers: np.ndarray | None = None
    id: str = ""
    keeps_last_input: bool = True


def loss_mask_until(
    end: str,
    targets: np.ndarray,
    negative_pairs: np.ndarray,
    strengths: np.ndarray | None = None,
) -> np.ndarray | None:
    """The loss mask of a target that counts up to an end.

    Args:
        end: one of LOSS_UNTIL. "first_negative" leaves no loss after the first token that is
            itself removed, for what follows a mistake is the consequence of it. Ids that are
            removed beside another token are no mistake of the target's.
        targets: `[T]` token ids.
        negative_pairs: `[M, 2]` rows (position, id), sorted.
        strengths: `[M]`, of each; None where all are 1. An id that is raised is no mistake.

    Returns:
        `[T]` int32; None where all tokens count.

    Raises:
        UsageError: no such end.
    """
    if end not in LOSS_UNTIL:
        raise UsageError(f"loss_until: expected one of {', '.join(LOSS_UNTIL)}, found {end!r}.")
    mistakes = _removed_targets(targets, negative_pairs, strengths)
    if end == "end" or not len(mistakes):
        return None
    return (np.arange(len(targets)) <= mistakes[0]).astype(np.int32)


def says_removed(example: Example) -> bool:
    """Whether a target token is itself to be removed, not only others in its place."""
    found = _removed_targets(example.targets, example.negative_pairs, example.negative_strengths)
    return bool(len(found))


def _removed_targets(
    targets: np.ndarray, negative_pairs: np.ndarray, strengths: np.ndarray | None
) -> np.ndarray:
    """The positions whose target token is itself to be removed, or lowered."""
    positions, ids = negative_pairs.T
    is_mistake = ids == targets[positions]
    if strengths is not None:
        is_mistake &= strengths > 0
    return positions[is_mistake]


def unique_pairs(
    pairs: np.ndarray, strengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Marks as an `Example` has them: sorted, each once, with the largest of its strengths.

    Args:
        pairs: `[N, 2]` rows (position, id).
        strengths: `[N]`, at most 1; None where all are 1.
    """
    found, places = np.unique(
        np.asarray(pairs, np.int32).reshape(-1, 2), axis=0, return_inverse=True
    )
    if strengths is None:
        return found, None
    largest = np.full(len(found), -np.inf)
    np.maximum.at(largest, places.reshape(-1), strengths)
    return found, None if (largest == 1).all() else largest


def id_of(value: Any) -> str:
    """The id of an example as a task of seqio has it: a text, or a number."""
    return value.decode() if isinstance(value, bytes) else str(value)


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of a data set: 16 hexadecimal digits; the order counts."""
    hashed = hashlib.sha256()
    for example in examples:
        arrays = (example.inputs, example.targets, example.negative_pairs, example.loss_mask)
        for array in arrays:
            hashed.update(b"-" if array is None else f"{array.shape} ".encode() + array.tobytes())
        if example.negative_strengths is not None:  # or the digests of other data would change
            hashed.update(b"strengths " + example.negative_strengths.tobytes())
    return hashed.hexdigest()[:16]


def max_negative_ids(examples: Sequence[Example]) -> int:
    """The smallest `K` that holds every mark of the examples; at least 1."""
    return max(
        (int(np.bincount(e.negative_pairs[:, 0]).max()) for e in examples if len(e.negative_pairs)),
        default=1,
    )


def have_strengths(examples: Sequence[Example]) -> bool:
    """Whether any mark of the examples has a strength below 1."""
    return any(example.negative_strengths is not None for example in examples)


def check_token_ids(examples: Sequence[Example], num_embeddings: int) -> None:
    """Raises a UsageError when an id has no embedding: JAX would silently take another row's."""
    for example in examples:
        for name, ids in [
            ("inputs", example.inputs),
            ("targets", example.targets),
            ("negative_pairs", example.negative_pairs[:, 1]),
        ]:
            if ids.size and not 0 <= ids.min() <= ids.max() < num_embeddings:
                raise UsageError(
                    f"example {example.id!r}: {name} has ids from {ids.min()} to {ids.max()}, but "
                    f"the model has {num_embeddings} embeddings. Expected its own vocabulary."
                )


class Selection(NamedTuple):
    """What `select_clean` kept."""

    examples: list[Example]
    num_marked: int
    num_clean: int  # of which there were
    num_clean_kept: int


def select_clean(
    examples: Sequence[Example], clean_per_marked: int | float, seed: int
) -> Selection:
    """Keeps every example with a mark, and a sample of the others, in their order.

    An original that mostly behaves produces few unwanted tokens: training on all of its outputs
    spends most updates on examples that only ask it to stay as it is.

    Args:
        examples: the data set.
        clean_per_marked: at most this many unmarked examples for each marked one.
        seed: of the sample.

    Raises:
        UsageError: no example has a mark, or `clean_per_marked` is negative.
    """
    if clean_per_marked < 0:
        raise UsageError(f"clean_per_marked: expected 0 or more, found {clean_per_marked}.")
    clean = [index for index, example in enumerate(examples) if not len(example.negative_pairs)]
    num_marked = len(examples) - len(clean)
    if not num_marked:
        raise UsageError(
            f"clean_per_marked={clean_per_marked} needs marked examples, but none of the "
            f"{len(examples)} has a negative token. Were they annotated?"
        )
    num_clean_kept = min(len(clean), round(clean_per_marked * num_marked))
    rng = np.random.default_rng(seed)
    dropped = set(rng.permutation(clean)[num_clean_kept:].tolist())
    return Selection(
        examples=[example for index, example in enumerate(examples) if index not in dropped],
        num_marked=num_marked,
        num_clean=len(clean),
        num_clean_kept=num_clean_kept,
    )
