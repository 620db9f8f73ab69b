// Gated activations, out = activation(gate) * up: the activations themselves, the parameter struct of their kernel
// classes and, for the host compiler, the bindings function that fills it in. Included by activation.cuh and
// activation_cpu.h.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// An activation is a template over F, which is float on CUDA and a SIMD register of floats on the CPU, and over Math,
// which has exp(x), reciprocal(x) and times_sigmoid(x, u) = x / (1 + exp(-u)). At +infinity its value is its limit, at
// -infinity NaN, as in PyTorch.

// x * sigmoid(x)
struct SiLU {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    return Math::times_sigmoid(x, x);
  }
};

// x * Phi(x), where Phi is the distribution function of the normal distribution, (1 + erf(x / sqrt(2))) / 2.
struct GELU {
  // Phi(-t) = exp(-t^2 / 2) * s * P(s) with s = 1 / (1 + 0.27 t), where P interpolates at the nine Chebyshev nodes of
  // 0 <= t <= 14.5; for larger t, the result is below the smallest float. The relative error is at most 3e-8, in the
  // tail too, where 1 + erf(x) would cancel.
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    const F t = x < 0.f ? -x : x, s = Math::reciprocal(1.f + 0.27f * t);
    F p = 0.0292058334f * s - 0.127722557f;
    p = p * s + 0.172436097f;
    p = p * s - 0.0723445624f;
    p = p * s + 0.110054217f;
    p = p * s + 0.0710775825f;
    p = p * s + 0.102063549f;
    p = p * s + 0.107507093f;
    p = p * s + 0.107722758f;
    const F tail = Math::exp(-0.5f * t * t) * s * p;
    return x * (x < 0.f ? tail : 1.f - tail);
  }
};

// x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2u).
struct GELUTanh {
  template <typename Math, typename F>
  static JITNORM_HOST_DEVICE F apply(F x) {
    return Math::times_sigmoid(x, x * (1.59576912f + 0.0713548163f * x * x));
  }
};

constexpr int kMaxWidth = 1 << 30;  // a row has 2 * width elements, and kernels count its columns in int

struct ActivationParams {
  const void* input;  // rows of `width` elements of gate, then as many of up
  void* out;
  index_t input_stride;  // in elements, like out_stride
  index_t out_stride;
  index_t num_rows;
  int width;
  bool has_int64_ids;      // otherwise int32
  const void* expert_ids;  // one for expert_step rows each; null to skip no row
  index_t expert_step;
};

struct ActivationInfo {
  LaunchInfo launch;
  ElementType input;
  unsigned alignment;
  int vector_bytes;        // of an access
  int vectors_per_thread;  // of gate, and as many of up

  template <typename Kernel>
  static constexpr ActivationInfo of() {
    ActivationInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.vector_bytes = Kernel::kVectorBytes;
    info.vectors_per_thread = Kernel::kVectorsPerThread;
    return info;
  }
};

// Whether the row is not written, because its expert is -1.
JITNORM_HOST_DEVICE bool is_skipped(const ActivationParams& p, index_t row) {
  if (!p.expert_ids) return false;
  const index_t i = row / p.expert_step;
  return (p.has_int64_ids ? static_cast<const index_t*>(p.expert_ids)[i] : static_cast<const int*>(p.expert_ids)[i]) ==
         -1;
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const ActivationInfo& info, const ActivationParams& p) {
  return grid_over_columns(p.num_rows, p.width * info.input.bytes() / info.vector_bytes, info.vectors_per_thread,
                           info.launch.threads);
}

// activation(input, out, expert_ids, expert_step, enable_pdl). src/jitnorm/activation.py explains refused calls.
template <typename Kernel>
Outcome activation(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const ActivationInfo& info = kernel.info();
  const index_t element_bytes = info.input.bytes();
  if (num_args != 5) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *ids = nullptr;
  if (!input || !out || out->ndim == 0) return Outcome::kRefused;
  const index_t width = out->shape[out->ndim - 1], row_bytes = width * element_bytes;
  Rows input_rows, out_rows;
  index_t expert_step;
  bool enable_pdl;
  if (width < 1 || width > kMaxWidth || row_bytes % 4 != 0 || vector_bytes(row_bytes) != info.vector_bytes ||
      !as_rows(*input, info.input, 2 * width, info.alignment, &input_rows) ||
      !as_rows(*out, info.input, width, info.alignment, &out_rows) || !same_leading_shape(*input, *out) ||
      !same_device(*input, *out) || !kernel.runs_on(input->device) || !as_int(args[3], &expert_step) ||
      expert_step < 1 || !as_optional_bool(args[4], true, &enable_pdl))
    return Outcome::kRefused;
  if (args[2].type_index != kTVMFFINone && !(ids = as_indices(args[2], input->device))) return Outcome::kRefused;
  const index_t rows = input_rows.count;
  if (ids && ids->shape[0] < rows / expert_step + (rows % expert_step != 0)) return Outcome::kRefused;
  if (rows == 0) return Outcome::kDone;
  const Rows id_rows = ids ? index_rows(*ids) : Rows{};
  if (!rows_are_disjoint(out_rows, width) ||
      rows_overlap(input_rows, 2 * row_bytes, element_bytes, out_rows, row_bytes, element_bytes) ||
      (ids && extents_overlap(out_rows, id_rows)))
    return Outcome::kRefused;
  ActivationParams params{};
  params.input = input_rows.data;
  params.out = out_rows.data;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  params.num_rows = rows;
  params.width = static_cast<int>(width);
  params.has_int64_ids = ids && ids->dtype.bits == 64;
  params.expert_ids = id_rows.data;
  params.expert_step = expert_step;
  return kernel.launch(params, input->device, enable_pdl);
}

}  // namespace jitnorm
#endif
