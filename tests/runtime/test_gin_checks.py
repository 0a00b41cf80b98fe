"""What gin would pass is compared with the annotation that takes it, before it is passed.

A flag for something that the run never makes is refused; what it makes in any way is taken.
"""

import collections
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import gin
import numpy as np
import pytest

from tnt_jax.runtime import gin_checks, operative_config, program
from tnt_jax.runtime.errors import UsageError


@dataclasses.dataclass
class Wheel:
    size: float = 1.0


class BigWheel(Wheel):
    pass


class Spokes:
    def __call__(self):
        return Wheel()


class Pair(NamedTuple):
    left: int
    right: int


class Rolls(Protocol):
    def roll(self) -> None: ...


def pair() -> Pair:
    return Pair(1, 2)


def number() -> int:
    return 3


def unknown():
    return 3


def some_wheel() -> Wheel:
    return BigWheel()


class Maker:
    def __new__(cls):
        return BigWheel()


def machine(
    count: int = 0,
    length: float = 0.0,
    wheel: Wheel | None = None,
    names: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    make: Callable[[], Wheel] | None = None,
    rolls: Rolls | None = None,
    anything: Any = None,
    untyped=None,
    dtype: np.dtype | None = None,
    path: os.PathLike | None = None,
    annotated: Annotated[int, "of something"] = 0,
    pairs: tuple[int, ...] = (),
    chosen: frozenset[str] = frozenset(),
    big: BigWheel | None = None,
):
    del count, length, wheel, names, settings, make, rolls, anything, untyped
    del dtype, path, annotated, pairs, chosen, big


@pytest.fixture(autouse=True)
def registered():
    gin.clear_config()
    with gin.unlock_config():
        for of in (Wheel, BigWheel, Spokes, Maker, pair, number, unknown, some_wheel, machine):
            if f"toy.{of.__name__}" not in gin.config._REGISTRY:
                gin.external_configurable(of, module="toy")
        if "toy.Lines" not in gin.config._REGISTRY:
            gin.external_configurable(collections.deque, name="Lines", module="toy")
        yield
    gin.clear_config()


@pytest.mark.parametrize(
    "binding",
    [
        "count = 3",
        "count = @number()",
        "count = @unknown()",
        "length = 3",
        "length = @number()",
        "wheel = @Wheel()",
        "wheel = @BigWheel()",
        "wheel = None",
        "settings = {'wheel': @Wheel(), 'make': @Wheel, 'steps': 3}",
        "make = @Wheel",
        "make = @Spokes()",
        "make = @Maker()",
        "rolls = @Wheel()",
        "anything = @Wheel",
        "anything = @Wheel()",
        "untyped = @pair()",
        "dtype = 'bfloat16'",
        "dtype = @number",
        "path = 'a/b'",
        "annotated = 3",
        "pairs = [1, 2]",
        "chosen = ('a', 'b')",
        "big = @some_wheel()",
        "big = @Maker()",
        "count = %deep/COUNT",
    ],
)
def test_what_fits(binding):
    gin.parse_config(f"deep/COUNT = 3\nmachine.{binding}")
    gin_checks.check_types()


def test_what_is_written_in_c_has_no_annotations():
    gin.parse_config("toy.Lines.maxlen = 3")
    gin_checks.check_types()


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        ("count = 3.0", "int, found 3.0"),
        ("count = True", "int, found True"),
        ("count = @number", "int, found @number. Write it with parentheses: @number()"),
        ("count = @Wheel()", "int, found @Wheel()"),
        ("length = @pair()", "float, found @pair()"),
        ("wheel = 3", "Wheel or None, found 3"),
        ("wheel = @Wheel", "Wheel or None, found @Wheel. Write it with parentheses: @Wheel()"),
        ("wheel = @pair()", "Wheel or None, found @pair()"),
        ("names = 'abc'", "Sequence[str], found 'abc'"),
        ("names = @pair()", "Sequence[str], found @pair()"),
        ("settings = {1: 2}", "Mapping or None, found {1: 2}"),
        ("make = 3", "a reference (@module.name) or None, found 3"),
        (
            "make = @Wheel()",
            "a reference (@module.name) or None, found @Wheel(). Write it without parentheses: "
            "@Wheel",
        ),
        ("rolls = @Wheel", "Rolls or None, found @Wheel. Write it with parentheses: @Wheel()"),
        (
            "make = @a/Wheel()",
            "a reference (@module.name) or None, found @a/Wheel(). Write it without parentheses: "
            "@a/Wheel",
        ),
    ],
)
def test_what_does_not(binding, expected):
    gin.parse_config(f"machine.{binding}")
    with pytest.raises(UsageError) as error:
        gin_checks.check_types()
    name = binding.partition(" ")[0]
    assert str(error.value) == f"--gin.toy.machine.{name}: expected {expected}."


# --- Use ------------------------------------------------------------------------------------------

SHARED = [
    *("--gin_file=models/from_checkpoint.gin", "--gin.ORIGINAL_CHECKPOINT_PATH=original"),
    *("--gin.TRAIN_PROMPTS=a.jsonl", "--gin.EVAL_PROMPTS=b.jsonl", "--gin.OUTPUT_DIR=out"),
    *("--gin.ANNOTATOR=@annotators.Lexicon", "--gin.annotators.Lexicon.path=words.txt"),
    "--gin.TRAIN_STEPS=2",
]


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


