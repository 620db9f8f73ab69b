// Attention of one new token of each sequence to its keys and values, paged or masked: the parameter struct of the
// kernel class and, for the host compiler, the bindings functions that fill it in. Included by decode_attention.cuh.
#pragma once
#include "jitnorm/divisor.h"
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// The tokens of a warp's step. Block sizes of caches are multiples of it, so that a step stays within one block of the
// cache, which is called a page here.
constexpr int kTokensPerStep = 16;
// So that sums of a length and a few steps do not overflow.
constexpr index_t kMaxTokens = 1 << 30;

struct DecodeAttentionParams {
  const char* q;
  const char* k_cache;
  const char* v_cache;
  char* out;
  const int* block_table;  // if paged, as seq_lens
  const int* seq_lens;
  float* partial_sums;   // [sequences, kv_heads, max_splits, group_size, head_dim]
  float* partial_stats;  // [sequences, kv_heads, max_splits, group_size, 2]: the maximum, and the sum of exponentials
  unsigned* counters;    // [sequences, kv_heads], 0 between calls
  index_t q_stride;      // from sequence to sequence, in bytes, like all strides but that of the table
  index_t q_head_stride;
  index_t out_stride;
  index_t out_head_stride;
  index_t k_block_stride;
  index_t k_token_stride;
  index_t k_head_stride;
  index_t v_block_stride;
  index_t v_token_stride;
  index_t v_head_stride;
  index_t table_stride;           // in elements
  UnsignedDivisor head_divisor;   // divides by num_kv_heads
  UnsignedDivisor block_divisor;  // divides by block_size
  unsigned num_sequences;
  unsigned num_kv_heads;
  unsigned block_size;
  unsigned max_splits;            // of a sequence
  unsigned max_tokens_per_split;  // unless a sequence has max_splits
  unsigned grid_blocks;
  int max_tokens;             // that the table has blocks for
  int window;                 // the tokens that a query attends to, its own included; 0 for all
  float scale;                // of the logits, times log2(e)
  const unsigned char* mask;  // if masked: [sequences, tokens], not 0 for a token that the query sees
  const int* ranges;          // if masked: [sequences, 2], the first token that it sees and the one after the last
  index_t mask_stride;
};

struct DecodeAttentionInfo {
  LaunchInfo launch;
  ElementType input;
  unsigned alignment;
  int head_dim;
  int group_size;  // query heads of a head of k and v
  int blocks_per_sm;

