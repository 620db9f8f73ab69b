// The product of up to 64 rows and the transpose of a weight, for Hopper's wgmma and TMA. Such a product takes as long
// as it takes to read the weight, if its reads do not wait for anything else: on an H100 SXM or H200 one wave of blocks
// has up to 28,672 columns, and as many copies are under way as shared memory holds. One warp copies boxes of the
// weight to shared memory and another one boxes of x, by TMA; two warpgroups multiply them, each every second step of
// k. With the formula of an activation, half of a block's columns are gates, and the others their factors.
//
// The first boxes of the weight are copied before the wait for the kernel before this one: no kernel that writes the
// weight may still be running. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "gemm/few_rows_wgmma.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/device_math.h"
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"

namespace jitnorm {

// Barriers in shared memory, which wait for arrivals and for the bytes of TMA copies. They are 32-bit addresses.
__device__ __forceinline__ void init_barrier(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_and_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

// A TMA copy of the box that begins at column `k` of `row`. What lies outside of the matrix becomes zero.
__device__ __forceinline__ void copy_box(unsigned to, const TensorMap& map, int k, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          to),
      "l"(&map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// d += a b, by a warpgroup: a has 64 rows, b `n` columns, and both 16 elements of k in shared memory, which descriptors
// tell. Without `accumulate`, d = a b. In d, a thread has what it has in the result of mma.m16n8k16, for rows of its
// warp and each 8 columns. D, A, B and P are the numbers of the operands d, a, b and accumulate in the instruction.
#define JITNORM_WGMMA(N, TYPE, D, A, B, P, ...)                                                                       \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " P ", 0; wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
               " {" D "}, " A ", " B ", p, 1, 1, 0, 0;}"                                                              \
               : __VA_ARGS__                                                                                          \
               : "l"(a), "l"(b), "r"(accumulate))
#define JITNORM_D4(I) "+f"(d[I]), "+f"(d[I + 1]), "+f"(d[I + 2]), "+f"(d[I + 3])
#define JITNORM_D16(I) JITNORM_D4(I), JITNORM_D4(I + 4), JITNORM_D4(I + 8), JITNORM_D4(I + 12)
#define JITNORM_WGMMA_OF(N, D, A, B, P, ...)                                                           \
  template <typename T>                                                                                \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], unsigned long long a, unsigned long long b, \
                                        int accumulate) {                                              \
    if constexpr (kIsBf16<T>) JITNORM_WGMMA(#N, "bf16", D, A, B, P, __VA_ARGS__);                      \
    else JITNORM_WGMMA(#N, "f16", D, A, B, P, __VA_ARGS__);                                            \
  }

JITNORM_WGMMA_OF(8, "%0, %1, %2, %3", "%4", "%5", "%6", JITNORM_D4(0))
JITNORM_WGMMA_OF(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", JITNORM_D4(0), JITNORM_D4(4))
JITNORM_WGMMA_OF(32, "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15", "%16", "%17", "%18",
                 JITNORM_D16(0))
JITNORM_WGMMA_OF(64,
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                 "%32", "%33", "%34", JITNORM_D16(0), JITNORM_D16(16))
#undef JITNORM_WGMMA_OF
#undef JITNORM_D16
#undef JITNORM_D4
#undef JITNORM_WGMMA

// What a thread has of 64 rows and kColumns columns: the largest instruction's part that fits, and the rest.
template <typename T, int kColumns>
struct Accumulator {
  static constexpr int kPart = kColumns >= 64 ? 64 : kColumns >= 32 ? 32 : kColumns >= 16 ? 16 : 8;
  float sum[kPart / 2];
  Accumulator<T, kColumns - kPart> rest;

  __device__ __forceinline__ void multiply(unsigned long long a, unsigned long long b, int accumulate) {
    wgmma<T>(sum, a, b, accumulate);
    rest.multiply(a, b + kPart * kBoxK * sizeof(T) / 16, accumulate);  // a descriptor counts 16 bytes
  }

  // To rows of kPitch floats. `low` and `high` say whether the thread's row and the row 8 below are wanted.
  template <int kPitch>
  __device__ __forceinline__ void store(float* to, bool low, bool high) const {
#pragma unroll
    for (int i = 0; i < kPart / 8; i++) {
      if (low) *reinterpret_cast<float2*>(to + i * 8) = make_float2(sum[4 * i], sum[4 * i + 1]);
      if (high) *reinterpret_cast<float2*>(to + 8 * kPitch + i * 8) = make_float2(sum[4 * i + 2], sum[4 * i + 3]);
    }
    rest.template store<kPitch>(to + kPart, low, high);
  }
};
template <typename T>
struct Accumulator<T, 0> {
  __device__ __forceinline__ void multiply(unsigned long long, unsigned long long, int) {}
  template <int kPitch>
  __device__ __forceinline__ void store(float*, bool, bool) const {}
};

template <int kN_, int kK_, typename T, typename Formula = NoActivation>
struct FewRowsWgmmaKernel {
  using input_t = T;
  using params_t = FewRowsWgmmaParams;
  using info_t = FewRowsGemmInfo;
  static constexpr int kN = kN_, kK = kK_;
  static constexpr unsigned kAlignment = 16;
  static constexpr int kMaxRows = 64;  // of a wgmma instruction
  static constexpr bool kGated = kIsGated<Formula>;
  static constexpr int kHalves = kGated ? 2 : 1, kOutColumns = kN / kHalves;
  static constexpr int kColumnStep = 8 * kHalves;  // columns of an instruction
  static_assert(kN % kColumnStep == 0 && kK % kBoxK == 0, "columns of an instruction, and boxes");

  // 128 blocks are one wave on the 132 SMs of an H100 SXM or H200. A block has up to 224 columns, whose sums fit in its
  // registers.
  static constexpr int columns_of(int splits) {
    const int columns = kN * splits, waves = (columns + 128 * 224 - 1) / (128 * 224);
    const int step = 128 * kColumnStep * waves;
    return (columns + step - 1) / step * kColumnStep;
  }
  // Each block reads all rows of x. Where that is much beside its columns of the weight, two blocks share these columns
  // and each has half of k. Clusters of four would not all fit in one wave.
  static constexpr bool kSplitsK = (kN < 2048 || (kK > 4096 && kN <= 8192)) && kK % (2 * kBoxK) == 0;
  static constexpr int kSplits = kSplitsK ? 2 : 1, kColumns = columns_of(kSplits);
  static constexpr int kOutColumnsPerBlock = kColumns / kHalves;
  static constexpr int kKPerBlock = kK / kSplits;
  // A step's copies and barriers cost about 50 ns: with few columns it takes two boxes.
  static constexpr int kBoxesPerStep = kColumns <= (kSplitsK ? 32 : 24) && kKPerBlock % (2 * kBoxK) == 0 ? 2 : 1;
  static constexpr int kStep = kBoxesPerStep * kBoxK, kSteps = kKPerBlock / kStep;

  static constexpr int kWarpgroups = 2, kWarpsPerGroup = 4;  // that multiply
  static constexpr int kWeightWarp = kWarpgroups * kWarpsPerGroup, kRowsWarp = kWeightWarp + 1;
  static constexpr int kThreads = 32 * (kRowsWarp + 1);
  static constexpr unsigned kMaxSmallGrid = kNoSmallGrid, kMinLargeGrid = kNoLargeGrid;
  static constexpr int kMinBlocksPerSM = 1, kMinBlocksPerSMOfLargeGrid = 0;
  static constexpr int kBlocksPerCluster = kSplits;

  // Shared memory: the barriers, and stages of boxes. In the end, the sums of each warpgroup instead of the stages.
  static constexpr int kRowBytes = kBoxK * int(sizeof(T));
  static constexpr int kWeightBoxBytes = kOutColumnsPerBlock * kRowBytes, kRowsBoxBytes = kMaxRows * kRowBytes;
  static constexpr int kWeightBytes = kBoxesPerStep * kHalves * kWeightBoxBytes;
  static constexpr int kStageBytes = kWeightBytes + kBoxesPerStep * kRowsBoxBytes;
  static constexpr int kMaxSharedBytes = 227 * 1024, kBarrierBytes = 1024;
  static constexpr int kMaxStages = 32;  // for which there are barriers
  // Either all steps have a stage of their own, or all uses of a stage are of the same warpgroup. Copies complete in
  // any order, and a barrier tells only the parity of its last phase: a warpgroup that skipped use u - 1 of a stage and
  // waited for use u while u - 1 is incomplete would go on at once, as u - 2 had the same parity.
  static constexpr int kStagesThatFit = min((kMaxSharedBytes - kBarrierBytes) / kStageBytes, kMaxStages);
  static constexpr int kStages = kSteps <= kStagesThatFit ? kSteps : kStagesThatFit / kWarpgroups * kWarpgroups;
  static_assert(kStages == kSteps || kStages >= 2 * kWarpgroups, "a stage is released a step later");
  static constexpr int kPitch = (kColumns + 31) / 32 * 32 + 8;  // a warp's stores have no bank conflicts
  static constexpr int kSumsBytes = kWarpgroups * kMaxRows * kPitch * int(sizeof(float));
  static constexpr int kSharedBytes = kBarrierBytes + max(kStages * kStageBytes, kSumsBytes);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the sums fit");

  // What is copied before the wait takes up the queues of L2, through which the kernel before this one writes x: on an
  // H200, copies of 64 KiB in each block made a norm of 64 rows 1.5 us slower.
  static constexpr int kBytesBeforeWait = (kKPerBlock > 2048 ? 16 : 8) * 1024;
  static constexpr int kStepsBeforeWait = max((kBytesBeforeWait + kWeightBytes / 2) / kWeightBytes, 1);

  template <GridVariant>
  static __device__ __forceinline__ void run(const FewRowsWgmmaParams& p) {
    extern __shared__ __align__(1024) char shared[];  // the swizzle is one of addresses: it repeats every 1024 bytes
    const Block block(shared);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; i++) {
        init_barrier(block.full(i), 2);                // the two warps that copy
        init_barrier(block.empty(i), kWarpsPerGroup);  // the warps that have read the stage
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / kWarpsPerGroup;
    Accumulator<T, kColumns> sum;
    if (warp < kWeightWarp) {
      multiply(block, group, lane, sum);
    } else if (warp == kWeightWarp) {
      if (lane == 0) copy_weight(p, block);
    } else {
      grid_dependency_wait();
      launch_dependents();
      if (lane == 0) copy_rows(p, block);
    }
    __syncwarp();     // the barriers of blocks and clusters are for whole warps
    __syncthreads();  // all stages have been read
    float* sums = reinterpret_cast<float*>(shared + kBarrierBytes);
    if (warp < kWeightWarp) {
      const int row = warp % kWarpsPerGroup * 16 + lane / 4;
      sum.template store<kPitch>(sums + (group * kMaxRows + row) * kPitch + lane % 4 * 2, row < p.num_rows,
                                 row + 8 < p.num_rows);
    }
    if constexpr (kSplitsK) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
    grid_dependency_wait();  // the kernel before this one may still read what `out` had
    write(p, block, sums);
    __syncwarp();
    if constexpr (kSplitsK) {  // the other block may still read the sums
      cluster_arrive();
      cluster_wait();
    }
  }

 private:
  // A block's place: which columns and which part of k it has, and where its barriers and stages are.
  struct Block {
    unsigned shared;
    int column, rank;

    __device__ __forceinline__ explicit Block(const char* memory)
        : shared(static_cast<unsigned>(__cvta_generic_to_shared(memory))),
          column(blockIdx.x / kSplits * kOutColumnsPerBlock),
          rank(blockIdx.x % kSplits) {}
    __device__ __forceinline__ unsigned full(int stage) const { return shared + stage * 8; }
    __device__ __forceinline__ unsigned empty(int stage) const { return shared + (kMaxStages + stage) * 8; }
    __device__ __forceinline__ unsigned weight(int stage) const { return shared + kBarrierBytes + stage * kStageBytes; }
    __device__ __forceinline__ unsigned rows(int stage) const { return weight(stage) + kWeightBytes; }
    __device__ __forceinline__ int k_of(int step) const { return rank * kKPerBlock + step * kStep; }

    // For the warps that copy: waits until a step's stage is empty.
    __device__ __forceinline__ void wait_until_empty(int step) const {
      if (step >= kStages) barrier_wait(empty(step % kStages), (step / kStages - 1) % 2);
    }
  };

  static __device__ __forceinline__ void copy_weight(const FewRowsWgmmaParams& p, const Block& block) {
    for (int step = 0; step < kSteps; step++) {
      const int stage = step % kStages;
      if (step == kStepsBeforeWait) grid_dependency_wait();
      block.wait_until_empty(step);
      barrier_arrive_and_expect(block.full(stage), kWeightBytes);
#pragma unroll
      for (int i = 0; i < kBoxesPerStep; i++)
#pragma unroll
        for (int half = 0; half < kHalves; half++)
          copy_box(block.weight(stage) + (kHalves * i + half) * kWeightBoxBytes, p.weight, block.k_of(step) + i * kBoxK,
                   half * kOutColumns + block.column, block.full(stage));
    }
  }

  // The rows of the tile after those of the box keep what shared memory had. Each row of x changes its own row of the
  // result only.
  static __device__ __forceinline__ void copy_rows(const FewRowsWgmmaParams& p, const Block& block) {
    const int bytes = kBoxesPerStep * box_rows(p.num_rows) * kRowBytes;
    for (int step = 0; step < kSteps; step++) {
      const int stage = step % kStages;
      block.wait_until_empty(step);
      barrier_arrive_and_expect(block.full(stage), bytes);
#pragma unroll
      for (int i = 0; i < kBoxesPerStep; i++)
        copy_box(block.rows(stage) + i * kRowsBoxBytes, p.x, block.k_of(step) + i * kBoxK, 0, block.full(stage));
    }
  }

  // A warpgroup's steps.
  static __device__ __forceinline__ void multiply(const Block& block, int group, int lane,
                                                  Accumulator<T, kColumns>& sum) {
    // Descriptors of operands whose k is contiguous. Bit 62: swizzled by 128 bytes. From bit 32: 1024 bytes from 8 rows
    // to the next 8. From bit 16: not used with this swizzle. The first bits: the address within the block; in a
    // cluster, an address has the block's rank above it.
    constexpr unsigned long long kLayout = 1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16;
    auto descriptor = [](unsigned address) { return kLayout | (address & 0x3ffff) >> 4; };
    int accumulate = 0;
    for (int step = group; step < kSteps; step += kWarpgroups) {
      const int stage = step % kStages;
      const unsigned long long x = descriptor(block.rows(stage)), weight = descriptor(block.weight(stage));
      barrier_wait(block.full(stage), step / kStages % 2);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int i = 0; i < kBoxesPerStep; i++)
#pragma unroll
        for (int j = 0; j < kRowBytes / 32; j++) {  // 16 elements of k
          sum.multiply(x + (i * kRowsBoxBytes + j * 32) / 16, weight + (i * kHalves * kWeightBoxBytes + j * 32) / 16,
                       accumulate);
          accumulate = 1;
        }
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // of the step before this one
      const int before = step - kWarpgroups;
      if (before >= 0 && before + kStages < kSteps && lane == 0) barrier_arrive(block.empty(before % kStages));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }

  // Adds the sums of both warpgroups, and of both blocks that share the columns, each of which writes half of them.
  static __device__ __forceinline__ void write(const FewRowsWgmmaParams& p, const Block& block, const float* sums) {
    constexpr int kVectorsPerRow = kOutColumnsPerBlock / 4;
    for (int i = block.rank * kThreads + threadIdx.x; i < p.num_rows * kVectorsPerRow; i += kSplits * kThreads) {
      const int row = i / kVectorsPerRow, column = i % kVectorsPerRow * 4;
      if (kN % kColumns != 0 && block.column + column >= kOutColumns) continue;
      Vector<T, 4> y = total(sums + row * kPitch + column);
      if constexpr (kGated) y = activate<Formula>(y, total(sums + row * kPitch + kOutColumnsPerBlock + column));
      store(static_cast<T*>(p.out) + row * p.out_stride + block.column + column, y);
    }
  }

  static __device__ __forceinline__ Vector<T, 4> total(const float* sums) {
    constexpr int kParts = kSteps < kWarpgroups ? kSteps : kWarpgroups;
    float4 parts[kSplits][kParts];
#pragma unroll
    for (int r = 0; r < kSplits; r++)
#pragma unroll
      for (int j = 0; j < kParts; j++) parts[r][j] = load_sums(sums + j * kMaxRows * kPitch, r);
    float total[4] = {};
#pragma unroll
    for (int r = 0; r < kSplits; r++)
#pragma unroll
      for (int j = 0; j < kParts; j++) {
        total[0] += parts[r][j].x;
        total[1] += parts[r][j].y;
        total[2] += parts[r][j].z;
        total[3] += parts[r][j].w;
      }
    Vector<T, 4> y;
    from_float(total, y);
    return y;
  }

  static __device__ __forceinline__ float4 load_sums(const float* from, int rank) {
    if constexpr (!kSplitsK) return *reinterpret_cast<const float4*>(from);
    float4 v;
    asm volatile(
        "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5;"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))), "r"(rank)
        : "memory");
    return v;
  }
};

}  // namespace jitnorm
