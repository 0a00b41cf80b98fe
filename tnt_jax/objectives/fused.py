"""The numbers of `definition` from hidden states and output matrices: `[B, T, V]` is never held.

`definition` is the definition. Here the same losses, the same metrics and the gradient are computed
for a block of tokens at a time:

    logits of the block, of both models     2 matrix products with the output matrices
    loss, metrics and gradient to logits    some passes over [rows, V]
    gradient to hidden states and matrix    2 matrix products, in the forward pass already

so a `custom_vjp`'s backward only scales, nothing is computed twice, and memory is a few arrays of
`[rows, V]`, whatever the number of tokens. Padding is not computed at all: unmasked tokens come
first in the order of the blocks, and the loop ends with them.

Products are float32 of float32 inputs, at JAX's default precision, as in T5X: a TPU multiplies in
bfloat16 and adds up in float32 unless `JAX_DEFAULT_MATMUL_PRECISION` asks for more.

On a mesh every device has a part of the vocabulary and a part of the tokens (`_Layout`). Devices
that share tokens add up per-row vectors in the loop, nothing larger (FTPO also collects the largest
few logits of a row); devices that share the vocabulary need not take equally many blocks, and
exchange nothing until the loop has ended.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tnt_jax.models import factored_logits, sharding
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.model import Model
from tnt_jax.objectives import definition
from tnt_jax.objectives.fused_block import Block, Reductions, TokenValues
from tnt_jax.runtime.array_types import Array, Float, Int, PyTree


def token_values(
    objective: definition.TntObjective,
    current: FactoredLogits,
    original: FactoredLogits | None,
    *,
    target_tokens: Int[Array, "B T"],
    negative_ids: Int[Array, "#B #T K"],
    loss_mask: Int[Array, "B T"],
    negative_strengths: Float[Array, "#B #T K"] | None = None,
    block_size: int | None = None,
) -> tuple[Float[Array, ""], TokenValues]:
    """The sum of the losses, which has a gradient, and the values per token, which have none.

    Agrees with `definition` to rounding. It is computed on the mesh of
    `jax.sharding.use_abstract_mesh`, if there is one.

    Args:
      objective: The loss per token.
      current: Logits of the model being trained; the gradient goes to their `hidden` and `matrix`.
      original: Logits of the frozen original; they get no gradient. May be None unless the
        objective `needs_original`.
      target_tokens: The tokens that the decoder was made to predict.
      negative_ids: Ids to remove at each position, padded with -1; `[1, 1, K]` holds for all. The
        first of a position may be -2 - n: set n of the objective.
      loss_mask: 1 at real tokens, 0 at padding, which is skipped.
      negative_strengths: The strength of each of the `negative_ids`, finite and at most 1; None is
        1 for all.
      block_size: Tokens that a device computes at a time; None chooses, where there are many 256 on
        a CPU and 512 elsewhere.

    Raises:
      UsageError: `original` is None and a term needs it, or `removed_everywhere` holds an id
        outside the vocabulary.
    """
    objective.check(has_original=original is not None, vocab_size=_vocab_size(current))
    strengths = objective.strengths(negative_ids, negative_strengths)
    shape = (*target_tokens.shape, negative_ids.shape[-1])
    negative_ids = jnp.broadcast_to(negative_ids, shape)
    if strengths is not None:
        strengths = jnp.broadcast_to(strengths, shape)
    if original is not None:
        original = jax.lax.stop_gradient(original)
    tokens = (target_tokens, negative_ids, loss_mask, strengths)
    settings = _Settings(objective, block_size, current.vocab_axis, current.softcap)
    loss: Any = _loss
    total, values = loss(
        settings, current.hidden, current.matrix, original, jax.lax.stop_gradient(tokens)
    )
    return total, jax.lax.stop_gradient(values)


@sharding.keep_compiled
def jit_log_likelihoods(model: Model) -> Callable[..., Float[Array, "B T"]]:
    """Compiles `(params, batch) -> log p(target)` of each token of a batch, in nats.

    The batch has the model's features and "decoder_loss_mask" `[B, T]`: where that is 0, the result
    is 0. Every device gets the whole result.
    """
    likelihood = definition.TntObjective(negative_term="none", positive_term="log_likelihood")

    def log_likelihoods(params: PyTree, batch: Mapping[str, Array]) -> Float[Array, "B T"]:
        _, values = token_values(
            likelihood,
            model.forward(params, batch, None),
            None,
            target_tokens=batch["decoder_target_tokens"],
            negative_ids=jnp.full((1, 1, 1), -1, jnp.int32),
            loss_mask=batch["decoder_loss_mask"],
        )
        return -values.losses

    return jax.jit(
        sharding.traced_on(model.mesh, log_likelihoods),
        out_shardings=sharding.replicated(model.mesh),
    )


def _vocab_size(logits: FactoredLogits) -> int:
    return logits.matrix.shape[logits.vocab_axis]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is static: the objective, and how to compute it."""

    objective: definition.TntObjective
    block_size: int | None
    vocab_axis: int
    softcap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings, hidden, matrix, original, tokens):
    total, values, _ = _on_mesh(settings, hidden, matrix, original, tokens, with_gradients=False)
    return total, values


