"""The fused objective against its dense definition: values, metrics, gradients, layouts, memory."""

import dataclasses
import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tnt_jax import objectives
from tnt_jax.models import sharding
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.objectives import fused, fused_block
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import train_step

BATCH, LENGTH, WIDTH, VOCAB_SIZE = 4, 6, 8, 40


def objective_of(negative_term, positive_term, **settings):
    return objectives.TntObjective(
        negative_term=negative_term, positive_term=positive_term, negative_weight=2.5, **settings
    )


# A device of eight has 5 of 40 ids: the 7 likeliest are never all on one.
FEW = objectives.FinalTokenPreference(num_chosen=7, min_p=1e-3, target_weight=0.3, margin=3.0)

OBJECTIVES = {
    "TNFF": objective_of("forward_kl", "forward_kl"),
    "TNRR": objective_of("reverse_kl", "reverse_kl"),
    "TNRF": objective_of("reverse_kl", "forward_kl"),
    "TNFLL": objective_of("forward_kl", "log_likelihood"),
    "TNRLL": objective_of("reverse_kl", "log_likelihood", label_smoothing=0.1, z_loss=1e-2),
    "TNSR": objective_of("reverse_kl_split", "reverse_kl"),
    "TNSF": objective_of("reverse_kl_split", "forward_kl"),
    "TNJJ": objective_of("jensen_shannon", "jensen_shannon"),
    "TNJSJ": objective_of("jensen_shannon_split", "jensen_shannon"),
    "TNRF floor": objective_of("reverse_kl", "forward_kl", removed_token_floor=0.5),
    "TNFF residual x 3": objective_of("forward_kl", "forward_kl", residual_weight=3.0),
    "TNSF residual x 3": objective_of("reverse_kl_split", "forward_kl", residual_weight=3.0),
    "TNJSJ residual x 3": objective_of(
        "jensen_shannon_split", "jensen_shannon", residual_weight=3.0
    ),
    "NL+LL": objective_of("negative_likelihood", "log_likelihood"),
    "UL+LL": objective_of("unlikelihood", "log_likelihood", z_loss=1e-3),
    "NL+KL": objective_of("negative_likelihood", "forward_kl"),
    "UL+KL": objective_of("unlikelihood", "forward_kl"),
    "NPO+KL": objective_of("negative_preference", "forward_kl", npo_beta=0.7),
    "FTPO": objective_of("final_token_preference", "none", ftpo=FEW),
    "FTPO+LL": objective_of("final_token_preference", "log_likelihood", ftpo=FEW),
    "FTPO everywhere": objective_of(
        "final_token_preference",
        "forward_kl",
        ftpo=objectives.FinalTokenPreference(num_chosen=30, min_p=0.2),
        removed_everywhere=tuple(range(3, 15)),
        removed_everywhere_counts_as="negative",
    ),
    "fine-tune": objective_of("none", "log_likelihood", label_smoothing=0.2),
    "anchor": objective_of("none", "reverse_kl"),
    "UNDIAL": objective_of("forward_kl", "none", negative_strength=0.9),
    "UNDIAL+KL": objective_of("forward_kl", "forward_kl", negative_strength=1 - np.exp(-10.0)),
    "TNFF smoothed": objective_of("forward_kl", "forward_kl", smoothing=1e-3),
    "TNRR smoothed": objective_of("reverse_kl", "reverse_kl", smoothing=1e-3),
    "TNRLL smoothed": objective_of("reverse_kl", "log_likelihood", smoothing=1e-3),
    "TNRF everywhere": objective_of("reverse_kl", "forward_kl", removed_everywhere=(3, 39, 5)),
    "TNSR everywhere, as negative": objective_of(
        "reverse_kl_split",
        "reverse_kl",
        removed_everywhere=tuple(range(3, 15)),  # more than are compared one by one
        removed_everywhere_counts_as="negative",
    ),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def problem(
    seed=0,
    *,
    num_ids=3,
    drift=0.7,
    scale=1.0,
    dtype=jnp.float32,
    vocab_axis=1,
    batch=BATCH,
    width=WIDTH,
    vocab_size=VOCAB_SIZE,
    softcap=None,
    strengths=None,
):
    """Factored logits of both models, and tokens; a third of the positions is padding.

    Of the marks some have each of `strengths`; None is without them.
    """
    random = np.random.default_rng(seed)
    shape = batch, LENGTH

    def model(hidden, matrix):
        matrix = matrix if vocab_axis == 1 else matrix.T
        return FactoredLogits(
            jnp.asarray(hidden, dtype), jnp.asarray(matrix, dtype), vocab_axis, softcap
        )

    hidden = random.normal(size=(*shape, width))
    matrix = random.normal(size=(width, vocab_size)) * scale
    original = model(hidden, matrix)
    current = model(
        hidden + drift * random.normal(size=hidden.shape),
        matrix + drift * random.normal(size=matrix.shape),
    )
    targets = random.integers(1, vocab_size, shape)
    ids = random.integers(0, vocab_size, (*shape, num_ids))
    ids[..., 0] = targets
    ids = np.where(random.random((*shape, num_ids)) < 0.4, -1, ids)
    if num_ids > 1:  # the same id twice, and an unmarked row
        ids[0, :, 1] = ids[0, :, 0]
    ids[1] = -1
    mask = (random.random(shape) < 0.67).astype(np.int32)
    tokens = {
        "target_tokens": jnp.asarray(targets, jnp.int32),
        "negative_ids": jnp.asarray(ids, jnp.int32),
        "loss_mask": jnp.asarray(mask),
    }
    if strengths is not None:
        tokens["loss_mask"] = tokens["loss_mask"].at[0].set(1)  # where ids have two strengths
        of_ids = random.choice(strengths, size=ids.shape)
        tokens["negative_strengths"] = jnp.asarray(of_ids, jnp.float32)
    return current, original, tokens


def dense(objective, current, original, tokens):
    """The same numbers by the definition."""
    current_logits, original_logits = current.whole(), original.whole()
    losses = objective.token_losses(
        current_logits=current_logits,
        original_logits=original_logits if objective.needs_original else None,
        **tokens,
    )
    ids = tokens["negative_ids"]
    strengths = objective.strengths(ids, tokens.get("negative_strengths"))
    if objective.negative_term == "none":
        ids = jnp.full_like(ids, -1)
    elif objective.mixes and strengths is not None:  # what raises an id is ignored
        ids = jnp.where(strengths > 0, ids, -1)
    everywhere = objective.removed_everywhere
    mass = objectives.removed_mass(current_logits, ids, everywhere, strengths)
    parts = objectives.certificate(
        current_logits=current_logits,
        original_logits=original_logits,
        negative_ids=ids,
        removed_everywhere=everywhere,
        negative_strengths=strengths,
    )
    is_real = tokens["loss_mask"] != 0
    others = (jnp.where(is_real, x, 0.0) for x in (mass, *parts))
    return losses.sum(), fused.TokenValues(losses, *others)


def fused_values(objective, current, original, tokens, block_size=None):
    return fused.token_values(objective, current, original, **tokens, block_size=block_size)


without_gradients = jax.jit(fused_values, static_argnames="objective")


@functools.partial(jax.jit, static_argnames=("function", "objective", "block_size"))
def with_gradients(function, objective, current, original, tokens, *, block_size=None):
    """Loss, values, and the gradients of the loss to hidden states and matrix."""
    settings = {} if block_size is None else {"block_size": block_size}

    def loss(hidden, matrix):
        model = current.replace(hidden=hidden, matrix=matrix)
        return function(objective, model, original, tokens, **settings)

    (total, values), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        current.hidden, current.matrix
    )
    return total, values, gradients


