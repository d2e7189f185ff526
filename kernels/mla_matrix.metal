// writes: cache
// Grid: splits of the context, groups of HEADS_AT_ONCE heads, queries. As mla_decode.metal, for long contexts: scores
// and sums are products of 8 x 8 matrices, and all heads of a threadgroup meet a row when it is loaded, which is once.
// Each simdgroup has a share of the dimensions, of all rows: of ROWS at a time it computes what its dimensions give to
// the scores, then all meet, then it weighs its dimensions of the same rows, which it still holds.
//
//   rows x dimensions (keys)  *  dimensions x heads (queries)  ->  rows x heads, summed over simdgroups
//   heads x rows (weights)    *  rows x dimensions (keys)      ->  heads x dimensions
//
// The last split has the rows past the last whole eight alone, among them the new ones: they are made, or copied, into
// threadgroup memory, with zeros up to TAIL.
threadgroup float shared[SHARED];
typedef Rows<T, LATENT, ROPE> CachedRows;
typedef typename CachedRows::Word Word;
typedef simdgroup_matrix<T, 8, 8> Matrix;
typedef simdgroup_matrix<float, 8, 8> Sums;
constexpr CachedRows as_cached = {};
constexpr int WIDTH = LATENT + ROPE;
constexpr int TILES = HEADS_AT_ONCE / 8;
constexpr int OWN_HEADS = HEADS_AT_ONCE / SIMDGROUPS;  // of a simdgroup in the softmax
constexpr int LATENT_TILES = LATENT / 8 / SIMDGROUPS;  // of a simdgroup, here and below
constexpr int ROPE_TILES = (ROPE / 8 + SIMDGROUPS - 1) / SIMDGROUPS;
constexpr int DIMENSION_TILES = LATENT_TILES + ROPE_TILES;
constexpr int ROWS = 32;  // at a time: in the softmax a lane has one
constexpr int ROW_TILES = ROWS / 8;
constexpr int TAIL = 16;  // 7 rows that are not a whole eight, and up to 8 new ones, one of which is the query's
constexpr int SCORE_STRIDE = 36;  // of a head; so that lanes of a load or store meet different banks, as below
constexpr int WEIGHT_STRIDE = 40;
constexpr int STAGED = WIDTH + 8;
const uint lane = thread_index_in_simdgroup;
const uint simdgroup = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint first_head = threadgroup_position_in_grid.y * uint(HEADS_AT_ONCE);
const uint query = threadgroup_position_in_grid.z;
const uint splits = threadgroups_per_grid.x;
device T* rows = (device T*)cache;
threadgroup T* staged = (threadgroup T*)shared;  // the queries in the beginning, the tail in the end
threadgroup float* factors = shared + SIMDGROUPS * HEADS_AT_ONCE * SCORE_STRIDE;  // 8 times that of each head
threadgroup T* weights = (threadgroup T*)(factors + HEADS_AT_ONCE * 8);
const uint cached = uint(position[0]);
const uint visible = cached + query + 1;  // rows that this query sees
const uint whole = cached / 8;            // tiles of rows in the cache
const uint tiles_of_split = (whole + splits - 2) / (splits - 1);
const uint first_tile = min(whole, split * tiles_of_split);
const uint end_tile = min(whole, first_tile + tiles_of_split);
const uint blocks = (end_tile - first_tile + uint(ROW_TILES - 1)) / uint(ROW_TILES);
const bool has_tail = split == splits - 1;

const uint latent = simdgroup * uint(LATENT_TILES * 8);  // where the simdgroup's dimensions begin, and those of k_pe
const uint k_pe = uint(LATENT) + simdgroup * 8;

// Which elements of a matrix a lane has: two neighbours of a row.
for (uint i = lane; i < 64; i += 32) {
  shared[simdgroup * 64 + i] = float(i);
}
simdgroup_barrier(mem_flags::mem_threadgroup);
Sums numbers;
simdgroup_load(numbers, shared + simdgroup * 64);
const uint first = uint(reinterpret_cast<thread float2&>(numbers.thread_elements()).x);
const uint own_row = first / 8;
const uint own_pair = first % 8 / 2;

constexpr int KEYS = ROW_TILES * DIMENSION_TILES;
uint keys[KEYS];  // rows x dimensions: of each matrix the lane's pair
uint ahead[TURNS_AHEAD][KEYS];  // of the turns after it
if (blocks > 0) {
  load_keys<ROW_TILES, LATENT_TILES, ROPE_TILES, SIMDGROUPS * 8, WIDTH>(rows, first_tile, end_tile, own_row, own_pair,
                                                                        latent, k_pe, keys);
#pragma unroll
  for (int i = 0; i + 1 < TURNS_AHEAD; ++i) {
    load_keys<ROW_TILES, LATENT_TILES, ROPE_TILES, SIMDGROUPS * 8, WIDTH>(
        rows, first_tile + uint((i + 1) * ROW_TILES), end_tile, own_row, own_pair, latent, k_pe, ahead[i]);
  }
}
LOADS_END
threadgroup_barrier(mem_flags::mem_threadgroup);

