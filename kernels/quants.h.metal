// Weights as kernels/planes.py lays them out, eight values ("a chunk") at a time.
//
// Each type of weight is a struct of its planes. Its rows are counted over all leading dimensions, so that row r of
// expert e is e * rows + r. COLS is the length of a row; chunk c of a row holds its values 8c .. 8c + 7.
//
//   load(w, row, chunk, ahead) -> Raw  the bytes of chunk + ahead; `ahead` is a constant, a multiple of 8, and goes
//                                      into the offset of the load itself; for K-quants it is 0, see below
//   decode(w, raw, chunk) -> Chunk     value = scale * quants[i] + minimum; chunk + ahead decodes alike
//   dot(chunk, x)                      the sum of eight values times x
//
// A row on which the 32 lanes of a simdgroup work together, DEPTH chunks of each a turn, is loaded in two parts. The
// scales of a K-quant, which many chunks share, are then loaded and multiplied out by one lane for all. `row` and
// `first` are the same in all lanes, and `first` is a multiple of 32:
//
//   load_turn<DEPTH>(w, row, first, lane) -> Turn   for the chunks from `first` on, where lane 0 begins
//   load_own(w, row, chunk, ahead) -> Raw           all that is not in the Turn
//   scales_of(w, turn, lane) -> Scales              once, when it is there
//   of_chunk(w, scales, d, lane) -> Own             what it has for a lane's d-th chunk; by all lanes together
//   decode_own(w, raw, own, chunk) -> Chunk
//
// A lane takes chunks lane, lane + 32, ...: whatever the type, a simdgroup then reads neighbouring bytes. It loads
// DEPTH of them before it decodes the first: with less under way, a GPU waits for memory.
//
// A section whose heading says `for` is left out of launches that have nothing of what it names: types of weights as
// the structs below are called, `quants` for all of them but Dense, `weights` for any; `uint8_t` is a cache in 8 bits,
// `turns` where load_turn is called. With `and` between, of each of them.

#ifndef LOADS_END  // cuda_prelude.h: there a compiler would move loads down again, to where they are used
#define LOADS_END
#endif

inline void put_pair(uint word, float16_t, thread float* out) {
  const half2 pair = as_type<half2>(word);
  out[0] = float(pair.x);
  out[1] = float(pair.y);
}

// A bfloat16 is the upper half of a float32.
inline void put_pair(uint word, bfloat16_t, thread float* out) {
  out[0] = as_type<float>(word << 16);
  out[1] = as_type<float>(word & 0xFFFF0000u);
}

// ---- for weights: activations ---------------------------------------------------------------------------------------

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

inline Eight with_sum(Eight x) {
  x.sum = ((x.v[0] + x.v[1]) + (x.v[2] + x.v[3])) + ((x.v[4] + x.v[5]) + (x.v[6] + x.v[7]));
  return x;
}

// Eight activations: chunk + ahead.
inline Eight load_eight(const device float* x, uint chunk, int ahead) {
  const device float4* words = (const device float4*)x + chunk * 2;
  const float4 low = words[2 * ahead];
  const float4 high = words[2 * ahead + 1];
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.v[i] = low[i];
    out.v[i + 4] = high[i];
  }
  return with_sum(out);
}

template <class T>
inline Eight load_eight(const device T* x, uint chunk, int ahead) {
  const uint4 words = ((const device uint4*)x + chunk)[ahead];
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    put_pair(words[i], T(0.0f), out.v + 2 * i);
  }
  return with_sum(out);
}

// ---- for quants uint8_t ---------------------------------------------------------------------------------------------

#ifndef HAS_AND_OR  // cuda_prelude.h has it as one instruction
inline uint and_or(uint word, uint mask, uint bits) {
  return (word & mask) | bits;
}
#endif

// Bits AT .. AT + BITS - 1 of a word as a float, less ZERO. No conversion and no shift, which run at a quarter of the
// rate on Apple's GPUs: in the mantissa of 2^23 the field counts units of 2^AT, and one fused multiply-add brings it
// down. Exact for AT + BITS <= 23.
template <int BITS, int AT, int ZERO>
inline float field(uint word) {
  const float unit = as_type<float>(uint(127 - AT) << 23);  // 2^-AT
  const float raised = as_type<float>(and_or(word, ((1u << BITS) - 1u) << AT, 0x4B000000u));
  return fma(raised, unit, -(8388608.0f * unit + float(ZERO)));
}

