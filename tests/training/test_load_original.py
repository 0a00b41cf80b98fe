"""The kinds of original: whatever the kind, the same loss; and what each keeps in files."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers import rooms, t5_inputs

from tnt_jax import convert, objectives
from tnt_jax.checkpoints import pretrained
from tnt_jax.data import datasets, example_files
from tnt_jax.data.examples import Example, ExampleTable
from tnt_jax.data.layouts import Place, convert_features
from tnt_jax.models import adapters, sharding, t5
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError
from tnt_jax.tokenizers import tokenization
from tnt_jax.training import load_original, original_cache, settings
from tnt_jax.training.original_cache import OriginalStates
from tnt_jax.training.originals import Original
from tnt_jax.training.trainer import make_trainer

# --------------------------------------------------------------------------------- Whole programs


@pytest.fixture(scope="module", autouse=True)
def working_directory(tmp_path_factory):
    """An original, and sentences that stand for its outputs, annotated."""
    folder = tmp_path_factory.mktemp("world")
    rooms.write_world(folder)
    with contextlib.chdir(folder), rooms.devices_seen():
        settings = {"OUTPUT": "annotated.jsonl", "RECORDS": "corpus.jsonl"}
        assert rooms.run("annotate", settings) == 0
        rooms.train_original("original", 10, LOG_EVERY=1)
        yield


def train(model_dir, gin_files=(), status=0, **settings):
    settings = {"RECORDS": "annotated.jsonl", "TRAIN_STEPS": 4, "LOG_EVERY": 1} | settings
    assert rooms.run("train", {**settings, "MODEL_DIR": model_dir}, gin_files) == status


def metrics(model_dir, name="loss"):
    lines = pathlib.Path(model_dir, "metrics.jsonl").read_text().splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


@pytest.mark.parametrize(
    "settings", [{"BLOCK_SIZE": 7}, {"PACK": True}, {"NUM_MICROBATCHES": 2}], ids=str
)
def test_cached_states_give_the_run_of_a_second_forward(settings, capfd):
    (name,) = settings
    train(f"{name}-parameters", **settings)
    train(f"{name}-cached", **settings, ORIGINAL="cached")
    losses = metrics(f"{name}-cached")
    np.testing.assert_allclose(losses, metrics(f"{name}-parameters"), rtol=2e-5, atol=1e-8)
    for name_of_metric in ("positive_kl", "negative_collateral", "negative_smallest_cost"):
        found = metrics(f"{name}-cached", name_of_metric)
        wanted = metrics(f"{name}-parameters", name_of_metric)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_states_serve_every_objective_and_are_computed_once(capfd):
    train("one", ORIGINAL="cached", STATES_DIR="states")
    files = {path: path.stat().st_mtime_ns for path in pathlib.Path("states").rglob("*.npy")}
    assert files
    assert "nothing to compute" not in capfd.readouterr().out
    train("two", ["objectives/tnff.gin"], ORIGINAL="cached", STATES_DIR="states")
    assert "nothing to compute" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in pathlib.Path("states").rglob("*.npy")} == files
    # Another original has states of its own.
    train("three", ORIGINAL="cached", STATES_DIR="states", INITIAL_CHECKPOINT_PATH="one")
    assert len({path.parent for path in pathlib.Path("states").rglob("*.npy")}) == 2


def test_cached_states_after_a_stop():
    train("straight", ORIGINAL="cached", TRAIN_STEPS=6)
    train("stopped", ORIGINAL="cached", TRAIN_STEPS=3)
    train("stopped", ORIGINAL="cached", TRAIN_STEPS=6)
    rooms.assert_same_state("stopped", "straight")


def test_states_with_evaluation():
    evaluation = {
        "EVAL_DATASET": "@evaluation/datasets.RecordFiles()",
        "evaluation/datasets.RecordFiles.files": "annotated.jsonl",
        "evaluation/datasets.RecordFiles.vocabulary": "%VOCABULARY",
    }
    train("evaluated-cached", ORIGINAL="cached", **evaluation)
    train("evaluated-parameters", **evaluation)
    found, wanted = (metrics(f"evaluated-{kind}", "eval/loss") for kind in ("cached", "parameters"))
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_a_damaged_part_is_named(capfd):
    train("damaged", ORIGINAL="cached", STATES_DIR="damaged_states")
    part = next(pathlib.Path("damaged_states").rglob("*.npy"))
    part.write_bytes(part.read_bytes()[:100])
    train("again", status=2, ORIGINAL="cached", STATES_DIR="damaged_states")
    assert f"{part.with_suffix('.json')}: expected states of the original" in capfd.readouterr().err


def test_adapters_start_at_the_original_and_only_they_move(capfd):
    train("adapters", ORIGINAL="adapters_off", ADAPTER_RANK=4, LEARNING_RATE=1e-2)
    train("parameters-too", LEARNING_RATE=1e-2)
    losses = metrics("adapters")
    # Before the first update both are the original.
    assert losses[0] == pytest.approx(metrics("parameters-too")[0], rel=1e-5)
    assert losses[-1] < losses[0]
    saved = jax.tree.leaves_with_path(rooms.saved("adapters"))
    assert saved
    assert all(adapters.is_adapter(path) for path, _ in saved)
    # Going on with another way to train is refused.
    train("adapters", status=2, TRAIN_STEPS=8)
    assert "adapter" in capfd.readouterr().err


def test_a_run_of_adapters_is_read_as_the_model_that_it_is():
    """Generation, evaluation and conversion take it as they take any checkpoint."""
    train("to-read", ORIGINAL="adapters_off", ADAPTER_RANK=4, ADAPTER_ALPHA=12.0, LEARNING_RATE=0.1)
    params, added, original = (
        traverse_util.flatten_dict(tree, sep="/")
        for tree in (
            restored("to-read"),
            rooms.saved("to-read"),
            rooms.saved("original"),
        )
    )
    assert params.keys() == original.keys()
    changed = set()
    for name, kernel in original.items():
        module = name.removesuffix("/kernel")
        expected = kernel
        if f"{module}/adapter_in" in added:
            changed.add(name)
            expected = kernel + 3 * added[f"{module}/adapter_in"] @ added[f"{module}/adapter_out"]
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6)
    assert len(changed) == 4 + 3 + 8 + 3  # attention and mlp of one layer in each stack
    settings = {"PROMPTS": "corpus.jsonl", "OUTPUT": "adapters.jsonl", "CHECKPOINT_PATH": "to-read"}
    assert rooms.run("generate", settings) == 0
    convert.convert(input="to-read", output="merged", output_format="orbax")
    jax.tree.map(np.testing.assert_array_equal, restored("merged"), restored("to-read"))


def restored(path):
    found = pretrained.open_checkpoint(path)
    return found.restore(Model(config=found.config, mesh=one_device()).abstract_params)


def one_device():
    return sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])


def test_adapters_beside_another_original_are_refused():
    """A run notes the checkpoint that it was trained beside, and what was in it."""
    shutil.copytree("original", "moving")
    train("beside", ORIGINAL="adapters_off", INITIAL_CHECKPOINT_PATH="moving")
    train("moved", TRAIN_STEPS=1, INITIAL_CHECKPOINT_PATH="moving", LEARNING_RATE=0.1)
    before = restored("beside")
    shutil.copytree("moved/checkpoint_1", "moving/checkpoint_20")
    jax.tree.map(np.testing.assert_array_equal, restored("beside"), before)
    shutil.rmtree("moving/checkpoint_10")
    shutil.copytree("moved/checkpoint_1", "moving/checkpoint_10")
    with pytest.raises(UsageError, match="its adapters were trained beside weights with the"):
        restored("beside")
    with pytest.raises(UsageError, match="its adapters were trained beside weights with the"):
        convert.convert(input="beside", output="merged-beside", output_format="orbax")


def test_other_adapters_on_a_restart_are_refused(capfd):
    train("alpha", ORIGINAL="adapters_off", ADAPTER_ALPHA=32.0)
    train("alpha", status=2, ORIGINAL="adapters_off", ADAPTER_ALPHA=320.0, TRAIN_STEPS=9)
    assert "ADAPTER_RANK, ADAPTER_ALPHA and TRAINED_LAYERS" in capfd.readouterr().err


def test_a_folder_of_states_that_nobody_reads_is_refused(capfd):
    train("forgotten", status=2, STATES_DIR="somewhere")
    assert "states are kept with ORIGINAL='cached' or 'adapters_cached'" in capfd.readouterr().err


def test_adapters_without_their_original_are_refused():
    shutil.copytree("original", "base-to-lose")
    train("to-lose", ORIGINAL="adapters_off", INITIAL_CHECKPOINT_PATH="base-to-lose")
    shutil.rmtree("base-to-lose")
    with pytest.raises(
        UsageError, match=r"adapters for an original that the run noted as .*base-to-lose"
    ):
        pretrained.open_checkpoint("to-lose")


@pytest.fixture(autouse=True, scope="module")
def base_of_adapters(working_directory):
    shutil.copytree("original", "adapters-base")


def test_adapters_after_a_stop():
    settings = {"ORIGINAL": "adapters_off", "ADAPTER_RANK": 2}
    train("adapters-straight", TRAIN_STEPS=6, **settings)
    train("adapters-stopped", TRAIN_STEPS=3, **settings)
    train("adapters-stopped", TRAIN_STEPS=6, **settings)
    rooms.assert_same_state("adapters-stopped", "adapters-straight")


@pytest.fixture(scope="module")
def upper_layers(base_of_adapters):
    """A run that trained the decoder alone, beside what its encoder said once."""
    settings = {"ORIGINAL": "cached", "TRAINED_LAYERS": 1, "STATES_DIR": "upper-states"}
    settings |= {"LEARNING_RATE": 1e-2, "INITIAL_CHECKPOINT_PATH": "adapters-base"}
    train("upper", **settings, TRAIN_STEPS=6, SAMPLE_EVERY=6)
    return settings


def test_a_run_of_upper_layers_is_read_as_the_model_that_it_is(upper_layers, capfd):
    params, trained, original = (
        traverse_util.flatten_dict(tree, sep="/")
        for tree in (restored("upper"), rooms.saved("upper"), rooms.saved("original"))
    )
    assert {name.split("/")[1] for name in trained} == {"layers_0"}
    assert params.keys() == original.keys()
    for name, leaf in params.items():
        np.testing.assert_array_equal(leaf, trained.get(name, original[name]))
    assert any((leaf != original[name]).any() for name, leaf in trained.items())
    # What the model that is trained says, by all of its layers.
    assert len(pathlib.Path("upper/samples.jsonl").read_text().splitlines()) > 0
    # A stop, and a second forward pass instead of what is kept, change nothing.
    train("upper-stopped", **upper_layers, TRAIN_STEPS=3)
    train("upper-stopped", **upper_layers, TRAIN_STEPS=6)
    assert capfd.readouterr().out.count("nothing to compute") == 2
    rooms.assert_same_state("upper-stopped", "upper")
    computed = {**upper_layers, "ORIGINAL": "parameters", "STATES_DIR": None}
    train("upper-computed", **computed, TRAIN_STEPS=6)
    np.testing.assert_allclose(metrics("upper-computed"), metrics("upper"), rtol=2e-5, atol=1e-8)
    train("upper-stopped", status=2, **upper_layers | {"TRAINED_LAYERS": None}, TRAIN_STEPS=9)
    with pytest.raises(UsageError, match="found a full model"):
        convert.convert(input="upper", output="none", output_format="peft")
    # Attention has 8 kernels, the MLP 3, and there are 3 norms: none is taken from the original.
    shutil.copytree("upper", "upper-damaged")
    shutil.rmtree("upper-damaged/checkpoint_6/params")
    shutil.copytree("original/checkpoint_10/params", "upper-damaged/checkpoint_6/params")
    with pytest.raises(UsageError, match="expected the 14 parameters of the last 1 layers"):
        pretrained.open_checkpoint("upper-damaged")


def test_a_further_round_of_upper_layers(upper_layers, capfd):
    """What lies below must be the original's, for it is not stored."""
    train("second", **upper_layers, START_CHECKPOINT_PATH="upper")
    assert metrics("second")[0] == pytest.approx(metrics("upper")[-1], rel=0.5)
    assert metrics("second")[0] < metrics("upper")[0] / 2
    train("whole", LEARNING_RATE=1e-2)
    capfd.readouterr()
    train("third", status=2, **upper_layers, START_CHECKPOINT_PATH="whole")
    assert (
        "expected a model that differs from the original in these layers" in capfd.readouterr().err
    )


