// Metal's words for CUDA: goes before a kernel's own header, so that `mx.fast.cuda_kernel` compiles the text written
// for `mx.fast.metal_kernel`. MLX includes cuda_fp16.h and cuda_bf16.h before it, and compiles with NVRTC and
// --device-as-default-execution-space, so that plain helper functions are device functions.
//
// Only what our kernels use. Not here: swizzles, comparisons of vectors, half literals (1.0h), bfloat arithmetic beyond
// CUDA's own. Free to differ, as Metal promises nothing: NaN in min, max and clamp, shuffles from a lane above 31, the
// last bits of exp and the like. A helper cannot be overloaded on the address space alone: there is one here. All 32
// lanes must meet at a simd_ operation, and where simdgroup_index_in_threadgroup is read; so threadgroups are whole
// simdgroups.
#pragma once

#define device
#define thread
#define threadgroup  // the launcher writes __shared__ where such memory is declared
#define constant const
#pragma nv_diag_suppress 83  // `const constant` says const twice
#define MSL_FN __device__ __forceinline__

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;
typedef __nv_bfloat16 bfloat;

#undef INFINITY
#undef NAN
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#define FLT_MAX 3.402823466e+38f
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

// ---- half and bfloat with float: float in Metal, ambiguous in CUDA -------------------------------------------------
#define MSL_MIXED(T, op)                                                 \
  MSL_FN float operator op(T a, float b) { return float(a) op b; }       \
  MSL_FN float operator op(float a, T b) { return a op float(b); }       \
  MSL_FN T& operator op##=(T& a, float b) { return a = T(float(a) op b); }
#define MSL_MIXED_ORDER(T, op)                                           \
  MSL_FN bool operator op(T a, float b) { return float(a) op b; }        \
  MSL_FN bool operator op(float a, T b) { return a op float(b); }
#define MSL_MIXED_ALL(T)                                                          \
  MSL_MIXED(T, +) MSL_MIXED(T, -) MSL_MIXED(T, *) MSL_MIXED(T, /)                 \
  MSL_MIXED_ORDER(T, <) MSL_MIXED_ORDER(T, >) MSL_MIXED_ORDER(T, <=)              \
  MSL_MIXED_ORDER(T, >=) MSL_MIXED_ORDER(T, ==) MSL_MIXED_ORDER(T, !=)
MSL_MIXED_ALL(__half)
MSL_MIXED_ALL(__nv_bfloat16)

namespace metal {

// ---- vectors -------------------------------------------------------------------------------------------------------
template <class T, int N>
struct vec;

namespace shim {
template <class T, int N>
struct components;
template <class T>
struct alignas(2 * sizeof(T)) components<T, 2> { T x, y; };
template <class T>
struct alignas(4 * sizeof(T)) components<T, 3> { T x, y, z; };
template <class T>
struct alignas(4 * sizeof(T)) components<T, 4> { T x, y, z, w; };
template <class T>
struct same { typedef T type; };  // not deduced: a scalar beside a vector converts to the vector's type
template <class T>
struct width { static constexpr int n = 1; };
template <class T, int N>
struct width<vec<T, N>> { static constexpr int n = N; };
}  // namespace shim

template <class T, int N>
struct vec : shim::components<T, N> {
  vec() = default;
  MSL_FN vec(T all) {
#pragma unroll
    for (int i = 0; i < N; ++i) (*this)[i] = all;
  }
  template <class U>
  MSL_FN explicit vec(vec<U, N> v) {
#pragma unroll
    for (int i = 0; i < N; ++i) (*this)[i] = T(v[i]);
  }
  template <class A, class B, class... Rest>
  MSL_FN vec(A a, B b, Rest... rest) {  // scalars and vectors, one after the other
    static_assert(shim::width<A>::n + shim::width<B>::n + (0 + ... + shim::width<Rest>::n) == N,
                  "vector constructor: wrong number of components");
    put<0>(a, b, rest...);
  }
  MSL_FN T& operator[](int i) { return (&this->x)[i]; }
  MSL_FN const T& operator[](int i) const { return (&this->x)[i]; }

