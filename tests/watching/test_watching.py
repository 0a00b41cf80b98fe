"""Training runs that are watched, through their real entry point."""

import contextlib
import dataclasses
import functools
import gzip
import html
import io
import json
import pathlib
import re
import shlex
import shutil

import gin
import jax
import numpy as np
import pytest
from helpers import rooms, t5_inputs
from helpers.event_files import shown
from helpers.tiny_llama import LLAMA

from tnt_jax.checkpoints import pretrained
from tnt_jax.data import records
from tnt_jax.models import causal_lm, decoding, sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime import program
from tnt_jax.watching import hooks, metric_writers, profiling, samples, seqio_evaluation

# T5X users' tasks: this module registers one, as theirs do. It knows nothing of tnt_jax.
TASKS = """
import functools
import numpy as np
import seqio
import tensorflow as tf

VOCABULARY = seqio.SentencePieceVocabulary("vocabulary.model", extra_ids=0)
SEEN = {}  # what the metrics were given

def rows(split, shuffle_files, seed=None):
    lines = tf.data.TextLineDataset("prompts.jsonl")
    def parse(line):
        import json
        row = json.loads(line.numpy())
        return row["inputs"], row["targets"]
    def of_line(line):
        inputs, targets = tf.py_function(parse, [line], [tf.string, tf.string])
        return {"inputs": tf.ensure_shape(inputs, []), "targets": tf.ensure_shape(targets, [])}
    return lines.map(of_line)

def exact(targets, predictions):
    SEEN["targets"], SEEN["predictions"] = targets, predictions
    same = [t == p for t, p in zip(targets, predictions)]
    return {
        "exact": 100 * np.mean(same),
        "count": seqio.metrics.Scalar(len(same)),
        "first": seqio.metrics.Text(predictions[0]),
    }

def likelihood(targets, scores):
    SEEN["scores"] = scores
    return {"log_likelihood": np.mean(scores)}

def confidence(targets, predictions, aux_values):
    SEEN["aux"] = aux_values["scores"]
    return {"confidence": np.mean(aux_values["scores"])}

def postprocess(text, example=None, is_target=False):
    return text.upper()

seqio.TaskRegistry.add(
    "rooms_upper",
    source=seqio.FunctionDataSource(rows, splits=("validation",)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    postprocess_fn=postprocess,
    output_features={name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")},
    metric_fns=[exact, likelihood, confidence],
)
seqio.TaskRegistry.add(
    "rooms_unmeasured",
    source=seqio.FunctionDataSource(rows, splits=("validation",)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")},
)
"""

