"""Fingerprints of parameters, the same on any mesh and in any file format."""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tnt_jax.checkpoints import lazy_arrays
from tnt_jax.models import parameters, sharding
from tnt_jax.runtime.array_types import PyTree


def of_params(params: PyTree) -> str:
    """A fingerprint of parameters: 16 hexadecimal digits, the same on any mesh.

    Covers the name, shape and bits of every parameter and where each element stands; layers that
    are stacked count as layers that are apart. It tells models apart, so that a mistake is seen; it
    does not withstand an adversary.
    """
    hashed = hashlib.sha256()
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for (path, leaf), sums in zip(
        jax.tree.leaves_with_path(parameters.unstack_layers(abstract)),
        jax.device_get(_bit_sums(params)),
        strict=True,
    ):
        hashed.update(f"{sharding.path_name(path)} {leaf.shape} {[int(x) for x in sums]} ".encode())
    return hashed.hexdigest()[:16]


def of_files(weights: Mapping[str, lazy_arrays.LazyArray]) -> str:
    """The `of_params` of parameters in files, layers apart, read one after the other."""
    hashed = hashlib.sha256()
    for name in sorted(weights, key=lambda name: name.split("/")):
        array = weights[name]
        (sums,) = jax.device_get(_bit_sums({"array": jnp.asarray(array.load())}))
        hashed.update(f"{name} {array.shape} {[int(x) for x in sums]} ".encode())
    return hashed.hexdigest()[:16]


@jax.jit
def _bit_sums(params):
    """Two sums modulo 2^32 of each parameter's scrambled bits: exact in any order of addition.

    So every device adds up what it holds, and nothing is gathered.
    """

    def scramble(x):  # the finalizer of MurmurHash3: every bit of x acts on every bit of the result
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def sums_of(leaf):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        position = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position = position * jnp.uint32(size) + index
        scrambled = scramble(bits ^ scramble(position + jnp.uint32(1)))
        return tuple(jnp.sum(x, dtype=jnp.uint32) for x in (scrambled, scramble(~scrambled)))

    return [sums_of(leaf) for leaf in jax.tree.leaves(parameters.unstack_layers(params))]
