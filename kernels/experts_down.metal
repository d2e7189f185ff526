// A threadgroup computes ROWS rows of one token. A slot is a chosen expert, or after those a part of the shared ones;
// simdgroup i takes slots i, i + SIMDGROUPS, ... The simdgroups' sums meet in threadgroup memory and are added in
// order, so the bits are the same in every run.
threadgroup float partial[SIMDGROUPS * ROWS];
constexpr int RESULTS = TOP_K * WIDTH + SHARED_WIDTH;  // of gate and up, for a token
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.y;
const uint first = threadgroup_position_in_grid.x * uint(ROWS);
const uint row = first + thread_index_in_threadgroup;
const bool writes = thread_index_in_threadgroup < uint(ROWS) && row < uint(ROWS_IN_ALL);
#ifdef RESIDUAL
T added = T(0.0f);
if (writes) {  // asked for now, needed last
  added = residual[token * uint(ROWS_IN_ALL) + row];
}
#endif
float sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  sums[r] = 0.0f;
}
for (uint slot = simdgroup; slot < uint(SLOTS); slot += uint(SIMDGROUPS)) {
  if (slot < uint(TOP_K)) {
    const auto chosen = choice + token * uint(2 * TOP_K) + slot;
    const uint base = min(chosen[0], uint(EXPERTS - 1)) * uint(ROWS_IN_ALL);
    const uint last = base + uint(ROWS_IN_ALL - 1);
    const auto x = hidden + token * uint(RESULTS) + slot * uint(WIDTH);
    add_rows<ROWS, DEPTH, WIDTH / 8>(DOWN, x, base + first, last, 0, as_type<float>(chosen[TOP_K]), lane, sums);
  }
#ifdef SHARED_DOWN
  if (slot >= uint(TOP_K)) {
    const uint from = (slot - uint(TOP_K)) * uint(SHARED_PART / 8);
    const auto x = hidden + token * uint(RESULTS) + uint(TOP_K * WIDTH);
    add_rows<ROWS, DEPTH, SHARED_PART / 8>(SHARED_DOWN, x, first, uint(ROWS_IN_ALL - 1), from, 1.0f, lane, sums);
  }
#endif
}
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  const float part = simd_sum(sums[r]);
  if (lane == 0) {
    partial[simdgroup * uint(ROWS) + uint(r)] = part;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (writes) {
  float sum = 0.0f;
#ifdef RESIDUAL
  sum = float(added);
#endif
  for (int i = 0; i < SIMDGROUPS; ++i) {
    sum += partial[uint(i * ROWS) + thread_index_in_threadgroup];
  }
  y[token * uint(ROWS_IN_ALL) + row] = T(sum);
}
