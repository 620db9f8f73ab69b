// Quantisation to e4m3 on the CPU. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/parallel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/simd.h"

namespace jitnorm {

// The largest magnitude of `count` elements.
template <typename T>
float amax_of(const T* x, index_t count) {
  floats amax{};
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) amax = max(amax, magnitude(load(x + i)));
  if (i < count) amax = max(amax, magnitude(load_partial(x + i, static_cast<int>(count - i))));
  return max(amax);
}

template <typename T>
void quantise(e4m3_t* out, const T* x, index_t count, float scale) {
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i) / scale);
  if (i == count) return;  // out of an empty tensor is null, which memcpy does not accept
  e4m3_t last[kLanes];
  store(last, load_partial(x + i, static_cast<int>(count - i)) / scale);
  __builtin_memcpy(out + i, last, count - i);
}

template <typename T, Pass kPass_>
struct PerTensorKernelBase {
  using input_t = T;
  using params_t = QuantFp8Params;
  using info_t = QuantFp8Info;
  static constexpr Pass kPass = kPass_;
  static constexpr unsigned kAlignment = 1;
  static constexpr index_t kTile = 4096;

  static index_t row_elements(const QuantFp8Params& p) { return p.num_elements / p.num_rows + 1; }
};

template <typename T>
struct PartialAmaxKernel : PerTensorKernelBase<T, Pass::kPartialAmax> {
  static void run(const QuantFp8Params& p, index_t part) {
    const index_t first = p.num_elements * part / p.num_rows, end = p.num_elements * (part + 1) / p.num_rows;
    p.partial_amax[part] = amax_of(static_cast<const T*>(p.input) + first, end - first);
  }
};

template <typename T, Pass kPass>
struct PerTensorQuantFp8Kernel : PerTensorKernelBase<T, kPass> {
  static void run(const QuantFp8Params& p, index_t tile) {
    constexpr index_t kTile = PerTensorKernelBase<T, kPass>::kTile;
    const bool is_dynamic = kPass == Pass::kDynamic;
    const float scale =
        is_dynamic ? dynamic_scale(amax_of(p.partial_amax, p.num_partial_amax), kMinTensorScale) : *p.scale;
    if (is_dynamic && tile == 0) *p.scale = scale;
    const index_t first = tile * kTile, remaining = p.num_elements - first;
    quantise(static_cast<e4m3_t*>(p.out) + first, static_cast<const T*>(p.input) + first,
             remaining < kTile ? remaining : kTile, scale);
  }
};

template <typename T>
struct PerTokenQuantFp8Kernel {
  using input_t = T;
  using params_t = QuantFp8Params;
  using info_t = QuantFp8Info;
  static constexpr Pass kPass = Pass::kDynamic;
  static constexpr unsigned kAlignment = 1;
  static constexpr index_t kTile = 0;

  static index_t row_elements(const QuantFp8Params& p) { return p.num_elements; }

  static void run(const QuantFp8Params& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const float scale = dynamic_scale(amax_of(x, p.num_elements), kMinTokenScale);
    p.scale[row] = scale;
    quantise(static_cast<e4m3_t*>(p.out) + row * p.out_stride, x, p.num_elements, scale);
  }
};

}  // namespace jitnorm
