// writes: cache
// Grid: splits of the context, groups of HEADS_AT_ONCE heads, queries. A threadgroup goes through the rows of its split
// for its heads and one query; its simdgroups take ROWS_AT_ONCE rows in turn. A lane holds some pairs of dimensions,
// those that it loads of a row (once, as key and as value): of the queries and of the sums too. Rows are of STORED: T,
// or bytes.
//
// The rows of the queries' own tokens are not in the cache yet: a threadgroup that needs one makes it, norm and RoPE,
// in its own memory, and the one that needs it for the last query and the first heads stores it. No threadgroup reads a
// row that another one writes.
//
// Softmax is taken on the way: `largest` is the largest score so far, in units of log2(e), and what was summed before
// is scaled down when it grows. A lane knows the score of one head and one row, and the state of that head.
threadgroup float shared_sums[SHARED];  // in the beginning the new rows, at the end half of the sums
threadgroup float shared_state[(SIMDGROUPS + 1) / 2 * HEADS_AT_ONCE * 2];
typedef Rows<STORED, LATENT, ROPE> CachedRows;
typedef typename CachedRows::Word Word;
constexpr CachedRows as_cached = {};
constexpr int WIDTH = LATENT + ROPE;
constexpr int PAIRS = CachedRows::PAIRS;
constexpr int VALUES = CachedRows::VALUES;
constexpr int WORDS = CachedRows::WORDS;
constexpr int SCORES = HEADS_AT_ONCE * ROWS_AT_ONCE;
constexpr int SHARE = 32 / HEADS_AT_ONCE;  // lanes that hold the state of one head
constexpr int SCORE_SHARE = 32 / SCORES;   // lanes that hold one score
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint first_head = threadgroup_position_in_grid.y * uint(HEADS_AT_ONCE);
const uint query = threadgroup_position_in_grid.z;
const uint splits = threadgroups_per_grid.x;
device STORED* rows = (device STORED*)cache;
const uint cached = uint(position[0]);
const uint visible = cached + query + 1;  // rows that this query sees
const uint rows_of_split = (visible + splits - 1) / splits;
const uint begin = split * rows_of_split;
const uint end = min(visible, begin + rows_of_split);
threadgroup Word* made = (threadgroup Word*)shared_sums;  // of each new row what lane 0 to 31 has of it

if (end > cached) {
  for (uint r = simdgroup; r <= query; r += uint(SIMDGROUPS)) {
    const uint row = cached + r;
    Word words[WORDS];
    make_row(as_cached, kv_a + r * uint(KV_A) + uint(KV_A - WIDTH), uint(LATENT), uint(ROPE), norm_weight, EPS,
             wavelengths, row, lane, words);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      made[(r * uint(WORDS) + uint(i)) * 32 + lane] = words[i];
    }
    if (first_head == 0 && query == uint(QUERIES - 1) && row >= begin && row < end) {
      store(as_cached, words, lane, rows + size_t(row) * size_t(CachedRows::ELEMENTS));
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float2 queries[HEADS_AT_ONCE][PAIRS];
float2 sums[HEADS_AT_ONCE][VALUES];
#pragma unroll
for (int h = 0; h < HEADS_AT_ONCE; ++h) {
  const uint at = min(first_head + uint(h), uint(HEADS - 1)) * uint(QUERIES) + query;
#pragma unroll
  for (int p = 0; p < PAIRS; ++p) {
    const uint pair = pair_of(as_cached, p, lane);
    float2 value = float2(0.0f, 0.0f);
    if (in_latent(as_cached, p, lane)) {
      value = as_float<T>(load_pair(q_latent + at * uint(LATENT), pair));
    } else if (in_row(as_cached, p, lane)) {
      const uint turn = pair - uint(LATENT / 2);
      const auto heads = q + (query * uint(HEADS) + min(first_head + uint(h), uint(HEADS - 1))) * uint(NOPE + ROPE);
      value = rotate(as_float<T>(load_pair(heads + NOPE, turn)), float(cached + query), wavelengths[turn]);
    }
    queries[h][p] = value * float(SCALE);
  }
#pragma unroll
  for (int p = 0; p < VALUES; ++p) {
    sums[h][p] = float2(0.0f, 0.0f);
  }
}
float largest = -INFINITY;
float total = 0.0f;

// A turn asks for rows and works on those of the turn before, so that it need not wait for them.
Word raw[ROWS_AT_ONCE][WORDS];
Word ahead[ROWS_AT_ONCE][WORDS];
const uint start = begin + simdgroup * uint(ROWS_AT_ONCE);
for (uint next = start; next == start || next - uint(SIMDGROUPS * ROWS_AT_ONCE) < end;
     next += uint(SIMDGROUPS * ROWS_AT_ONCE)) {
  if (next + uint(ROWS_AT_ONCE) <= min(end, cached)) {
    const auto from = cache + size_t(next) * size_t(CachedRows::ELEMENTS);
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      load(as_cached, from + r * CachedRows::ELEMENTS, lane, ahead[r]);
    }
  } else if (next < end) {  // the last of the split; some may be new
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      const uint row = min(next + uint(r), end - 1);
      if (row < cached) {
        load(as_cached, cache + size_t(row) * size_t(CachedRows::ELEMENTS), lane, ahead[r]);
      } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
          ahead[r][i] = made[((row - cached) * uint(WORDS) + uint(i)) * 32 + lane];
        }
      }
    }
  }
  LOADS_END
  if (next != start) {
    float scores[SCORES];
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
#pragma unroll
      for (int h = 0; h < HEADS_AT_ONCE; ++h) {
        scores[h * ROWS_AT_ONCE + r] = 0.0f;
      }
#pragma unroll
      for (int p = 0; p < PAIRS; ++p) {
        const float2 x = value(as_cached, raw[r], p);
#pragma unroll
        for (int h = 0; h < HEADS_AT_ONCE; ++h) {
          const float score = fma(queries[h][p].x, x.x, scores[h * ROWS_AT_ONCE + r]);
          scores[h * ROWS_AT_ONCE + r] = fma(queries[h][p].y, x.y, score);
          if (p == VALUES - 1) {
            scores[h * ROWS_AT_ONCE + r] *= scale(as_cached, raw[r]);
          }
        }
      }
    }
    const float sum = sums_by_lane<SCORES>(scores, lane);
    const uint row = next - uint(SIMDGROUPS * ROWS_AT_ONCE) + lane / uint(SCORE_SHARE) % uint(ROWS_AT_ONCE);
    const float score = row < end ? sum : -INFINITY;
    float larger = max(largest, score);
