"""From settings to a run: mesh, shardings, model, optimizer, and the one jitted step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tnt_jax import objectives
from tnt_jax.models import adapters, sharding
from tnt_jax.models.model import Forward, Model
from tnt_jax.models.network_config import NetworkConfig
from tnt_jax.runtime.array_types import PyTree
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import settings, train_step
from tnt_jax.training.originals import PARAMETERS, STATES, Original


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """What one training run holds fixed.

    Attributes:
      model: The current model.
      objective: The loss per token.
      optimizer: Updates the parameters.
      num_microbatches: Parts that a batch is computed in.
      original_kind: Where the original's logits come from, and what is trained.
      adapter_rank: Rank of the adapters, where these are trained.
      block_size: Tokens that the loss is computed for at a time on a device; None chooses.
      skip_non_finite: Whether an update whose loss or gradient norm is not finite is left out.
    """

    model: Model
    objective: objectives.TntObjective
    optimizer: optax.GradientTransformation
    num_microbatches: int = 1
    original_kind: Original = PARAMETERS
    adapter_rank: int = 0
    block_size: int | None = None
    skip_non_finite: bool = False

    def rows_at_once(self, batch_size: int) -> int:
        """Rows of a batch that devices compute together: evaluation has as much room as updates."""
        return batch_size // self.num_microbatches

    def with_sets(self, sets: tuple[tuple[int, ...], ...]) -> "Trainer":
        """For batches whose marks name these sets of ids (`TntObjective.sets`)."""
        objective = dataclasses.replace(self.objective, sets=sets)
        return dataclasses.replace(self, objective=objective)

    @functools.cached_property
    def abstract_params(self) -> PyTree:
        """Shapes, dtypes and shardings of the parameters that are trained."""
        layers = self.original_kind.trained_layers
        if self.original_kind.has_adapters:
            return self.model.abstract_adapters(self.adapter_rank, layers)
        return adapters.upper_layers(self.model.abstract_params, layers)

    @functools.cached_property
    def abstract_original(self) -> PyTree | None:
        """Shapes, dtypes and shardings of what the step reads of the original; None if nothing."""
        return self.original_kind.read_params(
            self.model.abstract_computed_params,
            self.abstract_params,
            needs_original=self.objective.needs_original,
        )

    @property
    def state_features(self) -> dict[str, str]:
        """The states that come with a batch, as `Original.features` has them."""
        return self.original_kind.features(needs_original=self.objective.needs_original)

    def measured(self, *, is_training: bool) -> list[str]:
        """The means that a run can have, of `train_step.MEAN_OVER`.

        Args:
          is_training: Whether of updates; otherwise of an evaluation.
        """
        objective, kind = self.objective, self.original_kind
        has_logits, never = objective.needs_original, set[str]()
        if not is_training:
            never.add("gradient_norm")
            has_logits = kind.gives_logits(needs_original=has_logits)
            has_logits &= self.abstract_original is not None
        if not has_logits:
            never |= train_step.OF_ORIGINAL
        all_are_negative = objective.removed_everywhere_counts_as == "negative"
        without = {
            "num_negative": objective.negative_term == "none",
            "num_positive": bool(objective.removed_everywhere) and all_are_negative,
        }
        return [
            name
            for name, count in train_step.MEAN_OVER.items()
            if name not in never and not without.get(count, False)
        ]

    @functools.cached_property
    def abstract_state(self) -> train_step.TrainState:
        """Shapes, dtypes and shardings of the state; no array is made."""
        params, mesh = self.abstract_params, self.model.mesh
        abstract = jax.eval_shape(
            functools.partial(train_step.init_state, optimizer=self.optimizer), params
        )
        shardings = train_step.TrainState(
            step=sharding.replicated(mesh),
            params=sharding.shardings_of(params),
            opt_state=sharding.optimizer_shardings(
                abstract.opt_state, params, sharding.shardings_of(params), mesh
            ),
        )
        return sharding.with_shardings(abstract, shardings)

    def init_state(self, params: PyTree) -> train_step.TrainState:
        """The state before the first update; takes over (donates) `params`."""
        return _jit_init_state(self)(params)

    @functools.cached_property
    def step(self) -> Callable[..., tuple[train_step.TrainState, train_step.Sums]]:
        """`(state, original_params or None, batch, key) -> (state, sums)`, compiled.

        The original is an argument with a sharding of its own: never captured, never donated.
        """
        return _jit_step(self)

    def abstract_batch(
        self, feature_shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Model features as the step takes them, the original's states among them if it does."""
        floats = ("decoder_negative_strengths",)
        shapes = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32 if name in floats else jnp.int32)
            for name, shape in feature_shapes.items()
        }
        for name, like in self.state_features.items():
            network = self.model.network
            shape = (*shapes[like].shape, self.model.config.emb_dim)
            dtype = network.hidden_dtype if name == STATES else self.model.config.dtype
            shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
        where = sharding.batch_sharding(self.model.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
            for name, shape in shapes.items()
        }

    def lower(self, abstract_batch: Mapping[str, jax.ShapeDtypeStruct]) -> Any:
        """The step for a batch of such shapes, ready to be compiled; no array is made."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        step: Any = self.step
        return step.lower(self.abstract_state, self.abstract_original, abstract_batch, key)

    def memory_advice(self) -> list[str]:
        """What would help a training step, what costs least first."""
        config, mesh = self.model.config, self.model.mesh
        tries = []
        if mesh.shape["data"] > 1:
            tries.append("FSDP_DEVICES (parameters, optimizer and original over more devices)")
        if config.remat_policy != "full":
            tries.append("REMAT_POLICY='full' (activations are computed again)")
        if not config.scan_layers:
            tries.append("SCAN_LAYERS=True (one layer's gradients and weights at a time)")
        if config.dtype != "bfloat16":
            tries.append("DTYPE='bfloat16' (activations, and the original's kernels, in half)")
        tries.append("NUM_MICROBATCHES (activations of a part of the batch)")
        if self.original_kind.name == "parameters" and self.objective.needs_original:
            tries.append("ORIGINAL='cached' (no second tree of parameters)")
        if not self.original_kind.has_adapters:
            tries.append("ORIGINAL='adapters_off' (gradients and optimizer of adapters alone)")
        tries.append("a smaller BATCH_SIZE or TASK_FEATURE_LENGTHS")
        return tries


# The functions that are compiled for a run belong to its settings: the next run with the same ones,
# a sweep's next seed, compiles nothing.


@sharding.keep_compiled
def _jit_init_state(trainer: Trainer) -> Callable[..., train_step.TrainState]:
    return jax.jit(
        functools.partial(train_step.init_state, optimizer=trainer.optimizer),
        out_shardings=sharding.shardings_of(trainer.abstract_state),
        donate_argnums=0,
    )


def _forward_of(model: Model, kind: Original) -> Forward:
    """The forward pass of a step: of the layers above the states that come with the batch."""
    if kind.begins_above is None:
        return model.forward
    return functools.partial(model.forward, trained_layers=kind.begins_above)


@sharding.keep_compiled
def _jit_step(trainer: Trainer) -> Callable[..., tuple[train_step.TrainState, train_step.Sums]]:
    state = sharding.shardings_of(trainer.abstract_state)
    mesh = trainer.model.mesh
    specs = jax.tree.map(lambda where: where.spec, state.params)
    return jax.jit(
        sharding.traced_on(
            mesh,
            train_step.train_step,
            forward=_forward_of(trainer.model, trainer.original_kind),
            objective=trainer.objective,
            optimizer=trainer.optimizer,
            num_microbatches=trainer.num_microbatches,
            original_kind=trainer.original_kind,
            block_size=trainer.block_size,
            place_gradients=lambda tree: jax.lax.with_sharding_constraint(tree, specs),
            skip_non_finite=trainer.skip_non_finite,
        ),
        in_shardings=(
            state,
            sharding.shardings_of(trainer.abstract_original),
            sharding.batch_sharding(mesh),
            sharding.replicated(mesh),
        ),
        out_shardings=(state, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def jit_eval_step(
    model: Model,
    objective: objectives.TntObjective,
    kind: Original = PARAMETERS,
    block_size: int | None = None,
) -> Callable[..., train_step.Sums]:
    """`(params, original_params or None, batch) -> sums`, compiled for the model's mesh."""
    return _jit_for_eval(train_step.eval_step, model, objective, kind, block_size)


