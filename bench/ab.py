"""Whether B is faster than A: one benchmark of both in turns, in fresh processes, and a verdict that noise can't make.

examples:
  python bench/ab.py main . -- --synthetic --depths 512,8k          a commit against the files as they are
  python bench/ab.py HEAD~1 HEAD --measure ops_speed -- --op qmv
  python bench/ab.py . MLX_MAX_OPS_PER_BUFFER=200                   an environment variable
  python bench/ab.py "--mix q4_0" "--mix q8_0" -- --synthetic 4     options of the benchmark
  python bench/ab.py . table.json --log -- --synthetic              launch shapes (see kernels/shapes.py)

A and B are each a commit, a folder with the project in it, a table of launch shapes, one NAME=VALUE or more, or options
of the benchmark; what stands after -- goes to both. Runs alternate: A B, B A, A B, ... Of each run the median counts,
of each pair B's over A's, and the verdict is that of Wilcoxon's signed-rank test at 95 %, on the mean of all rows and
on each. Pairs are added until the interval reaches no further than the smallest change that counts.

The rule: a faster op is a candidate, a faster block passes to the whole model, a faster whole model is accepted; and
nothing that makes a row slower. Every verdict is a line for bench/LOG.md, where --log writes it.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import numpy as np

from bench import script
from bench.conditions import ROOT
from bench.paired import CONFIDENCE, LEAST_PAIRS, Effect, enough, judge
from bench.sides import Report, Rows, Side, opened, rows_of, run
from bench.timing import summarize
from glm_mlx.errors import InputError

LOG = ROOT / "bench" / "LOG.md"
MOST_PAIRS, REST, SMALLEST = 20, 2.0, 0.01
FASTER = {  # by benchmark: what becomes of something faster, and what the log says of that
    "ops_speed": ("a candidate: a block of the model must be faster too", "candidate"),
    "block": ("passes to the whole model, which must be faster too", "to the whole model"),
    "decode": ("accepted", "yes"),
}
COLUMNS = ("", "A", "B", f"change ({CONFIDENCE:.0%} interval)", "B is")
ROWS_IN_LOG = 4


@dataclass
class Comparison:
    """pairs: (rows of A, rows of B); every other one began with B. first: the whole reports of the first pair. wrong:
    of which sides a kernel's result was not its twin's.
    """

    a: Side
    b: Side
    measure: str
    options: Sequence[str]
    smallest: float = SMALLEST
    pairs: list[tuple[Rows, Rows]] = field(default_factory=list)
    first: tuple[Report, Report] | None = None
    wrong: set[str] = field(default_factory=set)

    def medians(self) -> dict[str, list[tuple[float, float]]]:
        """(A, B) of each pair, by row, of the rows that every run has and whose time is over 0."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.pairs[0][0]:
            if all(side.get(row) for pair in self.pairs for side in pair):
                pairs = [(summarize(a[row]).median, summarize(b[row]).median) for a, b in self.pairs]
                if min(min(pair) for pair in pairs) > 0:
                    found[row] = pairs
        return found

    def effects(self) -> dict[str, Effect]:
        return {row: judge([b / a for a, b in pairs], self.smallest) for row, pairs in self.medians().items()}

    def overall(self) -> Effect:
        """Of the geometric mean of the rows."""
        logs = [[np.log(b / a) for a, b in pairs] for pairs in self.medians().values()]
        return judge(np.exp(np.mean(logs, axis=0)).tolist(), self.smallest)


@dataclass(frozen=True)
class Outcome:
    """What became of B, by the rule."""

    comparison: Comparison
    overall: Effect
    rows: dict[str, Effect]

    @classmethod
    def of(cls, comparison: Comparison) -> "Outcome":
        return cls(comparison, comparison.overall(), comparison.effects())

    @property
    def passes(self) -> bool:
        return self.overall.verdict == "faster" and self.objection is None

    @property
    def kept(self) -> str:
        """For the log."""
        return FASTER[self.comparison.measure][1] if self.passes else "no"

    def __str__(self) -> str:
        effect = self.overall
        found = effect.verdict if effect.verdict == "no difference" else f"B is {effect.verdict}"
        then = FASTER[self.comparison.measure][0] if self.passes else "rejected"
        if effect.verdict == "faster" and self.objection:
            then += f", as {self.objection}"
        return f"{found}: {effect} of the time, {effect.pairs} pairs; {then}"

    @property
    def objection(self) -> str | None:
        """What is said against something faster."""
        if "B" in self.comparison.wrong:
            return "its kernels compute something else than their twins"
        return next((f"{row} is slower" for row, effect in self.rows.items() if effect.verdict == "slower"), None)


