"""What kernels read of their weights: traces at GLM-4.7-Flash's real widths, with fewer rows and experts."""

import re
from collections.abc import Iterator
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from kernels import experts_down, experts_gate_up, launcher, mla_decode, qmv
from kernels.planes import QUANT_TYPES, SUPER, Weight, planes
from parity_tests.budgets import BUDGETS, record
from parity_tests.kernel_cases import KINDS, Case, Down, GateUp, HeadQmv, Mla, Qmv, block, on_gpu
from parity_tests.msl import BufferTraffic, LaunchReport, executing

ROWS = 64  # whole threadgroups
GLM = [
    *(Qmv((kind,), (ROWS,), cols, tokens=8) for kind in KINDS for cols in (2048, 5120)),
    *(GateUp(kind, 8, 4, ROWS, 2048, kind, ROWS) for kind in KINDS),
    *(Down(kind, 6, 4, 1536, ROWS, kind, 1536) for kind in KINDS),
    GateUp("Q4_0", 8, 4, ROWS, 2048, "Q5_K", ROWS, tokens=3, dtype=mx.bfloat16),
    Down("Q4_1", 6, 4, 1536, ROWS, "Q6_K", 1536, tokens=3, dtype=mx.bfloat16),
]
WIDE_ROWS = {False: 2 * 576, True: 672}  # bytes of a row of GLM-4.7-Flash's cache, in bfloat16 and in 8 bits
NARROW = [
    *(Qmv((kind,), (ROWS,), 768) for kind in KINDS),  # q_b
    *(Down(kind, 6, 6, 1408, ROWS, kind, 2816) for kind in KINDS if block(kind) != SUPER),  # DeepSeek-V2-Lite
]


@pytest.fixture(autouse=True)
def _on_cpu() -> None:
    if on_gpu():
        pytest.skip("traffic is counted by the executor")


def trace(case: Case) -> LaunchReport:
    with executing() as reports:
        mx.eval([y for y in case.kernel() if y is not None])
    (report,) = reports
    return report


def weights_read(case: Case) -> Iterator[tuple[str, Weight, float, float]]:
    """Name of a weight in the text, itself, how many times it must be read, and the part of it that is used.

    Experts are read once for each token that chose them.
    """
    if isinstance(case, Qmv):
        yield from ((f"w{i}", w, 1.0, 1.0) for i, w in enumerate(case.weights))
        return
    assert isinstance(case, GateUp | Down)
    _, first, second, third, fourth, *_ = case.inputs
    if isinstance(case, GateUp):
        routed, shared = {"gate": first, "up": second}, {"shared_gate": third, "shared_up": fourth}
    else:
        routed, shared = {"down": second}, {"shared_down": third}
    for name, w in routed.items():
        yield name, w, case.tokens * case.top_k / case.experts, len(np.unique(case.chosen)) / case.experts
    for name, w in shared.items():
        yield name, w, case.tokens, 1.0


def straddles(kind: str) -> bool:
    """Whether the loads of neighbouring lanes lie apart.

    Quants of 5 and 6 bits: a lane's 40 or 48 bits are two words, loaded one after the other. F32: 32 bytes are two
    loads of 16. Each such load touches every line of its stretch, and the second finds it in the cache, so the lines
    that a threadgroup fetches are what counts.
    """
    return kind == "F32" or (kind in QUANT_TYPES and QUANT_TYPES[kind].bits in (5, 6))


@pytest.mark.parametrize("case", GLM, ids=str)
def test_weights_are_fetched_once_in_whole_lines(case: Case) -> None:
    report = trace(case)
    lines, least = 0, 0
    for name, w, times, used in weights_read(case):
        kind, _ = launcher.kind(w)
        check_fetched("weights fetched" + ", K-quants" * (block(kind) == SUPER), report, name, w, times, str(case))
        for plane in planes_of(report, name, w):
            assert plane.unique_read == used * plane.size
            if not straddles(kind):
                lines, least = lines + plane.lines, least + plane.least_lines
            if plane.name.endswith("sub_scales"):
                minima = ", with minima" * QUANT_TYPES[kind].has_mins
                check_ratio("lines of groups' scales", plane.lines / plane.least_lines, f"{plane.name} of {case}")
                check_ratio(
                    f"groups' scales asked for{minima}", plane.read / (times * plane.size), f"{plane.name} of {case}"
                )
            else:
                twice = straddles(kind) and plane.name.endswith(("quants", "values"))
                budget = "lines of weights" + " in two loads" * twice
                check_ratio(budget, plane.lines / plane.least_lines, f"{plane.name} of {case}")
    if least:
        check_ratio("lines of weights", lines / least, f"all planes of {case}")


@pytest.mark.parametrize("case", NARROW, ids=str)
def test_rows_of_part_of_a_line_cost_little_more(case: Case) -> None:
    report = trace(case)
    for name, w, times, _ in weights_read(case):
        check_fetched("weights fetched, narrow", report, name, w, times, str(case))
        if not straddles(launcher.kind(w)[0]):
            for plane in planes_of(report, name, w):
                if not plane.name.endswith("sub_scales"):
                    check_ratio("lines of weights, narrow", plane.lines / plane.least_lines, f"{plane.name} of {case}")


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K"])
def test_matrices_of_heads_are_fetched_once(kind: str) -> None:
    """k_b, whose rows of 192 columns end within a line, and v_b, behind the attention's splits."""
    if block(kind) != SUPER:
        absorbing = HeadQmv(kind, 2, 64, 192)
        check_fetched("weights fetched, narrow", trace(absorbing), "w0", absorbing.inputs[1], 1.0, str(absorbing))
    merging = Mla(4, 40, 512, 64, kind=kind, values=256)
    with executing() as reports:
        mx.eval(merging.kernel())
    budget = "weights fetched" + ", K-quants" * (block(kind) == SUPER)
    check_fetched(budget, reports[-1], "v_b", merging.v_b, 1.0, str(merging))


