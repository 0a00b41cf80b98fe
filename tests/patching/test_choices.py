"""What `patch` chooses: each rule against cases worked out by hand."""

import dataclasses
import math
import re

import pytest

from tnt_jax.patching import choices
from tnt_jax.patching.choices import Counts
from tnt_jax.runtime.errors import UsageError

# A T5 of 60 million parameters, and SmolLM2 135M.
SMALL_T5 = choices.Network(
    is_decoder_only=False,
    num_layers=12,
    num_params=60_000_000,
    emb_dim=512,
    num_heads=8,
    vocab_size=32_128,
)
SMOL = choices.Network(
    is_decoder_only=True,
    num_layers=30,
    num_params=134_500_000,
    emb_dim=576,
    num_heads=9,
    vocab_size=49_152,
)
LAPTOP = choices.Machine(platform="cpu", num_devices=1, num_bytes=16 * 2**30)
LENGTHS = {"inputs": 64, "targets": 32}


def by_macro(found):
    return {choice.macro: choice for choice in found}


def chosen(network=SMALL_T5, machine=LAPTOP, lengths=None, **given):
    return by_macro(choices.update(given, lengths or LENGTHS, network, machine))


def values(found):
    return {macro: choice.value for macro, choice in found.items()}


# --- Prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "is_kept_back", "expected"),
    [
        (60, False, (12, 12)),
        (512, False, (102, 102)),
        (10_000, False, (512, 512)),
        (9, True, (4, 5)),
        (2_000, True, (512, 1_488)),
    ],
)
def test_a_fifth_is_kept_back_for_each_or_half_of_those_that_the_user_keeps_back(
    number, is_kept_back, expected
):
    assert choices.split_sizes(number, is_kept_back) == expected


@pytest.mark.parametrize(("number", "is_kept_back"), [(59, False), (3, True)])
def test_too_few_prompts_are_refused(number, is_kept_back):
    with pytest.raises(UsageError, match=rf"expected at least .* found {number}\."):
        choices.split_sizes(number, is_kept_back)


def test_as_many_are_looked_at_as_have_64_unwanted_ones():
    # A quarter is unwanted: 64 of 256. Nine tenths are: 71.1 of them have 64, so 72.
    assert choices.num_to_choose_by(1000, Counts(outputs=64, marked=16))[0] == 256
    assert choices.num_to_choose_by(1000, Counts(outputs=100, marked=90))[0] == 72
    assert choices.num_to_choose_by(1000, Counts(outputs=64, marked=64))[0] == 64
    few, reason = choices.num_to_choose_by(50, Counts(outputs=64, marked=64))
    assert few == 50
    assert reason == "all that were kept back; 64 would be enough to measure the wish on"
    # The report is of 256 at least.
    assert choices.num_to_report_on(1000, Counts(outputs=100, marked=90))[0] == 256
    assert choices.num_to_report_on(1000, Counts(outputs=64, marked=8))[0] == 512
    assert choices.num_to_report_on(300, Counts(outputs=64, marked=8))[0] == 300


# --- Lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longest_prompt", "longest_output", "expected"),
    [(8, 6, (8, 8)), (9, 7, (16, 16)), (511, 100, (512, 128)), (3_000, 128, (512, 128))],
)
def test_lengths_are_those_of_the_texts_rounded_up_to_eight(
    longest_prompt, longest_output, expected
):
    found = by_macro(
        choices.after_pilot({}, [3, longest_prompt], [longest_output, 2], 0, SMALL_T5, LAPTOP)
    )
    inputs, targets = expected
    assert found["TASK_FEATURE_LENGTHS"].value == {"inputs": inputs, "targets": targets}
    assert found["MAX_LENGTH"].value == targets
    is_cut = longest_prompt > 512
    assert ("1 are cut at 512" in found["TASK_FEATURE_LENGTHS"].reason) == is_cut


def longest(lengths, num_unended=0, **given):
    found = by_macro(choices.after_pilot(given, [9], lengths, num_unended, SMALL_T5, LAPTOP))
    assert found["TASK_FEATURE_LENGTHS"].value["targets"] == found["MAX_LENGTH"].value
    return found["MAX_LENGTH"].value, found["MAX_LENGTH"].reason


CUT = "are longer: their ends, and marks there, are cut off"


def test_a_few_outputs_that_run_on_make_no_difference():
    # 95 % of 64 outputs are 61.
    reason = "95 % of 64 outputs have up to 30 tokens: a quarter more"
    assert longest([30] * 64) == (40, reason)
    assert longest([30] * 61 + [128] * 3, 3) == (40, f"{reason}; 3 of 64 {CUT}")
    assert longest([30] * 60 + [128] * 4, 4) == (128, f"the most that is chosen; 4 of 64 {CUT}")


