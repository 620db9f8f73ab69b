// Sums and maximums over the threads that share a row, of one block or of a cluster, in an order that depends only on
// the template arguments. Device code, included by rms_row.h and elementwise/quant_fp8.cuh.
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

// Thread-block clusters, whose blocks can write to each other's shared memory. arrive() and wait() are a barrier of all
// their threads in two parts.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Over the kBlocks blocks of a cluster, of which this is number `rank`. `value` is the same in all threads of a block,
// and `partial` shared memory. A block must have waited for the arrival of all others before, so that they have begun.
template <int kBlocks>
__device__ __forceinline__ float cluster_sum(float value, float (&partial)[kBlocks], int rank) {
  if (threadIdx.x < kBlocks) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&partial[rank]));
    asm volatile(
        "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; st.shared::cluster.f32 [remote], %2;}" ::"r"(
            address),
        "r"(threadIdx.x), "f"(value)
        : "memory");
  }
  cluster_arrive();
  cluster_wait();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; i++) sum += partial[i];
  return sum;
}

}  // namespace jitnorm
