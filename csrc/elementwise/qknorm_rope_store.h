// From the QKV projection to attention in one launch: RMSNorm of the heads of q and k, rotary embedding, and the store
// of k and v into a paged cache, each of which may be left out. The parameter struct of the kernel classes and, for the
// host compiler, the binding that fills it in. Included by qknorm_rope_store.cuh and qknorm_rope_store_cpu.h.
#pragma once
#include "jitnorm/divisor.h"
#include "jitnorm/kernel_info.h"

namespace jitnorm {

// The weight type of kernels that do not normalise.
struct NoNorm {};

// How the elements of a head are paired for rotation: kIsNeox pairs i with i + rotary_dim / 2, otherwise 2 i with
// 2 i + 1. With kHasSections a token has three positions, and sections of the pairs are rotated by one of them each.
template <bool kIsNeox_, bool kHasSections_>
struct Rotation {
  static constexpr bool kIsNeox = kIsNeox_;
  static constexpr bool kHasSections = kHasSections_;
};

enum HeadKind { kQuery = 0, kKey, kValue, kHeadKinds };

// The heads of all tokens: those of one token are head_stride apart. Strides are in elements.
struct HeadTensor {
  char* data;
  index_t stride;
  index_t head_stride;
};

// A cache [blocks, block_size, heads, head_dim]. Strides are in elements.
struct PagedCache {
  char* data;
  index_t block_stride;
  index_t token_stride;  // within a block
  index_t head_stride;
};

// A quantisation scale for each head, or one for all. Null for 1.
struct HeadScales {
  const float* data;
  unsigned stride;  // 0 for one scale
};

// A row is a group of adjacent heads of one tensor of one token: as many as the kernel class takes at a time, or fewer
// at the end of a tensor. Rows are numbered token by token: the groups of q, then those of k, then those of v; or tile
// by tile of tokens, see head_group_in_tiles.
struct QKNormRopeStoreParams {
  HeadTensor in[kHeadKinds];
  HeadTensor out[kHeadKinds];    // null data: not written; never written for v
  PagedCache cache[kHeadKinds];  // of k and v, null without a cache
  HeadScales scales[kHeadKinds];
  const void* weight[kHeadKinds];  // null: not normalised
  const void* cos_sin;             // [max_position, rotary_dim]: cosines, then sines
  const void* positions;
  const void* slots;
  index_t cos_sin_stride;
  index_t positions_stride;  // from the first to the second of a token's three positions
  index_t max_position;
  index_t skip_index;
  index_t num_rows;
  index_t num_all_heads;           // of all tokens
  UnsignedDivisor groups_divisor;  // divides by num_groups
  UnsignedDivisor q_divisor;       // divides by q's groups of a token, or by 1 without q
  UnsignedDivisor kv_divisor;      // divides by k's, of which v has as many
  UnsignedDivisor block_divisor;   // divides by block_size
  unsigned num_tokens;
  unsigned num_groups;  // of q, k and v of a token together
  unsigned first_group[kHeadKinds];
  unsigned num_heads[kHeadKinds];
  unsigned block_size;
  unsigned num_stored;      // tokens that have a slot: the first ones
  unsigned section_end[2];  // the first pairs of the second and third section, or interleaved: where these end
  bool has_interleaved_sections;
  bool has_int64_positions;  // or int32 ones
  bool has_int64_slots;
  float eps;
  float weight_offset;
};

struct QKNormRopeStoreInfo {
  LaunchInfo launch;
  ElementType input, weight, cos_sin, cache, q_out;
  unsigned alignment;  // of the input's rows
  int hidden_size;     // that of a row: head_dim
  int rotary_dim;      // 0: nothing is rotated
  bool is_neox;        // see Rotation
  bool has_sections;
  bool has_norm;
  bool rounds_each_step;
  int rows_per_block;
  int large_heads_per_row;  // in the large grid's kernel; otherwise a row is one head
  index_t min_large_heads;  // from so many on, in all tokens, the large grid's kernel runs

