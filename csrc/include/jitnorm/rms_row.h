// RMSNorm of rows on CUDA: the schedule of a row over threads, the constants of a kernel class, and RowFragment, the
// part of a row that a thread holds in registers between one read and one write. Included by elementwise/rmsnorm.cuh
// and elementwise/qknorm.cuh.
//
// Hidden size and dtype fix the schedule, never the number of rows: a row's bits are the same in any batch.
// benchmarks/tune_rmsnorm.py compares schedules on a GPU; docs/contributing/decisions.md has its results.
#pragma once
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/device_math.h"
#include "jitnorm/reduce.h"
#include "jitnorm/rms_policy.h"
#include "jitnorm/vector.h"

namespace jitnorm {

// kThreadsPerRow counts the threads of all blocks of a cluster, which then has one row.
template <int kThreadsPerRow_, int kRowsPerBlock_, int kBlocksPerCluster_ = 1>
struct Schedule {
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kRowsPerBlock = kRowsPerBlock_;
  static constexpr int kBlocksPerCluster = kBlocksPerCluster_;
};

constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Short rows share a block that reads about 4 KiB, or 5 where threads have unequal work. Smaller blocks take longer to
// launch than to move their bytes. Rows of a few bytes share one of up to 256 threads.
constexpr int rows_per_block(int row_read_bytes, int threads_per_row, bool is_even) {
  const int rows_per_warp = max(1, kWarpSize / threads_per_row);  // warps are whole
  const int block_read_bytes = is_even ? 4096 : 5120;
  return max(1, min(block_read_bytes / row_read_bytes, 256 / threads_per_row) / rows_per_warp) * rows_per_warp;
}

// Rows of up to 256 elements: two 16-byte vectors per thread, by a power of two of threads.
constexpr int warp_threads_per_row(int row_bytes) {
  int threads = 1;
  while (threads * 32 < row_bytes) threads *= 2;
  return threads;
}

// Longer rows: two vectors per thread with up to 256 threads, then up to five, evenly if the size allows it. More
// threads reduce the latency of a single row, but keep fewer rows in flight.
constexpr int block_threads_per_row(int row_bytes) {
  const int vectors = row_bytes / 16;
  if (vectors <= 128) return vectors <= 64 ? 32 : 64;
  // Whole warps that vectors cannot be divided among evenly: as few as can hold them, for more rows in flight.
  if (vectors <= 256) return vectors % 32 == 0 ? 128 : round_up((vectors + 1) / 2, 32);
  const int max_vectors = vectors <= 512 ? 2 : 5, max_threads = vectors <= 1280 ? 256 : 512;
  for (int threads = 128; threads <= max_threads; threads += 32)
    if (vectors % threads == 0 && vectors / threads <= max_vectors) return threads;
  if (vectors % 32 != 0) return min(1024, max(128, round_up((vectors + max_vectors - 1) / max_vectors, 32)));
  return min(1024, round_up(vectors, 5 * 128) / 5);
}

// The longest rows are shared by the blocks of a cluster, as the registers of one block cannot hold them. A cluster is
// slower than one block, as its blocks wait for each other. Before sm_90 there are none: registers of such rows spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
constexpr int blocks_per_cluster(int row_bytes, bool has_residual, bool has_whole_vectors) {
  const int max_row_bytes_of_block = (!has_whole_vectors ? 32 : has_residual ? 48 : 64) * 1024;
  if (!kHasClusters || row_bytes <= max_row_bytes_of_block) return 1;
  return row_bytes <= 64 * 1024 ? 2 : 8;
}

// Of each block of a cluster: four vectors per thread.
constexpr int cluster_threads_per_row(int block_row_bytes) { return round_up((block_row_bytes / 16 + 3) / 4, 32); }

// With a residual a thread holds two rows' vectors: one of each with up to 256 threads, then two with up to 512. The
// number of vectors is that of the row with the wider elements. Narrower vectors are more than these, and fewer threads
// keep enough of them in flight.
constexpr int residual_threads_per_row(int row_bytes, bool has_whole_vectors) {
  const int vectors = row_bytes / 16;
  if (!has_whole_vectors && vectors <= 1024) return round_up((vectors + 2) / 3, 32);
  const int per_thread = vectors <= 256 ? 1 : vectors <= 1024 ? 2 : round_up(vectors, 512) / 512;
  return round_up((vectors + per_thread - 1) / per_thread, 32);
}

// The bytes of an element of input and residual; 0 for the residual of a policy without one.
template <typename T, typename Policy>
struct ElementBytes {
  static constexpr int kInput = sizeof(T);
  static constexpr int kResidual = Policy::kHasResidual ? sizeof(typename Policy::template residual_t<T>) : 0;
  static constexpr int kWider = max(kInput, kResidual);  // vectors have 16 bytes of these
};

template <int kHiddenSize, typename T, typename Policy>
struct DefaultSchedule {
  using Bytes = ElementBytes<T, Policy>;
  static constexpr int kRowBytes = round_up(kHiddenSize * Bytes::kWider, 16);
  static constexpr int kRowReadBytes = kHiddenSize * (Bytes::kInput + Bytes::kResidual);
  static constexpr bool kHasWholeVectors = kHiddenSize * Bytes::kWider % 16 == 0;
  static constexpr bool kIsEven = kHasWholeVectors && kRowBytes % (16 * kWarpSize) == 0;
  static constexpr int kBlocksPerCluster = blocks_per_cluster(kRowBytes, Policy::kHasResidual, kHasWholeVectors);
  static constexpr int kBlockRowBytes = round_up(kRowBytes / kBlocksPerCluster, 16);  // of a row, those of one block
  static constexpr int kThreads = kHiddenSize <= 256      ? warp_threads_per_row(kRowBytes)
                                  : Policy::kHasResidual  ? residual_threads_per_row(kBlockRowBytes, kHasWholeVectors)
                                  : kBlocksPerCluster > 1 ? cluster_threads_per_row(kBlockRowBytes)
                                                          : block_threads_per_row(kBlockRowBytes);
  static constexpr int kRowsPerBlock =
      kBlocksPerCluster > 1 ? 1 : rows_per_block(kRowReadBytes, kThreads, kHiddenSize <= 256 || kIsEven);
  using type = Schedule<kThreads * kBlocksPerCluster, kRowsPerBlock, kBlocksPerCluster>;
};

// The elements of a vector: those of 16 bytes, or so many fewer that a row is whole vectors.
constexpr int elements_per_vector(int hidden_size, int element_bytes) {
  int elements = 16 / element_bytes;
  while (hidden_size % elements) elements /= 2;
  return elements;
}

constexpr int kRegistersPerSM = 65536;
constexpr int kMaxStagedBytes = 40 * 1024;  // of a block's 48 KiB of static shared memory
// The smallest kMaxThreadsPerSM of the architectures before sm_80, and of those from sm_80 on. A larger number would
// leave each thread fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kThreadsOnAnySM = 1024;
#else
constexpr int kThreadsOnAnySM = 1536;
#endif

// The constants of kernel classes that normalise rows, for device code and for the launch.
template <int kHiddenSize_, typename T, typename W, typename Policy, typename S>
struct RMSNormKernelBase : S {
  using input_t = T;
  using weight_t = W;
  using output_t = typename Policy::template output_t<T>;
  using residual_t = typename Policy::template residual_t<T>;
  using policy_t = Policy;
  using Bytes = ElementBytes<T, Policy>;
  static constexpr int kHiddenSize = kHiddenSize_;
  static constexpr int kElementsPerVector = elements_per_vector(kHiddenSize, Bytes::kWider);
  static constexpr bool kHasWholeVectors = kElementsPerVector * Bytes::kWider == 16;
  // The widest access to rows of E, in bytes.
  template <typename E>
  static constexpr int kAccessBytesOf = Policy::kAccessBytes == 0 ? sizeof(E) : Policy::kAccessBytes;
  // Of rows of the input, in bytes, and of the others.
  template <typename E>
  static constexpr int kAlignmentOf =
      min(kAccessBytesOf<E>, kHiddenSize * sizeof(E) % 16 == 0 ? 16 : kElementsPerVector * int(sizeof(E)));
  static constexpr unsigned kAlignment = kAlignmentOf<T>, kWeightAlignment = kAlignmentOf<W>,
                            kResidualAlignment = kAlignmentOf<residual_t>, kOutputAlignment = kAlignmentOf<output_t>;
  static constexpr float kInverse = 1. / kHiddenSize;
  static constexpr float kInverseResidue = 1. / kHiddenSize - kInverse;  // the rounding error of kInverse
  static constexpr int kRowBytes = kHiddenSize * Bytes::kInput;
  static constexpr int kResidualRowBytes = kHiddenSize * Bytes::kResidual;
  static constexpr int kBlockReadBytes = (kRowBytes + kResidualRowBytes) * S::kRowsPerBlock / S::kBlocksPerCluster;
  static constexpr int kThreads = S::kThreadsPerRow * S::kRowsPerBlock / S::kBlocksPerCluster;
  static constexpr int kVectorsPerRow = kHiddenSize / kElementsPerVector;
  static constexpr int kVectorsPerThread = (kVectorsPerRow + S::kThreadsPerRow - 1) / S::kThreadsPerRow;
  // In a cluster the weight waits in shared memory, which leaves registers for more blocks on an SM.
  static constexpr bool kStagesWeight = S::kBlocksPerCluster > 1 && Policy::kHasWeight && kHasWholeVectors &&
                                        kWeightAlignment == 16 && kElementsPerVector * sizeof(W) % 16 == 0 &&
                                        kVectorsPerThread * kElementsPerVector * int(sizeof(W)) * kThreads
                                            <= kMaxStagedBytes;
  // 64 KiB of rows in flight on an SM keep memory busy, and in clusters, whose kernels need more registers, more. Where
  // blocks are large, kMinBlocksPerSM limits registers for that, as far as a thread's vectors of row, residual and
  // weight allow. Small blocks fit an SM in any case. LayerNorm nearly always has a bias, whose vectors would spill.
  static constexpr int kFactorBytes = sizeof(W) * (Policy::kSubtractsMean && Policy::kHasBias ? 2 : 1);
  static constexpr int kRegistersPerThread =
      kStagesWeight
          ? (4 * kVectorsPerThread + 32) * kElementsPerVector * (Bytes::kInput + Bytes::kResidual) / 16
          : (4 * kVectorsPerThread + 12) * kElementsPerVector * (Bytes::kInput + Bytes::kResidual + kFactorBytes) / 16;
  static constexpr int kMaxBlocksPerSM =
      min(kRegistersPerSM / (kRegistersPerThread * kThreads), kThreadsOnAnySM / kThreads);
  static constexpr int kBytesInFlight = (S::kBlocksPerCluster == 1 ? 64 : kStagesWeight ? 96 : 48) * 1024;
  static constexpr int kMinBlocksPerSM =
      kBlockReadBytes < 8192 || !kHasWholeVectors ? 1 : max(1, min(kBytesInFlight / kBlockReadBytes, kMaxBlocksPerSM));
  // In a large grid, which reads about as much as L2 holds or more, a block prefetches into L2 the rows of the block
  // with an index kBlocksAhead larger: without that, memory is idle for 2 to 4% of the time. In a smaller grid, the
  // prefetch would delay the block's own rows.
  static constexpr int kLargeGridBytes = (Policy::kHasResidual ? 16 : 48) << 20;
  static constexpr int kBytesAhead = (Policy::kHasResidual ? 4 : 2) << 20;
  static constexpr bool kHasLargeGrid = kRowBytes >= 256 && kRowBytes % 16 == 0 && kResidualRowBytes % 16 == 0 &&
                                        S::kBlocksPerCluster == 1 && !Policy::kIsGeneral;
  static constexpr unsigned kMinLargeGrid = !kHasLargeGrid         ? DefaultVariantOnly::kMinLargeGrid
                                            : Policy::kHasResidual ? max(1024, kLargeGridBytes / kBlockReadBytes)
                                                                   : kLargeGridBytes / kBlockReadBytes;
  static constexpr unsigned kBlocksAhead = max(128, kBytesAhead / kBlockReadBytes);
  // In a small grid, a block launches its dependents late if threads have much to compute after their loads: the next
  // kernel's blocks would slow that down.
  static constexpr unsigned kMaxSmallGrid =
      kVectorsPerThread > 3 && !Policy::kHasResidual ? 16 : DefaultVariantOnly::kMaxSmallGrid;
};

// The vectors of a row that one thread holds: every kThreadsPerRow-th, beginning with number `lane`, the thread's index
// within its row. Beside a float residual, a vector of 16-bit inputs has 8 bytes: then the warp's accesses to either
// have no gaps, and its stores fill whole sectors.
template <typename Kernel>
struct RowFragment {
  using T = typename Kernel::input_t;
  using R = typename Kernel::residual_t;
  using W = typename Kernel::weight_t;
  using Policy = typename Kernel::policy_t;
  static constexpr int kThreadsPerRow = Kernel::kThreadsPerRow;
  static constexpr int kElementsPerVector = Kernel::kElementsPerVector;
  static constexpr int kVectorsPerRow = Kernel::kVectorsPerRow;
  static constexpr int kVectorsPerThread = Kernel::kVectorsPerThread;
  using WeightVector = Vector<W, kElementsPerVector>;
  // Where a stored sum that is normalised is kept: in the registers of x or, if it is wider, of the residual.
  static constexpr bool kSumReplacesX = Policy::kRoundSum && sizeof(R) == sizeof(T);
  static constexpr bool kHasProduct = Policy::kGating == Gating::kBeforeNorm;

