// The product of a few rows and the transpose of a weight, out = x @ weight^T: the parameter struct of its kernel class
// and, for the host compiler, the bindings function that fills it in. Included by few_rows.cuh.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

struct FewRowsGemmParams {
  const void* x;
  const void* weight;
  void* out;
  index_t x_stride;  // from row to row, in elements, like out_stride
  index_t out_stride;
  int num_rows;
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

// few_rows_gemm(x, weight, out, enable_pdl).
template <typename Kernel>
Outcome few_rows_gemm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  if (num_args != 4) return Outcome::kRefused;
  const DLTensor *x = as_tensor(args[0]), *weight = as_tensor(args[1]), *out = as_tensor(args[2]);
  Rows x_rows, weight_rows, out_rows;
  bool enable_pdl;
  if (!x || !weight || !out || weight->ndim != 2 || !as_rows<T>(*x, Kernel::kK, Kernel::kAlignment, &x_rows) ||
      !as_rows<T>(*weight, Kernel::kK, Kernel::kAlignment, &weight_rows) ||
      !as_rows<T>(*out, Kernel::kN, Kernel::kAlignment, &out_rows) || !same_leading_shape(*x, *out) ||
      !same_device(*x, *weight) || !same_device(*x, *out) || !runs_on<Kernel>(x->device) ||
      weight_rows.count != Kernel::kN || weight_rows.stride != Kernel::kK || x_rows.count > Kernel::kMaxRows ||
      !as_optional_bool(args[3], true, &enable_pdl))
    return Outcome::kRefused;
  if (x_rows.count == 0) return Outcome::kDone;
  constexpr index_t row_bytes = index_t(Kernel::kK) * sizeof(T), out_bytes = index_t(Kernel::kN) * sizeof(T);
  if (!rows_are_disjoint(out_rows, Kernel::kN) ||
      rows_overlap(x_rows, row_bytes, sizeof(T), out_rows, out_bytes, sizeof(T)) ||
      rows_overlap(weight_rows, row_bytes, sizeof(T), out_rows, out_bytes, sizeof(T)))
    return Outcome::kRefused;
  FewRowsGemmParams params{};
  params.x = x_rows.data;
  params.weight = weight_rows.data;
  params.out = out_rows.data;
  params.x_stride = x_rows.stride;
  params.out_stride = out_rows.stride;
  params.num_rows = static_cast<int>(x_rows.count);
  return launch<Kernel>(params, x->device, enable_pdl);
}

}  // namespace jitnorm
#endif
