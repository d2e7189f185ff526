// ---- pairs of values: as they stand in memory, and as float -------------------------------------------------------
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

inline void store_pair(device float* values, uint pair, float2 value) {
  ((device float2*)values)[pair] = value;
}

template <class T>
inline void store_pair(device T* values, uint pair, uint value) {
  ((device uint*)values)[pair] = value;
}

// Whether DIMENSIONS values hold the p-th pair of a lane. Known when the loop over p is unrolled where that is
// possible: what is left out then is not fetched as instructions either, which in a short context take the longest.
template <int DIMENSIONS>
inline bool holds(int p, uint pair) {
  return DIMENSIONS % 64 == 0 ? p < DIMENSIONS / 64 : pair < uint(DIMENSIONS / 2);
}

// ---- rows of the cache: what a lane has of one ---------------------------------------------------------------------
//
// WORDS as they stand in memory, which are PAIRS of values, the first VALUES of them of the latent:
//
//   pair_of(rows, p, lane)            which pair of the row is the lane's p-th
//   in_latent, in_row(rows, p, lane)  whether the lane has a p-th pair there
//   slot_of(rows, p, lane)            its place in an array of the latent, beside those of the lanes next to it
//   load, store(rows, row, ...)       from and to the ELEMENTS of a row in the cache; `words` is a Word[WORDS]
//   pack(rows, values, ...)           from the lane's pairs in float; all lanes of the simdgroup together
//   value(rows, words, p)             a pair; of the latent it is still to be multiplied by scale(rows, words)
template <class STORED, int LATENT, int ROPE>
struct Rows {
  typedef decltype(load_pair((const device STORED*)0, 0u)) Word;
  enum {
    ELEMENTS = LATENT + ROPE,
    PAIRS = (LATENT + ROPE + 63) / 64,
    VALUES = (LATENT + 63) / 64,
    WORDS = PAIRS
  };
};

// Rows of floats: pairs lane, lane + 32, ... Lanes past the last load it again: their part of the query is 0.
template <class STORED, int LATENT, int ROPE>
inline uint pair_of(Rows<STORED, LATENT, ROPE>, int p, uint lane) {
  return uint(p) * 32 + lane;
}

template <class STORED, int LATENT, int ROPE>
inline uint slot_of(Rows<STORED, LATENT, ROPE>, int p, uint lane) {
  return uint(p) * 32 + lane;
}

template <class STORED, int LATENT, int ROPE>
inline bool in_latent(Rows<STORED, LATENT, ROPE>, int p, uint lane) {
  return holds<LATENT>(p, uint(p) * 32 + lane);
}

template <class STORED, int LATENT, int ROPE>
inline bool in_row(Rows<STORED, LATENT, ROPE>, int p, uint lane) {
  return holds<LATENT + ROPE>(p, uint(p) * 32 + lane);
}

template <class STORED, int LATENT, int ROPE, class W>
inline void load(Rows<STORED, LATENT, ROPE> rows, const device STORED* row, uint lane, thread W& words) {
#pragma unroll
  for (int p = 0; p < rows.PAIRS; ++p) {
    const uint pair = uint(p) * 32 + lane;
    words[p] = load_pair(row, (LATENT + ROPE) % 64 == 0 ? pair : min(pair, uint((LATENT + ROPE) / 2 - 1)));
  }
}

template <class STORED, int LATENT, int ROPE, class W>
inline void store(Rows<STORED, LATENT, ROPE> rows, const thread W& words, uint lane, device STORED* row) {
#pragma unroll
  for (int p = 0; p < rows.PAIRS; ++p) {
    if (in_row(rows, p, lane)) {
      store_pair(row, uint(p) * 32 + lane, words[p]);
    }
  }
}

template <class STORED, int LATENT, int ROPE, class V, class W>
inline void pack(Rows<STORED, LATENT, ROPE> rows, const thread V& values, uint lane, thread W& words) {
#pragma unroll
  for (int p = 0; p < rows.PAIRS; ++p) {
    words[p] = as_pair(values[p], STORED(0.0f));
  }
}