  template <typename Kernel>
  static constexpr QKNormRopeStoreInfo of() {
    QKNormRopeStoreInfo info{};
    info.launch = launch_info<Kernel>();
    info.input = kElementType<typename Kernel::input_t>;
    info.weight = kElementType<typename Kernel::weight_t>;
    info.cos_sin = kElementType<typename Kernel::cos_sin_t>;
    info.cache = kElementType<typename Kernel::cache_t>;
    info.q_out = kElementType<typename Kernel::q_out_t>;
    info.alignment = Kernel::kAlignment;
    info.hidden_size = Kernel::kHiddenSize;
    info.rotary_dim = Kernel::kRotaryDim;
    info.is_neox = Kernel::rotation_t::kIsNeox;
    info.has_sections = Kernel::rotation_t::kHasSections;
    info.has_norm = Kernel::kHasNorm;
    info.rounds_each_step = Kernel::kRoundsEachStep;
    info.rows_per_block = Kernel::kRowsPerBlock;
    info.min_large_heads = Kernel::kMinLargeHeads;
    info.large_heads_per_row = Kernel::kLargeHeadsPerRow;
    return info;
  }

  constexpr int heads_per_row(index_t num_heads) const { return num_heads < min_large_heads ? 1 : large_heads_per_row; }
};

// Which heads a row is.
struct HeadGroup {
  HeadKind kind;
  unsigned token;
  unsigned head;  // the first, of its tensor
};

template <int kHeadsPerRow>
JITNORM_HOST_DEVICE HeadGroup head_group(const QKNormRopeStoreParams& p, unsigned row) {
  const unsigned token = quotient(row, p.groups_divisor), group = row - token * p.num_groups;
  const HeadKind kind = group < p.first_group[kKey] ? kQuery : group < p.first_group[kValue] ? kKey : kValue;
  return {kind, token, (group - p.first_group[kind]) * kHeadsPerRow};
}

// The group of a row where rows are numbered tile by tile: the groups of q of all tokens of a tile, then those of k,
// then those of v. So nearly all warps have groups of one kind.
template <int kHeadsPerRow, unsigned kTokensPerTile>
JITNORM_HOST_DEVICE HeadGroup head_group_in_tiles(const QKNormRopeStoreParams& p, unsigned row) {
  const unsigned tile_start = quotient(row, p.groups_divisor) / kTokensPerTile * kTokensPerTile;
  const unsigned tokens_left = p.num_tokens - tile_start;
  const unsigned tokens = tokens_left < kTokensPerTile ? tokens_left : kTokensPerTile;  // of this tile
  const unsigned q_groups = p.first_group[kKey], k_groups = p.first_group[kValue] - q_groups;
  unsigned group = row - tile_start * p.num_groups;  // among those of its kind, below
  HeadKind kind = kQuery;
  if (group >= tokens * q_groups) {
    group -= tokens * q_groups;
    kind = kKey;
    if (group >= tokens * k_groups) group -= tokens * k_groups, kind = kValue;
  }
  const unsigned token = quotient(group, kind == kQuery ? p.q_divisor : p.kv_divisor);
  return {kind, tile_start + token, (group - token * (kind == kQuery ? q_groups : k_groups)) * kHeadsPerRow};
}

// The addresses of a group's first head. The others are head_stride apart.
template <typename T>
JITNORM_HOST_DEVICE T* head_address(const HeadTensor& heads, HeadGroup group) {
  return reinterpret_cast<T*>(heads.data) + group.token * heads.stride + group.head * heads.head_stride;
}

// `slot` is in range, so that it fits 31 bits.
template <typename T>
JITNORM_HOST_DEVICE T* cache_address(const QKNormRopeStoreParams& p, HeadGroup group, unsigned slot) {
  const PagedCache& cache = p.cache[group.kind];
  const unsigned block = quotient(slot, p.block_divisor), token = slot - block * p.block_size;
  return reinterpret_cast<T*>(cache.data) + block * cache.block_stride + token * cache.token_stride +
         group.head * cache.head_stride;
}

// Which of a token's three positions rotates pair `pair`: 0 time, 1 height, 2 width. Sections lie one after another, or
// interleaved: then of three pairs the second belongs to height and the third to width, up to where a section ends.
JITNORM_HOST_DEVICE int section_of(const QKNormRopeStoreParams& p, unsigned pair) {
  if (!p.has_interleaved_sections) return (pair >= p.section_end[0]) + (pair >= p.section_end[1]);
  const unsigned axis = pair % 3;
  return axis != 0 && pair < p.section_end[axis - 1] ? axis : 0;
}

}  // namespace jitnorm

