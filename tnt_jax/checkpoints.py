"""Checkpoints of a run, and the arrays of anything that Orbax wrote.

A checkpoint is `MODEL_DIR/checkpoint_<step>` with the items `params`, `optimizer` (Orbax trees) and
`run` (JSON: what the run was, the original's identity among it; `resume` lists it). Orbax writes to
a temporary name and renames, so a half-written checkpoint is never taken for the newest. The
original's parameters are never in a checkpoint of the run that trains away from them.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from tnt_jax import json_files, lazy_arrays, sharding, t5, train_step
from tnt_jax.array_types import PyTree
from tnt_jax.errors import UsageError, naming_file, system_error
from tnt_jax.lazy_arrays import LazyArray

PARAMS = "params"
# In a model directory: all of a directory of Hugging Face's but the weights.
DESCRIPTION = "huggingface"
_PREFIX = "checkpoint"
_STEP_NAMES = ocp.path.step.standard_name_format(step_prefix=_PREFIX)


class Checkpoints:
    """The checkpoints under one model directory; use it as a context manager."""

    def __init__(
        self,
        model_dir: str,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        keep_best: str | None = None,
    ):
        """Opens a model directory, and creates it if need be.

        What an earlier process left half-written is deleted.

        Args:
          model_dir: The directory.
          keep: The last checkpoints stay, so many.
          keep_every: Those of every such update stay as well.
          keep_best: So does the one with the smallest metric of that name.

        Raises:
          UsageError: The directory cannot be made, or a number is below 1.
        """
        for name, number in (("keep_checkpoints", keep), ("keep_every", keep_every)):
            if number is not None and number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")
        self._dir = epath.Path(model_dir).expanduser().absolute()
        try:
            self._dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"MODEL_DIR: expected a directory that can be written, found {model_dir}: "
                f"{error.strerror or error}."
            ) from error
        self._orbax = ocp.CheckpointManager(
            self._dir,
            item_names=("params", "optimizer", "run"),
            options=_retention(keep, keep_every, keep_best),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused):
        self._orbax.close()  # waits for what is being written

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None if there is none."""
        return self._orbax.latest_step()

    def best_step(self) -> int | None:
        """The step of the checkpoint where `keep_best` is smallest, None if there is none."""
        return self._orbax.best_step()

    def save(
        self,
        state: train_step.TrainState,
        run: Mapping[str, Any],
        metrics: Mapping[str, float | int] | None = None,
    ) -> None:
        """Writes a checkpoint in the background.

        Args:
          state: Of the run.
          run: A JSON object.
          metrics: Of this step; `keep_best` among them.
        """
        is_saved = self._orbax.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                run=ocp.args.JsonSave(dict(run)),
            ),
            metrics=metrics,
        )
        assert is_saved, f"there is a checkpoint of step {state.step} or a later one"

    def run_of(self, step: int) -> dict[str, Any]:
        """The `run` that was saved with a checkpoint.

        Raises:
          UsageError: The checkpoint was not written by a training run.
        """
        run = read_run(self._item(step, "run").parent)
        assert run is not None
        return run

    def check(self, step: int, abstract_state: train_step.TrainState) -> None:
        """Raises a UsageError unless a checkpoint is of a run, of this model and optimizer."""
        self._check_layers(step, abstract_state.params)
        _check_tree(self._item(step, "params"), abstract_state.params, "the model settings")
        _check_tree(self._item(step, "optimizer"), abstract_state.opt_state, "OPTIMIZER")

    def restore(self, step: int, abstract_state: train_step.TrainState) -> train_step.TrainState:
        """The state of a checkpoint, on the mesh of `abstract_state`, not on that it was saved on.

        Args:
          step: Of the checkpoint.
          abstract_state: Shapes, dtypes and shardings to restore to.

        Raises:
          UsageError: As in `check`.
        """
        self.check(step, abstract_state)
        with _reading(self._item(step, "params").parent):
            restored = self._orbax.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract_state.params),
                    optimizer=ocp.args.StandardRestore(abstract_state.opt_state),
                ),
            )
        return train_step.TrainState(
            step=jax.device_put(jnp.asarray(step, jnp.int32), abstract_state.step.sharding),
            params=restored["params"],
            opt_state=restored["optimizer"],
        )

    def _check_layers(self, step: int, abstract_params: PyTree) -> None:
        """A run goes on with its layers as it has them: its optimizer state is laid out so too."""

        def is_scanned(tree: PyTree) -> bool:
            return any("/layers/" in name for name in lazy_arrays.shapes(tree))

        item = self._item(step, "params")
        with _reading(item):
            saved = is_scanned(_tree_of(item))
        if saved != is_scanned(abstract_params):
            raise UsageError(
                f"scan_layers: expected {saved}, as the run in {item.parent.parent} has it, found "
                f"{not saved}. Set SCAN_LAYERS = {saved}; or begin another run from this one: give "
                f"{item.parent} as INITIAL_CHECKPOINT_PATH, with another MODEL_DIR."
            )

    def _item(self, step: int, name: str) -> epath.Path:
        checkpoint = self._dir / _STEP_NAMES.build_name(step)
        if not (checkpoint / name).exists():
            raise UsageError(
                f"MODEL_DIR: expected the checkpoints of a training run, but {checkpoint} has no "
                f"`{name}`. Give it as INITIAL_CHECKPOINT_PATH, with another MODEL_DIR."
            )
        return checkpoint / name


