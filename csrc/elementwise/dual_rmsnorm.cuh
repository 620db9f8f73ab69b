// Two RMSNorms of different widths on CUDA, in one launch. The first blocks of the grid take rows of one norm, the
// others rows of the other, each with the schedule of its width, so that the bits are those of two launches. A block of
// 128 threads takes one row of 1536 elements in 16 bits, or four of 512. Included by generated sources
// (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/dual_rmsnorm.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

// The threads of a block with as many rows as one of the norm alone, in whole warps.
template <int kHiddenSize, typename T>
constexpr int threads_of_norm() {
  using S = typename DefaultSchedule<kHiddenSize, T, Plain>::type;
  return round_up(S::kThreadsPerRow * S::kRowsPerBlock, kWarpSize);
}

// The schedule of a row alone, with as many rows as fit a block of kBlockThreads.
template <int kHiddenSize, typename T, int kBlockThreads>
struct ScheduleOfDual {
  using Alone = typename DefaultSchedule<kHiddenSize, T, Plain>::type;
  static_assert(Alone::kBlocksPerCluster == 1 && !Alone::kRowInSharedMemory, "a row is in the registers of one block");
  using type = Schedule<Alone::kThreadsPerRow, kBlockThreads / Alone::kThreadsPerRow>;
};

// One of the two norms.
template <int kHiddenSize, typename T, typename W, int kBlockThreads,
          typename S = typename ScheduleOfDual<kHiddenSize, T, kBlockThreads>::type>
struct NormOfDual : RMSNormKernelBase<kHiddenSize, T, W, Plain, S> {
  static constexpr bool kHasIdleThreads = kBlockThreads % S::kThreadsPerRow != 0;

  // `block` counts the blocks of this norm, of which there are `num_blocks`.
  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const NormParams& p, index_t num_rows, unsigned block,
                                             unsigned num_blocks) {
    using Norm = NormOfDual;
    RowFragment<Norm> fragment(threadIdx.x % S::kThreadsPerRow);
    const int row_of_block = threadIdx.x / S::kThreadsPerRow;
    const index_t row = index_t(block) * S::kRowsPerBlock + row_of_block;
    const T* input = static_cast<const T*>(p.input) + row * p.input_stride;
    const W* weight = static_cast<const W*>(p.weight);
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    // Threads without a row take part in the reductions: those left over, and in the last block others too.
    const bool has_row =
        (S::kRowsPerBlock == 1 || row < num_rows) && (!kHasIdleThreads || row_of_block < S::kRowsPerBlock);
    // eps >= 0 is always true. The condition makes the compiler load the parameters before griddepcontrol.wait.
    if (has_row && p.eps >= 0) prefetch_before_wait(input, weight, out, block);
    grid_dependency_wait();
    if (has_row) fragment.load(fragment.x, input);
    fragment.load(fragment.weight, weight);
    if (kVariant != GridVariant::kSmallGrid) launch_dependents();
    if constexpr (kVariant == GridVariant::kLargeGrid && Norm::kHasPrefetch)
      if (has_row && fragment.thread_in_row == 0 && block + Norm::kBlocksAhead < num_blocks - 1)
        prefetch<Norm::kRowBytes>(input + index_t(Norm::kBlocksAhead) * S::kRowsPerBlock * p.input_stride);
    const float squares =
        row_sum<S::kThreadsPerRow, S::kRowsPerBlock + kHasIdleThreads>(has_row ? fragment.sum_of_squares() : 0.f);
    if (kVariant == GridVariant::kSmallGrid) launch_dependents();
    const float rstd = rstd_of<T>(mean_plus_eps<Norm>(squares, p.eps));
    if (has_row) fragment.write(out, rstd);
  }
};

template <int kFirstSize, int kSecondSize, typename T, typename W = T>
struct DualRMSNormKernel : NoClusters {
  using input_t = T;
  using weight_t = W;
  using params_t = DualRMSNormParams;
  using info_t = DualRMSNormInfo;
  static constexpr int kThreads = max(threads_of_norm<kFirstSize, T>(), threads_of_norm<kSecondSize, T>());
  using First = NormOfDual<kFirstSize, T, W, kThreads>;
  using Second = NormOfDual<kSecondSize, T, W, kThreads>;
  static constexpr int kHiddenSizes[2] = {kFirstSize, kSecondSize};
  static constexpr int kRowsPerBlock[2] = {First::kRowsPerBlock, Second::kRowsPerBlock};
  static constexpr unsigned kAlignment = 16;
  static_assert(First::kAlignment == 16 && Second::kAlignment == 16 && First::kWeightAlignment == 16 &&
                    Second::kWeightAlignment == 16,
                "rows are whole vectors");
  // What the norm with more registers asks for, as far as the threads of this block leave it registers.
  static constexpr int kRegistersPerThread = max(First::kRegistersPerThread, Second::kRegistersPerThread);
  static constexpr int kMaxBlocksPerSM =
      min(kRegistersPerSM / (kRegistersPerThread * kThreads), kMinResidentThreadsPerSM / kThreads);
  static constexpr int kMinBlocksPerSM =
      max(1, min(min(First::kMinBlocksPerSM, Second::kMinBlocksPerSM), kMaxBlocksPerSM));
  static constexpr unsigned kMaxSmallGrid = max(First::kMaxSmallGrid, Second::kMaxSmallGrid);
  // As many blocks as read what a large grid of one norm reads. A block reads the mean of both norms' rows.
  static constexpr int kBlockReadBytes = index_t(First::kRowBytes + Second::kRowBytes) * First::kRowsPerBlock *
                                         Second::kRowsPerBlock / (First::kRowsPerBlock + Second::kRowsPerBlock);
  static constexpr unsigned kMinLargeGrid =
      First::kHasPrefetch || Second::kHasPrefetch ? First::kLargeGridBytes / kBlockReadBytes : kNoLargeGrid;

  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const DualRMSNormParams& p) {
    if (blockIdx.x < p.first_blocks) First::template run<kVariant>(p.norms[0], p.num_rows, blockIdx.x, p.first_blocks);
    else
      Second::template run<kVariant>(p.norms[1], p.num_rows, blockIdx.x - p.first_blocks, gridDim.x - p.first_blocks);
  }
};

}  // namespace jitnorm
