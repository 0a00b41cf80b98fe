"""What `patch` knows of a user's settings."""

import dataclasses
import pathlib

import pytest

from tnt_jax.patching import choices, pipeline_gin
from tnt_jax.patching.unwanted import Unwanted

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
def given(tmp_path, monkeypatch):
    """The settings that a command line gives, and a gin file of the user's."""
    monkeypatch.chdir(tmp_path)

    def given(*settings, text=""):
        pathlib.Path("mine.gin").write_text(text)
        return pipeline_gin.PipelineGin(
            model="model",
            folder=tmp_path,
            unwanted=Unwanted(words="words.txt"),
            decoding="greedy",
            own_files=["mine.gin"],
            settings=settings,
        ).given

    return given


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
