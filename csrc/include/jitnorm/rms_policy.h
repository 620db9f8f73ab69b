// The policies of the norms. A policy is the template argument of a kernel class that distinguishes the operators of
// the RMSNorm family. Included by elementwise/rmsnorm.h and rms_row.h. The operators' Python modules name these
// classes.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

enum class Quantisation { kNone, kStatic, kDynamicPerToken };

// What the activation of a gate multiplies: nothing, without a gate; the input before it is normalised; or the result.
enum class Gating { kNone, kBeforeNorm, kAfterNorm };
enum class GateActivation { kSilu, kSigmoid };

// rmsnorm: out = normalised input * weight. With a residual, input and residual are updated in place:
// residual += input, then input = normalised residual * weight.
struct Plain {
  // The types of the output and of the residual, for inputs of type T.
  template <typename T>
  using output_t = T;
  template <typename T>
  using residual_t = T;
  static constexpr Quantisation kQuantisation = Quantisation::kNone;
  static constexpr bool kHasResidual = false;  // or a gate, which is read as a residual is
  static constexpr bool kRoundSum = false;     // whether to normalise the sum as stored, and not before its rounding
  static constexpr float kWeightOffset = 0.f;  // added to the weight
  // Whether the normalised number is rounded to the input's type before the weight multiplies it.
  static constexpr bool kRoundNormalised = false;
  static constexpr bool kSubtractsMean = false;  // whether the row's mean is subtracted first: LayerNorm
  // Of General alone.
  static constexpr bool kIsGeneral = false, kHasWeight = true, kHasBias = false;
  static constexpr int kAccessBytes = 16;
  // Of Gated alone.
  static constexpr Gating kGating = Gating::kNone;
  static constexpr GateActivation kGateActivation = GateActivation::kSilu;
};
// layernorm: out = (input - mean) * rstd * weight, where rstd is the reciprocal standard deviation. General adds a
// bias.
struct LayerNorm : Plain {
  static constexpr bool kSubtractsMean = true;
};
struct Gemma : Plain {
  static constexpr float kWeightOffset = 1.f;
};
struct FusedAdd : Plain {
  static constexpr bool kHasResidual = true;
};
struct FusedAddRounded : FusedAdd {
  static constexpr bool kRoundSum = true;
};
struct GemmaFusedAdd : Gemma {
  static constexpr bool kHasResidual = true;
};
struct GemmaFusedAddRounded : GemmaFusedAdd {
  static constexpr bool kRoundSum = true;
};
// For 16-bit inputs: the residual is float, so that what is stored is the sum in float.
struct FusedAddFp32Residual : FusedAddRounded {
  template <typename T>
  using residual_t = float;
};
struct GemmaFusedAddFp32Residual : GemmaFusedAddRounded {
  template <typename T>
  using residual_t = float;
};

// Any of these with e4m3 outputs: the normalised float is divided by a scale, in float, and rounded once. With a
// residual, the input is not written.
template <typename Norm>
struct StaticFp8 : Norm {
  template <typename T>
  using output_t = e4m3_t;
  static constexpr Quantisation kQuantisation = Quantisation::kStatic;  // the scale is given
};
template <typename Norm>
struct DynamicFp8 : StaticFp8<Norm> {
  static constexpr Quantisation kQuantisation = Quantisation::kDynamicPerToken;  // the scale makes a row's amax 448
};

// gated_rmsnorm: out = norm(input) * weight * activation(gate), or norm(input * activation(gate)) * weight. The gate
// takes the place of a residual, and is not written.
template <typename Gate, Gating kGating_, GateActivation kGateActivation_>
struct Gated : Plain {
  template <typename T>
  using residual_t = Gate;
  static constexpr bool kHasResidual = true;
  static constexpr Gating kGating = kGating_;
  static constexpr GateActivation kGateActivation = kGateActivation_;
};

// Any of these with two roundings, as in the Llama class of Hugging Face's transformers. Of Gated, a weight's product
// is rounded too before a gate multiplies it.
template <typename Norm>
struct RoundedNormalised : Norm {
  static constexpr bool kRoundNormalised = true;
};

// Any of these for what the fast kernels leave out: rows under up to three leading dimensions, each with a stride of
// its own; rows that are aligned to kAccessBytes_ alone, or where that is 0, to their elements; a weight for each head,
// or none; a bias; mean and rstd as results.
template <typename Norm, int kAccessBytes_, bool kHasWeight_ = true, bool kHasBias_ = false>
struct General : Norm {
  static constexpr bool kIsGeneral = true, kHasWeight = kHasWeight_, kHasBias = kHasBias_;
  static constexpr int kAccessBytes = kAccessBytes_;
};

}  // namespace jitnorm
