// A register of floats at a time on the host, in the vector extensions of GCC and Clang. The half-precision conversions
// are builtins, or written out where the machine has none: left to themselves, compilers make scalar code of them, and
// immintrin.h alone would double the time of a build.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// Never more than one register holds: GCC makes scalar code of longer vectors.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef int ints __attribute__((vector_size(4 * kLanes)));
typedef unsigned words __attribute__((vector_size(4 * kLanes)));
typedef short halves __attribute__((vector_size(2 * kLanes)));  // bits; signed because the builtins want it so
typedef unsigned char bytes __attribute__((vector_size(kLanes)));

template <typename V, typename T>
inline V read(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename T>
inline void write(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Sign-extended, as the bits are signed; no conversion looks at what that leaves in the upper half.
inline words widen(halves h) {
#if defined(__clang__) || !defined(__AVX2__)
  return __builtin_convertvector(h, words);
#elif defined(__AVX512F__)  // one instruction, where GCC 12 makes four of __builtin_convertvector
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
// The exponent moves by a multiplication, which is exact and takes care of subnormals.
inline floats from_fp16(halves h) {
  words u = widen(h), magnitude = (u & 0x7fff) << 13;
  words scaled = (words)((floats)magnitude * 0x1p112f);
  words special = (words)(magnitude >= 0x7c00u << 13) & 0x7f800000;  // infinities and NaNs
  return (floats)((u & 0x80000000) | scaled | special);
}

inline halves to_fp16(floats f) {
  words u = (words)f, sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Below 2^-14 the float adder rounds: 0.5 has its last bit where a subnormal half has its own.
  words subnormal = (words)((floats)magnitude + 0.5f) - 0x3f000000;
  words normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // to nearest even
  words rounded = magnitude < 113u << 23 ? subnormal : normal;
  words special = magnitude > 0x7f800000u ? words{} + 0x7e00 : words{} + 0x7c00;  // NaN, infinity
  return narrow(sign | (magnitude < 0x477ff000u ? rounded : special));            // infinity from 65520 on
}
#endif

inline floats magnitude(floats f) { return (floats)((words)f & 0x7fffffff); }

inline bytes to_e4m3(floats f) {
  floats most = floats{} + kLargestE4M3, least = magnitude(f) < most ? magnitude(f) : most;
  words u = (words)least, sign = ((words)f >> 24) & 0x80;
  // Below 2^-6 the float adder rounds: 2^14 has its last bit where a subnormal e4m3 has its own.
  words subnormal = (words)(least + 0x1p14f) - 0x46800000;
  words normal = (u - (120 << 23) + 0x7ffff + ((u >> 20) & 1)) >> 20;  // to nearest even
  words code = sign | (u < 121u << 23 ? subnormal : normal);
  return __builtin_convertvector(f == f ? code : words{} + 0x7f, bytes);
}

inline floats load(const float* from) { return read<floats>(from); }
inline floats load(const bf16_t* from) { return from_bf16(read<halves>(from)); }
inline floats load(const fp16_t* from) { return from_fp16(read<halves>(from)); }
// The first `count` of them, fewer than there are lanes; zeros for the rest.
template <typename T>
inline floats load_first(const T* from, int count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

inline void store(float* to, floats f) { write(to, f); }
inline void store(bf16_t* to, floats f) { write(to, to_bf16(f)); }
inline void store(fp16_t* to, floats f) { write(to, to_fp16(f)); }
inline void store(e4m3_t* to, floats f) { write(to, to_e4m3(f)); }

// A recursion because GCC would take a loop over the lanes through memory.
template <int kCount = kLanes>
inline float sum(const floats& f, int first = 0) {
  if constexpr (kCount == 1) return f[first];
  else return sum<kCount / 2>(f, first) + sum<kCount / 2>(f, first + kCount / 2);
}

// Of numbers: a NaN in f counts for nothing.
inline floats larger(floats than, floats f) { return f > than ? f : than; }

inline float largest(const floats& f) {
  float most = f[0];
  for (int i = 1; i < kLanes; i++) most = f[i] > most ? f[i] : most;
  return most;
}

}  // namespace jitnorm
