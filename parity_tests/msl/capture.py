"""The text MLX would compile on a Mac, taken from MLX itself on a machine without Metal.

Inside `mx.export_function` a call of a custom kernel is traced, not launched, and the exporter shows its primitive with
the generated source, the grid and the threadgroup. So the signature, the template arguments and the choice between
`constant` and `device` are MLX's own. Works in MLX 0.32.0 to 0.32.4, in under a millisecond; the order of the
primitive's arguments is not documented, so `capture` checks their types and says so when they have changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import mlx.core as mx

MAX_THREADS = 1024  # in a threadgroup; Apple's limit on every family
MAX_BUFFERS = 31


class KernelError(Exception):
    """A kernel that must not be shipped, and why; names file:line of its text where there is one."""


@dataclass(frozen=True)
class Launch:
    """One launch as MLX describes it.

    text: the whole Metal source. grid, threadgroup: in threads. with_shape: for each input, which of `_shape`,
    `_strides` and `_ndim` follow it in the signature.
    """

    name: str
    text: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    with_shape: list[tuple[bool, bool, bool]]


def capture(name: str, kernel: Callable[..., Any], inputs: Sequence[mx.array], call: dict[str, Any]) -> Launch:
    """The launch that `kernel(inputs=inputs, **call)` would make; `kernel` comes from `mx.fast.metal_kernel`."""
    seen: list[dict[str, Any]] = []
    call = {**call, "stream": mx.gpu, "verbose": False}
    mx.export_function(seen.append, lambda *arrays: list(kernel(inputs=list(arrays), **call)), *inputs)
    found = [node["arguments"] for node in seen if node["type"] == "primitive" and node["name"] == "CustomKernel"]
    match found:
        case [[str(), str(text), *rest]] if len(rest) >= 7 and all(isinstance(n, int) for n in rest[:6]):
            launch = Launch(name, text, tuple(rest[:3]), tuple(rest[3:6]), rest[6])
        case _:
            raise KernelError(f"{name}: MLX {version('mlx')} describes a custom kernel in a way unknown here: {found}")
    check_launch(name, launch.grid, launch.threadgroup)
    return launch


def with_dimensions(name: str, inputs: Sequence[Any]) -> list[mx.array]:
    """The inputs as arrays; refuses those without dimensions."""
    arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
    if any(a.ndim == 0 for a in arrays):
        raise KernelError(
            f"{name}: an input without dimensions is a reference in Metal and a pointer in CUDA: use (1,)"
        )
    return arrays


def check_launch(name: str, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]) -> None:
    """Refuses what no device here could run, or what Metal and CUDA would run differently."""
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if not 0 < threads <= MAX_THREADS:
        raise KernelError(f"{name}: {threads} threads in a threadgroup; Metal allows 1 to {MAX_THREADS}")
    if any(g <= 0 or g % t for g, t in zip(grid, threadgroup, strict=True)):
        raise KernelError(
            f"{name}: grid {grid} is not a multiple of threadgroup {threadgroup}: "
            "Metal would trim the last threadgroup, and CUDA would not"
        )
