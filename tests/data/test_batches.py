import dataclasses
import re
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from helpers.examples import example
from hypothesis import strategies as st

from tnt_jax.data import layouts, marks, records
from tnt_jax.data.batches import Batches, batch_for_eval
from tnt_jax.data.examples import (
    check_token_ids,
    digest,
    loss_mask_until,
    marks_with_sets,
    max_negative_ids,
    says_removed,
    select_clean,
    sets_of,
    unique_pairs,
)
from tnt_jax.data.layouts import are_all_covered, convert_features, count_lost
from tnt_jax.data.t5patches_layout import T5PATCHES_MODES, t5patches_target
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization

LENGTHS = {"inputs": 4, "targets": 5}


# --- One batch ------------------------------------------------------------------------------------


def test_two_examples_by_hand():
    features = convert_features(
        [
            example([7, 8, 1], [3, 9, 4, 1], [(1, 6), (1, 9), (2, 4)]),
            example([8, 1], [5, 1], loss_mask=[0, 1]),
        ],
        LENGTHS,
        num_negative_ids=2,
    )
    expected = {
        "encoder_input_tokens": [[7, 8, 1, 0], [8, 1, 0, 0]],
        "decoder_input_tokens": [[0, 3, 9, 4, 1], [0, 5, 1, 0, 0]],
        "decoder_target_tokens": [[3, 9, 4, 1, 0], [5, 1, 0, 0, 0]],
        "decoder_loss_mask": [[1, 1, 1, 1, 0], [0, 1, 0, 0, 0]],
        "decoder_negative_ids": [
            [[-1, -1], [6, 9], [4, -1], [-1, -1], [-1, -1]],
            [[-1, -1]] * 5,
        ],
    }
    assert list(features) == list(expected)
    for name, value in expected.items():
        assert features[name].dtype == np.int32
        np.testing.assert_array_equal(features[name], value, err_msg=name)


def test_strengths_lie_beside_their_ids():
    pairs, strengths = unique_pairs(
        np.array([[2, 4], [1, 9], [1, 6], [1, 9]]), np.array([0.5, 0.25, 1.0, 0.75])
    )
    assert pairs.tolist() == [[1, 6], [1, 9], [2, 4]]
    assert strengths.tolist() == [1.0, 0.75, 0.5]  # of an id that is marked twice the larger
    assert unique_pairs(pairs, np.ones(3))[1] is None
    below_0 = unique_pairs(np.array([[1, 9], [1, 6], [1, 9]]), np.array([-3.0, -2.0, -1.0]))[1]
    assert below_0.tolist() == [-2.0, -1.0]
    graded = example([7, 1], [3, 9, 4, 1], pairs)
    graded = dataclasses.replace(graded, negative_strengths=strengths)
    plain = example([8, 1], [5, 1], [(0, 5)])
    features = convert_features([graded, plain], {"inputs": 4, "targets": 2})
    assert features["decoder_negative_strengths"].dtype == np.float32
    np.testing.assert_array_equal(
        features["decoder_negative_strengths"], [[[1, 1], [1, 0.75]], [[1, 1], [1, 1]]]
    )
    # The feature is one of the data set's: there for all batches of it, or for none.
    of_data = Batches([graded, plain], 1, LENGTHS, seed=0, shuffle=False)
    assert all("decoder_negative_strengths" in of_data[k] for k in (0, 1))
    assert "decoder_negative_strengths" not in convert_features([plain], LENGTHS)
    assert all(
        "decoder_negative_strengths" in b for b in batch_for_eval([plain, graded], 1, LENGTHS)
    )
    assert digest([graded]) != digest([dataclasses.replace(graded, negative_strengths=None)])


def test_what_is_too_long_is_cut_and_counted():
    examples = [
        example([7, 8, 9, 6, 5, 1], [2, 3, 4, 5, 6, 7, 1], [(0, 2), (4, 6), (5, 7), (5, 8)]),
        dataclasses.replace(example([7, 8, 9, 6, 5], [2, 3, 4, 5, 1]), keeps_last_input=False),
    ]
    features = convert_features(examples, LENGTHS, num_negative_ids=1)
    # An input keeps its end where it has one; a target does not end where it is cut.
    assert features["encoder_input_tokens"].tolist() == [[7, 8, 9, 1], [7, 8, 9, 6]]
    assert features["decoder_target_tokens"].tolist() == [[2, 3, 4, 5, 6], [2, 3, 4, 5, 1]]
    assert features["decoder_negative_ids"][0, :, 0].tolist() == [2, -1, -1, -1, 6]
    assert count_lost(examples, LENGTHS) == (2, 1, 2, 0)


