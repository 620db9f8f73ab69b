// RMSNorm of the heads of q and k, in place: the parameter struct of the kernel classes and, for the host compiler, the
// bindings function that fills it in. Included by qknorm.cuh and qknorm_cpu.h.
#pragma once
#include "jitnorm/divisor.h"
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// A row is one head of one token. Rows are numbered token by token: the heads of q, then those of k.
struct QKNormParams {
  void* q;
  void* k;
  const void* q_weight;
  const void* k_weight;
  index_t q_stride;  // from token to token, in elements, like the other strides
  index_t k_stride;
  index_t q_head_stride;
  index_t k_head_stride;
  UnsignedDivisor heads_divisor;  // divides by num_heads
  unsigned num_heads;             // of q and k together
  unsigned num_q_heads;
  float eps;
  index_t num_rows;
};

struct QKNormInfo {
  LaunchInfo launch;
  ElementType input, weight;
  unsigned alignment;
  int hidden_size;  // that of a row: head_dim
  int rows_per_block;

  template <typename Kernel>
  static constexpr QKNormInfo of() {
    QKNormInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.weight = kElementType<typename Kernel::weight_t>;
    info.alignment = Kernel::kAlignment;
    info.hidden_size = Kernel::kHiddenSize;
    info.rows_per_block = Kernel::kRowsPerBlock;
    return info;
  }
};

// The address of a row, and its weight.
template <typename T, typename W>
struct Head {
  T* row;
  const W* weight;
};