def assert_agree(objective, *inputs, rtol=2e-5, atol=2e-6, **settings):
    total, values, found = with_gradients(fused_values, objective, *inputs, **settings)
    expected_total, expected_values, expected = with_gradients(dense, objective, *inputs)
    np.testing.assert_allclose(total, expected_total, rtol=rtol, atol=atol)
    for name, wanted in expected_values._asdict().items():
        value = getattr(values, name)
        np.testing.assert_allclose(value, wanted, rtol=rtol, atol=atol, err_msg=name)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        gap, size = np.linalg.norm(one - other), np.linalg.norm(other)
        assert np.isfinite(gap)
        assert gap <= rtol * size + atol


@each_objective
def test_agrees_with_the_definition(objective):
    assert_agree(objective, *problem())


# Hardly any, half, nearly all, all: each id has one of its own, and some have two.
STRENGTHS = (1e-3, 0.5, 0.9999, 1.0)
# The same, and ids that are raised: a little, tenfold, a hundredfold.
RAISED = (*STRENGTHS, -1e-3, -9.0, -99.0)
GRADED = (
    "TNFF residual x 3",
    "TNRF",
    "TNRF floor",
    "TNRR smoothed",
    "TNSR",
    "TNJJ",
    "TNJSJ",
    "TNRLL",
)
GRADED += ("TNRF everywhere", "TNSR everywhere, as negative", "NL+LL", "UL+KL", "fine-tune")
GRADED += ("UNDIAL",)
each_graded = pytest.mark.parametrize("name", GRADED)


