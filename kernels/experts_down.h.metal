// sums[r] += weight * (rows first + r of w) . x, over chunks begin .. end - 1, by one simdgroup; each lane its part.
template <int ROWS, int DEPTH, class W, class T>
inline void add_rows(
    W w, const device T* x, uint first, uint last, uint begin, uint end, float weight, uint lane, thread float* sums) {
  float parts[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    parts[r] = 0.0f;
  }
  for (uint start = begin + lane; start < end; start += 32 * DEPTH) {
    Raw raw[ROWS][DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = start + uint(32 * d);
      if (chunk < end) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          raw[r][d] = load(w, min(first + uint(r), last), chunk);
        }
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = start + uint(32 * d);
      if (chunk < end) {
        const Eight x8 = load_eight(x + chunk * 8);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          parts[r] += dot(decode(w, raw[r][d], chunk), x8);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = fma(weight, parts[r], sums[r]);
  }
}
