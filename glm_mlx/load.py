"""Open a GGUF file as a running model: header, checks, configuration, tokenizer, weights."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from glm_mlx import weights
from glm_mlx.config import Config
from glm_mlx.gguf import GGUFFile
from glm_mlx.model import Model, activation_dtype
from glm_mlx.tokenizer import Tokenizer
from kernels.planes import Weight


@dataclass(frozen=True)
class Loaded:
    """A model that is ready, and what was learnt on the way. `nbytes` of the file's tensors were read."""

    gguf: GGUFFile
    config: Config
    tokenizer: Tokenizer
    weights: Mapping[str, Weight]
    model: Model
    quant_mix: dict[str, int]
    expanded_types: list[str]
    nbytes: int
    seconds: float


def load_model(path: str | Path, dtype: mx.Dtype | None = None) -> Loaded:
    """Read a model whole, with a progress bar on standard error where that is a terminal.

    Everything that can be wrong with the file is found before its data are read. Raises InputError.
    """
    start = time.perf_counter()
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    plan = weights.plan(gguf, cfg)
    tokenizer = Tokenizer(gguf.metadata)
    weights.check_memory(gguf, plan)
    nbytes = sum(info.nbytes for _, info in plan)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"loading {gguf.path.name}", total=nbytes)
        arrays = weights.load(gguf, cfg, plan, lambda n: bar.advance(task, n))
    model = Model(cfg, arrays, dtype or activation_dtype())
    return Loaded(
        gguf,
        cfg,
        tokenizer,
        arrays,
        model,
        weights.quant_mix(plan),
        weights.expanded_types(plan),
        nbytes,
        time.perf_counter() - start,
    )
