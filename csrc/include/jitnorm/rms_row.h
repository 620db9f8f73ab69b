// RMSNorm of rows on CUDA: the schedule of a row over threads, the constants of a kernel class, and RowFragment, the
// part of a row that a thread holds between one read and one write, in registers or in shared memory. Included by
// elementwise/rmsnorm.cuh, elementwise/qknorm.cuh and elementwise/dual_rmsnorm.cuh.
//
// Hidden size, dtypes, operator and architecture fix the schedule, never the number of rows: a row's bits are the same
// in any batch. benchmarks/tune_rmsnorm.py compares schedules on a GPU; docs/contributing/decisions.md has its results.
#pragma once
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/device_math.h"
#include "jitnorm/reduce.h"
#include "jitnorm/rms_policy.h"
#include "jitnorm/vector.h"

namespace jitnorm {

// How rows are divided among threads. kThreadsPerRow counts the threads of all blocks of a cluster, which then has one
// row. With kRowInSharedMemory a row waits there between its read and its write, and not in registers.
// kScheduledBlocksPerSM is the number of blocks on an SM for which __launch_bounds__ limits registers; with 0,
// RMSNormKernelBase computes one.
template <int kThreadsPerRow_, int kRowsPerBlock_, int kBlocksPerCluster_ = 1, bool kRowInSharedMemory_ = false,
          int kScheduledBlocksPerSM_ = 0>
struct Schedule {
  static constexpr int kThreadsPerRow = kThreadsPerRow_;
  static constexpr int kRowsPerBlock = kRowsPerBlock_;
  static constexpr int kBlocksPerCluster = kBlocksPerCluster_;
  static constexpr bool kRowInSharedMemory = kRowInSharedMemory_;
  static constexpr int kScheduledBlocksPerSM = kScheduledBlocksPerSM_;
};

// A schedule as a value.
struct RowSchedule {
  int threads;  // of a row, in one block
  int rows_per_block = 1;
  int blocks_per_cluster = 1;
  bool in_shared_memory = false;
  int blocks_per_sm = 0;
};

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

// Longer rows: about two vectors per thread with up to 256 threads, then up to five, evenly if the size allows it. More
// threads reduce the latency of a single row, but keep fewer rows in flight. `vector_bytes` is less than 16 where a row
// is not whole vectors of 16 bytes.
constexpr int block_threads_per_row(int row_bytes, int vector_bytes) {
  const int vectors = row_bytes / 16;
  if (vectors <= 128) return vectors <= 80 ? 32 : 64;  // of 64, at most 16 would have a second vector
  // Accesses of 2 bytes are so many that a third vector's bytes do not delay the row, and more rows are in flight.
  if (vector_bytes == 2 && vectors > 256 && vectors <= 512) return round_up((vectors + 2) / 3, 32);
  // Unevenly, as an SM has four schedulers for the warps, and 224 threads are seven warps.
  if (vector_bytes == 16 && vectors == 448) return 256;
  // Where vectors cannot be divided evenly among whole warps, as few warps as can hold them, for more rows in flight.
  if (vectors <= 256) return vectors % 32 == 0 ? 128 : round_up((vectors + 1) / 2, 32);
  const int max_vectors = vectors <= 512 ? 2 : 5, max_threads = vectors <= 1280 ? 256 : 512;
  for (int threads = 128; threads <= max_threads; threads += 32)
    if (vectors % threads == 0 && vectors / threads <= max_vectors) return threads;
  if (vectors % 32 != 0) return min(1024, max(128, round_up((vectors + max_vectors - 1) / max_vectors, 32)));
  return min(1024, round_up(vectors, 5 * 128) / 5);
}

// LayerNorm, whose threads compute two sums: up to five times 16 bytes of a row per thread, evenly if a few more
// threads allow it, and blocks that read 8 to 16 KiB.
constexpr int layernorm_threads_per_row(int row_bytes) {
  const int vectors = row_bytes / 16, fewest = round_up((vectors + 4) / 5, 32);
  for (int threads = fewest; threads <= min(1024, 2 * fewest); threads += 32)
    if (vectors % threads == 0) return threads;
  return min(1024, fewest);
}
constexpr int layernorm_rows_per_block(int row_bytes, int threads_per_row) {
  int rows = 1;
  while (rows * row_bytes < 8192 && 2 * rows * threads_per_row <= 256) rows *= 2;
  return rows;
}

// With a residual a thread holds two rows' vectors: one of each with up to 256 threads, then two with up to 512. The
// number of vectors is that of the row with the wider elements. Narrower vectors are more than these, and fewer threads
// keep enough of them in flight; of long rows, an even number of warps.
constexpr int residual_threads_per_row(int row_bytes, bool has_whole_vectors) {
  const int vectors = row_bytes / 16;
  if (!has_whole_vectors && vectors <= 1024) return round_up((vectors + 2) / 3, vectors > 512 ? 64 : 32);
  const int per_thread = vectors <= 256 ? 1 : vectors <= 1024 ? 2 : round_up(vectors, 512) / 512;
  return round_up((vectors + per_thread - 1) / per_thread, 32);
}

// Long rows do not fit the registers of one block beside weight and bias, or leave no room for a second block on its
// SM. The blocks of a cluster share such a row, or it waits in shared memory, or both. Before sm_90 one block holds any
// row in registers, which may spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kSplitsLongRows = false;
#else
constexpr bool kSplitsLongRows = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kMaxRowBytesInShared = 96 * 1024;  // of a block's 99 KiB
#else
constexpr int kMaxRowBytesInShared = 192 * 1024;  // of a block's 227 KiB
#endif

// The blocks that share a row, up to the number that any GPU with clusters allows.
constexpr int blocks_per_cluster(int row_bytes, int max_bytes_of_block) {
  int blocks = 1;
  while (blocks < 8 && row_bytes > blocks * max_bytes_of_block) blocks *= 2;
  return blocks;
}

// A row in the registers of the eight blocks of a cluster. `row_bytes` is that of the wider of input and residual, and
// `row_read_bytes` that of both. Small blocks, of which several share an SM, keep loads in flight while others wait for
// their cluster, and shorten the tail of the grid.
constexpr RowSchedule cluster_row(int row_bytes, int row_read_bytes) {
  const int vectors = (row_bytes / 16 + 7) / 8;  // of a block
  if (row_read_bytes > 256 * 1024) {
    const int per_thread = (vectors + 511) / 512;
    return {round_up((vectors + per_thread - 1) / per_thread, 32), 1, 8, false, 2};
  }
  const bool is_short = row_read_bytes <= 128 * 1024;
  const int per_thread = (is_short ? 4 : 8) * row_bytes / row_read_bytes;
  const int threads = round_up((vectors + per_thread - 1) / per_thread, 32);
  return {threads, 1, 8, false, min(6, (is_short ? 1280 : 768) / threads)};
}

// The registers of a block hold 128 KiB of a row and its gate. A gate after the norm needs more, as the compiler keeps
// both as floats, and such a row waits in shared memory. One with a gate before the norm does not, as its product needs
// registers in any case.
constexpr RowSchedule long_gated_row(int row_read_bytes, bool has_gate_after_norm) {
  if (has_gate_after_norm && row_read_bytes <= kMaxRowBytesInShared) return {1024, 1, 1, true};
  return {1024, 1, blocks_per_cluster(row_read_bytes, 128 * 1024)};
}

// LayerNorm mostly waits for weight and bias, which are longer than the row. Several blocks on an SM hide that.
constexpr RowSchedule long_layernorm_row(int row_bytes) {
  if (row_bytes <= 64 * 1024) return {row_bytes <= 32 * 1024 ? 384 : 512, 1, 1, true};
  return {256, 1, blocks_per_cluster(row_bytes, 32 * 1024), true};
}

// Rows of no whole vectors of 16 bytes. `row_bytes` is that of the wider of input and residual.
constexpr RowSchedule long_narrow_row(int row_bytes, bool has_residual) {
  const int blocks = row_bytes <= 64 * 1024 ? 2 : 8, block_row_bytes = round_up(row_bytes / blocks, 16);
  const int threads =
      has_residual ? residual_threads_per_row(block_row_bytes, false) : round_up((block_row_bytes / 16 + 3) / 4, 32);
  return {threads, 1, blocks};
}

// The elements of a vector: those of 16 bytes, or so many fewer that a row is whole vectors.
constexpr int elements_per_vector(int hidden_size, int element_bytes) {
  int elements = 16 / element_bytes;
  while (hidden_size % elements) elements /= 2;
  return elements;
}

// The bytes of an element of input and residual; 0 for the residual of a policy without one.
template <typename T, typename Policy>
struct ElementBytes {
  static constexpr int kInput = sizeof(T);
  static constexpr int kResidual = Policy::kHasResidual ? sizeof(typename Policy::template residual_t<T>) : 0;
  static constexpr int kWider = max(kInput, kResidual);  // vectors have 16 bytes of these
};

// The schedule of a row. Some, as threads of a block and their vectors of 16 bytes of each tensor, from sm_90 on:
//
//   hidden size   bf16                  float32               bf16 with a residual
//   4096          256 x 2               256 x 4               256 x 2
//   8192          256 x 4               512 x 4               512 x 2
//   16384         512 x 4               896 x 5               512 x 4
//   32768         8 blocks of 128 x 4   8 blocks of 256 x 4   8 blocks of 256 x 2
//   65536         8 blocks of 128 x 8   8 blocks of 256 x 8   8 blocks of 256 x 4
template <int kHiddenSize, typename T, typename Policy>
constexpr RowSchedule default_schedule() {
  using Bytes = ElementBytes<T, Policy>;
  const int row_bytes = round_up(kHiddenSize * Bytes::kWider, 16);
  const int row_read_bytes = kHiddenSize * (Bytes::kInput + Bytes::kResidual);
  const int vector_bytes = elements_per_vector(kHiddenSize, Bytes::kWider) * Bytes::kWider;
  int threads = 0;
  bool is_even = vector_bytes == 16 && row_bytes % (16 * kWarpSize) == 0;
  if (kHiddenSize <= 256) {
    threads = warp_threads_per_row(row_bytes);
    is_even = true;
  } else if (vector_bytes < 16) {
    if (kSplitsLongRows && row_bytes > 32 * 1024) return long_narrow_row(row_bytes, Policy::kHasResidual);
    threads = Policy::kHasResidual ? residual_threads_per_row(row_bytes, false)
                                   : block_threads_per_row(row_bytes, vector_bytes);
  } else if (Policy::kSubtractsMean) {
    if (kSplitsLongRows && row_bytes > 20 * 1024) return long_layernorm_row(row_bytes);
    threads = layernorm_threads_per_row(row_bytes);
    return {threads, layernorm_rows_per_block(row_bytes, threads)};
  } else if (Policy::kGating != Gating::kNone) {
    if (kSplitsLongRows && row_bytes > 48 * 1024)
      return long_gated_row(row_read_bytes, Policy::kGating == Gating::kAfterNorm);
    threads = residual_threads_per_row(row_bytes, true);
  } else if (Policy::kHasResidual) {
    if (kSplitsLongRows && row_read_bytes > 72 * 1024) return cluster_row(row_bytes, row_read_bytes);
    threads = residual_threads_per_row(row_bytes, true);
  } else if (Bytes::kInput == 2) {
    // Of longer rows, one block each keeps too few in flight. A thread of the cluster has up to eight vectors.
    if (kSplitsLongRows && row_bytes > 44 * 1024) return {128, 1, 8, false, 8};
    threads = block_threads_per_row(row_bytes, 16);
  } else {
    if (kSplitsLongRows && row_bytes > 64 * 1024) return cluster_row(row_bytes, row_read_bytes);
    threads = block_threads_per_row(row_bytes, 16);
  }
  return {threads, rows_per_block(row_read_bytes, threads, is_even)};
}

template <int kHiddenSize, typename T, typename Policy>
struct DefaultSchedule {
  static constexpr RowSchedule kRow = default_schedule<kHiddenSize, T, Policy>();
  using type = Schedule<kRow.threads * kRow.blocks_per_cluster, kRow.rows_per_block, kRow.blocks_per_cluster,
                        kRow.in_shared_memory, kRow.blocks_per_sm>;
};

constexpr int kRegistersPerSM = 65536;
constexpr int kSharedBytesPerSM = kMaxRowBytesInShared + 4 * 1024;  // that rows may fill
// The resident threads that every SM before sm_80 allows, and every one from sm_80 on. An SM may allow more, but more
// blocks would leave each thread fewer registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMinResidentThreadsPerSM = 1024;
#else
constexpr int kMinResidentThreadsPerSM = 1536;
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
  // The bytes of the widest element of a vector. LayerNorm reads so much of weight and bias that they count too.
  static constexpr int kWidestBytes = Policy::kSubtractsMean ? max(Bytes::kWider, sizeof(W)) : Bytes::kWider;
  static constexpr int kElementsPerVector = elements_per_vector(kHiddenSize, kWidestBytes);
  static constexpr bool kHasWholeVectors = kElementsPerVector * kWidestBytes == 16;
  // The widest access to rows of E, in bytes.
  template <typename E>
  static constexpr int kAccessBytesOf = Policy::kAccessBytes == 0 ? sizeof(E) : Policy::kAccessBytes;
  // What rows of E must be aligned to, in bytes.
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
  // The dynamic shared memory of a block.
  static constexpr int kSharedBytes =
      S::kRowInSharedMemory ? kVectorsPerThread * kThreads * kElementsPerVector * (Bytes::kInput + Bytes::kResidual)
                            : 0;
  static_assert(!S::kRowInSharedMemory || Policy::kSubtractsMean || Policy::kGating == Gating::kAfterNorm,
                "other rows wait in registers");
  // A block with more than 32 KiB of a row and up to 512 threads leaves half of an SM's registers to another block.
  static constexpr bool kSharesSM =
      !Policy::kHasResidual && kBlockReadBytes > 32 * 1024 && kBlockReadBytes < 64 * 1024 && kThreads <= 512;
  // Whether a block takes most of the registers of an SM: for more than 64 KiB, or 96 KiB of two tensors and up to 512
  // threads.
  static constexpr bool kFillsRegisters =
      !S::kRowInSharedMemory && kBlockReadBytes > (Policy::kHasResidual && kThreads <= 512 ? 96 : 64) * 1024;
  // Where weight and bias would take registers that rows in flight need, they are loaded after the reduction. LayerNorm
  // does so in a large grid: in another one its latency would suffer.
  static constexpr bool kLoadsWeightAfterReduction =
      Policy::kSubtractsMean || kSharesSM || kFillsRegisters || S::kScheduledBlocksPerSM > 0;
  // The compiler would keep 16-bit elements as floats, in twice the registers, until they are written.
  static constexpr bool kConvertsTwice =
      kLoadsWeightAfterReduction && !Policy::kSubtractsMean && !Policy::kHasResidual && Bytes::kInput == 2;
  // 64 KiB of rows in flight on an SM keep memory busy. Where blocks are large, kMinBlocksPerSM limits registers for
  // that, as far as a thread's vectors of row, residual and weight allow, by an estimate. Small blocks fit an SM in any
  // case.
  static constexpr int kRegistersPerThread =
      (4 * kVectorsPerThread + 12) * kElementsPerVector *
      (Bytes::kInput + Bytes::kResidual + (kLoadsWeightAfterReduction ? 0 : sizeof(W))) / 16;
  static constexpr int kMaxBlocksPerSM =
      min(kRegistersPerSM / (kRegistersPerThread * kThreads), kMinResidentThreadsPerSM / kThreads);
  // 48 KiB are those of LayerNorm's long rows of 16-bit elements that a float weight divides into vectors of 8 bytes.
  static constexpr int kBytesInFlight = (S::kBlocksPerCluster == 1 ? 64 : 48) * 1024;
  // With a bias, or with accesses of less than 16 bytes, a thread needs more registers than a schedule with many blocks
  // leaves: three quarters of these then, rounded up.
  static constexpr int kReducedBlocksPerSM =
      Policy::kHasBias || kAlignment < 16 ? (3 * S::kScheduledBlocksPerSM + 3) / 4 : S::kScheduledBlocksPerSM;
  static constexpr int kTargetBlocksPerSM =
      S::kScheduledBlocksPerSM > 0 ? kReducedBlocksPerSM
      : S::kRowInSharedMemory      ? max(1, min(kSharedBytesPerSM / kSharedBytes, kMinResidentThreadsPerSM / kThreads))
      : kBlockReadBytes < 8192 || !kHasWholeVectors
          ? 1
          : max(1, min(kSharesSM ? 2 : kBytesInFlight / kBlockReadBytes, kMaxBlocksPerSM));
  static constexpr int kMinBlocksPerSM = Policy::kSubtractsMean ? 1 : kTargetBlocksPerSM;
  static constexpr int kMinBlocksPerSMOfLargeGrid = kTargetBlocksPerSM;
  // In a large grid, which reads about as much as L2 holds or more, a block prefetches into L2 the rows of the block
  // with an index kBlocksAhead larger, or its part of that cluster's row: without that, memory is idle for 1 to 5% of
  // the time. In a smaller grid, the prefetch would delay the block's own rows.
  static constexpr int kLargeGridBytes = (Policy::kHasResidual ? 16 : 48) << 20;
  static constexpr int kBytesAhead = (Policy::kHasResidual || S::kBlocksPerCluster > 1 ? 4 : 2) << 20;
  // Rows without a residual that are read by accesses of 4 or 8 bytes have no gain from it. Those of 16-bit elements in
  // clusters have a loss with eight vectors a thread, which are enough in flight. So had rows that fill registers, as
  // some do before sm_90.
  static constexpr bool kHasPrefetch =
      kRowBytes >= 256 && !kFillsRegisters && !Policy::kIsGeneral &&
      (S::kBlocksPerCluster > 1 ? kRowBytes % 16 == 0 && !(kConvertsTwice && kVectorsPerThread > 7)
                                : kRowBytes % 16 == 0 || Policy::kHasResidual || kAlignment == 2);
  static constexpr unsigned kBlocksAhead = S::kBlocksPerCluster > 1
                                               ? kBytesAhead / (kRowBytes + kResidualRowBytes) * S::kBlocksPerCluster
                                               : max(128, kBytesAhead / kBlockReadBytes);
  // The blocks of the smallest large grid; a row of a cluster has several. LayerNorm, whose weight and bias are loaded
  // after the reduction there, has one from 1,025 blocks on, or 129 where rows wait in shared memory, as fewer fill an
  // SM.
  static constexpr unsigned kMinLargeGrid = Policy::kSubtractsMean ? (S::kRowInSharedMemory ? 129 : 1025)
                                            : !kHasPrefetch        ? kNoLargeGrid
                                            : Policy::kHasResidual ? max(1024, kLargeGridBytes / kBlockReadBytes)
                                                                   : kLargeGridBytes / kBlockReadBytes;
  // The blocks of the largest small grid. There a block launches its dependents late if threads have much to compute
  // after their loads: the next kernel's blocks would slow that down.
  static constexpr unsigned kMaxSmallGrid =
      kVectorsPerThread > 3 && !Policy::kHasResidual && !Policy::kSubtractsMean ? 16 : kNoSmallGrid;
};

