// The product of up to 16 rows and the transpose of a weight, on CUDA. Such a product takes as long as it takes to read
// the weight, and for a small weight as long as its latencies add up to. So a block takes a few columns and all of k,
// its warps take parts of k and sum them up in shared memory: no partial sums go through memory. A thread loads the
// weight straight into the registers that its tensor core instructions read, and begins before the wait for the kernel
// before this one: no kernel that writes the weight may still be running. With the formula of an activation, a block
// has a tile of gates and the tile of their factors. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "gemm/few_rows.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/device_math.h"
#include "jitnorm/grid.h"
#include "jitnorm/tensor_core.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <int kN_, int kK_, typename T, typename Formula = NoActivation>
struct FewRowsGemmKernel : DefaultVariantOnly {
  using input_t = T;
  using params_t = FewRowsGemmParams;
  using info_t = FewRowsGemmInfo;
  static constexpr int kN = kN_, kK = kK_;
  static constexpr unsigned kAlignment = 16;
  static constexpr int kMaxRows = 16, kColumnsPerTile = 8;  // those of a tensor core instruction
  static constexpr int kStep = 64;                          // elements of k that a warp takes at a time
  static constexpr int kSteps = kK / kStep;
  static constexpr bool kGated = kIsGated<Formula>;
  static constexpr int kOutColumns = kGated ? kN / 2 : kN;
  static_assert(kOutColumns % kColumnsPerTile == 0 && kK % kStep == 0, "tiles and steps are whole");

  // Each block reads all rows of x. Two tiles in a block make half as many blocks, where these would read too much.
  static constexpr int tiles_per_block() {
    if (kGated) return 2;
    const bool reads_much = index_t(kN) / kColumnsPerTile * kK > (1 << 20);
    return reads_much && kN % (2 * kColumnsPerTile) == 0 ? 2 : 1;
  }
  // The most that take an equal number of steps, two or more: a warp has all tiles of its block.
  static constexpr int warps_per_block() {
    int warps = 1;
    for (int i = 2; i <= 16 / tiles_per_block(); i++)
      if (kSteps % i == 0 && kSteps / i >= 2) warps = i;
    return warps;
  }
  static constexpr int kTiles = tiles_per_block(), kWarps = warps_per_block();
  static constexpr int kColumns = kTiles * kColumnsPerTile, kOutColumnsPerBlock = kGated ? kColumns / 2 : kColumns;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStepsPerWarp = kSteps / kWarps;
  static constexpr int kStepsAhead = kStepsPerWarp < 8 / kTiles ? kStepsPerWarp : 8 / kTiles;  // 256 bytes of a thread
  static constexpr int kMinBlocksPerSM = kThreads <= 256 ? 2 : 1;

  template <GridVariant>
  static __device__ __forceinline__ void run(const FewRowsGemmParams& p) {
    __shared__ float sums[kWarps][kTiles][kMaxRows][kColumnsPerTile];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
    const int column = blockIdx.x * kOutColumnsPerBlock;
    const T* weight = static_cast<const T*>(p.weight) + index_t(column + group) * kK + warp * kStep + quad * 8;
    uint4 w[kStepsAhead][kTiles][2];
#pragma unroll
    for (int i = 0; i < kStepsAhead; i++) load_weight(weight, i, w[i]);
    grid_dependency_wait();
    launch_dependents();
    const T* x = static_cast<const T*>(p.x) + group * p.x_stride + warp * kStep + quad * 8;
    const bool has_low = group < p.num_rows, has_high = group + 8 < p.num_rows;
    uint4 rows[2][2][2];  // of this step and of the next: [][low or high row][half of the step]
    load_rows(x, 0, p.x_stride, has_low, has_high, rows[0]);
    float sum[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kStepsPerWarp; i++) {
      if (i + 1 < kStepsPerWarp) load_rows(x, i + 1, p.x_stride, has_low, has_high, rows[(i + 1) % 2]);
      const uint4(&r)[2][2] = rows[i % 2];
#pragma unroll
      for (int t = 0; t < kTiles; t++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4& b = w[i % kStepsAhead][t][h];
          mma_m16n8k16<T>(sum[t], r[0][h].x, r[1][h].x, r[0][h].y, r[1][h].y, b.x, b.y);
          mma_m16n8k16<T>(sum[t], r[0][h].z, r[1][h].z, r[0][h].w, r[1][h].w, b.z, b.w);
        }
      if (i + kStepsAhead < kStepsPerWarp) load_weight(weight, i + kStepsAhead, w[i % kStepsAhead]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; t++) {
      *reinterpret_cast<float2*>(&sums[warp][t][group][2 * quad]) = make_float2(sum[t][0], sum[t][1]);
      *reinterpret_cast<float2*>(&sums[warp][t][group + 8][2 * quad]) = make_float2(sum[t][2], sum[t][3]);
    }
    __syncthreads();
    constexpr int kPairsPerRow = kOutColumnsPerBlock / 2;
    for (int i = threadIdx.x; i < p.num_rows * kPairsPerRow; i += kThreads) {
      const int row = i / kPairsPerRow, pair = i % kPairsPerRow, t = pair / 4, at = pair % 4 * 2;
      Vector<T, 2> y = total(sums, t, row, at);
      if constexpr (kGated) y = activate<Formula>(y, total(sums, 1, row, at));
      store(static_cast<T*>(p.out) + row * p.out_stride + column + pair * 2, y);
    }
  }

 private:
  // The sum of all warps' parts.
  static __device__ __forceinline__ Vector<T, 2> total(const float (&sums)[kWarps][kTiles][kMaxRows][kColumnsPerTile],
                                                       int t, int row, int at) {
    float total[2] = {};
#pragma unroll
    for (int j = 0; j < kWarps; j++) {
      const float2 part = *reinterpret_cast<const float2*>(&sums[j][t][row][at]);
      total[0] += part.x;
      total[1] += part.y;
    }
    Vector<T, 2> y;
    from_float(total, y);
    return y;
  }

  static __device__ __forceinline__ void load_weight(const T* weight, int step, uint4 (&to)[kTiles][2]) {
#pragma unroll
    for (int t = 0; t < kTiles; t++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const T* from =
            weight + index_t(t) * (kGated ? kOutColumns : kColumnsPerTile) * kK + step * kWarps * kStep + h * 32;
        uint4& v = to[t][h];
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "l"(from));
      }
  }

  static __device__ __forceinline__ void load_rows(const T* x, int step, index_t stride, bool has_low, bool has_high,
                                                   uint4 (&to)[2][2]) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        to[r][h] = make_uint4(0, 0, 0, 0);
        if (r == 0 ? has_low : has_high)
          load_access(to[r][h], reinterpret_cast<const uint4*>(x + r * 8 * stride + step * kWarps * kStep + h * 32));
      }
  }
};

}  // namespace jitnorm