# --- Optimizers -----------------------------------------------------------------------------------

DECAY = "optax.adamw.weight_decay=0.5"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["optax.adafactor.clipping_threshold=0.001"],
            "--gin.optax.adafactor.clipping_threshold: this run's OPTIMIZER makes no "
            "optax.adafactor, so that the setting would change nothing. Set "
            "optimizers.adafactor.clipping_threshold instead.",
        ),
        (
            [
                "optax.adafactor.learning_rate=@optax.cosine_decay_schedule()",
                "optax.cosine_decay_schedule.init_value=3e-4",
            ],
            "--gin.optax.adafactor.learning_rate: this run's OPTIMIZER makes no optax.adafactor, "
            "so that the setting would change nothing. Set optimizers.adafactor.learning_rate "
            "instead.",
        ),
        (
            [DECAY],
            "--gin.optax.adamw.weight_decay: this run's OPTIMIZER makes no optax.adamw, so that "
            "the setting would change nothing. Set OPTIMIZER=@optax.adamw as well, or leave it "
            "out.",
        ),
        (
            ["OPTIMIZER=@optax.adamw", "optax.cosine_decay_schedule.init_value=3e-4"],
            "--gin.optax.cosine_decay_schedule.init_value: this run's OPTIMIZER makes no "
            "optax.cosine_decay_schedule, so that the setting would change nothing. Refer to "
            "@optax.cosine_decay_schedule() in LEARNING_RATE or OPTIMIZER, or leave it out.",
        ),
        (
            ["OPTIMIZER=@optax.contrib.schedule_free_adamw", "LEARNING_RATE=1e-5"],
            "OPTIMIZER: expected one whose learning_rate is set, found "
            "@optax.contrib.schedule_free_adamw, whose own default would be taken, whatever "
            "LEARNING_RATE is. Set "
            "--gin.optax.contrib.schedule_free_adamw.learning_rate=%LEARNING_RATE, or to a rate.",
        ),
        (
            ["OPTIMIZER=@optax.lion", "mine/optax.lion.learning_rate=1e-4"],
            "OPTIMIZER: expected one whose learning_rate is set, found @optax.lion, ",
        ),
    ],
)
def test_settings_that_no_optimizer_reads(flags, message):
    with pytest.raises(UsageError) as error:
        configure("pipeline", *(f"--gin.{flag}" for flag in flags))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("pipeline", ["optimizers.adafactor.clipping_threshold=0.001"]),
        (
            "pipeline",
            [
                *("OPTIMIZER=@optax.adamw", DECAY),
                "optax.adamw.learning_rate=@optax.cosine_decay_schedule()",
                "optax.cosine_decay_schedule.init_value=3e-4",
                "optax.cosine_decay_schedule.decay_steps=10",
            ],
        ),
        # In a scope, with the rate that is LEARNING_RATE; made already.
        (
            "pipeline",
            ["OPTIMIZER=@mine/optax.lion", "mine/optax.lion.learning_rate=%LEARNING_RATE"],
        ),
        ("pipeline", ["OPTIMIZER=@optax.lion()", "optax.lion.learning_rate=1e-4"]),
        # The optimizer of some arms.
        ("sweep", ["sweep.Grid.update={'optimizer': @optax.adamw}", DECAY]),
    ],
)
def test_settings_that_an_optimizer_reads(name, flags):
    assert configure(name, *(f"--gin.{flag}" for flag in flags)) is not None


def test_a_gin_file_of_the_user_is_read_as_the_command_line_is(tmp_path):
    own = tmp_path / "own.gin"
    own.write_text("import optax\noptax.adamw.weight_decay = 0.5\n")
    with pytest.raises(UsageError, match=f"^{own}, optax.adamw.weight_decay: this run's OPTIMIZER"):
        configure("pipeline", f"--gin_file={own}")
    assert configure("pipeline", f"--gin_file={own}", "--gin.OPTIMIZER=@optax.adamw") is not None


def test_gin_files_with_settings_to_spare(tmp_path):
    """The project's, those that hold all settings of a run, and those that other programs share."""
    demo = ["--gin_file=experiments/demo.gin", "--gin.OPTIMIZER=@optimizers.adafactor"]
    assert configure("pipeline", *demo) is not None
    operative_config.write(tmp_path)
    written = tmp_path / "operative_config.gin"
    assert "optax.adam.b2 = 0.99" in written.read_text()
    assert configure("pipeline", f"--gin_file={written}") is not None
    own = tmp_path / "own.gin"
    own.write_text("import optax\noptax.adamw.weight_decay = 0.5\n")
    arguments = ["--gin_file=runs/annotate_lexicon.gin", "--gin.RECORDS=a", "--gin.OUTPUT=b"]
    arguments += ["--gin.LEXICON=words.txt", "--gin.VOCABULARY_PATH=c", f"--gin_file={own}"]
    program.configure("tnt_jax.annotate", "annotate", arguments)