// ---- for weights: quants --------------------------------------------------------------------------------------------

// How quants are written: whole numbers of some bits of which ZERO stands for 0, or an index into a table.
template <int BITS, int ZERO>
struct Linear {
  enum { bits = BITS };
};
struct Iq4Nl {
  enum { bits = 4 };
};

// What a chunk is made of, as it stands in memory. Loading is apart from decoding, so that a lane can ask for several
// chunks before it needs the first. A type uses the members that it needs.
struct Raw {
  uint words[8];
  float16_t scale;
  float16_t minimum;
  uint sub[3];
};

// ---- for Linear<5> Linear<6> ----------------------------------------------------------------------------------------

// Bits `shift` .. `shift` + 31 of two words. A shift by 32 is not defined.
inline uint funnel(uint low, uint high, uint shift) {
  return (low >> shift) | ((high << 1) << (31 - shift));
}

// ---- for Linear<4> Iq4Nl --------------------------------------------------------------------------------------------

// Of each way to write quants, load_words: the words of eight of them, `row` being where the row begins; and unpack:
// the eight, less their zero.
inline void load_words(Linear<4, 0>, const device uint32_t* row, uint chunk, int ahead, thread Raw& raw) {
  raw.words[0] = (row + chunk)[ahead];
}

template <int ZERO>
inline Eight unpack(Linear<4, ZERO>, Raw raw, uint chunk) {
  const uint low = raw.words[0];
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

// ---- for Linear<5> --------------------------------------------------------------------------------------------------

// 40 bits: a chunk begins in one word and ends in that word or the next.
inline void load_words(Linear<5, 0>, const device uint32_t* row, uint chunk, int ahead, thread Raw& raw) {
  const device uint32_t* words = row + chunk * 5 / 4;
  raw.words[0] = words[ahead * 5 / 4];
  raw.words[1] = words[ahead * 5 / 4 + 1];
}

template <int ZERO>
inline Eight unpack(Linear<5, ZERO>, Raw raw, uint chunk) {
  const uint shift = (chunk & 3u) * 8;
  const uint low = funnel(raw.words[0], raw.words[1], shift);
  const uint high = (low >> 20) | ((raw.words[1] >> shift) << 12);
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

// ---- for Linear<6> --------------------------------------------------------------------------------------------------

// 48 bits, a word and a half.
inline void load_words(Linear<6, 0>, const device uint32_t* row, uint chunk, int ahead, thread Raw& raw) {
  const device uint32_t* words = row + chunk * 3 / 2;
  raw.words[0] = words[ahead * 3 / 2];
  raw.words[1] = words[ahead * 3 / 2 + 1];
}

template <int ZERO>
inline Eight unpack(Linear<6, ZERO>, Raw raw, uint chunk) {
  const uint shift = (chunk & 1u) * 16;
  const uint low = funnel(raw.words[0], raw.words[1], shift);
  const uint high = raw.words[1] >> shift;
  const uint middle = (low >> 18) | (high << 14);
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

// ---- for Linear<8> --------------------------------------------------------------------------------------------------

inline void load_words(Linear<8, 0>, const device uint32_t* row, uint chunk, int ahead, thread Raw& raw) {
  const uint2 pair = ((const device uint2*)row + chunk)[ahead];
  raw.words[0] = pair.x;
  raw.words[1] = pair.y;
}

template <int ZERO>
inline Eight unpack(Linear<8, ZERO>, Raw raw, uint chunk) {
  Eight q;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint low = raw.words[i];
    const uint high = low >> 16;
    q.v[4 * i] = field<8, 0, ZERO>(low);
    q.v[4 * i + 1] = field<8, 8, ZERO>(low);
    q.v[4 * i + 2] = field<8, 0, ZERO>(high);
    q.v[4 * i + 3] = field<8, 8, ZERO>(high);
  }
  return q;
}

// ---- for Iq4Nl ------------------------------------------------------------------------------------------------------

// -127 -104 -83 -65 | -49 -35 -22 -10 | 1 13 25 38 | 53 69 89 113 as bytes, 128 added so that none is negative.
inline Eight unpack(Iq4Nl, Raw raw, uint chunk) {
  Eight q;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint index = (raw.words[0] >> (4 * i)) & 15u;
    const uint lower = (index & 4u) ? 0x766A5D4Fu : 0x3F2D1801u;
    const uint upper = (index & 4u) ? 0xF1D9C5B5u : 0xA6998D81u;
    const uint table = (index & 8u) ? upper : lower;
    q.v[i] = field<8, 0, 128>(table >> (8 * (index & 3u)));
  }
  return q;
}

// ---- for quants -----------------------------------------------------------------------------------------------------

template <class CODE, int COLS>
inline void load_quants(const device uint32_t* quants, uint row, uint chunk, int ahead, thread Raw& raw) {
  load_words(Linear<int(CODE::bits), 0>(), quants + row * uint(COLS / 32 * int(CODE::bits)), chunk, ahead, raw);
}

// ---- for weights: what a chunk comes to -----------------------------------------------------------------------------

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

// ---- for Scaled -----------------------------------------------------------------------------------------------------

// Q4_0 Q5_0 Q8_0 IQ4_NL: one scale for 32 values.
template <class CODE, int COLS>
struct Scaled {
  const device uint32_t* quants;
  const device float16_t* scales;
};

template <class CODE, int COLS>
inline Raw load(Scaled<CODE, COLS> w, uint row, uint chunk, int ahead) {
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, ahead, raw);
  raw.scale = (w.scales + (row * uint(COLS / 32) + chunk / 4))[ahead / 4];
  return raw;
}

