// RMSNorm of the heads of q and k on the CPU. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/qknorm.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kHeadDim, typename T, typename W = T>
struct QKNormKernel {
  using input_t = T;
  using weight_t = W;
  using params_t = QKNormParams;
  using info_t = QKNormInfo;
  static constexpr int kHiddenSize = kHeadDim;
  static constexpr int kRowsPerBlock = 1;
  static constexpr unsigned kAlignment = 1;

  static constexpr index_t row_elements(const QKNormParams&) { return kHeadDim; }

  static void run(const QKNormParams& p, index_t row) {
    const auto [x, weight] = head_of<T, W>(p, static_cast<unsigned>(row));
    const float rstd = rstd_of_row<kHeadDim>(p.eps, [x = x](int i) { return load(x + i); });
    for (int i = 0; i < kHeadDim; i += kLanes) store(x + i, load(x + i) * rstd * load(weight + i));
  }
};

}  // namespace jitnorm
