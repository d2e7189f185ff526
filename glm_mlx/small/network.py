"""The model as it is trained: whole sequences, no cache, every expert computed for every token, float weights.

The formulas are `glm_mlx.model`'s, unabsorbed and differentiable; `parity_tests/test_small_training.py` holds the two
to the same logits. Parameters have the product's names. B batch, L tokens, H heads, E experts, K used, D hidden_size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from glm_mlx.make_tiny import TinySpec
from kernels.route import Router

Params = dict[str, mx.array]
EPS = 1e-5
ROPE_THETA = 1e6
SCALING = 1.8  # routed_scaling_factor


@dataclass(frozen=True)
class Output:
    """logits (B, L, V); mtp_logits (B, L - 1, V), of the token after the next; loads: layer -> (E,) of choices."""

    logits: mx.array
    mtp_logits: mx.array
    loads: Params


def shapes(spec: TinySpec, vocab: int) -> dict[str, tuple[int, ...]]:
    """Every parameter by the product's name. The MTP layer is `layers.{spec.layers}`."""
    d, heads, latent = spec.hidden_size, spec.num_heads, spec.kv_lora_rank
    nope, rope, value, width = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim, spec.moe_intermediate_size
    table: dict[str, tuple[int, ...]] = {"embed_tokens": (vocab, d), "norm": (d,), "lm_head": (vocab, d)}
    for i in range(spec.layers + 1):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "self_attn.q_a_proj": (spec.q_lora_rank, d),
            "self_attn.q_a_layernorm": (spec.q_lora_rank,),
            "self_attn.q_b_proj": (heads * (nope + rope), spec.q_lora_rank),
            "self_attn.kv_a_proj": (latent + rope, d),
            "self_attn.kv_a_layernorm": (latent,),
            "self_attn.k_b": (heads, latent, nope),
            "self_attn.v_b": (heads, value, latent),
            "self_attn.o_proj": (d, heads * value),
            "post_attention_layernorm": (d,),
        }
        if i < spec.first_k_dense:
            inner = spec.intermediate_size
            layer |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
        else:
            shared = spec.num_shared_experts * width
            layer["mlp.gate"] = (spec.num_experts, d)
            for name in ("gate", "up"):
                layer[f"mlp.experts.{name}_proj"] = (spec.num_experts, width, d)
                layer[f"mlp.shared_experts.{name}_proj"] = (shared, d)
            layer |= {
                "mlp.experts.down_proj": (spec.num_experts, d, width),
                "mlp.shared_experts.down_proj": (d, shared),
            }
        if i == spec.layers:
            layer["nextn.eh_proj"] = (d, 2 * d)
            layer |= {f"nextn.{norm}": (d,) for norm in ("enorm", "hnorm", "shared_head_norm")}
        table |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return table


def init(spec: TinySpec, vocab: int, seed: int) -> Params:
    """Norms 1; matrices normal with 1 / sqrt(columns); projections into the residual smaller by the depth."""
    table = shapes(spec, vocab)
    params = {}
    for (name, shape), key in zip(table.items(), mx.random.split(mx.random.key(seed), len(table)), strict=True):
        if len(shape) == 1:
            params[name] = mx.ones(shape)
            continue
        std = 0.02 if name == "embed_tokens" else shape[-1] ** -0.5
        if name.endswith(("o_proj", "down_proj")):
            std /= math.sqrt(2 * spec.layers)
        params[name] = std * mx.random.normal(shape, key=key)
    return params


def forward(
    spec: TinySpec,
    params: Mapping[str, mx.array],
    biases: Mapping[str, mx.array],
    tokens: mx.array,
    segments: mx.array,
) -> Output:
    """tokens, segments (B, L): a token sees the earlier ones of its segment. biases: layer -> (E,) selection bias."""
    length = tokens.shape[1]
    causal = mx.arange(length)[:, None] >= mx.arange(length)
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    loads: Params = {}
    x = params["embed_tokens"][tokens]
    for i in range(spec.layers):
        x = _block(spec, params, biases, f"layers.{i}.", x, mask, loads)
    logits = rms_norm(x, params["norm"]) @ params["lm_head"].T
    # DeepSeek-V3 (arXiv 2412.19437, section 2.2): the next token's embedding beside the hidden state, one more block.
    prefix = f"layers.{spec.layers}."
    embedded = rms_norm(params["embed_tokens"][tokens[:, 1:]], params[prefix + "nextn.enorm"])
    hidden = rms_norm(x[:, :-1], params[prefix + "nextn.hnorm"])
    joined = mx.concatenate([embedded, hidden], axis=-1) @ params[prefix + "nextn.eh_proj"].T
    y = _block(spec, params, biases, prefix, joined, mask[:, :-1, :-1], loads)
    mtp_logits = rms_norm(y, params[prefix + "nextn.shared_head_norm"]) @ params["lm_head"].T
    return Output(logits, mtp_logits, loads)


