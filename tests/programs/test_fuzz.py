"""Random damage to data, settings and models: what comes of it is a result or a message.

The damage is the same in every run. A message is one line, and says something.
"""

import contextlib
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys

import gin
import orbax.checkpoint as ocp
import pytest
from etils import epath
from helpers import mutations, outputs, rooms
from helpers.huggingface_model import write_directory
from helpers.mutations import outcome

from tnt_jax import annotate, annotators, convert, report
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import datasets, records
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import program
from tnt_jax.tokenizers import tokenization, vocabularies

LENGTHS = {"inputs": 8, "targets": 16}


def assert_both(outcomes):
    """The damage was neither too small to be seen nor so large that one message hid all others."""
    assert "works" in outcomes
    assert len(set(outcomes)) > 4


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    rooms.write_world(folder)
    with contextlib.chdir(folder):
        yield


@pytest.fixture(scope="module")
def vocabulary():
    return tokenization.SentencePiece("vocabulary.model", 0)


@pytest.fixture(scope="module")
def rows(vocabulary):
    """Three records that have every field."""
    found = []
    for number, row in enumerate(rooms.corpus()[:3]):
        ids = [*vocabulary.encode(row.targets), 1]
        found.append(
            {
                "id": row.id,
                "inputs": row.inputs,
                "targets": row.targets,
                "target_ids": ids,
                "negative_spans": [[28, 33]] if number == 0 else [],
                "negative_token_ids": [[3, [7, 9]], [5, [4]]],
                "annotator": "by hand",
                "name": {"of": ["room", 0.5]},
            }
        )
    return found


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def damaged(rows, chance):
    """A file of records with one or two things wrong."""
    content = lines_of(
        [mutations.changed_value(rows[0], chance), *rows[1:]] if chance.random() < 0.6 else rows
    )
    if chance.random() < 0.5:
        content = mutations.changed_bytes(content, chance)
    return content


def test_records(rows, vocabulary):
    """Read, tokenised and marked for training; written again."""
    chance = random.Random(0)
    path = pathlib.Path("damaged.jsonl")
    dataset = datasets.RecordFiles(files=str(path), vocabulary=vocabulary, annotated=False)

    def read():
        dataset.load(LENGTHS)
        found = records.read_records(path)
        records.write_records("again.jsonl", found)
        again = records.read_records("again.jsonl")
        assert [row.targets for row in again] == [row.targets for row in found]

    outcomes = []
    for _ in range(600):
        path.write_bytes(damaged(rows, chance))
        outcomes.append(outcome(read))
    assert_both(outcomes)


GAZETTEER = {"state": {"dirty": ["filthy"], "noisy": []}, "size": ["small", "large"]}
MARKS_CSV = b'text,spans\n"the acorn room is small and dirty.","[28, 29, 30, 31, 32]"\n'


def test_files_of_annotators(rows):
    """A lexicon, a gazetteer, marks as JSONL and CSV: read, and used on a record."""
    chance = random.Random(2)
    record = records.Record.from_json(rows[0], "rows:1")
    of_bytes = mutations.changed_bytes

    def use(kind, path):
        annotate.mark(record, kind(path=path), None)

    def gazetteer():
        if chance.random() < 0.3:
            return of_bytes(json.dumps(GAZETTEER).encode(), chance)
        return json.dumps(mutations.changed_value(GAZETTEER, chance)).encode()

    kinds = {
        "words.txt": (annotators.Lexicon, lambda: of_bytes(b"# unwanted\ndirty\nnoisy\n", chance)),
        "values.json": (annotators.Gazetteer, gazetteer),
        "marks.jsonl": (annotators.Spans, lambda: damaged(rows, chance)),
        "marks.csv": (annotators.Spans, lambda: of_bytes(MARKS_CSV, chance)),
    }
    outcomes = []
    for _ in range(80):
        for name, (kind, content) in kinds.items():
            path = pathlib.Path(f"damaged.{name}")
            path.write_bytes(content())
            outcomes.append(outcome(use, kind, str(path)))
    assert_both(outcomes)


# --- Settings -------------------------------------------------------------------------------------

GIN_CONFIGS = pathlib.Path(__file__).parents[2] / "gin_configs"
# What each program misses comes after its settings were looked at: no run begins.
NOWHERE = {
    "train": {"RECORDS": "nowhere.jsonl", "INITIAL_CHECKPOINT_PATH": None, "MODEL_DIR": "model"},
    "generate": {"CHECKPOINT_PATH": "nowhere", "OUTPUT": "output"},
    "annotate": {"RECORDS": "nowhere.jsonl", "OUTPUT": "output"},
    "localize": {"RECORDS": "nowhere.jsonl", "OUTPUT": "output"},
    "evaluate": {
        "ORIGINAL_RECORDS": "nowhere.jsonl",
        "CURRENT_RECORDS": "nowhere.jsonl",
        "CHECKPOINT_PATH": "nowhere",
        "OUTPUT": "output",
    },
    "pipeline": {"ORIGINAL_CHECKPOINT_PATH": "nowhere", "OUTPUT_DIR": "runs", "TRAIN_STEPS": 1},
    "sweep": {"ORIGINAL_CHECKPOINT_PATH": "nowhere", "OUTPUT_DIR": "runs", "TRAIN_STEPS": 1},
}


VALUES = [
    *(repr(value) for value in mutations.ODD_VALUES if value != 10**400),
    *(
        "%BATCH_SIZE",
        "%nothing",
        "@nothing",
        "@optax.adam()",
        "@tnt_jax",
        "@train.train",
        "(1,",
    ),
    *("{'inputs': 8, 'targets': 'x'}", "{'inputs': 1.5}", "[1, 'x']", "-7", "1e400", "'\\x00'"),
]


