import copy

import pytest

from tnt_jax.evaluation import diagnosis, evaluations


def rate(numerator, denominator=200):
    return {"numerator": numerator, "denominator": denominator, "value": numerator / denominator}


HEALTHY = {
    "original": {
        "unwanted_outputs": rate(40),
        "repeated_word": rate(2),
        "repeated_phrase": rate(10),
        "unknown_token": rate(0),
        "distinct_outputs": rate(190),
        "distinct_trigrams": rate(1500, 3000),
        "mean_length": 20.0,
    },
    "current": {
        "unwanted_outputs": rate(4),
        "repeated_word": rate(3),
        "repeated_phrase": rate(12),
        "unknown_token": rate(0),
        "distinct_outputs": rate(188),
        "distinct_trigrams": rate(1480, 3000),
        "mean_length": 19.5,
    },
    "comparison": {
        "bleu": 72.0,
        "rouge_l": 81.0,
        "exact_match": rate(90),
        "unchanged_clean": rate(90, 160),
    },
    "cut": 0.9,
    "certificate": {
        "negative_residual": 0.02,
        "negative_collateral": None,
        "negative_smallest_cost": 1.4,
        "positive_collateral": None,
    },
    "unrelated": {"kl": 0.05, "unchanged": rate(60, 80)},
}


NOTHING = {
    "negative_residual": None,
    "negative_collateral": None,
    "negative_smallest_cost": None,
    "positive_collateral": None,
}


def notes(certificate):
    return diagnosis.notes(evaluations.parse({**HEALTHY, "certificate": certificate}).certificate)


def seen(num_newly_unwanted=1, **changed):
    """Names and suggestions of what is seen; `part__field=value` changes the healthy evaluation."""
    evaluation = copy.deepcopy(HEALTHY)
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if field:
            evaluation[part][field] = value
        else:
            evaluation[part] = value
    found = diagnosis.signs(evaluations.parse(evaluation), num_newly_unwanted)
    assert all(sign.evidence and sign.suggestion for sign in found)
    return {sign.name: sign.suggestion for sign in found if sign.is_seen}


def test_a_healthy_update_has_no_sign():
    assert seen() == {}


@pytest.mark.parametrize(
    ("changed", "name", "advice"),
    [
        ({"current__repeated_word": rate(12)}, "repeated words", "Loss imbalance or poor marks"),
        ({"current__repeated_phrase": rate(20)}, "repeated phrases", "Loss imbalance"),
        ({"current__unknown_token": rate(6)}, "unknown tokens", "Loss imbalance or poor marks"),
        ({"current__mean_length": 14.0}, "length drift", "end too early"),
        ({"current__mean_length": 30.0}, "length drift", "no longer end"),
        ({"current__distinct_outputs": rate(20)}, "collapse of distinct outputs", "the same"),
        (
            {"current__distinct_trigrams": rate(700, 3000)},
            "collapse of distinct trigrams",
            "the same",
        ),
        ({"comparison__bleu": 31.0}, "low BLEU or ROUGE-L", "alpha too high"),
        ({"comparison__rouge_l": 41.0}, "low BLEU or ROUGE-L", "alpha too high"),
        ({"comparison__unchanged_clean": rate(15, 160)}, "clean outputs changed", "a KL term"),
        ({"num_newly_unwanted": 12}, "unwanted elsewhere", "alternatives"),
        ({"unrelated__kl": 0.3}, "leak into other tasks", "not trained on"),
        ({"unrelated__kl": None}, "leak into other tasks", "not trained on"),
    ],
)
def test_signs(changed, name, advice):
    found = seen(**changed)
    assert list(found) == [name]
    assert advice in found[name]


def masked(num_same=60, **of_mask):
    """What an evaluation has of a mask; so many of the 200 outputs are the mask's."""
    comparison = {"bleu": 40.0, "rouge_l": 50.0, "exact_match": rate(20)} | of_mask
    to_current = {"bleu": 62.0, "rouge_l": 70.0, "exact_match": rate(num_same)}
    return {**HEALTHY["current"], "comparison": comparison, "to_current": to_current}


@pytest.mark.parametrize(
    ("bleu", "rouge_l", "is_seen"),
    [(32.0, 40.0, False), (31.9, 40.0, True), (32.0, 39.9, True), (95.0, 95.0, False)],
)
def test_where_there_is_a_mask_low_is_below_four_fifths_of_its_own(bleu, rouge_l, is_seen):
    """Most outputs have to change here: without the mask all of these but the last are low."""
    name = "low BLEU or ROUGE-L"
    changed = {"comparison__bleu": bleu, "comparison__rouge_l": rouge_l}
    assert (name in seen(**changed, mask=masked())) == is_seen
    assert (name in seen(**changed)) == (bleu < 50)
    # Where little has to change, more is asked for than without a mask.
    assert name in seen(mask=masked(bleu=95.0, rouge_l=97.0))


