// Quantisation to e4m3 numbers on the host.
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/parallel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/simd.h"

namespace jitnorm {

template <typename T>
struct Fp8Kernel {
  using input_t = T;
  using params_t = QuantFp8Params;
  static constexpr int kHiddenSize = 4096;  // about; threads are woken by it
  static constexpr int kTile = kHiddenSize;
  static constexpr int kMultiple = 16;
  static constexpr unsigned kAlignment = 1;

 protected:
  static float largest_magnitude(const T* x, index_t count) {
    floats most{};
    index_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = larger(most, magnitude(load(x + i)));
    return largest(larger(most, magnitude(load_first(x + i, int(count - i)))));
  }

  static void quantise(e4m3_t* y, const T* x, index_t count, float scale) {
    index_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(y + i, load(x + i) / scale);
    e4m3_t last[kLanes];
    store(last, load_first(x + i, int(count - i)) / scale);
    __builtin_memcpy(y + i, last, count - i);
  }
};

template <typename T>
struct PerTensorFp8MaximaKernel : Fp8Kernel<T> {
  static void run(const QuantFp8Params& p, index_t part) {
    const index_t first = p.num_elements * part / p.num_tokens, end = p.num_elements * (part + 1) / p.num_tokens;
    p.maxima[part] = Fp8Kernel<T>::largest_magnitude(static_cast<const T*>(p.input) + first, end - first);
  }
};

template <typename T, TensorScale kScale_>
struct PerTensorQuantFp8Kernel : Fp8Kernel<T> {
  static constexpr TensorScale kScale = kScale_;

  static void run(const QuantFp8Params& p, index_t tile) {
    float scale;
    if constexpr (kScale == TensorScale::kFound) {
      scale = scale_of(Fp8Kernel<float>::largest_magnitude(p.maxima, p.num_maxima), kLeastTensorScale);
      if (tile == 0) *p.scale = scale;
    } else {
      scale = *p.scale;
    }
    const index_t first = tile * Fp8Kernel<T>::kTile, left = p.num_elements - first;
    Fp8Kernel<T>::quantise(static_cast<e4m3_t*>(p.out) + first, static_cast<const T*>(p.input) + first,
                           left < Fp8Kernel<T>::kTile ? left : Fp8Kernel<T>::kTile, scale);
  }
};

template <typename T>
struct PerTokenQuantFp8Kernel : Fp8Kernel<T> {
  static void run(const QuantFp8Params& p, index_t row) {
    const T* x = static_cast<const T*>(p.input) + row * p.input_stride;
    const float scale = scale_of(Fp8Kernel<T>::largest_magnitude(x, p.num_elements), kLeastTokenScale);
    p.scale[row] = scale;
    Fp8Kernel<T>::quantise(static_cast<e4m3_t*>(p.out) + row * p.out_stride, x, p.num_elements, scale);
  }
};

}  // namespace jitnorm
