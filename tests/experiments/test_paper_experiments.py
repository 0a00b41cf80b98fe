"""The paper's two experiments, end to end, on the mock data of TensorFlow Datasets."""

import json

import gin
import pytest
import tensorflow_datasets as tfds
from helpers import rooms

from tnt_jax.data import records
from tnt_jax.runtime import program
from tnt_jax.tokenizers import tokenization

# The experiment as it is, but for the sizes, and for an annotator that finds something in the
# outputs of a random model.
TINY = [
    "--gin.t5.T5Config.emb_dim=16",
    "--gin.t5.T5Config.num_heads=2",
    "--gin.t5.T5Config.num_encoder_layers=1",
    "--gin.t5.T5Config.num_decoder_layers=1",
    "--gin.t5.T5Config.head_dim=8",
    "--gin.t5.T5Config.mlp_dim=16",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 12}",
    "--gin.EXTRA_IDS=0",
    "--gin.BATCH_SIZE=8",
]
# One token each, so that a random model says many of them: they are what is unwanted. The mock
# inputs, which are random letters, support none of them.
WORDS = ("alder", "birch", "cedar", "damson", "elm", "fir", "gorse", "hazel", "ivy", "juniper")
VOCAB_SIZE = 35


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with rooms.devices_seen():
        yield


@pytest.fixture(scope="module")
def vocabulary_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "pieces.model"
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS]
    tokenization.train_sentencepiece(texts, path, vocab_size=VOCAB_SIZE)
    return path


@pytest.fixture
def run():
    """Runs a program as its command line does; a mistake fails the test with its message."""

    def run_program(name, *arguments):
        with tfds.testing.mock_data(num_examples=8), pytest.raises(SystemExit) as stopped:
            program.run(f"tnt_jax.{name}", name, [str(argument) for argument in arguments])
        assert stopped.value.code == 0

    yield run_program
    gin.clear_config()


@pytest.mark.parametrize(
    ("experiment", "task", "annotator"),
    [
        ("xsum_t5_base", "xsum_summaries", "Gazetteer"),
        ("civil_comments_t5_base", "civil_comments_replies", "Lexicon"),
    ],
)
def test_experiment_runs_end_to_end(experiment, task, annotator, vocabulary_path, tmp_path, run):
    settings = [*TINY, f"--gin.VOCABULARY_PATH={vocabulary_path}", f"--gin.VOCAB_SIZE={VOCAB_SIZE}"]
    original = tmp_path / "original"
    run(
        "train",
        "--gin_file=models/t5_1_0_base.gin",
        "--gin_file=objectives/fine_tune.gin",
        "--gin_file=runs/train_task.gin",
        "--gin_file=runs/vocabulary.gin",
        *settings,
        f"--gin.MIXTURE_OR_TASK_NAME={task}",
        "--gin.MIXTURE_OR_TASK_MODULE=tnt_jax.data.paper_tasks",
        "--gin.tasks.SeqioDataset.vocabulary_override=%VOCABULARY",
        "--gin.INITIAL_CHECKPOINT_PATH=None",
        f"--gin.MODEL_DIR={original}",
        "--gin.TRAIN_STEPS=2",
    )
    run(
        "pipeline",
        f"--gin_file=experiments/{experiment}.gin",
        *settings,
        f"--gin.ORIGINAL_CHECKPOINT_PATH={original}",
        f"--gin.ANNOTATOR=@annotators.{annotator}",
        f"--gin.annotators.{annotator}.path={unwanted(tmp_path, annotator)}",
        f"--gin.OUTPUT_DIR={tmp_path / 'run'}",
        "--gin.TRAIN_STEPS=2",
        "--gin.MAX_LENGTH=12",
        "--gin.GENERATE_BATCH_SIZE=8",
        "--gin.DECODERS={'sampled': @decoding.Decoding()}",
        "--gin.decoding.Decoding.temperature=1.0",
    )
    # The task's own prompts went in.
    folder = tmp_path / "run" / "training_outputs"
    outputs = records.read_records(folder / "sampled.annotated.jsonl")
    assert len(outputs) == 8
    assert all(output.inputs.startswith(("summarize: ", "reply: ")) for output in outputs)
    assert any(output.negative_spans for output in outputs)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert set(summary["evaluations"]) == {"decode mask", "TNFF", "TNRF", "UL+LL"}
    for of_arm in summary["evaluations"].values():
        assert of_arm["sampled"]["current"]["unwanted_outputs"]["denominator"] == 8


def unwanted(folder, kind):
    path = folder / kind.lower()
    path.write_text("\n".join(WORDS) if kind == "Lexicon" else json.dumps({"tree": WORDS}), "utf-8")
    return path
