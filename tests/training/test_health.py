"""Updates that are not finite, and losses that leap: what is said, written and remembered."""

import contextlib
import json
import math

import pytest

from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import health
from tnt_jax.watching import metric_writers

NAMES = ["decoder/mlp/wi/kernel", "decoder/norm/scale", "encoder/mlp/wi/kernel"]


def sums_of(loss, norm=1.0, not_finite=(False, False, False), num_tokens=4.0, num_negative=0.0):
    return {
        "loss": loss * num_tokens,
        "num_tokens": num_tokens,
        "num_negative": num_negative,
        "gradient_norm": norm,
        "gradient_not_finite": not_finite,
    }


@pytest.fixture
def health_of():
    """Makes a `Health` that writes into a folder."""
    with contextlib.ExitStack() as files:

        def make(folder, *, last_step=None, **settings):
            settings = {"is_skipping": False, "spike_deviations": 10.0} | settings
            return health.Health(
                names=NAMES,
                examples_of=lambda step: [f"{step}-{number}" for number in range(8)],
                events=files.enter_context(
                    metric_writers.StepLines(folder / "events.jsonl", last_step)
                ),
                where=lambda: "checkpoint 4 in there",
                **settings,
            )

        yield make


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("sums", "found"),
    [
        (
            sums_of(math.nan, math.nan, (False, True, False)),
            "loss = nan and gradient_norm = nan. Not finite is the gradient of decoder/norm/scale "
            "(1 of 3 parameters).",
        ),
        (
            sums_of(2.0, math.inf, (True, False, True)),
            "gradient_norm = inf. Not finite is the gradient of decoder/mlp/wi/kernel, "
            "encoder/mlp/wi/kernel (2 of 3 parameters).",
        ),
        # A loss of padding alone, say: the gradient may be sound.
        (
            sums_of(math.inf),
            "loss = inf. The gradient of each of the 3 parameters is finite.",
        ),
    ],
)
def test_what_is_not_finite_is_named(health_of, sums, found, tmp_path):
    with pytest.raises(UsageError) as raised:
        health_of(tmp_path).is_sound(7, sums)
    assert str(raised.value) == (
        f"update 7: expected finite numbers, found {found} Before it, there is checkpoint 4 in "
        "there. Lower LEARNING_RATE or negative_weight, set MAX_GRADIENT_NORM in a run with "
        "another MODEL_DIR, or look at the examples of that update: 7-0, 7-1, 7-2, 7-3, 7-4, 7-5 "
        "and 2 more. NON_FINITE='skip' leaves such updates out."
    )
    assert events(tmp_path) == []


def test_what_is_left_out_is_counted_and_written_down(health_of, tmp_path, capsys):
    health = health_of(tmp_path, is_skipping=True)
    assert health.is_sound(1, sums_of(1.0))
    assert not health.is_sound(2, sums_of(math.nan, math.nan, (True, True, False)))
    assert health.is_sound(3, sums_of(1.0))
    assert health.num_skipped == 1
    (event,) = events(tmp_path)
    assert event == {
        "step": 2,
        "event": "skipped",
        "loss": None,
        "gradient_norm": None,
        "parameters": NAMES[:2],
        "examples": [f"2-{number}" for number in range(8)],
    }
    assert "update 2 is left out (1 so far): found loss = nan" in capsys.readouterr().out


def test_a_run_that_leaves_everything_out_stops(health_of, tmp_path):
    health = health_of(tmp_path, is_skipping=True)
    bad = sums_of(math.nan, math.nan)
    for step in range(1, 20):
        assert not health.is_sound(step, bad)
    assert health.is_sound(20, sums_of(1.0))
    for step in range(21, 40):
        assert not health.is_sound(step, bad)
    # As it stands in a checkpoint: a restart does not begin to count anew.
    health = health_of(tmp_path, is_skipping=True, state=json.loads(json.dumps(health.state())))
    with pytest.raises(UsageError, match=r"^updates 21 to 40: expected .*checkpoint 4 in there\."):
        health.is_sound(40, bad)
    assert health.num_skipped == 39


