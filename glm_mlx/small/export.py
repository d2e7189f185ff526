"""Write a trained checkpoint as GGUF: `python -m glm_mlx.small.export --run runs/small --out small.gguf`

Types as in published files: Q4_0, with k_b, v_b and kv_a in Q8_0, the output in Q6_K, norms and router in F32.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from glm_mlx.command import Parser, run
from glm_mlx.errors import InputError
from glm_mlx.make_tiny import TinySpec, tensor_shapes, type_of, write_model
from glm_mlx.small.train import SMALL

NAME = "the small model of glm-mlx"
TYPES = {"attn_k_b": "Q8_0", "attn_v_b": "Q8_0", "attn_kv_a_mqa": "Q8_0", "output.weight": "Q6_K"}
SAMPLING = {"general.sampling.temp": 0.7, "general.sampling.top_p": 0.9}

# The last parts of GGUF's names -> ours.
NAMES = {
    "token_embd.weight": "embed_tokens",
    "output_norm.weight": "norm",
    "output.weight": "lm_head",
    "attn_norm.weight": "input_layernorm",
    "attn_q_a.weight": "self_attn.q_a_proj",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm",
    "attn_q_b.weight": "self_attn.q_b_proj",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm",
    "attn_k_b.weight": "self_attn.k_b",
    "attn_v_b.weight": "self_attn.v_b",
    "attn_output.weight": "self_attn.o_proj",
    "ffn_norm.weight": "post_attention_layernorm",
    "ffn_gate.weight": "mlp.gate_proj",
    "ffn_up.weight": "mlp.up_proj",
    "ffn_down.weight": "mlp.down_proj",
    "ffn_gate_inp.weight": "mlp.gate",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    "ffn_gate_shexp.weight": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp.weight": "mlp.shared_experts.up_proj",
    "ffn_down_shexp.weight": "mlp.shared_experts.down_proj",
    "nextn.eh_proj.weight": "nextn.eh_proj",
    "nextn.enorm.weight": "nextn.enorm",
    "nextn.hnorm.weight": "nextn.hnorm",
    "nextn.shared_head_norm.weight": "nextn.shared_head_norm",
}


def quantize(values: npt.NDArray[np.float32], kind: str) -> npt.NDArray[Any]:
    """Blocks of a type: (..., bytes of a row) uint8, or the values as they are for F32."""
    if kind == "F32":
        return values
    if kind == "Q6_K":
        return quantize_q6_k(values)
    return gguf.quants.quantize(values, GGMLQuantizationType[kind])


def quantize_q6_k(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Q6_K, which `gguf` can't write: round to nearest, in the layout of llama.cpp's `block_q6_K`."""
    blocks = values.reshape(-1, 16, 16)  # super-blocks of 16 groups of 16
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    wanted = extreme / -32  # so that the value of the largest magnitude becomes -32 exactly
    d = (np.abs(wanted).max(axis=-1, keepdims=True) / 127).astype(np.float16)
    wide = d.astype(np.float32)
    scales = np.where(wide > 0, np.round(wanted / np.where(wide > 0, wide, 1)), 0).clip(-128, 127).astype(np.int8)
    step = (wide * scales)[..., None]
    nearest = np.where(step != 0, np.round(blocks / np.where(step != 0, step, 1)), 0).clip(-32, 31)
    q = (nearest + 32).astype(np.uint8).reshape(-1, 2, 4, 32)  # halves of 128: four rows of 32
    low, high = q & 0x0F, q >> 4
    ql = low[:, :, :2] | (low[:, :, 2:] << 4)
    qh = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = [ql.reshape(len(q), -1), qh.reshape(len(q), -1), scales.view(np.uint8), d.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(*values.shape[:-1], -1)


def export(run: Path, out: Path, spec: TinySpec = SMALL, types: dict[str, str] | None = None) -> Path:
    """Write the checkpoint of a training run; `types` as `TinySpec.overrides`, by default those of published files."""
    checkpoint = run / "checkpoint.safetensors"
    if not checkpoint.exists():
        raise InputError(f"there is no {checkpoint}; train first: python -m glm_mlx.small.train --out {run}")
    vocabulary = json.loads((run / "vocabulary.json").read_text()) | SAMPLING
    spec = TinySpec(**{**vars(spec), "overrides": TYPES if types is None else types})
    return write_model(out, spec, NAME, vocabulary, _tensors(spec, mx.load(str(checkpoint)), vocabulary))


def _tensors(spec: TinySpec, state: Any, vocabulary: dict[str, Any]) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    for name, shape in tensor_shapes(spec, len(vocabulary["tokenizer.ggml.tokens"])):
        prefix = ""
        last = name
        if name.startswith("blk."):
            _, layer, last = name.split(".", 2)
            prefix = f"layers.{layer}."
        key = f"biases.{prefix}" if last == "exp_probs_b.bias" else f"params.{prefix}{NAMES[last]}"
        values = np.array(state[key].astype(mx.float32))
        assert values.shape == shape, name
        kind = type_of(spec, name, shape)
        yield name, kind, quantize(values, kind)


def main() -> int:
    parser = Parser(prog="python -m glm_mlx.small.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="of the training run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .gguf file to write")
    parser.add_argument("--float", action="store_true", help="every matrix in F32, to measure what quantisation costs")
    args = parser.parse_args()
    export(args.run, args.out, types={"": "F32"} if args.float else None)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