def test_where_no_more_is_chosen_it_says_so_and_how_many_outputs_are_cut():
    """An output of the pilot is cut if it did not end, a given one if it is longer."""
    reason = "the most that is chosen"
    assert longest([20] * 64 + [300] * 40 + [90] * 60) == (128, f"{reason}; 40 of 164 {CUT}")
    assert longest([20] * 62 + [128] * 2 + [300] * 40 + [90] * 60, 2) == (
        128,
        f"{reason}; 42 of 164 {CUT}",
    )
    assert longest([110] * 164) == (128, reason)
    # 125 and a little more: that is no limit.
    assert longest([100] * 164) == (
        128,
        "95 % of 164 outputs have up to 100 tokens: a quarter more",
    )


def test_where_lengths_are_given_outputs_are_as_long_as_they_say():
    given = {"TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 48}}
    reason = "as the lengths say that are given"
    assert longest([30] * 64, **given) == (48, reason)
    assert longest([30] * 60 + [48] * 2 + [60] * 3, 2, **given) == (48, f"{reason}; 5 of 65 {CUT}")
    (first,) = (
        choice
        for choice in choices.before_pilot(given, [9], SMALL_T5, LAPTOP)
        if choice.macro == "MAX_LENGTH"
    )
    assert (first.value, first.reason) == (48, reason)


def test_what_the_user_sets_is_not_chosen_and_others_follow_it():
    given = {"MAX_LENGTH": 16, "BATCH_SIZE": 24, "OPTIMIZER": choices.UNKNOWN}
    found = by_macro(choices.after_pilot(given, [9], [40], 0, SMALL_T5, LAPTOP))
    assert found["TASK_FEATURE_LENGTHS"].value == {"inputs": 16, "targets": 16}
    assert {macro for macro, choice in found.items() if choice.is_given} == given.keys()
    assert found["BATCH_SIZE"].value == 24
    assert {found[macro].reason for macro in given} == {"given"}
    assert by_macro(choices.before_pilot(given, [9], SMALL_T5, LAPTOP))["MAX_LENGTH"].value == 16


# --- How many outputs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marked", "available", "expected"),
    [
        (32, 10_000, 400),  # half of them: 200 of 400
        (64, 10_000, 256),  # all of them, and at least 256
        (8, 10_000, 1_600),  # an eighth
        (32, 300, 300),  # what there is
        (1, 10_000, 10_000),  # 200 of 12,800
    ],
)
def test_as_many_outputs_as_have_200_marked_ones(marked, available, expected):
    assert choices.training_outputs(Counts(outputs=64, marked=marked), available)[0] == expected


@pytest.mark.parametrize(
    ("seconds_per_output", "expected"),
    [
        (0.001, 10_000),  # 180 seconds would be enough for 180,000, and 1,000 marked are of 10,000
        (0.1, 1_800),
        (0.5, 1_000),  # 360 are fewer than there are
        (0.15, 1_000),  # 1,200 are hardly more
    ],
)
def test_where_outputs_are_cheap_more_of_them_are_learned_from(seconds_per_output, expected):
    found = Counts(outputs=1_000, marked=100)
    assert choices.more_training_outputs(found, 20_000, seconds_per_output, 1_800) == expected
    assert choices.more_training_outputs(found, 1_700, 0.001, 1_800) == 1_700


def test_what_is_too_rare_is_refused_with_what_would_do():
    # One of 64, and perhaps three more: 4 of 64 are 6 of 100 prompts. 20 take 1,280.
    one = Counts(outputs=64, marked=1)
    expected = r"too rare: 1 of 64 .* about 1280 prompts that bring it up in --prompts, or"
    with pytest.raises(UsageError, match=expected):
        choices.training_outputs(one, 100, has_eval_prompts=True)
    # Two fifths are kept back, so that 3 of 5 are learned from; and the parts are rounded.
    expected = r"about 2135 prompts that bring it up in --prompts, of which 854 are kept back, or"
    with pytest.raises(UsageError, match=expected):
        choices.training_outputs(one, 100)


@pytest.mark.parametrize(("marked", "outputs"), [(72, 72), (10, 72), (7, 72), (1, 64), (1, 500)])
def test_as_many_prompts_as_it_asks_for_are_enough(marked, outputs):
    found = Counts(outputs=outputs, marked=marked)
    said = choices.too_rare(found, outputs, has_eval_prompts=False)
    number, kept_back = map(int, re.findall(r"about (\d+) .* of which (\d+)", said)[0])
    left = number - sum(choices.split_sizes(number, False))
    assert left * marked / outputs >= choices.FEWEST_MARKED
    assert number - kept_back == left


# --- The update -----------------------------------------------------------------------------------


