"""Train the small model from nothing: `python -m glm_mlx.small.train --out runs/small`

One GPU, under 20 minutes; a run that was stopped goes on where its last checkpoint stands. Written in MLX, so that it
needs nothing that the product does not need, and a reduced run is a test on any CPU.

The last part of the run trains through Q4_0's rounding (straight-through, arXiv 1308.3432), because the shipped file is
Q4_0 and so small a model has little to spare.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glm_mlx.command import Parser, run, whole
from glm_mlx.errors import InputError
from glm_mlx.make_tiny import TinySpec
from glm_mlx.small.corpus import conversations, encode
from glm_mlx.small.network import Params, forward, init
from glm_mlx.small.vocabulary import train_vocabulary
from glm_mlx.template import GLM_TEMPLATE, ChatTemplate
from glm_mlx.tokenizer import Tokenizer

SMALL = TinySpec(
    layers=6,
    hidden_size=256,
    num_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=512,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=96,
    mtp=True,
)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on; recorded beside its result."""

    spec: TinySpec = field(default_factory=lambda: SMALL)
    vocabulary_size: int = 2048
    steps: int = 12000
    rows: int = 64  # of a batch
    length: int = 512  # tokens of a row
    learning_rate: float = 3e-3
    warmup: int = 200  # steps
    decay_from: float = 0.6  # of the run: constant until here, then linear to 0
    round_from: float = 0.7  # of the run: from here through Q4_0's rounding
    weight_decay: float = 0.05
    mtp_weight: float = 0.3
    balance_rate: float = 1e-3  # nudge of the selection bias after each step (DeepSeek-V3, arXiv 2412.19437, 2.1.2)
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """tokens, segments (rows, length) int32; weights (rows, length) float32, of each token as a target."""

    tokens: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def make_batch(step: int, recipe: Recipe, vocabulary: dict[str, Any], held_out: bool = False) -> Batch:
    """The batch of a step: conversations side by side in rows, a new row where one does not fit."""
    tokenizer, template = _tokenizer(recipe.vocabulary_size, recipe.seed, vocabulary)
    shape = (recipe.rows, recipe.length)
    tokens = np.full(shape, tokenizer.eos_id, np.int32)
    segments, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    row = at = segment = 0
    for conversation in conversations(recipe.seed * 1_000_000_007 + step, held_out):
        ids, loss = encode(tokenizer, template, conversation)
        if len(ids) > recipe.length:
            continue
        if at + len(ids) > recipe.length:
            row, at = row + 1, 0
            if row == recipe.rows:
                return Batch(tokens, segments, weights)
        segment += 1
        tokens[row, at : at + len(ids)] = ids
        segments[row, at : at + len(ids)] = segment
        weights[row, at : at + len(ids)] = loss
        at += len(ids)
    raise AssertionError("the corpus is endless")


_cached: dict[tuple[int, int], tuple[Tokenizer, ChatTemplate]] = {}


def _tokenizer(size: int, seed: int, vocabulary: dict[str, Any]) -> tuple[Tokenizer, ChatTemplate]:
    """Built once in each worker process."""
    if (size, seed) not in _cached:
        _cached[size, seed] = Tokenizer(vocabulary), ChatTemplate(GLM_TEMPLATE)
    return _cached[size, seed]


def batches(recipe: Recipe, vocabulary: dict[str, Any], first: int, workers: int) -> Iterator[Batch]:
    """Batches from step `first` to the end, made ahead by worker processes, in order whatever their number."""
    make = partial(make_batch, recipe=recipe, vocabulary=vocabulary)
    if workers == 0:
        yield from map(make, range(first, recipe.steps))
        return
    # A bounded look-ahead: imap alone would make the whole corpus in advance.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        ahead = [pool.apply_async(make, (step,)) for step in range(first, min(recipe.steps, first + 3 * workers))]
        for step in range(first, recipe.steps):
            batch = ahead.pop(0).get()
            following = step + 3 * workers
            if following < recipe.steps:
                ahead.append(pool.apply_async(make, (following,)))
            yield batch


