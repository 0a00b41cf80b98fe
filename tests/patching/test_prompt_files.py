"""A user's prompts and outputs, as `patch` reads them."""

import dataclasses
import itertools
import json
import re

import pytest

from tnt_jax import annotators
from tnt_jax.data import records, removed_everywhere
from tnt_jax.patching import prompt_files
from tnt_jax.patching.prompt_files import Texts
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime.errors import UsageError

# As many prompts as a patch needs, each with an output.
OUTPUTS = [
    records.Record(id=f"a{i}", inputs=f"room {i}", targets=f"a dirty room {i}") for i in range(120)
]
DIRTY = ((2, 7),)


def read(tmp_path, rows, unwanted):
    path = tmp_path / "rows.jsonl"
    records.write_records(path, rows)
    is_in_records = unwanted.kind == "records"
    return Texts.read(None if is_in_records else str(path), None, unwanted)


def everything(texts):
    return [*texts.parts.train, *texts.parts.choice, *texts.parts.report]


def with_marks(row, spans):
    return dataclasses.replace(row, negative_spans=spans)


def test_what_people_marked_in_a_copy_of_an_output_is_not_lost(tmp_path):
    """Nobody has looked at the first copy."""
    again = [dataclasses.replace(row, id=f"again{i}") for i, row in enumerate(OUTPUTS)]
    lines = [json.dumps({"id": row.id, "negative_spans": DIRTY}) + "\n" for row in again]
    marks = tmp_path / "marks.jsonl"
    marks.write_text("".join(lines))
    texts = read(tmp_path, [*OUTPUTS, *again], Unwanted(spans=str(marks)))
    assert {row.id for row in everything(texts)} == {row.id for row in again}
    assert texts.marked == ["dirty"]
    assert texts.notes[0].startswith("120 of 240 outputs are left out: nobody marked them.")


@pytest.mark.parametrize("kind", ["records", "labels"])
def test_copies_of_an_output_of_which_others_are_said_are_kept(kind, tmp_path):
    def said(row, is_bad):
        if kind == "records":
            return with_marks(row, DIRTY if is_bad else ())
        return dataclasses.replace(row, extra={"is_bad": is_bad})

    rows = [said(row, False) for row in OUTPUTS]
    rows += [dataclasses.replace(said(row, True), id=f"bad{row.id}") for row in OUTPUTS]
    rows += [dataclasses.replace(said(row, True), id=f"same{row.id}") for row in OUTPUTS]
    path = str(tmp_path / "rows.jsonl")
    unwanted = Unwanted(records=path) if kind == "records" else Unwanted(labels="is_bad")
    texts = read(tmp_path, rows, unwanted)
    assert "120 of 360 outputs repeat another one, and are left out." in texts.notes
    learned = {row.id for row in texts.parts.train}
    assert {f"bad{name}" for name in learned if name[0] == "a"} == learned - {
        name for name in learned if name[0] == "a"
    }
    assert len(learned) > 100


def test_whatever_is_marked_is_looked_for_in_new_outputs(tmp_path):
    """Signs, and what would be a comment in a word list. White space is no word."""
    texts = ["\u2764\ufe0f", "!!!", "#ad", "\\#ad", "\U0001f600", "dirty"]
    rows = [
        dataclasses.replace(
            with_marks(row, ((2, 2 + len(text)),)), targets=f"a {text} room {number}"
        )
        for number, (row, text) in enumerate(zip(OUTPUTS, itertools.cycle(texts), strict=False))
    ]
    rows[5] = with_marks(rows[5], ((1, 2), *rows[5].negative_spans))
    found = read(tmp_path, rows, Unwanted(records=str(tmp_path / "rows.jsonl")))
    assert set(found.marked) == {*texts}
    assert found.notes == [
        "New outputs are looked at for the 6 texts that are marked in the given ones: nobody has "
        "marked these outputs.",
        "In 1 of 120 outputs white space is marked, or a sign that most outputs say unmarked, the "
        "first one 'a5': it is learned from, and not looked for in new outputs.",
    ]
    found.write_words(tmp_path)
    lexicon = annotators.Lexicon(path=str(tmp_path / "marked_texts.txt"))
    for row in rows:
        said = dataclasses.replace(row, negative_spans=None)
        (span,) = lexicon.annotate(said).spans
        # Of a longer entry and a shorter one within it the first to start is found.
        assert (span.start, span.end) == row.offsets[-1]


def test_white_space_alone_is_nothing_to_look_for(tmp_path):
    rows = [with_marks(row, ((1, 2),)) for row in OUTPUTS]
    message = "--records: expected something marked in some outputs, found nothing, white space, or"
    with pytest.raises(UsageError, match=message):
        read(tmp_path, rows, Unwanted(records=str(tmp_path / "rows.jsonl")))


