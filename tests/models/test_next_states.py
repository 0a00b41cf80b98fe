"""States after every one of several next tokens, against a forward pass of each continued text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import t5_inputs
from helpers.golden_model import CONFIG
from helpers.tiny_llama import LLAMA

from tnt_jax.data.examples import Example
from tnt_jax.models import families, next_states, parameters, sharding
from tnt_jax.models.model import Model

LENGTHS = {"inputs": 6, "targets": 5}
NO_MARKS = np.zeros((0, 2), np.int32)
CONFIGS = {
    "scaled logits": t5_inputs.CONFIG_1_0,
    "T5 1.1": CONFIG,
    "decoder-only": LLAMA,
    "stacked": dataclasses.replace(LLAMA, scan_layers=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_state_is_that_of_the_text_with_the_token(config):
    """Inputs and outputs of several lengths, two candidates at each position."""
    rng = np.random.default_rng(0)
    apart = t5_inputs.random_params(dataclasses.replace(config, scan_layers=False))
    params = parameters.stack_layers(apart) if config.scan_layers else apart
    inputs, targets = (rng.integers(2, 50, size=(3, n)).astype(np.int32) for n in (6, 5))
    lengths = np.array([6, 3, 1], np.int32)
    candidates = rng.integers(2, 50, size=(3, 5, 2)).astype(np.int32)
    model = Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1]))
    padded = inputs * (np.arange(6) < lengths[:, None])
    found = next_states.jit_next_states(model)(params, padded, lengths, targets, candidates)

    network = families.network_of(config)
    forward = jax.jit(network.forward)
    for position in range(4):
        for number in range(2):
            continued = np.append(
                targets[:, :position], candidates[:, position, number, None], axis=1
            )
            rows = [  # one more target, at which the state has read all others
                Example(row[:n], np.append(ids, np.int32(2)), NO_MARKS)
                for row, n, ids in zip(inputs, lengths, continued, strict=True)
            ]
            batch = network.feature_layout.convert(rows, LENGTHS)
            states = forward(params, jax.tree.map(jnp.asarray, batch)).hidden[:, position + 1]
            np.testing.assert_allclose(found[:, position, number], states, atol=2e-5)
