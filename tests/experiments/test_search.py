"""The search for the smallest update, over runs whose cuts are written down."""

import dataclasses
import time
import types

import pytest

from tnt_jax import objectives
from tnt_jax.experiments import experiment, search

ARM = experiment.Arm(
    name="TNFF",
    objective=objectives.TntObjective(negative_term="forward_kl", positive_term="forward_kl"),
)
PLAN = search.Plan(
    enough=0.8, weights=(10, 30), updates=(5, 10, 15, 20, 25), prompts="", deadline=float("inf")
)


@pytest.fixture
def cuts(monkeypatch):
    """Sets the cut of each look by weight; returns what was looked at."""
    looked = []

    def set_cuts(by_weight, seconds=0.0):
        def look(opened, arm, after, updates, plan, before):
            looked.append((arm.objective.negative_weight, after, updates))
            clock.now += seconds
            cut = by_weight[arm.objective.negative_weight][plan.updates.index(updates)]
            return search.Look(
                weight=arm.objective.negative_weight, updates=updates, cut=cut, unwanted={}
            )

        clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
        monkeypatch.setattr(search, "_look", look)
        monkeypatch.setattr(search, "time", clock)
        return looked

    assert search.time is time
    return set_cuts


def found(plan=PLAN):
    return search.search(None, ARM, plan, {"greedy": 10})


def taken(outcome):
    return outcome.best.weight, outcome.best.updates, outcome.is_enough


def test_the_first_look_that_is_enough_is_taken(cuts):
    looked = cuts({10: [0.1, 0.5, 0.8, 1.0, 1.0]})
    assert taken(found()) == (10, 15, True)
    assert looked == [(10, 0, 5), (10, 5, 10), (10, 10, 15)]


def test_a_run_that_ends_without_it_is_followed_by_a_larger_weight_from_the_original(cuts):
    looked = cuts({10: [0.1, 0.2, 0.3, 0.4, 0.5], 30: [0.6, 0.9, 1, 1, 1]})
    assert taken(found()) == (30, 10, True)
    assert looked[5:] == [(30, 0, 5), (30, 5, 10)]


def test_a_run_whose_cut_no_longer_rises_is_not_gone_on_with(cuts):
    longer = dataclasses.replace(PLAN, updates=range(5, 55, 5))
    looked = cuts({10: [0.1, 0.5, 0.5, 0.4, 0.5, 0.5, 0.2, 0.5, 1.0, 1.0], 30: [0.9] * 10})
    assert taken(found(longer)) == (30, 5, True)
    assert [weight for weight, _, _ in looked] == [10] * 8 + [30]


def test_a_run_that_has_not_begun_to_cut_goes_on(cuts):
    cuts({10: [0.0, 0.0, 0.0, 0.0, 0.9]})
    assert taken(found()) == (10, 25, True)


def test_where_none_is_enough_the_largest_cut_is_taken_and_of_equal_ones_the_smaller_update(cuts):
    cuts({10: [0.1, 0.6, 0.7, 0.7, 0.7], 30: [0.2, 0.7, 0.3, 0.3, 0.3]})
    outcome = found()
    assert taken(outcome) == (10, 15, False)
    assert outcome.reason == "no weight up to 30 was enough"


def test_no_leg_begins_that_would_end_after_the_time(cuts):
    looked = cuts({10: [0.1, 0.2, 0.3, 0.4, 0.5], 30: [0.9] * 5}, seconds=10)
    outcome = found(dataclasses.replace(PLAN, deadline=35))
    assert taken(outcome) == (10, 15, False)
    assert outcome.reason == "the time was over"
    assert len(looked) == 3
    # The first one always does: without it there is nothing to take.
    assert taken(found(dataclasses.replace(PLAN, deadline=-1))) == (10, 5, False)