@pytest.fixture(scope="module")
def first_round(base_of_adapters):
    """A run of adapters in the upper layers; returns its settings."""
    settings = {"ORIGINAL": "adapters_off", "ADAPTER_RANK": 2, "TRAINED_LAYERS": 1}
    settings |= {"LEARNING_RATE": 1e-2, "INITIAL_CHECKPOINT_PATH": "adapters-base"}
    train("first-round", **settings)
    return settings


def test_a_further_round_of_adapters(first_round):
    """They go on from those of the round before, and the original stays the first one."""
    settings = {**first_round, "START_CHECKPOINT_PATH": "first-round"}
    # Updates of nothing: what comes out is what went in.
    train("unmoved", **{**settings, "LEARNING_RATE": 0.0}, TRAIN_STEPS=1)
    jax.tree.map(np.testing.assert_array_equal, rooms.saved("unmoved"), rooms.saved("first-round"))
    train("second-round", **settings)
    assert metrics("first-round", "positive_kl")[0] < 1e-6
    assert metrics("second-round", "positive_kl")[0] > 1e-6
    assert metrics("second-round")[0] < metrics("first-round")[0] / 1.2
    first, second = (
        pretrained.open_checkpoint(f"{name}-round").run for name in ("first", "second")
    )
    assert second["original"] == first["original"]
    assert pathlib.Path(second["start"]["path"]).name == "first-round"
    # The step does not hold the original's states, yet they are the original's.
    train("second-cached", **{**settings, "ORIGINAL": "adapters_cached"})
    np.testing.assert_allclose(
        metrics("second-cached"), metrics("second-round"), rtol=2e-5, atol=1e-8
    )


