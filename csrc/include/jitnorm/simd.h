// Vectors of floats on the CPU, one SIMD register each, in the vector extensions of GCC and Clang: loads, stores,
// conversions, reductions, exp, and the RMS and the mean of a row. Included by every elementwise/<family>_cpu.h that
// computes.
//
// immintrin.h would double the time of a build. Half-precision conversions are builtins, or written out for machines
// without such instructions: compilers do not vectorise a loop over _Float16. exp is written out, because compilers
// vectorise libm's only under -ffast-math.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// The number of floats in one register. GCC generates scalar code for longer vectors.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Vectors of kLanes floats, signed 32-bit integers, unsigned 32-bit integers, and bytes.
typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef int ints __attribute__((vector_size(4 * kLanes)));
typedef unsigned words __attribute__((vector_size(4 * kLanes)));
typedef unsigned char bytes __attribute__((vector_size(kLanes)));
// Vectors of kLanes 16-bit elements, as bits. Signed, as the builtins require.
typedef short halves __attribute__((vector_size(2 * kLanes)));

template <typename V, typename T>
inline V read(const T* src) {
  V v;
  __builtin_memcpy(&v, src, sizeof v);
  return v;
}

template <typename V, typename T>
inline void write(T* dst, V v) {
  __builtin_memcpy(dst, &v, sizeof v);
}

// Sign-extended, since halves are signed. The conversions ignore the upper half.
inline words widen(halves h) {
#if defined(__clang__) || !defined(__AVX2__)
  return __builtin_convertvector(h, words);
#elif defined(__AVX512F__)  // one instruction; GCC 12 makes four of __builtin_convertvector
  return (words)__builtin_ia32_pmovsxwd512_mask(h, ints{}, -1);
#else
  return (words)__builtin_ia32_pmovsxwd256(h);
#endif
}

inline halves narrow(words u) { return __builtin_convertvector(u, halves); }

inline floats from_bf16(halves h) { return (floats)(widen(h) << 16); }

inline halves to_bf16(floats f) {
  words u = (words)f;
  words rounded = u + 0x7fff + ((u >> 16) & 1);  // to nearest even
  return narrow((f == f ? rounded : u | 0x400000) >> 16);
}

#if defined(__AVX512F__)
inline floats from_fp16(halves h) { return __builtin_ia32_vcvtph2ps512_mask(h, floats{}, -1, 4); }
inline halves to_fp16(floats f) { return __builtin_ia32_vcvtps2ph512_mask(f, 0, halves{}, -1); }  // to nearest even
#elif defined(__AVX2__) && defined(__F16C__)
inline floats from_fp16(halves h) { return __builtin_ia32_vcvtph2ps256(h); }
inline halves to_fp16(floats f) { return __builtin_ia32_vcvtps2ph256(f, 0); }  // to nearest even
#else
// A multiplication moves the exponent: it is exact, and normalises subnormals.
inline floats from_fp16(halves h) {
  words u = widen(h), magnitude = (u & 0x7fff) << 13;
  words scaled = (words)((floats)magnitude * 0x1p112f);
  words special = (words)(magnitude >= 0x7c00u << 13) & 0x7f800000;  // infinities and NaNs
  return (floats)((u & 0x80000000) | scaled | special);
}

inline halves to_fp16(floats f) {
  words u = (words)f, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Below 2^-14, where fp16 is subnormal, a float addition rounds: the ulp of 0.5f is the smallest fp16, 2^-24.
  words subnormal = (words)((floats)magnitude + 0.5f) - 0x3f000000;
  words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // to nearest even
  words rounded = magnitude < 113u << 23 ? subnormal : normal;
  words special = magnitude > 0x7f800000u ? words{} + 0x7e00 : words{} + 0x7c00;  // NaN, infinity
  return narrow(sign | (magnitude < 0x477ff000u ? rounded : special));            // infinity from 65520 on
}
#endif

inline floats magnitude(floats f) { return (floats)((words)f & 0x7fffffff); }

inline bytes to_e4m3(floats f) {
  floats limit = floats{} + kMaxE4M3, saturated = magnitude(f) < limit ? magnitude(f) : limit;
  words u = (words)saturated, sign = ((words)f >> 24) & 0x80;
  // Below 2^-6, where e4m3 is subnormal, a float addition rounds: the ulp of 2^14 is the smallest e4m3, 2^-9.
  words subnormal = (words)(saturated + 0x1p14f) - 0x46800000;
  words normal = (u - (120 << 23) + 0x7ffff + ((u >> 20) & 1)) >> 20;  // to nearest even
  words code = sign | (u < 121u << 23 ? subnormal : normal);
  return __builtin_convertvector(f == f ? code : words{} + 0x7f, bytes);
}

