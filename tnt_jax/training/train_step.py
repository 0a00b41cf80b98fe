"""The update: one pure function that holds the original, the current model and the objective.

Metrics leave the step as sums and counts, over the whole global batch; `summarize` divides once.
So microbatches, devices and batches without a negative token all add up to the same numbers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from tnt_jax import objectives
from tnt_jax.models import sharding
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.model import Forward
from tnt_jax.objectives import fused
from tnt_jax.objectives.fused import TokenValues
from tnt_jax.runtime.array_types import Array, Bool, Float, Int, Key, PyTree
from tnt_jax.training.originals import PARAMETERS, Logits, Original

Batch = Mapping[str, Int[Array, "B ..."] | Float[Array, "B ..."]]
Sums = dict[str, Float[Array, ""] | Bool[Array, "N"]]


class TrainState(flax.struct.PyTreeNode):
    """All that an update changes, and so all that a checkpoint holds.

    Attributes:
      step: Number of updates so far.
      params: The parameters that are trained, float32.
      opt_state: The state of the Optax optimizer.
    """

    step: Any  # Int[Array, ""], but trees of shapes and of shardings are TrainStates too
    params: PyTree
    opt_state: PyTree


def init_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )


def train_step(
    state: TrainState,
    original_params: PyTree | None,
    batch: Batch,
    key: Key[Array, ""],
    *,
    forward: Forward,
    objective: objectives.TntObjective,
    optimizer: optax.GradientTransformation,
    num_microbatches: int = 1,
    original_kind: Original = PARAMETERS,
    block_size: int | None = None,
    place_gradients: Callable[[PyTree], PyTree] = lambda gradients: gradients,
    skip_non_finite: bool = False,
) -> tuple[TrainState, Sums]:
    """One update.

    The loss is the sum of the objective's token losses over the whole batch divided by the number
    of unmasked tokens, however many microbatches it is computed in.

    With microbatches, gradients are added up on each device of the `data` axis of the mesh in use
    and exchanged once. Where parameters are split over `fsdp`, each microbatch scatters them.

    Args:
      state: The training state before the update.
      original_params: What `original_kind` needs of the frozen original, which runs without dropout
        and gets no gradient. None where the objective needs no original.
      batch: Model features of `data.layouts`, `[B, ...]`.
      key: The random key of the run, the same for every step: dropout uses `fold_in(key, step)`.
      forward: `forward(params, batch, dropout_key or None) -> logits [B, T, V]`; or their factors,
        from which `fused` works.
      objective: The loss per token.
      optimizer: Updates the parameters.
      num_microbatches: Divides `B`; activations of one microbatch live at a time.
      original_kind: Where the original's logits come from.
      block_size: Tokens that the loss is computed for at a time on a device; None chooses. Read by
        `fused.token_values`.
      place_gradients: Puts a tree of gradients where the parameters are (a sharding constraint).
      skip_non_finite: Where the loss or the gradient's norm is not finite, parameters and optimizer
        state stay as they were. The step is counted all the same: it has had its batch.

    Returns:
      The next state, and sums for `summarize`; those of an update that was skipped are not finite
      either. The gradient's norm is the one before clipping. "gradient_not_finite" `[N]` is no
      sum: it is True for those of the parameters of `gradient_names` whose norm is not finite.
    """
    # The mean is taken before the gradient: dividing gradients would take memory for some of them
    # twice. A batch of padding alone changes nothing.
    num_tokens = jnp.maximum(jnp.sum(batch["decoder_loss_mask"] != 0, dtype=jnp.float32), 1.0)

    def loss_and_sums(params, original_params, rows, key):
        current = forward(original_kind.current_params(params, original_params), rows, key)
        of_original = None
        if original_params is not None and objective.needs_original:
            of_original = original_kind.logits(forward, original_params, rows)
        loss, sums = token_sums(objective, current, of_original, rows, block_size)
        return loss / num_tokens, sums

    def gradients_and_sums(params, original_params, rows, key):
        (_, sums), gradients = jax.value_and_grad(loss_and_sums, has_aux=True)(
            params, original_params, rows, key
        )
        return place_gradients(gradients), sums

    step_key = jax.random.fold_in(key, state.step)
    if num_microbatches == 1:
        gradients, sums = gradients_and_sums(
            state.params, original_params, batch, jax.random.fold_in(step_key, 0)
        )
    else:
        gradients, sums = _add_up_microbatches(
            gradients_and_sums,
            num_microbatches,
            place_gradients,
            state.params,
            original_params,
            batch,
            step_key,
        )

    squares = _gradient_squares(gradients)
    norm = jnp.sqrt(jnp.sum(squares))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if skip_non_finite:
        is_finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(is_finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    next_state = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    sums |= {"gradient_norm": norm, "num_updates": jnp.ones(())}
    sums["gradient_not_finite"] = ~jnp.isfinite(squares)
    return next_state, sums


def _is_stacked(name: str) -> bool:
    return "/layers/" in name


def gradient_names(params: PyTree) -> list[str]:
    """The parameters of a step's "gradient_not_finite", each layer of a stack by itself."""
    names = []
    for path, leaf in jax.tree.leaves_with_path(params):
        name = sharding.path_name(path)
        if _is_stacked(name):
            layers = range(leaf.shape[0])
            names += [name.replace("/layers/", f"/layers_{layer}/") for layer in layers]
        else:
            names.append(name)
    return names


