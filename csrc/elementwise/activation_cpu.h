// Activations on the CPU. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/activation.h"
#include "jitnorm/parallel.h"
#include "jitnorm/simd.h"

namespace jitnorm {

// The Math of activations for a SIMD register of floats.
template <typename T>
struct SimdMath {
  static floats exp(floats x) { return jitnorm::exp(x); }
  static floats reciprocal(floats x) { return 1.f / x; }
  static floats times_sigmoid(floats x, floats u) { return x / (1.f + jitnorm::exp(-u)); }
  static floats round(floats x) {
    T rounded[kLanes];
    store(rounded, x);
    return load(rounded);
  }
};

// kLanes pairs of adjacent elements, as their first and their second elements.
typedef unsigned long long pairs __attribute__((vector_size(8 * kLanes)));
inline void load_pairs(const float* src, floats* first, floats* second) {
  pairs p;  // not by read: a function that returns two registers warns
  __builtin_memcpy(&p, src, sizeof p);
  *first = (floats) __builtin_convertvector(p, words);
  *second = (floats) __builtin_convertvector(p >> 32, words);
}
template <typename T>
inline void load_pairs(const T* src, floats* first, floats* second) {
  const words p = read<words>(src);
  T elements[kLanes];
  write(elements, narrow(p));
  *first = load(elements);
  write(elements, narrow(p >> 16));
  *second = load(elements);
}

template <typename T, typename Formula, int kVectorBytes_>
struct ActivationKernel {
  using formula_t = Formula;
  using input_t = T;
  using params_t = ActivationParams;
  using info_t = ActivationInfo;
  static constexpr int kVectorBytes = kVectorBytes_, kVectorsPerThread = 1;
  static constexpr unsigned kAlignment = 1;
  static constexpr bool kIsInterleaved = Formula::kOperands == Operands::kInterleaved;

  static index_t row_elements(const ActivationParams& p) { return p.width; }

  static void run(const ActivationParams& p, index_t row) {
    if (is_skipped(p, row)) return;
    constexpr int kInputStep = kIsInterleaved ? 2 : 1;  // from one element of the output to the next
    const T* gate = static_cast<const T*>(p.input) + row * p.input_stride;
    T* out = static_cast<T*>(p.out) + row * p.out_stride;
    const T* up = Formula::kOperands == Operands::kHalves ? gate + p.width : gate;
    const int rest = p.width % kLanes, full = p.width - rest;
    for (index_t i = 0; i < full; i += kLanes) compute(p, out + i, gate + kInputStep * i, up + kInputStep * i);
    if (rest == 0) return;
    T last_gate[kInputStep * kLanes] = {}, last_up[kInputStep * kLanes] = {}, last_out[kLanes];
    __builtin_memcpy(last_gate, gate + index_t(kInputStep) * full, kInputStep * rest * sizeof(T));
    __builtin_memcpy(last_up, up + index_t(kInputStep) * full, kInputStep * rest * sizeof(T));
    compute(p, last_out, last_gate, last_up);
    __builtin_memcpy(out + full, last_out, rest * sizeof(T));
  }

 private:
  static void compute(const ActivationParams& p, T* out, const T* gate, const T* up) {
    floats x, y;
    if constexpr (kIsInterleaved) load_pairs(gate, &x, &y);
    else x = load(gate), y = load(up);
    store(out, Formula::template compute<SimdMath<T>>(x, y, p.parameters));
  }
};

}  // namespace jitnorm
