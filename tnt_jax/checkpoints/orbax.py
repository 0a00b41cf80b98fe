"""What Orbax wrote, array by array, and what a run of ours noted beside its parameters.

A checkpoint is `MODEL_DIR/checkpoint_<step>` with the items `params`, `optimizer` (Orbax trees) and
`run` (JSON: what the run was, the original's identity among it; `resume` lists it).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from tnt_jax.checkpoints import lazy_arrays
from tnt_jax.checkpoints.lazy_arrays import LazyArray
from tnt_jax.models import sharding
from tnt_jax.runtime import files
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError, naming_file, system_error

PARAMS = "params"
# In a model directory: all of a directory of Hugging Face's but the weights.
DESCRIPTION = "huggingface"
_PREFIX = "checkpoint"
STEP_NAMES = ocp.path.step.standard_name_format(step_prefix=_PREFIX)


class _Original(msgspec.Struct):
    digest: str
    path: str | None = None


class _Adapters(msgspec.Struct):
    """The adapters of a run. The bounds are far beyond what is used: alpha 32 and rank 16."""

    alpha: Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
    rank: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    beside: str | None = None
    layers: Annotated[int, msgspec.Meta(ge=1, le=2**16)] | None = None


class _UpperLayers(msgspec.Struct):
    layers: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    beside: str | None = None


class _Run(msgspec.Struct):
    """What is read of a run's notes by others than the run itself."""

    original: _Original | None
    objective: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    # A run without these says nothing of them.
    adapters: _Adapters | msgspec.UnsetType = msgspec.UNSET
    upper_layers: _UpperLayers | msgspec.UnsetType = msgspec.UNSET


def read_run(checkpoint: epath.Path) -> dict[str, Any] | None:
    """What a training run has noted in its checkpoint; None where no run wrote it.

    Raises:
      UsageError: It is damaged.
    """
    if not (checkpoint / "run").exists():
        return None
    with reading(checkpoint / "run"):
        reader = ocp.JsonCheckpointHandler()
        run: Any = reader.restore(checkpoint / "run", args=ocp.args.JsonRestore())
        checked = msgspec.convert(run, _Run)
        for name in ("adapters", "upper_layers"):
            if getattr(checked, name) is not msgspec.UNSET and checked.original is None:
                raise ValueError(f"{name} without an original")
        return dict(run)


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Says in one line why Orbax cannot read something.

    Raises:
      UsageError: Whatever Orbax, its parsers and TensorStore raise, but for a lack of memory.
      OSError: The system does not let it be read.
    """
    try:
        yield
    except (UsageError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if (said := system_error(error)) is not None:
            with naming_file(path):
                raise said from error
        reason = lazy_arrays.first_line(error) if str(error) else type(error).__name__
        raise UsageError(
            f"{path}: expected what Orbax wrote, found it damaged, or not all of it there "
            f"({type(error).__name__}: {reason}). Copy it again; or delete the checkpoint, and a "
            "run goes on from the one before."
        ) from error


def lazy_item(item: epath.Path, within: tuple[str, ...] = ()) -> dict[str, LazyArray]:
    """The arrays of an item that Orbax wrote, by name.

    Args:
      item: Such as `checkpoint_10/params`.
      within: Leads to the part of its tree.

    Raises:
      UsageError: It has no such part, or Orbax does not read it.
    """
    with reading(item.joinpath(*within)):
        tree = tree_of(item)
        for key in within:
            tree = tree[key]
        arrays = _lazy_arrays(item, tree)
    lazy_arrays.check_sizes(arrays, item)
    return arrays


def tree_of(item: epath.Path) -> Any:
    """The tree of an item, with the shape and dtype of each array."""
    return ocp.PyTreeCheckpointHandler().metadata(item).tree


def _lazy_arrays(item: epath.Path, tree: Any) -> dict[str, LazyArray]:
    # TensorStore reads a layer of a stack, or what one device holds, where Orbax reads an array.
    metadata = files.read_object(item / "_METADATA")
    spec = {
        "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
        # Where zeros are written as well, what is missing is an error.
        "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
    }
    is_database = (item / "manifest.ocdbt").exists()
    arrays = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_database and not lazy_arrays.is_file_name(leaf.name):
            raise ValueError(f"{leaf.name!r:.60} is not the name of an array in this directory")
        kvstore = lazy_arrays.kvstore(item if is_database else item / leaf.name)
        if is_database:
            kvstore = {"driver": "ocdbt", "base": kvstore, "path": f"{leaf.name}/"}
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype)
        source = f"{item.parent.name}/{item.name}: {leaf.name.replace('.', '/')}"
        opened = functools.cache(
            functools.partial(_open, spec | {"kvstore": kvstore}, shape, dtype, source)
        )
        read = functools.partial(_read, opened)
        arrays[sharding.path_name(path)] = LazyArray(shape, dtype, source, read)
    return arrays


def _open(
    spec: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype, source: str
) -> LazyArray:
    """Opens an array of a checkpoint, of which its _METADATA says shape and dtype."""
    try:
        store = ts.open(dict(spec), open=True, read=True).result()
    except lazy_arrays.STORE_ERRORS as error:
        raise lazy_arrays.damaged(source, error) from error
    found = lazy_arrays.of_store(store, source)
    if (found.shape, found.dtype) != (shape, dtype):
        raise UsageError(
            f"{source}: expected {dtype} {shape}, as the checkpoint's _METADATA says, found "
            f"{found.dtype} {found.shape}: it is damaged."
        )
    return found


def _read(opened: Callable[[], LazyArray], index: lazy_arrays.Index) -> np.ndarray:
    return opened().read(index)


def restore_item(item: epath.Path, abstract: PyTree, within: tuple[str, ...] = ()) -> PyTree:
    """The arrays of an item, each straight to the devices that hold it.

    Args:
      item: Such as `checkpoint_10/params`.
      abstract: Shapes, dtypes and shardings to restore to.
      within: Leads to the part of its tree.

    Raises:
      UsageError: It is damaged.
    """
    wanted = _nested(within, abstract)
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with reading(item):
        restored = ocp.PyTreeCheckpointHandler().restore(item, args=arguments)
        for key in within:
            restored = restored[key]
        return restored


def _nested(keys: tuple[Any, ...], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def save_items(folder: epath.Path, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
    """Writes `folder/checkpoint_<step>` with the items given, by name, and waits for it.

    The folder must be held: what others are writing there would be deleted.
    """
    options = ocp.CheckpointManagerOptions(
        step_name_format=STEP_NAMES,
        cleanup_tmp_directories=True,  # what runs that were killed have left
    )
    with ocp.CheckpointManager(folder, item_names=tuple(items), options=options) as writer:
        # By force: a manager would leave out a step before the newest, without a word.
        is_saved = writer.save(step, args=ocp.args.Composite(**items), force=True)
        assert is_saved, f"Orbax did not write step {step} in {folder}"
