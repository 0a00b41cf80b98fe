"""A sweep end to end: every arm as `train` trains it, done once, by one process or by several."""

import contextlib
import json
import pathlib
import re
from typing import Any

import jax
import numpy as np
import pytest
from helpers import rooms

import tnt_jax
from tnt_jax.data import records
from tnt_jax.evaluation.results import intervals, is_for_choice
from tnt_jax.runtime import stages


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        rooms.train_original("original", 60, LEARNING_RATE=1e-2)
        yield


SWEEP = {
    "OBJECTIVES": "['TNRF', 'UL+LL']",
    "ALPHAS": "[0.5, 2.0]",
    "TRAIN_STEPS": 6,
    "CUT": 0.1,
    "MASK_DECODING": False,
    "sweep.sweep.num_resamples": 50,
}


def sweep(output_dir, status=0, **settings):
    assert rooms.run("sweep", {**SWEEP, **settings, "OUTPUT_DIR": output_dir}) == status


def results(output_dir):
    return json.loads(pathlib.Path(output_dir, "results.json").read_text())


@pytest.fixture(scope="module")
def swept(working_directory):
    sweep("swept", MASK_DECODING=None)
    return results("swept")


def test_every_arm_is_there(swept):
    arms = [(row["objective"], row["alpha"], row["seed"]) for row in swept["rows"]]
    expected = [(name, alpha, 0) for name in ("TNRF", "UL+LL") for alpha in (0.5, 2.0)]
    assert arms == [*expected, ("decode mask", None, 0)]
    assert [row["objective"] for row in swept["choice_rows"]] == [arm[0] for arm in arms]
    for row in swept["rows"]:
        assert row["task"] == "mine"
        assert row["decoder"] == "greedy"
    # Prompts of the choice are not those of the report, and together they are all.
    assert swept["rows"][0]["num_outputs"] + swept["choice_rows"][0]["num_outputs"] == 60
    assert all(row["steps"] == 6 and row["train_seconds"] > 0 for row in swept["rows"][:4])
    assert {row["objective"] for row in swept["chosen"]} == {"TNRF", "UL+LL", "decode mask"}
    # The frontier is that of trained arms.
    assert {row["objective"] for row in swept["chosen"] if "is_pareto" in row} == {"TNRF", "UL+LL"}
    assert any(row.get("is_pareto") for row in swept["chosen"])


def test_what_it_wrote_says_how_to_make_it_again(swept):
    assert swept["settings"]["version"] == tnt_jax.__version__
    settings = swept["settings"]["gin"].replace("'swept'", "'swept_again'")
    pathlib.Path("again.gin").write_text(settings)
    assert rooms.run_program("sweep", ["--gin_file=again.gin"]) == 0

    def numbers(found):
        return [{**row, "train_seconds": 0.0} for row in found["rows"] + found["choice_rows"]]

    assert numbers(results("swept_again")) == numbers(swept)


def test_what_an_arm_moved_is_measured_on_prompts_of_the_report(swept):
    lines = pathlib.Path("swept/TNRF, alpha 2, seed 0/greedy.tokens.jsonl").read_text().splitlines()
    measured = {json.loads(line)["id"] for line in lines}
    ids = {row.id for row in records.iterate("swept/original/greedy.annotated.jsonl")}
    assert measured == {name for name in ids if not is_for_choice(name, 0.5)}
    assert len(measured) == swept["rows"][0]["num_outputs"]
    # So rows of the prompts that weights are chosen on have no such numbers.
    assert {"residual", "collateral_elsewhere"} <= swept["rows"][0].keys()
    assert not {"residual", "collateral_elsewhere"} & swept["choice_rows"][0].keys()


def test_an_arm_is_what_train_makes_of_its_settings(swept):
    settings = {
        "MODEL_DIR": "by_itself",
        "RECORDS": "swept/training_outputs/greedy.annotated.jsonl",
        "NEGATIVE_WEIGHT": 2.0,
        "TRAIN_STEPS": 6,
    }
    assert rooms.run("train", settings) == 0
    rooms.assert_same_state("swept/TNRF, alpha 2, seed 0/model", "by_itself")


