"""The last layers alone are trained: what is cached below them changes no loss and no gradient."""

import contextlib
import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from helpers import rooms
from helpers.tiny_llama import LLAMA

from tnt_jax import objectives, precompile
from tnt_jax.data.batches import Batches, batch_for_eval, feature_shapes
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import sharding, t5
from tnt_jax.models.causal_lm_config import LayerKind
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import load_original, original_cache, originals, settings, train_step
from tnt_jax.training.trainer import jit_eval_step, jit_token_step, make_trainer

# Layers that differ, and an output matrix of its own.
MIXED = dataclasses.replace(
    LLAMA,
    logits_via_embedding=False,
    num_layers=3,
    layer_kinds=(LayerKind(window=3), LayerKind(rope_theta=None), LayerKind(rope_factor=4.0)),
    layer_pattern=(0, 1, 2),
    norms="pre_and_post",
    final_softcap=3.0,
)
T5 = t5.T5Config(
    vocab_size=40,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=32,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
)
LENGTHS = {"inputs": 10, "targets": 8}
TNRF = objectives.TntObjective(negative_term="reverse_kl", positive_term="forward_kl")
ULLL = objectives.TntObjective(negative_term="unlikelihood", positive_term="log_likelihood")


def some_examples(beginning=()):
    """Two of them fill a packed row's targets; all inputs begin as they are told to."""
    random = np.random.default_rng(0)
    rows = [random.integers(2, 40, (2, 5)).astype(np.int32) for _ in range(8)]
    return [
        Example(
            np.array([*beginning, *inputs], np.int32),
            targets[:4],
            np.array([[1, targets[1]]], np.int32),
            id=str(i),
        )
        for i, (inputs, targets) in enumerate(rows)
    ]


def made(kind, config, trained_layers, objective=TNRF, num_devices=1, mesh_shape=None, **update):
    how = settings.Update(
        **{"batch_size": 8, "task_feature_lengths": LENGTHS, "optimizer": SGD} | update,
        mesh_shape=mesh_shape,
    )
    adapters = {"adapter_rank": 2, "adapter_alpha": 4.0} if kind.startswith("adapters") else {}
    choice = settings.OriginalChoice(
        path=None, kind=kind, trained_layers=trained_layers, **adapters
    )
    with rooms.devices_seen(num_devices):
        trainer = make_trainer(
            config=config, objective=objective, original_choice=choice, update=how
        )
    schedule = settings.Schedule(train_steps=1)
    return trainer, load_original.Sources(trainer.model, None, choice, schedule), how


SGD = optax.sgd(1.0)  # an update is the gradient


def moved(path, leaf):
    """A parameter away from where it started, by its name: adapters do something."""
    random = np.random.default_rng(zlib.crc32(sharding.path_name(path).encode()))
    return leaf + jnp.asarray(0.1 * random.normal(size=leaf.shape), jnp.float32)


def gradients(folder, *arguments, only=None, examples=None, num_shared=0, **settings):
    """The sums of an update, and the gradient of each trained parameter, by name.

    Parameters that `only` does not name begin where the original's are.
    """
    trainer, sources, update = made(*arguments, **settings)
    examples = examples or some_examples()
    loaded, start = load_original.load(
        trainer, sources, update, is_new=True, data=[examples], states_folder=str(folder)
    )
    start = jax.tree.map_with_path(
        lambda path, x: moved(path, x) if only is None or sharding.path_name(path) in only else x,
        start,
    )
    before = jax.tree.map(np.asarray, start)
    batches = Batches(
        examples,
        update.batch_size,
        update.task_feature_lengths,
        seed=0,
        pack=update.pack,
        feature_layout=trainer.model.network.feature_layout,
        num_shared=num_shared,
    )
    placed = [(examples[at.example], at) for at in batches.read(0).places]
    batch = loaded.with_states(batches.batch(0), placed)
    assert sorted(trainer.state_features) == sorted(batch.keys() - batches.batch(0).keys())
    state, sums = trainer.step(
        trainer.init_state(start),
        loaded.params,
        sharding.put_batch(batch, trainer.model.mesh),
        jax.device_put(jax.random.key(0), sharding.replicated(trainer.model.mesh)),
    )
    found = jax.tree.map(lambda was, now: was - np.asarray(now), before, state.params)
    return jax.device_get(sums), traverse_util.flatten_dict(found, sep="/")


