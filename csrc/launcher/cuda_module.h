// A kernel that is in a cubin: loading it into the driver, and its launches.
#pragma once
#include <tvm/ffi/extra/c_env_api.h>

#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"
#include "launcher/cuda_driver.h"

namespace jitnorm {

// One cubin and its functions. It lives until the process ends, since a call may run at any time.
class CudaModule {
 public:
  // `symbols` are the names of the functions, by GridVariant. The cubin and they must outlive the module.
  CudaModule(const void* cubin, const char* const (&symbols)[kNumGridVariants], const LaunchInfo& info)
      : cubin_(cubin), info_(info) {
    for (int i = 0; i < kNumGridVariants; i++) symbols_[i] = symbols[i];
  }

  // Whether the module was compiled for a device, as far as is known: its architecture is queried at the first launch.
  bool runs_on(DLDevice device) const {
    return device.device_type == kDLCUDA && device.device_id >= 0 && device.device_id < kMaxGpus &&
           __atomic_load_n(&gpus_[device.device_id].state, __ATOMIC_ACQUIRE) != Gpu::kOtherArch;
  }

  Outcome launch(const void* params, const Grid& grid, GridVariant variant, DLDevice device, bool enable_pdl) {
    Gpu& gpu = gpus_[device.device_id];
    if (__atomic_load_n(&gpu.state, __ATOMIC_ACQUIRE) != Gpu::kReady) {
      if (const char* why = prepare(gpu, device.device_id)) return raise_error("cannot load", why);
      if (gpu.state == Gpu::kOtherArch) return Outcome::kRefused;
    }
    if (grid.x > kMaxGridX) return raise_error("cannot launch", "more rows than a grid has blocks for");
    LaunchAttribute attributes[2];
    unsigned num_attributes = 0;
    if (enable_pdl && info_.arch >= 90) {  // PDL begins with sm_90
      attributes[num_attributes].id = kProgrammaticStreamSerialization;
      attributes[num_attributes++].value[0] = 1;
    }
    if (info_.blocks_per_cluster > 1) {
      LaunchAttribute& attribute = attributes[num_attributes++];
      attribute.id = kClusterDimension;
      attribute.value[0] = info_.blocks_per_cluster;
      attribute.value[1] = attribute.value[2] = 1;
    }
    LaunchConfig config{};
    config.grid_x = static_cast<unsigned>(grid.x);
    config.grid_y = grid.y;
    config.grid_z = grid.z;
    config.block_x = grid.threads_x;
    config.block_y = grid.threads_y;
    config.block_z = 1;
    config.shared_bytes = info_.shared_bytes;
    config.stream = static_cast<CudaHandle>(TVMFFIEnvGetStream(kDLCUDA, device.device_id));
    config.attributes = attributes;
    config.num_attributes = num_attributes;
    void* arguments[] = {const_cast<void*>(params)};
    DeviceGuard guard(gpu.device, gpu.context);
    const CudaResult result = driver().launch(&config, gpu.functions[int(variant)], arguments, nullptr);
    return result == 0 ? Outcome::kDone : raise_error("cannot launch", message_of(result));
  }

 private:
  // The state of one GPU. Two threads may call prepare() at once; both write the same values.
  struct Gpu {
    enum State : int { kUnprepared = 0, kReady, kOtherArch };
    int state;
    CudaDevice device;
    CudaHandle context;
    CudaHandle functions[kNumGridVariants];  // in this context, by GridVariant
  };

  // Kernels (CUkernel) belong to no context; each context has its own function (CUfunction) of one.
  struct Loaded {
    CudaHandle kernels[kNumGridVariants] = {};  // by GridVariant
    CudaResult result;
  };

  bool has(GridVariant variant) const {
    return variant == GridVariant::kSmallGrid   ? info_.max_small_grid != kNoSmallGrid
           : variant == GridVariant::kLargeGrid ? info_.min_large_grid != kNoLargeGrid
                                                : true;
  }

  static const char* message_of(CudaResult result) {
    const char* message = "unknown error";
    driver().error_string(result, &message);
    return message;
  }

  Outcome raise_error(const char* what, const char* why) const {
    char message[512];
    __builtin_snprintf(message, sizeof message, "jitnorm: %s %s: %s", what, symbols_[int(GridVariant::kDefault)], why);
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
    return Outcome::kRaised;
  }

  // Two threads may load the cubin at the same time: what one of them stored is used by both.
  const Loaded& load() {
    Loaded* stored = __atomic_load_n(&loaded_, __ATOMIC_ACQUIRE);
    if (stored) return *stored;
    Loaded* loaded = new Loaded;
    CudaHandle library = nullptr;
    loaded->result = driver().library_load(&library, cubin_, nullptr, nullptr, 0, nullptr, nullptr, 0);
    for (int i = 0; i < kNumGridVariants; i++)
      if (has(GridVariant(i)) && loaded->result == 0)
        loaded->result = driver().library_kernel(&loaded->kernels[i], library, symbols_[i]);
    if (loaded->result != 0) return *loaded;  // the next call tries again
    if (__atomic_compare_exchange_n(&loaded_, &stored, loaded, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      return *loaded;
    return *stored;
  }

  // Makes the function of a kernel for the current context. Without the attribute, a block has 48 KiB at most, and
  // dynamic and static shared memory count together.
  CudaResult get_function(CudaHandle kernel, CudaHandle* function) const {
    const CudaResult result = driver().kernel_function(function, kernel);
    if (result != 0 || info_.shared_bytes == 0) return result;
    return driver().set_function_attribute(*function, kMaxDynamicSharedBytes, int(info_.shared_bytes));
  }

  // Loads the functions for one GPU; returns why it cannot, or null. This may happen inside a graph capture: nothing
  // here is an operation of the captured stream.
  [[gnu::cold, gnu::noinline]] const char* prepare(Gpu& gpu, int index) {
    const Driver& d = driver();
    if (!d.handle) return "there is no CUDA driver (libcuda.so.1)";
    if (d.missing) return "the CUDA driver is older than 12.0";
    int major = 0, minor = 0;
    int mode = kRelaxedCapture;
    CudaResult result = d.device_get(&gpu.device, index);
    auto attribute = [&](int* value, int name) {
      if (result == 0) result = d.device_attribute(value, name, gpu.device);
    };
    attribute(&major, kComputeCapabilityMajor);
    attribute(&minor, kComputeCapabilityMinor);
    if (result == 0 && unsigned(major * 10 + minor) != info_.arch) {
      __atomic_store_n(&gpu.state, Gpu::kOtherArch, __ATOMIC_RELEASE);
      return nullptr;
    }
    if (result == 0) result = d.primary_retain(&gpu.context, gpu.device);
    if (result == 0) {
      DeviceGuard guard(gpu.device, gpu.context);
      d.exchange_capture_mode(&mode);
      const Loaded& loaded = load();
      result = loaded.result;
      for (int i = 0; i < kNumGridVariants; i++)
        if (loaded.kernels[i] && result == 0) result = get_function(loaded.kernels[i], &gpu.functions[i]);
      d.exchange_capture_mode(&mode);
    }
    if (result != 0) return message_of(result);
    __atomic_store_n(&gpu.state, Gpu::kReady, __ATOMIC_RELEASE);
    return nullptr;
  }

  const void* cubin_;
  const char* symbols_[kNumGridVariants];
  LaunchInfo info_;
  Loaded* loaded_ = nullptr;
  Gpu gpus_[kMaxGpus] = {};
};

}  // namespace jitnorm
