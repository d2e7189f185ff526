// Grid: blocks of rows of v_b, heads, queries. A threadgroup adds up the splits of its head and query, scaled to the
// largest score of all, and multiplies the latent that comes out by its rows of v_b; a simdgroup takes ROWS of them, and
// asks for them before it does anything else. What several threadgroups need they compute each for themselves.
//
// Every simdgroup holds the factors of all splits, a lane those of splits lane, lane + 32, ...
threadgroup float latent[LATENT];
constexpr int PER_LANE = (SPLITS + 31) / 32;
constexpr int DEPTH = (LATENT / 8 + 31) / 32;
constexpr int THREADS = SIMDGROUPS * 32;
constexpr int AT_ONCE = (SPLITS + (SPLITS + 35) / 36 - 1) / ((SPLITS + 35) / 36);  // splits of a turn
constexpr int PAIRS = LATENT / 2 + 1;  // of a split: its sums, then its largest score and the sum of its exponentials
const uint lane = thread_index_in_simdgroup;
const uint first = (threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup) * uint(ROWS);
const uint head = threadgroup_position_in_grid.y;
const uint query = threadgroup_position_in_grid.z;
Raw raw[ROWS][DEPTH];
#pragma unroll
for (int d = 0; d < DEPTH; ++d) {
  if (has_chunk<LATENT / 8, DEPTH * 32>(lane + uint(32 * d))) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      raw[r][d] = load(V_B, head * uint(VALUES) + min(first + uint(r), uint(VALUES - 1)), lane, 32 * d);
    }
  }
}
LOADS_END

const uint at = head * uint(QUERIES) + query;
const device float2* partials = (const device float2*)partial + at * uint(SPLITS * PAIRS);
float factors[PER_LANE];
float totals[PER_LANE];
float largest = -INFINITY;
#pragma unroll
for (int i = 0; i < PER_LANE; ++i) {
  const uint split = uint(i) * 32 + lane;
  const float2 state = split < uint(SPLITS) ? partials[split * uint(PAIRS) + uint(LATENT / 2)] : float2(-INFINITY, 0.0f);
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

for (uint begin = 0; begin < uint(LATENT / 2); begin += uint(THREADS)) {
  const uint pair = begin + thread_index_in_threadgroup;
  float2 sum = float2(0.0f, 0.0f);
#pragma unroll
  for (int turn = 0; turn < SPLITS; turn += AT_ONCE) {
    float2 values[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      values[i] = partials[uint(min(turn + i, SPLITS - 1) * PAIRS) + min(pair, uint(LATENT / 2 - 1))];
    }
    LOADS_END
#pragma unroll
    for (int i = 0; i < AT_ONCE && turn + i < SPLITS; ++i) {
      const float factor = simd_shuffle(factors[(turn + i) / 32], ushort((turn + i) % 32));
      sum.x = fma(factor, values[i].x, sum.x);
      sum.y = fma(factor, values[i].y, sum.y);
    }
  }
  if (pair < uint(LATENT / 2)) {
    latent[pair * 2] = sum.x;
    latent[pair * 2 + 1] = sum.y;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float sums[ROWS];
#pragma unroll
for (int r = 0; r < ROWS; ++r) {
  sums[r] = 0.0f;
}
#pragma unroll
for (int d = 0; d < DEPTH; ++d) {
  const uint chunk = lane + uint(32 * d);
  if (has_chunk<LATENT / 8, DEPTH * 32>(chunk)) {
    Eight x8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x8.v[i] = latent[chunk * 8 + uint(i)];
    }
    x8 = with_sum(x8);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r] += dot(decode(V_B, raw[r][d], lane), x8);
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
