// Scales of e4m3 numbers, and division by one. A number y becomes the e4m3 number nearest to the float y / scale.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// What a scale is at least where it is found, so that zeros can be divided by it. For a token it is the floor of vLLM's
// operators, whose place ours take; for a tensor one that no scale in use comes near.
constexpr float kLeastTokenScale = 1.f / (448 * 512);
constexpr float kLeastTensorScale = 0x1p-90f;

// The scale that takes `largest` to the largest e4m3 number.
JITNORM_ANYWHERE float scale_of(float largest, float least) {
  const float scale = largest / kLargestE4M3;
  return scale > least ? scale : least;
}

#ifdef __CUDACC__
// x / scale for many x, in 4 instructions where a division takes 8 and a branch: the product with the reciprocal, put
// right by what it leaves (Markstein). Rounded to e4m3 the result has the bits of the division's, for scales of 2^-90
// to 2^125 and for 0, infinity and NaN; near the ends of float's range what is left is inexact, and a tie may go wrong.
struct Divisor {
  float scale, reciprocal;

  explicit __device__ __forceinline__ Divisor(float by) {
    const bool infinite = fabsf(by) == __uint_as_float(0x7f800000u);
    scale = infinite ? 1.f : by;
    reciprocal = infinite ? 0.f : __frcp_rn(by);
  }

  __device__ __forceinline__ float operator()(float x) const {
    const float product = within_512(x * reciprocal);  // an infinite one would leave a NaN
    const float excess = fmaf(product, scale, -x);
    return fmaf(-excess, reciprocal, product);
  }

 private:
  // Not more than saturates.
  static __device__ __forceinline__ float within_512(float f) {
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
