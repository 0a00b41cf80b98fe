"""What `patch` knows of a user's settings."""

import dataclasses
import pathlib

import pytest

from tnt_jax.patching import choices, patch_run, pipeline_gin, search
from tnt_jax.patching.unwanted import Unwanted
from tnt_jax.runtime import program
from tnt_jax.runtime.errors import UsageError

T5 = choices.Network(
    is_decoder_only=False,
    num_layers=2,
    num_params=1_000,
    emb_dim=8,
    num_heads=2,
    vocab_size=50,
)
LAPTOP = choices.Machine(platform="cpu", num_devices=1, num_bytes=2**34)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes what writes the gin file, for the settings of a command line and of a gin file."""
    monkeypatch.chdir(tmp_path)

    def made(*settings, text=""):
        pathlib.Path("mine.gin").write_text(text)
        return pipeline_gin.PipelineGin(
            model="model",
            folder=tmp_path,
            unwanted=Unwanted(words="words.txt"),
            decoding="greedy",
            own_files=["mine.gin"],
            settings=settings,
        )

    return made


@pytest.fixture
def given(made):
    """The settings that a command line gives, and a gin file of the user's."""
    return lambda *settings, text="": made(*settings, text=text).given


def chosen_with_a_rate(given):
    chosen = choices.update(given, {"inputs": 8, "targets": 8}, T5, LAPTOP)
    of_looks = choices.Looks(period=5, number=20, reason="")
    return [*chosen, choices.learning_rate(given, chosen, of_looks)]


@pytest.mark.parametrize("name", ["optax.adafactor", "optimizers.adafactor"])
def test_an_optimizer_that_the_user_names_is_the_one_that_counts(given, name):
    for settings in (given(f"OPTIMIZER=@{name}"), given(text=f"OPTIMIZER = @{name}")):
        chosen = choices.update(settings, {"inputs": 8, "targets": 8}, T5, LAPTOP)
        (optimizer,) = (choice for choice in chosen if choice.macro == "OPTIMIZER")
        assert (optimizer.value, optimizer.reason) == (f"@{name}", "given")
        of_looks = choices.Looks(period=5, number=20, reason="")
        rate = choices.learning_rate(settings, chosen, of_looks)
        assert rate.reason.startswith("0.001 for Adafactor, ")


def test_a_schedule_that_the_user_names_is_shown(given):
    settings = given("LEARNING_RATE=@optax.cosine_decay_schedule()")
    chosen = choices.update(settings, {"inputs": 8, "targets": 8}, T5, LAPTOP)
    of_looks = choices.Looks(period=5, number=20, reason="")
    rate = choices.learning_rate(settings, chosen, of_looks)
    assert (rate.value, rate.reason) == ("@optax.cosine_decay_schedule()", "given")


def test_what_is_only_known_when_it_is_made_is_not_counted_with(given):
    assert given("BATCH_SIZE=@mine.size()", "OPTIMIZER=%MINE", "MAX_LENGTH=16") == {
        "BATCH_SIZE": choices.UNKNOWN,
        "OPTIMIZER": choices.UNKNOWN,
        "MAX_LENGTH": 16,
    }


def test_none_is_a_value_and_no_setting_that_is_not_known(given):
    chosen = choices.update(
        given("CLEAN_PER_MARKED=None", text="TRAINED_LAYERS = None"),
        {"inputs": 8, "targets": 8},
        dataclasses.replace(T5, is_decoder_only=True),
        LAPTOP,
    )
    values = {choice.macro: (choice.value, choice.reason) for choice in chosen}
    assert values["CLEAN_PER_MARKED"] == values["TRAINED_LAYERS"] == (None, "given")


@pytest.mark.parametrize(
    "setting",
    [
        "optax.adam.b2=0.98",
        "optax.warmup_exponential_decay_schedule.decay_rate=0.7",
        "optax.adam.learning_rate=1e-4",  # the schedule that is written is not read then
    ],
)
def test_settings_of_the_optimizer_that_is_chosen(made, setting):
    gin = made(setting)
    for chosen in ([], chosen_with_a_rate(gin.given)):
        gin.write(chosen)
        patch_run.configure(gin)
    # The pipeline that does the same takes the file.
    assert program.configure("tnt_jax.pipeline", "pipeline", [f"--gin_file={gin.path}"])


@pytest.mark.parametrize("is_in_file", [False, True])
def test_settings_of_another_optimizer_are_refused_when_it_is_chosen(made, is_in_file):
    setting = "optax.adamw.weight_decay=0.1"
    gin = made(text=f"import optax\n{setting}") if is_in_file else made(setting)
    gin.write([])
    patch_run.configure(gin)
    gin.write(chosen_with_a_rate(gin.given))
    with pytest.raises(UsageError, match=r"optax\.adamw\.weight_decay: .* makes no optax\.adamw, "):
        patch_run.configure(gin)


@pytest.mark.parametrize(
    ("is_enough", "reason"),
    [
        # What `search` takes is not the nearest to the original: tests/patching/test_search.py.
        (True, "The largest cut of the looks that were enough and within one BLEU of the highest"),
        (False, "The largest cut"),
    ],
)
def test_the_file_says_why_that_look_was_taken(made, is_enough, reason):
    look = search.Look(attempt=search.ROUNDS[0], updates=40, cut=0.9, bleu=50.0, unwanted={})
    found = search.Found(
        best=look, files="outputs.jsonl", is_enough=is_enough, looks=[look], reason=""
    )
    gin = made()
    gin.write([], found)
    lines = gin.path.read_text().splitlines()
    assert lines[lines.index("TRAIN_STEPS = 40") - 2] == f"# {reason}"
