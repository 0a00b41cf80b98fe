import copy
import dataclasses
import json
import pickle
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from tnt_jax.data import records
from tnt_jax.runtime import files
from tnt_jax.runtime.errors import UsageError

FULL_LINE = {
    "id": "venue-7",
    "inputs": "name[Ask] area[riverside]",
    "targets": "Ask is 😀 by the café.",
    "target_ids": [31, 5, 9, 1],
    "negative_spans": [[7, 8], [16, 20]],
    "negative_token_ids": [[1, [7, 8]], [3, [2]]],
    "annotator": "gazetteer v1",
    "score": {"bleu": [1, None]},
}


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_full_record_is_read_as_written(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", json.dumps(FULL_LINE), "")
    (record,) = records.read_records(path)
    assert record == records.Record(
        id="venue-7",
        inputs="name[Ask] area[riverside]",
        targets="Ask is 😀 by the café.",
        target_ids=(31, 5, 9, 1),
        negative_spans=((7, 8), (16, 20)),
        negative_token_ids=((1, (7, 8)), (3, (2,))),
        annotator="gazetteer v1",
        extra={"score": {"bleu": [1, None]}},
    )
    # Offsets are code points: the emoji is one, "é" is one.
    assert [record.targets[s:e] for s, e in record.negative_spans] == ["😀", "café"]
    assert record.to_json() == FULL_LINE


def test_strengths_are_read_as_written_and_1_is_no_strength(tmp_path):
    fields = {
        "id": "a",
        "inputs": "x",
        "targets": "abcd",
        "negative_spans": [[0, 1], [1, 2, 0.25], [2, 3, 1], [3, 4, 1.0]],
        "negative_token_ids": [
            [0, [7, 8], 0.5],
            [0, [9]],
            [1, [7], 1],
            [2, [7], -99],
            [2, [8], -0.5],
        ],
    }
    path = write_lines(tmp_path / "a.jsonl", json.dumps(fields))
    (record,) = records.read_records(path)
    assert record.negative_spans == ((0, 1), (1, 2, 0.25), (2, 3), (3, 4))
    raised = ((2, (7,), -99.0), (2, (8,), -0.5))
    assert record.negative_token_ids == ((0, (7, 8), 0.5), (0, (9,)), (1, (7,)), *raised)
    assert record.offsets == ((0, 1), (1, 2), (2, 3), (3, 4))
    assert record.to_json() == fields | {
        "negative_spans": [[0, 1], [1, 2, 0.25], [2, 3], [3, 4]],
        "negative_token_ids": [
            [0, [7, 8], 0.5],
            [0, [9]],
            [1, [7]],
            [2, [7], -99.0],
            [2, [8], -0.5],
        ],
    }


@pytest.mark.parametrize(
    ("spans", "ids", "has_text", "is_said"),
    [
        (None, (), False, False),
        ((), (), False, False),
        (((0, 1),), (), True, True),
        (((0, 1, 0.01),), (), True, True),
        ((), ((0, (7,)),), False, True),  # its own id
        ((), ((0, (7,), 0.9999),), False, False),  # lowered
        ((), ((0, (7,), -0.5),), False, False),  # raised
        ((), ((0, (5, 9)), (1, (7,))), False, False),  # others than are said there
    ],
)
def test_text_that_is_unwanted_is_told_from_whatever_is_said_and_marked(
    spans, ids, has_text, is_said
):
    row = records.Record(
        **{"id": "a", "inputs": "", "targets": "x y", "target_ids": (7, 1)},
        **{"negative_spans": spans, "negative_token_ids": ids},
    )
    assert (row.has_unwanted_text, row.says_unwanted) == (has_text, is_said)


def test_not_annotated_and_nothing_unwanted_stay_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    annotated = records.Record(id="a", inputs="x", targets="y", negative_spans=())
    unknown = records.Record(id="b", inputs="x", targets="y", negative_spans=None)
    records.write_records(path, [annotated, unknown])
    assert [r.negative_spans for r in records.read_records(path)] == [(), None]


def test_prompts_need_only_inputs_and_get_an_id(tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", '{"inputs": "one"}', "", '{"inputs": "two"}')
    assert records.read_records(path) == [
        records.Record(id="prompts:1", inputs="one"),
        records.Record(id="prompts:3", inputs="two"),
    ]


@pytest.mark.parametrize("more", [{}, {"kept": 1}])
def test_an_id_may_be_an_integer(tmp_path, more):
    line = json.dumps({"id": 7, "inputs": "one", "targets": "two", **more})
    (found,) = records.read_records(write_lines(tmp_path / "a.jsonl", line))
    assert found.id == "7"


@pytest.mark.parametrize("more", [{}, {"kept": 1}])
def test_an_empty_output_is_none_of_no_output(tmp_path, more):
    """A model may end at once. That is an output, and stays one when it is written again."""
    rows = [
        {"id": "ended", "inputs": "one", "targets": ""},
        {"id": "prompt", "inputs": "one"},
        {"id": "null", "inputs": "one", "targets": None},
        {"id": "ids", "inputs": "one", "target_ids": [1]},
        {"id": "said", "prompt": "one", "completion": ""},
    ]
    lines = [json.dumps(row | more) for row in rows]
    found = records.read_records(write_lines(tmp_path / "a.jsonl", *lines))
    written = tmp_path / "b.jsonl"
    records.write_records(written, copy.deepcopy(found))
    fields = [json.loads(line) for line in written.read_text().splitlines()]
    for rows in (found, records.read_records(written), pickle.loads(pickle.dumps(found))):
        assert [row.id for row in rows if row.is_prompt] == ["prompt", "null"]
        assert [row.targets for row in rows] == [""] * 5
    assert [one.get("targets", "none") for one in fields] == ["", "none", "none", "", ""]
    for row in found:
        if row.is_prompt:
            with pytest.raises(UsageError, match=r"has no targets\. Expected outputs"):
                records.check_trainable(row, "a.jsonl", annotated=False)
        else:
            records.check_trainable(row, "a.jsonl", annotated=False)
    assert records.Record(id="a", inputs="", targets="").is_prompt is False
    assert dataclasses.replace(found[1], targets="text").is_prompt is False
    # Of a stopped run: what it was given has not become something else.
    assert records.digest(found[1:2]) == records.digest(
        [dataclasses.replace(found[0], id="prompt")]
    )


BY_ID = "match=id, unmatched=error"


@pytest.mark.parametrize(
    ("before", "after", "is_same"),
    [
        # Whoever marks the outputs of two models has a file of each.
        (f"Spans(m1.jsonl:0123456789ab, {BY_ID})", f"Spans(m2.jsonl:ba9876543210, {BY_ID})", True),
        (
            f"Spans(m1.jsonl:0123456789ab, {BY_ID})",
            "Spans(a, b.csv:ba9876543210, match=text, unmatched=leave_out)",
            True,
        ),
        # Another list is another measure, and so is who marked.
        ("Lexicon(w.txt:0123456789ab)", "Lexicon(w.txt:ba9876543210)", False),
        (f"Spans(m1.jsonl:0123456789ab, {BY_ID})", "Lexicon(w.txt:0123456789ab)", False),
        (f"Spans(m1.jsonl:0123456789ab, {BY_ID})", "", False),
        (
            f"Noisy(Spans(m.jsonl:0123456789ab, {BY_ID}), miss_rate=0.1)",
            f"Noisy(Spans(m.jsonl:0123456789ab, {BY_ID}), miss_rate=0.2)",
            False,
        ),
    ],
)
def test_which_annotators_measure_the_same(tmp_path, before, after, is_same):
    paths = []
    for name, annotator in (("before", before), ("after", after)):
        paths.append(tmp_path / f"{name}.jsonl")
        row = records.Record(
            id="a", inputs="x", targets=name, negative_spans=(), annotator=annotator
        )
        records.write_records(paths[-1], [row])
    if is_same:
        one, other = records.read_pairs(*paths)
        assert (one[0].targets, other[0].targets) == ("before", "after")
        told = records.annotator_of(one[0], other[0])
        assert told == f"{before} (original), {after} (patched)"
        assert records.annotator_of(one[0], one[0]) == before
        return
    with pytest.raises(UsageError) as raised:
        records.read_pairs(*paths)
    assert str(raised.value) == (
        f"record 'a' has another annotator in {paths[1]}, {after or 'none that is named'}, than in "
        f"{paths[0]}, {before}: another one marks other things. Annotate both alike."
    )


def test_outputs_for_other_inputs_are_no_pair(tmp_path):
    for name in ("one", "other"):
        row = records.Record(id="a", inputs=name, targets="t", negative_spans=(), annotator=name)
        records.write_records(tmp_path / f"{name}.jsonl", [row])
    with pytest.raises(
        UsageError,
        match=r"record 'a' has other inputs in .*other\.jsonl, 'other' \(str\), than in "
        r".*one\.jsonl, 'one' \(str\)\. Generate both from the same prompts\.",
    ):
        records.read_pairs(tmp_path / "one.jsonl", tmp_path / "other.jsonl")


def test_a_glob_reads_all_files_in_order(tmp_path):
    for name in ("part-1.jsonl", "part-0.jsonl", "other.jsonl"):
        write_lines(tmp_path / name, json.dumps({"inputs": name}))
    found = records.read_records(tmp_path / "part-*.jsonl")
    assert [r.inputs for r in found] == ["part-0.jsonl", "part-1.jsonl"]


texts = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def record_fields(draw):  # not records: run-time type checks draw random numbers of their own
    targets = draw(texts)
    bounds = st.tuples(*[st.integers(0, len(targets))] * 2).filter(lambda b: b[0] < b[1])
    spans = st.lists(bounds, max_size=3) if targets else st.just([])
    ids = draw(st.none() | st.lists(st.integers(0, 99), max_size=5).map(tuple))
    positions = st.integers(0, len(ids) - 1 if ids else 0)
    entry = st.tuples(positions, st.lists(st.integers(0, 99), min_size=1, max_size=2).map(tuple))
    return {
        "id": draw(texts),
        "inputs": draw(texts),
        "targets": targets,
        "target_ids": ids,
        "negative_spans": draw(st.none() | spans.map(tuple)),
        "negative_token_ids": () if ids == () else draw(st.lists(entry, max_size=2).map(tuple)),
        "annotator": draw(texts),
        "extra": draw(st.dictionaries(st.sampled_from(["mine", "extra"]), st.integers())),
    }


@hypothesis.given(st.lists(record_fields(), min_size=1, max_size=4, unique_by=lambda f: f["id"]))
def test_writing_then_reading_changes_nothing(tmp_path_factory, fields):
    written = [records.Record(**f) for f in fields]
    path = tmp_path_factory.mktemp("round_trip") / "deep" / "er" / "a.jsonl"
    records.write_records(path, written)
    assert records.read_records(path) == written


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", '{"inputs": "old"}')

    def broken():
        yield records.Record(id="new", inputs="new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        records.write_records(path, broken())
    assert [r.inputs for r in records.read_records(path)] == ["old"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": "x"', "not JSON"),
        ("[1, 2]", "expected a JSON object, found"),
        ('{"targets": "x"}', "'inputs' is missing"),
        ('{"inputs": 3}', "inputs: expected a string of Unicode text, found 3 (int)"),
        ('{"inputs": "\\ud800"}', "inputs: expected a string of Unicode text"),
        ('{"inputs": "x", "note": ["\\udc00"]}', "note: expected a string of Unicode text"),
        ('{"inputs": null}', "'inputs' is missing"),
        ('{"inputs": ' + "[" * 100_000, "JSON that cannot be read: nested too deeply"),
        ('{"inputs": ' + "1" * 5000 + "}", "JSON that cannot be read: a number is too long"),
        (
            '{"inputs": "x", "score": NaN}',
            "score: expected finite numbers, found NaN, which JSON does not have. Write null, or "
            "leave the field out.",
        ),
        ('{"inputs": "x", "a": 0.5, "b": {"c": [1, -Infinity]}}', "b: expected finite numbers"),
        ('{"inputs": "x", "b": 1e999}', "b: expected finite numbers, found 1e999, which is more"),
        ('{"inputs": "x", "target_ids": [Infinity]}', "target_ids: expected finite numbers"),
        ('{"inputs": NaN, "score": }', "expected finite numbers, found NaN"),
        ("NaN", "expected finite numbers, found NaN"),
        ('{"inputs": "x", "target_ids": [2147483648]}', "target_ids: expected a list of token ids"),
        ('{"inputs": "x", "id": 3.5}', "id: expected a string"),
        ('{"inputs": "x", "id": true}', "id: expected a string"),
        ('{"inputs": "x", "target_ids": "12"}', "target_ids: expected a list of token ids"),
        ('{"inputs": "x", "target_ids": [1, true]}', "target_ids: expected a list of token ids"),
        ('{"inputs": "x", "target_ids": [1, -2]}', "target_ids: expected a list of token ids"),
        # Where the value is too long to be shown, what is wrong with it is.
        (
            f'{{"inputs": "x", "target_ids": [{"7, " * 40}"8"]}}',
            "... (list). (Expected `int`, got `str` - at `$.target_ids[40]`.)",
        ),
        ('{"inputs": "x", "negative_spans": [3, 4]}', "negative_spans: expected a list of [start"),
        ('{"inputs": "x", "negative_spans": [[0, 1.0]]}', "negative_spans: expected a list"),
        (
            '{"inputs": "x", "targets": "né", "negative_spans": [[0, 3]]}',
            "negative_spans has [0, 3], but targets has 2 characters. (It has 3 bytes of UTF-8: "
            "were those counted?)",
        ),
        (
            '{"inputs": "x", "targets": "a😀", "negative_spans": [[0, 3]]}',
            "targets has 2 characters. (It has 3 UTF-16 units, as in JavaScript: were those",
        ),
        (
            '{"inputs": "x", "targets": "abcd", "negative_spans": [[3, 1]]}',
            "counted in Unicode code points (not bytes), end exclusive",
        ),
        (
            '{"inputs": "x", "targets": "ab", "negative_spans": [[1, 1]]}',
            "negative_spans has [1, 1]",
        ),
        ('{"inputs": "x", "negative_token_ids": [[0, 5]]}', "negative_token_ids: expected a list"),
        (
            '{"inputs": "x", "target_ids": [5, 1], "negative_token_ids": [[2, [5]]]}',
            "negative_token_ids has position 2",
        ),
        (
            '{"inputs": "x", "negative_token_ids": [[-1, [5]]]}',
            "negative_token_ids has position -1",
        ),
        ('{"inputs": "x", "id": "first:1"}', "the id 'first:1' was used before, at"),
        *(
            (
                f'{{"id": "a", "inputs": "", "targets": "abc", "negative_spans": [[0, 2, {one}]]}}',
                f"record 'a': negative_spans has the strength {shown} in [0, 2, {value}]: expected "
                "a number above 0 and at most 1.",
            )
            for one, value, shown in (
                ("0", "0", "0 (int)"),
                ("1.5", "1.5", "1.5 (float)"),
                ("-0.5", "-0.5", "-0.5 (float)"),
                ("true", "True", "True (bool)"),
                ('"0.5"', "'0.5'", "'0.5' (str)"),
                ("null", "None", "None (NoneType)"),
            )
        ),
        (
            '{"inputs": "x", "targets": "abc", "negative_spans": [[0, 2, NaN]]}',
            "negative_spans: expected finite numbers, found NaN",
        ),
        (
            '{"inputs": "x", "targets": "abc", "negative_spans": [[0, 2, 0.5, 1]]}',
            "negative_spans: expected a list of [start, end] code point offsets, or [start, end, "
            "strength], found",
        ),
        (
            '{"id": "a", "inputs": "x", "negative_token_ids": [[0, [5], 2]]}',
            "record 'a': negative_token_ids has the strength 2 (int) in [0, (5,), 2]: expected",
        ),
        *(
            (
                f'{{"id": "a", "inputs": "x", "negative_token_ids": [[0, [5], {one}]]}}',
                f"record 'a': negative_token_ids has the strength {one} (int) in [0, (5,), {one}]: "
                "expected a number above 0 and at most 1, or one from -99 to below 0, which raises "
                "the ids.",
            )
            for one in ("0", "-100")
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "first.jsonl", '{"inputs": "fine"}', line)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        records.read_records(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def no_json(literal):
    raise AssertionError(f"{literal} is not JSON")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_does_not_have_is_not_written(tmp_path, number):
    path = write_lines(tmp_path / "a.jsonl", '{"inputs": "old"}')
    row = records.Record(id="r", inputs="x", extra={"fine": 1.5, "values": ({"of": [0, number]},)})
    message = f"record 'r': values: expected finite numbers, found {number}"
    with pytest.raises(UsageError, match=re.escape(message)):
        records.write_records(path, [row])
    assert path.read_text() == '{"inputs": "old"}\n'


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(texts, parts, max_size=3),
    max_leaves=8,
)


@hypothesis.given(st.dictionaries(texts.map("my {}".format), values, max_size=4))
def test_what_is_read_is_json_for_others_too(extra):
    """Either as it is written, or not at all; `json` writes NaN and Infinity unasked."""
    line = json.dumps({"inputs": "x", **extra})
    try:
        json.loads(line, parse_constant=no_json)
    except AssertionError:
        with pytest.raises(UsageError, match=r"^rows:3: my .*: expected finite numbers, found "):
            files.parse_line(line.encode(), "rows:3")
        return
    row = records.Record.from_json(files.parse_line(line.encode(), "rows:3"), "rows:3")
    assert row.extra == extra
    written = json.loads(row.to_line(), parse_constant=no_json)
    assert {name: written[name] for name in extra} == extra


def test_the_mark_that_windows_begins_a_file_with_is_left_out(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"inputs": "one"}\r\n{"inputs": "two"}\r\n')
    assert [record.inputs for record in records.read_records(path)] == ["one", "two"]


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"inputs": "fine"}\n{"inputs": "caf\xe9"}\n')
    with pytest.raises(UsageError, match=r"latin\.jsonl:2: not UTF-8"):
        records.read_records(path)


def test_an_id_used_in_two_files_is_named(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_lines(tmp_path / name, '{"id": "same", "inputs": "x"}')
    with pytest.raises(
        UsageError, match=r"b\.jsonl:1: the id 'same' was used before, at .*a\.jsonl:1"
    ):
        records.read_records(tmp_path / "*.jsonl")


def test_missing_and_empty_files_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        records.read_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(UsageError, match="no such file"):
        records.read_records(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UsageError, match="expected records, found none"):
        records.read_records(tmp_path / "empty.jsonl")


# --- A look at all records, which keeps none ------------------------------------------------------


def test_a_survey_finds_the_mistakes_that_reading_finds(tmp_path):
    for name, other in (("a.jsonl", "one"), ("b.jsonl", "two")):
        write_lines(tmp_path / name, f'{{"id": "{other}", "inputs": "x"}}', '{"inputs": "y"}')
    assert records.survey(tmp_path / "*.jsonl").num_records == 4
    write_lines(tmp_path / "c.jsonl", '{"id": "one", "inputs": "x"}')
    (tmp_path / "empty.jsonl").touch()
    for pattern in ("*.jsonl", "empty.jsonl", "nowhere.jsonl"):
        said = []
        for read in (records.survey, records.read_records):
            with pytest.raises(UsageError) as caught:
                read(tmp_path / pattern)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_ids_that_have_one_hash_are_compared(tmp_path, monkeypatch):
    """Two different ids may have the same hash, for a hash has eight bytes."""
    monkeypatch.setattr(records, "hash", len, raising=False)
    path = write_lines(tmp_path / "a.jsonl", *(f'{{"id": "{n}", "inputs": ""}}' for n in "123"))
    assert records.survey(path).num_records == 3
    write_lines(path, *(f'{{"id": "{n}", "inputs": ""}}' for n in "1232"))
    with pytest.raises(UsageError, match=r"a\.jsonl:4: the id '2' was used before, at \S+:2\."):
        records.survey(path)


def test_a_survey_tells_records_apart(tmp_path):
    lines = ['{"id": "a", "inputs": "x"}', '{"id": "b", "inputs": "y"}']
    first = records.survey(write_lines(tmp_path / "a.jsonl", *lines))
    assert records.survey(write_lines(tmp_path / "a.jsonl", "", *lines, "")) == first
    for others in (lines[::-1], lines[:1], [lines[0], lines[1].replace("y", "z")]):
        assert records.survey(write_lines(tmp_path / "a.jsonl", *others)).digest != first.digest
    # Without an id of its own, a record's is made of the place.
    without = records.survey(write_lines(tmp_path / "a.jsonl", '{"inputs": "x"}'))
    assert records.survey(write_lines(tmp_path / "b.jsonl", '{"inputs": "x"}')) != without


@pytest.mark.parametrize(
    "value",
    [
        *("1e999", "-1E+400", '{"a": [1, 12345e305]}', "9" * 400 + ".0", "[2,1e99]", "1e-999"),
        *("9" * 400, "9" * 5000, '"said: 1e999"', "NaN", '"\\ud800"', '"\xff"', '"ä"'),
        *("[" * depth + "]" * depth for depth in (98, 99, 100, 500, 100_000)),
        '{"a":' * 5000 + "1" + "}" * 5000,
    ],
    ids=lambda value: value[:20],
)
@pytest.mark.parametrize("more", ["", ', "negative_spans": [' + "[0,1]," * 99 + "[0,1]]"])
def test_a_field_that_is_not_ours_is_read_in_both_ways_or_in_neither(value, more):
    """`quick` skips it. What is wrong with it is for the other to say."""
    line = f'{{"inputs": "x", "targets": "y", "b": {value}{more}}}'.encode(
        "latin-1" if value == '"\xff"' else "utf-8"
    )
    try:
        records.Record.from_json(files.parse_line(line, "f:1"), "f:1")
        is_good = True
    except UsageError:
        is_good = False
    assert records.quick(line) is None or is_good
    # Ordinary fields of others take the quick way.
    assert records.quick(b'{"inputs": "x", "score": [0.5, 1e-7, 12], "at": "1e999"}') is not None


def test_a_field_of_ours_with_many_entries_takes_the_quick_way():
    spans = [[n, n + 1] for n in range(200)]
    line = json.dumps({"inputs": "x", "targets": "y" * 300, "negative_spans": spans})
    found = records.quick(line.encode())
    assert found is not None and len(found.negative_spans) == 200


@hypothesis.given(st.data())
def test_a_line_that_is_decoded_at_once_is_the_same_record(data):
    """Most lines have no fields but ours; the others, and bad ones, are read field by field."""
    fields = {
        "id": st.none() | texts,
        "inputs": st.none() | texts,
        "targets": st.none() | texts | st.just("abcdef"),
        "target_ids": st.none() | st.lists(st.integers(-1, 9), max_size=4) | st.just([1.0]),
        "negative_spans": st.none() | st.just([[0, 2]]) | st.just([[0, 2, 0.5]]) | st.just([[9]]),
        "negative_token_ids": st.none() | st.just([[0, [3]]]) | st.just([[1, [3], 0.5]]),
        "annotator": st.none() | texts,
        "more": st.integers(),
        "messages": st.none() | st.just([]),
        "prompt": st.none(),
    }
    chosen = data.draw(st.fixed_dictionaries({}, optional=fields))
    line = json.dumps(chosen).encode()

    def outcome(read):
        try:
            return read()
        except UsageError as error:
            return str(error)

    def by_field():
        return records.Record.from_json(files.parse_line(line, "f:1"), "f:1")

    def at_once():
        ((where, found),) = records.located([line], "f")
        assert where == "f:1"
        return found

    assert outcome(at_once) == outcome(by_field)
