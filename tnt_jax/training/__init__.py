"""A training run: the train step, the loop, the original, checkpoints that resume.

Imports every room below, `watching` among them.
"""
