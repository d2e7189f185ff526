"""The benchmark of the ops does what it says: it counts touched bytes, launches wait, wrong results are not timed."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import glm_mlx.model
from bench import gpu_time, op_cases, op_timing, search
from glm_mlx.load import load_model
from glm_mlx.model import decode_bytes
from glm_mlx.small import SMALL_MODEL
from kernels import launcher
from kernels.planes import QuantizedTensor, Weight
from kernels.qmv import Norm
from kernels.route import Router, experts_of
from kernels.small_experts import SmallExperts
from parity_tests.msl import executing

# import-linter keeps tests and benchmarks from importing one another.
SIZES = replace(op_cases.CPU, num_experts=6, layers=2, vocab_size=512, rotating_bytes=1 << 20, contexts=(64,))


def cases(op: str, quant: str = "Q4_0", dtype: mx.Dtype = mx.float32) -> list[Any]:
    return list(op_cases.OPS[op](quant, dtype, SIZES))


def planes(weight: Weight) -> Sequence[mx.array]:
    return weight.planes if isinstance(weight, QuantizedTensor) else (weight,)


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K", "Q6_K", "F16"])
@pytest.mark.parametrize("op", ["experts_gate_up", "experts_down"])
def test_expert_bytes_are_those_of_the_rows_that_were_chosen(
    op: str, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spy in the place of the op sums the planes of the experts that it is given, one by one."""
    seen: list[int] = []

    def spy(*args: Any) -> Any:
        ids = [a for a in args if isinstance(a, mx.array) and a.dtype == mx.uint32]
        if ids:
            experts = ids[0][:, 0]
        else:
            logits = next(a for a in args if isinstance(a, mx.array) and a.shape == (1, SIZES.num_experts))
            experts = mx.argsort(-logits, axis=-1)[:, : op_cases.TOP_K]
        args = tuple(a for a in args if not isinstance(a, Router))
        weights = [a for a in args if isinstance(a, QuantizedTensor) or (isinstance(a, mx.array) and a.ndim > 2)]
        banks = [w for w in weights if w.shape[0] == SIZES.num_experts]
        shared = [w for w in args if w is not None and len(w.shape) == 2 and min(w.shape) > 8]
        chosen = {int(e) for e in np.asarray(experts).reshape(-1)}
        rows = [p[e] for bank in banks for p in planes(bank) for e in chosen]
        seen.append(sum(r.nbytes for r in rows) + sum(p.nbytes for w in shared for p in planes(w)))
        return mx.zeros((1, 1)) if op == "experts_down" else (mx.zeros((1, 1)), experts)

    monkeypatch.setattr(op_cases, op, spy)
    (case,) = cases(op, quant)
    twin = case.contestants["twin"]
    for i in range(case.sets):
        twin.run(case.x, i)
    assert len(seen) == 64
    assert twin.nbytes == sum(seen) / len(seen)


@pytest.mark.parametrize("op", ["qmv", "heads", "router"])
def test_matrix_bytes_are_those_of_the_planes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(x: mx.array, weights: Any, *fused: Any) -> list[mx.array]:
        of_one = [weights] if isinstance(weights, QuantizedTensor | mx.array) else weights
        seen.append(sum(p.nbytes for w in of_one for p in planes(w)))
        return [mx.zeros((1, 1))]

    for name in ("qmv", "qmv_all", "absorb", "merge_heads"):
        monkeypatch.setattr(op_cases, name, spy)
    found = cases(op)
    assert len(found) == {"qmv": 6, "heads": 2, "router": 1}[op]
    for case in found:
        seen.clear()
        case.contestants["twin"].run(case.x, 0)
        assert case.contestants["twin"].nbytes == sum(seen)


