// One kernel, from both sides: nvcc compiles it to a cubin, the host compiler everything that launches it.
//
// The library carries the cubin in its read-only data and gives it to the driver at the first call. That spares every
// build nvcc's host pass and the CUDA runtime, and every call the runtime's share of a launch. The driver is looked up
// by name, so that the library also loads where there is none.
#pragma once

namespace jitnorm {

// What pays in a grid of thousands of blocks costs a single row, even where it is only asked for: a few instructions
// more take 60 ns. So `run` is a template over GridLength, and a kernel class may have code of its own for grids of up
// to kShortGrid and from kLongGrid blocks, in its first dimension. One that has the same code for all inherits from
// EveryGrid.
enum class GridLength { kShort, kAny, kLong };
struct EveryGrid {
  static constexpr unsigned kShortGrid = 0, kLongGrid = ~0u;
};

template <typename Kernel, GridLength kGrid>
constexpr bool kHasCodeFor = kGrid == GridLength::kShort  ? Kernel::kShortGrid != EveryGrid::kShortGrid
                             : kGrid == GridLength::kLong ? Kernel::kLongGrid != EveryGrid::kLongGrid
                                                          : true;

// What a multiprocessor holds: those of data centres the most.
#if !defined(__CUDA_ARCH__)
constexpr int kProcessorThreads = 0;  // device code alone asks
#elif __CUDA_ARCH__ == 750
constexpr int kProcessorThreads = 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ / 100 == 10
constexpr int kProcessorThreads = 2048;
#else
constexpr int kProcessorThreads = 1536;
#endif

}  // namespace jitnorm

#ifdef __CUDACC__

