// The range of visible tokens of each sequence, by its mask: the parameter struct of the kernel class and, for the host
// compiler, the bindings function that fills it in. Included by mask_ranges.cuh.
#pragma once
#include "jitnorm/kernel_info.h"

namespace jitnorm {

struct MaskRangesParams {
  const unsigned char* mask;  // [sequences, tokens], not 0 for a visible token
  int* ranges;         // [sequences, 2]: the first visible token, and the one after the last; 0 and 0 if there is none
  unsigned* counters;  // of masked_decode_attention; they become 0
  index_t mask_stride;
  index_t num_counters;
  unsigned num_sequences;
  int num_tokens;
};

struct MaskRangesInfo {
  LaunchInfo launch;

  template <typename Kernel>
  static constexpr MaskRangesInfo of() {
    return {launch_info<Kernel>()};
  }
};

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/grid.h"
#include "jitnorm/integers.h"
#include "jitnorm/strided.h"

namespace jitnorm {

inline Grid grid_of(const MaskRangesInfo& info, const MaskRangesParams& params) {
  return grid_of_blocks(params.num_sequences, 1, info.launch.threads);
}

// mask_ranges(mask, ranges, counters). src/jitnorm/integrations/decode_attention.py describes the arguments.
template <typename Kernel>
Outcome mask_ranges(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  if (num_args != 3) return Outcome::kRefused;
  const DLTensor *mask = as_tensor(args[0]), *ranges = as_tensor(args[1]), *counters = as_tensor(args[2]);
  if (!mask || !kernel.runs_on(mask->device)) return Outcome::kRefused;
  const DLDevice device = mask->device;
  if (!is_mask(mask, device) || !is_integers(ranges, 32, 2, device) || !is_integers(counters, 32, 1, device))
    return Outcome::kRefused;
  const index_t sequences = mask->shape[0], tokens = mask->shape[1];
  if (sequences < 1 || sequences > 0x7fffffff || tokens > 1 << 30 || ranges->shape[0] != sequences ||
      ranges->shape[1] != 2 || (sequences > 1 && ranges->strides[0] != 2) ||
      share_memory(as_one_row(*ranges), as_one_row(*mask)) || share_memory(as_one_row(*counters), as_one_row(*mask)) ||
      share_memory(as_one_row(*counters), as_one_row(*ranges)))
    return Outcome::kRefused;
  MaskRangesParams params{};
  params.mask = elements_of<unsigned char>(*mask);
  params.ranges = elements_of<int>(*ranges);
  params.counters = elements_of<unsigned>(*counters);
  params.mask_stride = row_stride(*mask);
  params.num_counters = counters->shape[0];
  params.num_sequences = static_cast<unsigned>(sequences);
  params.num_tokens = static_cast<int>(tokens);
  return kernel.launch(params, device, true);
}

}  // namespace jitnorm
#endif
