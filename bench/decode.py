"""How fast a whole model decodes and reads prompts, at several context depths, against the memory's bandwidth.

examples:
  python bench/decode.py                                    the small model that ships with the project
  python bench/decode.py --model GLM-4.7-Flash-Q4_0.gguf
  python bench/decode.py --synthetic                        real shapes, random weights of the real types, no file
  python bench/decode.py --synthetic --layers 4 --mix q4_k_m --depths 0,4k --fill random

Greedy, through the same engine as `generate`; prompts are seeded random token ids. Round 0 reads each prompt once to
warm up ("cold"); that and the first tokens after a prompt are shown, but in no median. A depth is the number of tokens
before the first decoded one (0: a prompt of one). "read a token" is bytes of the weights and cached rows that a token
needs, each once: the chosen experts, one row of the embedding, all other weights and the rows of the cache. Tests hold
what our kernels fetch to that; MLX's operations may read more. "of copy" is the share of what a copy on this device
moves. Without --fill, the context is a real prompt up to 4,096 tokens (512 on a CPU) and random rows in the cache
beyond, which decode at the same speed.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import numpy as np
from rich.filesize import decimal
from rich.status import Status
from rich.table import Table

from bench import script, synthetic
from bench.conditions import back_end
from bench.frame import Frame
from bench.launches import decode_step, launches
from bench.subject import PATHS, Subject, add_arguments, add_paths, open_subject, usable_depths, usable_paths
from bench.timing import summarize
from glm_mlx.engine import Engine
from glm_mlx.errors import is_out_of_memory
from glm_mlx.model import Model, decode_bytes
from glm_mlx.sampling import SamplingParams

WARM_UP = 5  # tokens
COLUMNS = (
    "depth", "path", "context\nby", "cold first\ntoken s", "first\ntoken s", "prefill\ntok/s", "warm-up\nms",
    "decode\nms", "p10-p90\nms", "IQR\nms", "MAD\nms", "\ncount", "decode\ntok/s", "read a\ntoken", "\nGB/s",
    "of\ncopy", "peak\nmemory",
)  # fmt: skip


@dataclass
class Run:
    """One prompt and the tokens after it; times in seconds. Without a real prompt, prefill_tok_s is None.

    number: of the round; 0 reads a prompt to warm up and counts in no figure.
    """

    depth: int
    path: str
    fill: str
    number: int = 1
    time_to_first_token: float | None = None
    prefill_tok_s: float | None = None
    seconds: list[float] = field(default_factory=list)  # of every decoded token, warm-up first
    positions: list[int] = field(default_factory=list)  # of these tokens: as many rows of the cache were read
    tokens: list[int] = field(default_factory=list)  # all that came, the prompt's own first one too
    peak_memory: int = 0

    @property
    def decode(self) -> list[float]:
        return self.seconds[WARM_UP:]


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    path = script.results_file("decode", args.json)
    paths = usable_paths(args.paths)
    subject = open_subject(args)
    tokens = WARM_UP + args.count + 2  # the first comes from the prompt, beside the last no next one is computed
    depths, notes = usable_depths(subject, args.depths, tokens)
    frame = Frame("decode", path, subject)
    frame.notes += notes

    runs: list[Run] = []
    counted: dict[str, dict[str, int]] = {}
    with frame.measuring() as status:
        for name in paths:
            with PATHS[name]():
                counted[name] = dict(decode_step(subject.model))
        measure_all(subject.model, runs, frame.notes, args, paths, depths, tokens, status)

    cold = [run for run in runs if run.number == 0 and run.tokens]
    runs = [run for run in runs if run.decode]
    frame.notes += agreement(runs)
    if any(run.fill == "random" for run in runs):
        frame.notes.append("context by random: no prompt was read, rows drawn at random stand in the cache")
    rows = list(_rows(subject, cold, runs, frame))
    report = {
        "rounds": args.rounds,
        "warm_up_tokens": WARM_UP,
        "primitives_a_token": counted,
        "rows": rows,
        "warm_up_prompts": [asdict(run) for run in cold],
        "runs": [asdict(run) for run in runs],
    }
    return frame.finish(_lines(subject, args, counted), [_table(rows)], report)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser("decode", __doc__)
    add_arguments(parser)
    parser.add_argument("--depths", type=script.listed(script.whole(0)), metavar="N[,N]", help="such as 0,512,4k")
    parser.add_argument("--fill", choices=("prefill", "random"), help="where the context comes from")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="tokens a round (default 30)")
    parser.add_argument("--rounds", type=script.whole(1), default=3, help="of every depth (default 3)")
    add_paths(parser)
    return parser.parse_args(argv)


def fill_of(depth: int, given: str | None) -> str:
    """Where the context of a depth comes from, unless told: nobody wants to wait for the reading of a long one."""
    if depth <= 1:
        return "prefill"
    return given or ("prefill" if depth <= (512 if back_end() == "cpu" else 4096) else "random")


def measure_all(
    model: Model,
    runs: list[Run],
    notes: list[str],
    args: argparse.Namespace,
    paths: list[str],
    depths: list[int],
    tokens: int,
    status: Status,
) -> None:
    """Append runs, the paths in turns, and to `notes` what could not be measured."""
    deepest = depths[-1]
    for number in range(args.rounds + 1):
        for depth, path in [(d, p) for d in depths for p in paths[:: 1 if number % 2 else -1]]:
            fill = fill_of(depth, args.fill)
            is_warm_up = number == 0
            if depth > deepest or (is_warm_up and fill != "prefill"):
                continue
            status.update(f"round {number} of {args.rounds}, depth {depth:,}, {path}")
            run = Run(depth, path, fill, number)
            runs.append(run)
            try:
                with PATHS[path]():
                    measure(model, run, 1 if is_warm_up else tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                notes.append(f"not measured: depth {depth:,} and more: out of memory by {path}")
                deepest = depth - 1


def measure(model: Model, run: Run, tokens: int) -> None:
    """Fill `run` token by token: what is there when Ctrl-C comes is good."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, model.cfg.vocab_size, max(run.depth, 1)).tolist()
    engine = Engine(model)
    if run.fill == "random":
        synthetic.fill_cache(engine.cache, len(prompt) - 1)
        engine.tokens = prompt[:-1]  # as if they had been read
    for step in engine.generate(prompt, SamplingParams(temperature=0), tokens):
        stats = engine.stats
        run.tokens.append(step.token)
        run.peak_memory = stats.peak_memory
        if len(run.tokens) == 1:
            if run.fill == "prefill":
                run.time_to_first_token, run.prefill_tok_s = stats.time_to_first_token, stats.prefill_tok_s
        elif len(run.tokens) < tokens:
            run.seconds.append(step.seconds)
            run.positions.append(step.position)


