"""The mesh, one table from logical to mesh axes, and shardings for every tree of a run.

`data` splits the batch, `model` splits the parameters within a layer. Parameters say what their
dimensions mean (`t5.param_logical_axes`); where each meaning goes is decided in `AXIS_RULES` alone.
A dimension without a rule is an error: silent replication is how a model stops fitting.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_jax.array_types import PyTree
from tnt_jax.errors import UsageError

# Logical axis -> mesh axis; None replicates, on purpose. The names are T5X's.
AXIS_RULES: Mapping[str, str | None] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "joined_kv": "model",
    "mlp": "model",
    "embed": None,
    "relpos_buckets": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each mesh axis has.

    Attributes:
      data: devices that share the batch; -1 takes all that `model` leaves.
      model: devices that share each layer's parameters.
    """

    data: int = -1
    model: int = 1

    def __post_init__(self):
        if self.model < 1 or (self.data < 1 and self.data != -1):
            raise UsageError(
                "MeshShape: expected model of at least 1, and data of at least 1 or -1 (all other "
                f"devices); found data={self.data}, model={self.model}."
            )


def make_mesh(shape: MeshShape) -> Mesh:
    """A mesh over all devices of all hosts, with axes `data` and `model`.

    Raises:
      UsageError: The shape does not use exactly the devices that are there.
    """
    num_devices = jax.device_count()
    data = num_devices // shape.model if shape.data == -1 else shape.data
    if data * shape.model != num_devices:
        raise UsageError(
            f"MeshShape: expected data x model to be the {num_devices} devices here; found "
            f"data={shape.data}, model={shape.model}. Change MeshShape.data or MeshShape.model."
        )
    return jax.make_mesh((data, shape.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data`; holds for every feature, whatever its rank."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def check_batch_size(batch_size: int, num_microbatches: int, mesh: Mesh) -> None:
    """Raises a UsageError unless every microbatch splits evenly over `data`."""
    num_parts = num_microbatches * mesh.shape["data"]
    if num_microbatches < 1 or batch_size < 1 or batch_size % num_parts:
        raise UsageError(
            f"BATCH_SIZE: expected a multiple of num_microbatches x data devices = "
            f"{num_microbatches} x {mesh.shape['data']}; found {batch_size}."
        )


def param_shardings(abstract_params: PyTree, logical_axes: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every parameter, by `AXIS_RULES`.

    Args:
      abstract_params: Shapes, as from `t5.abstract_params`.
      logical_axes: The same structure with a tuple of axis names for each parameter.
      mesh: From `make_mesh`.

    Raises:
      UsageError: A logical axis has no rule, two axes of one parameter go to one mesh axis, or a
        dimension does not split evenly.
    """

    def sharding_of(path, param, axes):
        name = path_name(path)
        unknown = [axis for axis in axes if axis not in AXIS_RULES]
        if unknown or len(axes) != len(param.shape):
            raise UsageError(
                f"parameter {name} {param.shape} has the logical axes {axes}: expected one for "
                f"each dimension, each of {', '.join(AXIS_RULES)} (sharding.AXIS_RULES)."
            )
        spec = [AXIS_RULES[axis] for axis in axes]
        used = [mesh_axis for mesh_axis in spec if mesh_axis]
        if len(used) != len(set(used)):
            raise UsageError(
                f"parameter {name}: its axes {axes} go to the mesh axes {tuple(spec)}, one of them "
                "twice. Change sharding.AXIS_RULES."
            )
        for axis, size, mesh_axis in zip(axes, param.shape, spec, strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise UsageError(
                    f"parameter {name}: its {axis!r} axis of {size} does not split over the "
                    f"{mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis!r}. Choose another "
                    f"MeshShape.{mesh_axis}, or a model whose {axis!r} is a multiple of it."
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map_with_path(sharding_of, abstract_params, logical_axes)


def optimizer_shardings(
    abstract_opt_state: PyTree, abstract_params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
    """The sharding of every leaf of an Optax state.

    A leaf that stands for a parameter (the keys of its path end with the parameter's) and has its
    shape is sharded as the parameter is. Counters and Adafactor's factored statistics, at most one
    vector per parameter dimension, are replicated.

    Raises:
      UsageError: Another leaf has two or more dimensions, or is longer than any of a parameter's.
    """
    param_leaves = jax.tree.leaves_with_path(abstract_params)
    params = {
        _dict_keys(path): (param.shape, sharding)
        for (path, param), sharding in zip(param_leaves, jax.tree.leaves(shardings), strict=True)
    }
    longest = max(size for _, param in param_leaves for size in (1, *param.shape))

    def sharding_of(path, leaf):
        keys = _dict_keys(path)  # an optimizer may put keys of its own before the parameter's
        for start in range(len(keys)):
            shape, sharding = params.get(keys[start:], (None, None))
            if leaf.shape == shape:
                return sharding
        if len(leaf.shape) > 1 or leaf.size > longest:
            raise UsageError(
                f"optimizer state {path_name(path)} {leaf.shape} has no sharding: expected the "
                "shape of a parameter of that name, or one of its dimensions. Change OPTIMIZER."
            )
        return replicated(mesh)

    return jax.tree.map_with_path(sharding_of, abstract_opt_state)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as people write it: `decoder/layers_0/mlp/wi/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves a global batch to the devices, its rows over `data`.

    Every host gives the whole batch, which is small beside what is computed from it, and its
    devices take their rows. Which ones those are is the mesh's affair: on a TPU slice they need not
    be next to each other.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        for name, rows in batch.items()
    }


def _dict_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
