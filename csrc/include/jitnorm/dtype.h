// Element types by name and size only. How they convert to float is the business of vector.h (CUDA) and simd.h (host):
// cuda_bf16.h and cuda_fp16.h would double the time it takes to compile a kernel.
#pragma once

#ifdef __CUDACC__  // what kernels of both sides call
#define JITNORM_ANYWHERE __device__ __forceinline__
#else
#define JITNORM_ANYWHERE inline
#endif

namespace jitnorm {

using index_t = long long;  // row numbers and strides, in elements: 2^31 of them are not enough

struct bf16_t {
  unsigned short bits;
};

struct fp16_t {
  unsigned short bits;
};

// float8_e4m3fn: a sign, 4 bits of exponent, 3 of mantissa; no infinities, and one NaN for each sign. Only written,
// from float: to nearest even, what is beyond the largest number becomes that, infinities too, and every NaN becomes
// 0x7f.
struct e4m3_t {
  unsigned char bits;
};
constexpr float kLargestE4M3 = 448.f;

}  // namespace jitnorm