def test_a_further_round_of_adapters_after_a_stop(first_round):
    """What it started from is not needed again."""
    shutil.copytree("first-round", "start-to-lose")
    settings = {**first_round, "START_CHECKPOINT_PATH": "start-to-lose"}
    train("straight-round", **settings, TRAIN_STEPS=4)
    train("stopped-round", **settings, TRAIN_STEPS=2)
    shutil.rmtree("start-to-lose")
    train("stopped-round", **settings, TRAIN_STEPS=4)
    rooms.assert_same_state("stopped-round", "straight-round")


@pytest.mark.parametrize(
    ("start", "settings", "found"),
    [
        ("original", {}, "a model that is not such a run"),
        ("first-round", {"ADAPTER_RANK": 3}, "rank 2, not 3"),
        ("first-round", {"ADAPTER_ALPHA": 8.0}, "alpha 32.0, not 8.0"),
        ("first-round", {"TRAINED_LAYERS": None}, "layers 1, not all"),
        ("first-round", {"INITIAL_CHECKPOINT_PATH": "other"}, "an original with the digest "),
    ],
    ids=["whole", "rank", "alpha", "layers", "original"],
)
def test_adapters_start_from_such_adapters_alone(first_round, start, settings, found, capfd):
    if "INITIAL_CHECKPOINT_PATH" in settings:
        train("other", TRAIN_STEPS=1)
    train("refused", status=2, **{**first_round, **settings, "START_CHECKPOINT_PATH": start})
    said = capfd.readouterr().err
    assert "START_CHECKPOINT_PATH: with ORIGINAL='adapters_off', expected a run of adapters" in said
    assert f": {found}" in said
    assert not list(pathlib.Path("refused").glob("checkpoint_*"))


