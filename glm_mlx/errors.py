"""The one exception whose text is meant for the person at the terminal, and what tells a full memory."""

import re

NO_MEMORY = re.compile(
    "allocate|out of memory|insufficient memory"  # as MLX, CUDA and Metal say
    "|can't start new thread|resource temporarily unavailable",  # as Python and C++ say where a stack has no room
    re.IGNORECASE,
)


class InputError(Exception):
    """Something the user gave cannot be used.

    `str(error)` is one line: what is wrong, with the value, and after a semicolon what to do.
    The command line prints it after `error: ` and exits with 2; nothing else may reach the user as a traceback.
    """


class NotNumbersError(InputError):
    """The model's logits are NaN or infinite: nothing that this file goes on to say means anything."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this was raised because there was no memory."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))