def _retention(
    keep: int, keep_every: int | None, keep_best: str | None
) -> ocp.CheckpointManagerOptions:
    policies = ocp.checkpoint_managers
    kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
    if keep_every is not None:
        kept.append(policies.EveryNSteps(keep_every))

    def metric(metrics: Mapping[str, float | int]) -> float:
        value = metrics.get(keep_best or "", math.inf)
        # NaN is neither below nor above another: sorted, it may stand before what is best.
        return value if math.isfinite(value) else math.inf

    if keep_best is not None:
        best = policies.BestN(
            get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        kept.append(best)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # Metrics are written only where there is such a function.
        best_fn=None if keep_best is None else metric,
        best_mode="min",
        cleanup_tmp_directories=True,
        step_name_format=_STEP_NAMES,
    )


def read_run(checkpoint: epath.Path) -> dict[str, Any] | None:
    """What a training run has noted in its checkpoint; None where no run wrote it.

    Raises:
      UsageError: It is damaged.
    """
    if not (checkpoint / "run").exists():
        return None
    with _reading(checkpoint / "run"):
        reader = ocp.JsonCheckpointHandler()
        run: Any = reader.restore(checkpoint / "run", args=ocp.args.JsonRestore())
        _check_run(run)
        return dict(run)


_LARGEST_ALPHA, _LARGEST_RANK = 1e6, 2**16  # of adapters: 32 and 16, and no matrix is wider


def _check_run(run: Any) -> None:
    """Raises a ValueError unless what others read of a run's notes is of the right type."""

    def check(value: Any, types: Any, name: str) -> None:
        if not isinstance(value, types):
            raise ValueError(f"{name}: found {value!r:.60}")

    check(run, Mapping, "the notes")
    for name in ("original", "objective", "model", "data"):
        check(run.get(name), Mapping | None, name)
    if "adapters" in run:  # a run without them says nothing of them
        check(run["adapters"], Mapping, "adapters")
    original, adapters = run["original"], run.get("adapters")
    if original is not None:
        check(original.get("digest"), str, "original.digest")
        check(original.get("path"), str | None, "original.path")
    if adapters is not None:
        check(original, Mapping, "original")
        alpha, rank = adapters.get("alpha"), adapters.get("rank")
        if type(alpha) not in (int, float) or not abs(alpha) <= _LARGEST_ALPHA:
            raise ValueError(f"adapters.alpha: found {alpha!r:.60}")
        check(adapters.get("beside"), str | None, "adapters.beside")
        if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
            raise ValueError(f"adapters.rank: found {rank!r:.60}")


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
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
    with _reading(item.joinpath(*within)):
        tree = _tree_of(item)
        for key in within:
            tree = tree[key]
        arrays = _lazy_arrays(item, tree)
    lazy_arrays.check_sizes(arrays, item)
    return arrays


