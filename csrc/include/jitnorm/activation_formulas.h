// The formulas of activations, with a product, such as activation(gate) * up, and without. Included by
// elementwise/activation.h and gemm/few_rows.h.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// An activation is a template over F, which is float on CUDA and a SIMD register of floats on the CPU, and over Math,
// which has exp(x), reciprocal(x), times_sigmoid(x, u) = x / (1 + exp(-u)) and round(x), which rounds to the input's
// type. At +infinity its value is its limit, at -infinity that of the formula in floats, as in PyTorch: NaN where it is
// -infinity * 0. Comparisons are written so that a NaN is kept.

// x * sigmoid(x)
struct SiLU {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    return Math::times_sigmoid(x, x);
  }
};

// x * Phi(x), where Phi is the distribution function of the normal distribution, (1 + erf(x / sqrt(2))) / 2.
struct GELU {
  // Phi(-t) = exp(-t^2 / 2) * s * P(s) with s = 1 / (1 + 0.27 t), where P interpolates at the nine Chebyshev nodes of
  // 0 <= t <= 14.5; for larger t, the result is below the smallest float. The relative error is at most 3e-8, in the
  // tail too, where 1 + erf(x) would cancel.
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    const F t = x < 0.f ? -x : x, s = Math::reciprocal(1.f + 0.27f * t);
    F p = 0.0292058334f * s - 0.127722557f;
    p = p * s + 0.172436097f;
    p = p * s - 0.0723445624f;
    p = p * s + 0.110054217f;
    p = p * s + 0.0710775825f;
    p = p * s + 0.102063549f;
    p = p * s + 0.107507093f;
    p = p * s + 0.107722758f;
    const F tail = Math::exp(-0.5f * t * t) * s * p;
    return x * (x < 0.f ? tail : 1.f - tail);
  }
};

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2u).
struct GELUTanh {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    return Math::times_sigmoid(x, x * (1.59576912f + 0.0713548163f * x * x));
  }
};

// x * sigmoid(1.702 x)
struct QuickGELU {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    return Math::times_sigmoid(x, 1.702f * x);
  }
};

// max(x, 0)^2
struct SquaredReLU {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    const F y = x < 0.f ? F{} : x;
    return y * y;
  }
};

// What the elements of a row of the input are.
enum class Operands {
  kSingle,       // one for each element of the output
  kHalves,       // the gates, then as many factors (up)
  kInterleaved,  // a gate and its factor in turn
};

// A formula computes an element of the output from its gate, its factor and the parameters of the call. A kernel class
// is a template over a formula. Without a factor, `up` is the gate.
struct FormulaDefaults {
  static constexpr Operands kOperands = Operands::kHalves;
  static constexpr int kNumParameters = 0;
  static constexpr bool kHasLimit = false;  // whether the first parameter is a limit, which is zero or more
};

template <typename Activation>
struct NoMul : FormulaDefaults {
  static constexpr Operands kOperands = Operands::kSingle;
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F, const float*) {
    return Activation::template apply<Math>(gate);
  }
};

template <typename Activation>
struct AndMul : FormulaDefaults {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F up, const float*) {
    return Activation::template apply<Math>(gate) * up;
  }
};

// As two operators of PyTorch compute it: the activation's result is rounded before the product.
template <typename Activation>
struct RoundedAndMul : FormulaDefaults {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F up, const float*) {
    return Math::round(Activation::template apply<Math>(gate)) * up;
  }
};

// The activation is of the second half.
template <typename Activation>
struct MulAnd : FormulaDefaults {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F up, const float*) {
    return gate * Activation::template apply<Math>(up);
  }
};

// (gate if gate > threshold else 0) * up
struct FATReLUAndMul : FormulaDefaults {
  static constexpr int kNumParameters = 1;  // threshold
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F up, const float* parameters) {
    return (gate <= parameters[0] ? F{} : gate) * up;
  }
};

// g * sigmoid(alpha g) * (u + beta), where g is the gate, at most limit, and u the factor from -limit to limit.
template <Operands kOperands_>
struct ClampedSiLUAndMul : FormulaDefaults {
  static constexpr Operands kOperands = kOperands_;
  static constexpr int kNumParameters = 3;  // limit, alpha, beta
  static constexpr bool kHasLimit = true;
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F compute(F gate, F up, const float* parameters) {
    const F limit = F{} + parameters[0];
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up;
    up = up < -limit ? -limit : up;
    return Math::times_sigmoid(gate, parameters[1] * gate) * (up + parameters[2]);
  }
};

}  // namespace jitnorm
