"""Searches launch shapes for this device, lets a block and the whole model judge them, and stores what wins.

examples:
  python bench/tune.py                                        every op with Q4_0 weights; judged on random weights
  python bench/tune.py --op experts_down --quant Q4_K -- --synthetic --mix q4_k_m
  python bench/tune.py -- --model GLM-4.7-Flash-Q4_0.gguf     judged on a file
  python bench/tune.py -- --layers 4                          where memory is small
  python bench/tune.py --candidates found.json                in two steps: the search alone, and then
  python bench/tune.py --judge found.json                     the verdict on all that it found
  python bench/tune.py --within -- --synthetic --layers 12    all launches of a token at once, within the model (NVIDIA)

One parameter of a launch at a time (rows, simdgroups, chunks at once, splits of the context), beginning with what is in
use, until no other value is faster. A shape that no device could run is never launched, one whose result is not the
twin's, or not the same twice, is never timed. What is faster alone is a candidate: bench/ab.py then compares a block,
and after that the whole model, with and without it, in fresh processes. Options after -- go to both benchmarks.

Where the GPU tells the time of each launch (NVIDIA, with PyTorch installed), --within searches in whole tokens, as what
is the fastest alone need not be there. Its verdict: old and new shapes in turns, the GPU's time for a token must be
less, and bench/ab.py must not call decode.py slower by the clock, where the host may be the limit. After -- then stands
what names a model, and nothing else.

The table is the user's own, which every run of the product reads; --ship writes to kernels/shapes.json as well, for the
family of an Apple chip (Apple M3), but for one NVIDIA GPU by its name: those of one architecture differ too much. Where
no kernel is launched, there is nothing to tune.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import mlx.core as mx

from bench import ab, gpu_time, op_cases, script
from bench.conditions import conditions, describe
from bench.op_timing import Link
from bench.paired import LEAST_PAIRS
from bench.search import Found, Search, label
from bench.sides import with_table
from bench.subject import add_arguments, open_subject, usable_depths
from bench.timing import summarize
from bench.within import TOKENS, WARM_UP, Within
from glm_mlx import command
from glm_mlx.errors import InputError
from glm_mlx.model import activation_dtype
from kernels import launcher, shapes
from kernels.planes import QUANT_TYPES
from kernels.shown import shown

GATES: dict[str, tuple[str, ...]] = {
    "block": ("--depths", "512,4k,32k"),
    "decode": ("--depths", "0,4k,32k", "--fill", "random"),
}
IN_A_TOKEN = {"router": "qmv", "heads": "qmv"}  # ops of bench/op_cases.py that are others' launches
DEPTH_WITHIN = 128  # tokens before: shapes of attention are of that context
COLUMNS = ("shape", "type", "tried", "refused", "wrong", "in use", "found", "change (95% interval)")


def main(argv: list[str] | None = None) -> int:
    args, options = _arguments(sys.argv[1:] if argv is None else argv)
    device = shapes.device()
    if device is None or all(launcher.back_end(op) is None for op in launcher.OPS):
        raise InputError("this device launches no kernels, so there is no launch shape to tune")
    path = script.results_file("tune", args.json)
    within = subject_arguments(options) if args.within else None
    table = read_table(shapes.user_file())
    read_table(shapes.SHIPPED)
    judged = read_table(args.judge) if args.judge else {}
    if args.judge:
        judged = to_judge(args.judge, judged, table, device[0])
    if args.candidates:
        table, _ = for_these_texts(read_table(args.candidates) or table, device[0])
    found = conditions()
    script.show(describe(found), [])
    made: dict[str, Any] = {"script": "tune", "device": device, "conditions": found, "ops": {}, "stopped": None}
    kept: dict[str, Any]
    code = 0
    try:
        if args.judge:
            made["judged"] = kept = {"gates": [], "stored": False}
            if passes(str(args.judge), table, judged, options, args, kept["gates"]):
                store(judged, device, args.ship)
                kept["stored"] = True
        if within is not None:
            made["within"] = kept = {"searches": [], "token": None, "gates": [], "stored": False}
            new = search_within(within, args, table, device[0], kept)
            mx.clear_cache()  # the benchmark wants the memory of the model that was searched
            if new != table and not clock_objects(table, new, options, args, kept):
                store(new, device, args.ship)
                kept["stored"] = True
        for op in [] if args.judge or args.within else args.op:
            made["ops"][op] = kept = {"searches": [], "gates": [], "stored": False}
            new = search_op(op, args, table, device[0], kept["searches"])
            if args.candidates:
                table = new
            elif new != table and passes(op, table, new, options, args, kept["gates"]):
                table = new
                store(table, device, args.ship)
                kept["stored"] = True
    except KeyboardInterrupt:
        made["stopped"], code = "interrupted", 130
    except InputError as error:
        made["stopped"], code = str(error), 2
    if made["stopped"]:
        print(f"stopped: {made['stopped']}; what was stored until then stays", file=sys.stderr)
    script.write_json(path, made)
    return code


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    own = list(takewhile(lambda word: word != "--", argv))
    parser = script.parser("tune", __doc__)
    parser.usage = "python bench/tune.py [-h] [--op OP[,OP]] [...] [-- OPTIONS OF block.py AND decode.py]"
    ops, quants = tuple(op_cases.OPS), (*QUANT_TYPES, "F16", "BF16", "F32")
    ops_help = f"of {', '.join(ops)} (default: all)"
    parser.add_argument(
        "--op", type=script.listed(script.choice(*ops)), default=list(ops), metavar="OP[,OP]", help=ops_help
    )
    parser.add_argument(
        "--quant", type=script.listed(script.choice(*quants)), default=["Q4_0"], metavar="TYPE[,TYPE]",
        help=f"types of the weights (default Q4_0) of {', '.join(quants)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=script.whole(LEAST_PAIRS), default=20, help="samples of a shape (default 20)")
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument("--candidates", type=Path, metavar="FILE", help="only search, and add what wins to this table")
    stage.add_argument(
        "--within", action="store_true",
        help="search within the model, by the GPU's own time; without --quant, --rounds and --log",
    )  # fmt: skip
    stage.add_argument("--judge", type=Path, metavar="FILE", help="only judge this table, and store it if it wins")
    parser.add_argument("--ship", action="store_true", help="write what is stored to kernels/shapes.json too")
    ab.add_rule_arguments(parser)
    return parser.parse_args(own), argv[len(own) + 1 :]


def search_op(
    op: str, args: argparse.Namespace, table: shapes.Table, device: str, kept: list[dict[str, Any]]
) -> shapes.Table:
    """The table with what wins in an op's cases.

    As each search ends, `kept` gets it, and the file of candidates what it found.
    """
    cases: list[Found] = []
    notes: list[str] = []
    try:
        for case in searches(op, args, notes):
            cases.append(case)
            kept.append(_as_json(case))
            table = with_candidates(table, [case], device)
            if args.candidates and table != read_table(args.candidates):
                write_table(args.candidates, table)
    finally:
        mx.clear_cache()  # the benchmarks want the memory
        if cases or notes:
            show_search(op, cases, notes)
    return table


def subject_arguments(options: Sequence[str]) -> argparse.Namespace:
    """What model --within searches in. Raises InputError where no time of a launch is known."""
    if not gpu_time.available():
        raise InputError("this GPU does not tell the time of a launch: --within wants an NVIDIA GPU, and PyTorch")
    parser = command.Parser(prog="python bench/tune.py --within --", description="The model to search in.")
    add_arguments(parser)
    return parser.parse_args(list(options) or ["--synthetic"])


def search_within(
    model: argparse.Namespace, args: argparse.Namespace, table: shapes.Table, device: str, kept: dict[str, Any]
) -> shapes.Table:
    """The table with what makes a token take less of the GPU's time. `kept` gets what was found."""
    subject = open_subject(model)
    usable_depths(subject, [DEPTH_WITHIN], WARM_UP + TOKENS)
    within = Within(subject.model, DEPTH_WITHIN, [IN_A_TOKEN.get(op, op) for op in args.op], args.smallest)
    if not within.parts:
        raise InputError(f"no launch of a token has a shape that a table may set, of --op {','.join(args.op)}")
    try:
        with script.NOTES.status("searching within the model"):
            whole = within.run(args.pairs)
    finally:
        kept["searches"] += map(_as_json, within.found)
        show_search("within the model", within.found, [])
    print(f"a token, by the GPU's time: {whole or 'nothing is faster'}")
    kept["token"] = whole and whole.as_dict()
    return with_candidates(table, within.found, device) if whole and whole.verdict == "faster" else table


