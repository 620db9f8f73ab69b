// RMSNorm on CUDA: one read, one write. A thread holds its part of a row in registers in between.
//
// The schedule is fixed by hidden size and dtype, never by the number of rows: a row's bits are the same in any batch.
// benchmarks/tune_rmsnorm.py compares schedules on a GPU; docs/architecture.md has what it found.
#pragma once
#include "elementwise/rmsnorm.h"
#include "jitnorm/launch.h"
#ifdef __CUDACC__
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

template <int kThreadsPerRow_, int kRowsPerBlock_>
struct Schedule {
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kRowsPerBlock = kRowsPerBlock_;
};

constexpr int at_least_one(int n) { return n > 0 ? n : 1; }
constexpr int least(int a, int b) { return a < b ? a : b; }

// Short rows share a block of 4 KiB: in smaller ones the launch of blocks costs more than their memory traffic.
constexpr int rows_per_block(int row_bytes) { return at_least_one(4096 / row_bytes); }

// A row of up to 256 elements: two 16-byte vectors to a thread.
constexpr int warp_threads_per_row(int row_bytes) { return row_bytes / 32; }

// Longer rows: two vectors to a thread while that needs no more than 256 threads, then up to five, without a rest
// where the size allows it. More threads answer a single row sooner, but keep fewer rows in flight.
constexpr int block_threads_per_row(int row_bytes) {
  const int vectors = row_bytes / 16;
  if (vectors <= 256) return vectors <= 64 ? 32 : vectors <= 128 ? 64 : 128;
  const int most_vectors = vectors <= 512 ? 2 : 5, most_threads = vectors <= 1280 ? 256 : 512;
  for (int threads = 128; threads <= most_threads; threads += 32)
    if (vectors % threads == 0 && vectors / threads <= most_vectors) return threads;
  return (vectors + 5 * 128 - 1) / (5 * 128) * 128;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostThreads = 1024;  // that a multiprocessor holds
#else
constexpr int kMostThreads = 1536;
#endif

// What the two kernels have in common with each other, and with the host, which launches them.
template <int kHiddenSize_, typename T, typename W, typename S>
struct RMSNormCuda : S {
  using input_t = T;
  using weight_t = W;
  using params_t = RMSNormParams;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr unsigned kAlignment = 16;
  // Memory is kept busy by 64 KiB of rows in flight on a multiprocessor. Where blocks are large, registers are rationed
  // for that, as far as a thread's vectors of row and weight allow; many small blocks fit anyway.
  static constexpr int kBlockBytes = kHiddenSize * sizeof(T) * S::kRowsPerBlock;
  static constexpr int kThreads = S::kThreadsPerRow * S::kRowsPerBlock;
  static constexpr int kVectorsPerThread = (kBlockBytes / 16 + kThreads - 1) / kThreads;
  static constexpr int kRegisters = (4 * kVectorsPerThread + 12) * (1 + sizeof(W) / sizeof(T));
  static constexpr int kMostBlocks = least(65536 / (kRegisters * kThreads), kMostThreads / kThreads);
  static constexpr int kMinBlocks = kBlockBytes < 8192 ? 1 : least(64 * 1024 / kBlockBytes, kMostBlocks);
};

#ifdef __CUDACC__
// The vectors of a row that one of its kThreads threads holds: every kThreads-th, from its own lane on.
template <int kHiddenSize, int kThreads, typename T, typename W>
struct RowPart {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectors = kHiddenSize / kElements;
  static constexpr int kCount = (kVectors + kThreads - 1) / kThreads;
  static_assert(kHiddenSize % kElements == 0, "a row is made of 16-byte vectors");

  const int lane;
  Vector<T, kElements> x[kCount];
  Vector<W, kElements> weight[kCount];

  explicit __device__ RowPart(int lane) : lane(lane) {}

  __device__ __forceinline__ bool has(int i) const {
    return kVectors % kThreads == 0 || lane + i * kThreads < kVectors;
  }
  __device__ __forceinline__ int offset(int i) const { return (lane + i * kThreads) * kElements; }

  __device__ __forceinline__ void read(const T* row) {
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (has(i)) x[i] = load<T, kElements>(row + offset(i));
  }

  __device__ __forceinline__ void read_weight(const W* from) {
#pragma unroll
    for (int i = 0; i < kCount; i++)
      if (has(i)) weight[i] = load<W, kElements>(from + offset(i));
  }

  __device__ __forceinline__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements], squares = 0;  // a chain of its own for each vector: one over all would be waited for
      to_float(x[i], f);
#pragma unroll
      for (int j = 0; j < kElements; j++) squares = fmaf(f[j], f[j], squares);
      sum += squares;
    }
    return sum;
  }

  __device__ __forceinline__ void write(T* row, float scale) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements], w[kElements];
      to_float(x[i], f);
      to_float(weight[i], w);
