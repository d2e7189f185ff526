"""`python -m reference`: the product against the reference on any file. The one place here that knows both."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C while it starts is to print no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from parity_tests.check_file import main

sys.exit(main())