def clock_objects(
    old: shapes.Table, new: shapes.Table, options: Sequence[str], args: argparse.Namespace, kept: dict[str, Any]
) -> bool:
    """Whether the whole model is slower by the clock, or computes something else; `kept` gets what was measured."""
    outcome = judged_by("decode", "all launches", old, new, options, args, kept["gates"])
    kept["gates"][-1]["kept"] = None  # by the rule for what must be faster by the clock, which this is not
    objection = "it is slower" if outcome.overall.verdict == "slower" else outcome.objection
    print(f"by the clock: {outcome.overall} of the time; {objection or 'no objection'}")
    return objection is not None


def searches(op: str, args: argparse.Namespace, notes: list[str]) -> Iterator[Found]:
    """The searches of an op's cases, as they end. `notes` gets why others were not made."""
    with script.NOTES.status(f"{op}: making weights") as status:
        for quant in args.quant[:1] if op in op_cases.WITHOUT_QUANT else args.quant:
            for case in op_cases.OPS[op](quant, activation_dtype(), op_cases.GPU):
                status.update(f"{op}: {case.what}, {case.quant}")
                if "kernel" not in case.contestants:
                    notes.append(f"{case.what}: there is no kernel for it here")
                    continue
                link, _ = Link.long_enough(case.x.dtype, case.x.size)
                search = Search(case, link, args.rounds, args.smallest)
                if search.found.start:
                    yield search.run()
                else:
                    notes.append(f"{case.what}: its launch has no parameters that a table may set")


