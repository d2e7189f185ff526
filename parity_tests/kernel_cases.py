"""One call of a kernel through its public function: inputs among poison, the exact result, and MLX's own.

    verify(GateUp("Q4_0", shared="Q5_K", tokens=2, dtype=mx.bfloat16))

Poison is NaN, in all that a kernel has no business with: the rows before and after each of its inputs, and the experts
that nobody chose. Exact results are float64, from the values that `dequantize_ops` gives (bit for bit gguf's:
test_quants) and the inputs as rounded to `dtype`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal
from unittest import mock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glm_mlx.make_tiny import random_blocks
from glm_mlx.packing import pack
from kernels import launcher
from kernels.embed import embed, embed_ops
from kernels.expand import expand, expand_ops
from kernels.experts_down import experts_down, experts_down_ops
from kernels.experts_gate_up import experts_gate_up, experts_gate_up_ops
from kernels.mla_decode import mla_decode, mla_decode_ops
from kernels.planes import QUANT_TYPES, Weight, dequantize_ops
from kernels.qmv import Norm, absorb, absorb_ops, merge_heads, merge_heads_ops, norm_qmv, qmv, qmv_all, qmv_ops
from kernels.route import Gating, Router, experts_of, weights_of
from kernels.rows import RowFormat
from parity_tests.budgets import NEAR_TIE, check, check_twice
from parity_tests.msl import executing

KINDS = (*QUANT_TYPES, "F32", "F16", "BF16")
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
Exact = npt.NDArray[np.float64]
Ids = Literal["random", "repeated", "outside"]


# --- where kernels run


def on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu) or mx.metal.is_available()


@contextmanager
def counting() -> Iterator[list[launcher.Launch]]:
    """The launches of a block."""
    seen: list[launcher.Launch] = []
    launch = launcher.Launch.__call__

    def counted(self: launcher.Launch, *arrays: mx.array) -> list[mx.array]:
        seen.append(self)
        return launch(self, *arrays)

    with mock.patch.object(launcher.Launch, "__call__", counted):
        yield seen


def run(call: Callable[[], Sequence[mx.array | None]], mode: str = "trace", launches: int = 1) -> list[mx.array]:
    """What the call gives with kernels: on this machine's GPU, twice with the same bits, or else in the executor."""
    with counting() as seen:
        if not on_gpu():
            with executing(mode):
                outputs = _evaluated(call())
        else:
            before = mx.default_device()
            mx.set_default_device(mx.gpu)
            try:
                outputs, again = _evaluated(call()), _evaluated(call())
            finally:
                mx.set_default_device(before)
            assert [bits(a) for a in outputs] == [bits(a) for a in again], "two runs give different bits"
            del seen[len(seen) // 2 :]
    assert len(seen) == launches, f"{len(seen)} launches, not {launches}"
    return outputs


def _evaluated(outputs: Sequence[mx.array | None]) -> list[mx.array]:
    arrays = [y for y in outputs if y is not None]
    mx.eval(arrays)
    return arrays


def bits(a: mx.array) -> bytes:
    return np.array(mx.contiguous(a).view(mx.uint8)).tobytes()


def float64(a: mx.array) -> Exact:
    return np.array(a.astype(mx.float32)).astype(np.float64)


# --- inputs


def block(kind: str) -> int:
    """Values of a block, of which a row has a whole number."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]


def about(unit: int) -> int:
    """A multiple of `unit` rows: two or more, so many that no plane is too small for a kernel."""
    return unit * max(2, -(-16 // unit))


def among_poison(a: mx.array, rows: int, at: mx.array) -> mx.array:
    """(rows, ...) with the rows of `a` at these places. The others, and some before and after them in memory, are NaN,
    or integers that mean nothing. A frame is whole vectors of 16 bytes, in which kernels read: a model's arrays begin
    at such places, and a GPU stops at others."""
    poison = float("nan") if mx.issubdtype(a.dtype, mx.floating) else 85
    frame = 16 // math.gcd(16, math.prod(a.shape[1:]) * a.dtype.size)
    whole = mx.full((rows + 2 * frame, *a.shape[1:]), poison, a.dtype)
    whole[at + frame] = a
    mx.eval(whole)
    return whole[frame:-frame]


def framed(a: mx.array) -> mx.array:
    """The same values, with poison before and after them in memory."""
    return among_poison(a, len(a), mx.arange(len(a)))


def each_plane(w: Weight, change: Callable[[mx.array], mx.array]) -> Weight:
    if isinstance(w, mx.array):
        return change(w)
    names = [field.name for field in fields(w) if isinstance(getattr(w, field.name), mx.array)]
    return replace(w, **{name: change(getattr(w, name)) for name in names})


def random_weight(kind: str, shape: tuple[int, ...], seed: int) -> Weight:
    """A weight whose products with a normal vector are about normal."""
    data = random_blocks(np.random.default_rng(seed), kind, shape, shape[-1] ** -0.5)
    raw = data.view(np.uint8).reshape(*shape[:-1], -1)
    return pack(raw, GGMLQuantizationType[kind], shape)


def expert_weight(kind: str, experts: int, shape: tuple[int, int], seed: int, chosen: Exact) -> Weight:
    """Random weights of the chosen experts among poison."""
    w = random_weight(kind, (len(chosen), *shape), seed)
    poisoned = each_plane(w, lambda plane: among_poison(plane, experts, mx.array(chosen)))
    return poisoned if isinstance(poisoned, mx.array) else replace(poisoned, shape=(experts, *shape))


def random_array(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    """Normal values, framed."""
    return framed(mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).astype(dtype))


def values(w: Weight) -> Exact:
    return float64(dequantize_ops(w))


def silu(g: Exact) -> Exact:
    with np.errstate(over="ignore"):
        return g / (1 + np.exp(-g))


# --- cases


@dataclass(frozen=True)
class Case:
    """One call. The parameters are what its inputs are made of, and its name in a table of tests."""

    op: ClassVar[str]
    launches: ClassVar[int] = 1

    def kernel(self) -> Sequence[mx.array | None]:
        raise NotImplementedError

    def twin(self) -> Sequence[mx.array | None]:
        """MLX's own operations on the same inputs."""
        raise NotImplementedError

    @cached_property
    def exact(self) -> list[Exact]:
        raise NotImplementedError

    def __str__(self) -> str:
        shown = []
        for field in fields(self):
            value = getattr(self, field.name)
            if str(value) != str(field.default) or field.name in ("tokens", "dtype"):
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
                shown.append(f"{field.name}={text.removeprefix('mlx.core.')}")
        return f"{self.op} {' '.join(shown)}"


def verify(case: Case, mode: str = "trace") -> None:
    """Within its budget in float32, and NaN where the truth is. In 16 bits at most twice as far from the truth as MLX's
    own operations."""
    got = run(case.kernel, mode, case.launches)
    assert len(got) == len(case.exact)
    twin = _evaluated(case.twin()) if getattr(case, "dtype", mx.float32) != mx.float32 else got
    for y, exact, own in zip(got, case.exact, twin, strict=True):
        assert (y.dtype, y.shape) == (own.dtype, own.shape)
        if y.dtype == mx.uint32:
            np.testing.assert_array_equal(np.array(y), exact)
        elif y.dtype == mx.float32:
            np.testing.assert_array_equal(np.isnan(float64(y)), np.isnan(exact))
            check("kernel", np.nan_to_num(float64(y), posinf=np.inf), np.nan_to_num(exact), str(case))
        else:
            check_twice(float64(y), exact, float64(own), str(case))


@dataclass(frozen=True)
class Qmv(Case):
    """kinds and rows: of each matrix. norm: x is normed first. normed_too: and is a result. out: dtype of the product,
    where it is not x's. residual: added to the product of the one matrix."""

    kinds: tuple[str, ...]
    rows: tuple[int, ...]
    cols: int
    norm: bool = False
    residual: bool = False
    normed_too: bool = False
    tokens: int = 1
    dtype: mx.Dtype = mx.float32
    out: mx.Dtype | None = None
    op: ClassVar[str] = "qmv"

    @property
    def result(self) -> mx.Dtype:
        return self.out or self.dtype

    @cached_property
    def x(self) -> mx.array:
        return random_array((self.tokens, self.cols), self.dtype, seed=0)

    @cached_property
    def weights(self) -> list[Weight]:
        return [
            each_plane(random_weight(kind, (rows, self.cols), i), framed)
            for i, (kind, rows) in enumerate(zip(self.kinds, self.rows, strict=True))
        ]

    @cached_property
    def gains(self) -> Norm:
        gains = np.random.default_rng(1).uniform(0.5, 1.5, self.cols).astype(np.float32)
        return Norm(framed(mx.array(gains)), 1e-5)

    @cached_property
    def added(self) -> mx.array:
        return random_array((self.tokens, self.rows[0]), self.result, seed=2)

    def kernel(self) -> Sequence[mx.array]:
        norm = self.gains if self.norm else None
        if self.normed_too:
            return norm_qmv(self.x, self.weights[0], self.gains, self.result)
        if self.residual or self.out:
            return [qmv(self.x, self.weights[0], norm, self.added if self.residual else None, self.out)]
        return qmv_all(self.x, self.weights, norm)

    def twin(self) -> Sequence[mx.array]:
        x = self.x.astype(mx.float32) if self.result == mx.float32 else self.x
        x = self.gains(x) if self.norm or self.normed_too else x
        results = [qmv_ops(x, w).astype(self.result) for w in self.weights]
        results = [self.added + y for y in results] if self.residual else results
        return [x.astype(self.dtype), *results] if self.normed_too else results

    @cached_property
    def exact(self) -> list[Exact]:
        x = float64(self.x)
        if self.norm or self.normed_too:
            root = np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.gains.eps)
            x = x / root * float64(self.gains.weight)
        results = [x @ values(w).T for w in self.weights]
        results = [y + float64(self.added) for y in results] if self.residual else results
        return [x, *results] if self.normed_too else results


