// The RMSNorm family on the CPU. A thread takes a row, which stays in the L1 cache between the two passes. Included by
// generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/parallel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kHiddenSize_, typename T, typename W = T, typename Policy = Plain>
struct RMSNormKernel {
  using input_t = T;
  using weight_t = W;
  using output_t = typename Policy::template output_t<T>;
  using residual_t = typename Policy::template residual_t<T>;
  using policy_t = Policy;
  using params_t = RMSNormParams;
  using info_t = RMSNormInfo;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr int kRowsPerBlock = 1;
  static constexpr unsigned kAlignment = 1;

  static constexpr index_t row_elements(const RMSNormParams&) { return kHiddenSize; }

  static void run(const RMSNormParams& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const W* weight = static_cast<const W*>(p.weight);
    output_t* out = static_cast<output_t*>(p.out) + row * p.out_stride;
    float* scale = Policy::kQuantisation == Quantisation::kDynamicPerToken ? p.scale + row : p.scale;
    if constexpr (!Policy::kHasResidual) {
      write(out, x, weight, rstd_of_row<kHiddenSize>(p.eps, [&](int i) { return load(x + i); }), scale);
      return;
    }
    residual_t* residual = static_cast<residual_t*>(p.residual) + row * p.residual_stride;
    // With kRoundSum the stored residual is normalised; otherwise the sum in float, kept in `sum`.
    float sum[Policy::kRoundSum ? 1 : kHiddenSize];
    const float rstd = rstd_of_row<kHiddenSize>(p.eps, [&](int i) {
      floats f = load(x + i) + load(residual + i);
      store(residual + i, f);
      if constexpr (Policy::kRoundSum) return load(residual + i);
      store(sum + i, f);
      return f;
    });
    if constexpr (Policy::kRoundSum) write(out, residual, weight, rstd, scale);
    else write(out, sum, weight, rstd, scale);
  }

 private:
  template <typename V>
  static void write(output_t* out, const V* value, const W* weight, float rstd, float* scale) {
    auto normalised = [&](int i) { return load(value + i) * rstd * (load(weight + i) + Policy::kWeightOffset); };
    if constexpr (Policy::kQuantisation == Quantisation::kDynamicPerToken) {
      floats amax{};
      for (int i = 0; i < kHiddenSize; i += kLanes) amax = max(amax, magnitude(normalised(i)));
      *scale = dynamic_scale(max(amax), kMinTokenScale);
    }
    const float divisor = Policy::kQuantisation == Quantisation::kNone ? 1 : *scale;
#pragma GCC unroll 4
    for (int i = 0; i < kHiddenSize; i += kLanes)
      if constexpr (Policy::kQuantisation == Quantisation::kNone) store(out + i, normalised(i));
      else store(out + i, normalised(i) / divisor);
  }
};

// The same code under the name of the CUDA kernel class for short rows.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain>
struct RMSNormWarpKernel : RMSNormKernel<kHiddenSize, T, W, Policy> {};

}  // namespace jitnorm