each_strengths = pytest.mark.parametrize(
    "strengths", [STRENGTHS, RAISED], ids=["lowered", "raised"]
)


@each_strengths
@each_graded
def test_agrees_with_the_definition_on_strengths(name, strengths):
    assert_agree(OBJECTIVES[name], *problem(12, strengths=strengths))


@each_strengths
@pytest.mark.parametrize("num_ids", [12, 60])
@pytest.mark.parametrize("name", ["TNRF", "UL+KL"])
def test_agrees_with_the_definition_on_strengths_of_many_ids(name, num_ids, strengths):
    """A few ids are compared with each other, and many are sorted."""
    assert_agree(OBJECTIVES[name], *problem(12, num_ids=num_ids, strengths=strengths))


@pytest.mark.parametrize("strengths", [None, RAISED], ids=["removed", "graded"])
@pytest.mark.parametrize("name", ["TNRF", "TNRR smoothed", "UL+KL", "TNRF everywhere", "fine-tune"])
def test_a_set_is_the_ids_that_it_stands_for(name, strengths):
    """Against the same ids written out, one list for each position."""
    objective = OBJECTIVES[name]
    sets = (tuple(range(4, 36, 2)), (1, 39, 7, 20, 33), ())
    current, original, tokens = problem(7, strengths=strengths)
    random = np.random.default_rng(1)
    ids, own = (np.array(tokens.get(x, 1)) for x in ("negative_ids", "negative_strengths"))
    own = np.broadcast_to(own, ids.shape)
    names = random.integers(-1, 3, ids.shape[:2])  # of no set, or of one of three
    ids[..., 0] = np.where(names >= 0, -2 - names, ids[..., 0])
    whole = np.full((*ids.shape[:2], 3 + 16), -1)
    of_whole = np.ones(whole.shape)
    for place in np.ndindex(*names.shape):
        marks = [(i, s) for i, s in zip(ids[place], own[place], strict=True) if i >= 0]
        if names[place] >= 0:
            marks += [(i, own[place][0]) for i in sets[names[place]]]
        for slot, (i, strength) in enumerate(marks):
            whole[place][slot], of_whole[place][slot] = i, strength
    named = {**tokens, "negative_ids": jnp.asarray(ids, jnp.int32)}
    written = {**tokens, "negative_ids": jnp.asarray(whole, jnp.int32)}
    if strengths is not None:
        written["negative_strengths"] = jnp.asarray(of_whole, jnp.float32)
    with_sets = dataclasses.replace(objective, sets=sets)
    found = with_gradients(fused_values, with_sets, current, original, named)
    expected = with_gradients(dense, objective, current, original, written)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, expected
    )
    # And where logits are whole.
    batch = {f"decoder_{name}": value for name, value in named.items()}
    total, values = train_step.token_values(
        with_sets, current.whole(), original.whole() if objective.needs_original else None, batch
    )
    np.testing.assert_allclose(total, expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(values.losses, expected[1].losses, rtol=2e-5, atol=2e-5)
    marked = [
        objective.is_negative(t["target_tokens"], t["negative_ids"]) for t in (named, written)
    ]
    is_full = np.asarray(names) != 2  # a set without ids is none that `train` makes
    np.testing.assert_array_equal(np.asarray(marked[0])[is_full], np.asarray(marked[1])[is_full])


def test_a_shared_set_takes_memory_once():
    """Not `[B, T, K]`: with 2,000 ids the step needs what a few blocks of rows do."""
    objective = OBJECTIVES["TNRF"]

    def memory(**settings):
        current, original, tokens = problem(batch=512, vocab_size=2048, width=8, **settings)
        of = objective
        if "num_ids" not in settings:
            of = dataclasses.replace(objective, sets=(tuple(range(2000)),))
            ids = tokens["negative_ids"][..., :1].at[:].set(-2)
            tokens = {**tokens, "negative_ids": ids}
        step = with_gradients.lower(fused_values, of, current, original, tokens)
        found = step.compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes

    written = 512 * LENGTH * 2000 * 4  # 24 MB
    assert memory(num_ids=2000) - memory() > 0.9 * written


@each_objective
def test_agrees_with_the_definition_on_many_ids(objective):
    """More than there are in the vocabulary: most are there several times."""
    assert_agree(objective, *problem(3, num_ids=60))


def test_memory_is_linear_in_the_ids_of_a_position():
    """To compare 4,096 ids with each other in 24 rows would take 400 MB."""
    objective = OBJECTIVES["TNRF"]
    current, original, tokens = problem(num_ids=4096)
    compiled = with_gradients.lower(fused_values, objective, current, original, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 20e6


@pytest.mark.parametrize("name", [name for name in GRADED if name != "UNDIAL"])
def test_a_strength_of_1_is_removal_bit_by_bit(name):
    """The program is another one, and no number of it: neither fused nor by the definition.

    XLA rounds two programs alike as it compiles by default, not as tests compile (conftest.py).
    """
    emitters = "xla_cpu_use_fusion_emitters"
    by_default = jax.jit(
        with_gradients.__wrapped__,
        static_argnames=("function", "objective"),
        compiler_options={emitters: True} if emitters in os.environ["XLA_FLAGS"] else None,
    )
    objective = OBJECTIVES[name]
    current, original, tokens = problem(12)
    ones = {"negative_strengths": jnp.ones(tokens["negative_ids"].shape, jnp.float32)}
    for function in (fused_values, dense):
        found, expected = (
            by_default(function, objective, current, original, each)
            for each in (tokens | ones, tokens)
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_capped_logits_by_hand():
    current, _, _ = problem(softcap=4.0)
    logits = np.asarray(current.replace(softcap=None).whole(), np.float64)
    assert np.abs(logits).max() > 8  # so that the bound is felt
    np.testing.assert_allclose(current.whole(), 4 * np.tanh(logits / 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("name", ["TNRF", "TNSR", "TNJSJ", "UL+LL", "TNRLL", "TNRR smoothed"])
def test_agrees_with_the_definition_on_capped_logits(name, vocab_axis):
    assert_agree(OBJECTIVES[name], *problem(10, vocab_axis=vocab_axis, softcap=4.0))


def test_each_model_has_its_own_cap():
    current, original, tokens = problem(11, softcap=4.0)
    assert_agree(OBJECTIVES["TNRF"], current, original.replace(softcap=2.5), tokens)
    assert_agree(OBJECTIVES["TNRF"], current.replace(softcap=None), original, tokens)


@pytest.mark.parametrize("block_size", [1, 5, 16, 24, 100])
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_agrees_for_any_block_and_matrix(block_size, vocab_axis):
    inputs = problem(1, vocab_axis=vocab_axis, num_ids=12)
    assert_agree(OBJECTIVES["TNRF"], *inputs, block_size=block_size)


@pytest.mark.parametrize("block_size", [32, 48])
def test_agrees_in_several_passes_over_a_block(block_size):
    assert_agree(OBJECTIVES["TNRF"], *problem(9, batch=8), block_size=block_size)


@pytest.mark.parametrize("name", ["TNRF", "TNRLL smoothed", "fine-tune"])
def test_the_values_need_no_gradient(name):
    """Evaluation computes the same values without the gradient."""
    objective = OBJECTIVES[name]
    inputs = problem(2)
    total, values = without_gradients(objective, *inputs)
    expected_total, expected, _ = with_gradients(fused_values, objective, *inputs)
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), values, expected)


@pytest.mark.parametrize("name", ["TNRF", "TNRLL", "TNJSJ", "UL+LL"])
def test_agrees_in_bfloat16(name):
    # The definition rounds its gradients to bfloat16 too, but after other sums.
    inputs = problem(3, dtype=jnp.bfloat16)
    total, values, found = with_gradients(fused_values, OBJECTIVES[name], *inputs)
    expected_total, expected_values, expected = with_gradients(dense, OBJECTIVES[name], *inputs)
    np.testing.assert_allclose(total, expected_total, rtol=2e-5)
    np.testing.assert_allclose(values.losses, expected_values.losses, rtol=2e-5, atol=2e-6)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == jnp.bfloat16
        one, other = (np.asarray(x, np.float32) for x in (one, other))
        assert np.linalg.norm(one - other) <= 4e-3 * np.linalg.norm(other)


@each_graded
def test_strengths_are_finite_at_gaps_of_ten_thousand(name):
    test_finite_at_gaps_of_ten_thousand(OBJECTIVES[name], RAISED)


@each_objective
def test_finite_at_gaps_of_ten_thousand(objective, strengths=None):
    inputs = problem(4, scale=3000.0, strengths=strengths)
    assert float(jnp.ptp(inputs[0].whole())) > 2e4
    total, values, gradients = with_gradients(fused_values, objective, *inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((total, values, gradients)))
    _, expected, _ = with_gradients(dense, objective, *inputs)
    np.testing.assert_allclose(values.losses, expected.losses, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if "smoothed" not in n and "+" not in n])
def test_the_original_is_a_fixed_point(name):
    objective = OBJECTIVES[name]
    if objective.positive_term == "log_likelihood" or objective.removed_everywhere:
        pytest.skip("its desired distribution is not the original")
    _, original, tokens = problem(5)
    tokens |= {"negative_ids": jnp.full_like(tokens["negative_ids"], -1)}
    total, values, gradients = with_gradients(fused_values, objective, original, original, tokens)
    assert total == 0
    assert not values.losses.any()
    assert not any(g.any() for g in gradients)


def float64_gradient(current, original, tokens):
    """The gradient of KL(p0 || p), TNRF's unmarked loss, to the hidden states: (p - p0) W^T."""
    hidden, matrix = (np.asarray(x, np.float64) for x in (current.hidden, current.matrix))
    hidden0, matrix0 = (np.asarray(x, np.float64) for x in (original.hidden, original.matrix))

    def probs(logits):
        logits = logits - logits.max(axis=-1, keepdims=True)
        return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)

    change = probs(hidden @ matrix) - probs(hidden0 @ matrix0)
    return (change * np.asarray(tokens["loss_mask"])[..., None]) @ matrix.T


@pytest.mark.parametrize("drift", [1e-1, 1e-2, 1e-3])
def test_digits_near_the_original(drift):
    """The gradient is a difference of nearly equal distributions, and keeps its digits."""
    current, original, tokens = problem(6, drift=drift)
    tokens |= {"negative_ids": jnp.full_like(tokens["negative_ids"], -1)}
    _, _, (found, _) = with_gradients(fused_values, OBJECTIVES["TNRF"], current, original, tokens)
    expected = float64_gradient(current, original, tokens)
    # The logits themselves are off by one rounding of some 10, 1e-6, at a drift of about that.
    assert np.linalg.norm(found - expected) <= (3e-6 / drift) * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["TNRF", "UL+LL"])