template <class STORED, int LATENT, int ROPE, class W>
inline float2 value(Rows<STORED, LATENT, ROPE>, const thread W& words, int p) {
  return as_float<STORED>(words[p]);
}

template <class STORED, int LATENT, int ROPE, class W>
inline float scale(Rows<STORED, LATENT, ROPE>, const thread W& words) {
  return 1.0f;
}

// ---- for uint8_t: rows in 8 bits, as kernels/rows.py lays them out -------------------------------------------------
// 16 values of the latent in a row, under a scale for two lanes, then pairs lane, lane + 32, ... of k_pe.
// Lanes past the end of the latent load the last 16 again.
template <int LATENT, int ROPE>
struct Rows<uint8_t, LATENT, ROPE> {
  typedef uint Word;
  enum {
    LANES = LATENT / 16,  // that have some of the latent, of 32
    ELEMENTS = (LATENT + 2 * ROPE + LATENT / 16 + 15) / 16 * 16,
    VALUES = 8,
    PAIRS = VALUES + (ROPE + 63) / 64,
    SCALE_AT = PAIRS - VALUES + 4,
    WORDS = SCALE_AT + 1
  };
};

template <int LATENT, int ROPE>
inline uint pair_of(Rows<uint8_t, LATENT, ROPE> rows, int p, uint lane) {
  return p < rows.VALUES ? lane * 8 + uint(p) : uint(LATENT / 2) + uint(p - rows.VALUES) * 32 + lane;
}

template <int LATENT, int ROPE>
inline uint slot_of(Rows<uint8_t, LATENT, ROPE> rows, int p, uint lane) {
  return uint(p) * uint(rows.LANES) + lane;
}

template <int LATENT, int ROPE>
inline bool in_latent(Rows<uint8_t, LATENT, ROPE> rows, int p, uint lane) {
  return p < rows.VALUES && lane < uint(rows.LANES);
}

template <int LATENT, int ROPE>
inline bool in_row(Rows<uint8_t, LATENT, ROPE> rows, int p, uint lane) {
  const int q = p - rows.VALUES;
  return p < rows.VALUES ? lane < uint(rows.LANES) : holds<ROPE>(q, uint(q) * 32 + lane);
}

template <int LATENT, int ROPE, class W>
inline void load(Rows<uint8_t, LATENT, ROPE> rows, const device uint8_t* row, uint lane, thread W& words) {
  const uint part = min(lane, uint(rows.LANES - 1));
  const uint4 quants = ((const device uint4*)row)[part];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = quants[i];
  }
  const device uint* k_pe = (const device uint*)(row + LATENT);
#pragma unroll
  for (int i = 4; i < rows.SCALE_AT; ++i) {
    words[i] = k_pe[min(uint(i - 4) * 32 + lane, uint(ROPE / 2 - 1))];
  }
  words[rows.SCALE_AT] = uint(((const device ushort*)(row + LATENT + 2 * ROPE))[part / 2]);
}

template <int LATENT, int ROPE, class W>
inline void store(Rows<uint8_t, LATENT, ROPE> rows, const thread W& words, uint lane, device uint8_t* row) {
  if (lane < uint(rows.LANES)) {
    ((device uint4*)row)[lane] = uint4(words[0], words[1], words[2], words[3]);
    if (lane % 2 == 0) {
      ((device ushort*)(row + LATENT + 2 * ROPE))[lane / 2] = ushort(words[rows.SCALE_AT]);
    }
  }
  device uint* k_pe = (device uint*)(row + LATENT);
#pragma unroll
  for (int i = 4; i < rows.SCALE_AT; ++i) {
    const uint pair = uint(i - 4) * 32 + lane;
    if (pair < uint(ROPE / 2)) {
      k_pe[pair] = words[i];
    }
  }
}

template <int LATENT, int ROPE, class W>
inline float scale(Rows<uint8_t, LATENT, ROPE> rows, const thread W& words) {
  return as_float<float16_t>(words[rows.SCALE_AT]).x;
}

// Unlike max, with what is NaN.
inline float larger_or_nan(float a, float b) {
  return a >= b || isnan(a) ? a : b;
}

