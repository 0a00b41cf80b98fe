"""The plug-in with the real T5X: its trainer, and its training program in other processes."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import seqio
import tensorflow as tf
from flax import traverse_util
from helpers import golden_model, t5_inputs

from tnt_jax import objectives
from tnt_jax.checkpoints import digests
from tnt_jax.data import records, tasks
from tnt_jax.data.batches import batch_for_eval
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import train_step

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X calls what JAX deprecates
    pytest.importorskip(
        "t5x", reason="needs google-research/t5x, which no package index has: see docs/howto_t5x.md"
    )
    from t5x import adafactor, partitioning, utils
    from t5x.examples.t5 import network

    from tnt_jax import t5x_plugin

ROOT = pathlib.Path(__file__).parents[2]
LENGTHS = {"inputs": 12, "targets": 9}
VOCABULARY = seqio.ByteVocabulary()  # 384 ids, as many as the golden model has
SEED = 7

# T5X and its libraries warn, and broadcast between ranks.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def as_t5x_runs(tmp_path_factory):
    with jax.numpy_rank_promotion("allow"):
        yield


# ------------------------------------------------------------------------------------- The trainer

OBJECTIVES = {
    "FT": {"negative_term": "none", "positive_term": "log_likelihood", "z_loss": 1e-4},
    "UL": {"negative_term": "unlikelihood", "positive_term": "log_likelihood"},
    "TNFF": {"negative_term": "forward_kl", "positive_term": "forward_kl"},
    "TNRF": {"negative_term": "reverse_kl", "positive_term": "forward_kl", "smoothing": 1e-6},
}
TNRF = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")


def golden(name):
    return golden_model.tree(np.load(golden_model.FOLDER / "t5_logits.npz"), name)


def as_batch(weights, **features):
    return {
        **features,
        "decoder_loss_mask": (weights != 0).astype(jnp.int32),
        "decoder_negative_ids": jnp.where(weights < 0, features["decoder_target_tokens"], -1)[
            ..., None
        ],
    }


@pytest.fixture(scope="module")
def batch():
    """The golden batch and a row of padding, so that it divides over four devices."""
    features = golden("batch/int/")
    features = {name: jnp.pad(rows, ((0, 1), (0, 0))) for name, rows in features.items()}
    return as_batch(features.pop("decoder_loss_weights"), **features)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The golden original, as T5X saves it."""
    folder = tmp_path_factory.mktemp("original")
    save(folder, golden("orig_params/"))
    return str(folder / "checkpoint_0")


def make_model(objective):
    config = network.T5Config(
        vocab_size=384,
        emb_dim=32,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
        head_dim=16,
        mlp_dim=64,
        mlp_activations=("gelu", "linear"),
        dropout_rate=0.0,
    )
    return t5x_plugin.TntModel(
        module=network.Transformer(config=config),
        input_vocabulary=VOCABULARY,
        output_vocabulary=VOCABULARY,
        optimizer_def=adafactor.Adafactor(
            decay_rate=0.8,
            step_offset=0,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        ),
        objective=objective,
    )


class Partitioner(partitioning.PjitPartitioner):
    """T5X's, with four devices for data and two for the model; on CPU its own has `model` alone."""

    mesh = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("data", "model"))


@functools.cache
def partitioner():
    return Partitioner(num_partitions=2)


def make_state(model, params):
    """T5X's train state of these parameters, and how it is spread over the devices."""
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={"encoder_input_tokens": (4, 12), "decoder_input_tokens": (4, 9)},
        input_types={"encoder_input_tokens": jnp.int32, "decoder_input_tokens": jnp.int32},
        partitioner=partitioner(),
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    leaves = [
        jax.device_put(new, old.sharding)
        for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True)
    ]
    params = jax.tree.unflatten(jax.tree.structure(state.params), leaves)
    return state.replace_params(params), initializer.train_state_axes


def save(folder, params):
    """A checkpoint as T5X writes it."""
    folder.mkdir(exist_ok=True)
    state, _ = make_state(make_model(TNRF), params)
    manager = utils.create_orbax_checkpoint_manager(
        save_cfg=utils.SaveCheckpointConfig(),
        train_state=state,
        partitioner=partitioner(),
        model_dir=str(folder),
    )
    manager.save(state)
    manager.close()


