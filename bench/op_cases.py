"""The ops of the decode path at GLM-4.7-Flash's shapes, each by its kernel, by its twin and by MLX's own operations.

A case holds so many sets of weights, tokens, chosen experts or caches that no cache of the machine keeps them from one
launch to the next with the same set. Adding an op, or the kernel of one, is an entry here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np

from bench.synthetic import config, random_weight
from glm_mlx.model import rope_wavelengths
from kernels import launcher
from kernels.embed import embed
from kernels.experts_down import experts_down
from kernels.experts_gate_up import experts_gate_up, swiglu_ops
from kernels.mla_decode import latent_rows_ops, mla_decode, rope_ops
from kernels.planes import GROUP, QUANT_TYPES, SUPER, Bundle, QuantizedTensor, Weight, bundled, group_scales
from kernels.qmv import Norm, absorb, merge_heads, qmv, qmv_all
from kernels.route import Router
from kernels.rows import RowFormat

CFG = config()
TOP_K, SHARED = CFG.num_experts_per_tok, CFG.num_shared_experts
CHOICES = 64  # sets of chosen experts
MOST_SETS = 4096

# (activations, number of the set) -> results. The next launch of a chain takes its activations from the first of them.
Run: TypeAlias = Callable[[mx.array, int], Sequence[mx.array]]


@dataclass(frozen=True)
class Sizes:
    """What differs between a GPU and a CPU, on which the real sizes would take minutes."""

    num_experts: int
    layers: int  # whose experts rotate
    vocab_size: int
    rotating_bytes: int  # of weights or caches, at least
    contexts: tuple[int, ...]


# Four times 96 MB, the largest cache before the memory of a GPU with a back end here (M2 and M3 Ultra; H200: 60 MB).
GPU = Sizes(CFG.num_experts, 4, CFG.vocab_size, 4 * 96 << 20, (256, 4096, 32_768))
CPU = Sizes(16, 2, 16_384, 64 << 20, (128, 1024))


@dataclass(frozen=True)
class Contestant:
    """nbytes: of weights and caches that one launch reads, each byte counted once; the mean over the sets."""

    run: Run
    nbytes: float


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    x: the activations; of embed the ids of the vocabulary, int32, of which each launch takes the one of its set.
    other_nbytes: what it reads beside x and the weights, such as ids and residuals; below 0 if not all of x is read.
    """

    op: str
    what: str
    quant: str
    x: mx.array
    sets: int
    flops: float
    contestants: dict[str, Contestant]  # the first is the twin
    other_nbytes: int = 0
    row_dtype: mx.Dtype | None = None  # of embed

    @property
    def dtype(self) -> mx.Dtype:
        """Of the activations."""
        return self.row_dtype or self.x.dtype


class Bytes(Protocol):
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


W = TypeVar("W", bound=Bytes)


