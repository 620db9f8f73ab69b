// What a CUDA kernel class is made of: its variants for small and large grids, its __global__ functions, and
// programmatic dependent launch (PDL). Included by rms_row.h and every elementwise/<family>.cuh.
//
// Two compilers read those files. nvcc compiles the device code to a cubin; the host compiler takes the constants that
// a launch needs. Code for nvcc alone is inside #ifdef __CUDACC__, and includes no standard header.
#pragma once

namespace jitnorm {

// The variants of a kernel. launch() chooses one by the number of blocks in the grid's first dimension: kSmallGrid for
// up to kMaxSmallGrid blocks, kLargeGrid from kMinLargeGrid on. Code that is faster in a grid of thousands of blocks
// slows a single row down by 60 ns, even if a branch skips it. So a cubin has up to three kernels, and `run` of a
// kernel class is a template over GridVariant.
enum class GridVariant { kDefault, kSmallGrid, kLargeGrid };
constexpr int kNumGridVariants = 3;

// The base of kernel classes that have only the default variant.
struct DefaultVariantOnly {
  static constexpr unsigned kMaxSmallGrid = 0, kMinLargeGrid = ~0u;
};

template <typename Kernel, GridVariant kVariant>
constexpr bool kHasVariant =
    kVariant == GridVariant::kSmallGrid   ? Kernel::kMaxSmallGrid != DefaultVariantOnly::kMaxSmallGrid
    : kVariant == GridVariant::kLargeGrid ? Kernel::kMinLargeGrid != DefaultVariantOnly::kMinLargeGrid
                                          : true;

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

}  // namespace jitnorm

#ifdef __CUDACC__

// Defines the __global__ function SYMBOL, which runs one variant of the kernel class KERNEL, and does nothing if KERNEL
// has no such variant.
#define JITNORM_DEFINE_KERNEL(SYMBOL, KERNEL, VARIANT)                                    \
  extern "C" __global__ void __launch_bounds__(KERNEL::kThreads, KERNEL::kMinBlocksPerSM) \
      SYMBOL(const __grid_constant__ KERNEL::params_t params) {                           \
    jitnorm::run_variant<KERNEL, VARIANT>(params);                                        \
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
#endif
