"""Launch shapes: the tables that say which, and the search that finds them."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench import ab, conditions, op_cases, op_timing, script, tune
from bench import search as search_module
from bench.sides import Side
from glm_mlx.errors import InputError
from kernels import experts_down, launcher, shapes
from kernels.planes import QUANT_TYPES
from parity_tests.kernel_cases import Case, Down, GateUp, HeadQmv, Mla, Qmv, verify
from parity_tests.msl import executing

CHIP, FAMILY = "Test chip 7", "Test chips"
DOWN = "Q4_0 64x256 + Q4_0 64x256"
KEY = ("experts_down", DOWN)


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device with a name, no tables, and launches that are prepared anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(shapes, "device", lambda: (CHIP, FAMILY))
    forget()
    yield
    forget()


def forget() -> None:
    shapes._tables.cache_clear()
    shapes._from_tables.cache_clear()
    search_module.clear_launches()


def asked(op: str = "experts_down", what: str = "Q4_0 8x32", tokens: int = 1) -> tuple[int, ...]:
    return shapes.launch_shape(op, what, tokens, ROWS=4, DEPTH=8)


def entry(values: Any, where: str = CHIP, op: str = "experts_down", what: str = "Q4_0 8x32") -> Any:
    return {where: {op: {what: values}}}


# --- tables


def test_without_a_table_the_constants_hold() -> None:
    assert asked() == (4, 8)


@pytest.mark.parametrize(
    ("users", "shipped", "got"),
    [
        ({}, entry({"ROWS": 2}), (2, 8)),
        ({}, entry({"ROWS": 2}, FAMILY), (2, 8)),
        (entry({"DEPTH": 3}), entry({"ROWS": 2}), (4, 3)),
        (entry({"DEPTH": 3}, FAMILY), entry({"ROWS": 2}), (4, 3)),
        (entry({"DEPTH": 3}, FAMILY) | entry({"ROWS": 1}), {}, (1, 8)),
        (entry({"ROWS": 1}, "Another chip"), {}, (4, 8)),
        (entry({"ROWS": 1}, op="qmv"), {}, (4, 8)),
        (entry({"ROWS": 1}, what="Q4_0 8x64"), {}, (4, 8)),
        (entry({"ROWS": 1}, what="Q8_0 8x32"), {}, (4, 8)),
    ],
)
def test_the_users_table_goes_first_and_a_device_before_its_family(users: Any, shipped: Any, got: Any) -> None:
    shapes.write(shapes.user_file(), users)
    shapes.write(shapes.SHIPPED, shipped)
    assert asked() == got


def test_more_tokens_than_one_take_the_constants() -> None:
    shapes.write(shapes.user_file(), entry({"ROWS": 2}))
    assert [asked(tokens=n) for n in (1, 2, 8)] == [(2, 8), (4, 8), (4, 8)]


def test_an_entry_for_another_text_of_the_kernel_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    shapes.write(shapes.user_file(), entry({"ROWS": 2, "text": shapes.text_digest("experts_down")}))
    assert asked() == (2, 8)
    assert capsys.readouterr().err == ""
    shapes.write(shapes.user_file(), entry({"ROWS": 2, "text": shapes.text_digest("qmv")}))
    forget()
    for _ in range(2):
        assert asked() == (4, 8)
    error = capsys.readouterr().err
    assert "found for another text of the kernel and not used; python bench/tune.py finds it anew" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("op", "texts"),
    [
        ("qmv", {"qmv.metal", "qmv.h.metal", "quants.h.metal"}),
        (
            "mla_decode",
            {
                "mla_decode.metal",
                "mla_decode.h.metal",
                "mla_matrix.metal",
                "mla_matrix.h.metal",
                "mla_merge.metal",
                "quants.h.metal",
            },
        ),
    ],
)
def test_the_text_of_an_op_is_all_that_it_launches(
    op: str, texts: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in launcher.HERE.glob("*.metal"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(shapes, "HERE", tmp_path)
    before = shapes.text_digest(op)
    changed = set()
    for path in tmp_path.glob("*.metal"):
        text = path.read_text()
        path.write_text(text + " ")
        changed |= {path.name} if shapes.text_digest(op) != before else set()
        path.write_text(text)
    assert changed == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "(no JSON)"),
        ("[" * 10**5, "(no JSON)"),
        (b"\xff\x00", "(no JSON)"),
        ([1], "(the table is [1], no object of names and values)"),
        ({CHIP: 3}, "(Test chip 7 is 3, no object"),
        ({CHIP: {"qmv": None}}, "(Test chip 7, qmv is None, no object"),
        (entry([4]), "(Test chip 7, experts_down, Q4_0 8x32 is [4], no object"),
        (entry({"ROWS": 0}), "(Test chip 7, experts_down, Q4_0 8x32: ROWS is 0, not a whole number to 1024)"),
        (entry({"ROWS": -1}), "ROWS is -1,"),
        (entry({"ROWS": 1025}), "ROWS is 1025,"),
        (entry({"ROWS": 2.0}), "ROWS is 2.0,"),
        (entry({"ROWS": True}), "ROWS is True,"),
        (entry({"ROWS": "2"}), "ROWS is '2',"),
        (entry({"text": 2}), "text is 2,"),
    ],
    ids=range(14),
)
def test_a_malformed_table_is_one_line_and_the_constants(
    content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shapes.user_file()
    file.parent.mkdir(parents=True)
    raw = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else None
    file.write_bytes(json.dumps(content).encode() if raw is None else raw)
    shapes.write(shapes.SHIPPED, entry({"DEPTH": 3}, what="Q4_0 8x64"))
    for _ in range(2):
        assert asked() == (4, 8)
        assert asked(what="Q4_0 8x64") == (4, 3), "the other table holds"
    error = capsys.readouterr().err
    assert error.startswith(f"note: cannot use the launch shapes of {file} (")
    assert message in error
    assert error.endswith("; mend or remove it\n")
    assert error.count("\n") == 1


def test_a_table_of_another_folder_is_one_line_and_the_constants(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A link within the cache folder may lead to what another user writes."""
    shapes.write(tmp_path / "elsewhere", entry({"ROWS": 2}))
    shapes.user_file().parent.mkdir(parents=True)
    shapes.user_file().symlink_to(tmp_path / "elsewhere")
    assert asked() == (4, 8)
    error = capsys.readouterr().err
    assert error.startswith(f"note: cannot use the launch shapes of {shapes.user_file()} (")
    assert error.count("\n") == 1


