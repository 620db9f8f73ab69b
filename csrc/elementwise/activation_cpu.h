// Gated activations on the host: a register of gates at a time.
#pragma once
#include "elementwise/activation.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd_math.h"

namespace jitnorm {

struct SimdMath {
  static floats exp(floats x) { return jitnorm::exp(x); }
  static floats reciprocal(floats x) { return 1.f / x; }
  static floats times_logistic(floats x, floats u) { return x / (1.f + jitnorm::exp(-u)); }
};

template <typename T, typename Activation, int kVectorBytes_>
struct ActivationKernel {
  using input_t = T;
  using params_t = ActivationParams;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = 1;

  static index_t row_elements(const ActivationParams& p) { return p.width; }

  static void run(const ActivationParams& p, index_t row) {
    if (is_skipped(p, row)) return;
    const T* gate = static_cast<const T*>(p.input) + row * p.input_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const int width = p.width, rest = width % kLanes, i = width - rest;
    for (int j = 0; j < i; j += kLanes) apply(out + j, gate + j, gate + width + j);
    if (rest == 0) return;
    T gates[kLanes] = {}, factors[kLanes] = {}, results[kLanes];
    __builtin_memcpy(gates, gate + i, rest * sizeof(T));
    __builtin_memcpy(factors, gate + width + i, rest * sizeof(T));
    apply(results, gates, factors);
    __builtin_memcpy(out + i, results, rest * sizeof(T));
  }

 private:
  static void apply(T* out, const T* gate, const T* factor) {
    store(out, Activation::template apply<SimdMath>(load(gate)) * load(factor));
  }
};

}  // namespace jitnorm
