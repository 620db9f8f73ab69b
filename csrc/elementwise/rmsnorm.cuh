// The RMSNorm family on CUDA. A block takes one row or, if rows are short, several; a cluster of blocks takes a long
// row. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/quantise.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

// The work of a block, for both kernel classes. `row_sum` and `row_max` reduce one float over the threads of a row;
// `row_sum` also takes the number of the reduction: 0, or 1 for the second one of a kernel, which needs other memory.
template <typename Kernel, GridVariant kVariant, typename RowSum, typename RowMax>
__device__ __forceinline__ void rmsnorm_block(const typename Kernel::params_t& p, RowSum row_sum, RowMax row_max) {
  using T = typename Kernel::input_t;
  using R = typename Kernel::residual_t;
  using W = typename Kernel::weight_t;
  using Out = typename Kernel::output_t;
  constexpr bool kHasResidual = Kernel::policy_t::kHasResidual, kSubtractsMean = Kernel::policy_t::kSubtractsMean;
  constexpr Gating kGating = Kernel::policy_t::kGating;
  constexpr Quantisation kQuantisation = Kernel::policy_t::kQuantisation;
  constexpr int kBlocksPerCluster = Kernel::kBlocksPerCluster;
  constexpr int kThreadsPerRowInBlock = Kernel::kThreadsPerRow / kBlocksPerCluster;
  constexpr bool kLoadsWeightAfterReduction =
      Kernel::kLoadsWeightAfterReduction && (!kSubtractsMean || kVariant == GridVariant::kLargeGrid);
  RowFragment<Kernel, kLoadsWeightAfterReduction> fragment(threadIdx.x % kThreadsPerRowInBlock +
                                                           blockIdx.x % kBlocksPerCluster * kThreadsPerRowInBlock);
  const index_t row =
      index_t(blockIdx.x / kBlocksPerCluster) * Kernel::kRowsPerBlock + threadIdx.x / kThreadsPerRowInBlock;
  const T* input = static_cast<const T*>(p.input);
  R* residual = static_cast<R*>(p.residual);
  const W* weight = static_cast<const W*>(p.weight);
  Out* out = static_cast<Out*>(p.out);
  [[maybe_unused]] const W* bias = nullptr;
  if constexpr (Kernel::policy_t::kIsGeneral) {
    // Threads without a row read a weight too: that of the last row.
    const RowIndex index = row_index(p, row < p.num_rows ? row : p.num_rows - 1);
    input += offset_of(index, p.input_strides);
    residual += offset_of(index, p.residual_strides);
    out += offset_of(index, p.out_strides);
    weight += offset_of(index, p.weight_strides);
    bias = static_cast<const W*>(p.bias);
  } else {
    input += row * p.input_stride;
    residual += row * p.residual_stride;
    out += row * p.out_stride;
  }
  // The last block may have threads without a row, which still take part in the reductions.
  const bool has_row = Kernel::kRowsPerBlock == 1 || row < p.num_rows;
  // eps >= 0 is always true. The condition makes the compiler load the parameters before griddepcontrol.wait.
  if (has_row && p.eps >= 0) prefetch_before_wait(input, weight, kHasResidual ? static_cast<void*>(residual) : out);
  grid_dependency_wait();
  if (has_row) fragment.load_input(input);
  if constexpr (kHasResidual)
    if (has_row) fragment.load_residual(residual);
  fragment.load_weight_and_bias(weight, bias);
  const float static_scale = kQuantisation == Quantisation::kStatic ? load(p.scale) : 1;
  if (kVariant != GridVariant::kSmallGrid) launch_dependents();
  if constexpr (kVariant == GridVariant::kLargeGrid && Kernel::kHasPrefetch) {
    constexpr index_t kRowsAhead = index_t(Kernel::kBlocksAhead / kBlocksPerCluster) * Kernel::kRowsPerBlock;
    // A cluster has one row. Without clusters, the last block may have fewer rows than others: none prefetches for it.
    if constexpr (kBlocksPerCluster > 1) {
      static_assert(Kernel::kBlocksAhead % kBlocksPerCluster == 0, "a block has the same part of each row");
      const T* input_ahead = input + kRowsAhead * p.input_stride;
      const R* residual_ahead = residual + kRowsAhead * p.residual_stride;
      if (threadIdx.x == 0 && blockIdx.x + Kernel::kBlocksAhead < gridDim.x) {
        const int part = blockIdx.x % kBlocksPerCluster;
        prefetch_part<Kernel::kHiddenSize, kBlocksPerCluster>(input_ahead, part);
        if constexpr (kHasResidual) prefetch_part<Kernel::kHiddenSize, kBlocksPerCluster>(residual_ahead, part);
      }
    } else if (fragment.thread_in_row == 0 && blockIdx.x + Kernel::kBlocksAhead < gridDim.x - 1) {
      prefetch<Kernel::kRowBytes>(input + kRowsAhead * p.input_stride);
      if constexpr (kHasResidual) prefetch<Kernel::kResidualRowBytes>(residual + kRowsAhead * p.residual_stride);
    }
  }
  fragment.wait_for_row();
  if constexpr (kGating == Gating::kBeforeNorm) {
    if (has_row) fragment.multiply_input_by_gate();
  } else if constexpr (kHasResidual && kGating == Gating::kNone) {
    if (has_row) fragment.add_residual(residual);
  }
  if constexpr (kSubtractsMean) fragment.mean = mean_plus_eps<Kernel>(row_sum(has_row ? fragment.sum() : 0.f, 0), 0.f);
  const float squares = row_sum(has_row ? fragment.sum_of_squares() : 0.f, kSubtractsMean ? 1 : 0);
  if (kVariant == GridVariant::kSmallGrid) launch_dependents();
  fragment.block_early_loads();
  const float rstd = rstd_of<T>(mean_plus_eps<Kernel>(squares, p.eps));
  if constexpr (Kernel::policy_t::kIsGeneral) {
    if (has_row && p.rstd && fragment.thread_in_row == 0) p.rstd[row] = rstd;
    if (kSubtractsMean && has_row && p.mean && fragment.thread_in_row == 0) p.mean[row] = fragment.mean;
  }
  if constexpr (kQuantisation == Quantisation::kNone) {
    if (has_row) fragment.write(out, rstd);
  } else if constexpr (kQuantisation == Quantisation::kStatic) {
    if (has_row) fragment.write(out, rstd, ScaleDivider(static_scale));
  } else {
    const float scale = dynamic_scale(row_max(has_row ? fragment.amax(rstd) : 0.f), kMinTokenScale);
    if (has_row) fragment.write(out, rstd, ScaleDivider(scale));
    if (has_row && fragment.thread_in_row == 0) p.scale[row] = scale;
  }
}

