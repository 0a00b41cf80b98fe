"""What every program has: settings, files, the console, several processes, errors.

Reads no model and no record, and imports no other room. Of records it knows how the tables beside
them are called (`files.SETS_ENDING`), for a pattern leaves them out; of batches, that they have
room for the ids that are removed (`memory.check_batch`).
"""
