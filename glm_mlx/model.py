"""GLM-4.7-Flash (`glm4_moe_lite`, GGUF `deepseek2`) on MLX arrays, in the order a token meets it.

Sources: transformers `modular_glm4_moe_lite.py` and `modeling_deepseek_v3.py`; llama.cpp `src/models/deepseek2.cpp`
(YaRN, fall-backs). Parameter names are the checkpoint's. In shapes, with GLM-4.7-Flash's values:

B batch, L new tokens, S cached + new tokens, D hidden_size 2048, H heads 20, R kv_lora_rank 512,
P qk_rope_head_dim 64, N qk_nope_head_dim 192, V v_head_dim 256, E experts 64, K experts per token 4,
F moe_intermediate_size 1536.

Each function of `kernels` launches its kernel where there is a GPU and the tokens are few, and else computes the same
with MLX's operations; those named `_ops` have no kernel, nor have `moe_prefill`, which is for many tokens, and
`small_moe`, which is for small experts on a CPU.
"""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import cache
from typing import TypeAlias

import mlx.core as mx

from glm_mlx.cache import BatchCache, KvBits, LatentCache, TracedCache, row_format
from glm_mlx.config import Config
from kernels import wide
from kernels.embed import embed
from kernels.experts_down import experts_down
from kernels.experts_gate_up import experts_gate_up, swiglu_ops
from kernels.mla_decode import attend_ops, latent_rows_ops, mla_decode, rope_ops
from kernels.planes import Bundle, QuantizedTensor, Weight, bundled
from kernels.prefill import moe_prefill, takes
from kernels.qmv import Norm, absorb, merge_heads, norm_qmv, qmv, qmv_all, qmv_beside
from kernels.route import Router, experts_of, weights_of
from kernels.rows import RowFormat
from kernels.small_experts import small_experts, small_moe

Cache: TypeAlias = LatentCache | TracedCache
Tap = Callable[[str, mx.array], None]  # sees named intermediate values; the parity tests' way in


def no_tap(name: str, value: mx.array) -> None:
    """The tap of normal running."""


