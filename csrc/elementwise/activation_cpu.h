// Gated activations on the CPU. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/activation.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

// The Math of activations for a SIMD register of floats.
struct SimdMath {
  static floats exp(floats x) { return jitnorm::exp(x); }
  static floats reciprocal(floats x) { return 1.f / x; }
  static floats times_sigmoid(floats x, floats u) { return x / (1.f + jitnorm::exp(-u)); }
};

template <typename T, typename Activation, int kVectorBytes_>
struct ActivationKernel {
  using input_t = T;
  using params_t = ActivationParams;
  using info_t = ActivationInfo;
  static constexpr int kVectorBytes = kVectorBytes_, kVectorsPerThread = 1;
  static constexpr unsigned kAlignment = 1;

  static index_t row_elements(const ActivationParams& p) { return p.width; }

  static void run(const ActivationParams& p, index_t row) {
    if (is_skipped(p, row)) return;
    const T* gate = static_cast<const T*>(p.input) + row * p.input_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const T* up = gate + p.width;
    const int rest = p.width % kLanes, full = p.width - rest;
    for (int i = 0; i < full; i += kLanes) apply(out + i, gate + i, up + i);
    if (rest == 0) return;
    T last_gate[kLanes] = {}, last_up[kLanes] = {}, last_out[kLanes];
    __builtin_memcpy(last_gate, gate + full, rest * sizeof(T));
    __builtin_memcpy(last_up, up + full, rest * sizeof(T));
    apply(last_out, last_gate, last_up);
    __builtin_memcpy(out + full, last_out, rest * sizeof(T));
  }

 private:
  static void apply(T* out, const T* gate, const T* up) {
    store(out, Activation::template apply<SimdMath>(load(gate)) * load(up));
  }
};

}  // namespace jitnorm