  const int lane;
  float mean;  // subtracted by `value`; of policies with kSubtractsMean alone
  Vector<T, kElementsPerVector> x[kVectorsPerThread];
  Vector<R, kElementsPerVector> residual[Policy::kHasResidual ? kVectorsPerThread : 1];
  WeightVector weight[Policy::kHasWeight && !Kernel::kStagesWeight ? kVectorsPerThread : 1];
  Vector<W, kElementsPerVector> bias[Policy::kHasBias ? kVectorsPerThread : 1];
  // Of a gate before the norm. It takes the registers of x and residual, which hold the gate.
  Vector<float, kElementsPerVector> product[kHasProduct ? kVectorsPerThread : 1];

  explicit __device__ RowFragment(int lane) : lane(lane) {}

  // Whether the thread has an i-th vector: a row's vectors may not divide evenly among its threads.
  __device__ __forceinline__ bool has(int i) const {
    return kVectorsPerRow % kThreadsPerRow == 0 || lane + i * kThreadsPerRow < kVectorsPerRow;
  }
  __device__ __forceinline__ int offset(int i) const { return (lane + i * kThreadsPerRow) * kElementsPerVector; }

  template <typename E, int kSize>
  __device__ __forceinline__ void read(Vector<E, kElementsPerVector> (&dst)[kSize], const E* src) {
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (has(i)) dst[i] = load_aligned_to<Kernel::template kAccessBytesOf<E>, E, kElementsPerVector>(src + offset(i));
  }

