// Rows of keys and values scattered into their caches: the parameter struct of the kernel classes and, for the host
// compiler, the bindings function that fills it in. Included by store_cache.cuh and store_cache_cpu.h. Rows are bytes,
// of any dtype.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

struct StoreCacheParams {
  const char* k;
  const char* v;
  char* k_cache;
  char* v_cache;
  const void* indices;
  index_t k_stride;  // in bytes, like the other strides
  index_t v_stride;
  index_t k_cache_stride;
  index_t v_cache_stride;
  index_t num_rows;
  index_t skip_index;  // rows with this index are not written
  int k_vectors;       // per row
  int v_vectors;
  int num_split;           // warps per row; 0 to choose by the row's width
  bool has_int64_indices;  // otherwise int32
};

struct StoreCacheInfo {
  LaunchInfo launch;
  unsigned alignment;
  int vector_bytes;        // of an access
  int vectors_per_thread;  // of k, and as many of v

  template <typename Kernel>
  static constexpr StoreCacheInfo of() {
    StoreCacheInfo info{};
    info.launch = launch_info<Kernel>();
    info.alignment = Kernel::kAlignment;
    info.vector_bytes = Kernel::kVectorBytes;
    info.vectors_per_thread = Kernel::kVectorsPerThread;
    return info;
  }
};

JITNORM_HOST_DEVICE index_t index_of(const StoreCacheParams& p, index_t row) {
  return p.has_int64_indices ? static_cast<const index_t*>(p.indices)[row] : static_cast<const int*>(p.indices)[row];
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const StoreCacheInfo& info, const StoreCacheParams& p) {
  const int vectors = p.k_vectors > p.v_vectors ? p.k_vectors : p.v_vectors;
  if (p.num_split == 0) return grid_over_columns(p.num_rows, vectors, info.vectors_per_thread, info.launch.threads);
  const unsigned threads_x = 32 * p.num_split;
  return grid_over_columns(p.num_rows, vectors, info.vectors_per_thread, threads_x, info.launch.threads / threads_x);
}

constexpr index_t kMaxRowBytes = 1 << 30;                  // 32 bits count the bytes of a row of k and one of v
constexpr index_t kNoSkipIndex = -0x7fffffffffffffff - 1;  // the smallest index_t, which is never a valid slot

inline bool same_dtype(const DLTensor& a, const DLTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.dtype.lanes == b.dtype.lanes;
}

// A tensor [rows, ...] as rows of bytes. False if bytes are not adjacent within a row, the stride from row to row is
// negative, there is no storage, or a row is not aligned to `alignment` bytes.
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
  char* data = data_of(tensor);
  rows->data = data;
  rows->count = count;
  rows->stride = stride;
  rows->end = data + (count - 1) * stride + bytes;
  *row_bytes = bytes;
  if (count == 0) return true;
  return tensor.data && stride >= 0 && is_aligned(data, alignment) && is_aligned(stride, alignment);
}

// store_cache(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index). src/jitnorm/store_cache.py explains
// refused calls.
template <typename Kernel>
Outcome store_cache(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const StoreCacheInfo& info = kernel.info();
  if (num_args != 8) return Outcome::kRefused;
  const DLTensor* tensors[4];
  Rows rows[4];  // like `tensors` and `widths`, of k, v, k_cache and v_cache
  index_t widths[4], row_bytes, num_split, skip_index = kNoSkipIndex;
  for (int i = 0; i < 4; i++) {
    tensors[i] = as_tensor(args[i]);
    if (!tensors[i] || !as_byte_rows(*tensors[i], info.alignment, &rows[i], &widths[i]) ||
        !same_dtype(*tensors[i], *tensors[0]) || !same_device(*tensors[i], *tensors[0]))
      return Outcome::kRefused;
  }
  const DLDevice device = tensors[0]->device;
  const auto& [k, v, k_cache, v_cache] = rows;
  const index_t k_bytes = widths[0], v_bytes = widths[1];
  const index_t bits = k_bytes | v_bytes;  // a multiple of 4, 8 or 16 exactly if both are
  const DLTensor* indices = as_indices(args[4], device);
  if (!indices || indices->shape[0] != k.count || v.count != k.count || v_cache.count != k_cache.count ||
      widths[2] != k_bytes || widths[3] != v_bytes || k_bytes == 0 || v_bytes == 0 || bits % 4 != 0 ||
      k_bytes > kMaxRowBytes || v_bytes > kMaxRowBytes || vector_bytes(bits) != info.vector_bytes ||
      !as_int(args[5], &row_bytes) || (row_bytes != 0 && row_bytes != k_bytes) || !as_int(args[6], &num_split) ||
      (num_split != 0 && num_split != 1 && num_split != 2 && num_split != 4) ||
      (args[7].type_index != kTVMFFINone && !as_int(args[7], &skip_index)) || !kernel.runs_on(device))
    return Outcome::kRefused;
  if (k.count == 0) return Outcome::kDone;
  const Rows index_elements = index_rows(*indices);
  for (int cache = 2; cache < 4; cache++) {
    const Rows& written = rows[cache];
    if (written.count == 0 || !rows_are_disjoint(written, widths[cache]) || extents_overlap(written, index_elements))
      return Outcome::kRefused;
    for (int other = 0; other < cache; other++)
      if (rows_overlap(rows[other], widths[other], 1, written, widths[cache], 1)) return Outcome::kRefused;
  }
  StoreCacheParams params{};
  params.k = k.data;
  params.v = v.data;
  params.k_cache = k_cache.data;
  params.v_cache = v_cache.data;
  params.indices = index_elements.data;
  params.k_stride = k.stride;
  params.v_stride = v.stride;
  params.k_cache_stride = k_cache.stride;
  params.v_cache_stride = v_cache.stride;
  params.num_rows = k.count;
  params.skip_index = skip_index;
  params.k_vectors = static_cast<int>(k_bytes / info.vector_bytes);
  params.v_vectors = static_cast<int>(v_bytes / info.vector_bytes);
  params.num_split = static_cast<int>(num_split);
  params.has_int64_indices = indices->dtype.bits == 64;
  return kernel.launch(params, device, true);
}

}  // namespace jitnorm
#endif
