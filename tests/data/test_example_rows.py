"""Many records at a time become what each becomes alone."""

import ast
import csv
import dataclasses
import json
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tnt_jax.data import example_rows, marks, records
from tnt_jax.data.examples import COLUMNS, from_bytes, row_digest, to_bytes
from tnt_jax.data.layouts import columns_of
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

TARGET_LENGTH = 6
SETTINGS = {"marks": "whole", "loss_until": "end", "annotated": True}
# Words and white space of all kinds; what is normalised, dropped, unknown, or spelt as a token.
PIECES = ["the", "house", "is", " ", "  ", "\n", "\t", "\u00a0", "wonderful", ".", "½"]
PIECES += ["\u200b", "é", "e\u0301", "😂", "<extra_id_0>", "▁", "{", "'s", "…"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "vocabulary.model"
    texts = ["the house is wonderful.", "is the house wonderful? it's the house", "é the ' s"]
    tokenization.train_sentencepiece(texts, path, vocab_size=24)
    return tokenization.SentencePiece(str(path), extra_ids=2)


def alone(fields, number, vocabulary, settings):
    """What `marks` makes of a record, and the counts that belong to it."""
    record = records.Record.from_json(fields, f"there/file.jsonl:{number}")
    records.check_trainable(record, "there/file.jsonl", settings["annotated"])
    example, without_token = marks.example_from_record(
        record, vocabulary, settings["marks"], settings["loss_until"]
    )
    columns = columns_of(example, TARGET_LENGTH, bool(record.negative_spans))
    return example, columns, without_token


def check(rows, vocabulary, settings):
    lines = [json.dumps(fields).encode() for fields in rows]
    found = example_rows.rows_of(lines, "there/file.jsonl", 1, vocabulary, TARGET_LENGTH, settings)
    expected = [alone(row, n, vocabulary, settings) for n, row in enumerate(rows, 1)]
    assert len(found.contents) == len(rows)
    for content, digest, name, columns, (example, of_example, _) in zip(
        found.contents, found.digests, found.id_digests, found.columns, expected, strict=True
    ):
        stored = to_bytes(example)
        assert content[: len(stored)] == stored, example
        assert content[len(stored) :].rstrip(b"\0").decode() == example.id
        assert len(content) % 4 == 0
        assert (digest, name) == (row_digest(stored), row_digest(example.id.encode()))
        assert columns.tolist() == of_example, example
        again, size = from_bytes(content)
        assert size == len(stored)
        for field in dataclasses.fields(again):
            if field.name not in ("id", "span_numbers"):
                one, other = getattr(again, field.name), getattr(example, field.name)
                np.testing.assert_array_equal(one, other, err_msg=field.name)
    assert found.num_spans_without_token == sum(number for _, _, number in expected)
    ids = [example.targets for example, _, _ in expected]
    ids += [example.inputs for example, _, _ in expected]
    ids += [example.negative_pairs[:, 1] for example, _, _ in expected]
    every = [0, *np.concatenate(ids).tolist()]
    assert (found.least_id, found.largest_id) == (min(every), max(every))
    return found


@st.composite
def rows(draw):
    text = "".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=9)))
    row: dict[str, Any] = {
        "inputs": "".join(draw(st.lists(st.sampled_from(PIECES), max_size=4))),
        "targets": text,
    }
    if draw(st.booleans()):
        row["id"] = draw(st.text(st.characters(codec="utf-8"), max_size=5))
    places = st.integers(0, len(text))
    spans = draw(st.lists(st.tuples(places, places), max_size=3))
    spans = [sorted(span) for span in spans if span[0] != span[1]]
    row["negative_spans"] = sorted(spans) if draw(st.booleans()) else spans
    if spans and draw(st.integers(0, 9)) == 0:
        row["negative_spans"][0] = [*row["negative_spans"][0], 0.5]
    if draw(st.integers(0, 9)) == 0:
        row["negative_token_ids"] = [[0, [4, 5]]]
    return row


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(rows(), min_size=1, max_size=12),
    st.sampled_from(["whole", "first_token"]),
    st.sampled_from(["end", "end", "first_negative"]),
)
def test_rows_are_those_of_each_alone(vocabulary, rows, kind, loss_until):
    check(rows, vocabulary, SETTINGS | {"marks": kind, "loss_until": loss_until})


