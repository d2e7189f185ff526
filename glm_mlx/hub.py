"""Models by name: `owner/repo[:QUANT]` on the Hugging Face hub, through its own library and cache."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from glm_mlx.errors import InputError

NAME = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<quant>[\w.-]+))?$")
DEFAULT_QUANT = "Q4_0"


def resolve(model: str) -> Path:
    """The file that `--model` means: a path if there is one, else a download (or the cached copy of one)."""
    if not model:
        raise InputError("the name of the model is empty; give the path of a .gguf file")
    path = Path(os.path.expanduser(model))  # these two never raise, whatever the name
    if os.path.exists(path) or model.endswith(".gguf") or model.count("/") != 1 or not (name := NAME.match(model)):
        return path
    return _download(name["repo"], name["quant"] or DEFAULT_QUANT)


def choose_files(files: Sequence[str], quant: str) -> list[str]:
    """The .gguf file of a quantisation, or all parts of it in order; empty if there is none.

    The name must hold the quant as a whole word, so that Q4_K does not take Q4_K_M; the shortest such name wins.
    """
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [f for f in files if f.lower().endswith(".gguf") and word.search(f) and "mmproj" not in f]
    stems: dict[str, list[str]] = {}
    for file in found:
        stems.setdefault(re.sub(r"-\d{5}-of-\d{5}\.gguf$", "", file), []).append(file)
    return sorted(stems[min(stems, key=lambda s: (len(s), s))]) if stems else []


def _download(repo: str, quant: str) -> Path:
    import huggingface_hub  # slow to import, and most runs have a path
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        # model_info asks once; list_repo_files would retry for half a minute on a machine without a network.
        siblings = huggingface_hub.HfApi().model_info(repo).siblings or []
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"there is no such path, and the hub has no public repository {repo}; check the name"
        ) from None
    except Exception as error:  # the library lets through whatever its HTTP client raises
        if cached := _cached(repo, quant):
            return cached
        raise _unreachable(repo, quant, error) from None
    files = [sibling.rfilename for sibling in siblings]
    parts = choose_files(files, quant)
    if not parts:
        have = ", ".join(sorted(f for f in files if f.endswith(".gguf"))[:8]) or "no .gguf file at all"
        raise InputError(f"{repo} has no {quant} file; it has {have}: name one as {repo}:QUANT")
    try:
        paths = [huggingface_hub.hf_hub_download(repo, part) for part in parts]
    except Exception as error:  # the network, or the disk
        raise _unreachable(repo, quant, error) from None
    return Path(paths[0])


def _unreachable(repo: str, quant: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"cannot fetch {repo}:{quant} from the hub ({type(error).__name__}: {reason}); "
        "go online once, or give the path of a .gguf file"
    )


def _cached(repo: str, quant: str) -> Path | None:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception:  # nothing of it is on this machine
        return None
    parts = choose_files([os.path.relpath(p, folder) for p in folder.rglob("*.gguf")], quant)
    return folder / parts[0] if parts else None