def test_a_cache_folder_that_is_not_used_needs_no_line_without_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    shapes.user_file().parent.mkdir(parents=True)
    shapes.user_file().parent.chmod(0o777)
    assert asked() == (4, 8)
    assert capsys.readouterr().err == ""


def test_a_name_that_the_op_does_not_have_is_one_line_and_the_constants(capsys: pytest.CaptureFixture[str]) -> None:
    shapes.write(shapes.user_file(), entry({"ROWS": 2, "ROW": 3}))
    for _ in range(2):
        assert asked() == (4, 8)
    error = capsys.readouterr().err
    assert "not used, as the op has ROWS, DEPTH and no ROW" in error
    assert error.count("\n") == 1


def test_a_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(shapes, "read", lambda path: reads.append(path) or {})
    for what in ("a", "b", "a"):
        asked(what=what)
    assert reads == [shapes.user_file(), shapes.SHIPPED]


def test_what_is_tried_holds_instead_of_a_table_and_is_told() -> None:
    shapes.write(shapes.user_file(), entry({"ROWS": 2}))
    with shapes.asking() as seen:
        asked()
        with shapes.trying({("experts_down", "Q4_0 8x32"): {"DEPTH": 5}}):
            assert asked() == (4, 5)
            assert asked(what="other") == (4, 8)
            assert asked(tokens=2) == (4, 8)
        with shapes.trying({}):
            assert asked() == (4, 8)
        assert asked() == (2, 8)
    assert [(a.op, a.what, dict(a.values)) for a in seen][:2] == [
        ("experts_down", "Q4_0 8x32", {"ROWS": 2, "DEPTH": 8}),
        ("experts_down", "Q4_0 8x32", {"ROWS": 4, "DEPTH": 5}),
    ]
    assert len(seen) == 5


