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

// Over the kThreadsPerRow threads of a row, of which a block has up to kRows. Every thread of the block must call it,
// once.
template <int kThreadsPerRow, int kRows>
__device__ __forceinline__ float row_sum(float value) {
  if constexpr (kThreadsPerRow <= kWarpSize) {
    return warp_sum<kThreadsPerRow>(value);
  } else {
    constexpr int kWarps = kThreadsPerRow / kWarpSize;
    __shared__ alignas(16) float partial[kRows][kWarps];
    const int warp = threadIdx.x / kWarpSize;
    return block_sum<kWarps>(value, partial[warp / kWarps], warp % kWarps);
  }
}

// As block_sum. `partial` must not be the one of an earlier block_sum, which other threads may still read.
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

// An arrival after which the other blocks need not see what the thread has written to memory. That of cluster_arrive
// waits until L2 has acknowledged all stores to global memory.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// A sum over the kBlocks blocks of a cluster, in shared memory of each. Each block writes its part to all of them by
// st.async, and an mbarrier of each counts the bytes that have arrived. A cluster barrier would take longer, as it
// waits for stores to global memory. No block ends while another one writes to it, since it waits for all parts.
template <int kBlocks>
class ClusterSum {
 public:
  // All threads of the block must call it. Each must call cluster_wait() before its first sum().
  template <int kSums>
  static __device__ __forceinline__ void init_and_arrive(ClusterSum (&sums)[kSums]) {
    if (threadIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < kSums; i++)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(&sums[i].barrier_)) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();  // the arrival is that of a whole warp
    cluster_arrive_relaxed();
  }

  // A ClusterSum computes one sum. `value` is the same in all threads of a block, and `rank` the block's number in the
  // cluster. The wait acquires what was written to the block's own shared memory, as after a TMA copy.
  __device__ __forceinline__ float sum(float value, int rank) {
    const unsigned barrier = address_of(&barrier_);
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kBlocks * sizeof(float))
                   : "memory");
    if (threadIdx.x < kBlocks)
      asm volatile(
          "{.reg .b32 to, remote; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 remote, %1, %2;"
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [remote];}" ::"r"(
              address_of(&parts_[rank])),
          "r"(barrier), "r"(threadIdx.x), "r"(__float_as_uint(value))
          : "memory");
    asm volatile(
        "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0; @!done bra again;}" ::"r"(
            barrier)
        : "memory");
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; i++) sum += parts_[i];
    return sum;
  }

 private:
  static __device__ __forceinline__ unsigned address_of(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
  }

  float parts_[kBlocks];
  alignas(8) unsigned long long barrier_;
};

}  // namespace jitnorm