def test_a_full_stop_that_somebody_marked_is_not_looked_for_in_every_sentence():
    rows = [with_marks(dataclasses.replace(row, targets=f"{row.targets}."), ()) for row in OUTPUTS]
    end = len(rows[0].targets)
    rows[0] = with_marks(rows[0], ((end - 1, end), (0, 1)))
    assert prompt_files.marked_texts(rows) == [rows[0].targets[0]]
    rows = [with_marks(row, ((len(row.targets) - 1, len(row.targets)),)) for row in rows]
    assert prompt_files.marked_texts(rows) == ["."]


def test_signs_that_make_outputs_bad_are_looked_for():
    rows = [
        dataclasses.replace(row, targets=f"{row.targets} {sign}", negative_spans=((n, n + 1),))
        for row, sign in zip(OUTPUTS, "\u2620#" * 60, strict=True)
        for n in [len(row.targets) + 1]
    ]
    assert prompt_files.words_mostly_marked(rows) == ["#", "\u2620"]


def test_repeated_prompts_are_left_out(tmp_path):
    (tmp_path / "words.txt").write_text("dirty\n")
    rows = [*OUTPUTS, *(dataclasses.replace(row, id=f"b{row.id}") for row in OUTPUTS[:7])]
    texts = read(tmp_path, rows, Unwanted(words=str(tmp_path / "words.txt")))
    assert sorted(row.id for row in everything(texts)) == sorted(row.id for row in OUTPUTS)
    assert texts.notes == ["7 of 127 prompts repeat another one, and are left out."]


def test_a_file_of_another_version_stays(tmp_path):
    """It wrote empty targets. A stage goes by the bytes of a file: a patch would begin anew."""
    path = tmp_path / "prompts.jsonl"
    before = '{"id": "a", "inputs": "x", "targets": ""}\n'
    path.write_text(before)
    rows = [records.Record(id="a", inputs="x")]
    prompt_files.write(path, rows)
    assert path.read_text() == before
    prompt_files.write(path, [dataclasses.replace(rows[0], inputs="y")])
    assert path.read_text() == '{"id": "a", "inputs": "y"}\n'
    path.write_text("{")
    prompt_files.write(path, rows)
    assert path.read_text() == '{"id": "a", "inputs": "x"}\n'


def test_what_is_removed_at_every_position_of_given_records_is_so_of_their_copy(tmp_path):
    """And long sets of ids are in a table beside the copy, as beside the records."""
    long = tuple(range(30, 60))
    rows = [
        dataclasses.replace(with_marks(row, DIRTY), negative_token_ids=((1, long),))
        for row in OUTPUTS
    ]
    path, copy = str(tmp_path / "rows.jsonl"), tmp_path / "prompts" / "train.jsonl"
    removed_everywhere.write_records(path, rows, removed_everywhere.Ids((7, 5), {}))
    texts = Texts.read(None, None, Unwanted(records=path))
    assert texts.everywhere == (5, 7)
    assert f"2 tokens are removed at every position: {path}.everywhere.json." in texts.notes

    def write(ids):
        prompt_files.write(copy, texts.parts.train, whole=True, everywhere=ids)
        return copy.stat().st_mtime_ns

    first = write(texts.everywhere)
    assert removed_everywhere.of_records(str(copy)) == (5, 7)
    assert records.read_records(copy) == texts.parts.train
    assert {path.name for path in copy.parent.iterdir()} == {
        *("train.jsonl", "train.jsonl.everywhere.json", "train.jsonl.sets.jsonl"),
    }
    assert write(texts.everywhere) == first  # a patch goes on
    # With other ids it is another patch, and other data.
    write((5,))
    assert removed_everywhere.of_records(str(copy)) == (5,)
    removed_everywhere.write_records(path, rows, removed_everywhere.Ids((5,), {}))
    assert Texts.read(None, None, Unwanted(records=path)).digest != texts.digest
    removed_everywhere.write_records(path, rows, None)
    without = Texts.read(None, None, Unwanted(records=path))
    assert (without.everywhere, without.digest) == ((), records.digest(everything(without)))


def test_prompts_of_a_table(tmp_path):
    """A prompt may have commas and line breaks in it."""
    path = tmp_path / "prompts.csv"
    path.write_text('\ufeffid,prompt,else\n7,"hello, there",x\n8,"two\nlines",y\n', "utf-8")
    found = prompt_files.read(str(path), "--prompts")
    assert [(row.id, row.inputs) for row in found] == [("7", "hello, there"), ("8", "two\nlines")]
    path = tmp_path / "prompts.tsv"
    path.write_text("inputs\na room\nno room\n")
    found = prompt_files.read(str(path), "--prompts")
    assert [(row.id, row.inputs) for row in found] == [
        ("prompts:1", "a room"),
        ("prompts:2", "no room"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "question,answer\na,b\n",
            'expected a column "inputs" or "prompt", found question, answer',
        ),
        ("prompt\n", "expected records, found none"),
        ("id,prompt\n1,a\n1,b\n", "the id '1' was used before"),
        ("id,prompt\n1,\n", "expected a text in each prompt, found none in 1 of 1"),
        ('prompt\n"a" b\n', "expected a table in UTF-8, found "),
    ],
)
def test_a_table_that_has_no_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(message)):
        prompt_files.read(str(path), "--prompts")
