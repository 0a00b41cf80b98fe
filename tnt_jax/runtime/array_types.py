"""Array annotations with shapes, optional at run time.

Under pytest, jaxtyping and beartype check every annotated call. In production nothing is checked,
and a machine that has only JAX, Flax and Optax does not need jaxtyping: there each annotation is
plain `jax.Array`.
"""

import jax

try:
    from jaxtyping import Array, Bool, Float, Int, Key, PyTree
except ImportError:  # jaxtyping comes with the `test` extra

    class _Unchecked:
        def __class_getitem__(cls, item):
            return jax.Array

    Array = jax.Array
    Bool = Float = Int = Key = PyTree = _Unchecked

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]
