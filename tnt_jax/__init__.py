"""Targeted Negative Training of T5 and decoder-only language models in JAX.

Importing the package imports nothing else. Each module imports only what it needs; the numerics
need JAX, Flax and Optax (docs/architecture.md).
"""

__version__ = "0.3.0"
