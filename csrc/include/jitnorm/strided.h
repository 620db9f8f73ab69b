// Heads in memory: tensors whose rows lie under up to three leading dimensions, each with a stride of its own, as the
// heads of a fused projection and of a paged cache do. Host compiler only. The same rules in Python are those of
// src/jitnorm/core/checks.py, and for as_merged_rows those of merge() in src/jitnorm/general_rmsnorm.py.
#pragma once
#include "jitnorm/ffi.h"

namespace jitnorm {

// Strides are in bytes. That of a dimension of one element is arbitrary, and set to 0 here.
struct StridedRows {
  char* data = nullptr;
  index_t counts[kMaxLeadingDims] = {1, 1, 1};
  index_t strides[kMaxLeadingDims] = {};
  index_t row_bytes = 0;      // 0 for an argument that is None
  const char* end = nullptr;  // one past the last byte
  bool is_empty = true;

  bool is_given() const { return row_bytes != 0; }

  // The bytes from the first to the end of the last row of the dimensions from `dim` on.
  index_t extent(int dim = 0) const {
    index_t bytes = row_bytes;
    for (int i = dim; i < kMaxLeadingDims; i++) bytes += (counts[i] - 1) * strides[i];
    return bytes;
  }
};

// [tokens, heads, head_dim], whose middle dimension becomes one of one element, or [blocks, block_size, heads,
// head_dim]. False if `tensor` has another rank, type or head_dim, elements that are not adjacent within a row,
// negative strides, no storage, or rows that are not aligned to `alignment` bytes.
inline bool as_strided_rows(const DLTensor* tensor, ElementType type, index_t head_dim, unsigned alignment,
                            StridedRows* rows) {
  if (!tensor || (tensor->ndim != 3 && tensor->ndim != 4) || !has_type(*tensor, type)) return false;
  const int last = tensor->ndim - 1;
  if (tensor->shape[last] != head_dim || tensor->strides[last] != 1) return false;
  const int dims[kMaxLeadingDims] = {0, last == 3 ? 1 : -1, last - 1};
  rows->data = data_of(*tensor);
  rows->row_bytes = head_dim * type.bytes();
  rows->is_empty = false;
  bool is_accepted = true;
  for (int i = 0; i < kMaxLeadingDims; i++) {
    const index_t count = dims[i] < 0 ? 1 : tensor->shape[dims[i]];
    const index_t stride = count > 1 ? tensor->strides[dims[i]] * type.bytes() : 0;
    rows->counts[i] = count;
    rows->strides[i] = stride;
    if (count == 0) rows->is_empty = true;
    if (stride < 0 || !is_aligned(stride, alignment)) is_accepted = false;
  }
  rows->end = rows->data + rows->extent();
  if (rows->is_empty) return true;
  return is_accepted && tensor->data && is_aligned(rows->data, alignment);
}

// An argument of as_merged_rows.
struct RowsArgument {
  const DLTensor* tensor;
  ElementType type;
  unsigned alignment;
  StridedRows* rows;
};

// Tensors of one shape, [..., hidden_size], of any rank, as rows under the same leading dimensions: neighbouring
// dimensions are merged where the strides of all tensors allow it. A tensor with fewer dimensions than the first, such
// as a weight, is broadcast along those that it lacks. False if more than kMaxLeadingDims are left, and for tensors
// that as_strided_rows refuses.
inline bool as_merged_rows(const RowsArgument* arguments, int count, index_t hidden_size) {
  const DLTensor& shape = *arguments[0].tensor;
  const int last = shape.ndim - 1;
  const bool is_empty = element_count(shape) == 0;  // then strides do not matter
  for (int i = 0; i < count; i++) {
    const DLTensor& tensor = *arguments[i].tensor;
    StridedRows& rows = *arguments[i].rows;
    if (tensor.ndim < 1 || tensor.ndim > shape.ndim || !has_type(tensor, arguments[i].type)) return false;
    for (int dim = 0; dim < tensor.ndim; dim++)
      if (tensor.shape[tensor.ndim - 1 - dim] != shape.shape[last - dim]) return false;
    if (shape.shape[last] != hidden_size) return false;
    if (!is_empty && hidden_size > 1 && tensor.strides[tensor.ndim - 1] != 1) return false;
    rows = StridedRows{};
    rows.data = data_of(tensor);
    rows.row_bytes = hidden_size * arguments[i].type.bytes();
    rows.is_empty = is_empty;
  }
  if (is_empty) return true;
  auto stride_of = [&](const RowsArgument& argument, int dim) {
    const DLTensor& tensor = *argument.tensor;
    const int own = dim - (shape.ndim - tensor.ndim);
    return own < 0 ? 0 : tensor.strides[own] * argument.type.bytes();
  };
  int level = kMaxLeadingDims;  // the outermost dimension so far
  for (int dim = last - 1; dim >= 0; dim--) {
    const index_t size = shape.shape[dim];
    if (size == 1) continue;
    bool merges = level < kMaxLeadingDims;
    for (int i = 0; i < count && merges; i++) {
      const StridedRows& rows = *arguments[i].rows;
      merges = stride_of(arguments[i], dim) == rows.strides[level] * rows.counts[level];
    }
    if (!merges && --level < 0) return false;
    for (int i = 0; i < count; i++) {
      StridedRows& rows = *arguments[i].rows;
      if (!merges) rows.strides[level] = stride_of(arguments[i], dim);
      rows.counts[level] = merges ? rows.counts[level] * size : size;
    }
  }
  for (int i = 0; i < count; i++) {
    StridedRows& rows = *arguments[i].rows;
    rows.end = rows.data + rows.extent();
    if (!arguments[i].tensor->data || !is_aligned(rows.data, arguments[i].alignment)) return false;
    for (int dim = 0; dim < kMaxLeadingDims; dim++)
      if (rows.strides[dim] < 0 || !is_aligned(rows.strides[dim], arguments[i].alignment)) return false;
  }
  return true;
}

// A tensor whose last dimension is made of groups of adjacent elements: [..., groups, size] instead of
// [..., groups * size], without the dimension where there is one group.
struct GroupedTensor {
  static constexpr int kMaxDims = 64;  // torch's
  DLTensor tensor;

