"""Where the time of one decoded token goes: host and device, op by op, layer by layer.

examples:
  python bench/trace.py                                     the small model that ships with the project
  python bench/trace.py --synthetic --depth 4k
  python bench/trace.py --with-source mla_decode            the text that the device's compiler gets; measures nothing
  python bench/trace.py --with-source qmv:o_proj            of the launch on this weight

Host: "build" is Python that makes the graph of a token, "dispatch" is mx.async_eval until it returns, "wait" until the
token is there. "As in decode" builds a token while the device computes the one before; "alone" waits for each. Time of
the host counts only what its thread computes in build and dispatch: MLX may make it wait there too.

Ops: on NVIDIA with PyTorch installed, the time that the GPU itself spent, in the same loop as decode. Elsewhere every
op is evaluated on its own, which shows how ops compare and is slower than decode: each figure holds a launch and a
wait. "between ops" is what lies between them then, such as the update of the cache.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import mlx.core as mx
from rich.table import Table

from bench import commits, gpu_time, script, synthetic
from bench.calls import Call, Entries, Entry, Place, record, time_calls
from bench.conditions import back_end
from bench.frame import Frame
from bench.gpu_time import Timeline
from bench.launches import decode_step, launches
from bench.subject import Subject, add_arguments, open_subject, usable_depths
from bench.timing import summarize
from glm_mlx.cache import KvBits, TracedCache
from glm_mlx.engine import Engine
from glm_mlx.errors import InputError
from glm_mlx.model import Model
from glm_mlx.sampling import Sampler, SamplingParams
from kernels.launcher import KernelRefusedError
from kernels.source import source

DEPTH = 512
WARM_UP = 5  # tokens
GPU_TOKENS = 20  # of the GPU's own time
OWN_EVALUATIONS = 10  # tokens whose ops are evaluated one by one
BUSY = 0.8  # of a token's time: who works for so long has little to wait for
MODES = {"as in decode": True, "alone": False}  # name -> whether a token is built before the last one is there
DURATION = ("median\n{0}", "p10-p90\n{0}", "IQR\n{0}", "MAD\n{0}", "\ncount")
HOST_COLUMNS = ("token", "phase", "warm-up\nms", *(name.format("ms") for name in DURATION), "of\ntoken")
OP_COLUMNS = (
    "op", "on", "type", "calls\na token", "launches\na token", "one call\nµs",
    *(name.format("µs") for name in DURATION), "of\nall", "\nGB/s", "of\ncopy",
)  # fmt: skip
LAYER_COLUMNS = (
    "layer",
    "launches",
    "attention\nµs",
    "feed-forward\nµs",
    *(name.format("µs") for name in DURATION),
    "of\nall",
)


@dataclass
class Phases:
    """Seconds of tokens, warm-up first. host: computed by the host's thread in build and dispatch."""

    build: list[float] = field(default_factory=list)
    dispatch: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


