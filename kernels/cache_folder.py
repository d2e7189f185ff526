"""Where this machine remembers what was found out about it: checked kernels, tuned launch shapes, compiled kernels."""

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

NVIDIA = Path("/proc/driver/nvidia/gpus")  # of the driver on Linux: a folder for each GPU
DRIVER = Path("/proc/driver/nvidia/version")  # one driver may not take what another's compiler made


def cache_folder() -> Path:
    """The user's; it need not exist."""
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        home = Path(tempfile.gettempdir())
    usual = home / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "glm-mlx"


def compiled_folder() -> Path | None:
    """A folder for what MLX compiles for this machine's NVIDIA GPUs; None where there are none, or no such folder.

    MLX names a compiled kernel of its own after what it does. What else it depends on is in the name of the folder.
    """
    try:
        lines = [line for file in NVIDIA.glob("*/information") for line in file.read_text().splitlines()]
        models = sorted({line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")})
        if not models:
            return None
        # Of several kinds of GPUs, those that this process may use.
        used = os.environ.get("CUDA_VISIBLE_DEVICES") if len(models) > 1 else None
        driver = DRIVER.read_text() if DRIVER.exists() else ""
        digest = hashlib.sha256(repr((models, used, driver)).encode()).hexdigest()[:8]
        folder = cache_folder().absolute() / "cuda" / f"mlx-{version('mlx')}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, PackageNotFoundError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def write_whole(file: Path, content: bytes) -> None:
    """In one step, as another process may be reading it; makes its folder. Raises OSError, and then leaves nothing."""
    # Not by the process's number: containers that share a folder have the same.
    new = file.with_name(f"{file.name}.{uuid4().hex}")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        new.write_bytes(content)
        new.replace(file)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            new.unlink()
        raise
