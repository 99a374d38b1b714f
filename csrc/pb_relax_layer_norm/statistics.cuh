// Sums over the columns of a row, and the row's statistics.
//
// With s the power of two that brings the row's maximum to [1, 2), so that no square leaves
// float32's range and scaling is exact:
//   d = x s - rough_mean;  shift = mean(d);  var = mean(d^2) - shift^2
//   rstd = 1 / sqrt(var + eps (c s)^2);      xhat = (d - shift) rstd
// shift is the rounding error of the first mean, tiny: with it, large offsets stay exact.
#pragma once

#include <type_traits>

#include "row_ring.cuh"

namespace cogview {

// What becomes of number n of two threads. A maximum is one of numbers that are not negative.
struct Add {
  static constexpr int kMaxima = 0, kEqualLanes = 1;
  __device__ __forceinline__ float operator()(int, float a, float b) const { return a + b; }
};
template <int kLanes>
struct MaxThenAdd {
  static constexpr int kMaxima = 1;           // number 0
  static constexpr int kEqualLanes = kLanes;  // so many neighbours have the sum of all of them
  __device__ __forceinline__ float operator()(int n, float a, float b) const {
    return n < kMaxima ? fmaxf(a, b) : a + b;
  }
};

// Reduces numbers over the threads of a row, who all get the same results.
// `scratch` is shared memory of kCount floats for each warp; consecutive calls use different ones, so
// that one barrier is enough.
template <int kCount, typename Combine>
__device__ __forceinline__ void reduce_row(float (&number)[kCount], float* scratch,
                                           const RowThread& me, const Combine& combine) {
#pragma unroll
  for (int n = 0; n < Combine::kMaxima; ++n) {
    number[n] = uint_as_float(redux_max(float_as_uint(number[n])));
  }
#pragma unroll
  for (int mask = kWarpSize / 2; mask >= Combine::kEqualLanes; mask /= 2) {
#pragma unroll
    for (int n = Combine::kMaxima; n < kCount; ++n) {
      number[n] = combine(n, number[n], shfl_bfly(number[n], mask));
    }
  }
  if (me.threads_per_row == kWarpSize) return;
  const int num_warps = me.threads_per_row / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  float* of_row = scratch + me.row_in_block * num_warps * kCount;
  if (lane == 0) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) of_row[me.in_row / kWarpSize * kCount + n] = number[n];
  }
  me.sync();
  // Lane l takes the numbers of warp l, as far as there is one.
  const int warp = lane & (me.lanes_for_warps - 1);
#pragma unroll
  for (int n = 0; n < kCount; ++n) number[n] = warp < num_warps ? of_row[warp * kCount + n] : 0.f;
#pragma unroll 1
  for (int mask = me.lanes_for_warps / 2; mask > 0; mask /= 2) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      number[n] = combine(n, number[n], shfl_bfly(number[n], mask));
    }
  }
}

constexpr float kSmallest = 1.175494351e-38f;  // normal: a constant row has no deviation to divide

// The power of two s with max|x| * s in [1, 2), as far as s itself is a normal number.
__device__ __forceinline__ float relaxing_scale(float peak, Relax relax) {
  constexpr int kBias = 127;  // of an exponent
  if (!(peak > 0.f)) return 1.f;
  int exponent = min(max(int(float_as_uint(peak) >> 23) - kBias, -126), 126);
  if (relax == Relax::kNone) exponent = max(exponent, -60);  // eps s^2 must stay finite
  return uint_as_float(uint32_t(kBias - exponent) << 23);
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
  const float var = variance < kSmallest ? kSmallest : variance;
  const float rough = rsqrt_approx(var);
  const float error = 1.f - var * rough * rough;              // one step of Newton's method
  return rough > 0.f ? rough + 0.5f * rough * error : rough;  // 0 of infinity, NaN of NaN
}

// max|x|. A NaN is passed over.
template <typename T>
struct Peak {
  uint32_t most = 0, least = 0;  // of even columns, of odd ones

  __device__ __forceinline__ void add(const Vector<T>& vector) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(vector.piece);
#pragma unroll
    for (int j = 0; j < kColumns / 2; ++j) {
      most = max_x2<T>(most, words[j]);
      least = min_x2<T>(least, words[j]);
    }
  }
  __device__ __forceinline__ float value() const {
    const T* high = reinterpret_cast<const T*>(&most);
    const T* low = reinterpret_cast<const T*>(&least);
    const float smallest = fminf(to_float(low[0]), to_float(low[1]));
    // Not -smallest, which may be -0: redux_max compares bits.
    return fmaxf(fmaxf(to_float(high[0]), to_float(high[1])), fabsf(smallest));
  }
};
template <>
struct Peak<float> {
  float largest = 0.f;

  __device__ __forceinline__ void add(const Vector<float>& vector) {
    float x[kColumns];
    unpack(vector, x);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) largest = fmaxf(largest, fabsf(x[j]));
  }
  __device__ __forceinline__ float value() const { return largest; }
};

// The sum of x times a power of two. Two sums, so that an addition need not wait for the last one.
struct ScaledSum {
  float of_even = 0.f, of_odd = 0.f;

  template <typename T>
  __device__ __forceinline__ void add(const Vector<T>& vector, float scale) {
    float x[kColumns];
    unpack(vector, x);
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      of_even += x[j] * scale;
      of_odd += x[j + 1] * scale;
    }
  }
  __device__ __forceinline__ float value() const { return of_even + of_odd; }
};