def assert_close(one, other):
    for name in ("loss", "gradient_norm", "num_tokens", "negative_mass"):
        np.testing.assert_allclose(one[0][name], other[0][name], rtol=1e-5)
    assert one[0]["gradient_norm"] > 1e-3
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        np.testing.assert_allclose(gradient, other[1][name], rtol=1e-3, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("config", "trained_layers", "objective"),
    [(LLAMA, 1, TNRF), (MIXED, 2, TNRF), (MIXED, 3, ULLL), (T5, 1, ULLL), (T5, 2, TNRF)],
    ids=["llama", "mixed", "mixed, every layer", "t5", "t5, the whole decoder"],
)
def test_the_gradient_is_that_part_of_the_whole_models(config, trained_layers, objective, tmp_path):
    """Whatever is cached, and with an objective that needs the original for what is below alone."""
    found = gradients(tmp_path, "parameters", config, trained_layers, objective)
    assert len({name.split("/")[1] for name in found[1]}) == trained_layers
    _, whole = gradients(tmp_path, "parameters", config, None, objective, only=found[1])
    for name, gradient in found[1].items():
        np.testing.assert_allclose(gradient, whole[name], rtol=1e-3, atol=2e-6, err_msg=name)
    assert_close(gradients(tmp_path, "cached", config, trained_layers, objective), found)


@pytest.mark.parametrize(
    ("config", "trained_layers"),
    [(LLAMA, 1), (MIXED, None), (T5, 1), (T5, 2)],
    ids=["llama", "mixed, everywhere", "t5", "t5, the whole decoder"],
)
def test_adapters_learn_the_same_from_cached_states(config, trained_layers, tmp_path):
    found = gradients(tmp_path, "adapters_cached", config, trained_layers)
    assert_close(found, gradients(tmp_path, "adapters_off", config, trained_layers))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("kind", ["cached", "adapters_cached"])
def test_states_of_rows_that_begin_alike(kind, devices, tmp_path, monkeypatch):
    """States and gradients are the same, whether their beginning is computed once or in each."""
    settings = {
        "examples": some_examples(beginning=range(20, 28)),
        "task_feature_lengths": {"inputs": 13, "targets": 8},
        "num_devices": devices,
        "mesh_shape": None if devices == 1 else sharding.MeshShape(data=2, fsdp=2, model=2),
    }
    assert CAUSAL.num_shared(settings["examples"], settings["task_feature_lengths"]) == 8
    seen, batch_of = [], original_cache.OriginalStates.batch

    def batch(self, examples, batch_size, num_shared):
        seen.append(num_shared)
        return batch_of(self, examples, batch_size, num_shared)

    with monkeypatch.context() as patched:
        patched.setattr(original_cache.OriginalStates, "batch", batch)
        found = gradients(tmp_path / "one", kind, MIXED, 1, num_shared=8, **settings)
    monkeypatch.setattr(type(CAUSAL), "num_shared", lambda *_: 0)
    apart = gradients(tmp_path / "other", kind, MIXED, 1, **settings)
    assert_close(found, apart)
    assert seen == [8]
    one, other = (
        sorted((tmp_path / name).rglob("part_*.npy"), key=lambda path: path.stat().st_size)
        for name in ("one", "other")
    )
    assert len(one) == len(other) == 2
    for pair in zip(one, other, strict=True):
        np.testing.assert_allclose(*map(np.load, pair), atol=1e-5)


@pytest.mark.parametrize(("config", "trained_layers"), [(MIXED, 1), (T5, 1)], ids=["mixed", "t5"])
@pytest.mark.parametrize("kind", ["cached", "adapters_cached"])
def test_packed_rows_devices_and_microbatches(kind, config, trained_layers, tmp_path):
    apart = gradients(tmp_path, kind, config, trained_layers)
    together = gradients(
        tmp_path,
        kind,
        config,
        trained_layers,
        num_devices=8,
        mesh_shape=sharding.MeshShape(data=2, fsdp=2, model=2),
        batch_size=4,
        pack=True,
    )
    assert_close(together, apart)
    parts = gradients(tmp_path, kind, config, trained_layers, num_microbatches=4)
    assert_close(parts, apart)


