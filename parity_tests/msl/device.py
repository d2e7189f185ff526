"""A block of code that takes this machine for one with a GPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal
from unittest import mock

import mlx.core as mx


@contextmanager
def posing_as(backend: Literal["metal", "cuda"]) -> Iterator[None]:
    """In the block MLX says that it has this back end, and that its GPU is the default device.

    Only the answers change: MLX's own operations run where they ran, and a model that is loaded in the block takes the
    GPU's dtype. `mx.compile` does nothing in the block, because kernels here need values, and what it traced would
    outlive the block.
    """
    with ExitStack() as stack:
        for module, name in ((mx.metal, "metal"), (mx.cuda, "cuda")):
            stack.enter_context(mock.patch.object(module, "is_available", return_value=name == backend))
        stack.enter_context(mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu)))
        mx.disable_compile()
        stack.callback(mx.enable_compile)
        yield
