"""Where the original's logits come from in an update: the kinds of original.

Whatever the kind, what it needs is an argument of the jitted step, sharded, never captured, donated
or trained: `original_params` below.

    Parameters    a second tree of parameters and a second forward pass: nothing to prepare
    CachedStates  its decoder states, computed once for a data set, come with the batch; only its
                  output matrix is in memory
    AdaptersOff   the model being trained is the original with adapters, so it is its own original
                  with the adapters left out: one tree of parameters in all
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from tnt_jax.models import sharding
from tnt_jax.models.adapters import is_adapter
from tnt_jax.models.factored_logits import FactoredLogits
from tnt_jax.models.model import Forward
from tnt_jax.runtime.array_types import Array, Float, PyTree
from tnt_jax.runtime.errors import UsageError

# Logits `[B, T, V]`, or what they are the product of.
Logits = Float[Array, "B T V"] | FactoredLogits

STATES = "original_hidden"  # the model feature that CachedStates reads


@runtime_checkable
class Original(Protocol):
    """What `train_step` asks of a kind."""

    def current_params(self, params: PyTree, original_params: PyTree | None) -> PyTree:
        """What the model being trained is run with; `params` are those that get a gradient."""
        ...

    def logits(
        self, forward: Forward, original_params: PyTree, batch: Mapping[str, Array]
    ) -> Logits:
        """The original's logits for a batch, without dropout."""
        ...


class _Apart:
    """An original that shares nothing with the model being trained."""

    def current_params(self, params: PyTree, original_params: PyTree | None) -> PyTree:
        """The trained parameters alone."""
        del original_params
        return params


@dataclasses.dataclass(frozen=True)
class Parameters(_Apart):
    """A second tree of parameters."""

    def logits(
        self, forward: Forward, original_params: PyTree, batch: Mapping[str, Array]
    ) -> Logits:
        """A second forward pass."""
        return forward(original_params, batch, None)


PARAMETERS = Parameters()


@dataclasses.dataclass(frozen=True)
class CachedStates(_Apart):
    """Decoder states that come with the batch, `[B, T, E]` under `STATES`.

    Attributes:
      vocab_axis: Of the output matrix, as in `FactoredLogits`; `original_params` is that matrix.
      softcap: As in `FactoredLogits`.
    """

    vocab_axis: int
    softcap: float | None = None

    def logits(
        self, forward: Forward, original_params: PyTree, batch: Mapping[str, Array]
    ) -> Logits:
        """No forward pass at all."""
        del forward
        return FactoredLogits(batch[STATES], original_params, self.vocab_axis, self.softcap)


@dataclasses.dataclass(frozen=True)
class AdaptersOff:
    """One tree of parameters, with adapters beside them; `t5` runs with those that it is given."""

    def current_params(self, params: PyTree, original_params: PyTree | None) -> PyTree:
        """The original's parameters with the adapters among them.

        Raises:
          UsageError: Something else than an adapter would be trained: the original would move.
        """
        assert original_params is not None
        others = [path for path, _ in jax.tree.leaves_with_path(params) if not is_adapter(path)]
        if others:
            names = ", ".join(sharding.path_name(path) for path in others[:3])
            raise UsageError(
                "ORIGINAL='adapters_off' trains adapters alone, or the original would change with "
                f"the model; found {len(others)} other parameters to train: {names}."
            )
        return _merged(original_params, params)

    def logits(
        self, forward: Forward, original_params: PyTree, batch: Mapping[str, Array]
    ) -> Logits:
        """A second forward pass, through the same parameters without adapters."""
        return forward(original_params, batch, None)


def _merged(tree: Any, other: Any) -> Any:
    """Two nested dicts as one; no leaf is in both."""
    if not (isinstance(tree, Mapping) and isinstance(other, Mapping)):
        raise AssertionError("a parameter and an adapter have the same name")
    shared = {key: _merged(tree[key], other[key]) for key in tree.keys() & other.keys()}
    return {**tree, **other, **shared}
