"""Tokenised examples of any length: token ids, ids to remove, and what may be trained on.

A data set is a list of them, or an `ExampleTable` that reads them from files when they are asked
for. Axes: `Ti` input tokens, `T` target tokens, `M` marks. NumPy only.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnt_jax.data import shuffling
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
        sets: which of the pairs are those of long sets of ids that many examples share.
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
    sets: "tuple[SetAt, ...]" = ()
    id: str = ""
    keeps_last_input: bool = True


class SetAt(NamedTuple):
    """A long set of ids to remove at a position.

    Attributes:
        position: a position of the target.
        name: the set's name, a number (`negative_sets`).
        strength: the strength that all its ids have.
        ids: `[K]` int32, the ids of the set.
    """

    position: int
    name: int
    strength: float
    ids: np.ndarray


class ExampleTable(Sequence[Example], abc.ABC):
    """Examples that are not in memory, of which a few numbers each are known beforehand."""

    @abc.abstractmethod
    def take(self, indices: np.ndarray) -> list[Example]:
        """Reads some of the examples, in the order of their indices; without `span_numbers`."""

    @abc.abstractmethod
    def column(self, name: str) -> np.ndarray:
        """A number of each example, `[N]` int32; the names are those of `COLUMNS`."""

    @abc.abstractmethod
    def subset(self, indices: np.ndarray) -> "ExampleTable":
        """Some of the examples."""

    @abc.abstractmethod
    def row_digests(self) -> np.ndarray:
        """`row_digest` of each example, `[N]` uint64."""

    @abc.abstractmethod
    def sets(self) -> Mapping[int, np.ndarray]:
        """The ids of each set that examples share, `[K]` int32, by its name."""

    @abc.abstractmethod
    def has_ids_below(self, number: int) -> bool:
        """Whether all ids are known to be at least 0 and below a number."""

    @abc.abstractmethod
    def kept(self, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What was made of these examples before and is kept with them, or is made now."""


def take(examples: Sequence[Example], indices: np.ndarray) -> list[Example]:
    """Some of the examples, in the order of their indices."""
    if isinstance(examples, ExampleTable):
        return examples.take(indices)
    return [examples[index] for index in indices.tolist()]


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """Counts the ids of inputs and targets of each example, `[N, 2]`, uncut."""
    if isinstance(examples, ExampleTable):
        return np.stack([examples.column("num_inputs"), examples.column("num_targets")], axis=1)
    return np.array([(len(example.inputs), len(example.targets)) for example in examples])


def num_marks_of(examples: Sequence[Example]) -> np.ndarray:
    """Counts the ids to remove in each example, `[N]`."""
    if isinstance(examples, ExampleTable):
        return examples.column("num_marks")
    return np.array([len(example.negative_pairs) for example in examples])


def count_graded(examples: Sequence[Example], target_length: int | None = None) -> int:
    """Counts the marks of a strength below 1.

    With a `target_length` those at later positions do not count. (A table has all of its own.)
    """
    if isinstance(examples, ExampleTable):
        return int(examples.column("num_graded").sum())
    number = 0
    for example in examples:
        if example.negative_strengths is not None:
            is_graded = example.negative_strengths < 1
            if target_length is not None:
                is_graded &= example.negative_pairs[:, 0] < target_length
            number += int(is_graded.sum())
    return number


# ------------------------------------------------------------------------- An example as bytes

# Of each example: `num_graded` marks have a strength below 1; `most_marks` are at one position, and
# `most_written` where one set of a position counts as one;
# `lost_marks` and `lost_spans` lie beyond the target length that the table was made for; `flags`
# are the sum of those below.
COLUMNS = (
    *("num_inputs", "num_targets", "num_marks", "most_marks", "num_graded"),
    *("lost_marks", "lost_spans", "flags", "most_written"),
)
IS_CLEAN = 1  # nothing unwanted was said
KEEPS_TEXT = 2  # some text within the target length has a loss and is not marked
HAS_SPAN = 4  # a negative span marks a token within the target length

KEEPS_LAST_INPUT, _HAS_STRENGTHS, _HAS_MASK, _HAS_SETS = 1, 2, 4, 8
_SET_AT = np.dtype([("position", "<i4"), ("name", "<u8"), ("strength", "<f8")])