  // False if the last dimension of `whole` does not divide into groups, or its elements are not adjacent.
  bool set(const DLTensor& whole, index_t size) {
    tensor = whole;
    const int last = whole.ndim - 1;
    if (last < 0 || last >= kMaxDims || whole.shape[last] < 1 || whole.shape[last] % size) return false;
    if (whole.shape[last] == size) return true;
    if (element_count(whole) != 0 && whole.strides[last] != 1) return false;
    for (int i = 0; i < last; i++) shape_[i] = whole.shape[i], strides_[i] = whole.strides[i];
    shape_[last] = whole.shape[last] / size, strides_[last] = size;
    shape_[last + 1] = size, strides_[last + 1] = 1;
    tensor.ndim++;
    tensor.shape = shape_;
    tensor.strides = strides_;
    return true;
  }

 private:
  int64_t shape_[kMaxDims + 1], strides_[kMaxDims + 1];
};

// One row: a tensor that is read whole, such as a weight.
inline StridedRows as_one_row(const DLTensor& tensor) {
  StridedRows rows;
  index_t elements = 1;
  for (int i = 0; i < tensor.ndim; i++) {
    if (tensor.shape[i] == 0) return rows;
    elements += (tensor.shape[i] - 1) * tensor.strides[i];
  }
  rows.data = data_of(tensor);
  rows.row_bytes = elements * tensor.dtype.bits / 8;
  rows.end = rows.data + rows.row_bytes;
  rows.is_empty = false;
  return rows;
}

// The leading dimensions in the order of their strides, the largest first. Where only one of two tensors has more than
// one element in a dimension, its stride counts.
struct DimsByStride {
  int dims[kMaxLeadingDims] = {0, 1, 2};

