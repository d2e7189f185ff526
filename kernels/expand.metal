// Grid: blocks of chunks, those of all rows one after the other. A thread writes the eight values of one chunk.
const uint at = threadgroup_position_in_grid.x * uint(SIMDGROUPS * 32) + thread_index_in_threadgroup;
if (at < uint(CHUNKS)) {
  const uint row = at / uint(COLS / 8), chunk = at % uint(COLS / 8);
  const auto w = decode(W, load(W, row, chunk, 0), chunk);
  uint4 words = uint4(0u);
  for (int i = 0; i < 4; ++i) {
    const T low = T(fma(w.quants[2 * i], w.scale, w.minimum)), high = T(fma(w.quants[2 * i + 1], w.scale, w.minimum));
    words[i] = uint(as_type<ushort>(low)) | uint(as_type<ushort>(high)) << 16;
  }
  ((device uint4*)y)[at] = words;
}
