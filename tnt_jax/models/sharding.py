"""The mesh, one table from logical to mesh axes, and shardings for every tree of a run.

`data` splits the batch. `fsdp` splits the batch as well, and every parameter along `embed`: a layer
is gathered when it is computed, its gradient is scattered again, and no device holds a whole model.
`model` splits the parameters within a layer, and the vocabulary. Parameters say what their
dimensions mean (`network.Network.logical_axes`), activations too (`constrain`); where each meaning
goes is decided in `AXIS_RULES` alone. A dimension without a rule is an error: silent replication is
how a model stops fitting.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tnt_jax.runtime.array_types import Array, PyTree
from tnt_jax.runtime.errors import UsageError

MESH_AXES = ("data", "fsdp", "model")

# Logical axis -> mesh axes; () replicates, on purpose. The names are T5X's.
AXIS_RULES: Mapping[str, tuple[str, ...]] = {
    # Of parameters.
    "vocab": ("model",),
    "heads": ("model",),
    "joined_kv": ("model",),
    "mlp": ("model",),
    "embed": ("fsdp",),
    "norm": (),  # a vector of the width of `embed`, too small to be worth gathering
    "head_dim": (),
    "relpos_buckets": (),
    "layers": (),
    "adapter_rank": (),
    # Of activations; those of parameters above stand for the same there, but for `embed`.
    "batch": ("data", "fsdp"),
    "group": ("data",),  # the batch where the devices of a `fsdp` group have the rows of all
    "length": (),
    "width": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each mesh axis has.

    Attributes:
      data: devices that share the batch; -1 takes all that the others leave.
      fsdp: devices that share the batch, the parameters, the optimizer state and the original.
      model: devices that share each layer's computation and the vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        if min(self.fsdp, self.model) < 1 or (self.data < 1 and self.data != -1):
            raise UsageError(
                "expected FSDP_DEVICES and MODEL_DEVICES of at least 1, and DATA_DEVICES of at "
                f"least 1 or -1 (all other devices); found {self._as_text()}."
            )

    def _as_text(self) -> str:
        return ", ".join(f"{_setting(axis)}={getattr(self, axis)}" for axis in MESH_AXES)

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Devices along each of `MESH_AXES`.

        Raises:
          UsageError: They do not use exactly `num_devices`.
        """
        others = self.fsdp * self.model
        data = num_devices // others if self.data == -1 else self.data
        if data * others != num_devices:
            raise UsageError(
                f"expected {' x '.join(map(_setting, MESH_AXES))} to be the {num_devices} devices "
                f"here; found {self._as_text()}. Change one of them."
            )
        return data, self.fsdp, self.model


