"""Writes the table of results in README.md from the JSON files in bench/results/, between its two markers.

examples:
  python bench/report.py            write it
  python bench/report.py --check    say whether it is up to date, and change nothing

A new file of decode, compare, block or ops_speed appears by itself. Where two files have the same row, the later one
counts. Of block.py it takes whole MoE blocks, of ops_speed.py the range over all shapes of an op.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

from rich.filesize import decimal

from bench import script
from bench.conditions import ROOT
from bench.contest import OURS
from glm_mlx.command import Parser
from glm_mlx.errors import InputError
from kernels.shown import shown

RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
BEGIN = "<!-- results: made by `python bench/report.py`, not by hand -->"
END = "<!-- end of results -->"
LEGEND = (
    "*context*: tokens before the first decoded one. *speed*: the median, p10 to p90 in brackets; of an op the\n"
    "medians of its shapes, from the fastest to the slowest. *GB/s*: bytes of the weights and cached rows that a\n"
    "token (a block, a launch) needs, each once, by the GPU's own time where that is known. Tests hold what our\n"
    "kernels fetch to these bytes (*weights fetched*, above); MLX's operations may read more. *of copy*: as a share\n"
    "of what a copy on that device moves. *ours is*: how many times as fast as this row this project is, in the\n"
    "same run; of an op from the least to the most of its shapes. Beside another program each round is a process of\n"
    "its own, warmed up, with no other model in memory. The ratio to quote is to its *fastest run*, of all rounds and\n"
    "one before ours ever ran (*alone*), from the median of ours; then the median of the ratios within a round, the\n"
    "least and the most in brackets, and how much longer it took in the rounds than alone. Fewer than 3 rounds, or\n"
    "more than 5 % longer than alone, are *not firm* and have no ratio.\n"
    "*ours then*: how fast this project was in that run, where the table shows a later one of it. Every sample is\n"
    "in the file."
)
COLUMNS = ("machine", "what", "context", "by", "speed", "prompt, tok/s", "GB/s, of copy", "ours is", "conditions")
RIGHT = ("context", "speed", "prompt, tok/s", "GB/s, of copy", "ours is")
PATHS = {"kernels": f"{OURS}, kernels", "twins": f"{OURS}, MLX's operations"}
WAYS = {"kernel": "kernel", "twin": "twin of MLX's operations", "mlx": "MLX's own operation"}


@dataclass(frozen=True)
class Report:
    """A file of results, read."""

    path: Path
    content: Mapping[str, Any]

    @property
    def conditions(self) -> Mapping[str, Any]:
        return self.content["conditions"]  # type: ignore[no-any-return]

    @property
    def machine(self) -> str:
        at = self.conditions
        gpu_cores = f", {at['gpu_cores']} GPU cores" if at["gpu_cores"] else ""
        return (
            f"{at['chip']} ({at['back_end']}){gpu_cores}, {at['cpu_cores']} CPU cores, {decimal(at['memory_bytes'])}, "
            f"{at['os'].split(', ')[0]}"
        )

    @property
    def told(self) -> str:
        """The conditions in one cell."""
        at = self.conditions
        power = [str(at[key]) for key in ("power_source", "power_mode") if at[key]]
        quoted = f" (quoted {at['quoted_gb_s']:,.0f})" if at["quoted_gb_s"] else ""
        parts = [
            at["date"][:10],
            # Of a checkout that is not clean the commit says little, the source all.
            at["commit"] if (at["commit"] or "+")[-1] != "+" else f"source {at['source_sha256']}",
            f"MLX {at['mlx']}",
            f"copy {at['copy']['gb_s']:,.0f} GB/s{quoted}" if at["copy"] else "no copy was timed",
            *power,
            *_parity(self.content),
            _rounds(self.content),
            *["interrupted"] * bool(self.content["interrupted"]),
            f"[{self.path.name}](bench/results/{self.path.name})",
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Row:
    """Of the table, less machine and conditions. context: a depth, or None. ratio: not of our own."""

    what: str
    context: int | None
    by: str
    speed: str
    prompt: str = ""
    share: str = ""
    ratio: str = ""

    def ours_in(self, rows: Sequence["Row"]) -> "Row | None":
        """Of the rows of the same file, the one that `ratio` is to."""
        same = (row for row in rows if (row.what, row.context) == (self.what, self.context) and not row.ratio)
        return next(same, None) if self.ratio else None


def main(argv: list[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python bench/report.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if README is out of date")
    args = parser.parse_args(argv)
    reports, left_out = read_reports(RESULTS)
    try:
        before = README.read_text(encoding="utf-8")
        after = replaced(before, markdown(reports))
        if args.check:
            if before != after:
                print("error: the results in README.md are out of date; run python bench/report.py", file=sys.stderr)
            return int(before != after)
        README.write_text(after, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{shown(README)}: {error.strerror}; make it a file that can be written") from None
    for name in left_out:
        script.NOTES.print(f"no row for {shown(name)}: it is of no script that has one", style="dim", markup=False)
    return 0


def read_reports(folder: Path) -> tuple[list[Report], list[str]]:
    """The files that have rows, in the order of their dates, and the names of the others.

    Raises InputError for a file that is damaged.
    """
    reports, left_out, dates = [], [], {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{shown(path)} is no JSON ({error}); measure again, or delete it") from None
        if isinstance(content, dict) and content.get("script") in SCRIPTS:
            reports.append(Report(path, content))
            with _as_written_today(path):
                dates[path] = str(content["conditions"]["date"])
        else:
            left_out.append(path.name)
    return sorted(reports, key=lambda report: dates[report.path]), left_out


def markdown(reports: Sequence[Report]) -> str:
    """The table; one line where nothing was measured."""
    latest: dict[tuple[Any, ...], tuple[Report, Row]] = {}
    rows_of: dict[Path, list[Row]] = {}
    for report in reports:
        with _as_written_today(report.path):
            rows_of[report.path] = list(SCRIPTS[report.content["script"]](report.content))
            _ = report.told
        for row in rows_of[report.path]:
            key = _key(report, row)
            latest.pop(key, None)  # the later one takes its own place
            latest[key] = report, row
    if not latest:
        return "Nothing was measured yet."
    lines = [_line(COLUMNS), _line(["---:" if name in RIGHT else "---" for name in COLUMNS])]
    groups: dict[tuple[str, int, Path], list[tuple[Report, Row]]] = {}
    for report, row in latest.values():
        order = list(SCRIPTS).index(report.content["script"])
        groups.setdefault((report.machine, order, report.path), []).append((report, row))
    last_machine = None
    for group in sorted(groups):
        last_what = None
        for number, (report, row) in enumerate(groups[group]):
            ours = row.ours_in(rows_of[report.path])
            superseded = ours is not None and latest[_key(report, ours)][0] is not report
            then = f", ours then {ours.speed.partition(' (')[0]}" if ours and superseded else ""
            cells = [
                report.machine if report.machine != last_machine else "",
                row.what if row.what != last_what else "",
                "" if row.context is None else f"{row.context:,}",
                row.by,
                row.speed,
                row.prompt,
                row.share,
                row.ratio + then,
                report.told if number == 0 else "",
            ]
            lines.append(_line(cells))
            last_machine, last_what = report.machine, row.what
    return "\n".join([*lines, "", LEGEND])


def _key(report: Report, row: Row) -> tuple[Any, ...]:
    """What a later row of the same replaces. Rows with a prompt are others than those of random contexts."""
    return report.content["script"], report.machine, row.what, row.context, row.by, bool(row.prompt)


@contextmanager
def _as_written_today(path: Path) -> Iterator[None]:
    """Raises InputError, naming the file, for what is not in it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{shown(path)} is not as today's scripts write it ({type(error).__name__}: {error}); measure again, or "
            "delete it"
        ) from None


