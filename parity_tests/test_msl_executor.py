"""The executor itself: good kernels give numpy's results, and each bad kernel is refused for its own reason."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("the executor runs on Linux; a Mac runs the kernels themselves", allow_module_level=True)

from parity_tests.msl import KernelError, LaunchReport, executing
from parity_tests.msl.apple import LAUNCH, SHARED_CACHE, apple_time
from parity_tests.msl.capture import capture
from parity_tests.msl.source import translate

N = 64
X = np.arange(N, dtype=np.float32)
IN_GRID = "uint i = thread_position_in_grid.x; "
IN_GROUP = "uint i = thread_position_in_threadgroup.x; "
SHARED = "threadgroup float t[64]; " + IN_GROUP
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup); "


@dataclass(frozen=True)
class Call:
    """One kernel from x (64 floats) to y, and how it is launched."""

    body: str
    header: str = ""
    inputs: dict[str, Any] = field(default_factory=lambda: {"x": X})
    outputs: tuple[str, ...] = ("y",)
    size: int = N  # of each output
    dtype: mx.Dtype = mx.float32
    grid: tuple[int, int, int] = (N, 1, 1)
    threadgroup: tuple[int, int, int] = (N, 1, 1)
    template: tuple[tuple[str, Any], ...] = ()
    init_value: float | None = None

    def run(self, mode: str = "trace") -> tuple[list[mx.array], LaunchReport]:
        with executing(mode) as launches:
            kernel = mx.fast.metal_kernel(
                name="k",
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                source=self.body,
                header=self.header,
            )
            outputs = kernel(
                inputs=list(self.inputs.values()),
                grid=self.grid,
                threadgroup=self.threadgroup,
                output_shapes=[(self.size,)] * len(self.outputs),
                output_dtypes=[self.dtype] * len(self.outputs),
                template=list(self.template),
                init_value=self.init_value,
            )
        return outputs, launches[0]


@dataclass(frozen=True)
class Good:
    call: Call
    want: Callable[[], Any]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Bad:
    call: Call
    why: str


def by_simdgroup(reduce: Callable[[Any], Any]) -> Any:
    return np.concatenate([np.full(32, reduce(X[s : s + 32])) for s in (0, 32)])


GOOD = {
    "elementwise": Good(Call(IN_GRID + "y[i] = x[i] * 2.0f;"), lambda: 2 * X),
    "math": Good(
        Call(IN_GRID + "y[i] = exp(-x[i]) + rsqrt(x[i] + 1.0f);"), lambda: np.exp(-X) + 1 / np.sqrt(X + 1), 1e-6
    ),
    "threadgroup memory": Good(Call(SHARED + "t[i] = x[i]; " + BARRIER + "y[i] = t[63 - i];"), lambda: X[::-1]),
    "two arrays of threadgroup memory": Good(
        Call(
            "threadgroup float a[N]; threadgroup half b[2][N / 2];"
            + IN_GROUP
            + "a[i] = x[i]; b[i / 32][i % 32] = half(x[i]); "
            + BARRIER
            + "y[i] = a[63 - i] + float(b[1 - i / 32][i % 32]);",
            template=(("N", N),),
        ),
        lambda: X[::-1] + np.roll(X, 32),
    ),
    "a loop with both its barriers": Good(
        Call(
            SHARED
            + "float sum = 0.0f; for (int j = 0; j < 3; ++j) { t[i] = x[i] + float(j); "
            + BARRIER
            + "sum += t[63 - i]; "
            + BARRIER
            + "} y[i] = sum;"
        ),
        lambda: 3 * X[::-1] + 3,
    ),
    "simdgroup barrier": Good(
        Call(SHARED + "t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[i ^ 1];"),
        lambda: X[np.arange(N) ^ 1],
    ),
    "simd_sum": Good(Call(IN_GRID + "y[i] = simd_sum(x[i]);"), lambda: by_simdgroup(np.sum)),
    "simd_max and simd_min": Good(Call(IN_GRID + "y[i] = simd_max(x[i]) - simd_min(x[i]);"), lambda: np.full(N, 31.0)),
    "simd_sum of a vector": Good(
        Call(IN_GRID + "float4 v = simd_sum(float4(x[i], 1.0f, 0.0f, 2.0f)); y[i] = v.x + v.y + v.w;"),
        lambda: by_simdgroup(np.sum) + 96,
    ),
    "shuffles": Good(
        Call(
            IN_GRID
            + "y[i] = simd_shuffle_xor(x[i], 5) + simd_shuffle(x[i], ushort(31 - i % 32)) + simd_broadcast(x[i], 3);"
        ),
        lambda: X[np.arange(N) ^ 5] + X.reshape(2, 32)[:, ::-1].ravel() + np.repeat([3.0, 35.0], 32),
    ),
    "shuffle up and down": Good(
        Call(
            IN_GRID + "float d = simd_shuffle_down(x[i], 1); float u = simd_shuffle_up(x[i], 1); y[i] = d * 100.0f + u;"
        ),
        lambda: np.where(np.arange(N) % 32 == 31, X, X + 1) * 100 + np.where(np.arange(N) % 32 == 0, X, X - 1),
    ),
    "prefix sums": Good(
        Call(IN_GRID + "y[i] = simd_prefix_exclusive_sum(x[i]) + simd_prefix_inclusive_sum(x[i]);"),
        lambda: np.concatenate([2 * np.cumsum(X[s : s + 32]) - X[s : s + 32] for s in (0, 32)]),
    ),
    "simd_all and simd_any": Good(
        Call(IN_GRID + "y[i] = (simd_all(x[i] < 40.0f) ? 1.0f : 0.0f) + (simd_any(x[i] > 40.0f) ? 2.0f : 0.0f);"),
        lambda: np.repeat([1.0, 2.0], 32),
    ),
    "helpers with address spaces": Good(
        Call(
            IN_GRID + "float a[2]; pair(x + i, a); y[i] = a[0] + a[1];",
            "inline void pair(const device float* p, thread float* out) { out[0] = p[0]; out[1] = p[0] * 3.0f; }\n",
        ),
        lambda: 4 * X,
    ),
    "a template helper": Good(
        Call(
            IN_GRID + "y[i] = float(triple<T>(T(x[i])));",
            "template <typename U>\ninline U triple(U v) { return v * U(3); }\n",
            template=(("T", mx.float16),),
        ),
        lambda: 3 * X,
    ),
    "a constant table": Good(
        Call(IN_GRID + "y[i] = table[i & 3];", "constant float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};\n"),
        lambda: np.tile([1.0, 2.0, 3.0, 4.0], 16),
    ),
    "half in, vectors of four": Good(
        Call(
            IN_GRID
            + "const device half4* v = (const device half4*)x; "
            + "y[i] = dot(float4(v[i]), float4(1.0f, 0.0f, 2.0f, 0.0f));",
            inputs={"x": np.arange(4 * N, dtype=np.float16)},
        ),
        lambda: 12 * X + 4,
    ),
    "bfloat16 in and out": Good(
        Call(
            IN_GRID + "y[i] = T(float(x[i]) * 1.5f);",
            inputs={"x": mx.array(X).astype(mx.bfloat16)},
            dtype=mx.bfloat16,
            template=(("T", mx.bfloat16),),
        ),
        lambda: np.array(mx.array(1.5 * X).astype(mx.bfloat16).astype(mx.float32)),
    ),
    "bits": Good(
        Call(IN_GRID + "y[i] = as_type<float>(x[i] ^ 0x80000000u);", inputs={"x": X.view(np.uint32)}), lambda: -X
    ),
    "fewer than eight elements arrive as constant": Good(
        Call(IN_GRID + "y[i] = x[i] * s[1];", inputs={"x": X, "s": np.array([5, 7], np.float32)}), lambda: 7 * X
    ),
    "shapes and strides": Good(
        Call(
            IN_GRID + "y[i] = x[i] + float(x_shape[0]) * 100.0f + float(x_strides[0]) * 1000.0f + float(x_ndim);",
            inputs={"x": X.reshape(4, 16)},
        ),
        lambda: X + 400 + 16000 + 2,
    ),
    "three dimensions": Good(
        Call(
            "uint3 p = thread_position_in_grid; uint3 n = threads_per_grid; uint i = (p.z * n.y + p.y) * n.x + p.x; "
            "y[i] = x[i] + float(threadgroup_position_in_grid.y) * 100.0f + float(simdgroups_per_threadgroup);",
            grid=(8, 4, 2),
            threadgroup=(8, 2, 2),
        ),
        lambda: X + 100 * (np.arange(N) // 16 % 2) + 1,
    ),
    "partly written, with init_value": Good(
        Call(IN_GRID + "if (i < 60) y[i] = x[i];", init_value=9), lambda: np.where(X < 60, X, 9)
    ),
    "float denormals are flushed": Good(Call(IN_GRID + "y[i] = x[i] * 1e-41f * 1e38f;"), lambda: 0 * X),
    "a simdgroup that skips work": Good(
        Call(SHARED + "if (i < 32) { t[i] = simd_sum(x[i]); } " + BARRIER + "y[i] = t[i % 32];"),
        lambda: np.full(N, 496.0),
    ),
}

HELPER = "inline float f({} float* p) {{ return p[0]; }}\n"
BAD = {
    # refused by the type check
    "undeclared name": Bad(
        Call(IN_GRID + "y[i] = x[i] * scale;"), r"k\.metal:1:\d+: error: use of undeclared identifier 'scale'"
    ),
    "misspelt function": Bad(Call(IN_GRID + "y[i] = simd_summ(x[i]);"), "undeclared identifier 'simd_summ'"),
    "misspelt attribute": Bad(Call("uint i = thread_position_in_gird.x; y[i] = x[i];"), "thread_position_in_gird"),
    "attribute in the header": Bad(
        Call("y[0] = f();", "inline uint f() { return thread_position_in_grid.x; }\n"), r"k\.h\.metal:1.*undeclared"
    ),
    "double": Bad(Call(IN_GRID + "double d = x[i]; y[i] = d;"), "double_is_not_a_Metal_type"),
    "write to an input": Bad(Call(IN_GRID + "x[i] = 1.0f; y[i] = 0.0f;"), "not assignable"),
    "write to an input, const cast away": Bad(
        Call(IN_GRID + "device float* p = (device float*)x; p[i] = 1.0f; y[i] = 0.0f;"),
        r"k\.metal:1: write to an input: .*'x'",
    ),
    "device pointer as threadgroup": Bad(Call(IN_GRID + "threadgroup float* p = y; p[i] = x[i];"), "cannot initialize"),
    "helper for another address space": Bad(
        Call(IN_GRID + "y[i] = f(x + i);", HELPER.format("const threadgroup")), "no matching"
    ),
    "small input to a device helper": Bad(
        Call(IN_GRID + "y[i] = f(s);", HELPER.format("const device"), inputs={"s": np.ones(2, np.float32)}),
        "no matching",
    ),
    "ambiguous min": Bad(Call(IN_GRID + "y[i] = x[min(i, 5)];"), "ambiguous"),
    "64-bit simd_sum": Bad(Call(IN_GRID + "y[i] = float(simd_sum(long(i)));"), "no matching"),
    "simd_sum of bfloat": Bad(Call(IN_GRID + "y[i] = float(simd_sum(bfloat(x[i])));"), "no matching"),
    "vector of too few": Bad(
        Call(IN_GRID + "float4 v = float4(x[i], x[i], x[i]); y[i] = v.x;"), "number of components"
    ),
    "vectors of two types": Bad(Call(IN_GRID + "int4 a = int4(1); float4 v = a; y[i] = v.x;"), "cannot initialize"),
    "uninitialised variable": Bad(Call(IN_GRID + "float a; y[i] = a + x[i];"), "uninitialized"),
    "uninitialised on one path": Bad(Call(IN_GRID + "float a; if (i > 3) a = 1.0f; y[i] = a;"), "uninitialized"),
    "array of unknown size": Bad(Call(IN_GRID + "float a[i + 1]; a[0] = x[i]; y[i] = a[0];"), "variable length"),
    "constant that needs code": Bad(
        Call(IN_GRID + "y[i] = t[i & 1];", "constant float t[2] = {metal::exp(1.0f), 2.0f};\n"), "constructor"
    ),
    "a position as a number": Bad(Call("uint i = thread_position_in_grid; y[i] = x[i];"), "uint3"),
    "MLX's broken signature": Bad(
        Call("y[0] = x[0]; z[0] = x_shape[0];", outputs=("y", "z"), size=1, grid=(1, 1, 1), threadgroup=(1, 1, 1)),
        "broken signature",
    ),
    # refused by the lint
    "double literal": Bad(Call(IN_GRID + "\ny[i] = x[i] * 2.0;"), r"k\.metal:2: a literal without f or h.*'2\.0'"),
    "exponent without suffix": Bad(Call(IN_GRID + "y[i] = x[i] * 1e-3;"), "a literal without f or h"),
    "static variable": Bad(Call(IN_GRID + "static float s; s = x[i]; y[i] = s;"), "static variables"),
    "lambda": Bad(Call(IN_GRID + "auto f = [](float v) { return v * 2.0f; }; y[i] = f(x[i]);"), "lambdas"),
    "goto": Bad(Call(IN_GRID + "if (i > 3) goto end; y[i] = x[i]; end: y[i] = 0.0f;"), "goto"),
    "std": Bad(
        Call(
            IN_GRID,
            "namespace std { inline float two() { return 2.0f; } }\n" + "inline float g() { return std::two(); }\n",
        ),
        "namespace std",
    ),
    "unqualified pointer": Bad(
        Call(IN_GRID + "float a[2]; float* p = a; p[0] = x[i]; y[i] = p[0];"), "explicit address space"
    ),
    "unqualified reference": Bad(
        Call(IN_GRID + "float a = x[i]; twice(a); y[i] = a;", "inline void twice(float& p) { p *= 2.0f; }\n"),
        r"k\.h\.metal:1: pointer or reference without an explicit address space",
    ),
    "unqualified pointer to a template type": Bad(
        Call(IN_GRID + "T a[1]; T* p = a; p[0] = T(x[i]); y[i] = float(p[0]);", template=(("T", mx.float16),)),
        "explicit address space",
    ),
    "address space cast away": Bad(
        Call(IN_GRID + "\nthread float* p = (thread float*)y; p[i] = x[i];"),
        r"k\.metal:2: a cast between address spaces",
    ),
    "threadgroup memory as device": Bad(
        Call(SHARED + "t[i] = x[i]; device float* p = (device float*)t; y[i] = p[i];"), "a cast between address spaces"
    ),
    "comparison of vectors": Bad(
        Call(IN_GRID + "float2 a = float2(x[i]); int2 b = a < float2(1.0f); y[i] = float(b.x);"),
        "a comparison of vectors",
    ),
    "program-scope variable": Bad(
        Call(IN_GRID + "y[i] = x[i] * two;", "constexpr float two = 2.0f;\n"), "program-scope variable 'two'"
    ),
    "recursion": Bad(
        Call(IN_GRID + "y[i] = float(f(i));", "inline uint f(uint n) { return n < 2 ? 1 : n * f(n - 1); }\n"),
        "recursive call of 'f'",
    ),
    "threadgroup memory with a value": Bad(
        Call(IN_GRID + "threadgroup float t = 0.0f; y[i] = x[i];"), "cannot have an initialiser|initializer"
    ),
    "threadgroup memory in a helper": Bad(
        Call(
            IN_GRID + "y[i] = f(x[i]);", "inline float f(float v) { threadgroup float t[2]; t[0] = v; return t[0]; }\n"
        ),
        "outside a kernel|address space",
    ),
    "simdgroup's number in a branch": Bad(
        Call(IN_GRID + "if (i < 3) { y[i] = float(simdgroup_index_in_threadgroup); }"), "lanes must read this together"
    ),
    "reserved name": Bad(Call(IN_GRID + "float quad = x[i]; y[i] = quad;"), "reserved name"),
    "include": Bad(Call(IN_GRID + "y[i] = x[i];", "#include <metal_math>\n"), "included|file not found"),
    "compiler's own name": Bad(Call(IN_GRID + "y[i] = __builtin_expf(x[i]);"), "two underscores"),
    # refused before the launch
    "more than 1024 threads": Bad(
        Call(
            IN_GRID + "y[i] = x[i];",
            inputs={"x": np.zeros(2048, np.float32)},
            size=2048,
            grid=(2048, 1, 1),
            threadgroup=(2048, 1, 1),
        ),
        "2048 threads in a threadgroup",
    ),
    "grid of a fraction": Bad(
        Call(IN_GRID + "y[i] = x[i];", grid=(40, 1, 1), size=40, threadgroup=(32, 1, 1)), "not a multiple"
    ),
    "input without dimensions": Bad(
        Call(IN_GRID + "y[i] = x;", inputs={"x": np.array(1.0, np.float32)}), "without dimensions"
    ),
    "more than 32 KB of threadgroup memory": Bad(
        Call("threadgroup float t[8200];" + IN_GROUP + "t[i] = x[i]; y[i] = t[i];"), "32800 bytes; Metal allows 32768"
    ),
    # refused while running
    "read past the end": Bad(
        Call(IN_GRID + "\n\ny[i] = x[i + 1];"), r"k\.metal:3: out of bounds: read of 4 bytes at byte 256 of 'x'"
    ),
    "read before the start": Bad(
        Call(IN_GRID + "y[i] = x[int(i) - 1];"), "out of bounds: read of 4 bytes at byte -4 of 'x'"
    ),
    "write past the end": Bad(
        Call(IN_GRID + "y[i] = x[i]; if (i == 63) y[64] = 0.0f;"), "out of bounds: write of 4 bytes at byte 256 of 'y'"
    ),
    "threadgroup memory, past the end": Bad(
        Call("threadgroup float t[32]; " + IN_GROUP + "threadgroup float* p = t; p[i] = x[i]; y[i] = p[i];"),
        "out of bounds",
    ),
    "past the end of a thread's array": Bad(
        Call(IN_GRID + "float a[4]; for (int j = 0; j <= int(i & 7u); ++j) a[j] = x[i]; y[i] = a[0];"),
        "out of bounds: index 4",
    ),
    "past the end of a thread's array, in a function": Bad(
        Call(
            IN_GRID + "float a[4]; fill(a, x[i], int(i & 7u)); y[i] = a[0];",
            header="template <class A> inline void fill(thread A& a, float v, int last) "
            "{ for (int j = 0; j <= last; ++j) a[j] = v; }",
        ),
        "out of bounds: index 4",
    ),
    "read through a null pointer": Bad(
        Call(IN_GRID + "const device float* p = 0; y[i] = p[i];"), "null pointer: read of 4 bytes"
    ),
    "write through a null pointer": Bad(
        Call(IN_GRID + "device float* p = 0; p[1] = x[i]; y[i] = x[i];"), "null pointer: write of 4 bytes"
    ),
    "more private memory than a thread has": Bad(
        Call(IN_GRID + "float a[20000]; for (uint j = 0; j < 20000u; ++j) a[j] = x[j % 64u]; y[i] = a[i];"),
        "private memory: a thread uses more than 64 KB",
    ),
    "misaligned vector": Bad(
        Call(IN_GRID + "const device float4* p = (const device float4*)(x + 1); y[i] = p[0].x;"),
        "misaligned: read of (16|4) bytes",
    ),
    "output not written": Bad(
        Call(IN_GRID + "if (i < 60) y[i] = x[i];"), "output not written: 16 of 256 bytes of 'y', from byte 240"
    ),
    "missing barrier": Bad(Call(SHARED + "t[i] = x[i]; y[i] = t[63 - i];"), "uninitialised read|data race"),
    "missing barrier after a first round": Bad(
        Call(SHARED + "t[i] = x[i]; " + BARRIER + "t[i] += 1.0f; y[i] = t[63 - i];"), "data race: (read|write) of byte"
    ),
    "missing second barrier of a loop": Bad(
        Call(
            SHARED
            + "float s = 0.0f; for (int j = 0; j < 2; ++j) { t[i] = x[i]; "
            + BARRIER
            + "s += t[63 - i]; } y[i] = s;"
        ),
        "data race: (read|write) of byte .* with no barrier between",
    ),
    "barrier for the wrong memory": Bad(
        Call(SHARED + "t[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = t[63 - i];"), "data race"
    ),
    "simdgroup barrier between simdgroups": Bad(
        Call(SHARED + "t[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = t[63 - i];"),
        "uninitialised read|data race",
    ),
    "lanes that trust a shuffle to order memory": Bad(
        Call(SHARED + "t[i] = x[i]; float v = simd_sum(x[i]); y[i] = t[i ^ 1] + v;"), "data race"
    ),
    "uninitialised threadgroup memory": Bad(
        Call(SHARED + "if (i < 32) t[i] = x[i]; " + BARRIER + "y[i] = t[i];"),
        "uninitialised read: byte 128 of 'threadgroup memory'",
    ),
    "output read before it is written": Bad(Call(IN_GRID + "y[i] += x[i];"), "uninitialised read: byte 0 of 'y'"),
    "two threadgroups write one word": Bad(
        Call(IN_GROUP + "y[i] = x[thread_position_in_grid.x];", size=32, threadgroup=(32, 1, 1)), "data race: write"
    ),
    "all lanes write one word": Bad(Call(IN_GRID + "y[i] = x[i]; y[0] = 1.0f;"), "data race: write"),
    "a threadgroup reads what another wrote": Bad(
        Call(IN_GRID + "y[i] = x[i]; y[i] += y[i ^ 32];", threadgroup=(32, 1, 1)), "uninitialised read|data race"
    ),
    "barrier that half the threads meet": Bad(
        Call(IN_GROUP + "if (i < 32) " + BARRIER + "y[i] = x[i];"),
        "divergent threads: threads 0 to 31 wait in threadgroup_barrier at k.metal:1:.*; threads 32 to 63 have",
    ),
    "divergent collectives": Bad(
        Call(IN_GRID + "if (i % 2 == 0) y[i] = simd_sum(x[i]); else y[i] = simd_max(x[i]);"),
        "divergent lanes: threads 0 to 0 wait in simd_sum .*threads 1 to 1 wait in simd_max",
    ),
    "collective after some lanes have finished": Bad(
        Call(IN_GRID + "y[i] = 0.0f; if (i % 32 > 20) return; y[i] = simd_sum(x[i]);"),
        "divergent lanes: .* have finished",
    ),
    "collective in part of a simdgroup": Bad(
        Call(IN_GRID + "y[i] = simd_sum(x[i]);", grid=(40, 1, 1), size=40, threadgroup=(40, 1, 1)),
        "incomplete simdgroup",
    ),
    "endless loop": Bad(Call(IN_GRID + "while (x[i] >= 0.0f) {} y[i] = 0.0f;"), r"k\.metal:1: endless loop"),
    "endless loop of barriers": Bad(
        Call(IN_GRID + "while (x[i] >= 0.0f) { " + BARRIER + "} y[i] = 0.0f;"), "endless loop"
    ),
    "shift by the width": Bad(Call(IN_GRID + "y[i] = float(1u << i);"), "shift by too much"),
    "integer division by zero": Bad(Call(IN_GRID + "y[i] = float(5u / i);"), "division by zero"),
    "float too large for an int": Bad(
        Call(IN_GRID + "y[i] = float(int(x[i] * 1e20f));"), "outside the integer's range"
    ),
    "signed overflow": Bad(Call(IN_GRID + "y[i] = float(2147483647 + int(i));"), "signed overflow"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_kernel(name: str) -> None:
    case = GOOD[name]
    (y,), _ = case.call.run()
    want = np.asarray(case.want(), np.float32)
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), want, rtol=case.tolerance, atol=0)


@pytest.mark.parametrize("name", BAD)
def test_bad_kernel(name: str) -> None:
    with pytest.raises(KernelError, match=BAD[name].why):
        BAD[name].call.run()


# Row at[0] of a cache of (6, 32) is written by the threadgroup that reads it back; each of three threadgroups, of one
# simdgroup, sums two rows.
APPEND = """// writes: cache
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.x * 2;
device T* rows = (device T*)cache;
if (row == uint(at[0]) || row + 1 == uint(at[0])) {
  rows[uint(at[0]) * 32 + lane] = fresh[lane];
}
const float sum = simd_sum(float(rows[row * 32 + lane]) + float(rows[row * 32 + 32 + lane]));
if (lane == 0) {
  y[row / 2] = sum;
}
"""


def append(body: str, cache: Any, more: dict[str, mx.array], mode: str = "trace") -> tuple[mx.array, LaunchReport]:
    """y and the report of APPEND, or a body like it, that writes 100, 101, ... as row 3."""
    dtype = cache.dtype if isinstance(cache, mx.array) else mx.float32
    call = Call(
        body,
        inputs={"cache": cache, "fresh": mx.arange(100, 132).astype(dtype), "at": mx.array([3], mx.int32), **more},
        size=3,
        grid=(96, 1, 1),
        threadgroup=(32, 1, 1),
        template=(("T", dtype),),
    )
    (y,), report = call.run(mode)
    return y, report


@pytest.mark.parametrize("mode", ["trace", "fast"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_written_input_is_written_in_place(dtype: mx.Dtype, mode: str) -> None:
    whole = mx.arange(8 * 32).astype(dtype).reshape(8, 32)
    want = np.array(whole.astype(mx.float32))
    want[1 + 3] = np.arange(100, 132)
    y, _ = append(APPEND, whole[1:7], {}, mode)
    np.testing.assert_array_equal(np.array(whole.astype(mx.float32)), want)
    np.testing.assert_array_equal(np.array(y), want[1:7].reshape(3, 64).sum(-1))


def test_traffic_counts_the_bytes_written_to_an_input() -> None:
    _, report = append(APPEND, mx.zeros((6, 32)), {})
    cache = report.buffer("cache")
    assert (cache.size, cache.written, cache.unique_written, cache.read, cache.unique_read) == (768, 128, 128, 768, 768)


@dataclass(frozen=True)
class BadWrite:
    why: str
    body: str = APPEND
    cache: Any = field(default_factory=lambda: mx.zeros((6, 32)))
    more: dict[str, mx.array] = field(default_factory=dict)


def saying(line: str) -> str:
    return APPEND.replace("// writes: cache", line)


def by_each_threadgroup(code: str) -> str:
    setting = "uint g = threadgroup_position_in_grid.x; uint lane = thread_index_in_simdgroup;\n"
    return "// writes: cache\n" + setting + "device T* rows = (device T*)cache; " + code


WIDE, ALIASED = mx.zeros((6, 64)), mx.zeros((6, 32))
BAD_WRITES = {
    "no line": BadWrite(r"k\.metal:6: write to an input: byte 384 of 'cache'", saying("")),
    "a line that is not the first": BadWrite("write to an input: byte 384 of 'cache'", "\n" + APPEND),
    "a line that names another input": BadWrite("write to an input: .*'cache'", saying("// writes: fresh")),
    "a line that names no input": BadWrite(
        r"k\.metal:1: writes 'caches'; the inputs are cache, fresh, at$", saying("// writes: cache, caches")
    ),
    "a line that names the shape of an input": BadWrite(
        "writes 'cache_shape'; the inputs are cache, fresh, at$",
        saying("// writes: cache_shape\nint n = cache_shape[0];"),
    ),
    "a line that names an output": BadWrite("writes 'y'; the inputs are", saying("// writes: y")),
    "a line that names nothing": BadWrite("writes ''; the inputs are", saying("// writes: ")),
    "const not cast away": BadWrite("cannot initialize", APPEND.replace("(device T*)cache", "cache")),
    "past the end": BadWrite(
        "out of bounds: write of 4 bytes at byte 1152", APPEND.replace("* 32 + lane] =", "* 96 + lane] =")
    ),
    "another threadgroup reads it": BadWrite(
        r"data race: write of byte 384 of 'cache', which thread 0 of threadgroup 0 read.*\(forward order\)",
        APPEND.replace("= sum", "= sum + float(rows[(row * 32 + 96) % 192])"),
    ),
    "another threadgroup reads it afterwards": BadWrite(
        r"data race: read of byte 384 of 'cache', which thread 0 of threadgroup 1 wrote.*\(forward order\)",
        APPEND.replace("= sum", "= sum + float(rows[(row * 32 + 160) % 192])"),
    ),
    "all threadgroups read it, and the last one writes it": BadWrite(
        r"data race: write of byte 0 of 'cache', which several threadgroups read.*\(forward order\)",
        by_each_threadgroup("if (lane == 0) { y[g] = float(rows[0]); if (g == 2) rows[0] = T(1.0f); }"),
    ),
    "two threadgroups write it": BadWrite(
        "data race: write of byte 0 of 'cache', which thread 0 of threadgroup 0 wrote",
        by_each_threadgroup("if (lane == 0) { y[g] = 0.0f; rows[0] = T(1.0f); }"),
    ),
    "no barrier between lanes": BadWrite(
        "data race: (read|write) of byte .* of 'cache', .* with no barrier between",
        by_each_threadgroup(
            "uint i = g * 32 + lane; rows[i] = T(1.0f); float v = simd_sum(float(rows[i ^ 1])); "
            "if (lane == 0) y[g] = v;"
        ),
    ),
    "columns of a wider array": BadWrite("'cache' is written and not row-contiguous", cache=WIDE[:, :32]),
    "a transposed array": BadWrite(
        "'cache' is written and not row-contiguous: a copy of it", cache=mx.zeros((32, 6), mx.bfloat16).T
    ),
    "no MLX array": BadWrite("'cache' is written and no MLX array: a copy", cache=np.zeros((6, 32), np.float32)),
    "memory of another input": BadWrite(
        "'cache' is written and shares memory with 'older'", cache=ALIASED, more={"older": ALIASED[:3]}
    ),
}


@pytest.mark.parametrize("name", BAD_WRITES)
def test_bad_write_to_an_input(name: str) -> None:
    """Each is refused for its own reason, and has written nothing."""
    case = BAD_WRITES[name]
    with pytest.raises(KernelError, match=case.why):
        append(case.body, case.cache, case.more)
    assert not np.array(mx.array(case.cache).astype(mx.float32)).any()


def test_each_order_starts_from_the_same_content() -> None:
    cache = mx.ones((6, 32))
    body = by_each_threadgroup("rows[g * 32 + lane] += T(1.0f); if (lane == 0) y[g] = float(rows[g * 32]);")
    y, _ = append(body, cache, {})
    assert np.array(y).tolist() == [2.0, 2.0, 2.0]
    assert np.array(cache).tolist() == [[2.0] * 32] * 3 + [[1.0] * 32] * 3


def test_private_memory_is_watched_in_fast_mode() -> None:
    with pytest.raises(KernelError, match="private memory: a thread uses more than 64 KB"):
        BAD["more private memory than a thread has"].call.run("fast")


GATHER = """
// y[k, o] = sum of row sel[k] * ROWS + o of w, times x; a simdgroup a row
const uint lane = thread_index_in_simdgroup;
const uint o = threadgroup_position_in_grid.x * 2 + simdgroup_index_in_threadgroup;
const uint k = threadgroup_position_in_grid.y;
const device float* row = w + (uint(sel[k]) * ROWS + o) * COLS;
float sum = 0.0f;
for (uint i = lane; i < COLS; i += 32) {
  sum += row[i] * x[i];
}
sum = simd_sum(sum);
if (lane == 0) {
  y[k * ROWS + o] = sum;
}
"""


def gather(chosen: list[int], stride: int = 1, mode: str = "trace") -> tuple[float, LaunchReport]:
    """Worst relative error of GATHER over 4 matrices of (6, 96); lanes are `stride` columns apart where it is not 1."""
    experts, rows, cols = 4, 6, 96
    rng = np.random.default_rng(0)
    w = rng.standard_normal((experts, rows, cols), np.float32)
    x = rng.standard_normal(cols, np.float32)
    body = (
        GATHER if stride == 1 else GATHER.replace("i = lane; i < COLS; i += 32", "i = lane * 3; i < lane * 3 + 3; ++i")
    )
    call = Call(
        body,
        inputs={"w": w, "x": x, "sel": np.array(chosen, np.int32)},
        size=len(chosen) * rows,
        grid=(rows // 2 * 64, len(chosen), 1),
        threadgroup=(64, 1, 1),
        template=(("ROWS", rows), ("COLS", cols)),
    )
    (y,), report = call.run(mode)
    want = np.einsum("koi,i->ko", w[chosen].astype(np.float64), x.astype(np.float64)).ravel()
    return float(np.abs(np.array(y) - want).max() / np.abs(want).max()), report


@pytest.mark.parametrize("mode", ["trace", "fast"])
@pytest.mark.parametrize("chosen", [[2], [3, 0], [0, 1, 2, 3, 0, 1, 2, 3, 0]])  # fewer than 8 ids are `constant`
def test_gathered_matvec(chosen: list[int], mode: str) -> None:
    assert gather(chosen, mode=mode)[0] < 1e-6


def test_traffic_counts_every_byte() -> None:
    _, report = gather([3, 0])
    w, x, y = report.buffer("w"), report.buffer("x"), report.buffer("y")
    matrix = 6 * 96 * 4
    assert (w.size, w.read, w.unique_read, w.written) == (4 * matrix, 2 * matrix, 2 * matrix, 0)
    assert (x.read, x.unique_read) == (2 * matrix, 96 * 4)  # each row reads x
    assert (y.written, y.unique_written, y.unique_read) == (48, 48, 0)
    assert (w.accesses, w.lines, w.coalescing) == (36, 36, 1.0)  # 12 rows of 3 lines
    assert report.simdgroup_operations == 12
    assert (report.threadgroup_barriers, report.threadgroup_memory) == (0, 0)
    assert "coalescing" in str(report)
    assert "[[buffer(0)]]" in report.text


def test_traffic_shows_lanes_that_stand_apart() -> None:
    """Each lane three neighbours in turn: 96 floats in 3 lines, and all 3 are met at each of the 3 turns."""
    _, report = gather([1], stride=3)
    w = report.buffer("w")
    assert w.unique_read == 6 * 96 * 4
    assert w.coalescing == pytest.approx(1 / 3)


def test_traffic_counts_lines_once_in_a_threadgroup() -> None:
    """Two rows a threadgroup, six threadgroups: each fetches its own 6 lines of w, and all of x, sel and y again."""
    _, report = gather([3, 0])
    lines = {b.name: (b.touched_lines, b.fetched_lines) for b in report.buffers if b.size}
    assert lines == {"w": (36, 36), "x": (3, 18), "sel": (1, 6), "y": (1, 6)}
    assert report.buffer("x").fetched == 18 * 128
    _, apart = gather([1], stride=3)  # lanes stand apart, but a cache makes up for that
    assert (apart.buffer("w").touched_lines, apart.buffer("w").fetched_lines) == (18, 18)
    call = Call(IN_GRID + "y[i] = x[i];", grid=(N, 1, 1), threadgroup=(16, 1, 1))  # half a line a threadgroup
    _, halves = call.run()
    assert (halves.buffer("x").touched_lines, halves.buffer("x").fetched_lines) == (2, 4)
    straddling = Call(IN_GRID + "y[i] = x[i + 16];", inputs={"x": np.zeros(80, np.float32)}, threadgroup=(32, 1, 1))
    _, report = straddling.run()
    assert (report.buffer("x").touched_lines, report.buffer("x").fetched_lines) == (3, 4)


def test_modelled_time_is_launch_and_bytes() -> None:
    _, report = gather([3, 0])
    once = (36 + 3 + 1 + 1) * 128  # everything is small here, and is served once
    assert apple_time(report, "M1") == pytest.approx(LAUNCH + once / 68e9)
    assert apple_time(report, "M3 Ultra") == pytest.approx(LAUNCH + once / 819e9)
    large = [replace(b, size=SHARED_CACHE + 1) if b.name == "x" else b for b in report.buffers]
    assert apple_time(replace(report, buffers=large), "M1") == pytest.approx(LAUNCH + (once + 15 * 128) / 68e9)
    with pytest.raises(ValueError, match="chip 'M7': one of M1, M1 Pro"):
        apple_time(report, "M7")
    _, fast = gather([3, 0], mode="fast")
    with pytest.raises(ValueError, match="fast mode counts no bytes"):
        apple_time(fast, "M1")


def test_traffic_counts_barriers_and_threadgroup_memory() -> None:
    _, report = GOOD["a loop with both its barriers"].call.run()
    assert (report.threadgroup_barriers, report.threadgroup_memory) == (6, 256)
    shared = report.buffer("threadgroup memory")
    assert (shared.read, shared.written) == (3 * 256, 3 * 256)


def test_only_kernels_built_in_the_block_are_executed() -> None:
    with executing() as launches:
        kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=IN_GRID + "y[i] = x[i];")
        assert mx.metal.is_available()
    assert launches == []
    call = {"grid": (N, 1, 1), "threadgroup": (N, 1, 1), "output_shapes": [(N,)], "output_dtypes": [mx.float32]}
    if not mx.metal.is_available():
        with pytest.raises(RuntimeError, match="No Metal back-end"):
            mx.eval(kernel(inputs=[mx.array(X)], **call))


def test_text_is_mlx_own() -> None:
    kernel = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source=IN_GRID + "y[i] = T(x[i]);")
    call = {"grid": (N, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [(N,)], "output_dtypes": [mx.float16]}
    launch = capture("k", kernel, [mx.array(X)], call | {"template": [("T", mx.float16)]})
    assert (launch.grid, launch.threadgroup) == ((N, 1, 1), (32, 1, 1))
    assert "const device float* x [[buffer(0)]]" in launch.text
    assert translate(launch).buffers == ["x", "y"]
