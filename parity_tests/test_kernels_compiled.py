"""Kernels are compiled for CUDA before MLX needs them, to the files where MLX looks, or else left to MLX."""

import importlib
import io
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

import glm_mlx
from bench import conditions
from glm_mlx import engine, self_test
from glm_mlx.compositions import read_small
from glm_mlx.engine import Engine
from glm_mlx.model import Model
from glm_mlx.small import SMALL_MODEL
from kernels import cache_folder, compiled, launcher
from kernels.compiled import compile_ahead
from kernels.launcher import Launch, Recorded
from parity_tests.kernel_cases import Case, Down, Expand, Mla, Qmv
from parity_tests.msl import nvrtc
from parity_tests.msl.device import posing_as
from parity_tests.msl.nvrtc import HAS_WHEELS, cuda_text
from parity_tests.test_kernels_cuda import CASES

if not HAS_WHEELS:
    pytest.skip("NVRTC's wheels are installed on Linux x86-64 only", allow_module_level=True)

SMALL = Qmv(("Q4_0",), (16,), 64, dtype=mx.bfloat16)
OTHERS = [Expand("Q4_0", (16, 64), mx.bfloat16), Down("Q4_0", width=64, cols=16, dtype=mx.bfloat16)]


def _cuda_kernel(name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str) -> Any:
    return partial(_text, name, input_names, output_names, source, header)


def _text(name: str, inputs: Any, outputs: Any, body: str, header: str, launch: Launch, arrays: Any) -> tuple[str, str]:
    named_inputs = list(zip(inputs, arrays, strict=True))
    named_outputs = list(zip(outputs, launch.output_dtypes, strict=True))
    text = cuda_text(name, named_inputs, named_outputs, body, header, launch.template)
    return text.entry, str(text)


def _source(launch: Launch, arrays: Any) -> Any:
    return launch.kernel(launch, arrays)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The folder where MLX would look, on a machine that says it is an H200 with CUDA. The text of a kernel is the one
    that `cuda_text` makes, as MLX's CPU wheel makes none."""
    nvrtc._nvrtc()  # as MLX with CUDA would have loaded it
    folder = tmp_path / "modules"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder))
    capability = {"compute_capability_major": 9, "compute_capability_minor": 0}
    with (
        posing_as("cuda"),
        mock.patch.object(mx, "device_info", return_value=capability),
        mock.patch.object(mx.fast, "cuda_kernel", _cuda_kernel),
        mock.patch.object(compiled, "source", _source),
    ):
        yield folder


def recorded(*cases: Case) -> list[Recorded]:
    with launcher.recording() as seen:
        for case in cases:
            case.kernel()
    assert len(seen) == sum(case.launches for case in cases)
    return seen


def kernels_of(seen: Sequence[Recorded]) -> set[Any]:
    """The kernels as MLX tells them apart, by text and template. Several launches may have the same one."""
    return {(launch.name, str(launch.template), tuple(array.dtype for array in arrays)) for launch, arrays in seen}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def functions(binary: bytes) -> dict[str, bytes]:
    """The kernels of a module: their names, and their machine code."""
    elf = ELFFile(io.BytesIO(binary))
    (table,) = (section for section in elf.iter_sections() if isinstance(section, SymbolTableSection))
    found = [symbol for symbol in table.iter_symbols() if symbol["st_info"]["type"] == "STT_FUNC"]
    return {symbol.name: elf.get_section(symbol["st_shndx"]).data() for symbol in found}


def test_the_hash_is_that_of_std_string() -> None:
    """As printed by a C++ program of GCC."""
    assert compiled.text_hash(b"a") == 0x454DDEE488C1ED6B
    assert compiled.text_hash(b"custom_kernel") == 0x0FB153B5EB721449


def test_a_module_has_the_names_that_mlx_looks_for(folder: Path) -> None:
    ((launch, arrays),) = seen = recorded(SMALL)
    assert compile_ahead(seen) == 1
    name, text = _source(launch, arrays)
    file = f"{name}_{compiled.text_hash(text.encode()):x}"
    assert files(folder) == [f"{file}.ptx", f"{file}.txt"]
    line, digest = (folder / f"{file}.txt").read_text().splitlines()
    assert "\t" not in digest, "MLX takes every line with a tab for a kernel's name"
    expression, mangled = line.split("\t")
    assert expression == f"mlx::core::cu::{name}"
    assert list(functions((folder / f"{file}.ptx").read_bytes())) == [mangled]


