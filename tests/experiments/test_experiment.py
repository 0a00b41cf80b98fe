"""What an experiment refuses before the work, and where it hands models over."""

import pytest
from helpers import huggingface_model

from tnt_jax.experiments import experiment, experiment_run
from tnt_jax.runtime.errors import UsageError


def test_there_is_a_round_at_least():
    with pytest.raises(UsageError, match=r"^NUM_ROUNDS: expected at least 1, found 0\.$"):
        experiment.check_rounds(0)


@pytest.mark.parametrize("folder", ["TNFF", "TNFF.round2"])
def test_in_our_format_the_model_of_the_last_round_is_handed_over(folder, tmp_path):
    huggingface_model.write_directory(tmp_path / "original")
    nothing = dict.fromkeys(
        ("original_choice", "update", "schedule", "generate", "annotate", "evaluate", "certificate")
    )
    settings = experiment.Experiment(
        output_dir=str(tmp_path / "run"),
        original_checkpoint_path=str(tmp_path / "original"),
        train_prompts=None,
        eval_prompts=None,
        vocabulary=lambda: None,
        annotator=lambda: None,
        decoders={"greedy": None},
        train=None,
        **nothing,
    )
    model_dir = tmp_path / "run" / folder / "model"
    opened = experiment_run.open_run(settings)
    found = opened.hand_over("TNFF", str(model_dir / "checkpoint_5"), "orbax")
    assert found == str(model_dir)
