"""The model that a script measures: the small one, a file, or one of real shapes with random weights. And by what path,
and in what depths of context.
"""

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from rich.filesize import decimal

from bench import script, synthetic
from bench.conditions import has_kernels
from glm_mlx import weights
from glm_mlx.cache import KvBits
from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile
from glm_mlx.hub import resolve
from glm_mlx.load import open_model
from glm_mlx.memory import available_memory
from glm_mlx.model import Model, activation_dtype
from glm_mlx.small import SMALL_MODEL
from kernels import launcher
from kernels.planes import Weight
from kernels.shown import shown

DEPTHS = (0, 512, 4096, 16_384, 32_768, 65_536, 131_072)
PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {"kernels": nullcontext, "twins": launcher.avoiding}


@dataclass(frozen=True)
class Subject:
    """room: bytes of memory that the weights leave. header_sha256: see `header_hash`; None without a file."""

    name: str
    mix: str
    header_sha256: str | None
    config: Config
    weights: Mapping[str, Weight]
    model: Model
    room: int

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    @property
    def cache_type(self) -> str:
        rows = self.model.row_format
        return "8-bit" if rows.is_packed else script.dtype_name(rows.dtype)

    def describe(self) -> str:
        return (
            f"{shown(self.name)}: {self.config.num_layers} layers, {decimal(self.nbytes)} of weights ({self.mix}), "
            f"activations {script.dtype_name(self.model.dtype)}, cache {self.cache_type}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "mix": self.mix,
            "header_sha256": self.header_sha256,
            "layers": self.config.num_layers,
            "bytes_by_type": {kind: nbytes for kind, (_, nbytes) in synthetic.by_type(self.weights).items()},
            "activations": script.dtype_name(self.model.dtype),
            "cache": self.cache_type,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", "-m", metavar="M", help="a .gguf file, or OWNER/REPO[:QUANT] on the hub")
    which.add_argument(
        "--synthetic", type=script.whole(1), nargs="?", const=synthetic.LAYERS, metavar="N",
        help=f"GLM-4.7-Flash with random weights, N layers of it (default {synthetic.LAYERS})",
    )  # fmt: skip
    parser.add_argument("--layers", type=script.whole(1), metavar="N", help="the same as --synthetic N")
    parser.add_argument(
        "--mix", choices=synthetic.MIXES, default="q4_0",
        help=f"the file whose types random weights have: {', '.join(synthetic.MIXES)} (default q4_0)",
    )  # fmt: skip
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), default=16, help="of the cache's values (default 16)")


def add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paths", type=script.listed(script.choice(*PATHS)), metavar="PATH[,PATH]",
        help="kernels, twins, or both in turns (default: kernels where the device launches them)",
    )  # fmt: skip


def usable_paths(given: list[str] | None) -> list[str]:
    """Raises InputError for kernels where there are none."""
    if given and "kernels" in given and not has_kernels():
        raise InputError("this device launches no kernels; leave --paths out")
    return given or ["kernels" if has_kernels() else "twins"]


def usable_depths(
    subject: Subject, given: Sequence[int] | None, tokens: int, usual: Sequence[int] = DEPTHS
) -> tuple[list[int], list[str]]:
    """The depths to measure, and why others are left out. Raises InputError for a given one that can't be."""
    cfg = subject.config
    per_row = cfg.num_layers * subject.model.row_format.nbytes
    by_context = cfg.context_length - tokens
    by_memory = int(subject.room / 1.1 / per_row) - tokens
    wanted = sorted(set(given or usual))
    depths = [depth for depth in wanted if max(depth, 1) <= min(by_context, by_memory)]
    if depths == wanted:
        return depths, []
    why = (
        f"the model's context ends at {cfg.context_length:,}"
        if by_context <= by_memory
        else f"{decimal(subject.room)} of memory are left for a cache of {decimal(per_row)} a token"
    )
    left_out = f"depth {wanted[len(depths)]:,} and more: {why}"
    if given is not None or not depths:
        raise InputError(f"cannot measure {left_out}; give less depth, or a smaller --count")
    return depths, [f"not measured: {left_out}"]


@dataclass(frozen=True)
class Source:
    """Ingredients of a model, before one is made. Fields as in `Subject`; dtype: of its activations."""

    name: str
    mix: str
    header_sha256: str | None
    config: Config
    weights: dict[str, Weight]
    dtype: mx.Dtype
    kv_bits: KvBits
    room: int


def open_source(args: argparse.Namespace) -> Source:
    """Raises InputError for what can't be opened or does not fit."""
    room = available_memory()
    layers = args.layers or args.synthetic
    if layers and args.model is None:
        with script.NOTES.status("making weights"):
            config, dtype = synthetic.config(layers), activation_dtype()
            made = synthetic.make_weights(config, synthetic.MIXES[args.mix])
        name, mix, header = config.name, args.mix, None
    elif layers:
        raise InputError("--layers takes layers of a synthetic model, not of --model; leave one out")
    else:
        opened = open_model(SMALL_MODEL if args.model is None else resolve(args.model), kv_bits=args.kv_bits)
        opened.memory.check(shown(opened.gguf.path))
        with script.NOTES.status(f"loading {shown(opened.gguf.path.name)}"):
            made = weights.load(opened.gguf, opened.config, opened.tensors)
        name, header, config, dtype = opened.gguf.path.name, header_hash(opened.gguf), opened.config, opened.dtype
        mix = ", ".join(f"{n} {kind}" for kind, n in weights.quant_mix(opened.tensors).items())
    left = room - sum(weight.nbytes for weight in made.values())
    return Source(name, mix, header, config, made, dtype, args.kv_bits, left)


def open_subject(args: argparse.Namespace) -> Subject:
    """Raises InputError for what can't be opened or does not fit."""
    found = open_source(args)
    model = Model(found.config, found.weights, found.dtype, found.kv_bits)
    return Subject(found.name, found.mix, found.header_sha256, found.config, found.weights, model, found.room)


def header_hash(gguf: GGUFFile) -> str:
    """SHA-256 of the first part up to its first tensor: of the metadata, and of the tensors' names and types."""
    end = min((info.offset for info in gguf.tensors.values() if info.part == 0), default=gguf.parts[0].size)
    return hashlib.sha256(gguf.parts[0].read(0, end)).hexdigest()
