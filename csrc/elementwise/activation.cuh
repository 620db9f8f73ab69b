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
// For results in float32.
struct ExactMath {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ float quotient(float x, float y) { return x / y; }
};

// For results of 16 bits, which the errors of the special function unit cannot reach. Without .ftz, as silu(-88) is a
// number of bfloat16 that 1 / exp(88) alone is too small for.
struct FastMath {
  static __device__ __forceinline__ float exp(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
  }
  static __device__ __forceinline__ float quotient(float x, float y) {
    float r;
    asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(y));
    return x * r;
  }
};

template <typename T>
struct MathOf {
  using type = FastMath;
};
template <>
struct MathOf<float> {
  using type = ExactMath;
};
#endif

template <typename T, typename Activation, int kVectorBytes_>
struct ActivationKernel {
  using input_t = T;
  using params_t = ActivationParams;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = kVectorBytes;
  static constexpr int kElements = kVectorBytes / sizeof(T);
  static constexpr int kVectors = 16 / kVectorBytes;  // of gates, and as many of factors, in a thread
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocks = 1;

  // Short rows share a block; the threads of a longer row are shared out evenly over blocks, as whole warps.
  static Grid grid(const ActivationParams& p) {
    const index_t threads = divide_up(p.width / kElements, kVectors);
    if (threads <= kThreads) return over_rows(p.num_tokens, threads, kThreads / threads, 1);
    const index_t blocks = divide_up(threads, kThreads), warps = divide_up(divide_up(threads, blocks), 32);
    return over_rows(p.num_tokens, warps * 32, 1, divide_up(threads, warps * 32));
  }

#ifdef __CUDACC__
  static __device__ __forceinline__ void run(const ActivationParams& p) {
    const index_t token = grid_row();
    const int column = grid_column() * kVectors * kElements;
    if (token >= p.num_tokens || column >= p.width) return;
    const T* gates = static_cast<const T*>(p.input) + token * p.input_stride + column;
    const T* factors = gates + p.width;
    T* out = static_cast<T*>(p.out) + token * p.out_stride + column;
    before_wait(gates, factors, out, grid_block());
    wait_for_previous();
    if (is_skipped(p, token)) return;
    Vector<T, kElements> gate[kVectors], factor[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (i > 0 && column + i * kElements >= p.width) continue;
      gate[i] = load<T, kElements>(gates + i * kElements);
      factor[i] = load<T, kElements>(factors + i * kElements);
    }
    let_next_start();
#pragma unroll
    for (int i = 0; i < kVectors; i++) {
      if (i > 0 && column + i * kElements >= p.width) continue;
      float x[kElements], y[kElements];
      to_float(gate[i], x);
      to_float(factor[i], y);
#pragma unroll
      for (int j = 0; j < kElements; j++) y[j] *= Activation::template apply<typename MathOf<T>::type>(x[j]);
      Vector<T, kElements> result;
      from_float(y, result);
      store(out + i * kElements, result);
    }
  }
#endif
};

}  // namespace jitnorm
