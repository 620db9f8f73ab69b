// Activations on CUDA. A thread reads 16 bytes of gate and, for a product, 16 of up, and writes 16. One kernel supports
// every width: the grid, computed at the call, places threads over the columns of a row. Included by generated sources
// (jitnorm/jit/spec.py).
#pragma once
#include "elementwise/activation.h"
#include "jitnorm/cuda_kernel.h"
#include "jitnorm/device_math.h"
#include "jitnorm/grid.h"
#include "jitnorm/vector.h"

namespace jitnorm {

template <typename T, typename Formula, int kVectorBytes_>
struct ActivationKernel : DefaultVariantOnly {
  using formula_t = Formula;
  using input_t = T;
  using params_t = ActivationParams;
  using info_t = ActivationInfo;
  static constexpr int kVectorBytes = kVectorBytes_;
  static constexpr unsigned kAlignment = kVectorBytes;
  static constexpr int kElementsPerVector = kVectorBytes / sizeof(T);
  static constexpr int kVectorsPerThread = 16 / kVectorBytes;  // of the output
  static constexpr bool kHasUp = Formula::kOperands != Operands::kSingle;
  static constexpr bool kIsInterleaved = Formula::kOperands == Operands::kInterleaved;
  static constexpr int kInputStep = kIsInterleaved ? 2 : 1;  // from one element of the output to the next
  static constexpr int kThreads = 512;
  static constexpr int kMinBlocksPerSM = kMaxThreadsPerSM / kThreads;  // a thread has only 32 bytes in flight

  template <GridVariant>
  static __device__ __forceinline__ void run(const ActivationParams& p) {
    const index_t row = grid_row();
    const int first = first_column(kVectorsPerThread) * kElementsPerVector, step = blockDim.x * kElementsPerVector;
    if (row >= p.num_rows || first >= p.width) return;
    // Interleaved, `gate` has the first half of the elements for a vector of the output, and `up` the rest.
    const T* gate = static_cast<const T*>(p.input) + row * p.input_stride + index_t(kInputStep) * first;
    const T* up = kIsInterleaved ? gate + kElementsPerVector : kHasUp ? gate + p.width : gate;
    T* out = static_cast<T*>(p.out) + row * p.out_stride + first;
    prefetch_before_wait(gate, up, out, linear_block_index());
    grid_dependency_wait();
    if (is_skipped(p, row)) return;
    Vector<T, kElementsPerVector> gates[kVectorsPerThread], ups[kVectorsPerThread];
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (i > 0 && first + i * step >= p.width) continue;
      gates[i] = load<T, kElementsPerVector>(gate + i * kInputStep * step);
      if constexpr (kHasUp) ups[i] = load<T, kElementsPerVector>(up + i * kInputStep * step);
    }
    launch_dependents();
#pragma unroll
    for (int i = 0; i < kVectorsPerThread; i++) {
      if (i > 0 && first + i * step >= p.width) continue;
      float x[2 * kElementsPerVector], y[kElementsPerVector];
      to_float(gates[i], y);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) x[j] = y[j];
      if constexpr (kHasUp) to_float(ups[i], y);
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++) x[kElementsPerVector + j] = y[j];
#pragma unroll
      for (int j = 0; j < kElementsPerVector; j++)
        y[j] = Formula::template compute<DeviceMath<T>>(
            x[kIsInterleaved ? 2 * j : j], x[kIsInterleaved ? 2 * j + 1 : kElementsPerVector + j], p.parameters);
      Vector<T, kElementsPerVector> result;
      from_float(y, result);
      store(out + i * step, result);
    }
  }
};

}  // namespace jitnorm
