"""Words of files, the hub, libraries and arguments reach the terminal as text, never as a command to it."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from glm_mlx import command, generate, make_tiny
from glm_mlx.command import Parser
from glm_mlx.console import Console
from glm_mlx.errors import InputError
from glm_mlx.make_tiny import TinySpec
from glm_mlx.tiny_vocab import tiny_vocabulary
from kernels import shapes
from kernels.shown import CONTROL, shown, without_control
from parity_tests.conftest import MakeModel

TITLE = "\x1b]0;title\x07"
HOSTILE = f"a{TITLE}b\x9b2Jc\x08\x7f\r"


def test_a_name_is_one_line_that_only_its_length_can_cut() -> None:
    assert shown(f"{HOSTILE}\n\u202e ü 😀") == r"a\x1b]0;title\x07b\x9b2Jc\x08\x7f\r\n\u202e ü 😀"
    assert shown("a" * 10, 4) == "aaaa..."


def test_lines_keep_all_but_control_characters() -> None:
    text = "a\tb\n\U0001f469\u200d\U0001f52c ü\u2028"  # a joined emoji too
    assert without_control(text) == text
    for number in (*range(32), *range(127, 160)):
        if chr(number) not in "\t\n":
            assert without_control(chr(number)) == f"\\x{number:02x}".replace("\\x0d", "\\r")


@pytest.mark.parametrize("error", [InputError, OSError, ImportError, MemoryError])
def test_an_error_is_one_line_without_control_characters(
    error: type[Exception], capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error(f"{HOSTILE}\nnote: all is well; do")

    assert command.run(work) == 2
    err = capfd.readouterr().err
    assert not CONTROL.search(err)
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert "b\\x9b2Jc" in err


def test_a_bad_argument_is_told_without_control_characters(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args([HOSTILE])
    assert not CONTROL.search(capfd.readouterr().err)


def _printed(console: Console) -> None:
    console.print(HOSTILE, markup=False)


def _soft_wrapped(console: Console) -> None:
    console.print(HOSTILE, style="dim", soft_wrap=True)


def _in_a_table(console: Console) -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)


def _in_a_status(console: Console) -> None:
    with console.status(HOSTILE):
        pass


def _in_a_progress_bar(console: Console) -> None:
    with Progress(console=console) as bar:
        bar.add_task(HOSTILE, total=1)


@pytest.mark.parametrize("use", [_printed, _soft_wrapped, _in_a_table, _in_a_status, _in_a_progress_bar])
def test_a_console_lets_no_control_characters_through(use: Callable[[Console], None]) -> None:
    """Beside its own: colours, and what a progress bar moves the cursor with."""
    out = io.StringIO()
    use(Console(file=out, force_terminal=True, width=200, highlight=False))
    said = out.getvalue()
    assert "title" in said
    assert TITLE[:2] not in said
    assert "\x9b" not in said
    assert "\\x1b]0;title" in said


def test_a_bar_still_moves_the_cursor() -> None:
    out = io.StringIO()
    with Progress(console=Console(file=out, force_terminal=True)) as bar:
        bar.add_task("a", total=1)
        bar.refresh()
        bar.refresh()
    assert "\x1b[2K" in out.getvalue(), "a line is written over"
    assert "\\x1b" not in out.getvalue()


def test_a_template_that_raises_an_escape_sequence_is_one_harmless_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    template = {"tokenizer.chat_template": "{{ raise_exception('\x1b]0;title\x07\n\x9b2J') }}"}
    monkeypatch.setattr(make_tiny, "tiny_vocabulary", lambda: tiny_vocabulary() | template)
    path = make_tiny.make_tiny(tmp_path / "model.gguf")
    assert generate.main(["-m", str(path), "Hello"]) == 2
    err = capfd.readouterr().err
    assert not CONTROL.search(err)
    assert err.startswith("error: the chat template failed")
    assert len(err.splitlines()) == 1


def test_the_name_of_a_file_is_shown_without_its_control_characters(
    model_file: MakeModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{TITLE}\n\x9b2J.gguf"
    shutil.copy(model_file(TinySpec()), path)
    assert generate.main(["-m", str(path), "Hello", "--no-think", "-n", "1", "-v", "--context", "99"]) == 0
    err = capfd.readouterr().err
    assert not CONTROL.search(err)
    assert r"\x1b]0;title\x07\n\x9b2J.gguf" in err


@pytest.mark.parametrize("depth", range(4))
def test_keys_of_a_table_of_shapes_are_shown(depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of a device, an op, its matrices and a parameter."""
    keys = ["Chip", "qmv", "Q4_0 1x2", "ROWS"]
    keys[depth] = f"{HOSTILE}\n" + "x" * 1000
    table: object = 0
    for key in reversed(keys):
        table = {key: table}
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="not a whole number") as error:
        shapes.read(file)
    assert not CONTROL.search(str(error.value))
    assert len(str(error.value)) < 500
    shapes._note(f"{file}, {keys[depth]}: not used")
    err = capsys.readouterr().err
    assert not CONTROL.search(err)
    assert len(err.splitlines()) == 1