@hypothesis.settings(max_examples=150)
@hypothesis.given(st.data())
def test_rows_with_given_ids_are_those_of_each_alone(vocabulary, data):
    made = []
    for _ in range(data.draw(st.integers(1, 6))):
        ids = data.draw(st.lists(st.integers(2, vocabulary.size - 1), max_size=9))
        text = vocabulary.decode(ids)
        ids = [*ids, 1] if data.draw(st.booleans()) else ids
        row = {"inputs": "the", "targets": text, "target_ids": ids, "negative_spans": []}
        if text and data.draw(st.booleans()):
            start = data.draw(st.integers(0, len(text) - 1))
            row["negative_spans"] = [[start, data.draw(st.integers(start + 1, len(text)))]]
        made.append(row)
    check(made, vocabulary, SETTINGS)


def test_an_empty_output_is_learned_as_its_end_alone(vocabulary):
    rows = [
        {"inputs": "the", "targets": "", "negative_spans": []},
        {"inputs": "the", "targets": ""},
    ]
    check(rows, vocabulary, {**SETTINGS, "annotated": False})
    for row in rows:
        example, _, _ = alone(row, 1, vocabulary, {**SETTINGS, "annotated": False})
        assert example.targets.tolist() == [vocabulary.end_id]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"inputs": "a", "targets": "is the", "negative_spans": [[3, 7]]}, r"has \[3, 7\], but"),
        ({"inputs": "a", "targets": "is"}, "nobody annotated it"),
        ({"inputs": "a"}, "has no targets"),
        ({"targets": "a"}, r"file.jsonl:3: the field 'inputs' is missing"),
        ({"inputs": "a", "targets": "is", "target_ids": [5], "negative_spans": []}, "decode to"),
        ({"inputs": "a", "targets": 3}, r"file.jsonl:3: targets: expected a string"),
    ],
)
def test_a_mistake_is_that_of_the_record_alone(vocabulary, row, message):
    good = b'{"inputs": "the", "targets": "house", "negative_spans": []}'
    with pytest.raises(UsageError, match=message) as alone_error:
        alone(row, 3, vocabulary, SETTINGS)
    with pytest.raises(UsageError) as error:
        lines = [good, b"", json.dumps(row).encode(), good]
        example_rows.rows_of(lines, "there/file.jsonl", 1, vocabulary, TARGET_LENGTH, SETTINGS)
    assert str(error.value) == str(alone_error.value)


def test_most_records_need_no_look_of_their_own(vocabulary, monkeypatch):
    row = {"inputs": "the", "targets": "the  house\nis wonderful.", "negative_spans": [[5, 10]]}
    monkeypatch.setattr(marks, "example_from_record", None)
    lines = [json.dumps(row).encode()] * 3
    found = example_rows.rows_of(lines, "f.jsonl", 1, vocabulary, TARGET_LENGTH, SETTINGS)
    assert found.columns[:, 2].tolist() == [1, 1, 1]


def test_a_token_that_two_spans_mark_is_the_first_ones(tmp_path):
    """So the second one is not lost where that token is cut, and the first has another."""
    path = tmp_path / "whole.model"
    texts = ["is house", "the house is"]
    tokenization.train_sentencepiece(
        texts, path, vocab_size=9, user_defined_symbols=["house", "is"]
    )
    vocabulary = tokenization.SentencePiece(str(path))
    row = {"inputs": "the", "targets": "ishouse", "negative_spans": [[0, 4], [5, 7]]}
    ids = vocabulary.encode("ishouse")
    assert [vocabulary.processor.id_to_piece(i) for i in ids[-2:]] == ["is", "house"]
    found = None
    for length in range(1, len(ids) + 2):
        example, _ = marks.example_from_record(
            records.Record.from_json(row, "f.jsonl:1"), vocabulary, "whole", "end"
        )
        found = example_rows.rows_of(
            [json.dumps(row).encode()], "f.jsonl", 1, vocabulary, length, SETTINGS
        )
        assert found.columns[0].tolist() == columns_of(example, length, True)
    assert found is not None and found.columns[0, COLUMNS.index("lost_spans")] == 0


def test_real_posts(shared_data):
    """Every post of SemEval-2021's trial data, with T5's vocabulary."""
    vocabulary = tokenization.SentencePiece(
        str(shared_data / "data" / "t5_vocab" / "sentencepiece.model"), 100
    )
    with (shared_data / "data" / "toxic_spans" / "tsd_trial.csv").open(encoding="utf-8") as file:
        posts = list(csv.DictReader(file))
    made = []
    for post in posts:
        offsets = sorted(ast.literal_eval(post["spans"]))
        spans = []
        for offset in offsets:
            if spans and spans[-1][1] == offset:
                spans[-1][1] += 1
            else:
                spans.append([offset, offset + 1])
        made.append({"inputs": "Say it.", "targets": post["text"], "negative_spans": spans})
    found = check(made, vocabulary, SETTINGS)
    assert found.columns[:, COLUMNS.index("num_marks")].sum() > 690
