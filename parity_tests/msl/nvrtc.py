"""The CUDA text of every launch compiled by NVRTC: no GPU, no driver, no toolkit.

    with compiling_cuda() as reports:
        y = some_public_op(...)        # its own call of mx.fast.cuda_kernel; y is zeros
    reports[0].registers

MLX's CPU wheel cannot hand out the CUDA text of a call (its `cuda_kernel` raises), so the text is built here as MLX
does: `build_kernel` in mlx/backend/cuda/custom_kernel.cpp and the options of mlx/backend/cuda/jit_module.cpp, 0.32.4.
test_msl_nvrtc.py compares it with MLX's own where there is a CUDA back end. NVRTC and CUDA's headers come from PyPI,
for Linux on x86-64. This shows that a kernel compiles and fits; what it computes is for the executor to show.
"""

import ctypes
import functools
import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from parity_tests.msl.capture import KernelError, check_launch, with_dimensions
from parity_tests.msl.device import posing_as

HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64"
ARCHITECTURE = "sm_90a"  # an H200
MAX_REGISTERS = 65536  # of one threadgroup, on every NVIDIA GPU since 2012
MAX_SHARED = 48 << 10  # bytes that a kernel may declare; NVRTC lets more pass, and the launch fails
MAX_BLOCKS = (2**31 - 1, 65535, 65535)
_HERE = Path(__file__).resolve().parent
_PRELUDE = _HERE.parent.parent / "kernels" / "cuda_prelude.h"
_INCLUDES = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
_NAMESPACE = "mlx::core::cu"
_TYPES = {  # in parameters; in the kernel's name
    mx.bool_: ("bool", "bool"),
    mx.int8: ("int8_t", "int8_t"),
    mx.int16: ("int16_t", "int16_t"),
    mx.int32: ("int32_t", "int32_t"),
    mx.int64: ("int64_t", "int64_t"),
    mx.uint8: ("uint8_t", "uint8_t"),
    mx.uint16: ("uint16_t", "uint16_t"),
    mx.uint32: ("uint32_t", "uint32_t"),
    mx.uint64: ("uint64_t", "uint64_t"),
    mx.float16: ("__half", "float16_t"),
    mx.bfloat16: ("__nv_bfloat16", "bfloat16_t"),
    mx.float32: ("float", "float"),
}
_Template = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class CudaReport:
    """What NVRTC made of one launch.

    text: the whole CUDA source, as MLX would generate it. registers: of a thread. spilled: bytes of a thread that did
    not fit into registers. shared_memory, binary: bytes.
    """

    kernel: str
    text: str = field(repr=False)
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    registers: int
    spilled: int
    shared_memory: int
    binary: int


_reports: list[CudaReport] | None = None  # of the block we are in


def _cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    shared_memory: int = 0,
) -> Callable[..., list[mx.array]]:
    """`mx.fast.cuda_kernel` in a block; one function for all blocks, so that a launcher may cache by it."""

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: _Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        if _reports is None:
            raise KernelError(f"{name}: was built for NVRTC alone; build it again outside of compiling_cuda()")
        arrays = with_dimensions(name, inputs)
        if (len(arrays), len(output_shapes), len(output_dtypes)) != (len(input_names), *[len(output_names)] * 2):
            raise KernelError(f"{name}: the launch has not as many inputs or outputs as the kernel has names")
        named_inputs = list(zip(input_names, arrays, strict=True))
        named_outputs = list(zip(output_names, output_dtypes, strict=True))
        text = cuda_text(name, named_inputs, named_outputs, source, header, template or ())
        _reports.append(_compile_launch(name, text, grid, threadgroup))
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    return call


@contextmanager
def compiling_cuda() -> Iterator[list[CudaReport]]:
    """Within the block `mx.fast.cuda_kernel` makes kernels that are compiled and not run: their outputs are zeros.

    Yields a report of each launch. A launch that would fail on an NVIDIA GPU raises KernelError with NVRTC's words.
    In the block MLX says that it has CUDA and that its default device is the GPU (device.py). A kernel that was built
    in any such block is compiled here, and is of no use outside one.
    """
    global _reports
    before, _reports = _reports, []
    try:
        with posing_as("cuda"), mock.patch.object(mx.fast, "cuda_kernel", _cuda_kernel):
            yield _reports
    finally:
        _reports = before


@dataclass(frozen=True)
class CudaText:
    """The CUDA text of a launch in five parts; entry: the kernel's whole name."""

    entry: str
    includes: str
    header: str
    signature: str
    body: str
    end: str

    def __str__(self) -> str:
        return self.includes + self.header + self.signature + self.body + self.end


