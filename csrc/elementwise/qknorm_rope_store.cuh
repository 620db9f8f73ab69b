// RMSNorm, rotary embedding and cache store of the heads of q, k and v on CUDA, in one launch. A block takes
// consecutive heads of the three tensors, so that blocks are full for any numbers of heads. A thread holds pairs of
// vectors: the two that rotation combines, so that no data moves between threads. It holds those of several heads,
// which share the weight, the cosines and the sines. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/qknorm_rope_store.h"
#include "jitnorm/quantise.h"
#include "jitnorm/rms_row.h"

namespace jitnorm {

constexpr int next_power_of_two(int n) { return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2); }

// A kind of heads that is known at compile time.
template <HeadKind kKind>
struct ConstantKind {
  JITNORM_HOST_DEVICE constexpr operator HeadKind() const { return kKind; }
};

// The elements of a weight; without a norm there is none, and any type serves.
template <typename W, typename T>
struct WeightOrInput {
  using type = W;
};
template <typename T>
struct WeightOrInput<NoNorm, T> {
  using type = T;
};

template <int kHeadDim, int kRotaryDim_, typename T, typename W, typename C, typename Cache, typename QOut,
          typename Rotation_, bool kRoundsEachStep_>
struct QKNormRopeStoreKernel : DefaultVariantOnly {
  using input_t = T;
  using weight_t = W;
  using cos_sin_t = C;
  using cache_t = Cache;
  using q_out_t = QOut;
  using rotation_t = Rotation_;
  using params_t = QKNormRopeStoreParams;
  using info_t = QKNormRopeStoreInfo;
  static constexpr bool kRoundsEachStep = kRoundsEachStep_;
  static constexpr int kHiddenSize = kHeadDim;
  static constexpr int kRotaryDim = kRotaryDim_;
  static constexpr bool kHasNorm = sizeof(W) > sizeof(NoNorm);
  static constexpr unsigned kAlignment = 16;
  static constexpr float kInverse = 1. / kHeadDim;
  static constexpr float kInverseResidue = 1. / kHeadDim - kInverse;  // the rounding error of kInverse
  static constexpr int kElementsPerVector = 16 / sizeof(T);
  static constexpr int kPairs = kHeadDim / (2 * kElementsPerVector);  // of vectors
  static constexpr int kRotaryPairs = kRotaryDim / (2 * kElementsPerVector);
  static constexpr int kThreadsPerRow = min(32, next_power_of_two(kPairs));
  static constexpr int kPairsPerThread = (kPairs + kThreadsPerRow - 1) / kThreadsPerRow;
  static constexpr bool kCacheIsFloat8 = sizeof(Cache) != sizeof(T), kQOutIsFloat8 = sizeof(QOut) != sizeof(T);
  static constexpr int kHeadBytes = kHeadDim * sizeof(T);
  static constexpr int kThreads = max(128, kThreadsPerRow);
  static constexpr int kRowsPerBlock = kThreads / kThreadsPerRow;
  // 56 KiB of heads in flight on an SM; 40 where 72 registers are too few for a thread.
  static constexpr int kMinBlocksPerSM = kIsBf16<T> && sizeof(W) <= sizeof(T) && !kQOutIsFloat8 ? 7 : 5;

  // From kMinLargeHeads on, in all tokens, a thread takes two heads: it loads weights, cosines and sines once for both,
  // and has more bytes in flight. For fewer heads, more threads with one head each finish earlier. Large grids also
  // prefetch later rows into L2, and number rows in tiles, so that a warp takes one of three paths: without the other
  // two a thread needs fewer registers.
  static constexpr int kLargeHeadsPerRow = kPairsPerThread > 1 ? 1 : 2;
  static constexpr index_t kMinLargeHeads = (8 << 20) / kHeadBytes;
  static constexpr int kBlocksAhead = (4 << 20) / (kRowsPerBlock * kLargeHeadsPerRow * kHeadBytes);
  static constexpr unsigned kTokensPerTile = 32;
  // In a grid of up to so many blocks the next kernel may start before the loads: 16 tokens took 1.55 us instead of
  // 1.74. Blocks that wait beside a larger grid would slow it down by 2 to 5%.
  static constexpr unsigned kMaxBlocksToLaunchAtOnce = 512;
  static constexpr unsigned kMinLargeGrid = 1;  // there is a variant for it; kMinLargeHeads chooses it
  static_assert(kHeadDim % (2 * kElementsPerVector) == 0 && kRotaryDim % (2 * kElementsPerVector) == 0,
                "a head is pairs of vectors");

