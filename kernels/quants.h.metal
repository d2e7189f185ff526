// Weights as kernels/planes.py lays them out, eight values ("a chunk") at a time.
//
// Each type of weight is a struct of its planes. Its rows are counted over all leading dimensions, so that row r of
// expert e is e * rows + r. COLS is the length of a row; chunk c of a row holds its values 8c .. 8c + 7.
//
//   load(w, row, chunk) -> Chunk    the one way in: value = scale * quants[i] + minimum
//   dot(chunk, x)                   the sum of eight values times x
//
// A lane takes chunks lane, lane + 32, ...: whatever the type, a simdgroup then reads neighbouring bytes.

struct Eight {
  float v[8];
  float sum;
};

template <bool MINS>
struct Chunk {
  float quants[8];
  float scale;
  float minimum;
};

inline float dot(Chunk<false> w, Eight x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum = fma(w.quants[i], x.v[i], sum);
  }
  return w.scale * sum;
}

inline float dot(Chunk<true> w, Eight x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum = fma(w.quants[i], x.v[i], sum);
  }
  return fma(w.minimum, x.sum, w.scale * sum);
}

// ---- activations ------------------------------------------------------------------------------------------------

inline Eight with_sum(Eight x) {
  x.sum = ((x.v[0] + x.v[1]) + (x.v[2] + x.v[3])) + ((x.v[4] + x.v[5]) + (x.v[6] + x.v[7]));
  return x;
}

inline Eight load_eight(const device float* x) {
  const float4 low = ((const device float4*)x)[0];
  const float4 high = ((const device float4*)x)[1];
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[i] = low[i];
    out.v[i + 4] = high[i];
  }
  return with_sum(out);
}

inline Eight load_eight(const device float16_t* x) {
  const uint4 words = ((const device uint4*)x)[0];
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const half2 pair = as_type<half2>(words[i]);
    out.v[2 * i] = float(pair.x);
    out.v[2 * i + 1] = float(pair.y);
  }
  return with_sum(out);
}

// A bfloat16 is the upper half of a float32.
inline Eight load_eight(const device bfloat16_t* x) {
  const uint4 words = ((const device uint4*)x)[0];
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[2 * i] = as_type<float>(words[i] << 16);
    out.v[2 * i + 1] = as_type<float>(words[i] & 0xFFFF0000u);
  }
  return with_sum(out);
}

// ---- quants -----------------------------------------------------------------------------------------------------

// Bits AT .. AT + BITS - 1 of a word as a float, less ZERO. No conversion and no shift, which run at a quarter of the
// rate on Apple's GPUs: in the mantissa of 2^23 the field counts units of 2^AT, and one fused multiply-add brings it
// down. Exact for AT + BITS <= 23.
template <int BITS, int AT, int ZERO>
inline float field(uint word) {
  const float unit = as_type<float>(uint(127 - AT) << 23);  // 2^-AT
  const float raised = as_type<float>((word & (((1u << BITS) - 1u) << AT)) | 0x4B000000u);
  return fma(raised, unit, -(8388608.0f * unit + float(ZERO)));
}

// How quants are written: whole numbers of some bits of which ZERO stands for 0, or an index into a table.
template <int BITS, int ZERO>
struct Linear {
  enum { bits = BITS };
};
struct Iq4Nl {
  enum { bits = 4 };
};

// Eight quants, less their zero. `words` is where the row begins.
template <int ZERO>
inline Eight unpack(Linear<4, ZERO>, const device uint32_t* words, uint chunk) {
  const uint low = words[chunk];
  const uint high = low >> 16;
  Eight q;
  q.v[0] = field<4, 0, ZERO>(low);
  q.v[1] = field<4, 4, ZERO>(low);
  q.v[2] = field<4, 8, ZERO>(low);
  q.v[3] = field<4, 12, ZERO>(low);
  q.v[4] = field<4, 0, ZERO>(high);
  q.v[5] = field<4, 4, ZERO>(high);
  q.v[6] = field<4, 8, ZERO>(high);
  q.v[7] = field<4, 12, ZERO>(high);
  return q;
}