def test_adapters_of_stacked_layers_go_on_from_layers_apart():
    settings = {"ORIGINAL": "adapters_off", "ADAPTER_RANK": 2, "LEARNING_RATE": 1e-2}
    train("apart", **settings)
    settings = {**settings, "START_CHECKPOINT_PATH": "apart"}
    for is_stacked in (False, True):
        train(f"from-apart-{is_stacked}", **settings, SCAN_LAYERS=is_stacked)
    np.testing.assert_allclose(
        metrics("from-apart-True"), metrics("from-apart-False"), rtol=1e-4, atol=1e-7
    )


def test_adapters_with_cached_states_are_the_same_run():
    settings = {"ADAPTER_RANK": 2, "TRAINED_LAYERS": 1, "LEARNING_RATE": 1e-2}
    train("adapters-computed", ORIGINAL="adapters_off", PACK=True, **settings)
    train("adapters-cached", ORIGINAL="adapters_cached", PACK=True, **settings)
    found, wanted = metrics("adapters-cached"), metrics("adapters-computed")
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-8)
    # One may go on with what the other has begun.
    train("adapters-computed", ORIGINAL="adapters_cached", PACK=True, **settings, TRAIN_STEPS=5)
    convert.convert(input="adapters-cached", output="lora", output_format="peft")


