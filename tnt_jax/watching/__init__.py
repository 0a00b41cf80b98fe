"""What is shown and written while a run goes on: metrics, samples, evaluations, profiles.

Imports the rooms below `training`.
"""
