// The exponential function of a register of floats. libm's takes one at a time, and compilers vectorise it only under
// -ffast-math.
#pragma once
#include "jitnorm/simd.h"

namespace jitnorm {

// Off by less than 2 units in the last place; 0, infinity and NaN where exp gives them, subnormal numbers included.
inline floats exp(floats x) {
  x = x < -104.f ? floats{} - 104.f : x;  // exp(-104) is 0, and exp(89) infinity; a NaN stays
  x = x > 89.f ? floats{} + 89.f : x;
  const floats n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to a whole number: 1.5 * 2^23 has no fractions
  floats r = x - n * 0.693359375f;                               // log(2) in two parts, the first exact times n
  r = r + n * 2.12194440e-4f;
  // exp(r) = 1 + r + r^2 P(r), where P interpolates at the five Chebyshev nodes of +-log(2) / 2: off by 1e-10 at most.
  floats p = 0.00139261761f * r + 0.00836317307f;
  p = p * r + 0.0416665547f;
  p = p * r + 0.16666577f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  // 2^n in two factors, as float has neither 2^128 nor 2^-150.
  const ints whole = __builtin_convertvector(n, ints), half = whole >> 1;
  return p * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
}

}  // namespace jitnorm
