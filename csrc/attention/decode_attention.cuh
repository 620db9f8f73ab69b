// Attention of one query token of each sequence, as in decode steps, with split KV, on CUDA. Paged: k and v are in
// blocks of a cache, which a block table lists, and a query sees all tokens of its sequence or the last ones. Masked: k
// and v are [sequences, kv_heads, tokens, head_dim], and a bool mask says which tokens a query sees. The query heads
// that share a head of k and v are the rows of the instruction that multiplies q and k, and the columns of the one that
// multiplies weights and v. The tokens of a sequence are divided into splits. A thread block computes one split after
// another; its warps take 16 tokens at a time. A thread loads k and v straight into the registers that its instructions
// read: k of the next tokens while it computes the current ones. The block that finishes the last split of a sequence
// combines all, in their order. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "attention/decode_attention.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/tensor_core.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <int kHeadDim_, int kGroupSize_, typename T, bool kIsMasked>
struct DecodeAttentionKernel : DefaultVariantOnly {
  using input_t = T;
  using params_t = DecodeAttentionParams;
  using info_t = DecodeAttentionInfo;
  static constexpr int kHeadDim = kHeadDim_, kGroupSize = kGroupSize_;
  static constexpr unsigned kAlignment = 16;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kHeadTiles = (kGroupSize + 7) / 8;  // of 8 query heads
  static constexpr int kKLoads = kHeadDim / 32;            // of 16 bytes, by a thread, for a token: four share a head
  static constexpr int kVLoads = kHeadDim / 64;            // of 16 bytes, by a thread, for a token: eight share a head
  static constexpr int kMinBlocksPerSM = kHeadDim == 64 ? (kHeadTiles == 1 ? 5 : 4) : (kHeadTiles == 1 ? 3 : 2);
  // The first maximum: the lowest float, as -inf - -inf would be NaN in the factor of a rescale.
  static constexpr float kLowest = -3.402823466e38f;
  static_assert(kHeadDim % 64 == 0 && kHeadDim <= 128 && kHeadTiles <= 2,
                "head_dim is 64 or 128, and a head of k and v has up to 16 query heads");

  template <GridVariant>
  static __device__ __forceinline__ void run(const DecodeAttentionParams& p) {
    grid_dependency_wait();
    launch_dependents();
    const SplitScheduler scheduler(p);
    const unsigned work_items = scheduler.num_splits * p.num_kv_heads;
    for (unsigned i = blockIdx.x; i < work_items; i += gridDim.x) attend(p, scheduler.split_of(p, i));
  }

 private:
  static constexpr int kVectors = kHeadDim / 4;                    // of four elements, in a head
  static constexpr int kTokensPerRound = kWarps * kTokensPerStep;  // of a block

  // Split `index` of the `count` splits of a sequence, for a head of k and v. `first` is the first token that the query
  // sees, and the split's tokens end at `end`. `token` and `page` are where this warp is: the first token of its step,
  // and the block of the cache that has it or, if masked, the sequence.
  struct Split {
    unsigned sequence, head, index, count;
    int first, end, token, page;

    __device__ __forceinline__ bool has_tokens() const { return token < end; }
  };

  // The query sees tokens from `first` to `end`; if masked, not all of them.
  struct Range {
    int first, end;
  };

  static __device__ __forceinline__ int load_int32(const int* from, index_t i) {
    return static_cast<int>(load_index(from, i, false));
  }

  static __device__ __forceinline__ Range range_of(const DecodeAttentionParams& p, unsigned sequence) {
    if constexpr (kIsMasked) {
      return {load_int32(p.ranges, 2 * sequence), load_int32(p.ranges, 2 * sequence + 1)};
    } else {
      const int length = load_int32(p.seq_lens, sequence);
      const int tokens = length < 0 ? 0 : length > p.max_tokens ? p.max_tokens : length;
      return {p.window && tokens > p.window ? tokens - p.window : 0, tokens};
    }
  }

