"""Checkpoints come back bit by bit on any mesh, and only where they fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils

from tnt_jax.checkpoints import checkpoint_kinds, digests, lazy_arrays, orbax
from tnt_jax.models import parameters, sharding
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import run_checkpoints, settings, train_step

LOGICAL_AXES = {
    "decoder": {"norm": {"scale": ("embed",)}, "wi": {"kernel": ("embed", "mlp")}},
    "embedding": ("vocab", "embed"),
    "out": ("mlp", "embed"),
}
SHAPES = {
    "decoder": {"norm": {"scale": (8,)}, "wi": {"kernel": (8, 16)}},
    "embedding": (12, 8),
    "out": (16, 8),
}
RUN = {"original": {"path": "there", "digest": "00ff"}, "objective": {"negative_weight": 1.5}}

adafactor = functools.partial(optax.adafactor, 1e-3, min_dim_size_to_factor=8)


def mesh_of(model):
    return sharding.make_mesh(sharding.MeshShape(model=model))


def fill(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: random.normal(size=x.shape, scale=9).astype(x.dtype), tree)


def make_params(mesh, seed=0):
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    shardings = sharding.param_shardings(shapes, LOGICAL_AXES, mesh)
    return jax.device_put(fill(shapes, seed), shardings)


def make_state(mesh, optimizer, step=3):
    """A state with random numbers in every array, each with the sharding of a real run."""
    params = make_params(mesh)
    opt_state = fill(jax.eval_shape(optimizer.init, params), seed=1)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return train_step.TrainState(
        step=jax.device_put(jnp.int32(step), sharding.replicated(mesh)),
        params=params,
        opt_state=jax.device_put(
            opt_state, sharding.optimizer_shardings(opt_state, params, shardings, mesh)
        ),
    )


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, expected_leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == expected_leaf.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(expected_leaf).tobytes()


def save(model_dir, *states):
    with run_checkpoints.Checkpoints(str(model_dir)) as saved:
        for state in states:
            saved.save(state, RUN)


def restore_params(path, wanted):
    item = checkpoint_kinds.find(str(path)) / "params"
    lazy_arrays.check(orbax.lazy_item(item), wanted, str(item.parent), "the model settings")
    return orbax.restore_item(item, wanted)


@pytest.mark.parametrize(
    "optimizer",
    [
        adafactor(),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        optax.sgd(1e-3),
    ],
    ids=["adafactor", "clipped adamw", "sgd"],
)
def test_what_is_restored_on_another_mesh_is_what_was_saved(optimizer, tmp_path):
    state = make_state(mesh_of(model=2), optimizer)
    save(tmp_path / "new" / "model", state)
    wanted = abstract(make_state(mesh_of(model=4), optimizer))
    with run_checkpoints.Checkpoints(str(tmp_path / "new" / "model")) as saved:
        assert saved.latest_step() == 3
        assert saved.run_of(3) == RUN
        restored = saved.restore(3, wanted)
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, wanted
    )


def test_a_checkpoint_holds_the_state_as_it_was_when_training_went_on(tmp_path):
    state = make_state(mesh_of(model=2), adafactor())
    expected = jax.tree.map(np.array, state.params)
    update = jax.jit(
        lambda state: state.replace(params=jax.tree.map(lambda x: x + 1, state.params)),
        donate_argnums=0,
    )
    with run_checkpoints.Checkpoints(str(tmp_path)) as saved:
        saved.save(state, RUN)
        for _ in range(3):  # while it is written, its buffers are given away
            state = update(state)
    found = restore_params(str(tmp_path), abstract(state.params))
    assert_same(found, expected)


def test_the_last_checkpoints_stay(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    save(tmp_path, *(state.replace(step=jnp.int32(step)) for step in (2, 10, 9_999, 10_000)))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_9999", "checkpoint_10000"}
    with run_checkpoints.Checkpoints(str(tmp_path)) as saved:
        assert saved.latest_step() == 10_000


def test_every_so_many_and_the_best_stay_too(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 6.0, 6: 3.1, 7: 9.0, 8: 7.0}

    def go_on(steps):
        # As after a stop: what is best is known of the checkpoints themselves.
        with run_checkpoints.Checkpoints(
            str(tmp_path), settings.Keep(checkpoints=1, every=3, best="loss")
        ) as saved:
            for step in steps:
                metrics = {"loss": losses[step], "num_tokens": 7.0}
                saved.save(state.replace(step=jnp.int32(step)), RUN, metrics)
            return saved.best_step()

    def kept():
        return {int(path.name.removeprefix("checkpoint_")) for path in tmp_path.iterdir()}

    assert go_on([1, 2, 3, 4]) == 2
    assert kept() == {2, 3, 4}
    assert go_on([5, 6]) == 2
    assert kept() == {2, 3, 6}
    losses[7] = 2.0
    assert go_on([7, 8]) == 7
    assert kept() == {3, 6, 7, 8}
    assert checkpoint_kinds.find(str(tmp_path)).name == "checkpoint_8"


@pytest.mark.parametrize("stops", [(), (35,), (35, 37)])
def test_a_stop_leaves_the_best_checkpoint_where_it_is(stops, tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    # A stop falls on an evaluation that is better than that of any checkpoint.
    losses = {10: 0.3, 20: 0.9, 30: 0.8, 35: 0.1, 37: 0.2, 40: 0.7, 50: 0.7}

    def kept():
        return {int(path.name.removeprefix("checkpoint_")) for path in tmp_path.iterdir()}

    def go_on(steps):
        with run_checkpoints.Checkpoints(
            str(tmp_path), settings.Keep(checkpoints=2, best="loss")
        ) as saved:
            if (newest := saved.latest_step()) is not None:
                saved.restore(newest, abstract(state))
            for step in steps:
                at_step = state.replace(step=jnp.int32(step))
                metrics = {"loss": losses[step]}
                saved.save(at_step, RUN, metrics, is_of_stop=step in stops)
            return saved.best_step()

    steps = [10, 20, 30]
    for stop in stops:
        go_on([*steps, stop])
        assert kept() == {10, 20, 30, stop}
        steps = []
    assert go_on([*steps, 40, 50]) == 10
    assert kept() == {10, 40, 50}


def test_what_is_no_number_is_never_the_best(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    losses = {1: 0.5, 2: 0.9, 3: float("nan"), 4: 0.8, 5: float("-inf"), 6: None, 7: 0.7}
    with run_checkpoints.Checkpoints(
        str(tmp_path), settings.Keep(checkpoints=1, best="loss")
    ) as saved:
        for step, loss in losses.items():
            metrics = {} if loss is None else {"loss": loss}
            saved.save(state.replace(step=jnp.int32(step)), RUN, metrics)
            assert saved.best_step() == 1
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_1", "checkpoint_7"}


def test_nothing_is_best_by_what_no_checkpoint_has(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    with run_checkpoints.Checkpoints(
        str(tmp_path), settings.Keep(best="eval/negative_mass")
    ) as saved:
        assert saved.best_step() is None
        for step, metrics in enumerate(({}, {"eval/negative_mass": float("nan")}), start=1):
            saved.save(state.replace(step=jnp.int32(step)), RUN, metrics)
            assert saved.best_step() is None
        saved.save(state.replace(step=jnp.int32(3)), RUN, {"eval/negative_mass": 0.5})
        assert saved.best_step() == 3


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_state_goes_to_fewer_devices_and_back(num_devices, tmp_path):
    state = make_state(mesh_of(model=2), adafactor())
    shape = sharding.MeshShape(model=num_devices)
    few = make_state(sharding.make_mesh(shape, jax.devices()[:num_devices]), adafactor())
    save(tmp_path, state)
    with run_checkpoints.Checkpoints(str(tmp_path)) as saved:
        on_few = saved.restore(3, abstract(few))
        assert_same(on_few, state)
        assert on_few.params["out"].sharding == few.params["out"].sharding
        saved.save(on_few.replace(step=on_few.step + 1), RUN)
    with run_checkpoints.Checkpoints(str(tmp_path)) as saved:
        assert_same(saved.restore(4, abstract(state)).params, state.params)


def test_a_half_written_checkpoint_is_not_the_newest(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    save(tmp_path, state, state.replace(step=jnp.int32(7)))
    # As a process leaves it that is killed while it writes: Orbax renames at the very end.
    (tmp_path / "checkpoint_7").rename(tmp_path / "checkpoint_7.orbax-checkpoint-tmp")
    assert checkpoint_kinds.find(str(tmp_path)).name == "checkpoint_3"
    with run_checkpoints.Checkpoints(str(tmp_path)) as saved:
        assert saved.latest_step() == 3
        saved.save(state.replace(step=jnp.int32(7)), RUN)  # the leftovers are not in the way
    assert checkpoint_kinds.find(str(tmp_path)).name == "checkpoint_7"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_3", "checkpoint_7"}


def test_parameters_go_to_another_mesh_and_dtype(tmp_path):
    state = make_state(mesh_of(model=2), adafactor())
    save(tmp_path, state)
    wanted = abstract(make_params(mesh_of(model=4)))
    found = restore_params(str(tmp_path), wanted)
    assert_same(found, state.params)
    assert found["embedding"].sharding == wanted["embedding"].sharding
    wanted["out"] = jax.ShapeDtypeStruct(
        wanted["out"].shape, jnp.bfloat16, sharding=wanted["out"].sharding
    )
    found = restore_params(str(tmp_path / "checkpoint_3"), wanted)
    np.testing.assert_array_equal(found["out"], state.params["out"].astype(jnp.bfloat16))


def test_a_checkpoint_of_another_model_names_every_parameter_that_differs(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    save(tmp_path, state)
    wanted = abstract(state.params)
    of = wanted["embedding"].sharding
    wanted["embedding"] = jax.ShapeDtypeStruct((13, 8), jnp.float32, sharding=of)
    wanted["decoder"]["wi_0"] = wanted["decoder"].pop("wi")
    message = (
        r"checkpoint_3 does not fit the model settings: "
        r"decoder/wi_0/kernel is missing; decoder/wi/kernel is unexpected; "
        r"embedding is \(12, 8\) instead of \(13, 8\)\. Expected"
    )
    with pytest.raises(UsageError, match=message):
        restore_params(str(tmp_path), wanted)
    with (
        pytest.raises(UsageError, match=message),
        run_checkpoints.Checkpoints(str(tmp_path)) as saved,
    ):
        saved.restore(3, abstract(state).replace(params=wanted))


@pytest.mark.parametrize(
    ("optimizer", "difference"),
    [
        (optax.adamw(1e-3), r"0/mu/decoder/norm/scale is missing.*0/nu/out is missing"),
        (optax.sgd(1e-3), r"0/count is unexpected"),
        # The same names, but another shape of statistics.
        (optax.adafactor(1e-3), r"0/v/embedding is \(1,\) instead of \(12, 8\)"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_refused(optimizer, difference, tmp_path):
    mesh = mesh_of(model=1)
    save(tmp_path, make_state(mesh, adafactor()))
    with (
        run_checkpoints.Checkpoints(str(tmp_path)) as saved,
        pytest.raises(UsageError, match=f"does not fit OPTIMIZER: .*{difference}"),
    ):
        saved.restore(3, abstract(make_state(mesh, optimizer)))


@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_run_goes_on_with_its_layers_as_it_has_them(is_scanned, tmp_path):
    layer = {"scale": jnp.ones(4)}
    apart = {"encoder": {"layers_0": layer, "layers_1": layer}}
    states = [
        train_step.init_state(params, adafactor())
        for params in (apart, parameters.stack_layers(apart))
    ]
    save(tmp_path, states[is_scanned])
    message = (
        f"scan_layers: expected {is_scanned}, .* found {not is_scanned}. "
        f"Set SCAN_LAYERS = {is_scanned}; .*checkpoint_0 as INITIAL_CHECKPOINT_PATH"
    )
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states[not is_scanned])
    with (
        run_checkpoints.Checkpoints(str(tmp_path)) as saved,
        pytest.raises(UsageError, match=message),
    ):
        saved.restore(0, other)


def test_parameters_alone_are_no_run_to_go_on_with(tmp_path):
    state = make_state(mesh_of(model=1), optax.sgd(1e-3))
    save(tmp_path / "run", state)
    (tmp_path / "alone").mkdir()
    (tmp_path / "run" / "checkpoint_3" / "params").rename(tmp_path / "params")
    (tmp_path / "alone" / "checkpoint_3").mkdir()
    (tmp_path / "params").rename(tmp_path / "alone" / "checkpoint_3" / "params")
    assert_same(restore_params(str(tmp_path / "alone"), abstract(state.params)), state.params)
    with run_checkpoints.Checkpoints(str(tmp_path / "alone")) as saved:
        with pytest.raises(UsageError, match=r"has no `run`.*INITIAL_CHECKPOINT_PATH"):
            saved.run_of(3)
        with pytest.raises(UsageError, match=r"has no `optimizer`.*INITIAL_CHECKPOINT_PATH"):
            saved.restore(3, abstract(state))


def test_a_model_directory_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=f"MODEL_DIR: .*{path}"):
            run_checkpoints.Checkpoints(str(path))
    with pytest.raises(UsageError, match="KEEP_CHECKPOINTS: expected at least 1, found 0"):
        settings.Keep(checkpoints=0)


def test_the_digest_is_the_same_on_every_mesh():
    found = {digests.of_params(make_params(mesh_of(model))) for model in (1, 2, 4)}
    found.add(digests.of_params(jax.tree.map(np.asarray, make_params(mesh_of(1)))))
    assert len(found) == 1
    assert len(found.pop()) == 16


def test_the_digest_sees_every_change():
    # Round numbers, whose bit patterns end in zeros: weaker sums let such changes through.
    a = np.ones((64, 32), np.float32)
    a[1, 0] = 2.0
    params = {"a": a, "b": 2 * np.ones((64, 32), np.float32), "scale": np.zeros(3, np.float32)}

    def changed(name, index, value):
        array = params[name].copy()
        array[index] = value
        return params | {name: array}

    def moved(row, column):
        array = np.ones_like(a)
        array[row, column] = 2.0
        return params | {"a": array}

    flipped = a.copy()
    flipped.view(np.uint32)[63, 31] ^= 1
    variants = [
        params,
        params | {"a": flipped},
        changed("a", (5, 5), -1.0),
        changed("scale", 0, -0.0),
        params | {"a": params["b"], "b": params["a"]},
        params | {"a": a.reshape(32, 64)},
        {"A": params["a"]} | {name: params[name] for name in ("b", "scale")},
        *(moved(i // 32, i % 32) for i in range(0, 2048, 64) if i != 32),
    ]
    assert len({digests.of_params(variant) for variant in variants}) == len(variants)


def test_orbax_asks_nobody_whether_to_stop(tmp_path, monkeypatch):
    """JAX would take the number of the checkpoint for one of the loop's questions."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    save(tmp_path / "model", make_state(mesh_of(model=2), optax.sgd(1e-3)))
    assert checkpoint_kinds.find(str(tmp_path / "model"))
    assert asked == []
