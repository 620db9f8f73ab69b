// RMSNorm of the heads of q and k, in place: the parameters that every kernel class takes and, for the host compiler,
// the glue that fills them in.
#pragma once
#include "jitnorm/divide.h"
#include "jitnorm/dtype.h"

namespace jitnorm {

constexpr index_t kMostRows = 0x7fffffff;  // that can be divided by a number of heads

// A row is a head of a token. Rows count through the heads of q and k of the first token, then of the next.
struct QKNormParams {
  void* q;
  void* k;
  const void* q_weight;
  const void* k_weight;
  index_t q_stride;  // from token to token, in elements, like the other strides
  index_t k_stride;
  index_t q_head_stride;
  index_t k_head_stride;
  UnsignedDivisor heads;  // of q and k together
  unsigned num_heads;
  unsigned num_q_heads;
  float eps;
  index_t num_tokens;  // as launch() counts them: rows
};

// Where a row lies, and its weight.
template <typename T, typename W>
struct Head {
  T* row;
  const W* weight;
};

template <typename T, typename W>
JITNORM_ANYWHERE Head<T, W> head_of(const QKNormParams& p, unsigned row) {
  const unsigned token = quotient(row, p.heads), head = row - token * p.num_heads;
  const bool of_q = head < p.num_q_heads;
  const index_t to_token = token * (of_q ? p.q_stride : p.k_stride);
  const index_t to_head = (of_q ? head : head - p.num_q_heads) * (of_q ? p.q_head_stride : p.k_head_stride);
  return {static_cast<T*>(of_q ? p.q : p.k) + to_token + to_head,
          static_cast<const W*>(of_q ? p.q_weight : p.k_weight)};
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/ffi.h"

namespace jitnorm {

// q or k, [tokens, heads, head_dim]. Strides along a dimension of one element say nothing, and are 0 here.
struct Heads {
  char* data;
  index_t tokens, heads, stride, head_stride;
  index_t width;    // elements from the first of a token to the end of its last head
  const char* end;  // one past the last byte
};

// False where `tensor` is no such thing, where its rows share memory with each other, or lie where a kernel cannot
// reach them.
template <typename Kernel>
bool as_heads(const DLTensor* tensor, Heads* to) {
  using T = typename Kernel::input_t;
  constexpr index_t size = sizeof(T), head_dim = Kernel::kHiddenSize;
  if (!tensor || tensor->ndim != 3 || !has_dtype<T>(*tensor) || tensor->shape[2] != head_dim || tensor->strides[2] != 1)
    return false;
  const index_t tokens = tensor->shape[0], heads = tensor->shape[1];
  const index_t stride = tokens > 1 ? tensor->strides[0] : 0, head_stride = heads > 1 ? tensor->strides[1] : 0;
  char* data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  const index_t width = (heads - 1) * head_stride + head_dim, length = (tokens - 1) * stride + head_dim;
  *to = {data, tokens, heads, stride, head_stride, width, data + ((tokens - 1) * stride + width) * size};
  if (tokens == 0 || heads == 0) return true;
  const bool apart = (tokens == 1 || stride >= head_dim) && (heads == 1 || head_stride >= head_dim) &&
                     (tokens == 1 || heads == 1 || stride >= width || head_stride >= length);
  return apart && tensor->data && reinterpret_cast<uintptr_t>(data) % Kernel::kAlignment == 0 &&
         stride * size % Kernel::kAlignment == 0 && head_stride * size % Kernel::kAlignment == 0;
}

// Whether the two share memory. Exact where the tokens of one lie between those of the other, as in a fused projection;
// elsewhere, extents that meet count as shared.
template <typename T>
bool overlap(const Heads& q, const Heads& k) {
  constexpr index_t size = sizeof(T);
  if (!q.heads || !k.heads || q.end <= k.data || k.end <= q.data) return false;
  if (q.stride != k.stride || q.stride == 0) return true;
  const index_t step = q.stride * size, offset = ((k.data - q.data) % step + step) % step;
  return offset < q.width * size || offset + k.width * size > step;
}

// Whether a kernel may write `heads` while it reads `weight`.
inline bool writable(const Heads& heads, const Rows& weight) {
  return !heads.heads || heads.end <= weight.data || weight.end <= heads.data;
}

inline bool as_head_dim(const TVMFFIAny& arg, index_t head_dim) {
  return arg.type_index == kTVMFFIInt && (arg.v_int64 == 0 || arg.v_int64 == head_dim);
}

// fused_inplace_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl): jitnorm.qknorm_ops.check says in words
// what is refused here.
template <typename Kernel>
Outcome fused_inplace_qknorm(const TVMFFIAny* args, int num_args) {
  using T = typename Kernel::input_t;
  if (num_args != 7) return Outcome::kRefused;
  const DLTensor *queries = as_tensor(args[0]), *keys = as_tensor(args[1]);
  const DLTensor *of_queries = as_tensor(args[2]), *of_keys = as_tensor(args[3]);
  Heads q, k;
  Rows q_weight, k_weight;
  double eps;
  bool enable_pdl;
  if (!as_heads<Kernel>(queries, &q) || !as_heads<Kernel>(keys, &k) || q.tokens != k.tokens ||
      !as_weight<Kernel>(of_queries, &q_weight) || !as_weight<Kernel>(of_keys, &k_weight) || !as_float(args[4], &eps) ||
      !(eps >= 0) || !as_head_dim(args[5], Kernel::kHiddenSize) || !as_optional_bool(args[6], true, &enable_pdl) ||
      !same_device(*queries, *keys) || !same_device(*queries, *of_queries) || !same_device(*queries, *of_keys) ||
      !runs_on(Kernel{}, queries->device))
    return Outcome::kRefused;
  const index_t heads = q.heads + k.heads, rows = q.tokens * heads;
  if (rows == 0) return Outcome::kDone;
  if (rows > kMostRows || overlap<T>(q, k) || !writable(q, q_weight) || !writable(q, k_weight) ||
      !writable(k, q_weight) || !writable(k, k_weight))
    return Outcome::kRefused;
  QKNormParams params{
      q.data,        k.data,        q_weight.data,     k_weight.data,   q.stride,          k.stride,
      q.head_stride, k.head_stride, divisor_of(heads), unsigned(heads), unsigned(q.heads), static_cast<float>(eps),
      rows};
  return launch(Kernel{}, params, queries->device, enable_pdl);
}

}  // namespace jitnorm
#endif
