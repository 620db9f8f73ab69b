// RMSNorm of the heads of q and k on CUDA, in one launch: the threads of a block are shared out over heads as they
// come, q's or k's, so that blocks are full whatever the numbers of heads.
#pragma once
#include "elementwise/qknorm.h"
#include "jitnorm/launch.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

template <int kHeadDim, typename T, typename W = T, typename S = typename DefaultSchedule<kHeadDim, T, Plain>::type>
struct QKNormKernel : RMSNormCuda<kHeadDim, T, W, Plain, S> {
  using params_t = QKNormParams;
  using Base = RMSNormCuda<kHeadDim, T, W, Plain, S>;
  // Finding its row costs a thread two registers more than the norms' kernels have, and with them two blocks of twelve.
  static constexpr int kMinBlocks = at_least_one(least(48 * 1024 / Base::kReadBytes, Base::kMostBlocks));

#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const QKNormParams& p) {
    RowPart<QKNormKernel> part(threadIdx.x % S::kThreadsPerRow);
    const unsigned row = blockIdx.x * S::kRowsPerBlock + threadIdx.x / S::kThreadsPerRow;
    const auto [x, weight] = head_of<T, W>(p, row);
    // Threads without a row still join the sum.
    const bool exists = S::kRowsPerBlock == 1 || row < unsigned(p.num_tokens);
    if (exists && p.eps >= 0) before_wait(x, p.q_weight, p.k_weight);
    wait_for_previous();
    if (exists) part.read(part.x, x);
    part.read(part.weight, weight);
    let_next_start();
    const float squares = sum(exists ? part.sum_of_squares() : 0.f);
    const float scale = inverse_root<T>(mean_plus_eps<QKNormKernel>(squares, p.eps));
    if (exists) part.write(x, scale);
  }

 private:
  // Over the threads of a row.
  static __device__ __forceinline__ float sum(float value) {
    if constexpr (S::kThreadsPerRow <= kWarpSize) {
      return warp_sum<S::kThreadsPerRow>(value);
    } else {
      constexpr int kWarps = S::kThreadsPerRow / kWarpSize;
      __shared__ alignas(16) float partial[S::kRowsPerBlock][kWarps];
      const int warp = threadIdx.x / kWarpSize;
      return block_sum<kWarps>(value, partial[warp / kWarps], warp % kWarps);
    }
  }
#endif
};

}  // namespace jitnorm