def losses(number):
    """Losses near 1, with a standard deviation of about 0.1."""
    return [1 + 0.15 * math.sin(2.4 * step) for step in range(1, number + 1)]


def test_a_loss_that_leaps_is_written_down_with_its_examples(health_of, tmp_path, capsys):
    health = health_of(tmp_path)
    for step, loss in enumerate(losses(60), start=1):
        # Twice as many tokens are no leap. Neither is a loss that falls.
        assert health.is_sound(step, sums_of(loss, num_tokens=4.0 * (1 + step % 2)))
    assert health.is_sound(61, sums_of(0.01))
    assert events(tmp_path) == []
    assert health.is_sound(62, sums_of(6.0, norm=80.0))
    assert health.is_sound(63, sums_of(1.0))
    (event,) = events(tmp_path)
    assert (event["step"], event["event"]) == (62, "loss_spike")
    assert (event["loss"], event["gradient_norm"]) == (6.0, 80.0)
    assert event["usual_loss"] == pytest.approx(1.0, abs=0.05)
    assert 30 < event["deviations"] < 60
    assert event["examples"] == [f"62-{number}" for number in range(8)]
    assert "update 62: the loss leapt to 6 from" in capsys.readouterr().out


def test_a_loss_is_compared_with_those_of_its_kind(health_of, tmp_path):
    """One batch in twenty has marks: its loss is far above that of the others, and no leap."""

    def rare_marks(leaps):
        noise = losses(1000)
        for step, near_one in enumerate(noise, start=1):
            is_marked = step % 20 == 0
            loss = leaps.get(step, near_one * (0.5 if is_marked else 0.01))
            yield step, sums_of(loss, num_negative=3.0 * is_marked)

    # A loss of 0.5 is usual in a marked batch, and a leap in another.
    leaps = {701: 0.5, 900: 6.0}
    for name, given in (("calm", {}), ("leaping", leaps)):
        health = health_of(tmp_path / name)
        for step, sums in rare_marks(given):
            assert health.is_sound(step, sums)
        if name == "calm":
            assert events(tmp_path / name) == []
    found = events(tmp_path / "leaping")
    assert [(event["step"], event["loss"]) for event in found] == [*leaps.items()]
    usual = [event["usual_loss"] for event in found]
    assert usual == [pytest.approx(0.01, rel=0.1), pytest.approx(0.5, rel=0.1)]


def test_few_losses_say_nothing_of_what_is_usual(health_of, tmp_path):
    health = health_of(tmp_path)
    for step, loss in enumerate(losses(19), start=1):
        health.is_sound(step, sums_of(loss))
    health.is_sound(20, sums_of(6.0))
    assert events(tmp_path) == []


def test_no_spikes_where_they_are_not_wanted(health_of, tmp_path):
    health = health_of(tmp_path, spike_deviations=None)
    for step, loss in enumerate([*losses(60), 6.0], start=1):
        health.is_sound(step, sums_of(loss))
    assert events(tmp_path) == []
    with pytest.raises(UsageError, match="SPIKE_DEVIATIONS: expected None or more than 0, found 0"):
        health_of(tmp_path, spike_deviations=0.0)


def test_a_run_that_goes_on_finds_what_it_would_have_found(health_of, tmp_path):
    run = losses(150)
    run[39] = run[99] = run[119] = 5.0

    def go(folder, steps, state=None):
        health = health_of(folder, last_step=steps[0] - 1, state=state)
        for step in steps:
            health.is_sound(step, sums_of(run[step - 1], num_negative=float(step % 3 == 0)))
        return json.loads(json.dumps(health.state()))

    go(tmp_path / "straight", range(1, 151))
    state = go(tmp_path / "stopped", range(1, 91))
    go(tmp_path / "stopped", range(91, 111), state)  # and is stopped again, after checkpoint 90
    go(tmp_path / "stopped", range(91, 151), state)
    assert [event["step"] for event in events(tmp_path / "straight")] == [40, 100, 120]
    written = [(tmp_path / name / "events.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert written[0] == written[1]