#pragma unroll
      for (int j = 0; j < kElements; j++) f[j] = f[j] * scale * w[j];
      Vector<T, kElements> y;
      from_float(f, y);
      store(row + offset(i), y);
    }
  }
};

// The whole life of a block, for both kernels. `sum` adds up one float over the threads of a row.
template <typename Kernel, typename Sum>
__device__ __forceinline__ void rmsnorm_block(const RMSNormParams& p, Sum sum) {
  using T = typename Kernel::input_t;
  using W = typename Kernel::weight_t;
  RowPart<Kernel::kHiddenSize, Kernel::kThreadsPerRow, T, W> part(threadIdx.x % Kernel::kThreadsPerRow);
  const index_t token = index_t(blockIdx.x) * Kernel::kRowsPerBlock + threadIdx.x / Kernel::kThreadsPerRow;
  const T* row = static_cast<const T*>(p.input) + token * p.input_stride;
  const W* weight = static_cast<const W*>(p.weight);
  T* out = static_cast<T*>(p.out) + token * p.out_stride;
  // Before the wait, the misses that no earlier kernel can affect: parameters, and addresses' translations.
  before_wait(row, out, weight, p.eps);
  wait_for_previous();
  const bool exists = Kernel::kRowsPerBlock == 1 || token < p.num_tokens;  // threads without a row still join the sum
  if (exists) part.read(row);
  part.read_weight(weight);
  let_next_start();
  const float mean = sum(exists ? part.sum_of_squares() : 0.f) * (1.f / Kernel::kHiddenSize);
  if (exists) part.write(out, __frsqrt_rn(mean + p.eps));
}
#endif

// hidden_size up to 256: the threads of one warp, or some of them, share a row, and several rows share a block.
template <int kHiddenSize, typename T, typename W = T,
          typename S = Schedule<warp_threads_per_row(kHiddenSize * sizeof(T)), rows_per_block(kHiddenSize * sizeof(T))>>
struct RMSNormWarpKernel : RMSNormCuda<kHiddenSize, T, W, S> {
#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    rmsnorm_block<RMSNormWarpKernel>(params, [](float part) { return warp_sum<S::kThreadsPerRow>(part); });
  }
#endif
};

// hidden_size from 512: whole warps share a row, and a block has one row or, up to 1024, a few.
template <int kHiddenSize, typename T, typename W = T,
          typename S =
              Schedule<block_threads_per_row(kHiddenSize * sizeof(T)), rows_per_block(kHiddenSize * sizeof(T))>>
struct RMSNormKernel : RMSNormCuda<kHiddenSize, T, W, S> {
#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const RMSNormParams& params) {
    constexpr int kWarps = S::kThreadsPerRow / kWarpSize;
    __shared__ alignas(16) float partial[S::kRowsPerBlock][kWarps];
    rmsnorm_block<RMSNormKernel>(params, [&](float part) {
      const int warp = threadIdx.x / kWarpSize;
      return block_sum<kWarps>(part, partial[warp / kWarps], warp % kWarps);
    });
  }
#endif
};

}  // namespace jitnorm
