// A threadgroup computes ROWS rows of one token. Slot s is a chosen expert, or after those WIDTH of the shared experts'
// columns; simdgroup i takes slots i, i + SIMDGROUPS, ... The simdgroups' sums meet in threadgroup memory and
// are added in order, so the bits are the same in every run.
threadgroup float partial[SIMDGROUPS * ROWS];
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.y;
const uint first = threadgroup_position_in_grid.x * uint(ROWS);
float sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  sums[r] = 0.0f;
}
for (uint slot = simdgroup; slot < uint(SLOTS); slot += uint(SIMDGROUPS)) {
  if (slot < uint(TOP_K)) {
    const uint choice = token * uint(TOP_K) + slot;
    const uint base = min(uint(experts[choice]), uint(EXPERTS - 1)) * uint(ROWS_IN_ALL);
    const auto x = hidden + choice * uint(WIDTH);
    const uint last = base + uint(ROWS_IN_ALL - 1);
    add_rows<ROWS, DEPTH, WIDTH / 8>(DOWN, x, base + first, last, 0, weights[choice], lane, sums);
  }
#ifdef SHARED_DOWN
  if (slot >= uint(TOP_K)) {
    const uint from = (slot - uint(TOP_K)) * uint(WIDTH / 8);
    const auto x = shared_hidden + token * uint(SHARED_WIDTH);
    add_rows<ROWS, DEPTH, WIDTH / 8>(SHARED_DOWN, x, first, uint(ROWS_IN_ALL - 1), from, 1.0f, lane, sums);
  }
#endif
}
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  const float sum = simd_sum(sums[r]);
  if (lane == 0) {
    partial[simdgroup * uint(ROWS) + uint(r)] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint row = first + thread_index_in_threadgroup;
if (thread_index_in_threadgroup < uint(ROWS) && row < uint(ROWS_IN_ALL)) {
#ifdef RESIDUAL
  float sum = float(residual[token * uint(ROWS_IN_ALL) + row]);
#else
  float sum = 0.0f;
#endif
  for (int i = 0; i < SIMDGROUPS; ++i) {
    sum += partial[uint(i * ROWS) + thread_index_in_threadgroup];
  }
  y[token * uint(ROWS_IN_ALL) + row] = T(sum);
}