 private:
  template <int AT>
  MSL_FN void put() {}
  template <int AT, class A, class... Rest>
  MSL_FN void put(A a, Rest... rest) {
    (*this)[AT] = T(a);
    put<AT + 1>(rest...);
  }
  template <int AT, class U, int M, class... Rest>
  MSL_FN void put(vec<U, M> a, Rest... rest) {
#pragma unroll
    for (int i = 0; i < M; ++i) (*this)[AT + i] = T(a[i]);
    put<AT + M>(rest...);
  }
};

#define MSL_BINARY(op)                                                             \
  template <class T, int N>                                                        \
  MSL_FN vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                         \
    _Pragma("unroll") for (int i = 0; i < N; ++i) a[i] = T(a[i] op b[i]);          \
    return a;                                                                      \
  }                                                                                \
  template <class T, int N>                                                        \
  MSL_FN vec<T, N> operator op(vec<T, N> a, typename shim::same<T>::type b) {      \
    return a op vec<T, N>(b);                                                      \
  }                                                                                \
  template <class T, int N>                                                        \
  MSL_FN vec<T, N> operator op(typename shim::same<T>::type a, vec<T, N> b) {      \
    return vec<T, N>(a) op b;                                                      \
  }                                                                                \
  template <class T, int N, class B>                                               \
  MSL_FN vec<T, N>& operator op##=(vec<T, N>& a, B b) { return a = a op b; }
MSL_BINARY(+) MSL_BINARY(-) MSL_BINARY(*) MSL_BINARY(/) MSL_BINARY(%)
MSL_BINARY(&) MSL_BINARY(|) MSL_BINARY(^) MSL_BINARY(<<) MSL_BINARY(>>)
// F(each component): for functions of one, two and three values
#define MSL_EACH(f, parameters, arguments)                                         \
  template <class T, int N>                                                        \
  MSL_FN vec<T, N> f parameters {                                                  \
    vec<T, N> r;                                                                   \
    _Pragma("unroll") for (int i = 0; i < N; ++i) r[i] = T(f arguments);           \
    return r;                                                                      \
  }
#define MSL_EACH1(f) MSL_EACH(f, (vec<T, N> a), (a[i]))
#define MSL_EACH2(f) MSL_EACH(f, (vec<T, N> a, vec<T, N> b), (a[i], b[i]))
#define MSL_EACH3(f) MSL_EACH(f, (vec<T, N> a, vec<T, N> b, vec<T, N> c), (a[i], b[i], c[i]))
template <class T, int N>
MSL_FN vec<T, N> operator-(vec<T, N> a) { return vec<T, N>(T(0)) - a; }
template <class T, int N>
MSL_FN vec<T, N> operator~(vec<T, N> a) { return a ^ vec<T, N>(T(~T(0))); }
template <class T, int N>
MSL_FN T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
#pragma unroll
  for (int i = 1; i < N; ++i) sum = sum + a[i] * b[i];
  return sum;
}

template <class To, class From>
MSL_FN To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: the sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- arithmetic: CUDA's own for float and integers, through float for half -----------------------------------------
#define MSL_HALF1(f) MSL_FN half f(half a) { return half(f(float(a))); } MSL_EACH1(f)
#define MSL_HALF2(f) MSL_FN half f(half a, half b) { return half(f(float(a), float(b))); } MSL_EACH2(f)
#define MSL_MATH(DO1, DO2)                                                                          \
  DO1(exp, expf) DO1(exp2, exp2f) DO1(log, logf) DO1(log2, log2f) DO1(sin, sinf) DO1(cos, cosf)      \
  DO1(tanh, tanhf) DO1(sqrt, sqrtf) DO1(rsqrt, rsqrtf) DO1(floor, floorf) DO1(ceil, ceilf)           \
  DO1(rint, rintf) DO1(round, roundf) DO1(trunc, truncf) DO1(fabs, fabsf)                            \
  DO2(pow, powf) DO2(fmin, fminf) DO2(fmax, fmaxf)
#define MSL_USE1(f, c_name) using ::f; MSL_HALF1(f)
#define MSL_USE2(f, c_name) using ::f; MSL_HALF2(f)
#define MSL_NAMED1(f, c_name) MSL_FN float f(float a) { return ::c_name(a); } MSL_HALF1(f)
#define MSL_NAMED2(f, c_name) MSL_FN float f(float a, float b) { return ::c_name(a, b); } MSL_HALF2(f)
MSL_MATH(MSL_USE1, MSL_USE2)
namespace precise {
MSL_MATH(MSL_NAMED1, MSL_NAMED2)
}
namespace fast {
#define expf __expf
#define logf __logf
#define log2f __log2f
#define powf __powf
#define sinf __sinf
#define cosf __cosf
MSL_MATH(MSL_NAMED1, MSL_NAMED2)
#undef expf
#undef logf
#undef log2f
#undef powf
#undef sinf
#undef cosf
}  // namespace fast
using ::abs;
using ::fma;
using ::isfinite;
using ::isinf;
using ::isnan;
using ::max;
using ::min;
MSL_HALF1(abs)
MSL_HALF2(min)
MSL_HALF2(max)
MSL_FN half fma(half a, half b, half c) { return ::__hfma(a, b, c); }
MSL_EACH3(fma)
MSL_FN bool isnan(half a) { return ::isnan(float(a)); }
MSL_FN bool isinf(half a) { return ::isinf(float(a)); }
MSL_FN bool isfinite(half a) { return ::isfinite(float(a)); }
#define MSL_CLAMP(T) MSL_FN T clamp(T a, T least, T most) { return min(max(a, least), most); }
MSL_CLAMP(float) MSL_CLAMP(half) MSL_CLAMP(int) MSL_CLAMP(uint)
MSL_EACH3(clamp)
template <class T>
MSL_FN T select(T if_false, T if_true, bool c) { return c ? if_true : if_false; }
MSL_FN uint popcount(uint a) { return uint(__popc(a)); }
MSL_FN uint clz(uint a) { return uint(__clz(a)); }
MSL_FN uint ctz(uint a) { return a ? uint(__ffs(a)) - 1u : 32u; }