def test_padding_is_not_looked_at(name):
    current, original, tokens = problem(7)
    is_padding = (tokens["loss_mask"] == 0)[..., None]
    spoilt = [
        model.replace(hidden=jnp.where(is_padding, jnp.nan, model.hidden))
        for model in (current, original)
    ]
    found = with_gradients(fused_values, OBJECTIVES[name], *spoilt, tokens, block_size=5)
    expected = with_gradients(
        fused_values, OBJECTIVES[name], current, original, tokens, block_size=5
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_batch_of_padding_alone():
    current, original, tokens = problem(8)
    tokens |= {"loss_mask": jnp.zeros_like(tokens["loss_mask"])}
    found = with_gradients(fused_values, OBJECTIVES["TNRF"], current, original, tokens)
    assert not any(x.any() for x in jax.tree.leaves(found))


def test_mistakes_are_those_of_the_definition():
    current, _, tokens = problem()
    with pytest.raises(UsageError, match="there are no original logits"):
        fused_values(OBJECTIVES["TNRF"], current, None, tokens)
    objective = objective_of("unlikelihood", "log_likelihood", removed_everywhere=(VOCAB_SIZE,))
    with pytest.raises(UsageError, match=f"ids below the vocabulary size, {VOCAB_SIZE}"):
        fused_values(objective, current, None, tokens)


# --------------------------------------------------------------------------------------- On a mesh


def on_mesh(objective, shape, current, original, tokens, **settings):
    """The compiled step of a mesh, parameters stored as `sharding` has it, and its inputs."""
    mesh = sharding.make_mesh(sharding.MeshShape(**shape))
    embed_and_vocab = ["fsdp", "model"] if current.vocab_axis else ["model", "fsdp"]

    def place(x, *spec):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec)))

    def of(model):
        return model.replace(
            hidden=place(model.hidden, ("data", "fsdp")),
            matrix=place(model.matrix, *embed_and_vocab),
        )

    def step(current, original, tokens):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return with_gradients(fused_values, objective, current, original, tokens, **settings)

    inputs = of(current), of(original), {k: place(x, ("data", "fsdp")) for k, x in tokens.items()}
    return jax.jit(step).lower(*inputs).compile(), inputs


