"""What an experiment refuses before the work."""

import functools

import pytest

from tnt_jax.experiments import experiment
from tnt_jax.models import decoding
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings


def of_original(kind):
    """An experiment of which nothing is made but its original's settings."""
    made = ("vocabulary", "annotator", "train", "update", "schedule", "generate", "annotate")
    return experiment.Experiment(
        output_dir="run",
        original_checkpoint_path="original",
        train_prompts="prompts.jsonl",
        eval_prompts="prompts.jsonl",
        decoders={"greedy": decoding.Decoding(max_length=8)},
        original_choice=functools.partial(settings.OriginalChoice, kind=kind),
        **dict.fromkeys((*made, "evaluate", "certificate"), pytest.fail),
    )


@pytest.mark.parametrize("kind", ["adapters_off", "adapters_cached"])
def test_adapters_are_trained_in_one_round(kind):
    adapters, whole = of_original(kind), of_original("parameters")
    message = (
        f"NUM_ROUNDS: expected 1 with ORIGINAL='{kind}', found 2: a further round starts from a "
        "patched model, and adapters start at nothing. Set NUM_ROUNDS=1, or ORIGINAL='parameters'."
    )
    adapters.check_rounds(1)
    whole.check_rounds(2)
    of_arm = {"original_choice": settings.OriginalChoice(path="original", kind=kind)}
    of_whole = {"original_choice": settings.OriginalChoice(path="original", kind="cached")}
    adapters.check_rounds(2, train=of_whole)
    for refused, train in ((adapters, None), (adapters, {}), (whole, of_arm)):
        with pytest.raises(UsageError) as found:
            refused.check_rounds(2, train=train)
        assert str(found.value) == message


def test_there_is_a_round_at_least():
    with pytest.raises(UsageError, match=r"^NUM_ROUNDS: expected at least 1, found 0\.$"):
        of_original("parameters").check_rounds(0)
