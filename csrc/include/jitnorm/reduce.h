// Sums and maximums over the threads that share a row, in an order that depends only on the template arguments. Device
// code, included by rms_row.h and elementwise/quant_fp8.cuh.
#pragma once

namespace jitnorm {

constexpr int kWarpSize = 32;

// Over groups of kThreads adjacent lanes. Every lane of the warp must call it.
template <int kThreads>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Likewise. NaNs are ignored unless all values are NaN.
template <int kThreads>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Over the kWarps warps of one row. `partial` is shared memory of this row alone. Every thread of the block must call
// it, once.
template <int kWarps>
__device__ __forceinline__ float block_sum(float value, float (&partial)[kWarps], int warp) {
  value = warp_sum<kWarpSize>(value);
  if (kWarps == 1) return value;
  if (threadIdx.x % kWarpSize == 0) partial[warp] = value;
  __syncthreads();
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kWarps; i++) sums[i % 4] += partial[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Likewise. `partial` must not be the one of an earlier block_sum, which other threads may still read.
template <int kWarps>
__device__ __forceinline__ float block_max(float value, float (&partial)[kWarps], int warp) {
  value = warp_max<kWarpSize>(value);
  if (kWarps == 1) return value;
  if (threadIdx.x % kWarpSize == 0) partial[warp] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; i++) value = fmaxf(value, partial[i]);
  return value;
}

}  // namespace jitnorm
