// RMSNormKernel<4096, bf16_t, bf16_t> for cpu_x86_64
#include "elementwise/rmsnorm_cpu.h"

namespace jitnorm {
using Kernel = RMSNormKernel<4096, bf16_t, bf16_t>;
}

JITNORM_EXPORT(__tvm_ffi_rmsnorm, (jitnorm::call<jitnorm::CpuKernel<jitnorm::Kernel>, jitnorm::rmsnorm<jitnorm::CpuKernel<jitnorm::Kernel>>>))
JITNORM_EXPORT(__tvm_ffi_rmsnorm_fast_path, (jitnorm::call_fast_path<jitnorm::CpuKernel<jitnorm::Kernel>, jitnorm::rmsnorm<jitnorm::CpuKernel<jitnorm::Kernel>>>))
