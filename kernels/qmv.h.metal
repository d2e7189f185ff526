// ROWS rows of one matrix times TOKENS rows of x, by one simdgroup. The last rows of a matrix may be fewer: a row past
// `last` is computed again as `last` and not written.
template <int ROWS, int TOKENS, int COLS, class W, class T>
inline void qmv_rows(W w, const device T* x, device T* y, uint first, uint rows, uint lane) {
  float sums[ROWS][TOKENS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      sums[r][t] = 0.0f;
    }
  }
#pragma unroll 4
  for (uint begin = 0; begin < uint(COLS / 8); begin += 32) {
    const uint chunk = begin + lane;
    if (has_chunk<COLS / 8>(chunk)) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const auto values = load(w, min(first + uint(r), rows - 1u), chunk);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          sums[r][t] += dot(values, load_eight(x + uint(t * COLS) + chunk * 8));
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
