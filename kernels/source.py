"""The text that MLX makes of a launch and gives to the device's compiler, on any machine."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from kernels.launcher import Launch


def source(launch: Launch, arrays: Sequence[mx.array]) -> tuple[str, str] | None:
    """MLX's name for the kernel, and the whole source with the signature that it generates for these arrays.

    In `mx.export_function` a kernel is traced, not launched, and the exporter shows what it is made of. None for an MLX
    that shows it in another way than 0.32.
    """
    seen: list[dict[str, Any]] = []

    def call(*inputs: mx.array) -> list[mx.array]:
        return launch.kernel(
            inputs=list(inputs),
            template=launch.template,
            grid=launch.grid,
            threadgroup=launch.threadgroup,
            output_shapes=launch.output_shapes,
            output_dtypes=launch.output_dtypes,
            stream=mx.gpu,
        )

    mx.export_function(seen.append, call, *arrays)
    for node in seen:
        match node:
            case {"type": "primitive", "name": "CustomKernel", "arguments": [str(name), str(text), *_]}:
                return name, text
    return None
