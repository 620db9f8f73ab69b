// The RMSNorm family: the parameter struct of its kernel classes and, for the host compiler, the bindings functions
// that fill it in. Included by rmsnorm.cuh and rmsnorm_cpu.h.
#pragma once
#include "jitnorm/dtype.h"
#include "jitnorm/rms_policy.h"

namespace jitnorm {

// What all operators read comes first, so that it fits one constant-cache line.
struct RMSNormParams {
  const void* input;
  const void* weight;
  void* out;             // may be `input`
  index_t input_stride;  // in elements, like the other strides
  index_t out_stride;
  float eps;
  index_t num_rows;
  void* residual;  // null without one
  index_t residual_stride;
  float* scale;  // static quantisation: one scale, read; dynamic: one per row, written; otherwise null
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

template <typename Kernel>
bool as_input_rows(const DLTensor* tensor, Rows* rows) {
  using T = typename Kernel::input_t;
  return tensor && as_rows<T>(*tensor, Kernel::kHiddenSize, Kernel::kAlignment, rows);
}

// Whether a kernel may write `rows` while it reads `weight`.
inline bool is_writable(const Rows& rows, index_t hidden_size, const Rows& weight) {
  return rows_are_disjoint(rows, hidden_size) && !extents_overlap(rows, weight);
}

inline bool same_shape_and_device(const DLTensor& a, const DLTensor& b) {
  return same_shape(a, b) && same_device(a, b);
}

// rmsnorm(input, weight, out, eps, enable_pdl). src/jitnorm/rmsnorm.py explains refused calls.
template <typename Kernel>
Outcome rmsnorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  Rows input_rows, weight_row, out_rows;
  double eps;
  bool enable_pdl;
  if (!as_input_rows<Kernel>(input, &input_rows) || !as_weight<Kernel>(weight, &weight_row) ||
      !as_input_rows<Kernel>(out, &out_rows) || !as_float(args[3], &eps) || !(eps >= 0) ||
      !as_optional_bool(args[4], true, &enable_pdl) || !same_shape_and_device(*input, *out) ||
      !same_device(*input, *weight) || !runs_on<Kernel>(input->device))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  bool in_place = input_rows.data == out_rows.data && (input_rows.stride == out_rows.stride || input_rows.count == 1);
  if (!is_writable(out_rows, hidden_size, weight_row) ||
      (!in_place && rows_overlap<T>(input_rows, out_rows, hidden_size)))
    return Outcome::kRefused;
  RMSNormParams params{};
  params.input = input_rows.data;
  params.weight = weight_row.data;
  params.out = out_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  params.eps = static_cast<float>(eps);
  params.num_rows = input_rows.count;
  return launch<Kernel>(params, input->device, enable_pdl);
}

// fused_add_rmsnorm(input, residual, weight, eps, enable_pdl). src/jitnorm/fused_add_rmsnorm.py explains refused calls.
template <typename Kernel>
Outcome fused_add_rmsnorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  using R = typename Kernel::residual_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *residual = as_tensor(args[1]), *weight = as_tensor(args[2]);
  Rows input_rows, residual_rows, weight_row;
  double eps;
  bool enable_pdl;
  if (!as_input_rows<Kernel>(input, &input_rows) || !residual ||
      !as_rows<R>(*residual, hidden_size, Kernel::kAlignment, &residual_rows) ||
      !as_weight<Kernel>(weight, &weight_row) || !as_float(args[3], &eps) || !(eps >= 0) ||
      !as_optional_bool(args[4], true, &enable_pdl) || !same_shape_and_device(*input, *residual) ||
      !same_device(*input, *weight) || !runs_on<Kernel>(input->device))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  if (!is_writable(input_rows, hidden_size, weight_row) || !is_writable(residual_rows, hidden_size, weight_row) ||
      rows_overlap<T, R>(input_rows, residual_rows, hidden_size))
    return Outcome::kRefused;
  RMSNormParams params{};
  params.input = input_rows.data;
  params.weight = weight_row.data;
  params.out = input_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = input_rows.stride;
  params.eps = static_cast<float>(eps);
  params.num_rows = input_rows.count;
  params.residual = residual_rows.data;
  params.residual_stride = residual_rows.stride;
  return launch<Kernel>(params, input->device, enable_pdl);
}

