// As few_rows.h, for the kernel class that reads its operands by TMA. Included by few_rows_wgmma.cuh.
#pragma once
#include "gemm/few_rows.h"

namespace jitnorm {

// The elements of k in a box. They take 128 bytes, the width of the swizzle in shared memory.
constexpr int kBoxK = 64;

// The rows of x in a box: the swizzle repeats every 8 rows.
JITNORM_HOST_DEVICE constexpr int box_rows(int num_rows) { return (num_rows + 7) / 8 * 8; }

struct FewRowsWgmmaParams {
  TensorMap x, weight;
  void* out;
  index_t out_stride;  // from row to row, in elements
  int num_rows;
};

}  // namespace jitnorm

#ifndef __CUDACC__
namespace jitnorm {

inline Grid grid_of(const FewRowsGemmInfo& info, const FewRowsWgmmaParams&) { return grid_of_few_rows(info); }

// few_rows_wgmma(x, weight, out, enable_pdl).
template <typename Kernel>
Outcome few_rows_wgmma(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  FewRowsOperands operands;
  if (!check_few_rows(kernel, args, num_args, &operands)) return Outcome::kRefused;
  if (operands.x.count == 0) return Outcome::kDone;
  const FewRowsGemmInfo& info = kernel.info();
  FewRowsWgmmaParams params{};
  params.out = operands.out.data;
  params.out_stride = operands.out.stride;
  params.num_rows = static_cast<int>(operands.x.count);
  if (!kernel.encode_tensor_map(operands.x, info.k, kBoxK, box_rows(params.num_rows), &params.x) ||
      !kernel.encode_tensor_map(operands.weight, info.k, kBoxK, info.columns * info.out_columns / info.n,
                                &params.weight))
    return Outcome::kRefused;
  return kernel.launch(params, operands.device, operands.enable_pdl);
}

}  // namespace jitnorm
#endif
