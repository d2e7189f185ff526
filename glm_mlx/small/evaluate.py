"""Examine the small model on held-out questions: `python -m glm_mlx.small.evaluate`

The exam goes through the product's own engine, on the quantised file, greedily. The figures beside it (perplexity,
multi-token prediction, use of the experts) come from training's forward pass over the file's dequantised weights.
"""

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.progress import track
from rich.table import Table

from glm_mlx.chat import encode_chat
from glm_mlx.command import Parser, run, whole
from glm_mlx.console import Console
from glm_mlx.engine import Engine
from glm_mlx.gguf import GGUFFile
from glm_mlx.load import Loaded, load_model
from glm_mlx.make_tiny import tensor_shapes
from glm_mlx.output import OutputSplitter
from glm_mlx.packing import pack
from glm_mlx.sampling import SamplingParams
from glm_mlx.small import SMALL_MODEL
from glm_mlx.small.exam import EXAMS, Case, exam, grade
from glm_mlx.small.export import NAMES
from glm_mlx.small.network import Params, forward
from glm_mlx.small.train import SMALL, Batch, Recipe, make_batch
from glm_mlx.template import ChatTemplate
from kernels.planes import dequantize_ops

SEED = 20_000_000  # of every exam: far from the seeds of training steps
MAX_TOKENS = 300
WANTED = {"addition": 0.95, "tools": 0.90, "story": 0.85, "format": 0.99}


@dataclass(frozen=True)
class Result:
    """One line of the table. `good`: whether `value` meets `wanted`, "≥" or "≤" by `at_least`."""

    name: str
    value: float
    wanted: float
    at_least: bool = True
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