  explicit DimsByStride(const index_t (&strides)[kMaxLeadingDims]) {
    for (int i = 1; i < kMaxLeadingDims; i++)
      for (int j = i; j > 0 && strides[dims[j]] > strides[dims[j - 1]]; j--) {
        const int swapped = dims[j];
        dims[j] = dims[j - 1];
        dims[j - 1] = swapped;
      }
  }
};

// Whether no two rows share memory, as is required of rows that are written: each stride passes all that lies under it.
inline bool rows_are_disjoint(const StridedRows& rows) {
  const DimsByStride order(rows.strides);
  index_t extent = rows.row_bytes;
  for (int i = kMaxLeadingDims - 1; i >= 0; i--) {
    const int dim = order.dims[i];
    if (rows.counts[dim] <= 1) continue;
    if (rows.strides[dim] < extent) return false;
    extent += (rows.counts[dim] - 1) * rows.strides[dim];
  }
  return true;
}

// Whether a row of `a` shares memory with a row of `b`. Exact for equal strides, as of slices of one projection or of
// one cache. For different strides, for rows that overlap each other, and where rows of one lie between those of the
// other in more places than kMaxSteps, overlapping extents count as shared.
inline bool share_memory(const StridedRows& a, const StridedRows& b) {
  if (a.is_empty || b.is_empty || a.end <= b.data || b.end <= a.data) return false;
  if (!rows_are_disjoint(a) || !rows_are_disjoint(b)) return true;
  index_t strides[kMaxLeadingDims];
  for (int i = 0; i < kMaxLeadingDims; i++) {
    if (a.counts[i] > 1 && b.counts[i] > 1 && a.strides[i] != b.strides[i]) return true;
    strides[i] = a.counts[i] > 1 ? a.strides[i] : b.strides[i];
  }
  const DimsByStride order(strides);
  // `distance` is that from a row of a to one of b, `below_a` and `below_b` the extents of the dimensions that follow.
  // A step is a difference of indices. Those that bring two rows near enough are few where strides are nested, as in
  // each tensor alone; in the two together they may not be, where only one has the dimension.
  constexpr index_t kMaxSteps = 4;
  struct Search {
    const StridedRows &a, &b;
    const index_t* strides;
    const int* dims;

    bool finds(index_t distance, int level) const {
      if (level == kMaxLeadingDims) return distance < a.row_bytes && -distance < b.row_bytes;
      const int dim = dims[level];
      const index_t stride = strides[dim], min = 1 - b.counts[dim], max = a.counts[dim] - 1;
      if (stride == 0) return min < max || finds(distance, level + 1);
      index_t below_a = a.row_bytes, below_b = b.row_bytes;
      for (int i = level + 1; i < kMaxLeadingDims; i++) {
        below_a += (a.counts[dims[i]] - 1) * strides[dims[i]];
        below_b += (b.counts[dims[i]] - 1) * strides[dims[i]];
      }
      index_t first = rounded_down(distance - below_a, stride) + 1;
      index_t last = -rounded_down(-(distance + below_b), stride) - 1;
      if (first < min) first = min;
      if (last > max) last = max;
      if (last - first >= kMaxSteps) return true;
      for (index_t step = first; step <= last; step++)
        if (finds(distance - step * stride, level + 1)) return true;
      return false;
    }

    static index_t rounded_down(index_t dividend, index_t divisor) {
      return dividend >= 0 ? dividend / divisor : -((divisor - 1 - dividend) / divisor);
    }
  };
  return Search{a, b, strides, order.dims}.finds(b.data - a.data, 0);
}

// Whether two tensors are the same rows of the same memory, so that each row of one may be written after the same row
// of the other has been read.
inline bool are_same_rows(const StridedRows& a, const StridedRows& b) {
  if (a.data != b.data || a.row_bytes != b.row_bytes) return false;
  for (int i = 0; i < kMaxLeadingDims; i++)
    if (a.counts[i] != b.counts[i] || a.strides[i] != b.strides[i]) return false;
  return true;
}

}  // namespace jitnorm
