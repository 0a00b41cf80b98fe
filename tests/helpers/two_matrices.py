"""A model of two matrices, and an update of it: what tests of `train_step` share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tnt_jax import objectives
from tnt_jax.models import sharding
from tnt_jax.training import train_step

KEY = jax.random.key(0)


def objective_of(negative_term, positive_term, **settings):
    return objectives.TntObjective(
        negative_term=negative_term, positive_term=positive_term, **settings
    )


FINE_TUNE = objective_of("none", "log_likelihood")
TNFF = objective_of("forward_kl", "forward_kl", negative_weight=3.0)
TNRF = objective_of("reverse_kl", "forward_kl")


def assert_trees_close(found, expected, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, err_msg=sharding.path_name(path), **tolerances)


VOCAB_SIZE = 11
DROPOUT_RATE = 0.5


def small_forward(params, batch, dropout_key=None):
    hidden = params["embedding"][batch["decoder_input_tokens"]]
    hidden += params["embedding"][batch["encoder_input_tokens"]].mean(axis=1, keepdims=True)
    if dropout_key is not None:
        kept = jax.random.bernoulli(dropout_key, 1 - DROPOUT_RATE, hidden.shape)
        hidden = jnp.where(kept, hidden / (1 - DROPOUT_RATE), 0.0)
    return hidden @ params["out"]


def without_dropout(params, batch, dropout_key=None):
    return small_forward(params, batch)


def small_params(seed):
    random = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(random.normal(size=(VOCAB_SIZE, 8)), jnp.float32),
        "out": jnp.asarray(random.normal(size=(8, VOCAB_SIZE)), jnp.float32),
    }


def small_batch(num_rows=8, *, is_marked=True, vocab_size=VOCAB_SIZE):
    """Rows of 2 to 5 targets, with up to two negative ids at a third of the positions."""
    random = np.random.default_rng(7)
    tokens = random.integers(1, vocab_size, (num_rows, 11))
    target_tokens = tokens[:, :5]
    negative_ids = np.stack([target_tokens, random.integers(0, vocab_size, (num_rows, 5))], axis=-1)
    negative_ids[random.random((num_rows, 5)) > 1 / 3] = -1
    negative_ids[..., 1][random.random((num_rows, 5)) > 1 / 2] = -1
    batch = {
        "encoder_input_tokens": tokens[:, 5:],
        "decoder_input_tokens": np.pad(target_tokens[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": target_tokens,
        "decoder_loss_mask": np.arange(5) < random.integers(2, 6, (num_rows, 1)),
        "decoder_negative_ids": negative_ids if is_marked else np.full_like(negative_ids, -1),
    }
    return {name: rows.astype(np.int32) for name, rows in batch.items()}


def on_device(batch):
    return {name: jnp.asarray(rows) for name, rows in batch.items()}


def step_of(batch, *, objective=TNRF, optimizer=None, params=None, original="another", **settings):
    """One update of the model of two matrices: the new state and the sums."""
    optimizer = optimizer or optax.sgd(0.1)
    state = train_step.init_state(params or small_params(0), optimizer)
    state = state.replace(step=jnp.int32(settings.pop("step", 0)))
    settings = {"forward": without_dropout, "key": KEY} | settings
    return train_step.train_step(
        state,
        small_params(1) if original == "another" else original,
        on_device(batch),
        settings.pop("key"),
        objective=objective,
        optimizer=optimizer,
        **settings,
    )
