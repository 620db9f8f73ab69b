// RMSNorm on the host: one thread, one row; the row stays in the first-level cache between the two passes.
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kHiddenSize_, typename T, typename W = T>
struct RMSNormKernel {
  using input_t = T;
  using weight_t = W;
  using params_t = RMSNormParams;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr unsigned kAlignment = 1;

  static void run(const RMSNormParams& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const W* w = static_cast<const W*>(p.weight);
    T* y = static_cast<T*>(p.out) + row * p.out_stride;
    constexpr int kSums = 4;  // into a single one, each addition would wait for the one before it
    static_assert(kHiddenSize % (kSums * kLanes) == 0, "a row is whole vectors");
    floats sums[kSums] = {};
    for (int i = 0; i < kHiddenSize; i += kSums * kLanes)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; j++) {
        floats f = load(x + i + j * kLanes);
        sums[j] += f * f;
      }
    for (int j = 1; j < kSums; j++) sums[0] += sums[j];
    const float scale = 1. / __builtin_sqrt(double(sum(sums[0])) / kHiddenSize + p.eps);
#pragma GCC unroll 4
    for (int i = 0; i < kHiddenSize; i += kLanes) store(y + i, load(x + i) * scale * load(w + i));
  }
};

// The same code: the host has no warps, but it has the same sizes and the same names.
template <int kHiddenSize, typename T, typename W = T>
struct RMSNormWarpKernel : RMSNormKernel<kHiddenSize, T, W> {};

}  // namespace jitnorm
