"""Doctor, and its quick part at the start of `generate`: what they find, what they remember, what they print.

Kernels run on this machine's GPU, or else in the executor, as if it had Metal.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import psutil
import pytest
from rich.filesize import decimal

from glm_mlx import checkup, doctor, generate, self_test
from glm_mlx.cache import STEP, KvBits
from glm_mlx.compositions import COMPOSITIONS, NARROW, read_small
from glm_mlx.isolation import COMPILED, Isolated, LostError, Rows, Variant
from glm_mlx.load import load_model, open_model
from glm_mlx.make_tiny import TinySpec
from glm_mlx.model import Model
from glm_mlx.model_cases import CHUNK, CONTEXTS, chunk_cases, decode_cases, launches
from kernels import embed, experts_down, experts_gate_up, launcher, mla_decode, qmv, wide
from kernels.cases import Case
from kernels.check import Result, check, difference
from kernels.planes import QUANT_TYPES
from parity_tests import variants
from parity_tests.conftest import MakeModel
from parity_tests.kernel_cases import on_gpu
from parity_tests.msl import compiler, executing
from parity_tests.test_engine import damaged

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "glm_mlx.doctor"]
SPEC = TinySpec(layers=2)
LONG = {"mla_decode": ("mla_matrix",)}  # what launches it in long contexts
PARTS = {"mla_decode": ["mla_decode", "mla_merge"]}  # ops of several launches
# Text of each op that every result goes through (where it is rounded to the type of the output), and that in error.
STORED = (r"= ([A-Z])\(", r"= \1(1.05f) * \1(")
FAULTS = {
    **dict.fromkeys(("embed", "qmv", "experts_gate_up", "experts_down"), STORED),
    "mla_decode": (r"\* float\(SCALE\)", "* float(SCALE) * 1.01f"),
}

NO_GPU = pytest.mark.skipif(on_gpu(), reason="this machine has a GPU")
Edit = Callable[[str, Callable[[str], str]], None]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has its own cache folder, and leaves no op avoided."""
    compiler.cache_folder()  # of the executor: it stays where it is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launcher, "_avoided", set())
    monkeypatch.setattr(self_test, "PATIENCE", 600.0)  # clang takes longer than Apple's compiler


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Edit]:
    """Changes the text of an op's kernel, in a copy of the folder."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    for path in launcher.HERE.glob("*.*"):
        (folder / path.name).write_text(path.read_text())
    forget()
    monkeypatch.setattr(launcher, "HERE", folder)

    def change(op: str, by: Callable[[str], str]) -> None:
        paths = [p for p in (folder / f"{op}.metal", folder / f"{op}.h.metal") if p.exists()]
        before = [p.read_text() for p in paths]
        for path, text in zip(paths, before, strict=True):
            path.write_text(by(text))
        assert before != [p.read_text() for p in paths], f"the change finds nothing in {op}"
        forget()

    yield change
    forget()


@contextmanager
def with_kernels() -> Iterator[list[str]]:
    """Within the block kernels run; yields the launches' names."""
    seen: list[str] = []
    launch = launcher.Launch.__call__

    def noted(self: launcher.Launch, *arrays: mx.array) -> list[mx.array]:
        if launcher._recorded is None:
            seen.append(self.op)
        return launch(self, *arrays)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launcher.Launch, "__call__", noted))
        if on_gpu():
            stack.callback(mx.set_default_device, mx.default_device())
            mx.set_default_device(mx.gpu)
        else:
            stack.enter_context(executing())
        yield seen


def forget() -> None:
    """The next launch reads the text again."""
    launcher._text.cache_clear()
    for module in (embed, qmv, experts_gate_up, experts_down):
        module._launch.cache_clear()
    mla_decode._launches.cache_clear()


def plant(edit: Edit, op: str) -> None:
    for part in (op, *LONG.get(op, ())):
        edit(part, lambda text: re.sub(*FAULTS[op], text))


def spoil(edit: Edit, op: str) -> None:
    edit(op, lambda text: text + "\nconst int spoilt = not_declared_anywhere;\n")


def cases_of(file: str | Path, dtype: mx.Dtype = mx.bfloat16, tokens: int = 1, kv_bits: KvBits = 16) -> list[Case]:
    cfg, weights = read_small(file)
    model = Model(cfg, weights, dtype, kv_bits)
    return [case for case in (decode_cases(model) if tokens == 1 else chunk_cases(model)) if case.has_kernel]


# --- one check