// A chunk is 40 bits: it begins in one word and ends in that word or the next.
template <int ZERO>
inline Eight unpack(Linear<5, ZERO>, const device uint32_t* words, uint chunk) {
  const uint first = chunk * 5 / 4;
  const uint shift = (chunk & 3u) * 8;
  const uint next = words[first + 1];
  const uint low = (words[first] >> shift) | ((next << 1) << (31 - shift));  // a shift by 32 is not defined
  const uint high = (low >> 20) | ((next >> shift) << 12);
  Eight q;
  q.v[0] = field<5, 0, ZERO>(low);
  q.v[1] = field<5, 5, ZERO>(low);
  q.v[2] = field<5, 10, ZERO>(low);
  q.v[3] = field<5, 15, ZERO>(low);
  q.v[4] = field<5, 0, ZERO>(high);
  q.v[5] = field<5, 5, ZERO>(high);
  q.v[6] = field<5, 10, ZERO>(high);
  q.v[7] = field<5, 15, ZERO>(high);
  return q;
}

// A chunk is 48 bits, a word and a half.
template <int ZERO>
inline Eight unpack(Linear<6, ZERO>, const device uint32_t* words, uint chunk) {
  const uint first = chunk * 3 / 2;
  const uint shift = (chunk & 1u) * 16;
  const uint next = words[first + 1];
  const uint low = (words[first] >> shift) | ((next << 1) << (31 - shift));
  const uint middle = (low >> 18) | ((next >> shift) << 14);
  const uint high = next >> shift;
  Eight q;
  q.v[0] = field<6, 0, ZERO>(low);
  q.v[1] = field<6, 6, ZERO>(low);
  q.v[2] = field<6, 12, ZERO>(low);
  q.v[3] = field<6, 0, ZERO>(middle);
  q.v[4] = field<6, 6, ZERO>(middle);
  q.v[5] = field<6, 12, ZERO>(middle);
  q.v[6] = field<6, 4, ZERO>(high);
  q.v[7] = field<6, 10, ZERO>(high);
  return q;
}

template <int ZERO>
inline Eight unpack(Linear<8, ZERO>, const device uint32_t* words, uint chunk) {
  const uint2 pair = ((const device uint2*)words)[chunk];
  Eight q;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    q.v[4 * i] = field<8, 0, ZERO>(pair[i]);
    q.v[4 * i + 1] = field<8, 8, ZERO>(pair[i]);
    q.v[4 * i + 2] = field<8, 0, ZERO>(pair[i] >> 16);
    q.v[4 * i + 3] = field<8, 8, ZERO>(pair[i] >> 16);
  }
  return q;
}

// -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113 as bytes, 128 added so that none is negative.
inline Eight unpack(Iq4Nl, const device uint32_t* words, uint chunk) {
  const uint word = words[chunk];
  Eight q;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint index = (word >> (4 * i)) & 15u;
    const uint lower = (index & 4u) ? 0x766A5D4Fu : 0x3F2D1801u;
    const uint upper = (index & 4u) ? 0xF1D9C5B5u : 0xA6998D81u;
    const uint table = (index & 8u) ? upper : lower;
    q.v[i] = field<8, 0, 128>(table >> (8 * (index & 3u)));
  }
  return q;
}

// ---- weights ----------------------------------------------------------------------------------------------------

// Q4_0 Q5_0 Q8_0 IQ4_NL: one scale for 32 values.
template <class CODE, int COLS>
struct Scaled {
  const device uint32_t* quants;
  const device float16_t* scales;
};

// Q4_1 Q5_1: a scale and a minimum for 32.
template <class CODE, int COLS>
struct ScaledMin {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device float16_t* mins;
};

