// Matrix products by the libcublasLt that is already in the process, in no workspace, or in one that is too small to
// split k in.
//
// Its C interface is stable, and declared here as far as it is used: the library's headers need not be installed.
#pragma once
#include <dlfcn.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "jitnorm/parallel.h"

namespace jitnorm {

struct CublasLt {};  // names the module, like the kernel classes of other families

namespace lt {

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
using Object = void*;  // of the library: a handle, a descriptor, a layout or a preference

enum { kRealFloat = 0, kRealHalf = 2, kRealBfloat16 = 14 };    // cudaDataType
enum { kComputeFloat = 68, kComputeTf32 = 77 };                // cublasComputeType_t
enum { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8 };     // cublasLtMatmulDescAttributes_t
enum { kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentD = 8 };  // cublasLtMatmulPreferenceAttributes_t
enum { kSplitK = 2, kReductionScheme = 3 };                    // cublasLtMatmulAlgoConfigAttributes_t
constexpr int kOpTranspose = 1, kEpilogueBias = 4;

struct Library {
  int (*create)(Object*);
  size_t (*version)();
  int (*operation_create)(Object*, int compute, int scale);
  int (*operation_set)(Object, int, const void*, size_t);
  int (*operation_destroy)(Object);
  int (*layout_create)(Object*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(Object);
  int (*preference_create)(Object*);
  int (*preference_set)(Object, int, const void*, size_t);
  int (*preference_destroy)(Object);
  int (*heuristic)(Object, Object, Object, Object, Object, Object, Object, int, Heuristic*, int*);
  int (*config_get)(const Algorithm*, int, void*, size_t, size_t*);
  int (*matmul)(Object, Object, const void*, const void*, Object, const void*, Object, const void*, const void*, Object,
                void*, Object, const Algorithm*, void*, size_t, void*);
};
inline Library library;

// Everything that a choice of the library depends on. Never the addresses: all operands are aligned alike.
struct Key {
  int64_t m, n, k, b_stride, workspace;
  int32_t device, type, out_type, transposed, bias, tf32;
};

struct Plan {
  Key key;
  Object operation, b, a, out;
  Algorithm algorithm;
  enum { kEmpty, kReady, kNoKernel } state;
};

constexpr int kPlans = 4096;  // a plan takes the place of another whose key falls on the same one
inline Plan plans[kPlans];
constexpr int kMaxGpus = 64;
inline Object handles[kMaxGpus];

inline Plan& place_of(const Key& key) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&key);
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < sizeof key; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
  return plans[(hash ^ hash >> 32) % kPlans];
}

inline Outcome raise(const char* function, int status) {
  char message[128];
  __builtin_snprintf(message, sizeof message, "jitnorm: %s failed with status %d", function, status);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return Outcome::kRaised;
}

// The first kernel that the library proposes which adds along k in one piece.
inline bool choose(Plan& plan, Object handle) {
  Object preference = nullptr;
  if (library.preference_create(&preference)) return false;
  const uint64_t workspace = plan.key.workspace;
  const uint32_t alignment = 16;
  library.preference_set(preference, kMaxWorkspace, &workspace, sizeof workspace);
  for (int name = kAlignmentA; name <= kAlignmentD; name++)
    library.preference_set(preference, name, &alignment, sizeof alignment);
  constexpr int kMost = 32;  // the best may all split k
  Heuristic proposed[kMost];
  int count = 0;
  if (library.heuristic(handle, plan.operation, plan.b, plan.a, plan.out, plan.out, preference, kMost, proposed,
                        &count))
    count = 0;
  library.preference_destroy(preference);
  for (int i = 0; i < count; i++) {
    int32_t splits = 1;
    uint32_t reduction = 0;
    library.config_get(&proposed[i].algorithm, kSplitK, &splits, sizeof splits, nullptr);
    library.config_get(&proposed[i].algorithm, kReductionScheme, &reduction, sizeof reduction, nullptr);
    if (proposed[i].state || proposed[i].workspace > workspace || splits > 1 || splits < 0 || reduction) continue;
    plan.algorithm = proposed[i].algorithm;
    return true;
  }
  return false;
}

// The library counts in columns: the product of these rows is, to it, out^T = b^T a^T.
inline Outcome make(Plan& plan, const Key& key, Object handle) {
  if (plan.state != Plan::kEmpty) {
    library.operation_destroy(plan.operation);
    library.layout_destroy(plan.b);
    library.layout_destroy(plan.a);
    library.layout_destroy(plan.out);
  }
  plan = {key, nullptr, nullptr, nullptr, nullptr, {}, Plan::kEmpty};
  const int32_t transpose = kOpTranspose, epilogue = kEpilogueBias;
  const uintptr_t aligned = 16;  // stands for a bias's address, of which only the alignment is looked at here
  if (int status = library.operation_create(&plan.operation, key.tf32 ? kComputeTf32 : kComputeFloat, kRealFloat))
    return raise("cublasLtMatmulDescCreate", status);
  if (key.transposed) library.operation_set(plan.operation, kTransposeA, &transpose, sizeof transpose);
  if (key.bias) {
    library.operation_set(plan.operation, kEpilogue, &epilogue, sizeof epilogue);
    library.operation_set(plan.operation, kBiasPointer, &aligned, sizeof aligned);
  }
  int status = library.layout_create(&plan.b, key.type, key.transposed ? key.k : key.n, key.transposed ? key.n : key.k,
                                     key.b_stride);
  if (!status) status = library.layout_create(&plan.a, key.type, key.k, key.m, key.k);
  if (!status) status = library.layout_create(&plan.out, key.out_type, key.n, key.m, key.n);
  if (status) return raise("cublasLtMatrixLayoutCreate", status);
  plan.state = choose(plan, handle) ? Plan::kReady : Plan::kNoKernel;
  return Outcome::kDone;
}

inline int type_of(const DLTensor& tensor) {
  if (has_dtype<fp16_t>(tensor)) return kRealHalf;
  if (has_dtype<bf16_t>(tensor)) return kRealBfloat16;
  return has_dtype<float>(tensor) ? kRealFloat : -1;
}

inline void* data_of(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// A matrix on CUDA, of a type that is known and at an address that is aligned; `stride` is that from row to row.
inline bool as_matrix(const DLTensor* tensor, bool transposed, int64_t* stride) {
  if (!tensor || tensor->ndim != 2 || tensor->device.device_type != kDLCUDA || type_of(*tensor) < 0) return false;
  *stride = tensor->strides[transposed ? 1 : 0];
  return tensor->data && reinterpret_cast<uintptr_t>(data_of(*tensor)) % 16 == 0 &&
         (tensor->shape[transposed ? 0 : 1] == 1 || tensor->strides[transposed ? 0 : 1] == 1);
}

}  // namespace lt

// cublaslt_open(handle) -> the library's version, or 0 if it lacks a function. `handle` is dlopen's.
inline int64_t open_cublaslt(const TVMFFIAny* args, int num_args) {
  if (num_args != 1 || args[0].type_index != kTVMFFIInt) return 0;
  void* handle = reinterpret_cast<void*>(args[0].v_int64);
  bool complete = true;
  auto find = [&](auto*& function, const char* name) {
    function = reinterpret_cast<decltype(+function)>(dlsym(handle, name));
    complete = complete && function;
  };
  lt::Library& l = lt::library;
  find(l.create, "cublasLtCreate");
  find(l.version, "cublasLtGetVersion");
  find(l.operation_create, "cublasLtMatmulDescCreate");
  find(l.operation_set, "cublasLtMatmulDescSetAttribute");
  find(l.operation_destroy, "cublasLtMatmulDescDestroy");
  find(l.layout_create, "cublasLtMatrixLayoutCreate");
  find(l.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(l.preference_create, "cublasLtMatmulPreferenceCreate");
  find(l.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(l.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(l.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(l.config_get, "cublasLtMatmulAlgoConfigGetAttribute");
  find(l.matmul, "cublasLtMatmul");
  return complete ? static_cast<int64_t>(l.version()) : 0;
}

// cublaslt_matmul(a, b, bias, out, b_transposed, tf32, workspace): out = a @ b + bias. The workspace is bytes on the
// GPU, or None. The caller has made the GPU current, and holds Python's lock, which guards the plans.
template <typename>
Outcome cublaslt_matmul(const TVMFFIAny* args, int num_args) {
  if (num_args != 7 || !lt::library.matmul) return Outcome::kRefused;
  const DLTensor *a = as_tensor(args[0]), *b = as_tensor(args[1]), *bias = as_tensor(args[2]),
                 *out = as_tensor(args[3]), *workspace = as_tensor(args[6]);
  bool transposed, tf32;
  int64_t a_stride, b_stride, out_stride;
  if (!as_optional_bool(args[4], false, &transposed) || !as_optional_bool(args[5], false, &tf32) ||
      !lt::as_matrix(a, false, &a_stride) || !lt::as_matrix(b, transposed, &b_stride) ||
      !lt::as_matrix(out, false, &out_stride))
    return Outcome::kRefused;
  const int64_t m = a->shape[0], k = a->shape[1], n = b->shape[1];
  if (b->shape[0] != k || out->shape[0] != m || out->shape[1] != n || (m > 1 && (a_stride != k || out_stride != n)) ||
      !same_device(*a, *b) || !same_device(*a, *out) || a->device.device_id >= lt::kMaxGpus ||
      lt::type_of(*b) != lt::type_of(*a))
    return Outcome::kRefused;
  if (bias && (bias->ndim != 1 || bias->shape[0] != n || !same_device(*a, *bias) ||
               lt::type_of(*bias) != lt::type_of(*out) || reinterpret_cast<uintptr_t>(lt::data_of(*bias)) % 16))
    return Outcome::kRefused;
  if (workspace && !same_device(*a, *workspace)) return Outcome::kRefused;
  const int64_t room = workspace ? element_count(*workspace) * workspace->dtype.bits / 8 : 0;
  const int device = a->device.device_id;
  lt::Object& handle = lt::handles[device];
  if (!handle)
    if (int status = lt::library.create(&handle)) return handle = nullptr, lt::raise("cublasLtCreate", status);
  const lt::Key key{m,   n, k, b_stride, room, device, lt::type_of(*a), lt::type_of(*out), transposed, bias != nullptr,
                    tf32};
  lt::Plan& plan = lt::place_of(key);
  if (plan.state == lt::Plan::kEmpty || __builtin_memcmp(&plan.key, &key, sizeof key))
    if (lt::make(plan, key, handle) == Outcome::kRaised) return Outcome::kRaised;
  if (plan.state == lt::Plan::kNoKernel) return Outcome::kRefused;
  if (bias) {
    const void* address = lt::data_of(*bias);
    lt::library.operation_set(plan.operation, lt::kBiasPointer, &address, sizeof address);
  }
  const float one = 1.f, zero = 0.f;
  void* to = lt::data_of(*out);
  int status = lt::library.matmul(
      handle, plan.operation, &one, lt::data_of(*b), plan.b, lt::data_of(*a), plan.a, &zero, to, plan.out, to, plan.out,
      &plan.algorithm, workspace ? lt::data_of(*workspace) : nullptr, room, TVMFFIEnvGetStream(kDLCUDA, device));
  return status ? lt::raise("cublasLtMatmul", status) : Outcome::kDone;
}

}  // namespace jitnorm

extern "C" JITNORM_PUBLIC int __tvm_ffi_cublaslt_open(void*, const TVMFFIAny* args, int32_t n_args, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = jitnorm::open_cublaslt(args, n_args);
  return 0;
}
