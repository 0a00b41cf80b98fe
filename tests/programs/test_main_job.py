"""The programs end to end, through their real entry points, on a model that learns in seconds."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys

import gin
import pytest
import seqio
from helpers import outputs, rooms

from tnt_jax import pipeline
from tnt_jax.checkpoints import digests
from tnt_jax.data import records, removed_everywhere
from tnt_jax.data.batches import Batches
from tnt_jax.evaluation import evaluations, results, tables
from tnt_jax.experiments import experiment_run
from tnt_jax.runtime import program
from tnt_jax.tokenizers import tokenization
from tnt_jax.training import loop, run_checkpoints

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, and what is made of it: all paths here are relative to it."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen(4):
        yield


@pytest.fixture(scope="module")
def original():
    """A model that learned the rooms, and its outputs, annotated."""
    rooms.train_original("original", 60, LEARNING_RATE=1e-2)
    generate("original.jsonl", "original")
    annotate("original.annotated.jsonl", "original.jsonl")


@pytest.fixture(scope="module")
def patched(original):
    """The original after 20 updates of TNRF, evaluated at the end on what it was trained on."""
    evaluation = {
        "EVAL_DATASET": "@evaluation/datasets.RecordFiles()",
        "evaluation/datasets.RecordFiles.files": "original.annotated.jsonl",
    }
    train("patched", LOG_EVERY=1, **evaluation)
    generate("patched.jsonl", "patched")
    annotate("patched.annotated.jsonl", "patched.jsonl")


def train(model_dir, gin_files=(), **settings):
    assert rooms.run("train", {**settings, "MODEL_DIR": model_dir}, gin_files) == 0


def generate(output, checkpoint, **settings):
    settings = {**settings, "OUTPUT": output, "CHECKPOINT_PATH": checkpoint}
    assert rooms.run("generate", settings) == 0


def annotate(output, generated, **settings):
    assert rooms.run("annotate", {**settings, "OUTPUT": output, "RECORDS": generated}) == 0


def evaluate(output, current_records, checkpoint, **settings):
    settings |= {
        "OUTPUT": output,
        "CURRENT_RECORDS": current_records,
        "CHECKPOINT_PATH": checkpoint,
    }
    assert rooms.run("evaluate", settings) == 0
    return json.loads(pathlib.Path(output).read_text())


def metrics_of(model_dir):
    lines = pathlib.Path(model_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def vocabulary():
    return tokenization.SentencePiece("vocabulary.model", extra_ids=0)


# --- The loop -------------------------------------------------------------------------------------


def test_generated_records_keep_what_the_prompts_had(original):
    prompts, outputs = rooms.corpus(), records.read_records("original.jsonl")
    assert [output.id for output in outputs] == [prompt.id for prompt in prompts]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.inputs == prompt.inputs
        assert output.extra == {**prompt.extra, "reference": prompt.targets}
        assert vocabulary().decode(output.target_ids) == output.targets
        assert output.target_ids.index(vocabulary().end_id) == len(output.target_ids) - 1
    learned = sum(output.targets == output.extra["reference"] for output in outputs)
    assert learned >= 50


def test_annotation_marks_the_listed_words_and_changes_nothing_else(original):
    generated = records.read_records("original.jsonl")
    annotated = records.read_records("original.annotated.jsonl")
    for before, after in zip(generated, annotated, strict=True):
        spans = tuple(match.span() for match in rooms.UNWANTED.finditer(before.targets))
        assert after.negative_spans == spans
        for name in ("id", "inputs", "targets", "target_ids", "extra"):
            assert getattr(after, name) == getattr(before, name)
        # Where "dirty" begins "noisy" would be just as wrong, and the other way round.
        alternatives = ()
        if spans:
            (other,) = {"dirty", "noisy"} - {before.targets[slice(*spans[0])]}
            instead = vocabulary().encode(rooms.UNWANTED.sub(other, before.targets))
            pairs = enumerate(zip(before.target_ids, instead, strict=False))
            position = next(position for position, (one, two) in pairs if one != two)
            alternatives = ((position, (instead[position],)),)
        assert after.negative_token_ids == alternatives
    assert sum(bool(row.negative_spans) for row in annotated) >= 20


def test_training_takes_the_mass_from_the_marks(patched):
    updates = [line for line in metrics_of("patched") if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 21))
    assert updates[0]["positive_kl"] == 0  # before the first update nothing has moved
    assert updates[0]["negative_mass"] > 0.9
    assert updates[-1]["negative_mass"] < 0.05
    spoken = collections.Counter(
        bool(rooms.UNWANTED.search(row.targets)) for row in records.read_records("patched.jsonl")
    )
    assert spoken[True] < 5


def test_the_best_checkpoint_stays(original, capsys):
    """Before the first update nothing has moved, so its KL is 0 and no later one's is smaller."""
    settings = {"CHECKPOINT_EVERY": 1, "KEEP_CHECKPOINTS": 1, "KEEP_BEST": "positive_kl"}
    train("best", TRAIN_STEPS=4, **settings)
    kept = {path.name for path in pathlib.Path("best").glob("checkpoint_*")}
    assert kept == {"checkpoint_1", "checkpoint_4"}
    assert "positive_kl is smallest at best/checkpoint_1" in capsys.readouterr().out
    # It is read from the disk by a run that goes on.
    train("best", TRAIN_STEPS=6, **settings)
    kept = {path.name for path in pathlib.Path("best").glob("checkpoint_*")}
    assert kept == {"checkpoint_1", "checkpoint_6"}


def test_training_goes_as_far_as_strengths_say(original, capsys):
    """Marks of 0.99 leave a hundredth; those of 1 are removal, in every bit of the run."""
    for name, strength in (("graded", 0.99), ("certain", 1.0)):
        rows = [
            dataclasses.replace(
                row,
                negative_spans=tuple((*span, strength) for span in row.negative_spans),
                negative_token_ids=(),
            )
            for row in records.read_records("original.annotated.jsonl")
        ]
        records.write_records(f"{name}.jsonl", rows)
    plain = [dataclasses.replace(row, negative_spans=row.offsets) for row in rows]
    records.write_records("plain.jsonl", plain)
    assert pathlib.Path("plain.jsonl").read_bytes() == pathlib.Path("certain.jsonl").read_bytes()
    capsys.readouterr()
    train("graded", RECORDS="graded.jsonl", LOG_EVERY=1)
    assert " of them have a strength below 1." in capsys.readouterr().out
    updates = [line for line in metrics_of("graded") if "loss" in line]
    first, last = updates[0], updates[-1]
    assert first["negative_residual"] == last["negative_residual"] == 0  # nothing goes altogether
    # Before the first update p is p0.
    assert first["negative_collateral"] == pytest.approx(first["negative_smallest_cost"], rel=1e-4)
    assert last["negative_collateral"] < 0.5 * last["negative_smallest_cost"]
    assert first["negative_mass"] > 0.9
    result = evaluate("graded.json", "graded.jsonl", "graded", ORIGINAL_RECORDS="graded.jsonl")
    assert result["certificate"]["negative_residual"] == 0
    assert result["certificate"]["negative_smallest_cost"] > 0
    # Of each token that a span touches, and of no other.
    assert result["certificate"]["num_graded"] == result["certificate"]["num_negative"] > 0
    assert " have a strength below 1. The residual is of those" in capsys.readouterr().out


