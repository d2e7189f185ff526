"""A picture of speed against context depth. matplotlib is an extra that nothing else needs."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_mlx.errors import InputError
from kernels.shown import shown

SUFFIXES = (".png", ".svg")


def usable(path: Path) -> Path:
    """Raises InputError now, and not after the run, where the picture can't be made."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot draw {shown(path)}; name a file that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {shown(path)}: there is no such folder; make it first")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install -e '.[plot]', or leave --plot out")
    return path


def draw(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as in the JSON of `bench/compare.py`: medians of decoding, with p10 to p90, a line for each contestant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["by"] for row in rows):
        own = [row for row in rows if row["by"] == name]
        seconds = [row["decode_seconds"] for row in own]
        speeds = [1 / s["median"] for s in seconds]
        spread = [
            [v - 1 / s["p90"] for v, s in zip(speeds, seconds, strict=True)],
            [1 / s["p10"] - v for v, s in zip(speeds, seconds, strict=True)],
        ]
        axes.errorbar([row["depth"] for row in own], speeds, spread, label=name, marker="o", capsize=3)
    depths = sorted({row["depth"] for row in rows})
    axes.set_xscale("symlog", base=2, linthresh=min([depth for depth in depths if depth] or [1]))
    axes.set_xticks(depths, [f"{depth:,}" for depth in depths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("decoded tokens a second, median and p10-p90")
    axes.set_title(title, fontsize="small", loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
