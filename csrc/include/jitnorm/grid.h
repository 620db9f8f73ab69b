// CUDA grids over rows whose width is known only at run time. A block covers some columns of some rows, and
// consecutive blocks follow each other along a row, so that no thread needs a division to find its row and columns.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

constexpr index_t kMaxGridX = 0x7fffffff;  // CUDA's limits on the number of blocks
constexpr index_t kMaxGridYZ = 0xffff;

struct Grid {
  index_t x;                      // blocks along a row; launch() raises for more than kMaxGridX
  unsigned y, z;                  // blocks over the rows, y * z of them: y alone could exceed kMaxGridYZ
  unsigned threads_x, threads_y;  // per block
};

inline index_t divide_up(index_t n, index_t by) { return (n + by - 1) / by; }

// One dimension of blocks, each with `rows_per_block` whole rows.
inline Grid grid_of_blocks(index_t rows, int rows_per_block, unsigned threads) {
  Grid grid;
  grid.x = divide_up(rows, rows_per_block);
  grid.y = grid.z = 1;
  grid.threads_x = threads;
  grid.threads_y = 1;
  return grid;
}

// Blocks of threads_x by threads_y over rows of `columns`. A thread takes `per_thread` columns, threads_x apart.
inline Grid grid_over_columns(index_t rows, index_t columns, int per_thread, unsigned threads_x, unsigned threads_y) {
  const index_t blocks = divide_up(rows, threads_y), z = divide_up(blocks, kMaxGridYZ);
  Grid grid;
  grid.x = divide_up(columns, index_t(per_thread) * threads_x);
  grid.y = static_cast<unsigned>(divide_up(blocks, z));
  grid.z = static_cast<unsigned>(z);
  grid.threads_x = threads_x;
  grid.threads_y = threads_y;
  return grid;
}

// The same in blocks of at most `max_threads`. Short rows share a block. The threads of longer rows are spread evenly
// over blocks, as whole warps.
inline Grid grid_over_columns(index_t rows, index_t columns, int per_thread, unsigned max_threads) {
  const index_t threads = divide_up(columns, per_thread), blocks = divide_up(threads, max_threads);
  if (blocks == 1) return grid_over_columns(rows, columns, per_thread, threads, max_threads / threads);
  return grid_over_columns(rows, columns, per_thread, divide_up(divide_up(threads, blocks), 32) * 32, 1);
}

#ifdef __CUDACC__
// The thread's first column; its others follow blockDim.x apart.
__device__ __forceinline__ int first_column(int per_thread) {
  return blockIdx.x * per_thread * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ index_t grid_row() {
  return (index_t(blockIdx.z) * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
}

// The block's index over x and y, for prefetch_before_wait: the first blocks of a grid all have z = 0.
__device__ __forceinline__ unsigned linear_block_index() { return blockIdx.y * gridDim.x + blockIdx.x; }
#endif

}  // namespace jitnorm
