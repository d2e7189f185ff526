"""The main command: text in, text out. `python -m glm_mlx.generate -h`

Arguments and exit codes only; `glm_mlx.session` does the work. It is imported late, so that -h, a mistyped option and
an early Ctrl-C are answered at once.
"""

import argparse
import sys

from glm_mlx.command import Parser, context, run
from glm_mlx.signals import importing

DESCRIPTION = "Generate text with GLM-4.7-Flash, or another model of its architecture, from a GGUF file."
EXAMPLES = """\
examples:
  python -m glm_mlx.generate --model GLM-4.7-Flash-Q4_0.gguf "Why is the sky blue?"
  python -m glm_mlx.generate --model unsloth/GLM-4.7-Flash-GGUF:Q4_0 --chat
  cat letter.txt | python -m glm_mlx.generate --model model.gguf --system "Summarise." --no-think
  python -m glm_mlx.generate --model model.gguf --benchmark 30 --no-think

The answer goes to standard output; the model's reasoning, progress, figures and errors go to standard error.
Exit codes: 0 done, 2 something you gave cannot be used, 130 stopped with Ctrl-C, 129 and 143 by SIGHUP and SIGTERM.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m glm_mlx.generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = parser.add_argument_group("model and text")
    text.add_argument(
        "text", nargs="?", metavar="PROMPT", help="what to say to the model; - or nothing reads standard input"
    )
    text.add_argument("--prompt", "-p", metavar="TEXT", help="the same, as an option")
    text.add_argument(
        "--model",
        "-m",
        metavar="M",
        help="a .gguf file (the first part of a split one), or OWNER/REPO[:QUANT] on the hub",
    )
    text.add_argument("--system", "-s", metavar="TEXT", help="the system message")
    text.add_argument("--chat", action="store_true", help="talk turn by turn; /reset forgets, Ctrl-C stops an answer")
    text.add_argument("--drop-reasoning", action="store_true", help="in --chat: forget the reasoning of earlier turns")
    text.add_argument("--no-think", action="store_true", help="answer without reasoning first")
    text.add_argument("--chat-template", metavar="FILE", help="a Jinja chat template in place of the model file's own")
    text.add_argument("--raw", action="store_true", help="no chat template: the model continues PROMPT as it stands")
    text.add_argument(
        "--context",
        type=context,
        metavar="N|auto",
        help="at most N tokens of prompts and answers together (default auto: as many as memory and model allow)",
    )
    text.add_argument(
        "--kv-bits",
        type=int,
        choices=(8, 16),
        default=16,
        help="of the cache's values (default 16, on a CPU 32); 8 take a little over half of the memory of 16",
    )
    text.add_argument("--count", "-n", type=int, default=2048, metavar="N", help="at most N tokens (default 2048)")

    sampling = parser.add_argument_group("sampling (defaults: the file's own, else temperature 1.0, top-p 0.95)")
    sampling.add_argument(
        "--temperature", "--temp", type=float, metavar="T", help="0 always takes the most likely token"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 is off")
    sampling.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens up to this probability")
    sampling.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most likely one")
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="over 1 makes repeats rarer"
    )
    sampling.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="for tokens the answer has")
    sampling.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="the same, for each use")
    sampling.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=X",
        help="add X to a token's logit; repeatable",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="same seed, same text (default: from the clock)")

    output = parser.add_argument_group("output")
    output.add_argument("--benchmark", type=int, metavar="N", help="N tokens, then a table: token, ms, tok/s, GB/s")
    output.add_argument("--logprobs", type=int, metavar="N", help="with --json: each token's N likeliest alternatives")
    output.add_argument("--json", action="store_true", help="one JSON object instead of text")
    output.add_argument("--verbose", "-v", action="store_true", help="say what is loaded and how it runs")
    return parser


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER") from None


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        args = build_parser().parse_args(argv)
        with importing():
            from glm_mlx import session
        return session.run(args)

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
