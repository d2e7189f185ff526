"""Where this machine remembers what was found out about it: checked kernels, tuned launch shapes."""

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """The user's; it need not exist."""
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        home = Path(tempfile.gettempdir())
    usual = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "glm-mlx"