EVALUATION = {
    "EVAL_MIXTURE_OR_TASK_NAME": "rooms_upper",
    "EVAL_MIXTURE_OR_TASK_MODULE": "rooms_tasks",
    "SEQIO_EVAL_EVERY": 2,
    "EVAL_BATCH_SIZE": 8,
}
SAMPLES = {"SAMPLE_EVERY": 2, "NUM_SAMPLES": 6}


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    (folder / "rooms_tasks.py").write_text(TASKS)
    records.write_records(folder / "prompts.jsonl", rooms.corpus()[::3])
    with (
        contextlib.chdir(folder),
        rooms.devices_seen(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def original():
    """A model that half knows the rooms, which is to say something else than it is told."""
    settings = {"RECORDS": "corpus.jsonl", "ANNOTATED": False, "INITIAL_CHECKPOINT_PATH": None}
    train("original", ["objectives/fine_tune.gin"], **settings, TRAIN_STEPS=50)
    annotated = {"OUTPUT": "original.annotated.jsonl", "RECORDS": "corpus.jsonl"}
    assert rooms.run("annotate", annotated) == 0


@pytest.fixture(scope="module")
def watched(original):
    """A run with everything that can be seen of it; returns the lines that it printed."""
    return train(
        "watched",
        ["runs/seqio_evaluation.gin"],
        **SAMPLES,
        **EVALUATION,
        TRAIN_STEPS=5,
        LOG_EVERY=2,
        CHECKPOINT_EVERY=2,
        KEEP_EVERY=2,
        PROFILE_UPDATES=[2, 3],
        EVAL_LOGGERS="[@seqio.JSONLogger]",
    )


def train(model_dir, gin_files=(), **settings):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert rooms.run("train", {**settings, "MODEL_DIR": model_dir}, gin_files) == 0
    return printed.getvalue().splitlines()


@functools.cache
def outputs_of(checkpoint, prompts="corpus.jsonl"):
    """What `generate` writes, by id."""
    output = f"{checkpoint.replace('/', '_')}.outputs.jsonl"
    settings = {"CHECKPOINT_PATH": checkpoint, "OUTPUT": output, "PROMPTS": prompts}
    assert rooms.run("generate", settings) == 0
    return {row.id: row.targets for row in records.read_records(output)}


def lines_of(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def samples_of(model_dir):
    return {line["step"]: line["samples"] for line in lines_of(f"{model_dir}/samples.jsonl")}


# --- Samples --------------------------------------------------------------------------------------


def check_samples(model_dir, steps):
    """Samples are what `generate` says."""
    samples, inputs = samples_of(model_dir), {row.id: row.inputs for row in rooms.corpus()}
    original, patched = outputs_of("original"), outputs_of(model_dir)
    assert original != patched
    assert list(samples) == steps
    for step, of_step in samples.items():
        assert [sample["id"] for sample in of_step] == [sample["id"] for sample in samples[0]]
        for sample in of_step:
            assert sample["inputs"] == inputs[sample["id"]]
            assert sample["original"] == original[sample["id"]]
            if step == steps[-1]:
                assert sample["current"] == patched[sample["id"]]


def test_samples_are_what_generate_says(watched):
    check_samples("watched", steps=[0, 2, 4, 5])


def test_half_of_the_samples_were_marked(watched):
    ids = [sample["id"] for sample in samples_of("watched")[0]]
    marked = {row.id for row in rooms.corpus() if rooms.UNWANTED.search(row.targets)}
    assert len(set(ids)) == 6
    assert sum(name in marked for name in ids) == 3


def test_samples_are_printed_and_shown(watched):
    ((start,),) = [[i] for i, line in enumerate(watched) if line == "update 5, samples:"]
    printed = "\n".join(watched[start + 1 : watched.index(watched[-1])])
    texts = dict(shown(pathlib.Path("watched/tensorboard"))["samples"])
    assert list(texts) == [2, 4, 5]
    for sample in samples_of("watched")[5]:
        said = [("original", sample["original"]), ("now", sample["current"])]
        if sample["original"] == sample["current"]:
            said = [("both", sample["current"])]
        lines = [f"  {sample['inputs']}", *(f"    {who:<8}  {text}" for who, text in said)]
        assert "\n".join(lines) in printed
        assert sample["current"] in html.unescape(texts[5])


def test_the_original_speaks_also_where_it_is_not_in_memory(original):
    """The first run hears it before it has changed, the one that goes on finds it written down."""
    settings = {**SAMPLES, "SAMPLE_EVERY": 1, "ORIGINAL": "cached"}
    for train_steps in (1, 2):
        train("cached", **settings, TRAIN_STEPS=train_steps)
    check_samples("cached", steps=[0, 1, 2])


def test_adapters_speak_to_the_prompts_of_a_file(original, monkeypatch):
    monkeypatch.setattr(samples, "_MOST_AT_ONCE", 4)  # of six
    records.write_records("few.jsonl", rooms.corpus()[:6])
    settings = {"SAMPLE_EVERY": 1, "SAMPLE_PROMPTS": "few.jsonl"}
    train("adapters", **settings, ORIGINAL="adapters_off", ADAPTER_RANK=2, TRAIN_STEPS=1)
    asked = [sample["id"] for sample in samples_of("adapters")[0]]
    assert asked == [row.id for row in rooms.corpus()[:6]]
    check_samples("adapters", steps=[0, 1])


# --- A run that goes on ---------------------------------------------------------------------------


def test_a_run_that_died_shows_every_update_once(watched):
    """It died after update 5, with a checkpoint at 2: it computes 3, 4 and 5 again.

    A full disk had cut the last line of its samples within a character.
    """
    shutil.copytree("watched", "died")
    with pathlib.Path("died/samples.jsonl").open("ab") as file:
        file.write('{"step": 6, "samples": [{"inputs": "ü'.encode()[:-1])
    for step in (4, 5):
        shutil.rmtree(f"died/checkpoint_{step}")
    settings = {**SAMPLES, **EVALUATION, "LOG_EVERY": 2, "CHECKPOINT_EVERY": 2, "TRAIN_STEPS": 5}
    train("died", ["runs/seqio_evaluation.gin"], **settings)
    assert len(list(pathlib.Path("died/tensorboard").glob("events*"))) == 2
    assert samples_of("died") == samples_of("watched")
    curves, straight = (
        {
            tag: points
            for tag, points in shown(pathlib.Path(f"{name}/tensorboard")).items()
            if "per_second" not in tag and "wait" not in tag
        }
        for name in ("died", "watched")
    )
    assert curves == straight
    assert [step for step, _ in curves["train/loss"]] == [2, 4, 5]
    assert [line["step"] for line in lines_of("died/metrics.jsonl")] == [0, 2, 4, 5]


@dataclasses.dataclass
class Says:
    """Stands for a model: it says whatever its parameters are."""

    decoder: decoding.Decoding
    prompts = (samples.Prompt(id="1", inputs=(2,)),)
    inputs = ("in",)

    def __call__(self, params):
        return [params]


def without_speaker(line):
    return {name: value for name, value in line.items() if name != "said_by"}


@pytest.mark.parametrize(
    ("digest", "max_length", "said"), [("a", 8, "first"), ("b", 8, "second"), ("a", 9, "second")]
)
def test_another_original_or_decoder_speaks_again(tmp_path, digest, max_length, said):
    def begin(step, original_digest, params, max_length):
        hook = samples.Samples(Says(decoding.Decoding(max_length=max_length)), str(tmp_path), 1)
        with metric_writers.open_all(str(tmp_path), start=step, config={}) as out:
            beginning = {"state": None, "params_of": lambda state: state, "out": out}
            hook.begin(
                hooks.Beginning(
                    step=step, original_params=params, original_digest=original_digest, **beginning
                )
            )
            hook(step + 1, "now")
            hook.close()
        return samples_of(tmp_path)[step + 1][0]["original"]

    assert begin(0, "a", "first", 8) == "first"
    assert begin(1, digest, "second", max_length) == said

    # A file of 0.2.0 does not say by whom: what it has of the original is kept.
    path = tmp_path / "samples.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(without_speaker(line)) + "\n" for line in lines))
    assert begin(2, "c", None, 10) == "first"


# --- seqio's Evaluator ----------------------------------------------------------------------------


def test_a_task_of_t5x_is_evaluated_as_it_is(watched):
    import rooms_tasks

    said = outputs_of("watched", "prompts.jsonl")
    prompts = records.read_records("prompts.jsonl")
    seen = rooms_tasks.SEEN  # of the last evaluation
    assert list(seen["targets"]) == [row.targets.upper() for row in prompts]
    assert list(seen["predictions"]) == [said[row.id].upper() for row in prompts]
    exact = 100 * np.mean([row.targets == said[row.id] for row in prompts])
    found = {
        line["step"]: line
        for line in lines_of("watched/metrics.jsonl")
        if "inference_eval/rooms_upper/exact" in line
    }
    assert list(found) == [0, 2, 4, 5]
    numbers = {name: value for name, value in found[5].items() if name.startswith("inference")}
    assert numbers == {
        "inference_eval/rooms_upper/exact": exact,
        "inference_eval/rooms_upper/count": len(prompts),
        "inference_eval/rooms_upper/log_likelihood": pytest.approx(np.mean(seen["scores"])),
        "inference_eval/rooms_upper/confidence": pytest.approx(np.mean(seen["aux"])),
    }
    curves = shown(pathlib.Path("watched/tensorboard"))
    assert [step for step, _ in curves["inference_eval/rooms_upper/exact"]] == [0, 2, 4, 5]
    ((step, text), *_) = curves["inference_eval/rooms_upper/first"][::-1]
    assert step == 5
    assert seen["predictions"][0] in html.unescape(text)


def test_loggers_of_seqio_write_beside_it(watched):
    prompts = records.read_records("prompts.jsonl")
    written = lines_of("watched/inference_eval/rooms_upper-000005.jsonl")
    assert [row["target"] for row in written] == [row.targets.upper() for row in prompts]
    said = outputs_of("watched", "prompts.jsonl")
    assert [row["prediction"] for row in written] == [said[row.id].upper() for row in prompts]


def test_scores_are_log_likelihoods(watched):
    """Against the dense logits of the same parameters."""
    import rooms_tasks

    config = pretrained.open_checkpoint("watched").config
    params = jax.device_put(rooms.saved("watched"))
    vocabulary, seen = rooms_tasks.VOCABULARY, rooms_tasks.SEEN

    def padded(rows, length):
        return np.array([np.pad(row, (0, length - len(row))) for row in rows], np.int32)

    def encoded(texts):
        return [[*vocabulary.encode(text), vocabulary.eos_id] for text in texts]

    def log_likelihoods(inputs, targets, is_decoded):
        inputs, targets = padded(inputs, 8), padded(targets, 16)
        batch = {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            "decoder_target_tokens": targets,
        }
        logits = np.array(forward(params, jax.device_put(batch)))
        if is_decoded:
            logits[..., 0] = -np.inf  # padding is never said
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        of_targets = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        return np.where(targets == 0, 0, of_targets).sum(axis=1)

    forward = jax.jit(t5_inputs.make_forward(config))
    prompts = records.read_records("prompts.jsonl")
    inputs = encoded(row.inputs for row in prompts)
    of_targets = log_likelihoods(inputs, encoded(row.targets for row in prompts), False)
    np.testing.assert_allclose(seen["scores"], of_targets, rtol=1e-4)
    outputs_of("watched", "prompts.jsonl")
    said = {row.id: row.target_ids for row in records.read_records("watched.outputs.jsonl")}
    of_outputs = log_likelihoods(inputs, [said[row.id] for row in prompts], True)
    np.testing.assert_allclose(seen["aux"], of_outputs, rtol=1e-4)


def test_a_decoder_only_model_is_scored_behind_its_prompts(tmp_path):
    """Against the logits of each prompt and target alone, in a row without padding."""
    model = Model(config=LLAMA, mesh=sharding.make_mesh(sharding.MeshShape()))
    params = t5_inputs.random_params(LLAMA)
    evaluation = seqio_evaluation.SeqioEvaluation(
        mixture_or_task_name="rooms_upper", mixture_or_task_module="rooms_tasks", batch_size=8
    ).open(
        model,
        source=None,
        task_feature_lengths={"inputs": 8, "targets": 16},
        model_dir=str(tmp_path),
    )
    with metric_writers.open_all(str(tmp_path), start=0, config={}) as out:
        evaluation.begin(
            hooks.Beginning(
                step=0,
                state=params,
                params_of=lambda state: state,
                original_params=None,
                original_digest=None,
                out=out,
            )
        )
    import rooms_tasks

    def log_likelihood(row):
        vocabulary = rooms_tasks.VOCABULARY
        prompt, target = (
            [*vocabulary.encode(text), vocabulary.eos_id] for text in (row.inputs, row.targets)
        )
        batch = {
            "decoder_input_tokens": np.array([[*prompt, *target[:-1]]]),
            "decoder_segment_ids": np.ones((1, len(prompt) + len(target) - 1), np.int32),
            "decoder_positions": np.arange(len(prompt) + len(target) - 1)[None],
            "decoder_target_places": np.arange(len(target))[None] + len(prompt) - 1,
        }
        logits = causal_lm.CausalLM(LLAMA).forward(params, jax.device_put(batch)).whole()
        return np.asarray(jax.nn.log_softmax(logits))[0, np.arange(len(target)), target].sum()

    prompts, scores = records.read_records("prompts.jsonl"), rooms_tasks.SEEN["scores"]
    assert len(prompts) == len(scores) == 20
    for row, score in list(zip(prompts, scores, strict=True))[::4]:
        np.testing.assert_allclose(score, log_likelihood(row), rtol=1e-4)


# --- Profiles, the last line, mistakes ------------------------------------------------------------


def test_a_trace_of_updates_that_do_not_come_is_told(capsys):
    trace = profiling.Trace([10, 11], "traces")
    trace(1, None)
    trace.close()
    assert "No trace was made: PROFILE_UPDATES is [10, 11], and none of" in capsys.readouterr().out


def test_the_trace_has_the_updates_that_were_asked_for(watched):
    (path,) = pathlib.Path("watched/tensorboard/plugins/profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert steps == {"2", "3"}
    assert any(line.startswith("The trace of updates [2, 3] is in ") for line in watched)


def test_the_last_line_says_what_came_out_and_what_to_run(watched):
    metrics = [line for line in lines_of("watched/metrics.jsonl") if "loss" in line]
    before, after = metrics[0], metrics[-1]
    assert re.match(
        rf"5 updates in \d+:\d\d, loss from {before['loss']:.4f} to {after['loss']:.4f}, "
        rf"p\(removed\) from {before['negative_mass']:.2e} to {after['negative_mass']:.2e}, .*"
        r"The model is in \S*watched/checkpoint_5\. ",
        watched[-1],
    )
    *_, command = watched[-1].partition("python -m tnt_jax.generate ")
    program_run = functools.partial(program.run, "tnt_jax.generate", "generate")
    assert command
    with pytest.raises(SystemExit) as stopped:
        program_run([*shlex.split(command), "--gin.MAX_LENGTH=16"])
    gin.clear_config()
    assert stopped.value.code == 0
    assert len(records.read_records("outputs.jsonl")) == len(records.read_records("prompts.jsonl"))


@pytest.mark.parametrize(
    ("gin_files", "settings", "message"),
    [
        ([], {"PROFILE_UPDATES": [3, 2]}, "PROFILE_UPDATES: expected [FIRST, LAST]"),
        ([], {"SAMPLE_EVERY": 0}, "SAMPLE_EVERY: expected at least 1, found 0"),
        ([], {"SAMPLE_EVERY": 1, "SAMPLE_PROMPTS": "no.jsonl"}, "no.jsonl"),
        ([], {"SAMPLE_PROMPTS": "few.jsonl"}, "SAMPLE_PROMPTS is set, to few.jsonl, and SAMPLE_EV"),
        ([], {"PROFILE_DIR": "traces"}, "PROFILE_DIR is set, to traces, and PROFILE_UPDATES is No"),
        (
            ["runs/seqio_evaluation.gin"],
            {**EVALUATION, "EVAL_MIXTURE_OR_TASK_NAME": "rooms_unmeasured"},
            "'rooms_unmeasured' (EVAL_MIXTURE_OR_TASK_NAME): expected a task with metric_fns",
        ),
        (
            ["runs/seqio_evaluation.gin"],
            {**EVALUATION, "EVAL_MIXTURE_OR_TASK_NAME": "rooms"},
            "no seqio task or mixture 'rooms'",
        ),
    ],
)
def test_mistakes_are_found_before_the_run(original, capsys, gin_files, settings, message):
    settings = {**settings, "MODEL_DIR": "mistaken", "TRAIN_STEPS": 1}
    assert rooms.run("train", settings, gin_files) == 2
    assert message in capsys.readouterr().err
    assert not pathlib.Path("mistaken").exists()
