// Grid: blocks of rows, slots, tokens. A slot is a chosen expert, or after those WIDTH rows of the shared experts. A
// simdgroup takes ROWS rows of both matrices of one slot for one token. Which expert a slot has, every simdgroup finds
// out for itself: that is less work than a launch; one of each token writes it down, with the weights.
const uint lane = thread_index_in_simdgroup;
const uint slot = threadgroup_position_in_grid.y;
const uint token = threadgroup_position_in_grid.z;
const uint first = (threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup) * uint(ROWS);
const auto xt = x + token * uint(COLS);
constexpr int RESULTS = TOP_K * WIDTH + SHARED_WIDTH;  // of a token
#ifndef BIAS
const device float* bias = 0;
#endif
float values[ROWS];
if (slot < uint(TOP_K) && first < uint(WIDTH)) {
  const bool writes = slot == 0 && first == 0;
  auto left = load_experts<EXPERTS, PER_LANE, SOFTMAX, HAS_BIAS>(router_logits + token * uint(EXPERTS), bias, lane);
  uint expert = 0;
  float scores[TOP_K];
  float total = 0.0f;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) {
    if (writes || uint(k) <= slot) {
      const uint best = take_best<PER_LANE>(left, lane, scores[k]);
      total += scores[k];
      expert = uint(k) <= slot ? best : expert;
      if (writes && lane == 0) {
        choice[token * uint(2 * TOP_K) + uint(k)] = best;
      }
    }
  }
  if (writes && lane == 0) {
#pragma unroll
    for (int k = 0; k < TOP_K; ++k) {
      const float share = NORMALIZE ? scores[k] / (total + 1e-20f) : scores[k];
      choice[token * uint(2 * TOP_K) + uint(TOP_K + k)] = as_type<uint>(share * SCALE);
    }
  }
  const uint base = expert * uint(WIDTH);
  swiglu_rows<ROWS, DEPTH, COLS>(GATE, UP, xt, base + first, base + uint(WIDTH - 1), lane, values);
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0 && first + uint(r) < uint(WIDTH)) {
      hidden[token * uint(RESULTS) + slot * uint(WIDTH) + first + uint(r)] = T(values[r]);
    }
  }
}
#ifdef SHARED_GATE
const uint shared_first = (slot - uint(TOP_K)) * uint(WIDTH) + first;
if (slot >= uint(TOP_K) && first < uint(WIDTH) && shared_first < uint(SHARED_WIDTH)) {
  swiglu_rows<ROWS, DEPTH, COLS>(SHARED_GATE, SHARED_UP, xt, shared_first, uint(SHARED_WIDTH - 1), lane, values);
  for (int r = 0; r < ROWS; ++r) {
    if (lane == 0 && first + uint(r) < uint(WIDTH) && shared_first + uint(r) < uint(SHARED_WIDTH)) {
      hidden[token * uint(RESULTS) + uint(TOP_K * WIDTH) + shared_first + uint(r)] = T(values[r]);
    }
  }
}
#endif
