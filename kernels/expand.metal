// Grid: blocks of chunks, those of all rows one after the other: planes are flat, so that a chunk needs no row. A thread
// writes the eight values of one.
const uint at = threadgroup_position_in_grid.x * uint(SIMDGROUPS * 32) + thread_index_in_threadgroup;
if (at < chunks[0]) {
  const auto w = decode(W, load(W, 0, at, 0), at);
  uint4 words = uint4(0u);
  for (int i = 0; i < 4; ++i) {
    const T low = T(fma(w.quants[2 * i], w.scale, w.minimum)), high = T(fma(w.quants[2 * i + 1], w.scale, w.minimum));
    words[i] = uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
  }
  ((device uint4*)y)[at] = words;
}