// ---- barriers and simdgroup operations -----------------------------------------------------------------------------
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
// Both order all memory, which is more than the flags ask for.
MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __syncwarp(); }

#define MSL_SHUFFLE(f, c_name)                                                           \
  template <class T>                                                                     \
  MSL_FN T f(T a, ushort by) { return T(c_name(0xffffffffu, a, by)); }                   \
  template <class T, int N>                                                              \
  MSL_FN vec<T, N> f(vec<T, N> a, ushort by) {                                           \
    _Pragma("unroll") for (int i = 0; i < N; ++i) a[i] = f(a[i], by);                    \
    return a;                                                                            \
  }
MSL_SHUFFLE(simd_shuffle, __shfl_sync)
MSL_SHUFFLE(simd_broadcast, __shfl_sync)
MSL_SHUFFLE(simd_shuffle_xor, __shfl_xor_sync)
MSL_SHUFFLE(simd_shuffle_down, __shfl_down_sync)
MSL_SHUFFLE(simd_shuffle_up, __shfl_up_sync)
// A butterfly: lane i meets i ^ 16, then i ^ 8, 4, 2, 1, so that every lane gets the same bits.
#define MSL_REDUCE(f, value)                             \
  template <class T>                                     \
  MSL_FN T f(T a) {                                      \
    _Pragma("unroll") for (int step = 16; step; step /= 2) { \
      const T b = simd_shuffle_xor(a, step);             \
      a = value;                                         \
    }                                                    \
    return a;                                            \
  }
MSL_REDUCE(simd_sum, T(a + b))
MSL_REDUCE(simd_max, max(a, b))
MSL_REDUCE(simd_min, min(a, b))
#if __CUDA_ARCH__ >= 800  // one instruction
MSL_FN uint simd_max(uint a) { return __reduce_max_sync(0xffffffffu, a); }
MSL_FN uint simd_min(uint a) { return __reduce_min_sync(0xffffffffu, a); }
#endif
MSL_FN bool simd_any(bool a) { return __any_sync(0xffffffffu, a); }
MSL_FN bool simd_all(bool a) { return __all_sync(0xffffffffu, a); }

// ---- 8 x 8 matrices of a simdgroup ---------------------------------------------------------------------------------
// Products of half or bfloat with sums in float. A lane has two neighbours of row lane / 4, and memory is read two
// values at a time: rows begin at even elements. NVIDIA multiplies 16 x 8 by 8 x 8: two products are asked for by name.
#define HAS_MULTIPLY_TWO
template <class T, int COLS, int ROWS>
struct simdgroup_matrix {
  static_assert(COLS == 8 && ROWS == 8, "simdgroup_matrix: 8 x 8 is what there is");
  vec<T, 2> elements;
  MSL_FN vec<T, 2>& thread_elements() { return elements; }
};
namespace shim {
MSL_FN uint matrix_lane() { return ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) % 32u; }
}  // namespace shim
template <class T, int COLS, int ROWS>
MSL_FN simdgroup_matrix<T, COLS, ROWS> make_filled_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, COLS, ROWS>{vec<T, 2>(value)};
}
template <class T>
MSL_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong per_row = 8, int = 0, bool transposed = false) {
  const uint row = shim::matrix_lane() / 4, col = shim::matrix_lane() % 4 * 2;
  if (transposed) {
    m.elements = vec<T, 2>(from[col * per_row + row], from[(col + 1) * per_row + row]);
  } else {
    m.elements = *(const vec<T, 2>*)(from + row * per_row + col);
  }
}
template <class T>
MSL_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong per_row = 8, int = 0, bool transposed = false) {
  const uint row = shim::matrix_lane() / 4, col = shim::matrix_lane() % 4 * 2;
  if (transposed) {
    to[col * per_row + row] = m.elements[0];
    to[(col + 1) * per_row + row] = m.elements[1];
  } else {
    *(vec<T, 2>*)(to + row * per_row + col) = m.elements;
  }
}
#define MSL_MULTIPLY(T, name)                                                                                        \
  MSL_FN void multiply_two(simdgroup_matrix<float, 8, 8>& d0, simdgroup_matrix<float, 8, 8>& d1,                     \
                           simdgroup_matrix<T, 8, 8> a0, simdgroup_matrix<T, 8, 8> a1, simdgroup_matrix<T, 8, 8> b) { \
    uint columns; /* of b: where a lane had a row */                                                                 \
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(as_type<uint>(b.elements)));           \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
        : "+f"(d0.elements.x), "+f"(d0.elements.y), "+f"(d1.elements.x), "+f"(d1.elements.y)                         \
        : "r"(as_type<uint>(a0.elements)), "r"(as_type<uint>(a1.elements)), "r"(columns));                           \
  }                                                                                                                  \
  MSL_FN void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<T, 8, 8>& a,          \
                                            simdgroup_matrix<T, 8, 8>& b, simdgroup_matrix<float, 8, 8>& c) {        \
    simdgroup_matrix<float, 8, 8> none = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);                            \
    simdgroup_matrix<float, 8, 8> sum = c;                                                                           \
    multiply_two(sum, none, a, make_filled_simdgroup_matrix<T, 8, 8>(T(0.0f)), b);                                   \
    d = sum;                                                                                                         \
  }