def with_spans(targets, numbers, loss_mask=None):
    made = example(targets=targets, loss_mask=loss_mask)
    return dataclasses.replace(made, span_numbers=np.array(numbers, np.int32))


def test_spans_are_lost_with_their_last_token():
    examples = [
        with_spans([2, 3, 4, 5, 6, 7, 1], [1, 0, 2, 3, 3, 3, -1]),  # two spans end within 5 tokens
        with_spans([2, 3, 4, 5, 6, 7, 8, 9, 1], [0, 0, 0, 0, -1, 1, 1, 2, -1]),
        example(targets=[2, 3, 4, 5, 6, 7, 1], pairs=[(5, 7)]),  # not known as spans
    ]
    assert count_lost(examples, LENGTHS).num_spans == 2


def test_spans_that_cover_everything():
    covered = with_spans([2, 3, 4, 1], [-1, 1, 2, -1])
    silent = with_spans([1], [-1])

    def are_covered(*examples):
        return are_all_covered(examples, LENGTHS)

    assert are_covered(covered, silent)
    assert not are_covered(silent)  # nothing is marked: another mistake
    assert not are_covered(covered, with_spans([2, 3, 1], [1, 0, -1]))
    # What is to be kept lies beyond the length, or has no loss.
    assert are_covered(covered, with_spans([2, 3, 4, 5, 6, 7, 1], [1, 1, 1, 1, 1, 0, -1]))
    assert are_covered(covered, with_spans([2, 3, 1], [1, 0, -1], loss_mask=[1, 0, 0]))
    # Every token removed by its id, as an annotator may do at every position: no mistake.
    assert not are_covered(covered, example(targets=[2, 3], pairs=[(0, 2), (1, 3)]))


def test_a_prompt_has_no_targets():
    features = convert_features([example([7, 1], [])], LENGTHS, 1)
    assert not features["decoder_target_tokens"].any()
    assert not features["decoder_loss_mask"].any()


