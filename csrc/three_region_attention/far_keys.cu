// Packs text lengths and pivots of any values into what the other kernels rely on.
//
// Phases     for each chunk of kChunk entries of a row: the largest of each group of 32; which
//            entries are in range and above all before them, and how many of each group; append
//            those. The next chunk is loaded meanwhile. Then fill the rest, and write text length
//            and number of pivots.
// Layout     text_len (batch), pivot_idx (batch, num_heads, num_pivots) at any strides; far_keys
//            (batch, num_heads, 2 + num_pivots): text length in [0, k_len], number of pivots, the
//            pivots.
// Grid       one block per sample and head.
// Warps      kWarps; warp w has the groups w, w + kWarps, ... of a chunk, a lane for each entry.
// Smem       of each group of a chunk, its largest entry and how many of its entries count: 256
//            bytes.
// Barriers   bar_sync, two a chunk           largest of all groups; counts of all groups. What one
//                                            announces is read before the other.
// Writers    one thread writes each element of far_keys; unused entries become k_len.
// Reference  cogview_kernels.attention.layout.ThreeRegionLayout

#include "../instructions/common.cuh"
#include "key_list.cuh"
#include "three_region_attention.h"

namespace cogview {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kChunk = kWarpSize * kWarpSize;  // a lane of a warp sums up each group
constexpr int kGroups = kChunk / kThreads;     // of a warp

// Of each group of a chunk.
struct Totals {
  int largest[kWarpSize];
  int counts[kWarpSize];
};

// The result of `op` on the numbers of this lane and the lanes before it.
template <typename Op>
__device__ __forceinline__ int running(int value, Op op) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int left = shfl_idx(value, max(lane - delta, 0));
    if (lane >= delta) value = op(left, value);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads)
    three_region_attention_far_keys_kernel(const ThreeRegionFarKeysParams params) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, row = blockIdx.x;
  const int batch = divide(row, params.head_divisor), head = row - batch * params.num_heads;
  const int32_t* pivot_idx =
      params.pivot_idx + batch * params.pivot_batch_stride + head * params.pivot_head_stride;
  int32_t* far_keys = params.far_keys + int64_t(row) * (2 + params.num_pivots);
  Totals& totals = *shared_array<Totals, 1>();
  const auto larger = [](int a, int b) { return max(a, b); };
  const auto sum = [](int a, int b) { return a + b; };

  int next[kGroups];  // the thread's entries of the next chunk
  const auto load = [&](int begin) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int index = begin + g * kThreads + int(threadIdx.x);
      next[g] = index < params.num_pivots ? pivot_idx[index * params.pivot_stride] : params.k_len;
    }
  };
  load(0);
  const int text_len = min(max(params.text_len[batch * params.text_len_stride], 0), params.k_len);

  int num_pivots = 0, largest = -1;  // of the chunks so far
  for (int begin = 0; begin < params.num_pivots; begin += kChunk) {
    int pivots[kGroups], largest_here[kGroups];  // -1 where out of range; up to the lane's entry
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      pivots[g] = next[g] >= text_len && next[g] < params.k_len ? next[g] : -1;
      largest_here[g] = running(pivots[g], larger);
      if (lane == kWarpSize - 1) totals.largest[g * kWarps + warp] = largest_here[g];
    }
    load(begin + kChunk);
    bar_sync();
    const int largest_of_groups = running(totals.largest[lane], larger);
    uint32_t counts[kGroups];  // a bit for each lane
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int group = g * kWarps + warp;
      const int of_groups = shfl_idx(largest_of_groups, max(group - 1, 0));
      const int left = shfl_idx(largest_here[g], max(lane - 1, 0));
      int before = largest;
      if (group > 0) before = max(before, of_groups);
      if (lane > 0) before = max(before, left);
      counts[g] = vote_ballot(pivots[g] > before);
      if (lane == 0) totals.counts[group] = popc(counts[g]);
    }
    bar_sync();
    const int counts_of_groups = running(totals.counts[lane], sum);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int group = g * kWarps + warp;
      const int of_groups = shfl_idx(counts_of_groups, max(group - 1, 0));
      const int before = num_pivots + (group > 0 ? of_groups : 0);
      const uint32_t bit = 1u << lane;
      if (counts[g] & bit) far_keys[2 + before + popc(counts[g] & (bit - 1))] = pivots[g];
    }
    num_pivots += shfl_idx(counts_of_groups, kWarpSize - 1);
    largest = max(largest, shfl_idx(largest_of_groups, kWarpSize - 1));
  }
  for (int index = num_pivots + int(threadIdx.x); index < params.num_pivots; index += kThreads) {
    far_keys[2 + index] = params.k_len;
  }
  if (threadIdx.x < 2) far_keys[threadIdx.x] = threadIdx.x == 0 ? text_len : num_pivots;
}

}  // namespace

cudaError_t three_region_attention_far_keys(const ThreeRegionFarKeysParams& params,
                                            cudaStream_t stream) {
  const int64_t rows = int64_t(params.batch) * params.num_heads;
  if (rows == 0) return cudaSuccess;
  return launch<three_region_attention_far_keys_kernel>(rows, 1, kThreads, 0, stream, params);
}

}  // namespace cogview
