// Sums and maxima over the threads that share a row, sums in an order that the template arguments fix. Device code, fit
// for NVRTC.
#pragma once

namespace jitnorm {

constexpr int kWarpSize = 32;

// Over groups of kThreads adjacent lanes; every lane of the warp must come here.
template <int kThreads>
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Of numbers: a NaN counts only where there is nothing else.
template <int kThreads>
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kThreads / 2; offset > 0; offset /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Over the kWarps warps of one row; `partial` is the row's own. Every thread of the block must come here, once.
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

// Likewise; `partial` is not that of a sum before it, which may still be read.
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