def test_evaluation_counts_what_the_files_hold(patched):
    sharded = {"FSDP_DEVICES": 2, "MODEL_DEVICES": 2}
    result = evaluate("evaluation.json", "patched.annotated.jsonl", "patched", **sharded)
    before, after = (records.read_records(f"{name}.jsonl") for name in ("original", "patched"))
    num_unwanted = {
        name: sum(bool(rooms.UNWANTED.search(row.targets)) for row in rows)
        for name, rows in (("original", before), ("current", after))
    }
    for name, number in num_unwanted.items():
        assert result[name]["unwanted_outputs"]["numerator"] == number
        assert result[name]["unwanted_outputs"]["denominator"] == 60
    assert result["cut"] == pytest.approx(1 - num_unwanted["current"] / num_unwanted["original"])
    unchanged = sum(a.targets == b.targets for a, b in zip(before, after, strict=True))
    assert result["comparison"]["exact_match"]["numerator"] == unchanged
    certificate = result["certificate"]
    assert certificate["negative_residual"] < 0.1 < 1 < certificate["negative_smallest_cost"]
    # The trainer evaluated the same models on the same outputs, with no parameter split.
    of_original, of_trainer = (line for line in metrics_of("patched") if "eval/loss" in line)
    assert (of_original["step"], of_trainer["step"]) == (0, 20)
    # Before the first update it is the original, which differs in nothing from itself.
    assert abs(of_original["eval/positive_kl"]) < 1e-6 < of_trainer["eval/positive_kl"]
    assert of_original["eval/negative_residual"] > of_trainer["eval/negative_residual"]
    for name, of_trainer_name in (
        ("negative_residual", "negative_residual"),
        ("negative_collateral", "negative_collateral"),
        ("negative_smallest_cost", "negative_smallest_cost"),
        ("positive_collateral", "positive_kl"),
        ("num_negative", "num_negative"),
        ("num_positive", "num_positive"),
    ):
        assert certificate[name] == pytest.approx(of_trainer[f"eval/{of_trainer_name}"], rel=1e-4)


def test_tokens_add_up_to_the_certificate(patched):
    def tokens_of(number):
        settings = {"TOKENS_OUTPUT": "tokens.jsonl", "evaluate.evaluate.num_token_records": number}
        result = evaluate("evaluation.json", "patched.annotated.jsonl", "patched", **settings)
        lines = pathlib.Path("tokens.jsonl").read_text().splitlines()
        return result["certificate"], [json.loads(line) for line in lines]

    certificate, tokens = tokens_of(100)
    outputs = {row.id: row for row in records.read_records("original.annotated.jsonl")}
    assert {row["id"] for row in tokens} == set(outputs)
    by_kind = {True: collections.defaultdict(list), False: collections.defaultdict(list)}
    for row in tokens:
        output = outputs[row["id"]]
        assert "".join(row["pieces"]) == output.targets
        assert len(row["pieces"]) == len(output.target_ids) == len(row["is_negative"])
        said = "".join(p for p, n in zip(row["pieces"], row["is_negative"], strict=True) if n)
        assert said.strip() == "".join(output.targets[slice(*s)] for s in output.negative_spans)
        for position, is_negative in enumerate(row["is_negative"]):
            for name in ("kl", "residual", "collateral", "smallest_cost"):
                by_kind[is_negative][name].append(row[name][position])
    for name in ("residual", "collateral", "smallest_cost"):
        mean = statistics.fmean(by_kind[True][name])
        assert certificate[f"negative_{name}"] == pytest.approx(mean, rel=1e-3)
    assert certificate["positive_collateral"] == pytest.approx(
        statistics.fmean(by_kind[False]["kl"]), rel=1e-3
    )
    totals = [sum(row["kl"]) for row in tokens]
    assert totals == pytest.approx(sorted(totals, reverse=True), abs=1e-3)
    assert tokens_of(7)[1] == tokens[:7]


def test_states_of_the_original_are_computed_once_for_all_certificates(patched, capsys):
    train("upper", TRAINED_LAYERS=1, TRAIN_STEPS=2)
    for model, said in (
        ("patched", "states of the original, "),
        ("patched", "nothing to compute"),
        ("upper", "states of the original, "),  # those below its layer
        ("upper", "nothing to compute"),
    ):
        expected = evaluate("computed.json", "patched.annotated.jsonl", model)["certificate"]
        capsys.readouterr()
        settings = {"evaluate.Certificate.states_dir": "certificate_states"}
        found = evaluate("kept.json", "patched.annotated.jsonl", model, **settings)["certificate"]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)
        assert said in capsys.readouterr().out


def test_records_that_settings_were_chosen_on_have_no_certificate(patched, capsys):
    share, names = 0.4, ("original.annotated.jsonl", "patched.annotated.jsonl")
    left = [[] for _ in names]
    for file, rows in zip(names, left, strict=True):
        lines = pathlib.Path(file).read_text().splitlines(keepends=True)
        rows += [x for x in lines if not results.is_for_choice(json.loads(x)["id"], share)]
        pathlib.Path(f"left.{file}").write_text("".join(rows))
    assert 0 < len(left[0]) < 60
    expected = evaluate(
        "left.json", f"left.{names[1]}", "patched", ORIGINAL_RECORDS=f"left.{names[0]}"
    )
    settings = {"evaluate.Certificate.choice_share": share}
    found = evaluate("share.json", names[1], "patched", **settings)
    assert found["certificate"] == expected["certificate"]
    assert found["current"]["unwanted_outputs"]["denominator"] == 60
    settings = {"OUTPUT": "none.json", "CURRENT_RECORDS": names[1], "CHECKPOINT_PATH": "patched"}
    for wrong, message in (
        (1.0, "expected 0 to less than 1, found 1.0"),
        (0.9999, "which takes all 60"),
    ):
        settings["evaluate.Certificate.choice_share"] = wrong
        assert rooms.run("evaluate", settings) == 2
        assert message in capsys.readouterr().err


