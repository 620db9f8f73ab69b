// The RMSNorm family: the parameter struct of its kernel classes and, for the host compiler, the bindings functions
// that fill it in. Included by rmsnorm.cuh and rmsnorm_cpu.h.
#pragma once
#include "jitnorm/divisor.h"
#include "jitnorm/kernel_info.h"
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

// Of policies with kIsGeneral. A row's index over the three leading dimensions follows from its number.
struct GeneralRMSNormParams : RMSNormParams {
  const void* bias;                  // of the weight's type; null without one
  float* rstd;                       // one for each row, written; null if nobody asks for it
  unsigned counts[kMaxLeadingDims];  // of the leading dimensions
  UnsignedDivisor divisors[kMaxLeadingDims];
  index_t input_strides[kMaxLeadingDims], out_strides[kMaxLeadingDims], residual_strides[kMaxLeadingDims];
  index_t weight_strides[kMaxLeadingDims];  // 0 where one weight serves the whole dimension
  float* mean;                              // as rstd, of policies with kSubtractsMean
};

template <bool kIsGeneral>
struct RMSNormParamsOf {
  using type = RMSNormParams;
};
template <>
struct RMSNormParamsOf<true> {
  using type = GeneralRMSNormParams;
};

struct RowIndex {
  unsigned at[kMaxLeadingDims];
};

JITNORM_HOST_DEVICE RowIndex row_index(const GeneralRMSNormParams& p, index_t row) {
  RowIndex index{};
  unsigned rest = static_cast<unsigned>(row);
  for (int dim = kMaxLeadingDims - 1; dim > 0; dim--) {
    const unsigned outer = quotient(rest, p.divisors[dim]);
    index.at[dim] = rest - outer * p.counts[dim];
    rest = outer;
  }
  index.at[0] = rest;
  return index;
}

JITNORM_HOST_DEVICE index_t offset_of(const RowIndex& index, const index_t (&strides)[kMaxLeadingDims]) {
  index_t offset = 0;
  for (int dim = 0; dim < kMaxLeadingDims; dim++) offset += index.at[dim] * strides[dim];
  return offset;
}

struct RMSNormInfo {
  LaunchInfo launch;
  ElementType input, weight, residual, output;
  // In bytes; `alignment` is that of the input, and of outputs of policies without kIsGeneral.
  unsigned alignment, weight_alignment, residual_alignment, output_alignment;
  int hidden_size;
  int rows_per_block;
  Quantisation quantisation;
  bool has_residual, has_weight, has_bias, has_gate;  // the gate is given as a residual, and not written

