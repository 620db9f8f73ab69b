// RMSNormWarpKernel<128, bf16_t, bf16_t> for sm_90a
#include "elementwise/rmsnorm.cuh"

namespace jitnorm {
using Kernel = RMSNormWarpKernel<128, bf16_t, bf16_t>;
}

JITNORM_CUDA_MODULE(rmsnorm, rmsnorm_128_bf16, jitnorm::Kernel)