def main(argv: list[str] | None = None) -> int:
    args, options = _arguments(sys.argv[1:] if argv is None else argv)
    path = script.results_file("ab", args.json)
    stopped, code = "", 0
    with opened((args.a, args.b), args.measure) as (a, b):
        comparison = Comparison(a, b, args.measure, options, args.smallest)
        try:
            with script.NOTES.status("measuring") as status:
                for text in measure(comparison, args.pairs, args.rest):
                    status.update(text)
        except KeyboardInterrupt:
            stopped, code = "interrupted: this is what was measured until then", 130
        except InputError as error:
            if not comparison.pairs:
                raise
            stopped, code = f"stopped: {error}", 2
        notes = [*_notes(comparison), *[stopped] * bool(stopped)]
    outcome = Outcome.of(comparison) if len(comparison.pairs) >= LEAST_PAIRS else None
    _print(comparison, outcome, notes)
    if outcome is not None and args.log:
        add_to_log(log_line(outcome, args.what))
    script.write_json(path, {**as_json(comparison), "what": args.what, "notes": notes})
    return code


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own = list(takewhile(lambda word: word != "--", argv))
    parser = script.parser("ab", __doc__)
    parser.usage = "python bench/ab.py A B [-h] [--measure SCRIPT] [...] [-- OPTIONS OF THE SCRIPT]"
    parser.add_argument("a", metavar="A", help="what there is")
    parser.add_argument("b", metavar="B", help="what may be faster")
    parser.add_argument("--measure", choices=FASTER, default="decode", help="the benchmark (default decode)")
    add_rule_arguments(parser)
    parser.add_argument("--what", default="", metavar="TEXT", help="what B tries, for the log")
    return parser.parse_args(own), argv[len(own) + 1 :]


def add_rule_arguments(parser: argparse.ArgumentParser) -> None:
    """How a verdict is reached: pairs, smallest, rest, log."""
    parser.add_argument(
        "--pairs", type=script.whole(LEAST_PAIRS), default=MOST_PAIRS, metavar="N",
        help=f"of runs, at most (default {MOST_PAIRS}, at least {LEAST_PAIRS})",
    )  # fmt: skip
    parser.add_argument(
        "--smallest", type=percent, default=SMALLEST, metavar="P", help="change that counts (default 1%%)"
    )
    parser.add_argument("--rest", type=_number, default=REST, metavar="S", help="seconds before a run (default 2)")
    parser.add_argument("--log", action="store_true", help="add each verdict to bench/LOG.md")


def percent(text: str) -> float:
    return _number(text.removesuffix("%")) / 100


def _number(text: str) -> float:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")
    return float(text)


def measure(comparison: Comparison, most: int = MOST_PAIRS, rest: float = REST) -> Iterator[str]:
    """Add pairs until there are enough, and say before each run which it is."""
    known = ""
    while len(comparison.pairs) < most:
        number = len(comparison.pairs)
        if number >= LEAST_PAIRS:
            effect = comparison.overall()
            # At even numbers, so that both began as often.
            if number % 2 == 0 and enough(effect, comparison.smallest):
                return
            known = f"; so far {effect}"
        sides = [("A", comparison.a), ("B", comparison.b)]
        reports: dict[str, Report] = {}
        for name, side in sides if number % 2 == 0 else sides[::-1]:
            yield f"pair {number + 1} of at most {most}, {name}{known}"
            time.sleep(rest)
            reports[name] = run(side, comparison.measure, comparison.options)
        comparison.wrong |= {
            name for name, found in reports.items() if (found.get("parity") or {}).get("agree") is False
        }
        comparison.first = comparison.first or (reports["A"], reports["B"])
        comparison.pairs.append((rows_of(reports["A"]), rows_of(reports["B"])))
        if not comparison.medians():
            if number:
                comparison.pairs.pop()  # those before it stay good
            raise InputError(f"A and B have no row in common that {comparison.measure}.py could measure")


def _notes(comparison: Comparison) -> Iterator[str]:
    if comparison.first is None:
        yield "no pair was measured"
        return
    a, b = comparison.first
    if differing := _differing_scripts(comparison.a.tree, comparison.b.tree):
        yield f"A and B are not measured by the same scripts: bench/ differs in {', '.join(differing)}"
    if left_out := {row for pair in comparison.pairs for rows in pair for row in rows} - set(comparison.medians()):
        yield f"left out, as not every run has a time for it: {'; '.join(sorted(left_out))}"
    for name in sorted(comparison.wrong):
        yield f"{name}: kernels disagree with their twins, so these are speeds of a wrong result"
    for row, (tokens_a, tokens_b) in _tokens(a, b):
        pairs = list(zip(tokens_a, tokens_b, strict=False))
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        yield f"{row}: A and B give the same first {same} of {len(pairs)} tokens"
    if len(comparison.pairs) < LEAST_PAIRS:
        yield f"no verdict: {len(comparison.pairs)} pairs, and {LEAST_PAIRS} are needed"
    elif not enough(comparison.overall(), comparison.smallest):
        yield (
            f"the interval is wider than ±{comparison.smallest:.1%}: noise may hide a difference; give more --pairs, a "
            "quieter machine, or a larger --smallest"
        )