def test_a_certificate_says_what_was_cut(patched, capsys):
    """Cut texts lose marks, and a residual without them would look like success."""
    rows = records.read_records("original.annotated.jsonl")
    lengths = {"inputs": 2, "targets": 6}
    settings = {"TASK_FEATURE_LENGTHS": lengths, "ORIGINAL_RECORDS": "original.annotated.jsonl"}
    found = evaluate("cut.json", "patched.annotated.jsonl", "patched", **settings)["certificate"]
    num_inputs = sum(len(vocabulary().encode(row.inputs)) + 1 > 2 for row in rows)
    num_targets = sum(len(row.target_ids) > 6 for row in rows)
    assert found["num_cut_inputs"] == num_inputs > 0
    assert found["num_cut_targets"] == num_targets > 0
    uncut = evaluate("uncut.json", "patched.annotated.jsonl", "patched")["certificate"]
    assert uncut["num_cut_inputs"] == uncut["num_cut_targets"] == uncut["num_lost_marks"] == 0
    assert found["num_lost_marks"] >= uncut["num_negative"] - found["num_negative"] > 0
    assert (
        f"{num_inputs} inputs and {num_targets} targets are cut (TASK_FEATURE_LENGTHS): the"
    ) in capsys.readouterr().out


def test_a_certificate_counts_what_is_removed_at_every_position(patched, capsys):
    rows = records.read_records("original.annotated.jsonl")
    removed_everywhere.write_records("listed.jsonl", rows, removed_everywhere.Ids([5, 6, 7], {}))
    found = evaluate(
        "listed.json", "patched.annotated.jsonl", "patched", ORIGINAL_RECORDS="listed.jsonl"
    )
    assert found["certificate"]["num_removed_everywhere"] == 3
    assert "3 ids are removed at every position (.everywhere.json)" in capsys.readouterr().out
    # Those beside other records say nothing of these.
    records.write_records("listed.jsonl", rows[::-1])
    found = evaluate(
        "listed.json", "patched.annotated.jsonl", "patched", ORIGINAL_RECORDS="listed.jsonl"
    )
    assert found["certificate"]["num_removed_everywhere"] == 0


def test_nothing_is_measured_at_marks_where_there_are_none(patched, capsys):
    """A residual of 0 would read as success."""
    lines = pathlib.Path("original.annotated.jsonl").read_text().splitlines()
    clean = [{**json.loads(line), "negative_spans": [], "negative_token_ids": []} for line in lines]
    text = "".join(json.dumps(row) + "\n" for row in clean)
    pathlib.Path("unmarked.jsonl").write_text(text)
    settings = {"ORIGINAL_RECORDS": "unmarked.jsonl"}
    found = evaluate("unmarked.json", "patched.annotated.jsonl", "patched", **settings)
    certificate = found["certificate"]
    for name in ("residual", "collateral", "smallest_cost"):
        assert certificate[f"negative_{name}"] is None
    assert certificate["num_negative"] == 0
    assert certificate["positive_collateral"] > 0
    assert re.search(r"residual at marks \(nats\)\W+-\W", capsys.readouterr().out)


def test_tokens_come_from_a_certificate(original, capsys):
    settings = {
        "OUTPUT": "texts.json",
        "CURRENT_RECORDS": "original.annotated.jsonl",
        "CHECKPOINT_PATH": "original",
        "CERTIFICATE": None,
        "TOKENS_OUTPUT": "tokens_of_texts.jsonl",
    }
    assert rooms.run("evaluate", settings) == 2
    assert "TOKENS_OUTPUT: expected a certificate" in capsys.readouterr().err


def test_the_original_compared_with_itself_has_not_changed(original):
    result = evaluate("unchanged.json", "original.annotated.jsonl", "original")
    assert result["cut"] == 0
    assert result["original"] == result["current"]
    assert result["comparison"]["bleu"] == pytest.approx(100)
    assert result["comparison"]["exact_match"]["value"] == 1
    certificate = result["certificate"]
    assert certificate["negative_residual"] == certificate["negative_smallest_cost"] > 1
    assert certificate["negative_collateral"] == certificate["positive_collateral"] == 0


# --- The same again -------------------------------------------------------------------------------


def test_written_settings_train_the_same_model_bit_by_bit(patched):
    train("patched_again", ["patched/operative_config.gin"])
    rooms.assert_same_state("patched", "patched_again")


def test_sampling_depends_on_seed_and_id_alone(original):
    sampled = {"TEMPERATURE": 1.0, "TOP_P": 0.95}
    generate("sample.jsonl", "original", **sampled)
    generate("again.jsonl", "original", **sampled)
    first = pathlib.Path("sample.jsonl").read_bytes()
    assert pathlib.Path("again.jsonl").read_bytes() == first
    records.write_records("reversed.jsonl", rooms.corpus()[::-1])
    generate("of_reversed.jsonl", "original", PROMPTS="reversed.jsonl", BATCH_SIZE=8, **sampled)
    of_reversed = records.read_records("of_reversed.jsonl")
    assert of_reversed[::-1] == records.read_records("sample.jsonl")
    generate("other.jsonl", "original", SEED=1, **sampled)
    assert pathlib.Path("other.jsonl").read_bytes() != first
    assert pathlib.Path("other.jsonl.gin").is_file()


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(original):
    train("straight", DROPOUT_RATE=0.1, TRAIN_STEPS=5)
    train("stopped", DROPOUT_RATE=0.1, TRAIN_STEPS=2)
    train("stopped", DROPOUT_RATE=0.1, TRAIN_STEPS=5)
    rooms.assert_same_state("straight", "stopped")
    assert [line["step"] for line in metrics_of("stopped")] == [2, 5]
    with run_checkpoints.Checkpoints("stopped") as stopped:
        original_of_run = stopped.run_of(5)["original"]
    # Not the half-trained model of checkpoint 2.
    digest = digests.of_params(rooms.saved("original"))
    assert (original_of_run["path"], original_of_run["digest"]) == ("original", digest)


def test_a_run_that_is_done_is_left_alone(patched, capsys):
    train("patched")
    assert "Nothing to do: patched is at update 20 of 20." in capsys.readouterr().out


