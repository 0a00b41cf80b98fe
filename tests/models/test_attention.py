"""Kernels of attention: against the definition and XLA, what they compile to, what is refused."""

import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import t5_inputs
from helpers.tiny_llama import LLAMA

from tnt_jax import objectives
from tnt_jax.data.batches import Batches
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import CAUSAL
from tnt_jax.models import attention, causal_lm, sharding
from tnt_jax.models.causal_lm_config import LayerKind
from tnt_jax.models.model import Model
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings, train_step
from tnt_jax.training.trainer import make_trainer

BATCH, KEY_HEADS, SHARED_BY = 2, 2, 3
SCALE = 0.3
NETWORK = dataclasses.replace(
    LLAMA,
    head_dim=64,
    num_layers=3,
    layer_kinds=(LayerKind(window=3), LayerKind(), LayerKind(window=3, rope_theta=100.0)),
    layer_pattern=(0, 1, 2),
    attention_softcap=5.0,
    scan_layers=True,
    remat_policy="full",
)


def sees(length, window):
    """The rule, pair by pair."""
    return np.array(
        [
            [j <= i and (window is None or i - j < window) for j in range(length)]
            for i in range(length)
        ]
    )


@pytest.mark.parametrize("window", [1, 3, 8, None])
def test_masks_are_the_rule_pair_by_pair(window):
    positions = jnp.arange(8)[None]
    found = attention.mask(jnp.ones((1, 8), jnp.int32), positions, jnp.int32(window or 99))
    np.testing.assert_array_equal(found[0, 0, 0], sees(8, window))
    np.testing.assert_array_equal(attention._static_mask(8, window)[:, :], sees(8, window))


def test_an_example_sees_itself_alone():
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0]])
    found = np.asarray(attention.mask(segment_ids, positions, jnp.int32(99))[0, 0, 0])
    assert [np.flatnonzero(row).tolist() for row in found[:5]] == [
        *([0], [0, 1], [0, 1, 2]),
        *([3], [3, 4]),
    ]


# --- The kernels against the definition -----------------------------------------------------------


def rows(sizes, length):
    """Segment ids of rows that hold examples of these sizes, and filler."""
    segment_ids = np.zeros((len(sizes), length), np.int32)
    for row, of_row in zip(segment_ids, sizes, strict=True):
        ends = np.cumsum([0, *of_row])
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            row[start:end] = number + 1
    return segment_ids


def heads(length, head_dim, dtype=jnp.float32):
    """Queries, keys, values, and what weighs the outputs."""
    rng = np.random.default_rng(0)
    queries = (BATCH, KEY_HEADS, SHARED_BY, length, head_dim)
    keys = (BATCH, KEY_HEADS, length, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (queries, keys, keys, queries)]


def defined(queries, keys, values, *, segment_ids, window, softcap):
    """Attention by its definition; positions of an example are as far apart as in the row."""
    logits = jnp.einsum("bhgqd,bhkd->bhgqk", queries, keys) * SCALE
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    is_same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = is_same & sees(segment_ids.shape[1], window)[None]
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf))
    return jnp.einsum("bhgqk,bhkd->bhgqd", weights, values)


def by_kernel(name, queries, keys, values, *, segment_ids, window, softcap):
    return attention.by_kernel(
        name,
        queries,
        (keys, values),
        jnp.asarray(segment_ids),
        windows=[7, window],
        kind=jnp.int32(1),
        scale=SCALE,
        softcap=softcap,
    )


