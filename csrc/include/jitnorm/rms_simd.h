// What a row is multiplied by on the host, so that its root mean square becomes 1.
#pragma once
#include "jitnorm/simd.h"

namespace jitnorm {

// 1 / sqrt(mean of squares + eps), of the floats that `value` gives for the elements from i on.
template <int kHiddenSize, typename Value>
inline float inverse_rms(float eps, Value value) {
  constexpr int kSums = 64 / kLanes;  // into a single one, each addition would wait for the one before it
  static_assert(kHiddenSize % (kSums * kLanes) == 0, "a row is whole vectors");
  floats sums[kSums] = {};
  for (int i = 0; i < kHiddenSize; i += kSums * kLanes)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; j++) {
      floats f = value(i + j * kLanes);
      sums[j] += f * f;
    }
  for (int j = 1; j < kSums; j++) sums[0] += sums[j];
  return 1. / __builtin_sqrt(double(sum(sums[0])) / kHiddenSize + eps);
}

}  // namespace jitnorm
