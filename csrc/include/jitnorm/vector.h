// Vectors of elements in one thread's registers: loads and stores, prefetches into L2, and conversions from and to
// float. Device code, included by rms_row.h and by the .cuh files that load vectors of their own.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// The type of one access of 16, 8, 4, 2 or 1 bytes; 16 for vectors of several accesses.
template <int kBytes>
struct Access {
  using type = uint4;
};
template <>
struct Access<8> {
  using type = uint2;
};
template <>
struct Access<4> {
  using type = unsigned;
};
template <>
struct Access<2> {
  using type = unsigned short;
};
template <>
struct Access<1> {
  using type = unsigned char;
};

// N elements that are loaded and stored together.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  static constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes % 16 == 0,
                "a vector is made of accesses of one size");
  using access_t = typename Access<kBytes>::type;
  static constexpr int kAccesses = kBytes / sizeof(access_t);
  access_t words[kAccesses];
};

// volatile, because the compiler would sink a load to its first use to save registers: then a thread would wait for one
// load after another instead of having all in flight.
__device__ __forceinline__ void load_access(uint4& dst, const uint4* src) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(dst.x), "=r"(dst.y), "=r"(dst.z), "=r"(dst.w)
               : "l"(src)
               : "memory");
}
__device__ __forceinline__ void load_access(uint2& dst, const uint2* src) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(dst.x), "=r"(dst.y) : "l"(src) : "memory");
}
__device__ __forceinline__ void load_access(unsigned& dst, const unsigned* src) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(dst) : "l"(src) : "memory");
}

__device__ __forceinline__ void load_access(unsigned short& dst, const unsigned short* src) {
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(dst) : "l"(src) : "memory");
}

// Loads of what nothing writes after grid_dependency_wait, at an address that is not known before
// (optimization_barrier). The compiler may move them.
__device__ __forceinline__ void load_constant_access(uint4& dst, const uint4* src) {
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(dst.x), "=r"(dst.y), "=r"(dst.z), "=r"(dst.w) : "l"(src));
}
__device__ __forceinline__ void load_constant_access(uint2& dst, const uint2* src) {
  asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(dst.x), "=r"(dst.y) : "l"(src));
}
__device__ __forceinline__ void load_constant_access(unsigned& dst, const unsigned* src) {
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(dst) : "l"(src));
}
__device__ __forceinline__ void load_constant_access(unsigned short& dst, const unsigned short* src) {
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(dst) : "l"(src));
}

// How `load` and load_aligned_to load.
struct OrderedLoads {
  template <typename A>
  static __device__ __forceinline__ void load(A& dst, const A* src) {
    load_access(dst, src);
  }
};
struct ConstantLoads {
  template <typename A>
  static __device__ __forceinline__ void load(A& dst, const A* src) {
    load_constant_access(dst, src);
  }
};

// Parts of 2, 4 or 8 bytes to the 32-bit words that they fill, and back. Parts of 1 byte may fill a shorter word.
template <int kParts>
__device__ __forceinline__ void join(const unsigned short (&parts)[kParts], unsigned* words) {
#pragma unroll
  for (int i = 0; i < kParts; i += 2) words[i / 2] = parts[i] | unsigned(parts[i + 1]) << 16;
}
template <int kParts>
__device__ __forceinline__ void join(const unsigned (&parts)[kParts], unsigned* words) {
#pragma unroll
  for (int i = 0; i < kParts; i++) words[i] = parts[i];
}
template <int kParts>
__device__ __forceinline__ void join(const uint2 (&parts)[kParts], unsigned* words) {
#pragma unroll
  for (int i = 0; i < kParts; i++) words[2 * i] = parts[i].x, words[2 * i + 1] = parts[i].y;
}
template <typename Word, int kParts>
__device__ __forceinline__ void split(const Word* words, unsigned char (&parts)[kParts]) {
  constexpr int kBytes = sizeof(Word);
#pragma unroll
  for (int i = 0; i < kParts; i++) parts[i] = words[i / kBytes] >> i % kBytes * 8 & 0xffu;
}
template <int kParts>
__device__ __forceinline__ void split(const unsigned* words, unsigned short (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; i += 2) parts[i] = words[i / 2] & 0xffffu, parts[i + 1] = words[i / 2] >> 16;
}
template <int kParts>
__device__ __forceinline__ void split(const unsigned* words, unsigned (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; i++) parts[i] = words[i];
}
template <int kParts>
__device__ __forceinline__ void split(const unsigned* words, uint2 (&parts)[kParts]) {
#pragma unroll
  for (int i = 0; i < kParts; i++) parts[i] = make_uint2(words[2 * i], words[2 * i + 1]);
}