@dataclass
class Found:
    """What was measured; what is not there yet when Ctrl-C comes is empty."""

    phases: dict[str, Phases] = field(default_factory=dict)
    entries: Entries = field(default_factory=Entries)
    by: str = ""  # whose time the entries are
    busy_seconds: float | None = None  # of the GPU for a token, where it tells
    gpu_kernels: float | None = None  # that ran for a token, copies counted in
    gpu_commits: float | None = None
    empty_evaluation: list[float] = field(default_factory=list)
    primitives: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.with_source:
        return print_source(open_subject(args), args.with_source, args.depth)
    path = script.results_file("trace", args.json)
    subject = open_subject(args)
    args.depth = max(args.depth, 1)  # a prompt has a token
    usable_depths(subject, [args.depth], (1 + len(MODES)) * (WARM_UP + args.count) + 2 * GPU_TOKENS)
    frame = Frame("trace", path, subject)

    found, calls = Found(notes=frame.notes), list[Call]()
    with frame.measuring():
        try:
            calls = record(subject.model, subject.weights, args.depth)
        except KernelRefusedError as error:
            found.notes.append(f"nothing is known of our launches: {error}")
        found.primitives = dict(decode_step(subject.model))
        measure(subject, found, calls, args)

    ops, layers, limit = _op_rows(found, frame), _layer_rows(found), limiting(found)
    if limit:
        found.notes.insert(0, limit["text"])
    by_limits = commit_counts(calls)
    lines = [
        f"depth {args.depth:,}; greedy; {args.count} tokens after {WARM_UP} of warm-up",
        *_launch_lines(found, calls, by_limits),
    ]
    tables = [_host_table(found), _op_table(found, ops), _layer_table(found, layers, subject)]
    report = {
        "depth": args.depth,
        "warm_up_tokens": WARM_UP,
        "limit": limit,
        "primitives_a_token": found.primitives,
        "kernel_launches_a_token": sum(len(call.launches) for call in calls),
        "gpu_kernels_a_token": found.gpu_kernels,
        "commits": {"counted_a_token": found.gpu_commits, "by_limits_a_token": by_limits},
        "gpu_busy_seconds_a_token": found.busy_seconds,
        "ops_by": found.by,
        "empty_evaluation_seconds": found.empty_evaluation,
        "phases": {mode: asdict(phases) for mode, phases in found.phases.items()},
        "ops": ops,
        "layers": layers,
        "entries": [asdict(entry) for entry in found.entries.values()],
    }
    return frame.finish(lines, [table for table in tables if table.row_count], report)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser("trace", __doc__)
    add_arguments(parser)
    parser.add_argument("--depth", type=script.whole(0), default=DEPTH, metavar="N", help="tokens before (default 512)")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="tokens of the host's (default 30)")
    parser.add_argument(
        "--with-source", metavar="OP[:WEIGHT]", help="print the generated source of a launch of this op, and stop"
    )
    return parser.parse_args(argv)


# --- measuring


def measure(subject: Subject, found: Found, calls: Sequence[Call], args: argparse.Namespace) -> None:
    """Fill `found` piece by piece."""
    model = subject.model
    sampler = Sampler(SamplingParams(temperature=0), model.cfg.vocab_size, [[]])
    engine = Engine(model)
    synthetic.fill_cache(engine.cache, args.depth)
    for mode, ahead in MODES.items():
        found.phases[mode] = Phases()
        decode(engine, sampler, WARM_UP + args.count, ahead, found.phases[mode])
    if gpu_time.available():
        decode(engine, sampler, GPU_TOKENS, True, Phases())  # the profiler must see nothing for the first time
        timeline = gpu_time.record(lambda: decode(engine, sampler, GPU_TOKENS, True, Phases()))
        found.by = "the GPU's own time, by CUPTI"
        found.busy_seconds = timeline.busy_seconds / GPU_TOKENS
        found.gpu_kernels = len(timeline.kernels) / GPU_TOKENS
        found.gpu_commits = timeline.commits / GPU_TOKENS if timeline.commits else None
        found.entries = attribute(timeline, calls, GPU_TOKENS, found.notes)
    else:
        found.by = "ops evaluated one by one"
        found.empty_evaluation = [_empty_evaluation() for _ in range(100)]
        cache = model.new_cache()
        synthetic.fill_cache(cache, args.depth)
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        for number in range(1 + OWN_EVALUATIONS):  # the first is warm-up
            rows = TracedCache(cache.reserve(1), mx.array([cache.offset], mx.int32)) if on_gpu else cache
            time_calls(model, subject.weights, rows, args.depth, found.entries, lambda logits: sampler(logits).token)
            if number == 0:
                for entry in found.entries.values():
                    entry.seconds.clear()


def decode(engine: Engine, sampler: Sampler, tokens: int, ahead: bool, phases: Phases) -> None:
    """So many tokens, as `Engine.generate` makes them, or each one alone."""
    sample = sampler(mx.zeros((1, engine.model.cfg.vocab_size)))
    int(sample.token)
    for _ in range(tokens):
        start, host = time.perf_counter(), time.thread_time()
        following = sampler(engine._forward(sample.token[:, None]))
        built = time.perf_counter()
        mx.async_eval(following.arrays())
        sent, host = time.perf_counter(), time.thread_time() - host
        int(sample.token if ahead else following.token)
        end = time.perf_counter()
        phases.build.append(built - start)
        phases.dispatch.append(sent - built)
        phases.wait.append(end - sent)
        phases.whole.append(end - start)
        phases.host.append(host)
        sample = following
    int(sample.token)


