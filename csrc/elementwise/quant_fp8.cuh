// Quantisation to e4m3 on CUDA. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/launch.h"
#include "jitnorm/quantise.h"
#ifdef __CUDACC__
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"
#endif

namespace jitnorm {

// The constants of the kernel classes, for device code and for the launch, and what their device code shares.
template <typename T>
struct QuantFp8KernelBase : DefaultVariantOnly {
  using input_t = T;
  using params_t = QuantFp8Params;
  static constexpr int kElements = 16 / sizeof(T);  // of a vector
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMinBlocks = 1;
  static constexpr unsigned kAlignment = 16;

#ifndef __CUDACC__
  static Grid grid(const QuantFp8Params& p) { return grid_of_blocks(p.num_rows, 1, kThreads); }
#else
  static __device__ __forceinline__ float vector_amax(const Vector<T, kElements>& x, float amax) {
    float f[kElements];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElements; j++) amax = fmaxf(amax, fabsf(f[j]));
    return amax;
  }

  static __device__ __forceinline__ float block_amax(float amax) {
    __shared__ float partial[kWarps];
    return block_max<kWarps>(amax, partial, threadIdx.x / kWarpSize);
  }

  static __device__ __forceinline__ void quantise(e4m3_t* out, const Vector<T, kElements>& x,
                                                  const ScaleDivider& divide) {
    float f[kElements];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElements; j++) f[j] = divide(f[j]);
    Vector<e4m3_t, kElements> y;
    from_float(f, y);
    store(out, y);
  }
#endif
};

// The first kernel of a dynamic scale. A grid-stride loop: a maximum is the same in any order, so the number of blocks
// does not matter to the result.
template <typename T>
struct PartialAmaxKernel : QuantFp8KernelBase<T> {
  static constexpr Pass kPass = Pass::kPartialAmax;
  static constexpr int kTile = 1;

#ifdef __CUDACC__
  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElements = Base::kElements, kUnroll = 4;
    const T* input = static_cast<const T*>(p.input);
    const index_t vectors = p.num_elements / kElements, step = p.num_rows * Base::kThreads;
    index_t i = index_t(blockIdx.x) * Base::kThreads + threadIdx.x;
    float amax = 0;
    prefetch_before_wait(input + (i < vectors ? i : 0) * kElements, p.partial_amax, p.partial_amax);
    grid_dependency_wait();
    for (; i + (kUnroll - 1) * step < vectors; i += kUnroll * step) {
      Vector<T, kElements> x[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; k++) x[k] = load<T, kElements>(input + (i + k * step) * kElements);
#pragma unroll
      for (int k = 0; k < kUnroll; k++) amax = Base::vector_amax(x[k], amax);
    }
    for (; i < vectors; i += step) amax = Base::vector_amax(load<T, kElements>(input + i * kElements), amax);
    const index_t last = vectors * kElements + threadIdx.x;  // elements that fill no vector
    if (blockIdx.x == 0 && last < p.num_elements) amax = fmaxf(amax, fabsf(to_float(input[last])));
    launch_dependents();
    amax = Base::block_amax(amax);
    if (threadIdx.x == 0) p.partial_amax[blockIdx.x] = amax;
  }
#endif
};

// A block takes a tile, two vectors a thread.
template <typename T, Pass kPass_>
struct PerTensorQuantFp8Kernel : QuantFp8KernelBase<T> {
  static constexpr Pass kPass = kPass_;
  static constexpr int kVectors = 2;
  static constexpr int kTile = kVectors * QuantFp8KernelBase<T>::kThreads * QuantFp8KernelBase<T>::kElements;

#ifdef __CUDACC__
  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElements = Base::kElements;
    const index_t first = index_t(blockIdx.x) * kTile;
    const T* input = static_cast<const T*>(p.input) + first;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + first;
    const int count = p.num_elements - first < kTile ? int(p.num_elements - first) : kTile, vectors = count / kElements;
    prefetch_before_wait(input, kPass == Pass::kDynamic ? p.partial_amax : p.scale, out);
    grid_dependency_wait();
    Vector<T, kElements> x[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors) x[k] = load<T, kElements>(input + i * kElements);
    float scale;
    if constexpr (kPass == Pass::kStatic) {
      scale = load(p.scale);
      launch_dependents();
    } else {
      float amax = 0;
#pragma unroll
      for (int k = 0; k < kMaxPartialAmax / Base::kThreads; k++)
        if (int i = threadIdx.x + k * Base::kThreads; i < p.num_partial_amax)
          amax = fmaxf(amax, load(p.partial_amax + i));
      launch_dependents();
      scale = dynamic_scale(Base::block_amax(amax), kMinTensorScale);
      if (blockIdx.x == 0 && threadIdx.x == 0) *p.scale = scale;
    }
    const ScaleDivider divide(scale);
#pragma unroll
    for (int k = 0; k < kVectors; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors) Base::quantise(out + i * kElements, x[k], divide);
    // Elements of the last tile that fill no vector.
    if (int last = vectors * kElements + threadIdx.x; last < count) out[last] = to_e4m3(divide(to_float(input[last])));
  }
#endif
};

// A block takes a row of any length. It reads the row twice, the second time from a cache.
template <typename T>
struct PerTokenQuantFp8Kernel : QuantFp8KernelBase<T> {
#ifdef __CUDACC__
  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElements = Base::kElements;
    const T* input = static_cast<const T*>(p.input) + index_t(blockIdx.x) * p.input_stride;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + index_t(blockIdx.x) * p.out_stride;
    const index_t vectors = p.num_elements / kElements;
    prefetch_before_wait(input, input, out);
    grid_dependency_wait();
    float amax = 0;
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      amax = Base::vector_amax(load<T, kElements>(input + i * kElements), amax);
    launch_dependents();
    const float scale = dynamic_scale(Base::block_amax(amax), kMinTokenScale);
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    const ScaleDivider divide(scale);
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      Base::quantise(out + i * kElements, load<T, kElements>(input + i * kElements), divide);
  }
#endif
};

}  // namespace jitnorm
