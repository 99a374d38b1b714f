// Shared by the kernels of the backward. Math, for a query row i and a key j that it sees:
//   p  = 2^(logit - row_max - row_log_sum)         the forward's weight, from the same numbers
//   ds = p (dout v^T - delta),  delta = sum(dout * out) - dlse
//   dq = softmax_scale ds k;  dk = softmax_scale ds^T q;  dv = p^T dout
#pragma once

#include "exact.cuh"

namespace cogview::sm80 {

// The launches of three_region_attention_backward that follow delta and the bounds.
cudaError_t three_region_attention_backward_dkdv(const ThreeRegionBackwardParams& params,
                                                 cudaStream_t stream);
cudaError_t three_region_attention_backward_dq(const ThreeRegionBackwardParams& params,
                                               cudaStream_t stream);

// PB-relax: ds is rounded to the element type before two products. For float16 it is multiplied by
// 2^e first, and the products by 2^-e in float32. |ds| <= |dout_i| |v_j| + |delta_i| then stays
// below 2^15, and numbers down to 2^-28 of that bound are normal, whatever the scale of the loss.
template <typename T>
__device__ __forceinline__ int ds_exponent(const ThreeRegionBackwardParams& params, int batch,
                                           int head) {
  if constexpr (!kIsFloat16<T>) return 0;
  const ThreeRegionProblem& problem = params.problem;
  const float* bounds = reinterpret_cast<const float*>(params.bounds);
  const int64_t row = int64_t(batch) * problem.num_heads + head;
  const int kv_head = head / (problem.num_heads / problem.num_kv_heads);
  const float v = bounds[2 * int64_t(problem.batch) * problem.num_heads +
                         batch * problem.num_kv_heads + kv_head];
  const float bound = bounds[2 * row] * v + bounds[2 * row + 1];
  if (bound == 0.f) return 100;  // no gradient: any exponent, so the largest
  if (!(bound <= kLargestFloat)) return 0;
  return min(max(14 - ilogbf(bound), -100), 100);
}

// p is rounded to the element type before p^T dout. float16 has few exponents for small weights: p
// is multiplied by 2^kBackwardShift first, and the product by 2^-kBackwardShift in float32.
template <typename T>
constexpr int kBackwardShift = kIsFloat16<T> ? 15 : 0;

// Far keys in one list, so that few tiles have long loops: the text, as far as it is among the first
// kFarText keys, then the pivots.
constexpr int kFarText = 256;

struct FarList {
  FarKeys far;
  int num_text, size;

  __device__ __forceinline__ explicit FarList(const FarKeys& keys)
      : far(keys), num_text(min(keys.text_len, kFarText)), size(num_text + keys.num_pivots) {}

  __device__ __forceinline__ int key(int entry) const {
    return entry < num_text ? entry : far.pivot(entry - num_text);
  }
};

// Rows of `partial`, at least as many as there may be entries of the list.
__host__ __device__ inline int partial_rows(const ThreeRegionProblem& problem) {
  const int keys = (problem.k_len + 63) / 64 * 64;
  return (problem.num_pivots + 63) / 64 * 64 + (keys < kFarText ? keys : kFarText);
}

}  // namespace cogview::sm80