@pytest.mark.parametrize("packed", [False, True], ids=["bfloat16", "8 bits"])
def test_a_group_of_heads_fetches_the_cache_once_as_it_stands(packed: bool) -> None:
    case = Mla(mla_decode.HEADS_AT_ONCE, 1025, 512, 64, dtype=mx.bfloat16, packed=packed)
    with executing() as reports:
        mx.eval(case.kernel())
    cache = reports[0].buffer("cache")
    assert cache.unique_read == 1024 * WIDE_ROWS[packed]
    assert cache.unique_written == WIDE_ROWS[packed]
    check_ratio("cache fetched", cache.fetched / (1025 * WIDE_ROWS[packed]), str(case))


ONCE = [
    (Mla(8, 257, 64, 64, dtype=mx.float16, room=2048), {"MATRIX_THREADGROUPS": 3, "MATRIX_AHEAD": 3}, 3),
    (Mla(4, 7, 64, 64, room=125), {"ROWS_OF_SPLIT": 32}, 4),
    (Mla(4, 6, 128, 64, room=125), {"ROWS_OF_SPLIT": 32, "MAX_SPLITS": 3}, 3),
]


@pytest.mark.parametrize(("case", "shape", "splits"), ONCE, ids=str)
def test_attention_does_nothing_twice(case: Mla, shape: dict[str, int], splits: int) -> None:
    """Where splits are whole turns, also of rows that are asked for ahead: rows are loaded once, new ones made by who
    needs them, and sums loaded once, but by groups of threads that have no split left."""
    mla_decode._launches.cache_clear()
    fixed = {"HEADS_AT_ONCE": 4, "SIMDGROUPS": 4, "ROWS_AT_ONCE": 2, "MERGE_ROWS": 2, "MERGE_SIMDGROUPS": 2}
    with mock.patch.multiple(mla_decode, **fixed, **shape), executing() as reports:
        mx.eval(case.kernel())
    mla_decode._launches.cache_clear()
    attention, merge = reports
    row = (case.latent + case.rope) * case.dtype.size
    assert attention.buffer("cache").read == (case.context - 1) * row
    assert attention.buffer("kv_a").read == row
    merging = case.heads * case.values // 4  # threadgroups, in which four loads meet three splits or four
    assert merge.buffer("partial").read == merging * (4 * case.latent * 4 + 2 * splits * 8)
    if case.dtype == mx.float32:
        handed = splits * 3 * case.heads * (case.latent + 2) * 4
        assert attention.buffer("threadgroup memory").written == handed + row
    else:
        # A turn of 32 rows, of which the last row makes one: products of four tiles with one of latent and one of k_pe,
        # and with the latent again, and the largest, the sum and whether it grew; for the new row, its norm.
        turns = 8 * ((case.context - 1) // 32 + 1)
        assert attention.simdgroup_operations == turns * (4 * 3 + 3) + 1


def planes_of(report: LaunchReport, name: str, w: Weight) -> list[BufferTraffic]:
    buffers = [b for b in report.buffers if re.fullmatch(rf"{name}_(quants|scales|mins|sub_scales|values)", b.name)]
    assert [buffer.size for buffer in buffers] == [plane.nbytes for plane in planes(w)]
    return buffers


def check_fetched(budget: str, report: LaunchReport, name: str, w: Weight, times: float, where: str) -> None:
    planes = planes_of(report, name, w)
    least = times * sum(plane.size for plane in planes)
    check_ratio(budget, sum(plane.fetched for plane in planes) / least, f"{name} of {where}")


def check_ratio(budget: str, ratio: float, where: str) -> None:
    record(budget, ratio, where)
    assert ratio <= BUDGETS[budget].most, f"{where}: {ratio:.3f} x the least, {BUDGETS[budget].most:g} at most"


# Rows that no launch shape divides, in types whose chunks are whole loads.
RAGGED: list[Qmv | GateUp | Down] = [
    Qmv(("Q4_0", "Q8_0"), (33, 5), 1024),
    Qmv(("F16", "Q4_0"), (9, 21), 96, tokens=2),
    GateUp("Q4_0", 8, 2, 9, 288, "Q8_0", 5, tokens=2),
    GateUp("Q4_0", 8, 2, 10, 288, "Q8_0", 16),
    GateUp("Q8_0", 8, 3, 12, 96, "F16", 17),
    Down("Q4_0", 5, 3, 288, 9, "Q8_0", 576, tokens=2),
]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_every_quant_is_loaded_once(case: Qmv | GateUp | Down) -> None:
    """But for rows that fill up the last simdgroup's share."""
    report = trace(case)
    for name, w, times, _ in weights_read(case):
        quants = planes_of(report, name, w)[0]
        if isinstance(case, Down):
            share = experts_down.ROWS
        elif isinstance(case, GateUp):
            share = experts_gate_up.ROWS
        else:
            share = qmv.ROWS * (1 if case.cols >= 512 else 4)  # eight lanes share a short row
        rows = w.shape[-2]
        assert quants.read <= times * quants.size * -(-rows // share) * share / rows, f"{name} of {case}"


def test_gate_and_up_share_one_reading_of_x() -> None:
    case = GateUp("Q4_0", 8, 2, ROWS, 2048, tokens=2)
    assert trace(case).buffer("x").read <= 2 * 2 * ROWS * 2048 * 4
