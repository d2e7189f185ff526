"""Models by name: `owner/repo[:QUANT]` on the Hugging Face hub, through its own library and cache."""

import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from glm_mlx.errors import InputError
from kernels.shown import shown

# The hub's rule: each part begins and ends with a letter, a digit or _, without -- or .. in it. All else is a path.
PART = r"\w+(?:[.-]\w+)*"
NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?<!\.git)(?::(?P<quant>[\w.-]+))?", re.ASCII)
DEFAULT_QUANT = "Q4_0"
# Files that stand beside a model and are none: a vision tower, what a quantisation was weighed by, an MTP layer alone.
COMPANION = re.compile(r"mmproj|(^|/)imatrix|imatrix\.gguf$|(^|/)mtp-", re.IGNORECASE)


def resolve(model: str) -> Path:
    """The file that `--model` means: a path if there is one, else a download (or the cached copy of one).

    The hub, which is sent the user's token with the name, is not asked for a file in a folder that is here. Raises
    InputError.
    """
    if not model:
        raise InputError("the name of the model is empty; give the path of a .gguf file")
    path = Path(os.path.expanduser(model))  # these two never raise, whatever the name
    if os.path.exists(path) or model.lower().endswith(".gguf") or not (name := NAME.fullmatch(model)):
        return path
    owner = name["repo"].partition("/")[0]
    if os.path.isdir(owner):
        raise InputError(
            f"no such file: {model}; check the path, or for that name on the hub start where there is no folder {owner}"
        )
    return _download(name["repo"], name["quant"] or DEFAULT_QUANT)


def choose_files(files: Sequence[str], quant: str) -> list[str]:
    """The .gguf file of a quantisation, or all parts of it in order; empty if there is none.

    The name must hold the quant as a whole word, so that Q4_K does not take Q4_K_M; the shortest such name wins.
    """
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    stems: dict[str, list[str]] = {}
    for file in _models(files):
        if word.search(file):
            stems.setdefault(re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", file), []).append(file)
    return sorted(stems[min(stems, key=lambda s: (len(s), s))]) if stems else []


def _models(files: Sequence[str]) -> list[str]:
    return [file for file in files if file.lower().endswith(".gguf") and not COMPANION.search(file)]


def _download(repo: str, quant: str) -> Path:
    import huggingface_hub  # slow to import, and most runs have a path
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        _note(f"there is no such file here, so the hub is asked for {repo}:{quant}")
    try:
        # model_info asks once; list_repo_files would retry for half a minute on a machine without a network.
        siblings = huggingface_hub.HfApi().model_info(repo).siblings or []
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"there is no such path, and the hub has no public repository {repo}; check the name"
        ) from None
    except Exception as error:  # the library lets through whatever its HTTP client raises
        if cached := _cached(repo, quant):
            file, revision, date = cached
            why = "it is set to be offline" if isinstance(error, OfflineModeIsEnabled) else _reason(error)
            _note(f"the hub was not reached ({why}); this is the copy of {repo} of {date}, revision {revision}")
            return file
        raise _unreachable(repo, quant, error) from None
    files = [sibling.rfilename for sibling in siblings]
    parts = choose_files(files, quant)
    if not parts:
        have = ", ".join(shown(file, 80) for file in sorted(_models(files))[:8]) or "no .gguf file at all"
        raise InputError(f"{repo} has no {quant} file; it has {have}: name one as {repo}:QUANT")
    try:
        paths = [huggingface_hub.hf_hub_download(repo, part) for part in parts]
    except Exception as error:  # the network, or the disk
        raise _unreachable(repo, quant, error) from None
    return Path(paths[0])


def _unreachable(repo: str, quant: str, error: Exception) -> InputError:
    return InputError(
        f"cannot fetch {repo}:{quant} from the hub ({_reason(error)}); go online once, or give the path of a .gguf file"
    )


def _reason(error: Exception) -> str:
    """In one line, of what may quote the hub's answer."""
    return f"{type(error).__name__}: {shown(' '.join(str(error).split()), 200)}"


def _cached(repo: str, quant: str) -> tuple[Path, str, str] | None:
    """A file of the hub's own cache, with its revision and the day it was fetched on; None if there is none."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        parts = choose_files([os.path.relpath(p, folder) for p in folder.rglob("*.gguf")], quant)
        if not parts:
            return None
        file = folder / parts[0]
        return file, shown(folder.name[:12]), f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d}"
    except Exception:  # nothing of it is on this machine
        return None


def _note(line: str) -> None:
    print(f"note: {line}", file=sys.stderr)