@contextlib.contextmanager
def make_trainer(model_dir, objective, original, params=None, num_microbatches=1):
    model = make_model(objective)
    state, axes = make_state(model, golden("params/") if params is None else params)
    found = t5x_plugin.TntTrainer(
        model=model,
        train_state=state,
        partitioner=partitioner(),
        summary_dir=str(model_dir),
        original=utils.RestoreCheckpointConfig(original, mode="specific"),
        eval_names=["evaluation"],
        train_state_axes=axes,
        rng=jax.random.PRNGKey(SEED),
        learning_rate_fn=lambda step: jnp.float32(1e-3),
        num_microbatches=num_microbatches,
    )
    with found:
        yield found


def train(found, batch, num_steps):
    """What T5X writes to its logs about these updates."""
    summary = found.train(itertools.repeat(batch), num_steps).result()
    return {name: float(value.value) for name, value in summary.items()}


def flat(params):
    params = traverse_util.flatten_dict(getattr(params, "unfreeze", lambda: params)(), sep="/")
    return {path: np.asarray(params[path]) for path in sorted(params)}


def assert_same(left, right, **tolerances):
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for path in left:
        if tolerances:
            np.testing.assert_allclose(left[path], right[path], err_msg=path, **tolerances)
        else:
            np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def assert_same_update(left, right):
    """Nearly all elements agree; test_train_step.py says why a few may differ."""
    left, right = flat(left), flat(right)
    gaps = np.concatenate([np.abs(left[path] - right[path]).ravel() for path in left])
    assert np.sum(gaps > 2e-6) <= 20
    assert gaps.max() < 1e-3


@pytest.mark.parametrize("name", ["FT", "UL", "TNFF", "TNRF"])
def test_three_steps_of_t5x(name, batch, original, tmp_path):
    """The numbers that T5X's own trainer and google/t5patches gave (golden/README.md)."""
    objective = objectives.TntObjective(**OBJECTIVES[name])
    with make_trainer(tmp_path, objective, original) as found:
        train(found, batch, 3)
        assert int(found.train_state.step) == 3
        params = found.train_state.params
    steps = np.load(golden_model.FOLDER / "t5x_steps.npz")
    assert_same_update(params, golden_model.tree(steps, f"traj/{name}/params3/"))


def test_an_update_and_its_metrics_are_those_of_train_step(batch, original, tmp_path):
    with make_trainer(tmp_path, TNRF, original) as found:
        evaluation = found.eval({"evaluation": [batch]})["evaluation"]
        summary = train(found, batch, 1)
        params = found.train_state.params
    optimizer = optax.adafactor(1e-3)
    state, sums = train_step.train_step(
        train_step.init_state(golden("params/"), optimizer),
        golden("orig_params/"),
        batch,
        jax.random.key(0),
        forward=t5_inputs.make_forward(golden_model.CONFIG),
        objective=TNRF,
        optimizer=optimizer,
    )
    expected = train_step.summarize(sums)
    assert expected["num_negative"] == 5
    for name, value in expected.items():
        if name != "num_updates":
            np.testing.assert_allclose(summary[name], value, rtol=2e-5, err_msg=name)
        if name not in ("num_updates", "gradient_norm"):
            np.testing.assert_allclose(evaluation[name].value, value, rtol=2e-5, err_msg=name)
    assert_same_update(params, state.params)
    assert summary["timing/seqs"] == 4


def test_microbatches_make_the_same_update(batch, original, tmp_path):
    """Though one holds 17 unmasked tokens and the other 3."""
    batch = {
        name: jnp.concatenate([rows, rows[2:3], rows[3:4], rows[3:4], rows[3:4]])
        for name, rows in batch.items()
    }
    summaries, params = {}, {}
    for number in (1, 2):
        with make_trainer(tmp_path / str(number), TNRF, original, None, number) as found:
            summaries[number] = train(found, batch, 2)
            params[number] = found.train_state.params
    names = [name for name in summaries[1] if "timing" not in name and "accuracy" not in name]
    assert {"loss", "negative_mass", "gradient_norm"} <= {*names}
    for name in names:
        np.testing.assert_allclose(summaries[2][name], summaries[1][name], rtol=1e-5, err_msg=name)
    assert_same_update(params[1], params[2])


