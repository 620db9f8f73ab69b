// The tensor core instruction of kernels that load its operands themselves. Device code, from sm_80 on.
#pragma once
#include "jitnorm/dtype.h"

namespace jitnorm {

// sum += a b for a matrix a [16, 16] and a matrix b [16, 8]. With group = lane / 4 and quad = lane % 4, a thread has of
// a: a0 and a2 of row group, a1 and a3 of row group + 8, and of b: column group. a0, a1 and b0 are the elements 2 quad
// and 2 quad + 1, a2, a3 and b1 these plus 8; which element is which does not matter, as long as it is the same in
// both. Of the sum it has the columns 2 quad and 2 quad + 1, of row group and of row group + 8.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                             unsigned b0, unsigned b1) {
  static_assert(kIsBf16<T> || kIsSame<T, fp16_t>, "a and b are bf16 or fp16");
  if constexpr (kIsBf16<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace jitnorm
