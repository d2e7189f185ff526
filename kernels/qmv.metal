// A simdgroup takes ROWS rows of one matrix; the matrices of x follow each other in the grid.
const uint lane = thread_index_in_simdgroup;
const uint block = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup;
#define ROWS_OF(W, Y, BEGIN, COUNT)                                                \
  if (block >= uint(BEGIN) && block < uint(BEGIN + (COUNT + ROWS - 1) / ROWS)) {   \
    const uint first = (block - uint(BEGIN)) * uint(ROWS);                         \
    qmv_rows<ROWS, TOKENS, DEPTH, COLS>(W, x, Y, first, uint(COUNT), lane);        \
  }
MATRICES(ROWS_OF)
