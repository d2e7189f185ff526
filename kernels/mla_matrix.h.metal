#ifndef HAS_MULTIPLY_TWO
// d0 += a0 * b, and d1 += a1 * b
template <class T>
inline void multiply_two(thread simdgroup_matrix<float, 8, 8>& d0, thread simdgroup_matrix<float, 8, 8>& d1,
                         simdgroup_matrix<T, 8, 8> a0, simdgroup_matrix<T, 8, 8> a1, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_multiply_accumulate(d0, a0, b, d0);
  simdgroup_multiply_accumulate(d1, a1, b, d1);
}
#endif

// Of a simdgroup's share of the latent a lane has TILES neighbouring pairs of each of its rows, which it loads
// together: its pair of the j-th matrix is the j-th of these. So the columns of the matrices stand for other dimensions
// than their numbers say; of queries, keys and sums for the same.
template <class T>
inline void set_pair(thread simdgroup_matrix<T, 8, 8>& m, uint pair) {
  reinterpret_cast<thread vec<T, 2>&>(m.thread_elements()) = as_type<vec<T, 2>>(pair);
}

// Pairs of a share of TILES matrices: where the i-th stands in matrices that are loaded from threadgroup memory.
template <int TILES>
inline uint place_of(uint i) {
  return i / uint(TILES * 4) * uint(TILES * 4) + i % uint(TILES) * 4 + i / uint(TILES) % 4;
}

// ROW_TILES x 8 rows of the cache from row `tile` * 8 on: of each matrix the lane's pair, in row `row` of 8 and column
// `pair` * 2. Past the last tile the last is loaded again. `k_pe`: where the simdgroup's first matrix of k_pe begins.
template <int ROW_TILES, int LATENT_TILES, int ROPE_TILES, int STEP, int WIDTH, class T, class Keys>
inline void load_keys(const device T* rows, uint tile, uint end_tile, uint row, uint pair, uint latent, uint k_pe,
                      thread Keys& keys) {
  constexpr int TILES = LATENT_TILES + ROPE_TILES;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    const device T* from = rows + size_t(min(tile + uint(r), end_tile - 1) * 8 + row) * size_t(WIDTH);
    const device uint* own = (const device uint*)(from + latent) + pair * uint(LATENT_TILES);
    if (LATENT_TILES % 4 == 0) {
#pragma unroll
      for (int k = 0; k < LATENT_TILES / 4; ++k) {
        const uint4 four = ((const device uint4*)own)[k];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          keys[r * TILES + k * 4 + i] = four[i];
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < LATENT_TILES; ++k) {
        keys[r * TILES + k] = own[k];
      }
    }
#pragma unroll
    for (int k = 0; k < ROPE_TILES; ++k) {
      const uint at = k_pe + uint(k * STEP);
      keys[r * TILES + LATENT_TILES + k] = at < uint(WIDTH) ? ((const device uint*)(from + at))[pair] : 0u;
    }
  }
}
