"""When a kernel is launched, when its twin does the work, and what is refused before any launch."""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest

from kernels import launcher
from kernels.embed import embed
from kernels.expand import expand
from kernels.experts_down import experts_down
from kernels.experts_gate_up import experts_gate_up
from kernels.mla_decode import mla_decode
from kernels.qmv import qmv, qmv_all
from kernels.route import Router
from kernels.source import source
from parity_tests.kernel_cases import (
    KINDS,
    Case,
    Down,
    Embed,
    Expand,
    GateUp,
    HeadQmv,
    Mla,
    Qmv,
    Route,
    bits,
    counting,
    on_gpu,
    random_weight,
    run,
    verify,
)

TOO_MANY = launcher.MAX_TOKENS + 1
CASES: dict[str, Case] = {
    "qmv": Qmv(("Q4_0",), (16,), 64, tokens=3),
    "embed": Embed("Q4_0", 16, 64, tokens=3),
    "experts_gate_up": GateUp("Q4_0", 8, width=16, cols=64, tokens=3),
    "experts_down": Down("Q4_0", width=64, cols=16, tokens=3),
    "mla_decode": Mla(4, 40, tokens=3, room=0),
    "expand": Expand("Q4_0", (16, 64)),
}
TO_TWIN: dict[str, Case] = {
    **{f"{op}: {TOO_MANY} tokens": replace(case, tokens=TOO_MANY) for op, case in CASES.items() if op in launcher.OPS},  # type: ignore
    "expand: a dense weight": Expand("F32", (16, 64)),
    "expand: fewer than eight scales": Expand("Q4_0", (7, 32)),
    "qmv: a residual of four": Qmv(("F32",), (4,), 64, residual=True),
    "embed: rows of 20": Embed("F16", 16, 20),
    "qmv: rows of 20": Qmv(("F32",), (16,), 20),
    "qmv: fewer than eight scales": Qmv(("Q4_0", "Q4_0"), (7, 16), 32),
    "experts_gate_up: rows of 20": GateUp("F16", 8, width=16, cols=20),
    "experts_gate_up: fewer than eight scales": GateUp("Q4_0", 8, width=16, cols=32, shared="Q4_0", shared_width=7),
    "experts_down: rows of 20": Down("BF16", width=20, cols=16),
    "experts_down: shared experts of another width": Down("Q4_0", width=64, shared="Q4_0", shared_width=96),
    "experts_gate_up: fewer than eight experts": Route(7, 4),
    "experts_gate_up: more than 256 experts": Route(257, 4),
    "mla_decode: latents of 60": Mla(4, 40, latent=60, room=0),
    "mla_decode: latents of 2,056": Mla(1, 4, latent=2056, room=0),
    "mla_decode: latents of 544 in 8 bits": Mla(1, 4, latent=544, room=0, packed=True),
    "mla_decode: fewer than eight values": Mla(1, 33, latent=6, rope=2, room=0),
}


@pytest.mark.parametrize("case", TO_TWIN.values(), ids=TO_TWIN)
def test_what_no_kernel_takes_goes_to_the_twin(case: Case) -> None:
    got = run(case.kernel, launches=0)
    assert [bits(y) for y in got] == [bits(y) for y in run(case.twin, launches=0)]  # traced too, which rounds otherwise


@pytest.mark.parametrize("op", CASES)
def test_an_op_to_be_avoided_goes_to_the_twin_and_the_others_do_not(op: str) -> None:
    for other, case in CASES.items():
        with launcher.avoiding(op):
            run(case.kernel, launches=case.launches * (other != op))
        with launcher.avoiding():
            run(case.kernel, launches=0)
        run(case.kernel, launches=case.launches)


@pytest.mark.parametrize("op", CASES)
def test_nothing_is_launched_on_a_cpu(op: str) -> None:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        with counting() as launches:
            mx.eval([y for y in CASES[op].kernel() if y is not None])
    finally:
        mx.set_default_device(before)
    assert launches == []


