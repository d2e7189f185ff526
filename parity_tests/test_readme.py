"""README's Python example runs as it stands there, with the small model in place of the file that it names."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_mlx.engine import Engine, Step
from glm_mlx.load import load_model
from glm_mlx.small import SMALL_MODEL

README = Path(__file__).parents[1] / "README.md"


def run_example() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert code.count('"model.gguf"') == 1
    exec(code.replace('"model.gguf"', repr(str(SMALL_MODEL))), {})


def test_the_example_prints_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    run_example()
    out = capsys.readouterr().out
    assert len(out.strip()) > 5
    assert "<" not in out


def test_the_example_prints_whole_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is several tokens."""
    text = "für 😀 日本"
    ids = load_model(SMALL_MODEL).tokenizer.encode(text)

    def says_it(*_: object, **options: object) -> Iterator[Step]:
        yield from (Step(token, 0.1, number) for number, token in enumerate(ids))

    monkeypatch.setattr(Engine, "generate", says_it)
    run_example()
    assert capsys.readouterr().out == f"{text}\n"
