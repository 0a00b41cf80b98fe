"""Marks of a record that no model could be trained on."""

import pytest

from tnt_jax.data import marks, records
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

VOCABULARY = tokenization.Bytes()  # id = byte + 3
ALL = tuple(range(VOCABULARY.size))
A = ord("a") + 3


def example(*entries, spans=()):
    record = records.Record(
        id="it", inputs="in", targets="aa", negative_spans=spans, negative_token_ids=entries
    )
    return marks.example_from_record(record, VOCABULARY, "whole", "end")[0]


@pytest.mark.parametrize(
    ("entries", "spans"),
    [
        ([(1, ALL)], ()),
        # Several lists together, some of them raised or lowered as well.
        ([(1, ALL[:100]), (1, ALL[90:]), (1, ALL[:3], -2.0), (1, ALL[5:200], 0.5)], ()),
        # All but what was said, which the span removes.
        ([(1, tuple(i for i in ALL if i != A))], [(1, 2)]),
    ],
)
def test_a_position_at_which_nothing_may_be_said_is_refused(entries, spans):
    expected = (
        f"record 'it': position 1: expected an id that may be said there, found all {len(ALL)} ids "
        "of the vocabulary removed. Take out of negative_token_ids what may stay, or give it a "
        "strength below 1."
    )
    with pytest.raises(UsageError) as error:
        example(*entries, spans=spans)
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "entries",
    [
        [(1, ALL[1:])],
        [(1, ALL[:-1]), (1, ALL[-1:], 0.99)],
        [(1, ALL[:-1]), (1, ALL[-1:], -1.0)],
        [(1, ALL, 0.5)],
        # As many, at two positions.
        [(0, ALL[:-1]), (1, ALL[:-1])],
    ],
)
def test_a_position_at_which_one_id_may_be_said_is_trained_on(entries):
    assert len(example(*entries).negative_pairs) >= len(ALL) - 1