@pytest.mark.parametrize("kind", ["parameters", "cached", "adapters_cached"])
@pytest.mark.parametrize("config", [MIXED, T5], ids=["mixed", "t5"])
def test_frozen_layers_are_where_the_step_does_not_look(kind, config, tmp_path):
    """What the step is given has no layer that it does not compute, and no second one."""
    trainer, sources, update = made(kind, config, 1)
    examples = some_examples()
    load = functools.partial(
        load_original.load, trainer, sources, update, data=[examples], states_folder=str(tmp_path)
    )
    loaded, start = load(is_new=True)
    last = f"layers_{getattr(config, trainer.model.network.stacks['decoder']) - 1}"
    layers = {name for name in loaded.params["decoder"] if name.startswith("layers_")}
    if kind == "parameters":
        assert len(layers) > 1
    else:
        assert layers == ({last} if kind == "adapters_cached" else set())
        assert loaded.params.keys() == {"decoder"}
        assert loaded.whole is None
    assert start["decoder"].keys() == {last}
    # What speaks on the way has all of the model.
    whole = load(is_new=False, keeps_whole=True)[0].whole
    assert jax.tree.structure(whole) == jax.tree.structure(trainer.model.abstract_params)


def test_neither_model_is_computed_below(optimised):
    """Counted in forward passes of one layer, for a model of 8 of which 2 have adapters.

    In one update: 8 for the model, 2 for its original, 2 for the gradient. Cached: 2 and 2.
    """

    def flops(kind, num_layers):
        config = dataclasses.replace(LLAMA, num_layers=num_layers)
        trainer, _, update = made(kind, config, 2)
        layout = trainer.model.network.feature_layout
        shapes = feature_shapes(LENGTHS, update.batch_size, 1, pack=False, feature_layout=layout)
        compiled = trainer.lower(trainer.abstract_batch(shapes)).compile()
        return compiled.cost_analysis()["flops"]

    whole = flops("adapters_off", 8)
    of_layer = flops("adapters_off", 9) - whole
    assert of_layer > whole / 20
    saved = whole - flops("adapters_cached", 8)
    np.testing.assert_allclose(saved / of_layer, 6 + 2, rtol=0.1)


@pytest.mark.parametrize("kind", ["cached", "adapters_cached"])
def test_a_step_with_cached_states_is_compiled_for_devices(kind):
    """Its batch has the states; what is counted is what the step is given."""
    _, _, update = made(kind, T5, 1, num_devices=8, mesh_shape=sharding.MeshShape(data=8))
    report = precompile.compile_step(
        jax.devices(),
        model=T5,
        objective=TNRF,
        update=update,
        original_choice=settings.OriginalChoice(path=None, kind=kind, trained_layers=1),
    )
    of_row = 4 * (10 + 4 * 8) + 4 * 16 * (10 + 8 + 8)  # ids and marks; the encoder's, below, above
    assert report["bytes"]["batch"] == of_row
    assert report["bytes"]["temporaries"] > 0


@pytest.mark.parametrize(
    ("config", "num_shared", "said"),
    [(LLAMA, 8, None), (LLAMA, 10, "the 10 tokens"), (LLAMA, -8, "found -8"), (T5, 8, "found 8")],
    ids=str,
)
def test_a_step_is_compiled_for_rows_that_begin_alike(config, num_shared, said):
    _, _, update = made("parameters", config, None)
    refused = pytest.raises(UsageError, match=f"^precompile.num_shared: .* {said}")
    with contextlib.nullcontext() if said is None else refused:
        report = precompile.compile_step(
            jax.devices()[:1],
            model=config,
            objective=TNRF,
            update=update,
            original_choice=settings.OriginalChoice(path=None),
            num_shared=num_shared,
        )
        # Of each of 8 rows the tokens, segments and positions; of its response the places, tokens,
        # loss mask and marks; and what all rows begin with.
        assert report["bytes"]["batch"] == 4 * 8 * (3 * 18 + 8 + 3 * 8 + num_shared)