#ifndef __CUDACC__
#include "jitnorm/grid.h"
#include "jitnorm/strided.h"

namespace jitnorm {

inline Grid grid_of(const QKNormRopeStoreInfo& info, const QKNormRopeStoreParams& params) {
  return grid_of_blocks(params.num_rows, info.rows_per_block, info.launch.threads);
}
inline bool is_large_grid(const QKNormRopeStoreInfo& info, const QKNormRopeStoreParams& params, unsigned) {
  return params.num_all_heads >= info.min_large_heads;
}

inline bool is_on(const DLTensor& tensor, DLDevice device) {
  return tensor.device.device_type == device.device_type && tensor.device.device_id == device.device_id;
}

// [tokens, heads, head_dim] of `type`; with `allows_blocks` also [blocks, block_size, heads, head_dim]. None leaves
// `rows` as it is.
inline bool as_optional_heads(const TVMFFIAny& arg, const QKNormRopeStoreInfo& info, ElementType type, DLDevice device,
                              bool allows_blocks, StridedRows* rows) {
  if (arg.type_index == kTVMFFINone) return true;
  // The rows of float8 tensors are shorter than the input's, and so are their accesses.
  const unsigned alignment = info.alignment == 1 ? 1 : info.alignment * type.bits / info.input.bits;
  const DLTensor* tensor = as_tensor(arg);
  return tensor && (tensor->ndim == 3 || allows_blocks) && is_on(*tensor, device) &&
         as_strided_rows(tensor, type, info.hidden_size, alignment, rows);
}

// A weight of a norm: one dimension of head_dim elements. None leaves `rows` as it is.
inline bool as_optional_weight(const TVMFFIAny& arg, const QKNormRopeStoreInfo& info, DLDevice device,
                               StridedRows* rows) {
  if (arg.type_index == kTVMFFINone) return true;
  const DLTensor* tensor = as_tensor(arg);
  Rows row;
  if (!info.has_norm || !as_weight(tensor, info, &row) || !is_on(*tensor, device)) return false;
  *rows = as_one_row(*tensor);
  return true;
}

// A quantisation scale: float32, one element or one for each head. None leaves both as they are. Scales belong to
// float8 tensors, which `type` says.
inline bool as_optional_scales(const TVMFFIAny& arg, ElementType type, index_t heads, DLDevice device,
                               HeadScales* scales, StridedRows* rows) {
  if (arg.type_index == kTVMFFINone) return true;
  const DLTensor* tensor = as_tensor(arg);
  if (type.bits != 8 || !tensor || !is_on(*tensor, device)) return false;
  const index_t count = element_count(*tensor);
  Rows elements;
  if ((count != 1 && count != heads) || !as_elements(tensor, kElementType<float>, count, alignof(float), &elements))
    return false;
  scales->data = reinterpret_cast<const float*>(elements.data);
  scales->stride = count != 1;
  *rows = as_one_row(*tensor);
  return true;
}

// int32 or int64, [tokens] or with mRoPE [3, tokens], adjacent along the tokens.
inline bool as_positions(const DLTensor& tensor, index_t tokens, bool has_sections, DLDevice device) {
  const int last = has_sections ? 1 : 0;
  return tensor.ndim == last + 1 && tensor.shape[last] == tokens && (last == 0 || tensor.shape[0] == 3) &&
         (tokens <= 1 || tensor.strides[last] == 1) && (last == 0 || tensor.strides[0] >= 0) &&
         tensor.dtype.code == kDLInt && tensor.dtype.lanes == 1 &&
         (tensor.dtype.bits == 32 || tensor.dtype.bits == 64) && is_on(tensor, device) &&
         (tokens == 0 || tensor.data) && is_aligned(data_of(tensor), tensor.dtype.bits / 8);
}

// Whether the outputs overlap no other argument. The first `num_replacing` outputs may be the input of the same index.
inline bool outputs_are_separate(const StridedRows* outputs, const StridedRows* inputs, int num_outputs, int num_inputs,
                                 int num_replacing) {
  for (int i = 0; i < num_outputs; i++) {
    const StridedRows& output = outputs[i];
    if (output.is_empty) continue;
    if (!rows_are_disjoint(output)) return false;
    for (int j = 0; j < i; j++)
      if (share_memory(output, outputs[j])) return false;
    for (int j = 0; j < num_inputs; j++)
      if (share_memory(output, inputs[j]) && !(i == j && i < num_replacing && are_same_rows(output, inputs[j])))
        return false;
  }
  return true;
}

inline HeadTensor head_tensor(const StridedRows& rows, index_t element_bytes) {
  HeadTensor heads;
  heads.data = rows.data;
  heads.stride = rows.strides[0] / element_bytes;
  heads.head_stride = rows.strides[2] / element_bytes;
  return heads;
}

inline PagedCache paged_cache(const StridedRows& rows, index_t element_bytes) {
  PagedCache cache;
  cache.data = rows.data;
  cache.block_stride = rows.strides[0] / element_bytes;
  cache.token_stride = rows.strides[1] / element_bytes;
  cache.head_stride = rows.strides[2] / element_bytes;
  return cache;
}

// Reads the arguments of the rotation: cos_sin_cache, positions, is_neox and mRoPE's sections. `cos_sin_rows` and
// `position_rows` become the memory of the first two.
inline bool as_rotation(const TVMFFIAny* args, const QKNormRopeStoreInfo& info, index_t tokens, DLDevice device,
                        QKNormRopeStoreParams* params, StridedRows* cos_sin_rows, StridedRows* position_rows) {
  const index_t rotary_dim = info.rotary_dim;
  const bool has_sections = info.has_sections;
  index_t section[3];
  bool is_neox;
  if (!as_bool(args[12], &is_neox) || !as_int(args[13], &section[0]) || !as_int(args[14], &section[1]) ||
      !as_int(args[15], &section[2]) || !as_bool(args[16], &params->has_interleaved_sections))
    return false;
  if (rotary_dim == 0) return args[3].type_index == kTVMFFINone && args[4].type_index == kTVMFFINone;

  const DLTensor *cos_sin = as_tensor(args[3]), *positions = as_tensor(args[4]);
  if (is_neox != info.is_neox || !cos_sin || cos_sin->ndim != 2 || !is_on(*cos_sin, device) ||
      !has_type(*cos_sin, info.cos_sin) || cos_sin->shape[1] != rotary_dim || cos_sin->strides[1] != 1 ||
      (cos_sin->shape[0] > 1 && cos_sin->strides[0] < rotary_dim) || !positions ||
      !as_positions(*positions, tokens, has_sections, device))
    return false;
  const index_t stride = cos_sin->shape[0] > 1 ? cos_sin->strides[0] : rotary_dim;
  if (tokens != 0 && (cos_sin->shape[0] == 0 || !cos_sin->data || !is_aligned(data_of(*cos_sin), info.alignment) ||
                      !is_aligned(stride * info.cos_sin.bytes(), info.alignment)))
    return false;
  // With one position for each token the sections change nothing, but are checked all the same.
  const bool has_given_sections = section[0] != 0 || section[1] != 0 || section[2] != 0;
  if ((has_sections || has_given_sections) &&
      (section[0] < 0 || section[1] < 0 || section[2] < 0 || section[0] > rotary_dim || section[1] > rotary_dim ||
       section[2] > rotary_dim || section[0] + section[1] + section[2] != rotary_dim / 2))
    return false;
  if (has_sections) {
    const bool is_interleaved = params->has_interleaved_sections;
    params->section_end[0] = is_interleaved ? 3 * section[1] : section[0];
    params->section_end[1] = is_interleaved ? 3 * section[2] : section[0] + section[1];
    params->positions_stride = positions->strides[0];
  }
  *cos_sin_rows = as_one_row(*cos_sin);
  *position_rows = as_one_row(*positions);
  params->cos_sin = cos_sin_rows->data;
  params->cos_sin_stride = stride;
  params->max_position = cos_sin->shape[0];
  params->positions = position_rows->data;
  params->has_int64_positions = positions->dtype.bits == 64;
  return true;
}

// Reads slot_mapping, and compares the caches with k. `slot_rows` becomes the memory of the slots. Without caches there
// are no slots and no scales.
inline bool as_stored_tokens(const TVMFFIAny* args, const QKNormRopeStoreInfo& info, const StridedRows& k,
                             const StridedRows& k_cache, const StridedRows& v_cache, DLDevice device,
                             QKNormRopeStoreParams* params, StridedRows* slot_rows) {
  params->block_size = 1;
  if (!k_cache.is_given())
    return args[7].type_index == kTVMFFINone && args[20].type_index == kTVMFFINone &&
           args[21].type_index == kTVMFFINone;
  const index_t tokens = k.counts[0], heads = k.counts[2];
  const DLTensor* slots = as_indices(args[7], device);
  if (!slots || slots->shape[0] > tokens || k_cache.counts[2] != heads || v_cache.counts[2] != heads ||
      k_cache.counts[0] != v_cache.counts[0] || k_cache.counts[1] != v_cache.counts[1] ||
      (k_cache.counts[1] != 0 && k_cache.counts[0] > kMaxDividend / k_cache.counts[1]) ||
      (slots->shape[0] != 0 && heads != 0 && k_cache.is_empty))
    return false;
  *slot_rows = as_one_row(*slots);
  params->slots = slot_rows->data;
  params->has_int64_slots = slots->dtype.bits == 64;
  params->num_stored = static_cast<unsigned>(slots->shape[0]);
  if (!k_cache.is_empty) params->block_size = static_cast<unsigned>(k_cache.counts[1]);
  params->cache[kKey] = paged_cache(k_cache, info.cache.bytes());
  params->cache[kValue] = paged_cache(v_cache, info.cache.bytes());
  return true;
}

// qk_norm_rope_store(q, k, v, cos_sin_cache, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps,
// weight_offset, is_neox, mrope_section[0], mrope_section[1], mrope_section[2], mrope_interleaved, q_out, k_out,
// q_scale, k_scale, v_scale, skip_index, rounds_each_step, enable_pdl). The sections are 0 without mRoPE. Tensors are
// None where the step that needs them is left out, but for k. src/jitnorm/qknorm_rope_store.py explains refused calls.
template <typename Kernel>
Outcome qk_norm_rope_store(const Kernel& kernel, const TVMFFIAny* args, int num_args) {
  const QKNormRopeStoreInfo& info = kernel.info();
  if (num_args != 25) return Outcome::kRefused;
  const DLTensor* k_tensor = as_tensor(args[1]);
  if (!k_tensor || !kernel.runs_on(k_tensor->device)) return Outcome::kRefused;
  const DLDevice device = k_tensor->device;
  QKNormRopeStoreParams params{};

  enum Input { kQ, kK, kV, kQWeight, kKWeight, kCosSin, kPositions, kSlots, kQScale, kKScale, kVScale, kInputs };
  enum Output { kQOut, kKOut, kKCache, kVCache, kOutputs };  // the first two have the indices of kQ and kK
  StridedRows in[kInputs], out[kOutputs];
  if (!as_optional_heads(args[0], info, info.input, device, false, &in[kQ]) ||
      !as_optional_heads(args[1], info, info.input, device, false, &in[kK]) ||
      !as_optional_heads(args[2], info, info.input, device, false, &in[kV]) ||
      !as_optional_heads(args[5], info, info.cache, device, true, &out[kKCache]) ||
      !as_optional_heads(args[6], info, info.cache, device, true, &out[kVCache]) ||
      !as_optional_heads(args[17], info, info.q_out, device, false, &out[kQOut]) ||
      !as_optional_heads(args[18], info, info.input, device, false, &out[kKOut]))
    return Outcome::kRefused;
  const StridedRows &q = in[kQ], &k = in[kK], &v = in[kV];
  const index_t tokens = k.counts[0], k_heads = k.counts[2], q_heads = q.is_given() ? q.counts[2] : 0;
  const bool has_cache = out[kKCache].is_given();
  if ((q.is_given() && q.counts[0] != tokens) || (v.is_given() && (v.counts[0] != tokens || v.counts[2] != k_heads)) ||
      out[kVCache].is_given() != has_cache || (has_cache && !v.is_given()) ||
      !as_optional_weight(args[8], info, device, &in[kQWeight]) ||
      !as_optional_weight(args[9], info, device, &in[kKWeight]) || (in[kQWeight].is_given() && !q.is_given()) ||
      info.has_norm != (in[kQWeight].is_given() || in[kKWeight].is_given()) ||
      !as_optional_scales(args[19], info.q_out, q_heads, device, &params.scales[kQuery], &in[kQScale]) ||
      !as_optional_scales(args[20], info.cache, k_heads, device, &params.scales[kKey], &in[kKScale]) ||
      !as_optional_scales(args[21], info.cache, k_heads, device, &params.scales[kValue], &in[kVScale]))
    return Outcome::kRefused;

  // Where the results go: in place, unless an output is given. What is neither normalised nor rotated is not written.
  const bool changes_heads = info.has_norm || info.rotary_dim != 0;
  for (int i = 0; i < 2; i++) {  // q, then k
    StridedRows& output = out[kQOut + i];
    if (output.is_given()) {
      if (!in[i].is_given() || !changes_heads || output.counts[0] != tokens || output.counts[2] != in[i].counts[2])
        return Outcome::kRefused;
    } else if (changes_heads) {
      if (i == 0 && info.q_out.bits != info.input.bits && q.is_given()) return Outcome::kRefused;
      output = in[i];
    }
  }
  if (!changes_heads && (q.is_given() || !has_cache)) return Outcome::kRefused;

  double eps, weight_offset;
  bool rounds_each_step, enable_pdl;
  if (!as_float(args[10], &eps) || !(eps >= 0) || !as_float(args[11], &weight_offset) ||
      !as_int(args[22], &params.skip_index) || !as_bool(args[23], &rounds_each_step) ||
      rounds_each_step != info.rounds_each_step || !as_optional_bool(args[24], true, &enable_pdl))
    return Outcome::kRefused;

  if (!as_rotation(args, info, tokens, device, &params, &in[kCosSin], &in[kPositions]) ||
      !as_stored_tokens(args, info, k, out[kKCache], out[kVCache], device, &params, &in[kSlots]))
    return Outcome::kRefused;

  const index_t heads = tokens * (q_heads + k_heads + (has_cache ? k_heads : 0));
  const index_t per_row = info.heads_per_row(heads);
  const index_t q_groups = (q_heads + per_row - 1) / per_row, k_groups = (k_heads + per_row - 1) / per_row;
  const index_t groups = q_groups + k_groups + (has_cache ? k_groups : 0);
  if (heads == 0) return Outcome::kDone;
  if (heads > kMaxDividend || !outputs_are_separate(out, in, kOutputs, kInputs, kKOut + 1)) return Outcome::kRefused;
  for (int i = 0; i < kHeadKinds; i++) params.in[i] = head_tensor(in[i], info.input.bytes());
  params.out[kQuery] = head_tensor(out[kQOut], info.q_out.bytes());
  params.out[kKey] = head_tensor(out[kKOut], info.input.bytes());
  params.weight[kQuery] = in[kQWeight].data;
  params.weight[kKey] = in[kKWeight].data;
  params.num_rows = tokens * groups;
  params.num_all_heads = heads;
  params.groups_divisor = divisor_of(groups);
  params.q_divisor = divisor_of(q_groups != 0 ? q_groups : 1);
  params.kv_divisor = divisor_of(k_groups != 0 ? k_groups : 1);
  params.block_divisor = divisor_of(params.block_size);
  params.num_tokens = static_cast<unsigned>(tokens);
  params.num_groups = static_cast<unsigned>(groups);
  params.first_group[kKey] = static_cast<unsigned>(q_groups);
  params.first_group[kValue] = static_cast<unsigned>(q_groups + k_groups);
  params.num_heads[kQuery] = static_cast<unsigned>(q_heads);
  params.num_heads[kKey] = params.num_heads[kValue] = static_cast<unsigned>(k_heads);
  params.eps = static_cast<float>(eps);
  params.weight_offset = static_cast<float>(weight_offset);
  return kernel.launch(params, device, enable_pdl);
}

}  // namespace jitnorm
#endif