SHAPES = [(8, 1, 1), (4, 1, 2), (1, 4, 2), (2, 4, 1), (2, 2, 2), (1, 1, 8)]


ON_MESHES = {
    **dict.fromkeys(["TNRF", "TNRLL smoothed", "TNRF everywhere", "TNRF capped"], SHAPES),
    "NPO+KL": [(2, 2, 2)],
    "FTPO": [(1, 4, 2), (2, 4, 1), (1, 1, 8)],
    "FTPO everywhere": [(2, 2, 2)],
}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name, shapes in ON_MESHES.items() for shape in shapes],
    ids=str,
)
def test_eight_devices_give_the_numbers_of_one(name, shape):
    inputs = problem(9, batch=8, softcap=4.0 if name.endswith("capped") else None)
    assert_same_on_mesh(OBJECTIVES[name.removesuffix(" capped")], shape, inputs)


@pytest.mark.parametrize("name", ["TNRF", "UL+KL"])
def test_eight_devices_give_the_numbers_of_one_on_strengths(name):
    assert_same_on_mesh(OBJECTIVES[name], (2, 2, 2), problem(9, batch=8, strengths=RAISED))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_eight_devices_give_the_numbers_of_one_on_sets(shape):
    """A set may have ids from every part of a vocabulary that is split over devices."""
    objective = dataclasses.replace(OBJECTIVES["TNRF"], sets=((1, 7, 20, 33, 39), (4, 8)))
    current, original, tokens = problem(9, batch=8)
    named = np.random.default_rng(1).integers(-3, 0, tokens["negative_ids"].shape[:2])
    ids = tokens["negative_ids"].at[..., 0].set(jnp.asarray(named, jnp.int32))
    assert_same_on_mesh(objective, shape, (current, original, {**tokens, "negative_ids": ids}))


