// Rows of keys and values scattered into their caches: the parameters that every kernel class takes and, for the host
// compiler, the glue that fills them in. Bytes are moved, of whatever type they are.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

struct StoreCacheParams {
  const char* k;
  const char* v;
  char* k_cache;
  char* v_cache;
  const void* indices;
  index_t k_stride;  // in bytes, like all that is not a number of vectors
  index_t v_stride;
  index_t k_cache_stride;
  index_t v_cache_stride;
  index_t num_tokens;
  index_t skip_index;  // rows of this index are not written
  int k_vectors;       // in a row
  int v_vectors;
  int num_split;      // warps of a block for each row; 0 for as many as suit its width
  bool wide_indices;  // int64 rather than int32
};

JITNORM_ANYWHERE index_t index_of(const StoreCacheParams& p, index_t token) {
  return p.wide_indices ? static_cast<const index_t*>(p.indices)[token] : static_cast<const int*>(p.indices)[token];
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

constexpr index_t kMostRowBytes = 1 << 30;
constexpr index_t kNoIndex = -0x7fffffffffffffff - 1;  // stands for no skip_index

inline bool same_dtype(const DLTensor& a, const DLTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.dtype.lanes == b.dtype.lanes;
}

// A tensor [rows, ...] as rows of bytes: adjacent within a row, any stride but a negative one from row to row, aligned.
inline bool as_byte_rows(const DLTensor& tensor, unsigned alignment, Rows* rows, index_t* row_bytes) {
  if (tensor.ndim < 2) return false;
  const index_t element_bytes = tensor.dtype.bits * tensor.dtype.lanes / 8;
  index_t elements = 1;
  for (int i = tensor.ndim - 1; i > 0; i--) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != elements) return false;
    elements *= tensor.shape[i];
  }
  const index_t count = tensor.shape[0], bytes = elements * element_bytes;
  const index_t stride = count > 1 ? tensor.strides[0] * element_bytes : bytes;
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  *rows = {data, count, stride, data + (count - 1) * stride + bytes};
  *row_bytes = bytes;
  if (count == 0) return true;
  return tensor.data && stride >= 0 && reinterpret_cast<uintptr_t>(data) % alignment == 0 && stride % alignment == 0;
}

// store_cache(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index):
// jitnorm.store_cache_ops.check says in words what is refused here.
template <typename Kernel>
Outcome store_cache(const TVMFFIAny* args, int num_args) {
  if (num_args != 8) return Outcome::kRefused;
  const DLTensor* tensors[4];
  Rows rows[4];
  index_t widths[4], row_bytes, num_split, skip_index = kNoIndex;
  for (int i = 0; i < 4; i++) {
    tensors[i] = as_tensor(args[i]);
    if (!tensors[i] || !as_byte_rows(*tensors[i], Kernel::kAlignment, &rows[i], &widths[i]) ||
        !same_dtype(*tensors[i], *tensors[0]) || !same_device(*tensors[i], *tensors[0]))
      return Outcome::kRefused;
  }
  const DLDevice device = tensors[0]->device;
  const auto& [k, v, k_cache, v_cache] = rows;
  const index_t k_bytes = widths[0], v_bytes = widths[1], both = k_bytes | v_bytes;
  const DLTensor* indices = as_indices(args[4], device);
  if (!indices || indices->shape[0] != k.count || v.count != k.count || v_cache.count != k_cache.count ||
      widths[2] != k_bytes || widths[3] != v_bytes || k_bytes == 0 || v_bytes == 0 || both % 4 != 0 ||
      k_bytes > kMostRowBytes || v_bytes > kMostRowBytes || vector_bytes(both) != Kernel::kVectorBytes ||
      !as_int(args[5], &row_bytes) || (row_bytes != 0 && row_bytes != k_bytes) || !as_int(args[6], &num_split) ||
      (num_split != 0 && num_split != 1 && num_split != 2 && num_split != 4) ||
      (args[7].type_index != kTVMFFINone && !as_int(args[7], &skip_index)) || !runs_on(Kernel{}, device))
    return Outcome::kRefused;
  if (k.count == 0) return Outcome::kDone;
  const Rows index_rows = as_vector(*indices);
  for (int cache = 2; cache < 4; cache++) {
    const Rows& to = rows[cache];
    if (to.count == 0 || !separate(to, widths[cache]) || extents_meet(to, index_rows)) return Outcome::kRefused;
    for (int other = 0; other < cache; other++)
      if (overlap(rows[other], widths[other], to, widths[cache], 1)) return Outcome::kRefused;
  }
  StoreCacheParams params{k.data,
                          v.data,
                          k_cache.data,
                          v_cache.data,
                          index_rows.data,
                          k.stride,
                          v.stride,
                          k_cache.stride,
                          v_cache.stride,
                          k.count,
                          skip_index,
                          static_cast<int>(k_bytes / Kernel::kVectorBytes),
                          static_cast<int>(v_bytes / Kernel::kVectorBytes),
                          static_cast<int>(num_split),
                          indices->dtype.bits == 64};
  return launch(Kernel{}, params, device, true);
}

}  // namespace jitnorm
#endif
