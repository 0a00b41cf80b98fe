import dataclasses
import enum
import functools
import json
import pathlib
import re

import gin
import numpy as np
import optax
import pytest

from tnt_jax.data import datasets
from tnt_jax.experiments import experiment_run
from tnt_jax.localization import prefix_values
from tnt_jax.runtime import settings_json
from tnt_jax.tokenizers import tokenization


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    label: str = "p"


@dataclasses.dataclass(frozen=True)
class LaterPoint:
    x: float
    added: float = dataclasses.field(default=2.0, metadata={"omit_default": True})
    folder: str | None = dataclasses.field(default=None, compare=False)


class Holder:
    def __init__(self, content):
        self.content = content

    def method(self):
        return self.content


def adder(amount):
    def add(x):
        return x + amount

    return add


CYCLE = []
CYCLE.append(CYCLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voice:
    pitch: int
    words: tuple = ("hello",)


@pytest.mark.parametrize(
    ("moved", "name"),
    [
        (tokenization.SentencePiece, "data.tokenization.SentencePiece"),
        (prefix_values.Training, "annotators.prefix_values.Training"),
        (experiment_run._hand_back, "experiments.experiment._hand_back"),
        (datasets.RecordFiles, "data.datasets.RecordFiles"),
    ],
)
def test_files_name_what_has_moved_as_before(moved, name):
    """Names in notes and checkpoints that earlier versions wrote, by which a run goes on."""
    assert settings_json.written_name(moved) == f"tnt_jax.{name}"


def test_a_setting_that_was_added_changes_nothing_while_it_has_its_default():
    named = {"class": f"{__name__}.LaterPoint"}
    assert settings_json.describe(LaterPoint(1.0)) == {**named, "x": 1.0}
    assert settings_json.describe(LaterPoint(1.0, 3.0)) == {**named, "x": 1.0, "added": 3.0}


def test_what_does_not_count_in_a_comparison_is_not_described():
    here, there = LaterPoint(1.0, folder="here"), LaterPoint(1.0, folder="there")
    assert settings_json.describe(here) == settings_json.describe(there)


def greet(*, style):
    return style


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (3, 3),
        (0.5, 0.5),
        (float("inf"), "inf"),
        ((1, [2, "a"]), [1, [2, "a"]]),
        ({"b": 1, 2: {3}}, {"b": 1, "2": [3]}),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (np.float32(0.25), 0.25),
        (np.dtype("int32"), "int32"),
        (Color.RED, {"class": "test_settings_json.Color", "name": "RED"}),
        (Point(1.0), {"class": "test_settings_json.Point", "x": 1.0, "label": "p"}),
        (
            Holder([Point(2.0)]).content,
            [{"class": "test_settings_json.Point", "x": 2.0, "label": "p"}],
        ),
        (Holder(1), {"class": "test_settings_json.Holder", "content": 1}),
        (
            Holder(1).method,
            {
                "function": "test_settings_json.Holder.method",
                "self": {"class": "test_settings_json.Holder", "content": 1},
            },
        ),
        (Point, {"function": "test_settings_json.Point"}),
        (adder(5), {"function": "test_settings_json.adder.<locals>.add", "amount": 5}),
        (
            functools.partial(adder, amount=2),
            {"partial": {"function": "test_settings_json.adder"}, "args": [], "amount": 2},
        ),
        (CYCLE, ["..."]),
        (json, {"module": "json"}),
    ],
)
def test_descriptions(value, expected):
    assert settings_json.describe(value) == expected


def test_description_of_arrays_is_of_their_content():
    described = settings_json.describe(np.arange(3))
    assert described["shape"] == [3]
    assert described == settings_json.describe(np.arange(3))
    assert described != settings_json.describe(np.arange(1, 4))


def test_description_of_built_optimizers_holds_their_numbers_and_no_address():
    def built(peak):
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 10, 100)
        return json.dumps(settings_json.describe(optax.adafactor(schedule)))

    assert built(0.1) == built(0.1)
    assert built(0.1) != built(0.2)
    assert not re.search(r"0x[0-9a-f]{6}", built(0.1))


@pytest.fixture
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


def test_description_of_gin_references_calls_nothing(clean_gin):
    gin.parse_config(
        """
from __gin__ import dynamic_registration
import optax

BASE = 0.1
RATE = %BASE
optax.adafactor.learning_rate = @optax.warmup_cosine_decay_schedule()  # lacks arguments: no call
optax.warmup_cosine_decay_schedule.peak_value = %RATE
careful/optax.adafactor.decay_rate = 0.5
OPTIMIZER = @optax.adafactor
CAREFUL = @careful/optax.adafactor
"""
    )
    plain = {
        "function": "optax._src.alias.adafactor",
        "learning_rate": {
            "call": "optax.schedules._schedule.warmup_cosine_decay_schedule",
            "peak_value": 0.1,
        },
    }
    assert settings_json.describe(optax.adafactor) == plain
    assert settings_json.describe(gin.query_parameter("OPTIMIZER/gin.macro.value")) == plain
    careful = gin.query_parameter("CAREFUL/gin.macro.value")
    assert settings_json.describe(careful) == {**plain, "decay_rate": 0.5}
    # What a program's function receives is not the reference but what gin makes of it.
    assert settings_json.describe(careful.scoped_configurable_fn) == {**plain, "decay_rate": 0.5}


def test_description_of_a_scoped_class(clean_gin):
    gin.parse_config(
        """
from __gin__ import dynamic_registration
import test_settings_json
test_settings_json.Voice.words = ("a", "b")
loud/test_settings_json.Voice.pitch = 9
test_settings_json.greet.style = @loud/test_settings_json.Voice
"""
    )
    style = gin.get_bindings("test_settings_json.greet")["style"]
    assert settings_json.describe(style) == {
        "function": "test_settings_json.Voice",
        "words": ["a", "b"],
        "pitch": 9,
    }


def test_description_of_a_vocabulary_depends_on_its_file_alone(tmp_path):
    class Vocabulary:  # as seqio.SentencePieceVocabulary
        def __init__(self, file, extra_ids=0):
            self.sentencepiece_model_file = str(file)
            self.extra_ids = extra_ids

    for name, content in [("a", b"model"), ("b", b"model"), ("c", b"other")]:
        (tmp_path / name).write_bytes(content)
    described = {n: settings_json.describe(Vocabulary(tmp_path / n)) for n in "abc"}
    assert described["a"] == described["b"] != described["c"]
    assert settings_json.describe(Vocabulary(tmp_path / "a", 100)) != described["a"]
    assert settings_json.describe(Vocabulary(tmp_path / "absent"))["model"] == f"{tmp_path}/absent"
