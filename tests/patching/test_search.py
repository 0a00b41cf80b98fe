"""The search for the smallest update, over attempts whose cuts are written down."""

import dataclasses
import json
import time
import types

import pytest
from helpers.mutations import LACKING, with_change

from tnt_jax import objectives
from tnt_jax.data import records
from tnt_jax.experiments import experiment
from tnt_jax.patching import search
from tnt_jax.runtime import stages
from tnt_jax.runtime.errors import UsageError

ARM = experiment.Arm(
    name="TNFF",
    objective=objectives.TntObjective(negative_term="forward_kl", positive_term="forward_kl"),
)
FIRST, SECOND = search.Attempt(weight=10), search.Attempt(weight=30, round=2)
PLAN = search.Plan(
    enough=0.8,
    attempts=(FIRST, SECOND),
    updates=(5, 10, 15, 20, 25),
    prompts="choice",
    deadline=float("inf"),
)


class Experiment:
    """Notes what is trained and said, and takes as long as is set; what models say is written down.

    Takes the place of `experiment_run.ExperimentRun`.
    """

    def __init__(self, clock, cuts, seconds_of_training=0.0, seconds_of_outputs=0.0):
        self.clock, self.cuts = clock, cuts
        self.of_training, self.of_outputs = seconds_of_training, seconds_of_outputs
        self.trained, self.rounds = [], []
        self.make_training_outputs, self.training_decoders = lambda: "outputs", ("greedy",)

    def seconds_of_outputs(self, name, decoders):
        assert (name, *decoders) == ("training_outputs", "greedy")
        return self.of_outputs

    def further_round(self, name, checkpoint, files, *, identity, keep_clean):
        assert not keep_clean
        self.clock.now += self.of_outputs
        self.rounds.append((name, checkpoint, identity))
        return [*files, name], " and ".join([*files, name])


@pytest.fixture
def run(monkeypatch):
    """Runs a search whose attempts have these cuts, by their weight."""

    def run(cuts, plan=PLAN, bleu=None, **seconds):
        clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
        opened = Experiment(clock, cuts, **seconds)

        def leg(self, attempt, after, updates):
            clock.now += opened.of_training
            opened.trained.append((attempt.weight, after, updates, self._files[attempt.round - 1]))
            place = plan.updates.index(updates)
            cut, score = cuts[attempt.weight][place], bleu[place] if bleu else 0.0
            look = search.Look(attempt=attempt, updates=updates, cut=cut, bleu=score, unwanted={})
            self._looks.append(look)
            self._seconds_of_training.append(opened.of_training)
            self._last_leg = opened.of_training
            return look

        monkeypatch.setattr(search._Search, "_leg", leg)
        monkeypatch.setattr(
            search._Search, "_model", lambda self, *model: (f"checkpoint_{model[1]}", str(model[0]))
        )
        monkeypatch.setattr(search._Search, "_is_kept", lambda self, make: False)
        monkeypatch.setattr(search._Search, "_kept_or_made", lambda self, make, train: make())
        monkeypatch.setattr(search, "time", clock)
        return search.search(opened, ARM, plan, {}), opened

    assert search.time is time
    return run


def taken(outcome):
    return outcome.best.attempt.weight, outcome.best.updates, outcome.is_enough


LONGER = dataclasses.replace(PLAN, updates=range(5, 55, 5))


def test_four_looks_that_are_enough_and_no_nearer_to_the_original_end_the_search(run):
    outcome, opened = run({10: [0.1, 0.8, 0.9, *[1.0] * 7]}, LONGER, [70, 50, *[40] * 8])
    assert taken(outcome) == (10, 10, True)
    assert outcome.files == "outputs"
    assert outcome.reason == "the cut was enough"
    assert opened.trained == [(10, k, k + 5, "outputs") for k in range(0, 30, 5)]