  // At least one: its block writes the result of an empty sequence.
  static __device__ __forceinline__ unsigned count_splits(const DecodeAttentionParams& p, Range range) {
    const unsigned span = range.end - range.first / kTokensPerStep * kTokensPerStep;
    const unsigned splits = (span + p.max_tokens_per_split - 1) / p.max_tokens_per_split;
    return splits == 0 ? 1 : splits > p.max_splits ? p.max_splits : splits;
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

  // Finds the split of a work item. Item i is split i / num_kv_heads, counted over all sequences, of head
  // i % num_kv_heads of k and v. The sequences are divided over the lanes of a warp, in order.
  struct SplitScheduler {
    unsigned sequences_per_lane, splits_before, num_splits;  // those before are of the sequences of the lanes before

    __device__ __forceinline__ explicit SplitScheduler(const DecodeAttentionParams& p) {
      sequences_per_lane = (p.num_sequences + 31) / 32;
      const unsigned first = threadIdx.x % 32 * sequences_per_lane;
      unsigned splits = 0;
#pragma unroll 4
      for (unsigned i = 0; i < sequences_per_lane; i++)
        if (first + i < p.num_sequences) splits += count_splits(p, range_of(p, first + i));
      const unsigned sum = inclusive_sum(splits);
      splits_before = sum - splits;
      num_splits = __shfl_sync(~0u, sum, 31);
    }

    // A lane without sequences has splits_before == num_splits, above every split.
    __device__ __forceinline__ Split split_of(const DecodeAttentionParams& p, unsigned work_item) const {
      const unsigned split = quotient(work_item, p.head_divisor);
      const unsigned owner = 31 - __clz(__ballot_sync(~0u, splits_before <= split));
      unsigned rest = split - __shfl_sync(~0u, splits_before, owner), sequence = owner * sequences_per_lane;
      for (;; sequence += 32) {  // 32 of the owner's sequences at a time
        const unsigned candidate = sequence + threadIdx.x % 32;
        const bool is_owners = candidate < (owner + 1) * sequences_per_lane && candidate < p.num_sequences;
        const unsigned splits = is_owners ? count_splits(p, range_of(p, candidate)) : 0;
        const unsigned sum = inclusive_sum(splits);
        const unsigned after = __ballot_sync(~0u, sum > rest);
        if (after) {
          const unsigned found = __ffs(after) - 1;
          rest -= __shfl_sync(~0u, sum - splits, found);
          sequence += found;
          break;
        }
        rest -= __shfl_sync(~0u, sum, 31);
      }
      const Range range = range_of(p, sequence);
      Split result;
      result.sequence = sequence;
      result.head = work_item - split * p.num_kv_heads;
      result.index = rest;
      result.count = count_splits(p, range);
      result.first = range.first;
      const int start = result.first / kTokensPerStep * kTokensPerStep;
      const int steps = (range.end - start + kTokensPerStep - 1) / kTokensPerStep;
      const int tokens_per_split = (steps + result.count - 1) / result.count * kTokensPerStep;
      const int begin = start + int(rest) * tokens_per_split;
      result.end = begin + tokens_per_split < range.end ? begin + tokens_per_split : range.end;
      result.token = begin + threadIdx.x / 32 * kTokensPerStep;
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
    if constexpr (kIsMasked) return static_cast<int>(sequence);
    return load_int32(p.block_table, sequence * p.table_stride + quotient(token, p.block_divisor));
  }

  static __device__ __forceinline__ int offset_in_page(const DecodeAttentionParams& p, int token) {
    return kIsMasked ? token : token - int(quotient(token, p.block_divisor) * p.block_size);
  }

  // The four tokens of a step, from `token` on, whose values and weights a thread has.
  static __device__ __forceinline__ int token_of(int token, int i) {
    return token + threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8;
  }

  // Clamps a token to those of this split: memory outside may have NaN.
  static __device__ __forceinline__ int clamp(int token, const Split& split) {
    return token < split.first ? split.first : token >= split.end ? split.end - 1 : token;
  }

  // What a thread has of q, and of k and v for a step.
  struct Operands {
    uint4 q[kHeadTiles][kKLoads];  // of the heads group_id and group_id + 8
    uint4 k[2][kKLoads];           // of the tokens group_id and group_id + 8
    uint4 v[4][kVLoads];           // of the tokens 2 thread_in_group, 2 thread_in_group + 1 and these plus 8
    bool is_visible[4];            // the same tokens; only if masked

    // Of a split's first step.
    __device__ __forceinline__ void load(const DecodeAttentionParams& p, const Split& split) {
      load_k(p, split);
      load_mask(p, split);
      load_v(p, split);
      load_q(p, split);
    }

    // The heads of q that share a head of k and v. The elements of a head are in the order in which a thread has those
    // of k, which is the same for the products.
    __device__ __forceinline__ void load_q(const DecodeAttentionParams& p, const Split& split) {
      const int lane = threadIdx.x % 32;
      const char* from =
          p.q + split.sequence * p.q_stride + index_t(split.head) * kGroupSize * p.q_head_stride + lane % 4 * 16;
#pragma unroll
      for (int t = 0; t < kHeadTiles; t++) {
        const int query_head = lane / 4 + 8 * t;
#pragma unroll
        for (int j = 0; j < kKLoads; j++) {
          q[t][j] = make_uint4(0, 0, 0, 0);
          if (query_head < kGroupSize)
            load_access(q[t][j], reinterpret_cast<const uint4*>(from + query_head * p.q_head_stride + j * 64));
        }
      }
    }

    __device__ __forceinline__ void load_k(const DecodeAttentionParams& p, const Split& split) {
      const int lane = threadIdx.x % 32;
      const int in_page = offset_in_page(p, split.token);
      const char* from = p.k_cache + split.head * p.k_head_stride + split.page * p.k_block_stride + lane % 4 * 16;
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const int row = clamp(split.token + lane / 4 + 8 * t, split) - split.token + in_page;
#pragma unroll
        for (int j = 0; j < kKLoads; j++) load_streamed(k[t][j], from + row * p.k_token_stride + j * 64);
      }
    }

    __device__ __forceinline__ void load_mask(const DecodeAttentionParams& p, const Split& split) {
      if constexpr (kIsMasked) {
        const unsigned char* from = p.mask + split.sequence * p.mask_stride;
#pragma unroll
        for (int i = 0; i < 4; i++) is_visible[i] = from[clamp(token_of(split.token, i), split)] != 0;
      }
    }

    __device__ __forceinline__ void load_v(const DecodeAttentionParams& p, const Split& split) {
      const int lane = threadIdx.x % 32;
      const int in_page = offset_in_page(p, split.token);
      const char* from = p.v_cache + split.head * p.v_head_stride + split.page * p.v_block_stride + lane / 4 * 16;
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const int row = clamp(token_of(split.token, t), split) - split.token + in_page;
#pragma unroll
        for (int h = 0; h < kVLoads; h++) load_streamed(v[t][h], from + row * p.v_token_stride + h * 128);
      }
    }
  };