def _gradient_squares(gradients: PyTree) -> Float[Array, "N"]:
    """Sums of squares, in the order of `gradient_names`."""

    def of_leaf(path, leaf):
        squares = jnp.square(leaf.astype(jnp.float32))
        is_stacked = _is_stacked(sharding.path_name(path))
        return jnp.atleast_1d(jnp.sum(squares, axis=tuple(range(is_stacked, leaf.ndim))))

    return jnp.concatenate(jax.tree.leaves(jax.tree.map_with_path(of_leaf, gradients)))


def _add_up_microbatches(
    function, num_microbatches, place_gradients, params, original_params, batch, key
):
    """The sum of `function(params, original_params, rows, key)` over microbatches and devices."""
    axis = "data"
    is_split = axis in sharding.free_axes()

    def on_device(params, original_params, batch, key):
        if is_split:  # otherwise all devices would drop the same
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))
        # Every n-th row, not n in a row: so each microbatch stays spread over all devices.
        microbatches = jax.tree.map(
            lambda x: x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1), dict(batch)
        )

        def add(totals, inputs):
            rows, index = inputs
            found = function(params, original_params, rows, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, totals, found), None

        first = jax.tree.map(lambda x: x[0], microbatches)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(function, params, original_params, first, key),
        )
        inputs = microbatches, jnp.arange(num_microbatches)
        totals, _ = jax.lax.scan(add, (place_gradients(zeros[0]), zeros[1]), inputs)
        return jax.lax.psum(totals, axis) if is_split else totals

    if not is_split:
        return on_device(params, original_params, batch, key)
    everywhere, rows = PartitionSpec(), PartitionSpec(axis)
    return jax.shard_map(
        on_device,
        in_specs=(everywhere, everywhere, rows, everywhere),
        out_specs=everywhere,
        axis_names={axis},
        check_vma=False,
    )(params, original_params, batch, key)


def eval_step(
    params: PyTree,
    original_params: PyTree | None,
    batch: Batch,
    *,
    forward: Forward,
    objective: objectives.TntObjective,
    original_kind: Original = PARAMETERS,
    block_size: int | None = None,
) -> Sums:
    """The sums of one batch without dropout and without an update."""
    return token_step(
        params,
        original_params,
        batch,
        forward=forward,
        objective=objective,
        original_kind=original_kind,
        block_size=block_size,
    )[0]


def token_step(
    params: PyTree,
    original_params: PyTree | None,
    batch: Batch,
    *,
    forward: Forward,
    objective: objectives.TntObjective,
    original_kind: Original = PARAMETERS,
    block_size: int | None = None,
) -> tuple[Sums, TokenValues]:
    """The sums of `eval_step`, and the values `[B, T]` of each token that they are sums of."""
    of_original = None
    gives_logits = original_kind.gives_logits(needs_original=objective.needs_original)
    if original_params is not None and gives_logits:
        of_original = original_kind.logits(forward, original_params, batch)
    current = forward(original_kind.current_params(params, original_params), batch, None)
    values = token_values(objective, current, of_original, batch, block_size)[1]
    return _sums(objective, values, batch), values


