// Rows scattered into caches on the host.
#pragma once
#include "elementwise/store_cache.h"
#include "jitnorm/parallel.h"

namespace jitnorm {

template <int kVectorBytes_>
struct StoreCacheKernel {
  using params_t = StoreCacheParams;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = 1;

  static index_t row_elements(const StoreCacheParams& p) {  // as of two bytes, which most are
    return (index_t(p.k_vectors) + p.v_vectors) * kVectorBytes / 2;
  }

  static void run(const StoreCacheParams& p, index_t token) {
    const index_t index = index_of(p, token);
    if (index == p.skip_index) return;
    __builtin_memcpy(p.k_cache + index * p.k_cache_stride, p.k + token * p.k_stride, p.k_vectors * kVectorBytes);
    __builtin_memcpy(p.v_cache + index * p.v_cache_stride, p.v + token * p.v_stride, p.v_vectors * kVectorBytes);
  }
};

}  // namespace jitnorm