def test_while_looks_come_nearer_to_the_original_it_goes_on(run):
    bleu = [70, 40, 39, 38, 37, 41, 40, 40, 99, 40]
    outcome, opened = run({10: [0.1, *[0.8] * 7, 0.7, 0.8]}, LONGER, bleu)
    assert taken(outcome) == (10, 30, True)
    assert len(opened.trained) == 10  # that of 99 is not enough, and counts for nothing


def test_of_those_that_are_enough_the_one_nearest_to_the_original_is_taken(run):
    cuts = {10: [0.1, 0.8, 0.9, 0.79, 0.8]}
    assert taken(run(cuts, bleu=[70, 40, 50, 60, 45])[0]) == (10, 15, True)
    assert taken(run(cuts, bleu=[70, 52, 50, 60, 50])[0]) == (10, 10, True)


def test_of_those_that_are_as_near_the_largest_cut_is_taken_and_of_equal_ones_the_nearest(run):
    cuts = {10: [0.1, 0.8, 0.9, 0.9, 0.95]}
    assert taken(run(cuts, bleu=[70, 51, 50, 50.5, 49.9])[0]) == (10, 20, True)
    assert taken(run(cuts, bleu=[70, 51, 50, 50.5, 50])[0]) == (10, 25, True)


def test_an_attempt_may_end_with_the_first_that_is_enough(run):
    assert taken(run({10: [0.1, 0.1, 0.1, 0.1, 0.8]})[0]) == (10, 25, True)


def test_where_the_time_is_over_after_the_first_that_is_enough_it_is_taken(run):
    plan = dataclasses.replace(PLAN, deadline=49)  # as in the test of the time below
    outcome, opened = run({10: [0.1, 0.8, 1, 1, 1]}, plan, seconds_of_training=10)
    assert (len(opened.trained), taken(outcome)) == (2, (10, 10, True))
    assert outcome.reason == "the cut was enough"


def test_an_attempt_that_ends_without_it_is_followed_by_the_next_one_from_the_original(run):
    outcome, opened = run({10: [0.1, 0.2, 0.3, 0.4, 0.5], 30: [0.6, 0.9, 1, 1, 1]})
    assert taken(outcome) == (30, 15, True)
    together = "outputs and looks/round 2"
    assert opened.trained[5:7] == [(30, 0, 5, together), (30, 5, 10, together)]
    assert outcome.files == together
    # What the last look's model says to the prompts that it learned from.
    assert opened.rounds == [("looks/round 2", "checkpoint_25", "weight 10")]


def test_attempts_of_one_round_learn_from_the_same_outputs(run):
    attempts = (FIRST, search.Attempt(weight=30))
    cuts = {10: [0.1] * 5, 30: [0.9] * 5}
    outcome, opened = run(cuts, dataclasses.replace(PLAN, attempts=attempts))
    assert taken(outcome) == (30, 5, True)
    assert opened.rounds == []
    assert {files for *_, files in opened.trained} == {"outputs"}


def test_an_attempt_whose_cut_no_longer_rises_is_not_gone_on_with(run):
    cuts = {10: [0.1, 0.5, 0.5, 0.4, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0], 30: [0.9] * 10}
    outcome, opened = run(cuts, LONGER)
    assert taken(outcome) == (30, 5, True)
    assert [weight for weight, *_ in opened.trained] == [10] * 6 + [30] * 5


def test_an_attempt_that_has_not_begun_to_cut_goes_on(run):
    assert taken(run({10: [0.0, 0.0, 0.0, 0.0, 0.9]})[0]) == (10, 25, True)


def test_where_none_is_enough_the_largest_cut_is_taken_and_of_equal_ones_the_smaller_update(run):
    outcome, _ = run({10: [0.1, 0.6, 0.7, 0.7, 0.7], 30: [0.2, 0.7, 0.3, 0.3, 0.3]})
    assert taken(outcome) == (10, 15, False)
    assert outcome.files == "outputs"
    assert outcome.reason == "no attempt up to round 2, weight 30 was enough"


