"""A model that is only run: the parameters it holds, and what is said of rows that are too long."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import gguf_writer

from tnt_jax.checkpoints import lazy_arrays, opened_model, pretrained
from tnt_jax.models import sharding
from tnt_jax.tokenizers import tokenization

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "causal_lm" / "llama"


class _Ids(tokenization.Bytes):
    """Bytes of which the model has rows."""

    @property
    def size(self):
        return 64


def opened(num_tokens=8, **settings):
    return opened_model.open_model(
        str(GOLDEN),
        pretrained.FromCheckpoint(**settings),
        _Ids(),
        batch_size=1,
        num_tokens=num_tokens,
        mesh_shape=sharding.MeshShape(data=1),
        devices=jax.devices()[:1],
    )


def test_parameters_are_held_as_they_are_computed():
    whole = opened().params
    found = opened(dtype=jnp.bfloat16).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(whole)} == {"float32"}
    layer = found["decoder"]["layers_0"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(layer["self_attention"])} == {"bfloat16"}
    jax.tree.map(
        lambda x, cast: np.testing.assert_array_equal(np.asarray(x).astype(cast.dtype), cast),
        whole,
        found,
    )


@pytest.mark.parametrize(("num_tokens", "is_said"), [(128, False), (129, True)])
def test_rows_that_are_longer_than_the_model_was_made_for(num_tokens, is_said, capsys):
    opened(num_tokens)
    said = "Rows may have 129 tokens (TASK_FEATURE_LENGTHS), and"
    assert (said in capsys.readouterr().out) == is_said


def test_a_gguf_says_how_long_its_texts_were(tmp_path):
    path = tmp_path / "llama.gguf"
    gguf_writer.write_model(path, GOLDEN)
    assert pretrained.open_checkpoint(str(path)).max_positions == 128


@pytest.mark.parametrize("axes", [("fsdp", None), (None, "fsdp"), ("fsdp", "model"), (None, None)])
def test_each_parameter_is_read_once_however_it_is_split(axes):
    """Files are read in rows: a part of all rows would be all of the file, for each device."""
    stored = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    reads = []

    def read(index):
        reads.append(index)
        return stored[index].copy()

    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, model=2))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    abstract = {"kernel": jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=place)}
    array = lazy_arrays.LazyArray(stored.shape, stored.dtype, "a file", read)
    found = lazy_arrays.restore({"kernel": array}, abstract)["kernel"]
    np.testing.assert_array_equal(found, stored)
    assert found.sharding == place
    assert len(reads) == 1