class Weights:
    """The weights below one name: `Weights(w, "layers.3.")["self_attn.o_proj"]`. bundle: where its norms may stand."""

    def __init__(self, weights: MutableMapping[str, Weight], prefix: str, bundle: Bundle | None = None):
        self.weights, self.prefix, self.bundle = weights, prefix, bundle

    def __getitem__(self, name: str) -> Weight:
        return self.weights[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.weights

    def get(self, name: str) -> Weight | None:
        return self.weights.get(self.prefix + name)

    def put_together(self, *names: str) -> Bundle | None:
        """Put those that there are into one array, where launches are: the arrays that were there are dropped."""
        if mx.default_device() == mx.Device(mx.cpu):
            return None
        present = [name for name in names if name in self]
        moved, bundle = bundled([self[name] for name in present])
        for name, weight in zip(present, moved, strict=True):
            self.weights[self.prefix + name] = weight
        mx.clear_cache()  # of the arrays that were dropped; the next bundle has another size
        return bundle

    def vector(self, name: str) -> mx.array:
        weight = self[name]
        assert isinstance(weight, mx.array)
        return weight

    def norm(self, name: str, cfg: Config) -> Norm:
        return Norm(self.vector(name), cfg.rms_norm_eps, self.bundle)


@cache
def rope_wavelengths(cfg: Config) -> mx.array:
    """Positions are divided by these: (P / 2,) float32. Plain RoPE, or YaRN's blend of it with its interpolation.

    Evaluated, and one array for all layers: a traced step would compute it again for every token.
    """
    wavelengths = _rope_wavelengths(cfg)
    mx.eval(wavelengths)
    return wavelengths


def _rope_wavelengths(cfg: Config) -> mx.array:
    dim, base = cfg.qk_rope_head_dim, cfg.rope_theta
    plain = base ** (mx.arange(0, dim, 2) / dim)
    if cfg.yarn is None:
        return plain

    def correction_dim(rotations: float) -> float:  # the pair that turns so often within the original context
        assert cfg.yarn is not None
        return dim * math.log(cfg.yarn.original_context_length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(correction_dim(cfg.yarn.beta_fast)))
    high = min(dim - 1, math.ceil(correction_dim(cfg.yarn.beta_slow)))
    ramp = mx.clip((mx.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return 1 / (ramp / (plain * cfg.yarn.factor) + (1 - ramp) / plain)


class Attention:
    """x + attention(norm(x))"""

    def __init__(self, cfg: Config, weights: Weights, layer: int, norm: Norm):
        self.cfg, self.layer, self.norm = cfg, layer, norm
        self.q_proj = weights.get("q_proj")  # models without q_lora
        if self.q_proj is None:
            self.q_a_proj = weights["q_a_proj"]
            self.q_a_layernorm = weights.norm("q_a_layernorm", cfg)
            self.q_b_proj = weights["q_b_proj"]
        self.kv_a_proj = weights["kv_a_proj"]
        self.kv_a_layernorm = weights.norm("kv_a_layernorm", cfg)
        self.k_b = weights["k_b"]  # (H, R, N)
        self.v_b = weights["v_b"]  # (H, V, R)
        self.o_proj = weights["o_proj"]
        self.wavelengths = rope_wavelengths(cfg)

    def __call__(self, x: mx.array, cache: Cache, tap: Tap = no_tap) -> mx.array:
        cfg = self.cfg
        tap("attn_norm", self.norm(x))

        if self.q_proj is not None:
            q, kv_a = qmv_all(x, (self.q_proj, self.kv_a_proj), self.norm)
        elif isinstance(cache, TracedCache):
            kv_a = qmv_beside(x, (self.q_a_proj, self.kv_a_proj), self.norm)  # one array of q_a, then kv_a
            q = qmv(kv_a, self.q_b_proj, self.q_a_layernorm)
        else:
            q_a, kv_a = qmv_all(x, (self.q_a_proj, self.kv_a_proj), self.norm)
            q = qmv(q_a, self.q_b_proj, self.q_a_layernorm)
        if isinstance(cache, TracedCache):
            q_latent = absorb(q, self.k_b)  # (B, H, L, R)
            rows, wavelengths = cache.rows[self.layer], self.wavelengths
            out, cache.rows[self.layer] = mla_decode(
                q_latent, q, kv_a, self.kv_a_layernorm, wavelengths, rows, cache.position, cfg.softmax_scale, self.v_b
            )
        else:
            out = merge_heads(self._attend(q, kv_a, cache, tap), self.v_b)
        out = qmv(out, self.o_proj, residual=x)  # out (B, L, H * V)
        tap("attn_out", out - x)
        return out

    def _attend(self, q: mx.array, kv_a: mx.array, cache: LatentCache, tap: Tap) -> mx.array:
        """q (B, L, H * (N + P)), kv_a (B, L, R + P) -> (B, H, L, R)"""
        cfg = self.cfg
        if cache.format.is_packed:
            kv_a = kv_a.astype(mx.float32)  # rounded once, to 8 bits
        position = cache.position
        latent, k_pe = latent_rows_ops(kv_a, self.kv_a_layernorm, self.wavelengths, position)
        heads = q.reshape(*q.shape[:2], cfg.num_heads, cfg.qk_head_dim).swapaxes(1, 2)
        q_nope, q_pe = mx.split(heads, [cfg.qk_nope_head_dim], axis=-1)  # (B, H, L, N), (B, H, L, P)
        q_pe = rope_ops(q_pe, self.wavelengths, position)
        tap("q", mx.concatenate([q_nope, q_pe], axis=-1).swapaxes(1, 2))
        tap("latent", latent)
        tap("k_pe", k_pe)
        # q_nope . (k_b latent) = (k_b^T q_nope) . latent: the query moves into the latent space, so that one cached
        # row is key and value of every head.
        q_latent = absorb(q, self.k_b)
        rows = cache.update(self.layer, mx.concatenate([latent, k_pe], axis=-1))  # (B, S, row's width)
        return attend_ops(q_latent, q_pe, rows, cfg.softmax_scale, cache.context(q.shape[1]))


class MLP:
    """x + mlp(norm(x))"""

    def __init__(self, weights: Weights, norm: Norm):
        self.norm = norm
        self.gate_proj, self.up_proj, self.down_proj = (weights[f"{n}_proj"] for n in ("gate", "up", "down"))

    def __call__(self, x: mx.array, tap: Tap = no_tap) -> mx.array:
        tap("ffn_norm", self.norm(x))
        hidden = swiglu_ops(*qmv_all(x, (self.gate_proj, self.up_proj), self.norm))
        return qmv(hidden, self.down_proj, residual=x)


class MoE:
    """x + experts(norm(x))"""

    def __init__(self, cfg: Config, weights: Weights, norm: Norm):
        self.norm = norm
        owners = ("experts", "shared_experts")
        if isinstance(weights["experts.gate_proj"], QuantizedTensor):  # others are too large to be copied for this
            gate_up = (f"{owner}.{name}_proj" for owner in owners for name in ("gate", "up"))
            weights.put_together("e_score_correction_bias", *gate_up)
            weights.put_together(*(f"{owner}.down_proj" for owner in owners))
        self.gate = weights["gate"]
        bias = weights.vector("e_score_correction_bias") if "e_score_correction_bias" in weights else None
        scale = cfg.routed_scaling_factor
        self.router = Router(bias, cfg.num_experts_per_tok, cfg.gating, cfg.norm_topk_prob, scale)
        self.gate_proj, self.up_proj, self.down_proj = (weights[f"experts.{n}_proj"] for n in ("gate", "up", "down"))
        self.shared_gate, self.shared_up, self.shared_down = (
            weights.get(f"shared_experts.{n}_proj") for n in ("gate", "up", "down")
        )
        self.small = small_experts(
            self.gate_proj, self.up_proj, self.down_proj, self.shared_gate, self.shared_up, self.shared_down
        )

    def __call__(self, x: mx.array, tap: Tap = no_tap) -> mx.array:
        # float32: the biases of e_score_correction_bias differ by less than half precision resolves.
        normed, router_logits = norm_qmv(x, self.gate, self.norm, mx.float32)  # (B, L, D), (B, L, E)
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        shared_gate, shared_up, shared_down = self.shared_gate, self.shared_up, self.shared_down
        if takes(x.size // x.shape[-1], self.router, gate.shape[0]):
            out, choice = moe_prefill(
                normed, router_logits, self.router, gate, up, down, shared_gate, shared_up, shared_down, x
            )
        elif self.small is not None and self.small.apply:
            out, choice = small_moe(normed, router_logits, self.router, self.small, x)
        else:
            hidden, choice = experts_gate_up(normed, router_logits, self.router, gate, up, shared_gate, shared_up)
            out = experts_down(hidden, choice, down, shared_down, x)
        tap("ffn_norm", normed)
        tap("router_logits", router_logits)
        tap("experts", experts_of(choice))
        tap("expert_weights", weights_of(choice))
        return out


class Block:
    # What its launches read, but for the experts. What all layers have alike comes first, so that it begins at the same
    # words in all, and the texts of their kernels are the same; a type that one layer alone has moves what comes after.
    BUNDLE = (
        *("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
        *(f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "kv_a_proj", "q_b_proj", "k_b", "v_b", "o_proj")),
        *(f"mlp.{name}" for name in ("gate", "gate_proj", "up_proj", "down_proj")),
    )

    def __init__(self, cfg: Config, weights: Weights, layer: int):
        bundle = weights.put_together(*self.BUNDLE)
        weights = Weights(weights.weights, weights.prefix, bundle)
        attn = Weights(weights.weights, f"{weights.prefix}self_attn.", bundle)
        mlp = Weights(weights.weights, f"{weights.prefix}mlp.")
        mlp_norm = weights.norm("post_attention_layernorm", cfg)
        self.self_attn = Attention(cfg, attn, layer, weights.norm("input_layernorm", cfg))
        self.mlp = MLP(mlp, mlp_norm) if layer < cfg.first_k_dense else MoE(cfg, mlp, mlp_norm)

    def __call__(self, x: mx.array, cache: Cache, tap: Tap = no_tap) -> mx.array:
        x = self.self_attn(x, cache, tap)
        out = self.mlp(x, tap)
        if wide.applies(x.shape[1], x.dtype):
            wide.start(out)
        tap("ffn_out", out - x)
        tap("out", out)
        return out


class Model:
    """`model.logits(model.hidden_states(tokens, cache))`, with tokens (B, L) and `cache` from `new_cache`, or from
    `new_batch_cache` for sequences of different lengths.

    On a GPU the weights of each launch move into one array, of most launches of a layer into the same, and `weights`
    then holds views of them. Experts that are not quantised stay where they are.
    """

    def __init__(self, cfg: Config, weights: MutableMapping[str, Weight], dtype: mx.Dtype, kv_bits: KvBits = 16):
        self.cfg, self.dtype = cfg, dtype
        self.row_format = row_format(cfg, dtype, kv_bits)  # of its caches
        self.embed_tokens = weights["embed_tokens"]
        self.layers = [Block(cfg, Weights(weights, f"layers.{i}."), i) for i in range(cfg.num_layers)]
        self.norm = Weights(weights, "").norm("norm", cfg)
        self.lm_head = weights.get("lm_head", self.embed_tokens)

    def new_cache(self) -> LatentCache:
        return LatentCache(self.cfg.num_layers, self.row_format)

    def new_batch_cache(self, sequences: int) -> BatchCache:
        return BatchCache(self.cfg.num_layers, self.row_format, sequences, limit=self.cfg.context_length)

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) -> (B, L, D)"""
        return embed(self.embed_tokens, tokens, self.dtype)

    def hidden_states(self, tokens: mx.array, cache: Cache) -> mx.array:
        """(B, L) -> (B, L, D) after the last layer; the cache then holds the tokens' rows."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cache)
        if isinstance(cache, LatentCache):
            cache.advance(tokens.shape[1])
        return x

    def step(self, tokens: mx.array, position: mx.array, rows: Sequence[mx.array]) -> tuple[mx.array, list[mx.array]]:
        """`hidden_states` and `logits` of the last token as a function of arrays alone, to be traced once.

        tokens (B, L), position (1,) int32, rows: whole arrays of the cache with room for L more -> logits
        (B, vocabulary), and the arrays with the new rows.
        """
        cache = TracedCache(list(rows), position)
        hidden = self.hidden_states(tokens, cache)
        return self.logits(hidden[:, -1:])[:, 0], cache.rows

    def logits(self, x: mx.array) -> mx.array:
        """(B, L, D) -> (B, L, vocabulary) float32"""
        return qmv(x, self.lm_head, self.norm, dtype=mx.float32)


def activation_dtype() -> mx.Dtype:
    """float32 on a CPU, where MLX is 10 to 45 times slower in 16 bits; bfloat16 on a GPU."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def decode_bytes(cfg: Config, weights: Mapping[str, Weight], rows: RowFormat) -> tuple[int, int]:
    """What one decoded token needs, each byte once: (bytes of weights, bytes more for each token in the context).

    Of the experts K of E are read, of the embedding one row; everything else whole.
    """
    total = 0
    for name, weight in weights.items():
        if ".experts." in name:
            total += weight.nbytes // cfg.num_experts * cfg.num_experts_per_tok
        elif name == "embed_tokens" and "lm_head" in weights:
            total += weight.nbytes // cfg.vocab_size
        else:
            total += weight.nbytes
    return total, cfg.num_layers * rows.nbytes