LONGEST = {
    "qmv": 10_200,
    "embed": 6_000,
    "experts_gate_up": 13_200,
    "experts_down": 9_900,
    "mla_decode": 16_200,
    "mla_merge": 10_100,
    "expand": 6_500,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_text_of_a_launch_is_short(case: Case) -> None:
    """For each launch MLX on Metal goes through all of it."""
    with launcher.recording() as seen:
        case.kernel()
    assert seen
    for launch, arrays in seen:
        found = source(launch, arrays)
        assert found is not None
        assert len(found[1]) <= LONGEST[launch.op]


def test_a_shorter_text_has_the_lines_of_its_file() -> None:
    common = "// writes: x\n// why\n  if (a) {  // so\n    b;\n"
    text = common + "// ---- for p q<4>: c ---\nd;\n// ---- for p ----\n// e\ne;\n// ---- f ---\ng;"
    start = "// writes: x\n\nif (a) {\nb;\n\n"
    assert launcher._shortened(text, {"q<4>"}) == start + "d;\n\n\n\n\ng;"
    assert launcher._shortened(text, {"p"}) == start + "d;\n\n\ne;\n\ng;"
    assert launcher._shortened(text, {"q"}) == start + "\n\n\n\n\ng;"
    both = "a;\n// ---- for turns and p q ----\nb;"
    assert launcher._shortened(both, {"turns", "q"}) == "a;\n\nb;"
    assert launcher._shortened(both, {"turns"}) == launcher._shortened(both, {"p"}) == "a;\n\n"


def test_sections_are_for_what_launches_use() -> None:
    known = launcher._uses([(kind, (1, 256)) for kind in KINDS], [mx.uint8, mx.bfloat16, 3, True], ["load_turn<"])
    headings = [
        heading
        for path in launcher.HERE.glob("*.metal")
        for heading in re.findall(r"^// -+ for (.*?)(?:: .*)? -+$", path.read_text(), re.MULTILINE)
    ]
    assert len(headings) >= 10
    assert {name for heading in headings for name in heading.split() if name != "and"} == known


TURNS: list[tuple[Case, dict[str, int]]] = [  # K-quants whose scales a lane has for others
    (Down("Q6_K", 3, 2, 1280, 9, "Q5_K", 1280), {"ROWS": 2, "MAX_SIMDGROUPS": 3, "DEPTH": 5}),
    (Down("Q4_0", 3, 2, 512, 9, "Q4_K", 1024), {"ROWS": 2, "MAX_SIMDGROUPS": 4, "DEPTH": 1}),
    (Down("Q8_0", 3, 2, 1408, 9, "Q4_K", 2816), {"ROWS": 2, "MAX_SIMDGROUPS": 4, "DEPTH": 6}),
    (GateUp("Q4_K", 9, 2, 11, 2304, "Q6_K", 9), {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 9}),
    (GateUp("Q6_K", 9, 2, 11, 1280, "Q5_K", 9), {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 5}),
    (GateUp("Q5_K", 9, 2, 11, 1024, "Q4_K", 9), {"ROWS": 3, "SIMDGROUPS": 2, "DEPTH": 2}),
    (Down("Q4_1", 3, 2, 1408, 9, "Q6_K", 2816), {"ROWS": 2, "MAX_SIMDGROUPS": 4, "DEPTH": 6}),
    (Qmv(("Q4_K", "Q6_K"), (7, 5), 2304, tokens=2), {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 9}),
    (Qmv(("Q5_K", "Q6_K"), (5, 3), 1024), {"ROWS": 2, "SIMDGROUPS": 1, "DEPTH": 4}),
    (HeadQmv("Q4_K", 2, 9, 512), {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 2}),
    (Mla(3, 20, 512, 16, kind="Q4_K", values=11), {"MERGE_ROWS": 2, "MERGE_SIMDGROUPS": 2}),
]
SHAPES: list[tuple[Case, dict[str, int]]] = [
    *TURNS,
    (Qmv(("Q5_0", "Q6_K"), (17, 3), 1280, True, tokens=2), {"ROWS": 1, "SIMDGROUPS": 1, "DEPTH": 1, "MANY_ROWS": 20}),
    (Qmv(("Q5_1", "F16"), (29, 9), 224, tokens=3), {"ROWS": 3, "SIMDGROUPS": 2, "DEPTH": 2}),
    (HeadQmv("Q8_0", 3, 35, 480, tokens=2), {"ROWS": 4, "SIMDGROUPS": 8, "DEPTH": 4}),
    (GateUp("Q4_K", 9, 2, 23, 768, "Q5_0", 25), {"ROWS": 2, "SIMDGROUPS": 2, "DEPTH": 1}),
    (GateUp("Q8_0", 40, 2, 45, 1408, "F32", 90), {"ROWS": 4, "SIMDGROUPS": 8, "DEPTH": 5}),
    (Down("Q4_1", 6, 4, 96, 17, "Q4_0", 96), {"ROWS": 1, "MAX_SIMDGROUPS": 3, "DEPTH": 1}),
    (Down("Q8_0", 6, 5, 1408, 17, "Q5_0", 2816), {"ROWS": 8, "MAX_SIMDGROUPS": 16, "DEPTH": 3}),
    (Down("Q6_K", 9, 8, 768, 16, "Q4_K", 1536), {"ROWS": 3, "MAX_SIMDGROUPS": 32, "DEPTH": 2}),
    (
        Mla(5, 70, 136, 62, tokens=2),
        {"HEADS_AT_ONCE": 2, "SIMDGROUPS": 3, "ROWS_AT_ONCE": 8, "MERGE_ROWS": 5},
    ),
    (
        Mla(5, 70, 96, 62, tokens=2, packed=True),
        {"HEADS_AT_ONCE": 2, "SIMDGROUPS": 3, "ROWS_AT_ONCE": 8, "MERGE_ROWS": 5},
    ),
    (
        Mla(3, 200, tokens=2),
        {"HEADS_AT_ONCE": 1, "SIMDGROUPS": 1, "ROWS_AT_ONCE": 2, "ROWS_OF_SPLIT": 8, "MERGE_ROWS": 5},
    ),
    (
        Mla(20, 300, 128, 32, dtype=mx.bfloat16, room=2048),
        {"MATRIX_HEADS": 8, "MATRIX_THREADGROUPS": 50, "MERGE_ROWS": 5},
    ),
    (
        Mla(20, 300, 64, 16, tokens=2, dtype=mx.float16, room=2048),
        {"MATRIX_HEADS": 24, "MATRIX_THREADGROUPS": 9, "MATRIX_AHEAD": 1},
    ),
    (
        Mla(9, 200),
        {"HEADS_AT_ONCE": 8, "SIMDGROUPS": 5, "ROWS_AT_ONCE": 1, "MERGE_SIMDGROUPS": 2},
    ),
]


@pytest.mark.parametrize(("case", "shape"), SHAPES, ids=str)
def test_any_launch_shape_computes_the_same(case: Case, shape: dict[str, int]) -> None:
    """Those in use are settled by speed, so the text must be right for others."""
    op = importlib.import_module(f"kernels.{case.op}")
    prepared = op._launches if isinstance(case, Mla) else op._launch
    prepared.cache_clear()
    try:
        with mock.patch.multiple(op, **shape):
            verify(case)
    finally:
        prepared.cache_clear()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "threads": ({"simdgroups": 33}, "1056 threads in a threadgroup; 32 to 1024"),
    "no threads": ({"simdgroups": 0}, "0 threads in a threadgroup"),
    "threadgroup memory": ({"threadgroup_bytes": 32769}, "32769 bytes of threadgroup memory; 32768 at most"),
    "buffers": ({"inputs": [f"x{i}" for i in range(31)]}, "32 buffers; 31 at most"),
    "planes": ({"weights": {"W0": ("Q4_K", (64, 256))}}, "35 buffers; 31 at most"),
    "no threadgroups": ({"threadgroups": (3, 0, 1)}, r"an empty grid of \(3, 0, 1\) threadgroups"),
    "writes": ({"writes": ["x0"]}, "writes x0; the first line of qmv.metal: none$"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_device_could_run_is_refused_by_name(what: str) -> None:
    """And the largest that one could is not."""
    fine: dict[str, Any] = {
        "inputs": [f"x{i}" for i in range(30)],
        "weights": {},
        "outputs": {"y": ((8,), mx.float32)},
        "template": {},
        "threadgroups": (1, 1, 1),
        "simdgroups": 32,
        "threadgroup_bytes": 32768,
    }
    launcher.prepare(mx.fast.metal_kernel, "qmv", **fine)
    change, why = REFUSED[what]
    with pytest.raises(launcher.KernelRefusedError, match=f"^qmv: {why}"):
        launcher.prepare(mx.fast.metal_kernel, "qmv", **{**fine, **change})


@pytest.mark.parametrize(
    ("writes", "why"),
    [
        (["x0", "x1"], None),
        (["x1", "x0"], None),
        ([], "writes no input; the first line of qmv.metal: x0, x1"),
        (["x0"], "writes x0; the first line of qmv.metal: x0, x1"),
        (["x0", "x1", "x2"], "writes x0, x1, x2; the first line of qmv.metal: x0, x1"),
    ],
    ids=str,
)
def test_a_launch_and_its_text_agree_on_what_is_written(
    writes: list[str], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_text", lambda name: "// writes: x0, x1\n" if name == "qmv.metal" else "")
    given: dict[str, Any] = {"weights": {}, "outputs": {"y": ((8,), mx.float32)}, "template": {}}
    given |= {"threadgroups": (1, 1, 1), "simdgroups": 1, "writes": writes}
    if why:
        with pytest.raises(launcher.KernelRefusedError, match=f"^qmv: {why}$"):
            launcher.prepare(mx.fast.metal_kernel, "qmv", inputs=["x0", "x1", "x2"], **given)
        return
    assert launcher.prepare(mx.fast.metal_kernel, "qmv", inputs=["x0", "x1", "x2"], **given).writes == tuple(writes)
    with pytest.raises(launcher.KernelRefusedError, match=r"^qmv: writes x1; its inputs: x0$"):
        launcher.prepare(mx.fast.metal_kernel, "qmv", inputs=["x0"], **given)


def test_too_many_matrices_are_refused_by_name() -> None:
    w = random_weight("Q4_1", (16, 64), 0)
    with pytest.raises(launcher.KernelRefusedError, match=r"^qmv: 33 buffers"):
        run(lambda: qmv_all(mx.zeros((1, 64)), [w] * 8))


X, W, EXPERTS = mx.zeros((2, 64)), random_weight("Q4_0", (16, 64), 0), random_weight("Q4_0", (4, 16, 64), 0)
CHOICE, HIDDEN = mx.zeros((2, 2, 2), mx.uint32), mx.zeros((2, 2 * 64))


MLA = Mla(4, 40, room=0)
LOGITS, BANK = mx.zeros((2, 8)), random_weight("Q4_0", (8, 16, 64), 0)


def gate_up(bias: mx.array | None = None, top_k: int = 4, **change: Any) -> Sequence[mx.array | None]:
    given = {"x": X, "router_logits": LOGITS, "gate": BANK, "up": BANK, "shared_gate": None, "shared_up": None}
    return experts_gate_up(router=Router(bias, top_k, "sigmoid", True, 1.0), **{**given, **change})


def down(**change: Any) -> Sequence[mx.array | None]:
    given = {"hidden": HIDDEN, "choice": CHOICE, "down": EXPERTS, "shared_down": None, "residual": None}
    return [experts_down(**{**given, **change})]


MISFITS: dict[str, Callable[[], Sequence[mx.array | None]]] = {
    "qmv: x of integers": lambda: [qmv(X.astype(mx.int32), W)],
    "qmv: x too narrow": lambda: [qmv(mx.zeros((2, 32)), W)],
    "qmv: matrices of two widths": lambda: qmv_all(X, [W, random_weight("Q4_0", (16, 32), 0)]),
    "experts_gate_up: x of integers": lambda: gate_up(x=X.astype(mx.int32)),
    "experts_gate_up: x too wide": lambda: gate_up(x=mx.zeros((2, 96))),
    "experts_gate_up: logits of fewer tokens than x": lambda: gate_up(router_logits=LOGITS[:1]),
    "experts_gate_up: logits of more experts": lambda: gate_up(router_logits=mx.zeros((2, 9))),
    "experts_gate_up: up with fewer rows than gate": lambda: gate_up(up=random_weight("Q4_0", (8, 15, 64), 0)),
    "experts_gate_up: up with fewer experts than gate": lambda: gate_up(up=random_weight("Q4_0", (7, 16, 64), 0)),
    "experts_gate_up: shared experts of another width": lambda: gate_up(
        shared_gate=random_weight("Q4_0", (16, 32), 0), shared_up=random_weight("Q4_0", (16, 32), 0)
    ),
    "experts_down: hidden of integers": lambda: down(hidden=HIDDEN.astype(mx.int32)),
    "experts_down: hidden too wide": lambda: down(hidden=mx.zeros((2, 2 * 96))),
    "experts_down: hidden of more experts": lambda: down(hidden=mx.zeros((2, 3 * 64))),
    "experts_down: a choice for fewer tokens": lambda: down(choice=CHOICE[:1]),
    "experts_down: a choice without weights": lambda: down(choice=CHOICE[:, :1]),
    "experts_down: residual too narrow": lambda: down(residual=mx.zeros((2, 8))),
    "experts_down: shared rows differ": lambda: down(
        hidden=mx.zeros((2, 3 * 64)), shared_down=random_weight("Q4_0", (17, 64), 0)
    ),
    "experts_gate_up: more experts than there are": lambda: gate_up(top_k=9),
    "experts_gate_up: bias too short": lambda: gate_up(bias=mx.zeros((7,))),
    "expand: to float32": lambda: [expand(W, mx.float32)],
    "expand: experts of a matrix": lambda: [expand(W, mx.bfloat16, mx.zeros(8, mx.uint32))],
    "embed: tokens of another type": lambda: [embed(W, mx.zeros((1, 2), mx.uint32), mx.float32)],
    "mla_decode: v_b of other heads": lambda: mla_decode(*MLA.inputs, MLA.scale, MLA.v_b[:3]),
}


@pytest.mark.parametrize("what", MISFITS)
def test_inputs_that_do_not_fit_are_refused_by_name(what: str) -> None:
    if on_gpu():
        pytest.skip("would read outside a buffer of a real GPU")
    with pytest.raises(ValueError, match=rf"^{what.split(':')[0]}: "):
        run(MISFITS[what])
