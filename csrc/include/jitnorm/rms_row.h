// Rows that are divided by their root mean square on CUDA: one read, one write. A thread holds its part of a row in
// registers in between.
//
// The schedule is fixed by hidden size and dtype, never by the number of rows: a row's bits are the same in any batch.
// benchmarks/tune_rmsnorm.py compares schedules on a GPU; docs/architecture.md has what it found.
#pragma once
#include "jitnorm/launch.h"
#include "jitnorm/rms_policy.h"
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
constexpr int most(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Short rows share a block that reads about 4 KiB: with less, the launch of blocks costs more than their memory
// traffic.
constexpr int rows_per_block(int read_bytes) { return at_least_one(4096 / read_bytes); }

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
  return round_up(vectors, 5 * 128) / 5;
}

// With a residual, a thread has two of everything: one vector up to 256 threads, then two up to 512.
constexpr int residual_threads_per_row(int row_bytes) {
  const int vectors = row_bytes / 16;
  const int per_thread = vectors <= 256 ? 1 : vectors <= 1024 ? 2 : round_up(vectors, 512) / 512;
  return round_up(vectors / per_thread, 32);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMostThreads = 1024;  // that any multiprocessor of this age holds
#else
constexpr int kMostThreads = 1536;
#endif

template <int kHiddenSize, typename T, typename Policy>
struct DefaultSchedule {
  static constexpr int kRowBytes = kHiddenSize * sizeof(T);
  static constexpr int kReadBytes = Policy::kAddResidual ? 2 * kRowBytes : kRowBytes;
  static constexpr int kThreads = kHiddenSize <= 256     ? warp_threads_per_row(kRowBytes)
                                  : Policy::kAddResidual ? residual_threads_per_row(kRowBytes)
                                                         : block_threads_per_row(kRowBytes);
  using type = Schedule<kThreads, rows_per_block(kReadBytes)>;
};

// What kernels of such rows have in common with each other, and with the host, which launches them.
template <int kHiddenSize_, typename T, typename W, typename Policy, typename S>
struct RMSNormCuda : S {
  using input_t = T;
  using weight_t = W;
  using output_t = typename Policy::template output_t<T>;
  using policy_t = Policy;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr unsigned kAlignment = 16;
  static constexpr float kInverse = 1. / kHiddenSize;
  static constexpr float kInverseRest = 1. / kHiddenSize - kInverse;  // what float leaves of 1 / kHiddenSize
  // Memory is kept busy by 64 KiB of rows in flight on a multiprocessor. Where blocks are large, registers are rationed
  // for that, as far as a thread's vectors of row, residual and weight allow; many small blocks fit anyway.
  static constexpr int kRowBytes = kHiddenSize * sizeof(T);
  static constexpr int kReadBytes = (Policy::kAddResidual ? 2 : 1) * kRowBytes * S::kRowsPerBlock;
  static constexpr int kThreads = S::kThreadsPerRow * S::kRowsPerBlock;
  static constexpr int kVectorsPerThread = (kRowBytes / 16 + S::kThreadsPerRow - 1) / S::kThreadsPerRow;
  static constexpr int kRegisters =
      (4 * kVectorsPerThread + 12) * (1 + sizeof(W) / sizeof(T) + (Policy::kAddResidual ? 1 : 0));
  static constexpr int kMostBlocks = least(65536 / (kRegisters * kThreads), kMostThreads / kThreads);
  static constexpr int kMinBlocks = kReadBytes < 8192 ? 1 : at_least_one(least(64 * 1024 / kReadBytes, kMostBlocks));
  // In a long grid a block begins the way of a later block's rows into the second-level cache: what registers hold
  // leaves memory idle for 2 to 4% of the time. In a shorter grid this would delay the rows at hand.
  static constexpr unsigned kLongGrid = kRowBytes < 256        ? EveryGrid::kLongGrid
                                        : Policy::kAddResidual ? most(1024, (16 << 20) / kReadBytes)
                                                               : (48 << 20) / kReadBytes;
  static constexpr unsigned kBlocksAhead = most(128, ((Policy::kAddResidual ? 4 : 2) << 20) / kReadBytes);
  // In a short one, the next kernel starts late where a thread has much left to do after its loads, and would be
  // slowed.
  static constexpr unsigned kShortGrid = kVectorsPerThread > 3 && !Policy::kAddResidual ? 16 : EveryGrid::kShortGrid;
};

#ifdef __CUDACC__
// The vectors of a row that one of its threads holds: every kThreadsPerRow-th, from its own lane on.
template <typename Kernel>
struct RowPart {
  using T = typename Kernel::input_t;
  using W = typename Kernel::weight_t;
  using Policy = typename Kernel::policy_t;
  static constexpr int kThreads = Kernel::kThreadsPerRow;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kVectors = Kernel::kHiddenSize / kElements;
  static constexpr int kCount = Kernel::kVectorsPerThread;
  static_assert(Kernel::kHiddenSize % kElements == 0, "a row is made of 16-byte vectors");

  const int lane;
  Vector<T, kElements> x[kCount];
  Vector<T, kElements> residual[Policy::kAddResidual ? kCount : 1];
  Vector<W, kElements> weight[kCount];

  explicit __device__ RowPart(int lane) : lane(lane) {}

  __device__ __forceinline__ bool has(int i) const {
    return kVectors % kThreads == 0 || lane + i * kThreads < kVectors;
  }
  __device__ __forceinline__ int offset(int i) const { return (lane + i * kThreads) * kElements; }

  template <typename E, int kMany>
  __device__ __forceinline__ void read(Vector<E, kElements> (&to)[kMany], const E* from) {
#pragma unroll
    for (int i = 0; i < kMany; i++)
      if (has(i)) to[i] = load<E, kElements>(from + offset(i));
  }

  // What is normalised: the sum is added up anew at each use, which is cheaper than registers to keep it in.
  __device__ __forceinline__ void value(int i, float (&f)[kElements]) const {
    to_float(x[i], f);
    if (!Policy::kAddResidual || Policy::kRoundSum) return;
    float r[kElements];
    to_float(residual[i], r);
#pragma unroll
    for (int j = 0; j < kElements; j++) f[j] += r[j];
  }

  __device__ __forceinline__ void add_residual(T* to) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements], r[kElements];
      to_float(x[i], f);
      to_float(residual[i], r);
#pragma unroll
      for (int j = 0; j < kElements; j++) f[j] += r[j];
      Vector<T, kElements> sum;
      from_float(f, sum);
      store(to + offset(i), sum);
      if (Policy::kRoundSum) x[i] = sum;
    }
  }

  __device__ __forceinline__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements], squares = 0;  // a chain of its own for each vector: one over all would be waited for
      value(i, f);
