"""The settings of a training run, as values that are passed on whole."""

import dataclasses
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from tnt_jax.models import sharding
from tnt_jax.runtime import seeds, settings_json
from tnt_jax.runtime.errors import UsageError
from tnt_jax.training import original_cache, train_step

# Where the original's logits come from, and whether adapters are trained.
ORIGINALS = ("parameters", "cached", "adapters_off", "adapters_cached")
_RANK, _ALPHA = 16, 32.0  # of adapters
EVAL_EVERY = 500  # unless it is set

# What becomes of an update whose loss or gradient is not finite: it stops the run, or is left out.
NON_FINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """How an update is computed.

    Attributes:
      batch_size: Rows per update, over all devices and microbatches: examples, unless packed.
      task_feature_lengths: Tokens of "inputs" and "targets"; longer ones are cut, and counted.
      optimizer: An Optax optimizer, or what makes one, such as `optax.adafactor`.
      pack: Puts as many whole examples into a row as fit. An update then sees more of them.
      num_microbatches: Parts that each batch is computed in, to save memory.
      mesh_shape: Devices per mesh axis; None puts all on `data`.
      block_size: Tokens that a device computes the loss of at a time; None chooses.
      max_gradient_norm: A gradient whose norm is larger is scaled down to it; None scales none.
      non_finite: What becomes of an update whose loss or gradient is not finite: "stop" ends the
        run, "skip" leaves the update out and counts it.
      learning_rate_factor: Multiplies what the optimizer adds to the parameters. For Adam, AdamW
        and all that multiply by the learning rate at last, that is to multiply the learning rate,
        be it a number or a schedule. For Adafactor it is, too, but for `weight_decay_rate`: the
        decay, which the learning rate does not change, is multiplied as well.

    Raises:
      UsageError: A number or a name is not possible.
    """

    batch_size: int
    task_feature_lengths: Mapping[str, int]
    optimizer: Callable[[], optax.GradientTransformation] | optax.GradientTransformation
    pack: bool = False
    num_microbatches: int = 1
    mesh_shape: sharding.MeshShape | None = None
    block_size: int | None = None
    max_gradient_norm: float | int | None = None
    non_finite: str = "stop"
    # Notes of finished stages do not have it: `settings_json.describe`.
    learning_rate_factor: float | int = dataclasses.field(
        default=1.0, metadata={"omit_default": True}
    )

    def __post_init__(self):
        for name, number in (
            ("BATCH_SIZE", self.batch_size),
            ("NUM_MICROBATCHES", self.num_microbatches),
        ):
            if number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")
        if self.block_size is not None and self.block_size < 1:
            raise UsageError(f"BLOCK_SIZE: expected None or at least 1, found {self.block_size}.")
        if self.non_finite not in NON_FINITE:
            raise UsageError(
                f"NON_FINITE: expected one of {NON_FINITE}, found {self.non_finite!r}."
            )
        norm = self.max_gradient_norm
        if norm is not None and not 0 < norm < math.inf:
            raise UsageError(f"MAX_GRADIENT_NORM: expected None or more than 0, found {norm}.")
        if not 0 < self.learning_rate_factor < math.inf:
            raise UsageError(
                "learning_rate_factor: expected more than 0, and finite, found "
                f"{self.learning_rate_factor}."
            )

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer, with clipping by the norm over all parameters before anything else.

        Optimizers are compared by identity: one that is made as the last run's was, with the same
        numbers in it, is that one, so that what was compiled for it serves again. One in which a
        function of the user's is, such as a schedule, is always another: no name says what that
        function does by now.
        """
        made = self.optimizer
        if callable(made):
            maker = made.func if isinstance(made, functools.partial) else made
            made = made()
            maker, numbers = inspect.unwrap(maker), json.dumps(settings_json.describe(made))
            if all(name.startswith(_LIBRARIES) for name in _FUNCTION.findall(numbers)):
                made = _made.setdefault((maker, numbers), made)
        return _surrounded(made, self.learning_rate_factor, self.max_gradient_norm)


# Where nobody changes a function under its name.
_LIBRARIES = ("optax.", "jax.", "tnt_jax.", "functools.", "builtins.")
_FUNCTION = re.compile(r'"(?:function|call)": "([^"]+)"')

# By what made them, and by all numbers that they hold.
_made: dict[tuple[Any, str], optax.GradientTransformation] = {}


@functools.lru_cache(maxsize=4)
def _surrounded(
    optimizer: optax.GradientTransformation,
    learning_rate_factor: float,
    largest_norm: float | int | None,
) -> optax.GradientTransformation:
    if learning_rate_factor != 1:
        optimizer = optax.chain(optimizer, optax.scale(learning_rate_factor))
    if largest_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(largest_norm), optimizer)
    return optimizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalChoice:
    """Which model is the original, and where its logits come from.

    Attributes:
      path: A checkpoint; training starts from it, too. None is a random initialisation.
      kind: "parameters" (a second tree and a second forward pass), "cached" (decoder states,
        computed once for the data), "adapters_off" (the model trains low-rank adapters, and is
        its own original without them) or "adapters_cached" (both).
      states_dir: Folder of the cached states; None is beside the file of records, or in the model
        directory.
      adapter_rank: Width of the adapters.
      adapter_alpha: Adapters are multiplied by `adapter_alpha / adapter_rank`.
      trained_layers: The decoder's last so many layers alone are trained or have adapters. All
        else is the original's: what is below is computed once for both models or, where states
        are cached, once for the data. None is the whole model, an encoder too.

    Raises:
      UsageError: Settings contradict each other.
    """

    path: str | None
    kind: str = "parameters"
    states_dir: str | None = None
    adapter_rank: int = _RANK
    adapter_alpha: float = _ALPHA
    trained_layers: int | None = None

    def __post_init__(self):
        if self.kind not in ORIGINALS:
            raise UsageError(
                f"ORIGINAL: expected one of {', '.join(ORIGINALS)}; found {self.kind!r}."
            )
        if self.states_dir is not None and not self.is_cached:
            raise UsageError(
                f"STATES_DIR is set, to {self.states_dir}, and ORIGINAL is {self.kind!r}: states "
                "are kept with ORIGINAL='cached' or 'adapters_cached' alone."
            )
        if self.states_dir is not None:
            original_cache.check_is_local(self.states_dir)
        # Whoever sets these wants adapters, and would get the whole model.
        for name, number, default in (
            ("ADAPTER_RANK", self.adapter_rank, _RANK),
            ("ADAPTER_ALPHA", self.adapter_alpha, _ALPHA),
        ):
            if number != default and not self.has_adapters:
                raise UsageError(
                    f"{name} is set, to {number:g}, and ORIGINAL is {self.kind!r}: adapters are "
                    "trained with ORIGINAL='adapters_off' or 'adapters_cached' alone."
                )
        if self.adapter_rank < 1:
            raise UsageError(f"ADAPTER_RANK: expected at least 1, found {self.adapter_rank}.")

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters are trained, and nothing else."""
        return self.kind.startswith("adapters")

    @property
    def is_cached(self) -> bool:
        """Whether states of the original are computed once for the data, and kept in files."""
        return self.kind.endswith("cached")

    def states_folder(self, records_path: str | os.PathLike | None, folder: str) -> str:
        """Where they are kept: in `states_dir`, beside a file of records, or else in a folder."""
        return self.states_dir or original_cache.default_folder(records_path, folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Where training starts, how long it goes on; how often it logs, evaluates and saves.

    Attributes:
      train_steps: Number of updates in all, those before a restart included.
      start_path: A checkpoint that training starts from instead of the original, for a further
        round; None starts from the original.
      seed: Decides the order of the data, dropout and a random initialisation.
      eval_every: Updates from one evaluation to the next; there is one at the end, too.
      checkpoint_every: Updates from one checkpoint to the next; the end is always saved.
      log_every: Updates from one line of metrics to the next.

    Raises:
      UsageError: A number is not possible.
    """

    train_steps: int
    start_path: str | None = None
    seed: int = 0
    eval_every: int = EVAL_EVERY
    checkpoint_every: int = 1000
    log_every: int = 50

    def __post_init__(self):
        for name, number in (
            ("TRAIN_STEPS", self.train_steps),
            ("CHECKPOINT_EVERY", self.checkpoint_every),
            ("LOG_EVERY", self.log_every),
            ("EVAL_EVERY", self.eval_every),
        ):
            if number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")
        seeds.check(self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay on disk, and what a run that goes on from them may change.

    Attributes:
      checkpoints: Number of newest ones that stay.
      every: Checkpoints of every so many updates stay as well; None keeps no others.
      best: A metric, such as "eval/loss": the checkpoint where it is smallest stays as well.
      allow_changes: Names in `resume.COMPARED`: these settings may differ from those of the run
        that the model directory holds; other differences are refused.

    Raises:
      UsageError: A number or the metric is not possible.
    """

    checkpoints: int = 2
    every: int | None = None
    best: str | None = None
    allow_changes: Sequence[str] = ()

    def __post_init__(self):
        for name, number in (("KEEP_CHECKPOINTS", self.checkpoints), ("KEEP_EVERY", self.every)):
            if number is not None and number < 1:
                raise UsageError(f"{name}: expected at least 1, found {number}.")
        if self.best is not None and self.best.removeprefix("eval/") not in train_step.MEAN_OVER:
            names = ", ".join(train_step.MEAN_OVER)
            raise UsageError(
                f"KEEP_BEST: expected one of {names}, of the evaluation with eval/ before it; "
                f"found {self.best!r}."
            )
