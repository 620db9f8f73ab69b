// RMSNormKernel<4096, bf16_t, bf16_t> for cpu_x86_64
#include "elementwise/rmsnorm_cpu.h"

namespace jitnorm {
using Kernel = RMSNormKernel<4096, bf16_t, bf16_t>;
}

JITNORM_CPU_MODULE(rmsnorm, jitnorm::Kernel)