def stderr_of(capsys, run_name, arguments):
    """The one line with which a program ends."""
    with pytest.raises(SystemExit) as stopped:
        program.run(f"tnt_jax.{run_name}", run_name, arguments)
    gin.clear_config()
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert all(line.startswith(f"tnt_jax.{run_name}: warning: ") for line in lines[:-1])
    assert lines[-1].startswith(f"tnt_jax.{run_name}: error: ")
    assert lines[-1].isprintable()
    return lines[-1]


@pytest.mark.parametrize("run_name", NOWHERE)
def test_flags(run_name, capsys):
    """Values of all kinds for what is set on the command line and in gin files."""
    chance = random.Random(run_name)
    files, _ = rooms.RUNS[run_name]
    arguments = rooms.arguments(run_name, NOWHERE[run_name])
    text = "".join((GIN_CONFIGS / name).read_text() for name in files if "/" in name)
    text += (GIN_CONFIGS / "runs" / "update.gin").read_text() if "train" in run_name else ""
    names = sorted({*re.findall(r"^([A-Z][A-Z0-9_]*) = ", text, re.MULTILINE)})
    outcomes = set()
    for _ in range(60):
        changed = f"--gin.{chance.choice(names)}={chance.choice(VALUES)}"
        outcomes.add(stderr_of(capsys, run_name, [*arguments, changed]))
    assert len(outcomes) > 10


def test_gin_files(capsys):
    """A run file of somebody's own, damaged."""
    chance = random.Random(3)
    whole = (GIN_CONFIGS / "runs" / "train.gin").read_bytes()
    arguments = rooms.arguments("train", NOWHERE["train"], ["damaged.gin"])
    outcomes = set()
    for _ in range(80):
        pathlib.Path("damaged.gin").write_bytes(mutations.changed_bytes(whole, chance))
        outcomes.add(stderr_of(capsys, "train", arguments))
    assert len(outcomes) > 10


# --- Models and results ---------------------------------------------------------------------------


def damage_one(folder, chance):
    """Changes one file of a directory: its JSON, or its bytes."""
    file = chance.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    content = file.read_bytes()
    if chance.random() < 0.6 and content[:1] in b"{[":
        with contextlib.suppress(ValueError):
            value = mutations.changed_value(json.loads(content), chance)
            file.write_text(json.dumps(value))
            return
    file.write_bytes(mutations.changed_bytes(content, chance))


@pytest.fixture(scope="module")
def models():
    """A model in every format, with its tokenizer; the safetensors in shards."""
    write_directory(pathlib.Path("huggingface"), max_shard_bytes=3000)
    texts = ["the house is wonderful"]
    tokenization.train_sentencepiece(texts, "spiece.model", vocab_size=17)
    vocabularies.write(epath.Path("huggingface"), tokenization.SentencePiece("spiece.model", 19))
    for name in ("t5x", "t5x_orbax", "orbax"):
        convert.convert(input="huggingface", output=name, output_format=name)
    checkpoint = epath.Path("orbax/checkpoint_0")
    run = {"original": {"path": "huggingface", "digest": "0"}, "data": {"num_examples": 1}}
    reader = ocp.JsonCheckpointHandler()
    (checkpoint / "run").mkdir()
    reader.save(checkpoint / "run", args=ocp.args.JsonSave(run))


@pytest.mark.usefixtures("reads_left_alone")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["huggingface", "t5x", "t5x_orbax", "orbax"])
def test_model_directories(name, models):
    chance = random.Random(name)
    mesh = sharding.make_mesh(sharding.MeshShape())

    def read():
        opened = pretrained.open_checkpoint("damaged")
        for array in opened.weights.values():
            array.load()
        opened.restore(Model(config=opened.config, mesh=mesh).abstract_params)
        vocabulary = pretrained.vocabulary("damaged")
        pretrained.check_vocabulary(vocabulary, opened.config, opened)
        vocabulary.encode("the house")

    outcomes = []
    # Orbax names its files by chance, so each run damages others of them: as many as it takes.
    while len(outcomes) < 20 or (len({*outcomes}) <= 4 and len(outcomes) < 200):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree(name, "damaged")
        damage_one(pathlib.Path("damaged"), chance)
        outcomes.append(outcome(read))
    assert_both(outcomes)


def test_nothing_follows_the_message(models):
    """The reads that Orbax left would end in pages of tracebacks, after the program has spoken."""
    shutil.rmtree("damaged", ignore_errors=True)
    shutil.copytree("orbax", "damaged")
    for file in pathlib.Path("damaged/checkpoint_0/params/d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    command = [sys.executable, "-m", "tnt_jax.convert", "--input=damaged", "--output=converted"]
    done = subprocess.run(
        [*command, "--output_format=huggingface"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "damaged/checkpoint_0/params: expected what Orbax wrote" in done.stderr


def test_files_of_a_report():
    chance = random.Random(4)
    folder = pathlib.Path("report")
    outputs.write_pair(folder, 6, num_tokens=2)
    (folder / "results.json").write_text(json.dumps({"rows": outputs.results()["rows"][:2]}))
    (folder / "evaluation.json").write_text(json.dumps(outputs.evaluation(6)))

    def write():
        report.report(
            output="report.html",
            original_records="damaged/original.jsonl",
            current_records="damaged/patched.jsonl",
            evaluation="damaged/evaluation.json",
            tokens="damaged/tokens.jsonl",
            results="damaged/results.json",
        )

    outcomes = []
    for _ in range(80):
        shutil.rmtree("damaged", ignore_errors=True)
        shutil.copytree(folder, "damaged")
        damage_one(pathlib.Path("damaged"), chance)
        outcomes.append(outcome(write))
    assert_both(outcomes)