def rms_norm(x: mx.array, weight: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, weight, EPS)


def _block(
    spec: TinySpec,
    params: Mapping[str, mx.array],
    biases: Mapping[str, mx.array],
    prefix: str,
    x: mx.array,
    mask: mx.array,
    loads: Params,
) -> mx.array:
    w = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
    x = x + _attention(spec, w, rms_norm(x, w["input_layernorm"]), mask)
    h = rms_norm(x, w["post_attention_layernorm"])
    if "mlp.gate" not in w:
        return x + _swiglu(h @ w["mlp.gate_proj"].T, h @ w["mlp.up_proj"].T) @ w["mlp.down_proj"].T
    y, loads[prefix] = _moe(spec, w, biases[prefix], h)
    return x + y


def _attention(spec: TinySpec, w: Mapping[str, mx.array], x: mx.array, mask: mx.array) -> mx.array:
    batch, length, _ = x.shape
    nope = spec.qk_nope_head_dim
    q = rms_norm(x @ w["self_attn.q_a_proj"].T, w["self_attn.q_a_layernorm"]) @ w["self_attn.q_b_proj"].T
    q = q.reshape(batch, length, spec.num_heads, -1).swapaxes(1, 2)
    q_nope, q_pe = q[..., :nope], _rope(q[..., nope:])
    latent, k_pe = mx.split(x @ w["self_attn.kv_a_proj"].T, [spec.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, w["self_attn.kv_a_layernorm"])[:, None]  # (B, 1, L, R)
    k_pe = _rope(k_pe[:, None])
    k_nope = latent @ w["self_attn.k_b"]  # (B, H, L, N)
    value = latent @ w["self_attn.v_b"].swapaxes(-1, -2)  # (B, H, L, V)
    scores = q_nope @ k_nope.swapaxes(-1, -2) + q_pe @ k_pe.swapaxes(-1, -2)
    scores = scores.astype(mx.float32) * (nope + spec.qk_rope_head_dim) ** -0.5
    probabilities = mx.softmax(mx.where(mask[:, None], scores, -1e9), axis=-1).astype(x.dtype)
    out = (probabilities @ value).swapaxes(1, 2).reshape(batch, length, -1)
    return out @ w["self_attn.o_proj"].T


def _rope(x: mx.array) -> mx.array:
    return mx.fast.rope(x, x.shape[-1], traditional=True, base=ROPE_THETA, scale=1.0, offset=0)


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _moe(spec: TinySpec, w: Mapping[str, mx.array], bias: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    """(B, L, D) -> the same, and the share of the choices that each expert got.

    All experts run on all tokens: with 16 small ones that is faster than sorting, and needs no gather in the gradient.
    """
    shape, x = x.shape, x.reshape(-1, x.shape[-1])  # (T, D)
    logits = x.astype(mx.float32) @ w["mlp.gate"].astype(mx.float32).T
    scores = mx.sigmoid(logits)
    experts, _ = Router(bias, spec.num_experts_per_tok, "sigmoid", True, SCALING)(mx.stop_gradient(logits))
    chosen = (experts[..., None] == mx.arange(spec.num_experts)).any(axis=1)  # (T, E)
    table = mx.where(chosen, scores, 0)
    table = table / (table.sum(axis=-1, keepdims=True) + 1e-20) * SCALING
    hidden = _swiglu(x @ w["mlp.experts.gate_proj"].swapaxes(-1, -2), x @ w["mlp.experts.up_proj"].swapaxes(-1, -2))
    hidden = hidden * table.T[..., None].astype(x.dtype)  # (E, T, F)
    y = (hidden @ w["mlp.experts.down_proj"].swapaxes(-1, -2)).sum(axis=0)
    shared = _swiglu(x @ w["mlp.shared_experts.gate_proj"].T, x @ w["mlp.shared_experts.up_proj"].T)
    y = y + shared @ w["mlp.shared_experts.down_proj"].T
    return y.reshape(shape), chosen.sum(axis=0) / (chosen.shape[0] * spec.num_experts_per_tok)