  template <typename Kernel>
  static constexpr DecodeAttentionInfo of() {
    DecodeAttentionInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.alignment = Kernel::kAlignment;
    info.head_dim = Kernel::kHeadDim;
    info.group_size = Kernel::kGroupSize;
    info.blocks_per_sm = Kernel::kMinBlocksPerSM;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/grid.h"
#include "jitnorm/integers.h"
#include "jitnorm/strided.h"

namespace jitnorm {

inline Grid grid_of(const DecodeAttentionInfo& info, const DecodeAttentionParams& params) {
  return grid_of_blocks(params.grid_blocks, 1, info.launch.threads);
}

// Fills in what does not depend on where the tokens are. `plan` has max_splits, max_tokens_per_split, num_sms and
// scale. The caches have four dimensions, of which `token_dim` is that of tokens, the first the pages or sequences, the
// last the elements, and the other the heads. Returns false if the kernel does not take these arguments.
inline bool set_heads(const DecodeAttentionInfo& info, const DLTensor* q, const DLTensor* k_cache,
                      const DLTensor* v_cache, const DLTensor* out, const DLTensor* partials, const DLTensor* counters,
                      const TVMFFIAny* plan, int token_dim, StridedRows* out_rows, DecodeAttentionParams* params) {
  StridedRows q_rows, k_rows, v_rows;
  index_t max_splits, max_tokens_per_split, num_sms;
  double scale;
  auto as_heads = [&](const DLTensor* tensor, int dims, StridedRows* rows) {
    return as_strided_rows(tensor, info.input, info.head_dim, info.alignment, rows) && tensor->ndim == dims &&
           same_device(*tensor, *q);
  };
  if (!as_heads(q, 3, &q_rows) || !as_heads(k_cache, 4, &k_rows) || !as_heads(v_cache, 4, &v_rows) ||
      !as_heads(out, 3, out_rows) || !same_shape(*q, *out) || !same_shape(*k_cache, *v_cache) ||
      !is_integers(counters, 32, 1, q->device) || !as_int(plan[0], &max_splits) ||
      !as_int(plan[1], &max_tokens_per_split) || !as_int(plan[2], &num_sms) || !as_float(plan[3], &scale))
    return false;
  const int kv_head_dim = 3 - token_dim;
  const index_t sequences = q->shape[0], heads = q->shape[1], kv_heads = k_cache->shape[kv_head_dim];
  const index_t items = sequences * kv_heads;
  Rows partial_elements;
  if (heads != kv_heads * info.group_size || k_rows.is_empty || counters->shape[0] < items || max_splits < 1 ||
      max_splits > kMaxDividend || max_tokens_per_split < 1 || max_tokens_per_split > kMaxDividend || num_sms < 1 ||
      items * max_splits > kMaxDividend || !partials || !same_device(*partials, *q) ||
      !as_elements(partials, kElementType<float>, items * max_splits * info.group_size * (info.head_dim + 2), 16,
                   &partial_elements) ||
      !rows_are_disjoint(*out_rows) || share_memory(*out_rows, q_rows) || share_memory(*out_rows, k_rows) ||
      share_memory(*out_rows, v_rows))
    return false;
  params->q = q_rows.data;
  params->k_cache = k_rows.data;
  params->v_cache = v_rows.data;
  params->out = out_rows->data;
  params->partial_sums = reinterpret_cast<float*>(partial_elements.data);
  params->partial_stats = params->partial_sums + items * max_splits * info.group_size * info.head_dim;
  params->counters = elements_of<unsigned>(*counters);
  params->q_stride = q_rows.strides[0];
  params->q_head_stride = q_rows.strides[2];
  params->out_stride = out_rows->strides[0];
  params->out_head_stride = out_rows->strides[2];
  params->k_block_stride = k_rows.strides[0];
  params->k_token_stride = k_rows.strides[token_dim];
  params->k_head_stride = k_rows.strides[kv_head_dim];
  params->v_block_stride = v_rows.strides[0];
  params->v_token_stride = v_rows.strides[token_dim];
  params->v_head_stride = v_rows.strides[kv_head_dim];
  params->head_divisor = divisor_of(static_cast<unsigned>(kv_heads));
  params->num_sequences = static_cast<unsigned>(sequences);
  params->num_kv_heads = static_cast<unsigned>(kv_heads);
  params->max_splits = static_cast<unsigned>(max_splits);
  params->max_tokens_per_split = static_cast<unsigned>(max_tokens_per_split);
  params->scale = static_cast<float>(scale * 1.4426950408889634);
  const index_t resident = num_sms * info.blocks_per_sm;
  params->grid_blocks = static_cast<unsigned>(items * max_splits < resident ? items * max_splits : resident);
  return true;
}

// decode_attention(q, k_cache, v_cache, block_table, seq_lens, out, partials, counters, max_splits,
// max_tokens_per_split, num_sms, scale, window, enable_pdl), and masked_decode_attention(q, k, v, mask, ranges, out,
// partials, counters, max_splits, max_tokens_per_split, num_sms, scale, enable_pdl).
// src/jitnorm/integrations/decode_attention.py describes the arguments.
template <typename Kernel>
Outcome decode_attention(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 14) return Outcome::kRefused;
  const DLTensor* tensors[8];
  for (int i = 0; i < 8; i++) tensors[i] = as_tensor(args[i]);
  const auto& [q, k_cache, v_cache, table, seq_lens, out, partials, counters] = tensors;
  if (!q || !kernel.runs_on(q->device)) return Outcome::kRefused;
  const DLDevice device = q->device;
  StridedRows out_rows;
  DecodeAttentionParams params{};
  index_t window;
  bool enable_pdl;
  if (!set_heads(kernel.info(), q, k_cache, v_cache, out, partials, counters, args + 8, 1, &out_rows, &params) ||
      !is_integers(table, 32, 2, device) || !is_integers(seq_lens, 32, 1, device) || !as_int(args[12], &window) ||
      !as_optional_bool(args[13], true, &enable_pdl))
    return Outcome::kRefused;
  const index_t sequences = q->shape[0], block_size = k_cache->shape[1];
  if (block_size % kTokensPerStep || table->shape[0] != sequences || seq_lens->shape[0] != sequences ||
      (sequences > 1 && table->strides[0] < table->shape[1]) || table->shape[1] < 1 ||
      table->shape[1] > kMaxTokens / block_size || window < 0 || window > kMaxTokens ||
      share_memory(out_rows, as_one_row(*table)) || share_memory(out_rows, as_one_row(*seq_lens)))
    return Outcome::kRefused;
  if (out_rows.is_empty) return Outcome::kDone;
  params.block_table = elements_of<int>(*table);
  params.seq_lens = elements_of<int>(*seq_lens);
  params.table_stride = row_stride(*table);
  params.block_divisor = divisor_of(static_cast<unsigned>(block_size));
  params.block_size = static_cast<unsigned>(block_size);
  params.max_tokens = static_cast<int>(table->shape[1] * block_size);
  params.window = static_cast<int>(window);
  return kernel.launch(params, device, enable_pdl);
}

template <typename Kernel>
Outcome masked_decode_attention(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 13) return Outcome::kRefused;
  const DLTensor* tensors[8];
  for (int i = 0; i < 8; i++) tensors[i] = as_tensor(args[i]);
  const auto& [q, k, v, mask, ranges, out, partials, counters] = tensors;
  if (!q || !kernel.runs_on(q->device)) return Outcome::kRefused;
  const DLDevice device = q->device;
  StridedRows out_rows;
  DecodeAttentionParams params{};
  bool enable_pdl;
  if (!set_heads(kernel.info(), q, k, v, out, partials, counters, args + 8, 2, &out_rows, &params) ||
      !is_mask(mask, device) || !is_integers(ranges, 32, 2, device) || !as_optional_bool(args[12], true, &enable_pdl))
    return Outcome::kRefused;
  const index_t sequences = q->shape[0], tokens = k->shape[2];
  if (k->shape[0] != sequences || mask->shape[0] != sequences || mask->shape[1] != tokens || tokens > kMaxTokens ||
      ranges->shape[0] != sequences || ranges->shape[1] != 2 || (sequences > 1 && ranges->strides[0] != 2) ||
      share_memory(out_rows, as_one_row(*mask)) || share_memory(out_rows, as_one_row(*ranges)))
    return Outcome::kRefused;
  if (out_rows.is_empty) return Outcome::kDone;
  params.mask = elements_of<unsigned char>(*mask);
  params.mask_stride = row_stride(*mask);
  params.ranges = elements_of<int>(*ranges);
  return kernel.launch(params, device, enable_pdl);
}

}  // namespace jitnorm
#endif