def _loss_forward(settings, hidden, matrix, original, tokens):
    total, values, gradients = _on_mesh(
        settings, hidden, matrix, original, tokens, with_gradients=True
    )
    return (total, values), gradients


def _loss_backward(settings, gradients, cotangents):
    del settings
    scale, _ = cotangents  # that of the values is zero: they come out under stop_gradient
    return *(scale.astype(g.dtype) * g for g in gradients), None, None


_loss.defvjp(_loss_forward, _loss_backward)


# ---------------------------------------------------------------------------------------- The mesh


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which mesh axes split the tokens, which the vocabulary, and how tokens are stored.

    Attributes:
      stored: Axes that split the rows of the batch.
      tokens: Those of them that split them here as well.
      vocab: Axes that split the vocabulary. Where `fsdp` is among them, the devices of a group see
        all tokens of the group: hidden states travel, not the matrix, which is larger.
      embed: Axes that split the other dimension of a matrix as it is stored.
    """

    stored: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @classmethod
    def of(cls, num_tokens: int, vocab_size: int, width: int) -> "_Layout":
        free = sharding.free_axes()
        stored = tuple(axis for axis in sharding.AXIS_RULES["batch"] if axis in free)
        vocab = tuple(axis for axis in sharding.AXIS_RULES["vocab"] if axis in free)
        shared = tuple(axis for axis in sharding.AXIS_RULES["embed"] if axis in stored)
        tokens_of_group = num_tokens // math.prod(
            free[axis] for axis in stored if axis not in shared
        )
        num_parts = math.prod(free[axis] for axis in (*shared, *vocab))
        if vocab_size % num_parts == 0 and tokens_of_group <= vocab_size:
            vocab = (*vocab, *shared)  # in this order a group has columns next to each other
        tokens = tuple(axis for axis in stored if axis not in vocab)
        is_split = width % math.prod(free[axis] for axis in shared) == 0
        return cls(stored, tokens, vocab, shared if is_split else ())

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes over which the tokens of a group are brought together."""
        return tuple(axis for axis in self.stored if axis not in self.tokens)

    @property
    def stored_vocab(self) -> tuple[str, ...]:
        """Axes that split the vocabulary of a matrix as it is stored."""
        return tuple(axis for axis in self.vocab if axis not in self.embed)

    def columns(self, matrix, vocab_axis):
        """From a device's part of a stored matrix to the columns that it computes with."""
        for axis in self.embed:
            if axis in self.vocab:
                matrix = jax.lax.all_to_all(
                    matrix, axis, split_axis=vocab_axis, concat_axis=1 - vocab_axis, tiled=True
                )
            else:
                matrix = jax.lax.all_gather(matrix, axis, axis=1 - vocab_axis, tiled=True)
        return matrix

    def stored_part(self, columns, vocab_axis):
        """Back: the sum over all devices of what they have for a part of the stored matrix."""
        for axis in self.embed:
            if axis in self.vocab:
                columns = jax.lax.all_to_all(
                    columns, axis, split_axis=1 - vocab_axis, concat_axis=vocab_axis, tiled=True
                )
            else:
                columns = jax.lax.psum_scatter(
                    columns, axis, scatter_dimension=1 - vocab_axis, tiled=True
                )
        rest = tuple(axis for axis in self.tokens if axis not in self.embed)
        return jax.lax.psum(columns, rest) if rest else columns


