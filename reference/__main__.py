"""`python -m reference`: the product against the reference on any file. The one place here that knows both."""

import sys

from parity_tests.check_file import main

sys.exit(main())
