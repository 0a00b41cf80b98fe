"""What the processes of a run must have alike of what it is watched with."""

import dataclasses

import pytest

from tnt_jax.models import decoding
from tnt_jax.watching import samples, watching


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Settings of one's own evaluation."""

    task: str = "a"
    every: int = 5


WATCH = watching.Watch(
    sample_every=2, sample_prompts="here.jsonl", inference_evaluation=Evaluation()
)


def describe(watch, *asked):
    prompts = [samples.Prompt(id=each, inputs=(3, 1)) for each in asked]
    speaker = samples.Speaker(
        model=None,
        vocabulary=None,
        prompts=prompts,
        decoder=decoding.Decoding(max_length=8),
        longest_input=8,
    )
    return watch.describe([samples.Samples(speaker, "model", 2)] if asked else [])


@pytest.mark.parametrize(
    "change",
    [
        {"sample_every": 3},
        {"sample_decoder": decoding.Decoding(max_length=9)},
        {"inference_evaluation": Evaluation(task="b")},
        {"inference_evaluation": Evaluation(every=6)},
        {"inference_evaluation": None},
    ],
)
def test_what_all_compute_together_is_compared(change):
    assert describe(dataclasses.replace(WATCH, **change), "1") != describe(WATCH, "1")


def test_prompts_are_compared_by_what_they_say():
    there = dataclasses.replace(WATCH, sample_prompts="there.jsonl")
    assert describe(there, "1", "2") == describe(WATCH, "1", "2")
    assert describe(WATCH, "1", "3") != describe(WATCH, "1", "2") != describe(WATCH, "1")


def test_settings_of_samples_that_nobody_asks_for_are_not():
    nothing = watching.Watch()
    greedy = decoding.Decoding(max_length=9)
    other = watching.Watch(sample_decoder=greedy, wandb_project="mine")
    assert describe(nothing) == describe(other)
