"""What `localize` does: how well each beginning of an output ends, and the marks of what it loses.

Imports `training` and the rooms below it, but `experiments`.
"""
