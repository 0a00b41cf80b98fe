"""Networks, and what they run on: layers, adapters, decoding, the mesh and its shardings.

`network.Network` is what the project asks of a network, `families` makes one from its settings.
Imports `data` and `runtime`. Needs JAX, Flax and NumPy only: no TensorFlow, seqio, gin or Orbax.
"""