def _tree_of(item: epath.Path) -> Any:
    """What an item holds: shapes and types, in its tree."""
    return ocp.PyTreeCheckpointHandler().metadata(item).tree


def _lazy_arrays(item: epath.Path, tree: Any) -> dict[str, LazyArray]:
    # TensorStore reads a layer of a stack, or what one device holds, where Orbax reads an array.
    metadata = json_files.read_object(item / "_METADATA")
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
    with _reading(item):
        restored = ocp.PyTreeCheckpointHandler().restore(item, args=arguments)
        for key in within:
            restored = restored[key]
        return restored


def _nested(keys: tuple[Any, ...], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def save_items(folder: epath.Path, step: int, items: Mapping[str, ocp.args.CheckpointArgs]) -> None:
    """Writes `folder/checkpoint_<step>` with the items given, by name, and waits for it."""
    options = ocp.CheckpointManagerOptions(step_name_format=_STEP_NAMES)
    with ocp.CheckpointManager(folder, item_names=tuple(items), options=options) as writer:
        # By force: a manager would leave out a step before the newest, without a word.
        is_saved = writer.save(step, args=ocp.args.Composite(**items), force=True)
        assert is_saved, f"Orbax did not write step {step} in {folder}"


def digest(params: PyTree) -> str:
    """A fingerprint of parameters: 16 hexadecimal digits, the same on any mesh.

    Covers the name, shape and bits of every parameter and where each element stands; layers that
    are stacked count as layers that are apart. It tells models apart, so that a mistake is seen; it
    does not withstand an adversary.
    """
    hashed = hashlib.sha256()
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for (path, leaf), sums in zip(
        jax.tree.leaves_with_path(t5.unstack_layers(abstract)),
        jax.device_get(_bit_sums(params)),
        strict=True,
    ):
        hashed.update(f"{sharding.path_name(path)} {leaf.shape} {[int(x) for x in sums]} ".encode())
    return hashed.hexdigest()[:16]


def digest_of_files(weights: Mapping[str, lazy_arrays.LazyArray]) -> str:
    """The `digest` of parameters in files, layers apart, read one after the other."""
    hashed = hashlib.sha256()
    for name in sorted(weights, key=lambda name: name.split("/")):
        array = weights[name]
        (sums,) = jax.device_get(_bit_sums({"array": jnp.asarray(array.load())}))
        hashed.update(f"{name} {array.shape} {[int(x) for x in sums]} ".encode())
    return hashed.hexdigest()[:16]


@jax.jit
def _bit_sums(params):
    """Two sums modulo 2^32 of each parameter's scrambled bits: exact in any order of addition.

    So every device adds up what it holds, and nothing is gathered.
    """

    def scramble(x):  # the finalizer of MurmurHash3: every bit of x acts on every bit of the result
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def sums_of(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        position = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position = position * jnp.uint32(size) + index
        scrambled = scramble(bits ^ scramble(position + jnp.uint32(1)))
        return tuple(jnp.sum(x, dtype=jnp.uint32) for x in (scrambled, scramble(~scrambled)))

    return [sums_of(leaf) for leaf in jax.tree.leaves(t5.unstack_layers(params))]


def _check_tree(path: epath.Path, abstract: PyTree, setting: str) -> None:
    """Compares a saved tree with the expected one and names every difference at once."""
    # The item's own handler: a checkpointer would warn that an item is no whole checkpoint.
    with _reading(path):
        found = lazy_arrays.shapes(_tree_of(path))
    differences = lazy_arrays.differences_of(found, lazy_arrays.shapes(abstract))
    if differences:
        raise UsageError(lazy_arrays.mismatch(str(path.parent), setting, differences))
