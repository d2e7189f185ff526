// ROWS rows of one matrix times TOKENS rows of x, by one simdgroup. The last rows of a matrix may be fewer: a row past
// `last` is computed again as `last` and not written.
template <int ROWS, int TOKENS, int DEPTH, int COLS, class W, class T>
inline void qmv_rows(W w, const device T* x, device T* y, uint first, uint rows, uint lane) {
  float sums[ROWS][TOKENS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      sums[r][t] = 0.0f;
    }
  }
  for (uint step = 0; step < uint(COLS / 8); step += 32 * DEPTH) {
    const uint begin = step + lane;
    Raw raw[ROWS][DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH>(begin + uint(32 * d))) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          raw[r][d] = load(w, min(first + uint(r), rows - 1u), begin, d);
        }
      }
    }
    LOADS_END
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH>(begin + uint(32 * d))) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          const Eight x8 = load_eight(x + t * COLS, begin, d);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            sums[r][t] += dot(decode(w, raw[r][d], begin), x8);
          }
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float sum = simd_sum(sums[r][t]);
      if (lane == 0 && first + uint(r) < rows) {
        y[uint(t) * rows + first + uint(r)] = T(sum);
      }
    }
  }
}
