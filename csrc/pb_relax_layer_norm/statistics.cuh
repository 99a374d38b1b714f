// Sums over the columns of a row, and the row's statistics.
//
// With s the power of two that brings the row's maximum to [1, 2), so that no square leaves
// float32's range and scaling is exact:
//   d = x s - rough_mean;  shift = mean(d);  var = mean(d^2) - shift^2
//   rstd = 1 / sqrt(var + eps (c s)^2);      xhat = (d - shift) rstd
// shift is the rounding error of the first mean, tiny: with it, large offsets stay exact.
#pragma once

#include <type_traits>

#include "row_pipeline.cuh"

namespace cogview {

// Reduce numbers over the threads of a row: `combine(n, a, b)` is what becomes of number n. All
// threads of the block take part, and those of a row get the same results.
// `scratch` is shared memory of kCount floats for each warp; consecutive calls use different ones.
template <int kCount, typename Combine>
__device__ __forceinline__ void reduce_row(float (&number)[kCount], float* scratch,
                                           const RowThread& me, const Combine& combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = combine(n, number[n], shfl_bfly(number[n], mask));
    }
  }
  const int num_warps = me.threads_per_row / kWarpSize;
  if (num_warps == 1) return;  // the whole block
  float* of_row = scratch + me.row_in_block * num_warps * kCount;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) of_row[me.in_row / kWarpSize * kCount + n] = number[n];
  }
  bar_sync();
#pragma unroll
  for (int n = 0; n < kCount; ++n) number[n] = of_row[n];
  for (int warp = 1; warp < num_warps; ++warp) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = combine(n, number[n], of_row[warp * kCount + n]);
    }
  }
}

struct Add {
  __device__ __forceinline__ float operator()(int, float a, float b) const { return a + b; }
};
// Number 0 is a maximum, the others are sums.
struct MaxThenAdd {
  __device__ __forceinline__ float operator()(int n, float a, float b) const {
    return n == 0 ? fmaxf(a, b) : a + b;
  }
};

constexpr float kSmallest = 1.175494351e-38f;  // normal: a constant row has no deviation to divide

// The power of two s with max|x| * s in [1, 2), as far as s itself is a normal number.
__device__ __forceinline__ float relaxing_scale(float peak, Relax relax) {
  if (!(peak > 0.f)) return 1.f;
  int exponent = min(max(ilogbf(peak), -126), 126);
  if (relax == Relax::kNone) exponent = max(exponent, -60);  // eps s^2 must stay finite
  return exp2f(float(-exponent));
}

// eps c^2 in the scaled row's units. Rows of zeros take c = 1.
__device__ __forceinline__ float scaled_epsilon(const Epsilon& eps, float peak, float scale,
                                                Relax relax) {
  const bool plain = relax == Relax::kNone || peak == 0.f;
  const float c = plain ? scale : peak * scale * 0.125f;
  return (plain ? eps.plain : eps.relaxed) * c * c;
}

// Keeps a NaN, which fmaxf would drop.
__device__ __forceinline__ float rstd_of(float variance) {
  return 1.f / sqrtf(variance < kSmallest ? kSmallest : variance);
}

// The maximum, and sums from which the mean comes before it is known how the row should be scaled:
// scaled down, as the sum could overflow, and up, for rows of denormal numbers. float16 has neither
// so large nor so small numbers that one sum would not do.
template <typename T>
struct RoughSums {
  static constexpr bool kOneSum = std::is_same_v<T, Half>;
  static constexpr float kDown = kOneSum ? 1.f : 0x1p-16f, kUp = 0x1p64f, kTiny = 0x1p-32f;
  float number[kOneSum ? 2 : 3] = {};  // max|x|, sum of x kDown, sum of x kUp

  __device__ __forceinline__ void add(const float (&x)[kColumns]) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      number[0] = fmaxf(number[0], fabsf(x[j]));
      number[1] += x[j] * kDown;
      if constexpr (!kOneSum) number[2] += x[j] * kUp;
    }
  }

  // Of a row in units of `scale`.
  __device__ __forceinline__ float sum(float scale) const {
    if constexpr (!kOneSum) {
      if (number[0] < kTiny) return number[2] * (scale / kUp);
    }
    return number[1] * (scale / kDown);
  }
};

// The rest of the statistics: sum and sum of squares of d.
struct Moments {
  float number[2] = {0.f, 0.f};
  float peak, scale, rough_mean;

  // `sums` are those of the whole row, tensor_peak is max|x| of the tensor for Relax::kTensor.
  template <typename T>
  __device__ __forceinline__ Moments(const RoughSums<T>& sums, float inverse_hidden, Relax relax,
                                     float tensor_peak) {
    peak = relax == Relax::kTensor ? tensor_peak : sums.number[0];
    scale = relaxing_scale(peak, relax);
    rough_mean = sums.sum(scale) * inverse_hidden;
  }

  // x becomes d. `count`: how many of these columns the row has.
  __device__ __forceinline__ void add(float (&x)[kColumns], int count) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[j] = x[j] * scale - rough_mean;
    if (count >= kColumns) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) add(x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (j < count) add(x[j]);
      }
    }
  }
  __device__ __forceinline__ void add(float d) {
    number[0] += d;
    number[1] += d * d;
  }

  // After `number` became those of the whole row.
  __device__ __forceinline__ RowStatistics statistics(float inverse_hidden, const Epsilon& eps,
                                                      Relax relax) const {
    const float shift = number[0] * inverse_hidden;
    const float var = fmaxf(number[1] * inverse_hidden - shift * shift, 0.f);
    return {rough_mean, shift, rstd_of(var + scaled_epsilon(eps, peak, scale, relax)), scale};
  }
};

constexpr int kMaxWarps = 32;
constexpr int kScratchFloats = 5 * kMaxWarps;  // of statistics_of_row
static_assert(kScratchFloats * sizeof(float) <= kRowArrayBytes);

// Statistics of a row of numbers of dtype T, whose columns become d.
template <typename T, int kVectors>
__device__ __forceinline__ RowStatistics statistics_of_row(float (&x)[kVectors][kColumns],
                                                           int hidden, const Epsilon& eps,
                                                           Relax relax, const float* tensor_peak,
                                                           const RowThread& me, float* scratch) {
  const float inverse_hidden = 1.f / float(hidden);
  RoughSums<T> rough;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) rough.add(x[i]);
  reduce_row(rough.number, scratch, me, MaxThenAdd());
  Moments moments(rough, inverse_hidden, relax, relax == Relax::kTensor ? *tensor_peak : 0.f);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) moments.add(x[i], hidden - me.column(i));
  reduce_row(moments.number, scratch + 3 * kMaxWarps, me, Add());
  return moments.statistics(inverse_hidden, eps, relax);
}

// d becomes LN(x).
__device__ __forceinline__ void normalise(float (&d)[kColumns], const RowStatistics& row,
                                          const float (&weight)[kColumns],
                                          const float (&bias)[kColumns]) {
  const float offset = row.shift * row.rstd;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) d[j] = (d[j] * row.rstd - offset) * weight[j] + bias[j];
}

}  // namespace cogview
