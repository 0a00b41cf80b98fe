"""Brings the original of a run: reads it, tells it from others, prepares what its kind needs."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from tnt_jax import objectives
from tnt_jax.checkpoints import digests, pretrained
from tnt_jax.data import feature_converters
from tnt_jax.models import families, sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.objectives import fused
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training.original_cache import OriginalStates
from tnt_jax.training.originals import PARAMETERS, STATES, AdaptersOff, CachedStates, Original
from tnt_jax.training.trainer import Trainer, copied

# What becomes of an update whose loss or gradient is not finite: it stops the run, or is left out.
NON_FINITE = ("stop", "skip")


def kind_of(name: str, config: NetworkConfig) -> Original:
    """The kind that a setting names.

    Raises:
      UsageError: There is no such kind.
    """
    match name:
        case "parameters":
            return PARAMETERS
        case "cached":
            network = families.network_of(config)
            return CachedStates(vocab_axis=network.output_matrix(network.abstract_params())[1])
        case "adapters_off":
            return AdaptersOff()
    raise UsageError(f"ORIGINAL: expected parameters, cached or adapters_off, found {name!r}.")


def make_trainer(
    *,
    model: NetworkConfig | pretrained.FromCheckpoint,
    initial_checkpoint_path: str | None,
    objective: objectives.TntObjective,
    optimizer: Callable[[], optax.GradientTransformation] | optax.GradientTransformation,
    batch_size: int,
    num_microbatches: int = 1,
    mesh_shape: sharding.MeshShape | None = None,
    original: str = "parameters",
    adapter_rank: int = 16,
    adapter_alpha: float = 32.0,
    block_size: int | None = None,
    max_gradient_norm: float | int | None = None,
    non_finite: str = "stop",
    devices: Sequence[Any] | None = None,
) -> Trainer:
    """The trainer of a run.

    Args:
      model: As in `train.train`, and so are all but the last.
      initial_checkpoint_path: What `model` is read from, if it is `FromCheckpoint`.
      objective: The loss per token.
      optimizer: An Optax optimizer, or what makes one.
      batch_size: Checked against microbatches and mesh.
      num_microbatches: Parts of a batch.
      mesh_shape: Devices per mesh axis.
      original: The kind of original.
      adapter_rank: Of adapters.
      adapter_alpha: Of adapters.
      block_size: Tokens that a device computes the loss of at a time.
      max_gradient_norm: Where gradients are clipped.
      non_finite: "stop" or "skip".
      devices: Of the mesh; None is all that are here.

    Raises:
      UsageError: A setting does not fit.
    """
    if adapter_rank < 1:
        raise UsageError(f"ADAPTER_RANK: expected at least 1, found {adapter_rank}.")
    if block_size is not None and block_size < 1:
        raise UsageError(f"BLOCK_SIZE: expected None or at least 1, found {block_size}.")
    if non_finite not in NON_FINITE:
        raise UsageError(f"NON_FINITE: expected one of {NON_FINITE}, found {non_finite!r}.")
    config = pretrained.config_of(model, initial_checkpoint_path)
    mesh = sharding.make_mesh(mesh_shape or sharding.MeshShape(), devices)
    sharding.check_batch_size(batch_size, num_microbatches, mesh)
    kind = kind_of(original, config)
    if isinstance(kind, AdaptersOff):
        config = dataclasses.replace(config, adapter_scale=adapter_alpha / adapter_rank)
    return Trainer(
        model=Model(config=config, mesh=mesh),
        objective=objective,
        optimizer=_clipped(optimizer() if callable(optimizer) else optimizer, max_gradient_norm),
        num_microbatches=num_microbatches,
        original=kind,
        adapter_rank=adapter_rank,
        block_size=block_size,
        skip_non_finite=non_finite == "skip",
    )


def _clipped(
    optimizer: optax.GradientTransformation, max_norm: float | int | None
) -> optax.GradientTransformation:
    """Clips by the norm over all parameters, before anything else is done with a gradient."""
    if max_norm is None:
        return optimizer
    if not 0 < max_norm < math.inf:
        raise UsageError(f"MAX_GRADIENT_NORM: expected None or more than 0, found {max_norm}.")
    return optax.chain(optax.clip_by_global_norm(max_norm), optimizer)


@dataclasses.dataclass(frozen=True)
class Brought:
    """What a run needs of its original.

    Attributes:
      params: For the step: an argument of it, None if the objective needs none.
      identity: Where it came from, its digest and its log-probabilities of a probe batch; None
        with `params`.
      states: The cache, where the kind is `CachedStates`.
    """

    params: PyTree | None
    identity: dict[str, Any] | None
    states: OriginalStates | None = None

    def with_states(
        self,
        batch: dict[str, np.ndarray],
        placed: Sequence[tuple[feature_converters.Example, int, int]],
    ) -> dict[str, np.ndarray]:
        """A batch with the original's states of its examples, if they are cached."""
        if self.states is None:
            return batch
        shape = batch["decoder_target_tokens"].shape
        return {**batch, STATES: self.states.feature(placed, shape)}


