// RMSNormWarpKernel<128, bf16_t, bf16_t> for sm_90a
#include "elementwise/rmsnorm.cuh"

namespace jitnorm {
using Kernel = RMSNormWarpKernel<128, bf16_t, bf16_t>;
}

JITNORM_DEFINE_INFO(jitnorm::Kernel)
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16, jitnorm::Kernel, jitnorm::GridVariant::kDefault)
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16_small_grid, jitnorm::Kernel, jitnorm::GridVariant::kSmallGrid)
JITNORM_DEFINE_KERNEL(rmsnorm_128_bf16_large_grid, jitnorm::Kernel, jitnorm::GridVariant::kLargeGrid)
