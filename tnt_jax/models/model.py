"""A network on a mesh: its parameters with their shardings, its forward pass, its decoding."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tnt_jax.data.layouts import pad_inputs
from tnt_jax.models import adapters, attention, decoding, families, sharding
from tnt_jax.models.network import Network
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import PyTree

Forward = Callable[..., Any]  # (params, batch, dropout_key or None) -> FactoredLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network on a mesh: what programs need to read parameters and to run them.

    Attributes:
      config: The settings of the network.
      mesh: From `sharding.make_mesh`.

    Raises:
      UsageError: Attention is to be computed by a kernel that the devices do not have.
    """

    config: NetworkConfig
    mesh: Mesh

    def __post_init__(self):
        attention.check_platform(self.config.attention, self.mesh)

    @functools.cached_property
    def network(self) -> Network:
        """The network, apart from any mesh."""
        return families.network_of(self.config)

    @functools.cached_property
    def abstract_params(self) -> PyTree:
        """Shapes, dtypes and shardings of the parameters; no array is made."""
        abstract = self.network.abstract_params()
        shardings = sharding.param_shardings(abstract, self.network.logical_axes(), self.mesh)
        return sharding.with_shardings(abstract, shardings)

    @functools.cached_property
    def abstract_computed_params(self) -> PyTree:
        """The parameters in the dtypes that a forward pass reads them in.

        A frozen model in these gives the numbers of the float32 one, bit for bit: what is cast to
        bfloat16 before every use may be cast once.
        """
        return jax.tree.map(
            lambda leaf, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding),
            self.abstract_params,
            self.network.computed_dtypes(),
        )

    def abstract_adapters(self, rank: int, num_layers: int | None = None) -> PyTree:
        """Shapes, dtypes and shardings of adapters for all kernels within layers.

        Args:
          rank: Rank of the adapters.
          num_layers: How many of the decoder's last layers have adapters; None: all layers.
        """
        kernels = adapters.upper_layers(self.abstract_params, num_layers)
        abstract = jax.eval_shape(
            functools.partial(adapters.init, kernels, rank), jax.random.key(0)
        )
        axes = adapters.upper_layers(self.network.logical_axes(), num_layers)
        axes = adapters.logical_axes(axes)
        return sharding.with_shardings(
            abstract, sharding.param_shardings(abstract, axes, self.mesh)
        )

    @property
    def forward(self) -> Forward:
        """`forward(params, batch, dropout_key or None, ...)`, as `network.Network` has it."""
        return self.network.forward

    def cacheable_states(
        self, name: str | None, trained_layers: int | None
    ) -> Callable[..., dict[str, jax.Array]]:
        """`(params, batch) -> states` by the names of their features, whole on every device.

        Args:
          name: The name that the decoder's states `[B, T, E]` get; None leaves them out.
          trained_layers: How many of the decoder's last layers are trained. The states that enter
            them (`network.lower_states`) come in the same forward pass; None leaves them out.
        """
        return _jit_cacheable_states(self, name, trained_layers)

    def decode(
        self,
        params: PyTree,
        inputs: Sequence[Sequence[int]],
        width: int,
        decoder: decoding.Decoding,
        batch_size: int,
        *,
        row_keys: jax.Array | None = None,
        mask: decoding.Mask | None = None,
        prefixes: np.ndarray | None = None,
        num_shared: int = 0,
    ) -> decoding.Decoded:
        """Has the devices begin with a batch of outputs, and does not wait for it.

        Args:
          params: The parameters of this model.
          inputs: Token ids, at most `batch_size` of them; filler rows come after theirs.
          width: Tokens that each input is cut or filled up to.
          decoder: How to choose the tokens.
          batch_size: Rows that are computed.
          row_keys: A random key for each of the inputs, for sampling.
          mask: What must not come up in each output.
          prefixes: How each output begins: token ids, filled up with -1 on the right
            (`decoding.decode`).
          num_shared: Number of tokens with which all inputs begin (`layouts.num_shared_by`).
        """
        if num_shared:
            assert len({tuple(ids[:num_shared]) for ids in inputs}) == 1
            assert all(num_shared < len(ids) <= width for ids in inputs)
        num_fill = batch_size - len(inputs)
        lengths = [min(len(ids), width) for ids in inputs]
        layout = self.network.feature_layout
        features = {
            "tokens": pad_inputs([*inputs, *[()] * num_fill], width, layout),
            "lengths": np.array([*lengths, *[0] * num_fill], np.int32),
        }
        if mask is not None:
            features["flags"] = np.pad(np.asarray(mask.flags), ((0, num_fill), (0, 0)))
        if prefixes is not None:
            features["prefixes"] = np.pad(prefixes, ((0, num_fill), (0, 0)), constant_values=-1)
        placed = sharding.put_batch(features, self.mesh)
        if row_keys is not None:
            filled = jnp.concatenate([row_keys, jnp.repeat(row_keys[:1], num_fill)])
            row_keys = jax.device_put(filled, placed["tokens"].sharding)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return decoding.decode(
                params,
                placed["tokens"],
                placed["lengths"],
                row_keys,
                mask and mask._replace(flags=placed["flags"]),
                placed.get("prefixes"),
                config=self.config,
                decoding=decoder,
                num_shared=num_shared,
            )

    def init(self, seed: int) -> PyTree:
        """Random parameters; no device ever holds more than its own part."""
        return _jit_init(self)(jax.random.key(seed))

    def init_adapters(self, rank: int, seed: int, num_layers: int | None = None) -> PyTree:
        """Adapters that change nothing yet; the arguments are those of `abstract_adapters`."""
        return _jit_init_adapters(self, rank, num_layers)(jax.random.key(seed))


@sharding.keep_compiled
def _jit_cacheable_states(
    model: Model, name: str | None, trained_layers: int | None
) -> Callable[..., dict[str, jax.Array]]:
    def states_of(params: PyTree, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        network, found = model.network, {}
        if trained_layers is not None:
            found = network.lower_states(params, batch, trained_layers)
        if name is not None:
            logits = network.forward(params, {**batch, **found}, None, trained_layers)
            found = {**found, name: logits.hidden}
        return found

    return jax.jit(
        sharding.traced_on(model.mesh, states_of),
        out_shardings=sharding.replicated(model.mesh),
    )


@sharding.keep_compiled
def _jit_init(model: Model) -> Callable[..., PyTree]:
    return jax.jit(model.network.init, out_shardings=sharding.shardings_of(model.abstract_params))


@sharding.keep_compiled
def _jit_init_adapters(model: Model, rank: int, num_layers: int | None) -> Callable[..., PyTree]:
    kernels = adapters.upper_layers(model.abstract_params, num_layers)
    return jax.jit(
        functools.partial(adapters.init, kernels, rank),
        out_shardings=sharding.shardings_of(model.abstract_adapters(rank, num_layers)),
    )
