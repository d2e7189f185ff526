"""Small models with random weights of the compositions that published files have."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from glm_mlx import weights as weights_module
from glm_mlx.config import Config
from glm_mlx.gguf import GGUFFile
from glm_mlx.make_tiny import GLM_FLASH, TinySpec
from kernels.planes import Weight

WIDTHS = replace(GLM_FLASH, intermediate_size=2048, num_experts=8)  # GLM-4.7-Flash's where kernels see them
NARROW = TinySpec(  # rows that K-quants fit into
    layers=2, hidden_size=256, q_lora_rank=256, kv_lora_rank=256, moe_intermediate_size=256, intermediate_size=256
)


@dataclass(frozen=True)
class Composition:
    """What a file is made of, as changes to a `TinySpec`, and the activations that are of interest for it."""

    name: str
    changes: Mapping[str, Any]
    dtypes: tuple[mx.Dtype, ...] = (mx.bfloat16,)


_ALL = (mx.bfloat16, mx.float16, mx.float32)
_UNSLOTH = {
    **dict.fromkeys(("attn_k_b", "attn_v_b", "attn_kv_a_mqa"), "Q8_0"),
    **dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), "Q5_K"),
    **dict.fromkeys(("ffn_down_shexp", "output.weight"), "Q6_K"),
}
_DEEPSEEK = {"q_lora_rank": 0, "gating": "softmax", "yarn": True, "num_shared_experts": 2}
# Where types differ within a file, as llama-quantize and Unsloth mix them; then every other type that stays packed.
COMPOSITIONS = (
    Composition("Q4_0", {"type": "Q4_0", "overrides": {"output.weight": "Q6_K"}}, _ALL),
    Composition("Q4_0, imatrix", {"type": "Q4_0", "overrides": {"output.weight": "Q6_K", "ffn_down": "Q4_1"}}, _ALL),
    Composition(
        "Q4_K_M",
        {"type": "Q4_K", "overrides": {"output.weight": "Q6_K", "ffn_down": "Q6_K", "attn_k_b": "Q5_0"}},
        _ALL,
    ),
    Composition("Q4_K", {"type": "Q4_K"}, _ALL),
    Composition("Unsloth Q4_0", {"type": "Q4_0", "overrides": {**_UNSLOTH, "token_embd": "Q4_K"}}, _ALL),
    Composition("Unsloth Q4_K_M", {"type": "Q4_K", "overrides": _UNSLOTH}, _ALL),
    Composition("Q8_0", {"type": "Q8_0"}, _ALL),
    Composition("DeepSeek-V2-Lite Q4_0", {"type": "Q4_0", **_DEEPSEEK}),
    *(Composition(kind, {"type": kind}) for kind in ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "IQ4_NL", "F16", "BF16", "F32")),
)


def read_small(path: str | Path) -> tuple[Config, dict[str, Weight]]:
    """A small file, without a progress bar and without its tokenizer."""
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    return cfg, weights_module.load(gguf, cfg, weights_module.plan(gguf, cfg), lambda n: None)
