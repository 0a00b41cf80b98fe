"""The tiny T5 1.1 that the real T5X wrote (golden/README.md): its settings, and trees of arrays."""

import pathlib

import jax.numpy as jnp
from flax import traverse_util

from tnt_jax.models import t5

FOLDER = pathlib.Path(__file__).parents[1] / "golden"

CONFIG = t5.T5Config(
    vocab_size=384,
    emb_dim=32,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
    head_dim=16,
    mlp_dim=64,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
)


def tree(arrays, prefix):
    """The arrays whose names begin with `prefix`, as nested dicts by the rest of their names."""
    flat = {k.removeprefix(prefix): jnp.asarray(arrays[k]) for k in arrays if k.startswith(prefix)}
    return traverse_util.unflatten_dict(flat, sep="/")