def test_an_unknown_kind_is_refused(capfd):
    train("unknown", status=2, ORIGINAL="cache")
    found = "expected one of parameters, cached, adapters_off, adapters_cached; found 'cache'"
    assert found in capfd.readouterr().err


# -------------------------------------------------------------------------------- The step's parts

CONFIG = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=32,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
    dtype="bfloat16",
    scan_layers=True,
)


LENGTHS = {"inputs": 6, "targets": 8}


def made(kind, config=CONFIG, **mesh_shape):
    """A trainer, where the parameters of its run come from, and how an update is computed."""
    update = settings.Update(
        batch_size=8,
        task_feature_lengths=LENGTHS,
        optimizer=optax.adam(1e-3),
        mesh_shape=sharding.MeshShape(**mesh_shape),
    )
    adapters = {"adapter_rank": 4, "adapter_alpha": 8.0} if kind.startswith("adapters") else {}
    original_choice = settings.OriginalChoice(path=None, kind=kind, **adapters)
    trainer = make_trainer(
        config=config,
        objective=objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl"),
        original_choice=original_choice,
        update=update,
    )
    schedule = settings.Schedule(train_steps=1)
    return trainer, load_original.Sources(trainer.model, None, original_choice, schedule), update


def some_examples(number=8):
    random = np.random.default_rng(0)

    def example(i):
        targets = random.integers(2, 40, random.integers(2, 7)).astype(np.int32)
        return Example(
            inputs=random.integers(2, 40, 5).astype(np.int32),
            targets=targets,
            negative_pairs=np.array([[0, targets[0]]], np.int32),
            id=str(i),
        )

    return [example(i) for i in range(number)]


def in_rows_of_their_own(examples):
    return [(e, Place(row, row, 1, 0, 0, len(e.targets))) for row, e in enumerate(examples)]


