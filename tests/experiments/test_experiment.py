"""What an experiment refuses before the work, and where it hands models over."""

import pytest
from helpers import huggingface_model

from tnt_jax.experiments import experiment, experiment_run
from tnt_jax.runtime import stages
from tnt_jax.runtime.errors import UsageError


def experiment_in(folder):
    nothing = dict.fromkeys(
        ("original_choice", "update", "schedule", "generate", "annotate", "evaluate", "certificate")
    )
    return experiment.Experiment(
        output_dir=f"{folder}/run",
        original_checkpoint_path=f"{folder}/original",
        train_prompts=None,
        eval_prompts=None,
        vocabulary=lambda: None,
        annotator=lambda: None,
        decoders={"greedy": None},
        train=None,
        **nothing,
    )


def test_there_is_a_round_at_least():
    with pytest.raises(UsageError, match=r"^NUM_ROUNDS: expected at least 1, found 0\.$"):
        experiment.check_rounds(experiment_in("run"), 0)
    message = r"^NUM_ROUNDS: expected 1 where TRAIN_PROMPTS is None, found 2: "
    with pytest.raises(UsageError, match=message):
        experiment.check_rounds(experiment_in("run"), 2)


@pytest.mark.parametrize("folder", ["TNFF", "TNFF.round2"])
def test_in_our_format_the_model_of_the_last_round_is_handed_over(folder, tmp_path):
    huggingface_model.write_directory(tmp_path / "original")
    settings = experiment_in(tmp_path)
    model_dir = tmp_path / "run" / folder / "model"
    opened = experiment_run.open_run(settings)
    found = opened.hand_over("TNFF", str(model_dir / "checkpoint_5"), "orbax")
    assert found == str(model_dir)


def test_a_model_of_the_hub_that_changed_since_is_refused(tmp_path, monkeypatch):
    """Stages know it by its name alone, and would go on with outputs of other weights."""
    revisions = iter(["aaa", "aaa", "bbb", None])
    monkeypatch.setattr(experiment_run.checkpoint_kinds, "revision", lambda path: next(revisions))
    for _ in range(2):
        experiment_run._check_revision(tmp_path, "someone/model")
    message = r"^someone/model has changed on the Hugging Face hub: its revision is bbb, .* aaa\."
    with pytest.raises(UsageError, match=message):
        experiment_run._check_revision(tmp_path, "someone/model")
    experiment_run._check_revision(tmp_path, "someone/model")  # a local folder by now


def test_notes_of_finished_stages_name_what_made_them_as_before():
    """Another name would make everything again, and a model that is handed back would go first."""
    for function in ("_write_corpus", "_train_vocabulary", "_hand_back"):
        described = stages.describe(getattr(experiment_run, function), {}, [])
        name = f"tnt_jax.experiments.experiment.{function}"
        assert described["function"] == {"function": name}