def jit_token_step(
    model: Model, objective: objectives.TntObjective, kind: Original = PARAMETERS
) -> Callable[..., tuple[train_step.Sums, train_step.TokenValues]]:
    """`jit_eval_step` with the values of each token: `-> (sums, values)`, on every device."""
    return _jit_for_eval(train_step.token_step, model, objective, kind, None)


@sharding.keep_compiled
def _jit_for_eval(
    step: Callable[..., Any],
    model: Model,
    objective: objectives.TntObjective,
    kind: Original,
    block_size: int | None,
) -> Callable[..., Any]:
    return jax.jit(
        sharding.traced_on(
            model.mesh,
            step,
            forward=_forward_of(model, kind),
            objective=objective,
            original_kind=kind,
            block_size=block_size,
        ),
        out_shardings=sharding.replicated(model.mesh),
    )


def copied(params: PyTree, abstract: PyTree) -> PyTree:
    """New arrays with the dtypes of `abstract`, placed as `params` are."""
    return jax.tree.map(lambda leaf, like: jnp.array(leaf, like.dtype, copy=True), params, abstract)


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
    if original_choice.has_adapters:
        scale = original_choice.adapter_alpha / original_choice.adapter_rank
        config = dataclasses.replace(config, adapter_scale=scale)
    return Trainer(
        model=Model(config=config, mesh=mesh),
        objective=objective,
        optimizer=update.make_optimizer(),
        num_microbatches=update.num_microbatches,
        original_kind=_kind_of(original_choice, config),
        adapter_rank=original_choice.adapter_rank,
        block_size=update.block_size,
        skip_non_finite=update.non_finite == "skip",
    )


def _kind_of(choice: settings.OriginalChoice, config: NetworkConfig) -> Original:
    """The kind that the settings name.

    Raises:
      UsageError: Dropout would change states that are cached.
    """
    kind = Original(
        has_adapters=choice.has_adapters,
        trained_layers=choice.trained_layers,
        cached_from=config if choice.is_cached else None,
    )
    if kind.begins_above is not None and config.dropout_rate:
        raise UsageError(
            f"DROPOUT_RATE: expected 0 with ORIGINAL={choice.kind!r} and TRAINED_LAYERS, because "
            f"the states that enter the trained layers are cached; found {config.dropout_rate}."
        )
    return kind
