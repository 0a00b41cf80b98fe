"""The words that make a scorer call a text unwanted."""

import pickle
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnt_jax import annotators
from tnt_jax.data import records
from tnt_jax.runtime.errors import UsageError


def write_scorer(folder, monkeypatch, body, name="scorer"):
    (folder / f"{name}.py").write_text(f"def score(texts):\n    {body}\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def marked(annotator, targets):
    spans = annotator.annotate(records.Record(id="a", inputs="", targets=targets)).spans
    return [targets[span.start : span.end] for span in spans]


def worst_word(texts):
    """Words have weights; the score of a text is that of its worst word."""
    weights = {"idiot": 0.9, "fool": 0.6, "silly": 0.4}
    return [max((weights.get(w.strip("!,."), 0.0) for w in t.split()), default=0.0) for t in texts]


def constant(texts):
    return [0.7] * len(texts)


HERE = __name__


def test_words_go_until_the_score_is_below_the_threshold():
    text = "You silly fool, an idiot!  A fool."
    for threshold, expected in (
        (0.95, []),
        (0.9, ["idiot"]),
        (0.61, ["idiot"]),
        (0.6, ["fool", "idiot", "fool"]),  # at the threshold is unwanted
        (0.3, ["silly", "fool", "idiot", "fool"]),
    ):
        annotator = annotators.Classifier(scorer=f"{HERE}:worst_word", threshold=threshold)
        assert marked(annotator, text) == expected


def test_a_mark_is_as_sure_as_the_score_before_it_was_taken_out():
    text = "You silly fool, an idiot!"
    annotator = annotators.Classifier(scorer=f"{HERE}:worst_word", threshold=0.3, confidence=True)
    spans = annotator.annotate(records.Record(id="a", inputs="", targets=text)).spans
    assert [(text[s.start : s.end], s.strength) for s in spans] == [
        ("silly", 0.4),
        ("fool", 0.6),
        ("idiot", 0.9),
    ]
    assert annotator.description.endswith("threshold=0.3, confidence=True)")
    certain = annotators.Classifier(scorer=f"{HERE}:worst_word", threshold=0.3)
    assert certain.description.endswith("threshold=0.3)")
    whole = annotators.Classifier(scorer=f"{HERE}:constant", confidence=True)
    (span,) = whole.annotate(records.Record(id="a", inputs="", targets=text)).spans
    assert (span.start, span.end, span.strength) == (0, len(text), 0.7)
    counting = annotators.Classifier(scorer=f"{HERE}:count_of_bad", threshold=2, confidence=True)
    with pytest.raises(
        UsageError, match="record 'a': expected test_classifier:count_of_bad to give"
    ):
        marked(counting, "bad one, bad two")


def test_of_words_that_do_alike_the_first_goes():
    annotator = annotators.Classifier(scorer=f"{HERE}:count_of_bad", threshold=2)
    assert marked(annotator, "bad one, bad two, bad three") == ["bad", "bad"]
    spans = annotator.annotate(records.Record(id="a", inputs="", targets="bad bad bad")).spans
    assert [span.start for span in spans] == [0, 4]


def count_of_bad(texts):
    return [text.split().count("bad") for text in texts]


def test_when_no_word_helps_the_whole_output_is_marked():
    annotator = annotators.Classifier(scorer=f"{HERE}:constant")
    assert marked(annotator, "no word. of it!") == ["no word. of it!"]
    assert marked(annotator, " \n") == []  # no word, so nothing that a model said


@given(st.text(alphabet="ab! '-", max_size=12), st.floats(0.05, 1.0))
def test_what_is_left_scores_below_the_threshold(targets, threshold):
    """The definition of the marks, for a score that every a raises."""
    annotator = annotators.Classifier(scorer=f"{HERE}:share_of_a", threshold=threshold)
    spans = annotator.annotate(records.Record(id="a", inputs="", targets=targets)).spans
    left = list(targets)
    for span in reversed(spans):
        del left[span.start : span.end]
    assert share_of_a(["".join(left)])[0] < threshold
    assert bool(spans) == (share_of_a([targets])[0] >= threshold)


def share_of_a(texts):
    return [text.count("a") / 12 for text in texts]


def bad_words(number, of):
    return " ".join(["bad" if place < number else "fine" for place in range(of)])


def test_where_many_words_would_have_to_go_the_whole_output_is_marked():
    few = annotators.Classifier(scorer=f"{HERE}:count_of_bad", threshold=1)
    for number, of in ((12, 300), (50, 300), (50, 51)):
        assert marked(few, bad_words(number, of)) == ["bad"] * number
    for number, of in ((51, 300), (50, 50), (51, 52)):
        assert marked(few, bad_words(number, of)) == [bad_words(number, of)]
    more = annotators.Classifier(scorer=f"{HERE}:count_of_bad", threshold=1, most_words=60)
    assert marked(more, bad_words(60, 300)) == ["bad"] * 60
    assert more.description.endswith(", threshold=1, most_words=60)")
    one = annotators.Classifier(scorer=f"{HERE}:count_of_bad", threshold=1, most_words=1)
    assert marked(one, "a bad bad day") == ["a bad bad day"]
    assert marked(one, "a bad day") == ["bad"]
    with pytest.raises(
        UsageError, match=r"^Classifier\.most_words: expected at least 1, found 0\."
    ):
        annotators.Classifier(scorer=f"{HERE}:constant", most_words=0)


def test_up_to_eight_words_are_found_however_they_work_together():
    """The last one seems better than any other until the first seven are gone."""
    annotator = annotators.Classifier(scorer=f"{HERE}:of_eight")
    text = " ".join([*(f"fine{number}" for number in range(100)), *SEVEN, "hidden"])
    assert marked(annotator, text) == [*SEVEN, "hidden"]


SEVEN = [f"odd{number}" for number in range(7)]


def of_eight(texts):
    def score(words):
        if {*SEVEN} & words:
            return 0.9
        if "hidden" in words and len(words) > 1:
            return 0.8
        return 0.0 if "hidden" in words else 0.1

    return [score({*text.split()}) for text in texts]


def test_the_scorer_is_asked_for_few_texts_at_once_and_not_for_their_square(tmp_path, monkeypatch):
    body = "sizes.append(len(texts)); return [float('bad' in t or len(t) > 900) for t in texts]"
    write_scorer(tmp_path, monkeypatch, body, "sizing")
    import sizing

    sizing.sizes = []
    annotator = annotators.Classifier(scorer="sizing:score")
    for text, number in (
        # The text, its words, eight times the text without each word, the text without fifty.
        (bad_words(0, 300), 1 + 300 + sum(range(293, 301)) + 1),
        (bad_words(3, 150), 1 + 150 + 150 + 149 + 148),
    ):
        sizing.sizes.clear()
        annotator.annotate(records.Record(id="a", inputs="", targets=text))
        assert sum(sizing.sizes) == number
        assert max(sizing.sizes) == 128


def test_scoring_is_batched(tmp_path, monkeypatch):
    batches = []
    body = "sizes.append(len(texts)); return [float('bad' in text) for text in texts]"
    write_scorer(tmp_path, monkeypatch, body, "counting")
    import counting

    counting.sizes = batches
    annotator = annotators.Classifier(scorer="counting:score")
    batches.clear()
    assert marked(annotator, "one bad word") == ["bad"]
    assert batches == [1, 3, 3]  # the text, its words, the text without each


def test_description_tells_versions_of_the_scorer_apart(tmp_path, monkeypatch):
    descriptions = set()
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_scorer(folder, monkeypatch, f"return [{number}.0 for _ in texts]", f"mine{number}")
        descriptions.add(annotators.Classifier(scorer=f"mine{number}:score").description)
    assert all(
        re.fullmatch(r"Classifier\(mine\d:score \w{12}, threshold=0.5\)", d) for d in descriptions
    )
    assert len({d.split()[1] for d in descriptions}) == 2


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ("scorer", "Classifier.scorer: expected \"module:function\", found 'scorer'"),
        ("../mine.py:score", 'expected "module:function"'),
        (":score", 'expected "module:function"'),
        ("no_such_module:score", "Classifier.scorer: no module 'no_such_module'"),
        (f"{HERE}:missing", f"expected a function 'missing' in module '{HERE}'"),
        (f"{HERE}:too_few", "to give 2 finite numbers for as many texts, found [1.0]"),
        (f"{HERE}:not_finite", "finite numbers"),
        (f"{HERE}:words_for_numbers", "to give a number for each text"),
    ],
)
def test_mistakes(scorer, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        annotators.Classifier(scorer=scorer)


def too_few(texts):
    return [1.0]


def not_finite(texts):
    return [float("nan")] * len(texts)


def words_for_numbers(texts):
    return ["high"] * len(texts)


def test_a_threshold_that_is_no_number():
    with pytest.raises(UsageError, match=r"Classifier\.threshold"):
        annotators.Classifier(scorer=f"{HERE}:constant", threshold=float("nan"))


def test_a_missing_default_scorer_says_what_to_install(monkeypatch):
    from tnt_jax.annotators import python_function

    python_function.find.cache_clear()
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(UsageError, match="pip install alt-profanity-check"):
        annotators.Classifier()
    python_function.find.cache_clear()


def test_alt_profanity_check():
    pytest.importorskip("profanity_check", reason="needs pip install alt-profanity-check")
    annotator = annotators.Classifier(threshold=0.3)
    assert marked(annotator, "You are a stupid idiot, my friend.") == ["stupid", "idiot"]
    assert marked(annotator, "You are a kind person, my friend.") == []
    assert re.fullmatch(
        r"Classifier\(profanity_check:predict_prob alt-profanity-check==[\d.]+, threshold=0.3\)",
        annotator.description,
    )
    copy = pickle.loads(pickle.dumps(annotator))
    assert marked(copy, "idiot!") == marked(annotator, "idiot!") != []