@pytest.mark.parametrize("case", [SMALL, Mla(20, 40, 512, 64, before=768, dtype=mx.bfloat16, kind="Q8_0")], ids=str)
def test_fewer_headers_make_the_same_machine_code(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_ahead(recorded(case)) == case.launches
    few = [functions((folder / name).read_bytes()) for name in files(folder) if name.endswith(".ptx")]
    headers = nvrtc._nvrtc()[1]
    monkeypatch.setattr(compiled, "HEADERS", {})
    monkeypatch.setattr(compiled, "include_folders", lambda: [headers / "cccl", headers, nvrtc._HERE / "shim"])
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(folder / "all"))
    assert compile_ahead(recorded(case)) == case.launches
    every = [functions((folder / "all" / name).read_bytes()) for name in files(folder / "all") if name.endswith(".ptx")]
    for one, other in zip(few, every, strict=True):
        assert one.items() <= other.items()


def test_every_op_and_type_compiles_ahead(folder: Path) -> None:
    seen = recorded(*CASES)
    assert compile_ahead(seen) == len(kernels_of(seen))
    assert len(files(folder)) == 2 * len(kernels_of(seen))


def test_nothing_is_compiled_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(SMALL, SMALL, *OTHERS)
    assert compile_ahead(seen) == 3
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert compile_ahead(seen) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_another_text_or_device_has_another_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def module() -> Any:
        qmv._launch.cache_clear()  # the launch is prepared anew
        ((launch, arrays),) = recorded(SMALL)
        return compiled._module(folder, launch, arrays)

    qmv = importlib.import_module("kernels.qmv")
    try:
        found = [module(), module()]
        assert found[0] == found[1]
        with mock.patch.object(mx, "device_info", return_value={"compute_capability_major": 8}):
            found.append(module())
        text = launcher._text
        monkeypatch.setattr(launcher, "_text", lambda name: text(name) + "\nconstant int more = 1;\n" * ("h.m" in name))
        found.append(module())
        assert len({one.file for one in found}) == 3
    finally:
        qmv._launch.cache_clear()


def test_kernels_are_compiled_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_one, together = compiled._compile, threading.Barrier(3)

    def meeting(*arguments: Any) -> Any:
        together.wait(20)
        return compile_one(*arguments)

    monkeypatch.setattr(compiled, "_compile", meeting)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert compile_ahead(recorded(SMALL, *OTHERS)) == 3