  // Reads the weight, to registers or on to shared memory.
  __device__ __forceinline__ void read_weight(const W* src) {
    if constexpr (!Kernel::kStagesWeight) {
      read(weight, src);
    } else {
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; i++)
#pragma unroll
        for (int k = 0; k < WeightVector::kAccesses; k++)
          if (has(i)) copy_async(staged_weight(i, k), reinterpret_cast<const uint4*>(src + offset(i)) + k);
    }
  }

  // To be called between the sum of squares and the result.
  __device__ __forceinline__ void wait_for_weight() {
    if constexpr (Kernel::kStagesWeight) {
      wait_for_async_copies();
      // Makes the compiler convert x to float again: floats kept from the sum of squares would need more registers.
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; i++)
        for (auto& words : x[i].words) forget_value(words);
    }
  }

  __device__ __forceinline__ WeightVector weight_vector(int i) const {
    if constexpr (!Kernel::kStagesWeight) {
      return weight[i];
    } else {
      WeightVector w;
#pragma unroll
      for (int k = 0; k < WeightVector::kAccesses; k++) w.words[k] = *staged_weight(i, k);
      return w;
    }
  }

  // Where the thread keeps the k-th 16 bytes of its i-th vector of the weight.
  static __device__ __forceinline__ uint4* staged_weight(int i, int k) {
    __shared__ uint4 staged[kVectorsPerThread * WeightVector::kAccesses][Kernel::kThreads];
    return &staged[i * WeightVector::kAccesses + k][threadIdx.x];
  }

  // Adds the input to the residual, and stores the sum to `dst`.
  __device__ __forceinline__ void add_residual(R* dst) {
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector], r[kElementsPerVector];
      to_float(x[i], f);
      to_float(residual[i], r);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] += r[j];
      Vector<R, kElementsPerVector> sum;
      from_float(f, sum);
      store_aligned_to<Kernel::template kAccessBytesOf<R>>(dst + offset(i), sum);
      if constexpr (kSumReplacesX) x[i] = sum;
      else if constexpr (Policy::kRoundSum) residual[i] = sum;
    }
  }

  // Multiplies f by the activation of the i-th vector of the gate.
  __device__ __forceinline__ void multiply_by_gate(int i, float (&f)[kElementsPerVector]) const {
    float g[kElementsPerVector];
    to_float(residual[i], g);
#pragma unroll
    for (int j = 0; j < kElementsPerVector; j++)
      f[j] *= DeviceMath<T>::times_sigmoid(Policy::kGateActivation == GateActivation::kSilu ? g[j] : 1.f, g[j]);
  }

  // Computes what is normalised where a gate multiplies the input.
  __device__ __forceinline__ void multiply_input_by_gate() {
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector];
      to_float(x[i], f);
      multiply_by_gate(i, f);
      from_float(f, product[i]);
    }
  }

  // The i-th vector of what is normalised. An unrounded sum is computed again at each use: registers to keep it would
  // cost more.
  __device__ __forceinline__ void value(int i, float (&f)[kElementsPerVector]) const {
    if constexpr (kHasProduct) return to_float(product[i], f);
    if constexpr (Policy::kRoundSum && !kSumReplacesX) return to_float(residual[i], f);
    to_float(x[i], f);
    if constexpr (Policy::kSubtractsMean) {
      static_assert(!Policy::kHasResidual, "LayerNorm has no residual");
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] -= mean;
    }
    if (!Policy::kHasResidual || Policy::kRoundSum || Policy::kGating != Gating::kNone) return;
    float r[kElementsPerVector];
    to_float(residual[i], r);
