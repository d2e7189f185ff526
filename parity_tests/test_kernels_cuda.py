"""The kernels of the product as CUDA: every op's text compiles with NVRTC, as MLX is given it."""

from pathlib import Path

import mlx.core as mx
import pytest

from kernels import launcher
from kernels.planes import bundled
from kernels.qmv import qmv_all
from parity_tests.kernel_cases import Case, Down, Embed, Expand, GateUp, HeadQmv, Mla, Qmv, random_array, random_weight
from parity_tests.msl import KernelError, compiling_cuda
from parity_tests.msl.nvrtc import HAS_WHEELS

if not HAS_WHEELS:
    pytest.skip("NVRTC's wheels are installed on Linux x86-64 only", allow_module_level=True)

# Together every type of weight, every dtype of activations, and what defines turn on.
CASES: list[Case] = [
    Qmv(("Q4_0", "Q8_0"), (16, 24), 64, norm=True, dtype=mx.bfloat16),
    Qmv(("Q4_K", "Q6_K", "Q5_1"), (8, 8, 16), 256, tokens=3, dtype=mx.float16),
    Qmv(("IQ4_NL",), (16,), 64, residual=True),
    HeadQmv("Q8_0", 2, 16, 64, dtype=mx.bfloat16),
    Embed("Q5_K", 16, 256, dtype=mx.bfloat16),
    GateUp("Q4_0", 8, width=16, cols=64, shared="Q5_0", shared_width=16, dtype=mx.bfloat16),
    Down("Q4_1", width=64, cols=16, shared="F16", shared_width=64, dtype=mx.bfloat16),
    GateUp("Q4_K", 8, width=16, cols=2048, shared="Q5_K", shared_width=16, dtype=mx.bfloat16),
    Down("Q6_K", width=1536, cols=16, shared="Q4_K", shared_width=1536, dtype=mx.bfloat16),
    Mla(20, 40, 512, 64, dtype=mx.bfloat16, kind="Q4_K", values=256),
    Mla(20, 40, 512, 64, before=768, dtype=mx.bfloat16, kind="Q8_0"),
    Mla(20, 40, 512, 64, packed=True, dtype=mx.bfloat16, kind="Q8_0"),
    Mla(3, 40, 72, 10, tokens=2),
    Expand("Q6_K", (3, 5, 256), mx.bfloat16),
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_as_cuda_and_fits_into_registers(case: Case) -> None:
    with compiling_cuda() as reports:
        case.kernel()
    assert len(reports) == case.launches
    for report in reports:
        assert report.spilled == 0
        assert len(report.text) < 2000  # MLX hashes it before each launch: the rest is in included files


def test_weights_in_one_array_compile_as_cuda() -> None:
    weights, _ = bundled([random_weight(kind, (8, 256), i) for i, kind in enumerate(("Q4_0", "Q4_K", "Q6_K"))])
    with compiling_cuda() as reports:
        qmv_all(random_array((1, 256), mx.bfloat16, 0), weights)
    assert [report.text.count("bundle") for report in reports] == [1]


def test_a_fault_in_an_included_file_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = launcher._text
    spoilt = {"quants.h.metal": "inline float fault() { return no_such_name; }\n"}
    monkeypatch.setattr(launcher, "_text", lambda name: text(name) + spoilt.get(name, ""))
    with pytest.raises(KernelError, match="no_such_name"), compiling_cuda():
        Qmv(("Q4_0",), (24,), 96).kernel()
