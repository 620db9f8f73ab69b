// The product of a few rows and the transpose of a weight, out = x @ weight^T, or with the formula of an activation:
// what its two kernel classes have in common, the parameter struct of one and, for the host compiler, the bindings
// function that fills it in. Included by few_rows.cuh and few_rows_wgmma.h.
#pragma once
#include "jitnorm/activation_formulas.h"
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// The formula of a kernel class without an activation: the result has the products as they are. With a formula of two
// operands, the first half of the weight's rows are those of gates, the second half those of their factors.
struct NoActivation : FormulaDefaults {
  static constexpr Operands kOperands = Operands::kSingle;
};
template <typename Formula>
constexpr bool kIsGated = Formula::kOperands == Operands::kHalves;

struct FewRowsGemmParams {
  const void* x;
  const void* weight;
  void* out;
  index_t x_stride;  // from row to row, in elements, like out_stride
  index_t out_stride;
  int num_rows;
};

struct FewRowsGemmInfo {
  LaunchInfo launch;
  ElementType input;
  unsigned alignment;
  int n, k;         // the weight is [n, k]
  int out_columns;  // n, or n / 2 with an activation
  int max_rows;
  int columns;  // of the n, of a block or of a cluster whose blocks share k

  template <typename Kernel>
  static constexpr FewRowsGemmInfo of() {
    FewRowsGemmInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.n = Kernel::kN;
    info.k = Kernel::kK;
    info.out_columns = Kernel::kOutColumns;
    info.max_rows = Kernel::kMaxRows;
    info.columns = Kernel::kColumns;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

// The checked operands of a call (x, weight, out, enable_pdl).
struct FewRowsOperands {
  Rows x, weight, out;
  DLDevice device;
  bool enable_pdl;
};

// Returns whether the kernel takes the operands.
template <typename Kernel>
bool check_few_rows(const Kernel& kernel, const TVMFFIAny* args, int num_args, FewRowsOperands* operands) {
  const FewRowsGemmInfo& info = kernel.info();
  if (num_args != 4) return false;
  const DLTensor *x = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  auto& [x_rows, weight_rows, out_rows, device, enable_pdl] = *operands;
  if (!x || !weight || !out || weight->ndim != 2 || !as_rows(*x, info.input, info.k, info.alignment, &x_rows) ||
      !as_rows(*weight, info.input, info.k, info.alignment, &weight_rows) ||
      !as_rows(*out, info.input, info.out_columns, info.alignment, &out_rows) || !same_leading_shape(*x, *out) ||
      !same_device(*x, *weight) || !same_device(*x, *out) || !kernel.runs_on(x->device) ||
      weight_rows.count != info.n || weight_rows.stride != info.k || x_rows.count > info.max_rows ||
      !as_optional_bool(args[3], true, &enable_pdl))
    return false;
  device = x->device;
  const index_t element_bytes = info.input.bytes(), row_bytes = info.k * element_bytes,
                out_bytes = info.out_columns * element_bytes;
  return rows_are_disjoint(out_rows, info.out_columns) &&
         !rows_overlap(x_rows, row_bytes, element_bytes, out_rows, out_bytes, element_bytes) &&
         !rows_overlap(weight_rows, row_bytes, element_bytes, out_rows, out_bytes, element_bytes);
}

inline Grid grid_of_few_rows(const FewRowsGemmInfo& info) {
  Grid grid = grid_of_blocks(info.n, info.columns, info.launch.threads);
  grid.x *= info.launch.blocks_per_cluster;
  return grid;
}

inline Grid grid_of(const FewRowsGemmInfo& info, const FewRowsGemmParams&) { return grid_of_few_rows(info); }

// few_rows_gemm(x, weight, out, enable_pdl).
template <typename Kernel>
Outcome few_rows_gemm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  FewRowsOperands operands;
  if (!check_few_rows(kernel, args, num_args, &operands)) return Outcome::kRefused;
  if (operands.x.count == 0) return Outcome::kDone;
  FewRowsGemmParams params{};
  params.x = operands.x.data;
  params.weight = operands.weight.data;
  params.out = operands.out.data;
  params.x_stride = operands.x.stride;
  params.out_stride = operands.out.stride;
  params.num_rows = static_cast<int>(operands.x.count);
  return kernel.launch(params, operands.device, operands.enable_pdl);
}

}  // namespace jitnorm
#endif