@dataclass(frozen=True)
class HeadQmv(Case):
    """Every head its own matrix of `rows` by `cols`: `absorb`, whose x has `beside` columns more for each head, or
    `merge_heads`."""

    kind: str
    heads: int
    rows: int
    cols: int
    tokens: int = 1
    dtype: mx.Dtype = mx.float32
    merges: bool = False
    beside: int = 8
    op: ClassVar[str] = "qmv"

    @cached_property
    def inputs(self) -> tuple[mx.array, Weight]:
        x = random_array((self.heads, self.tokens, self.cols), self.dtype, seed=0)
        w = each_plane(random_weight(self.kind, (self.heads, self.rows, self.cols), 1), framed)
        if self.merges:
            return x[None], w
        poison = mx.full((self.heads, self.tokens, self.beside), float("nan"), self.dtype)
        q = mx.concatenate([x, poison], axis=-1).swapaxes(0, 1).reshape(1, self.tokens, -1)
        return mx.contiguous(q), w

    def kernel(self) -> Sequence[mx.array]:
        return [(merge_heads if self.merges else absorb)(*self.inputs)]

    def twin(self) -> Sequence[mx.array]:
        return [(merge_heads_ops if self.merges else absorb_ops)(*self.inputs)]

    @cached_property
    def exact(self) -> list[Exact]:
        x, w = self.inputs
        if self.merges:
            y = np.einsum("bhtc,hrc->bthr", float64(x), values(w))
            return [y.reshape(1, self.tokens, -1)]
        heads = float64(x).reshape(1, self.tokens, self.heads, -1)[..., : self.cols]
        return [np.einsum("bthc,hrc->bhtr", heads, values(w))]


