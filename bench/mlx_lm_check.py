"""Holds mlx-lm's model against ours, step by step and as a whole, before anything of it is timed.

It runs in a process of its own: neither our model nor what was computed here is in memory when mlx-lm is timed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from bench import contest
from bench.contest import UnavailableError
from bench.mlx_lm_peer import MlxLm
from bench.subject import Subject
from glm_mlx.model import Model
from kernels import launcher

TOKENS = 8  # on which layers are compared
# What a step may differ by in float32 arithmetic, as a share of what it gives. Seen on the small model and on layers of
# the real shapes: 3e-7 with scales in float32, 0.008 with scales in bfloat16 and Q6_K held in 8 bits.
EXACT, ROUNDED = 1e-4, 0.02


@dataclass(frozen=True)
class Agreement:
    """details: for the JSON file. notes: one line each, for a person."""

    details: dict[str, Any]
    notes: list[str]


def step_of(name: str) -> str:
    """The step of the model to which a weight belongs: a layer, the embedding or the head with its norm."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else "lm_head" if name == "norm" else name


def check(peer: MlxLm, subject: Subject) -> Agreement:
    """Raises UnavailableError where a step computes something else than ours."""
    exact = Model(subject.config, dict(subject.weights), mx.float32)  # which may move its weights
    with launcher.avoiding():
        errors = dict(_step_errors(peer, exact))
    rounded = {step_of(name) for name in peer.rounded}
    budgets = {step: ROUNDED if step in rounded else EXACT for step in errors}
    logits = _logit_errors(peer, exact, subject.model)
    for step, error in errors.items():
        if not error <= budgets[step]:
            raise UnavailableError(
                f"its {step} differs from ours by {error:.2g} (budget {budgets[step]}): it computes something else "
                "and is not timed"
            )
    worst = max(errors, key=errors.__getitem__)
    notes = [f"mlx-lm computes what we do: step by step in float32 it differs by at most {errors[worst]:.2g} ({worst})"]
    for what, found in logits.items():
        if not math.isfinite(found["mlx-lm"]):
            raise UnavailableError(f"its logits of the {what} are not finite; they are not timed")
        notes.append(
            f"logits of the {what}, relative error against ours in float32: ours {found[contest.OURS]:.2g}, "
            f"mlx-lm {found['mlx-lm']:.2g}; {'the same' if found['same_token'] else 'another'} greedy token"
        )
    steps = {step: {"error": errors[step], "budget": budgets[step]} for step in errors}
    return Agreement({"steps_in_float32": steps, "first_logits": logits}, notes)


def _step_errors(peer: MlxLm, exact: Model) -> Iterator[tuple[str, float]]:
    """Every step of the model on our input, in float32: the median over tokens, since one of two experts that are
    all but equal may win here and the other there. Theirs takes token by token, as when it decodes."""
    prompt = mx.array([contest.prompt_tokens(TOKENS, peer.cfg.vocab_size)])
    cache, caches = exact.new_cache(), peer.library.make_prompt_cache(peer.model)
    x = exact.embed(prompt)
    yield "embed_tokens", _relative(peer.model.model.embed_tokens(prompt).astype(mx.float32), x)
    for number, layer in enumerate(peer.model.model.layers):
        out = exact.layers[number](x, cache)
        parts = [layer(x[:, t : t + 1], None, cache=caches[number]) for t in range(TOKENS)]
        yield f"layers.{number}", _relative(mx.concatenate(parts, axis=1) - x, out - x)
        x = out
    yield "lm_head", _relative(peer.model.lm_head(peer.model.model.norm(x)), exact.logits(x))


def _logit_errors(peer: MlxLm, exact: Model, ours: Model) -> dict[str, dict[str, Any]]:
    """Compare the whole models, each in its own arithmetic, after a prompt and after one decoded token more."""
    prompt = mx.array([contest.prompt_tokens(TOKENS + 1, peer.cfg.vocab_size)])
    with launcher.avoiding():
        truth = our_logits(exact, prompt)
    found, caches = our_logits(ours, prompt), peer.library.make_prompt_cache(peer.model)
    peer.model(prompt[:, : TOKENS - 1], cache=caches)  # the last token of a prompt by itself, as `generate_step` has it
    theirs = [peer.model(prompt[:, n : n + 1], cache=caches)[:, -1] for n in (TOKENS - 1, TOKENS)]
    return {
        what: {
            contest.OURS: _relative(a, exactly),
            "mlx-lm": _relative(b, exactly),
            "same_token": bool(mx.argmax(a) == mx.argmax(b)),
        }
        for what, exactly, a, b in zip(("prompt", "decoded token"), truth, found, theirs, strict=True)
    }


def our_logits(model: Model, tokens: mx.array) -> list[mx.array]:
    """(1, L) -> the logits (1, vocabulary) of token L - 1, the last of a prompt, and of token L, decoded as usual."""
    cache = model.new_cache()
    prompt = model.logits(model.hidden_states(tokens[:, :-1], cache)[:, -1:])[:, 0]
    mx.eval(prompt, [rows for rows in cache.rows if rows is not None])
    if mx.default_device() == mx.Device(mx.gpu):
        decoded, _ = model.step(tokens[:, -1:], mx.array([cache.offset], mx.int32), cache.reserve(1))
    else:
        decoded = model.logits(model.hidden_states(tokens[:, -1:], cache))[:, 0]
    mx.eval(decoded)
    return [prompt, decoded]


def _relative(a: mx.array, exact: mx.array) -> float:
    """Root mean square of the difference to that of `exact`, over the last axis; of several tokens the median."""
    a, exact = a.astype(mx.float32), exact.astype(mx.float32)
    ratios = mx.sqrt((a - exact).square().sum(axis=-1) / exact.square().sum(axis=-1))
    return float(np.median(np.asarray(ratios)))
