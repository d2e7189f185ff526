"""Open a GGUF file as a running model: header, checks, configuration, tokenizer, weights."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from glm_mlx import weights
from glm_mlx.cache import KvBits
from glm_mlx.config import Config
from glm_mlx.console import Console
from glm_mlx.engine import prefill_chunk
from glm_mlx.gguf import GGUFFile, TensorInfo
from glm_mlx.memory import MemoryPlan, plan_memory
from glm_mlx.model import Model, activation_dtype
from glm_mlx.tokenizer import Tokenizer
from kernels.planes import Weight
from kernels.shown import shown


@dataclass(frozen=True)
class Opened:
    """A file of which only the header has been read, and found good. `tensors` are those to load."""

    gguf: GGUFFile
    config: Config
    tokenizer: Tokenizer
    tensors: list[tuple[weights.Expected, TensorInfo]]
    dtype: mx.Dtype
    kv_bits: KvBits
    memory: MemoryPlan
    seconds: float

    @property
    def notes(self) -> list[str]:
        """Notes on this file for the user, a line each."""
        expanded = weights.expanded_types(self.tensors)
        held = [f"{', '.join(expanded)} tensors are held as float32, exact but larger and slower"] * bool(expanded)
        return [*self.config.notes, *held]

    def load(self) -> "Loaded":
        """Read the data, with a progress bar on standard error where that is a terminal.

        Raises InputError, before anything is read, where this machine is too small for `memory`.
        """
        start = time.perf_counter()
        self.memory.check(shown(self.gguf.path))
        nbytes = sum(info.nbytes for _, info in self.tensors)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(f"loading {shown(self.gguf.path.name)}", total=nbytes)
            arrays = weights.load(self.gguf, self.config, self.tensors, lambda n: bar.advance(task, n))
        return Loaded(
            self.gguf,
            self.config,
            self.tokenizer,
            arrays,
            Model(self.config, arrays, self.dtype, self.kv_bits),
            self.memory,
            weights.quant_mix(self.tensors),
            self.notes,
            nbytes,
            self.seconds + time.perf_counter() - start,
        )


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and what was learnt on the way. `nbytes` of the file's tensors were read."""

    gguf: GGUFFile
    config: Config
    tokenizer: Tokenizer
    weights: Mapping[str, Weight]
    model: Model
    memory: MemoryPlan
    quant_mix: dict[str, int]
    notes: list[str]
    nbytes: int
    seconds: float


def open_model(
    path: str | Path, dtype: mx.Dtype | None = None, context: int | None = None, kv_bits: KvBits = 16
) -> Opened:
    """Read a file's header, and plan memory for a context of so many tokens, by default of as many as fit.

    Everything that can be wrong with the file is found here, before its data are read. Raises InputError.
    """
    start = time.perf_counter()
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    tensors = weights.plan(gguf, cfg)
    tokenizer = Tokenizer(gguf.metadata)
    dtype = dtype or activation_dtype()
    memory = plan_memory(cfg, weights.tensors_of(tensors), dtype, prefill_chunk(dtype), context, kv_bits)
    return Opened(gguf, cfg, tokenizer, tensors, dtype, kv_bits, memory, time.perf_counter() - start)


def load_model(
    path: str | Path, dtype: mx.Dtype | None = None, context: int | None = None, kv_bits: KvBits = 16
) -> Loaded:
    """`open_model` and `load` in one."""
    return open_model(path, dtype, context, kv_bits).load()
