// Two RMSNorms of different widths in one launch: the parameter struct of the kernel classes and, for the host
// compiler, the bindings function that fills it in. Included by dual_rmsnorm.cuh and dual_rmsnorm_cpu.h.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// One of the two norms.
struct NormParams {
  const void* input;
  const void* weight;
  void* out;             // may be `input`
  index_t input_stride;  // in elements, like out_stride
  index_t out_stride;
  float eps;
};

struct DualRMSNormParams {
  NormParams norms[2];
  index_t num_rows;       // of each norm
  unsigned first_blocks;  // of the grid: those of the first norm, which come before those of the second
};

struct DualRMSNormInfo {
  LaunchInfo launch;
  ElementType input, weight;
  unsigned alignment;
  int hidden_sizes[2], rows_per_block[2];

  template <typename Kernel>
  static constexpr DualRMSNormInfo of() {
    DualRMSNormInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.weight = kElementType<typename Kernel::weight_t>;
    info.alignment = Kernel::kAlignment;
    for (int i = 0; i < 2; i++) {
      info.hidden_sizes[i] = Kernel::kHiddenSizes[i];
      info.rows_per_block[i] = Kernel::kRowsPerBlock[i];
    }
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline index_t blocks_of(const DualRMSNormInfo& info, int norm, index_t rows) {
  return divide_up(rows, info.rows_per_block[norm]);
}

inline Grid grid_of(const DualRMSNormInfo& info, const DualRMSNormParams& params) {
  const index_t blocks = blocks_of(info, 0, params.num_rows) + blocks_of(info, 1, params.num_rows);
  return grid_of_blocks(blocks, 1, info.launch.threads);
}

// dual_rmsnorm(input1, input2, weight1, weight2, out1, out2, eps1, eps2, enable_pdl). src/jitnorm/dual_rmsnorm.py
// explains refused calls.
template <typename Kernel>
Outcome dual_rmsnorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const DualRMSNormInfo& info = kernel.info();
  bool enable_pdl;
  if (num_args != 9 || !as_optional_bool(args[8], true, &enable_pdl)) return Outcome::kRefused;
  const DLTensor* const first = as_tensor(args[0]);
  const DLTensor* const second = as_tensor(args[1]);
  if (!first || !second || !same_leading_shape(*first, *second) || !kernel.runs_on(first->device))
    return Outcome::kRefused;
  Rows inputs[2], weights[2], outs[2];
  index_t row_bytes[2];
  DualRMSNormParams params{};
  for (int i = 0; i < 2; i++) {
    const DLTensor *input = as_tensor(args[i]), *weight = as_tensor(args[2 + i]), *out = as_tensor(args[4 + i]);
    const index_t hidden_size = info.hidden_sizes[i];
    double eps;
    if (!weight || !out || weight->ndim != 1 || !as_rows(*input, info.input, hidden_size, info.alignment, &inputs[i]) ||
        !as_rows(*weight, info.weight, hidden_size, info.alignment, &weights[i]) ||
        !as_rows(*out, info.input, hidden_size, info.alignment, &outs[i]) || !same_shape(*input, *out) ||
        !as_float(args[6 + i], &eps) || !(eps >= 0) || !same_device(*first, *input) || !same_device(*first, *weight) ||
        !same_device(*first, *out))
      return Outcome::kRefused;
    row_bytes[i] = hidden_size * info.input.bytes();
    NormParams& norm = params.norms[i];
    norm.input = inputs[i].data;
    norm.weight = weights[i].data;
    norm.out = outs[i].data;
    norm.input_stride = inputs[i].stride;
    norm.out_stride = outs[i].stride;
    norm.eps = static_cast<float>(eps);
  }
  const index_t num_rows = inputs[0].count;
  if (num_rows == 0) return Outcome::kDone;
  // Blocks of one norm may run before or after those of the other.
  const index_t element_bytes = info.input.bytes();
  for (int i = 0; i < 2; i++) {
    if (!rows_are_disjoint(outs[i], info.hidden_sizes[i])) return Outcome::kRefused;
    for (int j = 0; j < 2; j++) {
      const bool in_place =
          i == j && outs[i].data == inputs[j].data && (outs[i].stride == inputs[j].stride || num_rows == 1);
      if (extents_overlap(outs[i], weights[j]) ||
          (!in_place && rows_overlap(outs[i], row_bytes[i], element_bytes, inputs[j], row_bytes[j], element_bytes)))
        return Outcome::kRefused;
    }
  }
  if (rows_overlap(outs[0], row_bytes[0], element_bytes, outs[1], row_bytes[1], element_bytes))
    return Outcome::kRefused;
  params.num_rows = num_rows;
  params.first_blocks = static_cast<unsigned>(blocks_of(info, 0, num_rows));
  return kernel.launch(params, first->device, enable_pdl);
}

}  // namespace jitnorm
#endif
