"""clang, and a folder of what it has made.

An installed clang of 17 or later, else the one inside `ziglang` from PyPI: `zig clang` is clang's own driver,
and `zig ld.lld` its linker, so that nothing of zig's own library is ever built. The kernel's unit needs no header but
the shim's, and is linked with nothing but the runtime; libc and libm are those of the Python process.
"""

import atexit
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kernels.cache_folder import private_folder
from parity_tests.msl.capture import KernelError
from parity_tests.msl.source import HERE

PATIENCE = 300  # seconds for one kernel; the first use of a new ziglang takes about a minute
OLDEST = 17  # 16 has no arithmetic on __bf16
_WARNINGS = [
    *("-Wno-everything", "-ferror-limit=5", "-fno-caret-diagnostics"),
    *("-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=conditional-uninitialized"),
    *("-Werror=return-type", "-Werror=array-bounds", "-Werror=vla", "-Werror=shift-count-overflow"),
    *("-Werror=infinite-recursion", "-Werror=global-constructors", "-Werror=literal-conversion"),
]
_KERNEL = ["-x", "c++", "-std=c++14", "-nostdinc", f"-I{HERE / 'shim'}", *_WARNINGS]
# Contraction within an expression, and 16-bit types rounded at each operation, as Apple's compiler does.
_EXECUTE = ["-DMSL_EXECUTE", "-fPIC", "-ffp-contract=on", "-Xclang", "-ffloat16-excess-precision=none"]
_EXECUTE += ["-Xclang", "-fbfloat16-excess-precision=none"]
_TARGET = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
MODES = {
    "check": ["-S", "-emit-llvm", "-O0", "-gline-tables-only"],
    "fast": [*_EXECUTE, "-c", "-O2", _TARGET],
    # No vectors, no memcpy made of loops, no loop taken to end: every access and every turn stays visible.
    "trace": [
        *(
            *_EXECUTE,
            "-c",
            "-O1",
            _TARGET,
            "-gline-tables-only",
            "-fno-vectorize",
            "-fno-slp-vectorize",
            "-mllvm",
            "-disable-vector-combine",
        ),
        *("-fno-builtin", "-fno-finite-loops", "-ftrivial-auto-var-init=pattern", "-fno-delete-null-pointer-checks"),
        "-fsanitize-coverage=edge,no-prune,trace-pc-guard,trace-loads,trace-stores",
        "-fstrict-flex-arrays=3",  # else the last array of a struct may be any length
        # array-bounds and not bounds: the latter brings local-bounds, which traps instead of calling us.
        "-fsanitize=array-bounds,shift,integer-divide-by-zero,float-cast-overflow,signed-integer-overflow,return",
        "-fsanitize-recover=all",
    ],
}


@dataclass(frozen=True)
class Compiler:
    version: str
    clang: list[str]  # clang's driver
    host: list[str]  # a compiler that finds libc's headers, for the runtime
    linker: list[str]


@functools.cache
def compiler() -> Compiler:
    for name in ["clang++", *(f"clang++-{n}" for n in range(30, OLDEST - 1, -1))]:
        if path := shutil.which(name):
            version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            if (number := re.search(r"clang version (\d+)", version)) and int(number[1]) >= OLDEST:
                return Compiler(version, [path], [path], [path, "-shared", "-nostdlib"])
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise KernelError(f"no clang of {OLDEST} or later\nhint: pip install ziglang")
    zig = str(Path(spec.origin).parent / "zig")
    version = subprocess.run([zig, "clang", "--version"], capture_output=True, text=True, check=True).stdout
    return Compiler(version, [zig, "clang"], [zig, "c++"], [zig, "ld.lld", "-shared"])


@functools.cache
def cache_folder() -> Path:
    """In the user's cache; where there is none, a new one of this process alone, as its libraries are loaded."""
    with suppress(OSError):
        folder = private_folder("msl")
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.mkdtemp(prefix="glm-mlx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _surroundings() -> str:
    """What an object depends on beside its own text: compiler, shim, runtime and this processor."""
    cpu = Path("/proc/cpuinfo")
    features = next((x for x in cpu.read_text().splitlines() if x.startswith(("flags", "Features"))), "")
    files = [p.read_text() for p in (HERE / "shim" / "metal_stdlib", HERE / "simt.cpp", HERE / "lint.py")]
    return "\0".join([compiler().version, str(MODES), str(_KERNEL), platform.machine(), features, *files])


def _run(command: list[str], what: str) -> None:
    zig = str(cache_folder() / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig, "ZIG_LOCAL_CACHE_DIR": zig}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{what}: no answer from the compiler in {PATIENCE} s: {shlex.join(command)}") from error
    if done.returncode:
        raise KernelError(f"{what}: refused by clang\n{done.stderr.strip()}")


def _make(key: str, suffix: str, command: list[str], what: str, source: str | None = None) -> Path:
    """The file <key><suffix> of the cache, made by `command` if it is not there; another process may be at it too."""
    target = cache_folder() / f"{hashlib.sha256((_surroundings() + key).encode()).hexdigest()[:24]}{suffix}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        made = Path(folder) / target.name
        inputs = []
        if source is not None:
            (Path(folder) / "kernel.cpp").write_text(source)
            inputs.append(str(Path(folder) / "kernel.cpp"))
        _run([*command, *inputs, "-o", str(made)], what)
        made.replace(target)
    return target


def runtime() -> Path:
    options = ["-std=c++17", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-sanitize=all", "-c"]
    return _make("runtime", ".o", [*compiler().host, *options, str(HERE / "simt.cpp")], "simt.cpp")


def type_check(name: str, source: str) -> Path:
    """LLVM's text of the unit, which `lint` reads; raises what clang says."""
    return _make(f"check {source}", ".ll", [*compiler().clang, *_KERNEL, *MODES["check"]], name, source)


def library(name: str, source: str, mode: str) -> Path:
    """A shared library with `msl_entry` and the runtime; mode: 'trace' (checked) or 'fast'."""
    compiled = _make(f"{mode} {source}", ".o", [*compiler().clang, *_KERNEL, *MODES[mode]], name, source)
    return _make(f"{mode} library {source}", ".so", [*compiler().linker, str(compiled), str(runtime())], name)
