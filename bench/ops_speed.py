"""How fast each op is at the model's shapes: its kernel against its twin and against MLX's own operations.

examples:
  python bench/ops_speed.py
  python bench/ops_speed.py --op experts_gate_up,experts_down --quant Q4_0,Q4_K --dtype bfloat16

Launches wait for one another, as in decode ("chain"), or not ("independent"). Weights, tokens, chosen experts and
caches rotate, so that no cache holds them. The contestants take turns; a wrong result is not timed. "GPU" is the time
that the GPU itself spent, known on NVIDIA with PyTorch installed; where it is known, the columns after it are by it.
GB/s counts each byte once that a launch must read or write; "of copy" is its share of what a copy on this device moves.
On a CPU there are no kernels, and fewer experts, tokens of the vocabulary and rounds.
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import mlx.core as mx
from rich.table import Table

from bench import gpu_time, op_cases, script
from bench.conditions import back_end, parity_state
from bench.frame import Frame
from bench.op_cases import OPS, WITHOUT_QUANT
from bench.op_timing import LAUNCHES, Link, Row, Timer, measure_gpu, measure_wall
from bench.timing import summarize
from glm_mlx.model import activation_dtype
from kernels.planes import QUANT_TYPES

DTYPES = {script.dtype_name(dtype): dtype for dtype in (mx.float32, mx.bfloat16, mx.float16)}
COLUMNS = (
    "shape", "type", "by", "first\nms", "chain\nµs", "p10-p90\nµs", "IQR\nµs", "MAD\nµs", "\ncount", "GPU\nµs",
    "\nGB/s", "of\ncopy", "\nGFLOP/s", "against\ntwin", "independent\nµs",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = script.parser("ops_speed", __doc__)
    quants = (*QUANT_TYPES, "F16", "BF16", "F32")
    ops_help = f"of {', '.join(OPS)} (default: all)"
    parser.add_argument(
        "--op", type=script.listed(script.choice(*OPS)), default=list(OPS), metavar="OP[,OP]", help=ops_help
    )
    parser.add_argument(
        "--quant", type=script.listed(script.choice(*quants)), default=["Q4_0"], metavar="TYPE[,TYPE]",
        help=f"types of the weights (default Q4_0) of {', '.join(quants)}",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of activations (default: the product's on this device)")
    parser.add_argument("--rounds", type=script.whole(1), help="samples of each (default 30, on a CPU 5)")
    args = parser.parse_args(argv)
    path = script.results_file("ops_speed", args.json)
    on_cpu = back_end() == "cpu"
    sizes = op_cases.CPU if on_cpu else op_cases.GPU
    dtype = DTYPES[args.dtype] if args.dtype else activation_dtype()
    rounds = args.rounds or (5 if on_cpu else 30)

    frame = Frame("ops_speed", path)
    rows: list[Row] = []
    tiny: dict[mx.Dtype, float] = {}
    with frame.measuring() as status:
        timers: list[list[Timer]] = []
        for op in args.op:
            for quant in args.quant[:1] if op in WITHOUT_QUANT else args.quant:
                for case in OPS[op](quant, dtype, sizes):
                    status.update(f"{op}: {case.what}")
                    link, tiny[case.dtype] = Link.long_enough(case.x.dtype, case.x.size)
                    timers.append(measure_wall(case, link, rounds, rows))
            mx.clear_cache()
        status.update("GPU time")
        for of_case in timers if gpu_time.available() else []:
            measure_gpu(of_case, rounds)

    rows = [row for row in rows if row.chain or row.problem]
    kernels = [row for row in rows if row.by == "kernel"]
    wrong = [{"call": _name(row), "error": row.problem} for row in kernels if row.problem]
    frame.parity = parity_state(len(kernels), wrong)
    lines = [
        f"activations {', '.join(script.dtype_name(d) for d in tiny)}; a tiny launch that waits for "
        f"another: {', '.join(f'{1e6 * t:.1f}' for t in tiny.values())} µs; medians of up to {rounds} rounds",
    ]
    frame.notes += [f"{_name(row)}, by {row.by}: {row.problem}" for row in rows if row.problem]
    report = {
        "sizes": vars(sizes),
        "dtype": script.dtype_name(dtype),
        "rounds": rounds,
        "launches_of_a_sample": LAUNCHES,
        "tiny_launch_seconds": {script.dtype_name(d): t for d, t in tiny.items()},
        "rows": [_as_json(row) for row in rows],
    }
    return frame.finish(lines, _tables(rows, frame), report)


def _tables(rows: list[Row], frame: Frame) -> list[Table]:
    """One for each op."""
    twins = {id(row.case): _launch_seconds(row) for row in rows if row.by == "twin" and row.chain}
    tables: list[Table] = []
    last = None
    for row in rows:
        case = row.case
        if last is None or case.op != last.op:
            tables.append(script.table(case.op, COLUMNS, words=3))
        name = (case.what, case.quant) if case is not last else ("", "")
        last = case
        if row.problem:
            tables[-1].add_row(*name, row.by)
            continue
        chain, independent = summarize(row.chain), summarize(row.independent)
        each = _launch_seconds(row)
        gb_s = row.nbytes / each / 1e9
        tables[-1].add_row(
            *name,
            row.by,
            f"{1e3 * (row.first or 0):.1f}",
            f"{1e6 * chain.median:.2f}",
            f"{1e6 * chain.p10:.2f}-{1e6 * chain.p90:.2f}",
            f"{1e6 * chain.iqr:.2f}",
            f"{1e6 * chain.mad:.2f}",
            f"{chain.count}",
            f"{1e6 * each:.2f}" if row.gpu else "-",
            f"{gb_s:.1f}",
            script.share(frame.of_copy(gb_s)),
            f"{case.flops / each / 1e9:.1f}" if case.flops else "-",
            f"{twins[id(case)] / each:.2f} x" if id(case) in twins else "-",
            f"{1e6 * independent.median:.2f}",
        )
    return tables


def _name(row: Row) -> str:
    return f"{row.case.op}, {row.case.what}, {row.case.quant}"


def _launch_seconds(row: Row) -> float:
    return summarize(row.gpu or row.chain).median


def _as_json(row: Row) -> dict[str, Any]:
    case = row.case
    samples = {"chain": row.chain, "link": row.link, "independent": row.independent, "gpu": row.gpu}
    return {
        "op": case.op,
        "shape": case.what,
        "type": case.quant,
        "dtype": script.dtype_name(case.dtype),
        "by": row.by,
        "sets": case.sets,
        "bytes": row.nbytes,
        "flops": case.flops,
        "error": row.error,
        "problem": row.problem,
        "launches": row.launches,
        "first_seconds": row.first,
        "warm_up_seconds": row.warm_up,
        "summary": {name: summarize(values).as_dict() for name, values in samples.items() if values},
        "seconds": samples,
    }


if __name__ == "__main__":
    sys.exit(script.run(main))
