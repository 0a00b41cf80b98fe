"""What to change where memory does not suffice, of the host or of a device."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnt_jax import assembly, failures
from tnt_jax.errors import UsageError
from tnt_jax.original import AdaptersOff, Parameters


def of_training(trainer: assembly.Trainer) -> list[str]:
    """What would help a training step, what costs least first."""
    config, mesh = trainer.model.config, trainer.model.mesh
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
    if isinstance(trainer.original, Parameters) and trainer.objective.needs_original:
        tries.append("ORIGINAL='cached' (no second tree of parameters)")
    if not isinstance(trainer.original, AdaptersOff):
        tries.append("ORIGINAL='adapters_off' (gradients and optimizer of adapters alone)")
    tries.append("a smaller BATCH_SIZE or TASK_FEATURE_LENGTHS")
    return tries


def of_inference(*settings: str) -> list[str]:
    """What would help a program that runs a model whose batches depend on these settings."""
    return [
        f"a smaller {' or '.join(settings)}",
        "FSDP_DEVICES or MODEL_DEVICES (parameters over more devices)",
    ]


@contextlib.contextmanager
def explained(tries: Sequence[str], **settings: Any) -> Iterator[None]:
    """Around work that takes memory: where there is not enough, it says what to change.

    Args:
      tries: From one of the functions above.
      **settings: That the work was done with, by their macros.

    Raises:
      UsageError: There is not enough.
    """
    try:
        yield
    except Exception as error:
        reason = failures.out_of_memory(error)
        if reason is None or isinstance(error, UsageError):
            raise
        found = ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())
        raise UsageError(
            f"out of memory with {found}: {reason}. To make it fit, try {'; '.join(tries)}."
        ) from error


def _shown(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