@pytest.mark.parametrize("quant", ["Q4_0", "Q4_K", "F16"])
def test_embed_reads_one_row_and_every_row_once_in_turn(quant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of real tables; the whole vocabulary's ids, which are there for the launches to take from, are not counted."""
    read: list[tuple[int, int, int]] = []  # table, token, bytes

    def spy(w: Weight, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
        read.append((id(w), tokens.item(), sum(p[tokens[0]].nbytes for p in planes(w))))
        return mx.zeros((1, 1, 1))

    (case,) = cases("embed", quant)
    rows: list[Any] = []
    op_timing.measure(case, op_timing.Link(case.x.dtype, case.x.size), 0, rows)
    monkeypatch.setattr(op_cases, "embed", spy)
    for i in range(case.sets):
        case.contestants["twin"].run(case.x, i)
    assert len({(table, token) for table, token, _ in read}) == case.sets
    assert {token for _, token, _ in read} == set(range(SIZES.vocab_size))
    assert {nbytes for _, _, nbytes in read} == {case.contestants["twin"].nbytes}
    assert rows[0].nbytes == read[0][2] + 4 + 4 * op_cases.CFG.hidden_size


def test_a_cache_in_8_bits_is_counted_at_672_bytes_a_row_and_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[mx.Dtype, int, int]] = []

    def spy(*args: Any) -> Any:
        cache, v_b = args[5], args[8]
        seen.append((cache.dtype, cache.nbytes, sum(p.nbytes for p in planes(v_b))))
        return [mx.zeros((1, 1))]

    monkeypatch.setattr(op_cases, "mla_decode", spy)
    contexts = (64, 33)
    found = list(op_cases.OPS["mla_decode"]("Q4_0", mx.bfloat16, replace(SIZES, contexts=contexts)))
    for case in found:
        case.contestants["twin"].run(case.x, 0)
    assert [(dtype, nbytes) for dtype, nbytes, _ in seen] == [
        *[(mx.bfloat16, 1152 * context) for context in contexts],
        *[(mx.uint8, 672 * context) for context in contexts],
    ]
    assert [case.contestants["twin"].nbytes for case in found] == [nbytes + v_b for _, nbytes, v_b in seen]
    assert [(case.what, case.quant, "mlx" in case.contestants) for case in found] == [
        (f"{context} rows of 576, 20 heads", kind, kind == "-") for kind in ("-", "8 bits") for context in contexts
    ]


@pytest.mark.parametrize("op", ["embed", "qmv", "heads", "mla_decode"])
def test_sets_are_more_than_a_cache_holds(op: str) -> None:
    for case in cases(op):
        assert case.sets >= 2
        assert case.sets * case.contestants["twin"].nbytes >= SIZES.rotating_bytes


@pytest.mark.parametrize("op", op_cases.OPS)
@pytest.mark.parametrize("quant", ["Q4_0", "Q5_1", "Q4_K"])
def test_contestants_compute_the_same(op: str, quant: str) -> None:
    """MLX's own operations are set up right: on a CPU in float32 they give what the twin gives."""
    rows: list[Any] = []
    for case in cases(op, quant):
        op_timing.measure(case, op_timing.Link(case.x.dtype, case.x.size), 0, rows)
    assert {row.by for row in rows} >= ({"twin"} if op == "router" else {"twin", "mlx"})
    for row in rows:
        assert row.problem is None
        assert row.error < 1e-5
        assert row.nbytes > row.case.contestants[row.by].nbytes > 0


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, list[Any]]]]:
    """A function that measures an op at small shapes, its kernel run by the executor: rows by the case's type."""
    small = {"hidden_size": 64, "num_heads": 2, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 32}
    monkeypatch.setattr(op_cases, "CFG", replace(op_cases.CFG, **small))
    monkeypatch.setattr(op_timing, "LAUNCHES", (2, 2))
    sizes = replace(SIZES, vocab_size=40, rotating_bytes=1 << 12, contexts=(33,))

    def measured(op: str) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {}
        search.clear_launches()
        with executing():
            for case in op_cases.OPS[op]("Q4_0", mx.bfloat16, sizes):
                link = op_timing.Link(case.x.dtype, case.x.size)
                op_timing.measure(case, link, 1, rows.setdefault(case.quant, []))
        return rows

    yield measured
    search.clear_launches()