#pragma unroll
    for (int step = SCORE_SHARE; step < SHARE; step *= 2) {
      larger = max(larger, simd_shuffle_xor(larger, ushort(step)));
    }
    const float weight = exp2(score - larger);
    float weights = weight;
#pragma unroll
    for (int step = SCORE_SHARE; step < SHARE; step *= 2) {
      weights += simd_shuffle_xor(weights, ushort(step));
    }
    const float shrink = exp2(largest - larger);
    if (simd_any(larger > largest)) {
#pragma unroll
      for (int h = 0; h < HEADS_AT_ONCE; ++h) {
        const float factor = simd_shuffle(shrink, ushort(h * SHARE));
#pragma unroll
        for (int p = 0; p < VALUES; ++p) {
          sums[h][p] = sums[h][p] * factor;
        }
      }
    }
    total = fma(total, shrink, weights);
    largest = larger;
#pragma unroll
    for (int r = 0; r < ROWS_AT_ONCE; ++r) {
      float2 x[VALUES];
#pragma unroll
      for (int p = 0; p < VALUES; ++p) {
        x[p] = value(as_cached, raw[r], p);
      }
#pragma unroll
      for (int h = 0; h < HEADS_AT_ONCE; ++h) {
        const ushort from = ushort((h * ROWS_AT_ONCE + r) * SCORE_SHARE);
        const float share = simd_shuffle(weight, from) * scale(as_cached, raw[r]);
#pragma unroll
        for (int p = 0; p < VALUES; ++p) {
          sums[h][p].x = fma(share, x[p].x, sums[h][p].x);
          sums[h][p].y = fma(share, x[p].y, sums[h][p].y);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS_AT_ONCE; ++r) {
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      raw[r][i] = ahead[r][i];
    }
  }
}

// The upper half of the simdgroups hands its sums to the lower half, until one holds all.
threadgroup_barrier(mem_flags::mem_threadgroup);  // `made` has been read
for (int count = SIMDGROUPS; count > 1; count = (count + 1) / 2) {
  const uint half_count = uint((count + 1) / 2);
  if (simdgroup >= half_count && simdgroup < uint(count)) {
    const uint at = (simdgroup - half_count) * uint(HEADS_AT_ONCE);
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) {
#pragma unroll
      for (int p = 0; p < VALUES; ++p) {
        const uint slot = slot_of(as_cached, p, lane) * 2;
        if (in_latent(as_cached, p, lane)) {
          shared_sums[(at + uint(h)) * uint(LATENT) + slot] = sums[h][p].x;
          shared_sums[(at + uint(h)) * uint(LATENT) + slot + 1] = sums[h][p].y;
        }
      }
    }
    if (lane % uint(SHARE) == 0) {
      shared_state[(at + lane / uint(SHARE)) * 2] = largest;
      shared_state[(at + lane / uint(SHARE)) * 2 + 1] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simdgroup + half_count < uint(count)) {
    const uint at = simdgroup * uint(HEADS_AT_ONCE);
    const float other_largest = shared_state[(at + lane / uint(SHARE)) * 2];
    const float other_total = shared_state[(at + lane / uint(SHARE)) * 2 + 1];
    const float larger = max(largest, other_largest);
    const float mine = largest == larger ? 1.0f : exp2(largest - larger);
    const float others = other_largest == larger ? 1.0f : exp2(other_largest - larger);
    total = total * mine + other_total * others;
    largest = larger;
#pragma unroll
    for (int h = 0; h < HEADS_AT_ONCE; ++h) {
      const float my_factor = simd_shuffle(mine, ushort(h * SHARE));
      const float other_factor = simd_shuffle(others, ushort(h * SHARE));
#pragma unroll
      for (int p = 0; p < VALUES; ++p) {
        if (in_latent(as_cached, p, lane)) {
          const uint from = (at + uint(h)) * uint(LATENT) + slot_of(as_cached, p, lane) * 2;
          sums[h][p].x = sums[h][p].x * my_factor + shared_sums[from] * other_factor;
          sums[h][p].y = sums[h][p].y * my_factor + shared_sums[from + 1] * other_factor;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
if (simdgroup == 0) {
#pragma unroll
  for (int h = 0; h < HEADS_AT_ONCE; ++h) {
    if (first_head + uint(h) < uint(HEADS)) {
      const uint at = ((first_head + uint(h)) * uint(QUERIES) + query) * splits + split;
#pragma unroll
      for (int p = 0; p < VALUES; ++p) {
        if (in_latent(as_cached, p, lane)) {
          ((device float2*)partial)[at * uint(LATENT / 2 + 2) + pair_of(as_cached, p, lane)] = sums[h][p];
        }
      }
      if (lane == uint(h * SHARE)) {
        ((device float4*)partial)[at * uint(LATENT / 4 + 1) + uint(LATENT / 4)] = float4(largest, total, 0.0f, 0.0f);
      }
    }
  }
}