def _setting(axis: str) -> str:
    """The setting that says how many devices a mesh axis has."""
    return f"{axis.upper()}_DEVICES"


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes of `MESH_AXES`.

    Args:
      shape: Devices per axis.
      devices: Those to use, such as the ones of a TPU that is only described; None takes all of all
        hosts.

    Raises:
      UsageError: The shape does not use exactly the devices that are there, or they are of several
        slices of a TPU.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape.sizes(len(devices))
    is_tpu = devices[0].platform == "tpu"
    slices = {getattr(device, "slice_index", 0) for device in devices if is_tpu}
    if len(slices) > 1:
        raise UsageError(
            f"expected devices of one slice of a TPU, found {len(slices)} slices. Start the run on "
            "one."
        )
    # `jax.make_mesh` refuses an axis that is a part of an axis of the torus, of which a v6e of 4x4
    # or a v5p of 4x4x4 have few.
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def automatic_axes() -> dict[str, int]:
    """The axes of the mesh in use that `jax.shard_map` has not taken over, and their devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        axis: mesh.shape[axis]
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def free_axes() -> dict[str, int]:
    """Those of the `automatic_axes` that have several devices, and how many."""
    return {axis: size for axis, size in automatic_axes().items() if size > 1}


def num_parts(logical_axis: str) -> int:
    """The number of parts that an axis of an activation lies in, on the mesh that is in use."""
    free = free_axes()
    return math.prod(free.get(axis, 1) for axis in AXIS_RULES[logical_axis])


def constrain(x: Array, *logical_axes: str) -> Array:
    """Says how an activation lies, by `AXIS_RULES`, on the mesh that is in use.

    That mesh is the one of `jax.sharding.use_abstract_mesh`, around the traced function; without
    one, and for mesh axes that `jax.shard_map` has taken over, nothing is said.

    Args:
      x: An activation.
      logical_axes: One for each of its dimensions.
    """
    free = free_axes()
    if not free:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(logical_axes, free))


def spec_of(logical_axes: Sequence[str], mesh_axes: Container[str]) -> PartitionSpec:
    """How an activation lies by `AXIS_RULES`, as far as it is over `mesh_axes`."""
    rules = [[axis for axis in AXIS_RULES[name] if axis in mesh_axes] for name in logical_axes]
    return _partition_spec(rules)


def gather(param: Array, logical_axes: Sequence[str], dtype: Any) -> Array:
    """A parameter as a layer computes with it: cast, and whole along `embed`.

    On the mesh that is in use, as for `constrain`. Two constraints: the cast is made where the
    parameter lies, so that in bfloat16 half the bytes travel; and what is transposed from it, the
    gradient, lies there too, so that each device is sent its part of the sum and no other. Left to
    itself the compiler gathers weights as well, but in copies of another layout: of T5 1.1 XXL on
    eight chips, 1.6 GiB more on each.

    Args:
      param: A parameter, or one layer of a stacked one.
      logical_axes: The logical axis of each of its dimensions.
      dtype: Dtype of the computation.
    """
    cast = constrain(param.astype(dtype), *logical_axes)
    return constrain(cast, *("width" if axis == "embed" else axis for axis in logical_axes))


def _partition_spec(rules: Sequence[Sequence[str]]) -> PartitionSpec:
    """The mesh axes of each dimension, written as JAX prints them."""
    return PartitionSpec(
        *(None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in rules)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`; holds for every feature, whatever its rank."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def check_batch_size(
    batch_size: int, num_microbatches: int, mesh: Mesh, setting: str = "BATCH_SIZE"
) -> None:
    """Raises a UsageError, which names the setting, unless devices share each microbatch evenly."""
    num_devices = _num_row_devices(mesh)
    num_parts = num_microbatches * num_devices
    if num_microbatches < 1 or batch_size < 1 or batch_size % num_parts:
        axes = " x ".join(AXIS_RULES["batch"])
        raise UsageError(
            f"{setting}: expected a multiple of NUM_MICROBATCHES x {axes} devices = "
            f"{num_microbatches} x {num_devices}; found {batch_size}."
        )


def batch_size_for(num_rows: int, mesh: Mesh) -> int:
    """The smallest batch that has so many rows and splits evenly over the devices."""
    num_devices = _num_row_devices(mesh)
    return math.ceil(num_rows / num_devices) * num_devices


def _num_row_devices(mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in AXIS_RULES["batch"])


def param_shardings(abstract_params: PyTree, logical_axes: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every parameter, by `AXIS_RULES`.

    Args:
      abstract_params: Shapes, as from `network.Network.abstract_params`.
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
        used = [mesh_axis for mesh_axes in spec for mesh_axis in mesh_axes]
        if len(used) != len(set(used)):
            raise UsageError(
                f"parameter {name}: its axes {axes} go to the mesh axes {tuple(used)}, one of them "
                "twice. Change sharding.AXIS_RULES."
            )
        for axis, size, mesh_axes in zip(axes, param.shape, spec, strict=True):
            for mesh_axis in mesh_axes:
                if size % mesh.shape[mesh_axis] == 0:
                    continue
                raise UsageError(
                    f"parameter {name}: its {axis!r} axis of {size} does not split over the "
                    f"{mesh.shape[mesh_axis]} devices of mesh axis {mesh_axis!r}. Choose another "
                    f"{_setting(mesh_axis)}, or a model whose {axis!r} is a multiple of it."
                )
        return NamedSharding(mesh, _partition_spec(spec))

    return jax.tree.map_with_path(sharding_of, abstract_params, logical_axes)


def optimizer_shardings(
    abstract_opt_state: PyTree, abstract_params: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
    """The sharding of every leaf of an Optax state.

    A leaf that stands for a parameter (the keys of its path end with the parameter's) and has its
    shape is sharded as the parameter is. Counters and Adafactor's factored statistics, which lack
    one of the parameter's dimensions, are replicated.

    Raises:
      UsageError: Another leaf has two or more dimensions, or is longer than any of a parameter's.
    """
    param_leaves = jax.tree.leaves_with_path(abstract_params)
    params = {
        dict_keys(path): (param.shape, sharding)
        for (path, param), sharding in zip(param_leaves, jax.tree.leaves(shardings), strict=True)
    }
    longest = max(size for _, param in param_leaves for size in (1, *param.shape))

    def sharding_of(path, leaf):
        keys = dict_keys(path)  # an optimizer may put keys of its own before the parameter's
        for start in range(len(keys)):
            shape, sharding = params.get(keys[start:], (None, None))
            if leaf.shape == shape:
                return sharding
            # (layers, 1) is, of a stacked parameter, what (1,) is of another: no statistics.
            if shape and leaf.shape in (*_without_one(shape), (shape[0], 1)):
                return replicated(mesh)
        if len(leaf.shape) > 1 or leaf.size > longest:
            raise UsageError(
                f"optimizer state {path_name(path)} {leaf.shape} has no sharding: expected the "
                "shape of a parameter of that name, or all of it but one. Change OPTIMIZER."
            )
        return replicated(mesh)

    return jax.tree.map_with_path(sharding_of, abstract_opt_state)


def _without_one(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(*shape[:i], *shape[i + 1 :]) for i in range(len(shape))]


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as people write it: `decoder/layers_0/mlp/wi/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves a global batch to the devices, its rows over `data` and `fsdp`.

    Every host gives the whole batch, which is small beside what is computed from it, and its
    devices take their rows. Which ones those are is the mesh's affair: on a TPU slice they need not
    be next to each other.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)
        for name, rows in batch.items()
    }


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array, on every host."""
    return multihost_utils.process_allgather(array, tiled=True)


def dict_keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names on the way to a leaf of a tree, without what is no dictionary."""
    return tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))


# Keeps what a function returns, a function that is compiled, for its latest arguments: called again
# with equal ones, nothing is traced or compiled again. Few are kept, for each takes memory.
keep_compiled = functools.lru_cache(maxsize=4)


def traced_on(mesh: Mesh, function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """The function with its settings, traced with the mesh that `sharding.constrain` looks for."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **settings)

    return traced


def shardings_of(abstract: PyTree) -> PyTree:
    """The shardings of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def with_shardings(abstract: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays with other shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract,
        shardings,
    )