class Examiner:
    """Asks a loaded model the cases of an exam."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.template = ChatTemplate(loaded.gguf.metadata["tokenizer.chat_template"])

    def ask(self, case: Case) -> tuple[bool, str]:
        """Whether the answer is right, and all that the model wrote."""
        tokenizer = self.loaded.tokenizer
        prompt = encode_chat(
            tokenizer, self.template, case.messages, tools=case.tools, thinking=case.thinking, clear_thinking=False
        )
        splitter = OutputSplitter(tokenizer, starts_inside=prompt[-1:] == [tokenizer.think_open_id])
        parts: dict[str, str] = {"reasoning": "", "answer": "", "tool_call": ""}
        ids = []
        for step in Engine(self.loaded.model).generate(
            prompt, SamplingParams(temperature=0), MAX_TOKENS, tokenizer.stop_ids
        ):
            ids.append(step.token)
            for part, text in splitter.push(step.token):
                parts[part] += text
        for part, text in splitter.finish():
            parts[part] += text
        raw = tokenizer.decode(ids, special=True)
        return grade(case, parts["reasoning"], parts["answer"], raw, ids[-1] in tokenizer.stop_ids), raw


_examiner: Examiner | None = None


def _start(path: Path) -> None:
    global _examiner
    mx.set_default_device(mx.cpu)
    _examiner = Examiner(load_model(path))


def _ask(case: Case) -> tuple[bool, str]:
    assert _examiner is not None
    return _examiner.ask(case)


def examine(path: Path, task: str, count: int, workers: int, show: bool = False) -> Result:
    """The share of right answers to `count` held-out cases, in processes of one model each."""
    cases = exam(task, count, SEED)
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(path,)) as pool:
        console = Console(stderr=True)
        answers = list(track(pool.map(_ask, cases), task, len(cases), console=console, transient=True))
    if show:
        for case, (right, raw) in zip(cases, answers, strict=True):
            if not right:
                console.print(
                    f"{task}: {case.messages[-1]['content']}\n  wrote {raw!r}\n  expected {case.expected}", markup=False
                )
    passed = sum(right for right, _ in answers)
    return Result(task, passed / count, WANTED[task], detail=f"{passed} of {count}")


def float_params(path: Path) -> tuple[Params, Params]:
    """Parameters and selection biases of a file of the small model, MTP layer too, as float32."""
    gguf = GGUFFile(path)
    params: Params = {}
    biases: Params = {}
    for source, shape in tensor_shapes(SMALL, len(gguf.metadata["tokenizer.ggml.tokens"])):
        info = gguf.tensors[source]
        values = dequantize_ops(pack(gguf.raw(source).reshape(*shape[:-1], -1), info.type, shape))
        layer = f"layers.{source.split('.')[1]}." if source.startswith("blk.") else ""
        last = source.split(".", 2)[2] if layer else source
        if last == "exp_probs_b.bias":
            biases[layer] = values
        else:
            params[layer + NAMES[last]] = values
    return params, biases


@dataclass(frozen=True)
class Figures:
    """Over held-out conversations: perplexity of what the assistant writes; how often the MTP layer's best token is
    the one that the main model then chooses itself; per layer the share of choices of each expert."""

    perplexity: float
    mtp_agreement: float
    loads: dict[str, list[float]]


def measure(path: Path, vocabulary: dict[str, Any], batches: int) -> Figures:
    params, biases = float_params(path)
    total = weight = agreed = compared = 0.0
    loads: dict[str, Any] = {}
    for batch in _held_out(vocabulary, batches):
        tokens, segments = mx.array(batch.tokens), mx.array(batch.segments)
        out = forward(SMALL, params, biases, tokens, segments)
        written = mx.array(batch.weights == 1)
        same = (segments[:, 1:] == segments[:, :-1]) & written[:, 1:]
        logprobs = out.logits - mx.logsumexp(out.logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        total -= float((chosen * same).sum())
        weight += float(same.sum())
        # MTP at place i guesses token i + 2; the main model guesses it at place i + 1.
        both = (segments[:, 2:] == segments[:, :-2]) & written[:, 2:]
        agree = mx.argmax(out.mtp_logits[:, :-1], axis=-1) == mx.argmax(out.logits[:, 1:-1], axis=-1)
        agreed += float((agree & both).sum())
        compared += float(both.sum())
        for layer, load in out.loads.items():
            loads[layer] = loads.get(layer, 0) + np.array(load) / batches
    return Figures(math.exp(total / weight), agreed / compared, {layer: load.tolist() for layer, load in loads.items()})


def _held_out(vocabulary: dict[str, Any], count: int) -> Iterator[Batch]:
    recipe = replace(Recipe(), rows=8)
    return (make_batch(SEED + n, recipe, vocabulary, held_out=True) for n in range(count))


def evaluate(path: Path, unquantised: Path | None, count: int, workers: int, show: bool = False) -> list[Result]:
    results = [examine(path, task, count, workers, show) for task in EXAMS]
    vocabulary = {k: v for k, v in GGUFFile(path).metadata.items() if k.startswith("tokenizer.")}
    figures = measure(path, vocabulary, 8)
    if unquantised is not None:
        exact = measure(unquantised, vocabulary, 8)
        ratio = figures.perplexity / exact.perplexity
        results.append(
            Result(
                "perplexity, quantised / not", ratio, 1.05, False, f"{figures.perplexity:.4f} / {exact.perplexity:.4f}"
            )
        )
    results.append(Result("MTP agrees on the token after next", figures.mtp_agreement, 0.60))
    shares = [share * len(load) for load in figures.loads.values() for share in load]
    results.append(Result("busiest expert, of its fair share", max(shares), 4.0, False))
    results.append(Result("least used expert, of its fair share", min(shares), 1e-4))
    return results


def main() -> int:
    parser = Parser(prog="python -m glm_mlx.small.evaluate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, metavar="FILE", help="default: the shipped one")
    parser.add_argument("--unquantised", type=Path, metavar="FILE", help="the same in F32, to compare perplexity")
    parser.add_argument("--count", type=whole(1), default=100, metavar="N", help="cases of each exam (default 100)")
    parser.add_argument("--workers", type=whole(1), default=2, metavar="N", help="processes (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--show", action="store_true", help="print every wrong answer")
    args = parser.parse_args()
    for path in filter(None, (args.model, args.unquantised)):
        GGUFFile(path)  # here, where what is wrong with it is one line
    results = evaluate(args.model, args.unquantised, args.count, args.workers, args.show)
    table = Table("what", "value", "wanted", "verdict", title=f"{args.model.name}, held-out")
    for result in results:
        sign = "≥" if result.at_least else "≤"
        value = f"{result.value:.3f} ({result.detail})" if result.detail else f"{result.value:.3f}"
        table.add_row(result.name, value, f"{sign} {result.wanted:g}", "met" if result.good else "MISSED")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([vars(result) | {"good": result.good} for result in results], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
