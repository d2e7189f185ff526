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
from kernels.launcher import Recorded
from kernels.planes import QuantizedTensor

# Rows: what a cache begins with, and enough for each of the launches that longer contexts have.
CONTEXTS = (STEP, 8 * STEP, 64 * STEP)
# Tokens. For another number of them each kernel is compiled anew. Not the most that kernels take, eight: for as many,
# MLX's CUDA back end compiles the matmuls of their twins, for 17 s each.
CHUNK = 4


def _contexts(model: Model) -> list[int]:
    return [rows for rows in CONTEXTS if rows <= max(STEP, model.cfg.context_length)]


def decode_cases(model: Model, contexts: Sequence[int] = ()) -> list[Case]:
    """The calls of a decoded token, in contexts of so many rows, or of all kinds that the model has. Nothing is
    computed."""
    cfg, found = model.cfg, dict[object, Case]()
    for context in contexts or _contexts(model):
        values = mx.random.normal((1, context, model.row_format.values), key=mx.random.key(context))
        rows = [model.row_format.store(values)] * cfg.num_layers
        with _as_on_a_gpu(model), calls(model_module, model, tokens=1) as made:
            model.step(mx.zeros((1, 1), mx.int32), mx.array([context - 1], mx.int32), rows)
        found.update((case.signature, case) for case in made)
    return list(found.values())


def chunk_cases(model: Model) -> list[Case]:
    """The calls for the last few tokens of a prompt. Nothing is computed."""
    tokens = mx.zeros((1, CHUNK), mx.int32)
    with _as_on_a_gpu(model), calls(model_module, model, tokens=CHUNK) as made:
        if wide.are_few(CHUNK, model.dtype):
            rows = [model.row_format.zeros(1, STEP)] * model.cfg.num_layers
            model.step(tokens, mx.array([STEP - CHUNK], mx.int32), rows)
        else:
            model.logits(model.hidden_states(tokens, model.new_cache())[:, -1:])
    return made


def launches(model: Model) -> list[Recorded]:
    """What decoded tokens launch, in a context of any length, and prompts. Nothing is computed.

    Up to a launch that would be refused, where there is one.
    """
    with launcher.recording() as seen, suppress(launcher.KernelRefusedError):
        rows = STEP
        while rows <= _contexts(model)[-1]:  # a launch depends on the rows to a power of 2
            caches = [model.row_format.zeros(1, rows)] * model.cfg.num_layers
            for tokens in (1, launcher.MAX_TOKENS) if wide.are_few(1, model.dtype) else (1,):
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
