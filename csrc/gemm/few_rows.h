// The product of a few rows and the transpose of a weight, out = x @ weight^T: the parameter struct of its kernel class
// and, for the host compiler, the bindings function that fills it in. Included by few_rows.cuh.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

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
  int n, k;  // the weight is [n, k]
  int max_rows;
  int columns_per_block;

  template <typename Kernel>
  static constexpr FewRowsGemmInfo of() {
    FewRowsGemmInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.n = Kernel::kN;
    info.k = Kernel::kK;
    info.max_rows = Kernel::kMaxRows;
    info.columns_per_block = Kernel::kTiles * Kernel::kColumnsPerTile;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const FewRowsGemmInfo& info, const FewRowsGemmParams&) {
  return grid_of_blocks(info.n, info.columns_per_block, info.launch.threads);
}

// few_rows_gemm(x, weight, out, enable_pdl).
template <typename Kernel>
Outcome few_rows_gemm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const FewRowsGemmInfo& info = kernel.info();
  if (num_args != 4) return Outcome::kRefused;
  const DLTensor *x = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  Rows x_rows, weight_rows, out_rows;
  bool enable_pdl;
  if (!x || !weight || !out || weight->ndim != 2 || !as_rows(*x, info.input, info.k, info.alignment, &x_rows) ||
      !as_rows(*weight, info.input, info.k, info.alignment, &weight_rows) ||
      !as_rows(*out, info.input, info.n, info.alignment, &out_rows) || !same_leading_shape(*x, *out) ||
      !same_device(*x, *weight) || !same_device(*x, *out) || !kernel.runs_on(x->device) ||
      weight_rows.count != info.n || weight_rows.stride != info.k || x_rows.count > info.max_rows ||
      !as_optional_bool(args[3], true, &enable_pdl))
    return Outcome::kRefused;
  if (x_rows.count == 0) return Outcome::kDone;
  const index_t element_bytes = info.input.bytes(), row_bytes = info.k * element_bytes,
                out_bytes = info.n * element_bytes;
  if (!rows_are_disjoint(out_rows, info.n) ||
      rows_overlap(x_rows, row_bytes, element_bytes, out_rows, out_bytes, element_bytes) ||
      rows_overlap(weight_rows, row_bytes, element_bytes, out_rows, out_bytes, element_bytes))
    return Outcome::kRefused;
  FewRowsGemmParams params{};
  params.x = x_rows.data;
  params.weight = weight_rows.data;
  params.out = out_rows.data;
  params.x_stride = x_rows.stride;
  params.out_stride = out_rows.stride;
  params.num_rows = static_cast<int>(x_rows.count);
  return kernel.launch(params, x->device, enable_pdl);
}

}  // namespace jitnorm
#endif
