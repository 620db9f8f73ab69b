// RMSNorm on CUDA. A thread holds its part of a row in registers from the one read to the one write.
//
// The schedule is fixed by hidden size and dtype, never by the number of rows: a row's bits are the same in any batch.
// benchmarks/tune_rmsnorm.py tries every schedule; docs/architecture.md has what it found.
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/launch.h"
#ifdef __CUDACC__
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

template <int kThreadsPerRow_, int kRowsPerBlock_, int kBlocksPerSM_ = 0, bool kWeightFirst_ = false>
struct Schedule {
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kRowsPerBlock = kRowsPerBlock_;
  static constexpr bool kWeightFirst = kWeightFirst_;
  static constexpr int kBlocksPerSM = kBlocksPerSM_;  // blocks launched at most; 0: one for every kRowsPerBlock rows
};

#ifdef __CUDACC__
// The vectors of a row that one of its kThreads threads holds: every kThreads-th, starting at its own lane.
template <int kHiddenSize, int kThreads, typename T, typename W>
struct RowPart {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectors = kHiddenSize / kElements;
  static constexpr int kCount = (kVectors + kThreads - 1) / kThreads;
  static_assert(kHiddenSize % kElements == 0, "a row is made of 16-byte vectors");

  Vector<T, kElements> x[kCount];

  static __device__ __forceinline__ bool has(int lane, int i) {
    return kVectors % kThreads == 0 || lane + i * kThreads < kVectors;
  }

  __device__ __forceinline__ void read(const T* row, int lane) {
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (has(lane, i)) x[i] = load<T, kElements>(row + (lane + i * kThreads) * kElements);
  }

  __device__ __forceinline__ float sum_of_squares(int lane) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(lane, i)) continue;
      float f[kElements];
      to_float(x[i], f);
#pragma unroll
      for (int j = 0; j < kElements; j++) sum = fmaf(f[j], f[j], sum);
    }
    return sum;
  }

  __device__ __forceinline__ void write(T* row, int lane, float scale,
                                        const Vector<W, kElements> (&weight)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(lane, i)) continue;
      float f[kElements], w[kElements];
      to_float(x[i], f);
      to_float(weight[i], w);
#pragma unroll
      for (int j = 0; j < kElements; j++) f[j] = f[j] * scale * w[j];
      Vector<T, kElements> y;
      from_float(f, y);
      store(row + (lane + i * kThreads) * kElements, y);
    }
  }
};

// The whole life of one block, for both kernels. `Sum` adds up one float over the threads of a row.
template <typename Kernel, typename Sum>
__device__ __forceinline__ void rmsnorm_rows(const RMSNormParams& p, Sum sum) {
  using T = typename Kernel::input_t;
  using W = typename Kernel::weight_t;
  using Part = RowPart<Kernel::kHiddenSize, Kernel::kThreadsPerRow, T, W>;
  const int lane = threadIdx.x % Kernel::kThreadsPerRow;
  const index_t step = index_t(gridDim.x) * Kernel::kRowsPerBlock;
  const W* scales = static_cast<const W*>(p.weight);
  Vector<W, Part::kElements> weight[Part::kCount];
  auto load_weight = [&] {
#pragma unroll
    for (int i = 0; i < Part::kCount; i++)
      if (Part::has(lane, i))
        weight[i] = load<W, Part::kElements>(scales + (lane + i * Kernel::kThreadsPerRow) * Part::kElements);
  };
  if (Kernel::kWeightFirst) load_weight();
  else {
#pragma unroll
  for (int i = 0; i < Part::kCount; i++)
    if (Part::has(lane, i))
      asm volatile("prefetch.global.L2 [%0];" ::"l"(scales + (lane + i * Kernel::kThreadsPerRow) * Part::kElements));
  }
  wait_for_previous();
  if (!Kernel::kWeightFirst) load_weight();
  // The threads of a block stay together to the last row: they meet in `sum`.
  for (index_t first = index_t(blockIdx.x) * Kernel::kRowsPerBlock; first < p.num_tokens; first += step) {
    const index_t row = first + threadIdx.x / Kernel::kThreadsPerRow;
    const bool mine = Kernel::kRowsPerBlock == 1 || row < p.num_tokens;
    Part part;
    if (mine) part.read(static_cast<const T*>(p.input) + row * p.input_stride, lane);
    let_next_start();
    const float mean = sum(mine ? part.sum_of_squares(lane) : 0.f) * (1.f / Kernel::kHiddenSize);
    if (mine) part.write(static_cast<T*>(p.out) + row * p.out_stride, lane, __frsqrt_rn(mean + p.eps), weight);
  }
}
#endif

// What the two kernels have in common with each other and with the host, which launches them.
template <int kHiddenSize_, typename T, typename W, typename S>
struct RMSNormCuda : S {
  using input_t = T;
  using weight_t = W;
  using params_t = RMSNormParams;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr unsigned kAlignment = 16;
};

// hidden_size up to 256: the threads of one warp, or some of them, share a row, and several rows share a block.
template <int kHiddenSize, typename T, typename W = T,
          typename S = Schedule<kHiddenSize / (16 / sizeof(T)) < 32 ? kHiddenSize / (16 / sizeof(T)) : 32, 8>>
struct RMSNormWarpKernel : RMSNormCuda<kHiddenSize, T, W, S> {
#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    rmsnorm_rows<RMSNormWarpKernel>(params, [](float part) { return warp_sum<S::kThreadsPerRow>(part); });
  }
#endif
};

// hidden_size from 512: the warps of a block share a row, or those of half a block.
template <int kHiddenSize, typename T, typename W = T, typename S = Schedule<128, 1>>
struct RMSNormKernel : RMSNormCuda<kHiddenSize, T, W, S> {
#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    constexpr int kWarps = S::kThreadsPerRow / kWarpSize;
    __shared__ float partial[2][S::kRowsPerBlock][kWarps];  // two, so that a row need not wait for the last one's readers
    int turn = 0;
    rmsnorm_rows<RMSNormKernel>(params, [&](float part) {
      const int warp = threadIdx.x / kWarpSize;
      turn ^= 1;
      return block_sum<kWarps>(part, partial[turn][warp / kWarps], warp % kWarps);
    });
  }
#endif
};

}  // namespace jitnorm
