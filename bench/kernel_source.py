"""The text that MLX makes of a launch and gives to the device's compiler, on any machine."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx

from glm_mlx.errors import InputError
from kernels.launcher import Launch


def source(launch: Launch, arrays: Sequence[mx.array]) -> str:
    """The whole source, with the signature that MLX generates for these arrays. Nothing is launched.

    In `mx.export_function` a kernel is traced, and the exporter shows what it is made of: its name, then its source.
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
            case {"type": "primitive", "name": "CustomKernel", "arguments": [str(), str(text), *_]}:
                return text
    raise InputError(f"MLX {version('mlx')} does not show the source of a kernel in the way that is known here")
