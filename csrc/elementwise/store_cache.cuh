// Rows scattered into caches on CUDA: the threads of a row load its index and its vectors at once, and store these
// where the index says. The widths are known at the call, so that one kernel serves all.
#pragma once
#include "elementwise/store_cache.h"
#include "jitnorm/grid.h"
#include "jitnorm/launch.h"
#ifdef __CUDACC__
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

template <int kVectorBytes_>
struct StoreCacheKernel : EveryGrid {
  using params_t = StoreCacheParams;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = kVectorBytes;
  static constexpr int kVectors = 16 / kVectorBytes;  // of k, and as many of v, that a thread has in flight
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 4;
  static constexpr int kBytesAhead = 2 << 20;  // how far before its turn a row's way to the second-level cache begins

  static Grid grid(const StoreCacheParams& p) {
    const int vectors = p.k_vectors > p.v_vectors ? p.k_vectors : p.v_vectors;
    if (p.num_split == 0) return over_rows(p.num_tokens, vectors, kVectors, kThreads);
    return over_rows(p.num_tokens, vectors, kVectors, 32 * p.num_split, kThreads / (32 * p.num_split));
  }

#ifdef __CUDACC__
  template <GridLength>
  static __device__ __forceinline__ void run(const StoreCacheParams& p) {
    const index_t token = grid_row();
    const int first = grid_column(kVectors), step = blockDim.x;
    if (token >= p.num_tokens || (first >= p.k_vectors && first >= p.v_vectors)) return;
    const char* k = p.k + token * p.k_stride;
    const char* v = p.v + token * p.v_stride;
    wait_for_previous();
    const index_t index = index_of(p, token);
    Word from_k[kVectors], from_v[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const int column = first + i * step;
      if (column < p.k_vectors) from_k[i] = read(k, column);
      if (column < p.v_vectors) from_v[i] = read(v, column);
    }
    let_next_start();
    prefetch_later_row(p, token, k, v);
    if (index == p.skip_index) return;
    char* k_slot = p.k_cache + index * p.k_cache_stride;
    char* v_slot = p.v_cache + index * p.v_cache_stride;
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      const int column = first + i * step;
      if (column < p.k_vectors) write(k_slot, column, from_k[i]);
      if (column < p.v_vectors) write(v_slot, column, from_v[i]);
    }
  }

 private:
  using Word = Vector<unsigned, kVectorBytes / 4>;

  static __device__ __forceinline__ void prefetch_later_row(const StoreCacheParams& p, index_t token, const char* k,
                                                            const char* v) {
    if (kVectorBytes < 16 || threadIdx.x != 0 || blockIdx.x != 0) return;
    const unsigned k_bytes = p.k_vectors * kVectorBytes, v_bytes = p.v_vectors * kVectorBytes;
    const index_t rows_ahead = kBytesAhead / (k_bytes + v_bytes);
    if (rows_ahead == 0 || token + rows_ahead >= p.num_tokens) return;
    prefetch(k + rows_ahead * p.k_stride, k_bytes);
    prefetch(v + rows_ahead * p.v_stride, v_bytes);
  }

  static __device__ __forceinline__ Word read(const char* row, int column) {
    return load<unsigned, kVectorBytes / 4>(reinterpret_cast<const unsigned*>(row + index_t(column) * kVectorBytes));
  }

  static __device__ __forceinline__ void write(char* row, int column, const Word& word) {
    store(reinterpret_cast<unsigned*>(row + index_t(column) * kVectorBytes), word);
  }
#endif
};

}  // namespace jitnorm
