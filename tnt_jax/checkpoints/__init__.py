"""Models in files: Orbax, T5X and Hugging Face's formats, to and from named lazy arrays.

Imports `models`, `data` and `runtime`.
"""
