// The inputs of an engine's decode step in one launch: tokens, positions, lengths, block tables and cache slots of a
// batch whose requests have one new token each. An engine has a small kernel for each, and for so little work a launch
// takes longer than the kernel.
#pragma once
#include "decode_step/decode_inputs.h"
#include "jitnorm/cuda_kernel.h"

namespace jitnorm {

struct DecodeInputsKernel : DefaultVariantOnly {
  using params_t = DecodeInputsParams;
  using info_t = DecodeInputsInfo;
  static constexpr int kThreads = 256;
  static constexpr int kMinBlocksPerSM = 1;
  static constexpr unsigned kPaddingBlocks = 8;
  static constexpr index_t kNoSlot = -1;  // nothing is stored for a token that pads a batch

  template <GridVariant>
  static __device__ __forceinline__ void run(const DecodeInputsParams& p) {
    const unsigned blocks = p.num_padded_requests + kPaddingBlocks;
    const unsigned group = blockIdx.x / blocks, block = blockIdx.x % blocks;
    grid_dependency_wait();  // the kernels before write the state and read the inputs
    launch_dependents();
    if (block < p.num_requests) write_request(p, group, block);
    else if (block < p.num_padded_requests) clear_table(p, group, block);
    else write_padding(p, group, block - p.num_padded_requests);
  }

 private:
  static __device__ __forceinline__ int* batch_table(const DecodeInputsParams& p, unsigned group, unsigned request) {
    return reinterpret_cast<int*>(p.batch_tables[group]) + request * p.table_strides[group];
  }

  static __device__ __forceinline__ void write_request(const DecodeInputsParams& p, unsigned group, unsigned request) {
    const int state = p.state_indices[request];
    const int num_blocks = p.num_blocks[group * p.num_blocks_stride + state];
    const int* from = reinterpret_cast<const int*>(p.state_tables[group]) + state * p.table_strides[group];
    int* to = batch_table(p, group, request);
    for (int i = threadIdx.x; i < num_blocks; i += kThreads) to[i] = from[i];
    if (threadIdx.x != 0) return;
    const int position = p.num_computed_tokens[state], block_size = p.block_sizes[group];
    p.slots[group * p.slots_stride + request] =
        index_t(from[position / block_size]) * block_size + position % block_size;
    if (group != 0) return;
    p.state_indices_out[request] = state;
    p.input_ids[request] = static_cast<int>(p.last_tokens[state]);
    p.positions[request] = position;
    p.seq_lens[request] = position + 1;
  }

  // A request that pads the batch of a CUDA graph has the null block, which no other request has.
  static __device__ __forceinline__ void clear_table(const DecodeInputsParams& p, unsigned group, unsigned request) {
    int* table = batch_table(p, group, request);
    for (index_t i = threadIdx.x; i < p.table_strides[group]; i += kThreads) table[i] = 0;
  }

  // What follows the requests. It is written in each step, as it holds values of an earlier, larger batch.
  static __device__ __forceinline__ void write_padding(const DecodeInputsParams& p, unsigned group, unsigned block) {
    const unsigned thread = block * kThreads + threadIdx.x;
    constexpr unsigned kStep = kPaddingBlocks * kThreads;
    index_t* slots = p.slots + group * p.slots_stride;
    for (unsigned i = p.num_requests + thread; i < p.max_tokens; i += kStep) slots[i] = kNoSlot;
    if (group != 0) return;
    for (unsigned i = thread; i <= p.max_requests; i += kStep) {
      p.query_start_loc[i] = static_cast<int>(i < p.num_requests ? i : p.num_requests);
      if (i >= p.num_requests && i < p.max_requests) p.seq_lens[i] = 0;
    }
  }
};

}  // namespace jitnorm
