"""Bounds of a command buffer on Metal, which MLX reads from the environment once, when it opens the device.

MLX ends a buffer after so many operations, or so many millions of elements of whole inputs. The experts of one layer
are more than its own bound, so that it ends a buffer for each layer of each token. Nothing here imports MLX.
"""

import ctypes
import re
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

NAMES = ("MLX_MAX_MB_PER_BUFFER", "MLX_MAX_OPS_PER_BUFFER")


@dataclass(frozen=True)
class Setting:
    """A variable that is set. is_ours: by this package. is_early: when MLX was not imported yet."""

    name: str
    value: str
    is_ours: bool
    is_early: bool

    def __str__(self) -> str:
        origin = "set by glm-mlx" if self.is_ours else "given"
        if self.is_ours and not self.is_early:
            origin += " after MLX was imported, which may not have seen it: import glm_mlx first"
        return f"{self.name}={self.value} ({origin})"


def set_command_buffers(environ: MutableMapping[str, str]) -> tuple[Setting, ...]:
    """Set what `command_buffers` says, and return all that is set then."""
    is_early = "mlx.core" not in sys.modules
    chosen = command_buffers(sys.platform, chip(), environ)
    environ.update(chosen)
    return tuple(Setting(name, environ[name], name in chosen, is_early) for name in NAMES if name in environ)


def command_buffers(platform: str, chip: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables to set on `platform` (as `sys.platform`) and `chip` ("Apple M4 Max"); those in `environ` are left.

    More operations in a buffer gain before M5, and nothing or less from there on (as others report).
    """
    wanted = {}
    if platform == "darwin":
        wanted["MLX_MAX_MB_PER_BUFFER"] = "400"
        if (generation := re.match(r"Apple M(\d+)\b", chip)) and int(generation[1]) < 5:
            wanted["MLX_MAX_OPS_PER_BUFFER"] = "200"
    return {name: value for name, value in wanted.items() if name not in environ}


def chip() -> str:
    """The processor's name as macOS gives it; "" on other systems, and where it gives none."""
    if sys.platform != "darwin":
        return ""
    name, size = ctypes.create_string_buffer(128), ctypes.c_size_t(128)
    try:
        failed = ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", name, ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return ""
    return "" if failed else name.value.decode(errors="replace")
