"""A small T5 1.0, random parameters of any network, a T5's whole logits, and batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

from tnt_jax.models import families, t5

CONFIG_1_0 = t5.T5Config(
    vocab_size=50,
    emb_dim=16,
    num_heads=3,
    num_encoder_layers=1,
    num_decoder_layers=1,
    head_dim=4,  # 3 heads of 4 are not emb_dim
    mlp_dim=24,
    mlp_activations=("relu",),
    logits_via_embedding=True,
)

TOKENS = ("encoder_input", "decoder_input", "decoder_target")


def random_params(config, seed=0):
    """Parameters away from their initial values, so that a forgotten scale shows."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        is_scale = len(leaf.shape) == 1
        values = rng.uniform(0.5, 1.5, leaf.shape) if is_scale else rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(draw, families.network_of(config).abstract_params())


def make_forward(config):
    """`forward(params, batch, dropout_key=None)` to whole logits, by the network's own product."""

    def forward(params, batch, dropout_key=None):
        return t5.Transformer(config).apply(
            {"params": params},
            *(batch[f"{name}_tokens"] for name in TOKENS),
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )

    return forward


def random_batch(rng, vocab_size, source_lengths, target_lengths):
    def rows(lengths):
        tokens = rng.integers(1, vocab_size, (len(lengths), max(lengths)))
        return np.where(np.arange(max(lengths)) < np.asarray(lengths)[:, None], tokens, 0)

    targets = rows(target_lengths)
    batch = {
        "encoder_input_tokens": rows(source_lengths),
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_target_tokens": targets,
    }
    return {name: jnp.asarray(tokens, jnp.int32) for name, tokens in batch.items()}


# One shape for the tests that need just some batch, so that they share compiled functions.
SOME_BATCH = random_batch(np.random.default_rng(2), 50, [12, 5, 9], [40, 40, 40])
