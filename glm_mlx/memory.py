"""What a model takes of a machine's memory, worked out from a file's header before any of its data are read."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import psutil
from gguf.constants import GGMLQuantizationType
from rich.filesize import decimal
from rich.table import Table

from glm_mlx.cache import KvBits, row_format, whole_steps
from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.packing import packed_nbytes
from kernels import wide
from kernels.mla_decode import QUERIES, block_rows
from kernels.rows import RowFormat
from kernels.tiles import tiles_shape

LEAST_CONTEXT = 512  # tokens; a machine that has no room for more is too small for the model
FEW = wide.LEAST_TOKENS - 1  # the most tokens of which all but the experts is computed alike on all back ends
MARGIN = 0.05  # of the memory that is free now; by so much less may be free when advice is followed
THREAD_STACK = 8 << 20  # bytes of address space that a thread takes for its stack where the system says nothing else
THREAD_HEAP = 64 << 20  # bytes of address space that glibc sets aside for a thread's small allocations
PROCESS_RESERVE = 64 << 20  # bytes that Python takes on the way, for objects and pieces of the file
MOST_KEPT = 256 << 20  # bytes of freed buffers that MLX may always keep for the next operation
# Bytes beside each value of a weight while it multiplies a prompt: scales and biases in float32 for groups of 32, for
# Q6_K twice for groups of 16, and all values in float32 for types that MLX's affine form cannot hold. K-quants, IQ4_NL
# and types of 16 bits are as measured, with what stands on the way there, or still stands in the layer before.
BESIDE = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), 0.28) | {
    "Q4_K": 0.45,
    "Q5_K": 0.45,
    "Q6_K": 0.8,
    "IQ4_NL": 6.7,
    "F16": 5.0,
    "BF16": 5.0,
}


@dataclass(frozen=True)
class Tensor:
    """What a header says of a tensor that is going to be loaded: GGUF's name, type, shape in numpy order."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """In bytes. `cache` is that of `context` tokens; `scratch` what a chunk of a prompt takes at the end of it.

    `kept` are freed buffers that MLX holds for the next operation. `available` is what the machine has to give, and
    `source` what that is. `largest`: the largest context that fits, 0 if none does. `advised`: the largest that also
    fits where `MARGIN` less is free, 0 if none does.
    """

    context: int
    weights: int
    cache: int
    scratch: int
    kept: int
    available: int
    source: str
    largest: int
    advised: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.kept

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def check(self, name: str) -> None:
        """Raises InputError where it does not fit, with a context that does, and will when it is tried next."""
        if self.fits:
            return
        what = f"a context of {self.context:,} tokens" if self.largest else name
        needed = self.weights if self.weights > self.available else self.total
        advice = f"--context {self.advised} would fit"
        if self.advised < min(LEAST_CONTEXT, self.context):  # of little use
            room = RAISE_LIMIT.get(self.source, "close other programs")
            smaller = " or take a smaller quantisation" if self.available else ""
            advice = room + smaller + f" ({advice})" * bool(self.advised)
        giver = "the limit of this process (ulimit) leaves" if self.source in RAISE_LIMIT else "this machine has"
        raise InputError(
            f"{what} needs {decimal(needed)} of memory, {giver} {decimal(self.available)} to give; {advice}"
        )

    def table(self, title: str | None = None) -> Table:
        table = Table("memory", "size", title=title)
        table.columns[1].justify = "right"
        style = "" if self.fits else "bold red"
        table.add_row("weights", decimal(self.weights))
        table.add_row(f"cache of {self.context:,} tokens", decimal(self.cache))
        table.add_row("scratch, while a prompt is read", decimal(self.scratch + self.kept), end_section=True)
        table.add_row("together", decimal(self.total), style=style)
        table.add_row(self.source, decimal(self.available), style=style, end_section=True)
        table.add_row("largest context that fits", f"{self.largest:,} tokens" if self.largest else "none")
        return table

    @contextmanager
    def limits(self) -> Iterator[None]:
        """MLX's limits as planned, until the end of the block.

        Freed buffers are kept up to what a chunk of a prompt frees, where there is room for that (MLX by itself keeps
        as much as the machine has). On Metal, from macOS 15 on, as much is wired as the plan counts: the system then
        leaves it in memory between two answers.
        """
        on_metal = mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
        cache_limit = mx.set_cache_limit(min(self.scratch, self.kept + max(0, self.available - self.total)))
        wired_limit = mx.set_wired_limit(min(self.total, self.available)) if on_metal else 0
        try:
            yield
        finally:
            mx.synchronize()  # what is still running needs its buffers
            if on_metal:
                mx.set_wired_limit(wired_limit)
            mx.set_cache_limit(cache_limit)


def plan_memory(
    cfg: Config,
    tensors: Iterable[Tensor],
    dtype: mx.Dtype,
    chunk: int,
    context: int | None = None,
    kv_bits: KvBits = 16,
) -> MemoryPlan:
    """For activations of `dtype` and prompts in chunks of so many tokens. Whether it fits is for `check` to say.

    context None: the largest that fits this machine and the model, or LEAST_CONTEXT if that does not fit. Raises
    InputError for a context that the model was not made for, and for rows that 8 bits cannot hold.
    """
    tensors = list(tensors)
    weights = sum(_held_nbytes(cfg, tensor) for tensor in tensors)
    beside = _beside_weights(tensors)
    available, source = machine_memory()
    rows = row_format(cfg, dtype, kv_bits)

    def plan(tokens: int, largest: int = 0, advised: int = 0) -> MemoryPlan:
        cache = cfg.num_layers * whole_steps(tokens) * rows.nbytes
        scratch = _scratch_nbytes(cfg, beside, dtype, rows, chunk, tokens)
        if wide.applies(min(chunk, tokens), dtype):  # then at most few tokens are computed as elsewhere
            few = _scratch_nbytes(cfg, beside, dtype, rows, FEW, tokens)
            scratch = max(few, _wide_nbytes(cfg, rows, chunk, tokens))
        return MemoryPlan(tokens, weights, cache, scratch, min(scratch, MOST_KEPT), available, source, largest, advised)

    largest = _last(lambda tokens: plan(tokens).fits, cfg.context_length)
    advised = _last(lambda tokens: plan(tokens).total <= (1 - MARGIN) * available, largest)
    if context is not None and not 1 <= context <= cfg.context_length:
        room = f"; this machine has room for {advised:,}" if largest < cfg.context_length else ""
        raise InputError(
            f"context is {context:,}; it must be 1 to {cfg.context_length:,}, which the model was made for{room}"
        )
    if context is None:
        context = max(largest, min(LEAST_CONTEXT, cfg.context_length))
    return plan(context, largest, advised)


def _last(holds: Callable[[int], bool], most: int) -> int:
    """The last of 1 to `most` for which something holds that holds up to some number; 0 if for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _held_nbytes(cfg: Config, tensor: Tensor) -> int:
    """Bytes of the weights that `glm_mlx.weights` makes of a tensor."""
    nbytes = packed_nbytes(tensor.type, tensor.shape)
    if len(tensor.shape) == 1:
        return 4 * tensor.shape[0]
    if tensor.name.endswith("attn_kv_b.weight"):  # k_b becomes float32
        heads, rows, latent = tensor.shape
        return nbytes * cfg.v_head_dim // rows + 4 * heads * cfg.qk_nope_head_dim * latent
    return nbytes


