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
  return (rows.count <= 1 || rows.stride >= hidden_size) && (rows.end <= weight.data || weight.end <= rows.data);
}

inline bool same_shape_and_device(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim || !same_device(a, b)) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// rmsnorm(input, weight, out, eps, enable_pdl): jitnorm.norms.check_rmsnorm says in words what is refused here.
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
                       in.count, nullptr,    0};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

// fused_add_rmsnorm(input, residual, weight, eps, enable_pdl): likewise, jitnorm.norms.check_fused_add_rmsnorm.
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
  RMSNormParams params{in.data,  scale.data, in.data,   in.stride, in.stride, static_cast<float>(eps),
                       in.count, sum.data,   sum.stride};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

}  // namespace jitnorm
#endif
