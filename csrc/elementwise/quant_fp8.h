// Quantisation to e4m3 numbers: the parameters that every kernel class takes and, for the host compiler, the glue that
// fills them in. What launch.h and parallel.h call tokens are the tiles of a tensor, parts of it, or its rows.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// A scale for a whole tensor takes two kernels, and nothing that is zeroed beforehand: each block of the first writes
// the largest magnitude of its part of the tensor, and each block of the second finds the largest of these.
constexpr int kMostMaxima = 512;
constexpr int kMultiple = 16;  // of elements in a row that gets a scale: what a product of such matrices asks for

struct QuantFp8Params {
  const void* input;
  void* out;
  float* scale;  // one for the tensor, read or written; or one to write for each row
  float* maxima;
  index_t num_tokens;
  index_t num_elements;  // of the tensor, or of a row
  index_t input_stride;  // from row to row, like out_stride
  index_t out_stride;
  int num_maxima;
};

enum class Pass { kScaleGiven, kFindMaxima, kScaleFound };

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

inline index_t tiles(index_t elements, index_t tile) { return elements == 0 ? 1 : (elements + tile - 1) / tile; }

inline index_t maxima_count(index_t elements) {
  const index_t parts = tiles(elements, 4096);
  return parts < kMostMaxima ? parts : kMostMaxima;
}

// per_tensor_quant_fp8(input, output_q, output_s, maxima), the same for each pass; None for maxima where the scale is
// given. jitnorm.per_tensor_quant_fp8's _check says in words what is refused here.
template <typename Kernel>
Outcome per_tensor_quant_fp8(const TVMFFIAny* args, int num_args) {
  constexpr bool found = Kernel::kPass != Pass::kScaleGiven;
  if (num_args != 4) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *scale = as_tensor(args[2]);
  Rows in, to, by, maxima{};
  if (!input || !out || !same_shape(*input, *out) ||
      !as_elements<typename Kernel::input_t>(input, element_count(*input), Kernel::kAlignment, &in) ||
      !as_elements<e4m3_t>(out, in.count, Kernel::kAlignment, &to) ||
      !as_elements<float>(scale, 1, alignof(float), &by) || !same_device(*input, *out) ||
      !same_device(*input, *scale) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  if (extents_meet(to, in) || extents_meet(to, by) || (found && extents_meet(by, in))) return Outcome::kRefused;
  if (found && !as_elements<float>(as_tensor(args[3]), kMostMaxima, alignof(float), &maxima)) return Outcome::kRefused;
  if (!found && in.count == 0) return Outcome::kDone;
  QuantFp8Params params{};
  params.input = in.data;
  params.out = to.data;
  params.scale = reinterpret_cast<float*>(by.data);
  params.maxima = reinterpret_cast<float*>(maxima.data);
  params.num_elements = in.count;
  params.num_maxima = static_cast<int>(maxima_count(in.count));
  params.num_tokens = Kernel::kPass == Pass::kFindMaxima ? params.num_maxima : tiles(in.count, Kernel::kTile);
  return launch(Kernel{}, params, input->device, true);
}

// per_token_quant_fp8(input, output_q, output_s): jitnorm.per_token_quant_fp8's _check says what is refused here.
template <typename Kernel>
Outcome per_token_quant_fp8(const TVMFFIAny* args, int num_args) {
  if (num_args != 3) return Outcome::kRefused;
  const DLTensor *input = as_tensor(args[0]), *out = as_tensor(args[1]), *scales = as_tensor(args[2]);
  if (!input || !out || input->ndim == 0 || !same_shape(*input, *out)) return Outcome::kRefused;
  const index_t hidden_size = input->shape[input->ndim - 1];
  Rows in, to, by;
  if (hidden_size < 1 || hidden_size % kMultiple != 0 ||
      !as_rows<typename Kernel::input_t>(*input, hidden_size, Kernel::kAlignment, &in) ||
      !as_rows<e4m3_t>(*out, hidden_size, Kernel::kAlignment, &to) ||
      !as_elements<float>(scales, in.count, alignof(float), &by) || !same_device(*input, *out) ||
      !same_device(*input, *scales) || !runs_on(Kernel{}, input->device))
    return Outcome::kRefused;
  if (in.count == 0) return Outcome::kDone;
  if (!separate(to, hidden_size) || extents_meet(to, in) || extents_meet(to, by) || extents_meet(by, in))
    return Outcome::kRefused;
  QuantFp8Params params{};
  params.input = in.data;
  params.out = to.data;
  params.scale = reinterpret_cast<float*>(by.data);
  params.num_tokens = in.count;
  params.num_elements = hidden_size;
  params.input_stride = in.stride;
  params.out_stride = to.stride;
  return launch(Kernel{}, params, input->device, true);
}

}  // namespace jitnorm
#endif
