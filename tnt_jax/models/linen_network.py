"""What the families' networks, all of Flax Linen, answer alike: everything about their parameters.

A family says how its parameters are initialised and how many layers its stacks have; a
`network.Network` needs its forward pass and its decoding besides.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import linen as nn

from tnt_jax.models import parameters
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class LinenNetwork(abc.ABC):
    """The parameters of a network, as `network.Network` describes them.

    Attributes:
      config: The settings of the network.
      stacks: The name of each stack of layers -> the field of `config` that counts its layers.
    """

    config: NetworkConfig
    stacks: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def boxed_params(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters in Flax's boxes; called for layers that are apart."""

    def _apart(self, **changes: int) -> "LinenNetwork":
        # Layers apart, whatever the config: a model with stacked layers starts from the same random
        # numbers. No kernel takes the one position that shapes are traced for.
        same = {"scan_layers": False, "remat_policy": "none", "attention": "xla"}
        return type(self)(dataclasses.replace(self.config, **same, **changes))

    def _boxed_shapes(self) -> PyTree:
        """Shapes of the parameters, with their axes; layers apart.

        All layers of a stack have the same, so one of each stack is traced: a trace takes a third
        of a second for every layer in it, and a file may say that there are many.
        """
        shapes = _traced_shapes(self._apart(**dict.fromkeys(self.stacks.values(), 1)))
        counts = {stack: getattr(self.config, field) for stack, field in self.stacks.items()}
        return parameters.repeat_layers(shapes, counts)

    def _stacked(self, params: PyTree) -> PyTree:
        return parameters.stack_layers(params) if self.config.scan_layers else params

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters."""
        return self._stacked(nn.unbox(self._apart().boxed_params(key)))

    def abstract_params(self) -> PyTree:
        """Shapes and dtypes of the parameters."""
        return self._stacked(nn.unbox(self._boxed_shapes()))

    def logical_axes(self) -> PyTree:
        """T5X's logical axis names of each parameter."""
        return parameters.logical_axes(self._boxed_shapes(), stacked=self.config.scan_layers)

    def first_trained(self, trained_layers: int | None) -> int:
        """The number, from 0, of the decoder's first layer that `forward` computes."""
        if trained_layers is None:
            return 0
        return getattr(self.config, self.stacks["decoder"]) - trained_layers

    def upper_params(self, params: PyTree, trained_layers: int) -> PyTree:
        """The output matrix, the decoder's norm and last layers, the embedding if it is read."""
        first = self.first_trained(trained_layers)
        upper = {f"layers_{number}" for number in range(first, first + trained_layers)}
        decoder = {
            name: branch
            for name, branch in params["decoder"].items()
            if name in upper or not name.startswith("layers")
        }
        if first and not self.config.logits_via_embedding:
            return {"decoder": decoder}
        return {"decoder": decoder, "token_embedder": params["token_embedder"]}

    def computed_dtypes(self) -> PyTree:
        """The dtype in which a forward pass reads each parameter."""
        return parameters.computed_dtypes(self.abstract_params(), self.config)

    @property
    def final_softcap(self) -> float | None:
        """The bound of the logits: None, as most networks have none."""
        return None

    def output_matrix(self, params: PyTree) -> tuple[Any, int]:
        """The embedding, if it is tied, or the decoder's own; and the vocabulary axis."""
        if self.config.logits_via_embedding:
            return params["token_embedder"]["embedding"], 0
        return params["decoder"]["logits_dense"]["kernel"], 1


@functools.lru_cache(maxsize=16)
def _traced_shapes(network: LinenNetwork) -> PyTree:
    """Once for each network: it traces a forward pass, and every stage of a run asks for it."""
    return jax.eval_shape(network.boxed_params, jax.random.key(0))
