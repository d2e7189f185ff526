// sums[r] += weight * (rows first + r of w) . x, over chunks begin .. end - 1, by one simdgroup; each lane its part.
template <int ROWS, class W, class T>
inline void add_rows(
    W w, const device T* x, uint first, uint last, uint begin, uint end, float weight, uint lane, thread float* sums) {
  float parts[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    parts[r] = 0.0f;
  }
#pragma unroll 4
  for (uint chunk = begin + lane; chunk < end; chunk += 32) {
    const Eight x8 = load_eight(x + chunk * 8);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      parts[r] += dot(load(w, min(first + uint(r), last), chunk), x8);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = fma(weight, parts[r], sums[r]);
  }
}
