// Launches of CPU kernels: distributes the rows of a call over OpenMP threads. Included by every
// elementwise/<family>_cpu.h.
//
// A CPU kernel class has params_t with num_rows, info_t with the constants that it reads, kAlignment, run(params, row),
// and row_elements(params): the elements of a row, as a measure of its work.
#pragma once
#include <dlfcn.h>

#include "jitnorm/ffi.h"

extern "C" int omp_get_max_threads();

namespace jitnorm {

constexpr index_t kMinParallelElements = 1 << 15;  // for fewer, waking the threads takes longer than the work
constexpr index_t kMinChunkElements = 1 << 11;     // for fewer, a call of run_rows would cost more than its rows

// Python's global interpreter lock. The calling thread has it, and releases it only for long calls: releasing it costs
// as much as a short call. The functions are looked up by name, so that a library works with every version of Python,
// and without Python.
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

// Set in a forked child, which has none of its parent's threads: libgomp would wait for them forever.
inline bool threads_disabled = false;

// disable_threads(): makes all later calls run on the calling thread. jit/load.py calls it after a fork.
inline Outcome disable_threads(const TVMFFIAny*, int) {
  threads_disabled = true;
  return Outcome::kDone;
}

// at::get_num_threads, or null without torch. OpenMP keeps its own number of threads per thread, so that a call of
// torch.set_num_threads in one Python thread would not affect another. Looked up by name, so that a library is not
// bound to a version of torch.
inline int (*const torch_num_threads)() = [] {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<int (*)()>(torch ? dlsym(torch, "_ZN2at15get_num_threadsEv") : nullptr);
}();

// torch_num_threads is not a static variable of this function: its guard would need libstdc++, and linking that takes
// a third of a build.
inline int num_threads() { return torch_num_threads ? torch_num_threads() : omp_get_max_threads(); }

template <typename>
constexpr LaunchInfo launch_info() {
  return {};
}

// Not inlined, so that the rows are compiled once for both callers below.
template <typename Kernel>
__attribute__((noinline)) void run_rows(const typename Kernel::params_t& params, index_t first, index_t last) {
  for (index_t row = first; row < last; row++) Kernel::run(params, row);
}

template <typename Kernel>
Outcome run_on_threads(const typename Kernel::params_t& params) {
  const index_t row_elements = Kernel::row_elements(params), rows = params.num_rows;
  const index_t chunk = row_elements < kMinChunkElements ? kMinChunkElements / row_elements : 1;
  if (rows == 1 || rows * row_elements < kMinParallelElements) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
  ScopedGilRelease released;
  if (threads_disabled) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
#pragma omp parallel for schedule(static) num_threads(num_threads())
  for (index_t row = 0; row < rows; row += chunk)
    run_rows<Kernel>(params, row, row + chunk < rows ? row + chunk : rows);
  return Outcome::kDone;
}

// A kernel class as bindings functions see it.
template <typename Kernel>
struct CpuKernel {
  static constexpr auto info() { return Kernel::info_t::template of<Kernel>(); }
  static bool runs_on(DLDevice device) { return device.device_type == kDLCPU; }
  static Outcome launch(const typename Kernel::params_t& params, DLDevice, bool) {
    return run_on_threads<Kernel>(params);
  }
};

// The functions that a library exports for kBinding: for calls through torch's dispatcher, and for those that do not
// come through it, which are refused while a mode is active.
template <typename Kernel, Outcome (*kBinding)(const Kernel&, const TVMFFIAny*, int)>
Outcome call(const TVMFFIAny* args, int num_args) {
  return kBinding(Kernel{}, args, num_args);
}
template <typename Kernel, Outcome (*kBinding)(const Kernel&, const TVMFFIAny*, int)>
Outcome call_fast_path(const TVMFFIAny* args, int num_args) {
  return is_mode_active() ? Outcome::kRefused : kBinding(Kernel{}, args, num_args);
}

}  // namespace jitnorm

JITNORM_EXPORT(__tvm_ffi_disable_threads, jitnorm::disable_threads)