NOT_ENOUGH = {10: [0.1, 0.2, 0.3, 0.4, 0.5], 30: [0.9] * 5}


@pytest.mark.parametrize(
    ("deadline", "num_looks"),
    [
        (-1, 1),  # the first one always is made: without it there is nothing to take
        # After two legs a third one ends at 30, and the best of the first two, the second, is
        # trained again until 50.
        (49, 2),
        (50, 3),
        (90, 5),
    ],
)
def test_no_leg_begins_that_would_end_after_the_time(run, deadline, num_looks):
    plan = dataclasses.replace(PLAN, deadline=deadline)
    outcome, opened = run(NOT_ENOUGH, plan, seconds_of_training=10, seconds_of_outputs=100)
    assert len(opened.trained) == num_looks
    assert taken(outcome) == (10, 5 * num_looks, False)
    assert outcome.reason == search.TIME_IS_OVER
    assert opened.rounds == []


def test_a_round_counts_the_time_of_its_outputs(run):
    """Five legs end at 50; outputs take 100, a leg 10, and the best is trained again in 50."""
    for deadline, is_enough in ((209, False), (210, True)):
        plan = dataclasses.replace(PLAN, deadline=deadline)
        outcome, _ = run(NOT_ENOUGH, plan, seconds_of_training=10, seconds_of_outputs=100)
        assert outcome.is_enough == is_enough


def test_looks_are_at_a_model_that_learned_from_the_data_of_the_arm(tmp_path):
    """An arm may learn from clean outputs alone. So must the models that are looked at."""
    seen = []

    class Noted(Experiment):
        root, settings = tmp_path, types.SimpleNamespace(decoders={"greedy": None})
        first_decoder = "greedy"

        def describe_training(self, objective, files, changes):
            seen.append(changes)
            return "a model"

        def train(self, name, objective, files, *, changes, after):
            seen.append(changes)

        def outputs_of(self, name, checkpoint, prompts, decoder, *, identity):
            if len(seen) == 1:
                raise stages.NotDoneError(name)
            return str(tmp_path / "said.jsonl")

    said = records.Record(id="a", inputs="x", targets="a dirty room", negative_spans=((2, 7),))
    records.write_records(tmp_path / "said.jsonl", [said])
    arm = dataclasses.replace(ARM, dataset={"only_clean": True})
    plan = dataclasses.replace(PLAN, attempts=(FIRST,), updates=(5,))
    search.search(Noted(None, {}), arm, plan, {"greedy": str(tmp_path / "said.jsonl")})
    expected = experiment.Changes(schedule={"train_steps": 5}, dataset={"only_clean": True})
    assert seen == [expected] * 3


def test_what_was_found_is_read_as_it_was_written(run, tmp_path):
    outcome, _ = run(NOT_ENOUGH)
    note = tmp_path / "search.json"
    assert search.read_note(note, {"enough": 0.8}) is None
    search.write_note(note, {"enough": 0.8}, outcome)
    assert search.read_note(note, {"enough": 0.8}) == outcome
    assert search.read_note(note, {"enough": 0.9}) is None


def test_a_note_that_is_damaged_is_refused_in_one_line(run, tmp_path):
    outcome, _ = run(NOT_ENOUGH)
    note = tmp_path / "search.json"
    for place, value, message in (
        ((), None, "Expected `object`, got `null`"),
        (("best",), [], r"Expected `object`, got `array` - at `\$.best`"),
        (("looks", 0, "cut"), "x", r"Expected `float`, got `str` - at `\$.looks\[0\].cut`"),
        (("best", "attempt", "weight"), LACKING, "missing required field `weight`"),
    ):
        found = with_change(json.loads(json.dumps(dataclasses.asdict(outcome))), place, value)
        note.write_text(json.dumps({"of": {}, "found": found}))
        with pytest.raises(UsageError, match=rf"search.json: .*{message}.* Delete this file"):
            search.read_note(note, {})
