"""The same records in the same order, whether a loop or Apache Beam marks them."""

import dataclasses
import json

import pytest

from tnt_jax import annotate, annotators
from tnt_jax.annotators import beam_jobs
from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

pytest.importorskip("apache_beam", reason="needs Apache Beam: README.md says how to install it")

# Beam's own, and it takes warnings as the tests' settings have them: as errors.
pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS = ["--runner=DirectRunner"]


@pytest.fixture
def lexicon(tmp_path):
    (tmp_path / "words.txt").write_text("rat\ncat\n")
    return annotators.Lexicon(path=str(tmp_path / "words.txt"))


def write_inputs(folder):
    """Two files: blank lines, letters of several bytes, an id that is made from the line."""
    for name, count in (("a", 2500), ("b", 3)):
        lines = []
        for i in range(count):
            animal = "rat" if i % 3 else "d\u00e9g\u00fc \U0001f400"
            lines.append(json.dumps({"inputs": "", "targets": f"{name}{i} is a {animal}."}))
            if i % 7 == 0:
                lines.append("  ")
        text = "\n".join(lines)  # the last line has no end
        (folder / f"in_{name}.jsonl").write_text(text, encoding="utf-8")
    return str(folder / "in_*.jsonl")


def test_output_is_that_of_the_loop_byte_for_byte(tmp_path, lexicon):
    inputs = write_inputs(tmp_path)
    outputs = {}
    for name, options in (("loop", None), ("beam", OPTIONS)):
        output = tmp_path / f"{name}.jsonl"
        annotate.annotate(output=str(output), input=inputs, annotator=lexicon, beam_options=options)
        outputs[name] = output.read_bytes()
    assert outputs["beam"] == outputs["loop"]
    assert outputs["loop"].count(b"\n") == 2503
    assert not list(tmp_path.glob("*.beam"))


def test_alternatives_are_tokenised_by_the_workers(tmp_path, lexicon):
    texts = ["the rat and the cat sat here", "a dog sat there"]
    tokenization.train_sentencepiece(texts, tmp_path / "pieces.model", vocab_size=17)
    vocabulary = tokenization.SentencePiece(str(tmp_path / "pieces.model"))
    rows = [records.Record(id=str(i), inputs="", targets=t) for i, t in enumerate(texts)]
    records.write_records(tmp_path / "in.jsonl", rows)
    for name, options in (("loop", None), ("beam", OPTIONS)):
        annotate.annotate(
            output=str(tmp_path / name),
            input=str(tmp_path / "in.jsonl"),
            annotator=lexicon,
            vocabulary=vocabulary,
            beam_options=options,
        )
    assert (tmp_path / "beam").read_bytes() == (tmp_path / "loop").read_bytes()
    assert records.read_records(tmp_path / "loop")[0].negative_token_ids


@pytest.mark.parametrize("lines_per_part", [1, 2, 5, 100])
def test_any_division_keeps_the_order_and_what_is_left_out(tmp_path, lines_per_part):
    rows = [records.Record(id=str(i), inputs="x", targets="\u00fc" * i) for i in range(11)]
    records.write_records(tmp_path / "in.jsonl", rows)

    def function(row):
        return None if row.id in "357" else dataclasses.replace(row, annotator="seen")

    results = beam_jobs.map_records(
        function,
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        OPTIONS,
        lines_per_part=lines_per_part,
    )
    assert list(results) == [function(row) for row in rows]


def test_what_a_job_that_was_stopped_has_left_goes(tmp_path, lexicon):
    folder = tmp_path / "out.jsonl.beam"
    folder.mkdir()
    for name in ("0.jsonl", "7.mistake", ".1.jsonl.0123abcd.unfinished"):
        (folder / name).write_text("of before")
    annotate.annotate(
        output=str(tmp_path / "out.jsonl"),
        input=write_inputs(tmp_path),
        annotator=lexicon,
        beam_options=OPTIONS,
    )
    assert len(records.read_records(tmp_path / "out.jsonl")) == 2503
    assert not folder.exists()


def test_mistakes_are_those_of_the_loop(tmp_path, lexicon):
    good = '{"inputs": "x", "targets": "rat"}\n'
    for content, message in (
        (good * 3 + '{"targets": 1}\n', "in.jsonl:4: the field 'inputs' is missing"),
        (good + '{"inputs": "prompt"}\n' + good, "record 'in:2' has no targets"),
        ('{"id": "a", "inputs": "x", "targets": "y"}\n' * 2, "the id 'a' was used before"),
        ("\n", "expected records, found none"),
    ):
        (tmp_path / "in.jsonl").write_text(content)
        said = []
        for options in (None, OPTIONS):
            with pytest.raises(UsageError, match=message) as raised:
                annotate.annotate(
                    output=str(tmp_path / "out.jsonl"),
                    input=str(tmp_path / "in.jsonl"),
                    annotator=lexicon,
                    beam_options=options,
                )
            said.append(str(raised.value))
        assert said[0] == said[1]
        assert not list(tmp_path.glob("*out.jsonl*"))
