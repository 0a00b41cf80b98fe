"""A mistake of the user's is one line: what was expected, what was found, what to change."""

import contextlib
import json
import pathlib
import re

import gin
import pytest
from helpers import rooms
from helpers.full_disk import full_disk

from tnt_jax.checkpoints import checkpoint_kinds
from tnt_jax.data import examples, records
from tnt_jax.runtime import operative_config, program


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """The world of `rooms`, with its records marked and an original of one update."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen(8):
        records.write_records("original.annotated.jsonl", rooms.marked_corpus())
        rooms.train_original("original", 1)
        yield


@pytest.fixture
def mistake(capsys):
    """The one line with which a program refuses its settings."""

    def mistake(run_name, settings, gin_files=()):
        assert rooms.run(run_name, settings, gin_files) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        name = run_name.partition("_")[0]
        assert error.startswith(f"tnt_jax.{name}: error: ")
        return error.removeprefix(f"tnt_jax.{name}: error: ").rstrip()

    return mistake


def record(**fields):
    """A file of one record, a good one but for `fields`."""
    good = {
        "id": "a",
        "inputs": "small acorn",
        "targets": "the acorn room is small and dirty.",
        "negative_spans": [[28, 33]],
    }
    return json.dumps({**good, **fields})


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"TRAIN_STPES": 3},
            "--gin.TRAIN_STPES: no gin file reads %TRAIN_STPES; did you mean TRAIN_STEPS?",
        ),
        (
            {"train.train.batchsize": 3},
            "--gin.train.train.batchsize=3: Configurable 'train.train' doesn't have a parameter "
            "named 'batchsize'.",
        ),
        ({"TRAIN_STEPS": "1e3"}, "--gin.TRAIN_STEPS: expected int, found 1000.0."),
        ({"TRAIN_STEPS": 0}, "TRAIN_STEPS: expected at least 1, found 0."),
        ({"SEED": -1}, "SEED: expected a whole number from 0 to 2147483647, found -1."),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": "8", "targets": 16}},
            "--gin.TASK_FEATURE_LENGTHS: expected Mapping[str, int], found {'inputs': '8', ",
        ),
        (
            {"settings.Update.mesh_shape": 8},
            "--gin.settings.Update.mesh_shape: expected MeshShape or None",
        ),
        (
            {"objectives.TntObjective.removed_everywhere": (5, 9999)},
            "removed_everywhere has id 9999, but the model has 38 embeddings. Expected ids of its ",
        ),
        (
            {"objectives.TntObjective.removed_everywhere": tuple(range(38))},
            "removed_everywhere: expected ids that leave one of the vocabulary's 38, found all of ",
        ),
        ({"LEARNING_RATE": "0,001"}, "--gin.LEARNING_RATE: expected float or "),
        ({"MODEL_DIR": 3}, "--gin.MODEL_DIR: expected str, found 3."),
        ({"TRAIN_STEPS": "@optax.adam"}, "--gin.TRAIN_STEPS: expected int, found @optax.adam."),
        ({"NEGATIVE_WEIGHT": "@optax.adam()"}, "--gin.NEGATIVE_WEIGHT: expected float, found @"),
        ({"t5.T5Config.emb_dim": "wide"}, "--gin.t5.T5Config.emb_dim: expected int, found 'wide'."),
        (
            {"TASK_FEATURE_LENGTHS": 8},
            "--gin.TASK_FEATURE_LENGTHS: expected Mapping[str, int], found 8.",
        ),
        (
            {"TASK_FEATURE_LENGTHS": {"inputs": 8}},
            "TASK_FEATURE_LENGTHS: expected positive numbers of tokens for 'inputs' and 'targets', "
            "found {'inputs': 8}.",
        ),
        (
            {"OPTIMIZER": "adam"},
            "--gin.OPTIMIZER: expected a reference (@module.name) or ",
        ),
        (
            {"OPTIMIZER": "@optax.adamm"},
            "--gin.OPTIMIZER=@optax.adamm: Couldn't resolve selector optax.adamm; optax has no "
            "attribute adamm.",
        ),
        ({"NEGATIVE_WEIGHT": -1.0}, "negative_weight: expected 0 or more, and finite, found -1.0."),
        (
            {"objectives.TntObjective.negative_term": "reverse"},
            "negative_term: expected one of forward_kl, ",
        ),
    ],
)
def test_settings(mistake, settings, message):
    assert mistake("train", {"MODEL_DIR": "model", **settings}).startswith(message)
    assert not pathlib.Path("model").exists()


def test_what_is_missing_is_listed_together(capsys):
    gin_files = ["--gin_file=objectives/tnrf.gin", "--gin_file=runs/train.gin"]
    with pytest.raises(SystemExit) as stopped:
        program.run("tnt_jax.train", "train", gin_files)
    assert stopped.value.code == 2
    required = ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_STEPS", "RECORDS")
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        "tnt_jax.train: error: settings are missing: set "
        + ", ".join(f"--gin.{name}=..." for name in required)
        + "; training.gin reads %MODEL, which nothing sets: add --gin_file=models/"
    )
    gin.clear_config()


def test_a_gin_file_that_is_not_there(mistake):
    message = mistake("train", {"MODEL_DIR": "model"}, ["objectives/tnnf.gin"])
    assert message.startswith("--gin_file: no gin file 'objectives/tnnf.gin': looked for ")
    assert "did you mean objectives/tnsf.gin or objectives/tnrf.gin?" in message


# --- Data -----------------------------------------------------------------------------------------

SPAN_RULE = (
    ", but targets has 34 characters. A span is [start, end] with 0 <= start < end <= length, "
    "counted in Unicode code points (not bytes), end exclusive."
)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            record(negative_spans=[[30, 40]]),
            "bad.jsonl:2: record 'a': negative_spans has [30, 40]" + SPAN_RULE,
        ),
        (
            record(negative_spans=[[5, 2]]),
            "bad.jsonl:2: record 'a': negative_spans has [5, 2]" + SPAN_RULE,
        ),
        (
            record(negative_spans=[5, 2]),
            "bad.jsonl:2: negative_spans: expected a list of [start, end] code point offsets, "
            "or [start, end, strength], found [5, 2] (list).",
        ),
        (
            '{"inputs": "a"',
            "bad.jsonl:2: not JSON: Expecting ',' delimiter at column 15. Expected JSONL, one "
            'object a line, such as {"inputs": "..."}.',
        ),
        ("3", "bad.jsonl:2: expected a JSON object, found 3 (int)."),
        (
            '{"inputs": null, "targets": "b"}',
            "bad.jsonl:2: the field 'inputs' is missing; found ['targets'].",
        ),
        (
            '{"inputs": "x", "targets": "né", "negative_spans": [[0, 3]]}',
            "bad.jsonl:2: record 'bad:2': negative_spans has [0, 3], but targets has 2 characters. "
            "(It has 3 bytes of UTF-8: were those counted?) A span is [start, end] with 0 <= start "
            "< end <= length, counted in Unicode code points (not bytes), end exclusive.",
        ),
        (
            record(id="good"),
            "bad.jsonl:2: the id 'good' was used before, at bad.jsonl:1. Every record of a data "
            "set needs its own.",
        ),
        (
            record(targets=None, negative_spans=[]),
            "bad.jsonl: record 'a' has no targets. Expected outputs of the original model "
            "(tnt_jax.generate writes them), not prompts.",
        ),
        (
            record(target_ids=[3, 4, 5, 1]),
            "record 'a': target_ids decode to 'acorn and birch', but targets is 'the acorn room "
            "is small and dirty.'. Expected the vocabulary that the ids were generated with; "
            "leave target_ids out to have targets tokenised.",
        ),
        (
            record(negative_token_ids=[[0, [9999]]]),
            "record 'a': negative_token_ids has id 9999, but the vocabulary has 38 ids.",
        ),
        (
            record(negative_token_ids=[[99, [5]]]),
            "record 'a': negative_token_ids has position 99, but its targets have 14 tokens.",
        ),
    ],
)
def test_records(mistake, line, message):
    pathlib.Path("bad.jsonl").write_text(f"{record(id='good')}\n{line}\n")
    assert mistake("train", {"MODEL_DIR": "model", "RECORDS": "bad.jsonl"}) == message


def test_a_number_that_json_does_not_have_is_not_handed_on(mistake):
    pathlib.Path("bad.jsonl").write_text(f"{record()}\n{record(id='b', score=[float('nan')])}\n")
    assert mistake("annotate", {"OUTPUT": "marked.jsonl", "RECORDS": "bad.jsonl"}) == (
        "bad.jsonl:2: score: expected finite numbers, found NaN, which JSON does not have. Write "
        "null, or leave the field out."
    )
    assert not pathlib.Path("marked.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"RECORDS": "nowhere.jsonl"},
            "nowhere.jsonl: no such file, and no file matches it as a pattern.",
        ),
        ({"RECORDS": "empty.jsonl"}, "empty.jsonl: expected records, found none."),
        (
            {"RECORDS": "corpus.jsonl"},
            "corpus.jsonl: record 'small acorn' has no negative_spans: nobody annotated it. Run "
            "tnt_jax.annotate on the file, or set ANNOTATED (RecordFiles.annotated) to False to "
            "train on it as it is.",
        ),
        (
            {"RECORDS": "clean.jsonl"},
            "negative_term='reverse_kl' needs marked tokens, but none of the 1 examples has one "
            "within TASK_FEATURE_LENGTHS. Annotate them (python -m tnt_jax.annotate), or use "
            "objectives/fine_tune.gin.",
        ),
        (
            {"RECORDS": "covered.jsonl"},
            "negative spans cover all text of all 2 examples (within TASK_FEATURE_LENGTHS and "
            "LOSS_UNTIL), so that nothing holds the model to its original: expected some text that "
            "may stay. Mark the unwanted words alone, and leave clean outputs in the file.",
        ),
        (
            {"RECORDS": "latin.jsonl"},
            "latin.jsonl:1: not UTF-8 (invalid continuation byte at byte 23). Save the file as "
            "UTF-8.",
        ),
        (
            {"VOCABULARY_PATH": "nowhere.model"},
            "vocabulary: expected a sentencepiece model at 'nowhere.model': ",
        ),
        (
            {"VOCABULARY_PATH": "corpus.jsonl"},
            "vocabulary: expected a sentencepiece model at 'corpus.jsonl': ",
        ),
        (
            {"EXTRA_IDS": 100},
            "VOCABULARY: expected the vocabulary of a model with 38 rows (vocab_size): as "
            "many ids, or up to 128 fewer; found 138. Give the vocabulary, and EXTRA_IDS, that the "
            "model was trained with.",
        ),
    ],
)
def test_files_and_vocabularies(mistake, settings, message):
    pathlib.Path("empty.jsonl").write_text("\n")
    pathlib.Path("clean.jsonl").write_text(record(negative_spans=[]))
    lines = record(negative_spans=[[0, 34]]), record(id="b", negative_spans=[[9, 34], [0, 10]])
    pathlib.Path("covered.jsonl").write_text("\n".join(lines))
    pathlib.Path("latin.jsonl").write_bytes('{"id": "a", "inputs": "é"}'.encode("latin-1"))
    assert mistake("train", {"MODEL_DIR": "model", **settings}).startswith(message)


def test_a_task_that_is_not_there(mistake):
    settings = {"MODEL_DIR": "model", "MIXTURE_OR_TASK_NAME": "nothing"}
    assert mistake("train_task", settings).startswith(
        "MIXTURE_OR_TASK_NAME: no seqio task or mixture 'nothing'; there are ["
    )
    settings["MIXTURE_OR_TASK_MODULE"] = "no.such"
    assert mistake("train_task", settings).startswith(
        "MIXTURE_OR_TASK_MODULE: no module 'no.such'. Expected an importable name such as "
    )


# --- Devices and checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"BATCH_SIZE": 12},
            "BATCH_SIZE: expected a multiple of NUM_MICROBATCHES x data x fsdp devices = 1 x 8; "
            "found 12.",
        ),
        (
            {"NUM_MICROBATCHES": 3},
            "BATCH_SIZE: expected a multiple of NUM_MICROBATCHES x data x fsdp devices = 3 x 8; "
            "found 16.",
        ),
        (
            {"MODEL_DEVICES": 3},
            "expected DATA_DEVICES x FSDP_DEVICES x MODEL_DEVICES to be the 8 devices here; found "
            "DATA_DEVICES=-1, FSDP_DEVICES=1, MODEL_DEVICES=3. Change one of them.",
        ),
        (
            {"MODEL_DEVICES": 4},
            "parameter decoder/logits_dense/kernel: its 'vocab' axis of 38 does not split over "
            "the 4 devices of mesh axis 'model'.",
        ),
        (
            {"INITIAL_CHECKPOINT_PATH": "nowhere"},
            "expected a checkpoint or a model directory, found nothing at nowhere.",
        ),
        (
            {"INITIAL_CHECKPOINT_PATH": "folder"},
            "expected a model at folder, found no kind that is known. Looked there, and in "
            "checkpoint_<step> folders, for: config.json and model.safetensors (Hugging Face); "
            "params (tnt_jax); a file named checkpoint (T5X); state/_METADATA (T5X with Orbax). "
            "The directory has nothing in it.",
        ),
    ],
)
def test_devices_and_places(mistake, settings, message):
    pathlib.Path("folder").mkdir(exist_ok=True)
    assert mistake("train", {"MODEL_DIR": "model", **settings}).startswith(message)


@pytest.mark.parametrize("model_dir", ["model", "original"])
def test_a_checkpoint_of_another_size(mistake, model_dir):
    """It is given as the original, or as the run to go on with."""
    settings = {
        "MODEL_DIR": model_dir,
        "RECORDS": "corpus.jsonl",
        "ANNOTATED": False,
        "t5.T5Config.emb_dim": 64,
    }
    message = mistake("train", settings, ["objectives/fine_tune.gin"])
    assert "original/checkpoint_1 does not fit the model settings: " in message
    assert "decoder/decoder_norm/scale is (32,) instead of (64,)" in message
    assert message.endswith("change the model settings, or the path.")


def test_another_optimizer_than_that_of_the_run(mistake):
    settings = {
        "MODEL_DIR": "original",
        "RECORDS": "corpus.jsonl",
        "ANNOTATED": False,
        "OPTIMIZER": "@optax.adafactor",
    }
    message = mistake("train", settings, ["objectives/fine_tune.gin"])
    assert "holds another run, at update 1: optimizer (OPTIMIZER and its settings): " in message
    assert message.endswith("MODEL_DIR: the checkpoint does not fit the change.")
    settings["ALLOW_CHANGES"] = ["optimizer"]
    message = mistake("train", settings, ["objectives/fine_tune.gin"])
    assert "original/checkpoint_1 does not fit OPTIMIZER: " in message


def test_another_original_than_that_of_the_run(mistake):
    message = mistake("train", {"MODEL_DIR": "original"})
    assert message.startswith(
        "MODEL_DIR original holds another run, at update 1: objective (the objective's file): "
        "negative_term was none, is reverse_kl, positive_term was log_likelihood, is forward_kl, "
        "z_loss was 0.0001, is 0.0; "
    )
    assert message.endswith(
        "or go on knowingly with --gin.ALLOW_CHANGES=\"['data', 'objective']\"."
    )


# Nothing can be made in /proc, not even by root.
@pytest.mark.parametrize("model_dir", ["/proc/model", "corpus.jsonl", "corpus.jsonl/model"])
def test_a_model_directory_that_cannot_be_written(mistake, model_dir):
    message = mistake("train", {"MODEL_DIR": model_dir})
    assert message.startswith(
        f"MODEL_DIR: expected a directory that can be written, found {model_dir}: "
    )


def test_a_model_directory_that_is_a_model(mistake):
    folder = pathlib.Path("flan-t5")
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    assert mistake("train", {"MODEL_DIR": "flan-t5"}) == (
        f"MODEL_DIR: expected a directory for checkpoints, found a model at {folder}. Choose "
        "another directory."
    )
    assert mistake("train", {"MODEL_DIR": "original/checkpoint_1"}).startswith(
        "MODEL_DIR: expected a directory for checkpoints, found a model at original/checkpoint_1."
    )


def test_an_output_directory_that_others_have_written_to(mistake):
    pathlib.Path("of_others/TNRF/model").mkdir(parents=True)
    pathlib.Path("of_others/TNRF/model/mine").touch()
    settings = {"OUTPUT_DIR": "of_others", "ARMS": "[@tnrf/experiment.Arm()]", "TRAIN_STEPS": 1}
    note = "of_others/stages/TNRF_train.json"
    assert mistake("pipeline", settings) == (
        "TNRF: train: expected nothing, or what this run made, in of_others/TNRF/model; found "
        f"files, and no {note}. Set another OUTPUT_DIR, or delete the folder."
    )
    # A damaged note is none.
    for content in ("{", "[1]"):
        pathlib.Path(note).write_text(content)
        assert "expected nothing, or what this run made" in mistake("pipeline", settings)
    assert pathlib.Path("of_others/TNRF/model/mine").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("arm", "TNRR", "TNFF, TNRF, UL+LL; found TNRR"),
        ("baseline", "UL", "TNFF, TNRF, UL+LL; found UL"),
        ("bleu_margin", {"greedy": 1, "sampled": 2}, "greedy; found sampled"),
    ],
)
def test_expectations_of_what_is_not_there(mistake, setting, value, message):
    expected = {"arm": "TNRF", "baseline": "UL+LL", "num_unwanted": 1, "unwanted_rate": 0.1}
    expected |= {"cut": 0.5, "bleu_margin": {"greedy": 1}, setting: value}
    settings = {f"pipeline.Expectations.{name}": of_it for name, of_it in expected.items()}
    settings |= {"pipeline.pipeline.expectations": "@pipeline.Expectations()"}
    settings |= {"OUTPUT_DIR": "expecting", "TRAIN_STEPS": 1}
    assert mistake("pipeline", settings) == (
        f"Expectations.{setting}: expected what this run has, {message}. Change it, or set "
        "--gin.pipeline.pipeline.expectations=None."
    )
    assert not pathlib.Path("expecting").exists()


@pytest.mark.parametrize("run_name", ["pipeline", "sweep"])
def test_an_output_directory_that_cannot_be_written(mistake, run_name):
    settings = {"OUTPUT_DIR": "/proc/here", "TRAIN_STEPS": 1}
    settings |= {"TASK": "rooms"} if run_name == "sweep" else {}
    assert mistake(run_name, settings).startswith(
        "OUTPUT_DIR: expected a directory that can be written, found /proc/here: "
    )


def test_a_loss_that_is_not_finite_stops_the_run(mistake):
    settings = {"MODEL_DIR": "divergent", "LEARNING_RATE": 1e30, "CHECKPOINT_EVERY": 1}
    message = mistake("train", settings)
    assert message.startswith(
        "update 2: expected finite numbers, found loss = nan and gradient_norm = nan. Not finite "
        "is the gradient of decoder/"
    )
    assert "Before it, there is checkpoint 1 in divergent. Lower LEARNING_RATE or " in message
    assert [path.name for path in pathlib.Path("divergent").glob("checkpoint_*")] == [
        "checkpoint_1"
    ]


def test_updates_that_are_not_finite_are_left_out(capsys):
    settings = {
        "MODEL_DIR": "skipping",
        "LEARNING_RATE": 1e30,
        "CHECKPOINT_EVERY": 1,
        "KEEP_CHECKPOINTS": 9,
        "NON_FINITE": "skip",
        "TRAIN_STEPS": 4,
        "LOG_EVERY": 1,
    }
    assert rooms.run("train", settings) == 0
    assert "update 4 is left out (3 so far): found loss = nan" in capsys.readouterr().out
    for step in (2, 4):
        rooms.assert_same_state("skipping/checkpoint_1", f"skipping/checkpoint_{step}")
    for name, key, expected in (
        ("metrics.jsonl", "num_skipped", [0, 1, 1, 1]),
        ("events.jsonl", "event", ["skipped"] * 3),
    ):
        lines = pathlib.Path("skipping", name).read_text().splitlines()
        assert [json.loads(line)[key] for line in lines] == expected


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_parameters_that_are_not_finite_are_not_saved(mistake):
    settings = {"MODEL_DIR": "infinite", "LEARNING_RATE": 1e39, "CHECKPOINT_EVERY": 1}
    message = mistake("train", settings)
    assert message.startswith("update 1: expected finite parameters, found others in decoder/")
    assert "Before it, there is no checkpoint yet in infinite." in message
    assert not list(pathlib.Path("infinite").glob("checkpoint_*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NON_FINITE": "ignore"}, "NON_FINITE: expected one of ('stop', 'skip'), found 'ignore'."),
        ({"MAX_GRADIENT_NORM": 0}, "MAX_GRADIENT_NORM: expected None or more than 0, found 0."),
        ({"KEEP_EVERY": 0}, "KEEP_EVERY: expected at least 1, found 0."),
        (
            {"KEEP_EVERY": 3, "CHECKPOINT_EVERY": 2},
            "KEEP_EVERY: expected a multiple of CHECKPOINT_EVERY, which is 2, found 3: no "
            "checkpoint is written after 3 updates.",
        ),
        (
            {"ADAPTER_RANK": 64},
            "ADAPTER_RANK is set, to 64, and ORIGINAL is 'parameters': adapters are trained with",
        ),
        ({"EVAL_EVERY": 5}, "EVAL_EVERY is set, to 5, and EVAL_DATASET is None. Set EVAL"),
        ({"NUM_SAMPLES": 3}, "NUM_SAMPLES is set, to 3, and SAMPLE_EVERY is None. Set SAMPLE"),
        ({"KEEP_BEST": "eval/lost"}, "KEEP_BEST: expected one of loss, negative_loss, "),
        (
            {"KEEP_BEST": "eval/loss"},
            "KEEP_BEST='eval/loss' needs an evaluation before each checkpoint: an EVAL_DATASET, "
            "and a CHECKPOINT_EVERY that is a multiple of EVAL_EVERY; found no EVAL_DATASET.",
        ),
        (
            {
                "KEEP_BEST": "eval/negative_mass",
                "EVAL_EVERY": 1,
                "EVAL_DATASET": "@clean/datasets.RecordFiles()",
                "clean/datasets.RecordFiles.files": "corpus.jsonl",
                "clean/datasets.RecordFiles.annotated": False,
            },
            "KEEP_BEST='eval/negative_mass' is a mean over marked tokens: expected marks in "
            "EVAL_DATASET, found none in its ",
        ),
    ],
)
def test_settings_of_checkpoints_and_numbers(mistake, settings, message):
    assert mistake("train", {"MODEL_DIR": "model", **settings}).startswith(message)


# --- A full disk, too little memory --------------------------------------------------------------


FULL = (
    "cannot write: File too large. Make room (or raise `ulimit -f`), or set another place, and "
    "give the same command again; what is whole under its name is kept."
)


def orbax_gives_up(test):
    """What its other threads were about to write is thrown away with them: before the test is over,
    for in another one, where nobody expects it, that is a failure.
    """
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("reads_left_alone")(ignored(test))


@orbax_gives_up
def test_a_full_disk_while_checkpoints_are_written(mistake):
    settings = {"MODEL_DIR": "full", "CHECKPOINT_EVERY": 1}
    assert rooms.run("train", {**settings, "TRAIN_STEPS": 1}) == 0
    with full_disk(20_000):
        assert mistake("train", {**settings, "TRAIN_STEPS": 2}) == FULL
    assert checkpoint_kinds.find("full").name == "checkpoint_1"
    assert rooms.run("train", {**settings, "TRAIN_STEPS": 2}) == 0
    assert checkpoint_kinds.find("full").name == "checkpoint_2"


@orbax_gives_up
def test_a_full_disk_while_records_are_written(mistake):
    pathlib.Path("kept.jsonl").write_text("of before")
    with full_disk(4000):
        settings = {"RECORDS": "corpus.jsonl", "OUTPUT": "kept.jsonl"}
        assert mistake("annotate", settings) == FULL
    assert pathlib.Path("kept.jsonl").read_text() == "of before"
    assert not list(pathlib.Path().glob(".kept*"))


@orbax_gives_up
@pytest.mark.parametrize("output_format", ["huggingface", "t5x"])
def test_a_full_disk_while_a_model_is_converted(capsys, output_format):
    with full_disk(6000), pytest.raises(SystemExit) as stopped:
        arguments = {"input": "original", "output": "converted", "output_format": output_format}
        settings = [f"--gin.convert.convert.{name}='{value}'" for name, value in arguments.items()]
        program.run("tnt_jax.convert", "convert", settings)
    gin.clear_config()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"tnt_jax.convert: error: {FULL}\n"
    assert not list(pathlib.Path().glob(".converted*"))
    assert not list(pathlib.Path().glob("converted/checkpoint*"))


def test_too_little_memory_for_a_batch_on_a_device(mistake):
    lengths = {"inputs": 8, "targets": 500_000}  # attention alone takes 2 TB a row
    settings = {"MODEL_DIR": "large", "TASK_FEATURE_LENGTHS": lengths}
    assert re.match(
        "out of memory with BATCH_SIZE=16, NUM_MICROBATCHES=1, TASK_FEATURE_LENGTHS={'inputs': 8, "
        r"'targets': 500000}: RESOURCE_EXHAUSTED: Out of memory .*\. To make it fit, try "
        r"FSDP_DEVICES .*; "
        r"REMAT_POLICY='full' .*; NUM_MICROBATCHES .*; a smaller BATCH_SIZE or "
        r"TASK_FEATURE_LENGTHS\.$",
        mistake("train", settings),
    )


@pytest.mark.parametrize(
    ("run_name", "settings", "size"),
    [
        ("train", {"MODEL_DIR": "large"}, r"4828\.0"),
        ("generate", {"OUTPUT": "output", "CHECKPOINT_PATH": "original"}, r"4351\.1"),
    ],
)
def test_too_little_memory_for_a_batch_on_the_host(mistake, run_name, settings, size):
    assert re.match(
        r"out of memory with BATCH_SIZE=8000000000 and 24 tokens in a row \(TASK_FEATURE_LENGTHS"
        rf"\): a batch takes about {size} GiB, and this host has [\d.]+\. Set a smaller BATCH_SIZE "
        r"or TASK_FEATURE_LENGTHS\.$",
        mistake(run_name, {**settings, "BATCH_SIZE": 8 * 10**9}),
    )


def test_too_little_memory_for_a_long_list_at_one_position(mistake):
    """A batch has room for it at every position: 16 targets, 15 ids, 4 bytes."""
    marks = {"negative_spans": [[6, 11]], "negative_token_ids": [[1, [*range(6, 21)]]]}
    long = record(targets="birch cedar", target_ids=[5, 6, 1], **marks)
    pathlib.Path("long.jsonl").write_text(long + "\n")
    settings = {"RECORDS": "long.jsonl", "MODEL_DIR": "large", "BATCH_SIZE": 10**9}
    assert re.match(
        r"out of memory with BATCH_SIZE=1000000000 .*: a batch takes about 1438\.0 GiB, 894\.1 of "
        r"them room for 15 removed ids at every position of the targets, as many as one position "
        r"has, and this host has [\d.]+\. Set .* TASK_FEATURE_LENGTHS, or mark fewer ids at one "
        r"position\.$",
        mistake("train", settings),
    )


def test_a_long_list_that_no_device_has_room_for(mistake, monkeypatch):
    """Sets that are too large to be held beside the step are written out at their positions."""
    monkeypatch.setattr(examples, "_MOST_IN_SETS", 0)
    marks = {"negative_spans": [[6, 11]], "negative_token_ids": [[1, [*range(6, 26)]]]}
    long = record(targets="birch cedar", target_ids=[5, 6, 1], **marks)
    pathlib.Path("longer.jsonl").write_text(long + "\n")
    lengths = {"inputs": 8, "targets": 500_000}  # attention alone takes 2 TB a row
    settings = {"RECORDS": "longer.jsonl", "MODEL_DIR": "large", "TASK_FEATURE_LENGTHS": lengths}
    said = mistake("train", settings)
    assert said.startswith("out of memory with BATCH_SIZE=16, ")
    assert said.endswith("; fewer ids marked at one position (one has 20).")


# --- The other programs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_name", "settings", "message"),
    [
        (
            "generate",
            {"PROMPTS": "nowhere.jsonl"},
            "nowhere.jsonl: no such file, and no file matches it as a pattern.",
        ),
        (
            "generate",
            {"CHECKPOINT_PATH": "nowhere"},
            "expected a checkpoint or a model directory, found nothing at nowhere.",
        ),
        (
            "generate",
            {"TASK_FEATURE_LENGTHS": {"targets": 8}},
            "TASK_FEATURE_LENGTHS: expected a positive number of tokens for 'inputs', found "
            "{'targets': 8}.",
        ),
        (
            "generate",
            {"EXTRA_IDS": 100},
            "VOCABULARY: expected the vocabulary of a model with 38 rows (vocab_size): ",
        ),
        (
            "generate",
            {"TOP_P": 2.0},
            "Decoding.top_p: expected above 0 and at most 1 (off), found 2.0",
        ),
        (
            "generate",
            {"NUM_BEAMS": 2, "TEMPERATURE": 1.0},
            "Decoding.num_beams=2 searches and temperature=1.0 samples: ",
        ),
        (
            "generate",
            {"OUTPUT": "original"},
            "OUTPUT: expected a file that can be written, found original: it is a directory.",
        ),
        ("annotate", {"LEXICON": "nowhere.txt"}, "Lexicon.path: expected a UTF-8 text file, "),
        ("annotate", {"LEXICON": "comment.txt"}, "Lexicon.path: comment.txt lists nothing; "),
        (
            "annotate",
            {"RECORDS": "prompts.jsonl"},
            "record 'prompts:1' has no targets. Expected outputs of the original model ",
        ),
        (
            "annotate",
            {"RECORDS": "other_ids.jsonl"},
            "record 'a': target_ids decode to 'acorn and birch', but targets is ",
        ),
        (
            "annotate",
            {"AT_EVERY_POSITION": True, "annotate.annotate.vocabulary": None},
            "the annotator removes texts at every position: expected a vocabulary to turn them "
            "into token ids, found None. Set annotate.vocabulary.",
        ),
        (
            "evaluate",
            {"CURRENT_RECORDS": "corpus.jsonl"},
            "record 'small acorn' of corpus.jsonl has no negative_spans: expected annotated "
            "records (python -m tnt_jax.annotate).",
        ),
        (
            "evaluate",
            {"CURRENT_RECORDS": "other_ids.jsonl"},
            "expected outputs for the same records, found 60 in original.annotated.jsonl, 1 in "
            "other_ids.jsonl and 0 ids in both. Generate both from the same prompts.",
        ),
        (
            "evaluate",
            {"CHECKPOINT_PATH": "nowhere"},
            "expected a checkpoint or a model directory, found nothing at nowhere.",
        ),
        (
            "pipeline",
            {"ORIGINAL_CHECKPOINT_PATH": "nowhere"},
            "expected a checkpoint or a model directory, found nothing at nowhere.",
        ),
        (
            "pipeline",
            {"OUTPUT_DIR": "gs://bucket/run"},
            "OUTPUT_DIR: expected a local folder, ",
        ),
        (
            "pipeline",
            {"annotators.Lexicon.path": "nowhere.txt"},
            "Lexicon.path: expected a UTF-8 text file, ",
        ),
        (
            "pipeline",
            {"ARMS": "[@tnrf/experiment.Arm(), @tnrf/experiment.Arm()]"},
            "expected arms whose names differ from each other and from original, ",
        ),
        (
            "pipeline",
            {"OUTPUT_DIR": "output", "NUM_ROUNDS": 0},
            "NUM_ROUNDS: expected at least 1, found 0.",
        ),
    ],
)
def test_other_programs(mistake, run_name, settings, message):
    pathlib.Path("comment.txt").write_text("# nothing\n")
    pathlib.Path("prompts.jsonl").write_text('{"inputs": "small acorn"}\n')
    pathlib.Path("other_ids.jsonl").write_text(record(target_ids=[3, 4, 5, 1]))
    right = {
        "generate": {"OUTPUT": "output", "CHECKPOINT_PATH": "original"},
        "annotate": {"OUTPUT": "output", "RECORDS": "corpus.jsonl"},
        "evaluate": {
            "OUTPUT": "output",
            "CURRENT_RECORDS": "original.annotated.jsonl",
            "CHECKPOINT_PATH": "original",
        },
        "pipeline": {"OUTPUT_DIR": "pipeline", "TRAIN_STEPS": 1},
    }
    assert mistake(run_name, {**right[run_name], **settings}).startswith(message)
    assert not pathlib.Path("output").exists()


@pytest.mark.parametrize("run_name", ["generate", "annotate", "evaluate"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(mistake, run_name):
    settings = {"OUTPUT": "/proc/output"}
    settings |= {"RECORDS" if run_name == "annotate" else "CHECKPOINT_PATH": "nowhere"}
    settings |= {"CURRENT_RECORDS": "nowhere"} if run_name == "evaluate" else {}
    assert mistake(run_name, settings).startswith(
        "OUTPUT: expected a file that can be written, found /proc/output: "
    )


@pytest.mark.parametrize(
    ("run_name", "settings", "setting"),
    [
        ("generate", {"PROMPTS": "mine*.jsonl", "CHECKPOINT_PATH": "original"}, "PROMPTS"),
        ("annotate", {"RECORDS": "mine.jsonl"}, "RECORDS"),
    ],
)
def test_what_is_read_is_not_written_over(mistake, run_name, settings, setting):
    mine = pathlib.Path("mine.jsonl")
    mine.write_text(record())
    assert mistake(run_name, {**settings, "OUTPUT": "./mine.jsonl"}) == (
        f"OUTPUT: expected a file of its own, found mine.jsonl, which {setting} reads: it would be "
        "written over. Choose another."
    )
    assert mine.read_text() == record()


ANNOTATE = {"RECORDS": "original.annotated.jsonl"}
TRAIN_IN = {"MODEL_DIR": "new", "RECORDS": "original.annotated.jsonl"}


@pytest.mark.parametrize(
    ("run_name", "settings", "setting", "file"),
    [
        ("annotate", {"OUTPUT": "kept", **ANNOTATE}, "OUTPUT", "kept.gin"),
        ("annotate", {"OUTPUT": "kept.gin", **ANNOTATE}, "OUTPUT", "kept.gin"),
        ("generate", {"OUTPUT": "kept", "CHECKPOINT_PATH": "original"}, "OUTPUT", "kept.gin"),
        ("train", TRAIN_IN, "MODEL_DIR", "new/operative_config.gin"),
        (
            "pipeline",
            {"OUTPUT_DIR": "new", "TRAIN_STEPS": 1},
            "OUTPUT_DIR",
            "new/operative_config.gin",
        ),
    ],
)
def test_a_gin_file_is_not_written_over(mistake, run_name, settings, setting, file):
    """Also where another one includes it."""
    mine = pathlib.Path(file)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("# Mine.\n")
    pathlib.Path("outer.gin").write_text(f'include "./{file}"\n')
    message = f"{setting}: expected a place of its own for the "
    for gin_file in (file, "outer.gin"):
        refused = mistake(run_name, settings, [gin_file])
        assert refused.startswith(message)
        assert f", found {file}, which is a gin file of this run" in refused
    assert mine.read_text() == "# Mine.\n"


def test_a_gin_file_that_a_run_has_written_may_be_its_own_again():
    settings = {**ANNOTATE, "OUTPUT": "repeated.jsonl"}
    assert rooms.run("annotate", settings) == 0
    written = pathlib.Path("repeated.jsonl.gin").read_text()
    assert rooms.run("annotate", settings, ["repeated.jsonl.gin"]) == 0
    assert pathlib.Path("repeated.jsonl.gin").read_text() == written


def test_a_gin_file_that_has_gone_is_no_mistake():
    """Somebody has tidied up since the program began, or another program ran in this process."""
    pathlib.Path("brief.gin").write_text("# Gone soon.\n")
    settings = {**ANNOTATE, "OUTPUT": "twice.jsonl"}
    assert rooms.run("annotate", settings, ["brief.gin"]) == 0
    pathlib.Path("brief.gin").unlink()
    operative_config.check_writable("twice.jsonl", "OUTPUT")
