"""Write a small GGUF file of this architecture with seeded random weights: raw material for tests and trials.

    python -m glm_mlx.make_tiny tiny.gguf --type Q4_K --override output=Q6_K --mtp

The weights are random blocks of the asked type, so every quant, scale and minimum of a format takes many values; their
scales are set so that activations stay near 1. The text that such a model writes means nothing.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glm_mlx.command import Parser, run, whole
from glm_mlx.errors import InputError
from glm_mlx.tiny_vocab import tiny_vocabulary
from kernels.shown import shown

Layout = Literal["split", "flat", "kv_b"]
Array: TypeAlias = npt.NDArray[np.generic]


@dataclass(frozen=True)
class TinySpec:
    """Dimensions of the model, under the configuration's names, and the variant of the file format."""

    layers: int = 3
    hidden_size: int = 64
    num_heads: int = 4
    q_lora_rank: int = 64  # 0: one q projection, as in DeepSeek-V2-Lite
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    intermediate_size: int = 128
    first_k_dense: int = 1
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_shared_experts: int = 1
    moe_intermediate_size: int = 64
    context_length: int = 4096
    type: str = "Q4_0"  # of every matrix that no override names
    overrides: Mapping[str, str] = field(default_factory=dict)  # beginning of a tensor's name -> type
    gating: Literal["sigmoid", "softmax"] = "sigmoid"
    write_gating: bool = True  # older files lack the key
    yarn: bool = False
    layout: Layout = "split"  # of k_b and v_b: 3-D, 2-D, or the unsplit kv_b of old files
    fused_gate_up: bool = False
    tied: bool = False  # no output.weight
    mtp: bool = False
    seed: int = 0


GLM_FLASH = TinySpec(  # the real widths; few layers, because 47 take 17 GB
    layers=2,
    hidden_size=2048,
    num_heads=20,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=256,
    intermediate_size=10240,
    num_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=1536,
    context_length=202752,
)

# Standard deviation of the quants of a type when their bits are uniform, as multiples of the block's scale.
_SPREAD = {
    "Q4_0": 4.6,
    "Q5_0": 9.2,
    "Q8_0": 73.9,
    "Q4_1": 4.6,
    "Q5_1": 9.2,
    "Q4_K": 4.6 * 36.4,
    "Q5_K": 9.2 * 36.4,
    "Q6_K": 18.5 * 73.9,
    "IQ4_NL": 69.0,
}
_SCALE_AT = {"Q6_K": 208}  # byte of the float16 scale in a block; 0 in the other types
_MIN_AT = {"Q4_1": (2, -7.5), "Q5_1": (2, -15.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}  # byte, times the scale


def random_blocks(rng: np.random.Generator, kind: str, shape: tuple[int, ...], std: float) -> Array:
    """Random data of a type: (..., bytes of a row) uint8 with values of about this standard deviation."""
    if kind in ("F32", "F16", "BF16"):
        values = rng.standard_normal(shape, np.float32) * np.float32(std)
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16) if kind == "F16" else values
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, block_bytes), np.uint8)
    scale = rng.uniform(0.5, 1.5, blocks.shape[:-1]) * rng.choice([-1, 1], blocks.shape[:-1]) * std / _SPREAD[kind]
    _put_half(blocks, _SCALE_AT.get(kind, 0), scale)
    if kind in _MIN_AT:
        at, factor = _MIN_AT[kind]
        _put_half(blocks, at, scale * factor)
    return blocks.reshape(*shape[:-1], -1)


def _put_half(blocks: npt.NDArray[np.uint8], at: int, values: npt.NDArray[np.float64]) -> None:
    blocks[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)


