// Quantisation scales of e4m3 numbers, and division by them: a float y becomes the e4m3 number nearest to the float
// y / scale. Included by the kernel classes with e4m3 outputs, for CUDA and the CPU.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// Lower limits of dynamic scales, so that rows of zeros can be divided. For a token it is vLLM's, whose operators ours
// replace; for a tensor it is smaller than any scale that occurs in practice.
constexpr float kMinTokenScale = 1.f / (448 * 512);
constexpr float kMinTensorScale = 0x1p-90f;

// The scale that maps `amax`, the largest magnitude, to kMaxE4M3.
JITNORM_HOST_DEVICE float dynamic_scale(float amax, float min_scale) {
  const float scale = amax / kMaxE4M3;
  return scale > min_scale ? scale : min_scale;
}

#ifdef __CUDACC__
// x / scale for many x, in 4 instructions each, where a division takes 8 and a branch: x times the reciprocal,
// corrected by its remainder (Markstein). Rounded to e4m3, the result has the same bits as the division's, for scales
// from 2^-90 to 2^125 and for 0, infinity and NaN. Outside this range the remainder is inexact, and ties may round the
// other way.
struct ScaleDivider {
  float scale, reciprocal;

  explicit __device__ __forceinline__ ScaleDivider(float divisor) {
    const bool infinite = fabsf(divisor) == __uint_as_float(0x7f800000u);
    scale = infinite ? 1.f : divisor;
    reciprocal = infinite ? 0.f : __frcp_rn(divisor);
  }

  __device__ __forceinline__ float operator()(float x) const {
    const float quotient = clamp_to_512(x * reciprocal);  // an infinity would become NaN below
    const float remainder = fmaf(quotient, scale, -x);
    return fmaf(-remainder, reciprocal, quotient);
  }

 private:
  // 512 is above kMaxE4M3, so what is clamped would saturate anyway.
  static __device__ __forceinline__ float clamp_to_512(float f) {
#if __CUDA_ARCH__ >= 860
    asm("min.xorsign.abs.f32 %0, %0, 0f44000000;" : "+f"(f));
    return f;
#else
    return fminf(fmaxf(f, -512.f), 512.f);
#endif
  }
};
#endif

}  // namespace jitnorm
