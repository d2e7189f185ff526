"""A GGUF file as plain Python values and float32 arrays, one tensor (or one expert) in memory at a time.

The `gguf` package, from llama.cpp, parses the file and undoes the quantisation. `gguf.quants.dequantize` (0.19) knows
F32 F16 BF16, Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, Q2_K to Q6_K, IQ1_S to IQ4_XS with IQ4_NL, TQ1_0 TQ2_0, MXFP4 and NVFP4;
for any other type it raises NotImplementedError.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

Index = int | slice | np.ndarray

SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


class GgufFile:
    """One model: a single file, or all parts of a split one, named by any of its parts.

    `metadata` comes from the first part. Tensors stay on disk, mapped, until `tensor` is called.
    """

    def __init__(self, path: str | Path):
        readers = [GGUFReader(part) for part in parts_of(Path(path))]
        self.metadata: dict[str, Any] = {name: field.contents() for name, field in readers[0].fields.items()}
        self._tensors: dict[str, ReaderTensor] = {t.name: t for reader in readers for t in reader.tensors}
        expected = self.metadata.get("split.tensors.count", len(self._tensors))
        if len(self._tensors) != expected:
            raise ValueError(f"{path}: {len(self._tensors)} tensors found, {expected} promised")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in numpy order: GGUF's dimensions reversed, so a matrix is (rows out, columns in)."""
        return tuple(reversed(self._tensors[name].shape.tolist()))

    def tensor(self, name: str, index: Index = slice(None)) -> np.ndarray:
        """The tensor in float32, or the part of it that `index` picks along its first axis.

        The first axis is the vocabulary of an embedding and the expert of an expert tensor; only what is picked is
        read and expanded: `tensor("blk.1.ffn_up_exps.weight", 5)` is expert 5, (F, D).
        """
        stored = self._tensors[name]
        return np.array(dequantize(stored.data[index], stored.tensor_type), dtype=np.float32)


def parts_of(path: Path) -> list[Path]:
    """All parts of a split model (`-00001-of-00003.gguf`) in order, or just the one file."""
    split = SPLIT_NAME.search(path.name)
    if split is None:
        return [path]
    stem, count = path.name[: split.start()], int(split[2])
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