def _empty_evaluation() -> float:
    """Seconds to evaluate next to nothing: what every op evaluated on its own has to pay."""
    made = mx.zeros((8,)) + 1
    start = time.perf_counter()
    mx.eval(made)
    return time.perf_counter() - start


def attribute(timeline: Timeline, calls: Sequence[Call], tokens: int, notes: list[str]) -> Entries:
    """The kernels that the GPU ran, each with the call that launched it.

    Ours come in the order of the calls and carry their op's name; MLX's own belong to the place of the one of ours
    before them, and to the sampling behind a token's last. If that order is not found, nothing is given to layers.
    """
    own = [(call, launch.op) for call in calls for launch, _ in call.launches]
    by_length = sorted({op for _, op in own}, key=len, reverse=True)
    named = re.compile(rf"({'|'.join(by_length)})_[0-9a-f]{{12}}") if own else None
    ops = [match[1] if named and (match := named.search(kernel.name)) else None for kernel in timeline.kernels]
    in_order = bool(own) and [op for op in ops if op] == [op for _, op in own] * tokens
    if not in_order:
        notes.append("by kernels, not by layers: the GPU did not run the launches of a token in the order of its calls")
    entries, number = Entries(), 0  # number: of our launches so far
    for op, kernel in zip(ops, timeline.kernels, strict=True):
        if not in_order:
            place, call, token = Place("token"), None, 0
        elif op:
            (call, _), token = own[number % len(own)], number // len(own)
            place = call.place
            number += 1
        else:
            call, token = None, max(number - 1, 0) // len(own)
            place = own[(number - 1) % len(own)][0].place if number % len(own) else Place("sampling")
        entry = entries.of(place, call.op if call else f"MLX: {short_name(kernel.name)}", call)
        entry.seconds += [0.0] * ((tokens if in_order else 1) - len(entry.seconds))
        entry.seconds[token] += kernel.seconds / (1 if in_order else tokens)
        entry.launches += 1 / tokens
        if call is None:
            entry.calls += 1 / tokens
    if in_order:
        for call in calls:
            if call.launches:
                entry = entries.of(call.place, call.op, call)
                entry.calls += 1
                entry.nbytes += call.nbytes
    return entries


def short_name(kernel: str) -> str:
    """ "void mlx::core::cu::copy_g<float, int>(...)" -> "copy_g" """
    plain = re.split(r"[<(]", kernel.replace("(anonymous namespace)::", ""))[0].split()
    return plain[-1].rsplit("::", 1)[-1] if plain else kernel


# --- what follows from it


def limiting(found: Found) -> dict[str, Any] | None:
    """Who sets the pace of decode, host or device, and for how much of a token's time each of them works.

    None if Ctrl-C came before a token was timed.
    """
    phases = found.phases.get("as in decode")
    if phases is None or len(phases.whole) <= WARM_UP:
        return None
    whole, host = (summarize(samples[WARM_UP:]).median for samples in (phases.whole, phases.host))
    host_share, device_share = host / whole, None if found.busy_seconds is None else found.busy_seconds / whole
    works = f"of a token's {1e3 * whole:.2f} ms the host works for {host_share:.0%}"
    works += ", the rest it waits" if device_share is None else f", the GPU for {device_share:.0%}"
    if host_share >= max(BUSY, device_share or 0):
        by, says = "host", "the host is the limit: faster kernels change nothing, fewer launches do"
    elif device_share is None or device_share >= BUSY:
        by, says = "device", f"the device{', which is this CPU,' if back_end() == 'cpu' else ''} is the limit"
    else:
        by, says = "neither", "neither host nor device fills the time: they wait for one another"
    return {"by": by, "host_share": host_share, "device_share": device_share, "text": f"{says}; {works}"}


