"""The update: one pure function that holds the original, the current model and the objective.

Metrics leave the step as sums and counts, over the whole global batch; `summarize` divides once.
So microbatches, devices and batches without a negative token all add up to the same numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tnt_jax import objectives
from tnt_jax.array_types import Array, Float, Int, Key, PyTree

Batch = Mapping[str, Int[Array, "B ..."]]
Forward = Callable[..., Float[Array, "B T V"]]  # (params, batch, dropout_key or None)
Sums = dict[str, Float[Array, ""]]


class TrainState(flax.struct.PyTreeNode):
    """All that an update changes, and so all that a checkpoint holds.

    Attributes:
      step: Number of updates so far.
      params: Of the current model, float32.
      opt_state: Of the Optax optimizer.
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
) -> tuple[TrainState, Sums]:
    """One update.

    The loss is the sum of the objective's token losses over the whole batch divided by the number
    of unmasked tokens, however many microbatches it is computed in.

    Args:
      state: Of the model being trained.
      original_params: Of the frozen original, which runs without dropout and gets no gradient. None
        where the objective needs no original.
      batch: Model features of `feature_converters`, `[B, ...]`.
      key: Of the run, the same for every step: dropout uses `fold_in(key, step)`.
      forward: `forward(params, batch, dropout_key or None) -> logits [B, T, V]`.
      objective: The loss per token.
      optimizer: Updates the parameters.
      num_microbatches: Divides `B`; activations of one microbatch live at a time.

    Returns:
      The next state, and sums for `summarize`. The gradient's norm is the one before clipping.
    """
    step_key = jax.random.fold_in(key, state.step)

    def microbatch_sums(params, rows, index):
        logits = forward(params, rows, jax.random.fold_in(step_key, index))
        original_logits = None if original_params is None else forward(original_params, rows, None)
        sums = token_sums(objective, logits, original_logits, rows)
        return sums["loss"], sums

    def accumulate(totals, inputs):
        (_, sums), gradients = jax.value_and_grad(microbatch_sums, has_aux=True)(
            state.params, *inputs
        )
        return jax.tree.map(jnp.add, totals, (gradients, sums)), None

    if num_microbatches == 1:
        (_, sums), gradients = jax.value_and_grad(microbatch_sums, has_aux=True)(
            state.params, batch, 0
        )
    else:
        # Every n-th row, not n in a row: so each microbatch stays spread over all `data` devices.
        microbatches = {
            name: rows.reshape(-1, num_microbatches, *rows.shape[1:]).swapaxes(0, 1)
            for name, rows in batch.items()
        }
        inputs = microbatches, jnp.arange(num_microbatches)
        first = jax.tree.map(lambda x: x[0], inputs)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(jax.grad(microbatch_sums, has_aux=True), state.params, *first),
        )
        (gradients, sums), _ = jax.lax.scan(accumulate, zeros, inputs)

    num_tokens = jnp.maximum(sums["num_tokens"], 1.0)  # a batch of padding alone changes nothing
    gradients = jax.tree.map(lambda g: g / num_tokens, gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    next_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    sums |= {"gradient_norm": optax.tree.norm(gradients), "num_updates": jnp.ones(())}
    return next_state, sums


def eval_step(
    params: PyTree,
    original_params: PyTree | None,
    batch: Batch,
    *,
    forward: Forward,
    objective: objectives.TntObjective,
) -> Sums:
    """The sums of one batch without dropout and without an update."""
    original_logits = None if original_params is None else forward(original_params, batch, None)
    return token_sums(objective, forward(params, batch, None), original_logits, batch)


def token_sums(
    objective: objectives.TntObjective,
    logits: Float[Array, "B T V"],
    original_logits: Float[Array, "B T V"] | None,
    batch: Mapping[str, Array],
) -> Sums:
    """What a step reports of a batch: sums over its tokens, and counts (`MEAN_OVER`)."""
    target_tokens = batch["decoder_target_tokens"]
    negative_ids = batch["decoder_negative_ids"]
    mask = batch["decoder_loss_mask"]
    losses = objective.token_losses(
        current_logits=logits,
        original_logits=original_logits,
        target_tokens=target_tokens,
        negative_ids=negative_ids,
        loss_mask=mask,
    )
    if objective.negative_term == "none":  # ignores marks, and so do the metrics
        negative_ids = jnp.full_like(negative_ids, -1)
    is_negative = objective.is_negative(target_tokens, negative_ids) & (mask != 0)
    is_positive = ~is_negative & (mask != 0)

    def total(values, where=None):
        return jnp.sum(values, where=where, dtype=jnp.float32)

    sums = {
        "loss": total(losses),
        "negative_loss": total(losses, is_negative),
        "positive_loss": total(losses, is_positive),
        "num_tokens": total(mask != 0),
        "num_negative": total(is_negative),
        "num_positive": total(is_positive),
    }
    # What the loss leaves to be seen: no gradient flows through the metrics below.
    logits = jax.lax.stop_gradient(logits)
    if objective.negative_term != "none":
        removed_mass = objectives.removed_mass(logits, negative_ids, objective.removed_everywhere)
        sums["negative_mass"] = total(removed_mass, is_negative)
    if original_logits is not None:
        parts = objectives.certificate(
            current_logits=logits,
            original_logits=original_logits,
            negative_ids=negative_ids,
            removed_everywhere=objective.removed_everywhere,
        )
        sums |= {
            "positive_kl": total(parts.residual + parts.collateral, is_positive),
            "negative_residual": total(parts.residual, is_negative),
            "negative_collateral": total(parts.collateral, is_negative),
            "negative_smallest_cost": total(parts.smallest_cost, is_negative),
        }
    return sums


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


def summarize(sums: Mapping[str, SupportsFloat]) -> dict[str, float]:
    """Divides sums, of one step or added over many, by their counts; leaves out empty means."""
    means = {
        name: float(sums[name]) / float(sums[count])
        for name, count in MEAN_OVER.items()
        if name in sums and float(sums[count]) > 0
    }
    counts = {name: float(sums[name]) for name in sums if name.startswith("num_")}
    return means | counts
