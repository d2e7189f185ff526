"""How fast this project is against mlx-lm and llama.cpp: one machine, one run, the same weights, taking turns.

examples:
  python bench/compare.py                                   the small model that ships with the project
  python bench/compare.py --model GLM-4.7-Flash-Q4_0.gguf --llama-bench ~/llama.cpp/build/bin/llama-bench
  python bench/compare.py --synthetic --depths 0,4k,32k --plot speed.svg

Each round of each program is a fresh process, with no other model in memory, and each depth is read and decoded there
once as a warm-up before it is measured: the same rules for all. First each peer runs alone, before we run at all, after
a process that counts for nothing: the first one on a machine may still compile. Then all take turns, in an order that
turns around with every round. `python bench/contestant.py` is that process by itself.

mlx-lm (pip install mlx-lm) runs its own model class through its own `generate_step`, as `stream_generate` calls it, on
the same quants, converted in memory; what MLX can't hold as the file does is held more finely, and a note says how. Its
activations have the type of ours. In a process before all others each step of its model is compared with ours.
llama.cpp runs its own llama-bench on the same file, with a prompt of its own.

A depth is the number of tokens before the first decoded one. Contexts are as in bench/decode.py, and the same for us
and for mlx-lm; llama.cpp always reads its context. A ratio above 1: we are faster. "to fastest" is the time of the
peer's fastest run, of the rounds and the one alone, to our median over rounds: the one to quote. "ratio" is the median
over rounds of their time to ours in that round, "range" its least and most, "against alone" how much more time the peer
takes in the rounds (their median) than alone. With fewer than 3 rounds, or a peer more than 5 % slower than alone, the
figures are not firm: a note says so, and README quotes no ratio of theirs.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

from rich.markup import escape
from rich.status import Status
from rich.table import Table

from bench import contest, decode, plot, script
from bench.contest import ALONE, OURS, Contestant, OwnProcess, Turn, UnavailableError
from bench.decode import WARM_UP
from bench.frame import Frame
from bench.llama_bench import LlamaBench
from bench.subject import add_arguments
from bench.timing import summarize
from glm_mlx.errors import InputError, is_out_of_memory
from glm_mlx.hub import resolve
from glm_mlx.small import SMALL_MODEL
from kernels.shown import shown

FIRM_ROUNDS = 3
FIRM_SLOWER = 0.05  # of the peer's time alone: more, and the rounds were not fair to it
COLUMNS = (
    "depth", "by", "context\nby", "cold first\ntoken s", "first\ntoken s", "prefill\ntok/s", "prefill to\nfastest",
    "warm-up\nms", "decode\nms", "p10-p90\nms", "IQR\nms", "MAD\nms", "\ncount", "decode\ntok/s", "alone\ntok/s",
    "against\nalone", "to\nfastest", "\nratio", "\nrange",
)  # fmt: skip
Found = Mapping[str, Any]  # what `bench.contestant.check` gives
Peer = Callable[[argparse.Namespace, Found], Contestant]


def _mlx_lm(args: argparse.Namespace, found: Found) -> Contestant:
    peer = found["peers"]["mlx-lm"]
    if "problem" in peer:
        raise contest.PROBLEMS[peer["problem"]](peer["why"])
    return OwnProcess("mlx-lm", options(args), peer["details"], peer["notes"])


PEERS: dict[str, Peer] = {
    "mlx-lm": _mlx_lm,
    "llama.cpp": lambda args, found: LlamaBench(model_file(args), args.llama_bench),
}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    path = script.results_file("compare", args.json)
    if args.plot is not None:
        plot.usable(args.plot)
    if args.model is not None:
        args.model = str(resolve(args.model))
    with script.NOTES.status("comparing what is computed"):
        found = check(args)
    frame = Frame("compare", path)
    frame.parity = found["parity"]

    contestants: list[Contestant] = [ours(args, found)]
    problems: list[dict[str, Any]] = []
    turns: list[Turn] = []
    with frame.measuring() as status:
        for name in args.peers:
            opened = open_peer(name, args, found, problems)
            if opened is not None:
                contestants.append(opened)
        take_turns(contestants, turns, problems, found["depths"], args, status)

    rows = rows_of(turns)
    frame.notes += [*found["notes"], *(note for contestant in contestants for note in contestant.notes)]
    frame.notes += decode.agreement(
        [decode.Run(t.depth, t.by, t.fill, tokens=t.tokens) for t in turns if t.number != ALONE and t.tokens]
    )
    if any(turn.fill == "random" for turn in turns):
        frame.notes.append("context by random: no prompt was read, rows drawn at random stand in the cache")
    frame.notes += [
        f"not firm: {row['by']} at depth {row['depth']:,}: {', '.join(row['not_firm'])}"
        for row in rows
        if row["not_firm"]
    ]
    report = {
        "model": found["model"],
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
            found["described"],
            f"greedy, {script.counted(args.rounds, 'round')} of {args.count} tokens after {WARM_UP} of warm-up, each "
            "in a process of its own after a generation like it; a ratio above 1: ours is faster",
        ],
        [_table(rows), *([_left_out(problems)] if problems else [])],
        report,
    )
    if args.plot is not None and rows:
        model = found["model"]
        title = "\n".join([f"{model['name']} ({model['mix']})", *_machine(frame.conditions)])
        plot.draw(args.plot, title, rows)
        script.NOTES.print(f"speed against depth: {shown(args.plot)}", style="dim", markup=False)
    return code


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser("compare", __doc__)
    add_arguments(parser)
    parser.add_argument("--depths", type=script.listed(script.whole(0)), metavar="N[,N]", help="such as 0,512,4k")
    parser.add_argument("--fill", choices=("prefill", "random"), help="where the context comes from")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="tokens a round (default 30)")
    parser.add_argument("--rounds", type=script.whole(1), default=FIRM_ROUNDS, help=f"default {FIRM_ROUNDS}")
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


def options(args: argparse.Namespace) -> list[str]:
    """Those that name the model, for a process of a contestant."""
    layers = args.layers or args.synthetic
    both = ["--model", args.model] if args.model else []
    return [*both, *(["--layers", str(layers)] if layers else []), "--mix", args.mix, "--kv-bits", str(args.kv_bits)]


def check(args: argparse.Namespace) -> Found:
    """`bench.contestant.check`, in a process of its own that ends before anything is timed. Raises what it raises."""
    depths = ["--depths", ",".join(map(str, args.depths))] if args.depths else []
    wanted = [*options(args), *depths, "--count", str(args.count), "--peers", ",".join(args.peers)]
    with contest.child("check", *wanted) as lines:
        return next(lines)


def ours(args: argparse.Namespace, found: Found) -> Contestant:
    return OwnProcess(OURS, options(args), found["details"], [])


def model_file(args: argparse.Namespace) -> Path | None:
    if args.layers or args.synthetic:
        return None
    return SMALL_MODEL if args.model is None else Path(args.model)


def open_peer(name: str, args: argparse.Namespace, found: Found, problems: list[dict[str, Any]]) -> Contestant | None:
    """The contestant, or None and an entry in `problems`: a peer may fail in any way, and the comparison goes on."""
    try:
        return PEERS[name](args, found)
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
    for number in range(ALONE, args.rounds + 1):
        for contestant in contestants[:: 1 if number % 2 else -1]:
            name = contestant.name
            if number == ALONE and name == OURS:
                continue
            blank = [Turn(number, d, name, decode.fill_of(d, args.fill)) for d in depths if d <= ends[name]]
            if not blank:
                continue
            status.update(f"round {number} of {args.rounds}, {name}" if number != ALONE else f"{name} alone")
            done = 0
            if number == ALONE:  # the first process on a machine may still compile: one that counts for nothing
                with suppress(Exception):
                    list(contestant.take([Turn(number, t.depth, name, t.fill) for t in blank], 1))
            try:
                for turn in contestant.take(blank, args.count):
                    turns.append(turn)
                    done += 1
            except Exception as error:
                if name == OURS and not is_out_of_memory(error):
                    raise
                problems.append({"by": name, "depth": blank[done].depth, "why": _why(error)})
                ends[name] = blank[done].depth - 1


def _why(error: Exception) -> str:
    """One line for a row of the table."""
    if isinstance(error, UnavailableError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    if is_out_of_memory(error):
        return f"out of memory: {shown(lines[0], 200)}"
    # What failed in a process of its own names its type itself.
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"failed: {kind}{shown(lines[0], 200)}"


def rows_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A row for each depth and contestant, ours first, over all rounds. Fields as the columns in this file's beginning.

    not_firm: why its ratios are not to be quoted, a few words each; empty for ours and for what is firm.
    """
    rows = []
    names = list(dict.fromkeys([OURS, *(turn.by for turn in turns if turn.number != ALONE)]))
    for depth in sorted({turn.depth for turn in turns}):
        by_name = {n: [t for t in turns if (t.depth, t.by) == (depth, n)] for n in names}
        groups = {n: [t for t in found if t.number != ALONE] for n, found in by_name.items()}
        for name, group in groups.items():
            if not group:
                continue
            firsts = [turn.time_to_first_token for turn in group if turn.time_to_first_token is not None]
            prefills = [turn.prefill_tok_s for turn in group if turn.prefill_tok_s is not None]
            versus = groups[OURS] if name != OURS else []
            alone = next((turn for turn in by_name[name] if turn.number == ALONE), None)
            slower = against_alone(group, alone)
            rows.append(
                {
                    "depth": depth,
                    "by": name,
                    "fill": group[0].fill,
                    "cold_time_to_first_token": group[0].cold_time_to_first_token,
                    "time_to_first_token": summarize(firsts).as_dict() if firsts else None,
                    "prefill_tok_s": summarize(prefills).as_dict() if prefills else None,
                    "warm_up_seconds": group[0].warm_up,
                    "decode_seconds": summarize([s for turn in group for s in turn.seconds]).as_dict(),
                    "seconds_by_round": [median(turn.seconds) for turn in group],
                    "mean_of_tokens": group[0].mean_of,
                    "seconds_alone": median(alone.seconds) if alone else None,
                    "prefill_tok_s_alone": alone.prefill_tok_s if alone else None,
                    "against_alone": slower,
                    "prefill_ratio_to_fastest": to_fastest(group, alone, versus, prefill_time),
                    "prefill_ratios": paired(group, versus, prefill_time),
                    "decode_ratio_to_fastest": to_fastest(group, alone, versus, decode_time),
                    "decode_ratios": paired(group, versus, decode_time),
                    "not_firm": [] if name == OURS else list(not_firm(len(group), slower)),
                }
            )
    return rows