  static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }

  // Computes a split. A partial result, of a warp, a block or a split, is for each query head: the sum of the values
  // weighted by exp2(score - row_max), row_max, and the sum of these exponentials, row_sum.
  static __device__ __forceinline__ void attend(const DecodeAttentionParams& p, Split split) {
    __shared__ float4 sums[kWarps][kGroupSize][kVectors];
    __shared__ float2 stats[kWarps][kGroupSize];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group_id = lane / 4, thread_in_group = lane % 4;

    float acc_o[kVLoads][4][kHeadTiles][4] = {};  // of the elements 64 i + 8 group_id + 2 j and + 1, of two heads each
    float row_max[kHeadTiles], row_sum[kHeadTiles];
#pragma unroll
    for (int t = 0; t < kHeadTiles; t++) row_max[t] = kLowest, row_sum[t] = 0.f;

    Operands operands;
    if (split.has_tokens()) operands.load(p, split);
    int next_page = 0;  // of the next step, before its k is loaded
    if (split.token + kTokensPerRound < split.end)
      next_page = page_of(p, split.sequence, split.token + kTokensPerRound);
    while (split.has_tokens()) {
      float logits[2][4] = {};
#pragma unroll
      for (int j = 0; j < kKLoads; j++) {
        const uint4& low = operands.q[0][j];
        const uint4 high = kHeadTiles > 1 ? operands.q[kHeadTiles - 1][j] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int t = 0; t < 2; t++) {
          const uint4& k = operands.k[t][j];
          mma_m16n8k16<T>(logits[t], low.x, high.x, low.y, high.y, k.x, k.y);
          mma_m16n8k16<T>(logits[t], low.z, high.z, low.w, high.w, k.z, k.w);
        }
      }
      const int token = split.token;
      bool is_visible[4];
#pragma unroll
      for (int i = 0; i < 4; i++) is_visible[i] = !kIsMasked || operands.is_visible[i];
      split.token += kTokensPerRound;
      split.page = next_page;
      const bool is_last_step = !split.has_tokens();
      if (!is_last_step) {
        operands.load_k(p, split);
        operands.load_mask(p, split);
        if (split.token + kTokensPerRound < split.end)
          next_page = page_of(p, split.sequence, split.token + kTokensPerRound);
      }
      // Of each of the two tiles of 8 tokens, this thread has the logits of token 2 thread_in_group and of the next.
      unsigned probs[kHeadTiles][2];
#pragma unroll
      for (int h = 0; h < kHeadTiles; h++) {
        float scores[4], tile_max = kLowest;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int of_logit = token_of(token, i);
          scores[i] = of_logit < split.first || of_logit >= split.end || !is_visible[i]
                          ? __int_as_float(0xff800000)  // -inf
                          : logits[i / 2][2 * h + i % 2] * p.scale;
          tile_max = fmaxf(tile_max, scores[i]);
        }
        tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 1));
        tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 2));
        const bool rises = tile_max > row_max[h];
        if (__any_sync(~0u, rises)) {
          const float before = row_max[h];
          if (rises) row_max[h] = tile_max;
          const float factor = exp2_approx(before - row_max[h]);
          row_sum[h] *= factor;
          const float low = __shfl_sync(~0u, factor, 8 * thread_in_group),
                      high = __shfl_sync(~0u, factor, 8 * thread_in_group + 4);
#pragma unroll
          for (int i = 0; i < kVLoads; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
              acc_o[i][j][h][0] *= low, acc_o[i][j][h][2] *= low;
              acc_o[i][j][h][1] *= high, acc_o[i][j][h][3] *= high;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          scores[i] = exp2_approx(scores[i] - row_max[h]);
          row_sum[h] += scores[i];
        }
        probs[h][0] = pack(scores, T{});
        probs[h][1] = pack(scores + 2, T{});
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
            mma_m16n8k16<T>(acc_o[i][j][h], even[0], odd[0], even[1], odd[1], probs[h][0], probs[h][1]);
        }
      if (!is_last_step) operands.load_v(p, split);
    }