template <class CODE, int COLS>
inline Chunk<false> decode(Scaled<CODE, COLS> w, Raw raw, uint chunk) {
  return scaled<false>(unpack(CODE(), raw, chunk), float(raw.scale), 0.0f);
}

// ---- for ScaledMin --------------------------------------------------------------------------------------------------

// Q4_1 Q5_1: a scale and a minimum for 32.
template <class CODE, int COLS>
struct ScaledMin {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device float16_t* mins;
};

template <class CODE, int COLS>
inline Raw load(ScaledMin<CODE, COLS> w, uint row, uint chunk, int ahead) {
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, ahead, raw);
  raw.scale = (w.scales + (row * uint(COLS / 32) + chunk / 4))[ahead / 4];
  raw.minimum = (w.mins + (row * uint(COLS / 32) + chunk / 4))[ahead / 4];
  return raw;
}

template <class CODE, int COLS>
inline Chunk<true> decode(ScaledMin<CODE, COLS> w, Raw raw, uint chunk) {
  return scaled<true>(unpack(CODE(), raw, chunk), float(raw.scale), float(raw.minimum));
}

// ---- for SuperMin ---------------------------------------------------------------------------------------------------

// Q4_K Q5_K: a scale and a minimum for 256, each times six bits for 32.
template <class CODE, int COLS>
struct SuperMin {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device float16_t* mins;
  const device uint8_t* sub_scales;
};

template <class CODE, int COLS>
inline Raw load(SuperMin<CODE, COLS> w, uint row, uint chunk, int) {
  const uint block = row * uint(COLS / 256) + chunk / 32;
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, 0, raw);
  raw.scale = w.scales[block];
  raw.minimum = w.mins[block];
#pragma unroll
  for (uint i = 0; i < 3; ++i) {
    raw.sub[i] = ((const device uint32_t*)w.sub_scales)[block * 3 + i];
  }
  return raw;
}

struct SixBits {
  uint scale;
  uint minimum;
};

// Of twelve bytes those of a group, in the lowest bits: six bits of scale of groups 0..3, six of their minima, four of
// both of groups 4..7; the upper two bits of those stand above the sixes. Layout: llama.cpp get_scale_min_k4.
inline SixBits six_bits(uint scales, uint mins, uint both, bool late) {
  return SixBits{
      late ? (both & 15u) | ((scales >> 2) & 48u) : scales & 63u,
      late ? ((both >> 4) & 15u) | ((mins >> 2) & 48u) : mins & 63u};
}

template <class CODE, int COLS>
inline Chunk<true> decode(SuperMin<CODE, COLS> w, Raw raw, uint chunk) {
  const uint group = (chunk / 4) & 7u;
  const uint at = (group & 3u) * 8;
  const SixBits two = six_bits(raw.sub[0] >> at, raw.sub[1] >> at, raw.sub[2] >> at, group >= 4);
  return scaled<true>(
      unpack(CODE(), raw, chunk), float(raw.scale) * float(two.scale), -(float(raw.minimum) * float(two.minimum)));
}

