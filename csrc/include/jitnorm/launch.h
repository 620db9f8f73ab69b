// Launches of CUDA kernels, through the driver API. Included by every elementwise/<family>.cuh; nvcc skips it.
//
// A library contains the cubin in its read-only data and loads it into the driver at the first call. So a build needs
// no host pass of nvcc and no CUDA runtime, and a launch has no overhead of the runtime. The driver is opened with
// dlopen, so that the library also loads on a host without a driver.
//
// A CUDA kernel class has params_t, kThreads and kMinBlocksPerSM for __launch_bounds__, kAlignment, a base or constants
// that say which GridVariants it has (cuda_kernel.h), grid(params), and run<variant>(params) on the device.
#pragma once
#ifndef __CUDACC__
#include <cuda.h>
#include <dlfcn.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "jitnorm/cuda_kernel.h"
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

extern "C" const char jitnorm_cubin[];  // linked in from kernel.cubin; see src/jitnorm/jit/spec.py

namespace jitnorm {

// The kernels' names in the cubin, by GridVariant. Defined by the generated source.
extern const char* const kKernelSymbols[kNumGridVariants];

inline Outcome raise_error(const char* what, const char* why) {
  char message[512];
  const char* symbol = kKernelSymbols[int(GridVariant::kDefault)];
  __builtin_snprintf(message, sizeof message, "jitnorm: %s %s: %s", what, symbol, why);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return Outcome::kRaised;
}

// The functions of the driver that a launch needs, looked up once. Their names are stringified after macro expansion,
// since cuda.h defines some as macros for versioned symbols, such as cuCtxPushCurrent_v2.
struct Driver {
#define JITNORM_STRINGIFY(x) #x
#define JITNORM_DRIVER_FUNCTION(FIELD, FUNCTION) \
  decltype(&::FUNCTION) FIELD = reinterpret_cast<decltype(&::FUNCTION)>(find(JITNORM_STRINGIFY(FUNCTION)));
  void* handle = dlopen("libcuda.so.1", RTLD_NOW);
  const char* missing = nullptr;
  JITNORM_DRIVER_FUNCTION(error_string, cuGetErrorString)
  JITNORM_DRIVER_FUNCTION(device_get, cuDeviceGet)
  JITNORM_DRIVER_FUNCTION(device_attribute, cuDeviceGetAttribute)
  JITNORM_DRIVER_FUNCTION(primary_retain, cuDevicePrimaryCtxRetain)
  JITNORM_DRIVER_FUNCTION(current_device, cuCtxGetDevice)
  JITNORM_DRIVER_FUNCTION(push_context, cuCtxPushCurrent)
  JITNORM_DRIVER_FUNCTION(pop_context, cuCtxPopCurrent)
  JITNORM_DRIVER_FUNCTION(exchange_capture_mode, cuThreadExchangeStreamCaptureMode)
  JITNORM_DRIVER_FUNCTION(library_load, cuLibraryLoadData)
  JITNORM_DRIVER_FUNCTION(library_kernel, cuLibraryGetKernel)
  JITNORM_DRIVER_FUNCTION(kernel_function, cuKernelGetFunction)
  JITNORM_DRIVER_FUNCTION(launch, cuLaunchKernelEx)
#undef JITNORM_DRIVER_FUNCTION
#undef JITNORM_STRINGIFY