// Queries: k_pe's part is rotated; that of a head that there is not is never looked at.
constexpr int THREADS = SIMDGROUPS * 32;
#pragma unroll
for (int i = 0; i < (HEADS_AT_ONCE * LATENT / 8 + THREADS - 1) / THREADS; ++i) {
  const uint four = uint(i * THREADS) + thread_index_in_threadgroup;  // pairs at once
  const uint head = four / uint(LATENT / 8);
  if (head < uint(HEADS_AT_ONCE)) {
    const auto from = q_latent + (min(first_head + head, uint(HEADS - 1)) * uint(QUERIES) + query) * uint(LATENT);
    const uint4 words = ((const device uint4*)from)[four % uint(LATENT / 8)];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint place = place_of<LATENT_TILES>(four % uint(LATENT / 8) * 4 + uint(j));
      ((threadgroup uint*)staged)[head * uint(STAGED / 2) + place] = words[j];
    }
  }
}
#pragma unroll
for (int i = 0; i < (HEADS_AT_ONCE * ROPE / 2 + THREADS - 1) / THREADS; ++i) {
  const uint turn = uint(i * THREADS) + thread_index_in_threadgroup;
  const uint head = turn / uint(ROPE / 2);
  const uint pair = turn % uint(ROPE / 2);
  if (head < uint(HEADS_AT_ONCE)) {
    const auto from = q + (query * uint(HEADS) + min(first_head + head, uint(HEADS - 1))) * uint(NOPE + ROPE) + NOPE;
    const float2 value = rotate(as_float<T>(load_pair(from, pair)), float(cached + query), wavelengths[pair]);
    ((threadgroup uint*)staged)[head * uint(STAGED / 2) + uint(LATENT / 2) + pair] = as_pair(value, T(0.0f));
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
Matrix queries[TILES][DIMENSION_TILES];  // dimensions x heads
#pragma unroll
for (int t = 0; t < TILES; ++t) {
#pragma unroll
  for (int k = 0; k < DIMENSION_TILES; ++k) {
    const uint at = k < LATENT_TILES ? latent + uint(k * 8) : k_pe + uint((k - LATENT_TILES) * SIMDGROUPS * 8);
    queries[t][k] = make_filled_simdgroup_matrix<T, 8, 8>(T(0.0f));
    if (at < uint(WIDTH)) {
      simdgroup_load(queries[t][k], staged + t * 8 * STAGED + at, STAGED, 0, true);
    }
  }
}

Sums sums[TILES][LATENT_TILES];  // heads x dimensions
float largest[OWN_HEADS];        // of head simdgroup * OWN_HEADS + j
float total[OWN_HEADS];
#pragma unroll
for (int j = 0; j < OWN_HEADS; ++j) {
  largest[j] = -INFINITY;
  total[j] = 0.0f;
}
#pragma unroll
for (int t = 0; t < TILES; ++t) {
#pragma unroll
  for (int k = 0; k < LATENT_TILES; ++k) {
    sums[t][k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries have been read

for (uint block = 0; block < blocks + uint(has_tail); ++block) {
  uint count;  // rows of this block
  if (block < blocks) {
    const uint tile = first_tile + block * uint(ROW_TILES);
    count = min(end_tile - tile, uint(ROW_TILES)) * 8;
    if (block + uint(TURNS_AHEAD) < blocks) {  // so that the rows need not be waited for
      load_keys<ROW_TILES, LATENT_TILES, ROPE_TILES, SIMDGROUPS * 8, WIDTH>(
          rows, tile + uint(TURNS_AHEAD * ROW_TILES), end_tile, own_row, own_pair, latent, k_pe,
          ahead[TURNS_AHEAD - 1]);
    }
    LOADS_END
  } else {
    count = visible - whole * 8;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = simdgroup; r < uint(TAIL); r += uint(SIMDGROUPS)) {
      const uint row = whole * 8 + r;
      Word words[CachedRows::WORDS] = {};
      if (row < cached) {
        load(as_cached, cache + size_t(row) * size_t(WIDTH), lane, words);
      } else if (row < visible) {
        make_row(as_cached, kv_a + (row - cached) * uint(KV_A) + uint(KV_A - WIDTH), uint(LATENT), uint(ROPE),
                 norm_weight, EPS, wavelengths, row, lane, words);
        if (first_head == 0 && query == uint(QUERIES - 1)) {
          store(as_cached, words, lane, rows + size_t(row) * size_t(WIDTH));
        }
      }
#pragma unroll
      for (int i = 0; i < CachedRows::WORDS; ++i) {
        if (in_row(as_cached, i, lane)) {
          const uint pair = uint(i) * 32 + lane;
          const uint place = pair < uint(LATENT / 2) ? place_of<LATENT_TILES>(pair) : pair;
          ((threadgroup Word*)staged)[r * uint(STAGED / 2) + place] = words[i];
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int k = 0; k < DIMENSION_TILES; ++k) {
        const uint at = k < LATENT_TILES ? latent + uint(k * 8) : k_pe + uint((k - LATENT_TILES) * SIMDGROUPS * 8);
        const uint pairs = (uint(r * 8) + own_row) * uint(STAGED / 2) + at / 2 + own_pair;
        keys[r * DIMENSION_TILES + k] = r < TAIL / 8 && at < uint(WIDTH) ? ((threadgroup uint*)staged)[pairs] : 0u;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  Matrix matrices[KEYS];
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    set_pair(matrices[i], keys[i]);
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; r += 2) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      Sums upper = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      Sums lower = upper;
#pragma unroll
      for (int k = 0; k < DIMENSION_TILES; ++k) {
        multiply_two(
            upper, lower, matrices[r * DIMENSION_TILES + k], matrices[(r + 1) * DIMENSION_TILES + k], queries[t][k]);
      }
      threadgroup float* scores = shared + (simdgroup * uint(HEADS_AT_ONCE) + uint(t * 8)) * uint(SCORE_STRIDE) + r * 8;
      simdgroup_store(upper, scores, SCORE_STRIDE, 0, true);
      simdgroup_store(lower, scores + 8, SCORE_STRIDE, 0, true);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int j = 0; j < OWN_HEADS; ++j) {
    const uint head = simdgroup * uint(OWN_HEADS) + uint(j);
    float score = 0.0f;
#pragma unroll
    for (int s = 0; s < SIMDGROUPS; ++s) {
      score += shared[(uint(s * HEADS_AT_ONCE) + head) * uint(SCORE_STRIDE) + lane];
    }
    score = lane < count ? score * float(SCALE) : -INFINITY;
    const float larger = max(largest[j], simd_max(score));
    const T weight = T(exp2(score - larger));
    const float shrink = exp2(largest[j] - larger);
    total[j] = fma(total[j], shrink, simd_sum(float(weight)));  // of what the sums are made with
    largest[j] = larger;
    weights[head * uint(WEIGHT_STRIDE) + lane] = weight;
    if (lane < 8) {
      factors[head * 8 + lane] = shrink;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int t = 0; t < TILES; ++t) {
    Sums factor;
    simdgroup_load(factor, factors + t * 64);
    const float2 two = reinterpret_cast<thread float2&>(factor.thread_elements());
    if (simd_any(two.x != 1.0f)) {
#pragma unroll
      for (int k = 0; k < LATENT_TILES; ++k) {
        thread float2& pair = reinterpret_cast<thread float2&>(sums[t][k].thread_elements());
        pair.x *= two.x;
        pair.y *= two.y;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    Matrix weight[TILES];
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      simdgroup_load(weight[t], weights + t * 8 * WEIGHT_STRIDE + r * 8, WEIGHT_STRIDE);
    }
#pragma unroll
    for (int k = 0; k < LATENT_TILES; ++k) {
#pragma unroll
      for (int t = 0; t + 1 < TILES; t += 2) {
        multiply_two(sums[t][k], sums[t + 1][k], weight[t], weight[t + 1], matrices[r * DIMENSION_TILES + k]);
      }
      if (TILES % 2 == 1) {
        simdgroup_multiply_accumulate(sums[TILES - 1][k], weight[TILES - 1], matrices[r * DIMENSION_TILES + k],
                                      sums[TILES - 1][k]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < KEYS; ++i) {
    keys[i] = ahead[0][i];
#pragma unroll
    for (int j = 0; j + 1 < TURNS_AHEAD; ++j) {
      ahead[j][i] = ahead[j + 1][i];
    }
  }
}

// Through threadgroup memory: there the dimensions of 8 heads are put in order, and the heads that there are not left
// out.
constexpr int RESULT = LATENT + 4;
#pragma unroll
for (int t = 0; t < TILES; ++t) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int k = 0; k < LATENT_TILES; ++k) {
    simdgroup_store(sums[t][k], shared + latent + k * 8, RESULT);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index_in_threadgroup; i < uint(8 * LATENT / 2); i += uint(THREADS)) {
    const uint row = i / uint(LATENT / 2);
    const uint pair = i % uint(LATENT / 2);
    const uint head = first_head + uint(t * 8) + row;
    if (head < uint(HEADS)) {
      const uint at = (head * uint(QUERIES) + query) * splits + split;
      const uint from = row * uint(RESULT / 2) + place_of<LATENT_TILES>(pair);
      ((device float2*)partial)[at * uint(LATENT / 2 + 2) + pair] = ((threadgroup float2*)shared)[from];
    }
  }
}
#pragma unroll
for (int j = 0; j < OWN_HEADS; ++j) {
  const uint head = first_head + simdgroup * uint(OWN_HEADS) + uint(j);
  if (lane == 0 && head < uint(HEADS)) {
    const uint at = (head * uint(QUERIES) + query) * splits + split;
    ((device float4*)partial)[at * uint(LATENT / 4 + 1) + uint(LATENT / 4)] = float4(largest[j], total[j], 0.0f, 0.0f);
  }
}