def test_names_come_before_the_code_and_both_in_one_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX may look while they are written."""
    replace, seen = Path.replace, list[list[str]]()

    def noting(self: Path, target: Path) -> Path:
        before = files(folder)
        result = replace(self, target)
        if target.parent == folder and target.suffix in (".txt", ".ptx"):
            seen.append([name[-4:] for name in files(folder) if name not in before])
        return result

    monkeypatch.setattr(Path, "replace", noting)
    assert compile_ahead(recorded(SMALL)) == 1
    assert seen == [[".txt"], [".ptx"]]


def test_what_took_a_process_down_is_left_to_mlx_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_one, marks = compiled._compile, list[str]()

    def noting(*arguments: Any) -> Any:
        marks.extend(files(folder))
        return compile_one(*arguments)

    monkeypatch.setattr(compiled, "_compile", noting)
    assert compile_ahead(recorded(SMALL)) == 1
    (mark,) = marks  # of this process, while it compiled
    (folder / mark).touch()
    for other in set(files(folder)) - {mark}:
        (folder / other).unlink()
    assert compile_ahead(recorded(SMALL)) == 1  # it is alive, and another one may compile as well
    assert len(files(folder)) == 2
    for file in folder.iterdir():
        file.unlink()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (folder / mark).with_suffix(f".{ended.pid}").touch()
    (folder / mark).with_suffix(".123.bak").touch()  # of somebody else
    assert compile_ahead(recorded(SMALL, *OTHERS)) == 2
    assert compile_ahead(recorded(SMALL, *OTHERS)) == 1


@pytest.mark.parametrize("suffix", [".txt", ".ptx"])
def test_half_of_what_mlx_reads_is_compiled_again(suffix: str, folder: Path) -> None:
    assert compile_ahead(recorded(SMALL)) == 1
    (file,) = folder.glob(f"*{suffix}")
    file.unlink()
    assert compile_ahead(recorded(SMALL)) == 1
    file.write_bytes(b"")
    assert compile_ahead(recorded(SMALL)) == 1
    assert compile_ahead(recorded(SMALL)) == 0


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, errors, names = tmp_path / "folder" / "file.json", list[BaseException](), set[str]()
    cache_folder.write_whole(file, b"first")
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("file.json", b"first")]

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as out:
            out.write(content[:1])
        names.add(path.name)
        raise errors[-1]

    monkeypatch.setattr(Path, "write_bytes", half)
    for error in (OSError("no space left on device"), KeyboardInterrupt()):
        errors.append(error)
        with pytest.raises(type(error)):
            cache_folder.write_whole(file, b"second")
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [("file.json", b"first")]
    assert len(names) == 2, "two writers, in one process or in two containers, may be at it at once"


def _raise(*_: Any) -> Any:
    raise RuntimeError("as MLX might")


AMISS: dict[str, tuple[str, Any]] = {
    "no CUDA": ("mlx.core.cuda.is_available", lambda: False),
    "no NVRTC": ("kernels.compiled._nvrtc", lambda: None),
    "no headers": ("kernels.compiled.include_folders", lambda: []),
    "another device": ("kernels.compiled.architecture", lambda: "sm_9999"),
    "another MLX": ("kernels.compiled.source", lambda *_: None),
    "MLX raises": ("kernels.compiled.source", _raise),
    "no C++ library": ("kernels.compiled.text_hash", _raise),
    "a text that is none": ("kernels.compiled.source", lambda *_: ("k", "__global__ void k() { nonsense }")),
    "a text without a kernel": ("kernels.compiled.source", lambda *_: ("k", "")),
    "a name too long for a file": ("kernels.compiled.LONGEST_NAME", 20),
}


@pytest.mark.parametrize("what", AMISS)
def test_what_is_amiss_is_left_to_mlx(what: str, folder: Path) -> None:
    seen = recorded(SMALL)
    with mock.patch(*AMISS[what]):
        assert compile_ahead(seen) == 0
    assert files(folder) == []
    assert compile_ahead(seen) == 1


@pytest.mark.parametrize("given", ["", "file/below"])
def test_a_folder_that_cannot_be_is_left_to_mlx(given: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", given and str(folder / given))
    assert compile_ahead(recorded(SMALL)) == 0
    assert files(folder) == ["file"]


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(SMALL)
    with mock.patch.object(Path, "replace", side_effect=OSError("no space left on device")):
        assert compile_ahead(seen) == 0
    assert files(folder) == []


def test_a_bad_text_does_not_keep_others_from_being_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = recorded(SMALL)
    with mock.patch.object(
        compiled,
        "source",
        lambda launch, a: (_source(launch, a)[0], "nonsense" if launch is bad[0][0] else _source(launch, a)[1]),
    ):
        assert compile_ahead([*bad, *recorded(*OTHERS)]) == 2


# --- what others could have put there


def test_mlx_s_default_folder_which_everybody_knows_is_not_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compile_ahead(recorded(SMALL)) == 0
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_may_write_to_is_not_used(mode: int, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    assert compile_ahead(recorded(SMALL)) == 0
    assert files(folder) == []
    folder.chmod(0o755)
    assert compile_ahead(recorded(SMALL)) == 1


def _other_code(code: Path) -> None:
    code.write_bytes(b"planted")


def _as_mlx_would_write_it(code: Path) -> None:
    names = code.with_suffix(".txt").read_text()
    code.with_suffix(".txt").write_text(names[: names.index("\n") + 1])


def _other_names(code: Path) -> None:
    names = code.with_suffix(".txt")
    names.write_bytes(names.read_bytes().replace(b"\t", b"\t_"))


def _of_another_text(code: Path) -> None:
    names = code.with_suffix(".txt").read_bytes()
    head = names[: names.index(compiled.DIGEST)]
    other = compiled.Module(code, "", b"another text")
    code.with_suffix(".txt").write_bytes(head + compiled.DIGEST + compiled._digest(other, head, code.read_bytes()))


def _a_link(code: Path) -> None:
    code.symlink_to(code.rename(code.parents[1] / "elsewhere"))


def _a_link_to_names(code: Path) -> None:
    names = code.with_suffix(".txt")
    names.symlink_to(names.rename(code.parents[1] / "elsewhere"))


def _a_pipe(code: Path) -> None:
    code.unlink()
    os.mkfifo(code)


PLANTED = [_other_code, _as_mlx_would_write_it, _other_names, _of_another_text, _a_link, _a_link_to_names, _a_pipe]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("with_compiler", [True, False])
def test_code_that_was_not_written_here_is_gone_before_mlx_looks(
    plant: Callable[[Path], None], with_compiler: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(SMALL)
    assert compile_ahead(seen) == 1
    (code,) = folder.glob("*.ptx")
    before = code.read_bytes()
    plant(code)
    if with_compiler:
        assert compile_ahead(seen) == 1
        assert not code.is_symlink()
        assert code.read_bytes() == before
        assert compile_ahead(seen) == 0
    else:
        monkeypatch.setattr(compiled, "_nvrtc", lambda: None)
        assert compile_ahead(seen) == 0
        assert not code.is_symlink()
        assert not code.exists()


def test_the_mark_of_a_compilation_follows_no_link(folder: Path, tmp_path: Path) -> None:
    seen = recorded(SMALL)
    assert compile_ahead(seen) == 1
    (code,) = folder.glob("*.ptx")
    code.unlink()
    victim = tmp_path / "victim"
    code.with_suffix(f".{os.getpid()}").symlink_to(victim)
    assert compile_ahead(seen) == 1
    assert not victim.exists()


# --- who asks for it


@pytest.fixture
def small_model() -> Model:
    return Model(*read_small(SMALL_MODEL), mx.bfloat16)


def test_an_engine_has_what_it_will_launch_compiled(folder: Path, small_model: Model) -> None:
    with mock.patch.object(engine, "compile_ahead") as ahead:
        Engine(small_model)
    ((launches,), _) = ahead.call_args
    assert {launch.op for launch, _ in launches} == {*launcher.OPS, "mla_matrix", "mla_merge", "expand"}
    splits = {dict(launch.template)["SPLITS"] for launch, _ in launches if launch.op == "mla_merge"}
    assert splits == {8, 16, 32, 132}  # of a cache of 256, 512, 1,024 rows, and of any larger one


def test_an_engine_without_cuda_records_nothing(small_model: Model) -> None:
    with posing_as("metal"), mock.patch.object(engine, "launches", side_effect=AssertionError):
        Engine(small_model)


def test_all_that_is_checked_is_compiled_before_the_first_check(folder: Path, small_model: Model) -> None:
    done: list[Any] = []

    def check(self: Any, name: str, case: Any) -> None:
        done.append(name)
        self.outcomes[name] = None
        self._save()

    def ahead(launches: Any) -> int:
        done.append({launch.op for launch, _ in launches})
        return 0

    with mock.patch.object(self_test._Memory, "check", check), mock.patch.object(self_test, "compile_ahead", ahead):
        assert self_test.leave_broken_kernels(small_model) == []
        assert done[0] == {*launcher.OPS, "mla_matrix", "mla_merge", "expand"}
        assert len(done) > 10
        count = len(done)
        assert self_test.leave_broken_kernels(small_model) == []
        assert len(done) == count  # all is known


# --- the folder


def gpu(folder: Path, number: int, model: str) -> None:
    (folder / str(number)).mkdir(parents=True)
    (folder / str(number) / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 24\n")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(cache_folder, "NVIDIA", tmp_path / "gpus")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")  # so that it is as before after the test
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    return tmp_path / "gpus"


def test_compiled_kernels_stay_in_the_users_cache(gpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.reload(glm_mlx)
    assert os.environ.pop("MLX_PTX_CACHE_DIR") == ""  # no GPU of NVIDIA's: nothing is made
    assert not (tmp_path / "cache").exists()
    gpu(gpus, 0, "NVIDIA H200")
    importlib.reload(glm_mlx)
    folder = Path(os.environ["MLX_PTX_CACHE_DIR"])
    assert folder.is_dir()
    assert folder.is_relative_to(tmp_path / "cache")
    assert str(folder) not in str(conditions._mlx_environment())
    gpu(gpus, 1, "NVIDIA H200")
    assert cache_folder.compiled_folder() == folder
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/given")
    importlib.reload(glm_mlx)
    assert os.environ["MLX_PTX_CACHE_DIR"] == "/given"


def test_another_gpu_or_mlx_has_another_folder(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(gpus, 0, "NVIDIA H200")
    found = [cache_folder.compiled_folder()]
    with mock.patch.object(cache_folder, "version", return_value="0.99"):
        found.append(cache_folder.compiled_folder())
    gpu(gpus, 1, "NVIDIA L4")
    for number in "01":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", number)
        found.append(cache_folder.compiled_folder())
    assert len({*found} - {None}) == 4


def test_a_cache_that_cannot_be_is_left_to_mlx(gpus: Path, tmp_path: Path) -> None:
    gpu(gpus, 0, "NVIDIA H200")
    (tmp_path / "cache").touch()
    assert cache_folder.compiled_folder() is None


def test_without_a_private_folder_mlx_keeps_nothing(gpus: Path, tmp_path: Path) -> None:
    """An empty name is no folder to MLX; without a name it would take one that everybody may fill."""
    gpu(gpus, 0, "NVIDIA H200")
    folder = tmp_path / "cache" / "glm-mlx"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    importlib.reload(glm_mlx)
    assert os.environ["MLX_PTX_CACHE_DIR"] == ""
    assert list(folder.iterdir()) == []