def assert_same(name, length, head_dim, sizes, window, softcap):
    """Outputs of real positions, and gradients, are those of the definition."""
    *inputs, weights = heads(length, head_dim)
    segment_ids = rows(sizes, length)
    is_real = (segment_ids > 0)[:, None, None, :, None]
    case = {"segment_ids": segment_ids, "window": window, "softcap": softcap}

    def total(function, *inputs):
        mixed = function(*inputs, **case) * is_real
        return jnp.sum(mixed * weights), mixed

    def found(function):
        computed = jax.value_and_grad(
            functools.partial(total, function), argnums=(0, 1, 2), has_aux=True
        )
        (_, mixed), gradients = jax.jit(computed)(*inputs)
        return mixed, *gradients

    for one, other in zip(found(functools.partial(by_kernel, name)), found(defined), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("length", "head_dim", "window", "softcap"),
    [(256, 128, None, None), (200, 64, 30, 2.0), (300, 64, 150, None)],
    ids=str,
)
def test_splash_is_the_definition(length, head_dim, window, softcap, monkeypatch):
    """The kernel for TPUs, interpreted: several blocks, with and without filling rows up."""
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", 128)
    assert_same("splash", length, head_dim, ((90, 70), (length - 5,)), window, softcap)


@pytest.mark.parametrize("window", [None, 20])
def test_cudnn_is_the_definition_where_rows_hold_one_example(window, monkeypatch):
    """JAX's function is the same on every device, so its XLA version stands for cuDNN here."""
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        functools.partial(_as_xla, jax.nn.dot_product_attention),
    )
    assert_same("cudnn", 50, 16, ((50,), (33,)), window, None)


def _as_xla(function, *inputs, implementation, **settings):
    assert implementation == "cudnn"
    return function(*inputs, implementation="xla", **settings)


# --- In a network ---------------------------------------------------------------------------------


def packed():
    rng = np.random.default_rng(0)

    def ids(number):
        return rng.integers(0, NETWORK.vocab_size, number).astype(np.int32)

    sizes = ((3, 4), (5, 2), (1, 6), (8, 3), (4, 3), (2, 5), (6, 6), (3, 1)) * 2
    marks = np.zeros((0, 2), np.int32)
    examples = [Example(ids(n), ids(m), marks) for n, m in sizes]
    lengths = {"inputs": 10, "targets": 12}
    batches = Batches(examples, 8, lengths, seed=0, pack=True, feature_layout=CAUSAL)
    batch = batches.batch(0)
    assert batch["decoder_segment_ids"].max() > 1
    return batch


def update(config, shape, num_microbatches):
    """Parameters after an update, and its sums."""
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    mesh = sharding.make_mesh(sharding.MeshShape(**shape), devices)
    step = sharding.traced_on(
        mesh,
        train_step.train_step,
        forward=causal_lm.CausalLM(config).forward,
        objective=objectives.TntObjective(negative_term="none", positive_term="log_likelihood"),
        optimizer=optax.sgd(1.0),
        num_microbatches=num_microbatches,
    )
    params = jax.device_put(t5_inputs.random_params(config), sharding.replicated(mesh))
    state, sums = jax.jit(step)(
        train_step.init_state(params, optax.sgd(1.0)),
        None,
        sharding.put_batch(packed(), mesh),
        jax.random.key(0),
    )
    return jax.tree.map(np.asarray, (state.params, sums))


@functools.cache
def update_by_xla():
    return update(NETWORK, {"data": 1}, 1)


@pytest.mark.parametrize(
    ("shape", "num_microbatches"),
    [({"data": 1}, 1), ({"data": 2, "fsdp": 2, "model": 2}, 2)],
    ids=str,
)
def test_splash_gives_the_update_of_xla(shape, num_microbatches):
    """Packed rows, layers of three kinds and two windows in a loop, with and without a mesh."""
    expected_params, expected = update_by_xla()
    config = dataclasses.replace(NETWORK, attention="splash")
    params, sums = update(config, shape, num_microbatches)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(sums[name], expected[name], rtol=2e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        params,
        expected_params,
    )


# --- What they are compiled to --------------------------------------------------------------------