def passes(
    op: str, old: shapes.Table, new: shapes.Table, options: Sequence[str], args: argparse.Namespace, gates: list[Any]
) -> bool:
    """Whether a block, and after it the whole model, is faster with the new table.

    `gates` gets what was measured, without a verdict where an end came on the way.
    """
    for measured in GATES:
        outcome = judged_by(measured, op, old, new, options, args, gates)
        print(f"{op}, {measured}: {outcome}")
        if args.log:
            ab.add_to_log(ab.log_line(outcome, f"launch shapes of {op}"))
        if not outcome.passes:
            return False
    return True


def judged_by(
    measured: str,
    op: str,
    old: shapes.Table,
    new: shapes.Table,
    options: Sequence[str],
    args: argparse.Namespace,
    gates: list[Any],
) -> ab.Outcome:
    """What became of the new table in one benchmark. `gates` gets what was measured, whatever ends it."""
    with tempfile.TemporaryDirectory(prefix="glm-mlx-tune-") as folder:
        a = with_table("the shapes in use", old, Path(folder) / "a")
        b = with_table(f"tuned shapes of {op}", new, Path(folder) / "b")
        comparison = ab.Comparison(a, b, measured, (*GATES[measured], *(options or ["--synthetic"])), args.smallest)
        interrupted = True
        try:
            with script.NOTES.status(f"{op}: {measured}") as status:
                for text in ab.measure(comparison, args.pairs, args.rest):
                    status.update(f"{op}, {measured}: {text}")
            interrupted = False
        finally:
            no_verdict = {"verdict": None, "kept": None} if interrupted else {}
            gates.append({**ab.as_json(comparison), **no_verdict, "interrupted": interrupted})
    return ab.Outcome.of(comparison)


def with_candidates(table: shapes.Table, cases: Sequence[Found], device: str) -> shapes.Table:
    for case in cases:
        for (op, what), values in case.best.items() if case.is_candidate else ():
            entry: shapes.Entry = {**values, "text": shapes.text_digest(op)}
            table = shapes.with_entry(table, device, op, what, entry)
    return table