def test_what_an_annotator_removes_everywhere_is_removed_in_its_arms(swept):
    pathlib.Path("quiet.txt").write_text("quiet\n")
    settings = {
        "annotators.Lexicon.path": "quiet.txt",
        "annotators.Lexicon.at_every_position": True,
        "OBJECTIVES": "['TNFF']",
        "ALPHAS": "[1.0]",
    }
    sweep("everywhere", **settings)
    settings = {
        "MODEL_DIR": "everywhere_by_itself",
        "RECORDS": "everywhere/training_outputs/greedy.annotated.jsonl",
        "TRAIN_STEPS": 6,
    }
    assert rooms.run("train", settings, ["objectives/tnff.gin"]) == 0
    rooms.assert_same_state("everywhere/TNFF, alpha 1, seed 0/model", "everywhere_by_itself")


LOOK_AHEAD = """
from __gin__ import dynamic_registration

from tnt_jax import localize
from tnt_jax import sweep
from tnt_jax.localization import look_ahead
from tnt_jax.localization import prefix_values
from tnt_jax.checkpoints import pretrained

sweep.Grid.localize = @localize.localize
localize.localize:
  original_model = @localize.OriginalModel()
  training = @prefix_values.Training()
  num_folds = 2
  ahead = @look_ahead.settings_of()
look_ahead.settings_of.num_tokens = 4
prefix_values.Training.num_updates = 10
localize.OriginalModel:
  checkpoint_path = %ORIGINAL_CHECKPOINT_PATH
  model = %MODEL
  task_feature_lengths = %TASK_FEATURE_LENGTHS
"""


def test_an_arm_learns_from_what_looks_ahead(swept):
    """From the marks and the strengths beside them, as `train` does with the same file."""
    pathlib.Path("ahead.gin").write_text(LOOK_AHEAD)
    settings = {**SWEEP, "OBJECTIVES": "['TNFF']", "ALPHAS": "[1.0]", "OUTPUT_DIR": "ahead"}
    assert rooms.run("sweep", settings, ["ahead.gin"]) == 0
    (found,) = pathlib.Path("ahead/training_outputs").glob("*.localized-*.jsonl")
    (given,) = pathlib.Path("ahead/training_outputs").glob("greedy.annotated.jsonl")
    rows, before = map(records.read_records, (found, given))
    assert [row.negative_spans for row in rows] == [row.negative_spans for row in before]
    assert any(len(entry) == 3 for row in rows for entry in row.negative_token_ids)
    settings = {"MODEL_DIR": "ahead_by_itself", "RECORDS": found, "TRAIN_STEPS": 6}
    settings["objectives.TntObjective.negative_weight"] = 1.0
    assert rooms.run("train", settings, ["objectives/tnff.gin"]) == 0
    rooms.assert_same_state("ahead/TNFF, alpha 1, seed 0/model", "ahead_by_itself")


def test_a_mask_leaves_nothing_of_what_it_knows(swept):
    """Both unwanted words are spelt in several tokens: it takes sequences to ban them."""
    (row,) = (row for row in swept["rows"] if row["objective"] == "decode mask")
    assert row["unwanted_rate_before"] > 0.2
    assert row["unwanted_rate_after"] == 0
    masked = records.read_records("swept/decode mask/greedy.annotated.jsonl")
    original = records.read_records("swept/original/greedy.annotated.jsonl")
    for before, after in zip(original, masked, strict=True):
        if not before.negative_spans:
            assert after.target_ids == before.target_ids


def test_it_is_done_once(swept, capsys):
    sweep("swept", MASK_DECODING=None)
    printed = capsys.readouterr().out
    done = re.findall(r"^\[\d+\] .*$", printed, re.MULTILINE)
    assert done
    assert all("done before, kept" in line for line in done)
    assert results("swept") == swept
    assert "| TNRF |" in pathlib.Path("swept/results.md").read_text()