// Both operators with e4m3 outputs. `residual` is null for an operator without one. `args` are the arguments after
// these two, from the weight on.
template <typename Kernel>
Outcome norm_quant_fp8(const DLTensor* input, const DLTensor* residual, const TVMFFIAny* args) {
  using T = typename Kernel::input_t;
  using Policy = typename Kernel::policy_t;
  constexpr index_t hidden_size = Kernel::kHiddenSize;
  constexpr bool is_dynamic = Policy::kQuantisation == Quantisation::kDynamicPerToken;
  const DLTensor *weight = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  Rows input_rows, residual_rows{}, weight_row, out_rows, scales;
  double eps;
  bool enable_pdl;
  if (!as_input_rows<Kernel>(input, &input_rows) || !as_weight<Kernel>(weight, &weight_row) || !out ||
      !as_rows<e4m3_t>(*out, hidden_size, Kernel::kAlignment, &out_rows) ||
      !as_elements<float>(scale, is_dynamic ? input_rows.count : 1, alignof(float), &scales) ||
      !as_float(args[3], &eps) || !(eps >= 0) || !as_optional_bool(args[4], true, &enable_pdl) ||
      !same_shape_and_device(*input, *out) || !same_device(*input, *weight) || !same_device(*input, *scale) ||
      !runs_on<Kernel>(input->device))
    return Outcome::kRefused;
  if (Policy::kHasResidual &&
      (!as_input_rows<Kernel>(residual, &residual_rows) || !same_shape_and_device(*input, *residual)))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  if (!is_writable(out_rows, hidden_size, weight_row) || extents_overlap(out_rows, input_rows) ||
      extents_overlap(out_rows, scales))
    return Outcome::kRefused;
  if (is_dynamic && (extents_overlap(scales, input_rows) || extents_overlap(scales, weight_row)))
    return Outcome::kRefused;
  if (Policy::kHasResidual && (!is_writable(residual_rows, hidden_size, weight_row) ||
                               rows_overlap<T>(input_rows, residual_rows, hidden_size) ||
                               extents_overlap(residual_rows, out_rows) || extents_overlap(residual_rows, scales)))
    return Outcome::kRefused;
  RMSNormParams params{};
  params.input = input_rows.data;
  params.weight = weight_row.data;
  params.out = out_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  params.eps = static_cast<float>(eps);
  params.num_rows = input_rows.count;
  params.residual = residual_rows.data;
  params.residual_stride = residual_rows.stride;
  params.scale = reinterpret_cast<float*>(scales.data);
  return launch<Kernel>(params, input->device, enable_pdl);
}

// rmsnorm_quant_fp8(input, weight, out, scale, eps, enable_pdl). src/jitnorm/rmsnorm_quant_fp8.py explains refused
// calls. A static scale is read; dynamic scales are written, one per row.
template <typename Kernel>
Outcome rmsnorm_quant_fp8(const TVMFFIAny* args, int num_args) {
  return num_args == 6 ? norm_quant_fp8<Kernel>(as_tensor(args[0]), nullptr, args + 1) : Outcome::kRefused;
}

// fused_add_rmsnorm_quant_fp8(input, residual, weight, out, scale, eps, enable_pdl): likewise.
template <typename Kernel>
Outcome fused_add_rmsnorm_quant_fp8(const TVMFFIAny* args, int num_args) {
  if (num_args != 7) return Outcome::kRefused;
  return norm_quant_fp8<Kernel>(as_tensor(args[0]), as_tensor(args[1]), args + 2);
}

}  // namespace jitnorm
#endif