template <typename T, int N, typename Loads = OrderedLoads>
__device__ __forceinline__ Vector<T, N> load(const T* src) {
  Vector<T, N> v;
#pragma unroll
  for (int i = 0; i < v.kAccesses; i++)
    Loads::load(v.words[i], reinterpret_cast<const typename Vector<T, N>::access_t*>(src) + i);
  return v;
}

// The same vector from an address that is a multiple of kBytes alone, which may be less than the vector has: by more
// and narrower accesses.
template <int kBytes, typename T, int N, typename Loads = OrderedLoads>
__device__ __forceinline__ Vector<T, N> load_aligned_to(const T* src) {
  using V = Vector<T, N>;
  if constexpr (kBytes >= int(sizeof(typename V::access_t))) {
    return load<T, N, Loads>(src);
  } else {
    using A = typename Access<kBytes>::type;
    constexpr int kParts = V::kBytes / kBytes;
    A parts[kParts];
#pragma unroll
    for (int i = 0; i < kParts; i++) Loads::load(parts[i], reinterpret_cast<const A*>(src) + i);
    V v;
    join(parts, reinterpret_cast<unsigned*>(v.words));
    return v;
  }
}

__device__ __forceinline__ float load(const float* src) {
  float f;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(f) : "l"(src) : "memory");
  return f;
}

// Copies a vector of 16 or 8 bytes to shared memory without a register, from sm_80 on. The thread that does it must
// wait before it reads the vector.
template <typename T, int N>
__device__ __forceinline__ void copy_async(Vector<T, N>* shared, const T* src) {
#if __CUDA_ARCH__ >= 800
  constexpr int kBytes = Vector<T, N>::kBytes;
  static_assert(kBytes == 16 || kBytes == 8, "a copy has one access");
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(src) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(src) : "memory");
#endif
}
__device__ __forceinline__ void wait_for_async_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The compiler must assume that the value has changed here, so that it neither reads through a pointer nor converts
// elements earlier than the program does.
template <typename T>
__device__ __forceinline__ void optimization_barrier(const T*& pointer) {
  asm volatile("" : "+l"(pointer)::"memory");
}
__device__ __forceinline__ void optimization_barrier(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}
__device__ __forceinline__ void optimization_barrier(uint2& v) { asm volatile("" : "+r"(v.x), "+r"(v.y)); }
__device__ __forceinline__ void optimization_barrier(unsigned& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void optimization_barrier(unsigned short& v) { asm volatile("" : "+h"(v)); }
template <typename T, int N>
__device__ __forceinline__ void optimization_barrier(Vector<T, N>& v) {
#pragma unroll
  for (int i = 0; i < v.kAccesses; i++) optimization_barrier(v.words[i]);
}

// int32 or int64 indices.
__device__ __forceinline__ index_t load_index(const void* from, index_t i, bool has_int64) {
  index_t index;
  if (has_int64) {
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(index) : "l"(static_cast<const index_t*>(from) + i) : "memory");
  } else {
    int narrow;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(narrow) : "l"(static_cast<const int*>(from) + i) : "memory");
    index = narrow;
  }
  return index;
}

template <typename T, int N>
__device__ __forceinline__ void store(T* dst, const Vector<T, N>& v) {
#pragma unroll
  for (int i = 0; i < v.kAccesses; i++) reinterpret_cast<typename Vector<T, N>::access_t*>(dst)[i] = v.words[i];
}