def test_the_frontier_is_run_with_other_seeds(swept):
    """At the weights that were chosen without them."""
    settings = {"MASK_DECODING": None, "FRONTIER_SEEDS": "[0, 7]", "sweep.sweep.name": "more"}
    sweep("swept", **settings)
    found = json.loads(pathlib.Path("swept/more.json").read_text())
    chosen = {row["objective"]: row["alpha"] for row in swept["chosen"]}
    one, other = (
        next(
            row
            for row in swept["choice_rows"]
            if (row["objective"], row["alpha"]) == (name, chosen[name])
        )
        for name in ("TNRF", "UL+LL")
    )
    # The baseline always, and TNRF unless the baseline is better in both.
    beaten = other["cut"] >= one["cut"] and other["bleu"] >= one["bleu"]
    again = ["UL+LL"] if beaten else ["TNRF", "UL+LL"]
    arms = [(row["objective"], row["alpha"], row["seed"]) for row in found["rows"]]
    before = [(row["objective"], row["alpha"], row["seed"]) for row in swept["rows"]]
    assert arms == [*before[:-1], *((name, chosen[name], 7) for name in again), before[-1]]
    for row in found["chosen"]:
        name = row["objective"]
        assert row["alpha"] == chosen[name]
        assert row["num_seeds"] == 1 + (name in again)
        assert len(row["cut_interval"]) == len(row["bleu_interval"]) == 2


def test_arms_that_are_not_chosen_can_be_spared(swept):
    """What was chosen has the same numbers; the others have those that need no second model."""
    both = "{'greedy': @decoding.Decoding(), 'sampled': @sampled/decoding.Decoding()}"
    sweep("spared", MASK_DECODING=None, ONLY_CHOSEN_IN_FULL=True, DECODERS=both)
    spared = results("spared")
    seconds = re.compile("train_seconds")

    def known(rows):
        return [{k: v for k, v in row.items() if not seconds.match(k)} for row in rows]

    greedy = [row for row in spared["chosen"] if row["decoder"] == "greedy"]
    assert known(greedy) == known(swept["chosen"])
    chosen = {(row["objective"], row["alpha"]) for row in greedy}
    assert len(chosen) == 3  # with the mask
    in_full = swept["rows"][0].keys()
    for row in spared["rows"]:
        if row["objective"] == "decode mask":
            continue
        if (row["objective"], row["alpha"]) in chosen:
            assert row["residual"] is not None
        else:
            assert row["decoder"] == "greedy"
            missing = {"residual", "collateral", "smallest_cost", "collateral_elsewhere"}
            missing |= {"num_graded"}
            assert row.keys() == in_full - missing
            assert not pathlib.Path("spared", sweep_folder(row), "greedy.evaluation.json").exists()
    assert {row["decoder"] for row in spared["chosen"]} == {"greedy", "sampled"}


def sweep_folder(row):
    return f"{row['objective']}, alpha {row['alpha']:g}, seed {row['seed']}"


def test_a_learning_rate_is_chosen_as_a_weight_is(working_directory):
    """Every rival is trained at both rates; half of one is exactly the other."""
    settings = {"OBJECTIVES": "['NPO+KL', 'FTPO']", "ALPHAS": "[2.0]", "RATES": "[0.5, 1.0]"}
    sweep("rates", **settings)
    found = results("rates")
    arms = [(row["objective"], row["alpha"], row["rate"]) for row in found["rows"]]
    assert arms == [(name, 2.0, rate) for name in ("NPO+KL", "FTPO") for rate in (0.5, None)]
    chosen = {row["objective"]: row for row in found["chosen"]}
    assert list(chosen) == ["NPO+KL", "FTPO"]
    for name, row in chosen.items():
        same = [other for other in found["rows"] if other["objective"] == name]
        assert row["num_seeds"] == 1
        assert (row["cut"], row["bleu"]) in [(other["cut"], other["bleu"]) for other in same]
    settings = {
        "MODEL_DIR": "half_the_rate",
        "RECORDS": "rates/training_outputs/greedy.annotated.jsonl",
        "NEGATIVE_WEIGHT": 2.0,
        "TRAIN_STEPS": 6,
        "LEARNING_RATE": rooms.UPDATES["LEARNING_RATE"] / 2,
    }
    assert rooms.run("train", settings, ["objectives/npo_kl.gin"]) == 0
    half = rooms.saved("rates/NPO+KL, alpha 2, rate 0.5, seed 0/model")
    whole = rooms.saved("rates/NPO+KL, alpha 2, seed 0/model")
    expected = rooms.saved("half_the_rate")
    jax.tree.map(np.testing.assert_array_equal, half, expected)
    leaves = zip(jax.tree.leaves(half), jax.tree.leaves(whole), strict=True)
    assert any((one != other).any() for one, other in leaves)


