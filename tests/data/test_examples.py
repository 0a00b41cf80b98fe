"""What a data set is asked before it is trained on."""

import numpy as np
import pytest

from tnt_jax.data import datasets, marks, records
from tnt_jax.data.examples import ExampleTable, check_ids_are_left
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

VOCABULARY = tokenization.Bytes()  # id = byte + 3
LENGTHS = {"inputs": 8, "targets": 8}


def rows():
    """The last one has all but the last ten ids at position 1: two of them graded, one raised."""
    few, most = (3, 4), tuple(range(VOCABULARY.size - 12))
    graded = tuple(range(len(most), len(most) + 2))
    entries = {
        "clean": (),
        "few": ((0, few), (1, few)),
        "most": ((0, few), (1, most), (1, graded, 0.5), (0, (250,), -1.0)),
    }
    return [
        records.Record(
            id=name, inputs="in", targets="ab", negative_spans=(), negative_token_ids=of_row
        )
        for name, of_row in entries.items()
    ]


@pytest.fixture(params=["in memory", "in files"])
def examples(request, tmp_path):
    if request.param == "in memory":
        return marks.examples_from_records(rows(), VOCABULARY, "here")
    records.write_records(tmp_path / "rows.jsonl", rows())
    given = datasets.RecordFiles(files=str(tmp_path / "rows.jsonl"), vocabulary=VOCABULARY)
    found = given.make(LENGTHS, [str(tmp_path / "examples")])
    assert isinstance(found, ExampleTable)
    return found


def test_ids_that_are_removed_everywhere_count_beside_the_marks(examples):
    last = [*range(VOCABULARY.size - 12, VOCABULARY.size)]
    check_ids_are_left(examples, (), VOCABULARY.size)
    for some in (last[1:], last[:-1], [*last[2:], *range(20)]):
        check_ids_are_left(examples, some, VOCABULARY.size)
    expected = (
        "example 'most': position 1: expected an id that may be said there, found all 259 ids of "
        r"the vocabulary removed \(12 of them everywhere\). Take out of negative_token_ids"
    )
    # Ids beyond the vocabulary are others' business.
    with pytest.raises(UsageError, match=expected):
        check_ids_are_left(examples, [*last, last[0], 400], VOCABULARY.size)


def test_ids_that_are_removed_everywhere_leave_one_by_themselves(examples):
    all_but_one = np.arange(VOCABULARY.size - 1).tolist()
    clean = [example for example in examples if not len(example.negative_pairs)]
    check_ids_are_left(clean, all_but_one, VOCABULARY.size)
    with pytest.raises(UsageError, match="removed_everywhere: expected ids that leave one of the"):
        check_ids_are_left(clean, [*all_but_one, VOCABULARY.size - 1], VOCABULARY.size)
