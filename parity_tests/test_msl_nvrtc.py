"""Kernels written for Metal compile as CUDA with the prelude, and what CUDA would refuse is refused here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from parity_tests.msl import CudaReport, KernelError, compiling_cuda, executing
from parity_tests.msl.nvrtc import HAS_WHEELS, cuda_text

if not HAS_WHEELS:
    pytest.skip("NVRTC's wheels are installed on Linux x86-64 only", allow_module_level=True)

PRELUDE = (Path(__file__).resolve().parent.parent / "kernels" / "cuda_prelude.h").read_text()
IN_GRID = "uint i = thread_position_in_grid.x; "


@dataclass(frozen=True)
class Call:
    """One kernel of 64 threads from x (64 floats), halves (256), words (256 uint32) and ids (4 int32) to y."""

    body: str
    header: str = ""
    dtype: mx.Dtype = mx.float32
    grid: tuple[int, int, int] = (64, 1, 1)
    threadgroup: tuple[int, int, int] = (64, 1, 1)
    scalar: bool = False

    def build(self) -> Any:
        arguments: dict[str, Any] = {
            "name": "k",
            "input_names": ["x", "halves", "words", "ids"],
            "output_names": ["y"],
            "source": self.body,
        }
        if mx.cuda.is_available():
            return mx.fast.cuda_kernel(**arguments, header=PRELUDE + self.header)
        return mx.fast.metal_kernel(**arguments, header=self.header)

    def launch(self) -> mx.array:
        rng = np.random.default_rng(0)
        x = mx.array(rng.standard_normal(64, np.float32))
        inputs = [
            mx.array(1.0) if self.scalar else x,
            mx.array(rng.standard_normal(256, np.float32).astype(np.float16)),
            mx.array(rng.integers(0, 2**32, 256, np.uint32)),
            mx.array([3, 1, 0, 2], mx.int32),
        ]
        (y,) = self.build()(
            inputs=inputs,
            template=[("T", self.dtype), ("N", 64), ("B", True)],
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=[(64,)],
            output_dtypes=[self.dtype],
        )
        return y

    def compile(self) -> CudaReport:
        with compiling_cuda() as reports:
            y = self.launch()
        assert y.shape == (64,)
        assert y.dtype == self.dtype
        assert not np.array(y.astype(mx.float32)).any()
        return reports[0]


# What the prelude offers, in kernels of the kind we write. Each must also be Metal: the executor runs the same text.
HELPERS = """
constant float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};
struct Pair { float v[2]; float sum; };
template <int BITS, int ZERO>
struct Scaled {
  const device uint32_t* quants;
  const device float16_t* scales;
  float at(uint i) const thread {
    const uint word = quants[i * BITS / 32];
    return float(scales[i / 32]) * float(int((word >> (i * BITS % 32)) & ((1u << BITS) - 1u)) - ZERO);
  }
};
template <typename W>
inline float total(W weights, uint n) {
  float sum = 0.0f;
#pragma unroll
  for (uint i = 0; i < n; ++i) {
    sum += weights.at(i);
  }
  return sum;
}
inline void pair(const device float* p, thread Pair& out) {
  out.v[0] = p[0];
  out.v[1] = p[0] * 3.0f;
  out.sum = out.v[0] + out.v[1];
}
inline float first(const constant int* p) { return float(p[0]); }
"""
ATTRIBUTES = """
uint3 p = thread_position_in_grid;
uint3 n = threads_per_grid;
const uint i = (p.z * n.y + p.y) * n.x + p.x;
const uint more = thread_position_in_threadgroup.x + threadgroup_position_in_grid.y + threads_per_threadgroup.y
    + threadgroups_per_grid.z + thread_index_in_threadgroup + thread_index_in_simdgroup
    + simdgroup_index_in_threadgroup * 32 + simdgroups_per_threadgroup + threads_per_simdgroup;
"""
WORDS = {
    "helpers and templates": Call(
        IN_GRID
        + "Pair q; pair(x + i, q); Scaled<4, 8> w = {words + (i & 7u) * 4, halves + (i & 7u)}; "
        + "y[i] = T(q.sum + total(w, 32) + table[i & 3] + first(ids));",
        HELPERS,
    ),
    "an input that is written": Call(
        "// writes: x\n"
        + IN_GRID
        + "device float* rows = (device float*)x; rows[i] = float(halves[i]); y[i] = T(rows[i]);"
    ),
    "attributes": Call(ATTRIBUTES + "y[i] = T(float(more));", grid=(8, 4, 2), threadgroup=(8, 4, 1)),
    "vectors": Call(
        IN_GRID
        + """