def test_filtered_arms_train_on_clean_outputs_alone(working_directory, capsys):
    """In a sweep, in a pipeline, and in `train`: the same model."""
    clean = {"sweep.Grid.dataset": '{"only_clean": True}', "sweep.Grid.variant": "'clean'"}
    sweep("filtered", OBJECTIVES="['KL', 'LL']", ALPHAS="[1.0]", **clean)
    assert [row["objective"] for row in results("filtered")["rows"]] == ["KL, clean", "LL, clean"]
    training_outputs = "filtered/training_outputs/greedy.annotated.jsonl"
    rows = records.read_records(training_outputs)
    num_clean = sum(not row.negative_spans for row in rows)
    assert 0 < num_clean < len(rows)
    said = f"{num_clean} of {len(rows)} examples, those in which nothing is marked"
    assert said in capsys.readouterr().out
    settings = {"OUTPUT_DIR": "filtered_pipeline", "TRAIN_STEPS": 6, "MASK_DECODING": False}
    settings["CLEAN_PER_MARKED"] = 1  # for the arms that take marked outputs
    arms = {"ARMS": "[@filtered_kl/experiment.Arm()]"}
    assert rooms.run("pipeline", settings | arms) == 0
    settings = {"MODEL_DIR": "filtered_train", "RECORDS": training_outputs, "TRAIN_STEPS": 6}
    assert rooms.run("train", settings | {"ONLY_CLEAN": True}, ["objectives/distill.gin"]) == 0
    rooms.assert_same_state("filtered/KL, clean, alpha 1, seed 0/model", "filtered_train")
    rooms.assert_same_state("filtered_pipeline/filtered KL/model", "filtered_train")


def test_updates_and_seconds_are_of_all_rounds(working_directory):
    rounds = {"sweep.Grid.num_rounds": 2, "ORIGINAL": "adapters_cached"}
    sweep("rounds", OBJECTIVES="['TNRF']", ALPHAS="[2.0]", **rounds)
    found = results("rounds")
    notes = [
        stages.note_path(pathlib.Path("rounds"), f"TNRF, alpha 2, seed 0{of_round}: train")
        for of_round in ("", ".round2")
    ]
    seconds = [json.loads(note.read_text())["seconds"] for note in notes]
    assert all(seconds)
    for row in (*found["rows"], *found["choice_rows"], *found["chosen"]):
        assert row["steps"] == 2 * 6
        assert row["train_seconds"] == pytest.approx(sum(seconds))


def test_several_processes_share_it(swept, capsys):
    sweep("shared", status=2, PROCESS_INDEX=1, NUM_PROCESSES=2)
    assert "Start that one first" in capsys.readouterr().err
    sweep("shared", PROCESS_INDEX=0, NUM_PROCESSES=2)
    assert len(results("shared")["rows"]) == 2
    assert "2 arms are not done yet" in capsys.readouterr().out
    sweep("shared", PROCESS_INDEX=1, NUM_PROCESSES=2)

    def numbers(rows):
        of_one = ("train_seconds", "bleu_to_mask", "same_as_mask")  # here no mask is compared with
        return [{k: v for k, v in row.items() if k not in of_one} for row in rows]

    alone = [row for row in swept["rows"] if row["objective"] != "decode mask"]
    assert numbers(results("shared")["rows"]) == numbers(alone)
    # With other settings, what another process made with the old ones is not an arm of this sweep.
    # Seeds come in turn: TNRF and UL+LL with the first one, and with the second.
    capsys.readouterr()
    of_seeds = {"ALPHAS": "[0.5]", "SEEDS": "[0, 1]"}
    sweep("shared", PROCESS_INDEX=0, NUM_PROCESSES=2, TRAIN_STEPS=7, **of_seeds)
    found = [(row["objective"], row["seed"], row["steps"]) for row in results("shared")["rows"]]
    assert found == [("TNRF", 0, 7), ("TNRF", 1, 7)]
    assert "2 arms are not done yet" in capsys.readouterr().out
    pathlib.Path("loud.txt").write_text("loud\n")
    of_words = {"annotators.Lexicon.path": "loud.txt"}
    sweep("shared", status=2, PROCESS_INDEX=1, NUM_PROCESSES=2, **of_words)
    assert "stage 'original: annotate, greedy' is not done" in capsys.readouterr().err
    # Two processes that come to this at once would both begin to write it.
    unrelated = {"UNRELATED_PROMPTS": "corpus.jsonl"}
    sweep("shared", status=2, PROCESS_INDEX=1, NUM_PROCESSES=2, **unrelated)
    assert "stage 'original.unrelated: generate, greedy' is not" in capsys.readouterr().err


