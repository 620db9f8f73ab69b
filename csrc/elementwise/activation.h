// Activations, with a product, such as out = activation(gate) * up, and without: the parameter struct of their kernel
// classes and, for the host compiler, the bindings function that fills it in. Included by activation.cuh and
// activation_cpu.h.
#pragma once
#include "jitnorm/activation_formulas.h"
#include "jitnorm/kernel_info.h"

namespace jitnorm {

constexpr int kMaxWidth = 1 << 30;  // a row of the input has up to 2 * width elements; kernels count columns in int
constexpr int kMaxParameters = 3;   // of a formula

struct ActivationParams {
  const void* input;
  void* out;             // rows of `width` elements
  index_t input_stride;  // in elements, like out_stride
  index_t out_stride;
  index_t num_rows;
  int width;
  bool has_int64_experts;  // otherwise int32
  bool has_counts;
  // One number for expert_step rows each; null to skip no row. With has_counts it is the number of rows to compute, the
  // first of each expert_step; otherwise the expert's id, and rows of expert -1 are skipped.
  const void* experts;
  index_t expert_step;
  float parameters[kMaxParameters];  // of the formula
};

struct ActivationInfo {
  LaunchInfo launch;
  ElementType input;
  unsigned alignment;
  int vector_bytes;        // of an access
  int vectors_per_thread;  // of the output
  int operands;            // elements of the input for each of the output: 1, or 2 for gate and up
  int num_parameters;
  bool has_limit;

  template <typename Kernel>
  static constexpr ActivationInfo of() {
    ActivationInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.vector_bytes = Kernel::kVectorBytes;
    info.vectors_per_thread = Kernel::kVectorsPerThread;
    info.operands = Kernel::formula_t::kOperands == Operands::kSingle ? 1 : 2;
    info.num_parameters = Kernel::formula_t::kNumParameters;
    info.has_limit = Kernel::formula_t::kHasLimit;
    return info;
  }
};

// Whether the row is neither read nor written.
JITNORM_HOST_DEVICE bool is_skipped(const ActivationParams& p, index_t row) {
  if (!p.experts) return false;
  const index_t i = row / p.expert_step;
  const index_t number =
      p.has_int64_experts ? static_cast<const index_t*>(p.experts)[i] : static_cast<const int*>(p.experts)[i];
  return p.has_counts ? row - i * p.expert_step >= number : number == -1;
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const ActivationInfo& info, const ActivationParams& p) {
  return grid_over_columns(p.num_rows, p.width * info.input.bytes() / info.vector_bytes, info.vectors_per_thread,
                           info.launch.threads);
}

// activation(input, out, expert_ids, expert_step, enable_pdl), for a formula with parameters or a call with counts
// followed by num_tokens_per_expert and the parameters. src/jitnorm/activation.py explains refused calls.
template <typename Kernel>
Outcome activation(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const ActivationInfo& info = kernel.info();
  const index_t element_bytes = info.input.bytes();
  const bool is_short = num_args == 5 && info.num_parameters == 0;
  if (!is_short && num_args != 6 + info.num_parameters) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *experts = nullptr;
  if (!input || !out || out->ndim == 0) return Outcome::kRefused;
  const index_t width = out->shape[out->ndim - 1], row_bytes = width * element_bytes;
  Rows input_rows, out_rows;
  index_t expert_step;
  bool enable_pdl;
  if (width < 1 || width > kMaxWidth || row_bytes % 4 != 0 || vector_bytes(row_bytes) != info.vector_bytes ||
      !as_rows(*input, info.input, info.operands * width, info.alignment, &input_rows) ||
      !as_rows(*out, info.input, width, info.alignment, &out_rows) || !same_leading_shape(*input, *out) ||
      !same_device(*input, *out) || !kernel.runs_on(input->device) || !as_int(args[3], &expert_step) ||
      expert_step < 1 || !as_optional_bool(args[4], true, &enable_pdl))
    return Outcome::kRefused;
  ActivationParams params{};
  for (int i = 0; i < info.num_parameters; i++) {
    double parameter;
    if (!as_float(args[6 + i], &parameter) || (i == 0 && info.has_limit && !(parameter >= 0))) return Outcome::kRefused;
    params.parameters[i] = static_cast<float>(parameter);
  }
  const bool has_ids = args[2].type_index != kTVMFFINone;
  const bool has_counts = !is_short && args[5].type_index != kTVMFFINone;
  if (has_ids && !(experts = as_indices(args[2], input->device))) return Outcome::kRefused;
  if (has_counts) {
    if (has_ids || input->ndim != 3 || !(experts = as_indices(args[5], input->device)) ||
        experts->shape[0] != input->shape[0])
      return Outcome::kRefused;
    expert_step = input->shape[1];
  }
  const index_t rows = input_rows.count;
  if (has_ids && experts->shape[0] < rows / expert_step + (rows % expert_step != 0)) return Outcome::kRefused;
  if (rows == 0) return Outcome::kDone;
  const Rows expert_rows = experts ? index_rows(*experts) : Rows{};
  if (!rows_are_disjoint(out_rows, width) ||
      rows_overlap(input_rows, info.operands * row_bytes, element_bytes, out_rows, row_bytes, element_bytes) ||
      (experts && extents_overlap(out_rows, expert_rows)))
    return Outcome::kRefused;
  params.input = input_rows.data;
  params.out = out_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  params.num_rows = rows;
  params.width = static_cast<int>(width);
  params.has_int64_experts = experts && experts->dtype.bits == 64;
  params.has_counts = has_counts;
  params.experts = expert_rows.data;
  params.expert_step = expert_step;
  return kernel.launch(params, input->device, enable_pdl);
}

}  // namespace jitnorm
#endif
