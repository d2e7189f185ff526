"""Draw the loss curve of a training run: `python -m glm_mlx.small.plot --run runs/small --out docs/small-training.png`

Needs matplotlib, the extra `plot`.
"""

import json
import sys
from pathlib import Path

import numpy as np

from glm_mlx.command import Parser, run
from glm_mlx.errors import InputError
from kernels.shown import shown

_WINDOW = 50  # steps, whose median is drawn: single batches scatter, and a few leap
_TICKS = (0.2, 0.3, 0.5, 1, 2, 5)


def draw(run: Path, out: Path) -> None:
    """From a run's recipe and log: the losses of both heads, and the load of the busiest expert, by step.

    Raises InputError where matplotlib or the run is missing, or `out` can't be written.
    """
    if out.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"cannot draw {shown(out)}; name a file that ends in .png or .svg")
    try:
        recipe = json.loads((run / "recipe.json").read_text())
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown(run)} holds no whole run ({error}); train first: python -m glm_mlx.small.train --out FOLDER"
        ) from None
    if len(lines) < _WINDOW:
        raise InputError(f"{shown(run)} has {len(lines)} steps so far; a curve takes {_WINDOW}")
    try:  # an extra, which nothing else here needs
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('a curve needs matplotlib: pip install -e ".[plot]"') from None

    values = {name: np.array([line[name] for line in lines]) for name in ("loss", "total", "worst_load")}
    mtp = (values["total"] - values["loss"]) / recipe["mtp_weight"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, loads = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for y, name in ((values["loss"], "next token"), (mtp, "token after next (MTP)")):
        losses.plot(*_medians(y), label=name, linewidth=1)
    losses.set_yscale("log")
    losses.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    losses.minorticks_off()
    losses.set_ylabel("loss, nats a weighted token")
    loads.plot(*_medians(values["worst_load"]), color="C2", linewidth=1)
    loads.set_ylabel("busiest expert,\nof its fair share")
    loads.set_xlabel(f"step (medians of {_WINDOW})")
    for axes in (losses, loads):
        axes.grid(alpha=0.3)
        axes.axvline(recipe["decay_from"] * recipe["steps"], color="gray", linestyle=":", label="rate falls from here")
        axes.axvline(recipe["round_from"] * recipe["steps"], color="gray", linestyle="--", label="Q4_0's rounding")
    losses.legend(fontsize="small")
    losses.set_title(
        f"small model: {recipe['steps']:,} steps of {recipe['rows']} x {recipe['length']} tokens, "
        f"seed {recipe['seed']}, {lines[-1]['seconds']:,.0f} s",
        fontsize="small",
        loc="left",
    )
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {shown(out)}: {error.strerror}; make its folder first") from None


def _medians(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last step of each whole window, and the window's median."""
    windows = values[: len(values) // _WINDOW * _WINDOW].reshape(-1, _WINDOW)
    return _WINDOW * np.arange(1, len(windows) + 1), np.median(windows, axis=1)


def main() -> int:
    parser = Parser(prog="python -m glm_mlx.small.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="of the training run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .png or .svg file to write")
    args = parser.parse_args()
    draw(args.run, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