def test_what_another_process_does_meanwhile_is_not_left_out(swept, monkeypatch, capsys):
    """Results are computed for a minute; whoever writes last may have looked first."""
    last = pathlib.Path("swept/UL+LL, alpha 2, seed 0/greedy.evaluation.json")
    kept = last.rename("kept.json")

    def meanwhile(*arguments, **settings):
        if kept.exists():
            kept.rename(last)
        return intervals(*arguments, **settings)

    monkeypatch.setattr("tnt_jax.evaluation.results.intervals", meanwhile)
    settings = {"MASK_DECODING": None, "sweep.sweep.name": "meanwhile"}
    sweep("swept", PROCESS_INDEX=0, NUM_PROCESSES=2, **settings)
    found = json.loads(pathlib.Path("swept/meanwhile.json").read_text())
    assert all(found[name] == swept[name] for name in ("rows", "choice_rows", "chosen"))
    assert "not done yet" not in capsys.readouterr().out


def test_the_frontier_waits_for_the_arms_of_other_processes(working_directory, capsys):
    settings: dict[str, Any] = {
        "ALPHAS": "[2.0]",
        "FRONTIER_SEEDS": "[7]",
        "DECODERS": '{"greedy": @decoding.Decoding(), "sampled": @sampled/decoding.Decoding()}',
    }

    def started(process_index):
        sweep("parted", PROCESS_INDEX=process_index, NUM_PROCESSES=2, **settings)
        rows = results("parted")["rows"]
        arms = {(row["objective"], row["seed"], row["decoder"]) for row in rows}
        return arms, capsys.readouterr().out

    def further():
        return sorted(pathlib.Path("parted").glob("*seed 7"))

    hint = "What is chosen by the others is run when they are done"
    # The baseline is the arm of process 1, and nothing is known of it yet.
    arms, printed = started(0)
    assert {(name, seed) for name, seed, _ in arms} == {("TNRF", 0)}
    assert "1 arms are not done yet" in printed
    assert hint in printed
    _, printed = started(1)
    of_process_1 = further()
    # An arm that was stopped before its last decoder is not done.
    last = pathlib.Path("parted/UL+LL, alpha 2, seed 0/sampled.evaluation.json")
    kept = last.rename("kept.json")
    _, printed = started(0)
    assert "1 arms are not done yet" in printed
    assert further() == of_process_1
    kept.rename(last)
    arms, printed = started(0)
    assert "not done yet" not in printed
    assert len(further()) == len(of_process_1) + 1
    again = {name for name, seed, _ in arms if seed == 7}
    assert "UL+LL" in again
    assert {row for row in arms if row[1] == 7} == {
        (name, 7, decoder) for name in again for decoder in ("greedy", "sampled")
    }


# --- Few prompts ----------------------------------------------------------------------------------


def some_rooms(num_choice, num_report):
    """So many rooms that weights are chosen on, and others that are reported on."""
    of_choice = [row for row in rooms.corpus() if is_for_choice(row.id, 0.5)]
    others = [row for row in rooms.corpus() if not is_for_choice(row.id, 0.5)]
    return [*of_choice[:num_choice], *others[:num_report]]


@pytest.mark.parametrize(
    ("num_choice", "num_report", "change"),
    [(3, 1, "smaller"), (1, 1, "smaller"), (2, 0, "smaller"), (0, 3, "larger")],
)
def test_too_few_prompts_are_refused_before_the_first_stage(
    working_directory, num_choice, num_report, change, capsys
):
    records.write_records("few.jsonl", some_rooms(num_choice, num_report))
    sweep("few", status=2, EVAL_PROMPTS="few.jsonl")
    assert capsys.readouterr().err == (
        "tnt_jax.sweep: error: EVAL_PROMPTS: expected at least 1 to choose weights on and 2 others "
        f"to report on, found {num_choice} and {num_report} of {num_choice + num_report} with "
        f"CHOICE_SHARE=0.5. Give more EVAL_PROMPTS, or a {change} CHOICE_SHARE.\n"
    )
    assert not pathlib.Path("few/stages").exists()


