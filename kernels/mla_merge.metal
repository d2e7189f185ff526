// Grid: blocks of rows of v_b, heads, queries. A threadgroup adds up the splits of its head and query, scaled to the
// largest score of all, and multiplies the latent that comes out by its rows of v_b; a simdgroup takes ROWS of them,
// and asks for them before it does anything else. What several threadgroups need they compute each for themselves.
//
// Every simdgroup holds the factors of all splits, a lane those of splits lane, lane + 32, ...
//
// The latent is added up four values a thread. Threads past a quarter of the latent take other splits.
constexpr int PER_LANE = (SPLITS + 31) / 32;
constexpr int DEPTH = (LATENT / 8 + 31) / 32;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int FOURS = LATENT / 4;
constexpr int GROUPS = THREADS >= 2 * FOURS ? THREADS / FOURS : 1;  // of threads, each with every GROUPS-th split
constexpr int TURNS = (SPLITS + GROUPS - 1) / GROUPS;
constexpr int AT_ONCE = TURNS < 18 ? TURNS : 18;
threadgroup float latents[GROUPS * LATENT];
threadgroup float shared_factors[SPLITS];
const uint lane = thread_index_in_simdgroup;
const uint first = (threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup) * uint(ROWS);
const uint head = threadgroup_position_in_grid.y;
const uint query = threadgroup_position_in_grid.z;
Raw raw[ROWS][DEPTH];
decltype(load_turn<DEPTH>(V_B, 0u, 0u, 0u)) asked[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  asked[r] = load_turn<DEPTH>(V_B, head * uint(VALUES) + min(first + uint(r), uint(VALUES - 1)), 0, lane);
}
#pragma unroll
for (int d = 0; d < DEPTH; ++d) {
  if (has_chunk<LATENT / 8, DEPTH * 32>(lane + uint(32 * d))) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      raw[r][d] = load_own(V_B, head * uint(VALUES) + min(first + uint(r), uint(VALUES - 1)), lane, 32 * d);
    }
  }
}
LOADS_END

const uint at = head * uint(QUERIES) + query;
const device float2* partials = (const device float2*)partial + at * uint(SPLITS * (LATENT / 2 + 2));
float factors[PER_LANE];
float totals[PER_LANE];
float largest = -INFINITY;
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  const uint split = uint(i) * 32 + lane;
  const float2 state =
      split < uint(SPLITS) ? partials[split * uint(LATENT / 2 + 2) + uint(LATENT / 2)] : float2(-INFINITY, 0.0f);
  factors[i] = state.x;
  totals[i] = state.y;
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

if (simdgroup_index_in_threadgroup == 0) {
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i) {
    if (uint(i) * 32 + lane < uint(SPLITS)) {
      shared_factors[uint(i) * 32 + lane] = factors[i];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint group = GROUPS == 1 ? 0 : thread_index_in_threadgroup / uint(FOURS);
for (uint begin = 0; begin < uint(FOURS); begin += uint(THREADS)) {
  const uint four = begin + (GROUPS == 1 ? thread_index_in_threadgroup : thread_index_in_threadgroup % uint(FOURS));
  const device float4* from = (const device float4*)partials + min(four, uint(FOURS - 1));
  float4 sum = float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int turn = 0; turn < TURNS; turn += AT_ONCE) {
    float4 values[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      values[i] = from[min(uint((turn + i) * GROUPS) + group, uint(SPLITS - 1)) * uint(LATENT / 4 + 1)];
    }
    LOADS_END
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const uint split = uint((turn + i) * GROUPS) + group;
      const float factor = split < uint(SPLITS) ? shared_factors[split] : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] = fma(factor, values[i][j], sum[j]);
      }
    }
  }
  if (four < uint(FOURS) && group < uint(GROUPS)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      latents[group * uint(LATENT) + four * 4 + uint(j)] = sum[j];
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

decltype(scales_of(V_B, asked[0], 0u)) scales[ROWS];
float sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  scales[r] = scales_of(V_B, asked[r], lane);
  sums[r] = 0.0f;
}
#pragma unroll
for (int d = 0; d < DEPTH; ++d) {
  decltype(of_chunk(V_B, scales[0], 0, 0u)) own[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    own[r] = of_chunk(V_B, scales[r], d, lane);
  }
  const uint chunk = lane + uint(32 * d);
  if (has_chunk<LATENT / 8, DEPTH * 32>(chunk)) {
    Eight x8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float value = latents[chunk * 8 + uint(i)];
#pragma unroll
      for (int g = 1; g < GROUPS; ++g) {
        value += latents[uint(g * LATENT) + chunk * 8 + uint(i)];
      }
      x8.v[i] = value;
    }
    x8 = with_sum(x8);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r] += dot(decode_own(V_B, raw[r][d], own[r], lane), x8);
    }
  }
}
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  const float sum = simd_sum(sums[r]);
  if (lane == 0 && first + uint(r) < uint(VALUES)) {
    y[(query * uint(HEADS) + head) * uint(VALUES) + first + uint(r)] = T(sum / total);
  }
}