def _on_mesh(settings, hidden, matrix, original, tokens, *, with_gradients):
    """Total, values and gradients, computed where the mesh in use says."""
    vocab_axis = settings.vocab_axis
    layout = _Layout.of(tokens[0].size, matrix.shape[vocab_axis], matrix.shape[1 - vocab_axis])
    compute = functools.partial(_on_device, settings, layout, with_gradients=with_gradients)
    if not layout.stored and not layout.vocab:
        return compute(hidden, matrix, original, tokens)

    rows = PartitionSpec(layout.stored or None)

    def of(vocab_axis):  # as the parameter lies: whole along no axis
        embed, vocab = layout.embed or None, layout.stored_vocab or None
        return PartitionSpec(embed, vocab) if vocab_axis == 1 else PartitionSpec(vocab, embed)

    of_matrix, of_original = of(settings.vocab_axis), None
    if original is not None:
        of_original = original.replace(hidden=rows, matrix=of(original.vocab_axis))
    return jax.shard_map(
        compute,
        in_specs=(rows, of_matrix, of_original, rows),
        out_specs=(PartitionSpec(), rows, (rows, of_matrix) if with_gradients else None),
        axis_names={*layout.stored, *layout.vocab},
        check_vma=False,
    )(hidden, matrix, original, tokens)


def _on_device(settings, layout, hidden, matrix, original, tokens, *, with_gradients):
    """One device's part: its tokens, or those of its group, with its columns of the matrix."""

    def gather(x):
        for axis in reversed(layout.gathered):
            x = jax.lax.all_gather(x, axis, axis=0, tiled=True)
        return x

    def scatter(x):  # adds up what each device of the group has for every row
        for axis in layout.gathered:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        rest = tuple(axis for axis in layout.vocab if axis not in layout.gathered)
        return jax.lax.psum(x, rest) if rest else x

    def own_rows(x):  # every device of the group has the same
        for axis in layout.gathered:
            size = x.shape[0] // jax.lax.axis_size(axis)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size)
        return x

    batch_shape = hidden.shape[:2]
    flat = jax.tree.map(
        lambda x: gather(x).reshape(-1, *x.shape[2:]),
        (hidden, None if original is None else original.hidden, tokens),
    )
    hidden_rows, original_rows, token_rows = flat
    if original is not None:
        columns = layout.columns(original.matrix, original.vocab_axis)
        original = original.replace(hidden=original_rows, matrix=columns)
    columns = layout.columns(matrix, settings.vocab_axis)
    blocks = functools.partial(_blocks, settings, layout.vocab, with_gradients)
    values, gradients = jax.lax.platform_dependent(
        *(hidden_rows, columns, original, token_rows),
        cpu=functools.partial(blocks, _CPU),
        default=functools.partial(blocks, _ACCELERATOR),
    )
    values = jax.tree.map(lambda x: own_rows(x.reshape(-1, batch_shape[1])), values)
    total = jnp.sum(values.losses)
    if layout.stored:
        total = jax.lax.psum(total, layout.stored)
    if gradients is None:
        return total, values, None
    of_hidden, of_matrix = gradients
    of_hidden = scatter(of_hidden.reshape(-1, *batch_shape[1:], of_hidden.shape[-1]))
    of_matrix = layout.stored_part(of_matrix, settings.vocab_axis)
    return total, values, (of_hidden.astype(hidden.dtype), of_matrix.astype(matrix.dtype))


