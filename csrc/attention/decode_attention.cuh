// Attention of one new token of each sequence to a paged KV cache, on CUDA. The query heads that share a head of k and
// v are the rows of a tensor core instruction. A sequence is divided into parts. A block takes one part after another;
// its warps take 16 tokens at a time. A thread loads k and v straight into the registers that its instructions read: k
// of the next tokens while it computes the current ones. The block that finishes the last part of a sequence sums up
// all, in their order. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "attention/decode_attention.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/grid.h"
#include "jitnorm/tensor_core.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <int kHeadDim_, int kGroup_, typename T>
struct DecodeAttentionKernel : DefaultVariantOnly {
  using input_t = T;
  using params_t = DecodeAttentionParams;
  using info_t = DecodeAttentionInfo;
  static constexpr int kHeadDim = kHeadDim_, kGroup = kGroup_;
  static constexpr unsigned kAlignment = 16;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kHeadTiles = (kGroup + 7) / 8;  // of 8 query heads
  static constexpr int kKLoads = kHeadDim / 32;        // of 16 bytes, for a token: a quad of threads has its head
  static constexpr int kVLoads = kHeadDim / 64;        // of 16 bytes, for a token: 8 threads have its head
  static constexpr int kMinBlocksPerSM = kHeadDim == 64 ? (kHeadTiles == 1 ? 5 : 4) : (kHeadTiles == 1 ? 3 : 2);
  static constexpr float kNothing = -3.402823466e38f;  // the maximum of no logits: the lowest float
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 128 && kHeadTiles <= 2, "registers suffice");

  template <GridVariant>
  static __device__ __forceinline__ void run(const DecodeAttentionParams& p) {
    grid_dependency_wait();
    launch_dependents();
    const Sequences sequences(p);
    const unsigned total = sequences.total * p.num_kv_heads;
    for (unsigned i = blockIdx.x; i < total; i += gridDim.x) attend(p, sequences.find(p, i));
  }

 private:
  static constexpr int kVectors = kHeadDim / 4;                    // of four elements, in a head
  static constexpr int kTokensPerRound = kWarps * kTokensPerStep;  // of a block

  // Part `index` of `count` of a sequence, for a head of k and v: the tokens from begin to end. `first` is the first
  // that the query sees. `token` is the first of this warp's next step, and `page` where it is.
  struct Part {
    unsigned sequence, head, index, count;
    int first, begin, end, token, page;

    __device__ __forceinline__ bool has_tokens() const { return token < end; }
  };

  static __device__ __forceinline__ int first_token(const DecodeAttentionParams& p, int tokens) {
    return p.window && tokens > p.window ? tokens - p.window : 0;
  }

  static __device__ __forceinline__ int length(const DecodeAttentionParams& p, unsigned sequence) {
    const int tokens = __ldg(p.seq_lens + sequence);
    return tokens < 0 ? 0 : tokens > p.max_tokens ? p.max_tokens : tokens;
  }

  // At least one: its block writes the result of an empty sequence.
  static __device__ __forceinline__ unsigned count_parts(const DecodeAttentionParams& p, int tokens) {
    const unsigned span = tokens - first_token(p, tokens) / kTokensPerStep * kTokensPerStep;
    const unsigned parts = (span + p.min_tokens_per_part - 1) / p.min_tokens_per_part;
    return parts == 0 ? 1 : parts > p.max_parts ? p.max_parts : parts;
  }

  static __device__ __forceinline__ unsigned inclusive_sum(unsigned value) {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const unsigned other = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value += other;
    }
    return value;
  }

  // Which part is whose. The sequences are divided over the lanes of a warp, in order.
  struct Sequences {
    unsigned per_lane, before, total;  // `before`: the parts of the sequences of the lanes before

    __device__ __forceinline__ explicit Sequences(const DecodeAttentionParams& p) {
      per_lane = (p.num_sequences + 31) / 32;
      const unsigned first = threadIdx.x % 32 * per_lane;
      unsigned parts = 0;
#pragma unroll 4
      for (unsigned i = 0; i < per_lane; i++)
        if (first + i < p.num_sequences) parts += count_parts(p, length(p, first + i));
      const unsigned sum = inclusive_sum(parts);
      before = sum - parts;
      total = __shfl_sync(~0u, sum, 31);
    }

    // Lanes without sequences are not before any part.
    __device__ __forceinline__ Part find(const DecodeAttentionParams& p, unsigned item) const {
      const unsigned part = quotient(item, p.head_divisor);
      const unsigned owner = 31 - __clz(__ballot_sync(~0u, before <= part));
      unsigned rest = part - __shfl_sync(~0u, before, owner), sequence = owner * per_lane;
      for (;; sequence += 32) {  // 32 of the owner's sequences at a time
        const unsigned mine = sequence + threadIdx.x % 32;
        const bool is_owners = mine < (owner + 1) * per_lane && mine < p.num_sequences;
        const unsigned parts = is_owners ? count_parts(p, length(p, mine)) : 0;
        const unsigned sum = inclusive_sum(parts);
        const unsigned after = __ballot_sync(~0u, sum > rest);
        if (after) {
          const unsigned found = __ffs(after) - 1;
          rest -= __shfl_sync(~0u, sum - parts, found);
          sequence += found;
          break;
        }
        rest -= __shfl_sync(~0u, sum, 31);
      }
      const int tokens = length(p, sequence);
      Part result;
      result.sequence = sequence;
      result.head = item - part * p.num_kv_heads;
      result.index = rest;
      result.count = count_parts(p, tokens);
      result.first = first_token(p, tokens);
      const int start = result.first / kTokensPerStep * kTokensPerStep;
      const int steps = (tokens - start + kTokensPerStep - 1) / kTokensPerStep;
      const int tokens_per_part = (steps + result.count - 1) / result.count * kTokensPerStep;
      result.begin = start + int(rest) * tokens_per_part;
      result.end = result.begin + tokens_per_part < tokens ? result.begin + tokens_per_part : tokens;
      result.token = result.begin + threadIdx.x / 32 * kTokensPerStep;
      result.page = result.has_tokens() ? page_of(p, sequence, result.token) : 0;
      return result;
    }
  };

  static __device__ __forceinline__ void load_streamed(uint4& v, const char* from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from)
                 : "memory");
  }

  static __device__ __forceinline__ int page_of(const DecodeAttentionParams& p, unsigned sequence, int token) {
    return __ldg(p.block_table + sequence * p.table_stride + quotient(token, p.block_divisor));
  }

  // A token of this part instead of one that is not: memory beyond a sequence may have NaN.
  static __device__ __forceinline__ int clamp(int token, const Part& part) {
    return token < part.first ? part.first : token >= part.end ? part.end - 1 : token;
  }

  // What a thread has of q, and of k and v for a step.
  struct Operands {
    uint4 q[kHeadTiles][kKLoads];  // of the heads group and group + 8
    uint4 k[2][kKLoads];           // of the tokens group and group + 8
    uint4 v[4][kVLoads];           // of the tokens 2 quad, 2 quad + 1 and these plus 8

    // Of a part's first step.
    __device__ __forceinline__ void load(const DecodeAttentionParams& p, const Part& part) {
      load_k(p, part);
      load_v(p, part);
      load_q(p, part);
    }

    // The heads of q that share a head of k and v. The elements of a head are in the order in which a thread has those
    // of k, which is the same for the products.
    __device__ __forceinline__ void load_q(const DecodeAttentionParams& p, const Part& part) {
      const int lane = threadIdx.x % 32;
      const char* from =
          p.q + part.sequence * p.q_stride + index_t(part.head) * kGroup * p.q_head_stride + lane % 4 * 16;
#pragma unroll
      for (int t = 0; t < kHeadTiles; t++) {
        const int mine = lane / 4 + 8 * t;
#pragma unroll
        for (int j = 0; j < kKLoads; j++) {
          q[t][j] = make_uint4(0, 0, 0, 0);
          if (mine < kGroup)
            load_access(q[t][j], reinterpret_cast<const uint4*>(from + mine * p.q_head_stride + j * 64));
        }
      }
    }

    __device__ __forceinline__ void load_k(const DecodeAttentionParams& p, const Part& part) {
      const int lane = threadIdx.x % 32;
      const int in_page = part.token - int(quotient(part.token, p.block_divisor) * p.block_size);
      const char* from = p.k_cache + part.head * p.k_head_stride + part.page * p.k_block_stride + lane % 4 * 16;
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const int mine = clamp(part.token + lane / 4 + 8 * t, part) - part.token + in_page;
#pragma unroll
        for (int j = 0; j < kKLoads; j++) load_streamed(k[t][j], from + mine * p.k_token_stride + j * 64);
      }
    }

    __device__ __forceinline__ void load_v(const DecodeAttentionParams& p, const Part& part) {
      const int lane = threadIdx.x % 32;
      const int in_page = part.token - int(quotient(part.token, p.block_divisor) * p.block_size);
      const char* from = p.v_cache + part.head * p.v_head_stride + part.page * p.v_block_stride + lane / 4 * 16;
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const int mine = clamp(part.token + lane % 4 * 2 + t % 2 + t / 2 * 8, part) - part.token + in_page;
#pragma unroll
        for (int h = 0; h < kVLoads; h++) load_streamed(v[t][h], from + mine * p.v_token_stride + h * 128);
      }
    }
  };

  static __device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // Computes a part. What a warp, a block or a part has so far, of a head, are the sums of the values weighted by
  // exp2(logit - maximum) and the sum of these exponentials.
  static __device__ __forceinline__ void attend(const DecodeAttentionParams& p, Part part) {
    __shared__ float4 sums[kWarps][kGroup][kVectors];
    __shared__ float2 stats[kWarps][kGroup];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;

    float sum[kVLoads][4][kHeadTiles][4] = {};  // of the elements 64 i + 8 group + 2 j and + 1, of two heads each
    float maximum[kHeadTiles], exponentials[kHeadTiles];
#pragma unroll
    for (int t = 0; t < kHeadTiles; t++) maximum[t] = kNothing, exponentials[t] = 0.f;

    Operands operands;
    if (part.has_tokens()) operands.load(p, part);
    int later_page = 0;  // of the step after the next
    if (part.token + kTokensPerRound < part.end) later_page = page_of(p, part.sequence, part.token + kTokensPerRound);
    while (part.has_tokens()) {
      float logits[2][4] = {};
#pragma unroll
      for (int j = 0; j < kKLoads; j++) {
        const uint4& low = operands.q[0][j];
        const uint4 high = kHeadTiles > 1 ? operands.q[kHeadTiles - 1][j] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int t = 0; t < 2; t++) {
          const uint4& k = operands.k[t][j];
          multiply<T>(logits[t], low.x, high.x, low.y, high.y, k.x, k.y);
          multiply<T>(logits[t], low.z, high.z, low.w, high.w, k.z, k.w);
        }
      }
      const int token = part.token;
      part.token += kTokensPerRound;
      part.page = later_page;
      const bool is_last = !part.has_tokens();
      if (!is_last) {
        operands.load_k(p, part);
        if (part.token + kTokensPerRound < part.end)
          later_page = page_of(p, part.sequence, part.token + kTokensPerRound);
      }
      // Of the two tiles of 8 tokens, this thread has the logits of the tokens 2 quad and 2 quad + 1.
      unsigned weights[kHeadTiles][2];
#pragma unroll
      for (int h = 0; h < kHeadTiles; h++) {
        float x[4], highest = kNothing;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int mine = token + i / 2 * 8 + 2 * quad + i % 2;
          x[i] = mine < part.first || mine >= part.end ? __int_as_float(0xff800000)
                                                       : logits[i / 2][2 * h + i % 2] * p.scale;
          highest = fmaxf(highest, x[i]);
        }
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
        const bool rises = highest > maximum[h];
        if (__any_sync(~0u, rises)) {
          const float before = maximum[h];
          if (rises) maximum[h] = highest;
          const float factor = exp2(before - maximum[h]);
          exponentials[h] *= factor;
          const float low = __shfl_sync(~0u, factor, 8 * quad), high = __shfl_sync(~0u, factor, 8 * quad + 4);
#pragma unroll
          for (int i = 0; i < kVLoads; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
              sum[i][j][h][0] *= low, sum[i][j][h][2] *= low;
              sum[i][j][h][1] *= high, sum[i][j][h][3] *= high;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          x[i] = exp2(x[i] - maximum[h]);
          exponentials[h] += x[i];
        }
        weights[h][0] = pack(x, T{});
        weights[h][1] = pack(x + 2, T{});
      }
#pragma unroll
      for (int i = 0; i < kVLoads; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const unsigned v[4] = {word(operands.v[0][i], j), word(operands.v[1][i], j), word(operands.v[2][i], j),
                                 word(operands.v[3][i], j)};
          const unsigned even[2] = {__byte_perm(v[0], v[1], 0x5410), __byte_perm(v[2], v[3], 0x5410)};
          const unsigned odd[2] = {__byte_perm(v[0], v[1], 0x7632), __byte_perm(v[2], v[3], 0x7632)};
#pragma unroll
          for (int h = 0; h < kHeadTiles; h++)
            multiply<T>(sum[i][j][h], even[0], odd[0], even[1], odd[1], weights[h][0], weights[h][1]);
        }
      if (!is_last) operands.load_v(p, part);
    }

