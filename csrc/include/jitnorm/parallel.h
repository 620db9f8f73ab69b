// Rows over the threads of OpenMP. torch brings its own libgomp and the linker finds that one loaded, so that
// torch.set_num_threads counts here too.
#pragma once
#include "jitnorm/ffi.h"
#include "jitnorm/interpreter.h"

#define JITNORM_CPU_MODULE(NAME, KERNEL)      \
  JITNORM_EXPORT(NAME, jitnorm::NAME<KERNEL>) \
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

constexpr index_t kParallelElements = 1 << 15;  // below, waking the threads takes longer than the work
constexpr index_t kChunkElements = 1 << 11;     // a call of run_rows is nothing beside them

// Out of line, so that the rows are compiled once for both callers below.
template <typename Kernel>
__attribute__((noinline)) void run_rows(const typename Kernel::params_t& params, index_t first, index_t last) {
  for (index_t row = first; row < last; row++) Kernel::run(params, row);
}

template <typename Kernel>
Outcome launch(Kernel, const typename Kernel::params_t& params, DLDevice, bool) {
  constexpr index_t kChunk = Kernel::kHiddenSize < kChunkElements ? kChunkElements / Kernel::kHiddenSize : 1;
  const index_t rows = params.num_tokens;
  if (rows == 1 || rows * Kernel::kHiddenSize < kParallelElements) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
  InterpreterReleased released;
  if (serial) {
    run_rows<Kernel>(params, 0, rows);
    return Outcome::kDone;
  }
#pragma omp parallel for schedule(static)
  for (index_t row = 0; row < rows; row += kChunk)
    run_rows<Kernel>(params, row, row + kChunk < rows ? row + kChunk : rows);
  return Outcome::kDone;
}

}  // namespace jitnorm