// ---- for Super ------------------------------------------------------------------------------------------------------

// Q6_K: a scale for 256, times a signed byte for 16.
template <class CODE, int COLS>
struct Super {
  const device uint32_t* quants;
  const device float16_t* scales;
  const device int8_t* sub_scales;
};

template <class CODE, int COLS>
inline Raw load(Super<CODE, COLS> w, uint row, uint chunk, int) {
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, 0, raw);
  raw.scale = w.scales[row * uint(COLS / 256) + chunk / 32];
  raw.sub[0] = uint(int(w.sub_scales[row * uint(COLS / 16) + chunk / 2]));
  return raw;
}

template <class CODE, int COLS>
inline Chunk<false> decode(Super<CODE, COLS> w, Raw raw, uint chunk) {
  return scaled<false>(unpack(CODE(), raw, chunk), float(raw.scale) * float(int(raw.sub[0])), 0.0f);
}

// ---- for turns: of any type -----------------------------------------------------------------------------------------

struct Turn {};

template <int DEPTH, class W>
inline Turn load_turn(W w, uint row, uint first, uint lane) {
  return Turn();
}

template <class W>
inline Raw load_own(W w, uint row, uint chunk, int ahead) {
  return load(w, row, chunk, ahead);
}

template <class W>
inline Turn scales_of(W w, Turn turn, uint lane) {
  return turn;
}

template <class W>
inline Turn of_chunk(W w, Turn turn, int d, uint lane) {
  return turn;
}

template <class W>
inline auto decode_own(W w, Raw raw, Turn own, uint chunk) {
  return decode(w, raw, chunk);
}

// ---- for turns and SuperMin -----------------------------------------------------------------------------------------

// Of FOURS times four blocks, eight groups each: lane l has group l % 8 of block l / 8 of each four.
template <int FOURS>
struct SuperMinTurn {
  uint bytes[FOURS][3];
  float16_t scale[FOURS];
  float16_t minimum[FOURS];
};

template <int FOURS>
struct SuperMinScales {
  float scale[FOURS];
  float minimum[FOURS];
};

struct SuperMinOwn {
  float scale;
  float minimum;
};

template <int DEPTH, class CODE, int COLS>
inline SuperMinTurn<(DEPTH + 3) / 4> load_turn(SuperMin<CODE, COLS> w, uint row, uint first, uint lane) {
  SuperMinTurn<(DEPTH + 3) / 4> turn;
#pragma unroll
  for (int i = 0; i < (DEPTH + 3) / 4; ++i) {
    const uint block = row * uint(COLS / 256) + min(first / 32 + uint(4 * i) + lane / 8, uint(COLS / 256 - 1));
    turn.scale[i] = w.scales[block];
    turn.minimum[i] = w.mins[block];
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      turn.bytes[i][j] = uint((w.sub_scales + block * 12 + lane % 4)[4 * j]);
    }
  }
  return turn;
}

template <class CODE, int COLS>
inline Raw load_own(SuperMin<CODE, COLS> w, uint row, uint chunk, int ahead) {
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, ahead, raw);
  return raw;
}

template <class CODE, int COLS, int FOURS>
inline SuperMinScales<FOURS> scales_of(SuperMin<CODE, COLS> w, SuperMinTurn<FOURS> turn, uint lane) {
  SuperMinScales<FOURS> scales;
#pragma unroll
  for (int i = 0; i < FOURS; ++i) {
    const SixBits two = six_bits(turn.bytes[i][0], turn.bytes[i][1], turn.bytes[i][2], lane % 8 >= 4);
    scales.scale[i] = float(turn.scale[i]) * float(two.scale);
    scales.minimum[i] = -(float(turn.minimum[i]) * float(two.minimum));
  }
  return scales;
}

template <class CODE, int COLS, int FOURS>
inline SuperMinOwn of_chunk(SuperMin<CODE, COLS> w, SuperMinScales<FOURS> scales, int d, uint lane) {
  const ushort from = ushort(uint(d % 4 * 8) + lane / 4);
  return SuperMinOwn{simd_shuffle(scales.scale[d / 4], from), simd_shuffle(scales.minimum[d / 4], from)};
}

template <class CODE, int COLS>
inline Chunk<true> decode_own(SuperMin<CODE, COLS> w, Raw raw, SuperMinOwn own, uint chunk) {
  return scaled<true>(unpack(CODE(), raw, chunk), own.scale, own.minimum);
}

