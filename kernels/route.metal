// One simdgroup a token; lane l holds experts l, l + 32, ... TOP_K times the best one left is taken by all lanes
// together: the largest choice, and of equals the lowest index.
const uint lane = thread_index_in_simdgroup;
const uint token = threadgroup_position_in_grid.x;
float scores[PER_LANE];
float choices[PER_LANE];
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  const uint expert = uint(i) * 32 + lane;
  scores[i] = expert < uint(EXPERTS) ? router_logits[token * uint(EXPERTS) + expert] : -INFINITY;
}
if (SOFTMAX) {
  float largest = scores[0];
  for (int i = 1; i < PER_LANE; ++i) {
    largest = max(largest, scores[i]);
  }
  largest = simd_max(largest);
  float total = 0.0f;
  for (int i = 0; i < PER_LANE; ++i) {
    scores[i] = exp(scores[i] - largest);
    total += scores[i];
  }
  total = simd_sum(total);
  for (int i = 0; i < PER_LANE; ++i) {
    scores[i] = scores[i] / total;
  }
} else {
  for (int i = 0; i < PER_LANE; ++i) {
    scores[i] = 1.0f / (1.0f + exp(-scores[i]));
  }
}
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  const uint expert = uint(i) * 32 + lane;
  choices[i] = scores[i];
#ifdef BIAS
  choices[i] += expert < uint(EXPERTS) ? bias[expert] : 0.0f;
#endif
  // NaN compares with nothing: as the last choice it leaves the loop below in order, and its weight is NaN.
  if (expert >= uint(EXPERTS) || isnan(choices[i])) {
    choices[i] = -INFINITY;
  }
}
float chosen_scores[TOP_K];
float total = 0.0f;
uint taken = 0;  // bit i: the lane's expert i is chosen
for (int k = 0; k < TOP_K; ++k) {
  float best = -INFINITY;
  uint expert = 0xFFFFFFFFu;
  float score = 0.0f;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    const uint candidate = uint(i) * 32 + lane;
    const bool is_left = (taken & (1u << i)) == 0 && candidate < uint(EXPERTS);
    if (is_left && (expert == 0xFFFFFFFFu || choices[i] > best)) {
      best = choices[i];
      expert = candidate;
      score = scores[i];
    }
  }
  const float winner = simd_max(best);
  const uint lowest = simd_min(best == winner ? expert : 0xFFFFFFFFu);
  taken |= expert == lowest ? 1u << (expert / 32) : 0u;
  chosen_scores[k] = simd_shuffle(score, ushort(lowest & 31u));
  total += chosen_scores[k];
  if (lane == 0) {
    experts[token * uint(TOP_K) + uint(k)] = lowest;
  }
}
if (lane == 0) {
  for (int k = 0; k < TOP_K; ++k) {
    const float share = NORMALIZE ? chosen_scores[k] / (total + 1e-20f) : chosen_scores[k];
    weights[token * uint(TOP_K) + uint(k)] = share * SCALE;
  }
}
