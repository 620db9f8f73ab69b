// Rows scattered into caches on the CPU. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/store_cache.h"
#include "jitnorm/parallel.h"

namespace jitnorm {

template <int kVectorBytes_>
struct StoreCacheKernel {
  using params_t = StoreCacheParams;
  using info_t = StoreCacheInfo;
  static constexpr int kVectorBytes = kVectorBytes_, kVectorsPerThread = 1;
  static constexpr unsigned kAlignment = 1;

  static index_t row_elements(const StoreCacheParams& p) {  // counted as elements of two bytes
    return (index_t(p.k_vectors) + p.v_vectors) * kVectorBytes / 2;
  }

  static void run(const StoreCacheParams& p, index_t row) {
    const index_t index = index_of(p, row);
    if (index == p.skip_index) return;
    __builtin_memcpy(p.k_cache + index * p.k_cache_stride, p.k + row * p.k_stride, p.k_vectors * kVectorBytes);
    __builtin_memcpy(p.v_cache + index * p.v_cache_stride, p.v + row * p.v_stride, p.v_vectors * kVectorBytes);
  }
};

}  // namespace jitnorm