  template <GridVariant kVariant>
  static __device__ __forceinline__ void run(const QKNormRopeStoreParams& p) {
    constexpr bool kIsLarge = kVariant == GridVariant::kLargeGrid;
    constexpr int kHeadsPerRow = kIsLarge ? kLargeHeadsPerRow : 1;
    const int lane = threadIdx.x % kThreadsPerRow;
    const unsigned row = blockIdx.x * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
    // The last block may have threads without a row, and a row may have fewer heads. Their threads still take part in
    // the sums.
    const bool has_row = row < unsigned(p.num_rows);
    const HeadGroup group = head_group_of<kIsLarge>(p, has_row ? row : 0);
    const int num_heads = has_row ? p.num_heads[group.kind] - group.head : 0;
    const T* x = head_address<const T>(p.in[group.kind], group);
    const index_t x_stride = p.in[group.kind].head_stride;
    const WeightElement* weight = static_cast<const WeightElement*>(p.weight[group.kind]);
    const bool rotates = kRotaryDim != 0 && group.kind != kValue, is_normalised = kHasNorm && weight;
    prefetch_before_wait(p, group, has_row);
    grid_dependency_wait();
    const bool launches_at_once = !kIsLarge && gridDim.x <= kMaxBlocksToLaunchAtOnce;
    if (launches_at_once) launch_dependents();

    index_t positions[kSections] = {}, slot = p.skip_index;
    if (rotates)
#pragma unroll
      for (int i = 0; i < kSections; i++)
        positions[i] = load_index(p.positions, i * p.positions_stride + group.token, p.has_int64_positions);
    if (group.kind != kQuery && group.token < p.num_stored) slot = load_index(p.slots, group.token, p.has_int64_slots);
    InputVector from_x[kHeadsPerRow][kPairsPerThread][2];
    Vector<WeightElement, kElementsPerVector> from_weight[kPairsPerThread][2];
#pragma unroll
    for (int h = 0; h < kHeadsPerRow; h++)
      if (h < num_heads)
        for_each_vector(
            lane, [&](int i, int j, int at) { from_x[h][i][j] = load<T, kElementsPerVector>(x + h * x_stride + at); });
    if (is_normalised)
      for_each_vector(lane, [&](int i, int j, int at) {
        from_weight[i][j] = load<WeightElement, kElementsPerVector>(weight + at);
      });
    float scale[kHeadsPerRow];
#pragma unroll
    for (int h = 0; h < kHeadsPerRow; h++) scale[h] = h < num_heads ? scale_of(p, group, h) : 1;
    if (!launches_at_once) launch_dependents();
    if (kIsLarge) prefetch_later_row(p, row, lane);
    Angles angles[kPairsPerThread];
    if (rotates)
#pragma unroll
      for (int i = 0; i < kPairsPerThread; i++)
        if (is_rotary(lane, i)) angles[i].read(p, positions, pair_of(lane, i));

    float rstd[kHeadsPerRow];
    if (kHasNorm)
#pragma unroll
      for (int h = 0; h < kHeadsPerRow; h++) rstd[h] = rstd_of_head(from_x[h], lane, p.eps);
    // `constant_kind` is group.kind: where its type tells the kind, steps of other kinds are left out at compile time.
    const auto write_heads = [&](auto constant_kind) {
      const HeadKind kind = constant_kind;
      const bool is_stored = kind != kQuery && slot != p.skip_index;
      // Where the results in the input's dtype go; null for v, and for q where its result is float8.
      const bool has_out = kChangesHeads && kind != kValue && !(kQOutIsFloat8 && kind == kQuery);
      T* out = has_out ? head_address<T>(p.out[kind], group) : nullptr;
      e4m3_t* q_out = head_address<e4m3_t>(p.out[kQuery], group);
      Cache* cache = is_stored ? cache_address<Cache>(p, group, static_cast<unsigned>(slot)) : nullptr;
#pragma unroll
      for (int h = 0; h < kHeadsPerRow; h++) {
        if (h >= num_heads) break;
        const bool is_float8 = kind == kQuery ? kQOutIsFloat8 : kCacheIsFloat8;
        const ScaleDivider divide(is_float8 ? scale[h] : 1);
#pragma unroll
        for (int i = 0; i < kPairsPerThread; i++) {
          if (!has(lane, i)) continue;
          float y[2][kElementsPerVector];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            to_float(from_x[h][i][j], y[j]);
            if (kind == kValue || !is_normalised) continue;
            float w[kElementsPerVector];
            to_float(from_weight[i][j], w);
            if (p.weight_offset != 0)
#pragma unroll
              for (int e = 0; e < kElementsPerVector; e++) w[e] += p.weight_offset;
#pragma unroll
            for (int e = 0; e < kElementsPerVector; e++) y[j][e] = y[j][e] * rstd[h] * w[e];
            if (kRoundsEachStep) round_to_input(y[j]);
          }
          if (kind != kValue && rotates && is_rotary(lane, i)) {
            angles[i].rotate(y);
            if (kRoundsEachStep) round_to_input(y[0]), round_to_input(y[1]);
          }
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int at = offset(lane, i, j);
            // What is not changed keeps its bits, also those of NaNs.
            InputVector result = from_x[h][i][j];
            if (kChangesHeads && kind != kValue) from_float(y[j], result);
            if (out) store_whole(out + h * p.out[kind].head_stride + at, result);
            if (kQOutIsFloat8 && kind == kQuery) store_float8(q_out + h * p.out[kind].head_stride + at, y[j], divide);
            if (!is_stored) continue;
            Cache* to = cache + h * p.cache[kind].head_stride + at;
            if constexpr (kCacheIsFloat8) store_float8(to, y[j], divide);
            else store_whole(to, result);
          }
        }
      }
    };
    if (!kIsLarge) write_heads(group.kind);
    else if (group.kind == kQuery) write_heads(ConstantKind<kQuery>());
    else if (group.kind == kKey) write_heads(ConstantKind<kKey>());
    else write_heads(ConstantKind<kValue>());
  }

 private:
  static constexpr bool kChangesHeads = kHasNorm || kRotaryDim != 0;
  static constexpr int kSections = rotation_t::kHasSections ? 3 : 1;
  using WeightElement = typename WeightOrInput<W, T>::type;
  using InputVector = Vector<T, kElementsPerVector>;

  template <bool kIsLarge>
  static __device__ __forceinline__ HeadGroup head_group_of(const QKNormRopeStoreParams& p, unsigned row) {
    return kIsLarge ? head_group_in_tiles<kLargeHeadsPerRow, kTokensPerTile>(p, row) : head_group<1>(p, row);
  }

  // A thread's i-th pair of vectors, and whether it has one.
  static __device__ __forceinline__ int pair_of(int lane, int i) { return lane + i * kThreadsPerRow; }
  static __device__ __forceinline__ bool has(int lane, int i) {
    return kPairs % kThreadsPerRow == 0 || pair_of(lane, i) < kPairs;
  }
  static __device__ __forceinline__ bool is_rotary(int lane, int i) {
    return kRotaryPairs == kPairs ? has(lane, i) : pair_of(lane, i) < kRotaryPairs;
  }

  // Where the vectors of a pair lie in the head. Those of the first kRotaryPairs are half the rotary dimensions apart,
  // those of the others half the dimensions that are not rotated.
  static __device__ __forceinline__ int offset(int lane, int i, int j) {
    const int pair = pair_of(lane, i);
    const bool rotary = kRotaryPairs == kPairs || pair < kRotaryPairs;
    return (rotary ? pair + j * kRotaryPairs : pair + kRotaryPairs + j * (kPairs - kRotaryPairs)) * kElementsPerVector;
  }

  template <typename Function>
  static __device__ __forceinline__ void for_each_vector(int lane, Function function) {
#pragma unroll
    for (int i = 0; i < kPairsPerThread; i++)
      if (has(lane, i))
#pragma unroll
        for (int j = 0; j < 2; j++) function(i, j, offset(lane, i, j));
  }

  // As to_float, by other instructions, for the sum of squares. With the same ones, ptxas would keep the floats for the
  // results, in twice the registers of the vectors, and an SM would have fewer heads in flight.
  static __device__ __forceinline__ void to_float_for_sum(const InputVector& v, float (&f)[kElementsPerVector]) {
    if constexpr (kIsBf16<T>) {
      const unsigned* words = reinterpret_cast<const unsigned*>(v.words);
#pragma unroll
      for (int i = 0; i < kElementsPerVector / 2; i++) {
        asm("prmt.b32 %0, %1, 0, 0x1044;" : "=f"(f[2 * i]) : "r"(words[i]));
        asm("prmt.b32 %0, %1, 0, 0x3244;" : "=f"(f[2 * i + 1]) : "r"(words[i]));
      }
    } else {
      to_float(v, f);
    }
  }

  // The cosines and sines for one pair of vectors, of kElementsPerVector pairs of elements.
  struct Angles {
    // With NeoX pairing they are adjacent. Otherwise each vector has its own, as its elements are pairs themselves.
    static constexpr int kRuns = rotation_t::kIsNeox ? 1 : 2;
    static constexpr int kRun = kElementsPerVector / kRuns;
    float cos[kElementsPerVector], sin[kElementsPerVector];

    __device__ __forceinline__ void read(const QKNormRopeStoreParams& p, const index_t (&positions)[kSections],
                                         int pair) {
      const C* row = static_cast<const C*>(p.cos_sin) + positions[0] * p.cos_sin_stride;
#pragma unroll
      for (int r = 0; r < kRuns; r++) {
        const int first = (pair + r * kRotaryPairs) * kRun;
        if constexpr (rotation_t::kHasSections) {
#pragma unroll
          for (int e = 0; e < kRun; e++) {
            const int section = section_of(p, first + e);
            const index_t position = section == 0 ? positions[0] : section == 1 ? positions[1] : positions[2];
            const C* angles = static_cast<const C*>(p.cos_sin) + position * p.cos_sin_stride + first + e;
            cos[r * kRun + e] = to_float(angles[0]);
            sin[r * kRun + e] = to_float(angles[kRotaryDim / 2]);
          }
        } else {
          const auto c = load<C, kRun>(row + first);
          const auto s = load<C, kRun>(row + kRotaryDim / 2 + first);
          float f[kRun], g[kRun];
          to_float(c, f);
          to_float(s, g);
#pragma unroll
          for (int e = 0; e < kRun; e++) cos[r * kRun + e] = f[e], sin[r * kRun + e] = g[e];
        }
      }
    }

    __device__ __forceinline__ void rotate(float (&y)[2][kElementsPerVector]) const {
#pragma unroll
      for (int e = 0; e < kElementsPerVector; e++) {
        float& a = rotation_t::kIsNeox ? y[0][e] : y[e / kRun][e % kRun * 2];
        float& b = rotation_t::kIsNeox ? y[1][e] : y[e / kRun][e % kRun * 2 + 1];
        const float rotated = fmaf(a, cos[e], -(b * sin[e]));
        b = fmaf(b, cos[e], a * sin[e]);
        a = rotated;
      }
    }
  };

  static __device__ __forceinline__ float rstd_of_head(const InputVector (&x)[kPairsPerThread][2], int lane,
                                                       float eps) {
    float sum = 0;
    for_each_vector(lane, [&](int i, int j, int) {
      float f[kElementsPerVector], squares = 0;
      to_float_for_sum(x[i][j], f);
#pragma unroll
      for (int e = 0; e < kElementsPerVector; e++) squares = fmaf(f[e], f[e], squares);
      sum += squares;
    });
    return rstd_of<T>(mean_plus_eps<QKNormRopeStoreKernel>(warp_sum<kThreadsPerRow>(sum), eps));
  }

  // Before the wait, the position may be an old one, which an earlier kernel is about to overwrite: it only chooses
  // which row of the cosines and sines is prefetched, and is loaded again after the wait.
  static __device__ __forceinline__ void prefetch_before_wait(const QKNormRopeStoreParams& p, HeadGroup group,
                                                              bool has_row) {
#if __CUDA_ARCH__ >= 900
    if (blockIdx.x >= 32 || threadIdx.x % kThreadsPerRow != 0 || !has_row) return;
    jitnorm::prefetch_before_wait(head_address<const T>(p.in[group.kind], group), p.weight[kQuery], p.weight[kKey]);
    if (kRotaryDim == 0 || group.head != 0 || group.kind == kValue) return;
    const index_t position = load_index(p.positions, group.token, p.has_int64_positions);
    if (position < 0 || position >= p.max_position) return;
    prefetch<kRotaryDim * sizeof(C)>(static_cast<const C*>(p.cos_sin) + position * p.cos_sin_stride);
#endif
  }

  static __device__ __forceinline__ void prefetch_later_row(const QKNormRopeStoreParams& p, unsigned row, int lane) {
    row += kBlocksAhead * kRowsPerBlock;
    if (lane >= kLargeHeadsPerRow || row >= p.num_rows) return;
    const HeadGroup group = head_group_of<true>(p, row);
    if (group.head + lane >= p.num_heads[group.kind]) return;
    const HeadTensor& heads = p.in[group.kind];
    prefetch<kHeadBytes>(head_address<const T>(heads, group) + lane * heads.head_stride);
  }

  // The quantisation scale of the group's head `h`; 1 where its output is no float8.
  static __device__ __forceinline__ float scale_of(const QKNormRopeStoreParams& p, HeadGroup group, int h) {
    if (!kCacheIsFloat8 && !kQOutIsFloat8) return 1;
    const HeadScales scales = p.scales[group.kind];
    return scales.data ? load(scales.data + (group.head + h) * scales.stride) : 1;
  }

  static __device__ __forceinline__ void round_to_input(float (&f)[kElementsPerVector]) {
    Vector<T, kElementsPerVector> rounded;
    from_float(f, rounded);
    to_float(rounded, f);
  }

  static __device__ __forceinline__ void store_float8(e4m3_t* to, const float (&f)[kElementsPerVector],
                                                      const ScaleDivider& divide) {
    float quotients[kElementsPerVector];
#pragma unroll
    for (int e = 0; e < kElementsPerVector; e++) quotients[e] = divide(f[e]);
    Vector<e4m3_t, kElementsPerVector> y;
    from_float(quotients, y);
    store_whole(to, y);
  }
};

}  // namespace jitnorm
