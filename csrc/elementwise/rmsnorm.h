// RMSNorm: the parameters that every kernel class takes and, for the host compiler, the glue that fills them in.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

struct RMSNormParams {
  const void* input;
  const void* weight;
  void* out;  // may be `input`
  index_t num_tokens;
  index_t input_stride;  // in elements, like out_stride
  index_t out_stride;
  float eps;
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

// rmsnorm(input, weight, out, eps, enable_pdl): see jitnorm.rmsnorm, whose _check says in words what is refused here.
template <typename Kernel>
Outcome rmsnorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  using W = typename Kernel::weight_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  double eps;
  bool enable_pdl;
  if (!input || !weight || !out || !as_float(args[3], &eps) || !as_optional_bool(args[4], true, &enable_pdl) ||
      !(eps >= 0) || weight->ndim != 1 || input->ndim != out->ndim || !same_device(*input, *weight) ||
      !same_device(*input, *out) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  Rows in, to, scale;
  if (!as_rows<T>(*input, hidden_size, Kernel::kAlignment, &in) ||
      !as_rows<T>(*out, hidden_size, Kernel::kAlignment, &to) ||
      !as_rows<W>(*weight, hidden_size, Kernel::kAlignment, &scale))
    return Outcome::kRefused;
  for (int i = 0; i < input->ndim; i++)
    if (input->shape[i] != out->shape[i]) return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  bool in_place = in.data == to.data && (in.stride == to.stride || in.count == 1);
  if ((to.count > 1 && to.stride < hidden_size) || (!in_place && overlap<T>(in, to, hidden_size)) ||
      (to.data < scale.end && scale.data < to.end))
    return Outcome::kRefused;
  RMSNormParams params{in.data, scale.data, to.data, in.count, in.stride, to.stride, static_cast<float>(eps)};
  return launch(Kernel{}, params, input->device, enable_pdl);
}

}  // namespace jitnorm
#endif