// Q4_K Q5_K: a scale and a minimum for 256, each times six bits for 32.
template <class CODE, int COLS>
struct SuperMin {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device float16_t* mins;
  const device uint8_t* sub_scales;
};

// Q6_K: a scale for 256, times a signed byte for 16.
template <class CODE, int COLS>
struct Super {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device int8_t* sub_scales;
};

// F32 F16 BF16.
template <class T, int COLS>
struct Dense {
  const device T* values;
};

template <class CODE, int COLS>
inline const device uint32_t* row_words(const device uint32_t* quants, uint row) {
  return quants + row * uint(COLS / 32 * int(CODE::bits));
}

template <bool MINS>
inline Chunk<MINS> scaled(Eight q, float scale, float minimum) {
  Chunk<MINS> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    out.quants[i] = q.v[i];
  }
  out.scale = scale;
  out.minimum = minimum;
  return out;
}

template <class CODE, int COLS>
inline Chunk<false> load(Scaled<CODE, COLS> w, uint row, uint chunk) {
  const float scale = float(w.scales[row * uint(COLS / 32) + chunk / 4]);
  return scaled<false>(unpack(CODE(), row_words<CODE, COLS>(w.quants, row), chunk), scale, 0.0f);
}

template <class CODE, int COLS>
inline Chunk<true> load(ScaledMin<CODE, COLS> w, uint row, uint chunk) {
  const uint group = row * uint(COLS / 32) + chunk / 4;
  const Eight q = unpack(CODE(), row_words<CODE, COLS>(w.quants, row), chunk);
  return scaled<true>(q, float(w.scales[group]), float(w.mins[group]));
}

template <class CODE, int COLS>
inline Chunk<true> load(SuperMin<CODE, COLS> w, uint row, uint chunk) {
  const uint block = row * uint(COLS / 256) + chunk / 32;
  // Twelve bytes: six bits of scale of groups 0..3, six of their minima, four of both of groups 4..7; the upper two
  // bits of those stand above the sixes. Layout: llama.cpp get_scale_min_k4.
  const device uint32_t* sub = (const device uint32_t*)w.sub_scales + block * 3;
  const uint group = (chunk / 4) & 7u;
  const uint at = (group & 3u) * 8;
  const uint scale_bits = sub[0] >> at;
  const uint minimum_bits = sub[1] >> at;
  const uint both = sub[2] >> at;
  const bool late = group >= 4;
  const uint scale = late ? (both & 15u) | ((scale_bits >> 2) & 48u) : scale_bits & 63u;
  const uint minimum = late ? ((both >> 4) & 15u) | ((minimum_bits >> 2) & 48u) : minimum_bits & 63u;
  const Eight q = unpack(CODE(), row_words<CODE, COLS>(w.quants, row), chunk);
  return scaled<true>(q, float(w.scales[block]) * float(scale), -(float(w.mins[block]) * float(minimum)));
}

template <class CODE, int COLS>
inline Chunk<false> load(Super<CODE, COLS> w, uint row, uint chunk) {
  const float scale = float(w.scales[row * uint(COLS / 256) + chunk / 32]);
  const float sub = float(w.sub_scales[row * uint(COLS / 16) + chunk / 2]);
  return scaled<false>(unpack(CODE(), row_words<CODE, COLS>(w.quants, row), chunk), scale * sub, 0.0f);
}

template <class T, int COLS>
inline Chunk<false> load(Dense<T, COLS> w, uint row, uint chunk) {
  return scaled<false>(load_eight(w.values + row * uint(COLS) + chunk * 8), 1.0f, 0.0f);
}

// ---- rows -------------------------------------------------------------------------------------------------------

// The lane's chunks of a row of COLS values: true while there is one.
template <int CHUNKS>
inline bool has_chunk(uint chunk) {
  return CHUNKS % 32 == 0 || chunk < uint(CHUNKS);
}