@dataclass(frozen=True)
class Embed(Case):
    """outside: some of the tokens are none of the vocabulary's, and stand for its first or last."""

    kind: str
    rows: int
    cols: int
    tokens: int = 1
    outside: bool = False
    dtype: mx.Dtype = mx.float32
    op: ClassVar[str] = "embed"

    @cached_property
    def ids(self) -> npt.NDArray[np.int32]:
        ids = np.random.default_rng(0).integers(0, self.rows, self.tokens, dtype=np.int32)
        return np.resize(np.array([-1, self.rows, 2**31 - 1, -(2**31)], np.int32), self.tokens) if self.outside else ids

    @cached_property
    def weight(self) -> Weight:
        return expert_weight(self.kind, 1, (self.rows, self.cols), 0, np.zeros(1, np.int64))[0]

    def kernel(self) -> Sequence[mx.array]:
        return [embed(self.weight, mx.array(self.ids)[None], self.dtype)]

    def twin(self) -> Sequence[mx.array]:
        return [embed_ops(self.weight, mx.array(np.clip(self.ids, 0, self.rows - 1))[None], self.dtype)]

    @cached_property
    def exact(self) -> list[Exact]:
        return [values(self.weight)[np.clip(self.ids, 0, self.rows - 1)][None]]


@dataclass(frozen=True)
class Expand(Case):
    """shape: of the weight."""

    kind: str
    shape: tuple[int, ...]
    dtype: mx.Dtype = mx.bfloat16
    op: ClassVar[str] = "expand"

    @cached_property
    def weight(self) -> Weight:
        return each_plane(random_weight(self.kind, self.shape, 0), framed)

    def kernel(self) -> Sequence[mx.array]:
        return [expand(self.weight, self.dtype)]

    def twin(self) -> Sequence[mx.array]:
        return [expand_ops(self.weight, self.dtype)]

    @cached_property
    def exact(self) -> list[Exact]:
        return [values(self.weight)]


