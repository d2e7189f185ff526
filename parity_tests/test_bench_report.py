"""bench/report.py: README's table of results comes from the committed files, and from nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import block, compare, contest, decode, frame, ops_speed, report, script

ROOT = Path(__file__).parents[1]
SUMMARY = {"count": 60, "median": 0.01, "p10": 0.008, "p90": 0.0125, "iqr": 0.001, "mad": 0.0005, "least": 0, "most": 1}


def test_readme_is_up_to_date() -> None:
    """As a person checks it. If this fails, run `python bench/report.py` and commit README.md."""
    done = subprocess.run(
        [sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_committed_file_can_be_read() -> None:
    reports, left_out = report.read_reports(report.RESULTS)
    assert reports
    table = report.markdown(reports)
    for found in reports:
        assert f"bench/results/{found.path.name}" in table
    assert len(reports) + len(left_out) == len(list(report.RESULTS.glob("*.json")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with an empty table and no results."""
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    return tmp_path


def conditions_of(chip: str = "Apple M9", date: str = "2027-01-02", **more: Any) -> dict[str, Any]:
    return {
        "date": f"{date}T03:04:05+00:00",
        "chip": chip,
        "back_end": "metal",
        "gpu_cores": 40,
        "cpu_cores": 16,
        "memory_bytes": 64_000_000_000,
        "os": "macOS 27.1",
        "power_source": "AC power",
        "power_mode": None,
        "commit": "1a2b3c4d5e",
        "source_sha256": "feed",
        "mlx": "0.99",
        "copy": {"gb_s": 500.0},
        "quoted_gb_s": 614,
    } | more


def decoded(depth: int = 512, path: str = "kernels", ms: float = 10, **more: Any) -> dict[str, Any]:
    return {
        "depth": depth,
        "path": path,
        "fill": "prefill",
        "prefill_tok_s": SUMMARY | {"median": 1234.0},
        "decode_seconds": SUMMARY | {"median": ms / 1e3},
        "gb_s": SUMMARY | {"median": 212.0},
        "of_copy": 0.424,
    } | more