def test_id_0_is_a_token_of_a_target_like_any_other():
    """What fills a row up is known by the length of the target, not by its id."""
    targets = [example(targets=[5, 0, 2, 0]), example(targets=[5, 0, 2, 0], loss_mask=[1, 1, 0, 1])]
    features = convert_features(targets, LENGTHS)
    assert features["decoder_loss_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 1, 0]]


def test_too_many_ids_at_a_position_are_a_usage_error():
    pairs = [(0, 2), (0, 3), (0, 4), (1, 2)]
    with pytest.raises(UsageError, match=r"'e' has 3 negative ids .* num_negative_ids is 2"):
        convert_features([example(targets=[5, 1], pairs=pairs, name="e")], LENGTHS, 2)
    assert max_negative_ids([example(), example(pairs=pairs)]) == 3
    assert max_negative_ids([example()]) == 1


@pytest.mark.parametrize("lengths", [{"inputs": 4}, {"inputs": 4, "targets": 0}])
def test_missing_lengths_are_a_usage_error(lengths):
    with pytest.raises(UsageError, match=r"TASK_FEATURE_LENGTHS: expected .* found \{'inputs': 4"):
        convert_features([example()], lengths, 1)


def test_ids_without_embedding_are_a_usage_error():
    examples = [example(), example([4, 1], [1], [(0, 8)], name="e")]
    check_token_ids(examples, num_embeddings=9)
    with pytest.raises(UsageError, match=r"'e': negative_pairs has ids from 8 to 8, .* 8 embedd"):
        check_token_ids(examples, num_embeddings=8)
    with pytest.raises(UsageError, match=r"'e': inputs has ids from 1 to 4"):
        check_token_ids(examples, num_embeddings=4)


# --- Batches --------------------------------------------------------------------------------------


def numbered(num_examples):
    """Examples that can be told apart by their first input token, from 2."""
    return [example([n + 2, 1], [n + 2, 1], [(0, n + 2)] * (n == 0)) for n in range(num_examples)]


def seen(batches, ks):
    return np.concatenate([batches[k]["encoder_input_tokens"][:, 0] for k in ks]) - 2


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (10, 4), (3, 8), (1, 2)])
def test_every_example_is_seen_once_per_epoch(num_examples, batch_size):
    batches = Batches(numbered(num_examples), batch_size, LENGTHS, seed=3)
    num_epochs = 4 * batch_size
    order = seen(batches, range(num_epochs * num_examples // batch_size))
    epochs = order.reshape(num_epochs, num_examples)
    assert (np.sort(epochs, axis=1) == np.arange(num_examples)).all()


def test_every_epoch_and_every_seed_has_its_own_order():
    orders = [
        tuple(seen(Batches(numbered(12), 12, LENGTHS, seed=seed), [epoch]))
        for seed in (0, 1)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 8


def test_batch_k_does_not_depend_on_what_was_read_before():
    straight = Batches(numbered(7), 4, LENGTHS, seed=0)
    all_batches = [straight[k] for k in range(9)]
    for k in (8, 0, 5):
        resumed = Batches(numbered(7), 4, LENGTHS, seed=0)
        for name, value in resumed.batch(k).items():
            np.testing.assert_array_equal(value, all_batches[k][name])


def test_without_shuffling_the_order_is_kept():
    batches = Batches(numbered(5), 3, LENGTHS, seed=0, shuffle=False)
    assert seen(batches, range(3)).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_the_number_of_negative_ids_is_that_of_the_data_not_of_the_batch():
    examples = [*numbered(6), example(targets=[5, 1], pairs=[(0, 2), (0, 3), (0, 5)])]
    batches = Batches(examples, 2, LENGTHS, seed=0)
    assert {batches[k]["decoder_negative_ids"].shape for k in range(7)} == {(2, 5, 3)}


def test_batches_need_examples_and_rows():
    with pytest.raises(UsageError, match="found none"):
        Batches([], 2, LENGTHS, seed=0)
    with pytest.raises(UsageError, match="BATCH_SIZE"):
        Batches(numbered(1), 0, LENGTHS, seed=0)


def test_evaluation_reads_everything_once_and_fills_up_with_masked_rows():
    batches = list(batch_for_eval(numbered(5), 3, LENGTHS))
    assert len(batches) == 2
    inputs, masks = (
        np.concatenate([batch[name] for batch in batches])
        for name in ("encoder_input_tokens", "decoder_loss_mask")
    )
    assert inputs[:, 0].tolist() == [2, 3, 4, 5, 6, 0]
    assert masks.sum(axis=1).tolist() == [2, 2, 2, 2, 2, 0]
    assert (batches[1]["decoder_negative_ids"] == -1).all()


# --- Mining ---------------------------------------------------------------------------------------


def test_clean_examples_are_sampled_and_marked_ones_kept():
    examples = [
        example([n + 2, 1], pairs=[(0, 1)] * (n % 10 == 0), name=str(n)) for n in range(100)
    ]
    kept = select_clean(examples, 2.5, seed=0)
    assert kept[1:] == (10, 90, 25)
    names = [int(e.id) for e in kept.examples]
    assert len(names) == 35
    assert names == sorted(names)
    assert set(range(0, 100, 10)) <= set(names)
    again, other = (
        [e.id for e in select_clean(examples, 2.5, seed=seed).examples] for seed in (0, 1)
    )
    assert again == [str(n) for n in names] != other
    assert len(select_clean(examples, 50, seed=0).examples) == 100
    assert len(select_clean(examples, 0, seed=0).examples) == 10


def test_mining_needs_marks_and_a_ratio():
    with pytest.raises(UsageError, match="none of the 3 has a negative token"):
        select_clean([example()] * 3, 2, seed=0)
    with pytest.raises(UsageError, match="expected 0 or more, found -1"):
        select_clean([example(pairs=[(0, 1)])], -1, seed=0)


# --- The published T5Patches layout ---------------------------------------------------------------

LONGER_NEGATIVE = ([3, 9, 4, 8, 1], [3, 7, 4, 1])
LONGER_CORRECTED = ([3, 9, 1], [3, 7, 9, 1])
POSITIVE = ([0], [2, 3, 1])
EQUAL = ([3, 1], [3, 1])


@pytest.mark.parametrize(
    ("mode", "sequences", "targets", "negative_positions", "loss_mask"),
    [
        ("first", LONGER_NEGATIVE, [3, 9, 4, 8, 1], [1], [1] * 5),
        ("diff", LONGER_NEGATIVE, [3, 9, 4, 8, 1], [1, 3, 4], [1] * 5),
        ("full", LONGER_NEGATIVE, [3, 9, 4, 8, 1], [0, 1, 2, 3, 4], [1] * 5),
        ("first", EQUAL, [3, 1], [], [1, 1]),
        ("diff", EQUAL, [3, 1], [], [1, 1]),
        # One is the beginning of the other: no token of the shorter one differs.
        ("first", ([3, 9], [3, 9, 1]), [3, 9], [], [1, 1]),
        ("diff", ([3, 9, 0, 0], [3, 9, 1]), [3, 9], [], [1, 1]),
        ("corrective_first", LONGER_NEGATIVE, [3, 7, 4, 1], [], [0, 1, 0, 0]),
        ("corrective_diff", LONGER_NEGATIVE, [3, 7, 4, 1], [], [0, 1, 0, 1]),
        ("corrective_full", LONGER_NEGATIVE, [3, 7, 4, 1], [], [1, 1, 1, 1]),
        ("corrective_first", ([3, 9, 1], [3, 9]), [3, 9], [], [0, 0]),
        ("corrective_diff", LONGER_CORRECTED, [3, 7, 9, 1], [], [0, 1, 1, 1]),
        ("negative_and_positive_first", LONGER_NEGATIVE, [3, 9, 4, 8, 1], [1], [1] * 5),
        ("negative_and_positive_diff", LONGER_NEGATIVE, [3, 9, 4, 8, 1], [1, 3, 4], [1] * 5),
        ("negative_and_positive_full", EQUAL, [3, 1], [0, 1], [1, 1]),
        ("negative_and_positive_first", LONGER_CORRECTED, [3, 7, 9, 1], [], [1] * 4),
        ("negative_and_positive_diff", POSITIVE, [2, 3, 1], [], [1, 1, 1]),
        ("negative_and_positive_full", ([5, 0, 0, 0], [2, 3, 1]), [2, 3, 1], [], [1, 1, 1]),
    ],
)
def test_t5patches_modes_by_hand(mode, sequences, targets, negative_positions, loss_mask):
    found_targets, pairs, found_mask = t5patches_target(*(np.array(ids) for ids in sequences), mode)
    assert found_targets.tolist() == targets
    assert pairs.tolist() == [[position, targets[position]] for position in negative_positions]
    assert found_mask.tolist() == loss_mask


@hypothesis.given(*[st.lists(st.integers(1, 4), min_size=1, max_size=6)] * 2)
def test_t5patches_padding_changes_nothing(negative, corrected):
    for mode in T5PATCHES_MODES:
        plain, padded = (
            t5patches_target(np.array(negative + zeros), np.array(corrected + zeros[1:]), mode)
            for zeros in ([], [0, 0, 0])
        )
        for left, right in zip(plain, padded, strict=True):
            np.testing.assert_array_equal(left, right)


def test_an_unknown_t5patches_mode_is_a_usage_error():
    message = "expected one of ('first', 'diff', 'full', 'corrective_first'"
    with pytest.raises(UsageError, match=re.escape(message)):
        t5patches_target(np.array([1]), np.array([1]), "second")


def test_neither_records_nor_batches_import_a_framework():
    code = (
        "import sys; from tnt_jax.data import batches, records, t5patches_layout;"
        "print([m for m in ('tensorflow', 'seqio', 'jax', 'gin') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- Up to the first negative token ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([], None),
        ([(1, 6)], [1, 1, 0, 0, 0]),
        ([(0, 9), (2, 5), (2, 7), (3, 8)], [1, 1, 1, 0, 0]),  # 9 is beside the 5 of position 0
        ([(0, 9), (3, 7)], None),  # what the target itself says is nowhere removed
        ([(0, 5)], [1, 0, 0, 0, 0]),
        ([(4, 1)], [1, 1, 1, 1, 1]),
    ],
)
def test_loss_until_the_first_negative(pairs, expected):
    one = example(targets=[5, 6, 7, 8, 1], pairs=pairs)
    found = loss_mask_until("first_negative", one.targets, one.negative_pairs)
    assert (found if found is None else found.tolist()) == expected
    assert loss_mask_until("end", one.targets, one.negative_pairs) is None


@pytest.mark.parametrize(
    ("strengths", "spans", "expected"),
    [
        ([-2.0, 1.0], [0, 0, 0, 0, -1], [1, 1, 1, 1, 0]),
        ([0.01, 1.0], [0, 0, 0, 0, -1], [1, 1, 1, 1, 0]),
        ([0.01, 1.0], [0, 1, 0, 0, -1], [1, 1, 0, 0, 0]),  # somebody marked it, however unsure
        ([0.9999, -1.0], [0, 0, 0, 0, -1], None),
    ],
)
def test_what_is_raised_or_only_lowered_is_no_mistake_unless_a_span_marks_it(
    strengths, spans, expected
):
    one = example(targets=[5, 6, 7, 8, 1], pairs=[(1, 6), (3, 8)])
    strengths, spans = np.array(strengths), np.array(spans)
    found = loss_mask_until("first_negative", one.targets, one.negative_pairs, strengths, spans)
    assert (found if found is None else found.tolist()) == expected
    graded = dataclasses.replace(one, negative_strengths=strengths, span_numbers=spans)
    assert says_removed(graded) == (expected is not None)


def test_loss_until_what_is_unknown():
    with pytest.raises(UsageError, match="loss_until: expected one of end, first_negative, found"):
        loss_mask_until("first", np.array([1]), np.zeros((0, 2), np.int32))


# --- Sets that examples share ---------------------------------------------------------------------


def test_a_set_at_a_position_is_one_mark_by_hand():
    """The first of two sets at a position is named; an id that another mark removes more stays."""
    record = records.Record(
        id="r",
        inputs="a",
        targets="abc",
        negative_spans=((1, 2),),
        negative_token_ids=((1, LONG), (1, OTHER), (2, (5, LONG[0]), 0.5), (2, LONG, 0.25)),
    )
    example, _ = marks.example_from_record(record, tokenization.Bytes(), "whole", "end")
    numbers = {one.name: number for one, number in zip(example.sets, (0, 1), strict=False)}
    pairs, strengths = marks_with_sets(example, numbers)
    assert strengths is not None
    found = [(*pair, s) for pair, s in zip(pairs.tolist(), strengths.tolist(), strict=True)]
    own = ord("b") + 3  # which both sets have, too
    assert own in LONG and own in OTHER
    others = [(1, i, 1.0) for i in sorted({*OTHER} - {*LONG})]
    assert found == [(1, -2, 1.0), *others, (2, -2, 0.25), (2, 5, 0.5), (2, LONG[0], 0.5)]
    assert marks_with_sets(example, {})[0] is example.negative_pairs
    assert max_negative_ids([example]) == len({*LONG, *OTHER})
    assert max_negative_ids([example], with_sets=True) == 1 + len(others)


LONG, OTHER = tuple(range(90, 120)), tuple(range(81, 105))


@pytest.mark.parametrize("layout", [layouts.ENCODER_DECODER, layouts.CAUSAL])
@pytest.mark.parametrize("pack", [False, True])
def test_batches_with_sets_are_those_without(layout, pack):
    """When their names are replaced by their ids."""
    random = np.random.default_rng(0)
    rows = [
        records.Record(
            id=str(n),
            inputs="in",
            targets="some text",
            negative_spans=((0, 1),),
            negative_token_ids=tuple(
                records.with_strength(
                    int(position),
                    (LONG, OTHER, (5,))[random.integers(3)],
                    random.choice([1.0, 0.5]),
                )
                for position in sorted(random.integers(0, 9, 4))
            ),
        )
        for n in range(20)
    ]
    examples = marks.examples_from_records(rows, tokenization.Bytes(), "here")
    sets = sets_of(examples[:10], examples[10:])
    assert {*sets.ids} == {LONG, OTHER}
    settings = {"batch_size": 8, "seed": 0, "pack": pack, "feature_layout": layout}
    lengths = {"inputs": 8, "targets": 16}
    written = Batches(examples, task_feature_lengths=lengths, **settings)
    named = Batches(examples, task_feature_lengths=lengths, set_numbers=sets.numbers, **settings)
    assert named.num_negative_ids < written.num_negative_ids == len({*LONG, *OTHER})
    num_named = 0
    for k in range(3):
        one, other = written.batch(k), named.batch(k)
        kinds = ("decoder_negative_ids", "decoder_negative_strengths")
        for name in one.keys() - {*kinds}:
            np.testing.assert_array_equal(one[name], other[name])
        for place in np.ndindex(*one["decoder_target_tokens"].shape):
            found = []
            for features in (one, other):
                strength_of = {}
                of_place = (features[name][place].tolist() for name in kinds)
                for id_, strength in zip(*of_place, strict=True):
                    num_named += id_ < -1
                    for i in sets.ids[-2 - id_] if id_ < -1 else (id_,):
                        strength_of[i] = max(strength, strength_of.get(i, 0.0))
                found.append({i: s for i, s in strength_of.items() if i >= 0})
            assert found[0] == found[1]
    assert num_named > 20


def test_sets_that_are_too_large_are_written_out(monkeypatch):
    record = records.Record(id="r", inputs="", targets="abc", negative_token_ids=((1, LONG),))
    examples = marks.examples_from_records([record], tokenization.Bytes(), "here")
    assert sets_of(examples).ids == (LONG,)
    monkeypatch.setattr("tnt_jax.data.examples._MOST_IN_SETS", 29)
    assert sets_of(examples) == ({}, ())
