"""Attention over whole rows: who sees whom, and the kernels that compute it without its logits.

A position sees those of its own example that are not later, within the window of its layer. That is
the one rule, `mask`; each way to compute attention has it in its own terms:

    xla      a mask of all pairs of positions: on every device, for every network. Logits
             `[.., L, L]` of each head are held. `causal_lm_layers.Attention` computes it.
    splash   JAX's kernel for TPUs: a static mask of rows and columns, and the example of each
    cudnn    NVIDIA's kernel: causality and a window. It knows no examples, so a row may hold one;
             what fills the row up comes after it, where nothing of it looks

Axes: B rows, L positions, H heads of keys and values, G query heads that share one, D width of a
head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tnt_jax.models import sharding
from tnt_jax.models.layers import KeysValues
from tnt_jax.runtime.array_types import Array, Bool, Float, Int
from tnt_jax.runtime.errors import UsageError

_PLATFORMS = {"splash": ("tpu", "TPUs"), "cudnn": ("gpu", "NVIDIA GPUs")}
_LANES = 128  # of a TPU: a block of positions is a multiple of it
_LARGEST_BLOCK = 640  # positions; a block of logits is of float32, in a memory of some MiB


def mask(
    segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"], window: Int[Array, ""]
) -> Bool[Array, "B 1 1 L L"]:
    """The rule: which positions of a row each position sees.

    Args:
      segment_ids: The example of each position.
      positions: Counted from 0 in each example.
      window: How many positions a position sees, itself among them.
    """
    asking, seen = positions[:, :, None], positions[:, None, :]
    is_same = segment_ids[:, :, None] == segment_ids[:, None, :]
    allowed = is_same & (seen <= asking) & (asking - seen < window)
    return allowed[:, None, None]


def check_platform(implementation: str, mesh: Mesh) -> None:
    """Raises a UsageError where the devices of a mesh do not have a kernel."""
    platform, name = _PLATFORMS.get(implementation, (None, ""))
    found = mesh.devices.flat[0].platform
    if platform not in (None, found):
        raise UsageError(
            f"ATTENTION: {implementation!r} is for {name}, found devices of the kind {found!r}. "
            "Use ATTENTION='xla'."
        )


def by_kernel(
    implementation: str,
    queries: Float[Array, "B H G L D"],
    keys_values: KeysValues,
    segment_ids: Int[Array, "B L"],
    *,
    windows: Sequence[int | None],
    kind: Int[Array, ""],
    scale: float,
    softcap: float | None,
) -> Float[Array, "B H G L D"]:
    """Attends within whole rows, without logits in memory.

    Where no mesh says that this is a TPU, `splash` is interpreted, slowly.

    Args:
      implementation: "splash" or "cudnn".
      queries: Rotated, by the head of keys that they ask.
      keys_values: Rotated keys, and values, `[B, H, L, D]` both.
      segment_ids: The example of each position; its positions are next to each other.
      windows: The window of each kind of layer (`LayerKind.window`): positions that are seen, up to
        and with the own one; None sees all earlier ones.
      kind: Index into `windows`: the kind of this layer.
      scale: Multiplies attention logits.
      softcap: The bound of attention logits (`factored_logits.cap`); None is no bound. "cudnn"
        needs None.
    """
    length = queries.shape[3]
    within = [None if window is None or window >= length else window for window in windows]
    distinct = list(dict.fromkeys(within))
    number = jnp.asarray([distinct.index(window) for window in within])[kind]
    if implementation == "splash":
        kernel = functools.partial(_splash, softcap=softcap, interpret=_platform() != "tpu")
    else:
        kernel = _cudnn
    # The masks of the kernels are static, the kind of a layer in a loop is not.
    branches = [functools.partial(kernel, window=window, scale=scale) for window in distinct]

    def attend(number: Int[Array, ""], *arrays: Array) -> Array:
        return jax.lax.switch(number, branches, *arrays)  # one branch is no switch at all

    return _on_each_device(attend)(number, queries, *keys_values, segment_ids)


def _platform() -> str:
    """The platform that is traced for: it need not be here."""
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _on_each_device(attend: Callable[..., Array]) -> Callable[..., Array]:
    """`attend` with the rows and heads that a device of the mesh in use has.

    The partitioner cannot divide a kernel, so no axis may be left to it: those of one device are
    taken over too.
    """
    axes = sharding.automatic_axes()
    if not axes:
        return attend
    spec = functools.partial(sharding.spec_of, mesh_axes=axes)
    queries = spec(("batch", "heads", "width", "length", "width"))
    keys = spec(("batch", "heads", "length", "width"))
    return jax.shard_map(
        attend,
        in_specs=(spec(()), queries, keys, keys, spec(("batch", "length"))),
        out_specs=queries,
        axis_names=set(axes),
        check_vma=False,
    )


def _static_mask(length: int, window: int | None) -> Any:
    """`mask` within an example, whose positions are next to each other, for the kernel of TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    if window is None:
        return library.CausalMask((length, length))
    return library.LocalMask((length, length), (window - 1, 0), 0)


def _splash(
    queries: Float[Array, "B H G L D"],
    keys: Float[Array, "B H L D"],
    values: Float[Array, "B H L D"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B H G L D"]:
    """By JAX's kernel, with its backward pass in one kernel as well."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length = queries.shape[3]
    # Filled up to whole blocks: what comes after a row is later than all of it, so not seen.
    fill = -length % _LANES

    def filled(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, fill if i == axis else 0) for i in range(x.ndim)])

    whole = length + fill
    block = max(
        size for size in range(_LANES, min(whole, _LARGEST_BLOCK) + 1, _LANES) if whole % size == 0
    )
    num_heads = queries.shape[1] * queries.shape[2]
    kernel = library.make_splash_mha(
        library.MultiHeadMask([_static_mask(whole, window)] * num_heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    scaled = (queries.astype(jnp.float32) * scale).astype(queries.dtype)  # the kernel does not
    flat = scaled.reshape(len(queries), num_heads, length, -1)
    ids = filled(segment_ids, 1)
    mixed: Any = jax.vmap(kernel)(
        filled(flat, 2), filled(keys, 2), filled(values, 2), library.SegmentIds(ids, ids)
    )
    return mixed[:, :, :length].reshape(queries.shape)


def _cudnn(
    queries: Float[Array, "B H G L D"],
    keys: Float[Array, "B H L D"],
    values: Float[Array, "B H L D"],
    segment_ids: Int[Array, "B L"],
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "B H G L D"]:
    """By cuDNN: each row is one example, and filler after it."""
    del segment_ids
    flat = queries.reshape(len(queries), -1, *queries.shape[3:])
    mixed = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (flat, keys, values)),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed.swapaxes(1, 2).reshape(queries.shape)