def cuda_text(
    name: str,
    inputs: list[tuple[str, mx.array]],
    outputs: list[tuple[str, mx.Dtype]],
    source: str,
    header: str,
    template: _Template,
) -> CudaText:
    """The text that MLX builds for a launch with these arguments."""
    entry, constants = f"custom_kernel_{name}", ""
    for key, value in template:
        match value:
            case bool():
                entry += "_t" if value else "_f"
                constants += f"  constexpr bool {key} = {'true' if value else 'false'};\n"
            case int():
                entry += f"_{value}"
                constants += f"  constexpr int {key} = {value};\n"
            case mx.Dtype():
                entry += f"_{_TYPES[value][1]}"
                constants += f"  using {key} = {_TYPES[value][0]};\n"
            case _:
                raise KernelError(f"{name}: template argument {key} is {value!r}: an int, a bool or a dtype")
    parameters = []
    for key, array in inputs:
        parameters.append(f"const {_TYPES[array.dtype][0]}* {key}")
        for kind, suffix in (("Shape", "_shape"), ("Strides", "_strides"), ("int", "_ndim")):
            if key + suffix in source:
                parameters.append(f"const __grid_constant__ {kind} {key}{suffix}")
    parameters += [f"{_TYPES[dtype][0]}* {key}" for key, dtype in outputs]
    signature = (
        f"namespace {_NAMESPACE} {{\n\nnamespace cg = cooperative_groups;\n\n__global__ void {entry}(\n    "
        + ",\n    ".join(parameters)
        + f") {{\n{constants}"
        + ("\n" if constants else "")
    )
    return CudaText(entry, _INCLUDES, header, signature, source, f"\n}}\n\n}} // namespace {_NAMESPACE}\n")


def _compile_launch(
    name: str, text: CudaText, grid: tuple[int, int, int], threadgroup: tuple[int, int, int]
) -> CudaReport:
    check_launch(name, grid, threadgroup)
    blocks = [g // t for g, t in zip(grid, threadgroup, strict=True)]
    if any(n > most for n, most in zip(blocks, MAX_BLOCKS, strict=True)):
        raise KernelError(f"{name}: {blocks} threadgroups; CUDA allows {list(MAX_BLOCKS)}")
    own = text.header.removeprefix(_PRELUDE.read_text())
    parts = {"h.metal": own, "signature": text.signature, "metal": text.body, "end": text.end}
    # The same text, but that errors name the author's files and lines, and that NVRTC reads the prelude once.
    marked = text.includes + ("" if own == text.header else f'#include "{_PRELUDE}"\n')
    marked += "".join(f'\n#line 1 "{name}.{label}"\n{part}' for label, part in parts.items())
    log, binary = _compile(name, marked, f"{_NAMESPACE}::{text.entry}")
    registers, shared, spilled = (
        int(m[1]) if (m := re.search(pattern, log)) else 0
        for pattern in (r"Used (\d+) registers", r", (\d+) bytes smem", r"(\d+) bytes spill stores")
    )
    if shared > MAX_SHARED:
        raise KernelError(f"{name}: {shared} bytes of shared memory; CUDA allows {MAX_SHARED}")
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if (needed := -(-registers // 8) * 8 * threads) > MAX_REGISTERS:
        raise KernelError(
            f"{name}: {threads} threads of {registers} registers need {needed}; a threadgroup has {MAX_REGISTERS}"
        )
    return CudaReport(name, str(text), grid, threadgroup, registers, spilled, shared, binary)


@functools.cache
def _nvrtc() -> tuple[ctypes.CDLL, Path]:
    """The compiler, and the folder of CUDA's headers."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        home = Path(folder) / "cu13"
        if (home / "lib" / "libnvrtc.so.13").exists() and (home / "include" / "cccl" / "cuda" / "std").exists():
            # The compiler looks its builtins up by name, and finds them only where they are loaded already.
            for builtins in (home / "lib").glob("libnvrtc-builtins.so.13.*"):
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(home / "lib" / "libnvrtc.so.13")), home / "include"
    wheels = " ".join(f"'nvidia-cuda-{w}==13.0.*'" for w in ("nvrtc", "runtime", "crt", "cccl"))
    raise KernelError(f"no NVRTC 13 with its headers\nhint: pip install {wheels}")


@functools.lru_cache(1024)
def _compile(name: str, text: str, entry: str) -> tuple[str, int]:
    """NVRTC's log, and the size of what it made."""
    nvrtc, headers = _nvrtc()
    options = [
        "--device-as-default-execution-space",
        f"--gpu-architecture={ARCHITECTURE}",
        *(f"--include-path={p}" for p in (headers / "cccl", headers, _HERE / "shim")),
        # Ours: neither changes the code. The headers are read once, and the log counts registers.
        "--pch",
        "--ptxas-options=-v",
    ]
    program = ctypes.c_void_p()

    def must(call: str, *arguments: Any) -> None:
        if code := getattr(nvrtc, call)(*arguments):
            raise KernelError(f"{name}: {call} failed with {code}")

    must("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    try:
        must("nvrtcAddNameExpression", program, entry.encode())
        encoded = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        size = ctypes.c_size_t()
        must("nvrtcGetProgramLogSize", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        must("nvrtcGetProgramLog", program, buffer)
        log = buffer.value.decode()
        if failed:
            raise KernelError(f"{name}: refused by NVRTC\n{_first_errors(log)}")
        must("nvrtcGetCUBINSize", program, ctypes.byref(size))
        return log, size.value
    finally:
        must("nvrtcDestroyProgram", ctypes.byref(program))


def _first_errors(log: str, most: int = 5) -> str:
    """The first errors of a log, as file:line."""
    lines = [line for line in log.splitlines() if re.search(r"\berror\b", line)]
    errors = [re.sub(r"^(\S+?)\((\d+)\): ", r"\1:\2: ", line) for line in lines]
    return "\n".join(errors[:most] or [log.strip()])
