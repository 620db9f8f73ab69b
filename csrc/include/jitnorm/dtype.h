// Element types by name and size only. How they convert to float is the business of vector.h (CUDA) and simd.h (host):
// cuda_bf16.h and cuda_fp16.h would double the time it takes to compile a kernel.
#pragma once

#ifdef __CUDACC__  // what kernels of both sides call
#define JITNORM_ANYWHERE __device__ __forceinline__
#else
#define JITNORM_ANYWHERE inline
#endif

namespace jitnorm {

using index_t = long long;  // row numbers and strides, in elements: 2^31 of them are not enough

struct bf16_t {
  unsigned short bits;
};

struct fp16_t {
  unsigned short bits;
};

}  // namespace jitnorm
