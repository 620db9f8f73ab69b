// The RMSNorm family on the CPU. A thread takes a row, which stays in the caches between the two passes. Included by
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
  using params_t = typename RMSNormParamsOf<Policy::kIsGeneral>::type;
  using info_t = RMSNormInfo;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr int kRowsPerBlock = 1;
  static constexpr unsigned kAlignment = 1, kWeightAlignment = 1, kResidualAlignment = 1, kOutputAlignment = 1;

  static constexpr index_t row_elements(const params_t&) { return kHiddenSize; }

  static void run(const params_t& p, index_t number) {
    const T* x = static_cast<const T*>(p.input);
    Factors factors{static_cast<const W*>(p.weight), nullptr, nullptr};
    output_t* out = static_cast<output_t*>(p.out);
    residual_t* residual = static_cast<residual_t*>(p.residual);
    if constexpr (Policy::kIsGeneral) {
      const RowIndex index = row_index(p, number);
      x += offset_of(index, p.input_strides);
      residual += offset_of(index, p.residual_strides);
      out += offset_of(index, p.out_strides);
      factors.weight += offset_of(index, p.weight_strides);
      factors.bias = static_cast<const W*>(p.bias);
    } else {
      x += number * p.input_stride;
      residual += number * p.residual_stride;
      out += number * p.out_stride;
    }
    float* scale = Policy::kQuantisation == Quantisation::kDynamicPerToken ? p.scale + number : p.scale;
    if constexpr (Policy::kSubtractsMean) {
      static_assert(!Policy::kHasResidual, "LayerNorm has no residual");
      const float mean = mean_of_row<kHiddenSize>([&](int i) { return load_of_row<kHiddenSize>(x, i); });
      if (p.mean) p.mean[number] = mean;
      float centred[kHiddenSize];
      const float rstd = rstd_of_row<kHiddenSize>(p.eps, [&](int i) {
        store_of_row<kHiddenSize>(centred, i, load_of_row<kHiddenSize>(x, i) - mean);
        return load_of_row<kHiddenSize>(centred, i);
      });
      write(p, number, out, centred, factors, rstd, scale);
      return;
    }
    factors.gate = residual;
    if constexpr (!Policy::kHasResidual || Policy::kGating == Gating::kAfterNorm) {
      const float rstd = rstd_of_row<kHiddenSize>(p.eps, [&](int i) { return load_of_row<kHiddenSize>(x, i); });
      write(p, number, out, x, factors, rstd, scale);
      return;
    }
    // With kRoundSum the stored residual is normalised; otherwise the sum or product in float, kept in `sum`.
    float sum[Policy::kRoundSum ? 1 : kHiddenSize];
    const float rstd = rstd_of_row<kHiddenSize>(p.eps, [&](int i) {
      floats f = load_of_row<kHiddenSize>(x, i);
      if constexpr (Policy::kGating == Gating::kBeforeNorm) {
        f *= activated(residual, i);
      } else {
        f += load_of_row<kHiddenSize>(residual, i);
        store_of_row<kHiddenSize>(residual, i, f);
      }
      if constexpr (Policy::kRoundSum) return load_of_row<kHiddenSize>(residual, i);
      store_of_row<kHiddenSize>(sum, i, f);
      return f;
    });
    if constexpr (Policy::kRoundSum) write(p, number, out, residual, factors, rstd, scale);
    else write(p, number, out, sum, factors, rstd, scale);
  }

 private:
  struct Factors {
    const W *weight, *bias;
    const residual_t* gate;
  };

  // The activation of the elements of a gate from i on. Behind the last they are finite numbers.
  static floats activated(const residual_t* gate, int i) {
    const floats g = load_of_row<kHiddenSize>(gate, i);
    const floats numerator = Policy::kGateActivation == GateActivation::kSilu ? g : floats{} + 1.f;
    return numerator / (1.f + exp(-g));
  }

  template <typename V>
  static void write(const params_t& p, index_t row, output_t* out, const V* value, Factors factors, float rstd,
                    float* scale) {
    if constexpr (Policy::kIsGeneral)
      if (p.rstd) p.rstd[row] = rstd;
    auto normalised = [&](int i) {
      floats f = load_of_row<kHiddenSize>(value, i) * rstd;
      if constexpr (Policy::kRoundNormalised) f = rounded_to<T>(f);
      if constexpr (Policy::kHasWeight) f *= load_of_row<kHiddenSize>(factors.weight, i) + Policy::kWeightOffset;
      if constexpr (Policy::kHasBias) f += load_of_row<kHiddenSize>(factors.bias, i);
      if constexpr (Policy::kGating == Gating::kAfterNorm) {
        // A weight of another type makes the product float32.
        if constexpr (Policy::kRoundNormalised && Policy::kHasWeight && kIsSame<T, W>) f = rounded_to<T>(f);
        f *= activated(factors.gate, i);
      }
      return f;
    };
    if constexpr (Policy::kQuantisation == Quantisation::kDynamicPerToken) {
      floats amax{};
      for (int i = 0; i < kHiddenSize; i += kLanes) amax = max(amax, magnitude(normalised(i)));
      *scale = dynamic_scale(max(amax), kMinTokenScale);
    }
    const float divisor = Policy::kQuantisation == Quantisation::kNone ? 1 : *scale;
#pragma GCC unroll 4
    for (int i = 0; i < kHiddenSize; i += kLanes)
      if constexpr (Policy::kQuantisation == Quantisation::kNone) store_of_row<kHiddenSize>(out, i, normalised(i));
      else store_of_row<kHiddenSize>(out, i, normalised(i) / divisor);
  }
};

// The same code under the name of the CUDA kernel class for short rows.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain>
struct RMSNormWarpKernel : RMSNormKernel<kHiddenSize, T, W, Policy> {};

}  // namespace jitnorm