def test_microbatches_make_the_same_update(patched, monkeypatch):
    """And the same evaluation: of as many rows at once as fit beside an update."""
    rows_of_evaluation = []

    def spied(examples, batch_size, *args, make=loop.batch_for_eval):
        rows_of_evaluation.append(batch_size)
        return make(examples, batch_size, *args)

    monkeypatch.setattr(loop, "batch_for_eval", spied)
    settings = {
        "EVAL_DATASET": "@evaluation/datasets.RecordFiles()",
        "evaluation/datasets.RecordFiles.files": "original.annotated.jsonl",
        "LOG_EVERY": 1,
        "TRAIN_STEPS": 2,
    }
    train("whole", **settings)
    train("microbatched", NUM_MICROBATCHES=2, **settings)
    assert rows_of_evaluation == [16, 16, 8, 8]  # before the first update, and after the last
    (_, whole), (_, parts) = (
        [line for line in metrics_of(name) if "eval/loss" in line]
        for name in ("whole", "microbatched")
    )
    assert whole["eval/num_tokens"] == parts["eval/num_tokens"]
    assert parts["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-4)
    updates = [line for line in metrics_of("microbatched") if "loss" in line]
    assert len(updates) == 2
    of_patched = [line for line in metrics_of("patched") if "loss" in line]
    for line, expected in zip(updates, of_patched, strict=False):
        for name in ("num_tokens", "num_negative"):
            assert line[name] == expected[name]
        for name in ("loss", "gradient_norm", "negative_mass"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)


def test_an_evaluation_has_all_of_its_records_whatever_is_trained_on(patched):
    rows = records.read_records("original.annotated.jsonl")
    records.write_records("clean.jsonl", [row for row in rows if not row.negative_spans])
    evaluation = {
        "EVAL_DATASET": "@evaluation/datasets.RecordFiles()",
        "evaluation/datasets.RecordFiles.files": "original.annotated.jsonl",
        "TRAIN_STEPS": 1,
    }
    before_the_first = next(line for line in metrics_of("patched") if "eval/loss" in line)
    train("of-marked", CLEAN_PER_MARKED=0, **evaluation)
    assert metrics_of("of-marked")[0]["eval/num_tokens"] == before_the_first["eval/num_tokens"]
    evaluation["evaluation/datasets.RecordFiles.files"] = "clean.jsonl"
    train("of-marked-again", CLEAN_PER_MARKED=0, **evaluation)  # not: needs marked examples
    of_clean = metrics_of("of-marked-again")[0]["eval/num_tokens"]
    assert 0 < of_clean < before_the_first["eval/num_tokens"]


def test_packed_rows_hold_several_examples(patched, capsys):
    lengths = {"inputs": 16, "targets": 48}
    train("packed", PACK=True, TASK_FEATURE_LENGTHS=lengths, LOG_EVERY=1, TRAIN_STEPS=4)
    first, *_, last = metrics_of("packed")
    # The sixty rooms fill two batches of sixteen rows at most: with sixteen alone, it takes four.
    assert first["num_tokens"] + metrics_of("packed")[1]["num_tokens"] >= sum(
        len(row.target_ids) for row in records.read_records("original.jsonl")
    )
    assert first["positive_kl"] < 1e-9  # nothing has moved, whoever shares the row
    assert last["negative_mass"] < first["negative_mass"]
    assert 0 <= last["input_wait_fraction"] < 1
    assert re.search(r"Packed, [2-5]\.\d examples a row: padding is \d+%", capsys.readouterr().out)


# --- Other data, other removals -------------------------------------------------------------------

TASK = """
import seqio
import tensorflow as tf

from tnt_jax.data import tasks

VOCABULARY = seqio.SentencePieceVocabulary("vocabulary.model", extra_ids=0)


def dataset_fn(split, shuffle_files):
    negative, corrected = (
        VOCABULARY.encode(f"the room is {state}.") + [1] for state in ("dirty", "clean")
    )
    row = {
        "inputs": VOCABULARY.encode("small acorn") + [1],
        "negative_targets": negative,
        "corrected_targets": corrected,
    }
    ints = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(
        lambda: iter([row] * 4), output_signature=dict.fromkeys(row, ints)
    )


for mode in ("first", "full"):
    seqio.TaskRegistry.add(
        f"rooms_{mode}",
        source=seqio.FunctionDataSource(dataset_fn, splits=["train"]),
        preprocessors=[tasks.t5patches_mode(mode)],
        output_features=tasks.record_features(VOCABULARY),
    )
"""


@pytest.fixture
def task_module(tmp_path, monkeypatch):
    """A user's module that registers tasks in the layout of google/t5patches."""
    (tmp_path / "room_tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(tmp_path)
    yield "room_tasks"
    sys.modules.pop("room_tasks", None)
    for name in ("rooms_first", "rooms_full"):
        seqio.TaskRegistry.remove(name)


def test_seqio_tasks_and_the_t5patches_layout(original, task_module):
    num_tokens = len(vocabulary().encode("the room is dirty.")) + 1
    for mode, num_negative in (("first", 1), ("full", num_tokens)):
        settings = {
            "MIXTURE_OR_TASK_NAME": f"rooms_{mode}",
            "MIXTURE_OR_TASK_MODULE": task_module,
            "MODEL_DIR": mode,
            "TRAIN_STEPS": 1,
        }
        assert rooms.run("train_task", settings) == 0
        (line,) = metrics_of(mode)
        assert line["num_tokens"] == 16 * num_tokens
        assert line["num_negative"] == 16 * num_negative


def test_words_removed_at_every_position(original):
    """A word of one token ("quiet") is removed for all records; one of several is marked."""
    pathlib.Path("two_words.txt").write_text("quiet\ndirty\n")
    settings = {"LEXICON": "two_words.txt", "ALTERNATIVES": False, "AT_EVERY_POSITION": True}
    annotate("everywhere.jsonl", "original.jsonl", **settings)
    written = json.loads(pathlib.Path("everywhere.jsonl.everywhere.json").read_text())
    assert written["ids"] == vocabulary().encode("quiet")
    assert written["left_out"] == ["dirty"]
    assert written["unspelt"] == []

    marked = records.read_records("everywhere.jsonl")
    removed = {
        (row.targets, id_) for row in marked for _, ids in row.negative_token_ids for id_ in ids
    }
    assert removed == {
        (row.targets, vocabulary().encode("dirty")[-1]) for row in marked if "dirty" in row.targets
    }

    unmarked = [dataclasses.replace(row, negative_spans=()) for row in marked]
    # The ids go with the records, and a name for them is what other kinds of data need.
    ids = removed_everywhere.removed_ids("everywhere.jsonl.everywhere.json")
    removed_everywhere.write_records("unmarked.jsonl", unmarked, removed_everywhere.Ids(ids, {}))
    train("without_quiet", RECORDS="unmarked.jsonl", LOG_EVERY=5)
    pathlib.Path("unmarked.jsonl.everywhere.json").unlink()
    removal = {
        "objectives.TntObjective.removed_everywhere": "@removed_everywhere.removed_ids()",
        "removed_everywhere.removed_ids.path": "everywhere.jsonl.everywhere.json",
    }
    train("also_without_quiet", RECORDS="unmarked.jsonl", LOG_EVERY=5, **removal)
    rooms.assert_same_state("without_quiet", "also_without_quiet")
    first, *_, last = metrics_of("without_quiet")
    assert last["negative_mass"] < 0.1 < first["negative_mass"]
    generate("without_quiet.jsonl", "without_quiet")
    num_spoken = [
        [
            sum(word in row.targets for row in records.read_records(path))
            for word in ("quiet", "dirty", "noisy")
        ]
        for path in ("original.jsonl", "without_quiet.jsonl")
    ]
    assert num_spoken == [[15, 15, 15], [0, 0, 15]]
    # An annotator that removes nothing everywhere leaves no ids of an earlier one.
    annotate("everywhere.jsonl", "original.jsonl", **{**settings, "AT_EVERY_POSITION": False})
    assert not pathlib.Path("everywhere.jsonl.everywhere.json").exists()


# --- The pipeline ---------------------------------------------------------------------------------

PIPELINE = {
    "ARMS": "[@tnrf/experiment.Arm(), @ul_ll/experiment.Arm()]",
    "ul_ll/objectives.TntObjective.negative_weight": 0.1,
    "TRAIN_STEPS": 6,
    "CHECKPOINT_EVERY": 2,
}


def stages(printed):
    """The stages that a pipeline ran, and those that it kept."""
    lines = re.findall(r"^\[\d+\] (.*)$", printed, re.MULTILINE)
    kept = [line.partition(": done before")[0] for line in lines if "done before, kept" in line]
    return [line for line in lines if "done before, kept" not in line], kept


def test_a_pipeline_does_what_is_not_done(original, capsys, monkeypatch):
    settings = {**PIPELINE, "OUTPUT_DIR": "pipeline"}
    of_original = [
        f"{name}: {what}, greedy"
        for name in ("training_outputs", "original")
        for what in ("generate", "annotate")
    ]
    of_original += [f"decode mask: {what}, greedy" for what in ("generate", "annotate", "evaluate")]
    of_tnrf, of_ul_ll = (
        [f"{arm}: train", *(f"{arm}: {w}, greedy" for w in ("generate", "annotate", "evaluate"))]
        for arm in ("TNRF", "UL+LL")
    )

    # Interrupted before its sixth update, the last checkpoint being that of the fourth.
    whole_read = Batches.read

    def interrupted_read(self, k):
        if k == 5:
            raise KeyboardInterrupt
        return whole_read(self, k)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "read", interrupted_read)
        assert rooms.run("pipeline", settings) == 130
    assert stages(capsys.readouterr().out) == ([*of_original, "TNRF: train"], [])

    assert rooms.run("pipeline", settings) == 0
    printed = capsys.readouterr().out
    assert stages(printed) == ([*of_tnrf, *of_ul_ll, "report"], of_original)
    assert "Going on from checkpoint 4 in pipeline/TNRF/model." in printed
    assert "EVAL_PROMPTS: 60 of 60 inputs are also in TRAIN_PROMPTS: " in printed
    assert "greedy outputs on 60 prompts, 60 of them trained on" in printed
    # Before training people see what it will be trained to say.
    shown = re.search(r"\n  original     .*(dirty|noisy).*\n  decode mask  (.*)\n", printed)
    assert shown and not rooms.UNWANTED.search(shown[2])
    assert shown.start() < printed.index("Going on from")
    assert re.search(
        r"\nUnder the mask 0 of \d+ unwanted outputs are still unwanted, and \d+ of \d+ clean ones",
        printed,
    )
    # As if it had not been interrupted, and as the programs do it one by one.
    train("one_by_one", TRAIN_STEPS=6)
    rooms.assert_same_state("pipeline/TNRF/model", "one_by_one")
    annotated = records.read_records("pipeline/original/greedy.annotated.jsonl")
    assert annotated == records.read_records("original.annotated.jsonl")
    capsys.readouterr()

    summary = pathlib.Path("pipeline/summary.json").read_bytes()
    evaluations = {name: of["greedy"] for name, of in json.loads(summary)["evaluations"].items()}
    assert list(evaluations) == ["TNRF", "UL+LL", "decode mask"]
    masked = evaluations["decode mask"]
    assert masked["current"]["unwanted_outputs"]["numerator"] == 0
    assert masked["mask"]["to_current"]["bleu"] == pytest.approx(100)
    assert masked["mask"]["comparison"] == masked["comparison"]
    texts = [
        [row.targets for row in records.read_records(f"pipeline/{name}/greedy.annotated.jsonl")]
        for name in ("decode mask", "TNRF")
    ]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    assert evaluations["TNRF"]["mask"]["to_current"]["exact_match"]["numerator"] == same
    assert rooms.run("pipeline", settings) == 0
    kept = [*of_original, *of_tnrf, *of_ul_ll, "report"]
    assert stages(capsys.readouterr().out) == ([], kept)
    assert pathlib.Path("pipeline/summary.json").read_bytes() == summary

    # Another weight of one arm: that arm alone is done again, from the original. In float32 it is
    # the same weight, so the outputs stay the same: no new annotation, but an evaluation of the new
    # model. The other arm is only moved.
    settings |= {
        "ARMS": "[@ul_ll/experiment.Arm(), @tnrf/experiment.Arm()]",
        "ul_ll/objectives.TntObjective.negative_weight": 0.1 + 1e-9,
    }
    assert rooms.run("pipeline", settings) == 0
    printed = capsys.readouterr().out
    kept = [*of_original, "UL+LL: annotate, greedy", *of_tnrf]
    done = [stage for stage in of_ul_ll if stage not in kept]
    assert stages(printed) == ([*done, "report"], kept)
    assert "Going on from" not in printed
    assert [line["step"] for line in metrics_of("pipeline/UL+LL/model")] == [2, 4, 6]


def test_a_pipeline_reads_an_edited_word_list(original, capsys):
    words = pathlib.Path("edited_words.txt")
    words.write_text(pathlib.Path("words.txt").read_text())
    prompts = records.read_records("corpus.jsonl")
    records.write_records("even.jsonl", prompts[::2])
    records.write_records("odd.jsonl", prompts[1::2])
    settings = {
        **PIPELINE,
        "TRAIN_PROMPTS": "even.jsonl",
        "EVAL_PROMPTS": "odd.jsonl",
        "OUTPUT_DIR": "edited",
        "ARMS": "[@tnrf/experiment.Arm()]",
        "annotators.Lexicon.path": words,
        "TRAIN_STEPS": 1,
    }
    assert rooms.run("pipeline", settings) == 0
    printed = capsys.readouterr().out
    assert "greedy outputs on 30 unseen prompts" in printed
    assert "EVAL_PROMPTS: " not in printed
    # A file of prompts is an input: nothing else in a note says what they are, as in older notes.
    note = json.loads(pathlib.Path("edited/stages/original_generate_greedy.json").read_text())
    assert {"corpus.jsonl", "odd.jsonl"} & {*note["described"]["inputs"]} == {"odd.jsonl"}
    assert note["described"]["version"] == ""
    words.write_text(words.read_text() + "quiet\n")
    assert rooms.run("pipeline", settings) == 0
    done, kept = stages(capsys.readouterr().out)
    assert "original: annotate, greedy" in done
    assert "original: generate, greedy" in kept
    outputs = records.read_records("edited/original/greedy.annotated.jsonl")
    assert all(row.negative_spans for row in outputs if "quiet" in row.targets)


@contextlib.contextmanager
def experiment_of(settings):
    """What a pipeline with these settings is given, while gin has them."""
    program.configure("tnt_jax.pipeline", "pipeline", rooms.arguments("pipeline", settings))
    yield program.bound_arguments(pipeline.pipeline, ["experiment"])["experiment"]
    gin.clear_config()


def test_outputs_with_a_mask_are_those_of_an_edited_word_list(original, capsys):
    words = pathlib.Path("masked_words.txt")
    words.write_text(pathlib.Path("words.txt").read_text())
    settings = {
        **PIPELINE,
        "OUTPUT_DIR": "masked",
        "annotators.Lexicon.path": words,
    }

    def outputs():
        with experiment_of(settings) as found:
            file = experiment_run.open_run(found).make_mask_outputs()["greedy"]
        return " ".join(row.targets for row in records.read_records(file))

    assert "quiet" in outputs()
    words.write_text(words.read_text() + "quiet\n")
    assert "quiet" not in outputs()
    capsys.readouterr()
    outputs()
    done, _ = stages(capsys.readouterr().out)
    assert not done


def test_folders_in_the_home_folder(original, monkeypatch, tmp_path):
    """`program` expands `~` on a command line; a caller from Python may pass it, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"MODEL_DIR": "another", "TRAIN_STEPS": 1}
    train = program.configure("tnt_jax.train", "train", rooms.arguments("train", settings))
    assert train(model_dir="~/run") == str(tmp_path / "run" / "checkpoint_1")
    files = {"metrics.jsonl", "events.jsonl", "operative_config.gin", "tensorboard"}
    assert files <= {file.name for file in (tmp_path / "run").iterdir()}

    (tmp_path / "original").symlink_to(pathlib.Path("original").absolute())
    with experiment_of({**PIPELINE, "OUTPUT_DIR": "another"}) as found:
        opened = experiment_run.open_run(
            dataclasses.replace(
                found, output_dir="~/pipeline", original_checkpoint_path="~/original"
            )
        )
    assert opened.root == tmp_path / "pipeline"
    assert opened.original == str(tmp_path / "original")
    assert (tmp_path / "pipeline" / "operative_config.gin").exists()
    assert not pathlib.Path("~").exists()


def test_a_pipeline_takes_no_model_for_its_own(original, capsys):
    pathlib.Path("foreign/TNRF/model").mkdir(parents=True)
    assert rooms.run("pipeline", {**PIPELINE, "OUTPUT_DIR": "foreign"}) == 2
    message = "TNRF: train: expected nothing, or what this run made, in foreign/TNRF/model"
    assert message in capsys.readouterr().err


PROMPT_TASK = """
import pathlib

import seqio
import tensorflow as tf


def dataset_fn(split, shuffle_files):
    lines = pathlib.Path("task_prompts.txt").read_text().splitlines()
    return tf.data.Dataset.from_tensor_slices({"inputs": lines, "targets": [""] * len(lines)})


seqio.TaskRegistry.add(
    "room_prompts",
    source=seqio.FunctionDataSource(dataset_fn, splits=["train"]),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features=dict.fromkeys(
        ("inputs", "targets"),
        seqio.Feature(seqio.SentencePieceVocabulary("vocabulary.model", extra_ids=0)),
    ),
)
"""


def test_prompts_of_a_seqio_task_are_answered_anew_when_they_change(
    original, tmp_path, monkeypatch, capsys
):
    """The task's name stays. And what is learned from is told from what is not by the texts."""
    (tmp_path / "prompt_tasks.py").write_text(PROMPT_TASK)
    monkeypatch.syspath_prepend(tmp_path)
    prompts = [row.inputs for row in records.read_records("corpus.jsonl")]
    file = pathlib.Path("task_prompts.txt")
    file.write_text("\n".join(prompts[:20]))
    settings = {
        **PIPELINE,
        "TRAIN_PROMPTS": "@tasks.SeqioDataset()",
        "EVAL_PROMPTS": "@tasks.SeqioDataset()",
        "tasks.SeqioDataset.mixture_or_task_name": "room_prompts",
        "tasks.SeqioDataset.mixture_or_task_module": "prompt_tasks",
        "OUTPUT_DIR": "of_task",
        "ARMS": "[@tnrf/experiment.Arm()]",
        "TRAIN_STEPS": 1,
    }
    try:
        assert rooms.run("pipeline", settings) == 0
        printed = capsys.readouterr().out
        assert "EVAL_PROMPTS: 20 of 20 inputs are also in what is learned from: " in printed
        assert "greedy outputs on 20 prompts, 20 of them trained on" in printed
        assert rooms.run("pipeline", settings) == 0
        assert stages(capsys.readouterr().out)[0] == []
        file.write_text("\n".join(prompts[20:40]))
        assert rooms.run("pipeline", settings) == 0
        done, _ = stages(capsys.readouterr().out)
        assert {"training_outputs: generate, greedy", "original: generate, greedy"} <= {*done}
        answered = records.read_records("of_task/original/greedy.annotated.jsonl")
        assert [row.inputs for row in answered] == prompts[20:40]
    finally:
        sys.modules.pop("prompt_tasks", None)
        seqio.TaskRegistry.remove("room_prompts")


@pytest.mark.parametrize("setting", ["TRAIN_PROMPTS", "EVAL_PROMPTS", "UNRELATED_PROMPTS"])
def test_a_pipeline_without_prompts_ends_before_the_first_stage(original, setting, capsys):
    pathlib.Path("empty.jsonl").touch()
    assert rooms.run("pipeline", {**PIPELINE, "OUTPUT_DIR": "none", setting: "empty.jsonl"}) == 2
    assert "empty.jsonl: expected records, found none." in capsys.readouterr().err
    assert not pathlib.Path("none/stages").exists()


def test_a_pipeline_whose_annotator_knows_no_output_trains_nothing(original, capsys):
    pathlib.Path("others.jsonl").write_text('{"id": "another", "negative_spans": []}\n')
    settings = {**PIPELINE, "OUTPUT_DIR": "unknown"}
    assert rooms.run_with_marks("pipeline", settings, "others.jsonl") == 2
    message = "EVAL_PROMPTS: expected outputs that the annotator knows, found none in unknown/"
    assert message in capsys.readouterr().err
    assert not list(pathlib.Path("unknown").glob("*/model"))


def test_one_prompt_is_enough_for_a_pipeline_and_unrelated_ones_have_numbers_of_their_own(
    original, capsys
):
    records.write_records("one.jsonl", rooms.corpus()[:1])
    settings = {
        **{"EVAL_PROMPTS": "one.jsonl", "UNRELATED_PROMPTS": "corpus.jsonl"},
        **{"ARMS": "[@tnrf/experiment.Arm()]", "OUTPUT_DIR": "one"},
    }
    assert rooms.run("pipeline", {**PIPELINE, **settings}) == 0
    summary = json.loads(pathlib.Path("one/summary.json").read_text())
    evaluation = summary["evaluations"]["TNRF"]["greedy"]
    assert evaluation["current"]["unwanted_outputs"]["denominator"] == 1
    assert pathlib.Path("one/report.html").exists()
    # They are what an evaluation on the same prompts has.
    settings |= {"EVAL_PROMPTS": "corpus.jsonl", "OUTPUT_DIR": "all"}
    assert rooms.run("pipeline", {**PIPELINE, **settings}) == 0
    summary = json.loads(pathlib.Path("all/summary.json").read_text())
    of_all = summary["evaluations"]["TNRF"]["greedy"]
    unrelated = {
        "kl": of_all["certificate"]["positive_collateral"],
        "num_positive": of_all["certificate"]["num_positive"],
        "unchanged": of_all["comparison"]["exact_match"],
    }
    assert unrelated["kl"] > 0
    assert evaluation["unrelated"] == of_all["unrelated"] == unrelated
    line = re.findall(r"^ *TNRF .*%.*$", capsys.readouterr().out, re.MULTILINE)[-1]
    share = unrelated["unchanged"]["value"]
    assert line.split()[-2:] == [f"{unrelated['kl']:.4f}", f"{share:.1%}"]


def test_a_table_says_once_what_the_certificates_of_its_arms_are_of(capsys):
    evaluation = outputs.evaluation(60)
    evaluation["certificate"] |= {"num_negative": 700.0, "num_positive": 2.0}
    found = evaluations.parse(evaluation)
    pipeline._print_table({arm: {"greedy": found} for arm in ("a", "b")}, ["greedy"], 0)
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("700 of 702 positions of the original's outputs are marked") == 1


def test_a_number_that_was_not_finite_is_a_dash_in_the_table(capsys):
    evaluation = outputs.evaluation(60)
    certificate = dict.fromkeys(evaluation["certificate"])
    evaluation |= {"certificate": certificate}
    pipeline._print_table({"TNRF": {"greedy": evaluations.parse(evaluation)}}, ["greedy"], 0)
    printed = capsys.readouterr().out
    assert re.search(r"^ +residual +collateral +KL elsewhere *$", printed, re.MULTILINE)
    assert re.search(r"^ +TNRF +- +- +- *$", printed, re.MULTILINE)


def printed_tables(capsys, **arms):
    """Headings and rows of what `_print_table` prints, by arm: a dict of texts each."""
    of_arms = {arm: {"greedy": evaluations.parse(found)} for arm, found in arms.items()}
    pipeline._print_table(of_arms, ["greedy"], 0)
    found = {}
    for text in capsys.readouterr().out.split("greedy outputs")[1:]:
        lines = [line for line in text.splitlines()[1:] if line.startswith("  ") and line.strip()]
        headings = re.split(r"  +", lines[0].strip())
        starts = [lines[0].index(f" {heading} ") + 1 for heading in headings]
        for line in lines[1:]:
            cells = [line[a:b].strip() for a, b in itertools.pairwise([*starts, None])]
            arm = found.setdefault(line[: starts[0]].strip(), {})
            arm |= dict(zip(headings, cells, strict=True))
    return found


def test_the_table_has_the_numbers_of_the_other_tables(capsys):
    """Under their headings: those of a sweep's main columns, and what stayed as it was."""
    evaluation = outputs.evaluation(60)
    evaluation["certificate"] |= {"negative_collateral": 3.5}
    unchanged = {"numerator": 26, "denominator": 80, "value": 0.325}
    evaluation["unrelated"] = {"kl": 0.25, "unchanged": unchanged}
    evaluation["original"]["distinct_trigrams"]["value"] = 0.25
    mask = {name: evaluation[name] for name in evaluation.keys() - {"certificate", "unrelated"}}
    found = printed_tables(capsys, TNRF=evaluation, mask=mask)
    assert found["TNRF"] == {
        "unwanted": "1.7% (1)",
        "cut": "80.0%",
        "BLEU": "81.5",
        "BLEU to the mask": "61.5",
        "the mask's": "25.0%",
        "unchanged": "75.0%",
        "of clean ones": "87.5%",
        "phrases": "5.0%",
        "trigrams": "50.0%",
        "residual": "0.2500",
        "collateral": "3.5000",
        "KL elsewhere": "0.1250",
        "KL unrelated": "0.2500",
        "unrelated unchanged": "32.5%",
    }
    known = {"unwanted": "8.3% (5)", "phrases": "5.0%", "trigrams": "25.0%", "residual": "1.5000"}
    assert found["original"] == dict.fromkeys(found["TNRF"], "") | known
    # No model is behind a mask.
    assert [*found["mask"]] == [*found["TNRF"]][:9]
    row = results.from_evaluation(evaluations.parse(evaluation), {"objective": "TNRF", "alpha": 1})
    row |= {"decoder": "greedy", "num_outputs": 60, "num_seeds": 1}
    sweeps = tables.as_markdown([row], ["greedy"], in_full=False).splitlines()[2]
    assert {*sweeps.strip("| ").split(" | ")} - {*found["TNRF"]} == {"arm", "alpha", "95 %"}


def test_the_table_has_no_column_of_what_was_not_measured(capsys):
    evaluation = outputs.evaluation(60)
    del evaluation["mask"], evaluation["certificate"]
    found = printed_tables(capsys, TNRF=evaluation)
    expected = ["unwanted", "cut", "BLEU", "unchanged", "of clean ones", "phrases", "trigrams"]
    assert [*found["TNRF"]] == expected
    evaluation["unrelated"] = {"kl": 0.25, "unchanged": evaluation["comparison"]["exact_match"]}
    found = printed_tables(capsys, TNRF=evaluation)
    assert [*found["TNRF"]] == [*expected, "KL unrelated", "unrelated unchanged"]


def test_the_table_fits_a_terminal_of_120_columns(capsys, monkeypatch):
    """Headings of several words may take several lines; no word, and no number, is cut."""
    evaluation = outputs.evaluation(60)
    evaluation["unrelated"] = {"kl": 0.25, "unchanged": evaluation["comparison"]["exact_match"]}
    evaluation["comparison"]["bleu"] = evaluation["mask"]["to_current"]["bleu"] = 100.0
    for part in (evaluation["comparison"]["exact_match"], evaluation["current"]["repeated_phrase"]):
        part["value"] = 1.0
    of_arm = {"greedy": evaluations.parse(evaluation)}
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    pipeline._print_table({"decode mask": of_arm}, ["greedy"], 0)
    printed = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out)
    lines = printed.partition("BLEU and unchanged")[0].splitlines()
    assert max(map(len, lines)) <= 120 and "\u2026" not in printed
    first, second = (" ".join(line.split()) for line in lines if line.startswith("  decode mask"))
    assert first == "decode mask 1.7% (1) 80.0% 100.0 100.0 25.0% 100.0% 87.5% 100.0% 50.0%"
    assert second == "decode mask 0.2500 - 0.1250 0.2500 100.0%"


