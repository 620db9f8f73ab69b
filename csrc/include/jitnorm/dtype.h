// Element types, row indices, min and max, and the specifier of functions that both compilers see. Every other header
// includes this one.
//
// An element type is only a name and a size. vector.h (CUDA) and simd.h (CPU) convert it to float: including
// cuda_bf16.h and cuda_fp16.h would double the time of a build.
#pragma once

// For functions that CUDA and CPU kernels share. nvcc compiles device code alone, so __host__ is not needed.
#ifdef __CUDACC__
#define JITNORM_HOST_DEVICE __device__ __forceinline__
#else
#define JITNORM_HOST_DEVICE inline
#endif

namespace jitnorm {

using index_t = long long;          // for row numbers and strides, which can exceed 2^31
constexpr int kMaxLeadingDims = 3;  // of rows that lie under several dimensions, each with a stride of its own

constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }

struct bf16_t {
  unsigned short bits;
};

template <typename T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16_t> = true;

template <typename A, typename B>
constexpr bool kIsSame = false;
template <typename T>
constexpr bool kIsSame<T, T> = true;

struct fp16_t {
  unsigned short bits;
};

// float8_e4m3fn: 1 sign bit, 4 exponent bits, 3 mantissa bits; no infinities, one NaN for each sign. Kernels write it
// and never read it. Conversion from float rounds to nearest even and saturates, infinities too; every NaN becomes
// 0x7f.
struct e4m3_t {
  unsigned char bits;
};
constexpr float kMaxE4M3 = 448.f;

}  // namespace jitnorm