float4 v = ((const device float4*)x)[i & 15u];
half4 h = ((const device half4*)halves)[i];
uint4 u = ((const device uint4*)words)[i];
float4 f = float4(h) * v + 2.0f - v / 3.0f;
f += float4(1.0f);
f = -f * float4(float2(1.0f, 2.0f), v.z, v.w) + float4(float3(v.x), 1) + vec<float, 4>(u >> 20 & 0xFFu);
u = (u ^ 3u) | (u << 2) & ~u;
u.y %= 7u;
const uint2 w = i > 3u ? uint2(1u, i) : uint2(u.w & 15u);
const half2 pair = as_type<half2>(u[2] & 0x3FFF3FFFu);
y[i] = dot(f, v) + f[2] + float(h.w) + float(w.x + w.y) + float(dot(pair, half2(1.0f)));
""",
    ),
    "bits": Call(
        IN_GRID
        + "uint u = words[i] & 0x7FFFFFu | 0x3F800000u; float f = as_type<float>(u); "
        + "half2 h = as_type<half2>(u & 0x3FFF3FFFu); uint4 four = ((const device uint4*)words)[i]; "
        + "y[i] = f + float(as_type<uint>(h) & 255u) + as_type<float>(four.y & 0x3FFFFFFFu) + float(popcount(u));",
    ),
    "arithmetic": Call(
        IN_GRID
        + """
const float a = fabs(x[i]) + 0.5f;
float s = exp(-a) + log(a) + sqrt(a) + rsqrt(a) + metal::tanh(a) + exp2(a) + log2(a);
s += precise::exp(-a) + metal::precise::rsqrt(a) + precise::log(a) + fast::exp(-a) + fast::rsqrt(a);
s += fma(a, 2.0f, 1.0f) + min(a, 3.0f) + max(a, 2.0f) + clamp(a, 0.0f, 1.0f) + select(a, 1.0f, a > 2.0f) + abs(-a);
s += float(min(i, 3u)) + float(clamp(int(i), 2, 5)) + (isnan(a) || isinf(a) ? NAN : 0.0f);
s += 1.0f / INFINITY + float4(exp(float4(a)) + clamp(float4(a), float4(0.0f), float4(1.0f)))[1];
y[i] = s;
""",
    ),
    "half beside float": Call(
        IN_GRID
        + "half h = halves[i]; const float f = x[i]; float s = h * f + f / (h * h + half(1.0f)) - h; h += f; "
        + "h = max(h, half(0.25f)) + exp(half(-1.0f)); y[i] = T(s + float(h < f) + float(fma(h, h, h)) + float(-h));",
        dtype=mx.float16,
    ),
    "bfloat16": Call(IN_GRID + "T b = T(x[i]); b += T(1.0f); y[i] = T(float(b) * 2.0f);", dtype=mx.bfloat16),
    "simdgroups": Call(
        IN_GRID
        + """
