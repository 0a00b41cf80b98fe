"""Loads the original of a run: reads it, tells it from others, prepares what its kind needs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tnt_jax.checkpoints import digests, lazy_arrays, pretrained, trained_parts
from tnt_jax.data.examples import Example
from tnt_jax.data.layouts import Place
from tnt_jax.models import adapters, parameters, sharding
from tnt_jax.models.model import Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.objectives import fused
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import original_cache, settings
from tnt_jax.training.original_cache import OriginalStates
from tnt_jax.training.originals import STATES, part_of, without
from tnt_jax.training.trainer import Trainer, copied

_OF_DECODER = {STATES: original_cache.TARGETS}


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

    def read_start(self, original_digest: str | None = None) -> PyTree:
        """Reads what training starts from: a model, or where adapters are trained, adapters.

        Args:
          original_digest: Digest of the original's parameters, beside which adapters are trained.

        Raises:
          UsageError: Adapters are trained, and START_CHECKPOINT_PATH has none that fit.
        """
        path = self.schedule.start_path
        if path is None:
            return self.read_original()
        # Opened only now: a run that has started no longer needs it, and it may be gone.
        start = pretrained.open_checkpoint(path)
        if not self.choice.has_adapters:
            return start.restore(self.model.abstract_params)
        weights = _fitting_adapters(self.choice, start, original_digest).by_name
        abstract = self.model.abstract_adapters(
            self.choice.adapter_rank, self.choice.trained_layers
        )
        apart = parameters.unstack_layers(abstract)
        lazy_arrays.check(weights, apart, str(start.path), "TRAINED_LAYERS")
        return lazy_arrays.restore(lazy_arrays.laid_out(weights, abstract), abstract)


def _fitting_adapters(
    choice: settings.OriginalChoice, start: pretrained.Pretrained, original_digest: str | None
) -> trained_parts.Adapters:
    """The adapters of a checkpoint; raises a UsageError unless the settings ask for such ones."""
    trained, run = start.adapters, start.run
    expected = {
        "rank": choice.adapter_rank,
        "alpha": float(choice.adapter_alpha),
        "layers": choice.trained_layers or "all",
        "an original with the digest": original_digest,
    }
    differences = ["a model that is not such a run"]
    if trained is not None and run is not None:
        found = {
            "rank": trained.rank,
            "alpha": float(trained.alpha),
            "layers": trained.num_layers or "all",
            "an original with the digest": run["original"]["digest"],
        }
        differences = [
            f"{name} {found[name]}, not {value}"
            for name, value in expected.items()
            if found[name] != value
        ]
        if not differences:
            return trained
    raise UsageError(
        f"START_CHECKPOINT_PATH: with ORIGINAL={choice.kind!r}, expected a run of adapters of the "
        f"same rank, alpha and layers, trained beside the same original; found, in {start.path}: "
        f"{'; '.join(differences)}. Set ADAPTER_RANK, ADAPTER_ALPHA, TRAINED_LAYERS and "
        "INITIAL_CHECKPOINT_PATH as that run had them, or ORIGINAL='parameters' to start from a "
        "whole model."
    )


@dataclasses.dataclass(frozen=True)
class LoadedOriginal:
    """What a run needs of its original.

    Attributes:
      params: For the step: an argument of it, None if the objective needs none.
      identity: Where it came from, its digest and its log-probabilities of a probe batch; None
        with `params`.
      whole: All its parameters, for what runs it beside the step; None where they are not in
        memory.
      states: The cache of each of the `Trainer.state_features`.
    """

    params: PyTree | None
    identity: dict[str, Any] | None
    whole: PyTree | None = None
    states: Mapping[str, OriginalStates] = dataclasses.field(default_factory=dict)

    def with_states(
        self, batch: dict[str, np.ndarray], placed: Sequence[tuple[Example, Place]]
    ) -> dict[str, np.ndarray]:
        """A batch with the original's states of its examples, those that are cached.

        Args:
          batch: Model features.
          placed: Each example with its place in the batch.
        """
        states = {name: of.of_batch(batch, placed) for name, of in self.states.items()}
        return {**batch, **states}

    def with_states_of_rows(
        self, batch: dict[str, np.ndarray], examples: Sequence[Example]
    ) -> dict[str, np.ndarray]:
        """`with_states` of a batch with one example in each row, in their order."""
        states = {
            name: of.of_rows(examples, batch[of.like].shape) for name, of in self.states.items()
        }
        return {**batch, **states}


def load(
    trainer: Trainer,
    sources: Sources,
    update: settings.Update,
    *,
    is_new: bool,
    data: Sequence[Sequence[Example]],
    states_folder: str,
    keeps_whole: bool = False,
) -> tuple[LoadedOriginal, PyTree | None]:
    """Reads the original once, and makes of it what the step needs and where training starts.

    Args:
      trainer: The run's trainer.
      sources: Where the parameters come from.
      update: Decides how many examples states are computed for at a time, and their lengths.
      is_new: Whether the run starts here, so that it needs parameters to start from.
      data: The data sets that it will be asked about, where states are cached.
      states_folder: Folder of those states.
      keeps_whole: Whether something beside the step runs the model, so that all parameters of an
        original with which some are shared stay in memory.

    Returns:
      The original; and float32 parameters to start from (those that are trained, or adapters),
      which the caller may give away, or None unless `is_new`.

    Raises:
      UsageError: What training starts from does not fit what is trained.
    """
    abstract, model, kind = trainer.abstract_original, trainer.model, trainer.original_kind
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
    states = states_of(
        model,
        whole,
        data,
        features=trainer.state_features,
        trained_layers=kind.trained_layers,
        digest=identity["digest"],
        states_folder=states_folder,
        task_feature_lengths=update.task_feature_lengths,
        batch_size=trainer.rows_at_once(update.batch_size),
    )
    stays = abstract
    if keeps_whole and not kind.is_apart:
        stays = model.abstract_computed_params
    start, shared = None, ""
    if is_new and not kind.has_adapters and not starts_elsewhere:
        # A copy: the state's buffers are donated to every update, the original's never.
        kept = copied(part_of(whole, stays), stays)
        start = adapters.upper_layers(whole, kind.trained_layers)
    else:
        if is_new and not kind.is_apart:
            shared = digests.of_params(without(whole, trainer.abstract_params))
        kept = _converted(part_of(whole, stays), stays)
    del whole
    if is_new and kind.has_adapters and starts_elsewhere:
        start = sources.read_start(identity["digest"])
    elif is_new and kind.has_adapters:
        rank, seed = trainer.adapter_rank, sources.schedule.seed
        start = model.init_adapters(rank, seed, kind.trained_layers)
    elif is_new and starts_elsewhere:
        start = sources.read_start()
        if not kind.is_apart and shared != digests.of_params(
            without(start, trainer.abstract_params)
        ):
            raise UsageError(
                f"START_CHECKPOINT_PATH: with TRAINED_LAYERS={kind.trained_layers}, expected a "
                "model that differs from the original in these layers alone, found other "
                "differences. Set TRAINED_LAYERS to what that model was trained with."
            )
        start = adapters.upper_layers(start, kind.trained_layers)
    is_whole = jax.tree.structure(kept) == jax.tree.structure(model.abstract_params)
    loaded = LoadedOriginal(part_of(kept, abstract), identity, kept if is_whole else None, states)
    return loaded, start


def probe(model: Model, params: PyTree) -> np.ndarray:
    """The log-probabilities `[4, 16]`, in nats, that a model gives a batch of random tokens.

    A digest tells parameters apart, this what is computed with them. The batch depends on the size
    of the vocabulary alone.

    Args:
      model: The network.
      params: The network's parameters, with layers and kernels as the network has them.
    """
    num_rows, lengths = 4, {"inputs": 16, "targets": 16}
    random = np.random.default_rng(0)
    ids = random.integers(2, model.config.vocab_size, (num_rows, 2, 16), dtype=np.int32)
    no_marks = np.zeros((0, 2), np.int32)
    examples = [Example(*row, negative_pairs=no_marks) for row in ids]
    batch_size = sharding.batch_size_for(num_rows, model.mesh)
    repeated = [examples[row % num_rows] for row in range(batch_size)]
    batch = model.network.feature_layout.convert(repeated, lengths)
    placed = sharding.put_batch(batch, model.mesh)
    return np.asarray(fused.jit_log_likelihoods(model)(params, placed))[:num_rows]


def states_of(
    model: Model,
    params: PyTree,
    data: Sequence[Sequence[Example]],
    *,
    features: Mapping[str, str] = _OF_DECODER,
    trained_layers: int | None = None,
    digest: str,
    states_folder: str,
    task_feature_lengths: Mapping[str, int],
    batch_size: int,
) -> dict[str, OriginalStates]:
    """The states of examples, in folders that training and others share.

    Args:
      model: The original's network.
      params: The original's parameters.
      data: Examples, in any number of data sets; what the folder has is not computed again.
      features: Which states, as `Original.features` has them.
      trained_layers: Number of the decoder's last layers that are trained: the states below them
        are computed. None leaves these out.
      digest: Digest of the original's parameters.
      states_folder: To read and to write.
      task_feature_lengths: Tokens of "inputs" and "targets".
      batch_size: Examples that states are computed for at a time.

    Returns:
      The states by the names of `features`.

    Raises:
      UsageError: The folder cannot be used.
    """
    identity = f"{digest}-{_function_of(model.config)}"
    stores = {}
    for name, like in features.items():
        # The folder of the decoder's states has no name of its own: there were no others once.
        below = "" if name == STATES else f"-{name}-below-{trained_layers}"
        stores[name] = OriginalStates(
            states_folder,
            f"{identity}{below}",
            task_feature_lengths,
            model.network.feature_layout,
            like=like,
        )
    function = model.cacheable_states(STATES if STATES in features else None, trained_layers)

    def of_batch(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = function(params, sharding.put_batch(batch, model.mesh))
        return {name: np.asarray(states) for name, states in found.items()}

    original_cache.compute(stores, data, of_batch, batch_size)
    return stores


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
