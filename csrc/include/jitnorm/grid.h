// How a kernel's threads lie over rows of a width that is known at the call alone: a block covers some columns of some
// rows, blocks follow each other along a row first, and no thread has to divide to know its place.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

struct Grid {
  index_t x;      // blocks along a row
  unsigned y, z;  // over the rows, and over those that y has no room for
  unsigned threads_x, threads_y;
};

inline index_t divide_up(index_t n, index_t by) { return (n + by - 1) / by; }

// Blocks of threads_x by threads_y, `blocks_x` of them for each row.
inline Grid over_rows(index_t rows, unsigned threads_x, unsigned threads_y, index_t blocks_x) {
  const index_t blocks = divide_up(rows, threads_y), z = divide_up(blocks, 0xffff);
  return {blocks_x, static_cast<unsigned>(divide_up(blocks, z)), static_cast<unsigned>(z), threads_x, threads_y};
}

#ifdef __CUDACC__
__device__ __forceinline__ index_t grid_row() {
  return (index_t(blockIdx.z) * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
}

// Of the first blocks alone: to know which of them can be waiting for an earlier kernel.
__device__ __forceinline__ unsigned grid_block() { return blockIdx.y * gridDim.x + blockIdx.x; }
#endif

}  // namespace jitnorm