// ---- for turns and Super --------------------------------------------------------------------------------------------

// Of PAIRS of blocks, sixteen groups each: lane l has group l % 16 of block l / 16 of each pair.
template <int PAIRS>
struct SuperTurn {
  int byte[PAIRS];
  float16_t scale[PAIRS];
};

template <int PAIRS>
struct SuperScales {
  float scale[PAIRS];
};

template <int DEPTH, class CODE, int COLS>
inline SuperTurn<(DEPTH + 1) / 2> load_turn(Super<CODE, COLS> w, uint row, uint first, uint lane) {
  SuperTurn<(DEPTH + 1) / 2> turn;
#pragma unroll
  for (int i = 0; i < (DEPTH + 1) / 2; ++i) {
    const uint block = row * uint(COLS / 256) + min(first / 32 + uint(2 * i) + lane / 16, uint(COLS / 256 - 1));
    turn.scale[i] = w.scales[block];
    turn.byte[i] = int(w.sub_scales[block * 16 + lane % 16]);
  }
  return turn;
}

template <class CODE, int COLS>
inline Raw load_own(Super<CODE, COLS> w, uint row, uint chunk, int ahead) {
  Raw raw;
  load_quants<CODE, COLS>(w.quants, row, chunk, ahead, raw);
  return raw;
}

template <class CODE, int COLS, int PAIRS>
inline SuperScales<PAIRS> scales_of(Super<CODE, COLS> w, SuperTurn<PAIRS> turn, uint lane) {
  SuperScales<PAIRS> scales;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    scales.scale[i] = float(turn.scale[i]) * float(turn.byte[i]);
  }
  return scales;
}

template <class CODE, int COLS, int PAIRS>
inline float of_chunk(Super<CODE, COLS> w, SuperScales<PAIRS> scales, int d, uint lane) {
  return simd_shuffle(scales.scale[d / 2], ushort(uint(d % 2 * 16) + lane / 2));
}

template <class CODE, int COLS>
inline Chunk<false> decode_own(Super<CODE, COLS> w, Raw raw, float own, uint chunk) {
  return scaled<false>(unpack(CODE(), raw, chunk), own, 0.0f);
}

// ---- for Dense ------------------------------------------------------------------------------------------------------

// F32 F16 BF16.
template <class T, int COLS>
struct Dense {
  const device T* values;
};

template <int COLS>
inline Raw load(Dense<float, COLS> w, uint row, uint chunk, int ahead) {
  const device uint4* words = (const device uint4*)(w.values + (row * uint(COLS) + chunk * 8));
  const uint4 low = words[2 * ahead];
  const uint4 high = words[2 * ahead + 1];
  Raw raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw.words[i] = low[i];
    raw.words[i + 4] = high[i];
  }
  return raw;
}

template <class T, int COLS>
inline Raw load(Dense<T, COLS> w, uint row, uint chunk, int ahead) {
  const uint4 words = ((const device uint4*)(w.values + (row * uint(COLS) + chunk * 8)))[ahead];
  Raw raw;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    raw.words[i] = words[i];
  }
  return raw;
}

template <int COLS>
inline Chunk<false> decode(Dense<float, COLS> w, Raw raw, uint chunk) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    out.v[i] = as_type<float>(raw.words[i]);
  }
  return scaled<false>(out, 1.0f, 0.0f);
}

template <class T, int COLS>
inline Chunk<false> decode(Dense<T, COLS> w, Raw raw, uint chunk) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    put_pair(raw.words[i], T(0.0f), out.v + 2 * i);
  }
  return scaled<false>(out, 1.0f, 0.0f);
}

// ---- for weights: rows ----------------------------------------------------------------------------------------------

// Whether there is such a chunk in rows of CHUNKS, of which the lanes of a row take so many in one go.
template <int CHUNKS, int AT_ONCE>
inline bool has_chunk(uint chunk) {
  return CHUNKS % AT_ONCE == 0 || chunk < uint(CHUNKS);
}

// The sum over groups of LANES neighbouring lanes, in each of them.
template <int LANES>
inline float lanes_sum(float value) {
  if (LANES == 32) {
    return simd_sum(value);
  }
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    value += simd_shuffle_xor(value, ushort(step));
  }
  return value;
}