def _differing_scripts(a: Path, b: Path) -> list[str]:
    texts = [{path.name: path.read_bytes() for path in (tree / "bench").glob("*.py")} for tree in (a, b)]
    return sorted(name for name in texts[0].keys() | texts[1].keys() if texts[0].get(name) != texts[1].get(name))


def _tokens(a: Report, b: Report) -> Iterator[tuple[str, tuple[list[int], list[int]]]]:
    """By depth, where the benchmark decodes."""
    of_a, of_b = (
        {f"depth {run['depth']:,}": run["tokens"] for run in report.get("runs", []) if "tokens" in run}
        for report in (a, b)
    )
    for row in of_a:
        if row in of_b:
            yield row, (of_a[row], of_b[row])


# --- what a person reads


def _print(comparison: Comparison, outcome: Outcome | None, notes: Sequence[str]) -> None:
    options = " ".join((f"{comparison.measure}.py", *comparison.options))
    lines = [
        f"A: {comparison.a.name}",
        f"B: {comparison.b.name}",
        f"{options}: {len(comparison.pairs)} pairs of fresh processes; changes count from {comparison.smallest:.1%}",
    ]
    if comparison.first:
        lines.append(f"{_machine(comparison)}; every verdict by Wilcoxon's signed-rank test")
    table = script.table("time of B against A", COLUMNS)
    for row, pairs in comparison.medians().items() if comparison.pairs else ():
        effect = outcome and outcome.rows[row]
        table.add_row(row, *_medians(pairs), str(effect or "-"), effect.verdict if effect else "-")
    if outcome:
        table.add_row("mean of all rows", "", "", str(outcome.overall), outcome.overall.verdict)
        lines.append(str(outcome))
        notes = [*notes, f"for the log: {log_line(outcome, '')}"]
    script.show(lines, [table], notes)


def _medians(pairs: Sequence[tuple[float, float]]) -> tuple[str, str]:
    """Of A and of B over all pairs, in one unit."""
    a, b = (summarize(values).median for values in zip(*pairs, strict=True))
    scale, unit = (1e6, "µs") if a < 1e-3 else (1e3, "ms")
    return f"{scale * a:.4g} {unit}", f"{scale * b:.4g} {unit}"


def _machine(comparison: Comparison) -> str:
    assert comparison.first is not None
    found = comparison.first[0]["conditions"]
    return f"{found['chip']} ({found['back_end']})"


def log_line(outcome: Outcome, what: str) -> str:
    """A row of bench/LOG.md."""
    comparison, effect = outcome.comparison, outcome.overall
    medians = list(comparison.medians().items())
    figures = [f"{row}: {' → '.join(_medians(pairs))}" for row, pairs in medians[:ROWS_IN_LOG]]
    figures += [f"{len(medians) - ROWS_IN_LOG} rows more"] * (len(medians) > ROWS_IN_LOG)
    tried = f"{what}: " if what else ""
    cells = (
        date.today().isoformat(),
        f"{tried}`{comparison.b.name}` against `{comparison.a.name}`, "
        f"`{' '.join((comparison.measure, *comparison.options))}`",
        f"{effect.verdict}, {effect} of the time, {effect.pairs} pairs; {'; '.join(figures)}",
        _machine(comparison),
        outcome.kept,
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def add_to_log(line: str) -> None:
    """As the newest. Raises InputError where there is no such table."""
    try:
        before, rule, after = LOG.read_text().partition("|---|---|---|---|---|\n")
        if not rule:
            raise InputError(f"{LOG} has no table with five columns; add the line by hand: {line}")
        LOG.write_text(f"{before}{rule}{line}\n{after}")
    except OSError as error:
        raise InputError(f"cannot write {LOG}: {error.strerror}; add the line by hand: {line}") from None


def as_json(comparison: Comparison) -> Report:
    outcome = Outcome.of(comparison) if len(comparison.pairs) >= LEAST_PAIRS else None
    report: dict[str, Any] = {
        "script": "ab",
        "a": _side_as_json(comparison.a),
        "b": _side_as_json(comparison.b),
        "measure": comparison.measure,
        "options": list(comparison.options),
        "test": f"Wilcoxon signed-rank on log ratios of medians, Hodges-Lehmann estimate, {CONFIDENCE:.0%}",
        "smallest": comparison.smallest,
        "conditions": [report["conditions"] for report in comparison.first or ()],
        "parity": [report.get("parity") for report in comparison.first or ()],
        "verdict": outcome and outcome.overall.verdict,
        "kept": outcome and outcome.kept,
        "overall": outcome and outcome.overall.as_dict(),
        "rows": outcome and {row: effect.as_dict() for row, effect in outcome.rows.items()},
        "pairs": [{"a": a, "b": b, "began": "ab"[i % 2]} for i, (a, b) in enumerate(comparison.pairs)],
    }
    return report


def _side_as_json(side: Side) -> dict[str, Any]:
    return {"name": side.name, "options": list(side.options), "environment": dict(side.environment)}


if __name__ == "__main__":
    sys.exit(script.run(main))
