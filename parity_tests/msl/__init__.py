"""Metal kernels checked and executed without Metal: the exact text that MLX would hand to Apple's compiler.

    with executing() as launches:
        y = some_public_op(...)        # its own call of mx.fast.metal_kernel, unchanged
    launches[0].buffer("quants").coalescing

capture   the text, grid and buffers of a call, from MLX's own generator
source    from that text to a C++ unit for clang
compiler  an installed clang of 17 or later, or the one inside `ziglang`; objects are kept in a cache folder
lint      what Apple's compiler refuses and clang accepts
shim/     Metal's standard library, as much of it as our kernels need
simt.cpp  one fiber per GPU thread, with every access to memory checked
device    a block of code that takes this machine for one with a GPU
executor  puts the above together: `executing`
nvrtc     the same launches as CUDA, compiled by NVRTC: `compiling_cuda`
traffic   bytes, lines and barriers of a launch
apple     what they would cost on an Apple GPU, by a simple model: `apple_time`

What this cannot show: that Apple's compiler accepts the text (the shim is our reading of Metal), how fast it is, how
its transcendental functions round, and what simdgroups do between barriers on a real GPU beyond the orders tried here.
Caches are not modelled, beyond counting what they could save. x86-64 Linux; arm64 Linux has a context switch that has
not been run.
"""

from parity_tests.msl.apple import apple_time
from parity_tests.msl.capture import KernelError
from parity_tests.msl.executor import executing
from parity_tests.msl.nvrtc import CudaReport, compiling_cuda
from parity_tests.msl.traffic import BufferTraffic, LaunchReport

__all__ = ["BufferTraffic", "CudaReport", "KernelError", "LaunchReport", "apple_time", "compiling_cuda", "executing"]
