"""The time that an NVIDIA GPU itself spent in kernels, from CUPTI through PyTorch's profiler, where that is installed.

MLX offers no such figure for CUDA, and the clock on the wall shows the host where launches are short and it is slow.
"""

import importlib.util
import warnings
from collections.abc import Callable

import mlx.core as mx


def available() -> bool:
    if not mx.cuda.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return False
    return importlib.util.find_spec("torch") is not None


def busy_seconds(work: Callable[[], object]) -> float:
    """The sum over all kernels that `work` ran on the GPU, launched in a graph or not.

    `work` must have run before, so that nothing is compiled.
    """
    from torch.profiler import ProfilerActivity, profile

    mx.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            work()
            mx.synchronize()
        return sum(event.device_time for event in found.events()) * 1e-6
