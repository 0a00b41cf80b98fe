"""What the project asks of a network, whatever its family.

A config (`network_config.NetworkConfig`) is the value that goes around. Its class says of which
family it is, and `families.network_of(config)` gives the network. Only `models/` and `checkpoints/`
know a family by name; `make lint` checks that.

Axes: `B` rows, `S` input positions, `T` target positions, `E` width of the states, `V` vocabulary,
`N` rows that are decoded, which is `B` times the number of beams.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tnt_jax.data.layouts import FeatureLayout
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import Array, Float, Int, Key, PyTree

LOWER_STATES = "lower_states"  # the feature of what enters the decoder's first trained layer


class DecodingStart(NamedTuple):
    """What decoding begins with.

    Attributes:
      tokens: `[N]`, the ids that the first step reads.
      cache: Arrays with N rows each; each step returns them anew.
      memory: Arrays that every step reads and none changes.
    """

    tokens: Int[Array, "N"]
    cache: PyTree
    memory: PyTree


@runtime_checkable
class Network(Protocol):
    """A network as functions of its parameters, a nested dict of arrays (`parameters`)."""

    @property
    def config(self) -> NetworkConfig:
        """The settings of the network."""
        ...

    @property
    def feature_layout(self) -> FeatureLayout:
        """How examples become the features that `forward` reads."""
        ...

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Random float32 parameters.

        A pure function of the key, to be called under `jax.jit` with `out_shardings` where a model
        fits no single device. The numbers are the same with and without `scan_layers`.
        """
        ...

    def abstract_params(self) -> PyTree:
        """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without computing them."""
        ...

    def logical_axes(self) -> PyTree:
        """The meaning of each dimension of each parameter: a tuple of names, `sharding`'s."""
        ...

    def computed_dtypes(self) -> PyTree:
        """The dtype in which a forward pass reads each parameter.

        Parameters that were cast to these give the numbers of the float32 ones, bit for bit.
        """
        ...

    def forward(
        self,
        params: PyTree,
        batch: Mapping[str, Array],
        dropout_key: Key[Array, ""] | None = None,
        trained_layers: int | None = None,
    ) -> FactoredLogits:
        """Computes the teacher-forced logits of each target, `[B, T, V]` when multiplied out.

        Args:
          params: Parameters, layers stacked if `config.scan_layers`; kernels may have adapters
            beside them.
          batch: Features of `feature_layout`; others are not read.
          dropout_key: None computes without dropout.
          trained_layers: Computes the decoder's last so many layers alone, from the `lower_states`
            in the batch; of `params`, `upper_params` are read. None computes everything.

        Returns:
          `hidden` `[B, T, E]` of `hidden_dtype`, and the output matrix, which is the parameter
          itself.
        """
        ...

    def lower_features(self, trained_layers: int) -> dict[str, str]:
        """Names the states that `forward` begins from, where it computes the last layers alone.

        Returns:
          The name of each feature `[B, L, E]`, of the compute dtype -> that of the feature of
          tokens `[B, L]` which has the same positions.
        """
        ...

    def lower_states(
        self, params: PyTree, batch: Mapping[str, Array], trained_layers: int
    ) -> dict[str, Float[Array, "B L E"]]:
        """Computes the `lower_features` of a batch, without dropout."""
        ...

    def upper_params(self, params: PyTree, trained_layers: int) -> PyTree:
        """The part of a tree of parameters that `forward` reads to compute the last layers alone.

        With 0 layers that is the output matrix, and what is small beside it. Layers are apart, or
        there are none.
        """
        ...

    @property
    def hidden_dtype(self) -> Any:
        """The dtype of the states that `forward` returns: the compute dtype or float32."""
        ...

    @property
    def final_softcap(self) -> float | None:
        """What no logit exceeds, as in `factored_logits.cap`; None is no bound."""
        ...

    def output_matrix(self, params: PyTree) -> tuple[Any, int]:
        """The output matrix in a tree of parameters, shapes or shardings, and its vocabulary axis.

        `[E, V]` with the axis 1, or `[V, E]` with the axis 0.
        """
        ...

    def start_decoding(
        self,
        params: PyTree,
        input_tokens: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        *,
        num_beams: int,
        max_length: int,
        num_shared: int = 0,
    ) -> DecodingStart:
        """Computes, once, what every `decode_step` reads of the inputs.

        Decoding is for layers that are apart (`scan_layers=False`): a step that scanned them would
        cut every weight out of its stack again. See `decoding.decode`.

        Args:
          params: Parameters, layers apart.
          input_tokens: Ids of each input, at the left of its row; what fills it up is not read.
          lengths: Number of ids of each input, 0 for a row that is filler.
          num_beams: Outputs of each input that are decoded, next to each other among the N rows.
          max_length: Steps that the cache has room for.
          num_shared: Number of ids that all inputs but filler have in common at their beginning;
            each has at least one more. What follows from them may be computed once.
        """
        ...

    def decode_step(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: PyTree,
        memory: PyTree,
    ) -> tuple[Float[Array, "N V"], PyTree]:
        """Computes the logits of the next token of each row, in the time of one position.

        Args:
          params: Parameters, layers apart.
          tokens: The ids at `position`: `DecodingStart.tokens`, then those chosen by the step
            before.
          position: The number of the step, from 0, the same in every row.
          cache: From `start_decoding`, then from the step before.
          memory: From `start_decoding`.

        Returns:
          Logits in float32, and the cache with this position added.
        """
        ...

    def decode_states(
        self,
        params: PyTree,
        tokens: Int[Array, "N"],
        position: Int[Array, ""],
        cache: PyTree,
        memory: PyTree,
    ) -> tuple[Float[Array, "N E"], PyTree]:
        """Computes the states of which `decode_step` makes logits, with its arguments.

        They are those of `forward`'s `hidden` after the same tokens, to rounding.
        """
        ...