def test_the_original_itself_has_no_loss(batch, original, tmp_path):
    batch = {**batch, "decoder_negative_ids": jnp.full((4, 9, 1), -1)}
    for name in ("forward_kl", "reverse_kl", "jensen_shannon"):
        objective = objectives.TntObjective(negative_term="reverse_kl", positive_term=name)
        with make_trainer(tmp_path / name, objective, original, golden("orig_params/")) as found:
            summary = train(found, batch, 1)
            assert_same(found.train_state.params, golden("orig_params/"), atol=1e-6)
        assert abs(summary["loss"]) < 1e-7
        assert summary["gradient_norm"] < 1e-6
        assert summary["num_negative"] == summary["negative_mass"] == 0  # and no NaN


def test_a_batch_of_padding_changes_nothing(batch, original, tmp_path):
    batch = {name: jnp.zeros_like(rows) for name, rows in batch.items()}
    with make_trainer(tmp_path, TNRF, original) as found:
        summary = train(found, batch, 1)
        assert_same(found.train_state.params, golden("params/"))
    assert summary["loss"] == 0


def test_the_original_is_a_sharded_argument_and_stays_as_it_is(batch, original, tmp_path):
    with make_trainer(tmp_path, TNRF, original) as found:
        before = found.train_state
        assert_same(found._original_params, golden("orig_params/"))
        shardings = [x.sharding for x in jax.tree.leaves(found._original_params)]
        for sharding, current in zip(shardings, jax.tree.leaves(before.params), strict=True):
            assert sharding.is_equivalent_to(current.sharding, current.ndim)
        assert not all(sharding.is_fully_replicated for sharding in shardings)

        # (That an array is not deleted shows little: XLA keeps donated buffers it has no use for.)
        lowered = found._partitioned_train_step.lower(before, batch).step
        (state_info, original_info, _), _ = lowered.args_info
        assert all(argument.donated for argument in jax.tree.leaves(state_info))
        assert len(jax.tree.leaves(original_info)) == len(shardings)
        assert not any(argument.donated for argument in jax.tree.leaves(original_info))

        found.compile_train(batch)
        train(found, batch, 2)
        assert before.params["decoder"]["logits_dense"]["kernel"].is_deleted()  # donated
        assert_same(found._original_params, golden("orig_params/"))

        # The compiled program holds no original: given another one, it computes with that.
        other = found.train_state.params
        step = dataclasses.replace(
            found._compiled_train_step, original_params=jax.tree.map(jnp.copy, other)
        )
        _, metrics = step(found.train_state, batch)
        assert float(metrics["positive_kl"].compute()) < 1e-7


def test_dropout_is_the_current_model_s_alone(batch, original):
    model = make_model(TNRF)
    model.module = model.module.clone(
        config=dataclasses.replace(model.module.config, dropout_rate=0.5)
    )
    params = golden("orig_params/")
    key = jax.random.key(0)
    loss, found = model.loss_fn(params, batch, key, params)
    current, still = model._compute_logits(params, batch, key), model._compute_logits(params, batch)
    _, sums = train_step.token_sums(TNRF, current, still, batch)
    np.testing.assert_allclose(loss, sums["loss"], rtol=1e-5)
    assert float(found["positive_kl"].compute()) > 1e-3


def test_decoding_and_scoring_are_those_of_t5x(batch):
    model = make_model(TNRF)
    params = golden("params/")
    scores = model.score_batch(params, batch)
    log_probs = jax.nn.log_softmax(t5_inputs.make_forward(golden_model.CONFIG)(params, batch, None))
    targets = batch["decoder_target_tokens"][..., None]
    picked = jnp.take_along_axis(log_probs, targets, axis=-1)[..., 0] * batch["decoder_loss_mask"]
    np.testing.assert_allclose(scores, picked.sum(-1), rtol=1e-5, atol=1e-5)
    assert model.predict_batch(params, batch).shape == (4, 9)


def test_legacy_checkpoints_of_t5x_are_read(shared_data, tmp_path):
    legacy = shared_data / "golden" / "t5_1_1" / "legacy_orig" / "checkpoint_0"
    with make_trainer(tmp_path, TNRF, str(legacy)) as found:
        assert_same(found._original_params, golden("orig_params/"))


# ------------------------------------------------------------------------------------ The original