def test_a_t5_trains_all_parameters_where_they_fit():
    found = values(chosen())
    assert found["ORIGINAL"] == "parameters"
    assert found["BATCH_SIZE"] == 16
    assert found["OPTIMIZER"] == "@optax.adam"
    assert found["NUM_MICROBATCHES"] == 1
    assert found["REMAT_POLICY"] == "none"
    assert "TRAINED_LAYERS" not in found
    assert found["MAX_GRADIENT_NORM"] == 1.0


def test_a_t5_that_does_not_fit_twice_has_cached_states_and_a_larger_one_adapters():
    # 3 x 240 MB of parameters, gradients and original; 60 % of the memory may be used.
    row = choices._bytes_of_row(LENGTHS, 12, SMALL_T5)
    three = 3 * 4 * 60_000_000 + row
    two = 2 * 4 * 60_000_000 + 4 * 32_128 * 512 + row

    def kind(needed):
        machine = dataclasses.replace(LAPTOP, num_bytes=math.ceil(needed / 0.6))
        return chosen(machine=machine)["ORIGINAL"].value

    # Adam has two more.
    five = three + 2 * 4 * 60_000_000
    for needed, optimizer in ((five + 1, "@optax.adam"), (five - 1, "@optimizers.adafactor")):
        machine = dataclasses.replace(LAPTOP, num_bytes=math.ceil(needed / 0.6))
        assert values(chosen(machine=machine))["OPTIMIZER"] == optimizer
    assert kind(three + 1) == "parameters"
    assert kind(three - 1) == "cached"
    assert kind(two + 1) == "cached"
    assert kind(two - 1) == "adapters_off"


def test_a_t5_trains_adapters_where_they_are_asked_for():
    found = by_macro(choices.update({}, LENGTHS, SMALL_T5, LAPTOP, needs_adapters=True))
    assert found["ORIGINAL"].value == "adapters_off"
    assert found["TRAINED_LAYERS"].value is None
    assert found["OPTIMIZER"].value == "@optax.adam"


def test_a_decoder_only_model_trains_adapters_in_its_upper_third():
    found = chosen(SMOL)
    assert found["ORIGINAL"].value == "adapters_off"
    assert found["TRAINED_LAYERS"].value == 10
    assert found["BATCH_SIZE"].value == 8
    assert found["MAX_GRADIENT_NORM"].value == 1.0
    of_31 = chosen(dataclasses.replace(SMOL, num_layers=31))
    assert of_31["TRAINED_LAYERS"].value == 11


def test_a_batch_that_does_not_fit_is_computed_in_parts_and_one_row_again():
    row = choices._bytes_of_row(LENGTHS, 10, SMOL)

    def with_room_for(rows):
        needed = 4 * SMOL.num_params + rows * row
        return values(chosen(SMOL, dataclasses.replace(LAPTOP, num_bytes=int(needed / 0.6) + 1)))

    assert [with_room_for(rows)["NUM_MICROBATCHES"] for rows in (8, 7, 4, 3, 1)] == [1, 2, 2, 4, 8]
    assert with_room_for(1)["REMAT_POLICY"] == "none"
    assert with_room_for(0.5)["REMAT_POLICY"] == "full"


def test_whether_activations_fit_is_told_by_the_parts_that_were_given():
    row = choices._bytes_of_row(LENGTHS, 10, SMOL)
    needed = 4 * SMOL.num_params + 4 * row  # 4 of the 8 rows of a batch
    machine = dataclasses.replace(LAPTOP, num_bytes=int(needed / 0.6) + 1)
    assert chosen(SMOL, machine)["NUM_MICROBATCHES"].value == 2
    found = {parts: chosen(SMOL, machine, NUM_MICROBATCHES=parts) for parts in (1, 2, 8)}
    assert {parts: of["REMAT_POLICY"].value for parts, of in found.items()} == {
        1: "full",
        2: "none",
        8: "none",
    }
    assert found[1]["REMAT_POLICY"].reason == "those of a part do not fit: computed again"
    # Who splits the batch refuses it.
    assert chosen(SMOL, machine, NUM_MICROBATCHES=0)["NUM_MICROBATCHES"].value == 0


def test_batches_can_be_split_over_the_devices():
    eight = choices.Machine(platform="tpu", num_devices=8, num_bytes=16 * 2**30)
    twelve = dataclasses.replace(eight, num_devices=12)
    assert chosen(SMOL, eight)["BATCH_SIZE"].value == 8
    assert chosen(SMALL_T5, twelve)["BATCH_SIZE"].value == 24
    found = by_macro(choices.before_pilot({}, [9], SMOL, twelve))
    assert found["GENERATE_BATCH_SIZE"].value == 72


