"""What every program has: settings, files, the console, several processes, errors.

Knows nothing of models or records. Imports no other room.
"""
