"""Loads the original of a run: reads it, tells it from others, prepares what its kind needs."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tnt_jax import objectives
from tnt_jax.checkpoints import digests, pretrained
from tnt_jax.data.examples import Example
from tnt_jax.models import families, sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.objectives import fused
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings
from tnt_jax.training.original_cache import OriginalStates
from tnt_jax.training.originals import PARAMETERS, STATES, AdaptersOff, CachedStates, Original
from tnt_jax.training.trainer import Trainer, copied


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
            _, vocab_axis = network.output_matrix(network.abstract_params())
            return CachedStates(vocab_axis, network.final_softcap)
        case "adapters_off":
            return AdaptersOff()
    raise UsageError(f"ORIGINAL: expected parameters, cached or adapters_off, found {name!r}.")


def make_trainer(
    *,
    config: NetworkConfig,
    objective: objectives.TntObjective,
    original_choice: settings.OriginalChoice,
    update: settings.Update,
    devices: Sequence[Any] | None = None,
) -> Trainer:
    """Makes the trainer of a run.

    Args:
      config: Settings of the network.
      objective: The loss per token.
      original_choice: Which kind of original the step compares with.
      update: How an update is computed.
      devices: Devices of the mesh; None takes all that are here.

    Raises:
      UsageError: A setting does not fit.
    """
    mesh = sharding.make_mesh(update.mesh_shape or sharding.MeshShape(), devices)
    sharding.check_batch_size(update.batch_size, update.num_microbatches, mesh)
    if update.pack and config.attention == "cudnn":
        raise UsageError(
            "ATTENTION: 'cudnn' cannot tell the examples of a row apart, found PACK=True. Set "
            "PACK=False, or ATTENTION='xla'."
        )
    kind = kind_of(original_choice.kind, config)
    if isinstance(kind, AdaptersOff):
        scale = original_choice.adapter_alpha / original_choice.adapter_rank
        config = dataclasses.replace(config, adapter_scale=scale)
    return Trainer(
        model=Model(config=config, mesh=mesh),
        objective=objective,
        optimizer=update.make_optimizer(),
        num_microbatches=update.num_microbatches,
        original_kind=kind,
        adapter_rank=original_choice.adapter_rank,
        trained_layers=original_choice.trained_layers,
        block_size=update.block_size,
        skip_non_finite=update.non_finite == "skip",
    )


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the parameters of a run come from.

    Attributes:
      model: The network on its mesh.
      original_source: The original's checkpoint, opened; None is a random model.
      choice: Names that checkpoint as the user does.
      schedule: Names what training starts from instead, and the seed of random parameters.
    """

    model: Model
    original_source: pretrained.Pretrained | None
    choice: settings.OriginalChoice
    schedule: settings.Schedule

    @property
    def start_is_original(self) -> bool:
        """Whether training starts from a checkpoint, and that is the original's."""
        return self.original_source is not None and self.schedule.start_path is None

    def read_original(self) -> PyTree:
        """Reads the original, or makes a random one."""
        if self.original_source is None:
            return self.model.init(self.schedule.seed)
        return self.original_source.restore(self.model.abstract_params)

    def read_start(self) -> PyTree:
        """Reads what training starts from."""
        if self.schedule.start_path is None:
            return self.read_original()
        # Opened only now: a run that has started no longer needs it, and it may be gone.
        start = pretrained.open_checkpoint(self.schedule.start_path)
        return start.restore(self.model.abstract_params)


@dataclasses.dataclass(frozen=True)
class LoadedOriginal:
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
        placed: Sequence[tuple[Example, int, int]],
    ) -> dict[str, np.ndarray]:
        """A batch with the original's states of its examples, if they are cached."""
        if self.states is None:
            return batch
        shape = batch["decoder_target_tokens"].shape
        return {**batch, STATES: self.states.feature(placed, shape)}


def load(
    trainer: Trainer,
    sources: Sources,
    update: settings.Update,
    *,
    is_new: bool,
    examples: Iterable[Example],
    states_folder: str,
) -> tuple[LoadedOriginal, PyTree | None]:
    """Reads the original once, and makes of it what the step needs and where training starts.

    Args:
      trainer: The run's trainer.
      sources: Where the parameters come from.
      update: Decides how many examples states are computed for at a time, and their lengths.
      is_new: Whether the run starts here, so that it needs parameters to start from.
      examples: All that it will be asked about, for `CachedStates`.
      states_folder: Folder of those states.

    Returns:
      The original; and float32 parameters to start from (adapters: to train beside it), which the
      caller may give away, or None unless `is_new`.
    """
    abstract, model = trainer.abstract_original, trainer.model
    if abstract is None:
        return LoadedOriginal(None, None), sources.read_start() if is_new else None
    starts_elsewhere = sources.schedule.start_path is not None
    whole = sources.read_original()
    identity = {
        "path": sources.choice.path,
        "digest": digests.of_params(whole),
        "probe": probe(model, whole).tolist(),
    }
    if sources.original_source is not None and sources.original_source.quantisation is not None:
        identity["quantisation"] = sources.original_source.quantisation
    if isinstance(trainer.original_kind, AdaptersOff):
        if starts_elsewhere:
            raise UsageError(
                "START_CHECKPOINT_PATH: adapters start at nothing; expected None with "
                "ORIGINAL='adapters_off'."
            )
        params = _converted(whole, abstract)
        start = None
        if is_new:
            start = model.init_adapters(
                trainer.adapter_rank, sources.schedule.seed, trainer.trained_layers
            )
        return LoadedOriginal(params, identity), start
    if isinstance(trainer.original_kind, CachedStates):
        states = states_of(
            model,
            whole,
            examples,
            digest=identity["digest"],
            states_folder=states_folder,
            task_feature_lengths=update.task_feature_lengths,
            batch_size=update.batch_size,
        )
        matrix, _ = model.network.output_matrix(whole)
        params = copied(matrix, abstract)
        if is_new and starts_elsewhere:
            del whole
            whole = sources.read_start()
        return LoadedOriginal(params, identity, states), whole if is_new else None
    if not is_new or starts_elsewhere:
        params = _converted(whole, abstract)
        start = sources.read_start() if is_new else None
        return LoadedOriginal(params, identity), start
    # A copy: the state's buffers are donated to every update, the original's never.
    return LoadedOriginal(copied(whole, abstract), identity), whole


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
    examples = [Example(*row, negative_pairs=no_marks) for row in ids]
    devices = math.prod(model.mesh.shape[axis] for axis in sharding.AXIS_RULES["batch"])
    repeated = [examples[row % num_rows] for row in range(-(-num_rows // devices) * devices)]
    batch = model.network.feature_layout.convert(repeated, lengths)
    placed = sharding.put_batch(batch, model.mesh)
    return np.asarray(fused.jit_log_likelihoods(model)(params, placed))[:num_rows]


def states_of(
    model: Model,
    params: PyTree,
    examples: Iterable[Example],
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
        states_folder,
        f"{digest}-{_function_of(model.config)}",
        task_feature_lengths,
        model.network.feature_layout,
    )

    def of_batch(batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(model.hidden_states(params, sharding.put_batch(batch, model.mesh)))

    states.compute(examples, of_batch, batch_size)
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
