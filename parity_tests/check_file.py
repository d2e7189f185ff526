"""Check the product against the reference on any file, layer by layer.

    python -m reference --model GLM-4.7-Flash-Q4_0.gguf --layers 0,1,46

Every chosen layer is fed the reference's own input. Both sides hold one layer at a time, so that a 17 GB file fits a
32 GB machine; the reference computes every layer up to the last chosen one.
"""

from pathlib import Path

import numpy as np
from rich.table import Table

from glm_mlx.command import Parser, run, whole
from glm_mlx.config import Config
from glm_mlx.console import Console
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile
from glm_mlx.model import activation_dtype
from kernels.shown import shown
from parity_tests.budgets import BUDGETS
from parity_tests.compare import TapError, compare_layers


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 if every error is within its budget, 1 if not, 2 if something given cannot be used."""
    parser = Parser(prog="python -m reference", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", "-m", required=True, metavar="FILE", help="a .gguf file")
    parser.add_argument("--layers", metavar="I,J,...", help="numbers of layers (default: all)")
    parser.add_argument("--tokens", type=whole(1), default=16, metavar="N", help="of the random text (default 16)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the random text (default 0)")

    def work() -> int:
        args = parser.parse_args(argv)
        return _report(_compare(Path(args.model), args.layers, args.tokens, args.seed))

    return run(work)


def _compare(path: Path, layers: str | None, count: int, seed: int) -> list[TapError]:
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    if count > cfg.context_length:
        raise InputError(f"tokens is {count:,}; the model's context is {cfg.context_length:,}, give fewer")
    chosen = None if layers is None else [_layer(text, cfg.num_layers) for text in layers.split(",")]
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, count).tolist()
    with Console(stderr=True).status("computing the reference"):
        try:
            return list(compare_layers(path, tokens, chosen, activation_dtype()))
        except KeyError as error:  # of the reference, which falls back on nothing
            raise InputError(f"the reference needs {error.args[0]}, not in {path}; give a file that has it") from None
        except ValueError as error:
            raise InputError(f"the reference cannot use {path}: {error}; give another file") from None


def _layer(text: str, count: int) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) >= count:
        raise InputError(f"{shown(text, 40)!r} in --layers is no layer of this model; its layers are 0 to {count - 1}")
    return int(text)


def _report(taps: list[TapError]) -> int:
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
