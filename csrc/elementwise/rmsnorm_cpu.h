// The RMSNorm family on the host: one thread, one row; the row stays in the first-level cache between the two passes.
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/parallel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/rms_simd.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kHiddenSize_, typename T, typename W = T, typename Policy = Plain>
struct RMSNormKernel {
  using input_t = T;
  using weight_t = W;
  using output_t = typename Policy::template output_t<T>;
  using policy_t = Policy;
  using params_t = RMSNormParams;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr unsigned kAlignment = 1;

  static void run(const RMSNormParams& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const W* w = static_cast<const W*>(p.weight);
    output_t* y = static_cast<output_t*>(p.out) + row * p.out_stride;
    float* by = Policy::kQuantise == Quantise::kByToken ? p.scale + row : p.scale;
    if constexpr (!Policy::kAddResidual) {
      write(y, x, w, inverse_rms<kHiddenSize>(p.eps, [&](int i) { return load(x + i); }), by);
      return;
    }
    T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
    // The sum as it is normalised: the stored one, or in float while the residual already holds the rounded one.
    float exact[Policy::kRoundSum ? 1 : kHiddenSize];
    const float scale = inverse_rms<kHiddenSize>(p.eps, [&](int i) {
      floats f = load(x + i) + load(residual + i);
      store(residual + i, f);
      if constexpr (Policy::kRoundSum) return load(residual + i);
      store(exact + i, f);
      return f;
    });
    if constexpr (Policy::kRoundSum) write(y, residual, w, scale, by);
    else write(y, exact, w, scale, by);
  }

 private:
  template <typename V>
  static void write(output_t* y, const V* value, const W* weight, float scale, float* by) {
    auto normalised = [&](int i) { return load(value + i) * scale * (load(weight + i) + Policy::kWeightOffset); };
    if constexpr (Policy::kQuantise == Quantise::kByToken) {
      floats most{};
      for (int i = 0; i < kHiddenSize; i += kLanes) most = larger(most, magnitude(normalised(i)));
      *by = scale_of(largest(most), kLeastTokenScale);
    }
    const float divisor = Policy::kQuantise == Quantise::kNot ? 1 : *by;
#pragma GCC unroll 4
    for (int i = 0; i < kHiddenSize; i += kLanes)
      if constexpr (Policy::kQuantise == Quantise::kNot) store(y + i, normalised(i));
      else store(y + i, normalised(i) / divisor);
  }
};

// The same code: the host has no warps, but it has the same sizes and the same names.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain>
struct RMSNormWarpKernel : RMSNormKernel<kHiddenSize, T, W, Policy> {};

}  // namespace jitnorm
