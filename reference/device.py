"""Where tinygrad runs the reference: a device that needs no compiler installed, if there is one."""

import platform
import sys

from tinygrad.helpers import DEV


def choose_device() -> None:
    """Set tinygrad's device for this process.

    On x86-64 tinygrad 0.13 assembles machine code itself (`CPU:X86`); from 0.14 on its CPU device wants clang there
    too, to start its worker thread. A Mac compiles for its GPU with what macOS ships. Elsewhere `CPU` needs clang.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        DEV.value = "CPU:X86"
    elif sys.platform == "darwin":
        DEV.value = "METAL"
    else:
        DEV.value = "CPU"