@dataclass(frozen=True)
class Affine:
    """A weight as MLX's own quantised operations take it: scales and biases stored in the dtype of x."""

    quants: mx.array
    scales: mx.array
    biases: mx.array
    bits: int

    @property
    def nbytes(self) -> int:
        return self.quants.nbytes + self.scales.nbytes + self.biases.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.quants.shape)

    def matmul(self, x: mx.array) -> mx.array:
        return mx.quantized_matmul(x, self.quants, self.scales, self.biases, True, GROUP, self.bits)

    def gather(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (T, K or 1, cols), experts (T, K) -> (T, K, rows)"""
        y = mx.gather_qmm(x[:, :, None], self.quants, self.scales, self.biases, None, experts, True, GROUP, self.bits)
        return y[:, :, 0]

    def take(self, rows: mx.array) -> mx.array:
        """rows (...) -> their values (..., cols), as in MLX's own embedding"""
        return mx.dequantize(self.quants[rows], self.scales[rows], self.biases[rows], GROUP, self.bits)


def affine(w: Weight, dtype: mx.Dtype) -> Affine | None:
    """None for types that MLX's groups of 32 can't hold. The product of a K-quant's two scales is rounded."""
    if isinstance(w, mx.array) or w.type.name in ("Q6_K", "IQ4_NL"):
        return None
    scales, mins = group_scales(w)
    biases = -w.type.zero * scales if mins is None else mins
    made = Affine(w.quants, scales.astype(dtype), biases.astype(dtype), w.type.bits)
    mx.eval(made.scales, made.biases)
    return made


def total(weights: Iterable[Bytes]) -> int:
    return sum(w.nbytes for w in weights)


def chosen_nbytes(bank: Bytes, experts: mx.array) -> int:
    """Of the chosen experts' part of a bank (E, ...), each expert counted once."""
    return bank.nbytes // bank.shape[0] * int(np.unique(np.asarray(experts)).size)


def fits(quant: str, cols: int) -> bool:
    """Whether rows of so many columns can have the type."""
    return quant not in QUANT_TYPES or cols % (SUPER if QUANT_TYPES[quant].is_super else GROUP) == 0


def _contestants(op: str, call: Run, nbytes: float, mlx: Contestant | None) -> dict[str, Contestant]:
    """`call` goes to the product's function, whose kernel is avoided for the twin, and left out where there is none."""

    def twin(x: mx.array, i: int) -> Sequence[mx.array]:
        with launcher.avoiding():
            return call(x, i)

    ways = {"twin": Contestant(twin, nbytes)}
    if op in launcher.OPS and launcher.back_end(op) is not None:
        ways["kernel"] = Contestant(call, nbytes)
    if mlx is not None:
        ways["mlx"] = mlx
    return ways


def _normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    made = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
    mx.eval(made)
    return made


def _weight(quant: str, shape: tuple[int, ...], seed: int) -> Weight:
    made = random_weight(quant, shape, shape[-1] ** -0.5, mx.random.key(seed))
    mx.eval(made.planes if isinstance(made, QuantizedTensor) else made)
    return made


def _as_in_model(weights: Sequence[Weight]) -> tuple[list[Weight], Bundle | None]:
    """In one array where kernels are launched, as those of a launch stand in the model."""
    if all(launcher.back_end(op) is None for op in launcher.OPS):
        return list(weights), None
    return bundled(weights)


def _floats(weight: Weight) -> mx.array:
    assert isinstance(weight, mx.array)
    return weight


def _sets(nbytes_of_one: int, sizes: Sizes) -> int:
    return min(MOST_SETS, max(2, -(-sizes.rotating_bytes // nbytes_of_one)))


# --- the embedding


def embed_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    """A launch's token is a view of x, so that it waits for whoever computes x and costs no launch of its own."""
    vocab, hidden = sizes.vocab_size, CFG.hidden_size
    if not fits(quant, hidden):
        return
    count = _sets(_weight(quant, (vocab, hidden), 0).nbytes, sizes)
    tables = [_weight(quant, (vocab, hidden), seed) for seed in range(count)]
    own = [a for w in tables if (a := affine(w, dtype))]
    order = np.random.default_rng(0).permutation(vocab).tolist()
    ids = mx.arange(vocab)[None]
    mx.eval(ids)

    def token(x: mx.array, i: int) -> mx.array:
        begin = order[i // count]
        return x[:, begin : begin + 1].astype(mx.int32)  # the cast is for the judge alone, in float32

    def call(x: mx.array, i: int) -> list[mx.array]:
        return [embed(tables[i % count], token(x, i), dtype if x.dtype == ids.dtype else x.dtype)]

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        return [own[i % count].take(token(x, i))]

    yield Case(
        "embed",
        f"1 of {vocab} rows of {hidden}",
        quant,
        ids,
        count * vocab,
        0.0,
        _contestants(
            "embed",
            call,
            tables[0].nbytes // vocab,
            Contestant(by_mlx, own[0].nbytes // vocab) if own else None,
        ),
        ids.itemsize - ids.nbytes,
        dtype,
    )


# --- matrices


@dataclass(frozen=True)
class _Matrices:
    """A launch of the model: of one input, with what is fused in."""

    name: str
    cols: int
    rows: tuple[int, ...]
    norm: bool = False
    residual: bool = False


def qmv_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    """The model's matrices as it launches them, several of one input together."""
    hidden, heads, q_rank, width = CFG.hidden_size, CFG.num_heads, CFG.q_lora_rank or 0, CFG.intermediate_size
    for matrices in (
        _Matrices("q_a, kv_a", hidden, (q_rank, CFG.cache_dim), norm=True),
        _Matrices("q_b", q_rank, (heads * CFG.qk_head_dim,), norm=True),
        _Matrices("o", heads * CFG.v_head_dim, (hidden,), residual=True),
        _Matrices("dense gate, up", hidden, (width, width), norm=True),
        _Matrices("dense down", width, (hidden,), residual=True),
        _Matrices("lm_head", hidden, (sizes.vocab_size,), norm=True),
    ):
        if fits(quant, matrices.cols):
            yield _qmv_case(matrices, quant, dtype, sizes)


def router_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    """The router's matrix, which is float32 in every file."""
    yield _qmv_case(_Matrices("router", CFG.hidden_size, (CFG.num_experts,)), "F32", mx.float32, sizes)


def _qmv_case(matrices: _Matrices, quant: str, dtype: mx.Dtype, sizes: Sizes) -> Case:
    cols, rows = matrices.cols, matrices.rows
    first = [_weight(quant, (n, cols), 0) for n in rows]
    read = total(first)
    residual = _normal((1, rows[0]), dtype, 1) if matrices.residual else None
    sets: list[list[Weight]] = []
    norms: list[Norm | None] = []
    for seed in range(_sets(read, sizes)):
        made = [_weight(quant, (n, cols), seed) for n in rows] if seed else first
        (gains, *weights), bundle = _as_in_model([mx.ones((cols,)), *made])
        sets.append(weights)
        norms.append(Norm(_floats(gains), CFG.rms_norm_eps, bundle) if matrices.norm else None)
    own = [[a for w in weights if (a := affine(w, dtype))] for weights in sets]

    def call(x: mx.array, i: int) -> list[mx.array]:
        if residual is None:
            return qmv_all(x, sets[i], norms[i])
        return [qmv(x, sets[i][0], norms[i], residual.astype(x.dtype))]  # the cast is for the judge alone, in float32

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        norm = norms[i]
        normed = x if norm is None else norm(x)
        return [w.matmul(normed) if residual is None else w.matmul(normed) + residual for w in own[i]]

    with_ = [word for word, fused in (("norm", norms[0]), ("residual", residual)) if fused is not None]
    extra = [array for array in (None if norms[0] is None else norms[0].weight, residual) if array is not None]
    return Case(
        "qmv",
        f"{matrices.name}: {cols} -> {' + '.join(map(str, rows))}{''.join(f', {word}' for word in with_)}",
        quant,
        _normal((1, cols), dtype),
        len(sets),
        2.0 * cols * sum(rows),
        _contestants("qmv", call, read, Contestant(by_mlx, total(own[0])) if own[0] else None),
        total(extra),
    )


def heads_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    """The matrices with a part for each head: into the latent space, and out of it."""
    heads, latent = CFG.num_heads, CFG.kv_lora_rank
    cases: tuple[tuple[str, Callable[[mx.array, Weight], mx.array], int, int, tuple[int, ...]], ...] = (
        ("k_b", absorb, latent, CFG.qk_nope_head_dim, (1, 1, heads * CFG.qk_head_dim)),
        ("v_b", merge_heads, CFG.v_head_dim, latent, (1, heads, 1, latent)),
    )
    for name, call, rows, cols, x_shape in cases:
        if fits(quant, cols):
            yield _heads_case(name, call, quant, dtype, (heads, rows, cols), x_shape, sizes)


def _heads_case(
    name: str,
    call: Callable[[mx.array, Weight], mx.array],
    quant: str,
    dtype: mx.Dtype,
    shape: tuple[int, int, int],
    x_shape: tuple[int, ...],
    sizes: Sizes,
) -> Case:
    heads, rows, cols = shape
    first = _weight(quant, shape, 0)
    sets = [_as_in_model([_weight(quant, shape, seed)])[0][0] for seed in range(_sets(first.nbytes, sizes))]
    own = [a for w in sets if (a := affine(w, dtype))]

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        parts = x.reshape(heads, 1, -1)[..., :cols]
        y = own[i].matmul(parts)
        return [y[None] if name == "k_b" else y.reshape(1, 1, -1)]

    return Case(
        "heads",
        f"{name}: {heads} x {cols} -> {rows}",
        quant,
        _normal(x_shape, dtype),
        len(sets),
        2.0 * heads * rows * cols,
        _contestants(
            "qmv",
            lambda x, i: [call(x, sets[i])],
            first.nbytes,
            Contestant(by_mlx, own[0].nbytes) if own else None,
        ),
    )


# --- experts


@dataclass(frozen=True)
class Experts(Generic[W]):
    """The banks of several layers, and which experts each launch takes of which layer."""

    routed: list[list[W]]  # by layer: banks (E, rows, cols)
    shared: list[list[W]]  # by layer: (rows, cols)
    biases: list[mx.array]  # by layer: the router's, (E,), beside the banks where kernels read both
    chosen: list[mx.array]  # by set: (1, K) uint32
    logits: list[mx.array]  # by set: (1, E), of which the chosen ones are the largest

    def of(self, i: int) -> tuple[list[W], list[W], mx.array]:
        layer = i % len(self.routed)
        return self.routed[layer], self.shared[layer], self.chosen[i]

    @property
    def nbytes(self) -> float:
        """What a launch reads, in the mean over the sets."""
        reads = 0
        for i in range(len(self.chosen)):
            routed, shared, chosen = self.of(i)
            reads += sum(chosen_nbytes(bank, chosen) for bank in routed) + total(shared)
        return reads / len(self.chosen)


def _experts(quant: str, banks: int, shape: tuple[int, int], shared: tuple[int, int], sizes: Sizes) -> Experts[Weight]:
    rng = np.random.default_rng(0)
    chosen = [
        mx.array(rng.choice(sizes.num_experts, (1, TOP_K), replace=False).astype(np.uint32)) for _ in range(CHOICES)
    ]
    none, best_first = mx.full((1, sizes.num_experts), -9.0), -1.0 * mx.arange(TOP_K)[None]
    logits = [mx.put_along_axis(none, ids, best_first, axis=1) for ids in chosen]
    mx.eval(chosen, logits)
    experts: Experts[Weight] = Experts([], [], [], chosen, logits)
    for layer in range(sizes.layers):
        routed = [_weight(quant, (sizes.num_experts, *shape), layer * banks + i) for i in range(banks)]
        beside = [_weight(quant, shared, 100 + layer * banks + i) for i in range(banks)]
        (bias, *weights), _ = _as_in_model([mx.zeros((sizes.num_experts,)), *routed, *beside])
        experts.biases.append(_floats(bias))
        experts.routed.append(weights[:banks])
        experts.shared.append(weights[banks:])
    return experts


def _affine_experts(experts: Experts[Weight], dtype: mx.Dtype) -> Experts[Affine] | None:
    """Or None, as `affine`."""
    made = [
        [[a for w in weights if (a := affine(w, dtype))] for weights in layers]
        for layers in (experts.routed, experts.shared)
    ]
    return Experts(made[0], made[1], [], experts.chosen, experts.logits) if made[0][0] else None


def gate_up_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    width, hidden = CFG.moe_intermediate_size, CFG.hidden_size
    if not fits(quant, hidden):
        return
    experts = _experts(quant, 2, (width, hidden), (SHARED * width, hidden), sizes)
    own = _affine_experts(experts, dtype)

    routers = [
        Router(bias, TOP_K, CFG.gating, CFG.norm_topk_prob, CFG.routed_scaling_factor) for bias in experts.biases
    ]

    def call(x: mx.array, i: int) -> list[mx.array]:
        (gate, up), shared, _ = experts.of(i)
        hidden, _ = experts_gate_up(x, experts.logits[i], routers[i % len(routers)], gate, up, *shared)
        return [hidden]

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        assert own is not None
        (gate, up), (shared_gate, shared_up), chosen = own.of(i)
        routed = swiglu_ops(gate.gather(x[:, None], chosen), up.gather(x[:, None], chosen))
        return [mx.concatenate([mx.flatten(routed, 1), swiglu_ops(shared_gate.matmul(x), shared_up.matmul(x))], axis=1)]

    yield Case(
        "experts_gate_up",
        f"{TOP_K} of {sizes.num_experts} + {SHARED}: {hidden} -> 2 x {width}",
        quant,
        _normal((1, hidden), dtype),
        CHOICES,
        2.0 * (TOP_K + SHARED) * 2 * width * hidden,
        _contestants("experts_gate_up", call, experts.nbytes, Contestant(by_mlx, own.nbytes) if own else None),
        experts.logits[0].nbytes + experts.biases[0].nbytes,
    )


def down_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    width, hidden = CFG.moe_intermediate_size, CFG.hidden_size
    if not fits(quant, width):
        return
    experts = _experts(quant, 1, (hidden, width), (hidden, SHARED * width), sizes)
    own = _affine_experts(experts, dtype)
    residual, weights = _normal((1, hidden), dtype, 1), mx.full((1, TOP_K), CFG.routed_scaling_factor / TOP_K)
    choices = [mx.stack([chosen, weights.view(mx.uint32)], axis=-2) for chosen in experts.chosen]
    mx.eval(weights, choices)

    def call(x: mx.array, i: int) -> list[mx.array]:
        (down,), (shared_down,), _ = experts.of(i)
        return [experts_down(x, choices[i], down, shared_down, residual.astype(x.dtype))]

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        assert own is not None
        (down,), (shared_down,), chosen = own.of(i)
        routed_x, shared_x = mx.split(x, [TOP_K * width], axis=-1)
        routed = down.gather(mx.unflatten(routed_x, -1, (TOP_K, width)), chosen)
        routed = (routed * weights.astype(x.dtype)[..., None]).sum(axis=1)
        return [routed + shared_down.matmul(shared_x) + residual]

    yield Case(
        "experts_down",
        f"{TOP_K} of {sizes.num_experts} + {SHARED}: {width} -> {hidden}",
        quant,
        _normal((1, (TOP_K + SHARED) * width), dtype),
        CHOICES,
        2.0 * (TOP_K + SHARED) * width * hidden,
        _contestants("experts_down", call, experts.nbytes, Contestant(by_mlx, own.nbytes) if own else None),
        total((choices[0], residual)),
    )


# --- without weights


def mla_decode_cases(quant: str, dtype: mx.Dtype, sizes: Sizes) -> Iterator[Case]:
    """With a cache of the activations' dtype, and in 8 bits."""
    for stored in (dtype, mx.uint8):
        for context in sizes.contexts:
            yield _mla_decode_case(context, RowFormat(CFG.kv_lora_rank, CFG.qk_rope_head_dim, stored), dtype, sizes)


def _rows(row_format: RowFormat, context: int, dtype: mx.Dtype, seed: int) -> mx.array:
    made = row_format.store(_normal((1, context, row_format.values), dtype, seed))
    mx.eval(made)
    return made


def _mla_decode_case(context: int, row_format: RowFormat, dtype: mx.Dtype, sizes: Sizes) -> Case:
    heads, latent, scale = CFG.num_heads, CFG.kv_lora_rank, CFG.softmax_scale
    count = _sets(context * row_format.nbytes, sizes)
    caches = [_rows(row_format, context, dtype, seed) for seed in range(count)]
    q = _normal((1, 1, heads * CFG.qk_head_dim), dtype, 1)
    kv_a = _normal((1, 1, CFG.cache_dim), dtype, 2)
    wavelengths = rope_wavelengths(CFG)
    position = mx.array([context - 1], mx.int32)
    # Q8_0 in every published file.
    shape = heads, CFG.v_head_dim, latent
    v_b: list[Weight] = []
    norms: list[Norm] = []
    for seed in range(_sets(_weight("Q8_0", shape, 0).nbytes, sizes)):
        (gains, weight), bundle = _as_in_model([mx.ones((latent,)), _weight("Q8_0", shape, seed)])
        v_b.append(weight)
        norms.append(Norm(_floats(gains), CFG.rms_norm_eps, bundle))
    merges = [affine(w, dtype) for w in v_b]
    assert merges[0] is not None

    def call(x: mx.array, i: int) -> list[mx.array]:
        own = i % len(v_b)
        new = (q.astype(x.dtype), kv_a.astype(x.dtype), norms[own], wavelengths)
        return [mla_decode(x, *new, caches[i], position, scale, v_b[own])[0]]

    def by_mlx(x: mx.array, i: int) -> list[mx.array]:
        own = mx.unflatten(q, -1, (heads, -1))[..., -CFG.qk_rope_head_dim :].swapaxes(1, 2)
        q_pe = rope_ops(own, wavelengths, position)
        new = mx.concatenate([*latent_rows_ops(kv_a, norms[0], wavelengths, position)], axis=-1)
        key = mx.concatenate([caches[i][:, :-1], new], axis=1)[:, None]
        queries = mx.concatenate([x, q_pe], axis=-1)
        out = mx.fast.scaled_dot_product_attention(queries, key, key[..., :latent], scale=scale)
        merge = merges[i % len(v_b)]
        assert merge is not None
        return [merge.matmul(out.reshape(heads, 1, latent)).reshape(1, 1, -1)]

    read = context * row_format.nbytes
    mlx = None if row_format.is_packed else Contestant(by_mlx, read + merges[0].nbytes)
    return Case(
        "mla_decode",
        f"{context} rows of {CFG.cache_dim}, {heads} heads",
        "8 bits" if row_format.is_packed else "-",
        _normal((1, heads, 1, latent), dtype),
        count,
        2.0 * heads * (context * (CFG.cache_dim + latent) + CFG.v_head_dim * latent),
        _contestants("mla_decode", call, read + v_b[0].nbytes, mlx),
        q.nbytes + kv_a.nbytes + norms[0].weight.nbytes + wavelengths.nbytes,
    )


OPS: dict[str, Callable[[str, mx.Dtype, Sizes], Iterator[Case]]] = {
    "embed": embed_cases,
    "qmv": qmv_cases,
    "router": router_cases,
    "heads": heads_cases,
    "experts_gate_up": gate_up_cases,
    "experts_down": down_cases,
    "mla_decode": mla_decode_cases,
}
WITHOUT_QUANT = ("router", "mla_decode")  # the same whatever the type of the weights
