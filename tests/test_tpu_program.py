"""What the compiler for TPUs makes of a large model: it runs without one, where libtpu is."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
)

# On eight chips of a TPU v5e, which are only described.
PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from tnt_jax import assembly, sharding, t5

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = sharding.make_mesh(sharding.MeshShape(fsdp=8), topology.devices)
config = t5.T5Config(
    vocab_size=512, emb_dim=1024, num_heads=16, num_encoder_layers=6, num_decoder_layers=6,
    head_dim=64, mlp_dim=2048, mlp_activations=("gelu", "linear"), logits_via_embedding=False,
    dtype="bfloat16", scan_layers=True, remat_policy="full",
)
model = assembly.Model(config=config, mesh=mesh)
forward = t5.make_factored_forward(config)

def gradient(params, batch):
    def loss(params):
        return jnp.sum(forward(params, batch).hidden.astype(jnp.float32) ** 2)
    return jax.grad(loss)(params)

tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=sharding.batch_sharding(mesh))
names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
program = jax.jit(
    assembly._traced_on(mesh, gradient),
    out_shardings=jax.tree.map(lambda x: x.sharding, model.abstract_params),
)
print(program.lower(model.abstract_params, dict.fromkeys(names, tokens)).compile().as_text())
"""


@pytest.fixture(scope="module")
def program():
    described = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_PLATFORMS": "cpu",
    }
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | described,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_weights_are_cast_and_gathered_one_layer_at_a_time(program):
    gathered = set(re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", program))
    weights = {name for name in gathered if re.search(r"1024|2048", name)}
    assert {"bf16[1,1024,1024]", "bf16[1,1024,2048]", "bf16[1,2048,1024]"} <= weights
    assert not [
        name for name in weights if name.startswith("f32[") and not name.startswith("f32[6,1024]")
    ]
    # No stack of all six layers is cast before the loop: a device has an eighth of it.
    stacks = {"6,128,1024", "6,1024,128", "6,128,2048", "6,2048,128"}
    assert {f"f32[{stack}]" for stack in stacks} <= set(re.findall(r"f32\[6,[\d,]+\]", program))
    assert not {f"bf16[{stack}]" for stack in stacks} & set(
        re.findall(r"bf16\[6,[\d,]+\]", program)
    )


def test_no_activation_is_gathered(program):
    # All eight rows of a sequence of 128.
    gathered = re.findall(r"= (\w+\[[\d,]+\])\S* all-gather\(", program)
    assert not [name for name in gathered if re.match(r"(bf16|f32)\[8,128,\d{2,}", name)]