def commit_counts(calls: Sequence[Call]) -> dict[str, int]:
    """By the limits of this device, where it has such, and of others; of our launches alone."""
    inputs = [arrays for call in calls for _, arrays in call.launches]
    here = commits.limits()
    known = [*([here] if here else []), *dict.fromkeys((*commits.METAL.values(), *commits.CUDA.values()))]
    return {str(limits): commits.commits(inputs, limits) for limits in known}


def _launch_lines(found: Found, calls: Sequence[Call], by_limits: Mapping[str, int]) -> Iterator[str]:
    own = sum(len(call.launches) for call in calls)
    if found.primitives:
        total = launches(found.primitives)
        yield f"a token here: {total} launches in {sum(found.primitives.values())} primitives of MLX, after its fusing"
    if found.gpu_kernels is not None:
        commits_text = "" if found.gpu_commits is None else f" in {found.gpu_commits:.1f} graphs"
        yield f"counted on the GPU: {found.gpu_kernels:.1f} kernels and copies a token{commits_text}"
    where = "on a GPU" if back_end() == "cpu" else "here"
    shown = [f"{count} ({name})" for name, count in by_limits.items() if back_end() != "cpu" or "Apple" in name]
    yield (
        f"commits of the {own} launches of our kernels in a token {where}, reckoned by MLX's limits (assumed: whole "
        f"arrays count, MLX's own operations come on top): {'; '.join(shown)}"
    )


# --- tables


def _durations(seconds: Sequence[float], scale: float, whole: float | None, digits: int = 1) -> list[str]:
    """The columns of DURATION, and the share of a whole."""
    if not seconds:
        return ["-"] * (len(DURATION) + 1)
    s = summarize(seconds)
    return [
        f"{scale * s.median:.{digits}f}",
        f"{scale * s.p10:.{digits}f}-{scale * s.p90:.{digits}f}",
        f"{scale * s.iqr:.{digits}f}",
        f"{scale * s.mad:.{digits}f}",
        f"{s.count}",
        f"{s.median / whole:.1%}" if whole else "-",
    ]


def _host_table(found: Found) -> Table:
    table = script.table("host", HOST_COLUMNS, words=2)
    names = {"build": "build", "dispatch": "dispatch", "wait": "wait", "whole": "whole", "host": "host's own work"}
    for mode, phases in found.phases.items():
        whole = summarize(phases.whole[WARM_UP:]).median if phases.whole[WARM_UP:] else None
        for i, (name, label) in enumerate(names.items()):
            samples = getattr(phases, name)
            warm = f"{1e3 * samples[0]:.2f} .. {1e3 * samples[:WARM_UP][-1]:.2f}" if samples else "-"
            table.add_row(mode if i == 0 else "", label, warm, *_durations(samples[WARM_UP:], 1e3, whole, 3))
    return table


def _token_seconds(found: Found, chosen: Sequence[Entry]) -> list[float]:
    """By token, of several entries together."""
    return [sum(seconds) for seconds in zip(*(entry.seconds for entry in chosen), strict=False)]