def test_a_run_keeps_its_original(original, tmp_path):
    model_dir, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    save(moved, golden("orig_params/"))
    save(other, golden("params/"))
    with make_trainer(model_dir, TNRF, original):
        pass
    identity = json.loads((model_dir / "tnt_jax_run.json").read_text())
    digest = digests.of_params(golden("orig_params/"))
    assert identity == {"original": {"path": original, "digest": digest}, "first_step": 0}

    with make_trainer(model_dir, TNRF, str(moved / "checkpoint_0")):
        pass
    message = (
        f"holds a run whose original was {original} (digest {digest}); now it is "
        f"{other}/checkpoint_0 (digest {digests.of_params(golden('params/'))}). Pass the same "
        "INITIAL_CHECKPOINT_PATH"
    )
    with (
        pytest.raises(UsageError, match=re.escape(message)),
        make_trainer(model_dir, TNRF, str(other / "checkpoint_0")),
    ):
        pass
    with (
        pytest.raises(UsageError, match=r"now it is none \(an objective without divergences\)"),
        make_trainer(model_dir, objectives.TntObjective(**OBJECTIVES["UL"]), None),
    ):
        pass
    assert json.loads((model_dir / "tnt_jax_run.json").read_text()) == identity


def test_a_directory_of_another_trainer_is_refused(original, tmp_path):
    save(tmp_path, golden("params/"))
    message = re.escape(f"{tmp_path} has checkpoints but no tnt_jax_run.json")
    with pytest.raises(UsageError, match=message), make_trainer(tmp_path, TNRF, original):
        pass


def test_a_divergence_needs_an_original(batch, tmp_path):
    with (
        pytest.raises(UsageError, match=r"INITIAL_CHECKPOINT_PATH .* one checkpoint is expected"),
        make_trainer(tmp_path, TNRF, ()),
    ):
        pass
    with pytest.raises(UsageError, match=r"trainer_cls = @t5x_plugin\.TntTrainer"):
        make_model(TNRF).loss_fn(golden("params/"), batch, None)


def test_a_vocabulary_that_is_too_large_is_refused(batch):
    model = make_model(objectives.TntObjective(**OBJECTIVES["UL"]))
    model._output_vocabulary = seqio.ByteVocabulary(extra_ids=126)
    with pytest.raises(UsageError, match="the vocabulary has 385 ids, but the model has 384"):
        model.loss_fn(golden("params/"), batch, None)


# -------------------------------------------------------------------------------------------- Data


def rows_of(folder, number=10):
    """Annotated records: bytes, so every character is a token."""
    rows = [
        records.Record(
            id=f"row {i}",
            inputs="abcdefghijklmnop"[: 8 + i % 7],
            targets=f"xy{i}wz"[: 3 + i % 4],
            negative_spans=((1, 2),) if i % 3 else (),
            negative_token_ids=((0, (60 + i,)),) if i % 3 == 1 else (),
        )
        for i in range(number)
    ]
    records.write_records(folder / "annotated.jsonl", rows)
    return str(folder / "annotated.jsonl")


@pytest.fixture
def task(tmp_path):
    yield tasks.record_task(
        "plug_in_task", {"train": rows_of(tmp_path), "validation": rows_of(tmp_path)}, VOCABULARY
    )
    seqio.TaskRegistry.remove("plug_in_task")


def dataset_config(**settings):
    defaults = {
        "mixture_or_task_name": "plug_in_task",
        "task_feature_lengths": LENGTHS,
        "split": "train",
        "batch_size": 5,
        "shuffle": False,
        "seed": SEED,
        "trim_output_features": False,
    }
    return utils.DatasetConfig(**{**defaults, **settings})


def test_the_feature_converter_gives_our_model_features(task):
    dataset = utils.get_dataset(dataset_config(), 0, 1, t5x_plugin.FeatureConverter, num_epochs=1)
    found = list(dataset.as_numpy_iterator())
    examples = tasks.load_examples(task, LENGTHS, "train")
    expected = batch_for_eval(examples, 5, LENGTHS, 1)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
            assert one[name].dtype == np.int32
    cut = found[1]["encoder_input_tokens"]
    assert cut[0, -1] == 1  # 13 bytes and EOS in 12 places: EOS stays


