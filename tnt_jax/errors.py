"""The exceptions that are no defect of ours."""


class UsageError(ValueError):
    """A mistake in what the user gave us: a setting, a file, a record.

    The message says what was expected, what was found and which setting to change. Programs print
    it as one line and exit with status 2; anything else that escapes is our own defect and keeps
    its traceback.
    """


class ProcessLost(RuntimeError):
    """Another process of the run is not there, or not any more; nothing is wrong with this one.

    Programs print the message as one line and exit with status 1: all of them are to be started
    again.
    """
