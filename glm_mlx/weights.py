"""From a GGUF file to named weights: the one place that renames, splits and repacks tensors.

Names on our side are the checkpoint's (transformers `Glm4MoeLite`): `layers.3.self_attn.q_a_proj`. Everything that the
header says is checked against the configuration before the first byte of data is read.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from gguf.constants import GGMLQuantizationType

from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile, TensorInfo
from glm_mlx.memory import Tensor
from glm_mlx.packing import Read, pack_read, part_of_each
from kernels.planes import QUANT_TYPES, Weight, dequantize_ops
from kernels.qmv import with_affine, with_values
from kernels.shown import shown

PROGRESS_BYTES = 1 << 23  # of a tensor that are read between two reports
DENSE_TYPES = ("F32", "F16", "BF16")
EXPANDED_TYPES = ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "MXFP4")
VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Expected:
    """A tensor that the configuration asks for: our name, GGUF's, and the shape in numpy order."""

    name: str
    source: str
    shape: tuple[int, ...]
    optional: bool = False


def expected_tensors(cfg: Config, gguf: GGUFFile) -> Iterator[Expected]:
    """Every tensor of the model, in the layout that this file has; MTP layers are left out.

    A generator, so that a header with a billion layers fails at the first one that is missing.
    """
    yield Expected("embed_tokens", "token_embd.weight", (cfg.vocab_size, cfg.hidden_size))
    yield Expected("norm", "output_norm.weight", (cfg.hidden_size,))
    yield Expected("lm_head", "output.weight", (cfg.vocab_size, cfg.hidden_size), optional=True)
    for i in range(cfg.num_layers):
        is_dense = i < cfg.first_k_dense
        for part in (_attention(cfg, gguf, i), _mlp(cfg) if is_dense else _moe(cfg, gguf, i)):
            for tensor in part:
                source = f"blk.{i}.{tensor.source}"
                yield Expected(f"layers.{i}.{tensor.name}", source, tensor.shape, tensor.optional)


def _attention(cfg: Config, gguf: GGUFFile, i: int) -> Iterator[Expected]:
    heads, hidden, latent = cfg.num_heads, cfg.hidden_size, cfg.kv_lora_rank
    yield Expected("input_layernorm", "attn_norm.weight", (hidden,))
    if cfg.q_lora_rank is None:
        yield Expected("self_attn.q_proj", "attn_q.weight", (heads * cfg.qk_head_dim, hidden))
    else:
        yield Expected("self_attn.q_a_proj", "attn_q_a.weight", (cfg.q_lora_rank, hidden))
        yield Expected("self_attn.q_a_layernorm", "attn_q_a_norm.weight", (cfg.q_lora_rank,))
        yield Expected("self_attn.q_b_proj", "attn_q_b.weight", (heads * cfg.qk_head_dim, cfg.q_lora_rank))
    yield Expected("self_attn.kv_a_proj", "attn_kv_a_mqa.weight", (cfg.cache_dim, hidden))
    yield Expected("self_attn.kv_a_layernorm", "attn_kv_a_norm.weight", (latent,))
    if f"blk.{i}.attn_kv_b.weight" in gguf.tensors:  # files of before the MLA split
        yield Expected("self_attn.kv_b", "attn_kv_b.weight", (heads, cfg.qk_nope_head_dim + cfg.v_head_dim, latent))
    else:
        yield Expected("self_attn.k_b", "attn_k_b.weight", (heads, latent, cfg.qk_nope_head_dim))
        yield Expected("self_attn.v_b", "attn_v_b.weight", (heads, cfg.v_head_dim, latent))
    yield Expected("self_attn.o_proj", "attn_output.weight", (hidden, heads * cfg.v_head_dim))
    yield Expected("post_attention_layernorm", "ffn_norm.weight", (hidden,))


def _mlp(cfg: Config) -> Iterator[Expected]:
    yield Expected("mlp.gate_proj", "ffn_gate.weight", (cfg.intermediate_size, cfg.hidden_size))
    yield Expected("mlp.up_proj", "ffn_up.weight", (cfg.intermediate_size, cfg.hidden_size))
    yield Expected("mlp.down_proj", "ffn_down.weight", (cfg.hidden_size, cfg.intermediate_size))