def test_the_feature_converter_gives_strengths_where_it_is_told_to(task):
    row = {"id": "a", "inputs": "ab", "targets": "cde", "negative_spans": [[1, 2]]}
    row["negative_span_strengths"] = [0.25]
    seqio.TaskRegistry.add(
        "graded",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(row),
            splits=("train",),
        ),
        preprocessors=[tasks.tokenize_and_mark],
        output_features=tasks.record_features(VOCABULARY),
    )
    config = dataset_config(mixture_or_task_name="graded", batch_size=1)
    try:
        converter = functools.partial(t5x_plugin.FeatureConverter, has_strengths=True)
        (found,) = utils.get_dataset(config, 0, 1, converter, 1).as_numpy_iterator()
        expected = np.ones((1, 9, 1), np.float32)
        expected[0, 1] = 0.25
        np.testing.assert_array_equal(found["decoder_negative_strengths"], expected)
        with pytest.raises(UsageError, match=r"HAS_STRENGTHS .* 'graded' has marks of a strength"):
            t5x_plugin.get_dataset(config, 0, 1, t5x_plugin.FeatureConverter, model_dir="/nowhere")
    finally:
        seqio.TaskRegistry.remove("graded")


def test_the_feature_converter_takes_mixtures_and_plain_tasks(task):
    """Features that a task lacks: nothing is marked, and there is loss everywhere; an int as id."""
    seqio.TaskRegistry.add(
        "plain",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
                {"id": 7, "inputs": "ab", "targets": "c"}
            ),
            splits=("train",),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")},
    )
    seqio.MixtureRegistry.add("mixed", [("plug_in_task", 1)])
    converter = functools.partial(t5x_plugin.FeatureConverter, num_negative_ids=3)
    try:
        plain = utils.get_dataset(
            dataset_config(mixture_or_task_name="plain", batch_size=1), 0, 1, converter, 1
        )
        (row,) = plain.as_numpy_iterator()
        np.testing.assert_array_equal(row["decoder_loss_mask"], [[1, 1] + 7 * [0]])
        np.testing.assert_array_equal(row["decoder_negative_ids"], np.full((1, 9, 3), -1))
        mixed = utils.get_dataset(
            dataset_config(mixture_or_task_name="mixed", trim_output_features=True), 0, 1, converter
        )
        assert (next(mixed.as_numpy_iterator())["decoder_negative_ids"] >= 0).any()
    finally:
        seqio.TaskRegistry.remove("plain")
        seqio.MixtureRegistry.remove("mixed")


def test_packing_is_refused():
    with pytest.raises(UsageError, match=r"DatasetConfig\.pack: expected False"):
        t5x_plugin.FeatureConverter(pack=True)


def plug_in_batches(model_dir, shard_id=0, num_shards=1, **settings):
    return t5x_plugin.get_dataset(
        dataset_config(shuffle=True, **settings),
        shard_id,
        num_shards,
        t5x_plugin.FeatureConverter,
        model_dir=str(model_dir),
    )


def test_get_dataset_goes_on_where_the_checkpoint_stands(task, tmp_path):
    """Steps are counted from the first one, like T5X's; two hosts get what one gets."""
    whole = plug_in_batches(tmp_path, batch_size=4)
    expected = [next(whole) for _ in range(5)]
    assert whole.element_spec["decoder_negative_ids"].shape == (4, 9, 1)
    halves = [plug_in_batches(tmp_path, shard, 2, batch_size=4) for shard in (0, 1)]
    for batch in expected:
        parts = [next(half) for half in halves]
        for name in batch:
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])

    (tmp_path / "tnt_jax_run.json").write_text('{"original": null, "first_step": 1000}')
    np.testing.assert_array_equal(
        next(plug_in_batches(tmp_path, batch_size=4))["decoder_target_tokens"],
        expected[0]["decoder_target_tokens"],
    )
    for step in (1001, 1003):
        (tmp_path / f"checkpoint_{step}" / "state").mkdir(parents=True)
        (tmp_path / f"checkpoint_{step}" / "state" / "checkpoint").touch()
        (tmp_path / f"checkpoint_{step}" / "checkpoint").touch()
    went_on = plug_in_batches(tmp_path, batch_size=4)
    for batch in expected[3:]:
        found = next(went_on)
        for name in batch:
            np.testing.assert_array_equal(found[name], batch[name])


