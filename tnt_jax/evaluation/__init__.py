"""What changed, in numbers and as a page: text metrics, results of sweeps, the report page.

Imports `runtime` and `data`.
"""
