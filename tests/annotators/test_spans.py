"""Marks that people or a function of the user's give."""

import csv
import json
import pickle
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotate, annotators
from tnt_jax.annotators import Span, interface, spans
from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError


def record(targets, name="a", inputs=""):
    return records.Record(id=name, inputs=inputs, targets=targets)


def marked(annotator, row):
    return [row.targets[s.start : s.end] for s in annotator.annotate(row).spans]


# -----------------------------------------------------------------------------
# Spans
# -----------------------------------------------------------------------------


@pytest.fixture
def marks_of(tmp_path):
    """An annotator of marks in JSONL (objects) or CSV (pairs of a cell of spans and a text)."""

    def make(*rows, **settings):
        if isinstance(rows[0], dict):
            path = tmp_path / "marks.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            path = tmp_path / "marks.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("spans", "text"), *rows])
        return annotators.Spans(path=str(path), **settings)

    return make


def test_marks_by_id(marks_of):
    annotator = marks_of({"id": "a", "negative_spans": [[4, 7]]}, {"id": "b", "negative_spans": []})
    assert marked(annotator, record("the rat")) == ["rat"]
    assert marked(annotator, record("the rat", name="b")) == []


def test_marks_by_text_and_inputs_where_given(marks_of):
    annotator = marks_of(
        {"targets": "in Rome", "inputs": "area: Rome", "negative_spans": []},
        {"targets": "in Rome", "inputs": "area: Oslo", "negative_spans": [[3, 7]]},
        {"targets": "a rat", "negative_spans": [[2, 5]]},
    )
    assert marked(annotator, record("in Rome", inputs="area: Rome")) == []
    assert marked(annotator, record("in Rome", inputs="area: Oslo")) == ["Rome"]
    assert marked(annotator, record("a rat", inputs="anything")) == ["rat"]
    with pytest.raises(UsageError, match="expected its text among the 3"):
        annotator.annotate(record("in Rome", inputs="area: Riga"))


def test_toxic_spans_csv(marks_of):
    text = '\U0001f600 bad,\r\n\u00e9 "bad" word'
    annotator = marks_of(("[2, 3, 4, 11, 10, 9, 13]", text), ("[]", "good"))
    assert marked(annotator, record(text)) == ["bad", text[9:12], text[13]]
    assert marked(annotator, record("good", name="other")) == []
    assert [(s.start, s.end) for s in annotator.annotate(record(text)).spans] == [
        (2, 5),
        (9, 12),
        (13, 14),
    ]


@given(st.sets(st.integers(0, 40)))
def test_runs_are_the_offsets(offsets):
    text = "x" * 41
    runs = spans.runs(str(sorted(offsets, reverse=True)), len(text), "here")
    assert {i for start, end in runs for i in range(start, end)} == offsets
    # Not one run more than there are offsets without a left neighbour.
    assert len(runs) == sum(i - 1 not in offsets for i in offsets)


def test_a_cell_is_read_not_run(marks_of, tmp_path):
    trap = tmp_path / "trap"
    cell = f"[__import__('pathlib').Path({str(trap)!r}).touch() or 0]"
    with pytest.raises(UsageError, match=r"marks\.csv:2: spans: expected a list of character off"):
        marks_of((cell, "text"))
    assert not trap.exists()


@pytest.mark.parametrize(
    "cell", ["", "[4]", "[-1]", "[0.5]", "[True]", "0, 1", "(0, 1)", "[" * 999]
)
def test_cells_that_are_no_offsets(marks_of, cell):
    with pytest.raises(UsageError, match=r"offsets from 0 to 3 such as \[8, 9, 10\]"):
        marks_of((cell, "text"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}], "expected an object with negative_spans"),
        ([["a"]], "marks.jsonl:1: expected an object with negative_spans"),
        ([{"negative_spans": []}], "expected id or targets, to say whose marks these are"),
        ([{"id": "a", "negative_spans": [[0]]}], "negative_spans: expected a list of [start, end]"),
        ([{"id": [3], "negative_spans": []}], "id: expected a string"),
        (
            [{"id": "a", "negative_spans": []}, {"id": "a", "negative_spans": [[0, 1]]}],
            "marks.jsonl:2: marks [[0, 1]], but",
        ),
        (
            [{"id": "a", "negative_spans": []}, {"targets": "b", "negative_spans": []}],
            "marks.jsonl:1: expected a field 'targets' to match records by text",
        ),
    ],
)
def test_malformed_jsonl(tmp_path, rows, message):
    path = tmp_path / "marks.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UsageError, match=re.escape(message)):
        annotators.Spans(path=str(path))


