// What sets the operators apart that normalise rows: a template argument of their kernels.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

enum class Quantise { kNot, kWithGivenScale, kByToken };

// rmsnorm: out = normalised input * weight. With a residual, input and residual are updated in place:
// residual += input, then input = normalised residual * weight.
struct Plain {
  template <typename T>
  using output_t = T;  // for inputs of type T
  static constexpr Quantise kQuantise = Quantise::kNot;
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

// Any of these with e4m3 numbers for output: what the others round to T is divided by a scale, in float, and rounded
// once. With a residual, the input stays as it is.
template <typename Norm>
struct StaticFp8 : Norm {
  template <typename T>
  using output_t = e4m3_t;
  static constexpr Quantise kQuantise = Quantise::kWithGivenScale;
};
template <typename Norm>
struct DynamicFp8 : StaticFp8<Norm> {
  static constexpr Quantise kQuantise = Quantise::kByToken;  // the largest of a row becomes 448
};

}  // namespace jitnorm
