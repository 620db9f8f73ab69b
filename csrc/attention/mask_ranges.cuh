// The range of visible tokens of each sequence, by its mask, on CUDA. Attention reads no keys and values outside it. A
// thread block has a sequence. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "attention/mask_ranges.h"
#include "jitnorm/cuda_kernel.h"

namespace jitnorm {

struct MaskRangesKernel : DefaultVariantOnly {
  using params_t = MaskRangesParams;
  using info_t = MaskRangesInfo;
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocksPerSM = 2;

  template <GridVariant>
  static __device__ __forceinline__ void run(const MaskRangesParams& p) {
    __shared__ int shared_first, shared_end;
    grid_dependency_wait();
    launch_dependents();
    const index_t threads = index_t(p.num_sequences) * kThreads;
    for (index_t i = index_t(blockIdx.x) * kThreads + threadIdx.x; i < p.num_counters; i += threads) p.counters[i] = 0;
    if (threadIdx.x == 0) shared_first = p.num_tokens, shared_end = 0;
    __syncthreads();
    const unsigned char* row = p.mask + blockIdx.x * p.mask_stride;
    int first = p.num_tokens, end = 0;
#pragma unroll 8
    for (int token = threadIdx.x; token < p.num_tokens; token += kThreads)
      if (row[token]) {
        first = first < token ? first : token;
        end = token + 1;
      }
    if (end) {
      atomicMin(&shared_first, first);
      atomicMax(&shared_end, end);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    p.ranges[2 * blockIdx.x] = shared_end ? shared_first : 0;
    p.ranges[2 * blockIdx.x + 1] = shared_end;
  }
};

}  // namespace jitnorm