def test_cudnn_is_lowered_for_a_gpu_that_is_not_here(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = dataclasses.replace(
        NETWORK, attention="cudnn", dtype="bfloat16", attention_softcap=None
    )
    network, params = causal_lm.CausalLM(config), t5_inputs.random_params(config)
    mesh = sharding.make_mesh(sharding.MeshShape(data=2, fsdp=2, model=2))

    def total(params, batch):
        return jnp.sum(network.forward(params, batch).hidden.astype(jnp.float32))

    traced = jax.jit(sharding.traced_on(mesh, jax.grad(total))).trace(params, packed())
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    calls = re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(.*", text)
    # A branch for each window; a device has 8 / 4 rows and 4 / 2 heads.
    assert {re.search(r"sliding_window_length\\22: (\d+)", call).group(1) for call in calls} == {
        *("0", "3")
    }
    assert all("mask_type\\22: \\22CAUSAL" in call for call in calls)
    assert all("tensor<2x22x2x64xbf16>" in call for call in calls)


COMPILE = """
from tnt_jax import objectives, precompile
from tnt_jax.models import sharding
from tnt_jax.models.causal_lm_config import CausalLMConfig, LayerKind
from tnt_jax.training import optimizers, settings
from tnt_jax.training.trainer import make_trainer

found = precompile.compile_step(
    precompile.devices_of("v5e:2x4"),
    model=CausalLMConfig(
        vocab_size=512, emb_dim=256, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=512,
        mlp_activations=("silu", "linear"), logits_via_embedding=True, num_layers=4,
        layer_kinds=(LayerKind(window=200), LayerKind()), layer_pattern=(0, 1),
        attention_softcap=50.0, dtype="bfloat16", scan_layers=True, remat_policy="full",
        attention="splash",
    ),
    objective=objectives.TntObjective(negative_term="none", positive_term="log_likelihood"),
    update=settings.Update(
        batch_size=8, task_feature_lengths={"inputs": 448, "targets": 65}, pack=True,
        optimizer=optimizers.adafactor(1e-3),
        mesh_shape=sharding.MeshShape(data=2, fsdp=2, model=2),
    ),
    original_choice=settings.OriginalChoice(path=None),
    program_text="program.txt",
)
assert found["fits"], found
"""


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="takes minutes: the oldest Python that we test compiles it"
)
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'"
)
def test_splash_is_compiled_for_a_tpu_that_is_not_here(tmp_path):
    """The program of packed rows has the kernel, and no logits of all pairs of positions."""
    completed = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert completed.returncode == 0, completed.stderr
    text = (tmp_path / "program.txt").read_text()
    assert "tpu_custom_call" in text
    assert not re.search(r"\[[\d,]*512,512\]", text)


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (NETWORK, {"attention": "flash"}, "expected xla, splash, cudnn, found 'flash'"),
        (NETWORK, {"attention": "cudnn"}, "'cudnn' computes in bfloat16, found float32"),
        (
            NETWORK,
            {"attention": "cudnn", "dtype": "bfloat16"},
            "'cudnn' does not bound attention logits, as this network does at 5",
        ),
        (t5_inputs.CONFIG_1_0, {"attention": "splash"}, "expected 'xla' for a T5"),
    ],
)
def test_what_a_network_cannot_have_is_said(config, changes, message):
    with pytest.raises(UsageError, match=f"ATTENTION: {message}"):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(("name", "kind"), [("splash", "TPUs"), ("cudnn", "NVIDIA GPUs")])
def test_devices_without_the_kernel_are_said(name, kind):
    config = dataclasses.replace(NETWORK, attention=name, dtype="bfloat16", attention_softcap=None)
    with pytest.raises(UsageError, match=f"ATTENTION: '{name}' is for {kind}, found .* 'cpu'"):
        Model(config=config, mesh=sharding.make_mesh(sharding.MeshShape()))


def test_cudnn_is_for_rows_that_are_not_packed():
    config = dataclasses.replace(
        NETWORK, attention="cudnn", dtype="bfloat16", attention_softcap=None
    )
    with pytest.raises(UsageError, match=r"ATTENTION: 'cudnn' cannot .* found PACK=True"):
        make_trainer(
            config=config,
            objective=objectives.TntObjective(negative_term="none", positive_term="log_likelihood"),
            original_choice=settings.OriginalChoice(path=None),
            update=settings.Update(
                batch_size=8,
                task_feature_lengths={"inputs": 10, "targets": 12},
                optimizer=optax.sgd(1.0),
                pack=True,
            ),
        )