def test_other_mistakes(marks_of, tmp_path):
    with pytest.raises(UsageError, match=r"Spans\.path.*absent"):
        annotators.Spans(path=str(tmp_path / "absent.jsonl"))
    with pytest.raises(UsageError, match=r"Spans\.match: expected one of"):
        marks_of({"id": "a", "negative_spans": []}, match="ids")
    with pytest.raises(UsageError, match="columns text and spans, found"):
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        annotators.Spans(path=str(tmp_path / "other.csv"))
    with pytest.raises(UsageError, match="has no marks"):
        (tmp_path / "empty.jsonl").write_text("\n")
        annotators.Spans(path=str(tmp_path / "empty.jsonl"))
    annotator = marks_of({"id": "a", "targets": "a rat", "negative_spans": [[2, 5]]}, match="id")
    with pytest.raises(UsageError, match="marks another text under this id: its targets are"):
        annotator.annotate(record("a cat"))
    annotator = marks_of({"id": "a", "negative_spans": [[2, 6]]})
    with pytest.raises(UsageError, match=r"\[2, 6\] for record 'a', whose targets have 5 char"):
        annotator.annotate(record("a rat"))


def test_records_that_nobody_marked(marks_of, tmp_path, capsys):
    rows = [record("a rat", name=name) for name in "abc"]
    records.write_records(tmp_path / "in.jsonl", rows)
    mark = {"id": "b", "negative_spans": [[2, 5]]}

    def run(annotator):
        output = str(tmp_path / "out.jsonl")
        annotate.annotate(output=output, input=str(tmp_path / "in.jsonl"), annotator=annotator)
        return records.read_records(output)

    with pytest.raises(UsageError, match="record 'a': expected its id among the 1 that"):
        run(marks_of(mark))
    assert [row.id for row in run(marks_of(mark, unmatched="leave_out"))] == ["b"]
    assert "2 of 3 records are left out" in capsys.readouterr().out


def test_where_spans_are_null_nobody_looked(marks_of, tmp_path):
    """Null is what a table of labels has where a cell is empty: neither marked nor clean."""
    rows = (
        {"id": "a", "targets": "a rat", "negative_spans": None},
        {"id": "b", "targets": "a rat", "negative_spans": [[2, 5]]},
        {"id": "c", "targets": "a rat", "negative_spans": []},
        {"id": "d", "negative_spans": None, "negative_token_ids": None},
    )
    annotator = marks_of(*rows, unmatched="leave_out")
    assert annotator.annotate(record("a rat", name="a")) is None
    assert annotator.annotate(record("a rat", name="d")) is None
    assert marked(annotator, record("a rat", name="b")) == ["rat"]
    assert marked(annotator, record("a rat", name="c")) == []
    with pytest.raises(UsageError, match=r"expected its id among the 2 .* null says that nobody"):
        marks_of(*rows).annotate(record("a rat", name="a"))
    # Somebody who looked at the same output decides, whatever the order of the lines.
    both = marks_of({"id": "e", "negative_spans": None}, {"id": "e", "negative_spans": [[0, 1]]})
    assert marked(both, record("a rat", name="e")) == ["a"]
    with pytest.raises(UsageError, match="has no marks"):
        marks_of({"id": "a", "negative_spans": None})


