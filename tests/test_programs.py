"""The programs end to end, through their real entry points, on a model that learns in seconds."""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import rooms
import seqio

from tnt_jax import checkpoints, feature_converters, records, tokenization

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Many runs here are the same program: each is compiled once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The rooms, an original model that learned them, and its outputs, annotated."""
    world = rooms.World(tmp_path_factory.mktemp("world"))
    world.train(
        "original",
        "--gin.ANNOTATED=False",
        "--gin.LEARNING_RATE=1e-2",
        objective="fine_tune",
        records="corpus.jsonl",
        initial=None,
        steps=60,
    )
    world.generate("original.jsonl", "original")
    world.annotate("original.annotated.jsonl", "original.jsonl")
    return world


UPDATE = {
    "objective": "tnrf",
    "records": "original.annotated.jsonl",
    "initial": "original",
    "steps": 20,
}


@pytest.fixture(scope="module")
def patched(world):
    """The original after 20 updates of TNRF, evaluated meanwhile on the outputs it trains on."""
    world.train(
        "patched",
        "--gin.LOG_EVERY=1",
        "--gin.train.train.eval_dataset=@evaluation/tasks.RecordFiles()",
        f"--gin.evaluation/tasks.RecordFiles.files={world.folder}/original.annotated.jsonl",
        **UPDATE,
    )
    world.generate("patched.jsonl", "patched")
    world.annotate("patched.annotated.jsonl", "patched.jsonl")
    return world


# --- The loop -------------------------------------------------------------------------------------


def test_generated_records_keep_what_the_prompts_had(world):
    prompts, outputs = rooms.corpus(), world.records("original.jsonl")
    vocabulary = seqio.SentencePieceVocabulary(f"{world.folder}/vocabulary.model", 0)
    assert [output.id for output in outputs] == [prompt.id for prompt in prompts]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.inputs == prompt.inputs
        assert output.extra == {**prompt.extra, "reference": prompt.targets}
        assert tokenization.decode(vocabulary, output.target_ids) == output.targets
        assert output.target_ids.index(tokenization.EOS_ID) == len(output.target_ids) - 1
    learned = sum(output.targets == output.extra["reference"] for output in outputs)
    assert learned >= 50


def test_annotation_marks_the_listed_words_and_changes_nothing_else(world):
    generated, annotated = (
        world.records("original.jsonl"),
        world.records("original.annotated.jsonl"),
    )
    for before, after in zip(generated, annotated, strict=True):
        spans = tuple(match.span() for match in rooms.UNWANTED.finditer(before.targets))
        assert after.negative_spans == spans
        for name in ("id", "inputs", "targets", "target_ids", "extra"):
            assert getattr(after, name) == getattr(before, name)
        # Where "dirty" begins "noisy" would be just as wrong, and the other way round.
        assert bool(after.negative_token_ids) == bool(spans)
    assert sum(bool(row.negative_spans) for row in annotated) >= 20


def test_training_takes_the_mass_from_the_marks(patched):
    updates = [line for line in patched.metrics("patched") if "loss" in line]
    assert [line["step"] for line in updates] == list(range(1, 21))
    assert updates[0]["positive_kl"] == 0  # before the first update nothing has moved
    assert updates[0]["negative_mass"] > 0.9
    assert updates[-1]["negative_mass"] < 0.05
    spoken = collections.Counter(
        bool(rooms.UNWANTED.search(row.targets)) for row in patched.records("patched.jsonl")
    )
    assert spoken[True] < 5


def test_evaluation_counts_what_the_files_hold(patched):
    result = patched.evaluate("evaluation.json", "patched.annotated.jsonl", "patched")
    before, after = patched.records("original.jsonl"), patched.records("patched.jsonl")
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
    # The trainer evaluated the same models on the same outputs.
    (of_trainer,) = (line for line in patched.metrics("patched") if "eval/loss" in line)
    for name, of_trainer_name in (
        ("negative_residual", "negative_residual"),
        ("negative_collateral", "negative_collateral"),
        ("negative_smallest_cost", "negative_smallest_cost"),
        ("positive_collateral", "positive_kl"),
        ("num_negative", "num_negative"),
        ("num_positive", "num_positive"),
    ):
        assert certificate[name] == pytest.approx(of_trainer[f"eval/{of_trainer_name}"], rel=1e-4)


def test_the_original_compared_with_itself_has_not_changed(world):
    result = world.evaluate("unchanged.json", "original.annotated.jsonl", "original")
    assert result["cut"] == 0
    assert result["original"] == result["current"]
    assert result["comparison"]["bleu"] == pytest.approx(100)
    assert result["comparison"]["exact_match"]["value"] == 1
    certificate = result["certificate"]
    assert certificate["negative_residual"] == certificate["negative_smallest_cost"] > 1
    assert certificate["negative_collateral"] == certificate["positive_collateral"] == 0


def test_every_output_has_its_settings_beside_it(patched):
    for name in ("original", "patched"):
        assert (patched.folder / name / "operative_config.gin").is_file()
    for name in ("original.jsonl.gin", "original.annotated.jsonl.gin"):
        assert (patched.folder / name).is_file()


# --- The same again -------------------------------------------------------------------------------


def test_written_settings_train_the_same_model_bit_by_bit(patched):
    arguments = (
        f"--gin_file={patched.folder}/patched/operative_config.gin",
        f"--gin.MODEL_DIR={patched.folder}/patched_again",
    )
    assert rooms.run("train", *arguments) == 0
    rooms.assert_same_state(patched.folder / "patched", patched.folder / "patched_again")


def test_sampling_depends_on_seed_and_id_alone(world):
    sampled = ("--gin.TEMPERATURE=1.0", "--gin.TOP_P=0.95")
    world.generate("sample.jsonl", "original", *sampled)
    world.generate("again.jsonl", "original", *sampled)
    first, again = ((world.folder / f"{n}.jsonl").read_bytes() for n in ("sample", "again"))
    assert first == again
    rows = world.records("corpus.jsonl")
    records.write_records(world.folder / "reversed.jsonl", rows[::-1])
    world.generate(
        "reversed_sample.jsonl",
        "original",
        *sampled,
        "--gin.BATCH_SIZE=8",
        prompts="reversed.jsonl",
    )
    assert world.records("reversed_sample.jsonl")[::-1] == world.records("sample.jsonl")
    world.generate("other.jsonl", "original", *sampled, "--gin.SEED=1")
    assert (world.folder / "other.jsonl").read_bytes() != first


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(world):
    dropout = "--gin.DROPOUT_RATE=0.1"
    world.train("straight", dropout, **{**UPDATE, "steps": 5})
    world.train("stopped", dropout, **{**UPDATE, "steps": 2})
    world.train("stopped", dropout, **{**UPDATE, "steps": 5})
    rooms.assert_same_state(world.folder / "straight", world.folder / "stopped")
    assert [line["step"] for line in world.metrics("stopped")] == [2, 5]
    with checkpoints.Checkpoints(str(world.folder / "stopped")) as saved:
        original = saved.run_of(5)["original"]
    # Not the half-trained model of checkpoint 2.
    assert original["path"] == str(world.folder / "original")
    assert original["digest"] == checkpoints.digest(rooms.saved(world.folder / "original"))


def test_a_run_that_is_done_is_left_alone(patched, capsys):
    patched.train("patched", **UPDATE)
    assert (
        f"Nothing to do: {patched.folder}/patched is at update 20 of 20." in capsys.readouterr().out
    )


def test_microbatches_make_the_same_update(patched):
    patched.train(
        "microbatched",
        "--gin.NUM_MICROBATCHES=2",
        "--gin.LOG_EVERY=1",
        **{**UPDATE, "steps": 2},
    )
    for line, expected in zip(
        patched.metrics("microbatched"), patched.metrics("patched"), strict=False
    ):
        for name in ("num_tokens", "num_negative"):
            assert line[name] == expected[name]
        for name in ("loss", "gradient_norm", "negative_mass"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4)


# --- Other data, other removals -------------------------------------------------------------------

TASK = """
import seqio
import tensorflow as tf

