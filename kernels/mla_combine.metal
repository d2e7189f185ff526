// A thread for each dimension of a query of a head. Every simdgroup holds the factors of all splits, a lane those of
// splits lane, lane + 32, ...: sums are scaled to the largest score of all.
constexpr int PER_LANE = (SPLITS + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint head = threadgroup_position_in_grid.y;
const uint dimension = threadgroup_position_in_grid.x * uint(THREADS) + thread_index_in_threadgroup;
const auto states = state + head * uint(SPLITS * 2);
float factors[PER_LANE];
float totals[PER_LANE];
float largest = -INFINITY;
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  const uint split = uint(i) * 32 + lane;
  factors[i] = split < uint(SPLITS) ? states[split * 2] : -INFINITY;
  totals[i] = split < uint(SPLITS) ? states[split * 2 + 1] : 0.0f;
  largest = max(largest, factors[i]);
}
largest = simd_max(largest);
float total = 0.0f;
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  // A split without rows has no score, and counts for nothing.
  factors[i] = totals[i] == 0.0f ? 0.0f : exp2(factors[i] - largest);
  total = fma(factors[i], totals[i], total);
}
total = simd_sum(total);
float sum = 0.0f;
const auto partials = partial + head * uint(SPLITS * LATENT) + min(dimension, uint(LATENT - 1));
#pragma unroll 16
for (int i = 0; i < SPLITS; ++i) {
  sum = fma(simd_shuffle(factors[i / 32], ushort(i % 32)), partials[i * LATENT], sum);
}
if (dimension < uint(LATENT)) {
  y[head * uint(LATENT) + dimension] = T(sum / total);
}