def said(folder, name, *texts):
    """Annotated outputs of a model that says these; "glad" and "happy" are unwanted."""
    found = [
        records.Record(
            id=str(number),
            inputs=f"message {number}",
            targets=text,
            negative_spans=tuple(m.span() for m in re.finditer("glad|happy", text)),
            annotator="ours",
        )
        for number, text in enumerate(texts)
    ]
    records.write_records(folder / name, found)
    return str(folder / name)


def test_before_training_people_see_what_the_mask_makes_of_what_is_unwanted(tmp_path, capsys):
    """In order, also where that is unwanted as well; and that it is wrong about clean ones."""
    original = said(tmp_path, "original", "I am glad", "Good", "so glad", "Fine", "glad", "Well")
    masked = said(tmp_path, "masked", "I am happy", "Good", "so so", "Fi", "happy", "We")
    pipeline._print_masked(original, masked, 2)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "  input         message 0",
        "  original      I am glad",
        "  decode mask   I am happy",
        "  unwanted      'glad'",
        "  unwanted now  'happy'",
        "",
        "  input        message 2",
        "  original     so glad",
        "  decode mask  so so",
        "  unwanted     'glad'",
        "",
        "Under the mask 2 of 3 unwanted outputs are still unwanted, and 2 of 3 clean ones changed, "
        "such as this one:",
        "",
        "  input        message 3",
        "  original     Fine",
        "  decode mask  Fi",
    ]
    clean = said(tmp_path, "clean", "so so", "Good")
    pipeline._print_masked(clean, clean, 2)
    assert capsys.readouterr().out == (
        "\nUnder the mask 0 of 0 unwanted outputs are still unwanted, and 0 of 2 clean ones "
        "changed.\n"
    )
    pipeline._print_masked(original, masked, 0)
    assert capsys.readouterr().out == ""


