// The host part of all CUDA kernels: one library for every cubin, built once and shipped in the wheel. A kernel's
// description (kernel_info.h) comes with its cubin, so that nothing here depends on a size, a dtype or a schedule. It
// uses only the C ABI of tvm-ffi.
#include "attention/decode_attention.h"
#include "attention/mask_ranges.h"
#include "decode_step/decode_inputs.h"
#include "decode_step/greedy_sampling.h"
#include "elementwise/activation.h"
#include "elementwise/dual_rmsnorm.h"
#include "elementwise/qknorm.h"
#include "elementwise/qknorm_rope_store.h"
#include "elementwise/quant_fp8.h"
#include "elementwise/rmsnorm.h"
#include "elementwise/store_cache.h"
#include "gemm/cublaslt.h"
#include "gemm/few_rows.h"
#include "gemm/few_rows_wgmma.h"
#include "launcher/cuda_module.h"

namespace jitnorm {

// The variant to launch, by the number of blocks. A family can have an overload for its Info.
template <typename Info, typename Params>
bool is_large_grid(const Info& info, const Params&, unsigned blocks) {
  return blocks >= info.launch.min_large_grid;
}

// A kernel as bindings functions see it.
template <typename Info>
class CudaKernel {
 public:
  using info_t = Info;

  CudaKernel(const void* cubin, const char* const (&symbols)[kNumGridVariants], const Info& info)
      : info_(info), module_(cubin, symbols, info.launch) {}

  const Info& info() const { return info_; }
  bool runs_on(DLDevice device) const { return module_.runs_on(device); }

  // Describes rows of 16-bit elements, and boxes of them that TMA copies swizzled by 128 bytes. Returns whether it
  // could.
  bool encode_tensor_map(const Rows& rows, int columns, int box_columns, int box_rows, TensorMap* map) const {
    const unsigned long long sizes[] = {static_cast<unsigned long long>(columns),
                                        static_cast<unsigned long long>(rows.count)};
    const unsigned long long strides[] = {static_cast<unsigned long long>(rows.count > 1 ? rows.stride : columns) * 2};
    const unsigned box[] = {static_cast<unsigned>(box_columns), static_cast<unsigned>(box_rows)};
    const unsigned element_strides[] = {1, 1};
    return driver().encode_tensor_map &&
           driver().encode_tensor_map(map, kTensorMapUint16, 2, rows.data, sizes, strides, box, element_strides, 0,
                                      kTensorMapSwizzle128B, kTensorMapPromotion128B, 0) == 0;
  }

  template <typename Params>
  Outcome launch(const Params& params, DLDevice device, bool enable_pdl) const {
    const Grid grid = grid_of(info_, params);
    const unsigned blocks = static_cast<unsigned>(grid.x);
    const GridVariant variant = blocks <= info_.launch.max_small_grid  ? GridVariant::kSmallGrid
                                : is_large_grid(info_, params, blocks) ? GridVariant::kLargeGrid
                                                                       : GridVariant::kDefault;
    return module_.launch(&params, grid, variant, device, enable_pdl);
  }

 private:
  const Info info_;
  mutable CudaModule module_;
};

// What tvm-ffi calls: kBinding on the kernel that `self` is.
template <typename Info, Outcome (*kBinding)(const CudaKernel<Info>&, const TVMFFIAny*, int), bool kIsFastPath>
int call(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  // The fast path is for calls that do not come through torch's dispatcher.
  if (kIsFastPath && is_mode_active()) return return_outcome(Outcome::kRefused, result);
  return return_outcome(kBinding(*static_cast<const CudaKernel<Info>*>(self), args, num_args), result);
}

using Function = int (*)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);

// A bindings function: how to make a kernel for it, and its two functions.
struct Binding {
  const char* name;
  size_t info_bytes;
  void* (*make)(const void* cubin, const char* const (&symbols)[kNumGridVariants], const void* info);
  Function torch_op, fast_path;
};

template <typename Info>
void* make_kernel(const void* cubin, const char* const (&symbols)[kNumGridVariants], const void* bytes) {
  Info info;
  __builtin_memcpy(&info, bytes, sizeof info);
  return new CudaKernel<Info>(cubin, symbols, info);
}

template <typename Info, Outcome (*kBinding)(const CudaKernel<Info>&, const TVMFFIAny*, int)>
constexpr Binding binding(const char* name) {
  return {name, sizeof(Info), make_kernel<Info>, call<Info, kBinding, false>, call<Info, kBinding, true>};
}

