// RMSNorm, rotary embedding and cache store of the heads of q, k and v on the CPU. Included by generated sources
// (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/qknorm_rope_store.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <int kHeadDim, int kRotaryDim_, typename T, typename W, typename C, typename Cache, typename QOut,
          typename Rotation_, bool kRoundsEachStep_>
struct QKNormRopeStoreKernel {
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
  static constexpr int kRowsPerBlock = 1, kLargeHeadsPerRow = 1;
  static constexpr index_t kMinLargeHeads = 0;
  static constexpr unsigned kAlignment = 1;
  static_assert(kHeadDim % kLanes == 0, "a head is whole vectors");

  static constexpr index_t row_elements(const QKNormRopeStoreParams&) { return kHeadDim; }

  static void run(const QKNormRopeStoreParams& p, index_t index) {
    const HeadGroup row = head_group<1>(p, static_cast<unsigned>(index));
    const T* x = head_address<const T>(p.in[row.kind], row);
    float y[kHeadDim];
    for (int i = 0; i < kHeadDim; i += kLanes) store(y + i, load(x + i));
    if constexpr (kHasNorm)
      if (p.weight[row.kind]) normalise(p, static_cast<const W*>(p.weight[row.kind]), y);
    if constexpr (kRotaryDim != 0)
      if (row.kind != kValue) rotate(p, row.token, y);
    if (row.kind == kQuery) write(head_address<QOut>(p.out[kQuery], row), y, p.scales[kQuery], row.head);
    if (row.kind == kKey && kChangesHeads) write(head_address<T>(p.out[kKey], row), y, {}, row.head);
    if (row.kind == kQuery || row.token >= p.num_stored) return;
    const index_t slot = index_at(p.slots, row.token, p.has_int64_slots);
    if (slot == p.skip_index) return;
    Cache* cache = cache_address<Cache>(p, row, static_cast<unsigned>(slot));
    // What is not changed keeps its bits, also those of NaNs.
    const bool is_changed = kChangesHeads && row.kind == kKey;
    if (!is_changed && sizeof(Cache) == sizeof(T)) __builtin_memcpy(cache, x, sizeof(T) * kHeadDim);
    else write(cache, y, p.scales[row.kind], row.head);
  }

 private:
  static constexpr bool kChangesHeads = kHasNorm || kRotaryDim != 0;

  static index_t index_at(const void* indices, index_t i, bool has_int64) {
    return has_int64 ? static_cast<const index_t*>(indices)[i] : static_cast<const int*>(indices)[i];
  }

  static void round_to_input(float* y) {
    T rounded[kHeadDim];
    for (int i = 0; i < kHeadDim; i += kLanes) store(rounded + i, load(y + i));
    for (int i = 0; i < kHeadDim; i += kLanes) store(y + i, load(rounded + i));
  }

  static void normalise(const QKNormRopeStoreParams& p, const W* weight, float* y) {
    floats sums{};
    for (int i = 0; i < kHeadDim; i += kLanes) sums += load(y + i) * load(y + i);
    const float rstd = 1. / __builtin_sqrt(double(sum(sums)) / kHeadDim + p.eps);
    for (int i = 0; i < kHeadDim; i += kLanes) store(y + i, load(y + i) * rstd * (load(weight + i) + p.weight_offset));
    if (kRoundsEachStep) round_to_input(y);
  }

  static void rotate(const QKNormRopeStoreParams& p, unsigned token, float* y) {
    constexpr int kHalf = kRotaryDim / 2;
    float cos_sin[kRotaryDim];
    if constexpr (rotation_t::kHasSections) {
      for (int i = 0; i < kHalf; i++) {
        const C* angles = angles_at(p, section_of(p, i) * p.positions_stride + token) + i;
        cos_sin[i] = load_partial(angles, 1)[0];
        cos_sin[kHalf + i] = load_partial(angles + kHalf, 1)[0];
      }
    } else {
      const C* angles = angles_at(p, token);
      for (int i = 0; i < kRotaryDim; i += kLanes) store(cos_sin + i, load(angles + i));
    }
    for (int i = 0; i < kHalf; i++) {
      float& a = rotation_t::kIsNeox ? y[i] : y[2 * i];
      float& b = rotation_t::kIsNeox ? y[i + kHalf] : y[2 * i + 1];
      const float cos = cos_sin[i], sin = cos_sin[kHalf + i], rotated = a * cos - b * sin;
      b = b * cos + a * sin;
      a = rotated;
    }
    if (kRoundsEachStep) round_to_input(y);
  }

  static const C* angles_at(const QKNormRopeStoreParams& p, index_t i) {
    return static_cast<const C*>(p.cos_sin) + index_at(p.positions, i, p.has_int64_positions) * p.cos_sin_stride;
  }

  template <typename Out>
  static void write(Out* to, const float* y, const HeadScales& scales, unsigned head) {
    const float scale = sizeof(Out) != sizeof(T) && scales.data ? scales.data[head * scales.stride] : 1;
    for (int i = 0; i < kHeadDim; i += kLanes)
      store(to + i, sizeof(Out) == sizeof(T) ? load(y + i) : load(y + i) / scale);
  }
};

}  // namespace jitnorm