__device__ __forceinline__ void store_access(uint4* dst, const uint4& src) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "r"(src.x), "r"(src.y), "r"(src.z), "r"(src.w)
               : "memory");
}
__device__ __forceinline__ void store_access(uint2* dst, const uint2& src) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(dst), "r"(src.x), "r"(src.y) : "memory");
}
__device__ __forceinline__ void store_access(unsigned* dst, const unsigned& src) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(dst), "r"(src) : "memory");
}

// The counterpart of load_aligned_to.
template <int kBytes, typename T, int N>
__device__ __forceinline__ void store_aligned_to(T* dst, const Vector<T, N>& v) {
  using V = Vector<T, N>;
  if constexpr (kBytes >= int(sizeof(typename V::access_t))) {
    store(dst, v);
  } else {
    using A = typename Access<kBytes>::type;
    constexpr int kParts = V::kBytes / kBytes;
    A parts[kParts];
    using Word = typename Access<(V::kBytes < 4 ? V::kBytes : 4)>::type;
    split(reinterpret_cast<const Word*>(v.words), parts);
#pragma unroll
    for (int i = 0; i < kParts; i++) reinterpret_cast<A*>(dst)[i] = parts[i];
  }
}

// As store, but surely by whole accesses. The compiler splits a store into words where its optimiser took the vector
// apart.
template <typename T, int N>
__device__ __forceinline__ void store_whole(T* dst, const Vector<T, N>& v) {
#pragma unroll
  for (int i = 0; i < v.kAccesses; i++)
    store_access(reinterpret_cast<typename Vector<T, N>::access_t*>(dst) + i, v.words[i]);
}

// Prefetches kBytes into L2. This may come before an earlier kernel's writes, which go through L2 too. The instruction
// takes multiples of 16: of a row that begins or ends elsewhere, up to 30 bytes at its ends are left out.
template <int kBytes>
__device__ __forceinline__ void prefetch(const void* src) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kBytes % 16 == 0) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "n"(kBytes));
  } else {
    const void* aligned = reinterpret_cast<const void*>((reinterpret_cast<unsigned long long>(src) + 15) / 16 * 16);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(aligned), "n"((kBytes - 15) / 16 * 16));
  }
#endif
}
// Likewise, for a number of bytes that is known at run time.
__device__ __forceinline__ void prefetch(const void* src, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes));
#endif
}
// Prefetches one of kParts parts of a row of kSize elements, which is aligned to 16 bytes.
template <int kSize, int kParts, typename T>
__device__ __forceinline__ void prefetch_part(const T* row, int part) {
  constexpr int kElements = 16 / sizeof(T), kPartSize = (kSize / kElements + kParts - 1) / kParts * kElements;
  static_assert(kSize % kElements == 0, "a row is whole 16-byte vectors");
  static_assert(kPartSize * (kParts - 1) < kSize, "no part is empty");
  prefetch(row + part * kPartSize, (part < kParts - 1 ? kPartSize : kSize - (kParts - 1) * kPartSize) * sizeof(T));
}

// Two 16-bit elements of a word, the first in its low half, to two floats.
__device__ __forceinline__ void unpack(unsigned word, float* f, bf16_t) {
  f[0] = __uint_as_float(word << 16);
  f[1] = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void unpack(unsigned word, float* f, fp16_t) {
  asm("{.reg .b16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi;}"
      : "=f"(f[0]), "=f"(f[1])
      : "r"(word));
}

// Two floats to two elements of a word, the first in its low bits, rounded to nearest even. 16-bit elements fill the
// word, 8-bit elements its low half.
__device__ __forceinline__ unsigned pack(const float* f, bf16_t) {
#if __CUDA_ARCH__ >= 800
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(f[1]), "f"(f[0]));
  return word;
#else
  unsigned half[2];
  for (int i = 0; i < 2; i++) {
    unsigned u = __float_as_uint(f[i]);
    half[i] = f[i] != f[i] ? 0x7fffu : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  }
  return half[0] | half[1] << 16;
#endif
}

__device__ __forceinline__ unsigned pack(const float* f, fp16_t) {
  unsigned word;
  asm("{.reg .b16 lo, hi; cvt.rn.f16.f32 lo, %1; cvt.rn.f16.f32 hi, %2; mov.b32 %0, {lo, hi};}"
      : "=r"(word)
      : "f"(f[0]), "f"(f[1]));
  return word;
}

