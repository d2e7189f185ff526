"""One contestant of bench/compare.py in a process of its own; prints a line of JSON for each turn.

examples:
  python bench/contestant.py mlx-lm --synthetic --turns 128:random,4096:random     mlx-lm alone on this machine
  python bench/contestant.py glm-mlx --turns 128:prefill
  python bench/contestant.py check --depths 0,512                                  what would be compared, untimed

Each turn has a generation like it before it, from the same prompt or context and with the same number of tokens, which
counts in no figure. Only mlx-lm's own model is made for mlx-lm; ours is made to be compared with it in `check` alone.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import mlx.core as mx

from bench import decode, mlx_lm_check, script
from bench.conditions import parity
from bench.contest import OURS, Turn, UnavailableError
from bench.decode import WARM_UP
from bench.mlx_lm_peer import MlxLm
from bench.subject import Subject, add_arguments, open_source, open_subject, usable_depths
from glm_mlx.command import Parser
from glm_mlx.errors import InputError, is_out_of_memory
from glm_mlx.model import decode_bytes


class Measured(Protocol):
    def measure(self, turn: Turn, count: int) -> None:
        """Fill `turn` with `decode.WARM_UP` and then `count` tokens."""


class Ours:
    """This project, through the engine that `generate` uses."""

    def __init__(self, subject: Subject):
        self.model = subject.model

    def measure(self, turn: Turn, count: int) -> None:
        run = decode.Run(turn.depth, OURS, turn.fill)
        decode.measure(self.model, run, WARM_UP + count + 2)
        turn.time_to_first_token = run.time_to_first_token
        turn.warm_up, turn.seconds, turn.tokens = run.seconds[:WARM_UP], run.decode, run.tokens


def _mlx_lm(args: argparse.Namespace) -> MlxLm:
    source = open_source(args)
    return MlxLm(source.config, source.weights, source.dtype, source.room)


CONTESTANTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    OURS: lambda args: Ours(open_subject(args)),
    "mlx-lm": _mlx_lm,
}


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    with _own_output() as out:
        try:
            if args.name == "check":
                _say(out, check(args))
            else:
                contestant = CONTESTANTS[args.name](args)
                for depth, fill in args.turns:
                    _say(out, asdict(warmed_up(contestant, Turn(1, depth, args.name, fill), args.count)))
                    mx.clear_cache()  # no depth lives on what another one left
        except Exception as error:
            _say(out, problem(error))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = Parser(
        prog="python bench/contestant.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=(*CONTESTANTS, "check"), help="who, or check")
    add_arguments(parser)
    parser.add_argument("--turns", type=script.listed(_turn), default=[], metavar="N:FILL[,N:FILL]", help="of a round")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="tokens a turn (default 30)")
    parser.add_argument("--depths", type=script.listed(script.whole(0)), metavar="N[,N]", help="to check")
    parser.add_argument("--peers", type=script.listed(str), default=[], metavar="NAME[,NAME]", help="to check")
    return parser.parse_args(argv)


def _turn(text: str) -> tuple[int, str]:
    depth, _, fill = text.partition(":")
    return script.whole(0)(depth), script.choice("prefill", "random")(fill)


def _own_output() -> TextIO:
    """Standard output, for our lines alone: what others print goes to standard error from now on."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own


def _say(out: TextIO, line: dict[str, Any]) -> None:
    print(json.dumps(line), file=out, flush=True)


def problem(error: Exception) -> dict[str, str]:
    """Error that ended the work, as `contest.child` raises it again."""
    if isinstance(error, UnavailableError | InputError):
        return {"problem": "input" if isinstance(error, InputError) else "unavailable", "why": str(error)}
    if is_out_of_memory(error):
        return {"problem": "memory", "why": str(error)}
    trace = "".join(traceback.format_exception(error))
    return {"problem": "fault", "why": f"{type(error).__name__}: {error}\n{trace}"}


def warmed_up(contestant: Measured, turn: Turn, count: int) -> Turn:
    """`turn`, filled after a generation of the same prompt or context and of as many tokens."""
    before = Turn(turn.number, turn.depth, turn.by, turn.fill)
    contestant.measure(before, count)
    turn.cold_time_to_first_token = before.time_to_first_token
    contestant.measure(turn, count)
    return turn


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Subject of the comparison: the model, whether our kernels are right here, and what each peer is found to compute.

    Raises InputError for a model or depths that can't be measured.
    """
    subject = open_subject(args)
    # The first token comes from the prompt; beside the last one no next one is computed.
    depths, notes = usable_depths(subject, args.depths, WARM_UP + args.count + 2)
    fixed, per_row = decode_bytes(subject.config, subject.weights, subject.model.row_format)
    found: dict[str, Any] = {
        "model": subject.as_dict(),
        "described": subject.describe(),
        "depths": depths,
        "notes": notes,
        "details": {"bytes_a_token": {"weights": fixed, "each_row_of_the_cache": per_row}},
        "parity": parity(subject.model),
        "peers": {},
    }
    if "mlx-lm" in args.peers:
        try:
            peer = MlxLm(subject.config, dict(subject.weights), subject.model.dtype, subject.room)
            agreement = mlx_lm_check.check(peer, subject)
            found["peers"]["mlx-lm"] = {
                "details": peer.details | {"agreement": agreement.details},
                "notes": [*peer.notes, *agreement.notes],
            }
        except Exception as error:
            found["peers"]["mlx-lm"] = problem(error)
    return found


if __name__ == "__main__":
    sys.exit(script.run(main))
