// What a kernel's glue needs of tvm-ffi, on its C header alone: the C++ headers cost a second of every build.
//
// The glue decides and Python explains: an argument the kernel cannot take makes the call return 1, and the wrapper,
// which holds every message, says what was wrong. Only what Python cannot know (a failed launch) is raised from here.
#pragma once
#include <tvm/ffi/c_api.h>

#include "jitnorm/dtype.h"

#define JITNORM_PUBLIC __attribute__((visibility("default")))

// Exports FUNCTION, an `int(const TVMFFIAny* args, int num_args)`, under NAME.
#define JITNORM_EXPORT(NAME, ...)                                                                                   \
  extern "C" JITNORM_PUBLIC int __tvm_ffi_##NAME(void*, const TVMFFIAny* args, int32_t n_args, TVMFFIAny* result) { \
    jitnorm::Outcome outcome = __VA_ARGS__(args, n_args);                                                           \
    if (outcome == jitnorm::Outcome::kRaised) return -1;                                                            \
    result->type_index = kTVMFFIInt;                                                                                \
    result->v_int64 = static_cast<int64_t>(outcome);                                                                \
    return 0;                                                                                                       \
  }

// Exports one operator: NAME, and NAME_fast_path, which refuses every call while a mode of torch wants to see it.
#define JITNORM_OPERATOR(NAME, KERNEL)                                                                          \
  JITNORM_EXPORT(NAME, jitnorm::NAME<KERNEL>)                                                                   \
  JITNORM_EXPORT(watch_modes, jitnorm::watch_modes)                                                             \
  extern "C" JITNORM_PUBLIC int __tvm_ffi_##NAME##_fast_path(void* self, const TVMFFIAny* args, int32_t n_args, \
                                                             TVMFFIAny* result) {                               \
    if (!jitnorm::is_mode_active()) return __tvm_ffi_##NAME(self, args, n_args, result);                        \
    result->type_index = kTVMFFIInt;                                                                            \
    result->v_int64 = static_cast<int64_t>(jitnorm::Outcome::kRefused);                                         \
    return 0;                                                                                                   \
  }

