"""GLM-4.7-Flash and other `deepseek2` models, as naively as they can be written: the judge of everything faster.

The whole sequence goes through at once, in float32. There is no cache, attention is not absorbed (every head gets its
keys and values in full), and the experts run one after the other.

Sources: transformers `models/deepseek_v3/modeling_deepseek_v3.py` and `models/glm4_moe_lite/modeling_glm4_moe_lite.py`
for the formulas; llama.cpp `src/models/deepseek2.cpp` and `convert_hf_to_gguf.py` for what each tensor holds.
T tokens, D hidden 2048, H heads 20, R latent (kv_lora_rank) 512, P rope part 64, N no-rope part 192, V value 256,
E routed experts 64, K experts per token 4, F expert width 1536.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tinygrad import Tensor

from .config import read_config
from .device import choose_device
from .gguf_file import GgufFile
from .rope import cos_sin, softmax_scale

choose_device()

VOCABULARY_CHUNK = 8192  # rows of the output matrix that are float32 at one time: 64 MB when D is 2048


class Reference:
    """One model file, computed layer by layer. Only the weights in use are in memory, and only as float32."""

    def __init__(self, path: str | Path):
        self.file = GgufFile(path)
        self.config = read_config(self.file)
        self.n_layers = self.config.n_layers

    def forward(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Every tap of the model: `embed`, then `layers.{i}.{tap}`, then `output_norm` and `logits`."""
        x = self.embed(tokens)
        taps = {"embed": x}
        for i in range(self.n_layers):
            layer = self.layer(i, x)
            taps |= {f"layers.{i}.{name}": tap for name, tap in layer.items()}
            x = layer["out"]
        return taps | self.head(x)

    def embed(self, tokens: Sequence[int]) -> np.ndarray:
        """Token ids (T,) -> (T, D)."""
        return self.file.tensor("token_embd.weight", np.asarray(tokens))

    def layer(self, i: int, x: np.ndarray) -> dict[str, np.ndarray]:
        """All taps of layer i, in the order of computation, for positions 0..T-1. x and `out` are (T, D)."""
        residual = Tensor(np.array(x, dtype=np.float32))
        attn_norm = self.rms_norm(residual, f"blk.{i}.attn_norm")
        attention = self.attention(i, attn_norm)
        residual = (residual + attention["attn_out"]).realize()
        ffn_norm = self.rms_norm(residual, f"blk.{i}.ffn_norm")
        if i < self.config.first_k_dense_replace:
            ffn = {"ffn_out": self.mlp(ffn_norm, f"blk.{i}", "")}
        else:
            ffn = self.mixture_of_experts(i, ffn_norm)
        out = residual + sum(ffn[name] for name in ("ffn_out", "experts_out", "shared_out") if name in ffn)
        taps = {"attn_norm": attn_norm, **attention, "ffn_norm": ffn_norm, **ffn, "out": out}
        return {name: tap.numpy() for name, tap in taps.items()}

    def head(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """(T, D) -> `output_norm` (T, D) and `logits` (T, vocabulary), some rows of the output matrix at a time."""
        output_norm = self.rms_norm(Tensor(np.array(x, dtype=np.float32)), "output_norm")
        name = "output.weight" if "output.weight" in self.file else "token_embd.weight"
        starts = range(0, self.file.shape(name)[0], VOCABULARY_CHUNK)
        rows = (self.file.tensor(name, slice(start, start + VOCABULARY_CHUNK)) for start in starts)
        logits = np.concatenate([linear(output_norm, weight).numpy() for weight in rows], axis=-1)
        return {"output_norm": output_norm.numpy(), "logits": logits}

    # Attention

    def attention(self, i: int, x: Tensor) -> dict[str, Tensor]:
        """Multi-head latent attention, unabsorbed: (T, D) -> taps `q`, `latent`, `k_pe`, `attn_out` (T, D)."""
        config, blk, length = self.config, f"blk.{i}", int(x.shape[0])
        nope, heads = config.qk_nope_head_dim, config.n_heads

        q = self.queries(blk, x).reshape(length, heads, config.qk_head_dim)
        q = q[..., :nope].cat(rotate(q[..., nope:], *cos_sin(config, length)), dim=-1).realize()  # (T, H, N + P)

        kv_a = self.project(x, f"{blk}.attn_kv_a_mqa")  # (T, R + P)
        latent = self.rms_norm(kv_a[:, : config.kv_lora_rank], f"{blk}.attn_kv_a_norm")  # (T, R)
        k_pe = kv_a[:, config.kv_lora_rank :].reshape(length, 1, config.qk_rope_head_dim)  # one for all heads
        k_pe = rotate(k_pe, *cos_sin(config, length)).realize()  # (T, 1, P)

        k_b, v_b = self.key_and_value_weights(blk)
        k_nope = (latent @ Tensor(k_b)).realize()  # (T, R) @ (H, R, N) -> (H, T, N)
        v = (latent @ Tensor(v_b).transpose(1, 2)).realize()  # (T, R) @ (H, R, V) -> (H, T, V)
        k = k_nope.cat(k_pe.transpose(0, 1).expand(heads, -1, -1), dim=-1).realize()  # (H, T, N + P)

        scores = q.transpose(0, 1) @ k.transpose(1, 2) * softmax_scale(config)  # (H, T, T)
        future = Tensor.ones(length, length, dtype="bool").triu(1)
        probabilities = softmax(future.where(float("-inf"), scores))  # (H, T, T)
        heads_out = (probabilities @ v).transpose(0, 1).reshape(length, heads * config.v_head_dim).realize()
        attn_out = self.project(heads_out, f"{blk}.attn_output")
        return {"q": q, "latent": latent, "k_pe": k_pe.squeeze(1), "attn_out": attn_out}

    def queries(self, blk: str, x: Tensor) -> Tensor:
        """(T, D) -> (T, H * (N + P)), through a low rank where the model has one."""
        if self.config.q_lora_rank is None:
            return self.project(x, f"{blk}.attn_q")
        q_a = self.rms_norm(self.project(x, f"{blk}.attn_q_a"), f"{blk}.attn_q_a_norm")
        return self.project(q_a, f"{blk}.attn_q_b")

    def key_and_value_weights(self, blk: str) -> tuple[np.ndarray, np.ndarray]:
        """What expands a latent row: k_b (H, R, N) and v_b (H, V, R).

        New files hold just these two (k_b transposed, ready for absorption), with the axis of heads or flattened to
        (H * R, N) and (H * V, R). Old files hold `attn_kv_b`: for every head N rows of keys, then V rows of values.
        """
        c = self.config
        if f"{blk}.attn_kv_b.weight" in self.file:
            kv_b = self.file.tensor(f"{blk}.attn_kv_b.weight").reshape(c.n_heads, -1, c.kv_lora_rank)
            return kv_b[:, : c.qk_nope_head_dim].transpose(0, 2, 1), kv_b[:, c.qk_nope_head_dim :]
        columns = self.file.shape(f"{blk}.attn_k_b.weight")[-1], self.file.shape(f"{blk}.attn_v_b.weight")[-1]
        if columns != (c.qk_nope_head_dim, c.kv_lora_rank):
            raise ValueError(f"{blk}: attn_k_b and attn_v_b have {columns} columns, neither known layout")
        k_b = self.file.tensor(f"{blk}.attn_k_b.weight").reshape(c.n_heads, c.kv_lora_rank, c.qk_nope_head_dim)
        v_b = self.file.tensor(f"{blk}.attn_v_b.weight").reshape(c.n_heads, c.v_head_dim, c.kv_lora_rank)
        return k_b, v_b

    # Feed-forward

    def mixture_of_experts(self, i: int, x: Tensor) -> dict[str, Tensor]:
        """(T, D) -> taps of the router, `experts_out` (T, D) and, where the model has it, `shared_out` (T, D)."""
        blk = f"blk.{i}"
        router_logits = self.project(x, f"{blk}.ffn_gate_inp")
        experts, expert_weights, router_margin = self.route(blk, router_logits)

        # Each expert that any token chose sees all tokens; those that did not choose it give it weight 0.
        # With one shape for all experts, tinygrad compiles once.
        experts_out = Tensor.zeros(*x.shape).contiguous()
        for expert in np.unique(experts).tolist():
            weight = np.where(experts == expert, expert_weights, 0).sum(axis=-1, keepdims=True)  # (T, 1)
            expert_out = swiglu(x, *self.expert_weights(blk, expert))
            experts_out = (experts_out + Tensor(weight) * expert_out).realize()

        taps = {
            "router_logits": router_logits,
            "experts": Tensor(experts),
            "expert_weights": Tensor(expert_weights),
            "router_margin": Tensor(router_margin),
            "experts_out": experts_out,
        }
        if self.config.n_shared_experts:  # they lie side by side, as one MLP of width n_shared_experts * F
            taps["shared_out"] = self.mlp(x, blk, "_shexp")
        return taps

    def route(self, blk: str, router_logits: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(T, E) logits -> experts (T, K) best first, their weights (T, K), and the margin (T,) of the choice.

        The bias takes part in choosing only. Exact ties go to the lower expert. The margin is the selection score of
        the last one chosen above the first one left out. Where the weights are normalised, llama.cpp divides by at
        least 6.1e-5 and transformers adds 1e-20 to the sum; neither can be seen in a sum of sigmoids of real logits.
        """
        k = self.config.num_experts_per_tok
        score = Tensor.sigmoid if self.config.scoring_func == "sigmoid" else softmax
        scores = score(router_logits).numpy()  # (T, E)
        bias = f"{blk}.exp_probs_b.bias"
        selection = scores + self.file.tensor(bias) if bias in self.file else scores
        best_first = np.argsort(-selection, axis=-1, kind="stable")
        experts = best_first[:, :k]
        expert_weights = np.take_along_axis(scores, experts, axis=-1)
        if self.config.norm_topk_prob:
            expert_weights /= expert_weights.sum(axis=-1, keepdims=True)
        expert_weights *= np.float32(self.config.routed_scaling_factor)
        ranked = np.take_along_axis(selection, best_first, axis=-1)
        return experts.astype(np.int32), expert_weights, ranked[:, k - 1] - ranked[:, k]

    def expert_weights(self, blk: str, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """gate (F, D), up (F, D) and down (D, F) of one expert. Some files fuse the first two, gate before up."""
        down = self.file.tensor(f"{blk}.ffn_down_exps.weight", expert)
        if f"{blk}.ffn_gate_up_exps.weight" in self.file:
            gate, up = np.split(self.file.tensor(f"{blk}.ffn_gate_up_exps.weight", expert), 2)
            return gate, up, down
        gate = self.file.tensor(f"{blk}.ffn_gate_exps.weight", expert)
        return gate, self.file.tensor(f"{blk}.ffn_up_exps.weight", expert), down

    def mlp(self, x: Tensor, blk: str, suffix: str) -> Tensor:
        """The dense MLP of a layer, or with `_shexp` its shared experts."""
        return swiglu(x, *(self.file.tensor(f"{blk}.ffn_{part}{suffix}.weight") for part in ("gate", "up", "down")))

    def project(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self.file.tensor(f"{name}.weight"))

    def rms_norm(self, x: Tensor, name: str) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""
        weight = Tensor(self.file.tensor(f"{name}.weight"))
        mean_square = x.square().mean(axis=-1, keepdim=True)
        return (x * (mean_square + self.config.rms_norm_eps).rsqrt() * weight).realize()


def linear(x: Tensor, weight: np.ndarray) -> Tensor:
    """(..., in) @ (out, in)^T."""
    return (x @ Tensor(weight).T).realize()


def softmax(x: Tensor) -> Tensor:
    """exp(x) / sum(exp(x)) over the last axis."""
    exp = (x - x.max(axis=-1, keepdim=True)).exp().realize()  # once: otherwise tinygrad computes it again in the sum
    return (exp / exp.sum(axis=-1, keepdim=True)).realize()


def swiglu(x: Tensor, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    return linear((linear(x, gate).silu() * linear(x, up)).realize(), down)


def rotate(x: Tensor, cos: np.ndarray, sin: np.ndarray) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of x (T, heads, P) by the angles of each position, cos and sin (T, P/2)."""
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    c, s = Tensor(cos).unsqueeze(1), Tensor(sin).unsqueeze(1)  # (T, 1, P/2): the same for every head
    return Tensor.stack(even * c - odd * s, even * s + odd * c, dim=-1).flatten(-2)