def test_every_device_has_all_weights_and_its_part_of_the_rows():
    """No more of a model fits on eight devices than on one, but eight times the rows."""
    large = dataclasses.replace(SMALL_T5, num_params=250_000_000)
    one = choices.Machine(platform="gpu", num_devices=1, num_bytes=4 * 2**30)
    eight = dataclasses.replace(one, num_devices=8)
    for machine in (one, eight):
        # Three copies are 2.8 of 2.4 GiB; two are 1.9.
        assert chosen(large, machine)["ORIGINAL"].value == "cached"
        assert chosen(large, machine)["OPTIMIZER"].value == "@optimizers.adafactor"
    row = choices._bytes_of_row(LENGTHS, 10, SMOL)
    num_bytes = int((4 * SMOL.num_params + 2 * row) / 0.6) + 1  # two rows

    def parts(num_devices):
        machine = choices.Machine(platform="gpu", num_devices=num_devices, num_bytes=num_bytes)
        return chosen(SMOL, machine, BATCH_SIZE=8)["NUM_MICROBATCHES"].value

    assert [parts(number) for number in (1, 2, 4)] == [4, 2, 1]


def test_fewer_outputs_are_made_at_a_time_where_their_keys_and_values_do_not_fit():
    # 2 x 30 layers x 576 x 4 bytes, for 16 + 128 tokens: 19.9 MB an output.
    of_output = 2 * 30 * 576 * 4 * (16 + 128)
    room = 4 * SMOL.num_params + 20 * of_output
    small = dataclasses.replace(LAPTOP, num_bytes=int(room / 0.6) + 1)
    found = by_macro(choices.before_pilot({}, [9], SMOL, small))
    assert found["GENERATE_BATCH_SIZE"].value == 16


# --- Looks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "marked", "given", "period"),
    [
        (256, 200, {"BATCH_SIZE": 8}, 8),  # 200 marked and all 56 clean ones: 32 updates
        (2_000, 200, {}, 13),  # 200 marked and 600 clean ones: 50 updates
        (72, 35, {}, 5),  # an epoch of 4.5 updates: every 5
        (9_000, 1_000, {}, 40),  # one of 250: every 62.5 would be too seldom
        (2_000, 200, {"CLEAN_PER_MARKED": 0.5}, 5),  # and 100 clean ones: 18.75 updates
        (2_000, 200, {"CLEAN_PER_MARKED": 5}, 19),  # and 1,000: 75
        (2_000, 200, {"CLEAN_PER_MARKED": None}, 32),  # and all 1,800: 125
        (2_000, 200, {"CLEAN_PER_MARKED": choices.UNKNOWN}, 13),
    ],
)
def test_a_look_every_quarter_of_an_epoch(outputs, marked, given, period):
    of_update = choices.update(given, LENGTHS, SMALL_T5, LAPTOP)
    found = choices.looks(Counts(outputs=outputs, marked=marked), of_update)
    assert found.period == period


@pytest.mark.parametrize(
    ("network", "given", "peak"),
    [
        (SMOL, {}, "1e-3"),
        (SMALL_T5, {}, "3e-4"),
        (SMALL_T5, {"OPTIMIZER": "@optimizers.adafactor"}, "1e-3"),
        (SMALL_T5, {"OPTIMIZER": "@optax.adafactor"}, "1e-3"),
        (SMALL_T5, {"OPTIMIZER": "@mine/optax.adafactor()"}, "1e-3"),
        (SMALL_T5, {"OPTIMIZER": "@optax.adamw"}, "3e-4"),
    ],
)
def test_the_learning_rate_halves_with_the_looks_and_knows_no_end(network, given, peak):
    def rate(period):
        of_looks = choices.Looks(period=period, number=20, reason="")
        of_update = choices.update(given, LENGTHS, network, LAPTOP)
        return choices.learning_rate(given, of_update, of_looks)

    assert rate(40).value == "@optax.warmup_exponential_decay_schedule()"
    bindings = dict(line.split(" = ") for line in rate(40).bindings)
    assert {name.rpartition(".")[2]: float(value) for name, value in bindings.items()} == {
        "init_value": 0,
        "peak_value": float(peak),
        "warmup_steps": 5,
        "transition_steps": 160,
        "decay_rate": 0.5,
    }
    assert any(line.endswith("transition_steps = 80") for line in rate(8).bindings)


def test_the_wish_counts_with_a_standard_error_more():
    assert choices.threshold(0.9, 100) == pytest.approx(0.9 + 0.03)
    assert choices.threshold(0.75, 48) == pytest.approx(0.75 + 0.0625)
    assert choices.threshold(0.9, 4) == 1.0  # 0.15 more would be beyond all
    assert choices.threshold(1.0, 100) == 1.0


def test_a_choice_is_written_as_gin_has_it():
    found = chosen(SMOL)
    assert found["OPTIMIZER"].text == "@optax.adam"
    assert found["ORIGINAL"].text == "'adapters_off'"
    assert found["ORIGINAL"].flag == "--gin.ORIGINAL"
