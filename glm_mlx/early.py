"""Ctrl-C while a command is still imported. This imports nothing that Python has not imported itself."""

import _signal  # what the module `signal` is made of: that one's own import takes long enough to be interrupted


def quiet_start() -> None:
    """Let Ctrl-C end the process at once, without a traceback, until `signals.answered` is entered."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # not where it is ignored, as behind `&`
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
