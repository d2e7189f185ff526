// ---- pairs of values, two to a lane: as they stand in memory, and as float -----------------------------------------
inline float2 load_pair(const device float* values, uint pair) {
  return ((const device float2*)values)[pair];
}

template <class T>
inline uint load_pair(const device T* values, uint pair) {
  return ((const device uint*)values)[pair];
}

template <class T>
inline float2 as_float(float2 pair) {
  return pair;
}

template <class T>
inline float2 as_float(uint pair) {
  float out[2];
  put_pair(pair, T(0.0f), out);
  return float2(out[0], out[1]);
}

inline float2 as_pair(float2 values, float) {
  return values;
}

inline uint as_pair(float2 values, float16_t) {
  return as_type<uint>(half2(half(values.x), half(values.y)));
}

inline uint as_pair(float2 values, bfloat16_t) {
  const uint low = as_type<uint>(float(bfloat16_t(values.x)));
  return (low >> 16) | (as_type<uint>(float(bfloat16_t(values.y))) & 0xFFFF0000u);
}

inline void store_pair(device float* values, size_t pair, float2 value) {
  ((device float2*)values)[pair] = value;
}

template <class T>
inline void store_pair(device T* values, size_t pair, uint value) {
  ((device uint*)values)[pair] = value;
}

// Whether DIMENSIONS values hold the p-th pair of a lane. Known when the loop over p is unrolled where that is possible:
// what is left out then is not fetched as instructions either, which in a short context take the longest.
template <int DIMENSIONS>
inline bool holds(int p, uint pair) {
  return DIMENSIONS % 64 == 0 ? p < DIMENSIONS / 64 : pair < uint(DIMENSIONS / 2);
}

// RoPE of a pair, interleaved: the angle is the position over the wavelength. Whole turns are taken off first, 2 pi in two
// parts, so that the fast cosine and sine are good to 4e-7; the exact ones are hundreds of instructions.
inline float2 rotate(float2 pair, float position, float wavelength) {
  const float angle = position * (1.0f / wavelength);
  const float turns = rint(angle * 0.15915494f);
  const float rest = fma(turns, 1.7484556e-7f, fma(turns, -6.2831855f, angle));
  const float c = fast::cos(rest);
  const float s = fast::sin(rest);
  return float2(pair.x * c - pair.y * s, pair.x * s + pair.y * c);
}

// The sums over all lanes of N values, N a power of 2; value lane / (32 / N) is left in the lane. The halving takes
// N - 1 shuffles and what is left 5 - log2(N), where N sums apart would take 5 N.
template <int N>
inline float sums_by_lane(thread float* values, uint lane) {
  int step = 16;
#pragma unroll
  for (int half_count = N / 2; half_count > 0; half_count /= 2) {
    const bool upper = (lane & uint(step)) != 0;
#pragma unroll
    for (int i = 0; i < half_count; ++i) {
      const float kept = upper ? values[i + half_count] : values[i];
      const float sent = upper ? values[i] : values[i + half_count];
      values[i] = kept + simd_shuffle_xor(sent, ushort(step));
    }
    step /= 2;
  }
#pragma unroll
  for (; step > 0; step /= 2) {
    values[0] += simd_shuffle_xor(values[0], ushort(step));
  }
  return values[0];
}