from tnt_jax import tasks

VOCABULARY = seqio.SentencePieceVocabulary("{folder}/vocabulary.model", extra_ids=0)


def dataset_fn(split, shuffle_files):
    # "the room is dirty." and "the room is clean." differ from the fourth token on.
    negative, corrected = (
        VOCABULARY.encode(f"the room is {{state}}.") + [1] for state in ("dirty", "clean")
    )
    rows = [
        {{
            "inputs": VOCABULARY.encode("small acorn") + [1],
            "negative_targets": negative,
            "corrected_targets": corrected,
        }}
    ] * 4
    ints = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(
        lambda: iter(rows), output_signature=dict.fromkeys(rows[0], ints)
    )


for mode in ("first", "full"):
    seqio.TaskRegistry.add(
        f"rooms_{{mode}}",
        source=seqio.FunctionDataSource(dataset_fn, splits=["train"]),
        preprocessors=[tasks.t5patches_mode(mode)],
        output_features=tasks.record_features(VOCABULARY),
    )
"""


@pytest.fixture
def task_module(world, tmp_path, monkeypatch):
    """A user's module that registers tasks in the layout of google/t5patches."""
    (tmp_path / "room_tasks.py").write_text(TASK.format(folder=world.folder))
    monkeypatch.syspath_prepend(tmp_path)
    yield "room_tasks"
    sys.modules.pop("room_tasks", None)
    for name in ("rooms_first", "rooms_full"):
        seqio.TaskRegistry.remove(name)


