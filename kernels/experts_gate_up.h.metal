// silu(gate x) * (up x) for rows first .. first + ROWS - 1, by one simdgroup; rows past `last` repeat it.
template <int ROWS, int COLS, class W, class T>
inline void swiglu_rows(W gate, W up, const device T* x, uint first, uint last, uint lane, thread float* hidden) {
  float gates[ROWS];
  float ups[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    gates[r] = 0.0f;
    ups[r] = 0.0f;
  }
#pragma unroll 4
  for (uint begin = 0; begin < uint(COLS / 8); begin += 32) {
    const uint chunk = begin + lane;
    if (has_chunk<COLS / 8>(chunk)) {
      const Eight x8 = load_eight(x + chunk * 8);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const uint row = min(first + uint(r), last);
        gates[r] += dot(load(gate, row, chunk), x8);
        ups[r] += dot(load(up, row, chunk), x8);
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
