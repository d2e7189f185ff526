"""How fast one block decodes: the whole block, its attention alone and its feed-forward alone, at several depths.

examples:
  python bench/block.py                                     the small model that ships with the project
  python bench/block.py --model GLM-4.7-Flash-Q4_0.gguf
  python bench/block.py --synthetic --layers 4 --depths 512,4k,32k --paths kernels,twins

The quick gate between a kernel and the whole model. A step is a chain of blocks, as in decode: the same compiled step
on a GPU, one step queued while the one before is computed, every step waiting for the one before. Figures are a step's
divided by its blocks. The chain takes all layers of a kind in turn, and copies of them while it reads less than caches
hold; so weights come from memory, as in decode. The first steps are warm-up: shown, but in no median. "GPU" is the
time that the GPU itself was busy, known on NVIDIA with PyTorch installed; where it is known, GB/s and the share of what
a copy on this device moves are by it. "read" is bytes of the weights and cached rows that a token needs, each once: the
chosen experts, all other weights of the part, and the rows of the cache, which are drawn at random. Tests hold what our
kernels fetch to that; MLX's operations may read more.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import mlx.core as mx
from rich.filesize import decimal
from rich.status import Status
from rich.table import Table

from bench import gpu_time, script, synthetic
from bench.conditions import back_end
from bench.frame import Frame
from bench.launches import launches, primitives
from bench.subject import PATHS, Subject, add_arguments, add_paths, open_subject, usable_depths, usable_paths
from bench.timing import summarize
from glm_mlx.cache import LatentCache, TracedCache
from glm_mlx.config import Config
from glm_mlx.errors import is_out_of_memory
from glm_mlx.model import Cache, Model, decode_bytes
from kernels.planes import QuantizedTensor, Weight
from kernels.rows import RowFormat

DEPTHS = (512, 2048, 8192, 32_768)
PARTS = {"block": ("self_attn", "mlp"), "attention": ("self_attn",), "feed-forward": ("mlp",)}
NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
WARM_UP = 5  # steps
GPU_STEPS, GPU_SAMPLES = 4, 3  # of the GPU's own time: steps of a sample, samples of a round
INPUTS = 64  # rows of the embedding that begin steps in turn
# Of a chain. The real model has 47; a CPU would take minutes.
MOST_LAYERS = {"gpu": 48, "cpu": 8}
# Four times 96 MB, the largest cache before the memory of a GPU with a back end here (M2 and M3 Ultra; H200: 60 MB).
BEYOND_CACHES = {"gpu": 4 * 96 << 20, "cpu": 64 << 20}
COLUMNS = (
    "part", "layers", "path", "depth", "blocks\na step", "launches\na block", "warm-up\nµs", "block\nµs", "p10-p90\nµs",
    "IQR\nµs", "MAD\nµs", "\ncount", "GPU\nµs", "read a\nblock", "\nGB/s", "of\ncopy",
)  # fmt: skip


@dataclass
class Run:
    """One chain at one depth in one round; seconds of a step. Steps queue behind one another."""

    part: str
    kind: str
    path: str
    depth: int
    seconds: list[float] = field(default_factory=list)  # of every step, warm-up first
    gpu: list[float] = field(default_factory=list)

    @property
    def timed(self) -> list[float]:
        return self.seconds[WARM_UP:]


@dataclass(frozen=True)
class Rotation:
    """A model of layers of one kind alone, so many that caches do not hold what a chain of them reads."""

    kind: str
    subject: Subject
    own_layers: int  # the others are copies of these

    def read_bytes(self, part: str, depth: int) -> int:
        """What a step reads, with so many rows in the cache before its own."""
        subject = self.subject
        return read_bytes(part, depth, subject.config, subject.weights, subject.model.row_format)


def read_bytes(part: str, depth: int, cfg: Config, weights: Mapping[str, Weight], rows: RowFormat) -> int:
    """What a step through one part of all layers reads, with so many rows in the cache before its own."""
    words = [word for name in PARTS[part] for word in (name, NORMS[name])]
    of_part = {name: w for name, w in weights.items() if name.startswith("layers.") and name.split(".")[2] in words}
    fixed, per_row = decode_bytes(cfg, of_part, rows)
    return fixed + (per_row * (depth + 1) if "self_attn" in PARTS[part] else 0)


class Chain:
    """A step through one part of every layer, by the way that the engine goes on this device."""

    def __init__(self, model: Model, part: str):
        self.model, self.part = model, part
        self._step = mx.compile(self._traced) if mx.default_device() == mx.Device(mx.gpu) else None

    def __call__(self, x: mx.array, cache: LatentCache) -> mx.array:
        """(1, 1, D) -> (1, 1, D). The new rows stand behind the valid ones; the next step writes them again."""
        if self._step is None:
            return self._run(x, cache)
        rows = cache.reserve(1) if "self_attn" in PARTS[self.part] else []
        x, rows = self._step(x, mx.array([cache.offset], mx.int32), rows)
        if rows:
            cache.take(rows, 0)
        return x

    def _traced(self, x: mx.array, position: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, list[mx.array]]:
        cache = TracedCache(list(rows), position)
        return self._run(x, cache), cache.rows

    def _run(self, x: mx.array, cache: Cache) -> mx.array:
        for layer in self.model.layers:
            match self.part:
                case "block":
                    x = layer(x, cache)
                case "attention":
                    x = layer.self_attn(x, cache)
                case _:
                    x = layer.mlp(x)
        return x


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    path = script.results_file("block", args.json)
    paths = usable_paths(args.paths)
    subject = open_subject(args)
    rotations = rotate(subject)
    most = max(rotation.subject.config.num_layers for rotation in rotations)
    with_cache = replace(subject, config=replace(subject.config, num_layers=most), room=rotations[-1].subject.room)
    depths, notes = usable_depths(with_cache, args.depths, WARM_UP + args.count, DEPTHS)
    frame = Frame("block", path, subject)
    frame.notes += [*notes, *too_small(rotations)]

    runs: list[Run] = []
    counted: dict[str, dict[str, int]] = {}
    with frame.measuring() as status:
        measure_all(rotations, runs, counted, frame.notes, args, paths, depths, status)

    runs = [run for run in runs if run.timed]
    rows = list(_rows(rotations, runs, counted, frame))
    lines = [f"{script.counted(args.rounds, 'round')} of {args.count} steps after {WARM_UP} of warm-up"]
    report = {
        "rounds": args.rounds,
        "warm_up_steps": WARM_UP,
        "primitives_a_step": counted,
        "rows": rows,
        "runs": [asdict(run) for run in runs],
    }
    return frame.finish(lines, [_table(rows)], report)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser("block", __doc__)
    add_arguments(parser)
    parser.add_argument("--depths", type=script.listed(script.whole(0)), metavar="N[,N]", help="such as 512,4k,32k")
    parser.add_argument("--count", "-n", type=script.whole(1), default=30, help="steps a round (default 30)")
    parser.add_argument("--rounds", type=script.whole(1), default=3, help="of everything, in turns (default 3)")
    add_paths(parser)
    return parser.parse_args(argv)


def rotate(subject: Subject) -> list[Rotation]:
    """One rotation for each kind of layer that the model has. Half of the room is left for caches."""
    cfg, room, made = subject.config, subject.room, []
    dense = min(cfg.first_k_dense, cfg.num_layers)
    for kind, own in (("MoE", range(dense, cfg.num_layers)), ("dense", range(dense))):
        if own:
            made.append(_rotation(replace(subject, room=room), kind, own, subject.room // 2))
            room = made[-1].subject.room
    return made


def _rotation(subject: Subject, kind: str, own: Sequence[int], least_room: int) -> Rotation:
    room, rows = subject.room, subject.model.row_format
    weights: dict[str, Weight] = {name: w for name, w in subject.weights.items() if not name.startswith("layers.")}

    def with_layers(count: int) -> Config:
        return replace(subject.config, num_layers=count, first_k_dense=count if kind == "dense" else 0)

    for i, layer in enumerate(own):
        weights |= {f"layers.{i}.{name}": w for name, w in _of_layer(subject.weights, layer).items()}
    device = "cpu" if back_end() == "cpu" else "gpu"
    least = BEYOND_CACHES[device]
    reads = min(read_bytes(part, -1, with_layers(len(own)), weights, rows) for part in PARTS)
    wanted = min(MOST_LAYERS[device], -(-least * len(own) // reads))
    banks = sum(w.nbytes for name, w in weights.items() if ".experts." in name)
    count = len(own)
    while count < wanted:
        copied = _of_layer(subject.weights, own[count % len(own)])
        # Banks of experts that no cache holds are read here and there: a copy may share them, unless its model moves
        # them into one array with others.
        shared = {
            name
            for name, w in copied.items()
            if ".experts." in name and banks >= least and (device == "cpu" or isinstance(w, mx.array))
        }
        nbytes = sum(w.nbytes for name, w in copied.items() if name not in shared)
        if room - nbytes < least_room:
            break
        room -= nbytes
        weights |= {f"layers.{count}.{name}": w if name in shared else _copy(w) for name, w in copied.items()}
        count += 1
    cfg = with_layers(count)
    model = Model(cfg, weights, subject.model.dtype, 8 if rows.is_packed else 16)
    return Rotation(kind, replace(subject, config=cfg, weights=weights, model=model, room=room), len(own))


def _of_layer(weights: Mapping[str, Weight], layer: int) -> dict[str, Weight]:
    """By their names within the layer."""
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _copy(weight: Weight) -> Weight:
    """The same values in other memory."""

    def copied(array: mx.array) -> mx.array:
        made = array + mx.zeros((), array.dtype)
        mx.eval(made)
        return made

    if isinstance(weight, mx.array):
        return copied(weight)
    mins, sub_scales = (None if plane is None else copied(plane) for plane in (weight.mins, weight.sub_scales))
    return QuantizedTensor(weight.type, weight.shape, copied(weight.quants), copied(weight.scales), mins, sub_scales)


def too_small(rotations: Sequence[Rotation]) -> Iterator[str]:
    """What must be known of chains that a cache may hold all the same."""
    least = BEYOND_CACHES["cpu" if back_end() == "cpu" else "gpu"]
    for rotation in rotations:
        reads = {part: rotation.read_bytes(part, -1) for part in PARTS}
        small = [f"{part} {decimal(n)}" for part, n in reads.items() if n < least]
        if small:
            yield (
                f"{rotation.kind} layers: a step reads {', '.join(small)} of weights, which a cache may hold; "
                f"{decimal(least)} would be beyond it"
            )


def measure_all(
    rotations: Sequence[Rotation],
    runs: list[Run],
    counted: dict[str, dict[str, int]],
    notes: list[str],
    args: argparse.Namespace,
    paths: Sequence[str],
    depths: Sequence[int],
    status: Status,
) -> None:
    """Append runs, parts and paths in turns, and to `notes` what could not be measured.

    The GPU's own time is taken after all others: see `gpu_time`.
    """
    deepest = depths[-1]
    chains = {(r.kind, part, path): Chain(r.subject.model, part) for r in rotations for part in PARTS for path in paths}
    for number in range(args.rounds):
        for depth in depths:
            for rotation in rotations:
                if depth > deepest:
                    continue
                status.update(f"round {number + 1} of {args.rounds}, depth {depth:,}, {rotation.kind} layers")
                try:
                    with_depth = [
                        (part, path)
                        for part in PARTS
                        for path in paths
                        if part != "feed-forward" or depth == depths[0]  # it does not see the context
                    ]
                    cache, inputs = _context(rotation.subject.model, depth)
                    for part, path in with_depth[:: 1 if number % 2 == 0 else -1]:
                        run = Run(part, rotation.kind, path, depth)
                        chain = chains[rotation.kind, part, path]
                        runs.append(run)
                        with PATHS[path]():
                            if (name := f"{rotation.kind} {part}, {path}") not in counted:
                                counted[name] = dict(primitives(chain(inputs[0], cache)))
                            measure(chain, cache, inputs, run, WARM_UP + args.count)
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    notes.append(f"not measured: depth {depth:,} and more: out of memory")
                    deepest = depth - 1
    if gpu_time.available():
        for depth, kind in dict.fromkeys((run.depth, run.kind) for run in runs if run.timed):
            status.update(f"GPU time, depth {depth:,}, {kind} layers")
            group = [run for run in runs if (run.depth, run.kind) == (depth, kind) and run.timed]
            cache, inputs = _context(chains[kind, "block", paths[0]].model, depth)
            for run in group:
                with PATHS[run.path]():
                    measure_gpu(chains[kind, run.part, run.path], cache, inputs, run)


def _context(model: Model, depth: int) -> tuple[LatentCache, list[mx.array]]:
    """A cache with so many rows, and what steps begin with in turn: (1, 1, D) each. Other values choose other
    experts."""
    cache = model.new_cache()
    synthetic.fill_cache(cache, max(depth, 1))
    tokens = mx.random.randint(0, model.cfg.vocab_size, (INPUTS, 1, 1), mx.int32, key=mx.random.key(0))
    inputs = [model.embed(token) for token in tokens]
    mx.eval(inputs)
    return cache, inputs


def measure(chain: Chain, cache: LatentCache, inputs: Sequence[mx.array], run: Run, steps: int) -> None:
    """Fill `run` step by step: what is there when Ctrl-C comes is good."""
    last = time.perf_counter()
    x = _step(chain, cache, inputs, 0, inputs[0])
    for number in range(1, steps + 1):
        ahead = _step(chain, cache, inputs, number, x)
        mx.eval(x)
        now = time.perf_counter()
        run.seconds.append(now - last)
        last, x = now, ahead
    mx.eval(x)


def measure_gpu(chain: Chain, cache: LatentCache, inputs: Sequence[mx.array], run: Run) -> None:
    """The same steps by the GPU's own time."""

    def several() -> None:
        x = inputs[0]
        for number in range(GPU_STEPS):
            x = _step(chain, cache, inputs, number, x)
        mx.eval(x)

    for _ in range(GPU_SAMPLES):
        run.gpu.append(gpu_time.busy_seconds(several) / GPU_STEPS)