inline floats load(const float* src) { return read<floats>(src); }
inline floats load(const bf16_t* src) { return from_bf16(read<halves>(src)); }
inline floats load(const fp16_t* src) { return from_fp16(read<halves>(src)); }
// `count` elements, fewer than kLanes, followed by zeros.
template <typename T>
inline floats load_partial(const T* src, int count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, src, count * sizeof(T));
  return load(padded);
}

inline void store(float* dst, floats f) { write(dst, f); }
inline void store(bf16_t* dst, floats f) { write(dst, to_bf16(f)); }
inline void store(fp16_t* dst, floats f) { write(dst, to_fp16(f)); }
inline void store(e4m3_t* dst, floats f) { write(dst, to_e4m3(f)); }

// The first `count` elements, fewer than kLanes.
template <typename T>
inline void store_partial(T* dst, floats f, int count) {
  T padded[kLanes];
  store(padded, f);
  __builtin_memcpy(dst, padded, count * sizeof(T));
}

// Of a row of kSize elements those from i on, a multiple of kLanes. Behind the last they are zeros, which are not
// stored.
template <int kSize, typename T>
inline floats load_of_row(const T* row, int i) {
  if (kSize % kLanes == 0 || i + kLanes <= kSize) return load(row + i);
  return load_partial(row + i, kSize - i);
}
template <int kSize, typename T>
inline void store_of_row(T* row, int i, floats f) {
  if (kSize % kLanes == 0 || i + kLanes <= kSize) store(row + i, f);
  else store_partial(row + i, f, kSize - i);
}

// Rounded to T, in float.
template <typename T>
inline floats rounded_to(floats f) {
  T elements[kLanes];
  store(elements, f);
  return load(elements);
}

// Recursive, because GCC would compile a loop over the lanes to loads from memory.
template <int kCount = kLanes>
inline float sum(const floats& f, int first = 0) {
  if constexpr (kCount == 1) return f[first];
  else return sum<kCount / 2>(f, first) + sum<kCount / 2>(f, first + kCount / 2);
}

// Lane by lane. A NaN in f is ignored.
inline floats max(floats running, floats f) { return f > running ? f : running; }

// Over the lanes.
inline float max(const floats& f) {
  float largest = f[0];
  for (int i = 1; i < kLanes; i++) largest = f[i] > largest ? f[i] : largest;
  return largest;
}

// The error is below 2 ulp. Results that are 0, infinity, NaN or subnormal are the same as libm's.
inline floats exp(floats x) {
  x = x < -104.f ? floats{} - 104.f : x;  // exp(-104) is 0, and exp(89) infinity; a NaN stays a NaN
  x = x > 89.f ? floats{} + 89.f : x;
  const floats n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to an integer: 1.5 * 2^23 has no fraction bits
  floats r = x - n * 0.693359375f;                               // log(2) in two parts, the first exact times n
  r = r + n * 2.12194440e-4f;
  // exp(r) = 1 + r + r^2 P(r), where P interpolates at the five Chebyshev nodes of +-log(2) / 2: off by 1e-10 at most.
  floats p = 0.00139261761f * r + 0.00836317307f;
  p = p * r + 0.0416665547f;
  p = p * r + 0.16666577f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  // 2^n in two factors, as float has neither 2^128 nor 2^-150.
  const ints exponent = __builtin_convertvector(n, ints), half = exponent >> 1;
  return p * (floats)((half + 127) << 23) * (floats)((exponent - half + 127) << 23);
}

// The reciprocal root mean square of a row, 1 / sqrt(mean of squares + eps). `value(i)` gives the floats of the
// elements from i on, and zeros behind the last.
template <int kHiddenSize, typename Value>
inline float rstd_of_row(float eps, Value value) {
  constexpr int kSums = 64 / kLanes;  // independent sums: in a single one, each addition would wait for the one before
  floats sums[kSums] = {};
  for (int i = 0; i < kHiddenSize; i += kSums * kLanes)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; j++) {
      if (kHiddenSize % (kSums * kLanes) != 0 && i + j * kLanes >= kHiddenSize) break;
      floats f = value(i + j * kLanes);
      sums[j] += f * f;
    }
  for (int j = 1; j < kSums; j++) sums[0] += sums[j];
  return 1. / __builtin_sqrt(double(sum(sums[0])) / kHiddenSize + eps);
}

// The mean of a row. `value` is as for rstd_of_row.
template <int kHiddenSize, typename Value>
inline float mean_of_row(Value value) {
  constexpr int kSums = 64 / kLanes;  // as in rstd_of_row
  floats sums[kSums] = {};
  for (int i = 0; i < kHiddenSize; i += kSums * kLanes)
#pragma GCC unroll 16
    for (int j = 0; j < kSums; j++) {
      if (kHiddenSize % (kSums * kLanes) != 0 && i + j * kLanes >= kHiddenSize) break;
      sums[j] += value(i + j * kLanes);
    }
  for (int j = 1; j < kSums; j++) sums[0] += sums[j];
  return double(sum(sums[0])) / kHiddenSize;
}

}  // namespace jitnorm