constexpr Binding kBindings[] = {
    binding<RMSNormInfo, rmsnorm<CudaKernel<RMSNormInfo>>>("rmsnorm"),
    binding<RMSNormInfo, fused_add_rmsnorm<CudaKernel<RMSNormInfo>>>("fused_add_rmsnorm"),
    binding<RMSNormInfo, general_rmsnorm<CudaKernel<RMSNormInfo>>>("general_rmsnorm"),
    binding<RMSNormInfo, gated_rmsnorm<CudaKernel<RMSNormInfo>>>("gated_rmsnorm"),
    binding<RMSNormInfo, layernorm<CudaKernel<RMSNormInfo>>>("layernorm"),
    binding<RMSNormInfo, rmsnorm_quant_fp8<CudaKernel<RMSNormInfo>>>("rmsnorm_quant_fp8"),
    binding<RMSNormInfo, fused_add_rmsnorm_quant_fp8<CudaKernel<RMSNormInfo>>>("fused_add_rmsnorm_quant_fp8"),
    binding<DualRMSNormInfo, dual_rmsnorm<CudaKernel<DualRMSNormInfo>>>("dual_rmsnorm"),
    binding<QKNormInfo, fused_inplace_qknorm<CudaKernel<QKNormInfo>>>("fused_inplace_qknorm"),
    binding<QKNormRopeStoreInfo, qk_norm_rope_store<CudaKernel<QKNormRopeStoreInfo>>>("qk_norm_rope_store"),
    binding<ActivationInfo, activation<CudaKernel<ActivationInfo>>>("activation"),
    binding<StoreCacheInfo, store_cache<CudaKernel<StoreCacheInfo>>>("store_cache"),
    binding<QuantFp8Info, per_tensor_quant_fp8<CudaKernel<QuantFp8Info>>>("per_tensor_quant_fp8"),
    binding<QuantFp8Info, per_token_quant_fp8<CudaKernel<QuantFp8Info>>>("per_token_quant_fp8"),
    binding<FewRowsGemmInfo, few_rows_gemm<CudaKernel<FewRowsGemmInfo>>>("few_rows_gemm"),
    binding<FewRowsGemmInfo, few_rows_wgmma<CudaKernel<FewRowsGemmInfo>>>("few_rows_wgmma"),
    binding<DecodeAttentionInfo, decode_attention<CudaKernel<DecodeAttentionInfo>>>("decode_attention"),
    binding<DecodeAttentionInfo, masked_decode_attention<CudaKernel<DecodeAttentionInfo>>>("masked_decode_attention"),
    binding<MaskRangesInfo, mask_ranges<CudaKernel<MaskRangesInfo>>>("mask_ranges"),
    binding<DecodeInputsInfo, decode_inputs<CudaKernel<DecodeInputsInfo>>>("decode_inputs"),
    binding<GreedySamplingInfo, greedy_sampling<CudaKernel<GreedySamplingInfo>>>("greedy_sampling"),
};

inline int raise(const char* message) {
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}

inline const Binding* find_binding(const char* name) {
  for (const Binding& each : kBindings)
    if (__builtin_strcmp(each.name, name) == 0) return &each;
  return nullptr;
}

}  // namespace jitnorm

// make_kernel(binding, cubin, info, info_bytes, symbol, small_grid_symbol, large_grid_symbol): returns a handle for
// make_function. The arguments but info_bytes are addresses: of strings, of the cubin, and of its jitnorm_info. The
// caller keeps the cubin and the symbols for ever.
extern "C" JITNORM_PUBLIC int __tvm_ffi_make_kernel(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) {
  using namespace jitnorm;
  if (num_args != 7) return raise("jitnorm: make_kernel takes 7 arguments");
  auto address = [&](int i) { return reinterpret_cast<const char*>(args[i].v_int64); };
  const Binding* binding = find_binding(address(0));
  if (!binding) return raise("jitnorm: this launcher does not know the bindings function");
  if (static_cast<size_t>(args[3].v_int64) != binding->info_bytes)
    return raise("jitnorm: the cubin's description has another size than the launcher's");
  const char* symbols[kNumGridVariants] = {address(4), address(5), address(6)};
  result->type_index = kTVMFFIInt;
  result->v_int64 = reinterpret_cast<int64_t>(binding->make(address(1), symbols, address(2)));
  return 0;
}

// make_function(binding, handle, is_fast_path): returns the tvm-ffi function of a kernel.
extern "C" JITNORM_PUBLIC int __tvm_ffi_make_function(void*, const TVMFFIAny* args, int32_t num_args,
                                                      TVMFFIAny* result) {
  using namespace jitnorm;
  if (num_args != 3) return raise("jitnorm: make_function takes 3 arguments");
  const Binding* binding = find_binding(reinterpret_cast<const char*>(args[0].v_int64));
  if (!binding) return raise("jitnorm: this launcher does not know the bindings function");
  TVMFFIObjectHandle function;
  if (TVMFFIFunctionCreate(reinterpret_cast<void*>(args[1].v_int64),
                           args[2].v_int64 ? binding->fast_path : binding->torch_op, nullptr, &function))
    return -1;
  result->type_index = kTVMFFIFunction;
  result->v_obj = static_cast<TVMFFIObject*>(function);
  return 0;
}

JITNORM_EXPORT(__tvm_ffi_cublaslt_matmul, jitnorm::cublaslt_matmul)
