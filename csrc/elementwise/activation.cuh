// Gated activations on CUDA: a thread reads 16 bytes of gates and the 16 of their factors, and writes 16.
//
// The width is known at the call, so that one kernel serves all: threads lie over a row's columns by the grid alone.
#pragma once
#include "elementwise/activation.h"
#include "jitnorm/grid.h"
#include "jitnorm/launch.h"
#ifdef __CUDACC__
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

#ifdef __CUDACC__
// For results of T. The special function unit is off by 2^-22, which suffices but for the exponential of large numbers
// where float32 shows it.
template <typename T>
struct DeviceMath {
  static __device__ __forceinline__ float exp(float x) {
    if (sizeof(T) == 4) return expf(x);
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
  }
  static __device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  // Both terms by 4, as the reciprocal of what is beyond 2^126 is 0.
  static __device__ __forceinline__ float times_logistic(float x, float u) {
    return 0.25f * x * reciprocal(0.25f + 0.25f * exp(-u));
  }
};
#endif

template <typename T, typename Activation, int kVectorBytes_>
struct ActivationKernel : EveryGrid {
  using input_t = T;
  using params_t = ActivationParams;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = kVectorBytes;
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static constexpr int kVectors = 16 / kVectorBytes;  // of gates, and as many of factors, in a thread
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocks = kProcessorThreads / kThreads;  // 32 bytes of each thread are in flight

  static Grid grid(const ActivationParams& p) {
    return over_rows(p.num_tokens, p.width / kElements, kVectors, kThreads);
  }

#ifdef __CUDACC__
  template <GridLength>
  static __device__ __forceinline__ void run(const ActivationParams& p) {
    const index_t token = grid_row();
    const int first = grid_column(kVectors) * kElements, step = blockDim.x * kElements;
    if (token >= p.num_tokens || first >= p.width) return;
    const T* gates = static_cast<const T*>(p.input) + token * p.input_stride + first;
    const T* factors = gates + p.width;
    T* out = static_cast<T*>(p.out) + token * p.out_stride + first;
    before_wait(gates, factors, out, grid_block());
    wait_for_previous();
    if (is_skipped(p, token)) return;
    Vector<T, kElements> gate[kVectors], factor[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (i > 0 && first + i * step >= p.width) continue;
      gate[i] = load<T, kElements>(gates + i * step);
      factor[i] = load<T, kElements>(factors + i * step);
    }
    let_next_start();
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (i > 0 && first + i * step >= p.width) continue;
      float x[kElements], y[kElements];
      to_float(gate[i], x);
      to_float(factor[i], y);
#pragma unroll
      for (int j = 0; j < kElements; j++) y[j] *= Activation::template apply<DeviceMath<T>>(x[j]);
      Vector<T, kElements> result;
      from_float(y, result);
      store(out + i * step, result);
    }
  }
#endif
};

}  // namespace jitnorm