def test_the_mask_is_not_told_that_it_changed_too_much():
    evaluation = {**HEALTHY, "mask": masked(num_same=200)}
    evaluation["comparison"] = HEALTHY["comparison"] | {"bleu": 30.0, "rouge_l": 30.0}
    found = diagnosis.signs(evaluations.parse(evaluation), 0)
    assert "low BLEU or ROUGE-L" not in {sign.name for sign in found}
    # An arm is, with the mask's numbers beside its own.
    evaluation["mask"] = masked(num_same=199)
    (sign,) = (
        sign
        for sign in diagnosis.signs(evaluations.parse(evaluation), 0)
        if sign.name == "low BLEU or ROUGE-L"
    )
    assert sign.is_seen
    assert sign.evidence == (
        "BLEU 30.0 and ROUGE-L 30.0 to the original's outputs; the decode mask has 40.0 and 50.0"
    )


def test_without_a_cut_the_certificate_tells_why():
    no_cut = {"cut": 0.05, "current__unwanted_outputs": rate(38)}
    moved = seen(**no_cut)["no reduction"]
    assert "ineffective marks" in moved
    stuck = seen(**no_cut, certificate__negative_residual=1.3)["no reduction"]
    assert "hardly moved" in stuck
    evaluation = {**HEALTHY, "cut": 0.05}
    del evaluation["certificate"]
    (sign,) = (sign for sign in diagnosis.signs(evaluations.parse(evaluation), 0) if sign.is_seen)
    assert sign.suggestion.startswith("Ineffective marks or learning rate")


def test_of_graded_marks_both_parts_tell_whether_the_model_moved():
    """A model that did not move: nothing is residual, for a part of every mark may stay."""
    stuck = {**NOTHING, "negative_residual": 0.0, "negative_collateral": 0.7}
    stuck["negative_smallest_cost"] = 0.7
    no_cut = {"cut": 0.0, "current__unwanted_outputs": rate(40)}
    assert "hardly moved" in seen(**no_cut, certificate={**stuck, "num_graded": 12})["no reduction"]
    moved = {**stuck, "negative_collateral": 0.01, "num_graded": 12}
    assert "ineffective marks" in seen(**no_cut, certificate=moved)["no reduction"]
    # With marks of strength 1 alone, and in files of before, the residual tells.
    for certificate in (stuck, {**stuck, "num_graded": 0}):
        assert "ineffective marks" in seen(**no_cut, certificate=certificate)["no reduction"]
    unknown = {**stuck, "negative_collateral": None, "num_graded": 12}
    assert "or learning rate" in seen(**no_cut, certificate=unknown)["no reduction"]


def test_where_every_token_of_other_tasks_is_marked_no_leak_was_measured():
    unrelated = {**HEALTHY["unrelated"], "kl": None, "num_positive": 0.0}
    assert seen(unrelated=unrelated) == {}
    (sign,) = diagnosis.signs(evaluations.parse({**HEALTHY, "unrelated": unrelated}), 0)[-1:]
    assert sign.evidence == (
        "on unrelated prompts every token is marked, so none has a KL; 75.0% (60 of 80) unchanged"
    )
    # With tokens that have one, None is a number that was not finite.
    unrelated["num_positive"] = 400.0
    assert list(seen(unrelated=unrelated)) == ["leak into other tasks"]


def test_notes_say_what_a_certificate_is_of():
    usual = {**NOTHING, "num_negative": 40.0, "num_positive": 900.0}
    usual |= {"num_graded": 0, "num_cut_inputs": 0}
    for certificate in (None, NOTHING, usual, {**usual, "num_removed_everywhere": 0}):
        assert notes(certificate) == []
    (note,) = notes({**usual, "num_negative": 2000.0})
    assert note.startswith("2,000 of 2,900 positions of the original's outputs are marked (")
    assert note.endswith("KL elsewhere is of the few others.")
    (note,) = notes({**usual, "num_negative": 40.0, "num_positive": 0.0})
    assert note.endswith("KL elsewhere is of no position.")
    (note,) = notes({**usual, "num_removed_everywhere": 3})
    assert note.startswith("3 ids are removed at every position (.everywhere.json).")
    (note,) = notes({**usual, "num_graded": 7})
    assert note.startswith("7 of the ids to remove have a strength below 1.")
    cut = {"num_cut_inputs": 2, "num_cut_targets": 0, "num_lost_marks": 5}
    (note,) = notes({**usual, **cut})
    assert note.startswith("2 inputs and 0 outputs are cut (TASK_FEATURE_LENGTHS): ")
    assert note.endswith(" 5 ids to remove among it.")


def test_a_few_outputs_are_chance():
    assert seen(cut=0.0, original__unwanted_outputs=rate(3)) == {}
    assert seen(current__unknown_token=rate(2)) == {}
