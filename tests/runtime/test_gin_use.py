"""A flag for something that the run never makes is refused; what it makes in any way is taken."""

import gin
import pytest

from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError

SHARED = [
    *("--gin_file=models/from_checkpoint.gin", "--gin.ORIGINAL_CHECKPOINT_PATH=original"),
    *("--gin.TRAIN_PROMPTS=a.jsonl", "--gin.EVAL_PROMPTS=b.jsonl", "--gin.OUTPUT_DIR=out"),
    *("--gin.ANNOTATOR=@annotators.Lexicon", "--gin.annotators.Lexicon.path=words.txt"),
    "--gin.TRAIN_STEPS=2",
]


@pytest.fixture(autouse=True)
def own_settings():
    with gin.unlock_config():
        gin.clear_config()
        yield
        gin.clear_config()


def configure(name, *more):
    return program.configure(
        f"tnt_jax.{name}", name, [f"--gin_file=runs/{name}.gin", *SHARED, *more]
    )


@pytest.mark.parametrize(
    ("name", "flag", "what"),
    [
        # A sweep makes its objectives itself, from their names.
        ("sweep", "objectives.TntObjective.smoothing=1e-6", "objectives.TntObjective"),
        ("sweep", "any/objectives.TntObjective.residual_weight=3", "objectives.TntObjective"),
        ("pipeline", "annotators.Gazetteer.path=values.json", "annotators.Gazetteer"),
    ],
)
def test_a_setting_of_what_the_run_does_not_make(name, flag, what):
    with pytest.raises(UsageError, match=f"--gin.{flag.partition('=')[0]}: .* makes no {what}, "):
        configure(name, f"--gin.{flag}")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sweep", ["sweep.Grid.objective_settings={'smoothing': 1e-6}"]),
        # Within the list that a macro holds, in a scope of its own.
        ("pipeline", ["tnff/objectives.TntObjective.residual_weight=3"]),
        (
            "pipeline",
            [
                *("ARMS=[@mine/experiment.Arm()]", "mine/experiment.Arm.name=mine"),
                "mine/experiment.Arm.objective=@objectives.TntObjective()",
            ],
        ),
        # As a value in a dictionary.
        ("sweep", ["DECODERS={'a': @b/decoding.Decoding()}", "b/decoding.Decoding.num_beams=2"]),
        # Not ours: it may ask gin by itself.
        ("sweep", ["json.JSONDecoder.strict=False"]),
    ],
)
def test_settings_of_what_it_makes(name, flags):
    assert configure(name, *(f"--gin.{flag}" for flag in flags)) is not None