def test_records_marked_by_hand_are_such_a_file(tmp_path):
    row = records.Record(id="x", inputs="i", targets="a rat", negative_spans=((2, 5),))
    records.write_records(tmp_path / "by_hand.jsonl", [row])
    annotator = annotators.Spans(path=str(tmp_path / "by_hand.jsonl"))
    assert marked(annotator, record("a rat", name="x", inputs="i")) == ["rat"]
    assert re.fullmatch(
        r"Spans\(by_hand\.jsonl:\w{12}, match=id, unmatched=error\)", annotator.description
    )
    copy = pickle.loads(pickle.dumps(annotator))
    assert marked(copy, record("a rat", name="x", inputs="i")) == ["rat"]


def test_marks_of_two_models_outputs_are_compared(tmp_path):
    """What people marked before and after an update is in two files, each with its digest."""
    for name, text in (("before", "a rat"), ("after", "a cat")):
        records.write_records(tmp_path / f"{name}.jsonl", [record(text)])
        row = {"id": "a", "targets": text, "negative_spans": [[2, 5]]}
        (tmp_path / f"marks, {name}.jsonl").write_text(json.dumps(row))
        annotate.annotate(
            output=str(tmp_path / f"{name}.annotated.jsonl"),
            input=str(tmp_path / f"{name}.jsonl"),
            annotator=annotators.Spans(path=str(tmp_path / f"marks, {name}.jsonl")),
        )
    before, after = records.read_pairs(
        tmp_path / "before.annotated.jsonl", tmp_path / "after.annotated.jsonl"
    )
    assert before[0].annotator != after[0].annotator
    assert [row.offsets for row in (*before, *after)] == [((2, 5),)] * 2


def test_an_empty_output_is_marked_clean_and_a_prompt_is_refused(marks_of):
    annotator = marks_of({"id": "a", "negative_spans": []})
    made = annotate.mark(record(""), annotator, None)
    assert (made.negative_spans, made.negative_token_ids, made.is_prompt) == ((), (), False)
    with pytest.raises(UsageError, match=r"record 'a' has no targets\. Expected outputs"):
        annotate.mark(records.Record(id="a", inputs=""), annotator, None)


def test_toxic_spans_data(shared_data):
    """Every offset of SemEval's file comes back, on the texts as a CSV reader gives them."""
    path = shared_data / "data" / "toxic_spans" / "tsd_trial.csv"
    annotator = annotators.Spans(path=str(path))
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found = annotator.annotate(record(row["text"])).spans
            assert [i for s in found for i in range(s.start, s.end)] == json.loads(row["spans"])


# -----------------------------------------------------------------------------
# PythonFunction
# -----------------------------------------------------------------------------

HERE = __name__


def capitals(inputs, targets):
    return (m.span() for m in re.finditer("[A-Z]+", targets) if m.group() not in inputs)


def overlapping(inputs, targets):
    return [Span(start=4, end=6, alternatives=("x",)), (0, 2), [np.int64(1), np.int64(3)], (6, 7)]


def test_a_function_marks():
    annotator = annotators.PythonFunction(function=f"{HERE}:capitals")
    assert marked(annotator, record("ABC and DEF", inputs="ABC")) == ["DEF"]
    assert re.fullmatch(rf"PythonFunction\({HERE}:capitals \w{{12}}\)", annotator.description)
    copy = pickle.loads(pickle.dumps(annotator))
    assert marked(copy, record("ABC and DEF", inputs="ABC")) == ["DEF"]


