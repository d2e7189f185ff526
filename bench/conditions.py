"""Where and with what a figure was measured: stands beside every table and in every JSON file."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from rich.filesize import decimal

from bench import gpu_time
from bench.timing import summarize
from glm_mlx.memory import available_memory
from glm_mlx.model import Model
from glm_mlx.model_cases import decode_cases
from kernels import launcher
from kernels.cache_folder import read_own
from kernels.check import check
from kernels.shapes import user_file

ROOT = Path(__file__).resolve().parents[1]
COPIES = (4, 16)  # of each buffer in one go; the difference between the two is free of the time to start and to wait

_APPLE, _NVIDIA = "Apple, technical specifications", "NVIDIA, data sheet"
# Memory bandwidth in GB/s by the makers' word: (device name, GPU cores where a chip comes in two, else None).
QUOTED: dict[tuple[str, int | None], tuple[float, str]] = {
    (f"Apple {chip}", cores): (rate, _APPLE)
    for chip, cores, rate in (
        ("M1", None, 68.3),
        ("M1 Pro", None, 200),
        ("M1 Max", None, 400),
        ("M1 Ultra", None, 800),
        ("M2", None, 100),
        ("M2 Pro", None, 200),
        ("M2 Max", None, 400),
        ("M2 Ultra", None, 800),
        ("M3", None, 100),
        ("M3 Pro", None, 150),
        ("M3 Max", 30, 300),
        ("M3 Max", 40, 400),
        ("M3 Ultra", None, 819),
        ("M4", None, 120),
        ("M4 Pro", None, 273),
        ("M4 Max", 32, 410),
        ("M4 Max", 40, 546),
        ("M5", None, 153),
        ("M5 Pro", None, 307),
        ("M5 Max", 32, 460),
        ("M5 Max", 40, 614),
    )
} | {
    (f"NVIDIA {name}", None): (rate, _NVIDIA)
    for name, rate in (
        ("H200", 4800),
        ("H100 80GB HBM3", 3350),
        ("H100 PCIe", 2000),
        ("A100-SXM4-80GB", 2039),
        ("GeForce RTX 3090", 936),
        ("GeForce RTX 4090", 1008),
        ("GeForce RTX 5090", 1792),
    )
}


def conditions(copy: bool = True) -> dict[str, Any]:
    """Machine, system, power, versions, commit and memory bandwidth, as JSON can hold them.

    What can't be found out is None. Measuring the bandwidth takes a second or two, and uses `gpu_time`; without `copy`
    the caller adds it.
    """
    info = mx.device_info()
    chip = str(info.get("device_name", platform.processor() or platform.machine()))
    gpu_cores = _apple_gpu_cores()
    quoted = QUOTED.get((chip, gpu_cores), QUOTED.get((chip, None)))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "chip": chip,
        "back_end": back_end(),
        "device_info": {
            key: value if isinstance(value, int | float) else str(value)
            for key, value in info.items()
            if key not in ("uuid", "pci_bus_id")  # of this one card
        },
        "gpu_cores": gpu_cores,
        "gpu_settings": _output("nvidia-smi", f"--query-gpu={_NVIDIA_FIELDS}", "--format=csv,noheader")
        if back_end() == "cuda"
        else None,
        "cpu_cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": _system(),
        "power_source": _power_source(),
        "power_mode": _power_mode(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "numpy": version("numpy"),
        "glm_mlx": _own_version(),
        "commit": commit(),
        "clean": is_clean(),
        "source_sha256": source_hash(),
        "own_launch_shapes": _quietly(lambda: read_own(user_file()).decode(errors="replace")),
        "mlx_environment": _mlx_environment(),
        "gpu_time": "CUPTI, through PyTorch's profiler" if gpu_time.available() else None,
        "copy": copy_bandwidth() if copy else None,
        "quoted_gb_s": quoted[0] if quoted else None,
        "quoted_by": quoted[1] if quoted else None,
    }


def _mlx_environment() -> dict[str, str]:
    """Without the folder of compiled kernels: a path of this machine, and no figure depends on it."""
    return {k: v for k, v in os.environ.items() if k.startswith("MLX_") and k != "MLX_PTX_CACHE_DIR"}


def describe(found: dict[str, Any]) -> list[str]:
    """The same in two or three lines for a person."""
    cores = f", {found['gpu_cores']} GPU cores" if found["gpu_cores"] else ""
    quoted = f"; {found['quoted_gb_s']:,.0f} GB/s by {found['quoted_by']}" if found["quoted_gb_s"] else ""
    power = ", ".join(str(found[key]) for key in ("power_source", "power_mode") if found[key]) or "unknown"
    copy = found["copy"]
    measured = (
        f"{copy['gb_s']:,.1f} GB/s, measured by copies of {decimal(copy['bytes'])} there ({copy['by']})"
        if copy
        else "not measured"
    )
    return [
        f"{found['chip']}{cores} ({found['back_end']}), {found['cpu_cores']} CPU cores, "
        f"{decimal(found['memory_bytes'])} memory, {found['os']}, power: {power}",
        f"glm-mlx {found['glm_mlx']} at {found['commit'] or 'source ' + found['source_sha256']}, MLX {found['mlx']}, "
        f"Python {found['python']}",
        f"memory bandwidth {measured}{quoted}",
    ]


def back_end() -> str:
    """ "metal", "cuda" or "cpu"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def copy_bandwidth() -> dict[str, Any] | None:
    """Bytes read and written a second by a device that copies: {"gb_s", "bytes" of a copy, "seconds" by copies, "by"}.

    A copy is an elementwise operation that reads every word of one buffer and writes every word of another. Where the
    GPU tells what it was busy with, its own time counts, as it does for launches. None where memory is too short
    for a copy, or the machine so busy that more of them took no longer.
    """
    mx.clear_cache()  # what MLX keeps for itself is memory that seems not to be there
    most, rounds = (32 << 20, 3) if back_end() == "cpu" else (256 << 20, 10)
    words = min(most, available_memory() // (4 * COPIES[-1])) // 4
    source = mx.random.split(mx.random.key(0), words // 2)
    mx.eval(source)

    def seconds(copies: int) -> float:
        start = time.perf_counter()
        copy(copies)
        return time.perf_counter() - start

    def copy(copies: int) -> None:
        buffers = [source]
        for _ in range(copies):  # the list keeps them all, so that none is overwritten in place
            buffers.append(mx.bitwise_invert(buffers[-1]))
        mx.eval(buffers[-1])

    for _ in range(2):
        seconds(COPIES[-1])
    by_gpu = gpu_time.available()
    if by_gpu:
        samples = {n: [gpu_time.busy_seconds(lambda n=n: copy(n)) for _ in range(3)] for n in COPIES}  # type: ignore[misc]
    else:
        samples = {n: [seconds(n) for _ in range(rounds)] for n in COPIES}
    few, many = (summarize(samples[copies]).median for copies in COPIES)
    moved = (COPIES[1] - COPIES[0]) * 2 * source.nbytes
    if not moved or many <= few:
        return None
    return {
        "gb_s": moved / (many - few) / 1e9,
        "bytes": source.nbytes,
        "seconds": samples,
        "by": "GPU time" if by_gpu else "wall time",
    }


def parity(model: Model) -> dict[str, Any]:
    """Whether the kernels that a decoded token launches agree with their twins, on this device and now.

    {"path", "checked" calls, "agree", "differ": [{"call", "error"}]}. On a device without kernels nothing is checked:
    path is "twins", agree None.
    """
    cases = [case for case in decode_cases(model) if case.has_kernel] if has_kernels() else []
    differ = []
    for case in cases:
        if error := check(case, timed=False).summary:
            differ.append({"call": f"{case.op}: {case.variant}, {case.shapes}, {case.dtype}", "error": error})
        mx.clear_cache()  # of what the twin expanded
    return parity_state(len(cases), differ)


def parity_state(checked: int, differ: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What `parity` returns, for calls that were checked elsewhere."""
    return {
        "path": "kernels" if has_kernels() else "twins",
        "checked": checked,
        "agree": not differ if checked else None,
        "differ": [*differ],
    }


def describe_parity(found: dict[str, Any]) -> str:
    """The same in a line for a person."""
    if found["path"] == "twins":
        return "parity: this device launches no kernels; their twins, which define what is right, are the path"
    agree = f"{found['checked'] - len(found['differ'])} of {found['checked']} calls of kernels agree with their twins"
    first = "".join(f"; {one['call']}: {one['error']}" for one in found["differ"][:1])
    return f"parity: {agree}{first}" + ("; THESE ARE SPEEDS OF A WRONG RESULT" if found["differ"] else "")


def has_kernels() -> bool:
    return any(launcher.back_end(op) is not None for op in launcher.OPS)


def commit() -> str | None:
    """The short hash of the checkout, "+" if it is not clean; None outside of git."""
    short = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    return short and short + ("" if is_clean() else "+")


def is_clean() -> bool | None:
    """Whether all tracked files are as committed; None outside of git."""
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return None if changed is None else not changed


def source_hash() -> str:
    """Of the text that runs, kernels and product: the same on every machine with the same files, also outside git."""
    digest = hashlib.sha256()
    for path in sorted((*ROOT.glob("glm_mlx/*.py"), *ROOT.glob("kernels/*.*"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


_NVIDIA_FIELDS = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,persistence_mode"


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    name = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {name}"
    except (OSError, KeyError):
        return name


def _own_version() -> str | None:
    try:
        return version("glm-mlx")
    except PackageNotFoundError:
        return None


def _power_source() -> str | None:
    if sys.platform == "darwin":  # a Mac without a battery has a source too
        words = (_output("pmset", "-g", "ps") or "").split("'")
        return {"AC Power": "AC power", "Battery Power": "battery"}.get(words[1], words[1]) if len(words) > 1 else None
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None or battery.power_plugged is None:
        return None
    return "AC power" if battery.power_plugged else "battery"


def _power_mode() -> str | None:
    if sys.platform == "darwin":
        modes = {"0": "automatic", "1": "low power", "2": "high power"}
        for line in (_output("pmset", "-g") or "").splitlines():
            name, _, value = line.strip().partition(" ")
            if name in ("powermode", "lowpowermode"):
                return modes.get(value.strip(), value.strip())
        return None
    for path in ("/sys/firmware/acpi/platform_profile", "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"):
        if text := _quietly(Path(path).read_text):
            return text.strip()
    return None


def _apple_gpu_cores() -> int | None:
    if sys.platform != "darwin":
        return None
    try:
        displays = json.loads(_output("system_profiler", "SPDisplaysDataType", "-json") or "{}")
        return int(displays["SPDisplaysDataType"][0]["sppci_cores"])
    except (ValueError, KeyError, IndexError):
        return None


def _quietly(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