# -------------------------------------------------------------------------------------- The blocks


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Rows that are computed together on a kind of device.

    Attributes:
      smallest: Least rows of a block, where there are few tokens.
      largest: Most rows of a block. Each block reads the matrices, and the sum of their gradients,
        again.
      of_pass: Rows that are computed at a time between the products; None is all of a block.
    """

    smallest: int
    largest: int
    of_pass: int | None = None

    def of_block(self, num_tokens: int) -> int:
        """Small enough that padding is skipped, large enough for the products."""
        return min(self.largest, max(self.smallest, num_tokens // 8))


# Between the products there are ten passes over `[rows, V]` and more: 16 rows stay in a cache.
_CPU = _Sizes(smallest=32, largest=256, of_pass=16)
_ACCELERATOR = _Sizes(smallest=128, largest=512)


def _blocks(settings, vocab_axes, with_gradients, sizes, hidden, matrix, original, tokens):
    """Values of all tokens and the gradients, block by block; rows of `hidden` are tokens.

    Returns:
      TokenValues of `[N]`, and the float32 gradients to `hidden` and `matrix`, or None.
    """
    target_tokens, _, loss_mask, _ = tokens
    num_tokens, (_, embed) = len(target_tokens), hidden.shape
    rows = min(settings.block_size or sizes.of_block(num_tokens), num_tokens)
    # Without an original one pass is as quick; over a mesh each would be an exchange.
    rows_of_pass = sizes.of_pass if original is not None and not vocab_axes else None
    # Unmasked tokens first; one more block of indices, so that the last one is not cut.
    order = jnp.argsort(loss_mask == 0, stable=True)
    order = jnp.concatenate([order, jnp.full(rows, num_tokens, order.dtype)])
    num_live = jnp.sum(loss_mask != 0)
    reductions = Reductions(vocab_axes, matrix.shape[settings.vocab_axis])

    def take(x, index):  # an index of N, beyond the last row, reads 0
        return jnp.take(x, index, axis=0, mode="fill", fill_value=0)

    def block(carry):
        start, values, gradients = carry
        place = start + jnp.arange(rows)
        index = jax.lax.dynamic_slice_in_dim(order, start, rows)
        index = jnp.where(place < num_live, index, num_tokens)
        states = take(hidden, index)
        logits = factored_logits.multiply(states, matrix, settings.vocab_axis, settings.softcap)
        original_logits = None
        if original is not None:
            original_logits = factored_logits.multiply(
                take(original.hidden, index),
                original.matrix,
                original.vocab_axis,
                original.softcap,
            )
        target, negative, _, strengths = jax.tree.map(lambda x: take(x, index), tokens)
        negative, strengths = settings.objective.without_sets(negative, strengths)
        found, gradient = _in_passes(
            lambda *part: Block(settings.objective, reductions, *part).values_and_gradient(),
            rows_of_pass,
            (logits, original_logits, target, negative, strengths),
        )
        values = jax.tree.map(lambda x, y: x.at[index].set(y, mode="drop"), values, found)
        if with_gradients:
            gradient = jnp.where((place < num_live)[:, None], gradient, 0.0)
            if settings.softcap is not None:
                gradient *= factored_logits.slope_of_cap(logits, settings.softcap)
            of_hidden, of_matrix = gradients
            columns = "ev" if settings.vocab_axis == 1 else "ve"
            dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            update = dot(f"rv,{columns}->re", gradient, matrix.astype(jnp.float32))
            of_hidden = of_hidden.at[index].set(update, mode="drop")
            of_matrix += dot(f"re,rv->{columns}", states.astype(jnp.float32), gradient)
            gradients = of_hidden, of_matrix
        return start + rows, values, gradients

    has_original = original is not None
    zeros = jnp.zeros(num_tokens)
    values = TokenValues(zeros, zeros, *([zeros] * 3 if has_original else [None] * 3))
    gradients = None
    if with_gradients:
        gradients = jnp.zeros((num_tokens, embed)), jnp.zeros(matrix.shape)
    _, values, gradients = jax.lax.while_loop(
        lambda carry: carry[0] < num_live, block, (jnp.int32(0), values, gradients)
    )
    return values, gradients


def _in_passes(function, rows, arrays):
    """`function(*arrays)`, so many rows at a time, if they come out even."""
    num_rows = len(arrays[0])
    if rows is None or num_rows % rows:
        return function(*arrays)
    parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), arrays)
    found = jax.lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: x.reshape(num_rows, *x.shape[2:]), found)
