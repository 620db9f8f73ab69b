// Tensors of integers and masks: the indices, lengths and tables of an engine's batches. Host compiler only.
#pragma once
#include "jitnorm/ffi.h"

namespace jitnorm {

// Whether a tensor on `device` has `dims` dimensions, elements of `bytes` bytes, and those of its last dimension are
// adjacent.
inline bool has_adjacent_elements(const DLTensor& tensor, int bytes, int dims, DLDevice device) {
  if (tensor.ndim != dims || tensor.dtype.bits != 8 * bytes || tensor.dtype.lanes != 1 ||
      tensor.device.device_type != device.device_type || tensor.device.device_id != device.device_id)
    return false;
  if (element_count(tensor) == 0) return true;
  return tensor.data && is_aligned(data_of(tensor), bytes) &&
         (tensor.shape[dims - 1] == 1 || tensor.strides[dims - 1] == 1);
}

// Whether it is a tensor of integers of 32 or 64 bits.
inline bool is_integers(const DLTensor* tensor, int bits, int dims, DLDevice device) {
  return tensor && (tensor->dtype.code == kDLInt || tensor->dtype.code == kDLUInt) &&
         has_adjacent_elements(*tensor, bits / 8, dims, device);
}

// Whether it is a matrix of bools.
inline bool is_mask(const DLTensor* tensor, DLDevice device) {
  return tensor && tensor->dtype.code == kDLBool && has_adjacent_elements(*tensor, 1, 2, device);
}

// From row to row of two dimensions, in elements.
inline index_t row_stride(const DLTensor& tensor) { return tensor.shape[0] > 1 ? tensor.strides[0] : 0; }

template <typename T>
T* elements_of(const DLTensor& tensor) {
  return reinterpret_cast<T*>(data_of(tensor));
}

}  // namespace jitnorm