namespace jitnorm {

enum class Outcome { kDone = 0, kRefused = 1, kRaised = -1 };

// A mode of torch (torch.jit.trace, make_fx, TorchDispatchMode) shows in the dispatch keys that its thread includes.
// torch's function that looks one up is found by jitnorm.core.torch_modes, which also knows the keys' numbers: linking to
// torch would bind a library to one version of it.
struct ModeKeys {
  bool (*is_included)(uint16_t key) = nullptr;
  uint16_t python, pre_dispatch, tracer;
};
inline ModeKeys mode_keys;

inline bool is_mode_active() {
  const ModeKeys& keys = mode_keys;
  return !keys.is_included || keys.is_included(keys.python) || keys.is_included(keys.pre_dispatch) ||
         keys.is_included(keys.tracer);
}

// watch_modes(is_included, python, pre_dispatch, tracer)
inline Outcome watch_modes(const TVMFFIAny* args, int num_args) {
  if (num_args != 4) return Outcome::kRefused;
  mode_keys = {reinterpret_cast<bool (*)(uint16_t)>(args[0].v_int64), static_cast<uint16_t>(args[1].v_int64),
               static_cast<uint16_t>(args[2].v_int64), static_cast<uint16_t>(args[3].v_int64)};
  return Outcome::kDone;
}

template <typename T>
struct DType;
template <>
struct DType<float> {
  static constexpr unsigned code = kDLFloat, bits = 32;
};
template <>
struct DType<fp16_t> {
  static constexpr unsigned code = kDLFloat, bits = 16;
};
template <>
struct DType<bf16_t> {
  static constexpr unsigned code = kDLBfloat, bits = 16;
};
template <>
struct DType<e4m3_t> {
  static constexpr unsigned code = kDLFloat8_e4m3fn, bits = 8;
};

template <typename T>
bool has_dtype(const DLTensor& tensor) {
  return tensor.dtype.code == DType<T>::code && tensor.dtype.bits == DType<T>::bits && tensor.dtype.lanes == 1;
}

inline bool same_device(const DLTensor& a, const DLTensor& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

inline bool same_shape(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; i++)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

inline index_t element_count(const DLTensor& tensor) {
  index_t count = 1;
  for (int i = 0; i < tensor.ndim; i++) count *= tensor.shape[i];
  return count;
}

inline const DLTensor* as_tensor(const TVMFFIAny& arg) {
  if (arg.type_index == kTVMFFITensor) return reinterpret_cast<const DLTensor*>(arg.v_obj + 1);
  if (arg.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(arg.v_ptr);
  return nullptr;
}

inline bool as_float(const TVMFFIAny& arg, double* value) {
  if (arg.type_index == kTVMFFIFloat) return *value = arg.v_float64, true;
  if (arg.type_index == kTVMFFIInt) return *value = static_cast<double>(arg.v_int64), true;
  return false;
}

inline bool as_int(const TVMFFIAny& arg, index_t* value) {
  if (arg.type_index == kTVMFFIInt) return *value = arg.v_int64, true;
  return false;
}

// None stands for `otherwise`.
inline bool as_optional_bool(const TVMFFIAny& arg, bool otherwise, bool* value) {
  if (arg.type_index == kTVMFFINone) return *value = otherwise, true;
  if (arg.type_index == kTVMFFIBool) return *value = arg.v_int64 != 0, true;
  return false;
}

// A tensor [..., hidden_size] seen as rows one stride apart. `end` is one past the last byte.
struct Rows {
  char* data;
  index_t count;
  index_t stride;  // in elements
  const char* end;
};

// False where `tensor` is no such thing: other sizes or dtype, elements not adjacent, leading dimensions that do not
// collapse to one stride, storage that is absent (a FakeTensor's) or not aligned to `alignment` bytes, in every row.
template <typename T>
bool as_rows(const DLTensor& tensor, index_t hidden_size, unsigned alignment, Rows* rows) {
  int last = tensor.ndim - 1;
  if (last < 0 || !has_dtype<T>(tensor) || tensor.shape[last] != hidden_size || tensor.strides[last] != 1) return false;
  index_t count = 1, stride = hidden_size;
  bool collapses = true;
  for (int i = last - 1; i >= 0; i--) {
    index_t size = tensor.shape[i];
    if (size == 1) continue;
    if (count == 1) stride = tensor.strides[i];
    else if (tensor.strides[i] != stride * count) collapses = false;
    count *= size;
  }
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  *rows = {data, count, stride, data + ((count - 1) * stride + hidden_size) * static_cast<index_t>(sizeof(T))};
  if (count == 0) return true;
  return collapses && tensor.data && reinterpret_cast<uintptr_t>(data) % alignment == 0 &&
         stride * sizeof(T) % alignment == 0;
}

// One factor for each element of a row.
template <typename Kernel>
bool as_weight(const DLTensor* tensor, Rows* rows) {
  using W = typename Kernel::weight_t;
  return tensor && tensor->ndim == 1 && as_rows<W>(*tensor, Kernel::kHiddenSize, Kernel::kAlignment, rows);
}

// A contiguous tensor of `count` elements, of any shape, seen as rows of one.
template <typename T>
bool as_elements(const DLTensor* tensor, index_t count, unsigned alignment, Rows* rows) {
  if (!tensor || !has_dtype<T>(*tensor) || element_count(*tensor) != count) return false;
  char* data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  *rows = {data, count, 1, data + count * static_cast<index_t>(sizeof(T))};
  if (count == 0) return true;
  index_t step = 1;
  for (int i = tensor->ndim - 1; i >= 0; i--) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != step) return false;
    step *= tensor->shape[i];
  }
  return tensor->data && reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

// Whether each row has memory of its own, as rows that are written need.
inline bool separate(const Rows& rows, index_t hidden_size) { return rows.count <= 1 || rows.stride >= hidden_size; }

inline bool extents_meet(const Rows& a, const Rows& b) {
  return a.count && b.count && a.data < b.end && b.data < a.end;
}

// Rows of `a_row` and `b_row` bytes that share memory. Exact where both have one stride (the column slices of one
// buffer lie between each other without touching); where the strides differ, overlapping extents count as shared.
inline bool overlap(const Rows& a, index_t a_row, const Rows& b, index_t b_row, index_t element_bytes) {
  if (!extents_meet(a, b)) return false;
  if (a.stride != b.stride) return true;
  const index_t stride = a.stride * element_bytes;
  index_t offset = (b.data - a.data) % stride;
  if (offset < 0) offset += stride;
  return offset < a_row || offset > stride - b_row;
}

template <typename T>
bool overlap(const Rows& a, const Rows& b, index_t hidden_size) {
  return overlap(a, hidden_size * sizeof(T), b, hidden_size * sizeof(T), sizeof(T));
}

inline bool same_leading_shape(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim - 1; i++)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

// The one-dimensional tensor of int32 or int64 that `arg` is; null where it is none, or on another device.
inline const DLTensor* as_indices(const TVMFFIAny& arg, DLDevice device) {
  const DLTensor* t = as_tensor(arg);
  const bool fits = t && t->ndim == 1 && t->dtype.code == kDLInt && t->dtype.lanes == 1 &&
                    (t->dtype.bits == 32 || t->dtype.bits == 64) && (t->shape[0] <= 1 || t->strides[0] == 1) &&
                    (t->shape[0] == 0 || t->data) && t->device.device_type == device.device_type &&
                    t->device.device_id == device.device_id &&
                    (reinterpret_cast<uintptr_t>(t->data) + t->byte_offset) % (t->dtype.bits / 8) == 0;
  return fits ? t : nullptr;
}

// Its elements as rows, of which overlaps are asked.
inline Rows as_vector(const DLTensor& tensor) {
  char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return {data, tensor.shape[0], 1, data + tensor.shape[0] * (tensor.dtype.bits / 8)};
}

// Of a row of so many bytes, which is a multiple of 4: what one access can move, wherever in it the access begins.
inline int vector_bytes(index_t row_bytes) { return row_bytes % 16 == 0 ? 16 : row_bytes % 8 == 0 ? 8 : 4; }

}  // namespace jitnorm