def _step(chain: Chain, cache: LatentCache, inputs: Sequence[mx.array], number: int, before: mx.array) -> mx.array:
    # A new input, which must wait for the step before as a token does: it is sampled from that.
    made = chain(mx.depends([inputs[number % len(inputs)]], [before])[0], cache)
    mx.async_eval(made)
    return made


def _rows(
    rotations: Sequence[Rotation], runs: Sequence[Run], counted: Mapping[str, Mapping[str, int]], frame: Frame
) -> Iterator[dict[str, Any]]:
    """A row for each part, kind of layers, path and depth, over all its runs. Seconds and bytes are of one block."""
    by_kind = {rotation.kind: rotation for rotation in rotations}
    order = {part: i for i, part in enumerate(PARTS)}
    keys = {(run.kind, run.part, run.depth, run.path) for run in runs}
    for kind, part, depth, path in sorted(keys, key=lambda key: (key[0] != "MoE", order[key[1]], *key[2:])):
        group = [run for run in runs if (run.kind, run.part, run.depth, run.path) == (kind, part, depth, path)]
        rotation = by_kind[kind]
        blocks = rotation.subject.config.num_layers
        seconds = summarize([s / blocks for run in group for s in run.timed])
        gpu = [s / blocks for run in group for s in run.gpu]
        nbytes = rotation.read_bytes(part, max(depth, 1)) / blocks
        gb_s = nbytes / (summarize(gpu).median if gpu else seconds.median) / 1e9
        yield {
            "part": part,
            "kind": kind,
            "path": path,
            "depth": depth if "self_attn" in PARTS[part] else None,
            "own_layers": rotation.own_layers,
            "blocks_a_step": blocks,
            "launches": launches(counted[f"{kind} {part}, {path}"]) / blocks,
            "warm_up_seconds": [s / blocks for s in group[0].seconds[:WARM_UP]],
            "seconds": seconds.as_dict(),
            "gpu_seconds": summarize(gpu).as_dict() if gpu else None,
            "bytes": nbytes,
            "gb_s": gb_s,
            "of_copy": frame.of_copy(gb_s),
        }


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = script.table("block", COLUMNS, words=3)
    for row in rows:
        seconds, warm, gpu = row["seconds"], row["warm_up_seconds"], row["gpu_seconds"]
        copies = row["blocks_a_step"] - row["own_layers"]
        table.add_row(
            row["part"],
            row["kind"],
            row["path"],
            "-" if row["depth"] is None else f"{row['depth']:,}",
            f"{row['own_layers']}{f' + {copies}' if copies else ''}",
            f"{row['launches']:.1f}",
            f"{1e6 * warm[0]:,.0f} .. {1e6 * warm[-1]:,.0f}",
            f"{1e6 * seconds['median']:,.1f}",
            f"{1e6 * seconds['p10']:,.1f}-{1e6 * seconds['p90']:,.1f}",
            f"{1e6 * seconds['iqr']:.1f}",
            f"{1e6 * seconds['mad']:.1f}",
            f"{seconds['count']}",
            f"{1e6 * gpu['median']:.1f}" if gpu else "-",
            decimal(round(row["bytes"])),
            f"{row['gb_s']:.3g}",
            script.share(row["of_copy"]),
        )
    return table


if __name__ == "__main__":
    sys.exit(script.run(main))
