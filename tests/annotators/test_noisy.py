"""Mistakes of a chosen rate, the same on every machine."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotators
from tnt_jax.annotators import interface
from tnt_jax.data import records
from tnt_jax.runtime import settings_json
from tnt_jax.runtime.errors import UsageError

HERE = __name__
rates = st.floats(0, 1)


def every_rat(inputs, targets):
    return [(i, i + 3) for i in range(len(targets)) if targets.startswith("rat", i)]


def noisy(**settings):
    annotator = annotators.PythonFunction(function=f"{HERE}:every_rat")
    return annotators.Noisy(annotator=annotator, **settings)


def row(targets, inputs=""):
    return records.Record(id="a", inputs=inputs, targets=targets)


def spans(annotator, record):
    return {(s.start, s.end) for s in annotator.annotate(record).spans}


def test_rates_of_a_large_sample():
    """The share of 20,000 draws at 0.3 is within 0.3 +- 0.013 (four standard deviations)."""
    text = " ".join(["rat", "mouse"] * 200)
    annotator = noisy(miss_rate=0.3, false_rate=0.1)
    num_true = num_false = 0
    for number in range(100):
        for start, end in spans(annotator, row(text, inputs=str(number))):
            num_true += text[start:end] == "rat"
            num_false += text[start:end] == "mouse"
    assert num_true / 20_000 == pytest.approx(0.7, abs=0.013)
    assert num_false / 20_000 == pytest.approx(0.1, abs=0.0085)


def test_confidence_is_the_probability_that_a_mark_is_right():
    """Right and false marks are equally many: each of ten bins has 1,000 to 3,000 of 20,000."""
    text, num_marks = " ".join(["rat", "mouse"] * 100), 20_000
    for draws, share_of_pairs in ((1, None), (2, 5 / 6), (3, 19 / 20)):
        annotator = noisy(false_rate=1, confidence=draws)
        strengths = {"rat": [], "mouse": []}
        for number in range(num_marks // 200):
            for span in annotator.annotate(row(text, inputs=str(number))).spans:
                strengths[text[span.start : span.end]].append(span.strength)
        right, false = map(np.array, strengths.values())
        assert len(right) == len(false) == num_marks // 2
        if share_of_pairs is None:
            assert {*right, *false} == {0.5}
            continue
        assert (right > false).mean() == pytest.approx(share_of_pairs, abs=0.02)
        for low in np.arange(0, 1, 0.25):
            of_right, of_false = (((x > low) & (x <= low + 0.25)).sum() for x in (right, false))
            inside = [x[(x > low) & (x <= low + 0.25)] for x in (right, false)]
            mean = np.concatenate(inside).mean()
            assert of_right / (of_right + of_false) == pytest.approx(mean, abs=0.03)


def test_confidence_changes_no_mark():
    text = row(" ".join(["rat", "mouse"] * 50))
    settings = {"miss_rate": 0.3, "false_rate": 0.2}
    with_it, without = noisy(**settings, confidence=2), noisy(**settings)
    assert spans(with_it, text) == spans(without, text)
    assert {span.strength for span in without.annotate(text).spans} == {1.0}
    assert "confidence" not in without.description
    assert with_it.description.endswith("seed=0, confidence=2)")
    assert "confidence" not in settings_json.describe(without)  # what is there is not made again
    assert settings_json.describe(with_it)["confidence"] == 2
    with pytest.raises(UsageError, match=r"Noisy\.confidence: expected None, or a number of draws"):
        noisy(confidence=0)


def test_the_ends_of_the_rates():
    text = row("a rat, a cat")
    assert noisy().annotate(text) == noisy().annotator.annotate(text)
    assert spans(noisy(miss_rate=1), text) == set()
    words = {(0, 1), (2, 5), (5, 6), (7, 8), (9, 12)}
    assert spans(noisy(false_rate=1), text) == words
    assert spans(noisy(false_rate=1, miss_rate=1), text) == words - {(2, 5)}


@given(st.tuples(rates, rates), st.integers(0, 5))
def test_a_higher_rate_makes_the_same_mistakes_and_more(two_rates, seed):
    low, high = sorted(two_rates)
    text = row("rat mouse rat mouse rat cow rat")
    true = spans(noisy(), text)
    few, many = (spans(noisy(miss_rate=r, false_rate=r, seed=seed), text) for r in (low, high))
    assert true - few <= true - many
    assert few - true <= many - true


def test_mistakes_depend_on_seed_inputs_and_targets_alone():
    text = " ".join(["rat", "mouse"] * 20)
    settings = {"miss_rate": 0.5, "false_rate": 0.5}
    first = spans(noisy(**settings), row(text))
    other_id = records.Record(id="b", inputs="", targets=text, negative_spans=())
    assert spans(noisy(**settings), other_id) == first
    assert spans(noisy(**settings), row(text, inputs="x")) != first
    assert spans(noisy(**settings, seed=1), row(text)) != first


def test_mistakes_are_the_same_in_every_process():
    code = (
        "from tnt_jax import annotators\n"
        "from tnt_jax.data import records\n"
        f"inner = annotators.PythonFunction(function='{HERE}:every_rat')\n"
        "noisy = annotators.Noisy(annotator=inner, miss_rate=0.5, false_rate=0.5)\n"
        "row = records.Record(id='a', inputs='', targets='rat mouse rat cow \u00e9 rat')\n"
        "print([(s.start, s.end) for s in noisy.annotate(row).spans])\n"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=__file__.rpartition("/")[0],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = noisy(miss_rate=0.5, false_rate=0.5).annotate(row("rat mouse rat cow \u00e9 rat"))
    assert said == {f"{[(s.start, s.end) for s in here.spans]}\n".encode()}


def test_false_marks_have_no_alternatives_and_right_texts_stay_right(tmp_path):
    (tmp_path / "values.json").write_text('{"area": ["north", "south"]}')
    gazetteer = annotators.Gazetteer(path=str(tmp_path / "values.json"))
    record = row("in the south", inputs="north")
    found = annotators.Noisy(annotator=gazetteer, false_rate=1).annotate(record)
    assert found.supported == gazetteer.annotate(record).supported
    assert found.spans == (
        interface.Span(start=0, end=2),
        interface.Span(start=3, end=6),
        *gazetteer.annotate(record).spans,
    )


def test_what_goes_at_every_position_stays(tmp_path):
    (tmp_path / "values.json").write_text('{"area": ["north", "south"]}')
    gazetteer = annotators.Gazetteer(path=str(tmp_path / "values.json"), at_every_position=True)
    record = row("in the south", inputs="north")
    found = annotators.Noisy(annotator=gazetteer, miss_rate=1).annotate(record)
    assert found.unwanted == gazetteer.annotate(record).unwanted
    assert found.unwanted.texts == ("north", "south") and found.unwanted.allowed == ("north",)


def test_a_mask_is_handed_on_and_has_no_mistakes(tmp_path):
    (tmp_path / "words.txt").write_text("rat")
    (tmp_path / "values.json").write_text('{"area": ["north", "south"]}')
    record = row("a rat in the south", inputs="north")
    for inner, texts, allowed in (
        (annotators.Lexicon(path=str(tmp_path / "words.txt")), ("rat",), ()),
        (
            annotators.Gazetteer(path=str(tmp_path / "values.json")),
            ("north", "south"),
            ("north",),
        ),
    ):
        made = annotators.Noisy(annotator=inner, miss_rate=1, false_rate=1)
        for wrapped in (
            made,
            pickle.loads(pickle.dumps(made)),
            dataclasses.replace(made, seed=1),
            annotators.Noisy(annotator=made),
        ):
            assert isinstance(wrapped, interface.Mask)
            found = wrapped.unwanted(record)
            assert (found.texts, found.allowed) == (texts, allowed)
            assert wrapped.innocent_words("a rat") == inner.innocent_words("a rat")
        # What was made with it before is not made again.
        assert "unwanted" not in settings_json.describe(made)


def test_who_marks_what_it_is_shown_alone_is_no_mask():
    assert not isinstance(noisy(), interface.Mask)


def test_description_and_mistakes():
    described = noisy(miss_rate=0.2, seed=3).description
    assert described.startswith("Noisy(PythonFunction(test_noisy:every_rat ")
    assert described.endswith("), miss_rate=0.2, false_rate=0.0, seed=3)")
    with pytest.raises(UsageError, match=r"Noisy\.miss_rate: expected a rate from 0 to 1, found 2"):
        noisy(miss_rate=2)
    with pytest.raises(UsageError, match=r"Noisy\.false_rate"):
        noisy(false_rate=-0.1)


def test_a_record_that_is_not_known_stays_so(tmp_path):
    (tmp_path / "marks.jsonl").write_text('{"id": "z", "negative_spans": []}\n')
    people = annotators.Spans(path=str(tmp_path / "marks.jsonl"), unmatched="leave_out")
    assert annotators.Noisy(annotator=people, false_rate=1).annotate(row("rat")) is None
