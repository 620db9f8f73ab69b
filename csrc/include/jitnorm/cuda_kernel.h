// What a CUDA kernel class is made of: its variants for small and large grids, its __global__ functions, the
// description of it in the cubin, and programmatic dependent launch (PDL). Device code, compiled by nvcc or NVRTC; it
// includes no standard header. Included by rms_row.h and every elementwise/<family>.cuh.
//
// A CUDA kernel class has params_t and info_t with the constants that it reads, kThreads and kMinBlocksPerSM for
// __launch_bounds__, a base or constants that say which GridVariants it has, how many blocks a cluster has and how
// much dynamic shared memory a block has, and run<variant>(params).
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// The base of kernel classes without clusters and dynamic shared memory, and with the same limit of registers in all
// variants.
struct NoClusters {
  static constexpr int kBlocksPerCluster = 1, kSharedBytes = 0;
  static constexpr int kMinBlocksPerSMOfLargeGrid = 0;  // no other than kMinBlocksPerSM
};

// The base of those that have only the default variant too.
struct DefaultVariantOnly : NoClusters {
  static constexpr unsigned kMaxSmallGrid = kNoSmallGrid, kMinLargeGrid = kNoLargeGrid;
};

template <typename Kernel, GridVariant kVariant>
constexpr bool kHasVariant = kVariant == GridVariant::kSmallGrid   ? Kernel::kMaxSmallGrid != kNoSmallGrid
                             : kVariant == GridVariant::kLargeGrid ? Kernel::kMinLargeGrid != kNoLargeGrid
                                                                   : true;

template <typename Kernel, GridVariant kVariant>
constexpr int kMinBlocksPerSMOf =
    kVariant == GridVariant::kLargeGrid && Kernel::kMinBlocksPerSMOfLargeGrid != 0 ? Kernel::kMinBlocksPerSMOfLargeGrid
                                                                                   : Kernel::kMinBlocksPerSM;

// The maximum number of resident threads on an SM.
#if !defined(__CUDA_ARCH__)
constexpr int kMaxThreadsPerSM = 0;  // only device code depends on it
#elif __CUDA_ARCH__ == 750
constexpr int kMaxThreadsPerSM = 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int kMaxThreadsPerSM = 2048;
#else
constexpr int kMaxThreadsPerSM = 1536;
#endif

template <typename Kernel>
constexpr LaunchInfo launch_info() {
  LaunchInfo info{};
#ifdef __CUDA_ARCH__
  info.arch = __CUDA_ARCH__ / 10;
#endif
  info.threads = Kernel::kThreads;
  info.max_small_grid = Kernel::kMaxSmallGrid;
  info.min_large_grid = Kernel::kMinLargeGrid;
  info.blocks_per_cluster = Kernel::kBlocksPerCluster;
  info.shared_bytes = Kernel::kSharedBytes;
  return info;
}

}  // namespace jitnorm

// Defines the variable jitnorm_info, which the host reads from the cubin (src/jitnorm/jit/library.py).
#define JITNORM_DEFINE_INFO(KERNEL) \
  extern "C" __device__ __attribute__((used)) KERNEL::info_t jitnorm_info = KERNEL::info_t::of<KERNEL>();

// Defines the __global__ function SYMBOL, which runs one variant of the kernel class KERNEL, and does nothing if KERNEL
// has no such variant.
#define JITNORM_DEFINE_KERNEL(SYMBOL, KERNEL, VARIANT)                                                          \
  extern "C" __global__ void __launch_bounds__(KERNEL::kThreads, (jitnorm::kMinBlocksPerSMOf<KERNEL, VARIANT>)) \
      SYMBOL(const __grid_constant__ KERNEL::params_t params) {                                                 \
    jitnorm::run_variant<KERNEL, VARIANT>(params);                                                              \
  }

namespace jitnorm {

template <typename Kernel, GridVariant kVariant>
__device__ __forceinline__ void run_variant(const typename Kernel::params_t& params) {
  if constexpr (kHasVariant<Kernel, kVariant>) Kernel::template run<kVariant>(params);
}

// PDL: waits until the kernels before this one in the stream have ended. A kernel must call it before it reads anything
// that they may have written.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// PDL: lets blocks of the next kernel in the stream start while this kernel still computes.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Prefetches three addresses into L2, to use the time until grid_dependency_wait() returns. This also warms the TLB. An
// earlier kernel's writes go through L2 too, so no stale value can be read. To compute the addresses, a thread reads
// the parameters, which brings them into the constant cache. Only the first 32 blocks prefetch, which suffices: one
// prefetch in each block would slow short rows in a large grid by 7%.
__device__ __forceinline__ void prefetch_before_wait(const void* a, const void* b, const void* c,
                                                     unsigned block = blockIdx.x) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0 && block < 32)
    asm volatile("prefetch.global.L2 [%0]; prefetch.global.L2 [%1]; prefetch.global.L2 [%2];" ::"l"(a), "l"(b), "l"(c));
#endif
}

}  // namespace jitnorm
