"""Check the product against the reference on any file, layer by layer.

    python -m reference --model GLM-4.7-Flash-Q4_0.gguf --layers 0,1,46

Every chosen layer is fed the reference's own input. Both sides hold one layer at a time, so that a 17 GB file fits a
32 GB machine; the reference computes every layer up to the last chosen one.
"""

import argparse
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

from glm_mlx.command import Parser, run, whole
from glm_mlx.errors import InputError
from glm_mlx.signals import importing

if TYPE_CHECKING:
    from parity_tests.compare import TapError


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if every error is within its budget, 1 if not, 2 if something given cannot be used."""
    return run(lambda: _report(_compare(_parser().parse_args(argv))))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m reference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", "-m", required=True, metavar="FILE", help="a .gguf file")
    parser.add_argument("--layers", metavar="I,J,...", help="numbers of layers (default: all)")
    parser.add_argument("--tokens", type=whole(1), default=16, metavar="N", help="of the random text (default 16)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the random text (default 0)")
    return parser


def _compare(args: argparse.Namespace) -> list["TapError"]:
    with importing():
        import numpy as np

        from glm_mlx import weights
        from glm_mlx.config import Config
        from glm_mlx.console import Console
        from glm_mlx.gguf import GGUFFile
        from glm_mlx.model import activation_dtype
        from parity_tests.compare import compare_layers
    path = Path(args.model)
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    weights.plan(gguf, cfg)  # the reference does not say what a file lacks
    if args.tokens > cfg.context_length:
        raise InputError(
            f"tokens is {args.tokens}; it must be 1 to {cfg.context_length:,}, which the model was made for"
        )
    chosen = None if args.layers is None else [_layer(text, cfg.num_layers) for text in args.layers.split(",")]
    tokens = np.random.default_rng(args.seed).integers(0, cfg.vocab_size, args.tokens).tolist()
    with Console(stderr=True).status("computing the reference"):
        return list(compare_layers(path, tokens, chosen, activation_dtype()))


def _layer(text: str, count: int) -> int:
    """The number of a layer; `count` is how many there are."""
    try:
        return range(count)[whole(0)(text)]
    except (argparse.ArgumentTypeError, IndexError):
        raise InputError(
            f"{reprlib.repr(text)} in --layers is no layer of this model; its layers are 0 to {count - 1}"
        ) from None


def _report(taps: list["TapError"]) -> int:
    from rich.table import Table

    from glm_mlx.console import Console
    from parity_tests.budgets import BUDGETS

    table = Table(
        "value", "error", "budget", "verdict", title="product against reference: max |difference| / max |value|"
    )
    for tap in taps:
        verdict = "within" if tap.within_budget else "OVER"
        if tap.swaps:
            verdict += f" ({tap.swaps} tokens chose other experts, {tap.excused} at a near-tie)"
        table.add_row(tap.name, f"{tap.error:.2e}", f"{BUDGETS[tap.kind].most:.0e}", verdict)
    Console().print(table)
    return 0 if all(tap.within_budget for tap in taps) else 1