@dataclass(frozen=True)
class Experts(Case):
    """kind: of the routed experts. shared: type of the shared ones, or none. width: of an expert; shared_width: of the
    shared ones together. ids: how experts are chosen; those outside [0, experts) stand for the last expert."""

    kind: str
    experts: int = 9
    top_k: int = 3
    width: int = 64
    cols: int = 256
    shared: str = ""
    shared_width: int = 0
    ids: Ids = "random"
    tokens: int = 1
    dtype: mx.Dtype = mx.float32

    @cached_property
    def chosen(self) -> npt.NDArray[np.int64]:
        """(tokens, top_k), in [0, experts); one expert is left out where possible."""
        rng = np.random.default_rng(self.tokens + self.top_k)
        pool = [e for e in range(self.experts) if e != 1 or self.experts <= self.top_k]
        if self.ids == "repeated":
            return np.full((self.tokens, self.top_k), pool[-1])
        ids = np.stack([rng.permutation(pool)[: self.top_k] for _ in range(self.tokens)])
        if self.ids == "outside":
            ids[:, ::2] = self.experts - 1
        return ids

    @cached_property
    def given(self) -> mx.array:
        """The ids as the op gets them."""
        ids = self.chosen.astype(np.uint32)
        if self.ids == "outside":
            ids[:, ::2] = np.resize(np.array([self.experts, 2**31, 2**32 - 1], np.uint32), ids[:, ::2].shape)
        return mx.array(ids)

    def routed(self, kind: str, rows: int, cols: int, seed: int) -> Weight:
        return expert_weight(kind, self.experts, (rows, cols), seed, np.unique(self.chosen))

    def of_chosen(self, w: Weight) -> Exact:
        """(tokens, top_k, rows, cols)"""
        used, index = np.unique(self.chosen, return_inverse=True)
        return values(w[mx.array(used)])[index.reshape(self.chosen.shape)]