#pragma unroll
    for (int h = 0; h < kHeadTiles; h++) {
      exponentials[h] += __shfl_xor_sync(~0u, exponentials[h], 1);
      exponentials[h] += __shfl_xor_sync(~0u, exponentials[h], 2);
      if (quad == 0 && group + 8 * h < kGroup) stats[warp][group + 8 * h] = make_float2(maximum[h], exponentials[h]);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int mine = 2 * quad + c + 8 * h;
        if (mine < kGroup)
#pragma unroll
          for (int i = 0; i < kVLoads; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
              sums[warp][mine][i * 16 + group * 2 + j] = make_float4(
                  sum[i][2 * j][h][c], sum[i][2 * j][h][c + 2], sum[i][2 * j + 1][h][c], sum[i][2 * j + 1][h][c + 2]);
      }
    }
    __syncthreads();
    store(p, part, sums, stats);
    __syncthreads();  // the next part writes `sums` again
    if (part.count > 1 && is_last(p, part)) sum_parts(p, part);
  }

  // Sums up what the warps have, and writes the result, or that of a part.
  static __device__ __forceinline__ void store(const DecodeAttentionParams& p, const Part& part,
                                               const float4 (&sums)[kWarps][kGroup][kVectors],
                                               const float2 (&stats)[kWarps][kGroup]) {
    const Partials partials(p, part);
    for (int i = threadIdx.x; i < kGroup * kVectors; i += kThreads) {
      const int mine = i / kVectors, at = i % kVectors;
      Total total;
#pragma unroll
      for (int w = 0; w < kWarps; w++) total.add_maximum(stats[w][mine]);
#pragma unroll
      for (int w = 0; w < kWarps; w++) total.add(stats[w][mine], sums[w][mine][at]);
      if (part.count == 1) {
        total.store(p, part, mine, at);
      } else {
        const int row = part.index * kGroup + mine;
        __stcg(partials.sums + row * kVectors + at, total.sum);
        if (at == 0) __stcg(partials.stats + row, make_float2(total.maximum, total.exponentials));
      }
    }
  }

  // Whether this block has stored the last part of a sequence: all others are stored.
  static __device__ __forceinline__ bool is_last(const DecodeAttentionParams& p, const Part& part) {
    __shared__ bool result;
    if (threadIdx.x == 0) {
      __threadfence();  // after what this thread has seen at the barrier: the stores of all
      // The counter is 0 again after the last part.
      const unsigned before = atomicInc(p.counters + part.sequence * p.num_kv_heads + part.head, part.count - 1);
      result = before == part.count - 1;
      __threadfence();
    }
    __syncthreads();
    return result;
  }

  static __device__ __forceinline__ void sum_parts(const DecodeAttentionParams& p, const Part& part) {
    const Partials partials(p, part);
    for (int i = threadIdx.x; i < kGroup * kVectors; i += kThreads) {
      const int mine = i / kVectors, at = i % kVectors;
      Total total;
#pragma unroll 4
      for (unsigned j = 0; j < part.count; j++) total.add_maximum(__ldcg(partials.stats + j * kGroup + mine));
#pragma unroll 4
      for (unsigned j = 0; j < part.count; j++) {
        const int row = j * kGroup + mine;
        total.add(__ldcg(partials.stats + row), __ldcg(partials.sums + row * kVectors + at));
      }
      total.store(p, part, mine, at);
    }
  }

  // The partial results of a sequence, for a head of k and v.
  struct Partials {
    float4* sums;
    float2* stats;

    __device__ __forceinline__ Partials(const DecodeAttentionParams& p, const Part& part) {
      const index_t row = (index_t(part.sequence) * p.num_kv_heads + part.head) * p.max_parts * kGroup;
      sums = reinterpret_cast<float4*>(p.partial_sums) + row * kVectors;
      stats = reinterpret_cast<float2*>(p.partial_stats) + row;
    }
  };

  // Four elements of a head, from those of warps or parts: first all maxima are added, then all sums.
  struct Total {
    float maximum = kNothing, exponentials = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);

    __device__ __forceinline__ void add_maximum(float2 stats) { maximum = fmaxf(maximum, stats.x); }

    __device__ __forceinline__ void add(float2 stats, float4 other) {
      const float factor = exp2(stats.x - maximum);
      exponentials += factor * stats.y;
      sum.x += factor * other.x;
      sum.y += factor * other.y;
      sum.z += factor * other.z;
      sum.w += factor * other.w;
    }

    // To the query head `mine` of those of a head of k and v.
    __device__ __forceinline__ void store(const DecodeAttentionParams& p, const Part& part, int mine, int at) const {
      const float scale = exponentials == 0.f ? 0.f : 1.f / exponentials;
      const float result[4] = {sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale};
      Vector<T, 4> y;
      from_float(result, y);
      char* to = p.out + part.sequence * p.out_stride + (index_t(part.head) * kGroup + mine) * p.out_head_stride;
      jitnorm::store(reinterpret_cast<T*>(to) + 4 * at, y);
    }
  };

  static __device__ __forceinline__ unsigned word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
};

}  // namespace jitnorm
