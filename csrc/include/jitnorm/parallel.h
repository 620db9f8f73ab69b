// Launches of CPU kernels: shares the rows of a call out over OpenMP threads. Included by every
// elementwise/<family>_cpu.h.
//
// A CPU kernel class has params_t with num_rows, kAlignment, run(params, row), and row_elements(params): the elements
// of a row, as a measure of its work.
#pragma once
#include <dlfcn.h>

#include "jitnorm/ffi.h"

extern "C" int omp_get_max_threads();

namespace jitnorm {

constexpr index_t kMinParallelElements = 1 << 15;  // for fewer, waking the threads takes longer than the work
constexpr index_t kMinChunkElements = 1 << 11;     // so that a call of run_rows costs little beside its rows

// Python's global interpreter lock. A call arrives with it and keeps it while its work is short, since releasing it
// costs as much as a short call. The functions are found by name, so that a library serves every version of Python, or
// none.
struct GilFunctions {
  int (*is_held)() = reinterpret_cast<int (*)()>(dlsym(nullptr, "PyGILState_Check"));
  void* (*release)() = reinterpret_cast<void* (*)()>(dlsym(nullptr, "PyEval_SaveThread"));
  void (*acquire)(void*) = reinterpret_cast<void (*)(void*)>(dlsym(nullptr, "PyEval_RestoreThread"));
};

// Releases the lock, if this thread holds it, until the end of the scope.
class ScopedGilRelease {
 public:
  ScopedGilRelease() {
    if (gil_.is_held && gil_.release && gil_.acquire && gil_.is_held()) state_ = gil_.release();
  }
  ~ScopedGilRelease() {
    if (state_) gil_.acquire(state_);
  }
  ScopedGilRelease(const ScopedGilRelease&) = delete;

 private:
  static inline const GilFunctions gil_;
  void* state_ = nullptr;
};

// Set in a forked child, which has none of its parent's threads: libgomp would wait for them for ever.
inline bool is_serial = false;

// run_serially(): called by jit/load.py after a fork.
inline Outcome run_serially(const TVMFFIAny*, int) {
  is_serial = true;
  return Outcome::kDone;
}

// at::get_num_threads, or null without torch. OpenMP's own number belongs to a thread, so that a new Python thread
// would miss torch.set_num_threads of another. Found by name, as a library is not bound to a version of torch.
inline int (*const torch_num_threads)() = [] {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<int (*)()>(torch ? dlsym(torch, "_ZN2at15get_num_threadsEv") : nullptr);
}();

// torch_num_threads is no static variable of this function: its guard would need libstdc++, and linking that takes a
// third of a build.
inline int num_threads() { return torch_num_threads ? torch_num_threads() : omp_get_max_threads(); }

template <typename Kernel>
bool runs_on(DLDevice device) {
  return device.device_type == kDLCPU;
}

// Not inlined, so that the rows are compiled once for both callers below.
template <typename Kernel>
__attribute__((noinline)) void run_rows(const typename Kernel::params_t& params, index_t first, index_t last) {
  for (index_t row = first; row < last; row++) Kernel::run(params, row);
}

template <typename Kernel>
Outcome launch(const typename Kernel::params_t& params, DLDevice, bool) {
  const index_t row_elements = Kernel::row_elements(params), rows = params.num_rows;
  const index_t chunk = row_elements < kMinChunkElements ? kMinChunkElements / row_elements : 1;
  if (rows == 1 || rows * row_elements < kMinParallelElements) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
  ScopedGilRelease released;
  if (is_serial) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
#pragma omp parallel for schedule(static) num_threads(num_threads())
  for (index_t row = 0; row < rows; row += chunk)
    run_rows<Kernel>(params, row, row + chunk < rows ? row + chunk : rows);
  return Outcome::kDone;
}

}  // namespace jitnorm

JITNORM_EXPORT(__tvm_ffi_run_serially, jitnorm::run_serially)
