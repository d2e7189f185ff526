"""Kernels compiled for CUDA before they are launched, side by side, and kept for the next start.

MLX's CUDA back end compiles a custom kernel when it is first launched, one after the other, anew in every process. But
before it does, it looks into its folder of compiled modules, where those of its own kernels are. So here the text that
MLX is about to compile is compiled, and put into that folder under the name that MLX looks for, which holds the hash of
the whole text: another text never meets it. Source: MLX 0.32.4, mlx/backend/cuda/jit_module.cpp, custom_kernel.cpp.

Of the headers that MLX includes our text needs a few names; without the rest NVRTC makes the same machine code in a
seventh of the time. Whatever is amiss (another MLX, no headers, a folder that cannot be written) leaves it to MLX, and
so does, once, a text at which NVRTC took its process down.

MLX runs whatever has the right name there. So the folder must be this user's own, and beside the names of a module's
kernels stands a digest of its text and its code: what does not agree with it is removed before MLX looks.
"""

import ctypes
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from kernels.cache_folder import own_folder, read_own, write_whole
from kernels.launcher import Launch, Recorded, architecture
from kernels.source import source

LONGEST_NAME = 245  # of a module, for which MLX does not make folders
DIGEST = b"sha256 "  # begins the line of the digest, in which MLX finds no name as there is no tab
OPTIONS = ("--device-as-default-execution-space",)
# In place of what MLX's text includes.
HEADERS = {
    b"mlx/backend/cuda/device/utils.cuh": b"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
""",
    b"cooperative_groups.h": b"namespace cooperative_groups {}\n",
}


@dataclass(frozen=True)
class Module:
    """file: where MLX looks for the compiled text, without its suffix. entry: the kernel's name in C++."""

    file: Path
    entry: str
    text: bytes


def compile_ahead(launches: Iterable[Recorded]) -> int:
    """Sees to it that MLX finds the kernels of these launches compiled. Returns how many it had to compile.

    Nothing is launched, and nothing raised but KeyboardInterrupt. Without CUDA there is nothing to do.
    """
    if not mx.cuda.is_available() or (folder := modules_folder()) is None:
        return 0
    kinds = {(id(launch), *(a.dtype for a in arrays)): (launch, arrays) for launch, arrays in list(launches)}
    modules = {m.file: m for launch, arrays in kinds.values() if (m := _module(folder, launch, arrays))}
    compiler = _nvrtc()
    try:
        missing = [m for m in modules.values() if not _is_kept(m) and not _died(m)]
    except OSError:  # of a folder that cannot be read
        return 0
    if not missing or compiler is None:
        return 0
    options = (*OPTIONS, f"--gpu-architecture={architecture()}", *(f"--include-path={p}" for p in include_folders()))
    pool = ThreadPoolExecutor(min(len(missing), os.cpu_count() or 1))  # NVRTC runs without Python's lock
    try:
        return sum(pool.map(lambda module: _keep(module, compiler, options), missing))
    finally:
        pool.shutdown(cancel_futures=True)


def modules_folder() -> Path | None:
    """Folder in which MLX looks for compiled modules, made if missing; None where others could put some there too.

    So could everybody in the folder that MLX takes by default, which is below that for temporary files. What the user
    names holds for MLX as it is; what others may write to is not used here.
    """
    if not (given := os.environ.get("MLX_PTX_CACHE_DIR")):
        return None
    try:
        folder = Path(given).resolve()
        own_folder(folder)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        return None
    return folder


def include_folders() -> list[Path]:
    """That hold CUDA's headers: of a toolkit, or of NVIDIA's packages beside MLX."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    packages = Path(mx.__file__).resolve().parents[1] / "nvidia"
    folders = [*(Path(t) for t in toolkits if t), packages / "cu13", packages / "cuda_runtime"]
    return [folder / "include" for folder in folders if (folder / "include" / "cuda_fp16.h").exists()]


def text_hash(text: bytes) -> int:
    """std::hash<std::string> of the C++ library that MLX uses."""
    function = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return int(function(text, len(text), 0xC70F6907))


def _module(folder: Path, launch: Launch, arrays: Sequence[mx.array]) -> Module | None:
    try:
        found = source(launch, arrays)
        if found is None:
            return None
        name, text = found[0], found[1].encode()
        entry = re.search(r"__global__ void (\w+)\(", found[1])
        file = f"{name}_{text_hash(text):x}"
    except Exception:  # whatever MLX raises, or the loader of the C++ library
        return None
    return Module(folder / file, f"mlx::core::cu::{entry[1]}", text) if entry and len(file) <= LONGEST_NAME else None


def _is_kept(module: Module) -> bool:
    """True if the file holds what was written here; what does not is removed. Raises OSError if that fails.

    With its names: without them MLX would take it for whole, and find no kernel in it. These stay, as another process
    may just have written them.
    """
    code = module.file.with_suffix(".ptx")
    try:
        names, _, digest = read_own(module.file.with_suffix(".txt")).rpartition(DIGEST)
        if digest == _digest(module, names, read_own(code)):
            return True
    except OSError:
        pass
    code.unlink(missing_ok=True)
    return False


def _digest(module: Module, names: bytes, binary: bytes) -> bytes:
    parts = (hashlib.sha256(part).digest() for part in (module.text, names, binary))
    return hashlib.sha256(b"".join(parts)).hexdigest().encode() + b"\n"


def _died(module: Module) -> bool:
    """Whether a process ended while it compiled this. It is then left to MLX once: the process may have been killed."""
    died = False
    for mark in module.file.parent.glob(f"{module.file.name}.[0-9]*"):
        number = mark.suffix[1:]
        if number.isdigit() and len(number) < 10 and not psutil.pid_exists(int(number)):
            mark.unlink(missing_ok=True)
            died = True
    return died


def _keep(module: Module, nvrtc: ctypes.CDLL, options: Sequence[str]) -> bool:
    """Whether it could be compiled and written."""
    mark = module.file.with_suffix(f".{os.getpid()}")  # stays where the process ends
    try:
        write_whole(mark, b"")
        try:
            made = _compile(module, nvrtc, options)
        finally:
            mark.unlink()
        if made is None:
            return False
        binary, mangled = made
        # First the names: MLX takes a module for whole when its code is there.
        names = f"{module.entry}\t{mangled}\n".encode()
        write_whole(module.file.with_suffix(".txt"), names + DIGEST + _digest(module, names, binary))
        write_whole(module.file.with_suffix(".ptx"), binary)
    except OSError:
        return False
    return True


def _nvrtc() -> ctypes.CDLL | None:
    """The one that MLX has loaded: what another version makes, the driver might not take."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with suppress(OSError, AttributeError):  # no RTLD_NOLOAD: no Linux
            return ctypes.CDLL(name, os.RTLD_NOLOAD | os.RTLD_NOW)
    return None


def _compile(module: Module, nvrtc: ctypes.CDLL, options: Sequence[str]) -> tuple[bytes, str] | None:
    """The machine code, and the kernel's name in it; None if NVRTC does not like the text."""

    def strings(values: Iterable[bytes]) -> Any:
        array = [*values]
        return (ctypes.c_char_p * len(array))(*array)

    program, entry = ctypes.c_void_p(), module.entry.encode()
    size, mangled = ctypes.c_size_t(), ctypes.c_char_p()
    headers = len(HEADERS), strings(HEADERS.values()), strings(HEADERS)
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), module.text, b"kernel.cu", *headers):
        return None
    try:
        if (
            nvrtc.nvrtcAddNameExpression(program, entry)
            or nvrtc.nvrtcCompileProgram(program, len(options), strings(o.encode() for o in options))
            or nvrtc.nvrtcGetLoweredName(program, entry, ctypes.byref(mangled))
            or nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        ):
            return None
        binary = ctypes.create_string_buffer(size.value)
        if nvrtc.nvrtcGetCUBIN(program, binary) or not mangled.value:
            return None
        return binary.raw, mangled.value.decode()
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