def to_bytes(example: Example, *, names_sets: bool = False) -> bytes:
    """All of an example but its `id` and `span_numbers`.

    Little-endian int32: the numbers of inputs, of targets and of marks, and a sum (1: `inputs` are
    cut before their last id, 2: there are strengths, 4: there is a loss mask, 8: there are sets);
    then the inputs, the targets, the marks as (position, id), the loss mask; and the strengths as
    float64. Of sets, their number as int32, then of each the position, the name and the strength,
    as int32, uint64 and float64.

    Args:
        example: what is written.
        names_sets: the marks of sets are not written out.
    """
    pairs, strengths, mask = example.negative_pairs, example.negative_strengths, example.loss_mask
    sets = example.sets if names_sets else ()
    if sets:
        is_left = ~_are_of_sets(pairs, strengths, sets)
        pairs = pairs[is_left]
        strengths = None if strengths is None else strengths[is_left]
    what = example.keeps_last_input * KEEPS_LAST_INPUT
    what += (strengths is not None) * _HAS_STRENGTHS + (mask is not None) * _HAS_MASK
    what += bool(sets) * _HAS_SETS
    numbers = [len(example.inputs), len(example.targets), len(pairs), what]
    parts = [np.array(numbers), example.inputs, example.targets, pairs]
    parts += [] if mask is None else [mask]
    content = b"".join([np.asarray(part, "<i4").tobytes() for part in parts])
    if strengths is not None:
        content += strengths.astype("<f8").tobytes()
    if sets:
        content += np.int32(len(sets)).astype("<i4").tobytes()
        content += np.array([one[:3] for one in sets], _SET_AT).tobytes()
    return content


def _are_of_sets(
    pairs: np.ndarray, strengths: np.ndarray | None, sets: Sequence[SetAt]
) -> np.ndarray:
    """Which marks, `[M]`, are those of sets: not where another mark of the id is stronger."""
    found = np.zeros(len(pairs), bool)
    for position, _, strength, ids in sets:
        here = slice(*np.searchsorted(pairs[:, 0], [position, position + 1]))
        is_as_strong = strength == (1 if strengths is None else strengths[here])
        found[here] |= np.isin(pairs[here, 1], ids) & is_as_strong
    return found