#pragma unroll
    for (int j = 0; j < kElementsPerVector; j++) f[j] += r[j];
  }

  // Of the input, for the mean.
  __device__ __forceinline__ float sum() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector], elements = 0;  // one sum per vector, as in sum_of_squares
      to_float(x[i], f);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) elements += f[j];
      sum += elements;
    }
    return sum;
  }

  __device__ __forceinline__ float sum_of_squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      // One sum per vector: in a single sum over all vectors, each addition would wait for the one before.
      float f[kElementsPerVector], squares = 0;
      value(i, f);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) squares = fmaf(f[j], f[j], squares);
      sum += squares;
    }
    return sum;
  }

  // Rounds to the input's type.
  static __device__ __forceinline__ void round(float (&f)[kElementsPerVector]) {
    Vector<T, kElementsPerVector> rounded;
    from_float(f, rounded);
    to_float(rounded, f);
  }

  // The i-th vector of the result, in float. `rstd` is the reciprocal root mean square of the row's values.
  __device__ __forceinline__ void normalised(int i, float rstd, float (&f)[kElementsPerVector]) const {
    float w[kElementsPerVector];
    value(i, f);
    if constexpr (Policy::kHasWeight) to_float(weight_vector(i), w);
    if constexpr (Policy::kRoundNormalised) {
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] *= rstd;
      round(f);
      rstd = 1;  // so that the product below changes nothing
    }
