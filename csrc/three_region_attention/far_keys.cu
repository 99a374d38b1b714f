// Packs text lengths and pivots of any values into what the other kernels rely on.
//
// Phases     for each 32 entries of a sample's row: which are in range and above all before them;
//            append those. Then fill the rest, and write text length and number of pivots.
// Layout     text_len (batch), pivot_idx (batch, num_heads, num_pivots) at any strides; far_keys
//            (batch, num_heads, 2 + num_pivots): text length in [0, k_len], number of pivots, the pivots.
// Grid       one warp per sample and head.
// Smem       none.
// Writers    one thread writes each element of far_keys; unused entries become k_len.
// Reference  cogview_kernels.attention.layout.ThreeRegionLayout

#include "../instructions/common.cuh"
#include "three_region_attention.h"

namespace cogview {
namespace {

// The largest number of this lane and the lanes before it.
__device__ __forceinline__ int running_max(int value) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    value = max(value, shfl_idx(value, max(lane - delta, 0)));
  }
  return value;
}

__global__ void __launch_bounds__(kWarpSize)
    three_region_attention_far_keys_kernel(const ThreeRegionFarKeysParams params) {
  const int lane = threadIdx.x, row = blockIdx.x;
  const int batch = row / params.num_heads, head = row - batch * params.num_heads;
  const int text_len = min(max(params.text_len[batch * params.text_len_stride], 0), params.k_len);
  const int32_t* pivot_idx =
      params.pivot_idx + batch * params.pivot_batch_stride + head * params.pivot_head_stride;
  int32_t* far_keys = params.far_keys + int64_t(row) * (2 + params.num_pivots);

  int num_pivots = 0, largest = -1;  // of the pivots so far
  for (int begin = 0; begin < params.num_pivots; begin += kWarpSize) {
    const int index = begin + lane;
    const int pivot =
        index < params.num_pivots ? pivot_idx[index * params.pivot_stride] : params.k_len;
    const bool in_range = pivot >= text_len && pivot < params.k_len;
    const int largest_here = max(largest, running_max(in_range ? pivot : -1));
    const int left = shfl_idx(largest_here, max(lane - 1, 0));
    const int largest_before = lane == 0 ? largest : left;
    const bool counts = in_range && pivot > largest_before;
    const uint32_t ballot = vote_ballot(counts);
    if (counts) far_keys[2 + num_pivots + popc(ballot & ((1u << lane) - 1))] = pivot;
    num_pivots += popc(ballot);
    largest = shfl_idx(largest_here, kWarpSize - 1);
  }
  for (int index = num_pivots + lane; index < params.num_pivots; index += kWarpSize) {
    far_keys[2 + index] = params.k_len;
  }
  if (lane < 2) far_keys[lane] = lane == 0 ? text_len : num_pivots;
}

}  // namespace

cudaError_t three_region_attention_far_keys(const ThreeRegionFarKeysParams& params,
                                            cudaStream_t stream) {
  const int64_t rows = int64_t(params.batch) * params.num_heads;
  if (rows == 0) return cudaSuccess;
  return launch<three_region_attention_far_keys_kernel>(rows, 1, kWarpSize, 0, stream, params);
}

}  // namespace cogview