def marks_with_sets(
    example: Example, numbers: Mapping[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The marks of an example, of which those of one set at a position are one row.

    Args:
        example: what is marked.
        numbers: the number of each set, by its name; marks of other sets are written out.

    Returns:
        Rows (position, id), sorted, and the strength of each. The id -2 - n stands for all of set
        n; it is the first of its position.
    """
    pairs, strengths = example.negative_pairs, example.negative_strengths
    of_position = {one.position: one for one in reversed(example.sets) if one.name in numbers}
    if not of_position:
        return pairs, strengths
    sets = [of_position[position] for position in sorted(of_position)]
    is_left = ~_are_of_sets(pairs, strengths, sets)
    rows = np.array([(one.position, -2 - numbers[one.name]) for one in sets], np.int32)
    found = np.concatenate([rows, pairs[is_left]])
    order = np.argsort(found[:, 0], kind="stable")
    if strengths is not None:
        of_sets = np.array([one.strength for one in sets])
        strengths = np.concatenate([of_sets, strengths[is_left]])[order]
    return found[order], strengths


class Sets(NamedTuple):
    """Long sets of ids that examples share, for the device.

    Attributes:
        numbers: the number of each set, by its name.
        ids: the ids of each set, by its number; all are together what a device has once.
    """

    numbers: Mapping[int, int]
    ids: tuple[tuple[int, ...], ...]


_MOST_IN_SETS = 2**20  # ids of all sets, each as long as the longest: 4 MB


def sets_of(*data: Sequence[Example]) -> Sets:
    """The sets of all examples, in the order of their names; none where they are too large."""
    found: dict[int, np.ndarray] = {}
    for examples in data:
        if isinstance(examples, ExampleTable):
            found |= examples.sets()
        else:
            found |= {one.name: one.ids for example in examples for one in example.sets}
    if len(found) * max(map(len, found.values()), default=0) > _MOST_IN_SETS:
        return Sets({}, ())
    names = sorted(found)
    return Sets(
        {name: number for number, name in enumerate(names)},
        tuple(tuple(found[name].tolist()) for name in names),
    )


def from_bytes(content: bytes, sets: Mapping[int, np.ndarray] | None = None) -> tuple[Example, int]:
    """The inverse of `to_bytes`: the example, with all of its marks, and how many bytes it takes.

    Args:
        content: begins with what `to_bytes` wrote.
        sets: the ids of sets, `[K]` int32, by their names.

    Raises:
        ValueError: no example begins there, or one with a set that is not known.
    """
    num_inputs, num_targets, num_marks, what = np.frombuffer(content, "<i4", 4).tolist()
    counts = [num_inputs, num_targets, 2 * num_marks, num_targets * bool(what & _HAS_MASK)]
    end = 16 + 4 * sum(counts)
    size = end + 8 * num_marks * bool(what & _HAS_STRENGTHS)
    if min(counts) < 0 or size > len(content):
        raise ValueError(f"{len(content)} bytes for {counts} numbers")
    numbers = np.frombuffer(content, "<i4", (end - 16) // 4, 16)
    inputs, targets, pairs, mask = np.split(numbers, np.cumsum(counts[:3]))
    example = Example(
        inputs=inputs,
        targets=targets,
        negative_pairs=pairs.reshape(-1, 2),
        negative_strengths=np.frombuffer(content, "<f8", num_marks, end) if size > end else None,
        loss_mask=mask if what & _HAS_MASK else None,
        keeps_last_input=bool(what & KEEPS_LAST_INPUT),
    )
    if not what & _HAS_SETS:
        return example, size
    (number,) = np.frombuffer(content, "<i4", 1, size).tolist()
    named = np.frombuffer(content, _SET_AT, number, size + 4)
    return _with_sets(example, named, sets or {}), size + 4 + named.nbytes


def has_sets(content: bytes) -> bool:
    """Whether an example's bytes name sets."""
    return bool(np.frombuffer(content, "<i4", 4)[3] & _HAS_SETS)


def _with_sets(example: Example, named: np.ndarray, sets: Mapping[int, np.ndarray]) -> Example:
    """The example with the marks of sets, too."""
    try:
        of_sets = [sets[name] for name in named["name"].tolist()]
    except KeyError as error:
        raise ValueError(f"a set {error} that is not there") from None
    sizes = [len(ids) for ids in of_sets]
    pairs = np.stack([np.repeat(named["position"], sizes), np.concatenate(of_sets)], axis=1)
    strengths = example.negative_strengths
    if strengths is not None or (named["strength"] != 1).any():
        given = np.ones(len(example.negative_pairs)) if strengths is None else strengths
        strengths = np.concatenate([given, np.repeat(named["strength"], sizes)])
    pairs, strengths = unique_pairs(np.concatenate([example.negative_pairs, pairs]), strengths)
    at = tuple(
        SetAt(position, name, strength, ids)
        for (position, name, strength), ids in zip(named.tolist(), of_sets, strict=True)
    )
    return dataclasses.replace(example, negative_pairs=pairs, negative_strengths=strengths, sets=at)


def row_digest(content: bytes) -> bytes:
    """A fingerprint of what `to_bytes` made, 8 bytes."""
    return hashlib.blake2b(content, digest_size=8).digest()


def loss_mask_until(
    end: str,
    targets: np.ndarray,
    negative_pairs: np.ndarray,
    strengths: np.ndarray | None = None,
    span_numbers: np.ndarray | None = None,
) -> np.ndarray | None:
    """The loss mask of a target that counts up to an end.

    Args:
        end: one of LOSS_UNTIL. "first_negative" leaves no loss after the first token of a span, or
            that is itself removed, for what follows a mistake is the consequence of it. Ids that
            are removed beside another token are no mistake of the target's.
        targets: `[T]` token ids.
        negative_pairs: `[M, 2]` rows (position, id), sorted.
        strengths: `[M]`, of each; None where all are 1. An id that is only lowered, or raised, is
            no mistake unless a span marks it.
        span_numbers: `[T]`, above 0 where a span marks the token; None where there is no span.

    Returns:
        `[T]` int32; None where all tokens count.

    Raises:
        UsageError: no such end.
    """
    if end not in LOSS_UNTIL:
        raise UsageError(f"loss_until: expected one of {', '.join(LOSS_UNTIL)}, found {end!r}.")
    mistakes = _mistakes(targets, negative_pairs, strengths, span_numbers)
    if end == "end" or not len(mistakes):
        return None
    return (np.arange(len(targets)) <= mistakes[0]).astype(np.int32)


def says_removed(example: Example) -> bool:
    """Whether a target token is itself to be removed, or marked by a span."""
    pairs, strengths = example.negative_pairs, example.negative_strengths
    return bool(len(_mistakes(example.targets, pairs, strengths, example.span_numbers)))


def _mistakes(
    targets: np.ndarray,
    negative_pairs: np.ndarray,
    strengths: np.ndarray | None,
    span_numbers: np.ndarray | None,
) -> np.ndarray:
    """The positions whose target token is itself removed, or lowered because a span marks it."""
    positions, ids = negative_pairs.T
    is_mistake = ids == targets[positions]
    if strengths is not None:
        is_whole = strengths == 1
        if span_numbers is not None:
            is_whole |= span_numbers[positions] > 0
        is_mistake &= is_whole
    return positions[is_mistake]


def unique_pairs(
    pairs: np.ndarray, strengths: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Marks as an `Example` has them: sorted, each once, with the largest of its strengths.

    Args:
        pairs: `[N, 2]` rows (position, id).
        strengths: `[N]`, at most 1; None where all are 1.
    """
    # As one number each, which are in the same order.
    position, id_ = np.asarray(pairs, np.int32).reshape(-1, 2).astype(np.int64).T
    keys, places = np.unique((position << 32) + id_ + 2**31, return_inverse=True)
    found = np.stack([keys >> 32, (keys & (2**32 - 1)) - 2**31], axis=1).astype(np.int32)
    if strengths is None:
        return found, None
    largest = np.full(len(found), -np.inf)
    np.maximum.at(largest, places.reshape(-1), strengths)
    return found, None if (largest == 1).all() else largest


def id_of(value: Any) -> str:
    """The id of an example as a task of seqio has it: a text, or a number."""
    return value.decode() if isinstance(value, bytes) else str(value)


def digest(examples: Sequence[Example]) -> str:
    """A fingerprint of a data set: 16 hexadecimal digits; the order counts.

    Of more examples than `shuffling.LARGEST_TABLE` it begins with "rows-": it is made of their
    `row_digest`s. Runs of earlier versions, which had another order of so many, have no such one.
    """
    hashed = hashlib.sha256()
    if len(examples) > shuffling.LARGEST_TABLE:
        if isinstance(examples, ExampleTable):
            hashed.update(examples.row_digests().astype("<u8").tobytes())
        else:
            for example in examples:
                hashed.update(row_digest(to_bytes(example)))
        return f"rows-{hashed.hexdigest()[:16]}"
    for example in examples:
        arrays = (example.inputs, example.targets, example.negative_pairs, example.loss_mask)
        for array in arrays:
            hashed.update(b"-" if array is None else f"{array.shape} ".encode() + array.tobytes())
        if example.negative_strengths is not None:  # or the digests of other data would change
            hashed.update(b"strengths " + example.negative_strengths.tobytes())
    return hashed.hexdigest()[:16]


def max_negative_ids(examples: Sequence[Example], *, with_sets: bool = False) -> int:
    """The smallest `K` that holds every mark of the examples; at least 1.

    Args:
        examples: the data set.
        with_sets: one set of a position counts as one (`marks_with_sets`).
    """
    if isinstance(examples, ExampleTable):
        column = examples.column("most_written" if with_sets else "most_marks")
        return max(1, int(column.max(initial=0)))
    return max((most_at_one_position(e, with_sets=with_sets) for e in examples), default=1) or 1


def most_at_one_position(example: Example, *, with_sets: bool = False) -> int:
    """How many marks of an example are at one position, at most; see `max_negative_ids`."""
    pairs = example.negative_pairs
    if with_sets:
        pairs, _ = marks_with_sets(example, {one.name: 0 for one in example.sets})
    return int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0


def have_strengths(examples: Sequence[Example]) -> bool:
    """Whether any mark of the examples has a strength below 1."""
    if isinstance(examples, ExampleTable):
        return count_graded(examples) > 0
    return any(example.negative_strengths is not None for example in examples)


def check_token_ids(examples: Sequence[Example], num_embeddings: int) -> None:
    """Raises a UsageError when an id has no embedding: JAX would silently take another row's."""
    if isinstance(examples, ExampleTable) and examples.has_ids_below(num_embeddings):
        return
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


def position_without_ids(
    pairs: np.ndarray,
    strengths: np.ndarray | None,
    num_ids: int,
    everywhere: np.ndarray | None = None,
) -> int | None:
    """The first position at which all ids of a vocabulary are removed; None if there is none.

    Args:
        pairs: `[M, 2]` rows (position, id), each once.
        strengths: `[M]`, of each; None where all are 1. Below 1 an id is not removed altogether.
        num_ids: ids of the vocabulary.
        everywhere: `[K]`, ids that are removed at every position, each once; None is no id.
    """
    num_everywhere = 0 if everywhere is None else len(everywhere)
    if len(pairs) + num_everywhere < num_ids:  # nearly always
        return None
    positions, ids = pairs.T
    is_removed = np.ones(len(pairs), bool) if strengths is None else strengths == 1
    if everywhere is not None:
        is_removed &= ~np.isin(ids, everywhere)
    found = np.flatnonzero(np.bincount(positions[is_removed]) + num_everywhere >= num_ids)
    return int(found[0]) if len(found) else None


def check_ids_are_left(
    examples: Sequence[Example], removed_everywhere: Sequence[int], num_ids: int
) -> None:
    """Raises a UsageError where marks leave no id of a vocabulary that a model could say.

    Args:
        examples: the data set.
        removed_everywhere: ids that are removed at every position, beside the marks.
        num_ids: ids of the vocabulary.
    """
    everywhere = np.unique(np.array(removed_everywhere, np.int32))
    everywhere = everywhere[everywhere < num_ids]
    if len(everywhere) == num_ids:
        raise UsageError(
            f"removed_everywhere: expected ids that leave one of the vocabulary's {num_ids}, found "
            "all of them. Leave out what may be said."
        )
    is_table = isinstance(examples, ExampleTable)
    most = examples.column("most_marks") if is_table else num_marks_of(examples)
    for index in np.flatnonzero(most + len(everywhere) >= num_ids):
        (example,) = take(examples, np.array([index]))
        pairs, strengths = example.negative_pairs, example.negative_strengths
        position = position_without_ids(pairs, strengths, num_ids, everywhere)
        if position is not None:
            raise no_id_is_left(f"example {example.id!r}", position, num_ids, len(everywhere))


def no_id_is_left(where: str, position: int, num_ids: int, num_everywhere: int = 0) -> UsageError:
    """The error of a position at which all ids are removed, some of them perhaps everywhere."""
    beside = f" ({num_everywhere} of them everywhere)" if num_everywhere else ""
    return UsageError(
        f"{where}: position {position}: expected an id that may be said there, found all {num_ids} "
        f"ids of the vocabulary removed{beside}. Take out of negative_token_ids what may stay, or "
        "give it a strength below 1."
    )


class Selection(NamedTuple):
    """What `select_clean` kept."""

    examples: Sequence[Example]
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
        seed: random seed of the sample.

    Raises:
        UsageError: no example has a mark, or `clean_per_marked` is negative.
    """
    if clean_per_marked < 0:
        raise UsageError(f"clean_per_marked: expected 0 or more, found {clean_per_marked}.")
    is_marked = num_marks_of(examples) > 0
    clean = np.flatnonzero(~is_marked)
    num_marked = len(examples) - len(clean)
    if not num_marked:
        raise UsageError(
            f"clean_per_marked={clean_per_marked} needs marked examples, but none of the "
            f"{len(examples)} has a negative token. Were they annotated?"
        )
    num_clean_kept = min(len(clean), round(clean_per_marked * num_marked))
    rng = np.random.default_rng(seed)
    is_kept = np.ones(len(examples), bool)
    is_kept[rng.permutation(clean)[num_clean_kept:]] = False
    indices = np.flatnonzero(is_kept)
    return Selection(
        examples=subset(examples, indices),
        num_marked=num_marked,
        num_clean=len(clean),
        num_clean_kept=num_clean_kept,
    )


def subset(examples: Sequence[Example], indices: np.ndarray) -> Sequence[Example]:
    """Some of the examples, as they are kept."""
    if isinstance(examples, ExampleTable):
        return examples.subset(indices)
    return take(examples, indices)
