// Quantisation to e4m3 numbers on CUDA.
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/launch.h"
#include "jitnorm/quantise.h"
#ifdef __CUDACC__
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

// What the kernels have in common with each other, and with the host, which launches them.
template <typename T>
struct Fp8Cuda : EveryGrid {
  using input_t = T;
  using params_t = QuantFp8Params;
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRowsPerBlock = 1;
  static constexpr int kMinBlocks = 1;
  static constexpr unsigned kAlignment = 16;

#ifdef __CUDACC__
  static __device__ __forceinline__ float largest_of(const Vector<T, kElements>& x, float largest) {
    float f[kElements];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElements; j++) largest = fmaxf(largest, fabsf(f[j]));
    return largest;
  }

  static __device__ __forceinline__ float block_largest(float largest) {
    __shared__ float partial[kWarps];
    return block_max<kWarps>(largest, partial, threadIdx.x / kWarpSize);
  }

  static __device__ __forceinline__ void quantise(e4m3_t* out, const Vector<T, kElements>& x, const Divisor& by) {
    float f[kElements];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElements; j++) f[j] = by(f[j]);
    Vector<e4m3_t, kElements> y;
    from_float(f, y);
    store(out, y);
  }
#endif
};

// A block takes every num_tokens-th stretch of the tensor. A maximum is the same in any order.
template <typename T>
struct PerTensorFp8MaximaKernel : Fp8Cuda<T> {
  static constexpr Pass kPass = Pass::kFindMaxima;
  static constexpr int kTile = 1;

#ifdef __CUDACC__
  template <GridLength>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = Fp8Cuda<T>;
    constexpr int kElements = Base::kElements, kAtOnce = 4;
    const T* input = static_cast<const T*>(p.input);
    const index_t vectors = p.num_elements / kElements, step = p.num_tokens * Base::kThreads;
    index_t i = index_t(blockIdx.x) * Base::kThreads + threadIdx.x;
    float largest = 0;
    before_wait(input + (i < vectors ? i : 0) * kElements, p.maxima, p.maxima);
    wait_for_previous();
    for (; i + (kAtOnce - 1) * step < vectors; i += kAtOnce * step) {
      Vector<T, kElements> x[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) x[k] = load<T, kElements>(input + (i + k * step) * kElements);
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) largest = Base::largest_of(x[k], largest);
    }
    for (; i < vectors; i += step) largest = Base::largest_of(load<T, kElements>(input + i * kElements), largest);
    const index_t last = vectors * kElements + threadIdx.x;
    if (blockIdx.x == 0 && last < p.num_elements) largest = fmaxf(largest, fabsf(to_float(input[last])));
    let_next_start();
    largest = Base::block_largest(largest);
    if (threadIdx.x == 0) p.maxima[blockIdx.x] = largest;
  }
#endif
};

// A block takes a tile: two vectors to a thread.
template <typename T, Pass kPass_>
struct PerTensorQuantFp8Kernel : Fp8Cuda<T> {
  static constexpr Pass kPass = kPass_;
  static constexpr int kVectors = 2;
  static constexpr int kTile = kVectors * Fp8Cuda<T>::kThreads * Fp8Cuda<T>::kElements;

#ifdef __CUDACC__
  template <GridLength>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = Fp8Cuda<T>;
    constexpr int kElements = Base::kElements;
    const index_t first = index_t(blockIdx.x) * kTile;
    const T* input = static_cast<const T*>(p.input) + first;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + first;
    const int count = p.num_elements - first < kTile ? int(p.num_elements - first) : kTile, vectors = count / kElements;
    before_wait(input, kPass == Pass::kScaleFound ? p.maxima : p.scale, out);
    wait_for_previous();
    Vector<T, kElements> x[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors) x[k] = load<T, kElements>(input + i * kElements);
    float scale;
    if constexpr (kPass == Pass::kScaleGiven) {
      scale = load(p.scale);
      let_next_start();
    } else {
      float largest = 0;
#pragma unroll
      for (int k = 0; k < kMostMaxima / Base::kThreads; k++)
        if (int i = threadIdx.x + k * Base::kThreads; i < p.num_maxima) largest = fmaxf(largest, load(p.maxima + i));
      let_next_start();
      scale = scale_of(Base::block_largest(largest), kLeastTensorScale);
      if (blockIdx.x == 0 && threadIdx.x == 0) *p.scale = scale;
    }
    const Divisor by(scale);
#pragma unroll
    for (int k = 0; k < kVectors; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors) Base::quantise(out + i * kElements, x[k], by);
    if (int last = vectors * kElements + threadIdx.x; last < count) out[last] = to_e4m3(by(to_float(input[last])));
  }
#endif
};

// A block takes a row, of any length: it reads the row twice, the second time from a cache.
template <typename T>
struct PerTokenQuantFp8Kernel : Fp8Cuda<T> {
#ifdef __CUDACC__
  template <GridLength>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = Fp8Cuda<T>;
    constexpr int kElements = Base::kElements;
    const T* input = static_cast<const T*>(p.input) + index_t(blockIdx.x) * p.input_stride;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + index_t(blockIdx.x) * p.out_stride;
    const index_t vectors = p.num_elements / kElements;
    before_wait(input, input, out);
    wait_for_previous();
    float largest = 0;
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      largest = Base::largest_of(load<T, kElements>(input + i * kElements), largest);
    let_next_start();
    const float scale = scale_of(Base::block_largest(largest), kLeastTokenScale);
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    const Divisor by(scale);
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      Base::quantise(out + i * kElements, load<T, kElements>(input + i * kElements), by);
  }
#endif
};

}  // namespace jitnorm
