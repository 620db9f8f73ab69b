// RMSNormWarpKernel<128, bf16_t, bf16_t> for sm_90a
#include "elementwise/rmsnorm.cuh"

namespace jitnorm {
using Kernel = RMSNormWarpKernel<128, bf16_t, bf16_t>;
}

#ifdef __CUDACC__
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16, jitnorm::Kernel, jitnorm::GridVariant::kDefault)
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16_small_grid, jitnorm::Kernel, jitnorm::GridVariant::kSmallGrid)
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16_large_grid, jitnorm::Kernel, jitnorm::GridVariant::kLargeGrid)
#else
const char* const jitnorm::kKernelSymbols[] = {"rmsnorm_128_bf16", "rmsnorm_128_bf16_small_grid", "rmsnorm_128_bf16_large_grid"};
JITNORM_EXPORT(__tvm_ffi_rmsnorm, jitnorm::rmsnorm<jitnorm::Kernel>)
JITNORM_EXPORT(__tvm_ffi_rmsnorm_fast_path, jitnorm::fast_path<jitnorm::rmsnorm<jitnorm::Kernel>>)
#endif