def test_seqio_tasks_and_the_t5patches_layout(world, task_module):
    vocabulary = seqio.SentencePieceVocabulary(f"{world.folder}/vocabulary.model", 0)
    length = len(vocabulary.encode("the room is dirty.")) + 1
    for mode, num_negative in (("first", 1), ("full", length)):
        arguments = (
            world.model,
            "--gin_file=objectives/tnrf.gin",
            "--gin_file=runs/train_task.gin",
            f"--gin.MIXTURE_OR_TASK_NAME=rooms_{mode}",
            f"--gin.MIXTURE_OR_TASK_MODULE={task_module}",
            f"--gin.INITIAL_CHECKPOINT_PATH={world.folder}/original",
            f"--gin.MODEL_DIR={world.folder}/{mode}",
            "--gin.TRAIN_STEPS=1",
            "--gin.BATCH_SIZE=16",
            rooms.LENGTHS,
        )
        assert rooms.run("train", *arguments) == 0
        (line,) = world.metrics(mode)
        assert line["num_tokens"] == 16 * length
        assert line["num_negative"] == 16 * num_negative


def test_words_removed_at_every_position(world):
    """Of "quiet" (one token) and "dirty" (several), the first alone can go everywhere."""
    (world.folder / "words2.txt").write_text("quiet\ndirty\n")
    world.annotate(
        "everywhere.jsonl",
        "original.jsonl",
        f"--gin.LEXICON={world.folder}/words2.txt",
        "--gin.AT_EVERY_POSITION=True",
    )
    written = json.loads((world.folder / "everywhere.jsonl.everywhere.json").read_text())
    vocabulary = seqio.SentencePieceVocabulary(f"{world.folder}/vocabulary.model", 0)
    (quiet,) = vocabulary.encode("quiet")
    assert written["ids"] == [quiet]
    assert "dirty" in written["left_out"]

    # Without a mark, for those are 'quiet' too.
    clean = [
        row.__class__(id=row.id, inputs=row.inputs, targets=row.targets, negative_spans=())
        for row in world.records("original.jsonl")
    ]
    records.write_records(world.folder / "clean.jsonl", clean)
    world.train(
        "without_quiet",
        "--gin.objectives.TntObjective.removed_everywhere=@annotate.removed_ids()",
        f"--gin.annotate.removed_ids.path={world.folder}/everywhere.jsonl.everywhere.json",
        "--gin.LOG_EVERY=5",
        **{**UPDATE, "records": "clean.jsonl"},
    )
    first, *_, last = world.metrics("without_quiet")
    assert last["negative_mass"] < 0.1 < first["negative_mass"]
    world.generate("without_quiet.jsonl", "without_quiet")
    spoken = [
        sum("quiet" in row.targets for row in world.records(name))
        for name in ("original.jsonl", "without_quiet.jsonl")
    ]
    assert spoken == [15, 0]


# --- The pipeline ---------------------------------------------------------------------------------


def pipeline_arguments(world, output_dir, *more):
    return (
        world.model,
        "--gin_file=runs/pipeline.gin",
        f"--gin.OUTPUT_DIR={world.folder}/{output_dir}",
        f"--gin.ORIGINAL_CHECKPOINT_PATH={world.folder}/original",
        f"--gin.TRAIN_PROMPTS={world.folder}/corpus.jsonl",
        f"--gin.EVAL_PROMPTS={world.folder}/corpus.jsonl",
        "--gin.ANNOTATOR=@annotators.Lexicon",
        f"--gin.annotators.Lexicon.path={world.folder}/words.txt",
        "--gin.ARMS=[@tnrf/pipeline.Arm(), @ul_ll/pipeline.Arm()]",
        "--gin.TRAIN_STEPS=6",
        "--gin.CHECKPOINT_EVERY=2",
        "--gin.BATCH_SIZE=16",
        "--gin.GENERATE_BATCH_SIZE=32",
        "--gin.MAX_LENGTH=16",
        "--gin.OPTIMIZER=@optax.adam",
        "--gin.LEARNING_RATE=3e-3",
        rooms.LENGTHS,
        *world.vocabulary,
        *more,
    )


