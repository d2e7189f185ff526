// A simdgroup takes ROWS * 32 / LANES rows of one matrix; the matrices of x follow each other in the grid. Heads, each
// with its own matrix and its own x, lie along the grid's second dimension; X_HEAD and Y_HEAD are from one to the next,
// X_TOKEN and Y_TOKEN from one row of x and of the result to the next (0: as the matrix has rows).
const uint lane = thread_index_in_simdgroup;
const uint block = threadgroup_position_in_grid.x * uint(SIMDGROUPS) + simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y;
#ifndef NORM
const device float* norm_weight = 0;
#endif
#ifndef RESIDUAL
const device Y* residual = 0;
#endif
#ifndef NORMED_TOO
device T* normed = 0;
#endif
constexpr int BLOCK = ROWS * 32 / LANES;
#define ROWS_OF(W, OUT, BEGIN, COUNT)                                                                           \
  if (block >= uint(BEGIN) && block < uint(BEGIN + (COUNT + BLOCK - 1) / BLOCK)) {                              \
    qmv_rows<ROWS, TOKENS, DEPTH, LANES, HAS_NORM, HAS_NORMED_TOO, HAS_RESIDUAL, COLS>(                         \
        W, x + head * uint(X_HEAD), norm_weight, EPS, residual, OUT + head * uint(Y_HEAD), normed,              \
        uint(X_TOKEN), uint(Y_TOKEN == 0 ? COUNT : Y_TOKEN), head * uint(COUNT),                                \
        (block - uint(BEGIN)) * uint(BLOCK), uint(COUNT), lane);                                                \
  }
MATRICES(ROWS_OF)