// hidden_size up to 256: the threads of one warp, or some of them, share a row, and several rows share a block.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain,
          typename S = typename DefaultSchedule<kHiddenSize, T, Policy>::type>
struct RMSNormWarpKernel : RMSNormKernelBase<kHiddenSize, T, W, Policy, S> {
  using params_t = typename RMSNormParamsOf<Policy::kIsGeneral>::type;
  using info_t = RMSNormInfo;
  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const params_t& params) {
    rmsnorm_block<RMSNormWarpKernel, kVariant>(
        params, [](float value, int) { return warp_sum<S::kThreadsPerRow>(value); },
        [](float value) { return warp_max<S::kThreadsPerRow>(value); });
  }
};

// hidden_size above 256: whole warps share a row, and a block has one row or, up to 1024, a few. The longest rows have
// the blocks of a cluster.
template <int kHiddenSize, typename T, typename W = T, typename Policy = Plain,
          typename S = typename DefaultSchedule<kHiddenSize, T, Policy>::type>
struct RMSNormKernel : RMSNormKernelBase<kHiddenSize, T, W, Policy, S> {
  using params_t = typename RMSNormParamsOf<Policy::kIsGeneral>::type;
  using info_t = RMSNormInfo;
  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const params_t& params) {
    constexpr int kBlocks = S::kBlocksPerCluster;
    static_assert(kBlocks == 1 || Policy::kQuantisation != Quantisation::kDynamicPerToken, "there is no cluster_max");
    constexpr int kWarps = S::kThreadsPerRow / kBlocks / kWarpSize;
    // Each sum has memory of its own, as other threads may still read that of the one before.
    constexpr int kSums = Policy::kSubtractsMean ? 2 : 1;
    __shared__ ClusterSum<kBlocks> cluster_sums[kSums];
    if constexpr (kBlocks > 1) ClusterSum<kBlocks>::init_and_arrive(cluster_sums);
    __shared__ alignas(16) float partial_sums[kSums][S::kRowsPerBlock][kWarps];
    __shared__ alignas(16) float partial_max[S::kRowsPerBlock][kWarps];
    rmsnorm_block<RMSNormKernel, kVariant>(
        params,
        [&](float value, int reduction) {
          const int warp = threadIdx.x / kWarpSize;
          const float sum = block_sum<kWarps>(value, partial_sums[reduction][warp / kWarps], warp % kWarps);
          if constexpr (kBlocks == 1) return sum;
          if (reduction == 0) cluster_wait();
          return cluster_sums[reduction].sum(sum, blockIdx.x % kBlocks);
        },
        [&](float value) {
          const int warp = threadIdx.x / kWarpSize;
          return block_max<kWarps>(value, partial_max[warp / kWarps], warp % kWarps);
        });
  }
};

}  // namespace jitnorm