#pragma unroll
    for (int h = 0; h < kHeadTiles; h++) {
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
      if (thread_in_group == 0 && group_id + 8 * h < kGroupSize)
        stats[warp][group_id + 8 * h] = make_float2(row_max[h], row_sum[h]);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int query_head = 2 * thread_in_group + c + 8 * h;
        if (query_head < kGroupSize)
#pragma unroll
          for (int i = 0; i < kVLoads; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
              sums[warp][query_head][i * 16 + group_id * 2 + j] =
                  make_float4(acc_o[i][2 * j][h][c], acc_o[i][2 * j][h][c + 2], acc_o[i][2 * j + 1][h][c],
                              acc_o[i][2 * j + 1][h][c + 2]);
      }
    }
    __syncthreads();
    store(p, split, sums, stats);
    __syncthreads();  // the next split writes `sums` again
    if (split.count > 1 && is_last_split(p, split)) combine_splits(p, split);
  }

  // Adds up the sums of the warps. Writes the result of a sequence with one split, or the partial result of the split.
  static __device__ __forceinline__ void store(const DecodeAttentionParams& p, const Split& split,
                                               const float4 (&sums)[kWarps][kGroupSize][kVectors],
                                               const float2 (&stats)[kWarps][kGroupSize]) {
    const Partials partials(p, split);
    for (int i = threadIdx.x; i < kGroupSize * kVectors; i += kThreads) {
      const int query_head = i / kVectors, at = i % kVectors;
      SoftmaxMerge merge;
#pragma unroll
      for (int w = 0; w < kWarps; w++) merge.add_maximum(stats[w][query_head]);
#pragma unroll
      for (int w = 0; w < kWarps; w++) merge.add(stats[w][query_head], sums[w][query_head][at]);
      if (split.count == 1) {
        merge.store(p, split, query_head, at);
      } else {
        const int row = split.index * kGroupSize + query_head;
        __stcg(partials.sums + row * kVectors + at, merge.acc_o);
        if (at == 0) __stcg(partials.stats + row, make_float2(merge.row_max, merge.row_sum));
      }
    }
  }

  // Returns whether this block has stored the last split of a sequence, so that all others are stored too.
  static __device__ __forceinline__ bool is_last_split(const DecodeAttentionParams& p, const Split& split) {
    __shared__ bool result;
    if (threadIdx.x == 0) {
      __threadfence();  // orders the stores of all threads, visible since the barrier, before the counter
      // The counter is 0 again after the last split.
      const unsigned before = atomicInc(p.counters + split.sequence * p.num_kv_heads + split.head, split.count - 1);
      result = before == split.count - 1;
      __threadfence();
    }
    __syncthreads();
    return result;
  }

  // Writes the result of a sequence whose splits are all stored.
  static __device__ __forceinline__ void combine_splits(const DecodeAttentionParams& p, const Split& split) {
    const Partials partials(p, split);
    for (int i = threadIdx.x; i < kGroupSize * kVectors; i += kThreads) {
      const int query_head = i / kVectors, at = i % kVectors;
      SoftmaxMerge merge;
#pragma unroll 4
      for (unsigned j = 0; j < split.count; j++)
        merge.add_maximum(__ldcg(partials.stats + j * kGroupSize + query_head));
#pragma unroll 4
      for (unsigned j = 0; j < split.count; j++) {
        const int row = j * kGroupSize + query_head;
        merge.add(__ldcg(partials.stats + row), __ldcg(partials.sums + row * kVectors + at));
      }
      merge.store(p, split, query_head, at);
    }
  }

  // The partial results of a sequence, for a head of k and v.
  struct Partials {
    float4* sums;
    float2* stats;

    __device__ __forceinline__ Partials(const DecodeAttentionParams& p, const Split& split) {
      const index_t row = (index_t(split.sequence) * p.num_kv_heads + split.head) * p.max_splits * kGroupSize;
      sums = reinterpret_cast<float4*>(p.partial_sums) + row * kVectors;
      stats = reinterpret_cast<float2*>(p.partial_stats) + row;
    }
  };

  // Four elements of a head, from those of warps or splits: first all maxima are added, then all sums.
  struct SoftmaxMerge {
    float row_max = kLowest, row_sum = 0.f;
    float4 acc_o = make_float4(0.f, 0.f, 0.f, 0.f);

    __device__ __forceinline__ void add_maximum(float2 stats) { row_max = fmaxf(row_max, stats.x); }

    __device__ __forceinline__ void add(float2 stats, float4 other) {
      const float factor = exp2_approx(stats.x - row_max);
      row_sum += factor * stats.y;
      acc_o.x += factor * other.x;
      acc_o.y += factor * other.y;
      acc_o.z += factor * other.z;
      acc_o.w += factor * other.w;
    }

    // Writes them for one of the query heads that share a head of k and v.
    __device__ __forceinline__ void store(const DecodeAttentionParams& p, const Split& split, int query_head,
                                          int at) const {
      const float scale = row_sum == 0.f ? 0.f : 1.f / row_sum;
      const float result[4] = {acc_o.x * scale, acc_o.y * scale, acc_o.z * scale, acc_o.w * scale};
      Vector<T, 4> y;
      from_float(result, y);
      char* to =
          p.out + split.sequence * p.out_stride + (index_t(split.head) * kGroupSize + query_head) * p.out_head_stride;
      jitnorm::store(reinterpret_cast<T*>(to) + 4 * at, y);
    }
  };

  static __device__ __forceinline__ unsigned word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  }
};

}  // namespace jitnorm
