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

// Blocks of threads_x by threads_y over rows of so many columns, of which a thread takes `per_thread`, threads_x apart.
inline Grid over_rows(index_t rows, index_t columns, int per_thread, unsigned threads_x, unsigned threads_y) {
  const index_t blocks = divide_up(rows, threads_y), z = divide_up(blocks, 0xffff);
  return {divide_up(columns, index_t(per_thread) * threads_x), static_cast<unsigned>(divide_up(blocks, z)),
          static_cast<unsigned>(z), threads_x, threads_y};
}

// Likewise, in blocks of up to `most` threads: short rows share a block, and the threads of a longer one are shared out
// evenly over blocks, as whole warps.
inline Grid over_rows(index_t rows, index_t columns, int per_thread, unsigned most) {
  const index_t threads = divide_up(columns, per_thread), blocks = divide_up(threads, most);
  if (blocks == 1) return over_rows(rows, columns, per_thread, threads, most / threads);
  return over_rows(rows, columns, per_thread, divide_up(divide_up(threads, blocks), 32) * 32, 1);
}

#ifdef __CUDACC__
// Of the thread's columns the first; each other comes blockDim.x after the one before it.
__device__ __forceinline__ int grid_column(int per_thread) {
  return blockIdx.x * per_thread * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ index_t grid_row() {
  return (index_t(blockIdx.z) * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
}

// Of the first blocks alone: to know which of them can be waiting for an earlier kernel.
__device__ __forceinline__ unsigned grid_block() { return blockIdx.y * gridDim.x + blockIdx.x; }
#endif

}  // namespace jitnorm