template <typename T, typename W>
JITNORM_HOST_DEVICE Head<T, W> head_of(const QKNormParams& p, unsigned row) {
  const unsigned token = quotient(row, p.heads_divisor), head = row - token * p.num_heads;
  const bool is_q = head < p.num_q_heads;
  const index_t token_offset = token * (is_q ? p.q_stride : p.k_stride);
  const index_t head_offset = (is_q ? head : head - p.num_q_heads) * (is_q ? p.q_head_stride : p.k_head_stride);
  return {static_cast<T*>(is_q ? p.q : p.k) + token_offset + head_offset,
          static_cast<const W*>(is_q ? p.q_weight : p.k_weight)};
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"
#include "jitnorm/grid.h"

namespace jitnorm {

inline Grid grid_of(const QKNormInfo& info, const QKNormParams& params) {
  return grid_of_blocks(params.num_rows, info.rows_per_block, info.launch.threads);
}

constexpr index_t kMaxRows = kMaxDividend;

// q or k, [tokens, heads, head_dim]. A dimension of one element may have any stride; here it has the stride 0.
struct Heads {
  char* data;
  index_t tokens, heads, stride, head_stride;
  index_t width;    // elements from the first of a token to the end of its last head
  const char* end;  // one past the last byte
};

// False if `tensor` has another rank, type or head_dim, rows that share memory, no storage, or rows that are not
// adjacent elements, aligned.
inline bool as_heads(const DLTensor* tensor, const QKNormInfo& info, Heads* result) {
  const index_t size = info.input.bytes(), head_dim = info.hidden_size;
  if (!tensor || tensor->ndim != 3 || !has_type(*tensor, info.input) || tensor->shape[2] != head_dim ||
      tensor->strides[2] != 1)
    return false;
  const index_t tokens = tensor->shape[0], heads = tensor->shape[1];
  const index_t stride = tokens > 1 ? tensor->strides[0] : 0, head_stride = heads > 1 ? tensor->strides[1] : 0;
  char* data = data_of(*tensor);
  const index_t width = (heads - 1) * head_stride + head_dim, length = (tokens - 1) * stride + head_dim;
  result->data = data;
  result->tokens = tokens;
  result->heads = heads;
  result->stride = stride;
  result->head_stride = head_stride;
  result->width = width;
  result->end = data + ((tokens - 1) * stride + width) * size;
  if (tokens == 0 || heads == 0) return true;
  const bool disjoint = (tokens == 1 || stride >= head_dim) && (heads == 1 || head_stride >= head_dim) &&
                        (tokens == 1 || heads == 1 || stride >= width || head_stride >= length);
  return disjoint && tensor->data && is_aligned(data, info.alignment) && is_aligned(stride * size, info.alignment) &&
         is_aligned(head_stride * size, info.alignment);
}

// Whether q and k share memory. Exact if both have the same stride from token to token, as in a fused projection, where
// tokens of q and k alternate. For different strides, overlapping extents count as shared memory.
inline bool heads_overlap(const Heads& q, const Heads& k, ElementType type) {
  const index_t size = type.bytes();
  if (!q.heads || !k.heads || q.end <= k.data || k.end <= q.data) return false;
  if (q.stride != k.stride || q.stride == 0) return true;
  const index_t step = q.stride * size, offset = ((k.data - q.data) % step + step) % step;
  return offset < q.width * size || offset + k.width * size > step;
}

// Whether a kernel may write `heads` while it reads `weight`.
inline bool is_writable(const Heads& heads, const Rows& weight) {
  return !heads.heads || heads.end <= weight.data || weight.end <= heads.data;
}

inline bool as_head_dim(const TVMFFIAny& arg, index_t head_dim) {
  return arg.type_index == kTVMFFIInt && (arg.v_int64 == 0 || arg.v_int64 == head_dim);
}

// fused_inplace_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl); head_dim 0 means q's.
// src/jitnorm/qknorm.py explains refused calls.
template <typename Kernel>
Outcome fused_inplace_qknorm(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const QKNormInfo& info = kernel.info();
  if (num_args != 7) return Outcome::kRefused;
  const DLTensor *q = as_tensor(args[0]), *k = as_tensor(args[1]);
  const DLTensor *q_weight = as_tensor(args[2]), *k_weight = as_tensor(args[3]);
  Heads q_heads, k_heads;
  Rows q_weight_row, k_weight_row;
  double eps;
  bool enable_pdl;
  if (!as_heads(q, info, &q_heads) || !as_heads(k, info, &k_heads) || q_heads.tokens != k_heads.tokens ||
      !as_weight(q_weight, info, &q_weight_row) || !as_weight(k_weight, info, &k_weight_row) ||
      !as_float(args[4], &eps) || !(eps >= 0) || !as_head_dim(args[5], info.hidden_size) ||
      !as_optional_bool(args[6], true, &enable_pdl) || !same_device(*q, *k) || !same_device(*q, *q_weight) ||
      !same_device(*q, *k_weight) || !kernel.runs_on(q->device))
    return Outcome::kRefused;
  const index_t heads = q_heads.heads + k_heads.heads, rows = q_heads.tokens * heads;
  if (rows == 0) return Outcome::kDone;
  if (rows > kMaxRows || heads_overlap(q_heads, k_heads, info.input) || !is_writable(q_heads, q_weight_row) ||
      !is_writable(q_heads, k_weight_row) || !is_writable(k_heads, q_weight_row) || !is_writable(k_heads, k_weight_row))
    return Outcome::kRefused;
  QKNormParams params{};
  params.q = q_heads.data;
  params.k = k_heads.data;
  params.q_weight = q_weight_row.data;
  params.k_weight = k_weight_row.data;
  params.q_stride = q_heads.stride;
  params.k_stride = k_heads.stride;
  params.q_head_stride = q_heads.head_stride;
  params.k_head_stride = k_heads.head_stride;
  params.heads_divisor = divisor_of(heads);
  params.num_heads = static_cast<unsigned>(heads);
  params.num_q_heads = static_cast<unsigned>(q_heads.heads);
  params.eps = static_cast<float>(eps);
  params.num_rows = rows;
  return kernel.launch(params, q->device, enable_pdl);
}

}  // namespace jitnorm
#endif
