"""A tiny model of random weights, as a Hugging Face directory."""

import json

import numpy as np
from etils import epath

from tnt_jax.checkpoints import huggingface, lazy_arrays
from tnt_jax.models import t5

TINY = t5.T5Config(
    vocab_size=40,
    emb_dim=12,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
    head_dim=4,
    mlp_dim=20,
    mlp_activations=("gelu", "linear"),
    logits_via_embedding=False,
)


def write_directory(folder, config=TINY, dtype=np.float32, same_biases=False, scale=1.0, **kwargs):
    """Writes random weights; returns them by T5X's names."""
    random = np.random.default_rng(0)
    arrays = {
        name: random.normal(0, scale, shape).astype(dtype)
        for name, shape in lazy_arrays.shapes(t5.T5(config).abstract_params()).items()
    }
    if same_biases:
        first = arrays["encoder/layers_0/relpos_bias/rel_embedding"]
        arrays |= {name: first for name in arrays if name.endswith("rel_embedding")}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: lazy_arrays.of_array(array, name) for name, array in arrays.items()}
    huggingface.write_weights(epath.Path(folder), weights, config, **kwargs)
    (folder / "config.json").write_text(json.dumps(huggingface.new_config(config)))
    return arrays
