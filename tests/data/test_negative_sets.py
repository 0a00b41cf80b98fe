"""Long sets of ids are written once, beside the records, and are the same ids when read."""

import dataclasses
import json
import pathlib
import re

import pytest
from helpers import rooms

from tnt_jax.data import examples, negative_sets, records, removed_everywhere
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

LONG, OTHER, SHORT = tuple(range(5, 45)), tuple(range(100, 16, -4)), (7, 8)


def row(name, *entries):
    return records.Record(id=name, inputs="in", targets="out", negative_token_ids=entries)


ROWS = [
    row("a", (0, SHORT), (3, LONG)),
    row("b", (1, LONG), (1, OTHER, 0.5), (1, SHORT, 0.25), (1, LONG, -2.5)),
    row("c", (2, OTHER)),
    row("d"),
]


@pytest.fixture
def path(tmp_path):
    removed_everywhere.write_records(tmp_path / "a.jsonl", ROWS, None)
    return tmp_path / "a.jsonl"


def test_a_long_set_is_written_once_and_short_ones_with_their_records(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    table = [
        json.loads(line) for line in pathlib.Path(f"{path}.sets.jsonl").read_text().split("\n")[:-1]
    ]
    assert [tuple(one["ids"]) for one in table] == [LONG, OTHER]
    long, other = (one["set"] for one in table)
    assert [(line.get("negative_token_ids"), line.get("negative_set")) for line in lines] == [
        ([[0, [7, 8]]], [[3, long]]),
        ([[1, [7, 8], 0.25]], [[1, long], [1, other, 0.5], [1, long, -2.5]]),
        (None, [[2, other]]),
        (None, None),
    ]
    found = records.read_records(path)
    assert found == ROWS
    # However many records there are, the ids are in memory once.
    assert len({id(ids) for one in found for _, ids, *_ in one.negative_token_ids}) == 4


def test_records_without_their_table_have_the_ids_written_out(path, tmp_path):
    """What other programs read, and what was written before there were tables."""
    records.write_records(tmp_path / "whole.jsonl", records.iterate(path))
    assert (
        list(LONG)
        == json.loads((tmp_path / "whole.jsonl").read_text().splitlines()[0])["negative_token_ids"][
            1
        ][1]
    )
    assert records.read_records(tmp_path / "whole.jsonl") == ROWS
    assert not pathlib.Path(negative_sets.file_of(str(tmp_path / "whole.jsonl"))).exists()


def test_files_of_one_pattern_have_a_table_each(path, tmp_path):
    removed_everywhere.write_records(tmp_path / "b.jsonl", [row("e", (0, OTHER))], None)
    for pattern in ("?.jsonl", "*.jsonl", "*", "**/*.jsonl"):  # of which some match the tables
        assert records.read_records(tmp_path / pattern) == [*ROWS, row("e", (0, OTHER))]
    (table,) = files.matching_files(tmp_path / "a.jsonl.sets.jsonl")  # who names one means it
    assert table == tmp_path / "a.jsonl.sets.jsonl"
    message = r"no file matches it as a pattern \(names that end in \.sets\.jsonl do not count: "
    with pytest.raises(UsageError, match=message):
        records.read_records(tmp_path / "*.sets.jsonl")


def test_a_table_goes_with_the_records_that_it_belonged_to(path):
    removed_everywhere.write_records(path, ROWS[3:], None)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.jsonl"]


def test_what_fails_half_way_changes_neither(path):
    def rows():
        yield row("x", (0, tuple(range(200, 300))))
        raise ZeroDivisionError

    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with pytest.raises(ZeroDivisionError):
        removed_everywhere.write_records(path, rows(), None)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table.unlink(),
            r"a\.jsonl:1: negative_set: expected the sets that it names in \S+a\.jsonl\.sets\.jsonl"
            r", which is not there\. Keep that file beside the records, or annotate again\.$",
        ),
        (
            lambda table: table.write_text("".join(table.read_text().splitlines(True)[1:])),
            r"a\.jsonl:1: negative_set: expected a set that \S+ has, found '[0-9a-f]{16}'\.",
        ),
        (
            lambda table: table.write_text(table.read_text().replace("[5, 6,", "[6,")),
            r"sets\.jsonl:1: expected the ids of the set [0-9a-f]{16}, found others\.",
        ),
        (
            lambda table: table.write_text("nothing\n"),
            r'sets\.jsonl:1: expected a line that annotate wrote, \{"set": "\.\.\.", "ids": ',
        ),
    ],
    ids=["not there", "cut short", "changed", "something else"],
)
def test_sets_that_are_not_those_of_the_records_are_refused(path, change, message):
    change(pathlib.Path(negative_sets.file_of(str(path))))
    with pytest.raises(UsageError, match=message) as caught:
        records.read_records(path)
    assert "\n" not in str(caught.value)


def test_a_name_at_no_position_is_named(path):
    line = json.loads(path.read_text().splitlines()[0])
    for bad in ([[3]], [[3, 5]], [["3", "x"]], "x"):
        path.write_text(json.dumps({**line, "negative_set": bad}))
        with pytest.raises(
            UsageError, match=r"a\.jsonl:1: negative_set: expected a list of \[posi"
        ):
            records.read_records(path)
    name = line["negative_set"][0][1]
    path.write_text(json.dumps({**line, "target_ids": [1], "negative_set": [[3, name]]}))
    with pytest.raises(UsageError, match=re.escape("negative_token_ids has position 3; expected")):
        records.read_records(path)


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_is_the_same_whether_sets_are_shared_or_written_out(tmp_path, monkeypatch):
    """In the metrics of updates and evaluations, from records that name them or not."""
    monkeypatch.chdir(tmp_path)
    rooms.write_world(tmp_path)
    some, others = tuple(range(6, 30)), tuple(range(12, 38))
    rows = [
        dataclasses.replace(
            marked,
            negative_token_ids=((1, some), (2, others, 0.5), (2, (3,)))[: number % 4],
        )
        for number, marked in enumerate(rooms.marked_corpus())
    ]
    removed_everywhere.write_records("named.jsonl", rows, None)
    records.write_records("written.jsonl", rows)
    with rooms.devices_seen():
        rooms.train_original("original", 1)
        for name, most_in_sets in (("named", examples._MOST_IN_SETS), ("written", 0)):
            monkeypatch.setattr(examples, "_MOST_IN_SETS", most_in_sets)
            settings = {"RECORDS": f"{name}.jsonl", "MODEL_DIR": name, "TRAIN_STEPS": 2}
            settings |= {"EVAL_DATASET": "@eval/datasets.RecordFiles()", "EVAL_EVERY": 2}
            settings |= {"eval/datasets.RecordFiles.files": f"{name}.jsonl", "LOG_EVERY": 1}
            assert rooms.run("train", settings) == 0
    lines = [pathlib.Path(name, "metrics.jsonl").read_text() for name in ("named", "written")]
    found, expected = ([json.loads(line) for line in one.splitlines()] for one in lines)
    for one, other in zip(found, expected, strict=True):
        keys = [key for key in other if re.search("loss|num|mass|norm", key)]
        assert any("loss" in key for key in keys) and any("mass" in key for key in keys)
        for key in keys:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