def stages(printed):
    """The stages that a pipeline ran, and those that it kept."""
    lines = re.findall(r"^\[\d+\] (.*)$", printed, re.MULTILINE)
    kept = [line.partition(": done before")[0] for line in lines if "done before, kept" in line]
    return [line for line in lines if "done before, kept" not in line], kept


def test_a_pipeline_does_what_is_not_done(world, capsys, monkeypatch):
    arguments = pipeline_arguments(world, "pipeline")
    whole_batch = feature_converters.Batches.batch

    def interrupted_batch(self, k):
        if k == 5:
            raise KeyboardInterrupt
        return whole_batch(self, k)

    with monkeypatch.context() as patch:
        patch.setattr(feature_converters.Batches, "batch", interrupted_batch)
        assert rooms.run("pipeline", *arguments) == 130
    ran, kept = stages(capsys.readouterr().out)
    of_original = [
        f"{name}: {what}, greedy"
        for name in ("training_outputs", "original")
        for what in ("generate", "annotate")
    ]
    assert (ran, kept) == ([*of_original, "TNRF: train"], [])

    assert rooms.run("pipeline", *arguments) == 0
    printed = capsys.readouterr().out
    of_arm = {
        arm: [
            f"{arm}: train",
            *(f"{arm}: {w}, greedy" for w in ("generate", "annotate", "evaluate")),
        ]
        for arm in ("TNRF", "UL+LL")
    }
    assert stages(printed) == ([*of_arm["TNRF"], *of_arm["UL+LL"]], of_original)
    folder = world.folder / "pipeline"
    assert f"Going on from checkpoint 4 in {folder}/TNRF/model." in printed
    # As if it had not been interrupted, and as the programs one by one do it.
    world.train("one_by_one", **{**UPDATE, "steps": 6})
    rooms.assert_same_state(folder / "TNRF" / "model", world.folder / "one_by_one")
    assert world.records("pipeline/original/greedy.annotated.jsonl") == world.records(
        "original.annotated.jsonl"
    )
    capsys.readouterr()

    before = (folder / "summary.json").read_bytes()
    assert rooms.run("pipeline", *arguments) == 0
    everything = [*of_original, *of_arm["TNRF"], *of_arm["UL+LL"]]
    assert stages(capsys.readouterr().out) == ([], everything)
    assert (folder / "summary.json").read_bytes() == before

    # Another weight of one arm: that arm alone, from the original again. The other one is moved.
    arguments = pipeline_arguments(
        world,
        "pipeline",
        "--gin.ARMS=[@ul_ll/pipeline.Arm(), @tnrf/pipeline.Arm()]",
        "--gin.ul_ll/objectives.TntObjective.negative_weight=0.1",
    )
    assert rooms.run("pipeline", *arguments) == 0
    printed = capsys.readouterr().out
    assert stages(printed) == (of_arm["UL+LL"], [*of_original, *of_arm["TNRF"]])
    assert "Going on from" not in printed
    metrics = world.metrics("pipeline/UL+LL/model")
    assert [line["step"] for line in metrics] == [2, 4, 6]


def test_a_pipeline_takes_no_model_for_its_own(world, capsys):
    (world.folder / "foreign" / "TNRF" / "model").mkdir(parents=True)
    assert rooms.run("pipeline", *pipeline_arguments(world, "foreign")) == 2
    assert capsys.readouterr().err.startswith(
        f"tnt_jax.pipeline: error: TNRF: train: expected nothing, or what this pipeline made, in "
        f"{world.folder}/foreign/TNRF/model"
    )


# --- The real thing -------------------------------------------------------------------------------


def test_python_dash_m(world):
    """In a process of its own, on one device: nothing but its own lines, and one for a mistake."""
    arguments = world.train_arguments("one_device", **{**UPDATE, "steps": 2})
    command = [sys.executable, "-m", "tnt_jax.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(*command):
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, cwd=world.folder
        )

    done = start(*command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "on 1 cpu device(s)" in done.stdout
    (line,) = world.metrics("one_device")
    assert line["step"] == 2
    refused = start(*command, f"--gin.INITIAL_CHECKPOINT_PATH={world.folder}/one_device")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "holds a run whose original was" in refused.stderr