def test_a_package_that_is_edited_where_it_lies_is_known_by_its_code(tmp_path, monkeypatch):
    """`pip install -e` leaves code where it is edited, and no edit changes the version."""
    site = tmp_path / "site"
    for name, folder in (("copied", site), ("edited", tmp_path / "source")):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}_marks.py").write_text("def find(inputs, targets):\n    return []\n")
        metadata = site / f"{name}_marks-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Name: {name}-marks\nVersion: 1.0\n")
        (metadata / "top_level.txt").write_text(f"{name}_marks\n")
        files = [f"{metadata.name}/METADATA", *([f"{name}_marks.py"] if folder == site else [])]
        (metadata / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        monkeypatch.syspath_prepend(str(folder))
    copied, edited = (
        annotators.PythonFunction(function=f"{name}_marks:find").description
        for name in ("copied", "edited")
    )
    assert copied == "PythonFunction(copied_marks:find copied-marks==1.0)"
    assert re.fullmatch(r"PythonFunction\(edited_marks:find \w{12}\)", edited)


@pytest.mark.parametrize(
    "changed", ["the_marks.py", "helper.py", "parts/deeper.py", "parts/late.py"]
)
def test_a_function_is_known_by_the_modules_beside_it_that_it_imports(
    changed, tmp_path, monkeypatch
):
    """Whatever it takes of them: a list says nothing of where it comes from."""
    files = {
        "the_marks.py": "from helper import MARKS\ndef find(inputs, targets):\n    return MARKS\n",
        "helper.py": "import json, installed\nfrom parts.deeper import MARKS\n",
        "site-packages/installed.py": "",
        "parts/__init__.py": "",
        "parts/deeper.py": "MARKS = []\ndef ask():\n    from . import late\n",
        "parts/late.py": "",
        "parts/other.py": "",
    }

    def described():
        annotators.python_function.identity.cache_clear()
        return annotators.PythonFunction(function="the_marks:find").description

    (tmp_path / "parts").mkdir()
    (tmp_path / "site-packages").mkdir()
    for folder in (tmp_path, tmp_path / "site-packages"):
        monkeypatch.syspath_prepend(str(folder))
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    try:
        before = described()
        for name in ("parts/other.py", "site-packages/installed.py"):
            (tmp_path / name).write_text("1\n")
        assert described() == before
        (tmp_path / changed).write_text(files[changed] + "# changed\n")
        assert described() != before
    finally:
        annotators.python_function.find.cache_clear()
        for name in ("the_marks", "helper", "installed", "parts", "parts.deeper"):
            sys.modules.pop(name, None)


def test_its_spans_are_sorted_and_those_that_overlap_merged():
    found = annotators.PythonFunction(function=f"{HERE}:overlapping").annotate(record("1234567"))
    assert found.spans == (
        Span(start=0, end=3),
        Span(start=4, end=6, alternatives=("x",)),
        Span(start=6, end=7),  # touches, and stays a span
    )


def test_merged_spans_keep_the_alternatives_of_their_start():
    spans = [
        Span(start=0, end=2, alternatives=("a", "b")),
        Span(start=0, end=3, alternatives=("b", "c")),
        Span(start=1, end=5, alternatives=("d",)),
    ]
    assert interface.merged(spans) == (Span(start=0, end=5, alternatives=("a", "b", "c")),)


def unsure(inputs, targets):
    return [(0, 2, 0.5), (1, 4, 0.75), (5, 6)]


def test_a_function_may_say_how_sure_it_is():
    found = annotators.PythonFunction(function=f"{HERE}:unsure").annotate(record("1234567"))
    # Of spans that overlap the surest counts.
    assert found.spans == (Span(start=0, end=4, strength=0.75), Span(start=5, end=6))


NUMPY = {
    "strength": [(0, 3, np.float32(0.5))],
    "strength of 1": [(0, 3, np.int64(1))],
    "ends": [(np.int64(0), np.int32(3))],
    "ends in arrays": [(np.array(0), np.array(3))],
    "spans": [Span(start=np.int64(0), end=np.uint8(3), strength=np.float16(0.5))],
    "rows": np.array([[0, 3], [4, 5]]),
    "rows with strengths": np.array([[0, 3, 0.5]]),
    "no rows": np.zeros((0, 2), int),
}


def numpy_numbers(inputs, targets):
    return NUMPY[inputs]


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("strength", [[0, 3, 0.5]]),
        ("strength of 1", [[0, 3]]),
        ("ends", [[0, 3]]),
        ("ends in arrays", [[0, 3]]),
        ("spans", [[0, 3, 0.5]]),
        ("rows", [[0, 3], [4, 5]]),
        ("rows with strengths", [[0, 3, 0.5]]),
        ("no rows", []),
    ],
)
def test_what_numpy_computed_is_taken_and_written_as_json(kind, written):
    annotator = annotators.PythonFunction(function=f"{HERE}:numpy_numbers")
    row = annotate.mark(record("1234567", inputs=kind), annotator, None)
    assert json.loads(row.to_line())["negative_spans"] == written
    numbers = [number for span in row.negative_spans for number in span]
    assert {type(number) for number in numbers} <= {int, float}


