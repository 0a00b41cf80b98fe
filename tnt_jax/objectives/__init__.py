"""The objectives of Targeted Negative Training: their definition, and the fused head.

Imports `runtime` and `models`. Needs JAX, Flax and NumPy only: no TensorFlow, seqio, gin or Orbax.
"""

from tnt_jax.objectives.definition import (
    LOG_LIKELIHOOD_FLOOR,
    LOG_ZERO,
    NEGATIVE_TERMS,
    POSITIVE_TERMS,
    SETTINGS,
    TERMS,
    Certificate,
    FinalTokenPreference,
    TntObjective,
    certificate,
    desired_log_probs,
    exp_remainder,
    named,
    removed_mask,
    removed_mass,
)

__all__ = [
    "LOG_LIKELIHOOD_FLOOR",
    "LOG_ZERO",
    "NEGATIVE_TERMS",
    "POSITIVE_TERMS",
    "SETTINGS",
    "TERMS",
    "Certificate",
    "FinalTokenPreference",
    "TntObjective",
    "certificate",
    "desired_log_probs",
    "exp_remainder",
    "named",
    "removed_mask",
    "removed_mass",
]