def results(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    model = {"name": "small.gguf", "mix": "q4_0", "layers": 6, "activations": "bfloat16"}
    return {
        "script": "decode",
        "conditions": conditions_of(),
        "model": model,
        "rounds": 3,
        "interrupted": False,
        "rows": rows,
    } | more


def put(folder: Path, name: str, content: Any) -> None:
    (folder / "results" / name).write_text(json.dumps(content))


def table(folder: Path) -> list[list[str]]:
    """Write README's table and return its cells, without its two lines of heading."""
    assert report.main([]) == 0
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_a_row_holds_what_the_file_says(folder: Path) -> None:
    put(folder, "decode.json", results([decoded(), decoded(path="twins", ms=40)]))
    assert table(folder) == [
        [
            "Apple M9 (metal), 40 GPU cores, 16 CPU cores, 64.0 GB, macOS 27.1",
            "small.gguf, q4_0, 6 layers, bfloat16",
            "512",
            "glm-mlx, kernels",
            "100.0 tok/s (80.0-125.0)",
            "1,234",
            "212, 42.4%",
            "",
            "2027-01-02, 1a2b3c4d5e, MLX 0.99, copy 500 GB/s (quoted 614), AC power, 3 rounds, "
            "[decode.json](bench/results/decode.json)",
        ],
        ["", "", "512", "glm-mlx, MLX's operations", "25.0 tok/s (80.0-125.0)", "1,234", "212, 42.4%", "4.00 x", ""],
    ]
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n| machine")
    assert text.endswith(f"{report.END}\nafter\n")


def test_a_speed_stands_alone_where_no_copy_was_timed(folder: Path) -> None:
    put(folder, "decode.json", results([decoded(of_copy=None)]))
    assert [cells[6] for cells in table(folder)] == ["212"]
    row = {"op": "qmv", "type": "Q4_0", "dtype": "bfloat16", "by": "kernel", "shape": "64x64", "problem": None}
    rows = [row | {"summary": {"chain": {"median": 1e-6}}, "bytes": 1000}]
    put(folder, "decode.json", results(rows, script="ops_speed", conditions=conditions_of(copy=None)))
    assert [cells[6] for cells in table(folder)] == ["1"]


def test_a_new_file_appears_by_itself_and_check_tells(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "a.json", results([decoded()]))
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    put(folder, "b.json", results([decoded()], conditions=conditions_of("Apple M5", "2027-01-01")))
    before = (folder / "README.md").read_text()
    assert report.main(["--check"]) == 1
    assert "out of date; run python bench/report.py" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == before
    assert [row[0].split(" (")[0] for row in table(folder)] == ["Apple M5", "Apple M9"]
    assert report.main(["--check"]) == 0
    (folder / "results" / "a.json").unlink()
    assert report.main(["--check"]) == 1
    assert [row[0].split(" (")[0] for row in table(folder)] == ["Apple M5"]


def test_a_later_measurement_takes_the_place_of_an_earlier_one(folder: Path) -> None:
    """Row by row: what was not measured again stays. The names of the files say nothing of their age."""
    put(folder, "z.json", results([decoded(0), decoded(512)]))
    again = [decoded(32, ms=5), decoded(512, ms=5)]
    put(folder, "a.json", results(again, conditions=conditions_of(date="2027-02-01")))
    rows = table(folder)
    assert [(row[2], row[4].split()[0]) for row in rows] == [("32", "200.0"), ("512", "200.0"), ("0", "100.0")]
    assert ["a.json" in rows[0][-1], "z.json" in rows[2][-1]] == [True, True]


def test_other_caches_and_contexts_have_rows_of_their_own(folder: Path) -> None:
    put(folder, "a.json", results([decoded()]))
    for day, name, changes in (
        ("2027-02-01", "b.json", {"model": {**results([])["model"], "cache": "8-bit"}}),
        ("2027-02-02", "c.json", {"rows": [decoded(fill="random", prefill_tok_s=None)]}),
    ):
        put(folder, name, results([decoded()], conditions=conditions_of(date=day)) | changes)
    rows = table(folder)
    assert [row[1] for row in rows] == [
        f"small.gguf, q4_0, 6 layers, bfloat16{more}" for more in ("", ", cache in 8 bits", "")
    ]
    assert [row[5] for row in rows] == ["1,234", "1,234", ""]


def test_a_ratio_to_a_row_that_was_measured_again_names_its_speed(folder: Path) -> None:
    """Whatever the order of the paths. A ratio to a row that is shown needs no more words."""
    for twins_first in (False, True):
        both = [decoded(0, ms=20), decoded(0, "twins", 40), decoded(512), decoded(512, "twins", 40)]
        put(folder, "a.json", results(both[::-1] if twins_first else both))
        put(folder, "b.json", results([decoded(512, ms=5)], conditions=conditions_of(date="2027-02-01")))
        ratios = {(row[2], row[3]): row[7] for row in table(folder)}
        assert ratios == {
            ("0", "glm-mlx, kernels"): "",
            ("0", "glm-mlx, MLX's operations"): "2.00 x",
            ("512", "glm-mlx, kernels"): "",
            ("512", "glm-mlx, MLX's operations"): "4.00 x, ours then 100.0 tok/s",
        }


def compared(by: str, ratios: list[float], **more: Any) -> dict[str, Any]:
    return (
        decoded(
            by=by,
            decode_ratios=ratios,
            decode_ratio_to_fastest=1.5 if ratios else None,
            prefill_ratio_to_fastest=None,
            against_alone=0.012 if ratios else None,
            not_firm=[],
        )
        | more
    )


@pytest.mark.parametrize(("cache", "note"), [("8-bit", ", cache bfloat16"), ("bfloat16", "")])
def test_a_peer_with_another_cache_than_ours_says_so(folder: Path, cache: str, note: str) -> None:
    rows = [compared(by, ratios) for by, ratios in (("glm-mlx", []), ("mlx-lm", [2.0, 1.0, 4.0]), ("llama.cpp", [3.0]))]
    contestants = {
        "glm-mlx": {},
        "mlx-lm": {"version": "9.9", "activations": "bfloat16"},
        "llama.cpp": {"build_commit": "ab"},
    }
    model = results([])["model"] | {"cache": cache}
    put(folder, "compare.json", results(rows, script="compare", contestants=contestants, model=model))
    assert [(row[3], row[7]) for row in table(folder)] == [
        ("glm-mlx", ""),
        (f"mlx-lm 9.9{note}", "1.50 x its fastest run, median 2.00 x (1.00-4.00), against alone +1.2%"),
        ("llama.cpp ab", "1.50 x its fastest run, median 3.00 x (3.00-3.00), against alone +1.2%"),
    ]


def test_a_ratio_that_is_not_firm_is_not_shown(folder: Path) -> None:
    why = ["2 rounds", "9% slower than alone"]
    rows = [compared("glm-mlx", []), compared("mlx-lm", [9.6, 13.1], prefill_ratio_to_fastest=8.0, not_firm=why)]
    put(folder, "a.json", results(rows, script="compare", contestants={"glm-mlx": {}, "mlx-lm": {}}))
    assert table(folder)[1][7] == "not firm: 2 rounds, 9% slower than alone"
    rows[1] |= {"not_firm": []}
    put(folder, "a.json", results(rows, script="compare", contestants={"glm-mlx": {}, "mlx-lm": {}}))
    assert table(folder)[1][7].endswith(", prompt 8.00 x its fastest")


def test_what_the_harness_before_wrote_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its peers ran within our process."""
    old = decoded(by="mlx-lm", decode_ratios=[9.6], prefill_ratios=[])
    put(folder, "old.json", results([old], script="compare", contestants={"mlx-lm": {}}))
    assert script.run(lambda: report.main([])) == 2
    assert "old.json is not as today's scripts write it (KeyError: 'not_firm'); measure" in capsys.readouterr().err


def test_other_scripts_have_no_row_and_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "parity.json", {"tests": {}})
    put(folder, "list.json", [1])
    assert table(folder) == []
    assert "Nothing was measured yet." in (folder / "README.md").read_text()
    assert "no row for parity.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"interrupted": True}, ", interrupted, ["),
        ({"parity": {"checked": 9, "differ": [{"call": "a", "error": "b"}]}}, ", 8 of 9 calls of kernels right, "),
        ({"parity": {"checked": 0, "differ": []}}, "AC power, 3 rounds"),
        ({"conditions": conditions_of(commit=None)}, ", source feed, "),
        ({"conditions": conditions_of(quoted_gb_s=None)}, ", copy 500 GB/s, "),
        ({"rows": [decoded(fill="random", prefill_tok_s=None)]}, ", 3 rounds, random context, "),
        ({"rows": [decoded(), decoded(9, fill="random", prefill_tok_s=None)]}, ", 3 rounds, long contexts random, "),
    ],
)
def test_conditions_that_a_reader_must_know_stand_in_the_row(
    folder: Path, change: dict[str, Any], expected: str
) -> None:
    put(folder, "decode.json", results([decoded()]) | change)
    assert expected in table(folder)[0][-1]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: (folder / "results" / "a.json").write_text("{"), "a.json is no JSON ("),
        (lambda folder: put(folder, "a.json", {"script": "decode"}), "a.json is not as today's scripts write it"),
        (lambda folder: put(folder, "a.json", results([{"depth": 1}])), "(KeyError: 'path'); measure again, or delete"),
        (lambda folder: put(folder, "a.json", results([]) | {"conditions": 1}), "(TypeError: 'int' object is not"),
        (lambda folder: (folder / "README.md").unlink(), "README.md: No such file or directory; make it a file"),
        (lambda folder: (folder / "README.md").write_text("no markers"), "README.md must hold the lines"),
        (
            lambda folder: (folder / "README.md").write_text(f"{report.END}\n{report.BEGIN}\n"),
            "once each and in this order",
        ),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, write: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder)
    assert script.run(lambda: report.main([])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without seconds of copying."""
    copy = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: copy)


