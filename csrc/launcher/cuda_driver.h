// The functions of the CUDA driver that a launch needs, opened with dlopen, so that the launcher also loads on a host
// without a driver. The driver's C interface is stable. The part that is used is declared here, so that the launcher is
// built without a CUDA toolkit; tests/jit/test_launcher.py compares it with cuda.h.
#pragma once
#include <dlfcn.h>
#include <stddef.h>

// glibc 2.34 moved these functions: by their older versions the launcher also loads with an older glibc.
#if defined(__GLIBC__) && defined(__x86_64__)
asm(".symver dlopen, dlopen@GLIBC_2.2.5\n.symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
asm(".symver dlopen, dlopen@GLIBC_2.17\n.symver dlsym, dlsym@GLIBC_2.17");
#endif

namespace jitnorm {

using CudaResult = int;                 // CUresult
using CudaDevice = int;                 // CUdevice
using CudaHandle = struct CudaObject*;  // CUcontext, CUlibrary, CUkernel, CUfunction or CUstream

enum { kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76 };   // CUdevice_attribute
enum { kMaxDynamicSharedBytes = 8 };                                   // CUfunction_attribute
enum { kRelaxedCapture = 2 };                                          // CUstreamCaptureMode
enum { kClusterDimension = 4, kProgrammaticStreamSerialization = 6 };  // CUlaunchAttributeID
enum { kTensorMapUint16 = 1 };                                         // CUtensorMapDataType
enum { kTensorMapSwizzle128B = 3 };                                    // CUtensorMapSwizzle
enum { kTensorMapPromotion128B = 2 };                                  // CUtensorMapL2promotion

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  alignas(8) unsigned value[16];
};

struct LaunchConfig {  // CUlaunchConfig
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CudaHandle stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

struct Driver {
  void* handle = dlopen("libcuda.so.1", RTLD_NOW);
  const char* missing = nullptr;  // a function that the driver lacks
  CudaResult (*error_string)(CudaResult, const char**) = find("cuGetErrorString");
  CudaResult (*device_get)(CudaDevice*, int) = find("cuDeviceGet");
  CudaResult (*device_attribute)(int*, int, CudaDevice) = find("cuDeviceGetAttribute");
  CudaResult (*primary_retain)(CudaHandle*, CudaDevice) = find("cuDevicePrimaryCtxRetain");
  CudaResult (*current_device)(CudaDevice*) = find("cuCtxGetDevice");
  CudaResult (*push_context)(CudaHandle) = find("cuCtxPushCurrent_v2");
  CudaResult (*pop_context)(CudaHandle*) = find("cuCtxPopCurrent_v2");
  CudaResult (*exchange_capture_mode)(int*) = find("cuThreadExchangeStreamCaptureMode");
  CudaResult (*library_load)(CudaHandle*, const void*, void*, void*, unsigned, void*, void*,
                             unsigned) = find("cuLibraryLoadData");
  CudaResult (*library_kernel)(CudaHandle*, CudaHandle, const char*) = find("cuLibraryGetKernel");
  CudaResult (*kernel_function)(CudaHandle*, CudaHandle) = find("cuKernelGetFunction");
  CudaResult (*set_function_attribute)(CudaHandle, int, int) = find("cuFuncSetAttribute");
  CudaResult (*launch)(const LaunchConfig*, CudaHandle, void**, void**) = find("cuLaunchKernelEx");
  CudaResult (*encode_tensor_map)(void*, int, unsigned, void*, const unsigned long long*, const unsigned long long*,
                                  const unsigned*, const unsigned*, int, int, int,
                                  int) = find("cuTensorMapEncodeTiled");

  // A symbol, which converts to any pointer to a function.
  struct Symbol {
    void* address;
    template <typename F>
    operator F() const {
      return reinterpret_cast<F>(address);
    }
  };

  Symbol find(const char* name) {
    void* symbol = handle ? dlsym(handle, name) : nullptr;
    if (!symbol && !missing) missing = name;
    return {symbol};
  }
};

inline const Driver& driver() {
  static const Driver functions;
  return functions;
}

// Makes a device current until the end of the scope. Costs one query if the device is current already.
class DeviceGuard {
 public:
  DeviceGuard(CudaDevice device, CudaHandle context) {
    CudaDevice current;
    if (driver().current_device(&current) == 0 && current == device) return;
    pushed_ = driver().push_context(context) == 0;
  }
  ~DeviceGuard() {
    CudaHandle popped;
    if (pushed_) driver().pop_context(&popped);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

}  // namespace jitnorm
