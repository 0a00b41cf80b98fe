"""Networks, and what they run on: layers, adapters, decoding, the mesh and its shardings.

Imports `runtime`. Needs JAX, Flax and NumPy only: no TensorFlow, seqio, gin or Orbax.
"""