#pragma unroll
    for (int j = 0; j < kElementsPerVector; j++)
      if constexpr (!Policy::kHasWeight) f[j] *= rstd;
      else f[j] = f[j] * rstd * (Policy::kWeightOffset == 0 ? w[j] : Policy::kWeightOffset + w[j]);
    if constexpr (Policy::kHasBias) {
      to_float(bias[i], w);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] += w[j];
    }
    if constexpr (Policy::kGating == Gating::kAfterNorm) {
      // A weight of another type makes the product float32.
      if constexpr (Policy::kRoundNormalised && Policy::kHasWeight && kIsSame<T, W>) round(f);
      multiply_by_gate(i, f);
    }
  }

  // The largest magnitude of the result.
  __device__ __forceinline__ float amax(float rstd) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector];
      normalised(i, rstd, f);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) largest = fmaxf(largest, fabsf(f[j]));
    }
    return largest;
  }

  __device__ __forceinline__ void write(typename Kernel::output_t* out, float rstd) const {
    write(out, rstd, [](float y) { return y; });
  }

  // Writes epilogue(y) of each normalised number y, rounded to Out.
  template <typename Out, typename Epilogue>
  __device__ __forceinline__ void write(Out* out, float rstd, Epilogue epilogue) const {
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector];
      normalised(i, rstd, f);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] = epilogue(f[j]);
      Vector<Out, kElementsPerVector> y;
      from_float(f, y);
      store_aligned_to<Kernel::template kAccessBytesOf<Out>>(out + offset(i), y);
    }
  }
};

// The mean of a row's numbers plus eps, from their sum, with one rounding even if 1 / kHiddenSize is not exact in
// float. kInverseResidue may be negative, so it never multiplies an infinite sum: inf - inf would be NaN.
template <typename Kernel>
__device__ __forceinline__ float mean_plus_eps(float sum, float eps) {
  constexpr float kMaxFloat = 3.402823466e38f;
  if (Kernel::kInverseResidue == 0) return fmaf(sum, Kernel::kInverse, eps);
  return fmaf(sum, Kernel::kInverse, fmaf(fminf(sum, kMaxFloat), Kernel::kInverseResidue, eps));
}

// The reciprocal root mean square, for outputs computed from T.
template <typename T>
__device__ __forceinline__ float rstd_of(float mean_plus_eps) {
  // rsqrtf is off by at most 2 ulp, which 16-bit outputs cannot show, and saves 40 ns of a row's latency.
  return sizeof(T) == 4 ? __frsqrt_rn(mean_plus_eps) : rsqrtf(mean_plus_eps);
}

}  // namespace jitnorm
