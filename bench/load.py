"""How fast a GGUF file loads, against how fast it is read.

examples:
  python bench/load.py                 a file of GLM-4.7-Flash's real shapes, 4 layers, 1.1 GB, made on the spot
  python bench/load.py model.gguf

Three things in turn, several rounds, each in a fresh process: reading the file into memory that is new (what any loader
must do), reading it into a buffer that is used again (the disk or page cache alone), and loading it as weights. Before
each, the file is dropped from the page cache ("cold") where the system lets us, or not ("warm").
"""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # the repository instead of this folder, whose names would hide others
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from glm_mlx.early import quiet_start

    quiet_start()

import mlx.core as mx
from rich.filesize import decimal
from rich.table import Table

from bench import script
from bench.conditions import ROOT
from bench.frame import Frame
from bench.timing import summarize
from glm_mlx.errors import InputError
from glm_mlx.load import open_model
from glm_mlx.make_tiny import GLM_FLASH, make_tiny
from kernels.shown import shown

WAYS = {
    "read, new memory": "data = open(path, 'rb').read()",
    "read, one buffer": "f = open(path, 'rb', buffering=0); b = bytearray(1 << 24)\nwhile f.readinto(b): pass",
    "load": "load_model(path)",
}
STATES = ("cold", "warm")
CHILD = """
import os, sys, time
path = sys.argv[1]
import mlx.core as mx
from glm_mlx.load import load_model
mx.set_default_device(mx.cpu)
if {cold} and hasattr(os, "posix_fadvise"):
    fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); os.close(fd)
start = time.perf_counter()
{work}
print(time.perf_counter() - start)
"""
COLUMNS = ("what", "\nGB/s", "slowest-fastest\nGB/s", "median\ns", "IQR\ns", "MAD\ns", "\ncount", "load\nagainst it")

Samples = dict[tuple[str, str], list[float]]  # seconds by way and state


def main(argv: list[str] | None = None) -> int:
    parser = script.parser("load", __doc__)
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file in one part")
    parser.add_argument("--rounds", type=script.whole(1), default=5, help="default 5")
    args = parser.parse_args(argv)
    path = script.results_file("load", args.json)
    with tempfile.TemporaryDirectory(prefix="glm-mlx-load-") as folder:
        if args.model is None:
            overrides = {"output.weight": "Q6_K"}
            model = make_tiny(Path(folder) / "glm-4-layers.gguf", replace(GLM_FLASH, layers=4, overrides=overrides))
        else:
            model = args.model
        opened = open_model(model, mx.float32)  # here, where what is wrong with it is one line
        opened.memory.check(shown(model))
        if len(opened.gguf.parts) > 1:
            raise InputError(f"{shown(model)} is one of {len(opened.gguf.parts)} parts; name a file in one part")
        size = model.stat().st_size
        frame = Frame("load", path)
        samples: Samples = {(way, state): [] for state in STATES for way in WAYS}
        with frame.measuring() as status:
            for number in range(args.rounds):
                for way, state in samples:
                    status.update(f"round {number + 1} of {args.rounds}: {way}, {state}")
                    samples[way, state].append(measure(model, WAYS[way], state == "cold"))
    report = {
        "file": model.name,
        "bytes": size,
        "rounds": args.rounds,
        "summary": {", ".join(key): summarize(seconds).as_dict() for key, seconds in samples.items() if seconds},
        "seconds": {", ".join(key): seconds for key, seconds in samples.items()},
    }
    return frame.finish([f"{shown(model)}: {decimal(size)}; {args.rounds} rounds"], [_table(samples, size)], report)


def measure(path: Path, work: str, cold: bool) -> float:
    """Seconds of the work alone. Raises InputError with the last line of a process that fails."""
    child = CHILD.format(work=work, cold=cold)
    done = subprocess.run([sys.executable, "-c", child, path.resolve()], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        raise InputError(f"cannot load {shown(path)}: {said}")
    return float(done.stdout)


def _table(samples: Mapping[tuple[str, str], Sequence[float]], size: int) -> Table:
    table = script.table("load", COLUMNS)
    for (way, state), seconds in samples.items():
        if not seconds:
            continue
        s, load = summarize(seconds), samples["load", state]
        table.add_row(
            f"{way}, {state}",
            f"{size / s.median / 1e9:.2f}",
            f"{size / s.most / 1e9:.2f}-{size / s.least / 1e9:.2f}",
            f"{s.median:.3f}",
            f"{s.iqr:.3f}",
            f"{s.mad:.3f}",
            f"{s.count}",
            f"{s.median / summarize(load).median:.2f}" if load else "-",
        )
    return table


if __name__ == "__main__":
    sys.exit(script.run(main))
