"""Whether the kernels work on the present device: each is compiled, run and held against its twin.

The twin computes in float32, so a kernel may differ by the rounding of its outputs and a little of its sums. A fault of
one row, one lane or 1 % of a scale is far outside of that. What cannot be seen from here is a kernel that never ends,
or that takes the process with it.
"""

import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from kernels import launcher
from kernels.cache_folder import read_own
from kernels.cases import Case
from kernels.compiled import compile_ahead
from kernels.shapes import user_file

# Relative error of a rounding to the type of an output: the last is of the value itself, and what was rounded before (a
# row of the cache) is a part of it. Sums in float32 stay far below the second.
ROUNDING = {mx.float32: 2.0**-24, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11}
OF_LARGEST = 1e-4
TIMED_SECONDS = 0.005  # for each of three samples


@dataclass(frozen=True)
class Result:
    """compiles and agrees are None where there was no kernel, or it did not get that far; error is what went wrong."""

    compiles: bool | None = None
    agrees: bool | None = None
    error: str | None = None
    microseconds: float | None = None
    gb_s: float | None = None

    @property
    def summary(self) -> str | None:
        """The error in one line: its first, and what a compiler says further down."""
        if self.error is None:
            return None
        first, *rest = self.error.splitlines()
        detail = next((line for line in rest if "error" in line), "")
        return " ".join(f"{first} {detail}".split())[:300]


def check(case: Case, timed: bool, on_compiled: Callable[[], None] = lambda: None) -> Result:
    """Never raises for what a kernel does. Without a GPU the twin is run, and timed.

    `on_compiled` is called when the kernel is compiled and has not yet run, for a caller who may not live to see that.
    """
    has_kernel = launcher.back_end(case.op) is not None
    compiles = False if has_kernel else None
    try:
        if has_kernel:
            launches = case.launches()
            if not launches:
                return Result(False, error="its kernel does not take this call")
            compile_ahead(launches)
        # First, as a kernel may write into its inputs.
        expected = case.expected()
        mx.eval(expected)
        outputs = case.run()
        mx.async_eval(outputs)  # compiles before it returns
        if has_kernel:
            compiles = True
            on_compiled()
        mx.eval(outputs)
        error = difference(outputs, expected)
    except Exception as failure:  # whatever MLX, its compiler or its driver raises
        return Result(compiles, error=str(failure).strip() or repr(failure))
    agrees = error is None if has_kernel else None
    seconds = _seconds(case.run) if timed and error is None else None
    return Result(compiles, agrees, error, seconds and 1e6 * seconds, seconds and case.nbytes / seconds / 1e9)


def difference(got: Sequence[mx.array], expected: Sequence[mx.array]) -> str | None:
    """In words, or None. Integers must be equal, but for rows of the cache in 8 bits, whose values may be rounded to a
    neighbour; floats, after the rounding of their type; NaN is equal to NaN."""
    if len(got) != len(expected):
        return f"{len(got)} outputs, its twin {len(expected)}"
    for name, a, b in zip(("first", "second", "third"), got, expected, strict=False):
        if a.shape != b.shape:
            return f"the {name} output has shape {a.shape}, its twin {b.shape}"
        if a.dtype == mx.uint8:
            wrong = a - b + 1 > 2  # modulo 256, as a float16's lower byte may pass into the upper one
        elif mx.issubdtype(a.dtype, mx.integer):
            wrong = a != b
        else:
            rounding = ROUNDING[a.dtype]
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            size = mx.abs(b)
            largest = mx.where(mx.isfinite(size), size, 0).max()
            allowed = rounding * (1.5 * size + 0.5 * largest) + OF_LARGEST * largest
            close = (mx.abs(a - b) <= allowed) & mx.isfinite(b)
            wrong = mx.logical_not(close | (a == b) | (mx.isnan(a) & mx.isnan(b)))
        if count := int(wrong.sum()):
            return f"{count:,} of {a.size:,} values of the {name} output differ from the twin's"
    return None


def _seconds(call: Callable[[], list[mx.array]]) -> float:
    """Of one launch among many that do not wait for one another; the median of three samples."""
    times: list[float] = []
    launches = 1
    while len(times) < 3:
        start = time.perf_counter()
        mx.eval([call() for _ in range(launches)])
        seconds = time.perf_counter() - start
        if seconds < TIMED_SECONDS and launches < 256 and not times:
            launches *= 2
        else:
            times.append(seconds / launches)
    return statistics.median(times)


def machine() -> dict[str, str]:
    """What a result holds for: device, system (Apple's compiler is part of it), MLX, and the text of the kernels, with
    the user's own launch shapes."""
    text = hashlib.sha256()
    for path in sorted(launcher.HERE.iterdir()):
        if path.is_file():
            text.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    with suppress(OSError):
        text.update(user_file().name.encode() + b"\0" + read_own(user_file()) + b"\0")
    back_end = "CPU"
    if mx.default_device() == mx.Device(mx.gpu):
        back_end = "Metal" if mx.metal.is_available() else "CUDA"
    mac = platform.mac_ver()[0]
    return {
        "device": str(mx.device_info().get("device_name", platform.machine())),
        "back end": back_end,
        "os": f"macOS {mac}" if mac else f"{platform.system()} {platform.release()} {platform.machine()}",
        "mlx": version("mlx"),
        "kernels": text.hexdigest()[:12],
    }