def round_q4_0(w: mx.array) -> mx.array:
    """The values that Q4_0 leaves of w, with the gradient of w itself. Rounding as in gguf.quants."""
    blocks = mx.unflatten(w, -1, (-1, 32))
    at = mx.argmax(mx.abs(blocks), axis=-1, keepdims=True)
    d = mx.take_along_axis(blocks, at, axis=-1) / -8
    inverse = mx.where(d == 0, 0, 1 / mx.where(d == 0, 1, d))
    q = mx.clip(mx.floor(blocks * inverse + 8.5), 0, 15) - 8
    rounded = (q * d.astype(mx.float16).astype(w.dtype)).reshape(w.shape)
    return w + mx.stop_gradient(rounded - w)


def is_rounded(name: str, w: mx.array) -> bool:
    """Whether the shipped file holds a parameter as Q4_0; `export.py` says the types of the others."""
    exact = ("k_b", "v_b", "kv_a_proj", "lm_head", "mlp.gate")
    return w.ndim > 1 and not name.endswith(exact)


def loss_of(
    params: Params, biases: Params, batch: dict[str, mx.array], recipe: Recipe, rounding: bool, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, Params]:
    """Weighted cross-entropy: (total with MTP's share, next-token loss alone, expert loads)."""
    w = {name: round_q4_0(p) if rounding and is_rounded(name, p) else p for name, p in params.items()}
    out = forward(
        recipe.spec, {name: p.astype(dtype) for name, p in w.items()}, biases, batch["tokens"], batch["segments"]
    )
    main = _cross_entropy(out.logits, batch, ahead=1)
    mtp = _cross_entropy(out.mtp_logits, batch, ahead=2)
    return main + recipe.mtp_weight * mtp, main, out.loads