  void* find(const char* name) {
    void* symbol = handle ? dlsym(handle, name) : nullptr;
    if (!symbol && !missing) missing = name;
    return symbol;
  }
};

inline const Driver& driver() {
  static const Driver functions;
  return functions;
}

// Makes a device current until the end of the scope. Costs one query if the device is current already.
class DeviceGuard {
 public:
  DeviceGuard(CUdevice device, CUcontext context) {
    CUdevice current;
    if (driver().current_device(&current) == CUDA_SUCCESS && current == device) return;
    pushed_ = driver().push_context(context) == CUDA_SUCCESS;
  }
  ~DeviceGuard() {
    CUcontext popped;
    if (pushed_) driver().pop_context(&popped);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

// The state of one GPU. Two threads may call prepare() at once; both write the same values.
struct Gpu {
  enum State : int { kUnprepared = 0, kReady, kOtherArch };
  int state;
  CUdevice device;
  CUcontext context;
  CUfunction functions[kNumGridVariants];  // the kernels in this context, by GridVariant
};

inline Gpu gpus[kMaxGpus];

// The loaded cubin. A CUkernel belongs to no context; each context has its own CUfunction of it.
struct LoadedCubin {
  CUlibrary library = nullptr;
  CUkernel kernels[kNumGridVariants] = {};  // by GridVariant
  CUresult result = driver().library_load(&library, jitnorm_cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);

  void find_kernel(GridVariant variant) {
    const int i = int(variant);
    if (result == CUDA_SUCCESS) result = driver().library_kernel(&kernels[i], library, kKernelSymbols[i]);
  }
};

template <typename Kernel>
const LoadedCubin& loaded_cubin() {
  static const LoadedCubin cubin = [] {
    LoadedCubin loaded;
    loaded.find_kernel(GridVariant::kDefault);
    if (kHasVariant<Kernel, GridVariant::kSmallGrid>) loaded.find_kernel(GridVariant::kSmallGrid);
    if (kHasVariant<Kernel, GridVariant::kLargeGrid>) loaded.find_kernel(GridVariant::kLargeGrid);
    return loaded;
  }();
  return cubin;
}

// Loads the kernels for one GPU; returns why it cannot, or null. This may happen inside a graph capture: nothing here
// is an operation of the captured stream.
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
    d.exchange_capture_mode(&mode);
    const LoadedCubin& cubin = loaded_cubin<Kernel>();
    result = cubin.result;
    for (int i = 0; i < kNumGridVariants; i++)
      if (cubin.kernels[i] && result == CUDA_SUCCESS) result = d.kernel_function(&gpu.functions[i], cubin.kernels[i]);
    d.exchange_capture_mode(&mode);
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
bool runs_on(DLDevice device) {
  return device.device_type == kDLCUDA && device.device_id >= 0 && device.device_id < kMaxGpus &&
         __atomic_load_n(&gpus[device.device_id].state, __ATOMIC_ACQUIRE) != Gpu::kOtherArch;
}

// The variant to launch: what the kernel class chooses, or else by the number of blocks.
template <typename Kernel>
auto variant_of(const typename Kernel::params_t& params, unsigned, int) -> decltype(Kernel::variant(params)) {
  return Kernel::variant(params);
}
template <typename Kernel>
GridVariant variant_of(const typename Kernel::params_t&, unsigned blocks, long) {
  return blocks <= Kernel::kMaxSmallGrid   ? GridVariant::kSmallGrid
         : blocks >= Kernel::kMinLargeGrid ? GridVariant::kLargeGrid
                                           : GridVariant::kDefault;
}

template <typename Kernel>
Outcome launch(const typename Kernel::params_t& params, DLDevice device, bool enable_pdl) {
  Gpu& gpu = gpus[device.device_id];
  if (__atomic_load_n(&gpu.state, __ATOMIC_ACQUIRE) != Gpu::kReady) {
    if (const char* why = prepare<Kernel>(gpu, device.device_id)) return raise_error("cannot load", why);
    if (gpu.state == Gpu::kOtherArch) return Outcome::kRefused;
  }
  const Grid grid = Kernel::grid(params);
  if (grid.x > kMaxGridX) return raise_error("cannot launch", "more rows than a grid has blocks for");
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
  config.numAttrs = enable_pdl && JITNORM_CUDA_ARCH >= 90;  // PDL begins with sm_90
  void* arguments[] = {const_cast<typename Kernel::params_t*>(&params)};
  const GridVariant variant = variant_of<Kernel>(params, config.gridDimX, 0);
  DeviceGuard guard(gpu.device, gpu.context);
  CUresult result = driver().launch(&config, gpu.functions[int(variant)], arguments, nullptr);
  if (result == CUDA_SUCCESS) return Outcome::kDone;
  const char* why = "unknown error";
  driver().error_string(result, &why);
  return raise_error("cannot launch", why);
}

}  // namespace jitnorm
#endif
