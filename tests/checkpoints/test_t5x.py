"""What T5X wrote is read, in every layout; what we write has T5X's names, shapes and values.

`golden/t5x_checkpoints.tar.gz` was written by T5X itself (golden/README.md). That T5X reads what we
write: `test_t5x_restores.py`.
"""

import dataclasses
import tarfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import golden_model
from helpers.t5x_files import BATCH, CONFIG, FILTER, GOLDEN

from tnt_jax import convert
from tnt_jax.checkpoints import pretrained, t5x
from tnt_jax.models import sharding
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError

PER_LAYER = dataclasses.replace(CONFIG, relpos_bias_per_layer=True)
CONFIGS = {
    "t5_legacy": CONFIG,
    "t5_legacy_bf16": CONFIG,
    "t5_orbax": CONFIG,
    "t5_1_0_legacy": dataclasses.replace(
        CONFIG, mlp_activations=("relu",), logits_via_embedding=True
    ),
    "scanned_legacy": PER_LAYER,
    "scanned_orbax": PER_LAYER,
    "scalable_legacy": PER_LAYER,
}


@pytest.fixture
def copy(written_by_t5x, tmp_path):
    """The legacy checkpoint, to be damaged."""
    with tarfile.open(golden_model.FOLDER / "t5x_checkpoints.tar.gz") as archive:
        members = [m for m in archive if m.name.startswith("t5_legacy/")]
        archive.extractall(tmp_path, members=members, **FILTER)
    return tmp_path / "t5_legacy" / "checkpoint_7"


def params_of(name):
    prefix = f"{name}/params/"
    return {k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)}


