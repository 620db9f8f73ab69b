// exp, reciprocal and sigmoid on CUDA, as accurate as the type of the result needs them. Device code, included by
// rms_row.h and elementwise/activation.cuh.
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

}  // namespace jitnorm
