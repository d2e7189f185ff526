"""Every call of a kernel that a model makes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import mlx.core as mx

from glm_mlx import model as model_module
from glm_mlx.cache import STEP
from glm_mlx.model import Model, MoE
from kernels import launcher, wide
from kernels.cases import Case, calls, held
from kernels.expand import expand
from kernels.launcher import MAX_TOKENS, Recorded
from kernels.planes import QuantizedTensor

# Rows: what a cache begins with, and enough for each of the launches that longer contexts have.
CONTEXTS = (STEP, 8 * STEP, 64 * STEP)
CHUNK = 4  # tokens; for another number of them each kernel is compiled anew


def _contexts(model: Model) -> list[int]:
    return [rows for rows in CONTEXTS if rows <= max(STEP, model.cfg.context_length)]


def decode_cases(model: Model, contexts: Sequence[int] = ()) -> list[Case]:
    """The calls of a decoded token, in contexts of so many rows, or of all kinds that the model has. Nothing is
    computed."""
    return _step_cases(model, 1, contexts or _contexts(model))


def chunk_cases(model: Model) -> list[Case]:
    """The calls for the last few tokens of a prompt. Nothing is computed."""
    if _has_steps(model):
        return _step_cases(model, MAX_TOKENS, _contexts(model))
    with _as_on_a_gpu(model), calls(model_module, model, tokens=CHUNK) as made:
        hidden = model.hidden_states(mx.zeros((1, CHUNK), mx.int32), model.new_cache())
        model.logits(hidden)
    return made


def _has_steps(model: Model) -> bool:
    """Whether few tokens of a prompt go through `Model.step`, `MAX_TOKENS` at a time."""
    return wide.are_few(MAX_TOKENS, 0, model.dtype)


def _step_cases(model: Model, tokens: int, contexts: Sequence[int]) -> list[Case]:
    cfg, found = model.cfg, dict[object, Case]()
    for context in contexts:
        values = mx.random.normal((1, context, model.row_format.values), key=mx.random.key(context))
        rows = [model.row_format.store(values)] * cfg.num_layers
        with _as_on_a_gpu(model), calls(model_module, model, tokens=tokens) as made:
            model.step(mx.zeros((1, tokens), mx.int32), mx.array([context - tokens], mx.int32), rows)
        found.update((case.signature, case) for case in made)
    return list(found.values())


def launches(model: Model) -> list[Recorded]:
    """What decoded tokens launch, in a context of any length, and prompts. Nothing is computed.

    Up to a launch that would be refused, where there is one.
    """
    with launcher.recording() as seen, suppress(launcher.KernelRefusedError):
        rows = STEP
        while rows <= _contexts(model)[-1]:  # a launch depends on the rows to a power of 2
            caches = [model.row_format.zeros(1, rows)] * model.cfg.num_layers
            for tokens in (1, MAX_TOKENS) if _has_steps(model) else (1,):
                model.step(mx.zeros((1, tokens), mx.int32), mx.array([rows - tokens], mx.int32), caches)
            rows *= 2
        for case in prompt_cases(model):
            case.run()
    return seen


def prompt_cases(model: Model) -> list[Case]:
    """The calls for a long prompt, where there is a kernel for it: for each type the smallest weight."""
    if not wide.applies(wide.LEAST_TOKENS, model.dtype):
        return []
    smallest: dict[str, QuantizedTensor] = {}
    for weight in sorted(held(model, QuantizedTensor), key=lambda weight: weight.nbytes):
        smallest.setdefault(weight.type.name, weight)
    return [Case(expand, {"w": w, "dtype": model.dtype}, (), wide.LEAST_TOKENS) for w in smallest.values()]


@contextmanager
def _as_on_a_gpu(model: Model) -> Iterator[None]:
    """Without `small_moe`, which no GPU has."""
    kept = [(layer.mlp, layer.mlp.small) for layer in model.layers if isinstance(layer.mlp, MoE)]
    for mlp, _ in kept:
        mlp.small = None
    try:
        yield
    finally:
        for mlp, small in kept:
            mlp.small = small