@pytest.mark.parametrize(
    ("composition", "dtype", "tokens"),
    [
        ("Unsloth Q4_0", mx.bfloat16, 1),
        ("Q4_0, imatrix", mx.bfloat16, CHUNK),
        ("Q4_K_M", mx.float16, 1),
        ("Unsloth Q4_K_M", mx.float16, CHUNK),
        ("DeepSeek-V2-Lite Q4_0", mx.float32, 1),
    ],
    ids=str,
)
def test_every_kernel_of_a_published_composition_agrees(
    composition: str, dtype: mx.Dtype, tokens: int, model_file: MakeModel
) -> None:
    changes = next(c.changes for c in COMPOSITIONS if c.name == composition)
    cases = cases_of(model_file(replace(NARROW, **changes)), dtype, tokens)
    with with_kernels() as launches:
        for case in cases:
            before = len(launches)
            assert check(case, timed=False) == Result(compiles=True, agrees=True), case.variant
            launched = ["mla_decode" if op == "mla_matrix" else op for op in launches[before:]]
            assert launched == PARTS.get(case.op, [case.op])
    assert {case.op for case in cases} >= set(launcher.OPS) - ({"mla_decode"} if tokens > 1 else set())
    assert {case.dtype for case in cases} == {str(dtype).removeprefix("mlx.core.")}


def test_compositions_cover_every_type_that_stays_packed() -> None:
    types = {c.changes["type"] for c in COMPOSITIONS}
    for c in COMPOSITIONS:
        types |= set(c.changes.get("overrides", {}).values())
    assert types == {*QUANT_TYPES, "F32", "F16", "BF16"}
    assert any(c.dtypes == (mx.bfloat16, mx.float16, mx.float32) for c in COMPOSITIONS)


@pytest.mark.parametrize("op", launcher.OPS)
def test_a_kernel_that_is_a_little_off_disagrees(op: str, edit: Edit, model_file: MakeModel) -> None:
    cases = [case for case in cases_of(model_file(SPEC)) if case.op == op]
    plant(edit, op)
    with with_kernels():
        for case in cases:
            result = check(case, timed=False)
            assert (result.compiles, result.agrees) == (True, False), case.variant
            assert "differ from the twin's" in str(result.error)
    assert cases


IN_8_BITS = {  # text of the rows, and that in error
    "a scale": (r"largest \* \(1\.0f / 127\.0f\)", "largest * (1.0f / 126.0f)"),
    "a zero": (r"field<8, 0, 128>", "field<8, 0, 127>"),
    "an order": (r"const uint part = min\(lane,", "const uint part = min(lane ^ 1,"),
    "k_pe": (r"k_pe\[pair\] = words\[i\]", "k_pe[pair] = words[i] + 3"),
}


@pytest.mark.parametrize("fault", IN_8_BITS)
def test_a_fault_in_rows_of_8_bits_disagrees_and_good_ones_agree(fault: str, edit: Edit, model_file: MakeModel) -> None:
    count = sum(rows <= SPEC.context_length for rows in CONTEXTS)
    for dtype in (mx.bfloat16, mx.float32):
        cases = [case for case in cases_of(model_file(SPEC), dtype, kv_bits=8) if case.op == "mla_decode"]
        assert all("cache in 8 bits" in case.variant for case in cases)
        with with_kernels():
            assert [check(case, timed=False).agrees for case in cases] == [True] * count
    edit("mla_decode", lambda text: re.sub(*IN_8_BITS[fault], text))
    with with_kernels():
        assert [check(case, timed=False).agrees for case in cases] == [False] * count


@pytest.mark.parametrize("op", launcher.OPS)
def test_a_text_that_does_not_compile_is_told_from_one_that_is_wrong(
    op: str, edit: Edit, model_file: MakeModel
) -> None:
    case = next(case for case in cases_of(model_file(SPEC)) if case.op == op)
    spoil(edit, op)
    with with_kernels():
        result = check(case, timed=False)
    assert (result.compiles, result.agrees) == (False, None)
    assert "not_declared_anywhere" in str(result.summary)
    assert "\n" not in str(result.summary)


def test_a_kernel_that_does_not_take_the_call_is_no_success(model_file: MakeModel) -> None:
    case = next(case for case in cases_of(model_file(SPEC)) if case.op == "embed")
    few = {**case.arguments, "w": mx.zeros((16, 20))}
    with with_kernels() as launches:
        assert not replace(case, arguments=few).has_kernel
        assert check(replace(case, arguments=few), timed=False).compiles is False
    assert not launches


