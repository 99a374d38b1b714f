// Kernels of FlashAttention-2 (Dao-AILab/flash-attention, csrc/flash_attn/src), by which the model
// is calibrated: calibration.py. Their source is not part of this repository. nvcc makes the
// kernels of this file, a host compiler the function that fills their parameters.
#ifndef __CUDACC__
using cudaStream_t = struct CUstream_st*;
#endif

#include "flash.h"

#ifdef __CUDACC__

namespace at {
struct PhiloxCudaState {};  // only kernels with dropout use it
namespace cuda::philox {
__device__ inline std::tuple<uint64_t, uint64_t> unpack(PhiloxCudaState) { return {0, 0}; }
}  // namespace cuda::philox
}  // namespace at

// clang-format off: the backward needs what stands above it
#include "flash_bwd_preprocess_kernel.h"
#include "flash_bwd_kernel.h"
#include "flash_fwd_kernel.h"
// clang-format on

namespace flash {

// As flash_fwd_launch_template.h and flash_bwd_launch_template.h have them on an H100: no dropout,
// no mask, lengths that are multiples of the tiles.
using T = cutlass::bfloat16_t;
template <int kHeadDim>
using Forward =
    Flash_fwd_kernel_traits<kHeadDim, 128, kHeadDim == 64 ? 128 : 64, 4, false, false, T>;
using Backward = Flash_bwd_kernel_traits<64, 128, 128, 8, 4, 4, 4, false, false, T>;

template <int kHeadDim>
__global__ void flash_forward(const __grid_constant__ Flash_fwd_params params) {
  compute_attn<Forward<kHeadDim>, false, false, false, false, true, true, false, false>(params);
}
template __global__ void flash_forward<64>(const __grid_constant__ Flash_fwd_params params);
template __global__ void flash_forward<128>(const __grid_constant__ Flash_fwd_params params);

__global__ void flash_backward(const __grid_constant__ Flash_bwd_params params) {
  compute_dq_dk_dv_seqk_parallel<Backward, false, false, false, false, true, true, false>(params);
}

}  // namespace flash

#else

#include <cstring>

// One head of one sample: q, k, v, out, dout, dq, dk, dv (length, head_dim); lse, delta (length);
// dq_sums (length, head_dim) float32. Returns the bytes written to `to`.
extern "C" int flash_params(void** tensors, int length, int head_dim, float scale, void* to) {
  flash::Flash_bwd_params params;
  std::memset(static_cast<void*>(&params), 0, sizeof(params));
  params.q_ptr = tensors[0];
  params.k_ptr = tensors[1];
  params.v_ptr = tensors[2];
  params.o_ptr = tensors[3];
  params.do_ptr = tensors[4];
  params.dq_ptr = tensors[5];
  params.dk_ptr = tensors[6];
  params.dv_ptr = tensors[7];
  params.softmax_lse_ptr = tensors[8];
  params.dsoftmax_sum = tensors[9];
  params.dq_accum_ptr = tensors[10];
  params.q_row_stride = params.k_row_stride = params.v_row_stride = params.o_row_stride = head_dim;
  params.do_row_stride = params.dq_row_stride = params.dk_row_stride = head_dim;
  params.dv_row_stride = head_dim;
  params.b = params.h = params.h_k = params.h_h_k_ratio = 1;
  params.seqlen_q = params.seqlen_k = params.seqlen_q_rounded = params.seqlen_k_rounded = length;
  params.total_q = length;
  params.d = params.d_rounded = head_dim;
  params.scale_softmax = scale;
  params.scale_softmax_log2 = scale * 1.44269504f;
  params.p_dropout = params.rp_dropout = 1.f;
  params.scale_softmax_rp_dropout = scale;
  params.p_dropout_in_uint8_t = 255;
  params.window_size_left = params.window_size_right = -1;
  params.is_bf16 = true;
  std::memcpy(to, &params, sizeof(params));
  return sizeof(params);
}

#endif
