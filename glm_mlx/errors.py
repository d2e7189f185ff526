"""The one exception whose text is meant for the person at the terminal."""


class InputError(Exception):
    """Something the user gave cannot be used.

    `str(error)` is one line: what is wrong, with the value, and after a semicolon what to do.
    The command line prints it after `error: ` and exits with 2; nothing else may reach the user as a traceback.
    """
