// Gated activations, out = activation(gate) * up: the activations themselves, written once for a float on CUDA and for
// a register of floats on the host, the parameters that every kernel class takes and, for the host compiler, the glue
// that fills them in.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// Math has exp(x), reciprocal(x) and times_logistic(x, u), which is x / (1 + exp(-u)). At +infinity an activation is
// its limit, and at -infinity NaN, as PyTorch's are.

// x * sigmoid(x)
struct SiLU {
  template <typename Math, typename F>
  static JITNORM_ANYWHERE F apply(F x) {
    return Math::times_logistic(x, x);
  }
};

// x * Phi(x), the distribution function of the normal distribution, which is (1 + erf(x / sqrt(2))) / 2.
struct GELU {
  // Phi(-t) = exp(-t^2 / 2) * s * P(s) with s = 1 / (1 + 0.27 t), where P interpolates at the nine Chebyshev nodes of
  // 0 <= t <= 14.5, below which float has no more numbers: off by 3e-8 of the value at most. Without a difference that
  // cancels, as in 1 + erf, it is as exact in the tail.
  template <typename Math, typename F>
  static JITNORM_ANYWHERE F apply(F x) {
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
  static JITNORM_ANYWHERE F apply(F x) {
    return Math::times_logistic(x, x * (1.59576912f + 0.0713548163f * x * x));
  }
};

constexpr int kMostWidth = 1 << 30;  // so that the two halves of a row have columns that an int can count

struct ActivationParams {
  const void* input;  // rows of `width` gates, then as many factors
  void* out;
  index_t input_stride;  // in elements, like out_stride
  index_t out_stride;
  index_t num_tokens;
  int width;
  bool wide_ids;           // int64 rather than int32
  const void* expert_ids;  // one for every expert_step rows; null where all rows count
  index_t expert_step;
};

// Whether the row's expert is -1.
JITNORM_ANYWHERE bool is_skipped(const ActivationParams& p, index_t row) {
  if (!p.expert_ids) return false;
  const index_t i = row / p.expert_step;
  return (p.wide_ids ? static_cast<const index_t*>(p.expert_ids)[i] : static_cast<const int*>(p.expert_ids)[i]) == -1;
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

// activation(input, out, expert_ids, expert_step, enable_pdl): jitnorm.activation_ops.check says what is refused.
template <typename Kernel>
Outcome activation(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *ids = nullptr;
  if (!input || !out || out->ndim == 0) return Outcome::kRefused;
  const index_t width = out->shape[out->ndim - 1], row_bytes = width * static_cast<index_t>(sizeof(T));
  Rows in, to;
  index_t step;
  bool enable_pdl;
  if (width < 1 || width > kMostWidth || row_bytes % 4 != 0 || vector_bytes(row_bytes) != Kernel::kVectorBytes ||
      !as_rows<T>(*input, 2 * width, Kernel::kAlignment, &in) || !as_rows<T>(*out, width, Kernel::kAlignment, &to) ||
      !same_leading_shape(*input, *out) || !same_device(*input, *out) || !runs_on(Kernel{}, input->device) ||
      !as_int(args[3], &step) || step < 1 || !as_optional_bool(args[4], true, &enable_pdl))
    return Outcome::kRefused;
  if (args[2].type_index != kTVMFFINone && !(ids = as_indices(args[2], input->device))) return Outcome::kRefused;
  if (ids && ids->shape[0] < in.count / step + (in.count % step != 0)) return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  const Rows id_rows = ids ? as_vector(*ids) : Rows{};
  if (!separate(to, width) || overlap(in, 2 * row_bytes, to, row_bytes, sizeof(T)) ||
      (ids && extents_meet(to, id_rows)))
    return Outcome::kRefused;
  ActivationParams params{
      in.data,      to.data, in.stride, to.stride, in.count, static_cast<int>(width), ids && ids->dtype.bits == 64,
      id_rows.data, step};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

}  // namespace jitnorm
#endif
