// Sixteen floats at a time on the host, in the vector extensions of GCC and Clang: the compiler splits them into whatever
// registers the machine has. The half-precision conversions are written out because compilers leave them scalar, and
// because immintrin.h alone would double the time of a build.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

constexpr int kLanes = 16;
typedef float floats __attribute__((vector_size(4 * kLanes)));
typedef unsigned words __attribute__((vector_size(4 * kLanes)));
typedef unsigned short halves __attribute__((vector_size(2 * kLanes)));

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V, typename T>
inline V read(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

inline words choose(words mask, words yes, words no) { return (mask & yes) | (~mask & no); }

inline floats load(const float* from) { return read<floats>(from); }
inline void store(float* to, floats f) { __builtin_memcpy(to, &f, sizeof f); }

inline floats load(const bf16_t* from) {
  return bit_cast<floats>(__builtin_convertvector(read<halves>(from), words) << 16);
}

inline void store(bf16_t* to, floats f) {
  words u = bit_cast<words>(f);
  words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest even
  words nan = bit_cast<words>(f != f);
  halves h = __builtin_convertvector(choose(nan, (u >> 16) | 0x40, rounded), halves);
  __builtin_memcpy(to, &h, sizeof h);
}

#ifdef __F16C__
typedef short shorts8 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));

inline floats load(const fp16_t* from) {
  struct {
    floats8 half[2];
  } f = {{__builtin_ia32_vcvtph2ps256(read<shorts8>(from)), __builtin_ia32_vcvtph2ps256(read<shorts8>(from + 8))}};
  return bit_cast<floats>(f);
}

inline void store(fp16_t* to, floats f) {
  struct Halves {
    floats8 half[2];
  } halves = bit_cast<Halves>(f);
  for (int i = 0; i < 2; i++) {
    shorts8 h = __builtin_ia32_vcvtps2ph256(halves.half[i], 0);  // to nearest even
    __builtin_memcpy(to + 8 * i, &h, sizeof h);
  }
}
#else
// The exponent moves by a multiplication, which is exact and takes care of subnormals.
inline floats load(const fp16_t* from) {
  words h = __builtin_convertvector(read<halves>(from), words);
  words magnitude = (h & 0x7fff) << 13;
  words scaled = bit_cast<words>(bit_cast<floats>(magnitude) * 0x1p112f);
  words special = bit_cast<words>(magnitude >= (0x7c00u << 13));  // infinities and NaNs
  return bit_cast<floats>(((h & 0x8000) << 16) | scaled | (special & 0x7f800000u));
}

inline void store(fp16_t* to, floats f) {
  words u = bit_cast<words>(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Below 2^-14 the float adder rounds: 0.5 has its last bit where a subnormal half has its own.
  words small = bit_cast<words>(bit_cast<floats>(magnitude) + 0.5f) - 0x3f000000u;
  words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // to nearest even
  words h = choose(bit_cast<words>(magnitude < (113u << 23)), small, normal);
  h = choose(bit_cast<words>(magnitude >= 0x477ff000u), words{} + 0x7c00, h);  // 65520 and above
  h = choose(bit_cast<words>(magnitude > 0x7f800000u), words{} + 0x7e00, h);   // NaN
  halves narrow = __builtin_convertvector(h | sign, halves);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}
#endif

inline float sum(floats f) {
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) f[i] += f[i + width];
  return f[0];
}

}  // namespace jitnorm
