// Division by a number that is known only at run time, as a multiplication and a shift. Included by kernels that number
// the heads of all tokens.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// Exact for dividends below 2^31 (Granlund and Montgomery, 1994, theorem 4.2).
struct UnsignedDivisor {
  unsigned multiplier;  // 2^shift / divisor, rounded up
  unsigned shift;       // 31 + log2(divisor), rounded up
};

constexpr index_t kMaxDividend = 0x7fffffff;

JITNORM_HOST_DEVICE unsigned quotient(unsigned dividend, UnsignedDivisor divisor) {
  return static_cast<unsigned long long>(dividend) * divisor.multiplier >> divisor.shift;
}

#ifndef __CUDACC__
inline UnsignedDivisor divisor_of(unsigned value) {  // from 1 to 2^31
  unsigned shift = 31;
  while (1ull << (shift - 31) < value) shift++;
  UnsignedDivisor divisor;
  divisor.multiplier = static_cast<unsigned>(((1ull << shift) + value - 1) / value);
  divisor.shift = shift;
  return divisor;
}
#endif

}  // namespace jitnorm
