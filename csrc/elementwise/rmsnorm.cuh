// The RMSNorm family on CUDA: a block takes a row or, where they are short, several.
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/launch.h"
#include "jitnorm/quantise.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

#ifdef __CUDACC__
// The whole life of a block, for both kernels. `sum` adds up one float over the threads of a row, and `max` finds the
// largest.
template <typename Kernel, GridLength kGrid, typename Sum, typename Max>
__device__ __forceinline__ void rmsnorm_block(const RMSNormParams& p, Sum sum, Max max) {
  using T = typename Kernel::input_t;
  using W = typename Kernel::weight_t;
  using Out = typename Kernel::output_t;
  constexpr bool kAddResidual = Kernel::policy_t::kAddResidual;
  constexpr Quantise kQuantise = Kernel::policy_t::kQuantise;
  RowPart<Kernel> part(threadIdx.x % Kernel::kThreadsPerRow);
  const index_t token = index_t(blockIdx.x) * Kernel::kRowsPerBlock + threadIdx.x / Kernel::kThreadsPerRow;
  const T* row = static_cast<const T*>(p.input) + token * p.input_stride;
  T* residual = static_cast<T*>(p.residual) + token * p.residual_stride;
  const W* weight = static_cast<const W*>(p.weight);
  Out* out = static_cast<Out*>(p.out) + token * p.out_stride;
  const bool exists = Kernel::kRowsPerBlock == 1 || token < p.num_tokens;  // threads without a row still join the sum
  // Before the wait, the misses that no earlier kernel can affect: parameters, and addresses' translations.
  if (exists && p.eps >= 0) before_wait(row, weight, kAddResidual ? static_cast<void*>(residual) : out);
  wait_for_previous();
  if (exists) part.read(part.x, row);
  if (kAddResidual && exists) part.read(part.residual, residual);
  part.read(part.weight, weight);
  const float given = kQuantise == Quantise::kWithGivenScale ? load(p.scale) : 1;
  if (kGrid != GridLength::kShort) let_next_start();
  // Of the last block some rows may not exist.
  if (kGrid == GridLength::kLong && part.lane == 0 && blockIdx.x + Kernel::kBlocksAhead < gridDim.x - 1) {
    constexpr index_t kRowsAhead = index_t(Kernel::kBlocksAhead) * Kernel::kRowsPerBlock;
    prefetch<Kernel::kRowBytes>(row + kRowsAhead * p.input_stride);
    if (kAddResidual) prefetch<Kernel::kRowBytes>(residual + kRowsAhead * p.residual_stride);
  }
  if (kAddResidual && exists) part.add_residual(residual);
  const float squares = sum(exists ? part.sum_of_squares() : 0.f);
  if (kGrid == GridLength::kShort) let_next_start();
  const float scale = inverse_root<T>(mean_plus_eps<Kernel>(squares, p.eps));
  if constexpr (kQuantise == Quantise::kNot) {
    if (exists) part.write(out, scale);
  } else if constexpr (kQuantise == Quantise::kWithGivenScale) {
    if (exists) part.write(out, scale, Divisor(given));
  } else {
    const float found = scale_of(max(exists ? part.largest_magnitude(scale) : 0.f), kLeastTokenScale);
    if (exists) part.write(out, scale, Divisor(found));
    if (exists && part.lane == 0) p.scale[token] = found;
  }
}
#endif

// hidden_size up to 256: the threads of one warp, or some of them, share a row, and several rows share a block.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain,
          typename S = typename DefaultSchedule<kHiddenSize, T, Policy>::type>
struct RMSNormWarpKernel : RMSNormCuda<kHiddenSize, T, W, Policy, S> {
  using params_t = RMSNormParams;
#ifdef __CUDACC__
  template <GridLength kGrid>
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    rmsnorm_block<RMSNormWarpKernel, kGrid>(
        params, [](float part) { return warp_sum<S::kThreadsPerRow>(part); },
        [](float part) { return warp_max<S::kThreadsPerRow>(part); });
  }
#endif
};

// hidden_size from 512: whole warps share a row, and a block has one row or, up to 1024, a few.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain,
          typename S = typename DefaultSchedule<kHiddenSize, T, Policy>::type>
struct RMSNormKernel : RMSNormCuda<kHiddenSize, T, W, Policy, S> {
  using params_t = RMSNormParams;
#ifdef __CUDACC__
  template <GridLength kGrid>
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    constexpr int kWarps = S::kThreadsPerRow / kWarpSize;
    __shared__ alignas(16) float partial[S::kRowsPerBlock][kWarps];
    __shared__ alignas(16) float partial_max[S::kRowsPerBlock][kWarps];
    rmsnorm_block<RMSNormKernel, kGrid>(
        params,
        [&](float part) {
          const int warp = threadIdx.x / kWarpSize;
          return block_sum<kWarps>(part, partial[warp / kWarps], warp % kWarps);
        },
        [&](float part) {
          const int warp = threadIdx.x / kWarpSize;
          return block_max<kWarps>(part, partial_max[warp / kWarps], warp % kWarps);
        });
  }
#endif
};

}  // namespace jitnorm
