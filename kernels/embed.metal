// Grid: blocks of chunks of a row, tokens. A thread writes the eight values of one chunk.
const uint chunk = threadgroup_position_in_grid.x * uint(SIMDGROUPS * 32) + thread_index_in_threadgroup;
const uint token = threadgroup_position_in_grid.y;
if (chunk < uint(COLS / 8)) {
  const uint row = min(uint(max(tokens[token], 0)), uint(ROWS - 1));
  const auto w = decode(W, load(W, row, chunk, 0), chunk);
  for (int i = 0; i < 8; ++i) {
    y[token * uint(COLS) + chunk * 8 + uint(i)] = T(fma(w.quants[i], w.scale, w.minimum));
  }
}
