// The next token of each request of a decode step, the one with the largest logit or a given one, and its place in the
// state of the request: the parameter struct of the kernel class and, for the host compiler, the bindings function
// that fills it in. Included by greedy_sampling.cuh.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// A request has a row in each tensor of state, at its state index.
struct GreedySamplingParams {
  const char* logits;        // null if the tokens are given
  const int* state_indices;  // [requests]
  index_t* tokens;           // [requests]
  index_t* last_tokens;      // [states]
  int* num_tokens;           // [states]
  int* num_computed_tokens;  // [states]
  int* all_tokens;           // [states, max_length]
  int* token_counts;         // [states, vocab_size]
  unsigned long long* best;  // [requests]: the largest key yet; 0 between calls
  unsigned* finished;        // [requests]: how many blocks of a row have ended; 0 between calls
  index_t logits_stride;     // in elements, like the others
  index_t all_tokens_stride;
  index_t token_counts_stride;
  unsigned vocab_size, max_length;
  unsigned num_requests, blocks_per_request;
  bool is_aligned;  // each row to 16 bytes
};

struct GreedySamplingInfo {
  LaunchInfo launch;
  ElementType logits;
  unsigned elements_per_block;  // that a block reads at a time

  template <typename Kernel>
  static constexpr GreedySamplingInfo of() {
    GreedySamplingInfo info{};
    info.launch = launch_info<Kernel>();
    info.logits = kElementType<typename Kernel::input_t>;
    info.elements_per_block = Kernel::kElementsPerBlock;
    return info;
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/grid.h"
#include "jitnorm/integers.h"

namespace jitnorm {

inline Grid grid_of(const GreedySamplingInfo& info, const GreedySamplingParams& p) {
  return grid_of_blocks(index_t(p.num_requests) * p.blocks_per_request, 1, info.launch.threads);
}

// greedy_sampling(logits, state_indices, tokens, last_tokens, num_tokens, num_computed_tokens, all_tokens,
// token_counts, best, finished, num_sms). Without logits, which are None, the tokens are given.
// src/jitnorm/integrations/decode_steps.py describes the arguments.
template <typename Kernel>
Outcome greedy_sampling(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const GreedySamplingInfo& info = kernel.info();
  constexpr int kTensors = 9;
  constexpr int kBits[kTensors] = {32, 64, 64, 32, 32, 32, 32, 64, 32};
  constexpr int kDims[kTensors] = {1, 1, 1, 1, 1, 2, 2, 1, 1};
  if (num_args != kTensors + 2) return Outcome::kRefused;
  const DLTensor* tensors[kTensors];
  for (int i = 0; i < kTensors; i++) {
    tensors[i] = as_tensor(args[i + 1]);
    if (!tensors[i] || !is_integers(tensors[i], kBits[i], kDims[i], tensors[0]->device)) return Outcome::kRefused;
  }
  const auto& [indices, tokens, last_tokens, num_tokens, computed, all_tokens, counts, best, finished] = tensors;
  const DLDevice device = indices->device;
  const index_t requests = indices->shape[0], states = last_tokens->shape[0];
  index_t num_sms;
  if (!as_int(args[kTensors + 1], &num_sms) || num_sms < 1 || !kernel.runs_on(device) || requests < 1 ||
      requests > 0xffff || tokens->shape[0] != requests || num_tokens->shape[0] != states ||
      computed->shape[0] != states || all_tokens->shape[0] != states || all_tokens->shape[1] > 0x7fffffff ||
      counts->shape[0] != states || best->shape[0] < requests || finished->shape[0] < requests)
    return Outcome::kRefused;
  GreedySamplingParams params{};
  params.state_indices = elements_of<int>(*indices);
  params.tokens = elements_of<index_t>(*tokens);
  params.last_tokens = elements_of<index_t>(*last_tokens);
  params.num_tokens = elements_of<int>(*num_tokens);
  params.num_computed_tokens = elements_of<int>(*computed);
  params.all_tokens = elements_of<int>(*all_tokens);
  params.token_counts = elements_of<int>(*counts);
  params.best = elements_of<unsigned long long>(*best);
  params.finished = elements_of<unsigned>(*finished);
  params.all_tokens_stride = row_stride(*all_tokens);
  params.token_counts_stride = row_stride(*counts);
  params.vocab_size = static_cast<unsigned>(counts->shape[1]);
  params.max_length = static_cast<unsigned>(all_tokens->shape[1]);
  params.num_requests = static_cast<unsigned>(requests);
  params.blocks_per_request = 1;
  if (args[0].type_index == kTVMFFINone) return kernel.launch(params, device, true);
  const DLTensor* logits = as_tensor(args[0]);
  if (!logits || !has_type(*logits, info.logits) || logits->ndim != 2 || !same_device(*logits, *indices) ||
      !logits->data || logits->shape[0] != requests)
    return Outcome::kRefused;
  const index_t vocab_size = logits->shape[1], stride = row_stride(*logits);
  if (vocab_size < 1 || vocab_size > 0x7fffffff || vocab_size > counts->shape[1] ||
      (vocab_size > 1 && logits->strides[1] != 1) || (requests > 1 && stride < vocab_size))
    return Outcome::kRefused;
  params.logits = data_of(*logits);
  params.logits_stride = stride;
  params.vocab_size = static_cast<unsigned>(vocab_size);
  const index_t max_blocks = divide_up(vocab_size, info.elements_per_block);
  const index_t num_blocks = divide_up(2 * num_sms, requests);
  params.blocks_per_request = static_cast<unsigned>(num_blocks < max_blocks ? num_blocks : max_blocks);
  params.is_aligned = is_aligned(params.logits, 16) && is_aligned(stride * info.logits.bytes(), 16);
  return kernel.launch(params, device, true);
}

}  // namespace jitnorm
#endif
