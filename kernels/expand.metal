// Grid: blocks of chunks, those of all rows one after the other: planes are flat, so that a chunk needs no row. A
// thread writes the eight values of one. chunks: how many are written, how many a tile has, each tile that of its
// expert, and how many experts there are: a tile of another is left as it is.
const uint at = threadgroup_position_in_grid.x * uint(SIMDGROUPS * 32) + thread_index_in_threadgroup;
const uint tile = at / chunks[1];
if (at < chunks[0] && experts[tile] < chunks[2]) {
  const uint from = experts[tile] * chunks[1] + (at - tile * chunks[1]);
  const auto w = decode(W, load(W, 0, from, 0), from);
  uint4 words = uint4(0u);
  for (int i = 0; i < 4; ++i) {
    const T low = T(fma(w.quants[2 * i], w.scale, w.minimum)), high = T(fma(w.quants[2 * i + 1], w.scale, w.minimum));
    words[i] = uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
  }
  ((device uint4*)y)[at] = words;
}