def store(table: shapes.Table, device: tuple[str, str], ship: bool) -> None:
    """As the user's own; what it says about this device also in the repository, if it is to ship.

    There it holds for the device's family, but on NVIDIA for the device alone: an architecture has GPUs with less than
    half of another's bandwidth, and an entry of the device would go before the family's.
    """
    write_table(shapes.user_file(), table)
    if ship:
        name, family = device
        where = name if family.startswith("NVIDIA ") else family
        shipped = read_table(shapes.SHIPPED)
        for op, entries in table.get(name, {}).items():
            for what, entry in entries.items():
                if is_for_this_text(op, entry):
                    values: shapes.Entry = {key: value for key, value in entry.items() if key != "text"}
                    shipped = shapes.with_entry(shipped, where, op, what, values)
        write_table(shapes.SHIPPED, shipped)


def to_judge(path: Path, table: shapes.Table, own: shapes.Table, device: str) -> shapes.Table:
    """What is to be judged: a run passes over entries for another text of a kernel, so nothing could be said of them.

    `own`: the user's table. Raises InputError where nothing is left that is not in it.
    """
    if device not in table:
        raise InputError(f"{shown(path)} has no launch shapes for {device}; --candidates makes such a table")
    left, stale = for_these_texts(table, device)
    if stale:
        said = f"shapes of {', '.join(sorted(set(stale)))} in {shown(path)} were found for another text of the kernel"
        if left[device] == for_these_texts(own, device)[0].get(device, {}):
            raise InputError(f"{said}, and there is nothing else to judge; search anew with --candidates")
        script.NOTES.print(f"{said} and are left out; search anew with --candidates", markup=False)
    return left


def for_these_texts(table: shapes.Table, device: str) -> tuple[shapes.Table, list[str]]:
    """The table without a device's entries for other texts of the kernels, and of which op each of these was."""
    left: dict[str, dict[str, shapes.Entry]] = {}
    stale = []
    for op, entries in table.get(device, {}).items():
        for what, entry in entries.items():
            if is_for_this_text(op, entry):
                left.setdefault(op, {})[what] = entry
            else:
                stale.append(op)
    return ({**table, device: left} if stale else table), stale


def is_for_this_text(op: str, entry: shapes.Entry) -> bool:
    """Whether an entry was found for the kernel's text as it is, which a run asks too."""
    digest = shapes.text_digest(op)
    return entry.get("text", digest) == digest


def read_table(path: Path) -> shapes.Table:
    try:
        return shapes.read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot add to the launch shapes of {shown(path)} ({error}); mend or remove it") from None


def write_table(path: Path, table: shapes.Table) -> None:
    try:
        shapes.write(path, table)
    except OSError as error:
        raise InputError(f"cannot write {shown(path)}: {error.strerror}") from None
    print(f"written: {shown(path)}")


def show_search(op: str, cases: Sequence[Found], notes: Sequence[str]) -> None:
    table = script.table(op, COLUMNS, words=2)
    for found in cases:
        table.add_row(
            found.case,
            found.quant,
            str(found.tried),
            str(len(found.refused)),
            str(len(found.wrong)),
            label(found.start),
            label(found.best) if found.best != found.start else "the same",
            str(found.effect or "-"),
        )
        notes = [*notes, *(f"{found.case}, {name}: {why}" for name, why in found.wrong.items())]
    script.show([], [table], notes)


def _as_json(found: Found) -> dict[str, Any]:
    shapes_of = {
        name: [{"op": op, "what": what, **values} for (op, what), values in shape.items()]
        for name, shape in (("start", found.start), ("best", found.best))
    }
    summaries = [{name: summarize(values).as_dict() for name, values in rows.items()} for rows in found.seconds]
    effect = found.effect and asdict(found.effect)
    return {**vars(found), **shapes_of, "effect": effect, "summaries": summaries}


if __name__ == "__main__":
    sys.exit(script.run(main))
