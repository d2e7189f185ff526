"""Kernels that Apple's compiler made, run beside the same Metal source compiled through our shim. By hand:

    pip download --no-deps --only-binary=:all: --platform macosx_15_0_arm64 mlx-metal==<version of mlx>
    python -m parity_tests.msl.apple_oracle --wheel mlx_metal-*.whl

The macOS wheel carries mlx.metallib: MLX's own kernels as AIR, which is LLVM bitcode with calls of air.* functions.
The Linux wheel of the same version carries the headers that they were compiled from. Each kernel of apple_kernels.py
runs on the executor's fibers twice: as Apple's bitcode, bound to its buffers by Apple's metadata, and as MLX's header
through shim/metal_stdlib, bound by the signature in the text. All bits of the outputs must be equal, in the fast and in
the checked build. Needs what the executor needs: ziglang's clang, or an installed one as new as Apple's LLVM.
"""

import argparse
import platform
import re
import sys
import zipfile
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx
import mlx.core as mx
import numpy as np
import numpy.typing as npt

from parity_tests.msl import compiler, executor
from parity_tests.msl.apple_air import ENTRY, IDS, Metallib, apple_unit, made_by, thread_attribute, unit_of
from parity_tests.msl.apple_kernels import Case, cases
from parity_tests.msl.capture import KernelError, Launch
from parity_tests.msl.source import HERE, Unit, shared_arrays

REPORT = HERE / "apple_oracle.md"
MOST_ERROR = 0.01  # of the largest value: both sides compute the right thing, not only the same
_HEADING = "## Result"
_Array = npt.NDArray[Any]
_HEADERS = Path(mlx.__path__[0]) / "include/mlx/backend/metal/kernels"
# What MLX's headers use beyond the shim, and what they get from headers that the shim cannot read (complex numbers).
# For bfloat, bf16_math.h says the same: through float.
_PRELUDE = r"""
#include <metal_stdlib>
using namespace metal;
#define METAL_FUNC MSL_FN
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define ulong2(...) metal::shim::make<ulong2>(__VA_ARGS__)
#define ulong3(...) metal::shim::make<ulong3>(__VA_ARGS__)
template <class T> using uniform = T;
template <class T> constexpr T make_uniform(T x) { return x; }
namespace metal {
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
MSL_FN bool signbit(float x) { return __builtin_signbit(x); }
MSL_FN bfloat simd_sum(bfloat x, shim::site at = shim::site::here()) { return (bfloat)simd_sum((float)x, at); }
MSL_FN bfloat simd_max(bfloat x, shim::site at = shim::site::here()) { return (bfloat)simd_max((float)x, at); }
namespace fast { MSL_FN bfloat exp(bfloat x) { return (bfloat)exp((float)x); } }
}
template <class T> struct Limits;
#define LIMITS(T, most)                                                            \
  template <> struct Limits<T> {                                                   \
    static constexpr T max = (T)INFINITY, min = (T)-INFINITY;                      \
    static constexpr T finite_max = (T)most, finite_min = (T)-most;                \
  };
LIMITS(float, FLT_MAX) LIMITS(half, 65504.0f) LIMITS(bfloat, 3.3895313892515355e38f)
struct pointer { void* p; template <class T> operator T*() const { return (T*)p; } };
struct reference { void* p; template <class T> operator T&() const { return *(T*)p; } };
"""

_LEFT_OUT = r"complex|hypot|log1p|struct Limits|steel::|quad_|simd_shuffle_and_fill|gemv_wide"  # no case needs these


def _definitions(header: str) -> str:
    """The text of one of MLX's headers without its includes and without the definitions that no case needs."""
    text = re.sub(r"^#(include|pragma once).*$", "", (_HEADERS / header).read_text(), flags=re.M)
    text = re.sub(r"\[\[kernel, .*\]\] void", "[[kernel]] void", text).replace("[[threadgroup(0)]]", "")
    # clang has no cast from half to bfloat
    text = text.replace("(this->operator float16_t())", "(float(this->operator float16_t()))")
    pieces = re.split(r"(?<=^\};\n)|(?<=^\}\n)", text, flags=re.M)
    return "".join(p for p in pieces if not re.search(_LEFT_OUT, p))


def shim_unit(case: Case) -> Unit:
    """MLX's headers as they are, but for function constants, which get their values, and static threadgroup arrays."""
    text = "".join(_definitions(h) for h in ("defines.h", "utils.h", "steel/utils.h", *case.headers))
    text = re.sub(r"\[\[function_constant\((\d+)\)\]\];", lambda m: f"= {case.constants.get(int(m[1]), 0)};", text)
    for array in reversed(shared_arrays(text)):
        text = f"{text[: array.start()]}static MSL_SHARED {text[array.start() :]}"

    function = case.instance.split("<")[0]
    start = re.search(rf"\[\[kernel\]\] void {function}\(", text)
    assert start is not None, function
    signature = text[start.end() : text.index(") {", start.end())]
    arguments: list[str] = []
    number = 0
    for parameter in re.split(r",(?![^\[]*\]\])", signature):
        if place := re.search(r"\[\[buffer\((\d+)", parameter):
            number = int(place[1])
        elif known := re.search(r"(uint[23]?) \w+ \[\[(\w+)\]\]", parameter):
            arguments.append(thread_attribute(known[1], known[2]))
            continue
        arguments.append(f"{'reference' if '&' in parameter else 'pointer'}{{buffers[{number}]}}")
        number += 1
    call = f"static decltype(&{case.instance}) volatile call = &{case.instance}; call({', '.join(arguments)});"
    return unit_of(case, f"{_PRELUDE}{text}\n{IDS}\n{ENTRY} {{ {call} }}\n")