#define JITNORM_CUDA_MODULE(NAME, SYMBOL, KERNEL)     \
  JITNORM_CUDA_KERNEL(SYMBOL, KERNEL, kAny)           \
  JITNORM_CUDA_KERNEL(SYMBOL##_short, KERNEL, kShort) \
  JITNORM_CUDA_KERNEL(SYMBOL##_long, KERNEL, kLong)

#define JITNORM_CUDA_KERNEL(SYMBOL, KERNEL, GRID)                                    \
  extern "C" __global__ void __launch_bounds__(KERNEL::kThreads, KERNEL::kMinBlocks) \
      SYMBOL(const __grid_constant__ KERNEL::params_t params) {                      \
    jitnorm::run_in<KERNEL, jitnorm::GridLength::GRID>(params);                      \
  }

namespace jitnorm {

template <typename Kernel, GridLength kGrid>
__device__ __forceinline__ void run_in(const typename Kernel::params_t& params) {
  if constexpr (kHasCodeFor<Kernel, kGrid>) Kernel::template run<kGrid>(params);
}

// Programmatic dependent launch: nothing that an earlier kernel may have written is read before wait_for_previous();
// let_next_start() lets the blocks of the next kernel take their places while this one still computes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// What a kernel can do while it waits: fetch its parameters, which the addresses are made of and which its conditions
// for coming here ask for, and the addresses' translations, by a prefetch into the second-level cache, where no value
// can be out of date. Only the blocks that can be waiting do so: in a large grid, one prefetch a block slows a short
// row by 7%.
__device__ __forceinline__ void before_wait(const void* input, const void* weight, const void* other,
                                            unsigned block = blockIdx.x) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0 && block < 32)
    asm volatile("prefetch.global.L2 [%0]; prefetch.global.L2 [%1]; prefetch.global.L2 [%2];" ::"l"(input), "l"(weight),
                 "l"(other));
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace jitnorm

#else
#include <cuda.h>
#include <dlfcn.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

extern "C" const char jitnorm_cubin[];  // put in by the linker step; see src/jitnorm/jit/spec.py

#define JITNORM_CUDA_MODULE(NAME, SYMBOL, KERNEL)     \
  const char* const jitnorm::kKernelSymbol = #SYMBOL; \
  JITNORM_OPERATOR(NAME, KERNEL)

namespace jitnorm {

extern const char* const kKernelSymbol;

inline Outcome raise(const char* what, const char* why) {
  char message[512];
  __builtin_snprintf(message, sizeof message, "jitnorm: %s %s: %s", what, kKernelSymbol, why);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return Outcome::kRaised;
}

// The few functions of the driver that a launch needs, found once.
struct Driver {
#define JITNORM_NAME(x) #x
#define JITNORM_FIND(FIELD, FUNCTION) \
  decltype(&::FUNCTION) FIELD = reinterpret_cast<decltype(&::FUNCTION)>(find(JITNORM_NAME(FUNCTION)));
  void* handle = dlopen("libcuda.so.1", RTLD_NOW);
  const char* missing = nullptr;
  JITNORM_FIND(error_string, cuGetErrorString)
  JITNORM_FIND(device_get, cuDeviceGet)
  JITNORM_FIND(device_attribute, cuDeviceGetAttribute)
  JITNORM_FIND(primary_retain, cuDevicePrimaryCtxRetain)
  JITNORM_FIND(current_device, cuCtxGetDevice)
  JITNORM_FIND(push, cuCtxPushCurrent)
  JITNORM_FIND(pop, cuCtxPopCurrent)
  JITNORM_FIND(capture_mode, cuThreadExchangeStreamCaptureMode)
  JITNORM_FIND(library_load, cuLibraryLoadData)
  JITNORM_FIND(library_kernel, cuLibraryGetKernel)
  JITNORM_FIND(kernel_function, cuKernelGetFunction)
  JITNORM_FIND(launch, cuLaunchKernelEx)
#undef JITNORM_FIND
#undef JITNORM_NAME

  void* find(const char* name) {
    void* symbol = handle ? dlsym(handle, name) : nullptr;
    if (!symbol && !missing) missing = name;
    return symbol;
  }
};

inline const Driver& driver() {
  static const Driver found;
  return found;
}

// Makes a device current while this lives; costs one look where it is current already.
class DeviceGuard {
 public:
  DeviceGuard(CUdevice device, CUcontext context) {
    CUdevice current;
    if (driver().current_device(&current) == CUDA_SUCCESS && current == device) return;
    pushed_ = driver().push(context) == CUDA_SUCCESS;
  }
  ~DeviceGuard() {
    CUcontext popped;
    if (pushed_) driver().pop(&popped);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

// What this library knows of one GPU. Two threads may prepare it at once: both find the same.
struct Gpu {
  enum State : int { kUnknown = 0, kReady, kOtherArch };
  int state;
  CUdevice device;
  CUcontext context;
  CUfunction functions[3];  // of the kernels, by GridLength, in that context
};

constexpr int kMaxGpus = 64;
inline Gpu gpus[kMaxGpus];

// The kernels themselves belong to no device; each GPU's context has its functions of them.
struct Loaded {
  CUlibrary library = nullptr;
  CUkernel kernels[3] = {};  // by GridLength
  CUresult result = driver().library_load(&library, jitnorm_cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);

  void find(GridLength length, const char* suffix) {
    char symbol[512];
    __builtin_snprintf(symbol, sizeof symbol, "%s%s", kKernelSymbol, suffix);
    if (result == CUDA_SUCCESS) result = driver().library_kernel(&kernels[int(length)], library, symbol);
  }
};

template <typename Kernel>
const Loaded& loaded() {
  static const Loaded found = [] {
    Loaded l;
    l.find(GridLength::kAny, "");
    if (kHasCodeFor<Kernel, GridLength::kShort>) l.find(GridLength::kShort, "_short");
    if (kHasCodeFor<Kernel, GridLength::kLong>) l.find(GridLength::kLong, "_long");
    return l;
  }();
  return found;
}

// First use of a GPU, possibly inside a graph capture: nothing here is an operation of the captured stream.
template <typename Kernel>
[[gnu::cold, gnu::noinline]] const char* prepare(Gpu& gpu, int index) {
  const Driver& d = driver();
  if (!d.handle) return "there is no CUDA driver (libcuda.so.1)";
  if (d.missing) return "the CUDA driver is older than 12.0";
  int major = 0, minor = 0;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUresult result = d.device_get(&gpu.device, index);
  auto attribute = [&](int* value, CUdevice_attribute name) {
    if (result == CUDA_SUCCESS) result = d.device_attribute(value, name, gpu.device);
  };
  attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  if (result == CUDA_SUCCESS && major * 10 + minor != JITNORM_CUDA_ARCH) {
    __atomic_store_n(&gpu.state, Gpu::kOtherArch, __ATOMIC_RELEASE);
    return nullptr;
  }
  if (result == CUDA_SUCCESS) result = d.primary_retain(&gpu.context, gpu.device);
  if (result == CUDA_SUCCESS) {
    DeviceGuard guard(gpu.device, gpu.context);
    d.capture_mode(&mode);
    result = loaded<Kernel>().result;
    for (const CUkernel& kernel : loaded<Kernel>().kernels) {
      CUfunction& function = gpu.functions[&kernel - loaded<Kernel>().kernels];
      if (kernel && result == CUDA_SUCCESS) result = d.kernel_function(&function, kernel);
    }
    d.capture_mode(&mode);
  }
  if (result != CUDA_SUCCESS) {
    const char* why = "unknown error";
    d.error_string(result, &why);
    return why;
  }
  __atomic_store_n(&gpu.state, Gpu::kReady, __ATOMIC_RELEASE);
  return nullptr;
}

template <typename Kernel>
bool runs_on(Kernel, DLDevice device) {
  return device.device_type == kDLCUDA && device.device_id >= 0 && device.device_id < kMaxGpus &&
         __atomic_load_n(&gpus[device.device_id].state, __ATOMIC_ACQUIRE) != Gpu::kOtherArch;
}

// A kernel says how it lies over its rows, or has kRowsPerBlock of them in each block.
template <typename Kernel>
auto grid_of(const typename Kernel::params_t& params, int) -> decltype(Kernel::grid(params)) {
  return Kernel::grid(params);
}
template <typename Kernel>
Grid grid_of(const typename Kernel::params_t& params, long) {
  return {divide_up(params.num_tokens, Kernel::kRowsPerBlock), 1, 1, Kernel::kThreads, 1};
}

template <typename Kernel>
Outcome launch(Kernel, const typename Kernel::params_t& params, DLDevice device, bool enable_pdl) {
  Gpu& gpu = gpus[device.device_id];
  if (__atomic_load_n(&gpu.state, __ATOMIC_ACQUIRE) != Gpu::kReady) {
    if (const char* why = prepare<Kernel>(gpu, device.device_id)) return raise("cannot load", why);
    if (gpu.state == Gpu::kOtherArch) return Outcome::kRefused;
  }
  const Grid grid = grid_of<Kernel>(params, 0);
  if (grid.x > 0x7fffffff) return raise("cannot launch", "more rows than a grid has blocks for");
  CUlaunchAttribute attribute;
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = static_cast<unsigned>(grid.x);
  config.gridDimY = grid.y;
  config.gridDimZ = grid.z;
  config.blockDimX = grid.threads_x;
  config.blockDimY = grid.threads_y;
  config.blockDimZ = 1;
  config.hStream = static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, device.device_id));
  config.attrs = &attribute;
  config.numAttrs = enable_pdl && JITNORM_CUDA_ARCH >= 90;
  void* arguments[] = {const_cast<typename Kernel::params_t*>(&params)};
  const GridLength length = config.gridDimX <= Kernel::kShortGrid  ? GridLength::kShort
                            : config.gridDimX >= Kernel::kLongGrid ? GridLength::kLong
                                                                   : GridLength::kAny;
  CUfunction kernel = gpu.functions[int(length)];
  DeviceGuard guard(gpu.device, gpu.context);
  CUresult result = driver().launch(&config, kernel, arguments, nullptr);
  if (result == CUDA_SUCCESS) return Outcome::kDone;
  const char* why = "unknown error";
  driver().error_string(result, &why);
  return raise("cannot launch", why);
}

}  // namespace jitnorm
#endif