@dataclass(frozen=True)
class GateUp(Experts):
    """up_kind: of up, where it is not `kind`."""

    up_kind: str = ""
    op: ClassVar[str] = "experts_gate_up"

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        shared = [
            each_plane(random_weight(self.shared, (self.shared_width, self.cols), seed), framed)
            if self.shared
            else None
            for seed in (2, 3)
        ]
        gate = self.routed(self.kind, self.width, self.cols, 0)
        up = self.routed(self.up_kind or self.kind, self.width, self.cols, 1)
        return random_array((self.tokens, self.cols), self.dtype, 4), gate, up, *shared

    @cached_property
    def logits(self) -> mx.array:
        """Of which the chosen ones are the largest, best first."""
        logits = np.random.default_rng(9).uniform(-5, -4, (self.tokens, self.experts))
        np.put_along_axis(logits, self.chosen, np.linspace(3, -3, self.top_k)[None], axis=-1)
        return framed(mx.array(logits.astype(np.float32)))

    def call(self, op: Callable[..., Any]) -> Sequence[mx.array | None]:
        x, gate, up, *shared = self.inputs
        router = Router(None, self.top_k, "sigmoid", True, 1.8)
        return self.parts(*op(x, self.logits, router, gate, up, *shared))

    def parts(self, hidden: mx.array, choice: mx.array) -> list[mx.array]:
        """hidden of the experts, of the shared ones if there are any, experts, weights"""
        routed, shared = mx.split(hidden, [self.top_k * self.width], axis=-1)
        routed = mx.unflatten(routed, -1, (self.top_k, self.width))
        return [routed, *[shared] * bool(self.shared), experts_of(choice), weights_of(choice)]

    def kernel(self) -> Sequence[mx.array | None]:
        return self.call(experts_gate_up)

    def twin(self) -> Sequence[mx.array | None]:
        return self.call(experts_gate_up_ops)

    @cached_property
    def exact(self) -> list[npt.NDArray[Any]]:
        x, gate, up, shared_gate, shared_up = self.inputs
        x = float64(x)
        g, u = (np.einsum("tkrc,tc->tkr", self.of_chosen(w), x) for w in (gate, up))
        results: list[npt.NDArray[Any]] = [silu(g) * u]
        if self.shared:
            results.append(silu(x @ values(shared_gate).T) * (x @ values(shared_up).T))
        scores = 1 / (1 + np.exp(-np.take_along_axis(float64(self.logits), self.chosen, axis=-1)))
        return [*results, self.chosen, scores / scores.sum(axis=-1, keepdims=True) * 1.8]


@dataclass(frozen=True)
class Down(Experts):
    """cols: rows of down, which are the columns of the result. shared: type of the shared down."""

    residual: bool = True
    op: ClassVar[str] = "experts_down"

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """hidden, shared_hidden, down, shared_down, weights, residual"""
        weights = mx.array(np.random.default_rng(5).uniform(0.1, 1.8, self.chosen.shape).astype(np.float32))
        shared = None
        if self.shared:
            shared = each_plane(random_weight(self.shared, (self.cols, self.shared_width), 3), framed)
        return (
            random_array((self.tokens, self.top_k, self.width), self.dtype, 6),
            random_array((self.tokens, self.shared_width), self.dtype, 7) if self.shared else None,
            self.routed(self.kind, self.cols, self.width, 2),
            shared,
            weights,
            random_array((self.tokens, self.cols), self.dtype, 8) if self.residual else None,
        )

    def call(self, op: Callable[..., Any], ids: mx.array) -> Sequence[mx.array]:
        hidden, shared_hidden, down, shared_down, weights, residual = self.inputs
        return [op(self.beside(hidden, shared_hidden), self.choice(ids, weights), down, shared_down, residual)]

    def beside(self, hidden: mx.array, shared_hidden: mx.array | None) -> mx.array:
        """Both as the op gets them."""
        routed = mx.flatten(hidden, -2)
        return framed(routed if shared_hidden is None else mx.concatenate([routed, shared_hidden], axis=-1))

    def choice(self, ids: mx.array, weights: mx.array) -> mx.array:
        return framed(mx.stack([ids, weights.view(mx.uint32)], axis=-2))

    def kernel(self) -> Sequence[mx.array]:
        return self.call(experts_down, self.given)

    def twin(self) -> Sequence[mx.array]:
        return self.call(experts_down_ops, mx.array(self.chosen.astype(np.uint32)))

    @cached_property
    def exact(self) -> list[Exact]:
        hidden, shared_hidden, down, shared_down, weights, residual = self.inputs
        y = np.einsum("tkrc,tkc,tk->tr", self.of_chosen(down), float64(hidden), float64(weights))
        if self.shared:
            y += float64(shared_hidden) @ values(shared_down).T
        return [y if residual is None else y + float64(residual)]


