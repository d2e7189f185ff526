// Stands for the header that MLX puts before every CUDA kernel: the same includes and the same names, so that a kernel
// that needs or hides one of them is refused here as there. Names of MLX 0.32.4, without their definitions.
#pragma once
#define LIBCUDACXX_ENABLE_SIMPLIFIED_COMPLEX_OPERATIONS
#include <cuda/std/complex>
#include <cuda/std/type_traits>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cuda/std/tuple>
#define MAX_NDIM 10
#define WARP_SIZE 32

namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;
template <class T>
using complex_t = cuda::std::complex<T>;
using complex64_t = complex_t<float>;
using complex128_t = complex_t<double>;
template <class T> struct is_complex;
template <class T> inline constexpr bool is_complex_v = false;
template <class T> complex_t<T> operator%(complex_t<T>, complex_t<T>);
template <class T> bool operator<(complex_t<T>, complex_t<T>);
template <class T> bool operator>(complex_t<T>, complex_t<T>);
template <class T> bool operator<=(complex_t<T>, complex_t<T>);
template <class T> bool operator>=(complex_t<T>, complex_t<T>);
template <class T, int N> struct AlignedVector;
template <class T, class = void> struct Limits;
template <int N, bool GENERAL = true, class T = size_t> struct LoopedElemToLoc;
void is_aligned();
void load_vector();
void store_vector();
void unsafe_load_vector();
void unsafe_store_vector();
void elem_to_loc();
void elem_to_loc_nd();
}  // namespace mlx::core::cu