__device__ __forceinline__ unsigned pack(const float* f, e4m3_t) {
#if __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(f[1]), "f"(f[0]));
  return pair;
#else
  unsigned code[2];
  for (int i = 0; i < 2; i++) {
    const float magnitude = fminf(fabsf(f[i]), kMaxE4M3);
    const unsigned u = __float_as_uint(magnitude);
    // Below 2^-6, where e4m3 is subnormal, a float addition rounds: the ulp of 2^14 is the smallest e4m3, 2^-9.
    const unsigned subnormal = __float_as_uint(magnitude + 16384.f) - 0x46800000u;
    const unsigned normal = (u - (120u << 23) + 0x7ffffu + ((u >> 20) & 1u)) >> 20;
    code[i] =
        f[i] != f[i] ? 0x7fu : (magnitude < 0.015625f ? subnormal : normal) | (__float_as_uint(f[i]) >> 24 & 0x80u);
  }
  return code[0] | code[1] << 8;
#endif
}

template <typename T>
__device__ __forceinline__ void to_float(const Vector<T, 1>& v, float (&f)[1]) {
  float pair[2];
  unpack(v.words[0], pair, T{});
  f[0] = pair[0];
}

__device__ __forceinline__ void to_float(const Vector<float, 1>& v, float (&f)[1]) {
  f[0] = __uint_as_float(v.words[0]);
}

template <typename T, int N>
__device__ __forceinline__ void to_float(const Vector<T, N>& v, float (&f)[N]) {
  const unsigned* words = reinterpret_cast<const unsigned*>(v.words);
#pragma unroll
  for (int i = 0; i < N / 2; i++) unpack(words[i], f + 2 * i, T{});
}

template <int N>
__device__ __forceinline__ void to_float(const Vector<float, N>& v, float (&f)[N]) {
  const float* words = reinterpret_cast<const float*>(v.words);
#pragma unroll
  for (int i = 0; i < N; i++) f[i] = words[i];
}

template <typename T>
__device__ __forceinline__ float to_float(T element) {
  float f[2];
  unpack(element.bits, f, T{});
  return f[0];
}

__device__ __forceinline__ float to_float(float element) { return element; }

template <typename T>
__device__ __forceinline__ void from_float(const float (&f)[1], Vector<T, 1>& v) {
  const float pair[2] = {f[0], f[0]};
  v.words[0] = pack(pair, T{}) & 0xffffu;
}

__device__ __forceinline__ void from_float(const float (&f)[1], Vector<float, 1>& v) {
  v.words[0] = __float_as_uint(f[0]);
}

template <typename T, int N>
__device__ __forceinline__ void from_float(const float (&f)[N], Vector<T, N>& v) {
  unsigned* words = reinterpret_cast<unsigned*>(v.words);
#pragma unroll
  for (int i = 0; i < N / 2; i++) words[i] = pack(f + 2 * i, T{});
}

template <int N>
__device__ __forceinline__ void from_float(const float (&f)[N], Vector<float, N>& v) {
  float* words = reinterpret_cast<float*>(v.words);
#pragma unroll
  for (int i = 0; i < N; i++) words[i] = f[i];
}

__device__ __forceinline__ e4m3_t to_e4m3(float f) {
  const float pair[2] = {f, f};
  return {static_cast<unsigned char>(pack(pair, e4m3_t{}))};
}

__device__ __forceinline__ void from_float(const float (&f)[1], Vector<e4m3_t, 1>& v) {
  v.words[0] = to_e4m3(f[0]).bits;
}

__device__ __forceinline__ void from_float(const float (&f)[2], Vector<e4m3_t, 2>& v) {
  v.words[0] = pack(f, e4m3_t{});
}

template <int N>
__device__ __forceinline__ void from_float(const float (&f)[N], Vector<e4m3_t, N>& v) {
  unsigned* words = reinterpret_cast<unsigned*>(v.words);
#pragma unroll
  for (int i = 0; i < N / 4; i++) words[i] = pack(f + 4 * i, e4m3_t{}) | pack(f + 4 * i + 2, e4m3_t{}) << 16;
}

}  // namespace jitnorm