#pragma unroll
      for (int j = 0; j < kElements; j++) squares = fmaf(f[j], f[j], squares);
      sum += squares;
    }
    return sum;
  }

  __device__ __forceinline__ void normalised(int i, float scale, float (&f)[kElements]) const {
    float w[kElements];
    value(i, f);
    to_float(weight[i], w);
#pragma unroll
    for (int j = 0; j < kElements; j++)
      f[j] = f[j] * scale * (Policy::kWeightOffset == 0 ? w[j] : Policy::kWeightOffset + w[j]);
  }

  __device__ __forceinline__ float largest_magnitude(float scale) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements];
      normalised(i, scale, f);
#pragma unroll
      for (int j = 0; j < kElements; j++) largest = fmaxf(largest, fabsf(f[j]));
    }
    return largest;
  }

  __device__ __forceinline__ void write(typename Kernel::output_t* out, float scale) const {
    write(out, scale, [](float y) { return y; });
  }

  // What `last` makes of the normalised numbers, rounded.
  template <typename Out, typename Last>
  __device__ __forceinline__ void write(Out* out, float scale, Last last) const {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      if (!has(i)) continue;
      float f[kElements];
      normalised(i, scale, f);
#pragma unroll
      for (int j = 0; j < kElements; j++) f[j] = last(f[j]);
      Vector<Out, kElements> y;
      from_float(f, y);
      store(out + offset(i), y);
    }
  }
};

// The mean of squares plus eps, exact but for one rounding where float has no 1 / kHiddenSize. The infinite sum of a
// row must not meet the rest, which may be negative.
template <typename Kernel>
__device__ __forceinline__ float mean_plus_eps(float sum, float eps) {
  if (Kernel::kInverseRest == 0) return fmaf(sum, Kernel::kInverse, eps);
  return fmaf(sum, Kernel::kInverse, fmaf(fminf(sum, 3.402823466e38f), Kernel::kInverseRest, eps));
}

template <typename T>
__device__ __forceinline__ float inverse_root(float mean) {
  // The approximation is good to two bits of float32, which 16-bit outputs cannot show, and saves 40 ns of a row's way.
  return sizeof(T) == 4 ? __frsqrt_rn(mean) : rsqrtf(mean);
}
#endif

}  // namespace jitnorm