def test_a_difference_is_found_in_any_one_value() -> None:
    want = mx.array([1.0, -2.0, float("nan"), float("inf"), 0.0])
    assert difference([want], [want]) is None
    for at, value in ((0, 1.001), (1, 2.0), (2, 0.0), (3, float("-inf")), (3, float("nan")), (4, float("nan"))):
        got = want + 0
        got[at] = value
        assert "1 of 5 values of the first output" in str(difference([got], [want]))
    ids = mx.array([3, 4], mx.uint32)
    assert difference([want, ids], [want, ids]) is None
    assert "second output" in str(difference([want, ids], [want, ids + 1]))
    assert difference([want], [want, ids]) is not None
    assert difference([want], [want[:4]]) is not None
    rounded = mx.random.normal((1000,), key=mx.random.key(0))
    assert difference([rounded.astype(mx.bfloat16)], [rounded]) is None


def test_a_value_of_8_bits_that_is_rounded_to_its_neighbour_is_no_difference() -> None:
    """A quant, and a float16 whose upper byte changes with it."""
    rows = mx.array([[0, 128, 255, 255, 16]], mx.uint8)
    for near in ([1, 127, 255, 255, 16], [0, 128, 255, 0, 17], [0, 128, 255, 254, 16]):
        assert difference([mx.array([near], mx.uint8)], [rows]) is None
    for far in ([2, 128, 255, 255, 16], [0, 128, 255, 253, 16], [0, 128, 255, 255, 18]):
        assert "1 of 5 values" in str(difference([mx.array([far], mx.uint8)], [rows]))


