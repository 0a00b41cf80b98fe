"""Layers that every family of networks is made of: products, norm, dropout, MLP, stacks of layers.

A stack runs its layers one after the other or, with `NetworkConfig.scan_layers`, in one compiled
loop; `run_layers` is the only place that knows. Activations say what their dimensions mean
(`sharding.constrain`), weights are cast and gathered where they are used (`sharding.gather`), so on
a mesh with `fsdp` devices the weights of one layer at a time are whole, and activations never move.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from tnt_jax.models import adapters, sharding
from tnt_jax.models.network_config import ACTIVATIONS, REMAT_POLICIES, NetworkConfig
from tnt_jax.runtime.array_types import Array, Float

KeysValues = tuple[Float[Array, "_ H _ D"], Float[Array, "_ H _ D"]]
Cache = tuple[KeysValues, ...]  # of each layer
Axes = tuple[str, str]  # of a kernel: logical axes of its inputs and outputs


def _operand(kernel: Float[Array, "I O"], like: Array, axes: Axes, is_scanned: bool) -> Array:
    """A kernel as a layer computes with it: whole along `embed`, in the dtype of the other side."""
    if is_scanned and like.dtype == jnp.bfloat16:
        # Rounds as the cast does, so nothing changes. But a plain cast is moved out of the loop
        # by XLA for TPUs, through an optimization_barrier too: it casts the whole stack before
        # and keeps that, half as large as the parameters, until the loop has ended.
        kernel = jax.lax.reduce_precision(kernel, exponent_bits=8, mantissa_bits=7)
    return sharding.gather(kernel, axes, like.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "B T I"], kernel: Float[Array, "I O"], axes: Axes, is_scanned: bool
) -> Float[Array, "B T O"]:
    """`x @ kernel` in the dtype of `x`; the kernel's gradient adds up in the kernel's own.

    The sum over a batch is the one place where bfloat16 would lose what float32 parameters are kept
    for, on every device and between them. And the gathered kernel is not kept for the gradient,
    whatever `remat_policy` says: it is gathered again.
    """
    return x @ _operand(kernel, x, axes, is_scanned)


def _product_forward(x, kernel, axes, is_scanned):
    return x @ _operand(kernel, x, axes, is_scanned), (x, kernel)


def _product_backward(axes, is_scanned, kept, gradient):
    x, kernel = kept
    of_x = gradient @ _operand(kernel, x, axes, is_scanned).T
    if _tokens_travel(x, kernel, axes):
        x = sharding.constrain(x, "group", "length", axes[0])
        gradient = sharding.constrain(gradient, "group", "length", axes[1])
    of_kernel = jnp.einsum("bti,bto->io", x, gradient, preferred_element_type=kernel.dtype)
    return of_x, sharding.constrain(of_kernel, *axes)


def _tokens_travel(x: Float[Array, "B T I"], kernel: Float[Array, "I O"], axes: Axes) -> bool:
    """Whether a `fsdp` group shares its tokens for a kernel's gradient.

    The devices of a group hold a part of the kernel each, and its gradient is a sum over the tokens
    of all. Either each computes the whole gradient of its tokens and they scatter the sum, or each
    gets the tokens of the others and computes its part alone. The latter moves less, and needs no
    memory for whole gradients, where the tokens are few beside the width of the model.
    """
    if "embed" not in axes or "fsdp" not in sharding.free_axes():
        return False
    width = kernel.shape[axes.index("embed")]
    num_tokens = x.shape[0] * x.shape[1] // sharding.free_axes().get("data", 1)
    return num_tokens * x.dtype.itemsize <= width * kernel.dtype.itemsize


_product.defvjp(_product_forward, _product_backward)


def _along_last(vector: Any, like: Array) -> Array:
    """A vector with as many axes as an array has, for its last one."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


class Dense(nn.Module):
    """A product with a kernel, and with the adapter beside it if there is one.

    Attributes:
      config: The settings of the network.
      features: `O`, the width of the result.
      axes: Logical axes of the kernel.
      kernel_init: An initializer of Flax.
      dtype: Dtype of the computation, float32 or bfloat16.
      use_bias: Whether a bias is added, zero at first.
    """

    config: NetworkConfig
    features: int
    axes: Axes
    kernel_init: Callable
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """The product, in `dtype`."""
        shape = x.shape[-1], self.features
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        is_scanned = self.config.scan_layers
        product: Any = _product
        x = x.astype(self.dtype)
        y = product(x, self.param("kernel", init, shape, jnp.float32), self.axes, is_scanned)
        if self.use_bias:
            # A vector of the width of `embed` is too small to be worth gathering.
            axis = "norm" if self.axes[1] == "embed" else self.axes[1]
            init = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
            y = y + _along_last(self.param("bias", init, shape[1:], jnp.float32), y).astype(y.dtype)
        if not self.has_variable("params", adapters.ADAPTER_IN):
            return y
        for name, axes in (
            (adapters.ADAPTER_IN, (self.axes[0], "adapter_rank")),
            (adapters.ADAPTER_OUT, ("adapter_rank", self.axes[1])),
        ):
            x = product(x, self.get_variable("params", name), axes, is_scanned)
        return y + x * self.config.adapter_scale