@dataclass(frozen=True)
class Route(Case):
    """The first part of experts_gate_up. bias: about this, near 9 in the real model; None for a model without.

    logits: 'apart', no two choices near each other; 'ties', many equal; 'far', one of the second 32 alone, where exp
    leaves float32; 'nan', some are, and all of the last token.
    """

    experts: int
    top_k: int
    gating: Gating = "sigmoid"
    normalize: bool = True
    bias: float | None = 9.0
    logits: Literal["apart", "ties", "far", "nan"] = "apart"
    tokens: int = 1
    scale: float = 1.8
    op: ClassVar[str] = "experts_gate_up"

    @cached_property
    def inputs(self) -> tuple[mx.array, mx.array | None]:
        rng = np.random.default_rng(self.experts + self.top_k + self.tokens)
        logits = np.stack([rng.permutation(self.experts) for _ in range(self.tokens)]) / self.experts * 6 - 3
        bias = 0.3 * rng.standard_normal(self.experts)
        if self.logits == "ties":
            logits = rng.integers(0, 3, logits.shape).astype(np.float64)
            bias = rng.integers(0, 2, bias.shape).astype(np.float64)
        elif self.logits == "far":
            logits[np.arange(self.tokens), 32 + np.arange(self.tokens)] = 200
            logits[1:] -= 400
        elif self.logits == "nan":
            # The first of a lane is the best, and the next one of that lane is NaN.
            logits[:, 1] = 4
            logits[:, [0, 33 % self.experts, -1]] = np.nan
            logits[-1] = np.nan
        bias_array = None if self.bias is None else framed(mx.array((self.bias + bias).astype(np.float32)))
        return framed(mx.array(logits.astype(np.float32))), bias_array

    def call(self, logits: mx.array, bias: mx.array | None) -> Sequence[mx.array]:
        """With experts of one row, of zeros."""
        x, bank = mx.zeros((self.tokens, 8)), mx.zeros((self.experts, 1, 8))
        router = Router(bias, self.top_k, self.gating, self.normalize, self.scale)
        _, choice = experts_gate_up(x, logits, router, bank, bank, None, None)
        return [experts_of(choice), weights_of(choice)]

    def kernel(self) -> Sequence[mx.array]:
        return self.call(*self.inputs)

    def twin(self) -> Sequence[mx.array]:
        logits, bias = self.inputs
        return Router(bias, self.top_k, self.gating, self.normalize, self.scale)(logits)

    @cached_property
    def exact(self) -> list[npt.NDArray[Any]]:
        logits, bias = self.inputs
        scores = 1 / (1 + np.exp(-float64(logits)))
        if self.gating == "softmax":
            scores = np.exp(float64(logits) - float64(logits).max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
        choices = scores if bias is None else scores + float64(bias)
        choices = np.where(np.isnan(choices), -np.inf, choices)  # chosen last
        experts = np.argsort(-choices, axis=-1, kind="stable")[:, : self.top_k]
        if self.logits in ("apart", "far"):
            gaps = np.diff(np.sort(-choices, axis=-1)[:, : self.top_k + 1])
            assert gaps.min() > NEAR_TIE, "float32 may order these the other way"
        weights = np.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
        return [experts, weights * self.scale]


@dataclass(frozen=True)
class Mla(Case):
    """context: rows of the cache with those of the `tokens` new ones; `room` rows of NaN stand behind them. kind: of
    v_b, which gives `values` of each head. before: columns of kv_a that are not its own.

    packed: the cache is in 8 bits. What is exact then follows from the rows that the kernel has stored: a value at the
    middle of two quants goes to the one or the other.
    """

    heads: int
    context: int
    latent: int = 64
    rope: int = 16
    tokens: int = 1
    dtype: mx.Dtype = mx.float32
    nope: int = 24
    room: int = 3
    kind: str = "F16"
    values: int = 20
    before: int = 0
    packed: bool = False
    op: ClassVar[str] = "mla_decode"
    launches: ClassVar[int] = 2

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """All before the scale. Queries are large enough that a few rows win."""
        width = self.latent + self.rope
        q_latent = 3 * random_array((self.heads, self.tokens, self.latent), self.dtype, 0)
        q = random_array((self.tokens, self.heads, self.nope + self.rope), self.dtype, 1)
        q[..., : self.nope] = float("nan")
        kv_a = random_array((self.tokens, self.before + width), self.dtype, 2)
        kv_a[..., : self.before] = float("nan")
        gains = 1 + 0.3 * random_array((self.latent,), mx.float32, 3)
        wavelengths = 100.0 ** (mx.arange(self.rope // 2) / (self.rope // 2))
        cache = random_array((1, self.context + self.room, width), self.dtype, 4)
        cache[:, self.context - self.tokens :] = float("nan")
        if self.packed:
            cache = self.row_format.store(cache)
            cache[:, self.context - self.tokens :] = 255  # the scales and k_pe are NaN
        position = mx.array([self.context - self.tokens], mx.int32)
        q, kv_a = q.reshape(1, self.tokens, -1), kv_a[None]
        cache = mx.contiguous(cache)
        mx.eval(q, kv_a, cache)
        return framed(q_latent)[None], framed(q), framed(kv_a), Norm(gains, 1e-5), wavelengths, cache, position

    @property
    def row_format(self) -> RowFormat:
        return RowFormat(self.latent, self.rope, mx.uint8 if self.packed else self.dtype)

    @property
    def scale(self) -> float:
        return (self.latent + self.rope) ** -0.5

    @cached_property
    def v_b(self) -> Weight:
        return each_plane(random_weight(self.kind, (self.heads, self.values, self.latent), 5), framed)

    def kernel(self) -> Sequence[mx.array]:
        y, cache = mla_decode(*self.inputs, self.scale, self.v_b)
        return [y] if self.packed else [y, cache[:, : self.context]]

    def twin(self) -> Sequence[mx.array]:
        *others, cache, position = self.inputs
        # MLX's matmul meets the rows that are not valid yet, with weights of 0.
        cache = mx.where(mx.arange(cache.shape[1])[:, None] < self.context, cache, mx.zeros_like(cache))
        y, cache = mla_decode_ops(*others, mx.nan_to_num(cache), position, self.scale, self.v_b)
        return [y] if self.packed else [y, cache[:, : self.context]]

    @cached_property
    def exact(self) -> list[Exact]:
        q_latent, q, kv_a, norm, wavelengths, cache, _ = self.inputs
        rows, new = float64(self.row_format.load(cache[:, : self.context])), float64(kv_a)[0, :, self.before :]
        at = self.context - self.tokens + np.arange(self.tokens)
        angles = (at[:, None].astype(np.float32) * (1 / np.array(wavelengths))).astype(np.float64)  # RoPE's float32
        latent = new[:, : self.latent]
        root = np.sqrt((latent**2).mean(axis=-1, keepdims=True) + norm.eps)
        if not self.packed:
            rows[0, at, : self.latent] = latent / root * float64(norm.weight)
            rows[0, at, self.latent :] = rotated(new[:, self.latent :], angles)
        heads = float64(q).reshape(self.tokens, self.heads, -1).swapaxes(0, 1)
        both = np.concatenate([float64(q_latent)[0], rotated(heads[..., self.nope :], angles)], axis=-1)
        scores = np.einsum("hlw,bsw->bhls", both, rows) * self.scale
        scores[..., np.arange(self.context) > at[:, None]] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("bhls,bsr->bhlr", p / p.sum(axis=-1, keepdims=True), rows[..., : self.latent])
        y = np.einsum("bhlr,hvr->blhv", out, values(self.v_b))
        return [y.reshape(1, self.tokens, -1)] if self.packed else [y.reshape(1, self.tokens, -1), rows]


def rotated(x: Exact, angles: Exact) -> Exact:
    """RoPE of pairs (2i, 2i + 1): x (..., L, P), angles (L, P / 2)."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
    return np.stack(turned, axis=-1).reshape(x.shape)
