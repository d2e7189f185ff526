"""How fast a GGUF file loads, against how fast it is read.

    python bench/load.py                 a file of GLM-4.7-Flash's real shapes, 4 layers, 1.1 GB, made on the spot
    python bench/load.py model.gguf

Four things in turn, several rounds, each in a fresh process: reading the file into memory that is new (what any loader
must do), reading it into a buffer that is used again (the disk or page cache alone), and loading it as weights. Before
each, the file is dropped from the page cache where the system lets us.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # the repository instead of this folder, whose names would hide others

from dataclasses import replace  # noqa: E402

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench import script  # noqa: E402
from glm_mlx.command import Parser, run  # noqa: E402
from glm_mlx.gguf import GGUFFile  # noqa: E402
from glm_mlx.make_tiny import GLM_FLASH, make_tiny  # noqa: E402

WAYS = {
    "read, new memory": "data = open(path, 'rb').read()",
    "read, one buffer": "f = open(path, 'rb', buffering=0); b = bytearray(1 << 24)\nwhile f.readinto(b): pass",
    "load": "load_model(path)",
}
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


def measure(path: Path, work: str, cold: bool) -> float:
    child = CHILD.format(work=work, cold=cold)
    done = subprocess.run([sys.executable, "-c", child, path], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    parser = Parser(prog="python bench/load.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="a .gguf file in one part")
    parser.add_argument("--rounds", type=script.whole(1), default=5, help="default 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and the conditions there")
    args = parser.parse_args()
    if args.model is not None:
        GGUFFile(args.model)  # here, where what is wrong with it is one line
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or make_tiny(
            Path(folder) / "glm-4-layers.gguf", replace(GLM_FLASH, layers=4, overrides={"output.weight": "Q6_K"})
        )
        size = path.stat().st_size
        samples: dict[str, list[float]] = {f"{way}, {state}": [] for state in ("cold", "warm") for way in WAYS}
        for _ in range(args.rounds):
            for state in ("cold", "warm"):
                for way, work in WAYS.items():
                    samples[f"{way}, {state}"].append(measure(path, work, state == "cold"))
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    table = Table(
        "what", "GB/s", "slowest - fastest", "load against it", title=f"{size / 1e9:.2f} GB, median of {args.rounds}"
    )
    for name, seconds in samples.items():
        load = medians["load, " + name.rsplit(", ", 1)[1]]
        spread = f"{size / max(seconds) / 1e9:.2f} - {size / min(seconds) / 1e9:.2f}"
        table.add_row(name, f"{size / medians[name] / 1e9:.2f}", spread, f"{medians[name] / load:.2f}")
    Console().print(table)
    if args.json:
        conditions = {
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "mlx": version("mlx"),
            "numpy": version("numpy"),
            "file": path.name,
            "bytes": size,
        }
        args.json.write_text(json.dumps({"conditions": conditions, "seconds": samples}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