def dense(
    config: NetworkConfig,
    features: int,
    axes: Axes,
    kernel_init: Callable | None = None,
    **kwargs: Any,
) -> Dense:
    """A `Dense` of the compute dtype, with T5X's initializer, unless told otherwise."""
    if kernel_init is None:
        kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
    kwargs.setdefault("dtype", config.dtype)
    return Dense(config, features, axes, kernel_init, **kwargs)


def layer_norm(config: NetworkConfig) -> nn.RMSNorm:
    """A norm by the root mean square, with a scale and without a bias."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    return nn.RMSNorm(epsilon=config.layer_norm_epsilon, dtype=config.dtype, scale_init=scale_init)


class OffsetNorm(nn.Module):
    """A norm by the root mean square whose scale is what the parameter adds to an offset.

    Computed in float32 throughout. The parameter stays as checkpoints have it: what is added in
    the layer is neither rounded into it, nor seen by an optimizer that goes by its size.

    Attributes:
      config: The settings of the network.
      offset: Added to the scale.
      axis: Logical axis of the scale.
    """

    config: NetworkConfig
    offset: float
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape E"]) -> Float[Array, "*shape E"]:
        """Normalises the last axis; the result is in the compute dtype."""
        init = nn.with_logical_partitioning(nn.initializers.constant(1 - self.offset), (self.axis,))
        scale: Any = self.param("scale", init, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + self.config.layer_norm_epsilon)
        return (x * _along_last(self.offset + scale, x)).astype(self.config.dtype)


def dropout(config: NetworkConfig) -> nn.Dropout:
    """Dropout with one mask for all positions of a sequence, as in T5."""
    return nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))


class Mlp(nn.Module):
    """Position-wise MLP; with several activations their outputs gate each other."""

    config: NetworkConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"], *, deterministic: bool) -> Float[Array, "B T E"]:
        """The same function at every position."""
        c = self.config
        names = ["wi"]
        if len(c.mlp_activations) > 1:
            names = [f"wi_{i}" for i in range(len(c.mlp_activations))]
        product = math.prod(
            ACTIVATIONS[activation](dense(c, c.mlp_dim, ("embed", "mlp"), name=name)(x))
            for name, activation in zip(names, c.mlp_activations, strict=True)
        )
        hidden = sharding.constrain(cast(jax.Array, product), "batch", "length", "mlp")
        hidden = dropout(c)(hidden, deterministic=deterministic)
        return dense(c, c.emb_dim, ("mlp", "embed"), name="wo")(hidden)


def make_layers(config: NetworkConfig, layer: type[nn.Module], num_layers: int) -> Any:
    """Makes what a stack has as its `layers`: one that stands for all, or a list of them."""
    return layer(config) if config.scan_layers else [layer(config) for _ in range(num_layers)]


def chosen(layers: Any, first: int, stop: int | None) -> Any:
    """The layers of a stack from `first` on, before `stop`; all of them, if they are scanned."""
    return layers if (first, stop) == (0, None) else layers[first:stop]


def run_layers(
    layers: Any,
    num_layers: int,
    config: NetworkConfig,
    x: Float[Array, "B T E"],
    call: Callable,
    per_layer: tuple[Array, ...] = (),
) -> Float[Array, "B T E"]:
    """`x` through all layers, each by `call`, which the remat policy is applied to.

    `call(layer, x, *of_layer)` returns `x`; `of_layer` is the layer's own part of each array of
    `per_layer`, `[num_layers, ...]`.

    Dropout draws other masks in a loop than without one: its keys are split from the stack's there,
    and made from the names of the layers elsewhere.
    """

    def run_one(
        layer: nn.Module, x: Float[Array, "B T E"], *of_layer: Array
    ) -> Float[Array, "B T E"]:
        return sharding.constrain(call(layer, x, *of_layer), "batch", "length", "width")

    if config.remat_policy != "none":
        # A loop keeps what it computes again apart from what it computed first; without one the
        # compiler would find the two equal, and keep the first.
        run_one = nn.remat(
            run_one,
            policy=REMAT_POLICIES[config.remat_policy],
            prevent_cse=not config.scan_layers,
        )
    if not config.scan_layers:
        for number, layer in enumerate(layers):
            x = run_one(layer, x, *(array[number] for array in per_layer))
        return x
    run_all = nn.scan(
        lambda layer, x, of_layer: (run_one(layer, x, *of_layer), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return run_all(layers, x, per_layer)[0]