def test_a_relative_model_dir_is_refused_before_t5x_fails_on_it(task):
    with pytest.raises(UsageError, match="MODEL_DIR: expected an absolute path, found 'run'"):
        plug_in_batches("run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": None}, "seed: expected a number, found None"),
        ({"pack": True}, "expected False, found True"),
        ({"mixture_or_task_name": "plugin_task"}, "no seqio task or mixture 'plugin_task'"),
    ],
)
def test_get_dataset_names_mistakes(task, settings, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        plug_in_batches(tmp_path, **settings)


def test_too_many_ids_at_a_position_are_named(task, tmp_path):
    path = tmp_path / "two.jsonl"
    records.write_records(
        path,
        [
            records.Record(
                id="two",
                inputs="a",
                targets="b",
                negative_spans=(),
                negative_token_ids=((0, (5, 6)),),
            )
        ],
    )
    tasks.record_task("two", {"train": str(path)}, VOCABULARY)
    try:
        with pytest.raises(
            UsageError, match=r"NUM_NEGATIVE_IDS .* has 2 ids .* found 1. Set it to 2"
        ):
            plug_in_batches(tmp_path, mixture_or_task_name="two")
        dataset = utils.get_dataset(
            dataset_config(mixture_or_task_name="two"), 0, 1, t5x_plugin.FeatureConverter
        )
        with pytest.raises(tf.errors.OpError, match="UsageError: example 'two' has 2 negative ids"):
            next(dataset.as_numpy_iterator())
    finally:
        seqio.TaskRegistry.remove("two")


# ------------------------------------------------------------------------- python -m t5x.train ...

# Registers the task, and dies when a certain checkpoint is there, as a machine would.
MODULE = """
import os, pathlib, signal, threading, time
import seqio
from tnt_jax.data import tasks

files = dict.fromkeys(["train", "validation"], "annotated.jsonl")
tasks.record_task("mine", files, seqio.ByteVocabulary())

def die():
    while not pathlib.Path(os.environ["DIES_AT"]).exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("DIES_AT"):
    threading.Thread(target=die, daemon=True).start()
"""

MODEL = """
from __gin__ import dynamic_registration

include "t5x/examples/t5/t5_1_1/tiny.gin"

import seqio
from t5x.examples.t5 import network

VOCABULARY = @seqio.ByteVocabulary()
network.T5Config:
  vocab_size = 384
  dtype = "float32"
  emb_dim = 32
  num_heads = 2
  head_dim = 16
  mlp_dim = 64
"""


def t5x_train(folder, model_dir, original, dies_at=""):
    settings = {
        "MODEL_DIR": str(folder / model_dir),
        "MIXTURE_OR_TASK_NAME": "mine",
        "MIXTURE_OR_TASK_MODULE": "my_tasks",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "INITIAL_CHECKPOINT_PATH": original,
        "TRAIN_STEPS": 6,
        "BATCH_SIZE": 4,
        "NUM_MICROBATCHES": 2,
        "EVAL_PERIOD": 6,
        "EVAL_STEPS": 2,
        "utils.SaveCheckpointConfig.period": 2,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "t5x.train"),
            f"--gin_search_paths={ROOT / 'gin_configs'}",
            "--gin_file=tiny.gin",
            "--gin_file=objectives/tnrf.gin",
            f"--gin_file={ROOT / 'gin_configs' / 't5x' / 'train.gin'}",
            *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        ],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(folder),
            "DIES_AT": dies_at,
            "PYTHONWARNINGS": "ignore",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def saved(path):
    with ocp.PyTreeCheckpointer() as reader:
        return reader.restore(path / "state")


def test_t5x_train_goes_on_after_a_kill_as_if_nothing_had_happened(original, tmp_path):
    rows_of(tmp_path)
    (tmp_path / "my_tasks.py").write_text(MODULE)
    (tmp_path / "tiny.gin").write_text(MODEL)

    whole = t5x_train(tmp_path, "whole", original)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert "negative_mass" in whole.stderr
    state = saved(tmp_path / "whole" / "checkpoint_6")
    assert state.keys() == {"state", "target"}  # no original
    assert state["target"].keys() == {"encoder", "decoder", "token_embedder"}

    killed = t5x_train(tmp_path, "killed", original, dies_at="killed/checkpoint_2")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoint_6").exists()
    went_on = t5x_train(tmp_path, "killed", original)
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert re.search("Starting main loop over steps [24]-6", went_on.stderr)
    left, right = state, saved(tmp_path / "killed" / "checkpoint_6")
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)
    start = saved(pathlib.Path(original))
    assert not np.array_equal(
        left["target"]["token_embedder"]["embedding"],
        start["target"]["token_embedder"]["embedding"],
    )

    # The half-trained model in the original's place.
    wrong = t5x_train(tmp_path, "killed", str(tmp_path / "whole" / "checkpoint_2"))
    assert wrong.returncode != 0
    assert f"UsageError: MODEL_DIR {tmp_path / 'killed'} holds a run whose original" in wrong.stderr