@pytest.mark.parametrize("kind", settings.ORIGINALS)
def test_the_original_is_a_fixed_point_in_bfloat16(kind, tmp_path):
    """What is kept in bfloat16 is what every use casts to: not a bit of the logits changes."""
    with rooms.devices_seen(8):
        trainer, sources, update = made(kind, data=2, fsdp=2, model=2)
    examples = some_examples()
    original, start = load_original.load(
        trainer, sources, update, is_new=True, data=[examples], states_folder=str(tmp_path)
    )
    unmarked = [Example(e.inputs, e.targets, e.negative_pairs[:0]) for e in examples]
    batch = convert_features(unmarked, LENGTHS, 1)
    batch = original.with_states(batch, in_rows_of_their_own(examples))
    batch = sharding.put_batch(batch, trainer.model.mesh)
    _, sums = trainer.step(trainer.init_state(start), original.params, batch, jax.random.key(0))
    assert sums["loss"] == sums["gradient_norm"] == 0
    if kind != "cached":
        layer = original.params["decoder"]["layers"]
        assert layer["mlp"]["wo"]["kernel"].dtype == jnp.bfloat16
        assert layer["pre_mlp_layer_norm"]["scale"].dtype == jnp.float32


def test_states_are_those_of_the_tokens_that_are_kept(tmp_path):
    """Keyed by the tokens within the lengths: a longer target that is cut alike shares them."""
    states = OriginalStates(str(tmp_path), "one", LENGTHS)
    calls = []

    def states_of(batch):
        calls.append(batch)
        return {"states": batch["decoder_target_tokens"][..., None].astype(np.float32)}

    long = np.arange(2, 14, dtype=np.int32)
    pairs = np.zeros((0, 2), np.int32)
    examples = [
        Example(long, long, pairs, keeps_last_input=False),
        Example(long[:6], long[:8], pairs),
        Example(long, long[:3], pairs, keeps_last_input=False),
    ]
    original_cache.compute({"states": states}, [examples], states_of, batch_size=4)
    assert len(calls) == 1
    np.testing.assert_array_equal(states.of(examples[0])[:, 0], long[:8])
    np.testing.assert_array_equal(states.of(examples[1])[:, 0], long[:8])
    # Another process finds them, and adds what is new.
    later = OriginalStates(str(tmp_path), "one", LENGTHS)
    keys = [later.key(example) for example in examples]
    assert later.missing(keys) == set()
    more = Example(long[:2], long, pairs)
    assert later.missing([*keys, later.key(more)]) == {later.key(more)}
    feature = later.feature([(examples[2], 1, 2)], (2, 6))
    np.testing.assert_array_equal(feature[..., 0], [[0] * 6, [0, 0, *long[:3], 0]])
    # A part without its JSON was not finished, and does not count.
    for index in tmp_path.rglob("*.json"):
        index.unlink()
    assert OriginalStates(str(tmp_path), "one", LENGTHS).missing(keys) == {*keys}


def test_each_content_is_computed_once_whichever_data_set_has_it(tmp_path, monkeypatch):
    """Also where examples are looked for a few at a time."""
    monkeypatch.setattr(original_cache, "_KEYS_AT_A_TIME", 3)
    examples, batches = some_examples(10), []
    again = [dataclasses.replace(example, id="again") for example in examples[::-1]]

    def states_of(batch):
        batches.append({name: rows.shape for name, rows in batch.items()})
        tokens = batch["decoder_target_tokens"]
        computed.extend(map(tuple, tokens[tokens.any(axis=1)].tolist()))
        return {"states": tokens[..., None].astype(np.float32)}

    for data in (
        [[*examples, *again], []],
        [examples[:4], [*again, *examples]],
    ):
        computed = []
        states = OriginalStates(str(tmp_path / str(len(data[0]))), "one", LENGTHS)
        original_cache.compute({"states": states}, data, states_of, batch_size=4)
        assert len(computed) == len({*computed}) == 10
        for example in [*examples, *again]:
            np.testing.assert_array_equal(states.of(example)[:, 0], example.targets)
        original_cache.compute({"states": states}, data[::-1], states_of, batch_size=4)
        assert len(computed) == 10
    assert all(shapes == batches[0] for shapes in batches)  # or each would be compiled


