// What bindings functions need: they check the arguments of a tvm-ffi call and turn them into a kernel's parameter
// struct. Host compiler only; included by the bindings of every family (elementwise/<family>.h). It uses only tvm-ffi's
// C header, because the C++ headers would add a second to every build.
//
// A bindings function is a template over Kernel, which has info(), a struct such as RMSNormInfo, runs_on(device) and
// launch(params, device, enable_pdl). It is CpuKernel (parallel.h) or CudaKernel (launcher/launcher.cc).
//
// Bindings refuse, Python explains: a bindings function returns 1 (Outcome::kRefused) for arguments that the kernel
// does not support, and Python then raises an error that says what is wrong. Bindings raise only what Python cannot
// know, such as a failed launch.
#pragma once
#include <tvm/ffi/c_api.h>

#include "jitnorm/kernel_info.h"

#define JITNORM_PUBLIC __attribute__((visibility("default")))

// Exports FUNCTION, an `Outcome(const TVMFFIAny* args, int num_args)`, as SYMBOL. The symbol of a tvm-ffi function is
// its name after the prefix __tvm_ffi_; callers write it out, so that a text search finds it. A library is one
// translation unit, so headers export too.
#define JITNORM_EXPORT(SYMBOL, FUNCTION)                                                                    \
  extern "C" JITNORM_PUBLIC int SYMBOL(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) { \
    return jitnorm::return_outcome(FUNCTION(args, num_args), result);                                       \
  }

