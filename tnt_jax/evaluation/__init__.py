"""What changed, in numbers, tables and as a page; and where an arm's files lie.

Imports `runtime` and `data`.
"""
