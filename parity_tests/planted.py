"""Whether bench/ab.py calls a slowdown slower, and a change that changes nothing no difference. By hand, on a GPU.

    python -m parity_tests.planted --trials 10 --json planted.json
    python -m parity_tests.planted --trials 1 --measure decode -- --synthetic --depths 512 --fill random

Copies of this project are compared with a copy of it: `same` has one more comment, `slower` really does more work. In
it every so many-th launch of each kernel is made twice, one after the other, so that host and device both have more to
do. How many make 2 to 4 % is found first, from a few pairs each. The exit code is 0 where 9 of 10 verdicts are right.

The copies, all alike, time the kernels alone and more of them at once, and do not look at the results, so that a trial
takes a minute.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bench import ab, script
from bench.conditions import ROOT
from bench.sides import Side, rows_of, run
from glm_mlx.errors import InputError
from kernels import launcher

SLOWER, OFF = 0.03, 0.01  # the slowdown, and what it may be off
FIRST, DOSES, DOSE_PAIRS = 10, 6, 3  # the dose that is tried first, how many are, and pairs of each
RIGHT = 0.9
OPTIONS = ["--op", "experts_down", "--rounds", "6"]
WANTED = {"slower": "slower", "same": "no difference"}
ALIKE = {
    "bench/op_timing.py": """
GPU_LAUNCHES, SAMPLE_SECONDS = 256, 0.05
_measure = measure_wall

def relative_error(got, truth):
    return 0.0

def measure_wall(case, link, rounds, rows):
    from dataclasses import replace

    return _measure(replace(case, contestants={"kernel": case.contestants["kernel"]}), link, rounds, rows)
""",
    "bench/conditions.py": """
def copy_bandwidth():
    return {"gb_s": 1.0, "bytes": 1, "seconds": {}, "by": "nothing, for a trial"}
""",
}
REPEAT = """
_launch, _counts, _EVERY = Launch.__call__, {{}}, {every}

def _twice(self, *arrays):
    results = _launch(self, *arrays)
    _counts[self.op] = _counts.get(self.op, 0) + 1
    if _counts[self.op] % _EVERY == 0:
        results = _launch(self, mx.depends(arrays[0], results[0]), *arrays[1:])
    return results

Launch.__call__ = _twice
"""


def main() -> int:
    args, options = _arguments()
    if all(launcher.back_end(op) is None for op in launcher.OPS):
        raise InputError("this device launches no kernels, so no work can be planted in them")
    path = script.results_file("planted", args.json)
    options = options or (OPTIONS if args.measure == "ops_speed" else [])
    report: dict[str, Any] = {"script": "planted", "measure": args.measure, "options": options, "trials": []}
    with tempfile.TemporaryDirectory(prefix="glm-mlx-planted-") as folder:
        base = Side("base", copy(Path(folder) / "base"))
        same = Side("same", copy(Path(folder) / "same", "\n# one more comment\n"))
        report["doses"] = doses = {}

        def slowdown(every: int) -> float:
            doses[every] = change = measured(base, Path(folder) / f"every {every}", every, args.measure, options)
            return change

        report["every"] = every = args.every or dose(slowdown)
        slower = Side("slower", copy(Path(folder) / "slower", REPEAT.format(every=every)))
        print(f"planted: every launch number {every} of a kernel is made twice")
        for number in range(args.trials):
            for side in (slower, same):
                outcome = trial(base, side, args, options)
                right = outcome.overall.verdict == WANTED[side.name]
                report["trials"].append({"of": side.name, "right": right, **ab.as_json(outcome.comparison)})
                path.write_text(json.dumps(report))  # what is known if the time runs out
                print(f"trial {number + 1}, {side.name}: {'right' if right else 'WRONG'}; {outcome}", flush=True)
    script.write_json(path, report)
    counts = {name: [made["right"] for made in report["trials"] if made["of"] == name] for name in WANTED}
    for name, verdicts in counts.items():
        print(f"{name}: {sum(verdicts)} of {len(verdicts)} are called {WANTED[name]}")
    return 0 if all(sum(verdicts) >= RIGHT * len(verdicts) for verdicts in counts.values()) else 1


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    own = list(takewhile(lambda word: word != "--", sys.argv[1:]))
    parser = script.parser("planted", __doc__)
    parser.prog = "python -m parity_tests.planted"
    parser.usage = f"{parser.prog} [-h] [--trials N] [...] [-- OPTIONS OF THE BENCHMARK]"
    parser.add_argument("--trials", type=script.whole(1), default=10, help="of each kind (default 10)")
    parser.add_argument("--measure", choices=ab.FASTER, default="ops_speed", help="the benchmark (default ops_speed)")
    parser.add_argument("--every", type=script.whole(2), help="which launches are made twice, instead of a search")
    ab.add_rule_arguments(parser)
    parser.set_defaults(rest=0.0)
    return parser.parse_args(own), sys.argv[len(own) + 2 :]


def copy(tree: Path, planted: str = "") -> Path:
    """Of the project, with text behind kernels/launcher.py."""
    for name in ("bench", "glm_mlx", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name, text in {**ALIKE, "kernels/launcher.py": planted}.items():
        with (tree / name).open("a") as file:
            file.write(text)
    return tree


def dose(slowdown: Callable[[int], float]) -> int:
    """Of how many launches one must be made twice.

    The time is not in proportion to them: a second launch may find its weights in a cache. So doses are tried, first
    doubled or halved, and then between two.
    """
    every, too_much, too_little = FIRST, [1], list[int]()
    for _ in range(DOSES):
        change = slowdown(every)
        if abs(change - SLOWER) <= OFF:
            return every
        (too_much if change > SLOWER else too_little).append(every)
        every = (max(too_much) + min(too_little)) // 2 if too_little else 2 * every
        if every in (*too_much, *too_little):
            break
    raise InputError(f"no number of launches made twice changes the time by {SLOWER:.0%}: too much noise")


def measured(base: Side, tree: Path, every: int, measure: str, options: list[str]) -> float:
    """The slowdown where every so many-th launch is made twice, from a few pairs."""
    probe = Side("probe", copy(tree, REPEAT.format(every=every)))
    comparison = ab.Comparison(base, probe, measure, options)
    for _ in range(DOSE_PAIRS):
        comparison.pairs.append((rows_of(run(base, measure, options)), rows_of(run(probe, measure, options))))
    logs = [[np.log(b / a) for a, b in pairs] for pairs in comparison.medians().values()]
    change = float(np.expm1(np.median(np.mean(logs, axis=0)))) if logs else 0.0
    print(f"every launch number {every} made twice: {change:+.1%}", flush=True)
    return change


def trial(base: Side, side: Side, args: argparse.Namespace, options: list[str]) -> ab.Outcome:
    comparison = ab.Comparison(base, side, args.measure, options, args.smallest)
    with script.NOTES.status("measuring") as status:
        for text in ab.measure(comparison, args.pairs, args.rest):
            status.update(text)
    return ab.Outcome.of(comparison)


if __name__ == "__main__":
    sys.exit(script.run(main))
