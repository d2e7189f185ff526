// Rows of one matrix times TOKENS rows of x, `x_token` values apart, by one simdgroup: LANES lanes share a row, so that
// the simdgroup works on 32 / LANES rows side by side, ROWS times. The last rows of a matrix may be fewer: a row past
// them is computed again as the last one and not written.
//
// NORMED: x is divided by its root mean square and multiplied by `norm_weight`. The sum of squares is taken on the way,
// and divides the result. RESIDUAL: `residual` is added. NORMED_TOO: the normed x is wanted as well; of its columns
// every row of the matrix writes its share.
template <
    int ROWS, int TOKENS, int DEPTH, int LANES, bool NORMED, bool NORMED_TOO, bool RESIDUAL, int COLS,
    class W, class T, class Y>
inline void qmv_rows(
    W w,
    const device T* x,
    const device float* norm_weight,
    float eps,
    const device Y* residual,
    device Y* y,
    device T* normed,
    uint x_token,
    uint y_token,
    uint base,
    uint first,
    uint rows,
    uint lane) {
  first += lane / uint(LANES);
  float sums[ROWS][TOKENS];
  float squares[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    squares[t] = 0.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r][t] = 0.0f;
    }
  }
  for (uint step = 0; step < uint(COLS / 8); step += DEPTH * LANES) {
    const uint begin = step + lane % uint(LANES);
    Raw raw[ROWS][DEPTH];
    decltype(load_turn<DEPTH>(w, 0u, 0u, 0u)) turn[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      turn[r] = load_turn<DEPTH>(w, base + min(first + uint(32 / LANES * r), rows - 1u), step, lane);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH * LANES>(begin + uint(LANES * d))) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          raw[r][d] = load_own(w, base + min(first + uint(32 / LANES * r), rows - 1u), begin, LANES * d);
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
      if (has_chunk<COLS / 8, DEPTH * LANES>(begin + uint(LANES * d))) {
        Eight gain;
        if (NORMED) {
          gain = load_eight(norm_weight, begin, LANES * d);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
          Eight x8 = load_eight(x + uint(t) * x_token, begin, LANES * d);
          if (NORMED) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              squares[t] = fma(x8.v[i], x8.v[i], squares[t]);
              x8.v[i] *= gain.v[i];
            }
            x8 = with_sum(x8);
          }
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            sums[r][t] += dot(decode_own(w, raw[r][d], own[r], begin), x8);
          }
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const float inverse = NORMED ? rsqrt(lanes_sum<LANES>(squares[t]) / float(COLS) + eps) : 1.0f;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float sum = lanes_sum<LANES>(sums[r][t]) * inverse;
      const uint row = first + uint(32 / LANES * r);
      if (lane % uint(LANES) == 0 && row < rows) {
        const uint at = uint(t) * y_token + row;
        y[at] = Y(RESIDUAL ? sum + float(residual[at]) : sum);
      }
      if (NORMED_TOO && row < rows) {
        const uint share = (uint(COLS) + rows - 1) / rows;
        for (uint i = row * share + lane % uint(LANES); i < min((row + 1) * share, uint(COLS)); i += uint(LANES)) {
          normed[uint(t * COLS) + i] = T(float(x[uint(t) * x_token + i]) * inverse * norm_weight[i]);
        }
      }
    }
  }
}
