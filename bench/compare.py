"""How fast this project is against mlx-lm and llama.cpp: one machine, one run, the same weights, taking turns.

examples:
  python bench/compare.py                                   the small model that ships with the project
  python bench/compare.py --model GLM-4.7-Flash-Q4_0.gguf --llama-bench ~/llama.cpp/build/bin/llama-bench
  python bench/compare.py --synthetic --depths 0,4k,32k --plot speed.svg

mlx-lm (pip install --no-deps mlx-lm) runs its own model class on the same quants, read into the same process; what MLX
can't hold as the file does is held more finely, and a note says how. Before anything is timed, each step of its model
is compared with ours. Its activations have the type of ours, its tokens come without log-probabilities. llama.cpp runs
its own llama-bench on the same file, with a prompt of its own.

A depth is the number of tokens before the first decoded one. Contexts are as in bench/decode.py, and the same for us
and for mlx-lm; llama.cpp always reads its context. Round 0 reads each prompt once to warm up; then all take turns, in
an order that turns around with every round. "ratio" is the median over rounds of their time to ours in that round:
above 1 we are faster. "range" is its least and most.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.signals import quiet_start

    quiet_start()

import mlx.core as mx
from rich.markup import escape
from rich.status import Status
from rich.table import Table

from bench import decode, plot, script
from bench.contest import OURS, WARM_UP, Contestant, Ours, Turn, UnavailableError
from bench.frame import Frame
from bench.llama_bench import LlamaBench
from bench.mlx_lm_peer import MlxLm
from bench.subject import Subject, add_arguments, open_subject, usable_depths
from bench.timing import summarize
from glm_mlx.errors import InputError, is_out_of_memory
from glm_mlx.gguf import shown
from glm_mlx.hub import resolve
from glm_mlx.small import SMALL_MODEL

COLUMNS = (
    "depth", "by", "context\nby", "first\ntoken s", "prefill\ntok/s", "\nratio", "warm-up\nms", "decode\nms",
    "p10-p90\nms", "IQR\nms", "MAD\nms", "\ncount", "decode\ntok/s", "\nratio", "\nrange",
)  # fmt: skip
Peer = Callable[[Subject, argparse.Namespace], Contestant]
PEERS: dict[str, Peer] = {
    "mlx-lm": lambda subject, args: MlxLm(subject),
    "llama.cpp": lambda subject, args: LlamaBench(subject, model_file(args), args.llama_bench),
}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    path = script.results_file("compare", args.json)
    if args.plot is not None:
        plot.usable(args.plot)
    if args.model is not None:
        args.model = str(resolve(args.model))
    subject = open_subject(args)
    # The first token comes from the prompt; beside the last one no next one is computed.
    depths, notes = usable_depths(subject, args.depths, WARM_UP + args.count + 2)
    frame = Frame("compare", path, subject)

    ours = Ours(subject.model, dict(subject.weights))
    contestants: list[Contestant] = [ours]
    problems: list[dict[str, Any]] = []
    turns: list[Turn] = []
    with frame.measuring() as status:
        for name in args.peers:
            status.update(f"making {name} ready")
            opened = open_peer(name, subject, args, problems)
            if opened is not None:
                contestants.append(opened)
                subject = replace(subject, room=subject.room - opened.details.get("more_memory", 0))
        depths, notes = usable_depths(subject, args.depths, WARM_UP + args.count + 2)
        take_turns(contestants, turns, problems, depths, args, status)

    rows = rows_of(turns)
    frame.notes += [*notes, *(note for contestant in contestants for note in contestant.notes)]
    frame.notes += decode.agreement(
        [decode.Run(t.depth, t.by, t.fill, tokens=t.tokens) for t in turns if t.number and t.tokens]
    )
    if any(turn.fill == "random" for turn in turns):
        frame.notes.append("context by random: no prompt was read, rows drawn at random stand in the cache")
    report = {
        "rounds": args.rounds,
        "tokens_a_round": args.count,
        "warm_up_tokens": WARM_UP,
        "contestants": {c.name: c.details for c in contestants},
        "problems": problems,
        "rows": rows,
        "turns": [asdict(turn) for turn in turns],
    }
    code = frame.finish(
        [
            f"greedy, {script.counted(args.rounds, 'round')} of {args.count} tokens after {WARM_UP} of "
            "warm-up; a ratio above 1: ours is faster"
        ],
        [_table(rows), *([_left_out(problems)] if problems else [])],
        report,
    )
    if args.plot is not None and rows:
        plot.draw(args.plot, "\n".join([f"{subject.name} ({subject.mix})", *_machine(frame.conditions)]), rows)
        script.NOTES.print(f"speed against depth: {shown(args.plot)}", style="dim", markup=False)
    return code


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser("compare", __doc__)
    add_arguments(parser)
    parser.add_argument("--depths", type=script.listed(script.whole(0)), metavar="N[,N]", help="such as 0,512,4k")
    parser.add_argument("--fill", choices=("prefill", "random"), help="where the context comes from")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="tokens a round (default 30)")
    parser.add_argument("--rounds", type=script.whole(1), default=3, help="of every depth (default 3)")
    parser.add_argument(
        "--peers", type=script.listed(script.choice(*PEERS)), default=list(PEERS), metavar="NAME[,NAME]",
        help=f"whom to compare with (default {','.join(PEERS)})",
    )  # fmt: skip
    parser.add_argument("--llama-bench", type=Path, metavar="PATH", help="llama.cpp's (default: the one on the PATH)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png or .svg of speed against depth")
    args = parser.parse_args(argv)
    if args.llama_bench is not None and not args.llama_bench.is_file():
        raise InputError(f"no such program: {shown(args.llama_bench)}; give the path of llama-bench")
    return args


def model_file(args: argparse.Namespace) -> Path | None:
    if args.layers or args.synthetic:
        return None
    return SMALL_MODEL if args.model is None else Path(args.model)


def open_peer(
    name: str, subject: Subject, args: argparse.Namespace, problems: list[dict[str, Any]]
) -> Contestant | None:
    """The contestant, or None and an entry in `problems`: a peer may fail in any way, and the comparison goes on."""
    try:
        return PEERS[name](subject, args)
    except Exception as error:
        problems.append({"by": name, "depth": None, "why": _why(error)})
        return None


def take_turns(
    contestants: Sequence[Contestant],
    turns: list[Turn],
    problems: list[dict[str, Any]],
    depths: Sequence[int],
    args: argparse.Namespace,
    status: Status,
) -> None:
    """Append turns as they are taken. Who fails at a depth is left out there, and at all greater ones."""
    ends = {contestant.name: depths[-1] for contestant in contestants}
    for number in range(args.rounds + 1):
        order = contestants[:: 1 if number % 2 else -1]
        for depth, contestant in [(d, c) for d in depths for c in order]:
            fill = decode.fill_of(depth, args.fill)
            is_warm_up = number == 0
            if depth > ends[contestant.name] or (
                is_warm_up and (contestant.warms_up_itself or fill != "prefill" or depth < 2)
            ):
                continue
            status.update(f"round {number} of {args.rounds}, depth {depth:,}, {contestant.name}")
            turn = Turn(number, depth, contestant.name, fill)
            turns.append(turn)
            try:
                contestant.measure(turn, 0 if is_warm_up else args.count)
            except Exception as error:
                if contestant.name == OURS and not is_out_of_memory(error):
                    raise
                problems.append({"by": contestant.name, "depth": depth, "why": _why(error)})
                ends[contestant.name] = depth - 1
            mx.clear_cache()  # nobody lives on what another one left


def _why(error: Exception) -> str:
    """One line for a row of the table."""
    if isinstance(error, UnavailableError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    if is_out_of_memory(error):
        return f"out of memory: {shown(lines[0], 200)}"
    return f"failed: {type(error).__name__}: {shown(lines[0], 200)}"


def rows_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A row for each depth and contestant, ours first, over all turns that decoded."""
    rows = []
    names = list(dict.fromkeys([OURS, *(turn.by for turn in turns if turn.number)]))
    for depth in sorted({turn.depth for turn in turns}):
        groups = {n: [t for t in turns if (t.depth, t.by) == (depth, n) and t.seconds] for n in names}
        cold = {t.by: t.time_to_first_token for t in turns if t.depth == depth and not t.number}
        for name, group in groups.items():
            if not group:
                continue
            firsts = [turn.time_to_first_token for turn in group if turn.time_to_first_token is not None]
            prefills = [turn.prefill_tok_s for turn in group if turn.prefill_tok_s is not None]
            versus = groups[OURS] if name != OURS else []
            rows.append(
                {
                    "depth": depth,
                    "by": name,
                    "fill": group[0].fill,
                    "cold_time_to_first_token": cold.get(name),
                    "time_to_first_token": summarize(firsts).as_dict() if firsts else None,
                    "prefill_tok_s": summarize(prefills).as_dict() if prefills else None,
                    "warm_up_seconds": group[0].warm_up,
                    "decode_seconds": summarize([s for turn in group for s in turn.seconds]).as_dict(),
                    "mean_of_tokens": group[0].mean_of,
                    "prefill_ratios": paired(group, versus, prefill_time),
                    "decode_ratios": paired(group, versus, decode_time),
                }
            )
    return rows