@pytest.mark.usefixtures("quick")
def test_what_decode_writes_today_has_rows(folder: Path) -> None:
    path = folder / "results" / "decode.json"
    decode.main(["--depths", "0,20", "--count", "2", "--rounds", "1", "--json", str(path)])
    rows = table(folder)
    assert [row[2:4] for row in rows] == [["0", "glm-mlx, MLX's operations"], ["20", "glm-mlx, MLX's operations"]]
    assert rows[0][1].startswith("small.gguf, 52 Q4_0, 35 F32, ")
    assert [row[5] != "" for row in rows] == [False, True]


@pytest.mark.usefixtures("quick")
def test_what_compare_writes_today_has_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        details: dict[str, Any] = {"version": "9.9"}  # noqa: RUF012
        notes: list[str] = []  # noqa: RUF012

        def __init__(self, name: str, seconds: float):
            self.name, self.seconds = name, seconds

        def take(self, blank: Sequence[contest.Turn], count: int) -> Iterator[contest.Turn]:
            for turn in blank:
                slowly = self.seconds * (1 + turn.number / 100)
                turn.time_to_first_token, turn.warm_up, turn.seconds = slowly / 100, [1.0], [slowly] * count
                yield turn

    found = {"depths": [20], "notes": [], "details": {}, "described": "", "parity": None, "peers": {}}
    monkeypatch.setattr(compare, "check", lambda args: found | {"model": results([])["model"]})
    monkeypatch.setattr(compare, "ours", lambda args, found: Fake("glm-mlx", 0.25))
    monkeypatch.setattr(compare, "PEERS", {"mlx-lm": lambda args, found: Fake("mlx-lm", 0.5)})
    path = folder / "results" / "compare.json"
    for rounds, expected in (
        # Alone 0.5 s, ours 0.255: at most 3 % slower than alone, each round twice ours.
        (3, "1.96 x its fastest run, median 2.00 x (2.00-2.00), against alone +2.0%, prompt 1.96 x its fastest"),
        (2, "not firm: 2 rounds"),
    ):
        compare.main(["--count", "2", "--rounds", str(rounds), "--json", str(path)])
        ours, theirs = table(folder)
        assert (ours[3], ours[7]) == ("glm-mlx 9.9", "")
        assert theirs[2:4] == ["20", "mlx-lm 9.9"]
        assert theirs[7] == expected


