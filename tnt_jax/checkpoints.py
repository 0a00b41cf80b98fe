"""Checkpoints of a run, and parameters from any checkpoint directory.

A checkpoint is `MODEL_DIR/checkpoint_<step>` with the items `params`, `optimizer` (Orbax trees) and
`run` (JSON: what the run was, the original's identity among it). Orbax writes to a temporary name
and renames, so a half-written checkpoint is never taken for the newest. The original's parameters
are never in a checkpoint of the run that trains away from them.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from tnt_jax import sharding, train_step
from tnt_jax.array_types import PyTree
from tnt_jax.errors import UsageError

_PREFIX = "checkpoint"


class Checkpoints:
    """The checkpoints under one model directory; use it as a context manager."""

    def __init__(self, model_dir: str, *, keep: int = 2):
        """Opens, and creates if need be, a model directory that keeps its last `keep` checkpoints.

        Raises:
          UsageError: The directory cannot be made.
        """
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
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, step_prefix=_PREFIX),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused):
        self._orbax.close()  # waits for what is being written

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None if there is none."""
        return self._orbax.latest_step()

    def save(self, state: train_step.TrainState, run: Mapping[str, Any]) -> None:
        """Writes a checkpoint in the background; `run` is a JSON object."""
        self._orbax.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(state.opt_state),
                run=ocp.args.JsonSave(dict(run)),
            ),
        )

    def run_of(self, step: int) -> dict[str, Any]:
        """The `run` that was saved with a checkpoint."""
        restored = self._orbax.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))
        return restored["run"]

    def restore(
        self, step: int, abstract_state: train_step.TrainState
    ) -> train_step.TrainState:
        """The state of a checkpoint.

        Args:
          step: Of the checkpoint.
          abstract_state: Shapes, dtypes and shardings to restore to.

        Raises:
          UsageError: The checkpoint is of another model or optimizer.
        """
        path = self._dir / f"{_PREFIX}_{step}"
        _check_tree(path / "params", abstract_state.params, "the model settings")
        _check_tree(path / "optimizer", abstract_state.opt_state, "OPTIMIZER")
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


def find(path: str) -> epath.Path:
    """The checkpoint that a setting names: itself, or the newest one in a model directory.

    Raises:
      UsageError: There is none.
    """
    given = epath.Path(path).expanduser().absolute()
    if not given.exists():
        raise UsageError(f"expected a checkpoint or a model directory, found nothing at {path}.")
    if (given / "params").exists():
        return given
    steps = [
        int(child.name.removeprefix(f"{_PREFIX}_"))
        for child in (given.iterdir() if given.is_dir() else ())
        if child.name.removeprefix(f"{_PREFIX}_").isdigit() and (child / "params").exists()
    ]
    if not steps:
        raise UsageError(
            f"expected a checkpoint (a directory with `params`) or a model directory (with "
            f"`{_PREFIX}_<step>` directories); found neither at {path}."
        )
    return given / f"{_PREFIX}_{max(steps)}"


def restore_params(path: str, abstract_params: PyTree) -> PyTree:
    """The parameters of a checkpoint.

    Args:
      path: A checkpoint, or a model directory for its newest.
      abstract_params: Shapes, dtypes and shardings to restore to: every array goes straight to the
        devices that hold it.

    Raises:
      UsageError: There is no checkpoint, or it is of another model: all missing, unexpected and
        mis-shaped parameters are named.
    """
    checkpoint = find(path) / "params"
    _check_tree(checkpoint, abstract_params, "the model settings")
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(checkpoint, abstract_params)


def digest(params: PyTree) -> str:
    """A fingerprint of parameters: 16 hexadecimal digits, the same on any mesh.

    Sums of the bit patterns, weighted by position, in arithmetic modulo 2^32: exact in any order,
    so nothing has to be gathered. It tells two models apart; it is no cryptographic hash.
    """
    total = np.uint64(0)
    for path, sums in jax.tree.leaves_with_path(_bit_sums(params)):
        name = sharding.path_name(path).encode()
        for weight, value in enumerate(np.asarray(sums), start=1):
            seed = int.from_bytes(name[-4:], "little") + 2 * weight + 1
            with np.errstate(over="ignore"):
                total = total * np.uint64(6364136223846793005) + np.uint64(value) * np.uint64(seed)
    return f"{int(total):016x}"


@jax.jit
def _bit_sums(params):
    def of(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        # A position's weight, from its index along every dimension: no [size] iota to shard.
        weights = jnp.ones((), jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            weights = weights * jnp.uint32(2654435761) + index * jnp.uint32(2 * size + 1)
        return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * weights).sum(dtype=jnp.uint32)])

    return jax.tree.map(of, params)


def _check_tree(path: epath.Path, abstract: PyTree, setting: str) -> None:
    """Compares a saved tree with the expected one and names every difference at once."""
    with ocp.StandardCheckpointer() as reader:
        found = _shapes(reader.metadata(path).item_metadata.tree)
    expected = _shapes(abstract)
    differences = [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is unexpected" for name in found if name not in expected),
        *(
            f"{name} is {found[name]} instead of {expected[name]}"
            for name in expected
            if name in found and found[name] != expected[name]
        ),
    ]
    if differences:
        shown = "; ".join(differences[:8])
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise UsageError(
            f"the checkpoint {path.parent} does not fit {setting}: {shown}{more}. Expected a "
            f"checkpoint of the same sizes: change {setting}, or the path."
        )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {
        # Orbax reads named tuples back as dicts and tuples as lists: compare names alone.
        "/".join(_part(part) for part in path): tuple(leaf.shape)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _part(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
