// The inputs of an engine's decode step: the parameter struct of the kernel class and, for the host compiler, the
// bindings function that fills it in. Included by decode_inputs.cuh.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// A request has a row in each tensor of state, at its state index, and a row in each tensor of the batch. Each request
// of the batch has one new token. Attention layers with caches of one kind are a group, with block tables of their own.
struct DecodeInputsParams {
  const int* state_indices;                // [requests]
  const int* num_computed_tokens;          // [states]
  const index_t* last_tokens;              // [states]
  const int* num_blocks;                   // [groups, states]
  const unsigned long long* state_tables;  // [groups]: addresses of int32 [states, table_strides[group]]
  const unsigned long long* batch_tables;  // likewise, [padded_requests, ...], written
  const index_t* table_strides;            // [groups]
  const int* block_sizes;                  // [groups]
  int* state_indices_out;                  // [requests]
  int* input_ids;                          // [requests]
  index_t* positions;                      // [requests]
  int* seq_lens;                           // [max_requests]
  int* query_start_loc;                    // [max_requests + 1]
  index_t* slots;                          // [groups, max_tokens]
  index_t num_blocks_stride;
  index_t slots_stride;
  unsigned num_requests, num_padded_requests, max_requests, max_tokens;
  unsigned num_groups;
};

struct DecodeInputsInfo {
  LaunchInfo launch;
  unsigned padding_blocks;  // of each group, beside one for each padded request

  template <typename Kernel>
  static constexpr DecodeInputsInfo of() {
    DecodeInputsInfo info{};
    info.launch = launch_info<Kernel>();
    info.padding_blocks = Kernel::kPaddingBlocks;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/grid.h"
#include "jitnorm/integers.h"

namespace jitnorm {

inline Grid grid_of(const DecodeInputsInfo& info, const DecodeInputsParams& p) {
  return grid_of_blocks(index_t(p.num_groups) * (p.num_padded_requests + info.padding_blocks), 1, info.launch.threads);
}

// decode_inputs(state_indices, num_computed_tokens, last_tokens, num_blocks, state_tables, batch_tables,
// table_strides, block_sizes, state_indices_out, input_ids, positions, seq_lens, query_start_loc, slots,
// num_padded_requests). src/jitnorm/integrations/decode_steps.py describes the arguments.
template <typename Kernel>
Outcome decode_inputs(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  constexpr int kTensors = 14;
  constexpr int kBits[kTensors] = {32, 32, 64, 32, 64, 64, 64, 32, 32, 32, 64, 32, 32, 64};
  constexpr int kDims[kTensors] = {1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2};
  if (num_args != kTensors + 1) return Outcome::kRefused;
  const DLTensor* tensors[kTensors];
  for (int i = 0; i < kTensors; i++) {
    tensors[i] = as_tensor(args[i]);
    if (!tensors[i] || !is_integers(tensors[i], kBits[i], kDims[i], tensors[0]->device)) return Outcome::kRefused;
  }
  const auto& [indices, computed, last_tokens, num_blocks, state_tables, batch_tables, strides, block_sizes,
               indices_out, input_ids, positions, seq_lens, starts, slots] = tensors;
  index_t padded;
  if (!as_int(args[kTensors], &padded) || !kernel.runs_on(indices->device)) return Outcome::kRefused;
  const index_t requests = indices->shape[0], max_requests = seq_lens->shape[0], states = computed->shape[0];
  const index_t groups = num_blocks->shape[0], max_tokens = slots->shape[1];
  if (requests < 1 || padded < requests || padded > max_requests || max_requests > 0xffff || max_tokens < padded ||
      max_tokens > kMaxGridX || groups < 1 || groups > 0xffff || indices_out->shape[0] != requests ||
      last_tokens->shape[0] != states || num_blocks->shape[1] != states || state_tables->shape[0] != groups ||
      batch_tables->shape[0] != groups || strides->shape[0] != groups || block_sizes->shape[0] != groups ||
      slots->shape[0] != groups || input_ids->shape[0] < requests || positions->shape[0] < requests ||
      starts->shape[0] != max_requests + 1 || row_stride(*slots) < (groups > 1 ? max_tokens : 0))
    return Outcome::kRefused;
  DecodeInputsParams params{};
  params.state_indices = elements_of<int>(*indices);
  params.num_computed_tokens = elements_of<int>(*computed);
  params.last_tokens = elements_of<index_t>(*last_tokens);
  params.num_blocks = elements_of<int>(*num_blocks);
  params.state_tables = elements_of<unsigned long long>(*state_tables);
  params.batch_tables = elements_of<unsigned long long>(*batch_tables);
  params.table_strides = elements_of<index_t>(*strides);
  params.block_sizes = elements_of<int>(*block_sizes);
  params.state_indices_out = elements_of<int>(*indices_out);
  params.input_ids = elements_of<int>(*input_ids);
  params.positions = elements_of<index_t>(*positions);
  params.seq_lens = elements_of<int>(*seq_lens);
  params.query_start_loc = elements_of<int>(*starts);
  params.slots = elements_of<index_t>(*slots);
  params.num_blocks_stride = row_stride(*num_blocks);
  params.slots_stride = row_stride(*slots);
  params.num_requests = static_cast<unsigned>(requests);
  params.num_padded_requests = static_cast<unsigned>(padded);
  params.max_requests = static_cast<unsigned>(max_requests);
  params.max_tokens = static_cast<unsigned>(max_tokens);
  params.num_groups = static_cast<unsigned>(groups);
  return kernel.launch(params, indices->device, true);
}

}  // namespace jitnorm
#endif
