"""The model that a script measures: the small one, a file, or one of real shapes with random weights."""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench import script, synthetic
from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile
from glm_mlx.hub import resolve
from glm_mlx.load import load_model
from glm_mlx.model import Model
from glm_mlx.small import SMALL_MODEL
from glm_mlx.weights import available_memory
from kernels.planes import Weight


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

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "mix": self.mix,
            "header_sha256": self.header_sha256,
            "layers": self.config.num_layers,
            "bytes_by_type": {kind: nbytes for kind, (_, nbytes) in synthetic.by_type(self.weights).items()},
            "activations": script.dtype_name(self.model.dtype),
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


def open_subject(args: argparse.Namespace) -> Subject:
    """Raises InputError for what can't be opened or does not fit."""
    room = available_memory()
    layers = args.layers or args.synthetic
    if layers and args.model is None:
        with script.NOTES.status("making weights"):
            made = synthetic.make_model(synthetic.config(layers), args.mix)
        name, mix, header = made.config.name, args.mix, None
        config, weights, model = made.config, made.weights, made.model
    elif layers:
        raise InputError("--layers takes layers of a synthetic model, not of --model; leave one out")
    else:
        loaded = load_model(SMALL_MODEL if args.model is None else resolve(args.model))
        name, header = loaded.gguf.path.name, header_hash(loaded.gguf)
        mix = ", ".join(f"{n} {kind}" for kind, n in loaded.quant_mix.items())
        config, weights, model = loaded.config, loaded.weights, loaded.model
    return Subject(name, mix, header, config, weights, model, room - sum(w.nbytes for w in weights.values()))


def header_hash(gguf: GGUFFile) -> str:
    """SHA-256 of the first part up to its first tensor: of the metadata, and of the tensors' names and types."""
    end = min((info.offset for info in gguf.tensors.values() if info.part == 0), default=len(gguf.parts[0]))
    return hashlib.sha256(gguf.parts[0][:end]).hexdigest()