def tensor_shapes(spec: TinySpec, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """GGUF names and numpy shapes, in the order of published files."""
    yield "token_embd.weight", (vocab, spec.hidden_size)
    yield "output_norm.weight", (spec.hidden_size,)
    if not spec.tied:
        yield "output.weight", (vocab, spec.hidden_size)
    for i in range(spec.layers + spec.mtp):
        for name, shape in _layer(spec, is_dense=i < spec.first_k_dense):
            yield f"blk.{i}.{name}", shape
    if spec.mtp:
        prefix = f"blk.{spec.layers}.nextn."
        yield prefix + "eh_proj.weight", (spec.hidden_size, 2 * spec.hidden_size)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            yield f"{prefix}{norm}.weight", (spec.hidden_size,)


def _layer(spec: TinySpec, is_dense: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, latent = spec.hidden_size, spec.num_heads, spec.kv_lora_rank
    nope, rope, value = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim
    yield "attn_norm.weight", (hidden,)
    if spec.q_lora_rank:
        yield "attn_q_a.weight", (spec.q_lora_rank, hidden)
        yield "attn_q_a_norm.weight", (spec.q_lora_rank,)
        yield "attn_q_b.weight", (heads * (nope + rope), spec.q_lora_rank)
    else:
        yield "attn_q.weight", (heads * (nope + rope), hidden)
    yield "attn_kv_a_mqa.weight", (latent + rope, hidden)
    yield "attn_kv_a_norm.weight", (latent,)
    if spec.layout == "kv_b":
        yield "attn_kv_b.weight", (heads * (nope + value), latent)
    elif spec.layout == "flat":
        yield "attn_k_b.weight", (heads * latent, nope)
        yield "attn_v_b.weight", (heads * value, latent)
    else:
        yield "attn_k_b.weight", (heads, latent, nope)
        yield "attn_v_b.weight", (heads, value, latent)
    yield "attn_output.weight", (hidden, heads * value)
    yield "ffn_norm.weight", (hidden,)
    if is_dense:
        yield "ffn_gate.weight", (spec.intermediate_size, hidden)
        yield "ffn_up.weight", (spec.intermediate_size, hidden)
        yield "ffn_down.weight", (hidden, spec.intermediate_size)
        return
    experts, width, shared = spec.num_experts, spec.moe_intermediate_size, spec.num_shared_experts
    yield "ffn_gate_inp.weight", (experts, hidden)
    if spec.gating == "sigmoid":
        yield "exp_probs_b.bias", (experts,)
    if spec.fused_gate_up:
        yield "ffn_gate_up_exps.weight", (experts, 2 * width, hidden)
    else:
        yield "ffn_gate_exps.weight", (experts, width, hidden)
        yield "ffn_up_exps.weight", (experts, width, hidden)
    yield "ffn_down_exps.weight", (experts, hidden, width)
    if shared:
        yield "ffn_gate_shexp.weight", (shared * width, hidden)
        yield "ffn_up_shexp.weight", (shared * width, hidden)
        yield "ffn_down_shexp.weight", (hidden, shared * width)


def type_of(spec: TinySpec, name: str, shape: tuple[int, ...]) -> str:
    """The type a tensor gets: the last override that begins its name (the layer aside), else `spec.type`.

    Where the rows are no multiple of the type's block, Q8_0 or F16, as llama-quantize falls back.
    """
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    kind = spec.type
    for beginning, override in spec.overrides.items():
        kind = override if re.match(rf"(blk\.\d+\.)?{re.escape(beginning)}", name) else kind
    if shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        return "Q8_0" if shape[-1] % 32 == 0 else "F16"
    return kind


def make_tiny(path: str | Path, spec: TinySpec = TinySpec(), split_max_tensors: int = 0) -> Path:
    """Write the file (or its parts) and return the path to open. The same spec gives the same bytes."""
    vocabulary = tiny_vocabulary()
    name = f"a tiny model with random weights (seed {spec.seed})"
    vocab = len(vocabulary["tokenizer.ggml.tokens"])
    return write_model(Path(path), spec, name, vocabulary, _random_tensors(spec, vocab), split_max_tensors)


def _random_tensors(spec: TinySpec, vocab: int) -> Iterator[tuple[str, str, Array]]:
    rng = np.random.default_rng(spec.seed)
    for name, shape in tensor_shapes(spec, vocab):
        kind = type_of(spec, name, shape)
        if name.endswith("norm.weight"):
            data: Array = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        elif name.endswith("exp_probs_b.bias"):
            data = (9.03 + 0.02 * rng.standard_normal(shape)).astype(np.float32)  # as reported of the real model
        else:
            data = random_blocks(rng, kind, shape, std=1.0 if name.startswith("token_embd") else shape[-1] ** -0.5)
        yield name, kind, data


def write_model(
    path: Path,
    spec: TinySpec,
    name: str,
    vocabulary: Mapping[str, object],
    tensors: Iterable[tuple[str, str, Array]],
    split_max_tensors: int = 0,
) -> Path:
    """Write a GGUF file of these tensors (GGUF name, type, data or its blocks) and return the path to open."""
    writer = GGUFWriter(path, "deepseek2", split_max_tensors=split_max_tensors)
    writer.add_name(name)
    _add(writer, {f"deepseek2.{key}": value for key, value in metadata(spec).items()})
    _add(writer, vocabulary)
    for tensor, kind, data in tensors:
        writer.add_tensor(tensor, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split_max_tensors else path


def metadata(spec: TinySpec) -> dict[str, int | float | str]:
    """The keys of the architecture, without its prefix."""
    absorbed = spec.layout != "kv_b"
    qk_head_dim = spec.qk_nope_head_dim + spec.qk_rope_head_dim
    keys: dict[str, int | float | str] = {
        "block_count": spec.layers + spec.mtp,
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": 1 if absorbed else spec.num_heads,
        "attention.kv_lora_rank": spec.kv_lora_rank,
        "attention.key_length": spec.kv_lora_rank + spec.qk_rope_head_dim if absorbed else qk_head_dim,
        "attention.value_length": spec.kv_lora_rank if absorbed else spec.v_head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": spec.qk_rope_head_dim,
        "rope.freq_base": 1e6,
        "leading_dense_block_count": spec.first_k_dense,
        "expert_count": spec.num_experts,
        "expert_used_count": spec.num_experts_per_tok,
        "expert_shared_count": spec.num_shared_experts,
        "expert_feed_forward_length": spec.moe_intermediate_size,
        "expert_weights_scale": 1.8 if spec.gating == "sigmoid" else 1.0,
        "expert_weights_norm": spec.gating == "sigmoid",
    }
    if spec.q_lora_rank:
        keys["attention.q_lora_rank"] = spec.q_lora_rank
    if absorbed:
        keys |= {"attention.key_length_mla": qk_head_dim, "attention.value_length_mla": spec.v_head_dim}
    if spec.write_gating:
        keys["expert_gating_func"] = 2 if spec.gating == "sigmoid" else 1
    if spec.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": spec.context_length // 40 or 1,
            "rope.scaling.yarn_log_multiplier": 0.0707,
        }
    if spec.mtp:
        keys["nextn_predict_layers"] = 1
    return keys


def _add(writer: GGUFWriter, keys: Mapping[str, object]) -> None:
    for key, value in keys.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, str(value))


def main(argv: list[str] | None = None) -> int:
    types = sorted([*_SPREAD, "F16", "BF16", "F32"])
    parser = Parser(prog="python -m glm_mlx.make_tiny", description=__doc__.splitlines()[0])
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the weights (default 0)")
    parser.add_argument(
        "--full-width", action="store_true", help="GLM-4.7-Flash's real widths, one dense and one MoE layer"
    )
    parser.add_argument("--type", default="Q4_0", choices=types, help="of every matrix")
    parser.add_argument("--override", action="append", default=[], metavar="NAME=TYPE", help="of tensors that begin so")
    parser.add_argument("--mtp", action="store_true", help="add a multi-token-prediction layer")
    parser.add_argument("--layout", choices=("split", "flat", "kv_b"), default="split", help="of attn_k_b and attn_v_b")
    args = parser.parse_args(argv)
    base = GLM_FLASH if args.full_width else TinySpec()
    overrides = dict(item.partition("=")[::2] for item in args.override)
    for name, kind in overrides.items():
        if not name or kind not in types:
            parser.error(f"--override {name}={kind} is not NAME=TYPE with a type of {', '.join(types)}")
    spec = TinySpec(
        **{
            **vars(base),
            "type": args.type,
            "overrides": overrides,
            "mtp": args.mtp,
            "layout": args.layout,
            "seed": args.seed,
        }
    )
    try:
        make_tiny(args.path, spec)
    except OSError as error:
        raise InputError(f"cannot write {shown(args.path)}: {error.strerror}; name another file") from None
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
