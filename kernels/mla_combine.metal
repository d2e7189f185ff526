// A threadgroup for each query of a head, a thread a dimension. The splits' sums are scaled to the largest score of all.
const uint head = threadgroup_position_in_grid.y;
const uint dimension = threadgroup_position_in_grid.x * uint(THREADS) + thread_index_in_threadgroup;
const auto states = state + head * uint(SPLITS * 2);
float largest = -INFINITY;
for (uint i = 0; i < uint(SPLITS); ++i) {
  largest = max(largest, states[i * 2]);
}
float total = 0.0f;
float sum = 0.0f;
for (uint i = 0; i < uint(SPLITS); ++i) {
  // A split without rows has no score, and counts for nothing.
  const float factor = states[i * 2 + 1] == 0.0f ? 0.0f : exp2(states[i * 2] - largest);
  total = fma(factor, states[i * 2 + 1], total);
  if (dimension < uint(LATENT)) {
    sum = fma(factor, partial[(head * uint(SPLITS) + i) * uint(LATENT) + dimension], sum);
  }
}
if (dimension < uint(LATENT)) {
  y[head * uint(LATENT) + dimension] = T(sum / total);
}
