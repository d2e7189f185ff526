"""What an NVIDIA GPU did and for how long, from CUPTI through PyTorch's profiler, where that is installed.

MLX offers no such figure for CUDA, and the clock on the wall shows the host where launches are short and it is slow.
Once CUPTI was used in a process, launches may cost its host more (suspected, bench/LOG.md): scripts take their times by
the clock before.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

# Calls of CUDA that hand work to the GPU, as CUPTI names them; MLX collects its launches in graphs.
COMMITS = ("cudaGraphLaunch", "cuGraphLaunch")


@dataclass(frozen=True)
class Kernel:
    """A kernel, or a copy, that ran on the GPU. Seconds; `start` since some moment."""

    name: str
    start: float
    seconds: float


@dataclass(frozen=True)
class Timeline:
    """kernels: in the order of their start. commits: how often the host handed over a graph of them."""

    kernels: list[Kernel]
    commits: int

    @property
    def busy_seconds(self) -> float:
        """The sum over all kernels, launched in a graph or not."""
        return sum(kernel.seconds for kernel in self.kernels)


def available() -> bool:
    if not mx.cuda.is_available() or mx.default_device() != mx.Device(mx.gpu):
        return False
    return importlib.util.find_spec("torch") is not None


def record(work: Callable[[], object]) -> Timeline:
    """What `work` ran on the GPU. It must have run before, so that nothing is compiled."""
    from torch.autograd.profiler import profile  # torch.profiler's imports TorchInductor first, which takes seconds

    mx.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(use_cpu=False, use_device="cuda", use_kineto=True) as found:
            work()
            mx.synchronize()
        events = list(found.function_events)
    kernels = [
        Kernel(event.name, 1e-6 * event.time_range.start, 1e-6 * event.device_time)
        for event in events
        if str(event.device_type).endswith("CUDA") and event.device_time > 0
    ]
    commits = sum(event.name.startswith(COMMITS) for event in events)
    return Timeline(sorted(kernels, key=lambda kernel: kernel.start), commits)


def busy_seconds(work: Callable[[], object]) -> float:
    """For how long the GPU was busy with what `work` ran there, as `record`."""
    return record(work).busy_seconds
