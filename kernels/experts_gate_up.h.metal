// silu(gate x) * (up x) for rows first .. first + ROWS - 1, by one simdgroup; rows past `last` repeat it.
template <int ROWS, int DEPTH, int COLS, class G, class U, class T>
inline void swiglu_rows(G gate, U up, const device T* x, uint first, uint last, uint lane, thread float* hidden) {
  float gates[ROWS];
  float ups[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    gates[r] = 0.0f;
    ups[r] = 0.0f;
  }
  for (uint step = 0; step < uint(COLS / 8); step += 32 * DEPTH) {
    const uint begin = step + lane;
    Raw raw_gate[ROWS][DEPTH];
    Raw raw_up[ROWS][DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH * 32>(begin + uint(32 * d))) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const uint row = min(first + uint(r), last);
          raw_gate[r][d] = load(gate, row, begin, 32 * d);
          raw_up[r][d] = load(up, row, begin, 32 * d);
        }
      }
    }
    LOADS_END
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (has_chunk<COLS / 8, DEPTH * 32>(begin + uint(32 * d))) {
        const Eight x8 = load_eight(x, begin, 32 * d);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          gates[r] += dot(decode(gate, raw_gate[r][d], begin), x8);
          ups[r] += dot(decode(up, raw_up[r][d], begin), x8);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float g = simd_sum(gates[r]);
    const float u = simd_sum(ups[r]);
    hidden[r] = g / (1.0f + exp(-g)) * u;
  }
}
