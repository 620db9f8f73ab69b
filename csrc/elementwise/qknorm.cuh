// RMSNorm of the heads of q and k on CUDA, in one launch. A block takes consecutive heads, of q, of k or of both, so
// that blocks are full for any number of heads. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/qknorm.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

template <int kHeadDim, typename T, typename W = T, typename S = typename DefaultSchedule<kHeadDim, T, Plain>::type>
struct QKNormKernel : RMSNormKernelBase<kHeadDim, T, W, Plain, S> {
  using params_t = QKNormParams;
  using info_t = QKNormInfo;
  using Base = RMSNormKernelBase<kHeadDim, T, W, Plain, S>;
  // To find its row, a thread needs two registers more than in the kernels of the other norms, so that only 10 blocks
  // instead of 12 would fit an SM. Asking for 48 KiB of rows in flight limits the registers again.
  static constexpr int kMinBlocksPerSM = max(1, min(48 * 1024 / Base::kBlockReadBytes, Base::kMaxBlocksPerSM));
  static constexpr int kMinBlocksPerSMOfLargeGrid = kMinBlocksPerSM;

  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const QKNormParams& p) {
    RowFragment<QKNormKernel> fragment(threadIdx.x % S::kThreadsPerRow);
    const unsigned row = blockIdx.x * S::kRowsPerBlock + threadIdx.x / S::kThreadsPerRow;
    const auto [x, weight] = head_of<T, W>(p, row);
    // The last block may have threads without a row, which still take part in the sum.
    const bool has_row = S::kRowsPerBlock == 1 || row < unsigned(p.num_rows);
    // eps >= 0 is always true. The condition makes the compiler load the parameters before griddepcontrol.wait.
    if (has_row && p.eps >= 0) prefetch_before_wait(x, p.q_weight, p.k_weight);
    grid_dependency_wait();
    if (has_row) fragment.load(fragment.x, x);
    fragment.load(fragment.weight, weight);
    if (kVariant != GridVariant::kSmallGrid) launch_dependents();
    if (kVariant == GridVariant::kLargeGrid && fragment.thread_in_row == 0 &&
        blockIdx.x + Base::kBlocksAhead < gridDim.x - 1)
      prefetch<Base::kRowBytes>(head_of<T, W>(p, row + Base::kBlocksAhead * S::kRowsPerBlock).row);
    const float squares = row_sum<S::kThreadsPerRow, S::kRowsPerBlock>(has_row ? fragment.sum_of_squares() : 0.f);
    if (kVariant == GridVariant::kSmallGrid) launch_dependents();
    const float rstd = rstd_of<T>(mean_plus_eps<QKNormKernel>(squares, p.eps));
    if (has_row) fragment.write(x, rstd);
  }
};

}  // namespace jitnorm
