// The arithmetic of activations on CUDA: exp, reciprocal and sigmoid, as accurate as the type of the result needs them,
// and formulas of vectors. Device code, included by rms_row.h, elementwise/activation.cuh and the kernel classes of
// gemm/few_rows.h.
#pragma once
#include "jitnorm/vector.h"

namespace jitnorm {

// The arithmetic of an activation whose result is rounded to T. The special function unit's relative error of 2^-22
// suffices, except for exp of large numbers in float32.
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
  // Numerator and denominator are scaled by 1/4, as the reciprocal of a number beyond 2^126 is 0.
  static __device__ __forceinline__ float times_sigmoid(float x, float u) {
    return 0.25f * x * reciprocal(0.25f + 0.25f * exp(-u));
  }
  static __device__ __forceinline__ float round(float x) {
    if constexpr (sizeof(T) == 4) return x;
    else {
      const float pair[2] = {x, x};
      return to_float(T{static_cast<unsigned short>(pack(pair, T{}))});
    }
  }
};

// A formula (activation_formulas.h) without parameters, of gates and their factors.
template <typename Formula, typename T, int N>
__device__ __forceinline__ Vector<T, N> activate(const Vector<T, N>& gates, const Vector<T, N>& ups) {
  static_assert(Formula::kNumParameters == 0);
  float gate[N], up[N];
  to_float(gates, gate);
  to_float(ups, up);
#pragma unroll
  for (int i = 0; i < N; i++) gate[i] = Formula::template compute<DeviceMath<T>>(gate[i], up[i], nullptr);
  Vector<T, N> y;
  from_float(gate, y);
  return y;
}

}  // namespace jitnorm
