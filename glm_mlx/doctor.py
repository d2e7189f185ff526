"""Do the kernels work on this device? `python -m glm_mlx.doctor -h`

Arguments only; `glm_mlx.checkup` does the work, and is imported late, as it needs MLX to start.
"""

import argparse
import sys
from pathlib import Path

from glm_mlx.command import Parser, context, run
from glm_mlx.signals import importing

DESCRIPTION = "Compile every kernel on this device, hold each against its twin in MLX's own operations, and time it."
NOTES = """\
The table goes to standard output, below it what a model takes of this machine's memory (worked out), and a paragraph
for a bug report. The file of --model is then loaded, and a token computed: its logits must be numbers. Each kernel runs
in a process that it may take down or hang (for a minute), so that one that does not work hides no other. The inputs are
small, so that caches hold them: GB/s says that a kernel runs, not how fast it is in a model. Without a GPU the twins
are run and timed.
Exit codes: 0 every kernel works, or there is no GPU; 1 one does not, or the file's logits are not numbers; 2 something
you gave cannot be used; 130 stopped with Ctrl-C. With --compile-only no file is loaded: 0 every kernel compiles; 1 one
does not, or there is no GPU.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m glm_mlx.doctor",
        description=DESCRIPTION,
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        "-m",
        metavar="FILE",
        help="the memory that this .gguf file takes, and if its model works (default: GLM-4.7-Flash in Q4_0)",
    )
    parser.add_argument(
        "--context", type=context, metavar="N|auto", help="with so many tokens (default auto: as many as fit)"
    )
    parser.add_argument(
        "--kv-bits", type=int, choices=(8, 16), default=16, help="of its cache's values (default 16, on a CPU 32)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the table shows, and every error in full")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="for virtual GPUs: try to run the kernels too, but do not require it",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        args = build_parser().parse_args(argv)
        with importing():
            from glm_mlx import checkup
        return checkup.run(args)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
