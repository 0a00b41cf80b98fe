"""From records to batches: text to marked tokens, tasks, rows of a batch.

Imports `runtime`.
"""
