// Tensors of integers: the indices, lengths and tables of an engine's batches. Host compiler only.
#pragma once
#include "jitnorm/ffi.h"

namespace jitnorm {

// Whether a tensor has `dims` dimensions, of integers of 32 or 64 bits on `device`, and the elements of its last
// dimension are adjacent.
inline bool is_integers(const DLTensor* tensor, int bits, int dims, DLDevice device) {
  if (!tensor || tensor->ndim != dims || (tensor->dtype.code != kDLInt && tensor->dtype.code != kDLUInt) ||
      tensor->dtype.bits != bits || tensor->dtype.lanes != 1 || tensor->device.device_type != device.device_type ||
      tensor->device.device_id != device.device_id)
    return false;
  if (element_count(*tensor) == 0) return true;
  return tensor->data && is_aligned(data_of(*tensor), bits / 8) &&
         (tensor->shape[dims - 1] == 1 || tensor->strides[dims - 1] == 1);
}

// From row to row of two dimensions, in elements.
inline index_t row_stride(const DLTensor& tensor) { return tensor.shape[0] > 1 ? tensor.strides[0] : 0; }

template <typename T>
T* elements_of(const DLTensor& tensor) {
  return reinterpret_cast<T*>(data_of(tensor));
}

}  // namespace jitnorm
