"""Models in files: Orbax, T5X and Hugging Face's formats, to and from named lazy arrays.

Adapters also go to PEFT's format.

Imports `models`, `data` and `runtime`.
"""
