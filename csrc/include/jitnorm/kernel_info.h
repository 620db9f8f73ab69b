// What the host needs to know of a kernel, as data. Each family has a struct of it, made by the compiler that compiles
// the kernel, from the constants that the kernel itself uses. A cubin has it as the variable jitnorm_info, so that one
// launcher (launcher/launcher.cc) launches all cubins. Included by every elementwise/<family>.h.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// The variants of a CUDA kernel. A launch chooses one by the number of blocks in the grid's first dimension: kSmallGrid
// for up to kMaxSmallGrid blocks, kLargeGrid from kMinLargeGrid on. Code that is faster in a grid of thousands of
// blocks slows a single row down by 60 ns, even if a branch skips it. So a cubin has up to three kernels, and `run` of
// a kernel class is a template over GridVariant.
enum class GridVariant { kDefault, kSmallGrid, kLargeGrid };
constexpr int kNumGridVariants = 3;

constexpr unsigned kNoSmallGrid = 0, kNoLargeGrid = ~0u;  // of a kernel without the variant

// The type of a tensor's elements, with the layout and the numbers of DLPack's DLDataType. Zero for a type that no
// tensor has.
struct ElementType {
  unsigned char code, bits;
  unsigned short lanes;

  constexpr index_t bytes() const { return bits / 8; }
};
template <typename T>
constexpr ElementType kElementType = {};
template <>
constexpr ElementType kElementType<float> = {2, 32, 1};
template <>
constexpr ElementType kElementType<fp16_t> = {2, 16, 1};
template <>
constexpr ElementType kElementType<bf16_t> = {4, 16, 1};
template <>
constexpr ElementType kElementType<e4m3_t> = {10, 8, 1};

// Of a CUDA kernel; zero for a CPU kernel.
struct LaunchInfo {
  unsigned arch;                            // the compute capability that it was compiled for, such as 90
  unsigned threads;                         // of a block, or the most of one
  unsigned max_small_grid, min_large_grid;  // see GridVariant
  unsigned blocks_per_cluster;              // 1 for a kernel without clusters
  unsigned shared_bytes;                    // the dynamic shared memory of a block
};

// A CUtensorMap, for the parameters of a kernel: a matrix in global memory, and the box of it that one TMA copy takes.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};

// The LaunchInfo of a kernel class. Defined by cuda_kernel.h for CUDA and by parallel.h for the CPU.
template <typename Kernel>
constexpr LaunchInfo launch_info();

}  // namespace jitnorm