namespace jitnorm {

enum class Outcome { kDone = 0, kRefused = 1, kRaised = -1 };

constexpr int kMaxGpus = 64;  // the length of tables that are indexed by CUDA device id

inline int return_outcome(Outcome outcome, TVMFFIAny* result) {
  if (outcome == Outcome::kRaised) return -1;  // tvm-ffi raises the error that has been set
  result->type_index = kTVMFFIInt;
  result->v_int64 = static_cast<int64_t>(outcome);
  return 0;
}

// torch's modes (torch.jit.trace, make_fx, TorchDispatchMode) must see a call before a kernel runs. While a mode is
// active, one of these dispatch keys is included on its thread. jitnorm.core.torch_modes finds torch's function that
// queries a key, and the numbers of the keys: linking to torch would bind a library to one version of it.
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

// set_mode_query(is_included, python, pre_dispatch, tracer): sets torch's function and the keys. Until it is called,
// is_mode_active() returns true.
inline Outcome set_mode_query(const TVMFFIAny* args, int num_args) {
  if (num_args != 4) return Outcome::kRefused;
  mode_keys.is_included = reinterpret_cast<bool (*)(uint16_t)>(args[0].v_int64);
  mode_keys.python = static_cast<uint16_t>(args[1].v_int64);
  mode_keys.pre_dispatch = static_cast<uint16_t>(args[2].v_int64);
  mode_keys.tracer = static_cast<uint16_t>(args[3].v_int64);
  return Outcome::kDone;
}

// Scalar arguments. False if the argument has another type.

inline bool as_float(const TVMFFIAny& arg, double* value) {
  if (arg.type_index == kTVMFFIFloat) return *value = arg.v_float64, true;
  if (arg.type_index == kTVMFFIInt) return *value = static_cast<double>(arg.v_int64), true;
  return false;
}

inline bool as_int(const TVMFFIAny& arg, index_t* value) {
  if (arg.type_index == kTVMFFIInt) return *value = arg.v_int64, true;
  return false;
}

inline bool as_bool(const TVMFFIAny& arg, bool* value) {
  if (arg.type_index == kTVMFFIBool) return *value = arg.v_int64 != 0, true;
  return false;
}

inline bool as_optional_bool(const TVMFFIAny& arg, bool if_none, bool* value) {
  if (arg.type_index == kTVMFFINone) return *value = if_none, true;
  return as_bool(arg, value);
}

// Tensor arguments.

// Null if the argument is not a tensor.
inline const DLTensor* as_tensor(const TVMFFIAny& arg) {
  if (arg.type_index == kTVMFFITensor) return reinterpret_cast<const DLTensor*>(arg.v_obj + 1);
  if (arg.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(arg.v_ptr);
  return nullptr;
}

static_assert(kElementType<float>.code == kDLFloat && kElementType<fp16_t>.code == kDLFloat &&
                  kElementType<bf16_t>.code == kDLBfloat && kElementType<e4m3_t>.code == kDLFloat8_e4m3fn,
              "element types have DLPack's numbers");

inline bool has_type(const DLTensor& tensor, ElementType type) {
  return tensor.dtype.code == type.code && tensor.dtype.bits == type.bits && tensor.dtype.lanes == type.lanes;
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

// Whether all dimensions but the last are the same.
inline bool same_leading_shape(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim - 1; i++)
    if (a.shape[i] != b.shape[i]) return false;
  return true;
}

inline index_t element_count(const DLTensor& tensor) {
  index_t count = 1;
  for (int i = 0; i < tensor.ndim; i++) count *= tensor.shape[i];
  return count;
}

inline char* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// An alignment is a power of two, and known only at run time: a division would cost as much as the other checks.
inline bool is_aligned(index_t bytes, unsigned alignment) { return (bytes & (alignment - 1)) == 0; }
inline bool is_aligned(const void* data, unsigned alignment) {
  return is_aligned(reinterpret_cast<index_t>(data), alignment);
}

// A tensor [..., hidden_size] as rows that are one stride apart.
struct Rows {
  char* data;
  index_t count;
  index_t stride;   // in elements
  const char* end;  // one past the last byte
};

// False if `tensor` has another last dimension or type, elements that are not adjacent within a row, leading
// dimensions that do not collapse to one stride, no storage (a FakeTensor), or a row that is not aligned to `alignment`
// bytes.
inline bool as_rows(const DLTensor& tensor, ElementType type, index_t hidden_size, unsigned alignment, Rows* rows) {
  int last = tensor.ndim - 1;
  if (last < 0 || !has_type(tensor, type) || tensor.shape[last] != hidden_size || tensor.strides[last] != 1)
    return false;
  index_t count = 1, stride = hidden_size;
  bool collapses = true;
  for (int i = last - 1; i >= 0; i--) {
    index_t size = tensor.shape[i];
    if (size == 1) continue;
    if (count == 1) stride = tensor.strides[i];
    else if (tensor.strides[i] != stride * count) collapses = false;
    count *= size;
  }
  char* data = data_of(tensor);
  rows->data = data;
  rows->count = count;
  rows->stride = stride;
  rows->end = data + ((count - 1) * stride + hidden_size) * type.bytes();
  if (count == 0) return true;
  return collapses && tensor.data && is_aligned(data, alignment) && is_aligned(stride * type.bytes(), alignment);
}

// The weight of a norm: one dimension of hidden_size elements. Info has hidden_size, weight and alignment.
template <typename Info>
bool as_weight(const DLTensor* tensor, const Info& info, Rows* rows) {
  return tensor && tensor->ndim == 1 && as_rows(*tensor, info.weight, info.hidden_size, info.alignment, rows);
}

// A contiguous tensor of `count` elements, of any shape, as rows of one element.
inline bool as_elements(const DLTensor* tensor, ElementType type, index_t count, unsigned alignment, Rows* rows) {
  if (!tensor || !has_type(*tensor, type) || element_count(*tensor) != count) return false;
  char* data = data_of(*tensor);
  rows->data = data;
  rows->count = count;
  rows->stride = 1;
  rows->end = data + count * type.bytes();
  if (count == 0) return true;
  index_t contiguous_stride = 1;
  for (int i = tensor->ndim - 1; i >= 0; i--) {
    if (tensor->shape[i] != 1 && tensor->strides[i] != contiguous_stride) return false;
    contiguous_stride *= tensor->shape[i];
  }
  return tensor->data && is_aligned(data, alignment);
}

// A one-dimensional tensor of int32 or int64 on `device`. Null if the argument is anything else.
inline const DLTensor* as_indices(const TVMFFIAny& arg, DLDevice device) {
  const DLTensor* t = as_tensor(arg);
  const bool accepted = t && t->ndim == 1 && t->dtype.code == kDLInt && t->dtype.lanes == 1 &&
                        (t->dtype.bits == 32 || t->dtype.bits == 64) && (t->shape[0] <= 1 || t->strides[0] == 1) &&
                        (t->shape[0] == 0 || t->data) && t->device.device_type == device.device_type &&
                        t->device.device_id == device.device_id && is_aligned(data_of(*t), t->dtype.bits / 8);
  return accepted ? t : nullptr;
}

// Indices as rows of one element, for the overlap checks below.
inline Rows index_rows(const DLTensor& indices) {
  Rows rows;
  rows.data = data_of(indices);
  rows.count = indices.shape[0];
  rows.stride = 1;
  rows.end = rows.data + indices.shape[0] * (indices.dtype.bits / 8);
  return rows;
}

// Overlap of memory.

// Whether no two rows share memory, which is required of rows that are written.
inline bool rows_are_disjoint(const Rows& rows, index_t hidden_size) {
  return rows.count <= 1 || rows.stride >= hidden_size;
}

// Whether the address ranges of two tensors overlap, the gaps between rows included.
inline bool extents_overlap(const Rows& a, const Rows& b) {
  return a.count && b.count && a.data < b.end && b.data < a.end;
}

// Whether a row of `a` shares memory with a row of `b`. Exact for strides of equal bytes, as of two column slices of
// one buffer, whose rows alternate. For different strides, overlapping extents count as shared memory.
inline bool rows_overlap(const Rows& a, index_t a_row_bytes, index_t a_element_bytes, const Rows& b,
                         index_t b_row_bytes, index_t b_element_bytes) {
  if (!extents_overlap(a, b)) return false;
  const index_t stride = a.stride * a_element_bytes;
  if (stride != b.stride * b_element_bytes) return true;
  index_t offset = (b.data - a.data) % stride;
  if (offset < 0) offset += stride;
  return offset < a_row_bytes || offset > stride - b_row_bytes;
}

inline bool rows_overlap(const Rows& a, ElementType a_type, const Rows& b, ElementType b_type, index_t hidden_size) {
  return rows_overlap(a, hidden_size * a_type.bytes(), a_type.bytes(), b, hidden_size * b_type.bytes(), b_type.bytes());
}

// The widest access, of 16, 8 or 4 bytes, that divides `row_bytes`, which is a multiple of 4. Kernels for rows whose
// width is known only at run time are built for one of the three.
inline int vector_bytes(index_t row_bytes) { return row_bytes % 16 == 0 ? 16 : row_bytes % 8 == 0 ? 8 : 4; }

}  // namespace jitnorm

JITNORM_EXPORT(__tvm_ffi_set_mode_query, jitnorm::set_mode_query)
