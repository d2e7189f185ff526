#ifndef HAS_MULTIPLY_TWO
// d0 += a0 * b, and d1 += a1 * b
template <class T>
inline void multiply_two(thread simdgroup_matrix<float, 8, 8>& d0, thread simdgroup_matrix<float, 8, 8>& d1,
                         simdgroup_matrix<T, 8, 8> a0, simdgroup_matrix<T, 8, 8> a1, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_multiply_accumulate(d0, a0, b, d0);
  simdgroup_multiply_accumulate(d1, a1, b, d1);
}
#endif

// ROWS_OF_TILES x 8 rows of the cache as matrices of rows x dimensions, of the dimensions that begin at each `dimension`.
// Past the last tile the last is loaded again. Where there are no such dimensions, zeros.
template <int ROW_TILES, int DIMENSION_TILES, int ALWAYS, int WIDTH, class T>
inline void load_keys(const device T* rows, uint tile, uint end_tile, const thread uint* dimension,
                      thread simdgroup_matrix<T, 8, 8>* keys) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    const device T* from = rows + size_t(min(tile + uint(r), end_tile - 1) * 8) * size_t(WIDTH);
#pragma unroll
    for (int k = 0; k < DIMENSION_TILES; ++k) {
      if (k < ALWAYS || dimension[k] < uint(WIDTH)) {
        simdgroup_load(keys[r * DIMENSION_TILES + k], from + dimension[k], WIDTH);
      } else {
        keys[r * DIMENSION_TILES + k] = make_filled_simdgroup_matrix<T, 8, 8>(T(0.0f));
      }
    }
  }
}
