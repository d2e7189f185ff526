"""Bounds of a command buffer: what is set on which Mac, and what doctor says of it. None of this ran on a Mac."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_mlx import checkup, environment
from glm_mlx.environment import Setting, chip, command_buffers, set_command_buffers

MB, OPS = environment.NAMES


@pytest.mark.parametrize(
    ("platform", "chip", "given", "set_to"),
    [
        ("darwin", "Apple M1", {}, {MB: "400", OPS: "200"}),
        ("darwin", "Apple M4 Max", {}, {MB: "400", OPS: "200"}),
        ("darwin", "Apple M1 (Virtual)", {}, {MB: "400", OPS: "200"}),
        ("darwin", "Apple M5", {}, {MB: "400"}),
        ("darwin", "Apple M10 Pro", {}, {MB: "400"}),
        ("darwin", "", {}, {MB: "400"}),
        ("darwin", "Apple M3 Max", {MB: "50", OPS: ""}, {}),
        ("darwin", "Apple M3 Max", {OPS: "60"}, {MB: "400"}),
        ("linux", "Apple M3 Max", {}, {}),
    ],
)
def test_a_mac_gets_larger_command_buffers_where_the_user_set_none(
    platform: str, chip: str, given: dict[str, str], set_to: dict[str, str]
) -> None:
    assert command_buffers(platform, chip, given) == set_to


@pytest.mark.parametrize(("is_early", "says"), [(True, "(set by glm-mlx)"), (False, "may not have seen it")])
def test_doctor_tells_what_holds_from_what_may_not(is_early: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads them when it opens the device: who imports it first may have lost them. A value of the user's holds."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment, "chip", lambda: "Apple M2")
    if is_early:
        monkeypatch.delitem(sys.modules, "mlx.core")
    environ = {OPS: "77"}
    settings = set_command_buffers(environ)
    assert environ == {MB: "400", OPS: "77"}
    assert settings == (Setting(MB, "400", True, is_early), Setting(OPS, "77", False, is_early))
    assert says in str(settings[0])
    assert str(settings[1]) == f"{OPS}=77 (given)"


def test_importing_the_package_sets_them_before_mlx_is_there() -> None:
    code = """
import os, sys
sys.platform = "darwin"
import glm_mlx
assert "mlx.core" not in sys.modules
print(os.environ["MLX_MAX_MB_PER_BUFFER"], *glm_mlx.COMMAND_BUFFERS)
"""
    clean = {key: given for key, given in os.environ.items() if key not in environment.NAMES}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("400 MLX_MAX_MB_PER_BUFFER=400 (set by glm-mlx)")


def test_doctor_prints_what_holds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkup, "COMMAND_BUFFERS", (Setting(MB, "400", True, True), Setting(OPS, "77", False, True)))
    checkup.print_environment(checkup.Console())
    assert f"MLX's command buffers: {MB}=400 (set by glm-mlx), {OPS}=77 (given)" in capsys.readouterr().out


def test_the_chip_is_asked_without_a_process_and_need_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for macOS's library answers as `sysctlbyname` does."""

    class Library:
        def __init__(self, answer: bytes | None):
            self.answer = answer

        def sysctlbyname(self, key: bytes, name: Any, size: Any, *new: object) -> int:
            assert (key, new) == (b"machdep.cpu.brand_string", (None, 0))
            name.value = self.answer or b""
            return 0 if self.answer else -1

    def library(answer: bytes | None) -> Callable[[None], Library]:
        return lambda path: Library(answer)

    assert sys.platform == "darwin" or chip() == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(environment.ctypes, "CDLL", library(b"Apple M4 Pro"))
    assert chip() == "Apple M4 Pro"
    monkeypatch.setattr(environment.ctypes, "CDLL", library(None))
    assert chip() == ""
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda path: object())
    assert chip() == ""