def not_firm(rounds: int, slower: float | None) -> Iterator[str]:
    if rounds < FIRM_ROUNDS:
        yield script.counted(rounds, "round")
    if slower is None:
        yield "no run alone"
    elif slower > FIRM_SLOWER:
        yield f"{slower:.0%} slower than alone"


def against_alone(group: Sequence[Turn], alone: Turn | None) -> float | None:
    """Return by what share a token takes longer in the rounds, their median, than in the run alone."""
    return median(decode_time(turn, alone) for turn in group) / decode_time(alone, group[0]) - 1 if alone else None


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


def to_fastest(
    theirs: Sequence[Turn],
    alone: Turn | None,
    ours: Sequence[Turn],
    time_of: Callable[[Turn, Turn], float | None],
) -> float | None:
    """The least time of theirs, of the rounds and the run alone, over the median of ours; None where one is unknown."""
    if not ours:
        return None
    found = [time_of(turn, ours[0]) for turn in [*theirs, *([alone] if alone else [])]]
    their_times = [seconds for seconds in found if seconds is not None]
    our_times = [seconds for turn in ours if (seconds := time_of(turn, theirs[0])) is not None]
    return min(their_times) / median(our_times) if their_times and our_times else None


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
            _or_dash(row["cold_time_to_first_token"], ".3f"),
            f"{first['median']:.3f}" if first else "-",
            f"{prefill['median']:,.0f}" if prefill else "-",
            _or_dash(row["prefill_ratio_to_fastest"], ".2f"),
            f"{1e3 * warm[0]:.1f} .. {1e3 * warm[-1]:.1f}",
            f"{1e3 * seconds['median']:.2f}",
            f"{1e3 * seconds['p10']:.2f}-{1e3 * seconds['p90']:.2f}",
            f"{1e3 * seconds['iqr']:.2f}",
            f"{1e3 * seconds['mad']:.2f}",
            f"{seconds['count']}",
            f"{1 / seconds['median']:.1f}",
            f"{1 / row['seconds_alone']:.1f}" if row["seconds_alone"] else "-",
            _or_dash(row["against_alone"], "+.1%"),
            _or_dash(row["decode_ratio_to_fastest"], ".2f"),
            f"{median(ratios):.2f}" if ratios else "-",
            f"{min(ratios):.2f}-{max(ratios):.2f}" if ratios else "-",
        )
    return table


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _left_out(problems: Sequence[dict[str, Any]]) -> Table:
    left_out = script.table("not measured", ("depth", "by", "why"), words=3)
    for problem in problems:
        where = "all" if problem["depth"] is None else f"from {problem['depth']:,}"
        left_out.add_row(where, problem["by"], escape(problem["why"]))
    return left_out


if __name__ == "__main__":
    sys.exit(script.run(main))
