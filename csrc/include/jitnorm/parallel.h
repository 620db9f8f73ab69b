// Rows over the threads of OpenMP, as many as torch would use: torch.set_num_threads counts here too.
#pragma once
#include "jitnorm/ffi.h"
#include "jitnorm/interpreter.h"

extern "C" int omp_get_max_threads();

#define JITNORM_CPU_MODULE(NAME, KERNEL) \
  JITNORM_OPERATOR(NAME, KERNEL)         \
  JITNORM_EXPORT(run_serially, jitnorm::run_serially)

namespace jitnorm {

// A forked child has none of its parent's threads, and libgomp waits for them for ever: jit/load.py calls this there.
inline bool serial = false;

inline Outcome run_serially(const TVMFFIAny*, int) {
  serial = true;
  return Outcome::kDone;
}

template <typename Kernel>
bool runs_on(Kernel, DLDevice device) {
  return device.device_type == kDLCPU;
}

// OpenMP keeps its number for each thread, so that a new Python thread would not know what another one set. torch's
// at::get_num_threads does. It is found by name, as a library is bound to no version of torch.
inline int (*const torch_num_threads)() = [] {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<int (*)()>(torch ? dlsym(torch, "_ZN2at15get_num_threadsEv") : nullptr);
}();

// Not with a static variable in it: its guard needs libstdc++, and linking that takes a third of a build.
inline int num_threads() { return torch_num_threads ? torch_num_threads() : omp_get_max_threads(); }

constexpr index_t kParallelElements = 1 << 15;  // below, waking the threads takes longer than the work
constexpr index_t kChunkElements = 1 << 11;     // a call of run_rows is nothing beside them

// Out of line, so that the rows are compiled once for both callers below.
template <typename Kernel>
__attribute__((noinline)) void run_rows(const typename Kernel::params_t& params, index_t first, index_t last) {
  for (index_t row = first; row < last; row++) Kernel::run(params, row);
}

// A row's work, in elements: fixed by the kernel's kHiddenSize, or what the kernel says of its parameters.
template <typename Kernel>
auto row_elements(const typename Kernel::params_t& params, int) -> decltype(Kernel::row_elements(params)) {
  return Kernel::row_elements(params);
}
template <typename Kernel>
constexpr index_t row_elements(const typename Kernel::params_t&, long) {
  return Kernel::kHiddenSize;
}

template <typename Kernel>
Outcome launch(Kernel, const typename Kernel::params_t& params, DLDevice, bool) {
  const index_t elements = row_elements<Kernel>(params, 0), rows = params.num_tokens;
  const index_t chunk = elements < kChunkElements ? kChunkElements / elements : 1;
  if (rows == 1 || rows * elements < kParallelElements) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
  InterpreterReleased released;
  if (serial) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
#pragma omp parallel for schedule(static) num_threads(num_threads())
  for (index_t row = 0; row < rows; row += chunk)
    run_rows<Kernel>(params, row, row + chunk < rows ? row + chunk : rows);
  return Outcome::kDone;
}

}  // namespace jitnorm
