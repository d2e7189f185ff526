// sums[r] += weight * (rows first + r of w) . x, over CHUNKS chunks from `from` on, by one simdgroup; each lane its
// part.
template <int ROWS, int DEPTH, int CHUNKS, class W, class T>
inline void add_rows(
    W w, const device T* x, uint first, uint last, uint from, float weight, uint lane, thread float (&sums)[ROWS]) {
  float parts[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    parts[r] = 0.0f;
  }
  for (uint step = 0; step < uint(CHUNKS); step += 32 * DEPTH) {
    const uint begin = from + step + lane;
    Raw raw[ROWS][DEPTH];
    decltype(load_turn<DEPTH>(w, 0u, 0u, 0u)) turn[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      turn[r] = load_turn<DEPTH>(w, min(first + uint(r), last), from + step, lane);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<CHUNKS, DEPTH * 32>(step + lane + uint(32 * d))) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          raw[r][d] = load_own(w, min(first + uint(r), last), begin, 32 * d);
        }
      }
    }
    LOADS_END
    decltype(scales_of(w, turn[0], 0u)) scales[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      scales[r] = scales_of(w, turn[r], lane);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      decltype(of_chunk(w, scales[0], 0, 0u)) own[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        own[r] = of_chunk(w, scales[r], d, lane);
      }
      if (has_chunk<CHUNKS, DEPTH * 32>(step + lane + uint(32 * d))) {
        const Eight x8 = load_eight(x, begin, 32 * d);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          parts[r] += dot(decode_own(w, raw[r][d], own[r], begin), x8);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = fma(weight, parts[r], sums[r]);
  }
}
