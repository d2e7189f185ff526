"""Models by name: when the hub is asked, what is taken from its answer, and what is said of it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from glm_mlx.errors import InputError
from glm_mlx.hub import choose_files, resolve
from kernels.shown import CONTROL


class Hub:
    """Stands for the hub: notes what it is asked for, and answers with `files` or raises `error`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.files: list[str] = []
        self.error: Exception | None = None

    def model_info(self, repo: str) -> Any:
        self.asked.append(repo)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: f"/hub/{repo}/{name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_name_below_a_folder_that_is_here_is_not_sent(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match=r"^no such file: models/typo:Q8_0; check the path, or .* no folder models$"):
        resolve("models/typo:Q8_0")
    assert hub.asked == []


@pytest.mark.parametrize(
    "name",
    [
        "./typo",
        "../typo",
        "~/typo",
        "/typo",
        ".cache/typo",
        "a/.typo",
        "-a/b",
        "modèles/typo",
        "a/b/c",
        "a//b",
        "a/b.GGUF",
    ],
)
def test_what_looks_like_a_path_is_not_sent(name: str, hub: Hub) -> None:
    assert resolve(name) == Path(os.path.expanduser(name))
    assert hub.asked == []


def test_the_hub_is_asked_once_and_standard_error_says_so(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = ["M-Q8_0.gguf"]
    assert resolve("owner/repo:Q8_0") == Path("/hub/owner/repo/M-Q8_0.gguf")
    assert hub.asked == ["owner/repo"]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "note: there is no such file here, so the hub is asked for owner/repo:Q8_0\n")


COMPANIONS = ["mmproj-Q8_0.gguf", "MMPROJ-Q8_0.gguf", "imatrix-Q8_0.gguf", "q8_0.imatrix.gguf", "mtp-Q8_0.gguf"]


@pytest.mark.parametrize("folder", ["", "x/"])
@pytest.mark.parametrize("companion", COMPANIONS)
def test_a_file_beside_a_model_is_not_taken_for_it(companion: str, folder: str, hub: Hub) -> None:
    """Though its name is shorter. Alone it is no model, nor one to choose."""
    name = "GLM-4.7-Flash-i1-MTP-Q8_0.gguf"
    assert choose_files([f"{folder}{companion}", name], "Q8_0") == [name]
    hub.files = [f"{folder}{companion}"]
    with pytest.raises(InputError, match=r"has no Q8_0 file; it has no .gguf file at all"):
        resolve("owner/repo:Q8_0")


@pytest.mark.parametrize("error", [OSError("the network is unreachable"), RuntimeError("503")], ids=str)
def test_a_copy_from_an_earlier_day_says_which_it_is(
    error: Exception, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "0123456789abcdef"
    snapshot.mkdir()
    file = snapshot / "M-Q4_0.gguf"
    file.touch()
    os.utime(file, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, local_files_only: str(snapshot))
    hub.error = error
    assert resolve("owner/repo") == file
    _, said = capsys.readouterr().err.splitlines()
    assert said == (
        f"note: the hub was not reached ({type(error).__name__}: {error}); "
        "this is the copy of owner/repo of 2023-11-14, revision 0123456789ab"
    )


def test_what_the_hub_says_is_shown_without_control_characters(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files = ["\x1b]0;title\x07.gguf", "x\n\x9b2J.gguf"]
    with pytest.raises(InputError) as names:
        resolve("owner/repo")
    hub.error = RuntimeError("503 \x1b[2J\x9b" + "gone " * 1000)
    with pytest.raises(InputError) as error:
        resolve("owner/repo")
    for said in (str(names.value), str(error.value)):
        assert not CONTROL.search(said)
        assert "\n" not in said
        assert len(said) < 400
    (tmp_path / "\x1b]0;title\x07").mkdir()
    (tmp_path / "\x1b]0;title\x07" / "M-Q4_0.gguf").touch()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, local_files_only: str(tmp_path / "\x1b]0;title\x07")
    )
    resolve("owner/repo")
    assert not CONTROL.search(capsys.readouterr().err)
