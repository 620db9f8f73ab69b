// The token with the largest logit of each request, and the state that it changes, in one launch. The blocks of a
// request reduce their parts of its row to a key each, and the last of them to end has the largest key. A given
// token changes the same state.
#pragma once
#include "decode_step/greedy_sampling.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <typename T>
struct GreedySamplingKernel : DefaultVariantOnly {
  using input_t = T;
  using params_t = GreedySamplingParams;
  using info_t = GreedySamplingInfo;
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocksPerSM = 2;
  static constexpr int kElements = 16 / sizeof(T);  // of a load
  static constexpr int kLoads = 4;                  // that a thread has in flight
  static constexpr unsigned kElementsPerBlock = kThreads * kElements * kLoads;

  template <GridVariant>
  static __device__ __forceinline__ void run(const GreedySamplingParams& p) {
    const unsigned request = blockIdx.x / p.blocks_per_request, block = blockIdx.x % p.blocks_per_request;
    const T* row = reinterpret_cast<const T*>(p.logits) + request * p.logits_stride;
    grid_dependency_wait();
    launch_dependents();
    if (!p.logits) {  // the tokens are read alone: a copy of them to the host may be under way
      if (threadIdx.x == 0) add_token(p, request, p.tokens[request]);
      return;
    }
    Key key = block_max(largest(p, row, block));
    if (threadIdx.x != 0) return;
    if (p.blocks_per_request > 1) {
      atomicMax(&p.best[request], key);
      __threadfence();  // the key is there before the block counts as ended
      if (atomicAdd(&p.finished[request], 1u) + 1 != p.blocks_per_request) return;
      __threadfence();
      p.finished[request] = 0;
      key = atomicExch(&p.best[request], Key(0));
    }
    p.tokens[request] = index_of(key);
    add_token(p, request, index_of(key));
  }

 private:
  // A logit in its upper half, as an unsigned number in the order of floats, and in the lower half the complement of
  // its index: of equal logits, the first has the largest key. A NaN is below all numbers.
  using Key = unsigned long long;

  static __device__ __forceinline__ Key key_of(float logit, unsigned index) {
    const unsigned bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
    const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
    return Key(logit == logit ? order : 0) << 32 | ~index;
  }

  static __device__ __forceinline__ unsigned index_of(Key key) { return ~static_cast<unsigned>(key); }

  static __device__ __forceinline__ Key max(Key a, Key b) { return a > b ? a : b; }

  static __device__ __forceinline__ Key largest(const GreedySamplingParams& p, const T* row, unsigned block) {
    const unsigned thread = block * kThreads + threadIdx.x, threads = p.blocks_per_request * kThreads;
    const unsigned vectors = p.is_aligned ? p.vocab_size / kElements : 0;
    Key key = 0;
    for (index_t first = thread; first < vectors; first += index_t(kLoads) * threads) {
      Vector<T, kElements> loaded[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; i++)
        if (const index_t at = first + index_t(i) * threads; at < vectors)
          loaded[i] = load<T, kElements>(row + at * kElements);
#pragma unroll
      for (int i = 0; i < kLoads; i++) {
        const index_t at = first + index_t(i) * threads;
        if (at >= vectors) break;
        float logits[kElements];
        to_float(loaded[i], logits);
#pragma unroll
        for (int j = 0; j < kElements; j++) key = max(key, key_of(logits[j], at * kElements + j));
      }
    }
    for (index_t i = index_t(vectors) * kElements + thread; i < p.vocab_size; i += threads)
      key = max(key, key_of(to_float(row[i]), i));
    return key;
  }

  // All threads of the block must call it. The result is that of the first thread.
  static __device__ __forceinline__ Key block_max(Key key) {
    __shared__ Key of_warps[kThreads / kWarpSize];
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) key = max(key, __shfl_xor_sync(~0u, key, offset));
    if (threadIdx.x % kWarpSize == 0) of_warps[threadIdx.x / kWarpSize] = key;
    __syncthreads();
    if (threadIdx.x == 0)
      for (const Key of_warp : of_warps) key = max(key, of_warp);
    return key;
  }

  static __device__ __forceinline__ void add_token(const GreedySamplingParams& p, unsigned request, index_t token) {
    const int state = p.state_indices[request], length = p.num_tokens[state];
    p.last_tokens[state] = token;
    p.num_tokens[state] = length + 1;
    p.num_computed_tokens[state] += 1;
    if (0 <= token && token < p.vocab_size) p.token_counts[state * p.token_counts_stride + token] += 1;
    if (unsigned(length) < p.max_length) p.all_tokens[state * p.all_tokens_stride + length] = static_cast<int>(token);
  }
};

}  // namespace jitnorm