// Rounded by the addition, half to even: beside 2^23 only whole numbers have a place.
inline uint quant(float value, float divisor) {
  const float quotient = divisor == 0.0f ? 0.0f : value / divisor;
  return as_type<uint>(clamp(quotient, -127.0f, 127.0f) + (8388608.0f + 128.0f)) & 255u;
}

template <int LATENT, int ROPE, class V, class W>
inline void pack(Rows<uint8_t, LATENT, ROPE> rows, const thread V& values, uint lane, thread W& words) {
  float largest = 0.0f;
#pragma unroll
  for (int p = 0; p < rows.VALUES; ++p) {
    largest = larger_or_nan(largest, larger_or_nan(fabs(values[p].x), fabs(values[p].y)));
  }
  largest = larger_or_nan(largest, simd_shuffle_xor(largest, ushort(1)));
  words[rows.SCALE_AT] = as_pair(float2(largest * (1.0f / 127.0f), 0.0f), float16_t(0.0f));
  const float divisor = scale(rows, words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 low = values[i * 2];
    const float2 high = values[i * 2 + 1];
    words[i] = quant(low.x, divisor) | (quant(low.y, divisor) << 8) | (quant(high.x, divisor) << 16) |
               (quant(high.y, divisor) << 24);
  }
#pragma unroll
  for (int i = 4; i < rows.SCALE_AT; ++i) {
    words[i] = as_pair(values[i - 4 + rows.VALUES], float16_t(0.0f));
  }
}

template <int LATENT, int ROPE, class W>
inline float2 value(Rows<uint8_t, LATENT, ROPE> rows, const thread W& words, int p) {
  if (p >= rows.VALUES) {
    return as_float<float16_t>(words[p - rows.VALUES + 4]);
  }
  const uint two = p % 2 == 0 ? words[p / 2] : words[p / 2] >> 16;
  return float2(field<8, 0, 128>(two), field<8, 8, 128>(two));
}

// ---- what both need ------------------------------------------------------------------------------------------------
// RoPE of a pair, interleaved: the angle is the position over the wavelength. Whole turns are taken off first, 2 pi in
// two parts, so that the fast cosine and sine are good to 4e-7; the exact ones are hundreds of instructions.
inline float2 rotate(float2 pair, float position, float wavelength) {
  const float angle = position * (1.0f / wavelength);
  const float turns = rint(angle * 0.15915494f);
  const float rest = fma(turns, 1.7484556e-7f, fma(turns, -6.2831855f, angle));
  const float c = fast::cos(rest);
  const float s = fast::sin(rest);
  return float2(pair.x * c - pair.y * s, pair.x * s + pair.y * c);
}

// A new row, from what kv_a_proj gives: norm and RoPE, as it is cached.
template <class T, class R, class G, class W, class Words>
inline void make_row(R rows, const device T* kv_a, uint latent, uint rope, G gains, float eps, W wavelengths, uint row,
                     uint lane, thread Words& words) {
  float2 values[R::PAIRS];
  float squares = 0.0f;
#pragma unroll
  for (int p = 0; p < R::PAIRS; ++p) {
    const uint pair = min(pair_of(rows, p, lane), (latent + rope) / 2 - 1);
    values[p] = as_float<T>(load_pair(kv_a, pair));
    squares += in_latent(rows, p, lane) ? values[p].x * values[p].x + values[p].y * values[p].y : 0.0f;
  }
  const float inverse = rsqrt(simd_sum(squares) / float(latent) + eps);
#pragma unroll
  for (int p = 0; p < R::PAIRS; ++p) {
    const uint pair = pair_of(rows, p, lane);
    if (in_latent(rows, p, lane)) {
      values[p].x *= inverse * gains[pair * 2];
      values[p].y *= inverse * gains[pair * 2 + 1];
    } else if (in_row(rows, p, lane)) {
      values[p] = rotate(values[p], float(row), wavelengths[pair - latent / 2]);
    }
  }
  pack(rows, values, lane, words);
}

// The sums over all lanes of N values, N a power of 2; value lane / (32 / N) is left in the lane. The halving takes
// N - 1 shuffles and what is left 5 - log2(N), where N sums apart would take 5 N.
template <int N>
inline float sums_by_lane(thread float (&values)[N], uint lane) {
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