def test_memory_does_not_grow_with_the_examples(tmp_path, monkeypatch):
    """But for the places of their states: examples have their long sets of ids written out."""
    monkeypatch.setattr(example_files, "_AT_A_TIME", 16)
    monkeypatch.setattr(original_cache, "_KEYS_AT_A_TIME", 64)
    monkeypatch.setattr(original_cache, "_TOKENS_PER_PART", 128)
    ids = tuple(range(10, 250))

    def states_of(batch):
        return {"states": batch["decoder_target_tokens"][..., None].astype(np.float32)}

    def peaks(number):
        """Bytes, of a first start, and of one that finds all states."""
        file = tmp_path / f"{number}.jsonl"
        rows = [
            {
                "inputs": f"{n:05}",
                "targets": "a room",
                "negative_token_ids": [[m, ids] for m in range(4)],
            }
            for n in range(number)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folder = str(tmp_path / "examples")
        examples = datasets.RecordFiles(
            files=str(file), vocabulary=tokenization.Bytes(), examples_dir=folder
        ).load(LENGTHS)
        assert isinstance(examples, ExampleTable)
        assert len(examples[0].negative_pairs) == 4 * len(ids)
        found = []
        for _ in range(2):
            states = OriginalStates(str(tmp_path / str(number)), "one", LENGTHS)
            tracemalloc.start()
            original_cache.compute({"states": states}, [examples, []], states_of, batch_size=8)
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return found

    peaks(8)
    (few, few_again), (more, more_again) = peaks(200), peaks(1000)
    assert more - few < 800 * 400  # marks alone take 7,680 bytes
    assert more_again - few_again < 800 * 40


def test_states_of_another_network_are_computed_again(tmp_path, capsys):
    """The same weights with another setting that no shape shows are another original."""
    cached = [
        {},
        {"mlp_activations": ("relu", "linear")},
        {"layer_norm_epsilon": 1e-2},
        {"float32_attention_logits": True},
        # These change how it is computed, and nothing else.
        {"scan_layers": False},
        {"remat_policy": "full"},
        {"dropout_rate": 0.5},
    ]
    computed = []
    for changes in cached:
        load_original.load(
            *made("cached", dataclasses.replace(CONFIG, **changes)),
            is_new=False,
            data=[some_examples()],
            states_folder=str(tmp_path),
        )
        computed.append("nothing to compute" not in capsys.readouterr().out)
    assert computed == [True] * 4 + [False] * 3


def test_an_input_that_is_cut_is_no_shorter_input(tmp_path):
    """At four tokens the first becomes 5 6 7 and an EOS, the second stays 5 6 7 8."""
    states = OriginalStates(str(tmp_path), "one", {"inputs": 4, "targets": 4})
    pairs, targets = np.zeros((0, 2), np.int32), np.array([9], np.int32)
    examples = [
        Example(np.array(ids, np.int32), targets, pairs)
        for ids in ([5, 6, 7, 8, 9, 1], [5, 6, 7, 8])
    ]
    assert len(states.missing([states.key(example) for example in examples])) == 2


def test_states_in_a_bucket_are_refused():
    folder = original_cache.default_folder(None, "gs://bucket/run")
    assert folder == "gs://bucket/run/original_states"
    for refusing in (
        lambda: OriginalStates("gs://bucket/states", "one", LENGTHS),
        lambda: original_cache.check_folder(folder),
        lambda: settings.OriginalChoice(path="x", kind="cached", states_dir="gs://bucket/states"),
    ):
        with pytest.raises(UsageError, match="STATES_DIR: expected a local folder"):
            refusing()


def test_a_folder_of_states_that_cannot_be_made_is_refused_before_data_are_read(capfd):
    pathlib.Path("broken.jsonl").write_text("{")
    cached = {"RECORDS": "broken.jsonl", "ORIGINAL": "cached"}
    train("early", status=2, **cached, STATES_DIR="corpus.jsonl/states")
    message = "STATES_DIR: expected a directory that can be written, found corpus.jsonl/states: "
    assert message in capfd.readouterr().err
    # An objective that needs no states needs no folder.
    for folder, objective in (("new/states", "tnrf"), ("corpus.jsonl/states", "ul_ll")):
        more = [f"objectives/{objective}.gin"]
        train("early", more, status=2, **cached, STATES_DIR=folder)
        assert "broken.jsonl:1: not JSON" in capfd.readouterr().err


def test_anything_but_an_adapter_is_not_trained_beside_the_original():
    params = {"layers_0": {"query": {"kernel": jnp.ones((2, 2))}}}
    trained = {"layers_0": {"query": {"bias": jnp.ones(2)}}}
    with pytest.raises(UsageError, match="found 1 other parameters to train: layers_0/query/bias"):
        Original(has_adapters=True).current_params(trained, params)


def test_an_adapter_adds_its_product_to_the_kernel():
    """The network with adapters is the network whose kernels have `scale * A @ B` added."""
    config = t5.T5Config(**{**CONFIG.__dict__, "dtype": "float32", "adapter_scale": 2.0})
    params = t5.T5(config).init(jax.random.key(0))
    added = adapters.init(jax.eval_shape(lambda: params), 4, jax.random.key(1))
    leaves, structure = jax.tree.flatten(added)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    added = structure.unflatten(
        [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )
    batch = convert_features(some_examples(), LENGTHS, 1)
    batch = jax.tree.map(jnp.asarray, batch)
    forward = t5_inputs.make_forward(config)

    def merged(tree, beside):
        if "kernel" in tree and adapters.ADAPTER_IN in beside:
            product = jnp.matmul(beside[adapters.ADAPTER_IN], beside[adapters.ADAPTER_OUT])
            return {"kernel": tree["kernel"] + 2.0 * product}
        return {
            name: merged(value, beside[name]) if name in beside else value
            for name, value in tree.items()
        }

    together = Original(has_adapters=True).current_params(added, params)
    found, wanted = forward(together, batch), forward(merged(params, added), batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(found - forward(params, batch)).max()) > 0.1


# ------------------------------------------------------------------------------ What is compiled


def an_optimizer():
    return optax.adam(RATE)


RATE = 1e-3


def test_runs_with_equal_settings_share_what_is_compiled(monkeypatch):
    def step(optimizer, **changed):
        update = settings.Update(
            batch_size=8, task_feature_lengths={"inputs": 4, "targets": 4}, optimizer=optimizer
        )
        return make_trainer(
            config=CONFIG,
            objective=objectives.named("TNFF"),
            original_choice=settings.OriginalChoice(path=None),
            update=dataclasses.replace(update, **changed),
        ).step

    first = step(an_optimizer)
    assert step(an_optimizer) is first
    # A setting, a number that the optimizer's own settings do not show, another function.
    assert step(an_optimizer, num_microbatches=2) is not first
    assert step(an_optimizer, max_gradient_norm=1.0) is not first
    assert step(lambda: optax.adam(RATE)) is not first
    monkeypatch.setitem(globals(), "RATE", 1e-2)
    assert step(an_optimizer) is not first
    assert step(functools.partial(optax.adam, 1e-3)) is step(functools.partial(optax.adam, 1e-3))
    assert step(functools.partial(optax.adam, 1e-3)) is not step(
        functools.partial(optax.adam, 2e-3)
    )


def test_a_schedule_of_the_user_is_asked_again():
    """Two functions of one name: what the first one did is no news of the second."""

    def update_of(schedule):
        how = settings.Update(
            batch_size=8,
            task_feature_lengths=LENGTHS,
            optimizer=functools.partial(optax.sgd, schedule),
        )
        optimizer = how.make_optimizer()
        params = jnp.ones(1)
        return optimizer.update(params, optimizer.init(params), params)[0].item()

    assert [update_of(lambda count: 0.5), update_of(lambda count: 0.25)] == [-0.5, -0.25]