// The maximum, and the sum from which the mean comes before it is known how the row should be scaled:
// scaled down, as it could overflow. That loses a row of denormal numbers, for which a second sum,
// scaled up, is worth another pass. float16 has neither so large nor so small numbers.
//
// 16-bit numbers are added up by the tensor cores, which leaves their conversion to the second pass:
// a warp's vectors are a matrix of 16 x 16, and the other factor is constant. Tensor cores may round
// down; shift takes that back as any other error of the first mean. Whole warps call add().
template <typename T>
struct RoughSums {
  static constexpr bool kHalf = std::is_same_v<T, Half>;
  static constexpr float kDown = kHalf ? 1.f : 0x1p-16f, kUp = 0x1p64f;
  static constexpr float kTiny = kHalf ? 0.f : 0x1p-32f;  // maximum of a row with a second sum
  static constexpr int kEqualLanes = 4;                   // that share rows of the matrix
  Peak<T> peak;
  float of_rows[4] = {};  // the lane's two rows, each twice

  __device__ __forceinline__ void add(const Vector<T>& vector) {
    peak.add(vector);
    const uint4 words = vector.piece[0];
    const uint32_t down = cvt_rn_x2<T>(kDown, kDown);
    mma_m16n8k16<T>(of_rows, {words.x, words.y, words.z, words.w}, down, down);
  }
  __device__ __forceinline__ float sum() const { return of_rows[0] + of_rows[2]; }
};
template <>
struct RoughSums<float> {
  static constexpr float kDown = 0x1p-16f, kUp = 0x1p64f, kTiny = 0x1p-32f;
  static constexpr int kEqualLanes = 1;
  Peak<float> peak;
  ScaledSum scaled;

  __device__ __forceinline__ void add(const Vector<float>& vector) {
    peak.add(vector);
    scaled.add(vector, kDown);
  }
  __device__ __forceinline__ float sum() const { return scaled.value(); }
};

// The rest of the statistics: sum and sum of squares of d.
struct Moments {
  float scale, rough_mean;
  float sum[2] = {0.f, 0.f}, square[2] = {0.f, 0.f};  // of even columns, of odd ones

  __device__ __forceinline__ Moments(float scale, float rough_mean)
      : scale(scale), rough_mean(rough_mean) {}

  __device__ __forceinline__ float d(float x) const { return x * scale - rough_mean; }

  // `columns`: how many of these the row has.
  template <typename T>
  __device__ __forceinline__ void add(const Vector<T>& vector, int columns) {
    float x[kColumns];
    unpack(vector, x);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float of_column = j < columns ? d(x[j]) : 0.f;
      sum[j % 2] += of_column;
      square[j % 2] += of_column * of_column;
    }
  }
};

constexpr int kMaxWarps = 32;
constexpr int kScratchFloats = 5 * kMaxWarps;  // of statistics_of_row
static_assert(kScratchFloats * sizeof(float) <= kRowArrayBytes);

// Statistics of a row of numbers of dtype T. `rough` are those of this thread; visit(f) calls
// f(vector, columns) for each of its vectors, so many of whose columns the row has.
template <typename T, typename Visit>
__device__ __forceinline__ RowStatistics statistics_of_row(const RoughSums<T>& rough,
                                                           const Visit& visit, float inverse_hidden,
                                                           const Epsilon& eps, Relax relax,
                                                           const float* tensor_peak,
                                                           const RowThread& me, float* scratch) {
  float first[2] = {rough.peak.value(), rough.sum()};
  reduce_row(first, scratch, me, MaxThenAdd<RoughSums<T>::kEqualLanes>());
  const float peak = relax == Relax::kTensor ? *tensor_peak : first[0];
  const float scale = relaxing_scale(peak, relax);
  float mean = first[1] * scale * (inverse_hidden / RoughSums<T>::kDown);
  if (first[0] < RoughSums<T>::kTiny && first[0] > 0.f) {
    constexpr float kUp = RoughSums<T>::kUp;
    ScaledSum sum;
    visit([&](const Vector<T>& vector, int) { sum.add(vector, kUp); });
    float again[1] = {sum.value()};
    reduce_row(again, scratch + 2 * kMaxWarps, me, Add());
    mean = again[0] * (scale / kUp) * inverse_hidden;
  }
  Moments moments(scale, mean);
  visit([&](const Vector<T>& vector, int columns) { moments.add(vector, columns); });
  float second[2] = {moments.sum[0] + moments.sum[1], moments.square[0] + moments.square[1]};
  reduce_row(second, scratch + 3 * kMaxWarps, me, Add());
  const float shift = second[0] * inverse_hidden;
  const float var = fmaxf(second[1] * inverse_hidden - shift * shift, 0.f);
  return {mean, shift, rstd_of(var + scaled_epsilon(eps, peak, scale, relax)), scale};
}

// x becomes LN(x).
__device__ __forceinline__ void normalise(float (&x)[kColumns], const RowStatistics& row,
                                          const float (&weight)[kColumns],
                                          const float (&bias)[kColumns]) {
  const float offset = row.shift * row.rstd;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    const float d = x[j] * row.scale - row.rough_mean;
    x[j] = (d * row.rstd - offset) * weight[j] + bias[j];
  }
}

}  // namespace cogview
