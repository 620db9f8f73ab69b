// GEMMs by the libcublasLt that the process has loaded, with algorithms that do not split k. The bindings of
// jitnorm.batch_invariant's cuBLASLt backend, included by launcher/launcher.cc.
//
// cuBLASLt's C interface is stable. The part that is used is declared here, so that its headers need not be installed.
// The comments name the types and enumerations of cuBLASLt whose values the constants have.
#pragma once
#include <dlfcn.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "jitnorm/ffi.h"

namespace jitnorm {

namespace lt {

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
using Handle = void*;  // the library's handle, an operation descriptor, a matrix layout or a preference

enum { kRealFloat = 0, kRealHalf = 2, kRealBfloat16 = 14 };    // cudaDataType
enum { kComputeFloat = 68, kComputeTf32 = 77 };                // cublasComputeType_t
enum { kTransposeA = 3, kEpilogue = 7, kBiasPointer = 8 };     // cublasLtMatmulDescAttributes_t
enum { kMaxWorkspace = 1, kAlignmentA = 5, kAlignmentD = 8 };  // cublasLtMatmulPreferenceAttributes_t
enum { kSplitK = 2, kReductionScheme = 3 };                    // cublasLtMatmulAlgoConfigAttributes_t
constexpr int kOpTranspose = 1, kEpilogueBias = 4;

// The library's functions, set by cublaslt_open.
struct Library {
  int (*create)(Handle*);
  size_t (*version)();
  int (*operation_create)(Handle*, int compute_type, int scale_type);
  int (*operation_set)(Handle, int, const void*, size_t);
  int (*operation_destroy)(Handle);
  int (*layout_create)(Handle*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  int (*layout_destroy)(Handle);
  int (*preference_create)(Handle*);
  int (*preference_set)(Handle, int, const void*, size_t);
  int (*preference_destroy)(Handle);
  int (*heuristic)(Handle, Handle, Handle, Handle, Handle, Handle, Handle, int, Heuristic*, int*);
  int (*check)(Handle, Handle, Handle, Handle, Handle, Handle, const Algorithm*, Heuristic*);
  int (*config_get)(const Algorithm*, int, void*, size_t, size_t*);
  int (*matmul)(Handle, Handle, const void*, const void*, Handle, const void*, Handle, const void*, const void*, Handle,
                void*, Handle, const Algorithm*, void*, size_t, void*);
};
inline Library library;

// Everything that the library's choice of an algorithm depends on, except the alignment of addresses, which is the same
// for all operands.
struct Key {
  int64_t m, n, k, b_stride, workspace_bytes;
  int32_t device, type, out_type, b_transposed, has_bias, tf32;
};
static_assert(sizeof(Key) == 64, "keys are hashed and compared as bytes, so they have no padding");

// The descriptors of one key, and the algorithm chosen for it.
struct Plan {
  Key key;
  Handle operation, b, a, out;
  Algorithm algorithm;
  enum { kEmpty, kReady, kNoAlgorithm } state;
};

// Fewer rows than kMinRows get the algorithm for kMinRows, if it supports them and there are few columns: on an H200
// one row took up to 2.4 times as long as 16 rows by what the library proposed for each (n = 1024, k = 2048 and 3072).
// With more columns one row took the same time as 16, or 3% less.
constexpr int64_t kMinRows = 16, kMaxColumns = 4096;
constexpr int kMaxPlans = 4096;  // a hash table without chains: a new plan replaces the one in its slot
inline Plan plans[kMaxPlans];
inline Handle handles[kMaxGpus];

inline Plan& slot_of(const Key& key) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&key);
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (size_t i = 0; i < sizeof key; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
  return plans[(hash ^ hash >> 32) % kMaxPlans];
}

inline Outcome raise_error(const char* function, int status) {
  char message[128];
  __builtin_snprintf(message, sizeof message, "jitnorm: %s failed with status %d", function, status);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return Outcome::kRaised;
}

// Sets the plan's algorithm to the first one that the library proposes and that does not split k. False if there is
// none.
inline bool choose_algorithm(Plan& plan, Handle handle) {
  Handle preference = nullptr;
  if (library.preference_create(&preference)) return false;
  const uint64_t workspace = plan.key.workspace_bytes;
  const uint32_t alignment = 16;
  library.preference_set(preference, kMaxWorkspace, &workspace, sizeof workspace);
  for (int name = kAlignmentA; name <= kAlignmentD; name++)
    library.preference_set(preference, name, &alignment, sizeof alignment);
  constexpr int kMaxProposals = 32;  // the first, which are the fastest, may all split k
  Heuristic proposals[kMaxProposals];
  int count = 0;
  if (library.heuristic(handle, plan.operation, plan.b, plan.a, plan.out, plan.out, preference, kMaxProposals,
                        proposals, &count))
    count = 0;
  library.preference_destroy(preference);
  for (int i = 0; i < count; i++) {
    int32_t splits = 1;
    uint32_t reduction = 0;
    const Heuristic& proposal = proposals[i];
    library.config_get(&proposal.algorithm, kSplitK, &splits, sizeof splits, nullptr);
    library.config_get(&proposal.algorithm, kReductionScheme, &reduction, sizeof reduction, nullptr);
    if (proposal.state || proposal.workspace > workspace || splits > 1 || splits < 0 || reduction) continue;
    plan.algorithm = proposal.algorithm;
    return true;
  }
  return false;
}

// Sets the layouts of a and out for so many rows. Returns the library's status.
inline int set_layouts(Plan& plan, int64_t rows) {
  const Key& key = plan.key;
  if (plan.a) library.layout_destroy(plan.a);
  if (plan.out) library.layout_destroy(plan.out);
  plan.a = plan.out = nullptr;
  const int status = library.layout_create(&plan.a, key.type, key.k, rows, key.k);
  return status ? status : library.layout_create(&plan.out, key.out_type, key.n, rows, key.n);
}

// Whether the plan's algorithm supports its layouts, in its workspace.
inline bool is_supported(const Plan& plan, Handle handle) {
  Heuristic found{};
  return !library.check(handle, plan.operation, plan.b, plan.a, plan.out, plan.out, &plan.algorithm, &found) &&
         found.workspace <= static_cast<size_t>(plan.key.workspace_bytes);
}

// Makes the plan of a key. cuBLASLt's matrices are column-major, so it is asked for out^T = b^T a^T.
inline Outcome make_plan(Plan& plan, const Key& key, Handle handle) {
  if (plan.state != Plan::kEmpty) {
    library.operation_destroy(plan.operation);
    library.layout_destroy(plan.b);
    library.layout_destroy(plan.a);
    library.layout_destroy(plan.out);
  }
  plan = Plan{};
  plan.key = key;
  const int32_t transpose = kOpTranspose, epilogue = kEpilogueBias;
  const uintptr_t aligned = 16;  // in place of the bias's address: only its alignment affects the choice
  if (int status = library.operation_create(&plan.operation, key.tf32 ? kComputeTf32 : kComputeFloat, kRealFloat))
    return raise_error("cublasLtMatmulDescCreate", status);
  if (key.b_transposed) library.operation_set(plan.operation, kTransposeA, &transpose, sizeof transpose);
  if (key.has_bias) {
    library.operation_set(plan.operation, kEpilogue, &epilogue, sizeof epilogue);
    library.operation_set(plan.operation, kBiasPointer, &aligned, sizeof aligned);
  }
  int status = library.layout_create(&plan.b, key.type, key.b_transposed ? key.k : key.n,
                                     key.b_transposed ? key.n : key.k, key.b_stride);
  bool is_ready = false;
  if (!status && key.m < kMinRows && key.n <= kMaxColumns) {
    status = set_layouts(plan, kMinRows);
    is_ready = !status && choose_algorithm(plan, handle);
  }
  if (!status) status = set_layouts(plan, key.m);
  if (status) return raise_error("cublasLtMatrixLayoutCreate", status);
  is_ready = (is_ready && is_supported(plan, handle)) || choose_algorithm(plan, handle);
  plan.state = is_ready ? Plan::kReady : Plan::kNoAlgorithm;
  return Outcome::kDone;
}

inline int type_of(const DLTensor& tensor) {
  if (has_type(tensor, kElementType<fp16_t>)) return kRealHalf;
  if (has_type(tensor, kElementType<bf16_t>)) return kRealBfloat16;
  return has_type(tensor, kElementType<float>) ? kRealFloat : -1;
}

// Whether `tensor` is a matrix on CUDA, of a supported type, aligned to 16 bytes. Sets `stride` to its row stride, or
// that of its transpose if `transposed`.
inline bool as_matrix(const DLTensor* tensor, bool transposed, int64_t* stride) {
  if (!tensor || tensor->ndim != 2 || tensor->device.device_type != kDLCUDA || type_of(*tensor) < 0) return false;
  *stride = tensor->strides[transposed ? 1 : 0];
  return tensor->data && is_aligned(data_of(*tensor), 16) &&
         (tensor->shape[transposed ? 0 : 1] == 1 || tensor->strides[transposed ? 0 : 1] == 1);
}

}  // namespace lt

// cublaslt_open(handle) -> the library's version, or 0 if it lacks a function. `handle` is dlopen's.
inline int64_t cublaslt_open(const TVMFFIAny* args, int num_args) {
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
  find(l.check, "cublasLtMatmulAlgoCheck");
  find(l.config_get, "cublasLtMatmulAlgoConfigGetAttribute");
  find(l.matmul, "cublasLtMatmul");
  return complete ? static_cast<int64_t>(l.version()) : 0;
}

// cublaslt_matmul(a, b, bias, out, b_transposed, tf32, workspace): out = a @ b + bias. bias may be None. workspace is
// a tensor of bytes or None. The caller has made the GPU current and holds the GIL, which guards the plans.
inline Outcome cublaslt_matmul(const TVMFFIAny* args, int num_args) {
  if (num_args != 7 || !lt::library.matmul) return Outcome::kRefused;
  const DLTensor *a = as_tensor(args[0]), *b = as_tensor(args[1]), *bias = as_tensor(args[2]),
                 *out = as_tensor(args[3]), *workspace = as_tensor(args[6]);
  bool b_transposed, tf32;
  int64_t a_stride, b_stride, out_stride;
  if (!as_optional_bool(args[4], false, &b_transposed) || !as_optional_bool(args[5], false, &tf32) ||
      !lt::as_matrix(a, false, &a_stride) || !lt::as_matrix(b, b_transposed, &b_stride) ||
      !lt::as_matrix(out, false, &out_stride))
    return Outcome::kRefused;
  const int64_t m = a->shape[0], k = a->shape[1], n = b->shape[1];
  if (b->shape[0] != k || out->shape[0] != m || out->shape[1] != n || (m > 1 && (a_stride != k || out_stride != n)) ||
      !same_device(*a, *b) || !same_device(*a, *out) || a->device.device_id >= kMaxGpus ||
      lt::type_of(*b) != lt::type_of(*a))
    return Outcome::kRefused;
  if (bias && (bias->ndim != 1 || bias->shape[0] != n || !same_device(*a, *bias) ||
               lt::type_of(*bias) != lt::type_of(*out) || !is_aligned(data_of(*bias), 16)))
    return Outcome::kRefused;
  if (workspace && !same_device(*a, *workspace)) return Outcome::kRefused;
  const int64_t workspace_bytes = workspace ? element_count(*workspace) * workspace->dtype.bits / 8 : 0;
  const int device = a->device.device_id;
  lt::Handle& handle = lt::handles[device];
  if (!handle)
    if (int status = lt::library.create(&handle)) return handle = nullptr, lt::raise_error("cublasLtCreate", status);
  lt::Key key;
  key.m = m;
  key.n = n;
  key.k = k;
  key.b_stride = b_stride;
  key.workspace_bytes = workspace_bytes;
  key.device = device;
  key.type = lt::type_of(*a);
  key.out_type = lt::type_of(*out);
  key.b_transposed = b_transposed;
  key.has_bias = bias != nullptr;
  key.tf32 = tf32;
  lt::Plan& plan = lt::slot_of(key);
  if (plan.state == lt::Plan::kEmpty || __builtin_memcmp(&plan.key, &key, sizeof key))
    if (lt::make_plan(plan, key, handle) == Outcome::kRaised) return Outcome::kRaised;
  if (plan.state == lt::Plan::kNoAlgorithm) return Outcome::kRefused;
  if (bias) {
    const void* address = data_of(*bias);
    lt::library.operation_set(plan.operation, lt::kBiasPointer, &address, sizeof address);
  }
  const float one = 1.f, zero = 0.f;
  void* out_data = data_of(*out);
  int status =
      lt::library.matmul(handle, plan.operation, &one, data_of(*b), plan.b, data_of(*a), plan.a, &zero, out_data,
                         plan.out, out_data, plan.out, &plan.algorithm, workspace ? data_of(*workspace) : nullptr,
                         workspace_bytes, TVMFFIEnvGetStream(kDLCUDA, device));
  return status ? lt::raise_error("cublasLtMatmul", status) : Outcome::kDone;
}

}  // namespace jitnorm

// Without JITNORM_EXPORT, because it does not return an Outcome.
extern "C" JITNORM_PUBLIC int __tvm_ffi_cublaslt_open(void*, const TVMFFIAny* args, int32_t num_args,
                                                      TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = jitnorm::cublaslt_open(args, num_args);
  return 0;
}