@pytest.mark.parametrize("by_step", [False, True], ids=["chunk", "by the kernels of decode"])
@pytest.mark.parametrize("name", ["GLM Unsloth Q4_0", "DeepSeek-V2-Lite", "no shared expert, two dense layers"])
def test_what_is_checked_for_a_model_is_what_it_launches(
    name: str, by_step: bool, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not something like it: the same prepared launches, of the same weights."""
    monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype: by_step)
    with with_kernels() as launched_now:
        model = load_model(model_file(variants.VARIANTS[name])).model
        with launcher.recording() as checked:
            for case in [*decode_cases(model), *chunk_cases(model)]:
                case.run()
        with launcher.recording() as launched:
            rows = [mx.zeros((1, STEP, model.cfg.cache_dim), model.dtype)] * model.cfg.num_layers
            model.step(mx.array([[1]]), mx.array([5]), rows)
            if by_step:
                model.step(mx.ones((1, launcher.MAX_TOKENS), mx.int32), mx.array([5]), rows)
            else:
                model.logits(model.hidden_states(mx.ones((1, CHUNK), mx.int32), model.new_cache()))
        assert not launched_now, "to record is not to launch"
        for launch, _ in launched:
            assert any(other is launch for other, _ in checked), launch.op
        first = {id(launch): arrays for launch, arrays in reversed(launched)}
        for launch, arrays in checked:
            if id(launch) in first:
                planes, own = (a[len(launch.inputs) :] for a in (arrays, first[id(launch)]))
                assert all(a is b for a, b in zip(planes, own, strict=True))


@pytest.mark.parametrize("by_step", [False, True])
def test_what_is_compiled_ahead_is_of_all_numbers_of_tokens_that_run(
    by_step: bool, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype: by_step)
    model = Model(*read_small(model_file(SPEC)), mx.bfloat16)
    tokens = {dict(launch.template)["QUERIES"] for launch, _ in launches(model) if launch.op == "mla_merge"}
    assert tokens == ({1, launcher.MAX_TOKENS} if by_step else {1})


def test_a_check_of_several_tokens_sees_rows_that_are_there(
    model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In zeros a row that is read wrongly looks like any other."""
    monkeypatch.setattr(wide, "are_few", lambda tokens, rows, dtype: True)
    cfg, weights = read_small(model_file(replace(NARROW, context_length=STEP)))
    for kv_bits in (16, 8):
        cases = chunk_cases(Model(cfg, weights, mx.bfloat16, kv_bits))  # type: ignore[arg-type]
        caches = [case.arguments["cache"] for case in cases if case.op == "mla_decode"]
        assert caches
        assert all(int((rows != 0).sum()) > rows.size // 2 for rows in caches)


# --- the quick part, at the start of generate


@pytest.fixture(scope="module")
def file(model_file: MakeModel) -> str:
    return str(model_file(SPEC))


class Start:
    """What `generate` does about kernels once a model is loaded, on a machine with Metal."""

    def __init__(self, file: str):
        self.model = load_model(file, mx.bfloat16).model

    def __call__(self) -> tuple[list[str], int]:
        """The lines for the user, and the number of launches."""
        launcher._avoided.clear()
        with with_kernels() as launches:
            lines = self_test.leave_broken_kernels(self.model)
        return lines, len(launches)


@pytest.fixture(scope="module")
def start(file: str) -> Start:
    return Start(file)


def answer(file: str, capfd: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """What `generate` prints with kernels: tokens with their log-probabilities to the last bit, and the lines."""
    launcher._avoided.clear()
    with with_kernels():
        prompt = "What would you say to this?"
        code = generate.main(["-m", file, prompt, "--no-think", "-n", "2", "--temp", "0", "--json", "--logprobs", "3"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out)["logprobs"], [line for line in err.splitlines() if "kernel" in line]


def memory() -> dict[str, str | None]:
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx").glob("kernels-*.json")
    outcomes: dict[str, str | None] = json.loads(file.read_text())["outcomes"]
    return outcomes


def fail(*_: Any, **__: Any) -> Any:
    raise AssertionError("called")


def test_working_kernels_are_checked_once(start: Start) -> None:
    lines, launches = start()
    checked = memory()
    assert lines == []
    assert 0 < len(checked) <= launches
    assert {name.partition(":")[0] for name in checked} == set(launcher.OPS)
    assert set(checked.values()) == {None}
    assert start() == ([], 0)
    forget()  # another process prepares its own launches
    assert start() == ([], 0)
    assert not launcher._avoided


@pytest.mark.parametrize("op", launcher.OPS)
def test_generate_leaves_a_wrong_kernel_out_with_one_line_and_its_text_is_right(
    op: str, file: str, edit: Edit, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:  # as if the op had no kernel
        patch.setattr(launcher, "back_end", lambda name, real=launcher.back_end: None if name == op else real(name))
        patch.setattr(self_test, "check", lambda *_, **__: Result(True, True))
        right, lines = answer(file, capfd)
        assert len(right) == 2
        assert lines == []
    plant(edit, op)
    got, lines = answer(file, capfd)
    assert got == right
    assert len(lines) == 1
    assert re.search(rf"^note: the kernel {op} does not work here .*twin's.*python -m glm_mlx.doctor$", lines[0])


def test_generate_leaves_out_a_kernel_that_does_not_compile_and_remembers_it(
    file: str, edit: Edit, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(edit, "experts_gate_up")
    got, lines = answer(file, capfd)
    assert len(got) == 2
    assert len(lines) == 1
    assert "the kernel experts_gate_up does not work here" in lines[0]
    assert "not_declared_anywhere" in lines[0]
    monkeypatch.setattr(self_test, "check", fail)
    assert answer(file, capfd) == (got, lines), "without another look at it"


def test_another_kernel_text_is_checked_again(start: Start, edit: Edit) -> None:
    plant(edit, "mla_decode")
    lines, _ = start()
    assert len(lines) == 1
    assert launcher._avoided == {"mla_decode"}
    for part in ("mla_decode", *LONG["mla_decode"]):
        edit(part, lambda text: text.replace(" * 1.01f", ""))
    assert start()[0] == [], "repaired"
    edit("qmv", lambda text: text + "\n// the same in other words\n")
    assert start()[1] > 0
    assert start()[1] == 0


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Checks are noted here and find nothing."""
    cases: list[Case] = []

    def note(case: Case, timed: bool) -> Result:
        cases.append(case)
        return Result(True, True)

    monkeypatch.setattr(self_test, "check", note)
    return cases


@pytest.mark.parametrize("key", ["device", "os", "mlx"])
def test_another_machine_is_checked_again(
    key: str, start: Start, checked: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    once = len(checked)
    elsewhere = {**self_test.machine(), key: "another"}
    monkeypatch.setattr(self_test, "machine", lambda: elsewhere)
    for _ in range(2):
        start()
        assert len(checked) == 2 * once > 0


def test_a_cache_folder_that_cannot_be_written_does_no_harm(
    start: Start, checked: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/none")
    assert start()[0] == []
    once = len(checked)
    assert start()[0] == []
    assert len(checked) == 2 * once > 0, "checked at each start"


def test_a_memory_that_another_user_could_have_written_is_none(start: Start, checked: list[Case]) -> None:
    start()
    once = len(checked)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx"
    (file,) = folder.glob("kernels-*.json")
    file.symlink_to(file.rename(folder / "elsewhere"))
    assert start()[0] == []
    assert len(checked) == 2 * once > 0, "a link"
    folder.chmod(0o777)
    assert start()[0] == []
    assert len(checked) == 3 * once, "a folder of all"


def test_the_mark_of_a_check_overwrites_nobodys_file(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name can be known before: a link may stand there."""
    folder, victim, marks = Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx", tmp_path / "victim", set[Path]()

    def look(case: Case, timed: bool) -> Result:
        marks.update(folder.glob("*.running"))
        return Result(True, True)

    monkeypatch.setattr(self_test, "check", look)
    start()
    for file in folder.glob("kernels-*.json"):
        file.unlink()
    victim.write_text("kept")
    (mark,) = marks
    mark.symlink_to(victim)
    assert start()[0] == []
    assert victim.read_text() == "kept"


@pytest.mark.parametrize("content", ["", "[]", '{"outcomes": [1]}', '{"outcomes": null}', "\x00\xff"])
def test_a_damaged_memory_is_as_good_as_none(content: str, start: Start, checked: list[Case]) -> None:
    start()
    once = len(checked)
    (file,) = (Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx").glob("kernels-*.json")
    file.write_bytes(content.encode("latin-1"))
    for _ in range(2):
        assert start()[0] == []
        assert len(checked) == 2 * once > 0


def test_a_start_that_died_in_a_check_is_not_repeated(
    start: Start, checked: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was at stands in a file of its own; while that process lives, the file says nothing."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx"
    marks: dict[str, str] = {}

    def look(case: Case, timed: bool) -> Result:
        (mark,) = folder.glob("*.running")
        marks.setdefault(case.op, mark.name)
        marks.setdefault(f"{case.op} text", mark.read_text())
        return Result(True, True)

    with monkeypatch.context() as patch:
        patch.setattr(self_test, "check", look)
        start()
    assert list(folder.glob("*.running")) == []
    (file,) = folder.glob("kernels-*.json")
    file.unlink()
    with subprocess.Popen(["sleep", "60"]) as other:
        left = folder / marks["experts_down"].replace(f"-{os.getpid()}.", f"-{other.pid}.")
        left.write_text(marks["experts_down text"])
        assert start()[0] == []
        other.kill()
    file.unlink()
    lines, _ = start()
    assert len(lines) == 1
    assert "the kernel experts_down does not work here (the program ended while this was checked)" in lines[0]
    assert not left.exists()
    before = len(checked)
    assert start()[0] == lines
    assert len(checked) == before, "remembered"


def test_ctrl_c_in_a_check_is_no_failure_of_the_kernel(
    file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Result:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, with_kernels():
        patch.setattr(self_test, "check", interrupted)
        assert generate.main(["-m", file, "Hello"]) == 130
    assert "Traceback" not in capfd.readouterr().err
    with with_kernels():
        assert self_test.remembered_failures() == {}
    assert list((Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx").iterdir()) == []


def test_too_little_memory_for_a_check_is_not_held_against_a_kernel(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(self_test, "check", lambda *_, **__: Result(True, error="[malloc] Unable to allocate 1 bytes."))
        assert start()[0] == []
    assert not launcher._avoided
    with with_kernels():
        assert self_test.remembered_failures() == {}


def test_a_kernel_that_takes_the_gpu_with_it_is_one_line_and_left_out_at_the_next_start(
    file: str, start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: Any) -> mx.array:
        raise RuntimeError("illegal memory access")

    with monkeypatch.context() as patch, with_kernels():
        patch.setattr(self_test, "check", lambda *_, **__: Result(True, error="illegal memory access"))
        patch.setattr(mx, "ones", lost)
        assert generate.main(["-m", file, "Hello"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(r"^error: the kernel embed has stopped the GPU .*illegal.*start again.*glm_mlx.doctor$", err)
    monkeypatch.setattr(self_test, "check", lambda *_, **__: Result(True, True))
    lines, _ = start()
    assert len(lines) == 1
    assert "the kernel embed does not work here" in lines[0]


def test_a_launch_that_no_device_could_run_goes_to_its_twin(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(launcher, "MAX_BUFFERS", 9)
    lines, _ = start()
    forget()
    assert [re.findall(r"kernel (\w+) does.*buffers; 9 at most", line) for line in lines] == [["experts_gate_up"]]


@pytest.mark.usefixtures("checked")
def test_a_slow_start_leaves_chunks_of_tokens_to_the_next(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(self_test, "PATIENCE", 0.0)
        start()
    first = set(memory())
    assert all(", 1 tokens" in name for name in first)
    start()
    assert {name for name in memory() if f", {CHUNK} tokens" in name} == set(memory()) - first != set()


@NO_GPU
def test_without_a_gpu_nothing_is_looked_at(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_Memory", "decode_cases", "check", "machine"):
        monkeypatch.setattr(self_test, name, fail)
    assert generate.main(["-m", file, "Hello", "-n", "1"]) == 0
    assert not Path(os.environ["XDG_CACHE_HOME"]).exists()


# --- several processes


class Worker(Isolated):
    """Checks nothing: says which worker was asked."""

    def __init__(self, name: str, lost: bool = False):
        super().__init__()
        self.name, self.lost, self.asked, self.closed = name, lost, list[int](), False

    def open(self, file: Path, dtype: mx.Dtype) -> list[Variant]:
        if self.lost:
            raise LostError("gone")
        return []

    def check(self, index: int, timed: bool) -> Result:
        assert not timed
        self.asked.append(index)
        if self.name == "interrupted":
            raise KeyboardInterrupt
        return Result(True, True, self.name)

    def close(self) -> None:
        self.closed = True


def test_workers_share_the_checks_and_a_lost_one_spoils_its_own_alone() -> None:
    workers = [Worker("a"), Worker("b", lost=True), Worker("c")]
    found = checkup._check_together(workers, Path("none"), mx.float32, [10, 11, 12, 13, 14])
    assert {index: result.error for index, result in found.items()} == {
        10: "a", 13: "a", 11: "gone", 14: "gone", 12: "c",
    }  # fmt: skip


def test_ctrl_c_stops_every_worker() -> None:
    workers = [Worker("interrupted"), Worker("b")]
    with pytest.raises(KeyboardInterrupt):
        checkup._check_together(workers, Path("none"), mx.float32, range(100))
    assert workers[0].asked == [0]
    assert all(worker.closed for worker in workers)


# --- the command


class Few(Rows):
    """The first variant of each op, in this process."""

    def open(self, file: Path, dtype: mx.Dtype) -> list[Variant]:
        every = dict(zip(super().open(file, dtype), self.cases, strict=True))
        few = {variant.op: variant for variant in reversed(every)}
        self.cases = [every[variant] for variant in few.values()]
        return list(few.values())


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "COMPOSITIONS", COMPOSITIONS[:1])
    for name in ("WIDTHS", "NARROW"):
        monkeypatch.setattr(checkup, name, SPEC)
    for name in ("Isolated", "Rows"):
        monkeypatch.setattr(checkup, name, Few)
    monkeypatch.setattr(checkup, "WORKERS", 1)
    monkeypatch.setattr("kernels.check.TIMED_SECONDS", 0.0)


def table(out: str, columns: int = 7) -> list[list[str]]:
    """The cells of every row, of the table with so many columns."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return [row for row in rows if len(row) == columns]


@pytest.mark.usefixtures("_few")
def test_doctor_prints_and_writes_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    with with_kernels():
        assert doctor.main(["--json", str(file)]) == 0
    out = capsys.readouterr().out
    report = json.loads(file.read_text())
    rows = [
        [
            *(row[key] for key in ("op", "what", "activations")),
            *("yes" if row[key] else "?" for key in ("compiles", "agrees")),
            *(f"{row[key]:.1f}" for key in ("microseconds", "gb_s")),
        ]
        for row in report["variants"]
    ]
    assert table(out) == rows
    assert [(row[0], row[2].split(",")[0]) for row in rows] == [
        (op, dtype) for op in launcher.OPS for dtype in ("bfloat16", "float16", "float32")
    ]
    assert all(row["microseconds"] > 0 and row["gb_s"] > 0 and row["error"] is None for row in report["variants"])
    assert report["report"] in out
    assert "\nkept between starts in " in out
    assert re.search(r"\((Metal|CUDA)\), .*mlx 0\.\d+.*Of 15 variants 15 compile, 15 run and agree", report["report"])
    assert report["machine"]["device"] in out


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize("damage", [plant, spoil])
@pytest.mark.parametrize("compile_only", [False, True])
def test_doctor_names_what_does_not_work(
    damage: Callable[[Edit, str], None],
    compile_only: bool,
    edit: Edit,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """--compile-only requires no more than the compiler."""
    damage(edit, "experts_down")
    file = tmp_path / "doctor.json"
    compiles = damage is plant
    with with_kernels():
        code = doctor.main(["--json", str(file), *["--compile-only"] * compile_only])
    assert code == (0 if compile_only and compiles else 1)
    out, err = capsys.readouterr()
    assert err == ""
    for row in table(out):
        bad = ["yes", "NO"] if compiles else ["NO", "-"]
        assert row[3:5] == (bad if row[0] == "experts_down" else ["yes", "yes"])
    report = json.loads(file.read_text())
    assert re.search(r"experts_down: 2 x Q4_0, bfloat16, 1 token: .*(twin's|not_declared)", report["report"])
    wrong = [row for row in report["variants"] if row["error"]]
    assert {row["op"] for row in wrong} == {"experts_down"}
    for row in wrong:
        assert (row["compiles"], row["agrees"], row["microseconds"]) == (compiles, False if compiles else None, None)


@pytest.mark.usefixtures("_few")
def test_doctor_tells_what_generate_remembers(start: Start, edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    plant(edit, "qmv")
    start()
    with with_kernels():
        doctor.main([])
    assert re.search(r"generate remembers qmv: .*64x64.*: .*differ", capsys.readouterr().out)


def test_doctor_says_where_the_cache_is_or_why_there_is_none() -> None:
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "glm-mlx"
    assert checkup._cache_line() == f"kept between starts in {folder}"
    folder.chmod(0o777)
    assert re.fullmatch(
        rf"nothing is kept between starts, .*: .*other users may write to this folder: '{folder}'",
        checkup._cache_line(),
    )


@NO_GPU
@pytest.mark.usefixtures("_few")
def test_on_a_cpu_doctor_shows_the_twins(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert [row[0] for row in rows] == list(launcher.OPS)
    assert all(row[2:5] == ["float32, 1 token", "-", "-"] and float(row[5]) > 0 for row in rows)
    assert "no GPU here" in out
    assert doctor.main(["--compile-only"]) == 1, "nothing was compiled"


@pytest.mark.usefixtures("_few")
@pytest.mark.parametrize(
    ("room", "context", "says"),
    [
        (30e9, [], None),
        (60e9, ["--context", "202752"], "202,752"),
        (60e9, ["--context", "4096"], "4,096"),
        (5e9, [], "512"),  # it does not fit, which is no failure of a kernel
    ],
)
def test_doctor_says_what_of_the_real_model_fits(
    room: float,
    context: list[str],
    says: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """GLM-4.7-Flash in Q4_0, without its file: 16.95 GB, as llama-quantize makes it, but for the header."""
    monkeypatch.setattr("glm_mlx.memory.machine_memory", lambda: (int(room), "a test"))
    file = tmp_path / "doctor.json"
    assert doctor.main([*context, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = dict(table(out, 2))
    plan = json.loads(file.read_text())["memory"]
    assert "GLM-4.7-Flash in Q4_0" in out
    assert rows["weights"] == "16.9 GB"
    assert plan["weights"] == pytest.approx(16.95e9, rel=0.001)
    assert f"cache of {says or format(plan['largest'], ',')} tokens" in rows
    assert rows["a test"] == f"{room / 1e9:.1f} GB"
    assert rows["largest context that fits"] == ("none" if room < 6e9 else f"{plan['largest']:,} tokens")


@pytest.mark.usefixtures("_few")
def test_doctor_plans_for_a_file(model_file: MakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    path = model_file(SPEC)
    assert doctor.main(["--model", str(path), "--context", "1000"]) == 0
    out = capsys.readouterr().out
    assert "GLM-4.7-Flash" not in out
    assert dict(table(out, 2))["weights"] == decimal(load_model(path).memory.weights)
    assert "cache of 1,000 tokens" in out


@pytest.mark.usefixtures("_few")
def test_doctor_tries_a_file(
    model_file: MakeModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It says and writes if the logits are numbers. Too little memory to see is no damage."""
    good, out = model_file(SPEC), tmp_path / "doctor.json"
    broken = damaged(good, tmp_path, "blk.1.ffn_down_exps.weight", 5)
    for path, code, says in ((good, 0, "are numbers"), (broken, 1, "not numbers")):
        assert doctor.main(["--model", str(path), "--json", str(out)]) == code
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The file: ")]
        assert says in line
        assert json.loads(out.read_text())["file"] == {"says": line[len("The file: ") :], "damaged": code == 1}
    monkeypatch.setattr("glm_mlx.memory.machine_memory", lambda: (1000, "a test"))
    assert doctor.main(["--model", str(broken)]) == 0
    assert "The file: not tried; " in capsys.readouterr().out


def test_a_damaged_expert_of_the_last_layer_is_found_whichever_it_is(model_file: MakeModel, tmp_path: Path) -> None:
    """Any token of the prompt may choose it, not the last alone."""
    good = model_file(SPEC)
    assert not checkup._try_file(open_model(good), kernels_fail=False).damaged
    for expert in range(SPEC.num_experts):
        broken = open_model(damaged(good, tmp_path, "blk.1.ffn_down_exps.weight", expert))
        assert checkup._try_file(broken, kernels_fail=False).damaged, expert
        assert not checkup._try_file(broken, kernels_fail=True).damaged, "not tried"


@NO_GPU
def test_the_whole_table_on_this_cpu(tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    done = subprocess.run([*COMMAND, "--json", str(file), "--compile-only"], cwd=ROOT, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, b"")
    rows = json.loads(file.read_text())["variants"]
    assert len(rows) == len(table(done.stdout.decode()))
    assert all(row["error"] is None and row["microseconds"] is None for row in rows)
    assert {row["op"] for row in rows} == set(launcher.OPS)
    for op, types in {"experts_gate_up": "2 x Q4_0 + 2 x Q5_K", "experts_down": "Q4_K + Q6_K"}.items():
        for tokens in ("1 token", f"{CHUNK} tokens"):
            assert {"op": op, "what": types, "activations": f"float32, {tokens}"}.items() <= next(
                row.items()
                for row in rows
                if (row["op"], row["what"], tokens in row["activations"]) == (op, types, True)
            )


def test_help_says_what_the_exit_codes_mean() -> None:
    done = subprocess.run([*COMMAND, "-h"], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert all(word in done.stdout.decode() for word in ("--json", "--compile-only", "Exit codes", "bug report"))
    assert max(map(len, done.stdout.decode().splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--fast"], "--fast"),
        (["--model", "/no/such.gguf"], "/no/such.gguf"),
        (["--context", "few"], "few"),
        (["--context", "300000"], "202,752"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
        (["--json", "."], "."),
    ],
)
def test_what_cannot_be_used_gets_one_line_before_any_work(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "make_tiny", fail)
    try:
        code = doctor.main(arguments)
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert says in err


def test_ctrl_c_ends_with_130_and_no_traceback() -> None:
    with subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while sum(psutil.Process(process.pid).cpu_times()[:2]) < 1.5:  # it starts in half a second
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out == b""


# --- the process that checks are made in


def serve_badly(connection: Connection) -> None:
    """Opens whatever it is asked to, and does to the answer what its index stands for."""
    while True:
        request, argument, _ = connection.recv()
        if request == "open":
            if argument == Path("broken"):
                connection.send(LostError("no such model"))
            connection.send([Variant("qmv", str(argument), "")])
            continue
        fate = ("answers", "dies", "compiles and dies", "compiles and hangs", "disagrees")[argument]
        if "compiles" in fate:
            connection.send(COMPILED)
        if "dies" in fate:
            os.kill(os.getpid(), signal.SIGABRT)
        if "hangs" in fate:
            time.sleep(600)
        connection.send(Result(True, fate == "answers", "wrong" if fate == "disagrees" else None, float(os.getpid())))


def test_a_kernel_that_dies_or_hangs_takes_only_its_own_row() -> None:
    checks = Isolated(serve_badly, longest=20)

    def ask(index: int) -> Result:
        return checks.check(index, timed=True)

    assert checks.open(Path("model"), mx.float32) == [Variant("qmv", "model", "")]
    first, second = ask(0), ask(0)
    assert first == second, "one process for all, as long as they work"
    assert ask(1) == Result(False, error="the process ended with SIGABRT")
    assert ask(2) == Result(True, error="the process ended with SIGABRT")
    third = ask(0)
    assert third.agrees
    assert third != first
    checks.longest = 1
    assert ask(3) == Result(True, error="no answer in 1 s")
    checks.longest = 20
    assert ask(4).error == "wrong"
    assert checks.process is None, "what has failed once is not trusted"
    assert ask(0).agrees
    process = checks.process
    checks.close()
    assert process is not None
    assert not process.is_alive()


def test_a_model_that_cannot_be_opened_is_an_error_of_its_own() -> None:
    checks = Isolated(serve_badly, longest=20)
    with pytest.raises(LostError, match="no such model"):
        checks.open(Path("broken"), mx.float32)
    checks.close()


@NO_GPU
def test_the_other_process_checks_as_this_one_does(model_file: MakeModel) -> None:
    checks, here = Isolated(), Rows()
    file = model_file(SPEC)
    try:
        assert checks.open(file, mx.float32) == here.open(file, mx.float32)
        result = checks.check(0, timed=True)
    finally:
        checks.close()
    assert (result.compiles, result.agrees, result.error) == (None, None, None), "no GPU here"
    assert result.microseconds
