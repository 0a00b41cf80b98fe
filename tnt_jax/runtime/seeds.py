"""Random seeds, as settings give them."""

from tnt_jax.runtime.errors import UsageError


def check(seed: int) -> None:
    """Raises a UsageError for a seed that JAX or NumPy does not take."""
    if not 0 <= seed < 2**31:
        raise UsageError(f"SEED: expected a whole number from 0 to {2**31 - 1}, found {seed}.")
