"""What a run has trained of a model, where that is a part: adapters, or the last layers.

A checkpoint has that part alone; the rest is the original's, beside which it was trained.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath

from tnt_jax.checkpoints import lazy_arrays
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models import adapters, families
from tnt_jax.runtime.errors import UsageError

if TYPE_CHECKING:
    from tnt_jax.checkpoints.pretrained import Pretrained


def part_of(run: dict[str, Any]) -> str | None:
    """What a run has trained of a model, in words; None where that is the whole model."""
    if "adapters" in run:
        return "adapters"
    return "upper layers" if "upper_layers" in run else None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Adapters:
    """What a run of adapters has trained, and beside what: `W` acts as `W + (alpha / rank) A B`.

    Attributes:
      original: The model without the adapters.
      pairs: T5X's name of a kernel `[inputs, outputs]` -> its A `[inputs, rank]` and B
        `[rank, outputs]`.
      rank: Rank of every pair.
      alpha: Scale of the adapters: they are multiplied by `alpha / rank`.
      num_layers: How many of the decoder's last layers have adapters; None: all, and those of an
        encoder.
    """

    original: "Pretrained"
    pairs: dict[str, tuple[LazyArray, LazyArray]]
    rank: int
    alpha: float
    num_layers: int | None = None

    @property
    def by_name(self) -> dict[str, LazyArray]:
        """Every A and B, by the name that it has in a tree of parameters."""
        found = {}
        for kernel, (a, b) in self.pairs.items():
            module = kernel.rpartition("/")[0]
            found |= {f"{module}/{adapters.ADAPTER_IN}": a, f"{module}/{adapters.ADAPTER_OUT}": b}
        return found


def read_adapters(
    stored: dict[str, LazyArray], original: "Pretrained", run: dict[str, Any], folder: epath.Path
) -> Adapters:
    """What a run has trained, each pair of the shapes that its kernel asks for."""
    rank, pairs = run["adapters"]["rank"], {}
    for name, a in stored.items():
        module, _, leaf = name.rpartition("/")
        if leaf == adapters.ADAPTER_IN:
            kernel, b = f"{module}/kernel", stored.get(f"{module}/{adapters.ADAPTER_OUT}")
            if kernel not in original.weights:
                raise UsageError(
                    f"{folder}: it has an adapter for {kernel}, which {original.path} lacks."
                )
            shapes = [a.shape, b.shape if b else ()]
            rows_and_columns = original.weights[kernel].shape
            expected = [(*rows_and_columns[:1], rank), (rank, *rows_and_columns[1:])]
            if b is None or len(rows_and_columns) != 2 or shapes != expected:
                raise UsageError(
                    f"{folder}: expected an adapter of rank {rank} for {kernel} of shape "
                    f"{rows_and_columns}, found arrays of shapes {shapes}: it is damaged."
                )
            pairs[kernel] = (a, b)
    return Adapters(
        original=original,
        pairs=pairs,
        rank=rank,
        alpha=run["adapters"]["alpha"],
        num_layers=run["adapters"].get("layers"),
    )


def read_upper_layers(
    stored: dict[str, LazyArray], original: "Pretrained", run: dict[str, Any], folder: epath.Path
) -> dict[str, LazyArray]:
    """The layers that a run has trained: all of them, and nothing else."""
    number = run["upper_layers"]["layers"]
    params = families.network_of(original.config).abstract_params()
    names = lazy_arrays.shapes(adapters.upper_layers(params, number)).keys()
    if stored.keys() != names:
        raise UsageError(
            f"{folder}: expected the {len(names)} parameters of the last {number} layers of "
            f"{original.path}, found {len(stored)}, {len(stored.keys() & names)} of them these: it "
            "is damaged. Copy the checkpoint again."
        )
    return stored


def with_adapters(trained: Adapters) -> dict[str, LazyArray]:
    """The original's weights, with what was trained beside them added when they are read."""
    scale = trained.alpha / trained.rank

    def added(kernel: LazyArray, a: LazyArray, b: LazyArray) -> LazyArray:
        def read(index: lazy_arrays.Index) -> np.ndarray:
            rows, columns = index
            low, high = a[rows, slice(None)], b[slice(None), columns]
            return kernel.read(index).astype(np.float32) + scale * (low @ high)

        source = f"{kernel.source}, with {a.source}"
        return LazyArray(kernel.shape, np.dtype(np.float32), source, read)

    weights = trained.original.weights
    return weights | {name: added(weights[name], *pair) for name, pair in trained.pairs.items()}