def _beside_weights(tensors: Iterable[Tensor]) -> int:
    """Bytes that stand beside the weights of one feed-forward layer, or of the head, while they multiply a prompt.

    The layers take turns, but MLX prepares all matrices of one together. Those of attention are small.
    """
    sums: dict[str, float] = {}
    for tensor in tensors:
        block, _, name = tensor.name.rpartition(".ffn_")
        if len(tensor.shape) > 1 and (block or not name.startswith("blk.")):
            values = packed_nbytes(GGMLQuantizationType.F32, tensor.shape) // 4
            sums[block or name] = sums.get(block or name, 0) + BESIDE.get(tensor.type.name, 0) * values
    return int(max(sums.values(), default=0))


def _scratch_nbytes(cfg: Config, beside: int, dtype: mx.Dtype, rows: RowFormat, chunk: int, context: int) -> int:
    """The most that is alive at once, beside weights and cache, while the last chunk of a prompt is computed.

    Attention: the scores of a layer, H * L * S, in float32 and twice (masked and not), the cached rows in float32, and
    queries and their results. Behind more rows than make a block, scores and results of as many blocks as MLX prepares
    before the first is done, which was measured on a CPU. Feed-forward: the hidden values, and what stands beside the
    weights. Both, as MLX may prepare the one while the other runs. Or, where that is more, one layer of the cache a
    second time, as it grows.
    Held to what MLX measures on a CPU, at real widths but few experts, in `parity_tests/test_memory.py`. With all 64 of
    GLM-4.7-Flash, in Q4_0 and float32, by hand: a layer took 319 MB for the first 512 tokens of a prompt and 329 MB
    behind 1,536, its attention alone 558 MB behind 4,608, where this says 410, 1,175 and 1,175. Never measured on a
    GPU.
    """
    tokens = min(chunk, context)
    number = 4 if dtype == mx.float32 else 7  # values in 16 bits have a copy in float32 beside them, for a while
    heads, row, hidden = cfg.num_heads, cfg.cache_dim, cfg.hidden_size
    queries = heads * min(tokens, QUERIES)
    block = block_rows(queries, rows.is_packed)
    scores, results, copies = (2, 0, 2) if context <= block else (9, 10, 2)
    if rows.is_packed:
        copies = 3 if context <= block else 9
    attention = 4 * (scores * queries + copies * row) * min(context, block) + 4 * results * queries * row
    attention += number * tokens * heads * 2 * row
    experts = cfg.num_experts_per_tok * 5 * (cfg.moe_intermediate_size + hidden)
    feed_forward = beside + number * tokens * max(5 * cfg.intermediate_size, experts)
    return max(attention + feed_forward, context * rows.nbytes)


