"""Where every array of a run lies, and what is said when it cannot."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from tnt_jax.models import sharding
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import optimizers

AXES = {
    "embedding": ("vocab", "embed"),
    "query": ("embed", "joined_kv"),
    "rel_embedding": ("heads", "relpos_buckets"),
    "scale": ("norm",),
    "wo": ("mlp", "embed"),
}
SHAPES = {
    "embedding": (40, 16),
    "query": (16, 24),
    "rel_embedding": (4, 32),
    "scale": (16,),
    "wo": (48, 16),
}
SPECS = {
    "embedding": PartitionSpec("model", "fsdp"),
    "query": PartitionSpec("fsdp", "model"),
    "rel_embedding": PartitionSpec("model", None),
    "scale": PartitionSpec(None),
    "wo": PartitionSpec("model", "fsdp"),
}


def abstract(shapes):
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sorted(shapes.items())
    }


def specs_of(shardings):
    return jax.tree.map(lambda x: x.spec, shardings)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, model=2))


# ------------------------------------------------------------------------------------------ Mesh


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (sharding.MeshShape(), (8, 1, 1)),
        (sharding.MeshShape(model=4), (2, 1, 4)),
        (sharding.MeshShape(fsdp=2, model=2), (2, 2, 2)),
        (sharding.MeshShape(data=1, model=8), (1, 1, 8)),
    ],
)
def test_a_mesh_uses_every_device(shape, sizes):
    mesh = sharding.make_mesh(shape)
    assert dict(mesh.shape) == dict(zip(sharding.MESH_AXES, sizes, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())


def found_in(data, fsdp, model):
    return f"DATA_DEVICES={data}, FSDP_DEVICES={fsdp}, MODEL_DEVICES={model}"


SIZES = [(3, 1, 2), (8, 1, 2), (4, 1, 1), (-1, 1, 3), (-1, 1, 16), (-1, 3, 1), (2, 8, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_mesh_that_is_not_the_devices_is_refused(sizes):
    data, fsdp, model = sizes
    with pytest.raises(
        UsageError,
        match=rf"the 8 devices here; found {found_in(data, fsdp, model)}\. Change one",
    ):
        sharding.make_mesh(sharding.MeshShape(data=data, fsdp=fsdp, model=model))


def test_devices_of_several_slices_are_refused():
    devices = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(UsageError, match=r"one slice of a TPU, found 2 slices"):
        sharding.make_mesh(sharding.MeshShape(), devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (1, 1, 0), (8, 1, -1), (1, 0, 1)])
def test_a_mesh_has_devices_on_each_axis(sizes):
    data, fsdp, model = sizes
    with pytest.raises(UsageError, match=f"found {found_in(data, fsdp, model)}"):
        sharding.MeshShape(data=data, fsdp=fsdp, model=model)


# ----------------------------------------------------------------------------------------- Batch


@pytest.mark.parametrize("batch_size", [0, -8, 4, 12, 20])
def test_a_batch_that_does_not_split_is_refused(batch_size, mesh):
    message = rf"BATCH_SIZE: .* data x fsdp devices = 2 x 4; found {batch_size}\."
    with pytest.raises(UsageError, match=message):
        sharding.check_batch_size(batch_size, 2, mesh)


def test_a_batch_that_splits_passes(mesh):
    sharding.check_batch_size(24, 2, mesh)
    with pytest.raises(UsageError, match="NUM_MICROBATCHES"):
        sharding.check_batch_size(24, 0, mesh)


def test_a_batch_lies_in_order_over_the_data_axis(mesh):
    batch = {"ids": np.arange(24).reshape(8, 3), "mask": np.arange(48).reshape(8, 3, 2)}
    placed = sharding.put_batch(batch, mesh)
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        for shard in placed[name].addressable_shards:
            row = np.flatnonzero(mesh.devices.ravel() == shard.device)[0] // 2
            np.testing.assert_array_equal(shard.data, rows[2 * row : 2 * row + 2])


def test_rows_go_where_the_mesh_has_them_whatever_the_order_of_its_devices(mesh):
    devices = np.random.default_rng(0).permutation(mesh.devices.ravel()).reshape(4, 2, 1)
    shuffled = jax.sharding.Mesh(devices, sharding.MESH_AXES)
    placed = sharding.put_batch({"ids": np.arange(24).reshape(8, 3)}, shuffled)["ids"]
    for shard in placed.addressable_shards:
        row = np.flatnonzero(devices.ravel() == shard.device)[0]
        np.testing.assert_array_equal(shard.data, [[3 * row, 3 * row + 1, 3 * row + 2]])


# ------------------------------------------------------------------------------------ Parameters


def test_parameters_are_split_by_the_rules(mesh):
    shardings = sharding.param_shardings(abstract(SHAPES), AXES, mesh)
    assert specs_of(shardings) == SPECS
    assert shardings["query"].shard_shape((16, 24)) == (8, 12)


@pytest.mark.parametrize(
    ("name", "shape", "axes", "message"),
    [
        ("wi", (16, 48), ("embed", "hidden"), r"parameter wi \(16, 48\) .* \('embed', 'hidden'\)"),
        ("wi", (16, 48), ("embed",), r"parameter wi .*: expected one for each dimension"),
        ("wi", (16, 48), ("mlp", "heads"), r"parameter wi: .*\('model', 'model'\).*twice"),
        ("rel", (3, 32), ("heads", "relpos_buckets"), r"rel: its 'heads' axis of 3 .* the 2 dev"),
    ],
)
def test_a_parameter_without_a_place_is_named(name, shape, axes, message, mesh):
    with pytest.raises(UsageError, match=message):
        sharding.param_shardings(abstract({name: shape}), {name: axes}, mesh)


# --------------------------------------------------------------------------------- Optimizer state

# What each optimizer keeps, by hand: a parameter's own sharding, or replicated (PartitionSpec()).
NONE = PartitionSpec()
OPTIMIZERS = {
    "adamw": (optax.adamw(1e-3), {"mu": SPECS, "nu": SPECS}),
    "momentum": (optax.sgd(1e-3, momentum=0.9), {"trace": SPECS}),
    "adafactor": (
        optax.adafactor(1e-3, min_dim_size_to_factor=8),
        # `rel_embedding`, 4 x 32, is too narrow to be factored, and a vector never is.
        {
            "v": dict.fromkeys(SPECS, NONE)
            | {"rel_embedding": SPECS["rel_embedding"], "scale": SPECS["scale"]},
            "v_row": dict.fromkeys(SPECS, NONE),
            "v_col": dict.fromkeys(SPECS, NONE),
        },
    ),
    "adafactor, not factored": (
        optax.adafactor(1e-3, min_dim_size_to_factor=128),
        {"v": SPECS, "v_row": dict.fromkeys(SPECS, NONE), "v_col": dict.fromkeys(SPECS, NONE)},
    ),
    "clipped, one rate per group": (
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.multi_transform(
                {"fast": optax.sgd(1e-2, momentum=0.9), "slow": optax.adam(1e-4)},
                {name: "slow" if name == "embedding" else "fast" for name in SHAPES},
            ),
        ),
        {
            "trace": {name: SPECS[name] for name in SPECS if name != "embedding"},
            "mu": {"embedding": SPECS["embedding"]},
            "nu": {"embedding": SPECS["embedding"]},
        },
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_state_is_split_as_its_parameters(name, mesh):
    optimizer, expected = OPTIMIZERS[name]
    params = abstract(SHAPES)
    state = jax.eval_shape(optimizer.init, params)
    shardings = sharding.optimizer_shardings(
        state, params, sharding.param_shardings(params, AXES, mesh), mesh
    )
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    found = {}
    for path, leaf in jax.tree.leaves_with_path(shardings):
        *_, field, param = ["", *re.findall(r"\w+", jax.tree_util.keystr(path))]
        if param in SHAPES:
            found.setdefault(field, {})[param] = leaf.spec
        else:
            assert leaf.spec == NONE, path
    assert found == expected


@pytest.mark.parametrize("make", [optimizers.adafactor, optax.adafactor, optax.adamw])
def test_the_state_of_stacked_layers_is_split_as_they_are(make, mesh):
    layers = {name: shape for name, shape in SHAPES.items() if name != "embedding"}
    params = {"decoder": {"layers": abstract({name: (3, *layers[name]) for name in layers})}}
    axes = {"decoder": {"layers": {name: ("layers", *AXES[name]) for name in layers}}}
    of_params = sharding.param_shardings(params, axes, mesh)
    expected = {name: PartitionSpec(None, *SPECS[name]) for name in layers}
    assert specs_of(of_params["decoder"]["layers"]) == expected
    for settings in [{"min_dim_size_to_factor": 8}, {}] if make is not optax.adamw else [{}]:
        state = jax.eval_shape(make(1e-3, **settings).init, params)
        shardings = sharding.optimizer_shardings(state, params, of_params, mesh)
        for (path, leaf), where in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
        ):
            name = re.findall(r"\w+", jax.tree_util.keystr(path))[-1]
            is_whole = name in layers and leaf.shape == (3, *layers[name])
            assert where.spec == (expected[name] if is_whole else NONE), (path, leaf)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (lambda params: {"gram": jnp.zeros((16, 16))}, r"gram \(16, 16\)"),
        (lambda params: {"gram": {"wo": jnp.zeros((48, 48))}}, r"gram/wo \(48, 48\)"),
        (lambda params: {"all": jnp.zeros(1000)}, r"all \(1000,\)"),
    ],
)
def test_an_optimizer_state_without_a_place_is_named(init, message, mesh):
    params = abstract(SHAPES)
    with pytest.raises(UsageError, match=f"optimizer state {message} has no sharding"):
        sharding.optimizer_shardings(
            jax.eval_shape(init, params),
            params,
            sharding.param_shardings(params, AXES, mesh),
            mesh,
        )