def _moe(cfg: Config, gguf: GGUFFile, i: int) -> Iterator[Expected]:
    experts, width, hidden = cfg.num_experts, cfg.moe_intermediate_size, cfg.hidden_size
    yield Expected("mlp.gate", "ffn_gate_inp.weight", (experts, hidden))
    yield Expected("mlp.e_score_correction_bias", "exp_probs_b.bias", (experts,), optional=True)
    if f"blk.{i}.ffn_gate_up_exps.weight" in gguf.tensors:
        yield Expected("mlp.experts.gate_up_proj", "ffn_gate_up_exps.weight", (experts, 2 * width, hidden))
    else:
        yield Expected("mlp.experts.gate_proj", "ffn_gate_exps.weight", (experts, width, hidden))
        yield Expected("mlp.experts.up_proj", "ffn_up_exps.weight", (experts, width, hidden))
    yield Expected("mlp.experts.down_proj", "ffn_down_exps.weight", (experts, hidden, width))
    if cfg.num_shared_experts:
        shared = cfg.num_shared_experts * width
        yield Expected("mlp.shared_experts.gate_proj", "ffn_gate_shexp.weight", (shared, hidden))
        yield Expected("mlp.shared_experts.up_proj", "ffn_up_shexp.weight", (shared, hidden))
        yield Expected("mlp.shared_experts.down_proj", "ffn_down_shexp.weight", (hidden, shared))


def plan(gguf: GGUFFile, cfg: Config) -> list[tuple[Expected, TensorInfo]]:
    """What is to be loaded, in the order of the file. Reads no data.

    Raises InputError for a tensor that is missing, has another shape than the metadata say, a type that can't be read,
    or no place in the model: to leave one out without a word would be to run another model.
    """
    path, pairs = shown(gguf.path), []
    for expected in expected_tensors(cfg, gguf):
        info = gguf.tensors.get(expected.source)
        if info is None:
            if expected.optional:
                continue
            raise InputError(f"{path} has no tensor {expected.source}; download a complete conversion of this model")
        flat = (*_flattened(expected.shape[:-1]), expected.shape[-1])
        if info.shape not in (expected.shape, flat):
            raise InputError(
                f"{path}: tensor {info.name} has the shape {info.shape}, the metadata ask for {expected.shape}; "
                "the file is damaged"
            )
        known = DENSE_TYPES if len(expected.shape) == 1 else (*DENSE_TYPES, *QUANT_TYPES, *EXPANDED_TYPES)
        if info.type.name not in known:
            raise InputError(
                f"{path}: tensor {info.name} has the type {info.type.name}, which can't be read here; "
                f"use a file with {', '.join(known)}"
            )
        pairs.append((expected, info))
    planned = {info.name for _, info in pairs}
    for name in gguf.tensors:
        if name not in planned and not _is_spare(name, cfg):
            raise InputError(
                f"{path} holds the tensor {shown(name, 80)}, which has no place in a model of {cfg.num_layers} layers "
                "with these metadata; use another GGUF file of this model"
            )
    return sorted(pairs, key=lambda pair: (pair[1].part, pair[1].offset))


def _is_spare(name: str, cfg: Config) -> bool:
    """MTP layers, and k_b and v_b in files that have kv_b beside them."""
    block = re.fullmatch(r"blk\.([0-9]{1,9})\.(.+)", name)
    if block is None:
        return False
    if int(block[1]) < cfg.num_layers:
        return block[2] in ("attn_k_b.weight", "attn_v_b.weight")
    return int(block[1]) < cfg.num_layers + cfg.num_mtp_layers


def _flattened(rows: tuple[int, ...]) -> tuple[int, ...]:
    """k_b and v_b stand in some files with heads and rows as one dimension."""
    product = 1
    for n in rows:
        product *= n
    return (product,) if rows else ()


def expanded_types(pairs: list[tuple[Expected, TensorInfo]]) -> list[str]:
    """The types of this file that are held as float32 because they have no planes."""
    return sorted({info.type.name for _, info in pairs if info.type.name in EXPANDED_TYPES})