def assert_same_on_mesh(objective, shape, inputs):
    step, placed = on_mesh(objective, dict(zip(sharding.MESH_AXES, shape, strict=True)), *inputs)
    found = step(*placed)
    expected = with_gradients(fused_values, objective, *inputs)

    def assert_close(one, other):  # to the rounding of sums whose parts cancel
        largest = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6 * largest)

    jax.tree.map(assert_close, found, expected)


def test_of_equal_logits_eight_devices_choose_the_same():
    """All logits of the original are 0: chosen are the first ids that stay, of several devices."""
    # So few tokens that two axes of the mesh split the vocabulary.
    current, original, tokens = problem(12, batch=4)
    original = original.replace(matrix=jnp.zeros_like(original.matrix))
    step, placed = on_mesh(OBJECTIVES["FTPO"], {"fsdp": 4, "model": 2}, current, original, tokens)
    expected, values, _ = with_gradients(dense, OBJECTIVES["FTPO"], current, original, tokens)
    assert expected > 0
    of_one = with_gradients(fused_values, OBJECTIVES["FTPO"], current, original, tokens)
    for found, found_values, _ in (step(*placed), of_one):
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        np.testing.assert_allclose(found_values.losses, values.losses, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("size", [7, 40, 41, 300])
@pytest.mark.parametrize("number", [1, 5, 7])
def test_the_largest_logits_are_those_of_a_sort(size, number):
    """With many equals: the first of them come first."""
    logits = np.random.default_rng(size).integers(0, 9, (3, size)).astype(np.float32)
    values, ids = fused_block.Reductions((), size).top(jnp.asarray(logits), number)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :number]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, expected, axis=1))