// The vectors of a row that one thread holds: every kThreadsPerRow-th, beginning with number `thread_in_row`, the
// thread's index among those of its row, in all blocks of a cluster. Beside a float residual, a vector of 16-bit inputs
// has 8 bytes: then the warp's accesses to either have no gaps, and its stores fill whole sectors.
template <typename Kernel, bool kLoadsWeightAfterReduction = false>
struct RowFragment {
  using T = typename Kernel::input_t;
  using R = typename Kernel::residual_t;
  using W = typename Kernel::weight_t;
  using Policy = typename Kernel::policy_t;
  static constexpr int kThreadsPerRow = Kernel::kThreadsPerRow;
  static constexpr int kElementsPerVector = Kernel::kElementsPerVector;
  static constexpr int kVectorsPerRow = Kernel::kVectorsPerRow;
  static constexpr int kVectorsPerThread = Kernel::kVectorsPerThread;
  using InputVector = Vector<T, kElementsPerVector>;
  using ResidualVector = Vector<R, kElementsPerVector>;
  using WeightVector = Vector<W, kElementsPerVector>;
  // Where a stored sum that is normalised is kept: in the registers of x or, if it is wider, of the residual.
  static constexpr bool kSumReplacesX = Policy::kRoundSum && sizeof(R) == sizeof(T);
  static constexpr bool kHasProduct = Policy::kGating == Gating::kBeforeNorm;
  static_assert(!Policy::kSubtractsMean || !Policy::kHasResidual, "LayerNorm has no residual");