def replaced(text: str, table: str) -> str:
    """The text with the table between its markers. Raises InputError where they are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"README.md must hold the lines {BEGIN} and {END}, once each and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n{table}\n{text[text.index(END) :]}"


def _decode(content: Mapping[str, Any]) -> Iterator[Row]:
    kernels = {row["depth"]: row["decode_seconds"]["median"] for row in content["rows"] if row["path"] == "kernels"}
    for row in content["rows"]:
        ratio = ""
        if row["path"] != "kernels" and row["depth"] in kernels:
            ratio = f"{row['decode_seconds']['median'] / kernels[row['depth']]:.2f} x"
        share = _share(f"{row['gb_s']['median']:,.0f}", row["of_copy"])
        yield Row(_model(content), row["depth"], PATHS[row["path"]], _speed(row), _prompt(row), share, ratio)


def _compare(content: Mapping[str, Any]) -> Iterator[Row]:
    for row in content["rows"]:
        details = content["contestants"][row["by"]]
        by = " ".join([row["by"], *(str(details[key]) for key in ("version", "build_commit") if key in details)])
        if content["model"].get("cache") == "8-bit" and "activations" in details:
            by += f", cache {details['activations']}"  # whose type mlx-lm's always is
        ratio = ""
        if row["not_firm"]:
            ratio = f"not firm: {', '.join(row['not_firm'])}"
        elif ratios := row["decode_ratios"]:
            ratio = (
                f"{row['decode_ratio_to_fastest']:.2f} x its fastest run, median {median(ratios):.2f} x "
                f"({min(ratios):.2f}-{max(ratios):.2f}), against alone {row['against_alone']:+.1%}"
            )
            if row["prefill_ratio_to_fastest"]:
                ratio += f", prompt {row['prefill_ratio_to_fastest']:.2f} x its fastest"
        yield Row(_model(content), row["depth"], by, _speed(row), _prompt(row), "", ratio)


def _block(content: Mapping[str, Any]) -> Iterator[Row]:
    rows = [row for row in content["rows"] if (row["part"], row["kind"]) == ("block", "MoE")]
    kernels = {row["depth"]: row["seconds"]["median"] for row in rows if row["path"] == "kernels"}
    for row in rows:
        middle, p10, p90 = (1e6 * row["seconds"][name] for name in ("median", "p10", "p90"))
        speed = f"{middle:,.1f} µs ({p10:,.1f}-{p90:,.1f})"
        if row["gpu_seconds"]:
            speed += f", GPU {1e6 * row['gpu_seconds']['median']:,.1f}"
        ratio = ""
        if row["path"] != "kernels" and row["depth"] in kernels:
            ratio = f"{row['seconds']['median'] / kernels[row['depth']]:.2f} x"
        share = _share(f"{row['gb_s']:,.0f}", row["of_copy"])
        yield Row(f"an MoE block of {_model(content)}", row["depth"], PATHS[row["path"]], speed, "", share, ratio)


def _ops(content: Mapping[str, Any]) -> Iterator[Row]:
    """A row for each op, type and way: the range over its shapes."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, tuple[float, int]]]] = {}  # way -> shape -> seconds, bytes
    for row in content["rows"]:
        if row["problem"] is None:
            seconds = (row["summary"].get("gpu") or row["summary"]["chain"])["median"]
            ways = groups.setdefault((row["op"], row["type"], row["dtype"]), {})
            ways.setdefault(row["by"], {})[row["shape"]] = seconds, row["bytes"]
    copy = content["conditions"]["copy"]
    for (op, kind, dtype), ways in groups.items():
        kernel = ways.get("kernel", {})
        for by in sorted(ways, key=list(WAYS).index):
            found = ways[by]
            rates = [nbytes / seconds / 1e9 for seconds, nbytes in found.values()]
            ratios = [found[shape][0] / kernel[shape][0] for shape in found if shape in kernel and by != "kernel"]
            yield Row(
                f"{op}, {kind}, {dtype}",
                None,
                WAYS[by],
                f"{_range([1e6 * seconds for seconds, _ in found.values()], '.1f')} µs a launch",
                "",
                _share(_range(rates, ",.0f"), *([rate / copy["gb_s"] for rate in rates] if copy else [None])),
                f"{_range(ratios, '.2f')} x" if ratios else "",
            )