def largest_in_loop(compiled):
    """Elements of the largest collective within a loop body, and of the largest outside."""
    sizes = {True: [0], False: [0]}
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter)\(", line)
        if found:
            is_in_loop = "while/body" in line
            for dims in re.findall(r"\w+\[([\d,]*)\]", found[1]):
                sizes[is_in_loop].append(int(np.prod([int(d) for d in dims.split(",") if d])))
    return max(sizes[True]), max(sizes[False])


@pytest.mark.parametrize("shape", [(4, 1, 2), (1, 4, 2), (8, 1, 1)], ids=str)
def test_the_loop_exchanges_rows_alone_and_divides_the_work(shape):
    shape = dict(zip(sharding.MESH_AXES, shape, strict=True))
    inputs = problem(9, batch=8, vocab_size=640)  # matrix products are most of the work
    rows = 4
    step, _ = on_mesh(OBJECTIVES["TNRF"], shape, *inputs, block_size=rows)
    in_loop, outside = largest_in_loop(step)
    assert in_loop <= (0 if shape["data"] == 8 else rows)
    assert outside > 0 or shape["data"] == 1  # the gradient to the matrix: it is looked at all
    # A loop body counts once: every device computes `rows` tokens with its share of the columns,
    # and a group that shares its tokens takes as many blocks as those tokens are.
    one, _ = on_mesh(OBJECTIVES["TNRF"], {"data": 8}, *inputs, block_size=rows)
    of_group, of_device = (x.cost_analysis()["flops"] for x in (step, one))
    assert of_group <= of_device / (shape["fsdp"] * shape["model"]) * 1.3