def test_a_table_is_a_line_for_each_entry(tmp_path: Path) -> None:
    table = shapes.with_entry(entry({"ROWS": 2}), CHIP, "experts_down", "Q8_0 1x2", {"DEPTH": 1, "text": "ab"})
    table = shapes.with_entry(table, CHIP, "experts_down", "Q4_0 8x32", {"ROWS": 4})
    shapes.write(tmp_path / "new" / "table.json", table)
    text = (tmp_path / "new" / "table.json").read_text()
    assert text.splitlines()[3:5] == ['   "Q4_0 8x32": {"ROWS": 4},', '   "Q8_0 1x2": {"DEPTH": 1, "text": "ab"}']
    assert shapes.read(tmp_path / "new" / "table.json") == table
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.json"]


def test_every_shipped_shape_is_one_that_a_launch_of_the_real_widths_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no launch has, or a parameter that its op has not, would be passed over without a word."""
    shipped = launcher.HERE / "shapes.json"
    monkeypatch.setattr(shapes, "SHIPPED", shipped)
    sizes = replace(op_cases.GPU, num_experts=8, layers=1, rotating_bytes=1, contexts=(256,))
    for name, ops in shapes.read(shipped).items():
        monkeypatch.setattr(shapes, "device", lambda name=name: (name, "a family"))
        for op, entries in ops.items():
            search_module.clear_launches()
            shapes._from_tables.cache_clear()
            shapes._tables.cache_clear()
            quants = [quant for quant in QUANT_TYPES if any(quant in what for what in entries)] or ["Q4_0"]
            makers = [op_cases.OPS[op], *[op_cases.router_cases] * (op == "qmv")]
            with launcher.recording() as launches, shapes.asking() as asked:
                for maker, quant in product(makers, quants):
                    for case in maker(quant, mx.bfloat16, sizes):
                        case.contestants["kernel"].run(case.x, 0)
            assert launches
            got = {a.what: a.values for a in asked if a.op == op}
            for what, entry in entries.items():
                assert entry.items() <= got[what].items()
    search_module.clear_launches()


def test_names_of_what_a_launch_works_on() -> None:
    assert (
        shapes.matrix_names([("Q4_0", (64, 2048, 1536)), ("Q8_0", (2048, 1536))]) == "Q4_0 2048x1536 + Q8_0 2048x1536"
    )
    assert shapes.matrix_names([("Q8_0", (512, 192))], heads=20) == "20 heads, Q8_0 512x192"


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"device_name": "Apple M3 Max", "architecture": "applegpu_g15s"}, ("Apple M3 Max", "Apple M3")),
        ({"device_name": "Apple M12", "architecture": "x"}, ("Apple M12", "Apple M12")),
        ({"device_name": "NVIDIA H200", "architecture": "sm_90"}, ("NVIDIA H200", "NVIDIA sm_90")),
    ],
)
def test_families_of_devices(info: Any, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert shapes.device() is None or mx.default_device() == mx.Device(mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert shapes.device() == found


def down_launch() -> launcher.Launch:
    with launcher.recording() as seen:
        Down("Q4_0", width=256, cols=64, shared="Q4_0", shared_width=256).kernel()
    return seen[0][0]


def test_a_launch_takes_its_shape_from_the_table_and_computes_the_same() -> None:
    shapes.write(shapes.user_file(), entry({"ROWS": 2, "MAX_SIMDGROUPS": 3}, what=DOWN))
    template = dict(down_launch().template)
    assert (template["ROWS"], template["SIMDGROUPS"]) == (2, 3)
    assert down_launch().threadgroup == (96, 1, 1)


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"MAX_SIMDGROUPS": 8, "ROWS": 1024}, None),
        ({"MAX_SIMDGROUPS": 9, "ROWS": 1024}, r"36864 bytes of threadgroup memory; 32768 at most"),
        ({"MAX_SIMDGROUPS": 33, "ROWS": 1}, r"1056 threads in a threadgroup; 32 to 1024 are possible"),
    ],
    ids=str,
)
def test_a_shape_that_no_device_could_run_is_refused_before_it_is_launched(values: Any, why: str | None) -> None:
    shapes.write(shapes.user_file(), entry(values, what="Q4_0 64x256"))
    case = Down("Q4_0", experts=40, top_k=34, width=256, cols=64)
    with launcher.recording() as seen:
        if why is None:
            case.kernel()
        else:
            with pytest.raises(launcher.KernelRefusedError, match=f"^experts_down: {why}"):
                case.kernel()
    assert len(seen) == (why is None)


CASES: tuple[Case, ...] = (
    Qmv(("Q4_0", "Q6_K"), (70, 19), 1280, True),
    HeadQmv("Q8_0", 3, 35, 192),
    GateUp("Q4_0", 8, 4, 45, 768, "Q5_K", 45),
    Down("Q4_0", 6, 4, 768, 35, "Q6_K", 768),
    Mla(9, 700),
)


@pytest.mark.parametrize("extreme", [min, max])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_what_is_tried_computes_the_same(case: Case, extreme: Callable[[tuple[int, ...]], int]) -> None:
    """Or is refused. A race between threads, or what lies outside a buffer, need not show in a result on a GPU."""
    with launcher.recording(), shapes.asking() as asked:
        case.kernel()
    search_module.clear_launches()
    for a in asked:
        assert a.values.keys() <= search_module.VALUES.keys()
    tried = {(a.op, a.what): {name: extreme(search_module.VALUES[name]) for name in a.values} for a in asked}
    with shapes.trying(tried), suppress(launcher.KernelRefusedError):
        verify(case)


# --- the search


Cost = Callable[[Mapping[str, int]], float]


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Iterator[op_cases.Case]:
    """experts_down on small matrices, its kernel run by the executor."""
    small = replace(op_cases.CFG, hidden_size=64, moe_intermediate_size=256)
    monkeypatch.setattr(op_cases, "CFG", small)
    sizes = replace(op_cases.CPU, num_experts=6, layers=2, rotating_bytes=1 << 12)
    monkeypatch.setattr(op_cases, "GPU", sizes)
    monkeypatch.setattr(search_module, "VALUES", {"ROWS": (1, 2, 4), "DEPTH": (1, 8), "MAX_SIMDGROUPS": (2, 8)})
    monkeypatch.setattr(tune, "activation_dtype", lambda: mx.float32)
    with executing():
        (made,) = op_cases.OPS["experts_down"]("Q4_0", mx.float32, sizes)
        yield made


def timed_as(cost: Cost, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Each shape takes so long, to 0.1 %. The list gets what is timed together."""
    timed: list[list[str]] = []

    def measure(case: op_cases.Case, link: Any, rounds: int, rows: list[op_timing.Row]) -> None:
        timed.append(list(case.contestants))
        for i, name in enumerate(case.contestants):
            seconds = cost({part.split()[0]: int(part.split()[1]) for part in name.replace(";", ",").split(", ")})
            noise = mx.random.normal((rounds,), key=mx.random.key(1000 * len(timed) + i)).tolist()
            rows.append(op_timing.Row(case, name, chain=[seconds * (1 + 1e-3 * n) for n in noise]))

    monkeypatch.setattr(search_module, "measure", measure)
    return timed


