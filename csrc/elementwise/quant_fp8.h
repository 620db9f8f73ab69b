// Quantisation to e4m3: the parameter struct of its kernel classes and, for the host compiler, the bindings that fill
// it in. Included by quant_fp8.cuh and quant_fp8_cpu.h.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// A dynamic scale of a tensor takes two kernels, and no memory that must be zeroed beforehand. Each block of the first
// writes the amax (largest magnitude) of its part of the tensor; each block of the second reduces these to the tensor's
// amax.
enum class Pass { kStatic, kPartialAmax, kDynamic };

constexpr int kMaxPartialAmax = 512;     // two for each thread of a block of the second kernel
constexpr int kHiddenSizeMultiple = 16;  // of rows with a scale each, as float8 GEMMs require

struct QuantFp8Params {
  const void* input;
  void* out;
  float* scale;          // one for the tensor, read or written; or one per row, written
  float* partial_amax;   // null for a static scale and for a scale per row
  index_t num_rows;      // for one scale per tensor: its tiles or parts
  index_t num_elements;  // of the tensor, or of a row
  index_t input_stride;  // from row to row, like out_stride
  index_t out_stride;
  int num_partial_amax;
};

struct QuantFp8Info {
  LaunchInfo launch;
  ElementType input;
  unsigned alignment;
  Pass pass;     // of one scale per tensor
  index_t tile;  // the elements of a block, or on the CPU of a task; 0 for one scale per row

  template <typename Kernel>
  static constexpr QuantFp8Info of() {
    QuantFp8Info info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.pass = Kernel::kPass;
    info.tile = Kernel::kTile;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const QuantFp8Info& info, const QuantFp8Params& params) {
  return grid_of_blocks(params.num_rows, 1, info.launch.threads);
}

// At least 1, since an empty tensor has a dynamic scale too.
inline index_t tile_count(index_t elements, index_t tile) { return elements == 0 ? 1 : (elements + tile - 1) / tile; }

inline index_t partial_amax_count(index_t elements) {
  constexpr index_t kPartElements = 4096;  // of small tensors; larger ones have larger parts
  const index_t parts = tile_count(elements, kPartElements);
  return parts < kMaxPartialAmax ? parts : kMaxPartialAmax;
}

// per_tensor_quant_fp8(input, output_q, output_s, partial_amax), the same for each pass; partial_amax is None for a
// static scale. src/jitnorm/quant_fp8.py explains refused calls.
template <typename Kernel>
Outcome per_tensor_quant_fp8(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const QuantFp8Info& info = kernel.info();
  const bool is_dynamic = info.pass != Pass::kStatic;
  if (num_args != 4) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  Rows input_elements, out_elements, scale_element, partial_amax{};
  if (!input || !out || !same_shape(*input, *out) ||
      !as_elements(input, info.input, element_count(*input), info.alignment, &input_elements) ||
      !as_elements(out, kElementType<e4m3_t>, input_elements.count, info.alignment, &out_elements) ||
      !as_elements(scale, kElementType<float>, 1, alignof(float), &scale_element) || !same_device(*input, *out) ||
      !same_device(*input, *scale) || !kernel.runs_on(input->device))
    return Outcome::kRefused;
  if (extents_overlap(out_elements, input_elements) || extents_overlap(out_elements, scale_element) ||
      (is_dynamic && extents_overlap(scale_element, input_elements)))
    return Outcome::kRefused;
  if (is_dynamic &&
      !as_elements(as_tensor(args[3]), kElementType<float>, kMaxPartialAmax, alignof(float), &partial_amax))
    return Outcome::kRefused;
  const index_t elements = input_elements.count;
  if (!is_dynamic && elements == 0) return Outcome::kDone;
  QuantFp8Params params{};
  params.input = input_elements.data;
  params.out = out_elements.data;
  params.scale = reinterpret_cast<float*>(scale_element.data);
  params.partial_amax = reinterpret_cast<float*>(partial_amax.data);
  params.num_elements = elements;
  params.num_partial_amax = static_cast<int>(partial_amax_count(elements));
  params.num_rows = info.pass == Pass::kPartialAmax ? params.num_partial_amax : tile_count(elements, info.tile);
  return kernel.launch(params, input->device, true);
}

// per_token_quant_fp8(input, output_q, output_s): likewise.
template <typename Kernel>
Outcome per_token_quant_fp8(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const QuantFp8Info& info = kernel.info();
  if (num_args != 3) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  if (!input || !out || input->ndim == 0 || !same_shape(*input, *out)) return Outcome::kRefused;
  const index_t hidden_size = input->shape[input->ndim - 1];
  Rows input_rows, out_rows, scales;
  if (hidden_size < 1 || hidden_size % kHiddenSizeMultiple != 0 ||
      !as_rows(*input, info.input, hidden_size, info.alignment, &input_rows) ||
      !as_rows(*out, kElementType<e4m3_t>, hidden_size, info.alignment, &out_rows) ||
      !as_elements(scale, kElementType<float>, input_rows.count, alignof(float), &scales) ||
      !same_device(*input, *out) || !same_device(*input, *scale) || !kernel.runs_on(input->device))
    return Outcome::kRefused;
  if (input_rows.count == 0) return Outcome::kDone;
  if (!rows_are_disjoint(out_rows, hidden_size) || extents_overlap(out_rows, input_rows) ||
      extents_overlap(out_rows, scales) || extents_overlap(scales, input_rows))
    return Outcome::kRefused;
  QuantFp8Params params{};
  params.input = input_rows.data;
  params.out = out_rows.data;
  params.scale = reinterpret_cast<float*>(scales.data);
  params.num_rows = input_rows.count;
  params.num_elements = hidden_size;
  params.input_stride = input_rows.stride;
  params.out_stride = out_rows.stride;
  return kernel.launch(params, input->device, true);
}

}  // namespace jitnorm
#endif