SCRIPTS: dict[str, Callable[[Mapping[str, Any]], Iterator[Row]]] = {
    "decode": _decode,
    "compare": _compare,
    "block": _block,
    "ops_speed": _ops,
}


def _share(gb_s: str, *of_copy: float | None) -> str:
    """Beside a speed its share of a copy's, where that is known."""
    known = [share for share in of_copy if share is not None]
    return f"{gb_s}, {_range(known, '.1%')}" if known else gb_s


def _model(content: Mapping[str, Any]) -> str:
    model = content["model"]
    cache = ", cache in 8 bits" if model.get("cache") == "8-bit" else ""
    return f"{model['name']}, {model['mix']}, {model['layers']} layers, {model['activations']}{cache}"


def _speed(row: Mapping[str, Any]) -> str:
    seconds = row["decode_seconds"]
    return f"{1 / seconds['median']:,.1f} tok/s ({1 / seconds['p90']:,.1f}-{1 / seconds['p10']:,.1f})"


def _prompt(row: Mapping[str, Any]) -> str:
    return f"{row['prefill_tok_s']['median']:,.0f}" if row["prefill_tok_s"] else ""


def _range(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least}-{most}"


def _parity(content: Mapping[str, Any]) -> list[str]:
    """Whether the kernels gave right results there; nothing where there are none, or nobody looked."""
    found = content.get("parity")
    if found is None or not found["checked"]:
        return []
    wrong = len(found["differ"])
    return [f"{found['checked'] - wrong} of {found['checked']} calls of kernels right"]


def _rounds(content: Mapping[str, Any]) -> str:
    """How much was measured, and whether a prompt was read."""
    random = any(row.get("fill") == "random" for row in content["rows"])
    prompt = any(row.get("fill") == "prefill" and row["depth"] > 1 for row in content["rows"])
    context = {(True, False): ", random context", (True, True): ", long contexts random"}.get((random, prompt), "")
    return f"{script.counted(content['rounds'], 'round')}{context}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(script.run(main))