def search(case: op_cases.Case) -> search_module.Found:
    return search_module.Search(case, op_timing.Link(case.x.dtype, case.x.size), 10, 0.01).run()


def test_the_fastest_shape_is_found_and_measured_once_more(
    case: op_cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that differ: a row is one turn of its lanes, so DEPTH 1 and 8 are the same launch."""
    timed = timed_as(lambda v: 1.0 + 0.1 * (v["MAX_SIMDGROUPS"] == 8) + 0.01 * v["ROWS"], monkeypatch)
    found = search(case)
    assert found.start == {KEY: {"ROWS": 4, "DEPTH": 8, "MAX_SIMDGROUPS": 8}}
    assert found.best == {KEY: {"ROWS": 1, "DEPTH": 8, "MAX_SIMDGROUPS": 2}}
    assert found.is_candidate
    assert timed[0] == [f"ROWS {n}, DEPTH 8, MAX_SIMDGROUPS 8" for n in (4, 1, 2)]
    assert timed[-1] == ["ROWS 4, DEPTH 8, MAX_SIMDGROUPS 8", "ROWS 1, DEPTH 8, MAX_SIMDGROUPS 2"]
    assert not any("DEPTH 1" in name for names in timed for name in names)


def test_a_parameter_is_looked_at_again_after_another_has_changed(
    case: op_cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed_as(lambda v: 2.0 - v["ROWS"] / 10 if v["MAX_SIMDGROUPS"] == 8 else 1.0 + v["ROWS"] / 10, monkeypatch)
    assert search(case).best == {KEY: {"ROWS": 1, "DEPTH": 8, "MAX_SIMDGROUPS": 2}}


def test_a_gain_too_small_to_count_is_none(case: op_cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(lambda v: 1.0 + 0.0005 * v["ROWS"], monkeypatch)
    found = search(case)
    assert (found.best, found.effect) == (found.start, None)


def test_a_win_that_was_luck_is_no_candidate(case: op_cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[list[str]] = timed_as(lambda v: 1.0 - 0.1 * (v["ROWS"] == 1 and len(timed) < 4), monkeypatch)
    found = search(case)
    assert found.best != found.start
    assert found.effect is not None
    assert found.effect.verdict == "no difference"
    assert not found.is_candidate


def test_what_is_wrong_or_refused_is_never_timed_and_what_is_refused_never_launched(
    case: op_cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "VALUES", {"ROWS": (1, 2, 4, 8, 5000), "MAX_SIMDGROUPS": (2, 8)})
    monkeypatch.setattr(search_module, "MOST_THREADS", 64)
    shapes.write(shapes.user_file(), entry({"MAX_SIMDGROUPS": 2}, what=DOWN))
    timed = timed_as(lambda v: 1.0 / v["ROWS"], monkeypatch)
    launched: list[int] = []

    def faulty(*args: Any) -> mx.array:
        y = experts_down.experts_down(*args)
        rows = (shapes._tried or {}).get(KEY, {}).get("ROWS", 0)
        if launcher.back_end("experts_down") is None or launcher._recorded is not None:
            return y
        launched.append(rows)
        if rows == 1:
            return mx.where(mx.arange(64) == 63, 1.01 * y, y)  # the last row, by 1 %
        if rows == 2:
            return y * (1 + 1e-6 * (launched.count(2) % 2))  # as near as rounding, but not the same each time
        if rows == 8:
            raise RuntimeError("no such\n  registers")
        return y

    monkeypatch.setattr(op_cases, "experts_down", faulty)
    found = search(case)
    assert found.wrong == {
        "ROWS 1, DEPTH 8, MAX_SIMDGROUPS 2": "1 of 64 values of the first output differ from the twin's",
        "ROWS 2, DEPTH 8, MAX_SIMDGROUPS 2": "two runs give different results",
        "ROWS 8, DEPTH 8, MAX_SIMDGROUPS 2": "fails: no such registers",
    }
    assert found.refused == {
        "ROWS 5000, DEPTH 8, MAX_SIMDGROUPS 2": "experts_down: 40000 bytes of threadgroup memory; 32768 at most",
        "ROWS 4, DEPTH 8, MAX_SIMDGROUPS 8": "160 threads in a threadgroup, over 64",
    }
    assert set(launched) == {1, 2, 4, 8}
    assert timed == []
    assert found.tried == 6


# --- what is stored


@pytest.fixture
def gates(case: op_cases.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A search that finds ROWS 1, and how many times as long each benchmark takes with it."""
    timed_as(lambda v: 1.0 + 0.1 * v["ROWS"], monkeypatch)
    monkeypatch.setattr(conditions, "COPIES", (1, 2))
    monkeypatch.setattr(conditions, "available_memory", lambda: 1 << 26)
    monkeypatch.setattr(op_timing.Link, "long_enough", lambda dtype, least: (op_timing.Link(dtype, least), 0.0))
    monkeypatch.setattr(ab, "LOG", tmp_path / "LOG.md")
    ab.LOG.write_text("|---|---|---|---|---|\n")
    factors = {"block": 0.9, "decode": 0.95}
    noise = np.random.default_rng(0)

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        table = shapes.read(Path(side.environment["XDG_CACHE_HOME"]) / "glm-mlx" / "shapes.json")
        tuned = bool(table.get(CHIP, {}).get("experts_down", {}).get(DOWN))
        seconds = (factors[measure] if tuned else 1.0) * (1 + 1e-3 * noise.normal())
        runs = [{"depth": 512, "path": "kernels", "seconds": [seconds], "tokens": [], "options": options}]
        found = {"chip": CHIP, "back_end": "metal"}
        return {"script": "decode", "warm_up_tokens": 0, "conditions": found, "runs": runs}

    monkeypatch.setattr(ab, "run", run)
    return factors


def tuned(tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "tune.json"
    assert tune.main(["--op", "experts_down", "--rest", "0", "--json", str(path), *options]) == 0
    made: dict[str, Any] = json.loads(path.read_text())
    return made["ops"]["experts_down"]


STORED = {"ROWS": 1, "DEPTH": 8, "MAX_SIMDGROUPS": 8}


def test_what_wins_the_block_and_the_model_is_stored_and_read(
    gates: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = entry({"ROWS": 2}, "Another chip", "qmv")
    shapes.write(shapes.user_file(), other)
    made = tuned(tmp_path, "--log", "--", "--layers", "4")
    assert made["stored"] is True
    assert [(gate["measure"], gate["verdict"]) for gate in made["gates"]] == [("block", "faster"), ("decode", "faster")]
    assert made["gates"][1]["options"] == ["--depths", "0,4k,32k", "--fill", "random", "--layers", "4"]
    text = shapes.text_digest("experts_down")
    assert shapes.read(shapes.user_file()) == {**other, **entry({**STORED, "text": text}, what=DOWN)}
    assert not shapes.SHIPPED.exists()
    forget()
    assert shapes.launch_shape("experts_down", DOWN, 1, ROWS=4, DEPTH=8, MAX_SIMDGROUPS=8) == (1, 8, 8)
    out = capsys.readouterr().out
    assert "experts_down, block: B is faster: -10" in out
    assert f"written: {shapes.user_file()}" in out
    decode, block = ab.LOG.read_text().splitlines()[1:]
    assert "`tuned shapes of experts_down` against `the shapes in use`, `decode --depths" in decode
    assert block.endswith("| to the whole model |")
    assert decode.endswith("| yes |")


@pytest.mark.parametrize(("block", "decode", "gated"), [(1.0, 0.9, ["block"]), (0.9, 1.0, ["block", "decode"])])
def test_what_wins_alone_is_not_stored(
    block: float, decode: float, gated: list[str], gates: dict[str, float], tmp_path: Path
) -> None:
    gates.update(block=block, decode=decode)
    made = tuned(tmp_path, "--log")
    assert made["searches"][0]["effect"]["verdict"] == "faster"
    assert [gate["measure"] for gate in made["gates"]] == gated
    assert made["stored"] is False
    assert not shapes.user_file().exists()
    assert ab.LOG.read_text().splitlines()[1].endswith("| no |")


def test_a_shipped_shape_is_the_familys_and_of_any_text(gates: dict[str, float], tmp_path: Path) -> None:
    tuned(tmp_path, "--ship")
    assert shapes.read(shapes.SHIPPED) == entry(STORED, FAMILY, what=DOWN)
    assert shapes.user_file().exists()


@pytest.mark.parametrize(
    ("device", "where"),
    [(("NVIDIA H200", "NVIDIA sm_90"), "NVIDIA H200"), (("Apple M3 Max", "Apple M3"), "Apple M3")],
    ids=["NVIDIA", "Apple"],
)
def test_what_is_shipped_is_what_others_with_the_device_get(
    device: tuple[str, str], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the entries that are shipped now, which hold for a device by its name."""
    before = shapes.read(launcher.HERE / "shapes.json")
    what, values = "Q4_0 5120x768", {"ROWS": 1, "SIMDGROUPS": 2, "DEPTH": 4}
    assert before["NVIDIA H200"]["qmv"][what] != values
    shapes.write(shapes.SHIPPED, before)
    monkeypatch.setattr(shapes, "device", lambda: device)
    found = entry({**values, "text": shapes.text_digest("qmv")}, device[0], "qmv", what)
    stale = shapes.with_entry(found, device[0], "qmv", "Q4_0 1x32", {"ROWS": 2, "text": "another"})
    tune.store(stale, device, ship=True)
    shapes.user_file().unlink()
    assert shapes.launch_shape("qmv", what, 1, ROWS=4, SIMDGROUPS=4, DEPTH=8) == (1, 2, 4)
    assert shapes.read(shapes.SHIPPED) == shapes.with_entry(before, where, "qmv", what, dict(values))


def test_search_and_verdict_in_two_steps(gates: dict[str, float], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert tuned(tmp_path, "--candidates", str(file))["gates"] == []
    text = shapes.text_digest("experts_down")
    assert shapes.read(file) == entry({**STORED, "text": text}, what=DOWN)
    assert not shapes.user_file().exists()
    path = tmp_path / "tune.json"
    for factor, verdicts in ((1.1, ["faster", "slower"]), (0.9, ["faster", "faster"])):
        gates["decode"] = factor
        assert tune.main(["--judge", str(file), "--rest", "0", "--json", str(path)]) == 0
        made = json.loads(path.read_text())
        assert made["ops"] == {}
        assert [gate["verdict"] for gate in made["judged"]["gates"]] == verdicts
        assert made["judged"]["stored"] is shapes.user_file().exists() is (factor < 1)
    assert shapes.read(shapes.user_file()) == shapes.read(file)


def test_what_was_found_for_another_text_is_not_judged(
    gates: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run passes over it, so that both sides would be the same."""
    file, path = tmp_path / "found.json", tmp_path / "tune.json"
    arguments = ["--judge", str(file), "--rest", "0", "--json", str(path)]
    stale = entry({**STORED, "text": "another"}, what=DOWN)
    own = entry({"ROWS": 2}, op="qmv")
    shapes.write(shapes.user_file(), own)
    shapes.write(file, shapes.with_entry(stale, CHIP, "qmv", "Q4_0 8x32", {"ROWS": 2}))
    assert script.run(lambda: tune.main(arguments)) == 2
    assert capsys.readouterr().err == (
        f"error: shapes of experts_down in {file} were found for another text of the kernel, and there is nothing else "
        "to judge; search anew with --candidates\n"
    )
    assert not path.exists()

    good = {**STORED, "text": shapes.text_digest("experts_down")}
    shapes.write(file, shapes.with_entry(stale, CHIP, "experts_down", DOWN, good))
    shapes.write(file, shapes.with_entry(shapes.read(file), CHIP, "qmv", "Q4_0 1x2", {"ROWS": 1, "text": "another"}))
    assert tune.main(arguments) == 0
    assert f"shapes of qmv in {file} were found for another text of the kernel and are left" in capsys.readouterr().err
    assert json.loads(path.read_text())["judged"]["stored"] is True
    assert shapes.read(shapes.user_file()) == entry(good, what=DOWN)


def test_candidates_for_another_text_go_when_a_search_finds_nothing_better(
    gates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    shapes.write(file, entry({**STORED, "text": "another"}, what=DOWN) | entry({"ROWS": 2}, "Another chip"))
    timed_as(lambda v: 1.0, monkeypatch)
    tuned(tmp_path, "--candidates", str(file))
    assert shapes.read(file) == {CHIP: {}, **entry({"ROWS": 2}, "Another chip")}


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_table_without_this_device_is_not_judged(
    content: str | None, gates: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content:
        (tmp_path / "found.json").write_text(content)
    assert script.run(lambda: tune.main(["--judge", str(tmp_path / "found.json")])) == 2
    assert capsys.readouterr().err.endswith(f"has no launch shapes for {CHIP}; --candidates makes such a table\n")


def test_nothing_found_is_nothing_gated(
    gates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed_as(lambda v: 1.0, monkeypatch)
    made = tuned(tmp_path)
    assert (made["gates"], made["stored"]) == ([], False)
    assert "the same" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (InputError("block.py failed"), 2)])
def test_an_end_on_the_way_keeps_what_was_found(
    error: BaseException, code: int, gates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise error

    monkeypatch.setattr(ab, "run", stop)
    path = tmp_path / "tune.json"
    assert tune.main(["--op", "experts_down", "--rest", "0", "--json", str(path)]) == code
    made = json.loads(path.read_text())
    assert made["stopped"] == ("interrupted" if code == 130 else "block.py failed")
    assert made["ops"]["experts_down"]["searches"][0]["effect"]["verdict"] == "faster"
    assert not shapes.user_file().exists()


def test_an_interrupted_gate_keeps_its_pairs_and_has_no_verdict(
    gates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = ab.run, []

    def stopping(side: Side, measure: str, options: Any) -> dict[str, Any]:
        ran.append(side)
        if len(ran) == blocks + 15:
            raise KeyboardInterrupt
        return run(side, measure, options)

    path = tmp_path / "tune.json"
    blocks = 12  # runs: noise is small, so six pairs are enough
    monkeypatch.setattr(ab, "run", stopping)
    monkeypatch.setattr(ab, "enough", lambda effect, smallest: len(ran) == blocks)
    assert tune.main(["--op", "experts_down", "--rest", "0", "--json", str(path)]) == 130
    block, decode = json.loads(path.read_text())["ops"]["experts_down"]["gates"]
    assert (block["verdict"], block["interrupted"], len(block["pairs"])) == ("faster", False, 6)
    assert (decode["verdict"], decode["kept"], decode["interrupted"], len(decode["pairs"])) == (None, None, True, 7)
    assert not shapes.user_file().exists()


def test_an_interrupted_search_keeps_those_that_had_ended(
    gates: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search, searched = search_module.Search.run, []

    def stopping(self: search_module.Search) -> search_module.Found:
        searched.append(self)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return search(self)

    monkeypatch.setattr(search_module.Search, "run", stopping)
    file, path = tmp_path / "found.json", tmp_path / "tune.json"
    arguments = ["--op", "experts_down", "--quant", "Q4_0,Q8_0", "--candidates", str(file), "--json", str(path)]
    assert tune.main(arguments) == 130
    made = json.loads(path.read_text())
    assert made["stopped"] == "interrupted"
    assert [found["effect"]["verdict"] for found in made["ops"]["experts_down"]["searches"]] == ["faster"]
    assert list(shapes.read(file)[CHIP]["experts_down"]) == [DOWN]
    assert "MAX_SIMDGROUPS 8" in capsys.readouterr().out, "the table of the searches that ended"


def test_without_kernels_there_is_nothing_to_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for found in (None, (CHIP, FAMILY)):  # a CPU; kernels that are all avoided
        monkeypatch.setattr(shapes, "device", lambda found=found: found)
        assert script.run(lambda: tune.main([])) == 2
        assert (
            capsys.readouterr().err == "error: this device launches no kernels, so there is no launch shape to tune\n"
        )


def test_a_damaged_table_is_not_overwritten(gates: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    shapes.user_file().parent.mkdir(parents=True)
    shapes.user_file().write_text("[")
    assert script.run(lambda: tune.main([])) == 2
    error = capsys.readouterr().err
    assert error == f"error: cannot add to the launch shapes of {shapes.user_file()} (no JSON); mend or remove it\n"
