// Quantisation to e4m3 on CUDA. Included by generated sources (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/quant_fp8.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/quantise.h"
#include "jitnorm/reduce.h"
#include "jitnorm/vector.h"

namespace jitnorm {

// The constants of the kernel classes, for device code and for the launch, and what their device code shares.
template <typename T>
struct QuantFp8KernelBase : DefaultVariantOnly {
  using input_t = T;
  using params_t = QuantFp8Params;
  using info_t = QuantFp8Info;
  static constexpr int kElementsPerVector = 16 / sizeof(T);
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kMinBlocksPerSM = 1;
  static constexpr unsigned kAlignment = 16;

  static __device__ __forceinline__ float vector_amax(const Vector<T, kElementsPerVector>& x, float amax) {
    float f[kElementsPerVector];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElementsPerVector; j++) amax = fmaxf(amax, fabsf(f[j]));
    return amax;
  }

  static __device__ __forceinline__ float block_amax(float amax) {
    __shared__ float partial[kWarps];
    return block_max<kWarps>(amax, partial, threadIdx.x / kWarpSize);
  }

  static __device__ __forceinline__ void quantise(e4m3_t* out, const Vector<T, kElementsPerVector>& x,
                                                  const ScaleDivider& divide) {
    float f[kElementsPerVector];
    to_float(x, f);
#pragma unroll
    for (int j = 0; j < kElementsPerVector; j++) f[j] = divide(f[j]);
    Vector<e4m3_t, kElementsPerVector> y;
    from_float(f, y);
    store(out, y);
  }
};

// The first kernel of a dynamic scale, with a grid-stride loop: a maximum is the same in any order, so the number of
// blocks does not affect the result.
template <typename T>
struct PartialAmaxKernel : QuantFp8KernelBase<T> {
  static constexpr Pass kPass = Pass::kPartialAmax;
  static constexpr int kTile = 1;

  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElementsPerVector = Base::kElementsPerVector, kUnroll = 4;
    const T* input = static_cast<const T*>(p.input);
    const index_t vectors = p.num_elements / kElementsPerVector, step = p.num_rows * Base::kThreads;
    index_t i = index_t(blockIdx.x) * Base::kThreads + threadIdx.x;
    float amax = 0;
    prefetch_before_wait(input + (i < vectors ? i : 0) * kElementsPerVector, p.partial_amax, p.partial_amax);
    grid_dependency_wait();
    for (; i + (kUnroll - 1) * step < vectors; i += kUnroll * step) {
      Vector<T, kElementsPerVector> x[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; k++) x[k] = load<T, kElementsPerVector>(input + (i + k * step) * kElementsPerVector);
#pragma unroll
      for (int k = 0; k < kUnroll; k++) amax = Base::vector_amax(x[k], amax);
    }
    for (; i < vectors; i += step)
      amax = Base::vector_amax(load<T, kElementsPerVector>(input + i * kElementsPerVector), amax);
    const index_t last = vectors * kElementsPerVector + threadIdx.x;  // elements that fill no vector
    if (blockIdx.x == 0 && last < p.num_elements) amax = fmaxf(amax, fabsf(to_float(input[last])));
    launch_dependents();
    amax = Base::block_amax(amax);
    if (threadIdx.x == 0) p.partial_amax[blockIdx.x] = amax;
  }
};

// A block takes a tile, two vectors per thread.
template <typename T, Pass kPass_>
struct PerTensorQuantFp8Kernel : QuantFp8KernelBase<T> {
  static constexpr Pass kPass = kPass_;
  static constexpr int kVectorsPerThread = 2;
  static constexpr int kTile =
      kVectorsPerThread * QuantFp8KernelBase<T>::kThreads * QuantFp8KernelBase<T>::kElementsPerVector;

  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElementsPerVector = Base::kElementsPerVector;
    const index_t first = index_t(blockIdx.x) * kTile;
    const T* input = static_cast<const T*>(p.input) + first;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + first;
    const int count = p.num_elements - first < kTile ? int(p.num_elements - first) : kTile,
              vectors = count / kElementsPerVector;
    prefetch_before_wait(input, kPass == Pass::kDynamic ? p.partial_amax : p.scale, out);
    grid_dependency_wait();
    Vector<T, kElementsPerVector> x[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors)
        x[k] = load<T, kElementsPerVector>(input + i * kElementsPerVector);
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
    for (int k = 0; k < kVectorsPerThread; k++)
      if (int i = threadIdx.x + k * Base::kThreads; i < vectors)
        Base::quantise(out + i * kElementsPerVector, x[k], divide);
    // Elements of the last tile that fill no vector.
    if (int last = vectors * kElementsPerVector + threadIdx.x; last < count)
      out[last] = to_e4m3(divide(to_float(input[last])));
  }
};

// A block takes a row of any length. It reads the row twice, the second time from a cache.
template <typename T>
struct PerTokenQuantFp8Kernel : QuantFp8KernelBase<T> {
  static constexpr Pass kPass = Pass::kDynamic;
  static constexpr int kTile = 0;

  template <GridVariant>
  static __device__ __forceinline__ void run(const QuantFp8Params& p) {
    using Base = QuantFp8KernelBase<T>;
    constexpr int kElementsPerVector = Base::kElementsPerVector;
    const T* input = static_cast<const T*>(p.input) + index_t(blockIdx.x) * p.input_stride;
    e4m3_t* out = static_cast<e4m3_t*>(p.out) + index_t(blockIdx.x) * p.out_stride;
    const index_t vectors = p.num_elements / kElementsPerVector;
    prefetch_before_wait(input, input, out);
    grid_dependency_wait();
    float amax = 0;
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      amax = Base::vector_amax(load<T, kElementsPerVector>(input + i * kElementsPerVector), amax);
    launch_dependents();
    const float scale = dynamic_scale(Base::block_amax(amax), kMinTokenScale);
    if (threadIdx.x == 0) p.scale[blockIdx.x] = scale;
    const ScaleDivider divide(scale);
#pragma unroll 4
    for (index_t i = threadIdx.x; i < vectors; i += Base::kThreads)
      Base::quantise(out + i * kElementsPerVector, load<T, kElementsPerVector>(input + i * kElementsPerVector), divide);
  }
};

}  // namespace jitnorm
