"""The one exception that means: the user can mend this."""


class UsageError(ValueError):
    """A mistake in what the user gave us: a setting, a file, a record.

    The message says what was expected, what was found and which setting to change. Programs print
    it as one line and exit with status 2; anything else that escapes is our own defect and keeps
    its traceback.
    """
