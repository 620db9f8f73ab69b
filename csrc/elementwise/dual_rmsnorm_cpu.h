// Two RMSNorms of different widths on the CPU. A thread takes a row of each. Included by generated sources
// (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/dual_rmsnorm.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kFirstSize, int kSecondSize, typename T, typename W = T>
struct DualRMSNormKernel {
  using input_t = T;
  using weight_t = W;
  using params_t = DualRMSNormParams;
  using info_t = DualRMSNormInfo;
  static constexpr int kHiddenSizes[2] = {kFirstSize, kSecondSize};
  static constexpr int kRowsPerBlock[2] = {1, 1};
  static constexpr unsigned kAlignment = 1;

  static constexpr index_t row_elements(const DualRMSNormParams&) { return kFirstSize + kSecondSize; }

  static void run(const DualRMSNormParams& p, index_t row) {
    normalise<kFirstSize>(p.norms[0], row);
    normalise<kSecondSize>(p.norms[1], row);
  }

 private:
  template <int kHiddenSize>
  static void normalise(const NormParams& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const W* weight = static_cast<const W*>(p.weight);
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const float rstd = rstd_of_row<kHiddenSize>(p.eps, [&](int i) { return load_of_row<kHiddenSize>(x, i); });
#pragma GCC unroll 4
    for (int i = 0; i < kHiddenSize; i += kLanes)
      store_of_row<kHiddenSize>(out, i, load_of_row<kHiddenSize>(x, i) * rstd * load_of_row<kHiddenSize>(weight, i));
  }
};

}  // namespace jitnorm