def _wide_nbytes(cfg: Config, rows: RowFormat, chunk: int, context: int) -> int:
    """The most that `kernels.wide` has alive: results that later turns want, and all that the last `ALIVE` turns made.

    Most at once are either products with the experts of a few tiles, expanded to 16 bits, beside the rows of all tiles
    before and after; or where a layer begins: the end of the layer before, keys and values in float16, queries, and a
    turn of attention.
    """
    tokens, heads, hidden, row = min(chunk, context), cfg.num_heads, cfg.hidden_size, cfg.cache_dim
    # Products with experts.
    width, chosen = cfg.moe_intermediate_size, tokens * cfg.num_experts_per_tok
    tiles, tile_rows = tiles_shape(chosen, cfg.num_experts)
    at_once = min(tiles, wide.TILES)
    product = 2 * 2 * at_once * (width * hidden + 2 * tile_rows * width)  # gate and up, and what becomes of them
    all_tiles, hidden_values = 2 * tiles * tile_rows * hidden, 2 * 2 * at_once * tile_rows * width
    experts = wide.ALIVE * product + 2 * all_tiles + hidden_values
    # The end of a layer: what experts made, together, then of each token, then added up in float32; or a dense layer.
    added = 2 * hidden * (3 * chosen + 10 * tokens)
    shared = 2 * cfg.num_shared_experts * width * (3 * hidden + 3 * tokens)
    dense = 2 * cfg.intermediate_size * (3 * hidden + 5 * tokens)
    heads_merged = 2 * tokens * heads * (cfg.kv_lora_rank + 3 * cfg.v_head_dim)
    end = max(product + 3 * all_tiles + added + shared, dense + heads_merged)
    # Attention. Rows in 8 bits become keys in three steps.
    cached = 2 * (row + cfg.kv_lora_rank) * context  # keys and values
    if rows.is_packed:
        cached += 3 * 2 * row * min(context, wide.UNPACKED)
    queries = 2 * tokens * heads * (3 * cfg.qk_head_dim + 2 * cfg.kv_lora_rank)
    some = heads * min(tokens, wide.QUERIES)
    turn = 2 * heads * min(tokens, wide.queries_at_once(heads, context)) * context + 8 * some * row
    return max(experts, cached + queries + max(wide.ALIVE * turn, end + turn)) + 8 * tokens * hidden


def machine_memory() -> tuple[int, str]:
    """Bytes that a model may take where MLX runs, and what they are."""
    device = mx.device_info()
    if "max_recommended_working_set_size" in device:
        return int(device["max_recommended_working_set_size"]), "Metal's recommended working set"
    if "free_memory" in device:  # of all processes together where NVML is there
        return int(device["free_memory"]), "free memory of the GPU"
    rooms = [(psutil.virtual_memory().available, "free RAM"), *_ulimit_rooms()]
    if (group := _cgroup_room()) is not None:
        rooms.append((max(0, group), "left of this container's memory limit"))
    return min(rooms)


def available_memory() -> int:
    return machine_memory()[0]


RAISE_LIMIT = {  # by the source that a plan names
    "left of this process's address space": "raise ulimit -v",
    "left of this process's data": "raise ulimit -d",
}


def _ulimit_rooms() -> list[tuple[int, str]]:
    """Bytes that the limits of this process leave for a model on Linux, and what they are; none where it has no limits.

    MLX on a CPU writes through a null pointer where one of them stops it, so what is still to come is counted too: two
    threads for each core while a file loads (a loader and MLX's stream for it), and a few more.
    """
    if sys.platform != "linux":  # macOS lets them be set and does not enforce them
        return []
    import resource  # not everywhere

    used = psutil.Process().memory_info()
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack == resource.RLIM_INFINITY:
        stack = THREAD_STACK
    threads = 2 * (os.cpu_count() or 1) + 2
    rooms = []
    for kind, taken, of_thread, source in zip(
        (resource.RLIMIT_AS, resource.RLIMIT_DATA),
        (used.vms, used.data),
        (stack + THREAD_HEAP, stack),
        RAISE_LIMIT,
        strict=True,
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            rooms.append((max(0, limit - taken - threads * of_thread - PROCESS_RESERVE), source))
    return rooms


def _cgroup_room(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that Linux lets this process and its group take, by the tightest of the groups around it; None: no limit.

    Both versions of control groups, https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html. Pages
    of files count as used there, but make room when asked.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:  # not Linux
        return None
    rooms = []
    for _, controllers, path in lines:
        if controllers == "":
            top, limit, used, stat = mount, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, used, stat = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = top / path.lstrip("/")
        while True:  # within a container the outer groups, or its own path, may not be there to see
            try:
                pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                files = int(pages[f"{stat}inactive_file"]) + int(pages[f"{stat}active_file"])
                rooms.append(int((folder / limit).read_text()) - int((folder / used).read_text()) + files)
            except (OSError, ValueError, KeyError):  # ValueError: "max", which is no limit
                pass
            if folder == top:
                break
            folder = folder.parent
    return min(rooms, default=None)