def loaded(found):
    return {name: array.load() for name, array in found.weights.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        assert array.dtype == expected[name].dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_t5x_computes_the_same_logits(name, written_by_t5x):
    found = pretrained.open_checkpoint(str(written_by_t5x / name))
    assert found.step == 7
    assert found.config == CONFIGS[name]  # read off the arrays alone
    mesh = sharding.make_mesh(sharding.MeshShape(data=4, model=2))
    model = Model(config=found.config, mesh=mesh)
    params = found.restore(model.abstract_params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
        lambda x: x.sharding, model.abstract_params
    )
    logits = jax.jit(model.forward)(params, BATCH).whole()
    real = np.asarray(BATCH["decoder_target_tokens"]) > 0
    expected = GOLDEN[f"{name}/logits"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5_legacy", "t5_orbax", "t5_1_0_legacy"])
def test_every_bit_of_a_parameter_is_read(name, written_by_t5x):
    assert_same(loaded(pretrained.open_checkpoint(str(written_by_t5x / name))), params_of(name))


def test_bfloat16_stays_bfloat16(written_by_t5x):
    found = loaded(pretrained.open_checkpoint(str(written_by_t5x / "t5_legacy_bf16")))
    expected = {k: v.astype(jnp.bfloat16) for k, v in params_of("t5_legacy_bf16").items()}
    assert_same(found, expected)


def test_scanned_layers_are_those_that_t5x_numbered(written_by_t5x):
    found = loaded(pretrained.open_checkpoint(str(written_by_t5x / "scanned_legacy")))
    stacks = params_of("scanned_legacy")
    for i in range(3):
        np.testing.assert_array_equal(
            found[f"encoder/layers_{i}/mlp/wi_1/kernel"],
            stacks["encoder/encoder/mlp/wi_1/kernel"][:, i],
        )
        np.testing.assert_array_equal(
            found[f"encoder/layers_{i}/attention/query/kernel"],
            stacks["encoder/encoder/attention/query/kernel"][:, i].reshape(12, 8),
        )
        np.testing.assert_array_equal(
            found[f"encoder/layers_{i}/attention/out/kernel"],
            stacks["encoder/encoder/attention/out/kernel"][:, i].reshape(8, 12),
        )


def test_the_layout_with_scanned_layers_is_t5x_s_own(written_by_t5x):
    """Back from our layers to the arrays that T5X wrote, and those of another model likewise."""
    found = pretrained.open_checkpoint(str(written_by_t5x / "scanned_legacy"))
    stacks = t5x.stacked(found.weights)
    assert_same({k: v.load() for k, v in stacks.items()}, params_of("scanned_legacy"))

    shared = pretrained.open_checkpoint(str(written_by_t5x / "t5_legacy"))
    stacks = t5x.stacked(shared.weights)
    assert {k: v.shape for k, v in stacks.items()} == {
        k: v.shape for k, v in params_of("scanned_legacy").items()
    }
    # A run of the last layers beside a bfloat16 original has both types.
    first = "encoder/layers_0/mlp/wo/kernel"
    weights = {
        name: dataclasses.replace(array, dtype=np.dtype(jnp.bfloat16)) if name == first else array
        for name, array in shared.weights.items()
    }
    mixed = t5x.stacked(weights)["encoder/encoder/mlp/wo/kernel"]
    assert mixed.dtype == mixed.load().dtype == np.float32
    biases = stacks["encoder/encoder/relpos_bias/rel_embedding"].load()
    for i in range(3):
        np.testing.assert_array_equal(
            biases[:, i], params_of("t5_legacy")["encoder/relpos_bias/rel_embedding"]
        )


@pytest.mark.parametrize("name", ["t5_legacy", "t5_1_0_legacy", "scanned_legacy"])
@pytest.mark.parametrize("output_format", ["t5x", "t5x_orbax"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_is_written_is_read(name, output_format, scan_layers, written_by_t5x, tmp_path):
    source = pretrained.open_checkpoint(str(written_by_t5x / name))
    convert.convert(
        input=str(written_by_t5x / name),
        output=str(tmp_path / "out"),
        output_format=output_format,
        scan_layers=scan_layers,
    )
    assert (tmp_path / "out" / "checkpoint_7").is_dir()
    found = pretrained.open_checkpoint(str(tmp_path / "out"))
    assert (found.step, found.config) == (7, source.config)
    assert_same(loaded(found), loaded(source))


def test_a_tied_output_matrix_that_is_not_scaled_becomes_one_of_its_own(written_by_t5x, tmp_path):
    """T5X ties and scales, or neither; a transformers 5 model may tie alone."""
    source = pretrained.open_checkpoint(str(written_by_t5x / "t5_1_0_legacy"))
    config = dataclasses.replace(source.config, scale_decoder_outputs=False)
    model = Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape()))
    expected = model.forward(source.restore(model.abstract_params), BATCH).whole()

    config, arrays = t5x.as_t5x_has_it(config, source.weights)
    t5x.write_legacy(epath.Path(tmp_path) / "checkpoint_1", arrays, 1)
    found = pretrained.open_checkpoint(str(tmp_path))
    assert found.config == config
    model = Model(config=config, mesh=model.mesh)
    logits = model.forward(found.restore(model.abstract_params), BATCH).whole()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_large_array_is_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "_CHUNK_BYTES", 100)
    array = np.arange(7 * 12, dtype=np.float32).reshape(12, 7)
    stored = t5x.lazy_arrays.of_array(array, "here")
    t5x.write_legacy(epath.Path(tmp_path) / "checkpoint_2", {"a/b": stored}, 2)
    assert len(list((tmp_path / "checkpoint_2" / "target.a.b").glob("[0-9]*"))) == 4
    arrays, step = t5x.read_legacy(epath.Path(tmp_path) / "checkpoint_2")
    assert step == 2
    np.testing.assert_array_equal(arrays["a/b"].load(), array)
    np.testing.assert_array_equal(arrays["a/b"][slice(2, 8), slice(3, 5)], array[2:8, 3:5])


def test_arrays_within_the_msgpack_file_are_read(copy, written_by_t5x):
    """T5X writes arrays that are not partitioned into that file."""
    content = flax.serialization.msgpack_restore((copy / "checkpoint").read_bytes())
    scale = params_of("t5_legacy")["encoder/encoder_norm/scale"]
    content["optimizer"]["target"]["encoder"]["encoder_norm"]["scale"] = scale
    (copy / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    assert_same(loaded(pretrained.open_checkpoint(str(copy))), params_of("t5_legacy"))


# ------------------------------------------------------------------------------------- Damage


def test_a_lost_array(copy):
    norm = copy / "target.decoder.decoder_norm.scale"
    norm.rename(copy / "elsewhere")
    with pytest.raises(UsageError, match=r"target\.decoder\.decoder_norm\.scale: .*is damaged"):
        pretrained.open_checkpoint(str(copy))


def test_a_lost_chunk_is_not_read_as_zeros(copy):
    (copy / "target.decoder.decoder_norm.scale" / "0").unlink()
    found = pretrained.open_checkpoint(str(copy))
    with pytest.raises(UsageError, match=r"decoder_norm\.scale: .*the checkpoint is damaged"):
        found.weights["decoder/decoder_norm/scale"].load()


def test_a_chunk_that_is_cut_short(copy):
    chunk = copy / "target.decoder.decoder_norm.scale" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    found = pretrained.open_checkpoint(str(copy))
    with pytest.raises(UsageError, match=r"decoder_norm\.scale: .*the checkpoint is damaged"):
        found.weights["decoder/decoder_norm/scale"].load()


def test_a_file_that_is_no_checkpoint(copy):
    (copy / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"')  # TensorFlow's
    with pytest.raises(UsageError, match=r"checkpoint: expected a T5X checkpoint \(msgpack"):
        pretrained.open_checkpoint(str(copy))


def test_a_checkpoint_of_another_architecture(copy):
    content = flax.serialization.msgpack_restore((copy / "checkpoint").read_bytes())
    del content["optimizer"]["target"]["encoder"]
    (copy / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    with pytest.raises(UsageError, match=r"found no encoder/relpos_bias/rel_embedding among"):
        pretrained.open_checkpoint(str(copy))


def test_a_parameter_too_many_and_one_too_few(copy):
    content = flax.serialization.msgpack_restore((copy / "checkpoint").read_bytes())
    encoder = content["optimizer"]["target"]["encoder"]
    encoder["bias"] = np.zeros(3, np.float32)
    del encoder["encoder_norm"]
    (copy / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    message = "encoder/encoder_norm/scale is missing; encoder/bias is unexpected"
    with pytest.raises(UsageError, match=message):
        convert.convert(input=str(copy), output="out", output_format="orbax", dry_run=True)


@pytest.mark.parametrize(
    "change",
    [{"num_relpos_buckets": 16}, {"layer_norm_epsilon": 1e-5}, {"scale_decoder_outputs": True}],
)
def test_a_network_that_t5x_does_not_have(change):
    with pytest.raises(UsageError, match="T5X has no such network"):
        t5x.as_t5x_has_it(dataclasses.replace(CONFIG, **change), {})