  const int thread_in_row;
  float mean;  // subtracted by `value`; of policies with kSubtractsMean alone
  InputVector x[Kernel::kRowInSharedMemory ? 1 : kVectorsPerThread];
  ResidualVector residual[Policy::kHasResidual && !Kernel::kRowInSharedMemory ? kVectorsPerThread : 1];
  const W *weight_row, *bias_row;  // if they are loaded after the reduction
  WeightVector weight[Policy::kHasWeight && !kLoadsWeightAfterReduction ? kVectorsPerThread : 1];
  WeightVector bias[Policy::kHasBias && !kLoadsWeightAfterReduction ? kVectorsPerThread : 1];
  // Of a gate before the norm. It takes the registers of x and residual, which hold the gate.
  Vector<float, kElementsPerVector> product[kHasProduct ? kVectorsPerThread : 1];

  explicit __device__ RowFragment(int thread_in_row) : thread_in_row(thread_in_row) {}

  // Whether the thread has an i-th vector: a row's vectors may not divide evenly among its threads.
  __device__ __forceinline__ bool has(int i) const {
    return kVectorsPerRow % kThreadsPerRow == 0 || thread_in_row + i * kThreadsPerRow < kVectorsPerRow;
  }
  __device__ __forceinline__ int offset(int i) const {
    return (thread_in_row + i * kThreadsPerRow) * kElementsPerVector;
  }

