"""From records to batches: marked tokens, tasks, rows of a batch.

Imports `tokenizers` and `runtime`.
"""