@pytest.mark.parametrize("objective", [ULLL, TNRF], ids=["UL+LL", "TNRF"])
@pytest.mark.parametrize("trained_layers", [None, 1])
@pytest.mark.parametrize("kind", settings.ORIGINALS)
def test_every_kind_is_evaluated(kind, trained_layers, objective):
    """With the original's logits where an objective compares with it, or they are there anyway."""
    trainer, _, update = made(kind, T5, trained_layers, objective)
    layout = trainer.model.network.feature_layout
    shapes = feature_shapes(LENGTHS, update.batch_size, 1, pack=False, feature_layout=layout)
    sums = jax.eval_shape(
        jit_eval_step(trainer.model, objective, trainer.original_kind),
        trainer.abstract_params,
        trainer.abstract_original,
        trainer.abstract_batch(shapes),
    )
    assert {"loss", "negative_mass"} < sums.keys()
    # A model with adapters is its own original without them.
    assert ("positive_kl" in sums) == (objective is TNRF or kind == "adapters_off")
    found = [name for name in train_step.MEAN_OVER if name in sums]
    assert trainer.measured(is_training=False) == found


def test_settings_that_do_not_fit(tmp_path):
    with pytest.raises(UsageError, match=r"DROPOUT_RATE: expected 0 .*; found 0\.1\."):
        made("cached", dataclasses.replace(T5, dropout_rate=0.1), 1)
    with pytest.raises(UsageError, match=r"TRAINED_LAYERS: .* 1 to 2, .* found 3\."):
        made("cached", T5, 3)[0].abstract_params  # noqa: B018
    with pytest.raises(UsageError, match=r"TRAINED_LAYERS=1: expected SCAN_LAYERS=False, "):
        made("cached", dataclasses.replace(T5, scan_layers=True), 1)[0].abstract_params  # noqa: B018


def changed_in(params, *paths):
    """The same parameters, but for one number of each of these."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in paths:
        flat[path] = flat[path].at[(0,) * flat[path].ndim].add(0.5)
    return traverse_util.unflatten_dict(flat, sep="/")


OF_LAYER = {
    "mixed": (MIXED, "decoder/layers_{}/self_attention/query/kernel"),
    "t5": (T5, "decoder/layers_{}/encoder_decoder_attention/query/kernel"),
}


@pytest.mark.parametrize("layers", [(), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("name", OF_LAYER)
def test_two_models_are_compared_by_what_differs(name, layers, optimised):
    """The values of every token are those of both models computed whole, for less work."""
    config, path = OF_LAYER[name]
    trainer, *_ = made("parameters", config, None)
    model, layout = trainer.model, trainer.model.network.feature_layout
    original = model.init(0)
    current = changed_in(original, *(path.format(layer) for layer in layers))
    kind, own = originals.what_differs(original, current)
    num_layers = getattr(config, model.network.stacks["decoder"])
    assert kind.trained_layers == num_layers - min(layers, default=num_layers - 1)
    assert own["decoder"].keys() == {
        f"layers_{number}" for number in range(num_layers - kind.trained_layers, num_layers)
    }
    batch = next(iter(batch_for_eval(some_examples(), 8, LENGTHS, feature_layout=layout)))
    placed = sharding.put_batch(batch, model.mesh)
    step, whole = (jit_token_step(model, TNRF, of) for of in (kind, originals.PARAMETERS))
    _, found = step(own, original, placed)
    _, expected = whole(current, original, placed)
    for of_part, of_whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(of_part, of_whole, rtol=1e-4, atol=1e-6)
    if layers:
        assert float(jnp.abs(expected.losses).max()) > 1e-3
    if layers != (0, 1) or config is T5:  # else all layers differ, and nothing is shared
        counted = [
            of.lower(params, original, placed).compile().cost_analysis()["flops"]
            for of, params in ((step, own), (whole, current))
        ]
        assert counted[0] < 0.85 * counted[1]


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (MIXED, "decoder/decoder_norm/scale"),
        (T5, "encoder/layers_1/mlp/wo/kernel"),
        (T5, "token_embedder/embedding"),
        (dataclasses.replace(T5, scan_layers=True), "decoder/layers/mlp/wo/kernel"),
    ],
    ids=["norm", "encoder", "embedding", "stacked"],
)
def test_models_that_differ_below_are_compared_whole(config, path):
    model = made("parameters", config, None)[0].model
    original = model.init(0)
    current = changed_in(original, path)
    kind, own = originals.what_differs(original, current)
    assert kind is originals.PARAMETERS
    assert own is current