def _op_rows(found: Found, frame: Frame) -> list[dict[str, Any]]:
    """A row for each op on the same weights of all layers; the slowest first."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in found.entries.values():
        groups.setdefault((entry.op, entry.what, entry.quant), []).append(entry)
    rows = []
    for (op, what, quant), group in groups.items():
        seconds, nbytes = _token_seconds(found, group), sum(entry.nbytes for entry in group)
        if not seconds:
            continue
        median = summarize(seconds).median
        gb_s = nbytes / median / 1e9 if nbytes and median else None
        rows.append(
            {
                "op": op,
                "on": what,
                "type": quant,
                "calls": sum(entry.calls for entry in group),
                "launches": sum(entry.launches for entry in group),
                "seconds": summarize(seconds).as_dict(),
                "samples": seconds,
                "bytes": nbytes,
                "gb_s": gb_s,
                "of_copy": gb_s and frame.of_copy(gb_s),
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"]["median"])


def _op_table(found: Found, rows: Sequence[dict[str, Any]]) -> Table:
    table = script.table(f"ops of a token: {found.by}", OP_COLUMNS, words=3)
    whole = sum(row["seconds"]["median"] for row in rows)
    for row in rows:
        table.add_row(
            row["op"],
            row["on"],
            row["type"],
            f"{row['calls']:.0f}" if row["calls"] else "-",
            f"{row['launches']:.0f}" if row["launches"] else "-",
            f"{1e6 * row['seconds']['median'] / row['calls']:.1f}" if row["calls"] else "-",
            *_durations(row["samples"], 1e6, whole),
            f"{row['gb_s']:.3g}" if row["gb_s"] else "-",
            script.share(row["of_copy"]),
        )
    return table


def _layer_rows(found: Found) -> list[dict[str, Any]]:
    """A row for each layer, and for each part outside of layers, in the order of a token."""
    groups: dict[tuple[str, int | None], list[Entry]] = {}
    for entry in found.entries.values():
        place = entry.place
        groups.setdefault(("layer", place.layer) if place.layer is not None else (place.part, None), []).append(entry)
    rows = []
    for (part, layer), group in groups.items():
        seconds = _token_seconds(found, group)
        if not seconds:
            continue
        parts = {
            name: summarize(of_part).median
            for name in ("attention", "feed-forward")
            if (of_part := _token_seconds(found, [entry for entry in group if entry.place.part == name]))
        }
        rows.append(
            {
                "part": part,
                "layer": layer,
                "launches": sum(entry.launches for entry in group),
                "attention_seconds": parts.get("attention"),
                "feed_forward_seconds": parts.get("feed-forward"),
                "seconds": summarize(seconds).as_dict(),
                "samples": seconds,
            }
        )
    return rows


def _layer_table(found: Found, rows: Sequence[dict[str, Any]], subject: Subject) -> Table:
    table = script.table(f"layers of a token: {found.by}", LAYER_COLUMNS)
    whole = sum(row["seconds"]["median"] for row in rows)
    for row in rows:
        layer, both = row["layer"], (row["attention_seconds"], row["feed_forward_seconds"])
        kind = "dense" if layer is not None and layer < subject.config.first_k_dense else "MoE"
        table.add_row(
            row["part"] if layer is None else f"{layer} {kind}",
            f"{row['launches']:.0f}",
            *("-" if seconds is None else f"{1e6 * seconds:.1f}" for seconds in both),
            *_durations(row["samples"], 1e6, whole),
        )
    return table


# --- source


def print_source(subject: Subject, wanted: str, depth: int) -> int:
    """On a machine without a GPU: what a Mac would get, with a GPU's type of activations."""
    op, _, weight = wanted.partition(":")
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    kv_bits: KvBits = 8 if subject.model.row_format.is_packed else 16
    model = Model(subject.config, dict(subject.weights), mx.bfloat16, kv_bits) if on_cpu else subject.model
    try:
        seen = [(call, *one) for call in record(model, subject.weights, depth) for one in call.launches]
    except KernelRefusedError as error:
        raise InputError(f"a GPU would refuse a launch: {error}") from None
    chosen = [one for one in seen if one[1].op == op and (not weight or any(weight in name for name in one[0].weights))]
    if not chosen:
        ops = ", ".join(dict.fromkeys(launch.op for _, launch, _ in seen))
        raise InputError(f"a token of this model makes no launch of {wanted}; its launches are of {ops or 'no op'}")
    call, launch, arrays = chosen[0]
    found = source(launch, arrays)
    if found is None:
        raise InputError(f"MLX {version('mlx')} does not show the source of a kernel in the way that is known here")
    where = call.place.part if call.place.layer is None else f"layer {call.place.layer}, {call.place.part}"
    print(f"// {launch.op} ({where}), on {call.what}: grid {launch.grid}, threadgroup {launch.threadgroup}, in threads")
    print(found[1])
    others = dict.fromkeys(one[0].what for one in seen if one[1].op == op and one[0].what != call.what)
    if others:
        script.NOTES.print(f"other launches of {op} are on: {', '.join(others)}; choose with {op}:WEIGHT", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(script.run(main))
