// What sets the operators apart that normalise rows: a template argument of their kernels.
#pragma once

namespace jitnorm {

// rmsnorm: out = normalised input * weight. With a residual, input and residual are updated in place:
// residual += input, then input = normalised residual * weight.
struct Plain {
  static constexpr bool kAddResidual = false;
  static constexpr bool kRoundSum = false;     // normalise the sum as it is stored, not as it was computed
  static constexpr float kWeightOffset = 0.f;  // added to the weight
};
struct Gemma : Plain {
  static constexpr float kWeightOffset = 1.f;
};
struct FusedAdd : Plain {
  static constexpr bool kAddResidual = true;
};
struct FusedAddRounded : FusedAdd {
  static constexpr bool kRoundSum = true;
};
struct GemmaFusedAdd : Gemma {
  static constexpr bool kAddResidual = true;
};
struct GemmaFusedAddRounded : GemmaFusedAdd {
  static constexpr bool kRoundSum = true;
};

}  // namespace jitnorm
