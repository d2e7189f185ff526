"""The user's cache folder: checked kernels, tuned launch shapes, compiled kernels, results of benchmarks.

Code that runs on a GPU is read from it. So the folder and those below it are the user's own, with mode 0700, no links
and no one else's; else there is no cache. What is wrong is an OSError, which callers answer by going without.
"""

import errno
import hashlib
import os
import stat
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from uuid import uuid4

NVIDIA = Path("/proc/driver/nvidia/gpus")  # of the driver on Linux: a folder for each GPU
DRIVER = Path("/proc/driver/nvidia/version")  # one driver may not take what another's compiler made
NOWHERE = Path(os.devnull)  # nothing can be below it


def cache_folder() -> Path:
    """Absolute; need not exist. A relative XDG_CACHE_HOME is ignored, as its standard asks. Without a home: NOWHERE."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "glm-mlx"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in passwd
        home = NOWHERE
    home = home if home.is_absolute() else NOWHERE
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "glm-mlx"


def private_folder(*below: str, make: bool = True) -> Path:
    """The cache folder, or one below it, that nobody else can read or write. Raises OSError that says what is wrong.

    make: whether missing folders are made. The folder that holds the cache may be a link.
    """
    folder = cache_folder()
    if folder.is_relative_to(NOWHERE):
        raise FileNotFoundError(errno.ENOENT, "there is no home folder, nor XDG_CACHE_HOME")
    for name in ("", *below):
        folder /= name
        own_folder(folder, make)
        if folder.stat().st_mode & 0o077:  # as earlier versions made it
            folder.chmod(0o700)
    return folder


def own_folder(folder: Path, make: bool = True) -> None:
    """Raises OSError if it is a link, or not a folder of this user in which, and around which, nobody else can write.

    make: whether it is made if it is missing, with those above it, for this user alone.
    """
    if make:
        _make_folder(folder)
    _check_holder(folder.parent)
    for above in folder.parent.resolve().parents:
        _check_open(above)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "a link, or no folder", str(folder))
    if found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "this folder is another user's", str(folder))
    if found.st_mode & 0o022:  # so what is in it may be theirs
        raise PermissionError(errno.EPERM, "other users may write to this folder", str(folder))


def read_own(file: Path) -> bytes:
    """Raises OSError; also for a link, what is no regular file, another user's file, and a cache folder not private."""
    if file.is_relative_to(cache_folder()):
        private_folder(*file.parent.relative_to(cache_folder()).parts, make=False)
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe would wait for a writer
    with open(file, "rb", opener=lambda path, mode: os.open(path, mode | flags)) as opened:
        found = os.fstat(opened.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "not a regular file of this user", str(file))
        return opened.read()


def write_whole(file: Path, content: bytes) -> None:
    """In one step, as another process may be reading it; makes its folder. Raises OSError, and then leaves nothing.

    A link of that name is replaced, not followed. Within the cache, the folder must be private.
    """
    # Not by the process's number: containers that share a folder have the same.
    new = file.with_name(f"{file.name}.{uuid4().hex}")
    if file.is_relative_to(cache_folder()):
        private_folder(*file.parent.relative_to(cache_folder()).parts)
    else:
        _make_folder(file.parent)
    try:
        new.write_bytes(content)
        new.replace(file)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            new.unlink()
        raise


def compiled_folder() -> Path | None:
    """A private folder for what MLX compiles for this machine's NVIDIA GPUs; None where there are none, or no cache.

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
        return private_folder("cuda", f"mlx-{version('mlx')}-{digest}")
    except (OSError, PackageNotFoundError):
        return None


def _make_folder(folder: Path) -> None:
    """With the missing ones above it, for this user alone. Raises OSError, also below a folder of another user."""
    if not folder.exists():
        _make_folder(folder.parent)
        _check_holder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(0o700)


def _check_holder(folder: Path) -> None:
    """Raises OSError if another user could exchange what is in a folder; root may, and the group is trusted."""
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(folder))
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, "this folder is another user's", str(folder))
    _check_open(folder)


def _check_open(folder: Path) -> None:
    """Raises OSError if every user may exchange what is in a folder."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise PermissionError(errno.EPERM, "every user may write to this folder", str(folder))
