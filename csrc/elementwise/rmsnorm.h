// The RMSNorm family: the parameters that every kernel class takes and, for the host compiler, the glue that fills them
// in.
#pragma once
#include "jitnorm/dtype.h"
#include "jitnorm/rms_policy.h"

namespace jitnorm {

// What every operator needs of them comes first: it shares one line of the GPU's constant cache.
struct RMSNormParams {
  const void* input;
  const void* weight;
  void* out;             // may be `input`
  index_t input_stride;  // in elements, like the other strides
  index_t out_stride;
  float eps;
  index_t num_tokens;
  void* residual;  // only where the operator adds one
  index_t residual_stride;
  float* scale;  // only where the output is quantised: one to read, or one to write for each token
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

template <typename Kernel>
bool as_tokens(const DLTensor* tensor, Rows* rows) {
  using T = typename Kernel::input_t;
  return tensor && as_rows<T>(*tensor, Kernel::kHiddenSize, Kernel::kAlignment, rows);
}

// Rows that a kernel may write while it reads `weight`.
inline bool writable(const Rows& rows, index_t hidden_size, const Rows& weight) {
  return separate(rows, hidden_size) && !extents_meet(rows, weight);
}

inline bool same_shape_and_device(const DLTensor& a, const DLTensor& b) {
  return same_shape(a, b) && same_device(a, b);
}

// rmsnorm(input, weight, out, eps, enable_pdl): jitnorm.core.norms.check_rmsnorm says in words what is refused here.
template <typename Kernel>
Outcome rmsnorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  Rows in, scale, to;
  double eps;
  bool enable_pdl;
  if (!as_tokens<Kernel>(input, &in) || !as_weight<Kernel>(weight, &scale) || !as_tokens<Kernel>(out, &to) ||
      !as_float(args[3], &eps) || !(eps >= 0) || !as_optional_bool(args[4], true, &enable_pdl) ||
      !same_shape_and_device(*input, *out) || !same_device(*input, *weight) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  bool in_place = in.data == to.data && (in.stride == to.stride || in.count == 1);
  if (!writable(to, hidden_size, scale) || (!in_place && overlap<T>(in, to, hidden_size))) return Outcome::kRefused;
  RMSNormParams params{in.data,  scale.data, to.data, in.stride, to.stride, static_cast<float>(eps),
                       in.count, nullptr,    0,       nullptr};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

// fused_add_rmsnorm(input, residual, weight, eps, enable_pdl): likewise, jitnorm.core.norms.check_fused_add_rmsnorm.
template <typename Kernel>
Outcome fused_add_rmsnorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *residual = as_tensor(args[1]), *weight = as_tensor(args[2]);
  Rows in, sum, scale;
  double eps;
  bool enable_pdl;
  if (!as_tokens<Kernel>(input, &in) || !as_tokens<Kernel>(residual, &sum) || !as_weight<Kernel>(weight, &scale) ||
      !as_float(args[3], &eps) || !(eps >= 0) || !as_optional_bool(args[4], true, &enable_pdl) ||
      !same_shape_and_device(*input, *residual) || !same_device(*input, *weight) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  if (!writable(in, hidden_size, scale) || !writable(sum, hidden_size, scale) || overlap<T>(in, sum, hidden_size))
    return Outcome::kRefused;
  RMSNormParams params{in.data,  scale.data, in.data,    in.stride, in.stride, static_cast<float>(eps),
                       in.count, sum.data,   sum.stride, nullptr};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

// What both operators with e4m3 outputs are called with, after the input and, if any, the residual.
template <typename Kernel>
Outcome quantised(const DLTensor* input, const DLTensor* residual, const TVMFFIAny* args) {
  using T = typename Kernel::input_t;
  using Policy = typename Kernel::policy_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  constexpr bool by_token = Policy::kQuantise == Quantise::kByToken;
  const DLTensor *weight = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  Rows in, sum{}, factors, to, scales;
  double eps;
  bool enable_pdl;
  if (!as_tokens<Kernel>(input, &in) || !as_weight<Kernel>(weight, &factors) || !out ||
      !as_rows<e4m3_t>(*out, hidden_size, Kernel::kAlignment, &to) ||
      !as_elements<float>(scale, by_token ? in.count : 1, alignof(float), &scales) || !as_float(args[3], &eps) ||
      !(eps >= 0) || !as_optional_bool(args[4], true, &enable_pdl) || !same_shape_and_device(*input, *out) ||
      !same_device(*input, *weight) || !same_device(*input, *scale) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  if (Policy::kAddResidual && (!as_tokens<Kernel>(residual, &sum) || !same_shape_and_device(*input, *residual)))
    return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  if (!writable(to, hidden_size, factors) || extents_meet(to, in) || extents_meet(to, scales)) return Outcome::kRefused;
  if (by_token && (extents_meet(scales, in) || extents_meet(scales, factors))) return Outcome::kRefused;
  if (Policy::kAddResidual && (!writable(sum, hidden_size, factors) || overlap<T>(in, sum, hidden_size) ||
                               extents_meet(sum, to) || extents_meet(sum, scales)))
    return Outcome::kRefused;
  RMSNormParams params{in.data,    factors.data,
                       to.data,    in.stride,
                       to.stride,  static_cast<float>(eps),
                       in.count,   sum.data,
                       sum.stride, reinterpret_cast<float*>(scales.data)};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

// rmsnorm_quant_fp8(input, weight, out, scale, eps, enable_pdl): jitnorm.quant_norms.check says in words what is
// refused here. The scale is read, or one is written for each token.
template <typename Kernel>
Outcome rmsnorm_quant_fp8(const TVMFFIAny* args, int num_args) {
  return num_args == 6 ? quantised<Kernel>(as_tensor(args[0]), nullptr, args + 1) : Outcome::kRefused;
}

// fused_add_rmsnorm_quant_fp8(input, residual, weight, out, scale, eps, enable_pdl): likewise.
template <typename Kernel>
Outcome fused_add_rmsnorm_quant_fp8(const TVMFFIAny* args, int num_args) {
  return num_args == 7 ? quantised<Kernel>(as_tensor(args[0]), as_tensor(args[1]), args + 2) : Outcome::kRefused;
}

}  // namespace jitnorm
#endif
