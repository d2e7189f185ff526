// Grid: blocks of rows, slots, tokens. A slot is a chosen expert, or after those WIDTH rows of the shared experts. A
// simdgroup takes ROWS rows of both matrices of one slot for one token.
const uint lane = thread_index_in_simdgroup;
const uint slot = threadgroup_position_in_grid.y;
const uint token = threadgroup_position_in_grid.z;
const uint first = (threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup) * uint(ROWS);
const auto xt = x + token * uint(COLS);
float values[ROWS];
if (slot < uint(TOP_K)) {
  if (first < uint(WIDTH)) {
    const uint expert = min(uint(experts[token * uint(TOP_K) + slot]), uint(EXPERTS - 1));
    const uint base = expert * uint(WIDTH);
    swiglu_rows<ROWS, DEPTH, COLS>(GATE, UP, xt, base + first, base + uint(WIDTH - 1), lane, values);
    for (int r = 0; r < ROWS; ++r) {
      if (lane == 0 && first + uint(r) < uint(WIDTH)) {
        hidden[(token * uint(TOP_K) + slot) * uint(WIDTH) + first + uint(r)] = T(values[r]);
      }
    }
  }
}
#ifdef SHARED_GATE
const uint shared_first = (slot - uint(TOP_K)) * uint(WIDTH) + first;
if (slot >= uint(TOP_K) && first < uint(WIDTH) && shared_first < uint(SHARED_WIDTH)) {
  swiglu_rows<ROWS, DEPTH, COLS>(SHARED_GATE, SHARED_UP, xt, shared_first, uint(SHARED_WIDTH - 1), lane, values);
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0 && first + uint(r) < uint(WIDTH) && shared_first + uint(r) < uint(SHARED_WIDTH)) {
      shared_hidden[token * uint(SHARED_WIDTH) + shared_first + uint(r)] = T(values[r]);
    }
  }
}
#endif