const float f = x[i];
const float4 v = simd_sum(float4(f)) + simd_shuffle_xor(float4(f), 2);
float s = simd_sum(f) + simd_max(f) + simd_min(f) + v.z;
s += simd_shuffle(f, ushort(31 - i % 32)) + simd_shuffle_down(f, 1) + simd_shuffle_up(f, 1) + simd_broadcast(f, 3);
s += float(simd_max(i) + simd_min(words[i] & 15u) + simd_sum(i)) + float(simd_max(halves[i]));
s += float(simd_max(ushort(i))) + float(simd_min(int(i)));
simdgroup_barrier(mem_flags::mem_none);
threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
y[i] = simd_any(f > 1.0f) && !simd_all(f > 1.0f) ? s : 0.0f;
""",
    ),
    "constants of the launch": Call(
        IN_GRID + "y[i] = B ? T(x[i] + float(N) + float(x_shape[0]) + float(x_ndim)) : T(0);"
    ),
}


@pytest.mark.parametrize("name", WORDS)
def test_metal_words_compile_as_cuda(name: str) -> None:
    report = WORDS[name].compile()
    assert 0 < report.registers < 128
    assert report.binary > 1000
    assert report.spilled == 0


@pytest.mark.parametrize("name", WORDS)
def test_metal_words_are_metal(name: str) -> None:
    with executing():
        y = WORDS[name].launch()
    assert np.isfinite(np.array(y.astype(mx.float32))).all()


def test_report_counts_registers_and_shared_memory() -> None:
    call = Call("__shared__ float t[64]; " + IN_GRID + "t[i] = x[i]; __syncthreads(); y[i] = t[63 - i];")
    report = call.compile()
    assert report.shared_memory >= 256
    assert (report.grid, report.threadgroup) == ((64, 1, 1), (64, 1, 1))
    assert report.text.startswith('\n#include "mlx/backend/cuda/device/utils.cuh"')
    assert "#line" not in report.text
    small = Call(IN_GRID + "y[i] = x[i];").compile()
    assert report.registers >= small.registers > 0
    assert small.shared_memory < 256


MANY = """
float a[120];
#pragma unroll
for (int j = 0; j < 120; ++j) a[j] = x[(i + j) & 63u];
for (uint k = 0; k < words[0]; ++k) {
#pragma unroll
  for (int j = 0; j < 120; ++j) a[j] = fma(a[(j + 1) % 120], a[j], float(k));
}
float s = 0.0f;
#pragma unroll
for (int j = 0; j < 120; ++j) s += a[j];
y[i & 63u] = s;
"""
BAD = {
    "undeclared name": (Call(IN_GRID + "\n\ny[i] = x[i] * scale;"), r'k\.metal:3: error: identifier "scale"'),
    "undeclared name in the header": (
        Call(IN_GRID + "y[i] = f(x[i]);", "\ninline float f(float v) { return v * scale; }\n"),
        r'k\.h\.metal:2: error: identifier "scale"',
    ),
    "swizzle": (Call(IN_GRID + "float4 v = float4(x[i]); y[i] = dot(v.xy, v.zw);"), 'has no member "xy"'),
    "vector of too few": (Call(IN_GRID + "y[i] = float4(x[i], 1.0f).x;"), "wrong number of components"),
    "write to an input": (Call("ids[0] = 1; y[0] = 0.0f;"), "must be a modifiable lvalue"),
    "helpers that differ in address space only": (
        Call(
            IN_GRID + "y[i] = f(x);",
            "inline float f(const device float* p) { return p[0]; }\n"
            "inline float f(const threadgroup float* p) { return p[1]; }\n",
        ),
        "has already been defined",
    ),
    "helper with a name that MLX hides": (
        Call(IN_GRID + "y[i] = load_vector(x);", "inline float load_vector(const device float* p) { return p[0]; }\n"),
        "too many arguments in function call|cannot be used to initialize|void",
    ),
    "as_type of another size": (Call(IN_GRID + "y[i] = as_type<float>(halves[i]);"), "the sizes differ"),
    "more than 48 KB of shared memory": (
        Call("__shared__ float t[13000]; " + IN_GRID + "t[i] = x[i]; __syncthreads(); y[i] = t[63 - i];"),
        "52000 bytes of shared memory; CUDA allows 49152",
    ),
    "more registers than a threadgroup has": (
        Call(IN_GRID + MANY, grid=(1024, 1, 1), threadgroup=(1024, 1, 1)),
        "1024 threads of .* registers need .*; a threadgroup has 65536",
    ),
    "more than 1024 threads": (
        Call(IN_GRID + "y[i & 63u] = x[0];", grid=(2048, 1, 1), threadgroup=(2048, 1, 1)),
        "2048 threads in a threadgroup",
    ),
    "too many threadgroups": (
        Call(IN_GRID + "y[i & 63u] = x[0];", grid=(64, 70000, 1), threadgroup=(64, 1, 1)),
        "70000, 1] threadgroups; CUDA allows",
    ),
    "grid of a fraction": (Call(IN_GRID + "y[i] = x[0];", grid=(40, 1, 1), threadgroup=(32, 1, 1)), "not a multiple"),
    "input without dimensions": (Call(IN_GRID + "y[i] = x[0];", scalar=True), "without dimensions"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cuda_refuses_is_refused(name: str) -> None:
    call, why = BAD[name]
    with pytest.raises(KernelError, match=why):
        call.compile()


def test_a_kernel_outlives_its_block_for_the_next_one() -> None:
    call = Call(IN_GRID + "y[i] = x[i];")
    with compiling_cuda():
        kernel = call.build()
    arguments = {"output_shapes": [(64,)], "output_dtypes": [mx.float32], "grid": (64, 1, 1), "threadgroup": (64, 1, 1)}
    inputs = [mx.zeros(64), mx.zeros(8, mx.float16), mx.zeros(8, mx.uint32), mx.zeros(8, mx.int32)]
    with compiling_cuda() as reports:
        kernel(inputs=inputs, **arguments)
    assert len(reports) == 1
    with pytest.raises(KernelError, match="outside of compiling_cuda"):
        kernel(inputs=inputs, **arguments)


@pytest.mark.skipif(not mx.cuda.is_available(), reason="MLX has no CUDA back end here, so it builds no CUDA text")
def test_text_is_what_mlx_builds(capfd: pytest.CaptureFixture[str]) -> None:
    body, header, template = "y[0] = x_shape[0] * B;", "// header\n", [("T", mx.bfloat16), ("N", -3), ("B", True)]
    kernel = mx.fast.cuda_kernel(name="k", input_names=["x", "b"], output_names=["y", "z"], source=body, header=header)
    x, b = mx.zeros((2, 2), mx.float16), mx.zeros((4,), mx.bool_)
    outputs = kernel(
        inputs=[x, b],
        template=template,
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[(1,), (1,)],
        output_dtypes=[mx.float32, mx.bfloat16],
        verbose=True,
        stream=mx.gpu,
    )
    del outputs  # built, and never launched
    printed = capfd.readouterr().out
    text = cuda_text("k", [("x", x), ("b", b)], [("y", mx.float32), ("z", mx.bfloat16)], body, header, template)
    assert str(text) in printed
    assert f"`{text.entry}`" in printed