@pytest.mark.parametrize("value", [np.float32(0.5), np.float64(1), np.int64(1), np.float16(0.25)])
def test_numpy_strengths_of_a_record_are_strengths(value):
    row = records.Record(
        id="a",
        inputs="",
        targets="abc",
        negative_spans=((0, 2, value),),
        negative_token_ids=((0, (5,), -value),),
    )
    fields = json.loads(row.to_line())
    assert fields["negative_spans"] == [[0, 2] if value == 1 else [0, 2, float(value)]]
    assert fields["negative_token_ids"] == [[0, [5], -float(value)]]


@pytest.mark.parametrize("value", [np.True_, True, np.float32("nan"), np.float32(1.5), "0.5"])
def test_what_is_no_strength(value):
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        records.Record(id="a", inputs="", targets="abc", negative_spans=((0, 2, value),))


BAD = {
    "none": None,
    "unsure": [(0, 1, 0.0)],
    "floats": [(0.0, 1.0)],
    "booleans": [(False, True)],
    "numpy_booleans": [(np.False_, np.True_)],
    "halves": np.array([[0.5, 1.5, 0.5]]),
    "float_rows": np.array([[0.0, 1.0]]),
    "one_number": np.array([3]),
    "triples": [(0, 1, 2)],
    "numbers": [3],
    "beyond": [(0, 6)],
    "negative": [(-1, 2)],
    "empty": [(2, 2)],
    "span_beyond": [Span(start=0, end=9)],
    "letters": [Span(start=0, end=2, alternatives="cat")],
    "blank": [Span(start=0, end=2, alternatives=["cat", " "])],
}


def bad(inputs, targets):
    return BAD[inputs]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "to give (start, end) pairs or Span objects for record 'a', found None"),
        ("floats", "pairs of integers or Span objects for record 'a', found (0.0, 1.0)"),
        ("booleans", "found (False, True)"),
        ("numpy_booleans", "pairs of integers or Span objects for record 'a', found (np.False_"),
        ("halves", "pairs of integers or Span objects for record 'a', found array([0.5, 1.5"),
        ("float_rows", "pairs of integers or Span objects for record 'a', found array([0., 1"),
        ("one_number", "found np.int64(3)"),
        ("triples", "found (0, 1, 2)"),
        ("unsure", "expected a strength above 0 and at most 1 for record 'a', found (0, 1, 0.0)."),
        ("numbers", "found 3"),
        (
            "beyond",
            "[0, 6] for record 'a', whose targets have 5 characters. A span is [start, end]",
        ),
        ("negative", "[-1, 2] for record 'a'"),
        ("empty", "[2, 2] for record 'a'"),
        ("span_beyond", "[0, 9] for record 'a'"),
        ("letters", "expected a list of texts that are not blank as alternatives for record 'a'"),
        ("blank", "expected a list of texts that are not blank as alternatives for record 'a'"),
    ],
)
def test_what_a_function_must_not_give(kind, message):
    annotator = annotators.PythonFunction(function=f"{HERE}:bad")
    with pytest.raises(UsageError, match=re.escape(message)) as raised:
        annotator.annotate(record("a rat", inputs=kind))
    assert str(raised.value).startswith("PythonFunction.function: ")


def test_a_function_that_is_not_there():
    with pytest.raises(UsageError, match="no module 'nowhere'"):
        annotators.PythonFunction(function="nowhere:marks")


def test_a_module_that_misses_another_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        annotators.PythonFunction(function="needs_more:marks")
