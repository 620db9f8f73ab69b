// Quantisation to e4m3 numbers on the host.
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/parallel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <typename T>
float largest_magnitude(const T* x, index_t count) {
  floats most{};
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) most = larger(most, magnitude(load(x + i)));
  if (i < count) most = larger(most, magnitude(load_first(x + i, static_cast<int>(count - i))));
  return largest(most);
}

template <typename T>
void quantise(e4m3_t* y, const T* x, index_t count, float scale) {
  index_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) / scale);
  if (i == count) return;  // an empty tensor has no address
  e4m3_t last[kLanes];
  store(last, load_first(x + i, static_cast<int>(count - i)) / scale);
  __builtin_memcpy(y + i, last, count - i);
}

template <typename T, Pass kPass_>
struct PerTensorFp8Kernel {
  using input_t = T;
  using params_t = QuantFp8Params;
  static constexpr Pass kPass = kPass_;
  static constexpr unsigned kAlignment = 1;
  static constexpr index_t kTile = 4096;

  static index_t row_elements(const QuantFp8Params& p) { return p.num_elements / p.num_tokens + 1; }
};

template <typename T>
struct PerTensorFp8MaximaKernel : PerTensorFp8Kernel<T, Pass::kFindMaxima> {
  static void run(const QuantFp8Params& p, index_t part) {
    const index_t first = p.num_elements * part / p.num_tokens, end = p.num_elements * (part + 1) / p.num_tokens;
    p.maxima[part] = largest_magnitude(static_cast<const T*>(p.input) + first, end - first);
  }
};

template <typename T, Pass kPass>
struct PerTensorQuantFp8Kernel : PerTensorFp8Kernel<T, kPass> {
  static void run(const QuantFp8Params& p, index_t tile) {
    constexpr index_t kTile = PerTensorFp8Kernel<T, kPass>::kTile;
    const bool found = kPass == Pass::kScaleFound;
    const float scale = found ? scale_of(largest_magnitude(p.maxima, p.num_maxima), kLeastTensorScale) : *p.scale;
    if (found && tile == 0) *p.scale = scale;
    const index_t first = tile * kTile, left = p.num_elements - first;
    quantise(static_cast<e4m3_t*>(p.out) + first, static_cast<const T*>(p.input) + first, left < kTile ? left : kTile,
             scale);
  }
};

template <typename T>
struct PerTokenQuantFp8Kernel {
  using input_t = T;
  using params_t = QuantFp8Params;
  static constexpr unsigned kAlignment = 1;

  static index_t row_elements(const QuantFp8Params& p) { return p.num_elements; }

  static void run(const QuantFp8Params& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const float scale = scale_of(largest_magnitude(x, p.num_elements), kLeastTokenScale);
    p.scale[row] = scale;
    quantise(static_cast<e4m3_t*>(p.out) + row * p.out_stride, x, p.num_elements, scale);
  }
};

}  // namespace jitnorm