  template <typename Kernel>
  static constexpr RMSNormInfo of() {
    using Policy = typename Kernel::policy_t;
    RMSNormInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.weight = kElementType<typename Kernel::weight_t>;
    info.residual = kElementType<typename Kernel::residual_t>;
    info.output = kElementType<typename Kernel::output_t>;
    info.alignment = Kernel::kAlignment;
    info.weight_alignment = Kernel::kWeightAlignment;
    info.residual_alignment = Kernel::kResidualAlignment;
    info.output_alignment = Kernel::kOutputAlignment;
    info.hidden_size = Kernel::kHiddenSize;
    info.rows_per_block = Kernel::kRowsPerBlock;
    info.quantisation = Policy::kQuantisation;
    info.has_residual = Policy::kHasResidual;
    info.has_weight = Policy::kHasWeight;
    info.has_bias = Policy::kHasBias;
    info.has_gate = Policy::kGating != Gating::kNone;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"
#include "jitnorm/strided.h"

namespace jitnorm {

inline Grid grid_of(const RMSNormInfo& info, const RMSNormParams& params) {
  Grid grid = grid_of_blocks(params.num_rows, info.rows_per_block, info.launch.threads);
  if (info.launch.blocks_per_cluster > 1) grid.x *= info.launch.blocks_per_cluster;
  return grid;
}

inline bool as_input_rows(const DLTensor* tensor, const RMSNormInfo& info, Rows* rows) {
  return tensor && as_rows(*tensor, info.input, info.hidden_size, info.alignment, rows);
}

inline bool as_weight_row(const DLTensor* tensor, const RMSNormInfo& info, Rows* row) {
  return tensor && tensor->ndim == 1 && as_rows(*tensor, info.weight, info.hidden_size, info.weight_alignment, row);
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
Outcome rmsnorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const RMSNormInfo& info = kernel.info();
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  Rows input_rows, weight_row, out_rows;
  double eps;
  bool enable_pdl;
  if (!as_input_rows(input, info, &input_rows) || !as_weight_row(weight, info, &weight_row) ||
      !as_input_rows(out, info, &out_rows) || !as_float(args[3], &eps) || !(eps >= 0) ||
      !as_optional_bool(args[4], true, &enable_pdl) || !same_shape_and_device(*input, *out) ||
      !same_device(*input, *weight) || !kernel.runs_on(input->device))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  bool in_place = input_rows.data == out_rows.data && (input_rows.stride == out_rows.stride || input_rows.count == 1);
  if (!is_writable(out_rows, info.hidden_size, weight_row) ||
      (!in_place && rows_overlap(input_rows, info.input, out_rows, info.input, info.hidden_size)))
    return Outcome::kRefused;
  RMSNormParams params{};
  params.input = input_rows.data;
  params.weight = weight_row.data;
  params.out = out_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  params.eps = static_cast<float>(eps);
  params.num_rows = input_rows.count;
  return kernel.launch(params, input->device, enable_pdl);
}

// fused_add_rmsnorm(input, residual, weight, eps, enable_pdl). src/jitnorm/fused_add_rmsnorm.py explains refused calls.
template <typename Kernel>
Outcome fused_add_rmsnorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const RMSNormInfo& info = kernel.info();
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *residual = as_tensor(args[1]), *weight = as_tensor(args[2]);
  Rows input_rows, residual_rows, weight_row;
  double eps;
  bool enable_pdl;
  if (!as_input_rows(input, info, &input_rows) || !residual ||
      !as_rows(*residual, info.residual, info.hidden_size, info.residual_alignment, &residual_rows) ||
      !as_weight_row(weight, info, &weight_row) || !as_float(args[3], &eps) || !(eps >= 0) ||
      !as_optional_bool(args[4], true, &enable_pdl) || !same_shape_and_device(*input, *residual) ||
      !same_device(*input, *weight) || !kernel.runs_on(input->device))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  if (!is_writable(input_rows, info.hidden_size, weight_row) ||
      !is_writable(residual_rows, info.hidden_size, weight_row) ||
      rows_overlap(input_rows, info.input, residual_rows, info.residual, info.hidden_size))
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
  return kernel.launch(params, input->device, enable_pdl);
}

// Both operators with e4m3 outputs. `residual` is null for an operator without one. `args` are the arguments after
// these two, from the weight on.
template <typename Kernel>
Outcome norm_quant_fp8(const Kernel& kernel, const DLTensor* input, const DLTensor* residual, const TVMFFIAny* args) {
  const RMSNormInfo& info = kernel.info();
  const index_t hidden_size = info.hidden_size;
  const bool is_dynamic = info.quantisation == Quantisation::kDynamicPerToken;
  const DLTensor *weight = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  Rows input_rows, residual_rows{}, weight_row, out_rows, scales;
  double eps;
  bool enable_pdl;
  if (!as_input_rows(input, info, &input_rows) || !as_weight_row(weight, info, &weight_row) || !out ||
      !as_rows(*out, info.output, hidden_size, info.alignment, &out_rows) ||
      !as_elements(scale, kElementType<float>, is_dynamic ? input_rows.count : 1, alignof(float), &scales) ||
      !as_float(args[3], &eps) || !(eps >= 0) || !as_optional_bool(args[4], true, &enable_pdl) ||
      !same_shape_and_device(*input, *out) || !same_device(*input, *weight) || !same_device(*input, *scale) ||
      !kernel.runs_on(input->device))
    return Outcome::kRefused;
  if (info.has_residual &&
      (!as_input_rows(residual, info, &residual_rows) || !same_shape_and_device(*input, *residual)))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  if (!is_writable(out_rows, hidden_size, weight_row) || extents_overlap(out_rows, input_rows) ||
      extents_overlap(out_rows, scales))
    return Outcome::kRefused;
  if (is_dynamic && (extents_overlap(scales, input_rows) || extents_overlap(scales, weight_row)))
    return Outcome::kRefused;
  if (info.has_residual && (!is_writable(residual_rows, hidden_size, weight_row) ||
                            rows_overlap(input_rows, info.input, residual_rows, info.input, hidden_size) ||
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
  return kernel.launch(params, input->device, enable_pdl);
}

// rmsnorm_quant_fp8(input, weight, out, scale, eps, enable_pdl). src/jitnorm/rmsnorm_quant_fp8.py explains refused
// calls. A static scale is read; dynamic scales are written, one per row.
template <typename Kernel>
Outcome rmsnorm_quant_fp8(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  return num_args == 6 ? norm_quant_fp8(kernel, as_tensor(args[0]), nullptr, args + 1) : Outcome::kRefused;
}

// fused_add_rmsnorm_quant_fp8(input, residual, weight, out, scale, eps, enable_pdl): likewise.
template <typename Kernel>
Outcome fused_add_rmsnorm_quant_fp8(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 7) return Outcome::kRefused;
  return norm_quant_fp8(kernel, as_tensor(args[0]), as_tensor(args[1]), args + 2);
}

// Sets `strides` to those of `rows`, in elements.
inline void set_strides(const StridedRows& rows, ElementType type, index_t (&strides)[kMaxLeadingDims]) {
  for (int dim = 0; dim < kMaxLeadingDims; dim++) strides[dim] = rows.strides[dim] / type.bytes();
}

// The norms of policies with kIsGeneral. `args` are those of general_rmsnorm; `mean` and `scale` may be null.
template <typename Kernel>
Outcome general_norm(const Kernel& kernel, const TVMFFIAny* args, const DLTensor* mean, const DLTensor* scale) {
  const RMSNormInfo& info = kernel.info();
  const DLTensor *input = as_tensor(args[0]), *residual = as_tensor(args[1]), *weight = as_tensor(args[2]),
                 *bias = as_tensor(args[3]), *out = as_tensor(args[4]), *rstd = as_tensor(args[5]);
  double eps;
  bool enable_pdl;
  if (!input || !out || info.has_residual != (residual != nullptr) || info.has_weight != (weight != nullptr) ||
      info.has_bias != (bias != nullptr) || (rstd == nullptr) != (args[5].type_index == kTVMFFINone) ||
      (info.quantisation == Quantisation::kStatic) != (scale != nullptr) || !as_float(args[6], &eps) || !(eps >= 0) ||
      !as_optional_bool(args[7], true, &enable_pdl) || !kernel.runs_on(input->device))
    return Outcome::kRefused;
  const DLTensor* const others[] = {residual, weight, bias, out, rstd, mean, scale};
  for (const DLTensor* tensor : others)
    if (tensor && !same_device(*input, *tensor)) return Outcome::kRefused;
  if (!same_shape(*input, *out) || (residual && !same_shape(*input, *residual)) || (weight && weight->ndim > 2) ||
      (bias && bias->ndim != 1))
    return Outcome::kRefused;
  StridedRows input_rows, residual_rows, weight_rows, bias_row, out_rows;
  RowsArgument arguments[5] = {{input, info.input, info.alignment, &input_rows},
                               {out, info.output, info.output_alignment, &out_rows}};
  int count = 2;
  if (residual) arguments[count++] = {residual, info.residual, info.residual_alignment, &residual_rows};
  if (weight) arguments[count++] = {weight, info.weight, info.weight_alignment, &weight_rows};
  if (bias) arguments[count++] = {bias, info.weight, info.weight_alignment, &bias_row};
  if (!as_merged_rows(arguments, count, info.hidden_size)) return Outcome::kRefused;
  const index_t num_rows = input_rows.is_empty ? 0 : input_rows.counts[0] * input_rows.counts[1] * input_rows.counts[2];
  Rows rstd_elements{}, mean_elements{}, scale_element{};
  if (num_rows > kMaxDividend ||
      (rstd && !as_elements(rstd, kElementType<float>, num_rows, alignof(float), &rstd_elements)) ||
      (mean && !as_elements(mean, kElementType<float>, num_rows, alignof(float), &mean_elements)) ||
      (scale && !as_elements(scale, kElementType<float>, 1, alignof(float), &scale_element)))
    return Outcome::kRefused;
  if (input_rows.is_empty) return Outcome::kDone;
  const StridedRows rstd_row = rstd ? as_one_row(*rstd) : StridedRows{};
  const StridedRows mean_row = mean ? as_one_row(*mean) : StridedRows{};
  const StridedRows scale_row = scale ? as_one_row(*scale) : StridedRows{};
  const StridedRows weight_row = weight ? as_one_row(*weight) : StridedRows{};
  const StridedRows* const read[] = {&weight_row, &bias_row, &scale_row};
  const StridedRows* const all_written[] = {&out_rows, &residual_rows, &rstd_row, &mean_row};
  for (const StridedRows* written : all_written) {
    if (written->is_empty || (written == &residual_rows && info.has_gate)) continue;
    if (!rows_are_disjoint(*written)) return Outcome::kRefused;
    for (const StridedRows* other : read)
      if (!other->is_empty && written->data < other->end && other->data < written->end) return Outcome::kRefused;
  }
  if (!are_same_rows(input_rows, out_rows) && share_memory(input_rows, out_rows)) return Outcome::kRefused;
  if (residual &&
      ((!info.has_gate && share_memory(residual_rows, input_rows)) || share_memory(residual_rows, out_rows)))
    return Outcome::kRefused;
  const StridedRows* const rows_of_tokens[] = {&input_rows, &out_rows, &residual_rows};
  for (const StridedRows* other : rows_of_tokens)
    if ((rstd && share_memory(rstd_row, *other)) || (mean && share_memory(mean_row, *other))) return Outcome::kRefused;
  if (mean && share_memory(mean_row, rstd_row)) return Outcome::kRefused;
  GeneralRMSNormParams params{};
  params.input = input_rows.data;
  params.weight = weight_rows.data;
  params.out = out_rows.data;
  params.eps = static_cast<float>(eps);
  params.num_rows = num_rows;
  params.residual = residual_rows.data;
  params.bias = bias_row.data;
  params.rstd = reinterpret_cast<float*>(rstd_elements.data);
  params.mean = reinterpret_cast<float*>(mean_elements.data);
  params.scale = reinterpret_cast<float*>(scale_element.data);
  for (int dim = 0; dim < kMaxLeadingDims; dim++) {
    params.counts[dim] = static_cast<unsigned>(input_rows.counts[dim]);
    params.divisors[dim] = divisor_of(params.counts[dim]);
  }
  set_strides(input_rows, info.input, params.input_strides);
  set_strides(out_rows, info.output, params.out_strides);
  set_strides(residual_rows, info.residual, params.residual_strides);
  set_strides(weight_rows, info.weight, params.weight_strides);
  return kernel.launch(params, input->device, enable_pdl);
}

// general_rmsnorm(input, residual, weight, bias, out, rstd, eps, enable_pdl). All but input, out and eps may be None,
// as the policy says. With a residual, input + residual is normalised and replaces the residual; `out` may be the
// input. src/jitnorm/general_rmsnorm.py explains refused calls.
template <typename Kernel>
Outcome general_rmsnorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  return num_args == 8 ? general_norm(kernel, args, nullptr, nullptr) : Outcome::kRefused;
}

// gated_rmsnorm(input, gate, weight, out, eps, enable_pdl), for kernels of Gated, whose rows are groups of adjacent
// elements of the last dimension. The weight is that of the whole dimension, of each group alike, or None.
// src/jitnorm/gated_rmsnorm.py explains refused calls.
template <typename Kernel>
Outcome gated_rmsnorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 6 || !kernel.info().has_gate) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *weight = as_tensor(args[2]);
  if ((weight == nullptr) != (args[2].type_index == kTVMFFINone)) return Outcome::kRefused;
  if (input && weight && (weight->ndim != 1 || input->ndim < 1)) return Outcome::kRefused;
  GroupedTensor groups[4];
  TVMFFIAny tensors[4];
  for (int i = 0; i < 4; i++) {
    tensors[i] = args[i];
    const DLTensor* tensor = as_tensor(args[i]);
    if (!tensor) continue;
    if (!groups[i].set(*tensor, kernel.info().hidden_size)) return Outcome::kRefused;
    tensors[i].type_index = kTVMFFIDLTensorPtr;
    tensors[i].v_ptr = &groups[i].tensor;
  }
  TVMFFIAny none{};
  none.type_index = kTVMFFINone;
  const TVMFFIAny general[] = {tensors[0], tensors[1], tensors[2], none, tensors[3], none, args[4], args[5]};
  return general_rmsnorm(kernel, general, 8);
}

// layernorm(input, None, weight, bias, out, rstd, eps, enable_pdl, mean, scale), for policies with kSubtractsMean. The
// scale is None unless the output is e4m3. src/jitnorm/layernorm.py explains refused calls.
template <typename Kernel>
Outcome layernorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 10) return Outcome::kRefused;
  const DLTensor *mean = as_tensor(args[8]), *scale = as_tensor(args[9]);
  if ((mean == nullptr) != (args[8].type_index == kTVMFFINone)) return Outcome::kRefused;
  return general_norm(kernel, args, mean, scale);
}

}  // namespace jitnorm
#endif
