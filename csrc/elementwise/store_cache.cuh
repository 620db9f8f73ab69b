// Rows scattered into caches on CUDA. The threads of a row load its index and its vectors at the same time, then store
// the vectors to the slot of that index. One kernel supports every width: the grid, computed at the call, places
// threads over the columns of a row. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/store_cache.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/grid.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <int kVectorBytes_>
struct StoreCacheKernel : DefaultVariantOnly {
  using params_t = StoreCacheParams;
  using info_t = StoreCacheInfo;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = kVectorBytes;
  static constexpr int kVectorsPerThread = 16 / kVectorBytes;  // of k, and as many of v, that a thread has in flight
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocksPerSM = 4;
  static constexpr int kBytesAhead = 2 << 20;  // from a row to the one that it prefetches into L2

  template <GridVariant>
  static __device__ __forceinline__ void run(const StoreCacheParams& p) {
    const index_t row = grid_row();
    const int first = first_column(kVectorsPerThread), step = blockDim.x;
    if (row >= p.num_rows || (first >= p.k_vectors && first >= p.v_vectors)) return;
    const char* k = p.k + row * p.k_stride;
    const char* v = p.v + row * p.v_stride;
    grid_dependency_wait();
    const index_t index = index_of(p, row);
    ByteVector k_data[kVectorsPerThread], v_data[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      const int column = first + i * step;
      if (column < p.k_vectors) k_data[i] = read(k, column);
      if (column < p.v_vectors) v_data[i] = read(v, column);
    }
    launch_dependents();
    prefetch_later_row(p, row, k, v);
    if (index == p.skip_index) return;
    char* k_slot = p.k_cache + index * p.k_cache_stride;
    char* v_slot = p.v_cache + index * p.v_cache_stride;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      const int column = first + i * step;
      if (column < p.k_vectors) write(k_slot, column, k_data[i]);
      if (column < p.v_vectors) write(v_slot, column, v_data[i]);
    }
  }

 private:
  using ByteVector = Vector<unsigned, kVectorBytes / 4>;

  static __device__ __forceinline__ void prefetch_later_row(const StoreCacheParams& p, index_t row, const char* k,
                                                            const char* v) {
    if (kVectorBytes < 16 || threadIdx.x != 0 || blockIdx.x != 0) return;
    const unsigned k_bytes = p.k_vectors * kVectorBytes, v_bytes = p.v_vectors * kVectorBytes;
    const index_t rows_ahead = kBytesAhead / (k_bytes + v_bytes);
    if (rows_ahead == 0 || row + rows_ahead >= p.num_rows) return;
    prefetch(k + rows_ahead * p.k_stride, k_bytes);
    prefetch(v + rows_ahead * p.v_stride, v_bytes);
  }

  static __device__ __forceinline__ ByteVector read(const char* row, int column) {
    return load<unsigned, kVectorBytes / 4>(reinterpret_cast<const unsigned*>(row + index_t(column) * kVectorBytes));
  }

  static __device__ __forceinline__ void write(char* row, int column, const ByteVector& vector) {
    store(reinterpret_cast<unsigned*>(row + index_t(column) * kVectorBytes), vector);
  }
};

}  // namespace jitnorm