def test_what_a_run_should_reach():
    """Limits that the numbers of `outputs.evaluation` reach exactly, and others just beyond."""
    arm, baseline = outputs.evaluation(60), outputs.evaluation(60)
    arm["certificate"] |= {"negative_collateral": 0.5}
    arm["mask"]["comparison"] |= {"bleu": 163.0}
    arm["mask"]["distinct_trigrams"] |= {"value": 0.25}
    baseline["comparison"] = {**baseline["comparison"], "bleu": 40.75}
    baseline["certificate"] = {**baseline["certificate"], "positive_collateral": 0.5}
    reached = {
        "num_unwanted": 5,
        "unwanted_rate": 5 / 60,
        "cut": 0.8,
        "bleu_margin": {"greedy": 81.5 - 40.75},
        "bleu_times_baseline": 2.0,
        "bleu_share_of_mask": 0.5,
        "bleu_to_mask": 61.5,
        "trigrams_share_of_mask": 2.0,
        "kl_elsewhere": 0.125,
        "collateral": 0.5,
        "baseline_kl_times": 4.0,
    }

    def missed(**changed):
        expected = pipeline.Expectations(arm="A", baseline="B", **{**reached, **changed})
        of_arms = {
            name: {"greedy": evaluations.parse(of_arm)}
            for name, of_arm in (("A", arm), ("B", baseline))
        }
        return [c["text"] for c in pipeline._check(expected, of_arms) if not c["reached"]]

    assert missed() == []
    for name, limit in reached.items():
        is_most = name in ("kl_elsewhere", "collateral")
        beyond = {"greedy": limit["greedy"] * 1.01} if name == "bleu_margin" else limit * 1.01
        assert len(missed(**{name: limit * 0.99 if is_most else beyond})) == 1, name
    # As many as of the original are not fewer.
    for number, texts in (
        (2, []),
        (3, ["outputs that repeat a phrase: 5.0%, expected below 5.0%"]),
        (30, ["outputs that repeat a phrase: 50.0%, expected below 5.0%"]),
    ):
        repeated = {"numerator": number, "denominator": 60, "value": number / 60}
        arm["current"] = {**arm["current"], "repeated_phrase": repeated}
        assert missed(fewer_repeated_phrases=True) == texts
    # What is asked of a mask that is not there is not reached.
    del arm["mask"]
    assert len(missed()) == 3