def agreement(runs: Sequence[Run]) -> Iterator[str]:
    """How far the tokens of two paths are the same, at each depth."""
    for depth in sorted({run.depth for run in runs}):
        first = {run.path: run.tokens for run in reversed(runs) if run.depth == depth}
        if len(first) == 2:
            a, b = (first[path] for path in sorted(first))
            pairs = list(zip(a, b, strict=False))
            same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            yield f"depth {depth:,}: {' and '.join(sorted(first))} give the same first {same} of {len(pairs)} tokens"


def _rows(subject: Subject, cold: Sequence[Run], runs: Sequence[Run], frame: Frame) -> Iterator[dict[str, Any]]:
    """A row for each depth and path, over all its runs. `cold`: those of round 0."""
    cold_seconds = {(run.depth, run.path): run.time_to_first_token for run in cold}
    fixed, per_row = decode_bytes(subject.config, subject.weights, subject.model.row_format)
    for depth, path in sorted({(run.depth, run.path) for run in runs}):
        group = [run for run in runs if (run.depth, run.path) == (depth, path)]
        seconds = [s for run in group for s in run.decode]
        nbytes = [fixed + per_row * p for run in group for p in run.positions[WARM_UP:]]
        rates = [n / s / 1e9 for n, s in zip(nbytes, seconds, strict=True)]
        prefills = [run for run in group if run.prefill_tok_s is not None]
        yield {
            "depth": depth,
            "path": path,
            "fill": group[0].fill,
            "cold_time_to_first_token": cold_seconds.get((depth, path)),
            "time_to_first_token": _summary([run.time_to_first_token or 0.0 for run in prefills]),
            "prefill_tok_s": _summary([run.prefill_tok_s or 0.0 for run in prefills if depth > 1]),
            "warm_up_seconds": group[0].seconds[:WARM_UP],
            "decode_seconds": summarize(seconds).as_dict(),
            "bytes_a_token": summarize(nbytes).median,
            "gb_s": summarize(rates).as_dict(),
            "of_copy": frame.of_copy(summarize(rates).median),
            "peak_memory": max(run.peak_memory for run in group),
        }


def _summary(samples: list[float]) -> dict[str, float] | None:
    return summarize(samples).as_dict() if samples else None


def _lines(subject: Subject, args: argparse.Namespace, counted: Mapping[str, Mapping[str, int]]) -> list[str]:
    fixed, per_row = decode_bytes(subject.config, subject.weights, subject.model.row_format)
    return [
        f"a token reads {decimal(fixed)} of weights and {decimal(per_row)} for each token before it; greedy, "
        f"{script.counted(args.rounds, 'round')} of {args.count} tokens after {WARM_UP} of warm-up",
        *(
            f"a token by {name}: {launches(counts)} launches in {sum(counts.values())} primitives of MLX"
            for name, counts in counted.items()
        ),
    ]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = script.table("decode", COLUMNS, words=0)
    for row in rows:
        decode, warm, cold = row["decode_seconds"], row["warm_up_seconds"], row["cold_time_to_first_token"]
        first, prefill = row["time_to_first_token"], row["prefill_tok_s"]
        table.add_row(
            f"{row['depth']:,}",
            row["path"],
            {"prefill": "prompt", "random": "random"}[row["fill"]],
            f"{cold:.3f}" if cold else "-",
            f"{first['median']:.3f}" if first else "-",
            f"{prefill['median']:,.0f}" if prefill else "-",
            f"{1e3 * warm[0]:.1f} .. {1e3 * warm[-1]:.1f}",
            f"{1e3 * decode['median']:.2f}",
            f"{1e3 * decode['p10']:.2f}-{1e3 * decode['p90']:.2f}",
            f"{1e3 * decode['iqr']:.2f}",
            f"{1e3 * decode['mad']:.2f}",
            f"{decode['count']}",
            f"{1 / decode['median']:.1f}",
            decimal(round(row["bytes_a_token"])),
            f"{row['gb_s']['median']:.3g}",
            script.share(row["of_copy"]),
            decimal(row["peak_memory"]),
        )
    return table


if __name__ == "__main__":
    sys.exit(script.run(main))