@pytest.mark.parametrize(
    ("op", "right", "wrong", "types"),
    [
        ("embed", "tokens[token]", "tokens[token] + 1", {"Q4_0": True}),
        ("mla_decode", "field<8, 0, 128>", "field<8, 0, 127>", {"-": False, "8 bits": True}),
    ],
    ids=["embed", "mla_decode"],
)
def test_kernels_are_timed_beside_their_twins_and_faulty_ones_are_not(
    op: str, right: str, wrong: str, types: dict[str, bool], executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """types: of the cases, and whether the fault is in what they run."""
    for rows in executed(op).values():
        assert {row.by for row in rows} >= {"twin", "kernel"}
        assert [(row.problem, len(row.chain)) for row in rows] == [(None, 1)] * len(rows)
        assert all(row.error > 0 for row in rows)  # against float32
    text = launcher._text
    monkeypatch.setattr(launcher, "_text", lambda name: text(name).replace(right, wrong))
    found = executed(op)
    assert {kind: any(row.problem for row in rows) for kind, rows in found.items()} == types
    for row in [row for rows in found.values() for row in rows if row.problem]:
        assert (row.by, row.problem[:20], row.chain) == ("kernel", "wrong result, off by", [])


@pytest.mark.parametrize("op", ["embed", "qmv", "heads", "experts_gate_up", "experts_down", "mla_decode"])
def test_a_device_with_kernels_measures_them_beside_their_twins(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    avoided: list[bool] = []
    monkeypatch.setattr(launcher, "back_end", lambda op: None if op in launcher._avoided else mx.fast.metal_kernel)

    def spy(*args: Any) -> Any:
        avoided.append(all(launcher.back_end(name) is None for name in launcher.OPS))
        return [mx.zeros((1, 1))] * 2

    for name in ("qmv", "qmv_all", "absorb", "merge_heads", "experts_gate_up", "experts_down", "mla_decode", "embed"):
        monkeypatch.setattr(op_cases, name, spy)
    case = cases(op)[0]
    assert list(case.contestants)[:2] == ["twin", "kernel"]
    for name in ("twin", "kernel", "twin"):
        case.contestants[name].run(case.x, 0)
    assert avoided == [True, False, True]
    assert case.contestants["twin"].nbytes == case.contestants["kernel"].nbytes


@pytest.mark.parametrize("op", ["qmv", "heads", "experts_gate_up", "experts_down", "mla_decode"])
def test_a_launch_gets_its_weights_in_one_array_as_in_the_model(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "back_end", lambda op: None if op in launcher._avoided else mx.fast.metal_kernel)
    for case in op_cases.OPS[op]("Q4_0", mx.float32, replace(SIZES, num_experts=8)):
        with launcher.recording() as seen:
            case.contestants["kernel"].run(case.x, 0)
        assert seen
        assert all(len(arrays) == len(launch.inputs) + 1 for launch, arrays in seen)


@pytest.mark.parametrize("quant", ["Q6_K", "IQ4_NL", "F16"])
def test_types_that_mlx_has_no_operation_for_have_no_such_contestant(quant: str) -> None:
    assert [list(case.contestants) for op in ("experts_down", "heads") for case in cases(op, quant)] == [
        ["twin"] for op in ("experts_down", "heads") for _ in cases(op, quant)
    ]


def small_case(runs: dict[str, Callable[[mx.array, int], Sequence[mx.array]]], sets: int = 3) -> Any:
    ways = {name: op_cases.Contestant(run, 100) for name, run in runs.items()}
    return op_cases.Case("op", "small", "-", mx.ones((1, 4)), sets, 1.0, ways, 7)


def test_each_launch_takes_its_activations_from_the_result_before() -> None:
    seen: list[tuple[int, mx.array, mx.array]] = []

    def run(x: mx.array, i: int) -> list[mx.array]:
        y = 0.5 * x + i
        seen.append((i, x, y))
        return [y]

    link = op_timing.Link(mx.float32, 4)
    timer = op_timing.Timer(small_case({"twin": run}), op_cases.Contestant(run, 0), link, None)
    timer.chain(5)
    assert [i for i, _, _ in seen] == [1, 2, 0, 1, 2]  # the sets rotate
    for (_, _, before), (_, x, _) in itertools.pairwise(seen):
        first = float(mx.tanh(before.reshape(-1)[0]))
        assert np.allclose(np.asarray(x)[0], np.cumsum([first, *np.asarray(link.steps)[1:]]), atol=1e-6)


def test_activations_of_a_chain_stay_as_they_are() -> None:
    link = op_timing.Link(mx.bfloat16, 4096)
    values = link.steps
    for _ in range(200):
        values = link.next(3e4 * values)
    got = np.asarray(values.astype(mx.float32))
    assert got.std() == pytest.approx(1, abs=0.1)
    assert abs(got.mean()) < 1.5


VIEWS = ("Slice", "Reshape", "View")  # operations that launch nothing


def operations(y: mx.array) -> Counter[str]:
    """How many of each make y."""
    graph = io.StringIO()
    mx.export_to_dot(graph, y)
    return Counter(re.findall(r'label ="(\w+)', graph.getvalue()))


def test_the_token_of_a_launch_waits_for_the_one_before_and_costs_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a result and the next token are the link's operations, and views of what they compute."""
    tokens: list[mx.array] = []
    made: list[Counter[str]] = []

    def spy(w: Weight, token: mx.array, dtype: mx.Dtype) -> mx.array:
        tokens.append(token)
        made.append(operations(token))
        return result()

    zeros = mx.zeros((1, 1, 8), mx.bfloat16)
    mx.eval(zeros)

    def result() -> mx.array:
        return mx.exp(zeros)

    monkeypatch.setattr(op_cases, "embed", spy)
    (case,) = cases("embed", dtype=mx.bfloat16)
    link = op_timing.Link(case.x.dtype, 1024)
    op_timing.Timer(case, case.contestants["twin"], link, None).chain(4)
    for i in range(1, 5):
        case.contestants["twin"].run(case.x, i)
    assert [t.item() for t in tokens[:4]] == [t.item() for t in tokens[4:]]
    of_link, alone = operations(link.next(result())), operations(link.next(link.steps))
    assert made[1] >= of_link >= alone
    assert "Exp" in of_link - alone
    assert set(made[1] - alone) <= {"Exp", *VIEWS}


def test_tokens_of_a_chain_stay_as_they_are() -> None:
    link = op_timing.Link(mx.int32, 1000)
    values = link.steps
    for dtype, number in ((mx.bfloat16, mx.nan), (mx.float32, -mx.inf), (mx.float16, -1.5)):
        assert link.next(mx.full((1, 1, 2), number, dtype)).tolist() == list(range(1000))
    for _ in range(200):
        values = link.next(values + 7)
    assert values.tolist() == list(range(1000))


def test_a_wrong_result_is_not_timed() -> None:
    case = small_case(
        {"twin": lambda x, i: [2 * x], "kernel": lambda x, i: [1.8 * x], "mlx": lambda x, i: [mx.array([[mx.nan] * 4])]}
    )
    rows: list[Any] = []
    op_timing.measure(case, op_timing.Link(mx.float32, 4), 2, rows)
    assert [(row.by, len(row.chain), row.problem) for row in rows] == [
        ("twin", 2, None),
        ("kernel", 0, "wrong result, off by 0.1"),
        ("mlx", 0, "wrong result, off by nan"),
    ]
    assert rows[0].nbytes == 100 + 7 + 16 + 16


def test_a_contestant_that_fails_is_a_row_that_says_why() -> None:
    def fail(x: mx.array, i: int) -> list[mx.array]:
        raise ValueError("no such\n  operation")

    rows: list[Any] = []
    op_timing.measure(small_case({"twin": lambda x, i: [x], "mlx": fail}), op_timing.Link(mx.float32, 4), 1, rows)
    assert [row.problem for row in rows] == [None, "fails: no such operation"]


def test_contestants_take_turns_in_either_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sample = op_timing.Timer.sample

    def spy(timer: Any) -> None:
        order.append(timer.row.by)
        sample(timer)

    monkeypatch.setattr(op_timing.Timer, "sample", spy)
    case = small_case({"twin": lambda x, i: [2 * x], "kernel": lambda x, i: [2 * x]})
    op_timing.measure(case, op_timing.Link(mx.float32, 4), 3, [])
    assert order == ["twin", "kernel", "kernel", "twin", "twin", "kernel"]


def test_the_gpu_time_of_a_kernel_is_that_of_its_own_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"kernel": ["mlx::core::cu::custom_kernel_qmv_1", "copy"], "twin": ["gemv", "copy"]}

    def seconds(by: str) -> float:
        timer = op_timing.Timer(
            small_case({}),
            op_cases.Contestant(lambda x, i: [x], 0),
            op_timing.Link(mx.float32, 4),
            op_timing.Row(None, by),
        )
        timer.row.launches = 2
        kernels = [gpu_time.Kernel(name, 0.0, time) for name, time in zip(names[by], (4.0, 3.0), strict=True)]
        monkeypatch.setattr(gpu_time, "record", lambda work: gpu_time.Timeline(kernels, 1))
        monkeypatch.setattr(gpu_time, "busy_seconds", lambda work: 2.0)
        timer.sample_gpu()
        return timer.row.gpu[0]

    assert seconds("kernel") == 2.0
    assert seconds("twin") == 2.5


def test_the_links_time_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    timer = op_timing.Timer(
        small_case({}), op_cases.Contestant(lambda x, i: [x], 0), op_timing.Link(mx.float32, 4), op_timing.Row(None, "")
    )
    timer.row.launches = 10
    monkeypatch.setattr(timer.link, "chain", lambda n: 2.0)
    monkeypatch.setattr(timer, "chain", lambda n: 5.0)
    monkeypatch.setattr(timer, "independent", lambda n: 4.0)
    timer.sample()
    row = timer.row
    assert (row.chain, row.link, row.independent) == ([0.3], [0.2], [0.4])


def test_bytes_of_a_token_are_those_that_a_decode_step_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that the model calls is watched for the weights and the cache that it is given."""
    loaded = load_model(SMALL_MODEL)
    names = {id(weight): name for name, weight in loaded.weights.items()}
    touched: dict[str, int] = {}
    rows_read: list[int] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            flat = [item for a in (*args, *kwargs.values()) for item in (a if isinstance(a, list | tuple) else [a])]
            flat += [item.weight for item in flat if isinstance(item, Norm)]
            flat += [item.bias for item in flat if isinstance(item, Router)]
            flat += [weight for item in flat if isinstance(item, SmallExperts) for weight in item.weights]
            ids = [a for a in flat if isinstance(a, mx.array) and a.dtype in (mx.uint32, mx.int32)]
            ids += [router(args[1])[0] for router in flat if isinstance(router, Router)]
            ids = [experts_of(a) if a.ndim == 4 else a for a in ids]
            for weight in flat:
                name = names.get(id(weight))
                if name is None:
                    continue
                parts = [p.nbytes for p in planes(weight)]
                if ".experts." in name or name == "embed_tokens":  # the rows that the ids choose
                    used = len(np.unique(np.asarray(ids[0])))
                    parts = [p[0].nbytes * used for p in planes(weight)]
                touched[name] = sum(parts)
            if function.__name__.startswith("attend"):
                rows_read.append(args[2].nbytes)
            return function(*args, **kwargs)

        return call

    for name, value in vars(glm_mlx.model).items():
        of_kernels = callable(value) and getattr(value, "__module__", "").startswith("kernels.")
        of_kernels = of_kernels and value.__module__ != "kernels.prefill"
        if of_kernels and value not in (Norm, Router):
            monkeypatch.setattr(glm_mlx.model, name, watched(value))
    normed = watched(Norm.__call__)
    monkeypatch.setattr(Norm, "__call__", lambda norm, x: normed(norm, x))
    model, cache = loaded.model, loaded.model.new_cache()
    mx.eval(model.hidden_states(mx.array([[5, 6, 7]]), cache))
    touched.clear()
    rows_read.clear()
    mx.eval(model.logits(model.hidden_states(mx.array([[8]], mx.int32), cache)))
    fixed, per_row = decode_bytes(loaded.config, loaded.weights, model.row_format)
    assert sorted(set(loaded.weights) - set(touched)) == []
    assert sum(touched.values()) == fixed
    assert sum(rows_read) == 4 * per_row