def _cross_entropy(logits: mx.array, batch: dict[str, mx.array], ahead: int) -> mx.array:
    """Mean over the weighted targets `ahead` places on, within their own conversation."""
    targets = batch["tokens"][:, ahead:]
    same = batch["segments"][:, ahead:] == batch["segments"][:, :-ahead]
    weights = batch["weights"][:, ahead:] * same
    logits = logits[:, : targets.shape[1]].astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return ((mx.logsumexp(logits, axis=-1) - chosen) * weights).sum() / weights.sum()


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step: linear warm-up, constant, linear to 0."""
    begin = recipe.decay_from * recipe.steps
    down = 1.0 if step < begin else (recipe.steps - step) / (recipe.steps - begin)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * down


class Trainer:
    """The state of a run: parameters, optimiser, selection biases, step."""

    def __init__(self, recipe: Recipe, vocab: int):
        self.recipe, self.step = recipe, 0
        self.params = init(recipe.spec, vocab, recipe.seed)
        routed = range(recipe.spec.first_k_dense, recipe.spec.layers + 1)
        self.biases: Params = {f"layers.{i}.": mx.zeros((recipe.spec.num_experts,)) for i in routed}
        self.optimizer = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.95], weight_decay=recipe.weight_decay)
        self.optimizer.init(self.params)
        on_gpu = mx.default_device() != mx.Device(mx.cpu)
        self.dtype = mx.bfloat16 if on_gpu else mx.float32
        # mx.compile needs a C++ compiler on a CPU, which a machine need not have.
        updates = {rounding: partial(self._update, rounding=rounding) for rounding in (False, True)}
        self._updates = {r: mx.compile(update) for r, update in updates.items()} if on_gpu else updates

    def train(self, batch: Batch) -> dict[str, float]:
        arrays = {name: mx.array(value) for name, value in vars(batch).items()}
        rounding = self.step >= self.recipe.round_from * self.recipe.steps
        state = {"params": self.params, "optimizer": self.optimizer.state, "biases": self.biases}
        new, figures = self._updates[rounding](state, arrays, mx.array(rate(self.recipe, self.step)))
        mx.eval(new, figures)
        self.params, self.optimizer.state, self.biases = new["params"], new["optimizer"], new["biases"]
        self.step += 1
        return {name: float(value) for name, value in figures.items()}

    def _update(
        self, state: dict[str, Any], batch: dict[str, mx.array], learning_rate: mx.array, rounding: bool
    ) -> tuple[dict[str, Any], dict[str, mx.array]]:
        recipe, optimizer = self.recipe, self.optimizer

        def objective(params: Params) -> tuple[mx.array, mx.array, Params]:
            return loss_of(params, state["biases"], batch, recipe, rounding, self.dtype)

        (total, main, loads), gradients = mx.value_and_grad(objective)(state["params"])
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        optimizer.state = state["optimizer"]
        optimizer.learning_rate = learning_rate
        params = optimizer.apply_gradients(gradients, state["params"])
        fair = 1 / recipe.spec.num_experts
        biases = {
            layer: bias + recipe.balance_rate * mx.sign(fair - loads[layer]) for layer, bias in state["biases"].items()
        }
        worst = mx.max(mx.stack([mx.max(load) for load in loads.values()])) / fair
        figures = {"loss": main, "total": total, "gradient_norm": norm, "worst_load": worst}
        return {"params": params, "optimizer": optimizer.state, "biases": biases}, figures

    def save(self, path: Path) -> None:
        """Everything that goes on from here, whole or not at all."""
        arrays = {f"params.{name}": value for name, value in self.params.items()}
        arrays |= {f"biases.{name}": value for name, value in self.biases.items()}
        for name, moments in self.optimizer.state.items():
            if isinstance(moments, dict):
                arrays |= {f"optimizer.{name}.{part}": value for part, value in moments.items()}
        partial_path = path.with_name("writing.safetensors")
        mx.save_safetensors(str(partial_path), arrays, {"step": str(self.step)})
        os.replace(partial_path, path)

    def restore(self, path: Path) -> None:
        arrays, metadata = mx.load(str(path), return_metadata=True)
        assert isinstance(arrays, dict)
        assert isinstance(metadata, dict)
        self.step = int(str(metadata["step"]))
        for key, value in arrays.items():
            kind, _, name = key.partition(".")
            if kind == "optimizer":
                name, _, part = name.rpartition(".")
                self.optimizer.state[name][part] = value
            else:
                getattr(self, kind)[name] = value
        self.optimizer.state["step"] = mx.array(self.step, mx.uint64)


def train(recipe: Recipe, out: Path, workers: int, checkpoint_every: int = 500) -> Trainer:
    """Run the recipe, or the rest of it, into a folder: recipe, vocabulary, log and checkpoint.

    Raises InputError where the folder holds a run of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    said, plan = out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n"
    if said.exists() and said.read_text() != plan:
        raise InputError(f"{out} holds a run of another recipe; give another --out or remove it")
    said.write_text(plan)
    words = out / "vocabulary.json"
    if not words.exists():
        words.write_text(json.dumps(train_vocabulary(seed=recipe.seed, size=recipe.vocabulary_size)))
    vocabulary = json.loads(words.read_text())
    trainer = Trainer(recipe, len(vocabulary["tokenizer.ggml.tokens"]))
    checkpoint, log = out / "checkpoint.safetensors", out / "log.jsonl"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    lines = log.read_text().splitlines()[: trainer.step] if log.exists() else []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    with bar, log.open("w") as file:
        file.writelines(line + "\n" for line in lines)
        task = bar.add_task("training", total=recipe.steps, completed=trainer.step)
        start = time.perf_counter()
        for batch in batches(recipe, vocabulary, trainer.step, workers):
            figures = trainer.train(batch)
            record = {"step": trainer.step, "seconds": time.perf_counter() - start, **figures}
            file.write(json.dumps(record) + "\n")
            bar.update(task, completed=trainer.step, description=f"loss {figures['loss']:.3f}")
            if trainer.step % checkpoint_every == 0 or trainer.step == recipe.steps:
                file.flush()
                trainer.save(checkpoint)
                print(json.dumps(record), file=sys.stderr)
    return trainer


def main() -> int:
    parser = Parser(prog="python -m glm_mlx.small.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for checkpoints and the log")
    parser.add_argument("--steps", type=whole(1), default=Recipe.steps, help=f"default {Recipe.steps}")
    parser.add_argument("--rows", type=whole(1), default=Recipe.rows, help="rows of 512 tokens in a batch")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the weights and the text (default 0)")
    parser.add_argument(
        "--workers", type=whole(0), default=max(1, (os.cpu_count() or 2) - 2), help="processes that make text"
    )
    args = parser.parse_args()
    try:
        train(Recipe(steps=args.steps, rows=args.rows, seed=args.seed), args.out, args.workers)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