MSL_MULTIPLY(half, "f16")
MSL_MULTIPLY(bfloat, "bf16")

#define MSL_NAMES(T)                \
  typedef vec<T, 2> msl_##T##2;     \
  typedef vec<T, 3> msl_##T##3;     \
  typedef vec<T, 4> msl_##T##4;
MSL_NAMES(float) MSL_NAMES(half) MSL_NAMES(bfloat) MSL_NAMES(int) MSL_NAMES(uint)
MSL_NAMES(short) MSL_NAMES(ushort) MSL_NAMES(char) MSL_NAMES(uchar)

namespace shim {
MSL_FN uint thread_number() { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
MSL_FN msl_uint3 triple(uint3 v) { return msl_uint3(v.x, v.y, v.z); }
MSL_FN msl_uint3 group() { return triple(blockIdx); }
MSL_FN msl_uint3 place() { return triple(threadIdx); }
MSL_FN msl_uint3 threads() { return triple(blockDim); }
MSL_FN msl_uint3 groups() { return triple(gridDim); }
}  // namespace shim
}  // namespace metal
using namespace metal;

// CUDA has vectors of these names without arithmetic.
#define float2 msl_float2
#define float3 msl_float3
#define float4 msl_float4
#define half2 msl_half2
#define half3 msl_half3
#define half4 msl_half4
#define bfloat2 msl_bfloat2
#define bfloat3 msl_bfloat3
#define bfloat4 msl_bfloat4
#define int2 msl_int2
#define int3 msl_int3
#define int4 msl_int4
#define uint2 msl_uint2
#define uint3 msl_uint3
#define uint4 msl_uint4
#define short2 msl_short2
#define short3 msl_short3
#define short4 msl_short4
#define ushort2 msl_ushort2
#define ushort3 msl_ushort3
#define ushort4 msl_ushort4
#define char2 msl_char2
#define char3 msl_char3
#define char4 msl_char4
#define uchar2 msl_uchar2
#define uchar3 msl_uchar3
#define uchar4 msl_uchar4

// ---- a thread's place: words of Metal that MLX makes parameters of the kernel --------------------------------------
#define thread_position_in_grid (metal::shim::group() * metal::shim::threads() + metal::shim::place())
#define thread_position_in_threadgroup metal::shim::place()
#define threadgroup_position_in_grid metal::shim::group()
#define threads_per_threadgroup metal::shim::threads()
#define threadgroups_per_grid metal::shim::groups()
#define threads_per_grid (metal::shim::groups() * metal::shim::threads())
#define thread_index_in_threadgroup metal::shim::thread_number()
#define thread_index_in_simdgroup (metal::shim::thread_number() % 32u)
// By a shuffle, so that NVRTC knows it to be one number for all lanes: branches on it then leave simdgroups whole, and
// what lanes do together inside needs no second version.
#define simdgroup_index_in_threadgroup (__shfl_sync(0xFFFFFFFFu, metal::shim::thread_number() / 32u, 0))
#define simdgroups_per_threadgroup ((blockDim.x * blockDim.y * blockDim.z + 31u) / 32u)
#define threads_per_simdgroup 32u

// NVRTC makes two instructions of (a & b) | c with two constants; asked for by name it is one.
#define HAS_AND_OR
inline uint and_or(uint word, uint mask, uint bits) {
  uint out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

// Loads do not sink below this, so that all of them are under way before the first is used.
#define LOADS_END __syncwarp();