def tensors_of(pairs: list[tuple[Expected, TensorInfo]]) -> list[Tensor]:
    """What the memory plan counts."""
    return [Tensor(expected.source, info.type, expected.shape) for expected, info in pairs]


def load(
    gguf: GGUFFile,
    cfg: Config,
    pairs: list[tuple[Expected, TensorInfo]],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Weight]:
    """Read, repack and name the tensors of `plan`, on all cores. `progress` gets bytes of the file as they are done.

    No tensor stands in memory twice: packing writes into the final arrays, piece by piece. Raises InputError where the
    file has become shorter.
    """

    def read(pair: tuple[Expected, TensorInfo]) -> list[tuple[str, Weight]]:
        expected, info = pair
        done, told = 0, 0

        def on_bytes(of_part: int) -> None:
            nonlocal told
            if (so_far := done + of_part) - told >= PROGRESS_BYTES or so_far == info.nbytes:
                progress(so_far - told)
                told = so_far
                gguf.prefetch(info.name, told + PROGRESS_BYTES, told + 2 * PROGRESS_BYTES)

        gguf.prefetch(info.name, 0, 2 * PROGRESS_BYTES)
        parts = []
        for name, shape, bytes_of in _parts(expected, info, cfg, partial(gguf.read, info.name)):
            weight = pack_read(bytes_of, info.type, shape, on_bytes)
            _evaluate(weight)  # here, for MLX can't evaluate in one thread what another has left to do
            done += math.prod(shape) * info.nbytes // math.prod(expected.shape)
            parts.append((name, weight))
        return parts

    weights: dict[str, Weight] = {}
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="load")
    try:
        for (expected, _), parts in zip(pairs, pool.map(read, pairs), strict=True):
            for name, weight in parts:
                finished = _finished(name, expected, weight)
                _evaluate(finished)  # a lazy one would keep what it is made of
                if on_cpu:  # kernels read planes
                    finished = with_values(finished) if name in VOCABULARY else with_affine(finished)
                weights[name] = finished
    finally:
        pool.shutdown(cancel_futures=True)  # at Ctrl-C: only the tensors in hand are finished
    return weights


def _evaluate(weight: Weight) -> None:
    mx.eval(weight if isinstance(weight, mx.array) else weight.planes)


def _parts(
    expected: Expected, info: TensorInfo, cfg: Config, read: Read
) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Name, shape and bytes of each weight that a tensor becomes: two where the file has two fused."""
    stem, _, last = expected.name.rpartition(".")
    rows = {
        "kv_b": (("k_b", cfg.qk_nope_head_dim), ("v_b", cfg.v_head_dim)),
        "gate_up_proj": (("gate_proj", cfg.moe_intermediate_size), ("up_proj", cfg.moe_intermediate_size)),
    }.get(last)
    if rows is None:
        yield expected.name, expected.shape, read
        return
    outer, whole, columns = expected.shape
    row_bytes, start = info.nbytes // (outer * whole), 0
    for name, count in rows:
        part = part_of_each(read, whole * row_bytes, start * row_bytes, count * row_bytes)
        yield f"{stem}.{name}", (outer, count, columns), part
        start += count


def _finished(name: str, expected: Expected, weight: Weight) -> Weight:
    """Vectors in float32, and k_b as absorption needs it; all others as they are."""
    if expected.name.endswith(".kv_b") and name.endswith(".k_b"):
        # Transposed, across its blocks: exact only as float32.
        return mx.contiguous(dequantize_ops(weight).swapaxes(-1, -2))
    return weight.astype(mx.float32) if isinstance(weight, mx.array) and weight.ndim == 1 else weight


def quant_mix(pairs: list[tuple[Expected, TensorInfo]]) -> dict[str, int]:
    """How many tensors have each type, most frequent first."""
    counts: dict[GGMLQuantizationType, int] = {}
    for _, info in pairs:
        counts[info.type] = counts.get(info.type, 0) + 1
    return {kind.name: n for kind, n in sorted(counts.items(), key=lambda item: -item[1])}
