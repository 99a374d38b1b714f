// One row at a time, over exactly what it sees. Slow path; runs only for rows whose result on the
// tensor cores is NaN, or infinite where bfloat16 sums left float32.
//
// A hidden key or query has weight zero, but 0 * NaN and 0 * inf are NaN, and products beyond
// float32 are infinite. Here nothing hidden is read, and logits of finite inputs stay finite.
// A whole warp calls each function; its lanes share the columns of a row.
#pragma once

#include <cmath>

#include "../key_list.cuh"
#include "tile.cuh"

namespace cogview::sm80 {

constexpr float kLargestFloat = 3.402823466e+38f;

template <typename T>
__device__ __forceinline__ const T* row_of_head(const ConstHeads& tensor, int batch, int head,
                                                int row) {
  return reinterpret_cast<const T*>(head_of(tensor, batch, head) + row * tensor.stride.row);
}

template <typename T, int kHeadDim>
__device__ __forceinline__ float exact_dot(const T* a, const T* b) {
  const int lane = threadIdx.x % kWarpSize;
  float sum = 0.f;
#pragma unroll
  for (int d = lane; d < kHeadDim; d += kWarpSize) sum += to_float(a[d]) * to_float(b[d]);
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) sum += shfl_bfly(sum, mask);
  return sum;
}

// The logit in bits. Where it overflows though q and k are finite, it is the largest float of its
// sign; where it is inf - inf, it is the bias.
template <typename T, int kHeadDim>
__device__ __forceinline__ float exact_logit(const T* q, const T* k, float scale, float bias) {
  const float dot = exact_dot<T, kHeadDim>(q, k), logit = fmaf(dot, scale, bias);
  if (fabsf(logit) <= kLargestFloat) return logit;
  bool finite = true;
#pragma unroll
  for (int d = threadIdx.x % kWarpSize; d < kHeadDim; d += kWarpSize) {
    finite = finite && fabsf(to_float(q[d])) <= kLargestFloat;
    finite = finite && fabsf(to_float(k[d])) <= kLargestFloat;
  }
  if (vote_ballot(!finite) != 0) return logit;
  return logit != logit ? bias : fminf(fmaxf(logit, -kLargestFloat), kLargestFloat);
}

// The bias of the key at an entry, in bits.
__device__ __forceinline__ float bias_of(const ThreeRegionProblem& problem, const KeyList& list,
                                         int entry) {
  if (entry >= list.num_far) return 0.f;
  return (entry < list.num_text ? problem.text_bias : problem.pivot_bias) * kLog2e;
}

// The whole warp calls f(row) for each of its 16 * kRowTiles rows that holds a NaN. has_nan: of the
// rows of the lane's own fragments.
template <int kRowTiles, typename Function>
__device__ __forceinline__ void for_rows_with_nan(const bool (&has_nan)[kRowTiles][2], Function f) {
  bool any = false;
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) any = any || has_nan[rt][0] || has_nan[rt][1];
  if (vote_ballot(any) == 0) return;
  uint32_t rows = 0;
#pragma unroll
  for (int rt = 0; rt < kRowTiles; ++rt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t lanes = vote_ballot(has_nan[rt][half]);
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        if (lanes >> (4 * g) & 0xf) rows |= 1u << (16 * rt + 8 * half + g);
      }
    }
  }
  for (; rows != 0; rows &= rows - 1) f(popc((rows & -rows) - 1));
}

// Computes out and the statistics of the row at position i again. k_len: of its sample.
template <typename T, int kHeadDim>
__device__ __noinline__ void forward_row(const ThreeRegionForwardParams& params, int batch,
                                         int head, int i, int k_len) {
  constexpr int kPerLane = kHeadDim / kWarpSize;
  const ThreeRegionProblem& problem = params.problem;
  const int lane = threadIdx.x % kWarpSize, row = i - (k_len - problem.q_len);
  const int kv_head = head / (problem.num_heads / problem.num_kv_heads);
  FarKeys far = far_keys_of(problem, batch, kv_head);
  far.k_len = k_len;
  const int far_pivots = count_below(far.pivots, problem.num_pivots, window_start(i, problem));
  // Exactly what the row sees.
  const KeyList list = key_list_of(problem, far, i, i + 1, far_pivots);
  const T* q = row_of_head<T>(params.q, batch, head, row);
  float m = -INFINITY, l = 0.f, o[kPerLane] = {};
  for (int entry = 0; entry < list.size; ++entry) {
    const int key = list.key(entry);
    const T* v = row_of_head<T>(params.v, batch, kv_head, key);
    const float s =
        exact_logit<T, kHeadDim>(q, row_of_head<T>(params.k, batch, kv_head, key),
                                 problem.softmax_scale * kLog2e, bias_of(problem, list, entry));
    const float new_m = fmaxf(m, s);
    const float keep = m == new_m ? l : l * exp2f(m - new_m);
    const float p = s == -INFINITY ? 0.f : exp2f(s - new_m);
    m = new_m;
    l = keep + p;
    if (l != l) break;
    // o is the mean so far, so it stays within the range of v.
#pragma unroll
    for (int d = 0; d < kPerLane; ++d) {
      o[d] = l == 0.f ? 0.f : o[d] * (keep / l) + to_float(v[lane + d * kWarpSize]) * (p / l);
    }
  }
  T* out = reinterpret_cast<T*>(head_of(params.out, batch, head) + row * params.out.stride.row);
#pragma unroll
  for (int d = 0; d < kPerLane; ++d) out[lane + d * kWarpSize] = from_float<T>(l != l ? l : o[d]);
  if (lane == 0) {
    const int64_t at = (int64_t(batch) * problem.num_heads + head) * problem.q_len + row;
    params.row_max[at] = m;
    params.row_log_sum[at] = log2f(l);
  }
}

}  // namespace cogview::sm80