def prefill_time(turn: Turn, other: Turn) -> float | None:
    """Seconds to read the prompt, or None where there was none to speak of."""
    return turn.time_to_first_token if turn.depth > 1 else None


def decode_time(turn: Turn, other: Turn) -> float:
    """Seconds a token in this round: the median, or the mean where the other one tells no more."""
    if max(turn.mean_of, other.mean_of) > 1:
        return sum(turn.seconds) / len(turn.seconds)
    return median(turn.seconds)


def paired(theirs: Sequence[Turn], ours: Sequence[Turn], time_of: Callable[[Turn, Turn], float | None]) -> list[float]:
    """Their time over ours, for each round that both took."""
    by_number = {turn.number: turn for turn in ours}
    pairs = [(turn, by_number[turn.number]) for turn in theirs if turn.number in by_number]
    times = [(time_of(their, our), time_of(our, their)) for their, our in pairs]
    return [a / b for a, b in times if a is not None and b is not None]


def _machine(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['chip']} ({found['back_end']}), {found['os']}",
        f"glm-mlx at {found['commit'] or found['source_sha256']}, MLX {found['mlx']}, {found['date'][:10]}",
    ]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = script.table("compare", COLUMNS, words=2)
    table.columns[0].justify = "right"
    for row in rows:
        seconds, warm, first, prefill = (
            row[key] for key in ("decode_seconds", "warm_up_seconds", "time_to_first_token", "prefill_tok_s")
        )
        ratios = row["decode_ratios"]
        table.add_row(
            f"{row['depth']:,}",
            row["by"],
            {"prefill": "prompt", "random": "random"}[row["fill"]],
            f"{first['median']:.3f}" if first else "-",
            f"{prefill['median']:,.0f}" if prefill else "-",
            f"{median(row['prefill_ratios']):.2f}" if row["prefill_ratios"] else "-",
            f"{1e3 * warm[0]:.1f} .. {1e3 * warm[-1]:.1f}",
            f"{1e3 * seconds['median']:.2f}",
            f"{1e3 * seconds['p10']:.2f}-{1e3 * seconds['p90']:.2f}",
            f"{1e3 * seconds['iqr']:.2f}",
            f"{1e3 * seconds['mad']:.2f}",
            f"{seconds['count']}",
            f"{1 / seconds['median']:.1f}",
            f"{median(ratios):.2f}" if ratios else "-",
            f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
        )
    return table


def _left_out(problems: Sequence[dict[str, Any]]) -> Table:
    left_out = script.table("not measured", ("depth", "by", "why"), words=3)
    for problem in problems:
        where = "all" if problem["depth"] is None else f"from {problem['depth']:,}"
        left_out.add_row(where, problem["by"], escape(problem["why"]))
    return left_out


if __name__ == "__main__":
    sys.exit(script.run(main))
