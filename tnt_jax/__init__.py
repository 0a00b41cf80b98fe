"""Targeted Negative Training for T5 models in JAX.

Importing the package is cheap on purpose: nothing heavier than the version lives here, and each
module imports only what it needs (the numerics need JAX, Flax and Optax; see docs/architecture.md).
"""

__version__ = "0.2.0"