def run(case: Case, unit: Unit, mode: str) -> list[_Array]:
    buffers = [np.zeros_like(b) if i in case.outputs else b for i, b in enumerate(case.buffers)]
    bound = [(n, b, int(i in case.outputs)) for i, (n, b) in enumerate(zip(unit.buffers, buffers, strict=True))]
    launch = Launch(case.name, "", case.grid, case.threadgroup, [])
    executor._run(unit, launch, bound, mode, order=0, seed=1, filled=False)
    return [buffers[i] for i in case.outputs]


def different(a: list[_Array], b: list[_Array]) -> int:
    """How many values differ in a bit."""
    return sum(int((x.view(f"u{x.itemsize}") != y.view(f"u{y.itemsize}")).sum()) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Verdict:
    """values: of all outputs. shim: those in which a bit differs between Apple's code and the shim's; checked: the same
    in the checked builds; control: the same with a shim that fuses no a * b + c.
    error: Apple's code against MLX on this CPU, relative to the largest value."""

    name: str
    values: int
    shim: int
    checked: int
    control: int
    error: float

    @property
    def good(self) -> bool:
        return self.shim == self.checked == 0 and self.error < MOST_ERROR


def compare(case: Case, llvm: str) -> Verdict:
    apple, shim = run(case, apple_unit(case, llvm, "fast"), "fast"), run(case, shim_unit(case), "fast")
    checked = [run(case, apple_unit(case, llvm, "trace"), "trace"), run(case, shim_unit(case), "trace")]
    unit = shim_unit(case)
    control = run(case, replace(unit, execute=f"#pragma STDC FP_CONTRACT OFF\n{unit.execute}"), "fast")
    y = mx.array(apple[0]).view(mx.bfloat16) if apple[0].dtype == np.uint16 else mx.array(apple[0])
    got, expected = (np.array(v.astype(mx.float32)).ravel() for v in (y, case.expected))
    finite = np.isfinite(expected)
    return Verdict(
        *(case.name, sum(a.size for a in apple), different(apple, shim), max(different(apple, c) for c in checked)),
        different(apple, control),
        float(np.abs(got[finite] - expected[finite]).max() / np.abs(expected[finite]).max()),
    )


def _metallib(path: Path) -> bytes:
    if path.suffix != ".whl":
        return path.read_bytes()
    if f"-{version('mlx')}-" not in path.name:
        raise KernelError(f"{path}: not of mlx {version('mlx')}, whose headers are installed here")
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name.endswith("mlx.metallib"):
                return wheel.read(name)
    raise KernelError(f"{path}: no mlx.metallib in it; take the macOS wheel of mlx-metal")


def _result(verdicts: list[Verdict], made: str) -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    clang = re.findall(r"clang version ([\d.]+)", compiler.compiler().version)[0]
    good, values = sum(v.good for v in verdicts), sum(v.values for v in verdicts)
    rows = [f"| `{v.name}` | {v.values:,} | {v.shim} | {v.checked} | {v.control} | {v.error:.1e} |" for v in verdicts]
    return "\n".join(
        [
            *(_HEADING, "", f"{date.today()}. mlx-metal {version('mlx')} for macOS, which says of itself:", f"{made}."),
            f"Against the headers of mlx {version('mlx')} for Linux, with clang {clang}",
            f"on {model[1] if model else platform.machine()}.",
            *("", f"**{good} of {len(verdicts)} kernels are bit-equal** ({values:,} values)."),
            *("", "| kernel | values | differ | checked | control | error |", "|---|---|---|---|---|---|", *rows, ""),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """0: all equal, and the result is written. 1: some differ (written too). 2: bad input. 130: Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.msl.apple_oracle",
        description=f"Compares Apple-compiled kernels with their source through our shim; see {REPORT.name}.",
    )
    parser.add_argument(
        "--wheel", type=Path, required=True, help="mlx_metal-*.whl for macOS, of the installed mlx; or its mlx.metallib"
    )
    path = parser.parse_args(arguments).wheel
    try:
        library = Metallib(_metallib(path))
        verdicts = []
        for case in cases():
            verdicts.append(compare(case, library.llvm(case.name)))
            print(f"{'equal' if verdicts[-1].good else 'DIFFERENT'}  {case.name}")
    except (KernelError, OSError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    prose = REPORT.read_text().partition(_HEADING)[0]
    REPORT.write_text(prose + _result(verdicts, made_by(library.llvm(verdicts[0].name))))
    return int(not all(v.good for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
