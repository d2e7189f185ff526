"""How many command buffers (Metal) or graphs (CUDA) MLX hands to the device for a decoded token, by its own limits.

After each operation MLX asks whether those collected since the last commit exceed a number of operations, or of
elements of the arrays that they read: of whole arrays, whatever a kernel reads of them. Metal counts an array once in a
command buffer, CUDA every time. What is left at the end of a token is committed too. `MLX_MAX_OPS_PER_BUFFER` and
`MLX_MAX_MB_PER_BUFFER` replace the limits. Source: MLX 0.32 `backend/metal/device.cpp` and `backend/cuda/device.cpp`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from bench.conditions import back_end


@dataclass(frozen=True)
class Limits:
    """elements: in units of 2^20, which MLX calls MB."""

    device: str
    ops: int
    elements: int
    once: bool  # an array counts once in a commit

    def __str__(self) -> str:
        return f"{self.device}, {self.ops} operations or {self.elements} Mi elements"


# By the last letter of Metal's name for the architecture, and by CUDA's compute capability.
_MAX_AND_ULTRA = Limits("Apple Max and Ultra", 50, 50, True)
METAL = {"g": Limits("Apple base and Pro", 40, 40, True), "s": _MAX_AND_ULTRA, "d": _MAX_AND_ULTRA}
_HOPPER_AND_BLACKWELL = (9, 0), (10, 0), (12, 0)
CUDA = {
    (8, 0): Limits("NVIDIA A100", 20, 400, False),
    **{capability: Limits("NVIDIA H100 and later", 100, 1000, False) for capability in _HOPPER_AND_BLACKWELL},
    (12, 1): Limits("NVIDIA DGX Spark", 20, 25, False),
}


def limits() -> Limits | None:
    """Of this device; None on a CPU, which has no such thing."""
    info: Mapping[str, Any] = mx.device_info()
    match back_end():
        case "metal":
            found = METAL.get(str(info.get("architecture", "g"))[-1], METAL["g"])
        case "cuda":
            capability = (info["compute_capability_major"], info["compute_capability_minor"])
            found = CUDA.get(capability, Limits("NVIDIA", 20, 100, False))
        case _:
            return None
    ops, elements = (_environment("OPS", found.ops), _environment("MB", found.elements))
    return Limits(found.device, ops, elements, found.once)


def _environment(name: str, default: int) -> int:
    value = os.environ.get(f"MLX_MAX_{name}_PER_BUFFER", "")
    return int(value) if value.isdecimal() else default


def commits(inputs: Sequence[Sequence[mx.array]], allowed: Limits) -> int:
    """For operations, in this order, that read these arrays each."""
    done = ops = elements = 0
    seen: set[int] = set()
    for arrays in inputs:
        ops += 1
        for array in arrays:
            if not (allowed.once and id(array) in seen):
                elements += array.size
            seen.add(id(array))
        if ops > allowed.ops or elements >> 20 > allowed.elements:
            done += 1
            ops = elements = 0
            seen.clear()
    return done + (ops > 0)