def test_a_pipeline_of_two_rounds(original, capsys):
    """The second round starts from the first one's model, and has the first original's target."""
    settings = {
        **PIPELINE,
        "ARMS": "[@tnrf/experiment.Arm()]",
        "NUM_ROUNDS": 2,
        "OUTPUT_DIR": "twice",
        "LOG_EVERY": 1,
    }
    assert rooms.run("pipeline", settings) == 0
    done, _ = stages(capsys.readouterr().out)
    second = ["generate, greedy", "annotate, greedy", "merge, rounds", "train"]
    assert done[done.index("TNRF: train") + 1 :][:4] == [f"TNRF.round2: {what}" for what in second]

    outputs = {
        (row.inputs, row.targets)
        for file in ("training_outputs/greedy", "TNRF.round2/greedy")
        for row in records.read_records(f"twice/{file}.annotated.jsonl")
    }
    merged = records.read_records("twice/TNRF.round2/rounds.merged.jsonl")
    assert {(row.inputs, row.targets) for row in merged} == outputs
    assert json.loads(pathlib.Path("twice/summary.json").read_text())["num_rounds"] == 2
    first, last = (
        run_checkpoints.Checkpoints(f"twice/{name}/model").run_of(6)
        for name in ("TNRF", "TNRF.round2")
    )
    assert last["original"] == first["original"]
    assert first["start"]["path"] == "original"
    checkpoint = pathlib.Path("twice/TNRF/model/checkpoint_6").absolute()
    assert pathlib.Path(last["start"]["path"]) == checkpoint

    def losses(name):
        lines = pathlib.Path(f"twice/{name}/model/metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["positive_kl"] for line in lines]

    # Before any update the first round's model is the original, the second round's is not.
    assert losses("TNRF")[0] < 1e-6 < losses("TNRF.round2")[0]


# --- The real thing -------------------------------------------------------------------------------


def test_python_dash_m(original):
    """In a process of its own, on one device: nothing but its own lines, and one for a mistake."""
    arguments = rooms.arguments("train", {"MODEL_DIR": "one_device", "TRAIN_STEPS": 2})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*more):
        command = [sys.executable, "-m", "tnt_jax.train", *arguments, *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    done = start()
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 1 cpu device(s)" in done.stdout
    assert [line["step"] for line in metrics_of("one_device")] == [2]
    refused = start("--gin.INITIAL_CHECKPOINT_PATH=one_device")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "MODEL_DIR one_device holds another run, at update 2: " in refused.stderr