def token_sums(
    objective: objectives.TntObjective,
    logits: Logits,
    original_logits: Logits | None,
    batch: Mapping[str, Array],
    block_size: int | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """The loss, and what a step reports of a batch: sums over its tokens, counts (`MEAN_OVER`).

    The arguments are those of `token_values`.

    Returns:
      The sum of the losses, which has a gradient; and the sums, which have none.
    """
    loss, values = token_values(objective, logits, original_logits, batch, block_size)
    return loss, _sums(objective, values, batch)


def token_values(
    objective: objectives.TntObjective,
    logits: Logits,
    original_logits: Logits | None,
    batch: Mapping[str, Array],
    block_size: int | None = None,
) -> tuple[Float[Array, ""], TokenValues]:
    """The loss, and the values of each token.

    Logits that are whole go through the definition, their factors through `fused`.

    Args:
      objective: The loss per token.
      logits: The logits of the model being trained, `[B, T, V]`, or their factors.
      original_logits: The original's logits, whole or in factors as `logits` are; None where there
        is none.
      batch: Model features of `data.layouts`, `[B, ...]`.
      block_size: Tokens that the loss is computed for at a time on a device; None chooses. Read by
        `fused.token_values`.

    Returns:
      The sum of the losses, which has a gradient; and the values, which have none.
    """
    values_of: Any = _whole_values
    if isinstance(logits, FactoredLogits):
        values_of = functools.partial(fused.token_values, block_size=block_size)
    return values_of(
        objective,
        logits,
        original_logits,
        target_tokens=batch["decoder_target_tokens"],
        negative_ids=batch["decoder_negative_ids"],
        loss_mask=batch["decoder_loss_mask"],
        negative_strengths=batch.get("decoder_negative_strengths"),
    )


def _sums(
    objective: objectives.TntObjective, values: TokenValues, batch: Mapping[str, Array]
) -> Sums:
    mask = batch["decoder_loss_mask"]
    ids = batch["decoder_negative_ids"]
    strengths = objective.strengths(ids, batch.get("decoder_negative_strengths"))
    ids = objective.without_raised(ids, strengths)
    is_negative = objective.is_negative(batch["decoder_target_tokens"], ids)
    is_negative &= mask != 0
    is_positive = ~is_negative & (mask != 0)

    def total(values, where=None):
        return jnp.sum(values, where=where, dtype=jnp.float32)

    sums = {
        "loss": total(values.losses),
        "negative_loss": total(values.losses, is_negative),
        "positive_loss": total(values.losses, is_positive),
        "num_tokens": total(mask != 0),
        "num_negative": total(is_negative),
        "num_positive": total(is_positive),
    }
    if objective.negative_term != "none":
        sums["negative_mass"] = total(values.removed_mass, is_negative)
    if values.residual is not None and values.collateral is not None:
        sums |= {
            "positive_kl": total(values.residual + values.collateral, is_positive),
            "negative_residual": total(values.residual, is_negative),
            "negative_collateral": total(values.collateral, is_negative),
            "negative_smallest_cost": total(values.smallest_cost, is_negative),
        }
    return sums


def _whole_values(
    objective,
    logits,
    original_logits,
    *,
    target_tokens,
    negative_ids,
    loss_mask,
    negative_strengths,
):
    """Computes what `fused.token_values` does from whole logits, by the definition."""
    negative_ids, negative_strengths = objective.without_sets(negative_ids, negative_strengths)
    losses = objective.token_losses(
        current_logits=logits,
        original_logits=original_logits,
        target_tokens=target_tokens,
        negative_ids=negative_ids,
        loss_mask=loss_mask,
        negative_strengths=negative_strengths,
    )
    strengths = objective.strengths(negative_ids, negative_strengths)
    # What the loss ignores, the metrics do, too.
    negative_ids = objective.without_raised(negative_ids, strengths)
    if objective.negative_term == "none":
        negative_ids = jnp.full_like(negative_ids, -1)
    everywhere = objective.removed_everywhere
    logits = jax.lax.stop_gradient(logits)
    values = TokenValues(
        jax.lax.stop_gradient(losses),
        objectives.removed_mass(logits, negative_ids, everywhere, strengths),
    )
    if original_logits is not None:
        parts = objectives.certificate(
            current_logits=logits,
            original_logits=original_logits,
            negative_ids=negative_ids,
            removed_everywhere=everywhere,
            negative_strengths=strengths,
        )
        values = values._replace(**parts._asdict())
    return losses.sum(), values


# What each sum is a mean over. Counts are reported as they are.
MEAN_OVER = {
    "loss": "num_tokens",
    "negative_loss": "num_negative",
    "positive_loss": "num_positive",
    "negative_mass": "num_negative",
    "positive_kl": "num_positive",
    "negative_residual": "num_negative",
    "negative_collateral": "num_negative",
    "negative_smallest_cost": "num_negative",
    "gradient_norm": "num_updates",
}

# Those of them that need the original's logits.
OF_ORIGINAL = {"positive_kl", "negative_residual", "negative_collateral", "negative_smallest_cost"}


def total(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The sums of several steps or batches added up, without those that are arrays.

    In float64: a count of tokens over many updates passes what float32 holds exactly.
    """
    return {
        name: float(sum(float(of_step[name]) for of_step in sums))
        for name, first in sums[0].items()
        if not np.ndim(first)
    }


def summarize(sums: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Divides sums, of one step or added over many, by their counts; leaves out empty means."""
    means = {
        name: float(sums[name]) / float(sums[count])
        for name, count in MEAN_OVER.items()
        if name in sums and float(sums[count]) > 0
    }
    counts = {name: float(sums[name]) for name in sums if name.startswith("num_")}
    return means | counts
