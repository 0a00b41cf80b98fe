"""Where the original's logits come from in an update, and what of a model is trained beside it.

Whatever the kind, what it needs is an argument of the jitted step, sharded, never captured, donated
or trained: `original_params` below.

    parameters       a second tree of parameters and a second forward pass: nothing to prepare
    cached           its decoder states, computed once for a data set, come with the batch; only its
                     output matrix is in memory
    adapters_off     the model being trained is the original with adapters, so it is its own
                     original with the adapters left out: one tree of parameters in all
    adapters_cached  the same, and its decoder states come with the batch

With each of them the decoder's last layers alone may be trained, or have adapters. What is below is
then the original's. If states come with the batch, those that enter these layers do, too, and
neither model is computed below them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tnt_jax.models import families, sharding
from tnt_jax.models.adapters import is_adapter, upper_layers
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.model import Forward
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import Array, Float, PyTree
from tnt_jax.runtime.errors import UsageError

# Logits `[B, T, V]`, or what they are the product of.
Logits = Float[Array, "B T V"] | FactoredLogits

STATES = "original_hidden"  # the model feature of the original's decoder states


@dataclasses.dataclass(frozen=True)
class Original:
    """How the original is computed, and what is trained.

    Attributes:
      has_adapters: Whether adapters are trained beside the original's parameters, and nothing else.
      trained_layers: How many of the decoder's last layers are trained or have adapters; all else
        is the original's. None is the whole model, or adapters everywhere.
      cached_from: The network whose states come with the batch; None computes them in the step.
    """

    has_adapters: bool = False
    trained_layers: int | None = None
    cached_from: NetworkConfig | None = None

    @property
    def name(self) -> str:
        """The kind, as the setting ORIGINAL has it."""
        if self.has_adapters:
            return "adapters_off" if self.cached_from is None else "adapters_cached"
        return "parameters" if self.cached_from is None else "cached"

    @property
    def is_apart(self) -> bool:
        """Whether the model being trained has nothing of the original."""
        return not self.has_adapters and self.trained_layers is None

    @property
    def begins_above(self) -> int | None:
        """The `trained_layers` of a forward pass in the step: None computes all layers."""
        return None if self.cached_from is None else self.trained_layers

    def features(self, *, needs_original: bool) -> dict[str, str]:
        """The states that come with the batch.

        Args:
          needs_original: Whether the objective compares with the original.

        Returns:
          The name of each feature -> that of the feature of tokens with the same positions.
        """
        if self.cached_from is None:
            return {}
        found = {STATES: "decoder_target_tokens"} if needs_original else {}
        if self.trained_layers is not None:
            network = families.network_of(self.cached_from)
            found |= network.lower_features(self.trained_layers)
        return found

    def read_params(self, whole: PyTree, trained: PyTree, *, needs_original: bool) -> PyTree | None:
        """The part of the original's parameters that a step reads; None if there is none.

        Args:
          whole: All of them, or their shapes.
          trained: Those that are trained, or their shapes.
          needs_original: Whether the objective compares with the original.
        """
        if self.is_apart and not needs_original:
            return None
        read = whole
        if self.cached_from is not None and not (self.has_adapters and self.trained_layers is None):
            network = families.network_of(self.cached_from)
            read = network.upper_params(whole, self.trained_layers or 0)
        computes_original = self.cached_from is None and needs_original
        if self.has_adapters or self.is_apart or computes_original:
            return read
        return without(read, trained)

    def gives_logits(self, *, needs_original: bool) -> bool:
        """Whether `logits` can be computed: an evaluation reports KL, needed by the loss or not.

        Args:
          needs_original: Whether the objective compares with the original. If it does not, no
            `STATES` come with the batch, and `read_params` leaves out the layers that are trained.
        """
        is_whole = self.cached_from is None and (self.has_adapters or self.is_apart)
        return needs_original or is_whole

    def current_params(self, params: PyTree, original_params: PyTree | None) -> PyTree:
        """What the model being trained is run with.

        Args:
          params: The parameters that get a gradient.
          original_params: The original's parameters: all of them, or the part that `read_params`
            gives.

        Raises:
          UsageError: Something else than an adapter would be trained beside the original.
        """
        if self.is_apart:
            return params
        assert original_params is not None
        others = [path for path, _ in jax.tree.leaves_with_path(params) if not is_adapter(path)]
        if self.has_adapters and others:
            names = ", ".join(sharding.path_name(path) for path in others[:3])
            raise UsageError(
                f"ORIGINAL={self.name!r} trains adapters alone, or the original would change with "
                f"the model; found {len(others)} other parameters to train: {names}."
            )
        return _overlaid(original_params, params)

    def logits(
        self, forward: Forward, original_params: PyTree, batch: Mapping[str, Array]
    ) -> Logits:
        """The original's logits for a batch, without dropout: by a forward pass, or cached."""
        if self.cached_from is None:
            return forward(original_params, batch, None)
        network = families.network_of(self.cached_from)
        matrix = network.output_matrix(original_params)
        return FactoredLogits(batch[STATES], *matrix, network.final_softcap)


PARAMETERS = Original()


def what_differs(original_params: PyTree, params: PyTree) -> tuple[Original, PyTree]:
    """What a model has of its own, beside the original: both can be computed with that.

    Args:
      original_params: All of the original's parameters.
      params: All of a model's that was trained from it, without adapters.

    Returns:
      The last layers of the decoder that hold every difference, as a kind of original and as the
      part of `params` that goes with it; what is below is computed once for both. Where something
      else differs, or layers are stacked, that is the whole model.
    """
    are_equal = jax.jit(lambda *trees: jax.tree.map(jnp.array_equal, *trees))(
        original_params, params
    )
    changed = [
        re.match(r"decoder/layers_(\d+)/", sharding.path_name(path))
        for path, is_equal in jax.tree.leaves_with_path(jax.device_get(are_equal))
        if not is_equal
    ]
    layers = [int(found[1]) for found in changed if found is not None]
    num_layers = sum(name.startswith("layers_") for name in params["decoder"])
    if len(layers) < len(changed) or not num_layers:
        return PARAMETERS, params
    number = num_layers - min(layers, default=num_layers - 1)
    return Original(trained_layers=number), upper_layers(params, number)


def _overlaid(tree: Any, other: Any) -> Any:
    """Two nested dicts as one; where both have a leaf, it is the other's."""
    if not (isinstance(tree, Mapping) and isinstance(other, Mapping)):
        return other
    shared = {key: _overlaid(tree[key], other[key]) for key in tree.keys() & other.keys()}
    return {**tree, **other, **shared}


def without(tree: Any, other: Any) -> Any:
    """A nested dict without the branches of which another has leaves."""
    kept = {}
    for key, branch in tree.items():
        if key not in other:
            kept[key] = branch
        elif isinstance(branch, Mapping) and (below := without(branch, other[key])):
            kept[key] = below
    return kept


def part_of(tree: PyTree, like: PyTree) -> PyTree:
    """The part of a nested dict that has the names of another."""
    if not isinstance(like, Mapping):
        return tree
    return {key: part_of(tree[key], branch) for key, branch in like.items()}