  template <typename E, int kSize>
  __device__ __forceinline__ void load(Vector<E, kElementsPerVector> (&dst)[kSize], const E* src) {
#pragma unroll
    for (int i = 0; i < kSize; i++)
      if (has(i)) dst[i] = load_aligned_to<Kernel::template kAccessBytesOf<E>, E, kElementsPerVector>(src + offset(i));
  }

  // Loads the vectors of the row: to registers or to shared memory, without waiting where accesses are wide.
  __device__ __forceinline__ void load_input(const T* src) {
    if constexpr (Kernel::kRowInSharedMemory) {
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; i++)
        if (has(i)) copy_to_shared(shared_input(i), src + offset(i));
    } else {
      load(x, src);
    }
  }
  __device__ __forceinline__ void load_residual(const R* src) {
    if constexpr (Kernel::kRowInSharedMemory) {
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; i++)
        if (has(i)) copy_to_shared(shared_residual(i), src + offset(i));
    } else {
      load(residual, src);
    }
  }
  template <typename E>
  static __device__ __forceinline__ void copy_to_shared(Vector<E, kElementsPerVector>* dst, const E* src) {
    constexpr int kBytes = Kernel::template kAccessBytesOf<E>;
    if constexpr (kBytes == 16) copy_async(dst, src);
    else *dst = load_aligned_to<kBytes, E, kElementsPerVector>(src);
  }
  // To be called before the row is used.
  __device__ __forceinline__ void wait_for_row() const {
    if constexpr (Kernel::kRowInSharedMemory) wait_for_async_copies();
  }

  // Where the thread keeps its i-th vectors of a row in shared memory. No other thread reads them.
  static __device__ __forceinline__ InputVector* shared_input(int i) {
    extern __shared__ uint4 shared_rows[];
    return reinterpret_cast<InputVector*>(shared_rows) + i * Kernel::kThreads + threadIdx.x;
  }
  static __device__ __forceinline__ ResidualVector* shared_residual(int i) {
    extern __shared__ uint4 shared_rows[];
    return reinterpret_cast<ResidualVector*>(reinterpret_cast<InputVector*>(shared_rows) +
                                             kVectorsPerThread * Kernel::kThreads) +
           i * Kernel::kThreads + threadIdx.x;
  }

  __device__ __forceinline__ const InputVector& input_vector(int i) const {
    if constexpr (Kernel::kRowInSharedMemory) return *shared_input(i);
    else return x[i];
  }
  __device__ __forceinline__ const ResidualVector& residual_vector(int i) const {
    if constexpr (Kernel::kRowInSharedMemory) return *shared_residual(i);
    else return residual[i];
  }
  // Loads the vectors of weight and bias, now or when they are used.
  __device__ __forceinline__ void load_weight_and_bias(const W* of_weight, const W* of_bias) {
    if constexpr (kLoadsWeightAfterReduction) {
      weight_row = of_weight;
      bias_row = of_bias;
    } else {
      if constexpr (Policy::kHasWeight) load(weight, of_weight);
      if constexpr (Policy::kHasBias) load(bias, of_bias);
    }
  }
  // To be called after the reduction. The compiler must not move loads of weight and bias above it: they would take
  // registers, or precede grid_dependency_wait.
  __device__ __forceinline__ void block_early_loads() {
    if constexpr (kLoadsWeightAfterReduction) optimization_barrier(weight_row), optimization_barrier(bias_row);
    if constexpr (Kernel::kConvertsTwice) {
#pragma unroll
      for (int i = 0; i < kVectorsPerThread; i++) optimization_barrier(x[i]);
    }
  }
  // The i-th vector of weight or bias: of those that are loaded, or of the row in memory.
  template <int kSize>
  __device__ __forceinline__ WeightVector factor(const WeightVector (&loaded)[kSize], const W* row, int i) const {
    if constexpr (!kLoadsWeightAfterReduction) return loaded[i];
    else
      return load_aligned_to<Kernel::template kAccessBytesOf<W>, W, kElementsPerVector, ConstantLoads>(row + offset(i));
  }

  // Adds the input to the residual, and stores the sum to `dst`.
  __device__ __forceinline__ void add_residual(R* dst) {
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector], r[kElementsPerVector];
      to_float(input_vector(i), f);
      to_float(residual_vector(i), r);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) f[j] += r[j];
      ResidualVector sum;
      from_float(f, sum);
      store_aligned_to<Kernel::template kAccessBytesOf<R>>(dst + offset(i), sum);
      if constexpr (kSumReplacesX) x[i] = sum;
      else if constexpr (Policy::kRoundSum) residual[i] = sum;
    }
  }

  // Multiplies f by the activation of the i-th vector of the gate.
  __device__ __forceinline__ void multiply_by_gate(int i, float (&f)[kElementsPerVector]) const {
    float g[kElementsPerVector];
    to_float(residual_vector(i), g);
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
      to_float(input_vector(i), f);
      multiply_by_gate(i, f);
      from_float(f, product[i]);
    }
  }

  // The i-th vector of what is normalised. An unrounded sum is computed again at each use: registers to keep it would
  // cost more.
  __device__ __forceinline__ void value(int i, float (&f)[kElementsPerVector]) const {
    if constexpr (kHasProduct) {
      to_float(product[i], f);
    } else if constexpr (Policy::kRoundSum && !kSumReplacesX) {
      to_float(residual_vector(i), f);
    } else {
      to_float(input_vector(i), f);
      if constexpr (Policy::kSubtractsMean) {
#pragma unroll
        for (int j = 0; j < kElementsPerVector; j++) f[j] -= mean;
      } else if constexpr (Policy::kHasResidual && !Policy::kRoundSum && Policy::kGating == Gating::kNone) {
        float r[kElementsPerVector];
        to_float(residual_vector(i), r);
#pragma unroll
        for (int j = 0; j < kElementsPerVector; j++) f[j] += r[j];
      }
    }
  }

  // Of the input, for the mean.
  __device__ __forceinline__ float sum() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (!has(i)) continue;
      float f[kElementsPerVector], elements = 0;  // one sum per vector, as in sum_of_squares
      to_float(input_vector(i), f);
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
    if constexpr (Policy::kHasWeight) to_float(factor(weight, weight_row, i), w);
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
      to_float(factor(bias, bias_row, i), w);
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