@pytest.mark.usefixtures("quick")
def test_what_block_writes_today_has_rows(folder: Path) -> None:
    path = folder / "results" / "block.json"
    block.main(["--depths", "0,20", "--count", "2", "--rounds", "1", "--json", str(path)])
    rows = table(folder)
    assert [row[2] for row in rows] == ["0", "20"]
    assert rows[0][1].startswith("an MoE block of small.gguf, ")
    middle = next(row["seconds"]["median"] for row in json.loads(path.read_text())["rows"] if row["part"] == "block")
    assert rows[0][4].startswith(f"{1e6 * middle:,.1f} µs (")


def test_a_block_by_kernels_is_set_against_its_twin(folder: Path) -> None:
    rows = [
        {
            "part": part,
            "kind": kind,
            "path": path,
            "depth": 512,
            "seconds": {"median": ms / 1e3, "p10": 0.001, "p90": 0.002},
            "gpu_seconds": {"median": 0.0005} if path == "kernels" else None,
            "gb_s": 100.0,
            "of_copy": 0.5,
        }
        for part, kind in (("block", "MoE"), ("attention", "MoE"), ("block", "dense"))
        for path, ms in (("kernels", 1.5), ("twins", 6))
    ]
    put(folder, "block.json", results(rows, script="block"))
    assert [row[3:8] for row in table(folder)] == [
        ["glm-mlx, kernels", "1,500.0 µs (1,000.0-2,000.0), GPU 500.0", "", "100, 50.0%", ""],
        ["glm-mlx, MLX's operations", "6,000.0 µs (1,000.0-2,000.0)", "", "100, 50.0%", "4.00 x"],
    ]


@pytest.mark.usefixtures("quick")
def test_what_ops_speed_writes_today_has_rows(folder: Path) -> None:
    path = folder / "results" / "ops.json"
    ops_speed.main(["--op", "router", "--rounds", "1", "--json", str(path)])
    assert table(folder)[0][3] == "twin of MLX's operations"


def test_ops_are_ranges_over_shapes(folder: Path) -> None:
    """By the GPU's own time where it is known. A wrong result has no figure."""

    def op(shape: str, by: str, us: float, gpu: float | None = None, problem: str | None = None) -> dict[str, Any]:
        known = {"chain": {"median": us / 1e6}} | ({"gpu": {"median": gpu / 1e6}} if gpu else {})
        return {
            "op": "qmv",
            "type": "Q4_0",
            "dtype": "bfloat16",
            "shape": shape,
            "by": by,
            "bytes": 1_000_000,
            "problem": problem,
            "summary": known,
        }

    rows = [
        *(op("a", "twin", 40), op("a", "kernel", 99, gpu=10), op("a", "mlx", 20)),
        *(op("b", "twin", 60), op("b", "kernel", 20), op("b", "mlx", 1, problem="wrong")),
    ]
    put(folder, "ops.json", results(rows, script="ops_speed"))
    assert [row[1:8] for row in table(folder)] == [
        ["qmv, Q4_0, bfloat16", "", "kernel", "10.0-20.0 µs a launch", "", "50-100, 10.0%-20.0%", ""],
        ["", "", "twin of MLX's operations", "40.0-60.0 µs a launch", "", "17-25, 3.3%-5.0%", "3.00-4.00 x"],
        ["", "", "MLX's own operation", "20.0 µs a launch", "", "50, 10.0%", "2.00 x"],
    ]
