// The inputs of an engine's decode step: the parameter struct of the kernel class and, for the host compiler, the
// bindings function that fills it in. Included by decode_inputs.cuh.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// A request has a row in each state tensor, its slot, and a row in each tensor of the batch. Each request of the batch
// has one new token. Attention layers with caches of one kind are a group, with block tables of their own.
struct DecodeInputsParams {
  const int* slots_of_requests;             // [requests]
  const int* num_computed_tokens;           // [slots]
  const index_t* last_tokens;               // [slots]
  const int* num_blocks;                    // [groups, slots]
  const unsigned long long* states_tables;  // [groups]: addresses of int32 [slots, table_strides[group]]
  const unsigned long long* batch_tables;   // likewise, [padded_requests, ...], written
  const index_t* table_strides;             // [groups]
  const int* block_sizes;                   // [groups]
  int* slots_of_requests_out;               // [requests]
  int* input_ids;                           // [requests]
  index_t* positions;                       // [requests]
  int* seq_lens;                            // [max_requests]
  int* query_start_loc;                     // [max_requests + 1]
  index_t* cache_slots;                     // [groups, max_tokens]
  index_t num_blocks_stride;
  index_t cache_slots_stride;
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

// decode_inputs(slots_of_requests, num_computed_tokens, last_tokens, num_blocks, states_tables, batch_tables,
// table_strides, block_sizes, slots_of_requests_out, input_ids, positions, seq_lens, query_start_loc, cache_slots,
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
  const auto& [slots, computed, last_tokens, num_blocks, states_tables, batch_tables, strides, block_sizes, slots_out,
               input_ids, positions, seq_lens, starts, cache_slots] = tensors;
  index_t padded;
  if (!as_int(args[kTensors], &padded) || !kernel.runs_on(slots->device)) return Outcome::kRefused;
  const index_t requests = slots->shape[0], max_requests = seq_lens->shape[0], states = computed->shape[0];
  const index_t groups = num_blocks->shape[0], max_tokens = cache_slots->shape[1];
  if (requests < 1 || padded < requests || padded > max_requests || max_requests > 0xffff || max_tokens < padded ||
      max_tokens > kMaxGridX || groups < 1 || groups > 0xffff || slots_out->shape[0] != requests ||
      last_tokens->shape[0] != states || num_blocks->shape[1] != states || states_tables->shape[0] != groups ||
      batch_tables->shape[0] != groups || strides->shape[0] != groups || block_sizes->shape[0] != groups ||
      cache_slots->shape[0] != groups || input_ids->shape[0] < requests || positions->shape[0] < requests ||
      starts->shape[0] != max_requests + 1 || row_stride(*cache_slots) < (groups > 1 ? max_tokens : 0))
    return Outcome::kRefused;
  DecodeInputsParams params{};
  params.slots_of_requests = elements_of<int>(*slots);
  params.num_computed_tokens = elements_of<int>(*computed);
  params.last_tokens = elements_of<index_t>(*last_tokens);
  params.num_blocks = elements_of<int>(*num_blocks);
  params.states_tables = elements_of<unsigned long long>(*states_tables);
  params.batch_tables = elements_of<unsigned long long>(*batch_tables);
  params.table_strides = elements_of<index_t>(*strides);
  params.block_sizes = elements_of<int>(*block_sizes);
  params.slots_of_requests_out = elements_of<int>(*slots_out);
  params.input_ids = elements_of<int>(*input_ids);
  params.positions = elements_of<index_t>(*positions);
  params.seq_lens = elements_of<int>(*seq_lens);
  params.query_start_loc = elements_of<int>(*starts);
  params.cache_slots = elements_of<index_t>(*cache_slots);
  params.num_blocks_stride = row_stride(*num_blocks);
  params.cache_slots_stride = row_stride(*cache_slots);
  params.num_requests = static_cast<unsigned>(requests);
  params.num_padded_requests = static_cast<unsigned>(padded);
  params.max_requests = static_cast<unsigned>(max_requests);
  params.max_tokens = static_cast<unsigned>(max_tokens);
  params.num_groups = static_cast<unsigned>(groups);
  return kernel.launch(params, slots->device, true);
}

}  // namespace jitnorm
#endif