def bring(
    trainer: Trainer,
    initial_params: Callable[[], PyTree],
    path: str | None,
    *,
    is_new: bool,
    start_params: Callable[[], PyTree] | None = None,
    examples: Sequence[feature_converters.Example],
    states_folder: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
    seed: int,
) -> tuple[Brought, PyTree | None]:
    """Reads the original once, and makes of it what the step needs and where training starts.

    Args:
      trainer: Of the run.
      initial_params: Reads it, or makes a random one.
      path: Where from, for people and the checkpoint.
      is_new: Whether the run starts here, so that it needs parameters to start from.
      start_params: Reads these, if they are not the original's.
      examples: All that it will be asked about, for `CachedStates`.
      states_folder: Of those states.
      task_feature_lengths: Tokens of "inputs" and "targets".
      batch_size: Examples that states are computed for at a time.
      seed: Of new adapters.

    Returns:
      The original; and float32 parameters to start from (adapters: to train beside it), which the
      caller may give away, or None unless `is_new`.
    """
    abstract, model = trainer.abstract_original, trainer.model
    if abstract is None:
        return Brought(None, None), (start_params or initial_params)() if is_new else None
    whole = initial_params()
    identity = {
        "path": path,
        "digest": digests.of_params(whole),
        "probe": probe(model, whole).tolist(),
    }
    if isinstance(trainer.original, AdaptersOff):
        if start_params is not None:
            raise UsageError(
                "START_CHECKPOINT_PATH: adapters start at nothing; expected None with "
                "ORIGINAL='adapters_off'."
            )
        params = _converted(whole, abstract)
        start = model.init_adapters(trainer.adapter_rank, seed) if is_new else None
        return Brought(params, identity), start
    if isinstance(trainer.original, CachedStates):
        states = states_of(
            model,
            whole,
            examples,
            digest=identity["digest"],
            states_folder=states_folder,
            task_feature_lengths=task_feature_lengths,
            batch_size=batch_size,
        )
        matrix, _ = model.network.output_matrix(whole)
        params = copied(matrix, abstract)
        if is_new and start_params is not None:
            del whole
            whole = start_params()
        return Brought(params, identity, states), whole if is_new else None
    if not is_new or start_params is not None:
        params = _converted(whole, abstract)
        return Brought(params, identity), start_params() if is_new and start_params else None
    # A copy: the state's buffers are donated to every update, the original's never.
    return Brought(copied(whole, abstract), identity), whole


def probe(model: Model, params: PyTree) -> np.ndarray:
    """The log-probabilities `[4, 16]`, in nats, that a model gives a batch of random tokens.

    A digest tells parameters apart, this what is computed with them. The batch depends on the size
    of the vocabulary alone.

    Args:
      model: The network.
      params: Of it, layers and kernels as it has them.
    """
    num_rows, lengths = 4, {"inputs": 16, "targets": 16}
    random = np.random.default_rng(0)
    ids = random.integers(2, model.config.vocab_size, (num_rows, 2, 16), dtype=np.int32)
    no_marks = np.zeros((0, 2), np.int32)
    examples = [feature_converters.Example(*row, negative_pairs=no_marks) for row in ids]
    devices = math.prod(model.mesh.shape[axis] for axis in sharding.AXIS_RULES["batch"])
    repeated = [examples[row % num_rows] for row in range(-(-num_rows // devices) * devices)]
    batch = model.network.feature_layout.convert(repeated, lengths)
    placed = sharding.put_batch(batch, model.mesh)
    return np.asarray(fused.jit_log_likelihoods(model)(params, placed))[:num_rows]


def states_of(
    model: Model,
    params: PyTree,
    examples: Sequence[feature_converters.Example],
    *,
    digest: str,
    states_folder: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
) -> OriginalStates:
    """The decoder states of examples, in a folder that training and others share.

    Args:
      model: The original's network.
      params: The original.
      examples: Any; what the folder has is not computed again.
      digest: Of the parameters.
      states_folder: To read and to write.
      task_feature_lengths: Tokens of "inputs" and "targets".
      batch_size: Examples that states are computed for at a time.

    Raises:
      UsageError: The folder cannot be used.
    """
    states = OriginalStates(
        states_folder, f"{digest}-{_function_of(model.config)}", task_feature_lengths
    )

    def of_batch(batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(model.hidden_states(params, sharding.put_batch(batch, model.mesh)))

    states.compute(examples, of_batch, batch_size, model.network.feature_layout)
    return states


def _function_of(config: NetworkConfig) -> str:
    """A name for everything beside the weights that decides what a network computes."""
    settings = dataclasses.asdict(config)
    for name in ("dropout_rate", "scan_layers", "remat_policy", "adapter_scale"):
        del settings[name]
    precision = jax.config.values["jax_default_matmul_precision"]
    text = json.dumps([settings, jax.default_backend(), precision], sort_keys=True, default=str)
    return f"{config.dtype}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _converted(params: PyTree, abstract: PyTree) -> PyTree:
    """The same in other dtypes, one array after the other: both models would not fit."""
    leaves, structure = jax.tree.flatten(params)
    del params
    likes = jax.tree.leaves(abstract)
    for i, like in enumerate(likes):
        if leaves[i].dtype != like.dtype:
            wide, leaves[i] = leaves[i], leaves[i].astype(like.dtype)
            jax.block_until_ready(leaves[i])
            wide.delete()
    return jax.tree.unflatten(structure, leaves)