def test_the_fewest_prompts_are_enough(working_directory):
    records.write_records("few.jsonl", some_rooms(1, 2))
    settings = {"EVAL_PROMPTS": "few.jsonl", "OBJECTIVES": "['UL+LL']", "ALPHAS": "[2.0]"}
    reported = [row for row in some_rooms(1, 2) if not is_for_choice(row.id, 0.5)]
    records.write_records("reported.jsonl", reported)
    sweep("fewest", UNRELATED_PROMPTS="reported.jsonl", **settings)
    (row,) = results("fewest")["chosen"]
    assert row["num_outputs"] == 2
    assert row["unrelated_kl"] == row["collateral_elsewhere"] > 0
    assert "KL unrelated" in pathlib.Path("fewest/results.md").read_text()
    assert len(row["cut_interval"]) == len(row["bleu_interval"]) == 2


def test_prompts_whose_outputs_the_annotator_does_not_know_do_not_count(working_directory, capsys):
    """Nothing is trained for a report that has none left."""
    known = [{"id": row.id, "negative_spans": []} for row in some_rooms(3, 1)]
    pathlib.Path("known.jsonl").write_text("".join(json.dumps(mark) + "\n" for mark in known))
    assert rooms.run_with_marks("sweep", {**SWEEP, "OUTPUT_DIR": "unknown"}, "known.jsonl") == 2
    message = "EVAL_PROMPTS, greedy outputs: expected at least 1 to choose weights on and 2 others "
    assert message + "to report on, found 3 and 1 of 4" in capsys.readouterr().err
    stages_done = {path.name for path in pathlib.Path("unknown/stages").iterdir()}
    assert stages_done == {"original_generate_greedy.json", "original_annotate_greedy.json"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"OBJECTIVES": "['TNXX']"}, "objective: expected one of TNFF, "),
        ({"ALPHAS": "[1.0, 1.0]"}, "expected arms whose names differ"),
        ({"CHOICE_SHARE": 1.0}, "CHOICE_SHARE: expected more than 0"),
        ({"sweep.Grid.num_rounds": 0}, "Grid.num_rounds: expected at least 1, found 0."),
        (
            {"sweep.Grid.num_rounds": 2, "sweep.Grid.localize": "@rounds.merge_files"},
            "Grid.localize: expected num_rounds=1, found 2",
        ),
        (
            {"sweep.Grid.num_rounds": 2, "sweep.Grid.annotator": "@annotators.Lexicon"},
            "Grid.annotator: expected num_rounds=1, found 2: further rounds are annotated by",
        ),
        (
            {"sweep.Grid.num_rounds": 2, "sweep.Grid.training_decoders": "['greedy']"},
            "Grid.training_decoders: expected num_rounds=1, found 2: further rounds decode as",
        ),
        (
            {"TRAINING_RECORDS": "a.jsonl", "sweep.Grid.annotator": "@annotators.Lexicon"},
            "Grid.annotator: expected none with TRAINING_RECORDS",
        ),
        ({"PROCESS_INDEX": 2, "NUM_PROCESSES": 2}, "PROCESS_INDEX: expected 0 to 1"),
        ({"ORIGINAL": "adapter_off"}, "ORIGINAL: expected one of parameters, cached, "),
        ({"ALPHAS": "[-1.0]"}, "negative_weight"),
        ({"BATCH_SIZE": 0}, "BATCH_SIZE: expected at least 1, found 0."),
        ({"OBJECTIVE_SETTINGS": "{'npo_bta': 0.5}"}, "argument 'npo_bta'"),
        ({"sweep.Grid.update": "{'bach_size': 8}"}, "argument 'bach_size'"),
        ({"sweep.Grid.dataset": "{'only_clen': True}"}, "argument 'only_clen'"),
        ({"sweep.Grid.train": "{'kep': None}"}, "argument 'kep'"),
        ({"EVAL_PROMPTS": "['a.jsonl', 'b.jsonl']"}, "EVAL_PROMPTS: expected a file (or a glob"),
    ],
    ids=str,
)
def test_mistakes(settings, message, capsys):
    """They are known before hours of generating, and in one line."""
    sweep("mistaken", status=2, **settings)
    found = capsys.readouterr().err
    assert message in found
    assert found.startswith("tnt_jax.sweep: error: ")
    assert found.count("\n") == 1
    assert not pathlib.Path("mistaken/original").exists()
